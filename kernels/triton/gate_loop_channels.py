"""Triton kernels of the gated loops with one number per channel, complex (narrow) or real (simple).

See gate_loop_narrow_device.py and gate_loop_simple_device.py. One kernel does the loop where batch and channels fill the GPU;
else the sequence is cut into segments, the kernel runs over them twice, and reads its inputs twice. Measured: not yet on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Operator
from ..native.gate_loop import flops
from . import device_code, power_of_2

# Positions of a tile, between which states are saved. Their number, n // EVERY + 2, is never 1, so that a tracer need not treat
# short sequences apart.
EVERY = 32
# More positions or channels per thread than with eight warps would not stay in registers.
CHANNELS, WARPS = 32, 8
# Fewer programs than this leave much of a large GPU idle: long sequences are then cut into segments.
PROGRAMS = 512


def plan(programs: int, tiles: int) -> tuple[int, int]:
    """Segments, and tiles of each: enough segments to make PROGRAMS programs of `programs`, none without a tile."""
    segments = min(tiles, max(1, PROGRAMS // max(programs, 1)))
    each = -(-tiles // segments)
    return -(-tiles // each), each


def shape(n: int, c: int, dtype: torch.dtype) -> dict[str, int]:
    """The sizes that a launch is compiled for."""
    channels = CHANNELS // 2 if dtype == torch.float64 else CHANNELS
    return {"T": min(EVERY, power_of_2(n, 2)), "C": min(channels, power_of_2(c, 2)), "num_warps": WARPS}


def _filled(t: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like, memory_format=torch.contiguous_format) if t is None else t.contiguous()


def _marks(x: Tensor, pairs: bool) -> tuple[int, ...]:
    b, n, c = x.shape
    return (b, n // EVERY + 2, 2, c) if pairs else (b, n // EVERY + 2, c)


def _run(module: str, name: str, before: tuple, after: tuple, first: Tensor | None, pairs: bool, **flags) -> tuple[Tensor, Tensor]:
    """Runs a kernel from `first`; what the state ends as, and (pairs) the product of all gates.

    before, after: the kernel's tensors before and after `starts`; before[0] has the shape of the channels.
    """
    x = before[0]
    device, lang = device_code(module, x)
    b, n, c = x.shape
    tail = (2,) if pairs else ()
    size = shape(n, c, x.dtype)
    acc, blocks = lang.accumulator(x.dtype), -(-c // size["C"])
    segments, tiles = plan(b * blocks, -(-n // EVERY))

    def new(*sizes: int) -> Tensor:
        return torch.empty((*sizes, *tail), dtype=x.dtype, device=x.device)

    given, starts = first is not None, x if first is None else first.contiguous()  # x stands for the pointer that is not read
    ends, products = new(b, segments, c), new(b, segments, c)

    def launch(**kind) -> None:
        getattr(device, name)[(b, segments, blocks)](*before, starts, *after, ends, products, n, c, tiles, n // EVERY + 2,
                                                     **kind, **flags, **size, ACC=acc)

    with torch.cuda.device_of(x):
        if segments == 1:
            launch(START=given, OUT=True, FINISH=True)
            return ends[:, 0], products[:, 0]
        start = starts
        launch(START=False, OUT=False, FINISH=True)
        starts, last, whole = new(b, segments, c), new(b, c), new(b, c)
        results = (starts, last, whole) if pairs else (starts, last)
        device.carry[(b, blocks)](products, ends, start, *results, segments, c, START=given, C=size["C"], ACC=acc)
        launch(START=True, OUT=True, FINISH=False)
    return last, whole


# ------------------------------------------------------------------------------------------------ complex


def _narrow(q: Tensor, k: Tensor, v: Tensor, a: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = tuple(t.contiguous() for t in (q, k, v, a))
    out, marks = torch.empty_like(args[0]), q.new_empty(_marks(q, True))
    last, product = _run("gate_loop_narrow", "forward", args, (out, marks), h0, True)
    return out, last, product, marks


def _narrow_fake(q: Tensor, k: Tensor, v: Tensor, a: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, n, c = q.shape
    return q.new_empty(b, n, c), q.new_empty(b, c, 2), q.new_empty(b, c, 2), q.new_empty(_marks(q, True))


def _narrow_backward(q: Tensor, k: Tensor, v: Tensor, a: Tensor, h0: Tensor | None, marks: Tensor, product: Tensor,
                     g: Tensor | None, g_last: Tensor | None, g_product: Tensor | None) -> tuple[Tensor, ...]:
    q, k, v, a, marks = (t.contiguous() for t in (q, k, v, a, marks))
    grads = tuple(torch.empty_like(t) for t in (q, k, v, a))
    fixed = q
    if g_product is not None:
        (gr, gi), (pr, pi) = g_product.unbind(-1), product.unbind(-1)
        fixed = torch.stack((gr * pr + gi * pi, gi * pr - gr * pi), -1)
    dh0, _ = _run("gate_loop_narrow", "backward", (q, k, v, a, marks, _filled(g, q), fixed), grads, g_last, True,
                  FIXED=g_product is not None)
    return *grads, dh0


def _narrow_backward_fake(q: Tensor, *rest) -> tuple[Tensor, ...]:
    b, n, c = q.shape
    return (*(q.new_empty(b, n, c) for _ in range(3)), q.new_empty(b, n, c, 2), q.new_empty(b, c, 2))


def _narrow_tangent(q, k, v, a, marks, tq, tk, tv, ta, th0) -> tuple[Tensor, Tensor, Tensor]:
    args = tuple(t.contiguous() for t in (q, k, v, a, marks))
    tangents = tuple(_filled(t, x) for t, x in zip((tq, tk, tv, ta), args))
    b, n, c = q.shape
    out = torch.empty_like(args[0])
    segments, _ = plan(b * -(-c // shape(n, c, q.dtype)["C"]), -(-n // EVERY))
    logs = q.new_empty(b, segments, c, 2)
    last, _ = _run("gate_loop_narrow", "tangent", (*args, *tangents), (out, logs), th0, True)
    return out, last, logs.sum(1)


# q, k, v [b, n, c], a [b, n, c, 2], h0 [b, c, 2] or None -> out, last state, product of the gates, marks; n, b, c at least 1.
narrow = Operator("gate_loop_narrow_triton", 1, "(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? h0)"
                  " -> (Tensor, Tensor, Tensor, Tensor)", fake=_narrow_fake, cpu=_narrow, cuda=_narrow)
# The state h0 is in the marks; it is an argument so that the derivatives of this operator see all that it depends on.
narrow_backward = Operator(
    "gate_loop_narrow_backward_triton", 1,
    "(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? h0, Tensor marks, Tensor product, Tensor? g, Tensor? g_last,"
    " Tensor? g_product) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", fake=_narrow_backward_fake, cpu=_narrow_backward,
    cuda=_narrow_backward)


def _tangent_of(run):
    return lambda q, k, v, a, h0, marks, *tangents: run(q, k, v, a, marks, *tangents)


_FIVE = "Tensor? tq, Tensor? tk, Tensor? tv, Tensor? ta, Tensor? th0"
# Tangents, None for zero -> those of out, of the last state, and of the logarithm of the product.
narrow_tangent = Operator(
    "gate_loop_narrow_tangent_triton", 1, f"(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? h0, Tensor marks, {_FIVE})"
    " -> (Tensor, Tensor, Tensor)", cpu=_tangent_of(_narrow_tangent), cuda=_tangent_of(_narrow_tangent),
    fake=lambda q, k, v, a, *rest: _narrow_fake(q, k, v, a, None)[:3])


# ------------------------------------------------------------------------------------------------ real


def _simple(q: Tensor, x: Tensor, a: Tensor, h0: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    args = tuple(t.contiguous() for t in (q, x, a))
    out, marks = torch.empty_like(args[0]), q.new_empty(_marks(q, False))
    last, _ = _run("gate_loop_simple", "forward", args, (out, marks), h0, False, REVERSE=reverse)
    return out, last, marks


def _simple_fake(q: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2]), q.new_empty(_marks(q, False))


def _simple_backward(q: Tensor, x: Tensor, a: Tensor, h0: Tensor | None, marks: Tensor, g: Tensor | None,
                     g_last: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, x, a, marks = (t.contiguous() for t in (q, x, a, marks))
    grads = tuple(torch.empty_like(t) for t in (q, x, a))
    dh0, _ = _run("gate_loop_simple", "backward", (q, x, a, marks, _filled(g, q)), grads, g_last, False, REVERSE=reverse)
    return *grads, dh0


def _simple_backward_fake(q: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2])


def _simple_tangent(q, x, a, h0, marks, tq, tx, ta, th0, reverse: bool) -> tuple[Tensor, Tensor]:
    args = tuple(t.contiguous() for t in (q, x, a, marks))
    tangents = tuple(_filled(t, x) for t, x in zip((tq, tx, ta), args))
    out = torch.empty_like(args[0])
    last, _ = _run("gate_loop_simple", "tangent", (*args, *tangents), (out,), th0, False, REVERSE=reverse)
    return out, last


# q, x, a [b, n, c], h0 [b, c] or None -> out [b, n, c], last state [b, c], marks.
simple = Operator("simple_gate_loop_triton", 1, "(Tensor q, Tensor x, Tensor a, Tensor? h0, bool reverse)"
                  " -> (Tensor, Tensor, Tensor)", fake=_simple_fake, cpu=_simple, cuda=_simple)
simple_backward = Operator(
    "simple_gate_loop_backward_triton", 1,
    "(Tensor q, Tensor x, Tensor a, Tensor? h0, Tensor marks, Tensor? g, Tensor? g_last, bool reverse)"
    " -> (Tensor, Tensor, Tensor, Tensor)", fake=_simple_backward_fake, cpu=_simple_backward, cuda=_simple_backward)
simple_tangent = Operator(
    "simple_gate_loop_tangent_triton", 1,
    "(Tensor q, Tensor x, Tensor a, Tensor? h0, Tensor marks, Tensor? tq, Tensor? tx, Tensor? ta, Tensor? th0, bool reverse)"
    " -> (Tensor, Tensor)", fake=lambda q, *rest: _simple_fake(q)[:2], cpu=_simple_tangent, cuda=_simple_tangent)

narrow.flops(flops(10))
narrow_backward.flops(flops(30))
narrow_tangent.flops(flops(30))
simple.flops(flops(3))
simple_backward.flops(flops(10))
simple_tangent.flops(flops(12))
narrow.split((2, 2, 2, 2, 1), (2, 1, 1, 3))
narrow_backward.split((2, 2, 2, 2, 1, 3, 1, 2, 1, 1), (2, 2, 2, 2, 1))
narrow_tangent.split((2, 2, 2, 2, 1, 3, 2, 2, 2, 2, 1), (2, 1, 1))
simple.split((2, 2, 2, 1), (2, 1, 2))
simple_backward.split((2, 2, 2, 1, 2, 2, 1), (2, 2, 2, 1))
simple_tangent.split((2, 2, 2, 1, 2, 2, 2, 2, 1), (2, 1))
