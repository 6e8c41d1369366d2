"""The gated recurrence is what a loop over positions says, whichever way it is computed, differentiated or cut."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.native.build import why_not

from fnattn.ops.associative_scan import associative_scan
from fnattn.ops.scan import complex_times, scan

native = pytest.param("native", marks=pytest.mark.skipif(why_not("scan") is not None, reason="no C kernel here"))
IMPLS = ["reference", native]
both_impls = pytest.mark.parametrize("impl", IMPLS)
real_and_pairs = pytest.mark.parametrize("pairs", [False, True], ids=["real", "pairs"])
both_ways = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def inputs(b, n, c, pairs=False, dtype=torch.float64, seed=7):
    torch.manual_seed(seed)
    tail = (2,) if pairs else ()
    return [torch.randn(b, n, c, *tail, dtype=dtype) * 0.6, torch.randn(b, n, c, *tail, dtype=dtype),
            torch.randn(b, c, *tail, dtype=dtype)]


def loop(a, x, h0=None, *, reverse=False, pairs=False):
    times = complex_times if pairs else torch.mul
    h, out = torch.zeros_like(x[:, 0]) if h0 is None else h0, []
    steps = range(x.shape[1])
    for t in reversed(steps) if reverse else steps:
        h = times(a[:, t], h) + x[:, t]
        out.append(h)
    return torch.stack(out[::-1] if reverse else out, 1)


def gradients(fn, args, cotangent):
    args = [t.detach().clone().requires_grad_() for t in args]
    return torch.autograd.grad(fn(*args), args, cotangent)


@both_impls
@real_and_pairs
@both_ways
@pytest.mark.parametrize("n", [1, 31, 32, 33, 65, 131])
def test_values_and_gradients_are_those_of_a_loop(n, reverse, pairs, impl, poisoned_empty):
    args = inputs(2, n, 19, pairs)
    for given in (args, args[:2]):
        out = scan(*given, reverse=reverse, pairs=pairs, impl=impl)
        assert_close(out, loop(*given, reverse=reverse, pairs=pairs))
        g = torch.randn_like(out)
        ours = gradients(lambda *z: scan(*z, reverse=reverse, pairs=pairs, impl=impl), given, g)
        theirs = gradients(lambda *z: loop(*z, reverse=reverse, pairs=pairs) + 0 * z[0], given, g)
        for u, v in zip(ours, theirs):
            assert_close(u, v)


@both_impls
@both_ways
def test_more_channels_than_one_task_takes_float32_and_gates_of_zero(reverse, impl):
    a, x, h0 = inputs(2, 37, 1031, dtype=torch.float32)
    a = a * (a.abs() > 0.3)
    assert_close(scan(a, x, h0, reverse=reverse, impl=impl), loop(a, x, h0, reverse=reverse))


@both_impls
@real_and_pairs
def test_strides_and_the_gradient_of_a_sum_do_not_matter(pairs, impl):
    a, x, h0 = inputs(3, 17, 11, pairs)
    odd = [a.transpose(0, 2).contiguous().transpose(0, 2), x[:, :, :1].expand_as(x), h0.flip(1).flip(1)]
    ours = gradients(lambda *z: scan(*z, pairs=pairs, impl=impl).sum(), odd, None)
    theirs = gradients(lambda *z: loop(*z, pairs=pairs).sum(), odd, None)
    for u, v in zip(ours, theirs):
        assert_close(u, v)


@both_impls
@both_ways
@pytest.mark.parametrize("cut", [1, 32, 40])
def test_a_sequence_may_be_cut_anywhere_if_the_state_is_carried(cut, reverse, impl):
    a, x, h0 = inputs(2, 41, 5)
    whole = scan(a, x, h0, reverse=reverse, impl=impl)
    parts = [slice(None, cut), slice(cut, None)]
    for part in reversed(parts) if reverse else parts:
        h = scan(a[:, part], x[:, part], h0, reverse=reverse, impl=impl)
        assert_close(h, whole[:, part])
        h0 = h[:, 0 if reverse else -1]


@both_impls
@real_and_pairs
@both_ways
def test_first_and_second_derivatives_agree_with_differences(reverse, pairs, impl):
    args = [t.requires_grad_() for t in inputs(1, 3, 2, pairs)]

    def fn(*z):
        return scan(*z, reverse=reverse, pairs=pairs, impl=impl)

    assert torch.autograd.gradcheck(fn, args, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(fn, args, check_fwd_over_rev=True)


@both_impls
@real_and_pairs
def test_the_third_derivative_is_that_of_the_loop(pairs, impl):
    a, x, h0 = inputs(1, 5, 2, pairs)
    push = [torch.randn_like(t) for t in (a, x, h0)]

    def third(run):
        fn = lambda s: run(*(t + s * u for t, u in zip((a, x, h0), push)), pairs=pairs).square().sum()  # noqa: E731
        for _ in range(3):
            fn = torch.func.grad(fn)
        return fn(torch.zeros((), dtype=torch.float64))

    ours = third(lambda *z, pairs: scan(*z, pairs=pairs, impl=impl))
    assert_close(ours, third(loop))
    assert ours.abs() > 1


@both_impls
def test_the_tangent_is_a_difference_quotient_and_not_zero(impl):
    args = inputs(2, 67, 3)
    push = [torch.randn_like(t) for t in args]
    tangent = torch.func.jvp(lambda *z: scan(*z, impl=impl), tuple(args), tuple(push))[1]
    step = 1e-6
    ahead, behind = (scan(*(t + s * step * u for t, u in zip(args, push)), impl=impl) for s in (1, -1))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)
    assert tangent.abs().min() > 0


@both_impls
@both_ways
def test_vmap_is_a_loop_and_so_are_gradients_under_it(reverse, impl):
    a, x, _ = inputs(3, 9, 5)
    a = a * torch.linspace(0.5, 1, 4, dtype=a.dtype)[:, None, None, None]
    h0 = torch.randn(3, 5, 4, dtype=a.dtype)

    def fn(a, x, h0):
        return scan(a, x, h0, reverse=reverse, impl=impl)

    grad = torch.func.grad(lambda *z: fn(*z).square().sum(), argnums=(0, 1, 2))
    out = torch.vmap(fn, (0, None, 2))(a, x, h0)
    grads = torch.vmap(grad, (0, None, 2))(a, x, h0)
    for i in range(4):
        assert_close(out[i], fn(a[i], x, h0[..., i]))
        for u, v in zip(grads, grad(a[i], x, h0[..., i])):
            assert_close(u[i], v)


@both_impls
def test_compiled_values_gradients_and_tangents_are_the_eager_ones(impl):
    args = inputs(2, 35, 3)
    value = lambda *z: scan(*z, reverse=True, impl=impl).square().sum()  # noqa: E731
    for fn in (value, torch.func.grad(value, argnums=(0, 1, 2)),
               lambda *z: torch.func.jvp(value, z, tuple(torch.ones_like(t) for t in z))[1]):
        compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")(*args)
        for u, v in zip(*((t,) if torch.is_tensor(t) else t for t in (compiled, fn(*args)))):
            assert_close(u, v)


@both_impls
def test_float32_is_as_accurate_on_long_sequences_as_a_loop(impl):
    a, x, h0 = inputs(1, 4096, 7)
    a = torch.sigmoid(3 + a)
    exact = loop(a, x, h0)
    low = [t.float() for t in (a, x, h0)]
    plain = (loop(*low) - exact).abs().max()
    assert (scan(*low, impl=impl) - exact).abs().max() <= 2 * plain


def test_kernel_and_reference_agree_in_bfloat16_and_keep_the_dtype():
    a, x, h0 = (t.bfloat16() for t in inputs(2, 70, 5))
    out = scan(a, x, h0)
    assert out.dtype == torch.bfloat16
    assert_close(out, loop(a.double(), x.double(), h0.double()), torch.bfloat16)


@both_impls
def test_empty_sequences_batches_and_channels_give_empty_results(impl):
    for shape in ((2, 0, 3), (0, 4, 3), (2, 4, 0)):
        x = torch.randn(shape, requires_grad=True)
        h0 = torch.randn(shape[0], shape[2], requires_grad=True)
        out = scan(x, x, h0, impl=impl)
        assert out.shape == shape
        assert [g.shape for g in torch.autograd.grad(out.sum(), (x, h0), allow_unused=True) if g is not None][0] == shape


def test_errors_name_the_argument_and_a_remedy():
    a, x, h0 = inputs(2, 5, 3)
    for call, match in ((lambda: scan(a[0], x), "a must be"), (lambda: scan(a, x[:, :4]), "one shape"),
                        (lambda: scan(a, x, h0[:1]), "h0 must be"), (lambda: scan(a, x, pairs=True), "a must be"),
                        (lambda: scan(a, x, impl="gpu"), "impl must be one of")):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="real floating"):
        scan(a.to(torch.complex128), x)
    with pytest.raises(KernelUnavailable, match="needs CUDA tensors, got cpu"):
        scan(a, x, impl="triton")


# ------------------------------------------------------------------------------------------------ any operation


@both_ways
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 37])
def test_associative_scan_runs_any_operation_over_trees(n, reverse):
    a, x, _ = inputs(2, n, 3)

    def op(earlier, later):
        return {"a": later["a"] * earlier["a"], "x": later["a"] * earlier["x"] + later["x"]}

    out = associative_scan(op, {"a": a, "x": x}, reverse=reverse)
    assert_close(out["x"], loop(a, x, reverse=reverse))
    assert_close(associative_scan(torch.add, x.movedim(1, -1), reverse=reverse, axis=-1).movedim(-1, 1),
                 loop(torch.ones_like(a), x, reverse=reverse))


def test_associative_scan_keeps_the_order_of_an_operation_that_does_not_commute():
    torch.manual_seed(3)
    m = torch.randn(13, 2, 2, dtype=torch.float64) / 2
    out = associative_scan(lambda p, q: p @ q, m, axis=0)
    expected = m[0]
    for t in range(1, 13):
        expected = expected @ m[t]
        assert_close(out[t], expected)


def test_associative_scan_composes_with_grad_vmap_and_compile():
    x = inputs(3, 11, 2)[1]
    fn = torch.func.grad(lambda x: associative_scan(torch.mul, x, axis=0).sum())
    expected = torch.stack([torch.func.grad(lambda x: x.cumprod(0).sum())(t) for t in x])
    assert_close(torch.vmap(fn)(x), expected)
    assert_close(torch.compile(torch.vmap(fn), fullgraph=True, backend="aot_eager")(x), expected)


def test_associative_scan_refuses_what_has_no_length():
    for elems in ((), torch.zeros(2, 0, 3), (torch.zeros(2, 3), torch.zeros(2, 4))):
        with pytest.raises(ValueError, match="one length >= 1"):
            associative_scan(torch.add, elems)
