"""Attention over static segments of keys in C and by Triton, as conv_attention, axial_attention and block_sparse_attention use it.

Value, gradient, tangent, and the tangent of the gradient are fused. They close under differentiation to second order, for with
f = g . attend(q, k, v), whose gradient in (q, k, v) is `backward`, J its Jacobian and H its symmetric Hessian in (q, k, v):

    tangent of backward along (tg, t)      second = H t + J^T tg
    pull-back of c through backward        H c for (q, k, v);   J c for g, which is `tangent`
    pull-back of c through tangent         H t of c . attend for (q, k, v);   J^T c for t, which is `backward`

Further derivatives are those of plain-torch formulas under the pattern's mask of positions. Both recompute the weights from q, k
and v: a saved result (out, lse, their tangents) is a function of them, not an input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from fnattn_kernels import flex
from fnattn_kernels.contracts import reference_jvp, reference_vjp
from fnattn_kernels.native import segment_attention as native
from fnattn_kernels.triton import segment_attention as triton
from torch import Tensor

from . import _segment_tiles, _segments, softmax
from ._door import Kernel, native_reason

NATIVE = native.operators("segment_attention_native", _segments.lists)
TRITON = triton.operators("segment_attention_triton", _segment_tiles.walk)


# ------------------------------------------------------------------------------------------------ formulas


def _mask(q: Tensor, keep: Tensor | None, layout: Tensor | None, pattern) -> Tensor:
    return _segments.table(tuple(pattern), layout, keep, q.shape[2], q.device)


def _of_backward(g, q, k, v, keep, out, lse, layout, pattern, scale, g_lse=None):
    return softmax._backward_formula(g, q, k, v, _mask(q, keep, layout, pattern), out, lse, None, scale, g_lse)


def _of_tangent(q, k, v, keep, out, lse, tq, tk, tv, layout, pattern, scale):
    return softmax._tangent_formula(q, k, v, _mask(q, keep, layout, pattern), out, lse, tq, tk, tv, None, scale)


def _of_second(g, q, k, v, keep, out, lse, t_out, t_lse, tg, tq, tk, tv, layout, pattern, scale):
    tg, tq, tk, tv = (torch.zeros_like(x) if t is None else t for x, t in ((g, tg), (q, tq), (k, tk), (v, tv)))
    q, p = softmax._table(q, k, _mask(q, keep, layout, pattern), None, scale)
    g, tg, tq = (t.unflatten(1, q.shape[1:3]) for t in (g, tg, tq))
    ts = scale * (torch.einsum("bgrid,bgjd->bgrij", tq, k) + torch.einsum("bgrid,bgjd->bgrij", q, tk))
    tp = p * (ts - (p * ts).sum(-1, keepdim=True))
    slope = torch.einsum("bgrie,bgje->bgrij", g, v)
    t_slope = torch.einsum("bgrie,bgje->bgrij", tg, v) + torch.einsum("bgrie,bgje->bgrij", g, tv)
    t_slope = t_slope - (tp * slope + p * t_slope).sum(-1, keepdim=True)
    slope = slope - (p * slope).sum(-1, keepdim=True)
    ds, tds = scale * p * slope, scale * (tp * slope + p * t_slope)
    dq = torch.einsum("bgrij,bgjd->bgrid", tds, k) + torch.einsum("bgrij,bgjd->bgrid", ds, tk)
    dk = torch.einsum("bgrij,bgrid->bgjd", tds, q) + torch.einsum("bgrij,bgrid->bgjd", ds, tq)
    dv = torch.einsum("bgrij,bgrie->bgje", tp, g) + torch.einsum("bgrij,bgrie->bgje", p, tg)
    return dq.flatten(1, 2), dk, dv


# ------------------------------------------------------------------------------------------------ rules


def _where(needs, grads) -> tuple:
    return tuple(x if need else None for x, need in zip(grads, needs))


def rules(attend, others) -> dict:
    """vjp and jvp of an operator that computes value and lse, by the other operators of a kernel."""

    def vjp(needs, args, outs, cotangents):
        q, k, v, keep, *pattern = args
        g, g_lse = cotangents
        if g_lse is None:
            grads = others.backward(g, q, k, v, keep, *outs, *pattern)
        else:
            g = torch.zeros_like(outs[0]) if g is None else g
            grads = _of_backward(g, q, k, v, keep, *outs, *pattern, g_lse)
        return (*_where(needs, grads), None, None, None, None)

    def jvp(args, outs, tangents):
        q, k, v, keep, *pattern = args
        return others.tangent(q, k, v, keep, *outs, *tangents[:3], *pattern)

    return {"vjp": vjp, "jvp": jvp, "batch": softmax._fold(attend, mask_at=4)}


def _rules_of_backward(ops) -> dict:
    def vjp(needs, args, outs, cotangents):
        g, q, k, v, keep, out, lse, *pattern = args
        moved = ops.tangent(q, k, v, keep, out, lse, *cotangents, *pattern)
        grads = ops.second(g, q, k, v, keep, out, lse, *moved, None, *cotangents, *pattern) if any(needs[1:4]) else (None,) * 3
        return (*_where(needs, (moved[0], *grads)), *(None,) * 6)

    def jvp(args, outs, tangents):
        g, q, k, v, keep, out, lse, *pattern = args
        moved = tangents[5:7]  # those of out and lse, unless they were saved before anyone moved
        if any(t is None for t in moved):
            moved = ops.tangent(q, k, v, keep, out, lse, *tangents[1:4], *pattern)
        return ops.second(g, q, k, v, keep, out, lse, *moved, *tangents[:4], *pattern)

    return {"vjp": vjp, "jvp": jvp, "batch": softmax._fold(ops.backward, mask_at=7), "save_outputs": False}


def _rules_of_tangent(ops) -> dict:
    def vjp(needs, args, outs, cotangents):
        c, c_lse = cotangents
        if c_lse is not None:
            return reference_vjp(_of_tangent, needs, args, cotangents)
        q, k, v, keep, out, lse, *moves = args
        moves, pattern = moves[:3], moves[3:]
        first = ops.second(c, q, k, v, keep, out, lse, *outs, None, *moves, *pattern) if any(needs[:3]) else (None,) * 3
        second = ops.backward(c, q, k, v, keep, out, lse, *pattern) if any(needs[6:9]) else (None,) * 3
        return (*_where(needs, first), None, None, None, *_where(needs[6:], second), None, None, None)

    return {"vjp": vjp, "jvp": lambda args, outs, tangents: reference_jvp(_of_tangent, args, tangents),
            "batch": softmax._fold(ops.tangent, mask_at=9)}


for _ops in (NATIVE, TRITON):
    _ops.attend.derive(**rules(_ops.attend, _ops))
    _ops.backward.derive(**_rules_of_backward(_ops))
    _ops.tangent.derive(**_rules_of_tangent(_ops))
    softmax._by_formula(_ops.second, _of_second, mask_at=13)
flex.attend.derive(**rules(flex.attend, TRITON))


# ------------------------------------------------------------------------------------------------ kernels of three operators


def _native_reason(q: Tensor, k: Tensor, v: Tensor, *_) -> str | None:
    return native_reason("segment_attention", q, k, v)


def _triton_reason(q: Tensor, k: Tensor, v: Tensor, *_) -> str | None:
    return triton.why_not(q, k, v)


def _flex_reason(q: Tensor, k: Tensor, v: Tensor, *_) -> str | None:
    return flex.why_not(q, k, v)


def conv(attend, q, k, v, mask, text_len, image_size, kernel_size, dilation, scale, text_sees_all, *_):
    """The result of `conv_attention` by one of the operators above."""
    return attend(q, k, v, mask, None, _segments.conv(text_len, image_size, kernel_size, dilation, text_sees_all), scale)[0]


def axial(attend, q, k, v, mask, text_len, image_size, axis, scale, text_sees_all, *_):
    """The result of `axial_attention` by one of the operators above."""
    return attend(q, k, v, mask, None, _segments.axial(text_len, image_size, axis, text_sees_all), scale)[0]


def blocks(attend, q, k, v, layout, block, causal, keep, scale):
    """The result of `block_sparse_attention` by one of the operators above."""
    return attend(q, k, v, keep, layout[None], _segments.blocks(block, causal), scale)[0]


def kernels(run: Callable) -> tuple[Kernel, Kernel]:
    """"native" and "triton" of the operator that run(attend, ...) computes."""
    return (Kernel("native", functools.partial(run, NATIVE.attend), _native_reason),
            Kernel("triton", functools.partial(run, TRITON.attend), _triton_reason))


FLEX = Kernel("flex", functools.partial(blocks, flex.attend), _flex_reason)
