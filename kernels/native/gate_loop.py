"""C kernels of the gated loops, forward and backward; see csrc/gate_loop.c and its headers.

simple: real gates per channel, sigmoid(a).  narrow: complex gates per channel.  wide: a complex gate per head.
Results have the memory layout [b, n, heads, width], so that merging heads afterwards is a view.

simple and narrow, forward and backward, also take rows of bfloat16 (q, x, k, v, a, g) and give such (out, gradients of rows);
states, products and marks are float32 then.
"""

from __future__ import annotations

from torch import Tensor

from ..contracts import Operator
from ..watchers import unwatched
from .call import SUFFIX, address, function, merged, sums_dtype, threads
from .scan import rows

# As in the C source: steps between saved states. Their number, n // EVERY + 2, is never 1, so that a tracer need not treat
# short sequences apart.
EVERY = 32
# Multiply-adds that one gate costs, for the choice of threads.
GATE = 16


def _strides(*tensors: Tensor | None) -> list[int]:
    return [s for t in tensors for s in ((0, 0) if t is None else t.stride()[:2])]


def _packed(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


# ------------------------------------------------------------------------------------------------ simple


def _simple(q: Tensor, x: Tensor, a: Tensor, h0: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    q, x, a, h0 = rows(q, 1), rows(x, 1), rows(a, 1), _packed(h0)
    b, n, c = q.shape
    out, last, marks = _simple_fake(q, x, a, h0, reverse)
    function("gate_loop", "simple_gate_loop", q.dtype, "ppppppp" + "i" * 11)(
        *map(address, (q, x, a, h0, out, last, marks)), b, n, c, *_strides(q, x, a), int(reverse), threads(GATE * out.numel()))
    return out, last, marks


def _simple_fake(q: Tensor, x: Tensor, a: Tensor, h0: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    b, n, c = q.shape
    sums = sums_dtype(q)
    return q.new_empty(b, n, c), q.new_empty(b, c, dtype=sums), q.new_empty(b, n // EVERY + 2, c, dtype=sums)


def _simple_backward(q: Tensor, x: Tensor, a: Tensor, h0: Tensor | None, marks: Tensor, g: Tensor | None,
                     g_last: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, x, a, g = rows(q, 1), rows(x, 1), rows(a, 1), None if g is None else rows(g, 1)
    marks, g_last = marks.contiguous(), _packed(g_last)
    b, n, c = q.shape
    dq, dx, da, dh0 = _simple_backward_fake(q, x, a)
    function("gate_loop", "simple_gate_loop_backward", q.dtype, "p" * 10 + "i" * 13)(
        *map(address, (q, x, a, marks, g, g_last, dq, dx, da, dh0)), b, n, c, *_strides(q, x, a, g), int(reverse),
        threads(GATE * dq.numel()))
    return dq, dx, da, dh0


def _simple_backward_fake(q: Tensor, x: Tensor, a: Tensor, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *(q.new_empty(q.shape) for _ in range(3)), q.new_empty(q.shape[0], q.shape[2], dtype=sums_dtype(q))


# q, x, a [b, n, c], h0 [b, c] or None -> out [b, n, c], last state [b, c], and marks: the states that backward starts from.
simple = Operator("simple_gate_loop_native", 2, "(Tensor q, Tensor x, Tensor a, Tensor? h0, bool reverse)"
                  " -> (Tensor, Tensor, Tensor)", fake=_simple_fake, cpu=_simple)
simple_backward = Operator(
    "simple_gate_loop_backward_native", 2,
    "(Tensor q, Tensor x, Tensor a, Tensor? h0, Tensor marks, Tensor? g, Tensor? g_last, bool reverse)"
    " -> (Tensor, Tensor, Tensor, Tensor)", fake=_simple_backward_fake, cpu=_simple_backward)


# ------------------------------------------------------------------------------------------------ narrow


def _narrow(q: Tensor, k: Tensor, v: Tensor, a: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, a, h0 = rows(q, 1), rows(k, 1), rows(v, 1), rows(a, 2), _packed(h0)
    b, n, c = q.shape
    out, last, product, marks = _narrow_fake(q, k, v, a, h0)
    function("gate_loop", "gate_loop_narrow", q.dtype, "p" * 9 + "i" * 12)(
        *map(address, (q, k, v, a, h0, out, last, product, marks)), b, n, c, *_strides(q, k, v, a),
        threads(2 * GATE * out.numel()))
    return out, last, product, marks


def narrow_heads(q: Tensor, k: Tensor, v: Tensor, a: Tensor, h0: Tensor | None) -> tuple[Tensor, ...] | None:
    """`narrow` on heads of width 1 as they are: q, k, v [b, h, n, 1], a [b, h, n, 2], h0 [b, h, 1, 1, 2].

    Gives out, last state and the product of the gates; None for a call that something watches, or of which the kernel would need
    copies in another precision. A dozen views in and out of rows would take longer than a short call.
    """
    given = (q, k, v, a)
    if q.dtype not in SUFFIX or any(t.dtype != q.dtype for t in given) or h0 is not None and h0.dtype != sums_dtype(q):
        return None
    if not unwatched(given if h0 is None else (*given, h0)):
        return None
    q, k, v, a, h0 = _side_by_side(q), _side_by_side(k), _side_by_side(v), _side_by_side(a), _packed(h0)
    b, h, n, _ = q.shape
    out, sums = merged(q, 1), sums_dtype(q)
    last, product = q.new_empty((b, h, 1, 1, 2), dtype=sums), q.new_empty((b, h, 2), dtype=sums)
    marks = q.new_empty((b, n // EVERY + 2, 2, h), dtype=sums)
    strides = [s for t in (q, k, v, a) for s in t.stride()[::2]]
    function("gate_loop", "gate_loop_narrow", q.dtype, "p" * 9 + "i" * 12)(
        *map(address, (q, k, v, a, h0, out, last, product, marks)), b, n, h, *strides, threads(2 * GATE * out.numel()))
    return out, last, product


def _side_by_side(t: Tensor) -> Tensor:
    """t [b, h, n, w], with a position's numbers in one stretch of memory; a copy only if need be."""
    h, w = t.shape[1], t.shape[3]
    if (t.stride(3) == 1 or w == 1) and (t.stride(1) == w or h == 1):
        return t
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _narrow_fake(q: Tensor, k: Tensor, v: Tensor, a: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, n, c = q.shape
    return q.new_empty(b, n, c), *(q.new_empty(s, dtype=sums_dtype(q)) for s in ((b, c, 2), (b, c, 2), (b, n // EVERY + 2, 2, c)))


def _narrow_backward(q: Tensor, k: Tensor, v: Tensor, a: Tensor, h0: Tensor | None, marks: Tensor, product: Tensor,
                     g: Tensor | None, g_last: Tensor | None, g_product: Tensor | None) -> tuple[Tensor, ...]:
    q, k, v, a, g = rows(q, 1), rows(k, 1), rows(v, 1), rows(a, 2), None if g is None else rows(g, 1)
    marks, product, g_last, g_product = marks.contiguous(), product.contiguous(), _packed(g_last), _packed(g_product)
    b, n, c = q.shape
    grads = _narrow_backward_fake(q)
    function("gate_loop", "gate_loop_narrow_backward", q.dtype, "p" * 14 + "i" * 14)(
        *map(address, (q, k, v, a, marks, product, g, g_last, g_product, *grads)), b, n, c, *_strides(q, k, v, a, g),
        threads(2 * GATE * q.numel()))
    return grads


def _narrow_backward_fake(q: Tensor, *rest) -> tuple[Tensor, ...]:
    b, n, c = q.shape
    return (*(q.new_empty(b, n, c) for _ in range(3)), q.new_empty(b, n, c, 2), q.new_empty(b, c, 2, dtype=sums_dtype(q)))


# q, k, v [b, n, c], a [b, n, c, 2], h0 [b, c, 2] or None -> out, last state, product of the gates, marks.
narrow = Operator("gate_loop_narrow_native", 2, "(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? h0)"
                  " -> (Tensor, Tensor, Tensor, Tensor)", fake=_narrow_fake, cpu=_narrow)
narrow_backward = Operator(
    "gate_loop_narrow_backward_native", 2,
    "(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? h0, Tensor marks, Tensor product, Tensor? g, Tensor? g_last,"
    " Tensor? g_product) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", fake=_narrow_backward_fake, cpu=_narrow_backward)


# ------------------------------------------------------------------------------------------------ wide


def _heads(t: Tensor | None) -> Tensor | None:
    """t [b, h, n, w] with a row's numbers side by side; a copy only if need be."""
    return None if t is None else t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def _strides3(*tensors: Tensor | None) -> list[int]:
    return [s for t in tensors for s in ((0, 0, 0) if t is None else t.stride()[:3])]


def _like_rows(q: Tensor, width: int) -> Tensor:
    b, h, n, _ = q.shape
    return q.new_empty(b, n, h, width).transpose(1, 2)


def _wide(q: Tensor, k: Tensor, v: Tensor, a: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, a, h0 = _heads(q), _heads(k), _heads(v), _heads(a), _packed(h0)
    (b, h, n, d), e = q.shape, v.shape[3]
    out, last, product = _wide_fake(q, k, v, a, h0)
    function("gate_loop", "gate_loop_wide", q.dtype, "p" * 8 + "i" * 21)(
        *map(address, (q, k, v, a, h0, out, last, product)), b, h, n, d, e, *_strides3(q, k, v, a, out),
        threads(4 * b * h * n * d * e))
    return out, last, product


def _wide_fake(q: Tensor, k: Tensor, v: Tensor, a: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    b, h, _, d = q.shape
    return _like_rows(q, v.shape[3]), q.new_empty(b, h, d, v.shape[3], 2), q.new_empty(b, h, 2)


def _wide_backward(q: Tensor, k: Tensor, v: Tensor, a: Tensor, h0: Tensor | None, g: Tensor | None, g_last: Tensor | None,
                   g_product: Tensor | None) -> tuple[Tensor, ...]:
    q, k, v, a, h0, g = _heads(q), _heads(k), _heads(v), _heads(a), _packed(h0), _heads(g)
    g_last, g_product = _packed(g_last), _packed(g_product)
    (b, h, n, d), e = q.shape, v.shape[3]
    grads = _wide_backward_fake(q, k, v)
    dq, dk, dv, da, dh0 = grads
    function("gate_loop", "gate_loop_wide_backward", q.dtype, "p" * 13 + "i" * 33)(
        *map(address, (q, k, v, a, h0, g, g_last, g_product, *grads)), b, h, n, d, e,
        *_strides3(q, k, v, a, g, dq, dk, dv, da), threads(8 * b * h * n * d * e))
    return grads


def _wide_backward_fake(q: Tensor, k: Tensor, v: Tensor, *rest) -> tuple[Tensor, ...]:
    b, h, _, d = q.shape
    e = v.shape[3]
    return _like_rows(q, d), _like_rows(q, d), _like_rows(q, e), _like_rows(q, 2), q.new_empty(b, h, d, e, 2)


# q, k [b, h, n, d], v [b, h, n, e], a [b, h, n, 2], h0 [b, h, d, e, 2] or None -> out, last state, product of the gates.
wide = Operator("gate_loop_wide_native", 1, "(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? h0)"
                " -> (Tensor, Tensor, Tensor)", fake=_wide_fake, cpu=_wide)
wide_backward = Operator(
    "gate_loop_wide_backward_native", 2,
    "(Tensor q, Tensor k, Tensor v, Tensor a, Tensor? h0, Tensor? g, Tensor? g_last, Tensor? g_product)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)", fake=_wide_backward_fake, cpu=_wide_backward)


def flops(real: int, heads: bool = False):
    """A FLOP formula: so many operations per position and entry of the state; what the gates themselves take is not counted."""
    def formula(q, k, v, *args, **kwargs):
        return real * q[0] * q[1] * q[2] * (q[3] * v[3] if heads else 1)
    return formula


# Forward: gate times state 2 (complex 6), product k v 1 and its sum 1, product with q and its sum 2. Backward: the state once
# more, its gradient likewise, and one product each for q, k, v (2 each) and the gate (8 for two complex numbers). Tangent: two
# recurrences, of which one has two gates and two products, and their reading.
simple.flops(flops(3))
simple_backward.flops(flops(10))
narrow.flops(flops(10))
narrow_backward.flops(flops(30))
wide.flops(flops(10, heads=True))
wide_backward.flops(flops(30, heads=True))
simple.split((2, 2, 2, 1), (2, 1, 2))
simple_backward.split((2, 2, 2, 1, 2, 2, 1), (2, 2, 2, 1))
narrow.split((2, 2, 2, 2, 1), (2, 1, 1, 3))
narrow_backward.split((2, 2, 2, 2, 1, 3, 1, 2, 1, 1), (2, 2, 2, 2, 1))
wide.split((1, 1, 1, 1, 1), (1, 1, 1))
wide_backward.split((1, 1, 1, 1, 1, 1, 1, 1), (1, 1, 1, 1, 1))
