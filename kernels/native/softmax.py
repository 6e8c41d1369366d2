"""Fused softmax attention on CPU: forward, backward and tangent without an [n, m] table; see csrc/softmax*.c.

torch's own fused kernels (`softmax_aten`) serve without a compiler, and where ours would idle: a few queries against many
keys, which fill a part of the vector lanes only, and a backward with far fewer key heads than threads. Measured in ms of one
AVX-512 core, ours against torch's, 8 causal heads of 512 x 512, float32, width 32 (64): forward 1.4 (2.4) against 3.4 (6.2),
backward 2.5 (4.9) against 8.6 (15.4); one query against 513 keys, 16 heads: 0.58 against 0.08.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import crossovers
from ..contracts import Operator
from . import softmax_aten as aten
from .build import why_not
from .call import function, strided, threads

# b batch, h query heads, g key heads, n queries, m keys, d width of q and k, e width of v.
# mask: bool [b or 1, h or 1, n or 1, m]; start: position of the first query, None if not causal.


def _call(source: str, name: str, mask: Tensor | None, tensors: tuple, sizes: tuple, start: int | None, scale: float) -> None:
    """Calls the C function; tensors of three or four axes, None where there is none. Layout: csrc/softmax_call.h."""
    b, h, _, n, m, d, _ = sizes
    seen = None if mask is None else mask.expand(b, h, n, m)
    numbers = [*sizes, int(start is not None), start or 0, threads(b * h * n * m * d), *strided(seen)]
    for t in tensors:
        numbers += strided(t)
    function(source, name, tensors[0].dtype, "pd")((ctypes.c_int64 * len(numbers))(*numbers), scale)


def _rows(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, copied only if their rows are not in one piece."""
    return [t if t is None or t.stride(-1) == 1 or t.shape[-1] < 2 else t.contiguous() for t in tensors]


def _result(like: Tensor, width: int) -> Tensor:
    """[b, heads, rows, width], laid out [b, rows, heads, width]: so heads are merged, or a split undone, without a copy."""
    b, heads, rows = like.shape[:3]
    return torch.empty_strided((b, heads, rows, width), (rows * heads * width, width, heads * width, 1), dtype=like.dtype)


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
        return aten.attend(q, k, v, mask, start, scale)
    q, k, v, mask = _rows(q, k, v, mask)
    out, lse = _result(q, v.shape[3]), torch.empty(q.shape[:3], dtype=q.dtype)
    _call("softmax", "softmax", mask, (q, k, v, out, lse), _sizes(q, k, v), start, scale)
    return out, lse


def _attend_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor,
                     start: int | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    # One task is a key head; on one core ours is four times as fast.
    if _torch_is_better(q, k) or _HEADS["speed"] * k.shape[0] * k.shape[1] < torch.get_num_threads():
        return aten.attend_backward(g, q, k, v, mask, out, lse, start, scale)
    g, q, k, v, mask, out = _rows(g, q, k, v, mask, out)
    grads = tuple(_result(t, t.shape[3]) for t in (q, k, v))
    _call("softmax", "softmax_backward", mask, (g, q, k, v, out, lse, *grads), _sizes(q, k, v), start, scale)
    return grads


def _tangent(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, tq: Tensor | None,
             tk: Tensor | None, tv: Tensor | None, start: int | None, scale: float) -> tuple[Tensor, Tensor]:
    if why_not("softmax_tangent") is not None:
        return aten.tangent(q, k, v, mask, out, lse, tq, tk, tv, start, scale)
    q, k, v, mask, out, tq, tk, tv = _rows(q, k, v, mask, out, tq, tk, tv)
    moved = _result(out, out.shape[3]), torch.empty(lse.shape, dtype=lse.dtype)
    _call("softmax_tangent", "softmax_tangent", mask, (q, k, v, out, lse, tq, tk, tv, *moved), _sizes(q, k, v), start, scale)
    return moved


