"""The gated loops are what a loop over positions in complex numbers says, whichever way they are computed or cut."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.native.build import why_not

from fnattn.ops.gate_loop import combine, gate_loop, simple_gate_loop
from fnattn.ops.gate_loop.reference import gate

native = pytest.param("native", marks=pytest.mark.skipif(why_not("gate_loop") is not None, reason="no C kernel here"))
both_impls = pytest.mark.parametrize("impl", ["reference", native])
both_ways = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
LENGTHS = [1, 31, 63, 64, 65, 131]
WIDTHS = [(1, 1), (3, 2), (17, 5), (1, 7), (33, 40)]


def inputs(b, h, n, d, e, dtype=torch.float64, seed=11):
    torch.manual_seed(seed)
    return [torch.randn(*shape, dtype=dtype) for shape in (
        (b, h, n, d), (b, h, n, d), (b, h, n, e), (b, h, n, 2), (b, h, d, e, 2), (b, h, 2))]


def simple_inputs(b, n, c, dtype=torch.float64, seed=13):
    torch.manual_seed(seed)
    return [torch.randn(*shape, dtype=dtype) for shape in ((b, n, c), (b, n, c), (b, n, c), (b, c))]


def run(q, k, v, a, h, p, impl):
    out, state = gate_loop(q, k, v, a, state=(h, p), impl=impl)
    return (out, *state)


def loop(q, k, v, a, h, p):
    """The definition, in complex numbers and with an angle."""
    a, h, p = (torch.view_as_complex(t.contiguous()) for t in (a, h, p))
    alpha, outs = torch.polar(torch.sigmoid(a.abs()), a.angle()), []
    for t in range(q.shape[2]):
        h = alpha[:, :, t, None, None] * h + k[:, :, t, :, None] * v[:, :, t, None]
        p = p * alpha[:, :, t]
        outs.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], h.real))
    return torch.stack(outs, 2), torch.view_as_real(h), torch.view_as_real(p)


def simple_loop(q, kv, a, h, *, reverse=False):
    outs, steps = [], range(q.shape[1])
    for t in reversed(steps) if reverse else steps:
        h = torch.sigmoid(a[:, t]) * h + kv[:, t]
        outs.append(q[:, t] * h)
    return torch.stack(outs[::-1] if reverse else outs, 1), h


def alone(fn, args, which, i):
    """Gradient for argument i of the squared result number `which`."""
    return torch.func.grad(lambda x: fn(*args[:i], x, *args[i + 1 :])[which].square().sum())(args[i])


def sum_gradients(fn, args):
    return torch.func.grad(lambda *z: fn(*z)[0].sum(), argnums=tuple(range(5)))(*args)


def assert_same_values_and_gradients(ours, theirs, args, cotangents=None):
    args = [t.detach().requires_grad_() for t in args]
    out, expected = ours(*args), theirs(*args)
    cotangents = cotangents or [torch.randn_like(t) for t in out]
    for u, v in zip(out, expected):
        assert_close(u, v)
    for u, v in zip(torch.autograd.grad(out, args, cotangents), torch.autograd.grad(expected, args, cotangents)):
        assert_close(u, v)


@both_impls
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("d, e", WIDTHS)
def test_values_and_gradients_are_those_of_a_complex_loop(n, d, e, impl, poisoned_empty):
    args = inputs(2, 3, n, d, e)
    assert_same_values_and_gradients(lambda *z: run(*z, impl), loop, args)


@both_impls
@both_ways
@pytest.mark.parametrize("n", LENGTHS)
def test_the_simple_loop_is_a_loop(n, reverse, impl, poisoned_empty):
    assert_same_values_and_gradients(lambda *z: simple_gate_loop(*z, reverse=reverse, impl=impl),
                                     lambda *z: simple_loop(*z, reverse=reverse), simple_inputs(2, n, 19))


@both_impls
def test_more_channels_than_one_task_takes(impl):
    assert_same_values_and_gradients(lambda *z: run(*z, impl), loop, inputs(1, 521, 34, 1, 1))
    assert_same_values_and_gradients(lambda *z: simple_gate_loop(*z, impl=impl), simple_loop, simple_inputs(1, 34, 521))


@both_impls
@pytest.mark.parametrize("d, e", [(1, 1), (16, 16), (5, 18)])
def test_float32_agrees_with_float64(d, e, impl):
    args = inputs(1, 2, 131, d, e)
    low = [t.float() for t in args]
    for u, v in zip(run(*low, impl), loop(*args)):
        assert_close(u, v.float(), torch.float32)
    grads = [torch.func.grad(lambda *z: sum(t.double().square().sum() for t in run(*z, impl)), argnums=tuple(range(6)))(*t)
             for t in (low, args)]
    for u, v in zip(*grads):
        assert (u - v).abs().max() <= 1e-5 * v.abs().max()


@both_impls
@pytest.mark.parametrize("d, e", [(1, 1), (3, 5)])
def test_without_a_state_it_starts_at_zero_and_partial_gradients_work(d, e, impl):
    q, k, v, a, h, p = inputs(2, 3, 67, d, e)
    out, state = gate_loop(q, k, v, a, impl=impl)
    one = torch.tensor([1.0, 0.0], dtype=p.dtype).expand_as(p)
    for u, w in zip((out, *state), loop(q, k, v, a, 0 * h, one)):
        assert_close(u, w)
    args = (q, k, v, a, h, p)
    for which in range(3):  # the gradient of one result alone, for one argument alone
        for i in (0, 3):
            ours, theirs = (alone(fn, args, which, i) for fn in (lambda *z: run(*z, impl), loop))
            assert_close(ours, theirs)


@both_impls
@pytest.mark.parametrize("d, e", [(1, 1), (3, 5)])
def test_strides_key_heads_and_the_gradient_of_a_sum_do_not_matter(d, e, impl):
    q, k, v, a, h, p = inputs(2, 4, 35, d, e)
    packed = torch.randn(2, 35, 3 * 4 * d, dtype=q.dtype)
    q = packed[..., : 4 * d].unflatten(-1, (4, d)).transpose(1, 2)
    args = [q, k[:, :2], v[:, :2], a[:, :, :1].expand_as(a), h.flip(3), p[:, :1].expand_as(p)]

    def theirs(q, k, v, *rest):
        return loop(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), *rest)

    grads = [sum_gradients(fn, args) for fn in (lambda *z: run(*z, impl), theirs)]
    for u, w in zip(*grads):
        assert_close(u, w)


@both_impls
@pytest.mark.parametrize("d, e", [(1, 1), (3, 5)])
@pytest.mark.parametrize("cut", [1, 32, 64, 90])
def test_a_sequence_may_be_cut_anywhere_and_stretches_combine(cut, d, e, impl):
    q, k, v, a, *state = inputs(2, 3, 97, d, e)
    whole = run(q, k, v, a, *state, impl)
    first, middle = gate_loop(*(t[:, :, :cut] for t in (q, k, v, a)), state=tuple(state), impl=impl)
    second, last = gate_loop(*(t[:, :, cut:] for t in (q, k, v, a)), state=middle, impl=impl)
    alone = gate_loop(*(t[:, :, cut:] for t in (q, k, v, a)), impl=impl)[1]
    assert_close(torch.cat((first, second), 2), whole[0])
    for u, w, x in zip(last, combine(middle, alone), whole[1:]):
        assert_close(u, x)
        assert_close(w, x)


@both_impls
@both_ways
def test_the_simple_loop_may_be_cut_anywhere(reverse, impl):
    q, kv, a, h = simple_inputs(2, 71, 5)
    whole, end = simple_gate_loop(q, kv, a, h, reverse=reverse, impl=impl)
    parts = [slice(None, 33), slice(33, None)]
    for part in reversed(parts) if reverse else parts:
        out, h = simple_gate_loop(q[:, part], kv[:, part], a[:, part], h, reverse=reverse, impl=impl)
        assert_close(out, whole[:, part])
    assert_close(h, end)


def test_the_gate_is_a_sigmoid_with_a_phase_at_every_size():
    phase = torch.linspace(-3, 3, 7, dtype=torch.float64)
    for size in (1e-30, 1e-20, 1e-6, 1.0, 30.0, 1e20, 1e38):
        for dtype in (torch.float64, torch.float32):
            a = torch.view_as_real(torch.polar(torch.full_like(phase, size), phase)).to(dtype)
            expected = torch.view_as_real(torch.polar(torch.sigmoid(torch.full_like(phase, size)), phase))
            assert_close(gate(a), expected.to(dtype))


@both_impls
@pytest.mark.parametrize("d, e", [(1, 1), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_of_any_size_give_the_loop_s_values_and_finite_gradients(dtype, d, e, impl):
    q, k, v, a, h, p = inputs(1, 2, 70, d, e, dtype)
    a = a * torch.tensor([0.0, 1e-35, 1e-28, 1e-18, 1e-3, 20.0, 90.0, 800.0, 1e20, 1e38], dtype=dtype).repeat(7)[:, None]
    args = (q, k, v, a, h, p)
    exact = [t.double() for t in args]
    exact[3] = torch.where(exact[3].abs() < 1e-31, 0.0, exact[3])
    for u, w in zip(run(*args, impl), loop(*exact)):
        assert_close(u, w.to(dtype), dtype)
    out, pull = torch.func.vjp(lambda *z: run(*z, impl), *args)
    grads = pull(tuple(torch.ones_like(t) for t in out))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[3].flatten(0, 1)[:, ::10] == 0).all() and grads[3].abs().max() > 0


@both_impls
@pytest.mark.parametrize("d, e", [(1, 1), (2, 3)])
def test_a_gate_of_zero_is_one_half_and_has_no_derivative_of_any_order_or_mode(d, e, impl):
    q, k, v, a, h, p = inputs(1, 2, 5, d, e)
    zero = torch.zeros_like(a)
    out = run(q, k, v, zero, h, p, impl)
    assert_close(out[2], p / 32)

    def value(a, q):
        return sum(t.square().sum() for t in run(q, k, v, a, h, p, impl))

    assert (torch.func.grad(value)(zero, q) == 0).all()
    assert (torch.func.jvp(lambda a: value(a, q), (zero,), (a,))[1] == 0).all()
    hessian = torch.func.jvp(torch.func.grad(value, argnums=(0, 1)), (zero, q), (a, torch.randn_like(q)))[1]
    twice = torch.func.grad(lambda a: torch.func.grad(value, 1)(a, q).square().sum())(zero)
    assert (hessian[0] == 0).all() and (twice == 0).all() and hessian[1].isfinite().all() and (hessian[1] != 0).all()


@both_impls
@pytest.mark.parametrize("d, e", [(1, 1), (2, 3)])
def test_first_and_second_derivatives_agree_with_differences(d, e, impl):
    args = [t.requires_grad_() for t in inputs(1, 1, 3, d, e)]
    fn = lambda *z: run(*z, impl)  # noqa: E731
    assert torch.autograd.gradcheck(fn, args, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(fn, args, check_fwd_over_rev=True)


@both_impls
@both_ways
def test_derivatives_of_the_simple_loop_agree_with_differences(reverse, impl):
    args = [t.requires_grad_() for t in simple_inputs(1, 3, 2)]
    fn = lambda *z: simple_gate_loop(*z, reverse=reverse, impl=impl)  # noqa: E731
    assert torch.autograd.gradcheck(fn, args, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(fn, args, check_fwd_over_rev=True)


def every_case():
    yield "narrow", run, loop, inputs(2, 3, 67, 1, 1)
    yield "wide", run, loop, inputs(2, 2, 67, 3, 5)
    yield "simple", lambda *z: simple_gate_loop(*z[:-1], impl=z[-1]), simple_loop, simple_inputs(2, 67, 3)
    yield ("simple reverse", lambda *z: simple_gate_loop(*z[:-1], reverse=True, impl=z[-1]),
           lambda *z: simple_loop(*z, reverse=True), simple_inputs(2, 67, 3))


def cases(count):
    chosen = list(every_case())[:count]
    return pytest.mark.parametrize("ours, theirs, args", [c[1:] for c in chosen], ids=[c[0] for c in chosen])


all_cases, one_direction = cases(4), cases(3)


def first_positions(args, n):
    return [(t[:, :, :n] if t.ndim > 2 and t.shape[2] == 67 else t[:, :n] if t.shape[1] == 67 else t).contiguous() for t in args]


@both_impls
@all_cases
def test_tangents_and_hessian_products_are_those_of_the_loop_and_not_zero(ours, theirs, args, impl):
    push = [torch.randn_like(t) for t in args]

    def value(fn):
        return lambda *z: sum((t * t.roll(1, 1)).sum() for t in fn(*z))

    fn = lambda *z: ours(*z, impl)  # noqa: E731
    for which in range(len(args)):  # one tangent alone, all others absent
        part = lambda run: (lambda x: run(*args[:which], x, *args[which + 1 :]))  # noqa: E731, B023
        for u, v in zip(*(torch.func.jvp(part(f), (args[which],), (push[which],))[1] for f in (fn, theirs))):
            assert_close(u, v)
    for u, v in zip(*(torch.func.jvp(f, tuple(args), tuple(push))[1] for f in (fn, theirs))):
        assert_close(u, v)
        assert (u != 0).all()
    where = tuple(range(len(args)))
    over = [torch.func.jvp(torch.func.grad(value(f), argnums=where), tuple(args), tuple(push))[1] for f in (fn, theirs)]
    back = torch.func.grad(lambda *z: sum((g * u).sum() for g, u in zip(torch.func.grad(value(fn), argnums=where)(*z), push)),
                           argnums=where)(*args)
    for u, v, w in zip(*over, back):
        assert_close(u, v)
        assert_close(w, v)


@both_impls
@one_direction
def test_third_derivatives_in_mixed_modes_are_those_of_the_loop(ours, theirs, args, impl):
    args = first_positions(args, 35 if impl == "native" else 5)
    push = [torch.randn_like(t) for t in args]
    jvp, grad = torch.func.jvp, torch.func.grad

    def along(fn):
        return lambda s: jvp(fn, (s,), (torch.ones_like(s),))[1]

    results = []
    for run in (lambda *z: ours(*z, impl), theirs):
        line = lambda s: sum((t * t.roll(1, 1)).sum() for t in run(*(x + s * u for x, u in zip(args, push))))  # noqa: B023, E731
        modes = (grad(along(along(line))), along(grad(along(line))), along(along(grad(line))), grad(grad(along(line))),
                 grad(along(grad(line))), along(grad(grad(line))), along(along(along(line))))
        results.append([mode(torch.zeros((), dtype=torch.float64)) for mode in modes])
    for u, v in zip(*results):
        assert_close(u, v)
        assert_close(u, results[0][0])
        assert u != 0


@both_impls
@all_cases
def test_vmap_is_a_loop_and_so_are_gradients_under_it(ours, theirs, args, impl):
    args = first_positions(args, 9)
    fn = lambda *z: ours(*z, impl)  # noqa: E731
    grad = torch.func.grad(lambda *z: sum(t.square().sum() for t in fn(*z)), argnums=(0, 2))
    first = torch.stack([args[0], 2 * args[0], -args[0]], 2)
    dims = (2, *(None for _ in args[1:]))
    values, grads = torch.vmap(fn, dims)(first, *args[1:]), torch.vmap(grad, dims)(first, *args[1:])
    for i in range(3):
        for u, v in zip((*values, *grads), (*fn(first.select(2, i), *args[1:]), *grad(first.select(2, i), *args[1:]))):
            assert_close(u[i], v)


@both_impls
@one_direction
def test_compiled_gradients_and_tangents_are_the_eager_ones(ours, theirs, args, impl):
    args = first_positions(args, 5)

    def value(*z):
        return sum(t.square().sum() for t in ours(*z, impl))

    for fn in (torch.func.grad(value, argnums=(0, 2)),
               lambda *z: torch.func.jvp(value, z, tuple(torch.ones_like(t) for t in z))):
        for u, v in zip(torch.compile(fn, fullgraph=True, backend="aot_eager")(*args), fn(*args)):
            assert_close(u, v)


@pytest.mark.parametrize("d, e", [(1, 1), (16, 16)])
def test_long_sequences_in_float32_are_as_accurate_as_plain_torch(d, e):
    if why_not("gate_loop"):
        pytest.skip("no C kernel here")
    args = [*inputs(1, 2, 4096, d, e)[:3], torch.randn(1, 2, 4096, 2, dtype=torch.float64) * 4]

    def results(args, impl):
        out, pull = torch.func.vjp(lambda *z: gate_loop(*z, impl=impl)[0], *args)
        return out, *pull(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).sin().view(out.shape))

    exact = results(args, "reference")
    low = [t.float() for t in args]
    for u, plain, true in zip(results(low, "native"), results(low, "reference"), exact):
        assert (u - true).abs().max() <= 2 * (plain - true).abs().max()


def test_bfloat16_is_computed_in_float32_and_returned_in_bfloat16():
    for d, e in ((1, 1), (3, 5)):
        args = [t.bfloat16() for t in inputs(2, 3, 70, d, e)[:4]]
        out, state = gate_loop(*args)
        assert out.dtype == torch.bfloat16 and state.H.dtype == state.A.dtype == torch.float32
        assert_close(out, gate_loop(*(t.double() for t in args))[0].bfloat16(), torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(gate_loop(*(t.float() for t in args))[0], gate_loop(*(t.double() for t in args))[0].float())
    args = [t.bfloat16() for t in simple_inputs(2, 70, 5)]
    out, last = simple_gate_loop(*args)
    assert out.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert_close(out, simple_loop(*(t.double() for t in args))[0].bfloat16(), torch.bfloat16)


@both_impls
def test_threads_change_no_bit(impl):
    cases = [lambda: run(*inputs(3, 4, 131, 1, 1), impl), lambda: run(*inputs(3, 2, 131, 17, 17), impl)]
    for case in cases:
        one = case()
        torch.set_num_threads(2)
        try:
            two = case()
        finally:
            torch.set_num_threads(1)
        assert all(torch.equal(u, v) for u, v in zip(one, two)) or impl == "reference"


@both_impls
@pytest.mark.parametrize("d, e", [(1, 1), (3, 5)])
def test_empty_sequences_and_batches_pass_the_state_on(d, e, impl):
    q, k, v, a, h, p = inputs(2, 3, 0, d, e)
    out, state = gate_loop(q, k, v, a, state=(h, p), impl=impl)
    assert out.shape == (2, 3, 0, e)
    assert_close(state.H, h)
    assert_close(state.A, p)
    out, state = gate_loop(*(t[:0] for t in inputs(2, 3, 4, d, e)[:4]), impl=impl)
    assert out.shape == (0, 3, 4, e) and state.H.shape == (0, 3, d, e, 2)
    out, last = simple_gate_loop(*simple_inputs(2, 0, 3), impl=impl)
    assert out.shape == (2, 0, 3)
    assert_close(last, simple_inputs(2, 0, 3)[3])


def test_errors_name_the_argument_and_a_remedy():
    q, k, v, a, h, p = inputs(2, 3, 4, 3, 5)
    wrong = {
        "one length": lambda: gate_loop(q, k[:, :, :3], v[:, :, :3], a),
        "a must be": lambda: gate_loop(q, k, v, a[..., 0]),
        "state H must be": lambda: gate_loop(q, k, v, a, state=(h[..., 0], p)),
        r"state must be \(H, A\)": lambda: gate_loop(q, k, v, a, state=(h,)),
        "expected q, kv, a": lambda: simple_gate_loop(q, k, v),
        "impl must be one of": lambda: gate_loop(q, k, v, a, impl="gpu"),
    }
    for match, call in wrong.items():
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="view_as_real"):
        gate_loop(q, k, v, torch.view_as_complex(a))
    with pytest.raises(KernelUnavailable, match="needs CUDA tensors, got cpu"):
        gate_loop(q, k, v, a, impl="triton")
