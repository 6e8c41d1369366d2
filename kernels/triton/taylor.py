"""Triton kernels of Taylor linear attention: value, gradient, tangent and the gradient's tangent; see taylor_device.py.

Two passes over the positions: sums of each segment, which a scan adds up, then what each tile of rows reads from them and from
its own segment. Every program stands alone, so that one long sequence fills a GPU as well as many short ones do.
Measured: not yet on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Operator
from ..native import taylor as native
from . import why_not as triton_why_not
from .taylor_launch import Held, Side, gather, slope, states

WIDTHS = (64, 128)  # of heads and of values


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """None if the kernels can serve these tensors, else the reason."""
    if q.shape[3] > WIDTHS[0] or v.shape[3] > WIDTHS[1]:
        return f"needs heads of at most {WIDTHS[0]} and values of at most {WIDTHS[1]} channels, got {q.shape[3]} and {v.shape[3]}"
    return triton_why_not(q, k, v)


# ------------------------------------------------------------------------------------------------ operands


def _keys(k: Tensor, v: Tensor, keep: Tensor | None, hard: bool) -> Side:
    """Keys with keep [v, 1]; what is not there is zero, whatever it holds."""
    if keep is None:
        return Side(k.contiguous(), v.contiguous(), torch.ones_like(k[..., 0]))
    weight = keep[:, None, :, None]
    z = keep[:, None].expand(k.shape[:3]).contiguous()
    if hard:
        return Side(torch.where(weight != 0, k, 0.0).contiguous(), torch.where(weight != 0, v, 0.0).contiguous(), z)
    return Side(k.contiguous(), (weight * v).contiguous(), z)


def _keys_along(k: Tensor, v: Tensor, keep: Tensor | None, hard: bool, tk, tv, tkeep) -> Side:
    """Change of _keys; None does not move."""
    tk, tv = (torch.zeros_like(x) if t is None else t for x, t in ((k, tk), (v, tv)))
    still = torch.zeros_like(k[..., 0])
    if keep is None:
        return Side(tk.contiguous(), tv.contiguous(), still)
    weight = keep[:, None, :, None]
    if hard:
        return Side(torch.where(weight != 0, tk, 0.0).contiguous(), torch.where(weight != 0, tv, 0.0).contiguous(), still)
    tv = weight * tv
    if tkeep is not None:
        tv, still = tv + tkeep[:, None, :, None] * v, tkeep[:, None].expand(k.shape[:3])
    return Side(tk.contiguous(), tv.contiguous(), still.contiguous())


def _rows(queries: Tensor, out: Tensor, den: Tensor, grad: Tensor, eps: float) -> Side:
    """Queries with the cotangents g' of what they sum: [grad / den, -(grad . out) / den]."""
    over = grad / den.clamp_min(eps)[..., None]
    return Side(queries, over.contiguous(), torch.where(den >= eps, -(over * out).sum(-1), 0.0))


def _joined(held: Held, g: int) -> Tensor:
    """The last sums as the operator's callers know them: [b, g, F, e + 1]."""
    return torch.cat((held.y[:, -1], held.z[:, -1, :, None]), -1).unflatten(0, (-1, g))


def _weights(d: int, like: Tensor) -> Tensor:
    """What `states` gives the features, [F, 1]: a half for squares."""
    at = torch.arange(d, device=like.device)
    square = 1 + d + at * d - at * (at - 1) // 2
    return like.new_ones(native.features(d), 1).index_fill_(0, square, 0.5)


# ------------------------------------------------------------------------------------------------ operators


def _forward(q, k, v, keep, sums, hard: bool, causal: bool, scale: float, eps: float):
    (b, h, n, d), (_, g, _, e) = q.shape, v.shape
    if b * g == 0:
        return tuple(q.new_zeros(s) for s in ((b, h, n, e), (b, h, n), (b, g, native.features(d), e + 1)))
    keys, queries = _keys(k, v, keep, hard), (scale * q).contiguous()
    held = states(keys, g, sums, causal, False)
    out, den = gather(queries, keys, held, causal, False, eps)
    return out, den, _joined(held, g)


def _backward(q, k, v, keep, sums, out, den, grad, grad_sums, hard: bool, causal: bool, scale: float, eps: float):
    b, g, d = q.shape[0], k.shape[1], q.shape[3]
    if b * g == 0:
        zeros = [torch.zeros_like(t) for t in (q, k, v)]
        return (*zeros, q.new_zeros(b, 0) if keep is None or hard else torch.zeros_like(keep),
                q.new_empty(b, 0, 0, 0) if sums is None else torch.zeros_like(sums))
    keys, rows = _keys(k, v, keep, hard), _rows((scale * q).contiguous(), out, den, grad, eps)
    weights = _weights(d, q)
    held = states(keys, g, sums, causal, False)
    after = states(rows, g, None if grad_sums is None else weights * grad_sums, causal, True)
    dq = scale * slope(rows, keys, held, causal, False)
    dk = slope(keys, rows, after, causal, True)
    dv, d_one = gather(keys.x, rows, after, causal, True)
    d_keep = q.new_empty(b, 0)
    if keep is not None:
        weight = keep[:, None, :, None]
        if hard:
            dk, dv = torch.where(weight != 0, dk, 0.0), torch.where(weight != 0, dv, 0.0)
        else:
            d_keep, dv = ((dv * v).sum(-1) + d_one).sum(1), weight * dv
    return dq, dk, dv, d_keep, q.new_empty(b, 0, 0, 0) if sums is None else _joined(after, g) / weights


