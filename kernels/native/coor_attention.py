"""C kernels of attention with coordinate descent; see csrc/coor_attention.h."""

from __future__ import annotations

import ctypes

from torch import Tensor

from ..contracts import Operator
from .call import address, function, merged, numbers, rows, threads
from .coor_descent import SOURCE, c_schedule


def _plain(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    b, h, n, d = q.shape
    return b, h, k.shape[1], n, k.shape[2], d, v.shape[3]


def _marks(exact: bool, n_iters: int) -> int:
    """How many numbers per query the backward pass needs: all thresholds; of the exact solver, cut and threshold."""
    return 2 if exact else n_iters


def _work(q: Tensor, k: Tensor, n_iters: int) -> int:
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (2 * q.shape[3] + n_iters)


def _call(name: str, rowed: list[Tensor], flat: list[Tensor | None], options: tuple) -> None:
    """Calls the C function: tensors whose rows may lie anywhere, q, k and v first, and contiguous ones."""
    nulls, scale, exact, eps, eps_init, eps_decay, n_iters = options
    q, k, v = rowed[:3]
    # Only the last eps counts for the exact solver, and with too few iterations a schedule would not have come to it.
    values = c_schedule(eps, eps if exact else eps_init, eps_decay, n_iters)
    function(SOURCE, name, q.dtype, "p" * (1 + len(flat)) + "i" * 8 + "d" + "i" + "p" + "ii")(
        numbers([], rowed), *map(address, flat), *_sizes(q, k, v), nulls, scale, int(exact), ctypes.addressof(values), n_iters,
        threads(_work(q, k, n_iters)))


def _forward(q, k, v, log_k, keep, start, *options):
    q, k, v = rows(q, k, v)
    out, marks = merged(q, v.shape[3]), q.new_empty(*q.shape[:3], _marks(options[2], options[-1]))
    _call("coor_attention", [q, k, v, out], [*_plain(log_k, keep, start), marks], options)
    return out, marks


def _backward(q, k, v, log_k, keep, start, marks, g, *options):
    q, k, v, g = rows(q, k, v, g)
    grads, dlog_k = [merged(t, t.shape[3]) for t in (q, k, v)], log_k.new_empty(log_k.shape)
    if q.numel() == 0:
        return *(t.zero_() for t in grads), dlog_k.zero_()
    _call("coor_attention_back", [q, k, v, g, *grads], [*_plain(log_k, keep, start, marks), dlog_k], options)
    return *grads, dlog_k


def _tangent(q, k, v, log_k, keep, start, marks, tq, tk, tv, tlog_k, *options):
    q, k, v, tq, tk, tv = rows(q, k, v, tq, tk, tv)
    out = merged(q, v.shape[3])
    _call("coor_attention_tangent", [q, k, v, tq, tk, tv, out], _plain(log_k, keep, start, marks, tlog_k), options)
    return out


_OPTIONS = "int nulls, float scale, bool exact, float eps, float eps_init, float eps_decay, int n_iters"


def _fake(q, k, v, log_k, keep, start, nulls, scale, exact, eps, eps_init, eps_decay, n_iters):
    return merged(q, v.shape[3]), q.new_empty(*q.shape[:3], _marks(exact, n_iters))


def _fake_back(q, k, v, log_k, *others):
    # Laid out so, whatever the arguments' strides.
    return *(merged(t, t.shape[3]) for t in (q, k, v)), log_k.new_empty(log_k.shape)


# q [b, h, n, d], k [b, g, m, d], v [b, g, m, e], log_k [b, h, n] (k itself if exact), keep [b, m] bool, start [b] int64
# -> out [b, h, n, e] and marks [b, h, n, n_iters or 2], which only the backward kernel reads.
attention = Operator(
    "coor_attention_native", 2,
    f"(Tensor q, Tensor k, Tensor v, Tensor log_k, Tensor? keep, Tensor start, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=_fake, cpu=_forward)
# -> gradients of q, k, v and log_k (k itself if exact), from the cotangent g of out.
attention_back = Operator(
    "coor_attention_back_native", 2,
    f"(Tensor q, Tensor k, Tensor v, Tensor log_k, Tensor? keep, Tensor start, Tensor marks, Tensor g, {_OPTIONS}) "
    f"-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_back, cpu=_backward)
# -> tangent of out, from those of q, k, v and log_k (k itself if exact).
attention_tangent = Operator(
    "coor_attention_tangent_native", 2,
    f"(Tensor q, Tensor k, Tensor v, Tensor log_k, Tensor? keep, Tensor start, Tensor marks, Tensor tq, Tensor tk, Tensor tv, "
    f"Tensor tlog_k, {_OPTIONS}) -> Tensor",
    fake=lambda q, k, v, *others: merged(q, v.shape[3]), cpu=_tangent)


def _flops(per_d: int, per_e: int, rounds: int):
    """A FLOP formula: so many operations per pair and channel, and the solver's as in coor_descent."""
    def formula(q, k, v, *args, **kwargs):
        (b, h, n, d), m, e = q, k[2], v[3]
        exact, n_iters = args[-5], args[-1]
        return b * h * n * m * (per_d * d + per_e * e + 6 * rounds * (2 if exact else n_iters + 1))
    return formula


attention.flops(_flops(2, 2, 1))
attention_back.flops(_flops(6, 4, 2))
attention_tangent.flops(_flops(6, 4, 2))
attention.split((1, 1, 1, 1, None, None), (1, 1))
attention_back.split((1, 1, 1, 1, None, None, 1, 1), (1, 1, 1, 1))
attention_tangent.split((1, 1, 1, 1, None, None, 1, 1, 1, 1, 1), (1,))
