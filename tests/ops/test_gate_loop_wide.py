"""gate_loop by C: second derivatives of wide heads against brute force, value and tangent in one, threads that share a head."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.native import gate_loop as native
from fnattn_kernels.native import gate_loop_tangent as native_tangent
from fnattn_kernels.native import scan as native_scan
from fnattn_kernels.native.build import why_not

from fnattn.ops import causal_dot
from fnattn.ops.gate_loop import gate_loop
from fnattn.ops.gate_loop.complex import GateLoopState

pytestmark = pytest.mark.skipif(why_not("gate_loop") is not None, reason="no C kernel here")


def inputs(b, h, n, d, e, dtype=torch.float64, seed=17):
    torch.manual_seed(seed)
    shapes = (b, h, n, d), (b, h, n, d), (b, h, n, e), (b, h, n, 2), (b, h, d, e, 2), (b, h, 2)
    return tuple(torch.randn(*shape, dtype=dtype) for shape in shapes)


def loop(q, k, v, a, h, p):
    """The definition with an angle: complex numbers, one position at a time."""
    a, h, p = (torch.view_as_complex(t.contiguous()) for t in (a, h, p))
    alpha, outs = torch.polar(torch.sigmoid(a.abs()), a.angle()), []
    for t in range(q.shape[2]):
        h = alpha[:, :, t, None, None] * h + k[:, :, t, :, None] * v[:, :, t, None]
        p = p * alpha[:, :, t]
        outs.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], h.real))
    return torch.stack(outs, 2), torch.view_as_real(h), torch.view_as_real(p)


def ours(q, k, v, a, h, p):
    out, state = gate_loop(q, k, v, a, state=GateLoopState(h, p), impl="native")
    return out, *state


def weighted(fn, weights):
    """A number that is nonlinear in the results whose weight is given."""
    def value(*args):
        return sum((w * t * t).sum() for w, t in zip(weights, fn(*args)) if w is not None)
    return value


def hessian_product(fn, weights, args, push, which):
    """Tangents of all gradients when the arguments in `which` move."""
    def gradients(*moved):
        full = list(args)
        for i, t in zip(which, moved):
            full[i] = t
        return torch.func.grad(weighted(fn, weights), argnums=tuple(range(6)))(*full)

    return torch.func.jvp(gradients, tuple(args[i] for i in which), tuple(push[i] for i in which))[1]


SIZES = [(1, 2, 3), (63, 17, 5), (64, 3, 19), (67, 33, 34), (131, 5, 2)]


@pytest.mark.parametrize("n, d, e", SIZES)
@pytest.mark.parametrize("seen", [(0, 1, 2), (0,), (1,), (2,)], ids=["all", "out", "state", "product"])
def test_hessian_products_are_those_of_the_complex_loop(n, d, e, seen, poisoned_empty):
    args = inputs(1, 2, n, d, e)
    push = [torch.randn_like(t) for t in args]
    weights = [torch.randn_like(t) if i in seen else None for i, t in enumerate(loop(*args))]
    found, true = (hessian_product(fn, weights, args, push, range(6)) for fn in (ours, loop))
    for i, (u, v) in enumerate(zip(found, true)):
        size = v.abs().max().clamp(min=1.0)  # entries of hundreds meet in sums whose result may be near 0
        assert_close(u / size, v / size)
        if seen == (0, 1, 2):
            assert (v != 0).all(), i


@pytest.mark.parametrize("moved", range(5), ids=["q", "k", "v", "a", "h0"])
def test_one_argument_that_moves_alone_and_the_transposed_derivative(moved):
    args = inputs(2, 1, 70, 5, 18)
    push = [torch.randn_like(t) for t in args]
    weights = [torch.randn_like(t) for t in loop(*args)]
    found, true = (hessian_product(fn, weights, args, push, (moved,)) for fn in (ours, loop))
    grad = torch.func.grad(weighted(ours, weights), argnums=moved)
    back = torch.func.grad(lambda *z: (grad(*z) * push[moved]).sum(), argnums=tuple(range(6)))(*args)
    for i, (u, v, w) in enumerate(zip(found, true, back)):
        assert_close(u, v)
        assert_close(w, v)
        assert (v != 0).any() or (i == 5 and moved != 3)  # only the gates meet the product of earlier ones


def test_the_backward_operator_moves_with_each_of_its_own_cotangents():
    q, k, v, a, h, _ = inputs(1, 2, 67, 3, 20)
    given = [torch.randn(1, 2, 67, 20, dtype=q.dtype), torch.randn_like(h), torch.randn(1, 2, 2, dtype=q.dtype)]
    push = [torch.randn_like(t) for t in given]

    def backward(*cotangents):
        return native.wide_backward(q, k, v, a, h, *cotangents)

    for i in range(3):  # it is linear in them
        alone = [p if j == i else torch.zeros_like(p) for j, p in enumerate(push)]
        for u, w in zip(torch.func.jvp(backward, tuple(given), tuple(alone))[1], backward(*alone)):
            assert_close(u, w)
        assert (backward(*alone)[3] != 0).all()
        cotangents = [torch.randn_like(t) for t in backward(*given)]
        (pulled,) = torch.func.vjp(lambda x: backward(*given[:i], x, *given[i + 1 :]), given[i])[1](tuple(cotangents))  # noqa: B023
        assert_close((pulled * push[i]).sum(), sum((c * t).sum() for c, t in zip(cotangents, backward(*alone))))
        assert (pulled != 0).all()


def test_third_derivatives_agree_with_the_complex_loop():
    args = inputs(1, 1, 66, 2, 3)
    push = [torch.randn_like(t) for t in args]
    weights = [torch.randn_like(t) for t in loop(*args)]
    results = []
    for fn in (ours, loop):
        product = lambda *z: sum((u * u).sum() for u in hessian_product(fn, weights, z, push, range(4)))  # noqa: B023, E731
        results.append((*torch.func.grad(product, argnums=(0, 1, 2, 3))(*args), torch.func.jvp(product, args, tuple(push))[1]))
    for u, v in zip(*results):
        assert_close(u, v)
        assert (u != 0).all()


@pytest.mark.parametrize("n, d, e", [(63, 17, 5), (131, 3, 19)])
def test_value_and_tangent_in_one_pass_are_those_of_two(n, d, e):
    q, k, v, a, h, _ = inputs(2, 1, n, d, e)
    moves = [torch.randn_like(t) for t in (q, k, v, a, h)]
    for some in (range(5), (0,), (1,), (2,), (3,), (4,)):
        push = [t if i in some else None for i, t in enumerate(moves)]
        both = native_tangent.wide_both(q, k, v, a, h, *push)
        out, last, logs = native_tangent.wide(q, k, v, a, h, *push)
        product = torch.view_as_complex(native.wide(q, k, v, a, h)[2])
        for u, w in zip(both, (*native.wide(q, k, v, a, h), out, last, torch.view_as_real(product * torch.view_as_complex(logs)))):
            assert_close(u, w)
        assert (both[3] != 0).any()


@pytest.mark.parametrize("n, d, e", [(63, 17, 5), (131, 3, 19)])
@pytest.mark.parametrize("given", [(0, 1, 2), (0,), (1,), (2,), ()], ids=["all", "out", "state", "product", "none"])
def test_gradient_and_its_tangent_in_one_pass_are_those_of_two(n, d, e, given):
    q, k, v, a, h, p = inputs(2, 1, n, d, e)
    grads = [t if i in given else None for i, t in enumerate((v.sin(), h.cos(), p))]
    for state in (h, None):
        moves = [None if t is None else torch.randn_like(t) for t in (q, k, v, a, state, *grads)]
        args = q, k, v, a, state, *grads
        both = native_tangent.wide_backward_both(*args, *moves)
        for u, w in zip(both, (*native.wide_backward(*args), *native_tangent.wide_hessian(*args, *moves))):
            assert_close(u, w)
            assert given != (0, 1, 2) or (w != 0).any()


def test_gates_of_any_size_give_finite_second_derivatives():
    args = list(inputs(1, 2, 70, 3, 5, torch.float32))
    size = torch.tensor([0.0, 1e-35, 1e-28, 1e-18, 1e-3, 20.0, 90.0, 800.0, 1e20, 1e38]).repeat(7)[:, None]
    args[3] = args[3] * size
    found = hessian_product(ours, [torch.ones(()), None, None], args, [torch.randn_like(t) for t in args], (0, 1, 2))
    assert all(t.isfinite().all() for t in found)
    assert (found[3].flatten(0, 1)[:, ::10] == 0).all() and (found[3].flatten(0, 1)[:, 5::10] != 0).all()


def with_threads(count, fn):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return fn()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("b, h, n, d, e", [(1, 1, 131, 64, 64), (1, 2, 193, 40, 70), (1, 1, 2113, 16, 17), (2, 2, 131, 17, 33)])
def test_threads_that_share_a_head_give_the_same_bits(b, h, n, d, e, dtype):
    q, k, v, a, state, _ = inputs(b, h, n, d, e, dtype)
    g, g_last, g_product = torch.randn_like(v), torch.randn_like(state), torch.randn(b, h, 2, dtype=dtype)
    moves = [torch.randn_like(t) for t in (q, k, v, a, state)]

    def every():
        return (*native.wide(q, k, v, a, None), *native.wide(q, k, v, a, state), *native.wide_backward(q, k, v, a, None, g, None, None),
                *native.wide_backward(q, k, v, a, state, g, g_last, g_product), *native_tangent.wide(q, k, v, a, state, *moves))

    one = with_threads(1, every)
    for count in (2, 3, 5):
        assert all(torch.equal(u, v) for u, v in zip(one, with_threads(count, every))), count


@pytest.mark.skipif(why_not("causal_dot") is not None, reason="no C kernel here")
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("h, g", [(1, 1), (2, 1), (4, 2)])
def test_threads_that_share_a_head_of_causal_dot_give_the_same_bits(h, g, reverse):
    torch.manual_seed(19)
    q, k, v = (torch.randn(1, heads, 211, width, dtype=torch.float64) for heads, width in ((h, 33), (g, 33), (g, 67)))

    def every():
        out, pull = torch.func.vjp(lambda *z: causal_dot(*z, reverse=reverse, impl="native"), q, k, v)
        return out, *pull(out.sin())

    one = with_threads(1, every)
    assert_close(one[0], causal_dot(q, k, v, reverse=reverse, impl="reference"))
    for count in (2, 3, 7):
        assert all(torch.equal(u, v) for u, v in zip(one, with_threads(count, every))), count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("b, c", [(1, 139), (2, 521)])
def test_threads_that_share_a_sequence_of_channels_give_the_same_bits(b, c, dtype):
    torch.manual_seed(23)
    q, k, v, a, h, g, m = (torch.randn(b, *shape, dtype=dtype) for shape in ((97, c),) * 3 + ((97, c, 2), (c, 2), (97, c), (97, c, 2)))

    def every():
        out, last, product, marks = native.narrow(q, k, v, a, h)
        return (out, last, product, *native.narrow_backward(q, k, v, a, h, marks, product, g, None, None),
                *native_tangent.narrow(q, k, v, a, h, g, None, None, m, None)[:3], native.simple(q, k, v, None, True)[0],
                native_scan.scan(a, m, h, False, True, False, False))

    one = with_threads(1, every)
    for count in (2, 3, 7):
        assert all(torch.equal(u, v) for u, v in zip(one, with_threads(count, every))), count


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_the_product_of_gates_has_the_same_bits_under_transforms(impl):
    """Torch's own product of complex tensors rounds some lanes otherwise than the one of their parts."""
    for seed in range(20):
        *given, h0, a0 = inputs(2, 5, 3, 2, 2, seed=seed)

        def product(a0, given=given, h0=h0):
            return gate_loop(*given, state=(h0, a0), impl=impl)[1][1]

        plain = product(a0)
        assert torch.equal(plain, torch.vmap(product)(a0[None])[0]) and torch.equal(plain, torch.func.vjp(product, a0)[0])
        assert not torch.equal(plain, a0)
