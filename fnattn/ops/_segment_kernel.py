"""Attention over static segments of keys in C, as conv_attention, axial_attention and block_sparse_attention use it.

Value, gradient and tangent are fused. Their derivatives are those of the plain-torch formulas of softmax attention under the
pattern's mask of positions, which recompute the weights from q, k and v: a saved sum is a function of them, not an input.
"""

from __future__ import annotations

import torch
from fnattn_kernels.native import segment_attention as native
from torch import Tensor

from . import _segments
from ._door import Kernel, native_reason
from .softmax import _backward_formula, _by_formula, _fold, _tangent_formula

ATTEND, BACKWARD, TANGENT = native.operators("segment_attention_native", _segments.lists)


def _table(q: Tensor, keep: Tensor | None, layout: Tensor | None, pattern) -> Tensor:
    return _segments.table(tuple(pattern), layout, keep, q.shape[2], q.device)


def _of_backward(g, q, k, v, keep, out, lse, layout, pattern, scale, g_lse=None):
    return _backward_formula(g, q, k, v, _table(q, keep, layout, pattern), out, lse, None, scale, g_lse)


def _of_tangent(q, k, v, keep, out, lse, tq, tk, tv, layout, pattern, scale):
    return _tangent_formula(q, k, v, _table(q, keep, layout, pattern), out, lse, tq, tk, tv, None, scale)


def _attend_vjp(needs, args, outs, cotangents):
    q, k, v, keep, *pattern = args
    g, g_lse = cotangents
    if g_lse is None:
        grads = BACKWARD(g, q, k, v, keep, *outs, *pattern)
    else:
        g = torch.zeros_like(outs[0]) if g is None else g
        grads = _of_backward(g, q, k, v, keep, *outs, *pattern, g_lse)
    return (*(x if need else None for x, need in zip(grads, needs)), None, None, None, None)


def _attend_jvp(args, outs, tangents):
    q, k, v, keep, *pattern = args
    return TANGENT(q, k, v, keep, *outs, *tangents[:3], *pattern)


ATTEND.derive(vjp=_attend_vjp, jvp=_attend_jvp, batch=_fold(ATTEND, mask_at=4))
_by_formula(BACKWARD, _of_backward, mask_at=7)
_by_formula(TANGENT, _of_tangent, mask_at=9)


def _why_not(q: Tensor, k: Tensor, v: Tensor, *_) -> str | None:
    return native_reason("segment_attention", q, k, v)


def _conv(q, k, v, mask, text_len, image_size, kernel_size, dilation, scale, text_sees_all, *_):
    return ATTEND(q, k, v, mask, None, _segments.conv(text_len, image_size, kernel_size, dilation, text_sees_all), scale)[0]


def _axial(q, k, v, mask, text_len, image_size, axis, scale, text_sees_all, *_):
    return ATTEND(q, k, v, mask, None, _segments.axial(text_len, image_size, axis, text_sees_all), scale)[0]


def _blocks(q, k, v, layout, block, causal, keep, scale):
    return ATTEND(q, k, v, keep, layout[None], _segments.blocks(block, causal), scale)[0]


CONV = Kernel("native", _conv, _why_not)
AXIAL = Kernel("native", _axial, _why_not)
BLOCK_SPARSE = Kernel("native", _blocks, _why_not)
