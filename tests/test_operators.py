"""Every operator with every implementation, under every transform of torch, against brute force in float64."""

from __future__ import annotations

import pytest
import torch
from versions import OLD

from fnattn.attentions import _heads
from fnattn.testing import CHECKS, brute, check_operator
from fnattn.testing.cases import CASES, REFERENCE, modules, pairs
from fnattn.testing.operators import APART

FULL = {case.operator: case.name for case in reversed(CASES)}  # the first case of each operator is also compiled and exported
# What torch itself cannot do, whatever the operator: saved-tensor hooks under torch.func.
TORCH_LIMITS = {"grad(checkpoint(f))", "compile: grad(checkpoint(f))",
                *(("make_fx(hessian)", "compile: hessian(f)", "compile: jacfwd(f)", "compile: jacrev(f)") if OLD else ())}
COMPILED = ("compile: grad(f)", "compile: jvp(f)", "compile: vmap(grad(f))", "export", "export, free sizes")
# Plain torch, whose operations torch itself puts together under nested transforms: the first case of each operator goes through all
# of them, the others through one of each kind.
PLAIN = ("f", "grad(f)", "jvp(f)", "hessian(f)", "vmap(f), integers and masks too", "vmap(grad(f))", "grad(vmap(f))",
         "gradgradcheck: forward over reverse", "meta device")


def able(case, impl):
    names, reasons = case.implementations()
    if impl not in names:
        pytest.skip(reasons[impl].splitlines()[-2].strip())


@pytest.mark.parametrize("case, impl", pairs(), ids=lambda p: p if isinstance(p, str) else p.name)
def test_every_transform_is_right(case, impl):
    able(case, impl)
    # What a compiler makes of plain torch, and of others' operators, is tried with some transforms: with all it costs minutes.
    # "bands" is plain torch around softmax_attention, of which both are tried by themselves.
    first = FULL[case.operator] == case.name
    only = [check for check in CHECKS if impl == "native" or check not in APART or check in COMPILED]
    only = only if first or impl != REFERENCE else PLAIN
    if OLD and impl == REFERENCE:  # torch's own backward of expanded sizes that are symbols ends in an internal error
        only = [check for check in only if check != "make_fx(grad), symbolic"]
    report = check_operator(case.call(impl), case.args(), reference=case.brute(), differentiable=case.diff,
                            dynamic=case.dynamic, compile=first and impl != "bands", only=only)
    report.require()
    assert {row.check for row in report.rows if row.status == "torch"} <= TORCH_LIMITS
    # "gather" looks into the layout, which tracing hides; no tensor of the meta device can be computed with; torch's associative scan
    # would fix sizes that an exported program leaves free, and that of old versions is not compiled.
    refused = {row.check for row in report.rows if row.status == "refused"}
    assert not refused or impl == "gather" or (impl != REFERENCE and refused == {"meta device"}) or (
        impl == "associative_scan" and all(OLD or "export" in check for check in refused))


def test_every_operator_with_a_choice_of_kernels_has_cases():
    assert set(modules()) == {case.module for case in CASES}


def test_the_checks_are_as_many_as_promised():
    assert len(CHECKS) == len(set(CHECKS)) >= 63


def permuted(t):
    """The same numbers in memory of another order."""
    return t.clone() if t.ndim < 2 else t.movedim(0, -1).contiguous().movedim(-1, 0)


@pytest.mark.parametrize("case, impl", pairs(), ids=lambda p: p if isinstance(p, str) else p.name)
def test_strides_do_not_matter_in_arguments_and_gradients(case, impl):
    able(case, impl)
    args, fn = case.args(), case.call(impl)
    diff = case.diff or [i for i, a in enumerate(args) if a.is_floating_point()]
    plain = [a.clone().requires_grad_(i in diff) for i, a in enumerate(args)]
    other = [permuted(a).requires_grad_(i in diff) for i, a in enumerate(args)]
    for a in (plain, other):
        out = torch.utils._pytree.tree_leaves(fn(*a))[0]
        out.sum().backward()  # the gradient of a sum is an expanded tensor
        a.append(out)
    for i in diff:
        torch.testing.assert_close(other[i].grad, plain[i].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other[-1], plain[-1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case, impl", pairs(), ids=lambda p: p if isinstance(p, str) else p.name)
def test_nothing_is_read_from_memory_that_was_not_written(case, impl, poisoned_empty):
    able(case, impl)
    args = [a.clone().requires_grad_(a.is_floating_point()) for a in case.args()]
    outs = [o for o in torch.utils._pytree.tree_leaves(case.call(impl)(*args))]
    grads = torch.autograd.grad(sum(o.sin().sum() for o in outs), [a for a in args if a.requires_grad])
    assert all(t.isfinite().all() for t in (*outs, *grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case, impl", [(c, i) for c, i in pairs() if i != REFERENCE],
                         ids=lambda p: p if isinstance(p, str) else p.name)
def test_low_precision_errs_at_most_twice_as_much_as_plain_torch(case, impl, dtype):
    able(case, impl)
    exact = torch.utils._pytree.tree_leaves(case.brute()(*case.args()))

    def error(name):
        outs = torch.utils._pytree.tree_leaves(case.call(name)(*case.args(dtype)))
        return [(o.double() - e).abs().max().item() / e.abs().max().item() for o, e in zip(outs, exact)]

    # One rounding of the result is always allowed: plain torch may be lucky.
    for ours, plain in zip(error(impl), error(REFERENCE)):
        assert ours <= 2 * plain + torch.finfo(dtype).eps


@pytest.mark.parametrize("case, impl", pairs(), ids=lambda p: p if isinstance(p, str) else p.name)
def test_vmap_over_heads_is_the_loop(case, impl):
    able(case, impl)
    if "q" not in case.tensors:
        pytest.skip("has no heads")
    args, axis = case.args(), 1
    h, g = args[0].shape[1], args[1].shape[1]
    if h != g:
        pytest.skip("heads share a key head")
    per_head = [i for i, a in enumerate(args) if a.ndim > 1 and a.shape[axis] == h and a.is_floating_point()
                and list(case.tensors)[i] != "keep"]
    fn = case.call(impl)

    def one(*xs):
        return fn(*[x.unsqueeze(1) if i in per_head else x for i, x in enumerate(xs)])

    mapped = torch.vmap(one, in_dims=tuple(axis if i in per_head else None for i in range(len(args))))(*args)
    looped = [one(*[a[:, j] if i in per_head else a for i, a in enumerate(args)]) for j in range(h)]
    leaves = torch.utils._pytree.tree_leaves
    for m, *each in zip(leaves(mapped), *map(leaves, looped)):
        torch.testing.assert_close(m, torch.stack(each), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm, shapes", [("layer_norm", ((3, 5), (5,), (5,))), ("rms_norm", ((3, 5), (5,)))])
def test_norms_are_right_under_every_transform(norm, shapes):
    """torch's own F.layer_norm fails ten of these checks in 2.13, with wrong numbers."""
    source = torch.Generator().manual_seed(3)
    args = [torch.randn(shape, generator=source, dtype=torch.float64) for shape in shapes]
    check_operator(getattr(_heads, norm), args, reference=getattr(brute, norm), compile=False).require()
