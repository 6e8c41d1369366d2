"""Fused softmax attention on CPU: value, gradient, tangent and the gradient's tangent, without an [n, m] table; csrc/softmax*.c.

Tensors are read and written where they lie: heads that were split from one projection are not copied.

torch's own kernels (`softmax_aten`) serve without a compiler, and where ours would idle: a few queries against many keys, which
fill a part of the vector lanes only, and a backward with far fewer key heads than threads. Measured in ms of one AVX-512 core,
ours against torch's, 8 causal heads of 512 x 512, float32, width 32 (64): forward 1.4 (2.4) against 3.4 (6.2), backward 2.5 (4.9)
against 8.6 (15.4) of torch's fused one and 14 (21) of what replaces it here; one query against 513 keys, 16 heads: 0.58 against 0.08.
Ours alone, 4 causal heads of 1024 x 1024, width 64: value 3.4, gradient 6.9, value and tangent 9.0, tangent 7.0, the gradient's
tangent 13.7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import crossovers
from ..contracts import Operator
from . import softmax_aten as aten
from .build import why_not
from .call import function, merged, numbers, rows, strided, threads

# b batch, h query heads, g key heads, n queries, m keys, d width of q and k, e width of v.
# mask: bool [b or 1, h or 1, n or 1, m]; start: position of the first query, None if not causal.


def _call(source: str, name: str, mask: Tensor | None, tensors: tuple, sizes: tuple, start: int | None, scale: float) -> None:
    """Calls the C function; tensors of three or four axes, None where there is none. Layout: csrc/softmax_call.h."""
    b, h, _, n, m, d, _ = sizes
    seen = None if mask is None else mask.expand(b, h, n, m)
    given = [*sizes, int(start is not None), start or 0, threads(b * h * n * m * d), *strided(seen)]
    function(source, name, tensors[0].dtype, "pd")(numbers(given, tensors), scale)


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    (b, h, n, d), (_, g, m, e) = q.shape, v.shape
    return b, h, g, n, m, d, e


_FEW = crossovers.limits("softmax_attention", "native, torch's")
_HEADS = crossovers.limits("softmax_attention", "native, torch's backward")


def _torch_is_better(q: Tensor, k: Tensor) -> bool:
    """No compiler, or too few queries for the vector lanes."""
    n, m = q.shape[2], k.shape[2]
    return why_not("softmax") is not None or (n < _FEW["bytes"] // q.element_size() and m > _FEW["ratio"] * n + _FEW["extra"])


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, start: int | None, scale: float) -> tuple[Tensor, Tensor]:
    if _torch_is_better(q, k):
        out, lse = aten.attend(q, k, v, mask, start, scale)
        return out, lse.double()
    q, k, v, mask = rows(q, k, v, mask)
    out, lse = merged(q, v.shape[3]), torch.empty(*q.shape[:3], dtype=torch.float64)
    _call("softmax", "softmax", mask, (q, k, v, out, lse), _sizes(q, k, v), start, scale)
    return out, lse


def _attend_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor,
                     start: int | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    # One task is a key head; on one core ours is four times as fast.
    if _torch_is_better(q, k) or _HEADS["speed"] * k.shape[0] * k.shape[1] < torch.get_num_threads():
        return aten.attend_backward(g, q, k, v, mask, start, scale)
    g, q, k, v, mask, out = rows(g, q, k, v, mask, out)
    grads = tuple(merged(t, t.shape[3]) for t in (q, k, v))
    _call("softmax", "softmax_backward", mask, (g, q, k, v, out, lse, *grads), _sizes(q, k, v), start, scale)
    return grads


def _tangent(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, tq: Tensor | None,
             tk: Tensor | None, tv: Tensor | None, start: int | None, scale: float) -> tuple[Tensor, Tensor]:
    if why_not("softmax_tangent") is not None:
        t_out, t_lse = aten.tangent(q, k, v, mask, out, lse.to(q.dtype), tq, tk, tv, start, scale)
        return t_out, t_lse.double()
    q, k, v, mask, out, tq, tk, tv = rows(q, k, v, mask, out, tq, tk, tv)
    moved = merged(out, out.shape[3]), torch.empty(lse.shape, dtype=lse.dtype)
    _call("softmax_tangent", "softmax_tangent", mask, (q, k, v, out, lse, tq, tk, tv, *moved), _sizes(q, k, v), start, scale)
    return moved


def _along(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None,
           start: int | None, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _torch_is_better(q, k):
        out, lse = _attend(q, k, v, mask, start, scale)
        return out, lse, *_tangent(q, k, v, mask, out, lse, tq, tk, tv, start, scale)
    q, k, v, mask, tq, tk, tv = rows(q, k, v, mask, tq, tk, tv)
    out, t_out = merged(q, v.shape[3]), merged(q, v.shape[3])
    lse, t_lse = (torch.empty(q.shape[:3], dtype=torch.float64) for _ in range(2))
    _call("softmax", "softmax_along", mask, (q, k, v, out, lse, tq, tk, tv, t_out, t_lse), _sizes(q, k, v), start, scale)
    return out, lse, t_out, t_lse


def _second(g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, t_out: Tensor,
            t_lse: Tensor, tg: Tensor | None, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, start: int | None,
            scale: float) -> tuple[Tensor, Tensor, Tensor]:
    if why_not("softmax_second") is not None:
        lse, t_lse = lse.to(q.dtype), t_lse.to(q.dtype)
        return aten.second(g, q, k, v, mask, out, lse, t_out, t_lse, tg, tq, tk, tv, start, scale)
    g, q, k, v, mask, out, t_out, tg, tq, tk, tv = rows(g, q, k, v, mask, out, t_out, tg, tq, tk, tv)
    grads = tuple(merged(t, t.shape[3]) for t in (q, k, v))
    _call("softmax_second", "softmax_second", mask, (g, q, k, v, out, lse, t_out, t_lse, tg, tq, tk, tv, *grads), _sizes(q, k, v),
          start, scale)
    return grads


# ------------------------------------------------------------------------------------------------ dispatcher operators


class SoftmaxOperators(NamedTuple):
    """The operators of one implementation; see `operators`."""

    attend: Operator
    attend_backward: Operator
    attend_tangent: Operator
    attend_second: Operator


def operators(name: str, result: Callable[[Tensor, int], Tensor], wide: bool = False,
              **functions: tuple[Callable, ...]) -> SoftmaxOperators:
    """The operators `name`; functions["cpu"] and ["cuda"] compute value, gradient, tangent and the gradient's tangent.

    result(like, width): an empty [b, heads, rows, width] as the functions lay out theirs, for tracing. wide: lse and its tangent
    are float64 whatever the arguments are, else as wide as they; see csrc/softmax_tile.h.
    """
    of = [{device: four[i] for device, four in functions.items()} for i in range(4)]
    given, rest = "Tensor q, Tensor k, Tensor v, Tensor? mask", "SymInt? start, float scale) -> "

    def fake_level(like):
        return like.new_empty(like.shape[:3], dtype=torch.float64 if wide else like.dtype)

    def fake_gradients(g, q, k, v, *rest):
        return tuple(result(t, t.shape[3]) for t in (q, k, v))

    found = SoftmaxOperators(
        # out [b, h, n, e] and the scores' log-sum-exp [b, h, n] (of a row that sees nothing, any number).
        Operator(name, 4, f"({given}, {rest}(Tensor, Tensor)", **of[0],
                 fake=lambda q, k, v, *rest: (result(q, v.shape[3]), fake_level(q))),
        # Gradients of q, k, v given g, that of out.
        Operator(f"{name}_backward", 3, f"(Tensor g, {given}, Tensor out, Tensor lse, {rest}(Tensor, Tensor, Tensor)", **of[1],
                 fake=fake_gradients),
        # Tangents of out and lse given those of q, k, v.
        Operator(f"{name}_tangent", 3, f"({given}, Tensor out, Tensor lse, Tensor? tq, Tensor? tk, Tensor? tv, {rest}"
                 "(Tensor, Tensor)", **of[2],
                 fake=lambda q, k, v, mask, out, lse, *rest: (result(out, out.shape[3]), fake_level(q))),
        # Tangents of attend_backward's gradients, given those of out and lse, and of g, q, k, v.
        Operator(f"{name}_second", 2, f"(Tensor g, {given}, Tensor out, Tensor lse, Tensor t_out, Tensor t_lse, Tensor? tg, "
                 f"Tensor? tq, Tensor? tk, Tensor? tv, {rest}(Tensor, Tensor, Tensor)", **of[3], fake=fake_gradients))
    found.attend.flops(lambda q, k, v, *args, **kwargs: _flops(2, q, k, v))
    found.attend_backward.flops(lambda g, q, k, v, *args, **kwargs: _flops(5, q, k, v))
    found.attend_tangent.flops(lambda q, k, v, *args, **kwargs: _flops(5, q, k, v))
    found.attend_second.flops(lambda g, q, k, v, *args, **kwargs: _flops(12, q, k, v))
    shared = (1,)  # a mask for all heads
    found.attend.split((1, 1, 1, shared), (1, 1))
    found.attend_backward.split((1, 1, 1, 1, shared, 1, 1), (1, 1, 1))
    found.attend_tangent.split((1, 1, 1, shared, 1, 1, 1, 1, 1), (1, 1))
    found.attend_second.split((1, 1, 1, 1, shared, *(1,) * 8), (1, 1, 1))
    return found


def _flops(products: int, q, k, v) -> int:
    """`products` products of widths d and e together, over all n m pairs of a head; masks are not counted."""
    return products * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


attend, attend_backward, attend_tangent, attend_second = operators(
    "softmax_native", merged, wide=True, cpu=(_attend, _attend_backward, _tangent, _second))

# out and lse of attend and their tangents of attend_tangent, in one pass: the scores are computed, and weighed, once.
attend_along = Operator(
    "softmax_native_along", 1, "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? tq, Tensor? tk, Tensor? tv, SymInt? start, "
    "float scale) -> (Tensor, Tensor, Tensor, Tensor)", cpu=_along,
    fake=lambda q, k, v, *_: tuple(t for _ in range(2) for t in (merged(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float64))))
attend_along.flops(lambda q, k, v, *args, **kwargs: _flops(6, q, k, v))
attend_along.split((1, 1, 1, (1,), 1, 1, 1), (1, 1, 1, 1))