def _tangent(q, k, v, keep, sums, out, den, tq, tk, tv, tkeep, tsums, hard: bool, causal: bool, scale: float, eps: float):
    g = k.shape[1]
    if q.shape[0] * g == 0:
        return _forward(q, k, v, keep, sums, hard, causal, scale, eps)
    keys, t_keys = _keys(k, v, keep, hard), _keys_along(k, v, keep, hard, tk, tv, tkeep)
    queries, t_queries = (scale * q).contiguous(), _scaled(q, tq, scale)
    held, t_held = states(keys, g, sums, causal, False), states(keys, g, tsums, causal, False, t_keys)
    t_num, t_den = gather(queries, keys, held, causal, False, 0.0, t_queries, t_keys, t_held)
    return (t_num - torch.where(den >= eps, t_den, 0.0)[..., None] * out) / den.clamp_min(eps)[..., None], t_den, _joined(t_held, g)


def _second(q, k, v, keep, sums, out, den, grad, grad_sums, tout, tden, tq, tk, tv, tsums, tgrad, tgrad_sums, hard: bool, causal: bool,
            scale: float, eps: float):
    b, g, d = q.shape[0], k.shape[1], q.shape[3]
    if b * g == 0:
        return (*(torch.zeros_like(t) for t in (q, k, v)), q.new_empty(b, 0, 0, 0) if sums is None else torch.zeros_like(sums))
    keys, t_keys = _keys(k, v, keep, hard), _keys_along(k, v, keep, hard, tk, tv, None)
    rows = _rows((scale * q).contiguous(), out, den, grad, eps)
    free, safe = den >= eps, den.clamp_min(eps)
    t_den = torch.where(free, tden, 0.0)
    t_over = ((0.0 if tgrad is None else tgrad) - rows.y * t_den[..., None]) / safe[..., None]
    t_last = torch.where(free, -(t_over * out + rows.y * tout).sum(-1), 0.0)
    t_rows = Side(_scaled(q, tq, scale), t_over.contiguous(), t_last)
    weights = _weights(d, q)
    first, t_first = (None if t is None else weights * t for t in (grad_sums, tgrad_sums))
    held, t_held = states(keys, g, sums, causal, False), states(keys, g, tsums, causal, False, t_keys)
    after, t_after = states(rows, g, first, causal, True), states(rows, g, t_first, causal, True, t_rows)
    t_dq = scale * slope(rows, keys, held, causal, False, t_rows, t_keys, t_held)
    t_dk = slope(keys, rows, after, causal, True, t_keys, t_rows, t_after)
    t_dv, _ = gather(keys.x, rows, after, causal, True, 0.0, t_keys.x, t_rows, t_after)
    if keep is not None:
        there = keep[:, None, :, None] != 0
        t_dk, t_dv = torch.where(there, t_dk, 0.0), torch.where(there, t_dv, 0.0)
    return t_dq, t_dk, t_dv, q.new_empty(b, 0, 0, 0) if sums is None else _joined(t_after, g) / weights


def _scaled(q: Tensor, t: Tensor | None, scale: float) -> Tensor:
    return torch.zeros_like(q, memory_format=torch.contiguous_format) if t is None else (scale * t).contiguous()



def _forward_fake(q, k, v, *rest):
    (b, h, n, d), (_, g, _, e) = q.shape, v.shape
    return q.new_empty(b, h, n, e), q.new_empty(b, h, n), q.new_empty(b, g, native.features(d), e + 1)


def _sums_fake(q, sums):
    return q.new_empty(q.shape[0], 0, 0, 0) if sums is None else sums.new_empty(sums.shape)


def _backward_fake(q, k, v, keep, sums, out, den, grad, grad_sums, hard, *rest):
    return (*(t.new_empty(t.shape) for t in (q, k, v)),
            q.new_empty(q.shape[0], 0) if keep is None or hard else keep.new_empty(keep.shape), _sums_fake(q, sums))


def _second_fake(q, k, v, keep, sums, *rest):
    return *(t.new_empty(t.shape) for t in (q, k, v)), _sums_fake(q, sums)


# Arguments, results and meaning as in native/taylor.py.
_INPUTS, _OPTIONS = "Tensor q, Tensor k, Tensor v, Tensor? keep, Tensor? sums", "bool hard, bool causal, float scale, float eps"
forward = Operator("taylor_triton", 1, f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)", cpu=_forward, cuda=_forward,
                   fake=_forward_fake)
backward = Operator(
    "taylor_backward_triton", 1, f"({_INPUTS}, Tensor out, Tensor den, Tensor grad, Tensor? grad_sums, {_OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)", cpu=_backward, cuda=_backward, fake=_backward_fake)
tangent = Operator(
    "taylor_tangent_triton", 1, f"({_INPUTS}, Tensor out, Tensor den, Tensor? tq, Tensor? tk, Tensor? tv, Tensor? tkeep, "
    f"Tensor? tsums, {_OPTIONS}) -> (Tensor, Tensor, Tensor)", cpu=_tangent, cuda=_tangent, fake=_forward_fake)
second = Operator(
    "taylor_second_triton", 1, f"({_INPUTS}, Tensor out, Tensor den, Tensor grad, Tensor? grad_sums, Tensor tout, Tensor tden, "
    "Tensor? tq, Tensor? tk, Tensor? tv, Tensor? tsums, Tensor? tgrad, Tensor? tgrad_sums, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)", cpu=_second, cuda=_second, fake=_second_fake)
for _own, _same in ((forward, native.forward), (backward, native.backward), (tangent, native.tangent), (second, native.second)):
    _own.like(_same)
