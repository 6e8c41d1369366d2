"""gate_loop and simple_gate_loop by Triton, interpreted."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import assert_close
from fnattn_kernels.contracts import KernelUnavailable
from fnattn_kernels.triton import gate_loop_channels as channels
from fnattn_kernels.triton import gate_loop_heads as heads
from interpreted_checks import check

from fnattn.ops import gate_loop, simple_gate_loop
from fnattn.testing import brute


@pytest.mark.parametrize("name", ["gate_loop", "gate_loop, width 1, state", "simple_gate_loop, reverse, h0"])
def test_transforms_are_right(name):
    check(name, "triton")


@pytest.fixture
def small(monkeypatch):
    """Tiles, chunks and blocks so small that a short sequence has several."""
    monkeypatch.setattr(channels, "EVERY", 4)
    monkeypatch.setattr(channels, "CHANNELS", 4)
    monkeypatch.setattr(heads, "CHUNK", 16)


def draw(*shapes, seed=1, dtype=torch.float64):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def loop_args(h, n, d, e, state=True, dtype=torch.float64):
    args = draw((1, h, n, d), (1, h, n, d), (1, h, n, e), (1, h, n, 2), seed=n, dtype=dtype)
    return args + (draw((1, h, d, e, 2), (1, h, 2)) if state else [])


def loop(impl, q, k, v, a, *state):
    state = state or None
    out, (last, product) = brute.gate_loop(q, k, v, a, state=state) if impl == "brute" else gate_loop(q, k, v, a, state=state, impl=impl)
    return out, last, product


def simple(impl, *args, reverse=False):
    return brute.simple_gate_loop(*args, reverse=reverse) if impl == "brute" else simple_gate_loop(*args, reverse=reverse, impl=impl)


def compare(run, args, true="brute"):
    """Values, all gradients and the tangents of all arguments; all right and none zero."""
    results = []
    for impl in ("triton", true):
        outs, tangents = torch.func.jvp(functools.partial(run, impl), tuple(args), tuple(x.detach().cos() for x in args))
        total = sum((x * (x.detach() + i).sin()).sum() for i, x in enumerate(outs))
        results.append((*outs, *tangents, *torch.autograd.grad(total, args)))
    for ours, expected in zip(*results):
        assert_close(ours, expected)
        assert ours.abs().max() > 0


# One tile or chunk less one, one, and one more; and several.
@pytest.mark.parametrize("n, programs", [(1, 1), (3, 512), (4, 512), (5, 1), (5, 512), (11, 512)])
def test_width_1_in_one_segment_or_many(n, programs, small, monkeypatch):
    monkeypatch.setattr(channels, "PROGRAMS", programs)
    compare(loop, loop_args(5, n, 1, 1))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n, programs", [(1, 1), (3, 512), (4, 512), (5, 1), (5, 512), (11, 512)])
def test_real_gates_in_one_segment_or_many(n, programs, reverse, small, monkeypatch):
    monkeypatch.setattr(channels, "PROGRAMS", programs)
    compare(functools.partial(simple, reverse=reverse), draw((2, n, 5), (2, n, 5), (2, n, 5), (2, 5), seed=n))


@pytest.mark.parametrize("h, n, d, e", [(2, 1, 3, 2), (1, 15, 1, 3), (1, 16, 17, 1), (1, 17, 3, 19), (2, 37, 3, 2)])
def test_wide_heads_in_several_chunks(h, n, d, e, small):
    compare(loop, loop_args(h, n, d, e))


def test_sizes_as_on_a_gpu():
    for args in (loop_args(1, 67, 33, 17), loop_args(2, 35, 1, 1)):
        compare(loop, [(x / 4).float().detach().requires_grad_() for x in args], "reference")


def hessian_times(run, args):
    """The derivative of all gradients along one direction, forward over reverse and reverse over reverse."""
    def loss(*args):
        return sum(x.sin().sum() for x in run(*args))

    gradient = torch.func.grad(loss, tuple(range(len(args))))
    along = tuple(x.detach().cos() for x in args)
    forward = torch.func.jvp(gradient, tuple(args), along)[1]
    backward = torch.func.vjp(gradient, *args)[1](along)
    return *forward, *backward


@pytest.mark.parametrize("run, args", [(loop, loop_args(1, 17, 3, 2)), (loop, loop_args(2, 5, 1, 1)),
                                       (simple, draw((1, 5, 3), (1, 5, 3), (1, 5, 3), (1, 3)))])
def test_second_derivatives(run, args, small):
    args = [x.detach() for x in args]
    for ours, true in zip(*(hessian_times(functools.partial(run, impl), args) for impl in ("triton", "brute"))):
        assert_close(ours, true)
        assert ours.abs().max() > 0


@pytest.mark.parametrize("d, e", [(3, 2), (1, 1)])
def test_a_sequence_may_be_cut(d, e, small):
    q, k, v, a = loop_args(2, 21, d, e, state=False)
    out, (last, product) = gate_loop(q, k, v, a, impl="triton")
    first, state = gate_loop(*(x[:, :, :7] for x in (q, k, v, a)), impl="triton")
    second, (final, whole) = gate_loop(*(x[:, :, 7:] for x in (q, k, v, a)), state=state, impl="triton")
    for ours, true in ((torch.cat((first, second), 2), out), (final, last), (whole, product)):
        assert_close(ours, true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_float32(dtype):
    for d, e in ((3, 5), (1, 1)):
        args = loop_args(1, 35, d, e, state=False, dtype=dtype)
        out, last, _ = loop("triton", *args)
        assert out.dtype == dtype and last.dtype == torch.float32
        assert_close(out.double(), loop("brute", *(x.double() for x in args))[0], dtype)
        grads = torch.autograd.grad(out.float().sum(), args)
        assert all(g.dtype == dtype and g.isfinite().all() and g.abs().max() > 0 for g in grads)
    args = draw((1, 35, 3), (1, 35, 3), (1, 35, 3), dtype=dtype)
    out, last = simple("triton", *args)
    assert out.dtype == dtype and last.dtype == torch.float32
    assert_close(out.double(), simple("brute", *(x.double() for x in args))[0], dtype)


def test_rows_that_lie_apart_or_are_shared(poisoned_empty, small):
    def apart(impl, packed, a, key, h0):
        q, _, v = packed.unflatten(-1, (3, 2, 3)).unbind(2)  # one projection cut in three, heads behind positions
        q, v, k = q.transpose(1, 2), v.transpose(1, 2), key.expand(1, 2, 18, 3)
        return loop(impl, q, k, v, a.transpose(1, 2), h0[:, :1].expand(1, 2, 3, 3, 2), h0[:, :, 0, 0].expand(1, 2, 2))

    compare(apart, draw((1, 18, 18), (1, 18, 2, 2), (1, 1, 1, 3), (1, 1, 3, 3, 2)))

    def channels_apart(impl, x, row):
        return simple(impl, x[..., ::2], row.expand(2, 6, 3), x.transpose(0, 1)[:2, :2].repeat(1, 3, 1)[..., 1::2], row[0, :1].expand(2, 3))

    compare(channels_apart, draw((2, 6, 6), (1, 1, 3)))


def test_empty_and_poisoned_memory(poisoned_empty):
    for h, n, d, e in ((2, 0, 3, 2), (2, 3, 3, 0), (0, 3, 3, 2), (2, 5, 1, 1), (1, 17, 3, 2)):
        args = loop_args(h, n, d, e)
        for ours, plain in zip(loop("triton", *args), loop("reference", *args)):
            assert_close(ours, plain)
    for n, c in ((0, 3), (3, 0), (33, 3)):
        args = draw((2, n, c), (2, n, c), (2, n, c), (2, c))
        outs = simple("triton", *args)
        assert_close(outs[0], simple("reference", *args)[0])
        assert all(g.isfinite().all() for g in torch.autograd.grad(sum(x.sum() for x in outs), args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 2])
def test_gates_of_any_size(d, dtype):
    """At zero alpha is 1/2 and the gradient 0; squares of tiny and of huge gates are not representable."""
    q, k, v, a = loop_args(1, 7, d, d, state=False, dtype=dtype)
    a = a.detach().clone()
    a[0, 0, 1:6] = torch.tensor([[0.0, 0.0], [1e-25, -2e-25], [3e30, 1e30], [-1e-35, 0.0], [50.0, -120.0]], dtype=dtype)
    a.requires_grad_()
    results = []
    for impl in ("triton", "reference"):
        outs = loop(impl, q, k, v, a)
        results.append((*outs, *torch.autograd.grad(sum((x * x).sum() for x in outs), (q, k, v, a))))
    for ours, plain in zip(*results):
        assert_close(ours, plain)
    da = results[0][-1]
    assert not da[0, 0, 1].any() and not da[0, 0, 4].any() and da[0, 0, 2].abs().max() > 0


def test_real_gates_of_zero_forget():
    q, x, a = (t.detach() for t in draw((1, 7, 2), (1, 7, 2), (1, 7, 2)))
    a[:, 3] = -2000
    a.requires_grad_()
    out, _ = simple("triton", q, x, a)
    assert_close(out[:, 3:], simple("reference", q[:, 3:], x[:, 3:], a[:, 3:])[0])
    (grad,) = torch.autograd.grad(out.sum(), a)
    assert grad.isfinite().all() and not grad[:, 3].any() and grad[:, 4].all()


def test_wide_heads_are_refused():
    with pytest.raises(KernelUnavailable, match="widths of at most 128, got 129 and 2"):
        loop("triton", *loop_args(1, 2, 129, 2))


def test_the_plan_covers_every_tile_once():
    for programs in (1, 7, 512, 5000):
        for tiles in (1, 2, 31, 1000):
            segments, each = channels.plan(programs, tiles)
            assert (segments - 1) * each < tiles <= segments * each
