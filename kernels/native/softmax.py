"""Fused softmax attention on CPU: forward, backward and tangent without an [n, m] table; see csrc/softmax*.c.

torch's own fused kernels (`softmax_aten`) serve without a compiler, and where ours would idle: a few queries against many
keys, which fill a part of the vector lanes only, and a backward with far fewer key heads than threads. Measured in ms of one
AVX-512 core, ours against torch's, 8 causal heads of 512 x 512, float32, width 32 (64): forward 1.4 (2.4) against 3.4 (6.2),
backward 2.5 (4.9) against 8.6 (15.4); one query against 513 keys, 16 heads: 0.58 against 0.08.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import crossovers
from ..contracts import Operator
from . import softmax_aten as aten
from .build import why_not
from .call import address, function, threads

# b batch, h query heads, g key heads, n queries, m keys, d width of q and k, e width of v.
# mask: bool [b or 1, h or 1, n or 1, m]; start: position of the first query, None if not causal.


def _call(source: str, name: str, mask: Tensor | None, tensors: tuple, sizes: tuple, start: int | None, scale: float) -> None:
    """Calls the C function on contiguous tensors (None: a null pointer); the mask stands at its place in `tensors`."""
    strides = [0] * 3
    if mask is not None:
        strides = [stride if size > 1 else 0 for stride, size in zip(mask.stride(), mask.shape[:3])]
    b, h, _, n, m, d, _ = sizes
    dtype = tensors[0].dtype
    function(source, name, dtype, "p" * len(tensors) + "i" * 13 + "d")(
        *map(address, tensors), *sizes, *strides, int(start is not None), start or 0, threads(b * h * n * m * d), scale)


def _plain(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


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
    q, k, v, mask = _plain(q, k, v, mask)
    out, lse = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype), torch.empty(q.shape[:3], dtype=q.dtype)
    _call("softmax", "softmax", mask, (q, k, v, mask, out, lse), _sizes(q, k, v), start, scale)
    return out, lse


def _attend_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor,
                     start: int | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    # One task is a key head; on one core ours is four times as fast.
    if _torch_is_better(q, k) or _HEADS["speed"] * k.shape[0] * k.shape[1] < torch.get_num_threads():
        return aten.attend_backward(g, q, k, v, mask, out, lse, start, scale)
    g, q, k, v, mask, out, lse = _plain(g, q, k, v, mask, out, lse)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _call("softmax", "softmax_backward", mask, (g, q, k, v, mask, out, lse, *grads), _sizes(q, k, v), start, scale)
    return grads


def _tangent(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, tq: Tensor | None,
             tk: Tensor | None, tv: Tensor | None, start: int | None, scale: float) -> tuple[Tensor, Tensor]:
    if why_not("softmax_tangent") is not None:
        return aten.tangent(q, k, v, mask, out, lse, tq, tk, tv, start, scale)
    q, k, v, mask, out, lse, tq, tk, tv = _plain(q, k, v, mask, out, lse, tq, tk, tv)
    tangents = torch.empty_like(out), torch.empty_like(lse)
    _call("softmax_tangent", "softmax_tangent", mask, (q, k, v, mask, out, lse, tq, tk, tv, *tangents), _sizes(q, k, v), start,
          scale)
    return tangents


# ------------------------------------------------------------------------------------------------ dispatcher operators


def _fake(q, k, v, mask, start, scale):
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1])


def _fake_backward(g, q, k, v, mask, out, lse, start, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fake_tangent(q, k, v, mask, out, lse, tq, tk, tv, start, scale):
    return q.new_empty(out.shape), q.new_empty(lse.shape)


# out [b, h, n, e] and the scores' log-sum-exp [b, h, n] (0 for a row that sees nothing).
attend = Operator("softmax_native", 1, "(Tensor q, Tensor k, Tensor v, Tensor? mask, SymInt? start, float scale) -> "
                  "(Tensor, Tensor)", fake=_fake, cpu=_attend)
# Gradients of q, k, v given g, that of out.
attend_backward = Operator("softmax_native_backward", 1, "(Tensor g, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, "
                           "Tensor lse, SymInt? start, float scale) -> (Tensor, Tensor, Tensor)",
                           fake=_fake_backward, cpu=_attend_backward)
# Tangents of out and lse given those of q, k, v.
attend_tangent = Operator("softmax_native_tangent", 1, "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, "
                          "Tensor? tq, Tensor? tk, Tensor? tv, SymInt? start, float scale) -> (Tensor, Tensor)",
                          fake=_fake_tangent, cpu=_tangent)


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