def _second(g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, t_out: Tensor,
            t_lse: Tensor, tg: Tensor | None, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, start: int | None,
            scale: float) -> tuple[Tensor, Tensor, Tensor]:
    if why_not("softmax_second") is not None:
        return aten.second(g, q, k, v, mask, out, lse, t_out, t_lse, tg, tq, tk, tv, start, scale)
    g, q, k, v, mask, out, t_out, tg, tq, tk, tv = _rows(g, q, k, v, mask, out, t_out, tg, tq, tk, tv)
    grads = tuple(_result(t, t.shape[3]) for t in (q, k, v))
    _call("softmax_second", "softmax_second", mask, (g, q, k, v, out, lse, t_out, t_lse, tg, tq, tk, tv, *grads), _sizes(q, k, v),
          start, scale)
    return grads


# ------------------------------------------------------------------------------------------------ dispatcher operators


def _laid_out(t: Tensor, heads_of: Tensor, width: int) -> Tensor:
    b, heads, rows = heads_of.shape[:3]
    return t.new_empty_strided((b, heads, rows, width), (rows * heads * width, width, heads * width, 1))


def _fake(q, k, v, mask, start, scale):
    return _laid_out(q, q, v.shape[3]), q.new_empty(q.shape[:3])


def _fake_tangent(q, k, v, mask, out, lse, *rest):
    return _laid_out(q, out, out.shape[3]), q.new_empty(lse.shape)


def _fake_backward(g, q, k, v, *rest):
    return tuple(_laid_out(t, t, t.shape[3]) for t in (q, k, v))


# out [b, h, n, e] and the scores' log-sum-exp [b, h, n] (0 for a row that sees nothing).
attend = Operator("softmax_native", 2, "(Tensor q, Tensor k, Tensor v, Tensor? mask, SymInt? start, float scale) -> "
                  "(Tensor, Tensor)", fake=_fake, cpu=_attend)
# Gradients of q, k, v given g, that of out.
attend_backward = Operator("softmax_native_backward", 2, "(Tensor g, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, "
                           "Tensor lse, SymInt? start, float scale) -> (Tensor, Tensor, Tensor)",
                           fake=_fake_backward, cpu=_attend_backward)
# Tangents of out and lse given those of q, k, v.
attend_tangent = Operator("softmax_native_tangent", 2, "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, "
                          "Tensor? tq, Tensor? tk, Tensor? tv, SymInt? start, float scale) -> (Tensor, Tensor)",
                          fake=_fake_tangent, cpu=_tangent)
# Tangents of attend_backward's gradients, given those of out and lse, and of g, q, k, v.
attend_second = Operator("softmax_native_second", 1, "(Tensor g, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, "
                         "Tensor lse, Tensor t_out, Tensor t_lse, Tensor? tg, Tensor? tq, Tensor? tk, Tensor? tv, SymInt? start, "
                         "float scale) -> (Tensor, Tensor, Tensor)", fake=_fake_backward, cpu=_second)


def _flops(products: int, q, k, v) -> int:
    """`products` products of widths d and e together, over all n m pairs of a head; masks are not counted."""
    return products * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def declare(attend: Operator, backward: Operator, tangent: Operator) -> None:
    """FLOP formulas, and that DTensor may split the heads; a mask that all heads have in common is shared."""
    attend.flops(lambda q, k, v, *args, **kwargs: _flops(2, q, k, v))
    backward.flops(lambda g, q, k, v, *args, **kwargs: _flops(5, q, k, v))
    tangent.flops(lambda q, k, v, *args, **kwargs: _flops(5, q, k, v))
    attend.split((1, 1, 1, (1,)), (1, 1))
    backward.split((1, 1, 1, 1, (1,), 1, 1), (1, 1, 1))
    tangent.split((1, 1, 1, (1,), 1, 1, 1, 1, 1), (1, 1))


declare(attend, attend_backward, attend_tangent)
attend_second.flops(lambda g, q, k, v, *args, **kwargs: _flops(12, q, k, v))
