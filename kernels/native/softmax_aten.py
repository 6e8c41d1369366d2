"""Softmax attention on CPU, with little C of our own or none: torch's own fused forward, and derivatives in blocks of queries.

torch's kernel knows neither grouped heads, nor values of another width, nor a causal offset, nor empty inputs (it crashes on
those); what follows lays such calls out as ones that it does know. Keys that every query sees and keys on the diagonal are
attended to apart and merged by their log-sum-exp, so no mask table is made for a causal offset.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from .build import why_not
from .call import address, function, merged, threads

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# Scores that a tangent holds at once.
BLOCK = 1 << 19
# Scores that a backward holds at once: such as stay in the cache.
STAYS = 1 << 16
FEW = 32  # queries

# b batch, h query heads, g key heads, r = h / g, n queries, m keys, d width of q and k, e width of v.
# mask: bool [b or 1, h or 1, n or 1, m]; start: position of the first query, None if not causal.


def _segments(n: int, m: int, start: int | None) -> list[tuple[int, int, int, bool]]:
    """(first row, first key, end of keys, causal from the corner): together, every visible pair once."""
    if start is None:
        return [(0, 0, m, False)] if n and m else []
    first = max(0, -start)  # earlier rows see nothing
    start, rows = max(0, start), n - first
    if rows <= 0 or m == 0:
        return []
    if rows == 1 or start + 1 >= m:
        return [(first, 0, min(m, start + 1) if rows == 1 else m, False)]
    diagonal = (first, start, min(m, start + rows), True)
    return [(first, 0, start, False), diagonal] if start else [diagonal]


def _dense(t: Tensor, width: int) -> Tensor:
    """t with its last axis padded to `width` and rows that a matrix product can stride over."""
    if t.shape[-1] < width:
        t = pad(t, (0, width - t.shape[-1]))  # heads that lay side by side still do: torch takes them for channels of a picture
    return t if t.stride(-1) == 1 and t.stride(-2) >= width else t.contiguous()


def _cut(mask: Tensor | None, first: int, begin: int, end: int) -> Tensor | None:
    if mask is None:
        return None
    return mask[:, :, first if mask.shape[2] > 1 else 0:, begin:end]


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(mask.logical_not(), -torch.inf)


def _empty_rows(mask: Tensor | None, n: int, causal: bool) -> Tensor | None:
    """Rows of a segment without a visible key, [b or 1, h or 1, n or 1]."""
    if mask is None:
        return None
    seen = mask.byte()
    if not causal:
        return seen.amax(-1) == 0
    return (seen.amax(-1) == 0) | (seen.argmax(-1) > torch.arange(n))


def _groups(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> list[tuple[slice, slice]]:
    """Query heads and key heads that one call serves: a single key head is shared by a stride of zero, never copied."""
    h, g = q.shape[1], k.shape[1]
    if g in (1, h):
        return [(slice(0, h), slice(0, g))]
    return [(slice(j * h // g, (j + 1) * h // g), slice(j, j + 1)) for j in range(g)]


def _heads(mask: Tensor | None, part: slice) -> Tensor | None:
    return mask if mask is None or mask.shape[1] == 1 else mask[:, part]


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """One segment; rows that see nothing get 0 and log-sum-exp -inf."""
    e, width = v.shape[3], max(q.shape[3], v.shape[3])
    if scale <= 0:  # torch's kernel scales after it has hidden keys by -inf
        q, scale = q * scale, 1.0
    q, k, v = (_dense(t, width) for t in (q, k, v))
    added, outs = _added(mask, q.dtype), []
    for heads, keys in _groups(q, k, mask, causal):
        q_g, r = q[:, heads], heads.stop - heads.start
        k_g, v_g = (t[:, keys] if keys.stop - keys.start == r else t[:, keys].expand(-1, r, -1, -1) for t in (k, v))
        outs.append(_FORWARD(q_g, k_g, v_g, 0.0, causal, attn_mask=_heads(added, heads), scale=scale))
    out, lse = outs[0] if len(outs) == 1 else (torch.cat(parts, 1) for parts in zip(*outs))
    out = out[..., :e]
    empty = _empty_rows(mask, q.shape[2], causal)
    if empty is not None:
        out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)
    return out, lse


def _zeros(like: Tensor, width: int) -> Tensor:
    """[b, heads, rows, width], laid out [b, rows, heads, width], as every result of the kernels."""
    b, heads, rows = like.shape[:3]
    return like.new_zeros(b, rows, heads, width).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, start: int | None, scale: float) -> tuple[Tensor, Tensor]:
    """out [b, h, n, e] and the logarithm of each row's sum of exponentials [b, h, n]; both 0 where a row sees no key."""
    (b, h, n, _), e = q.shape, v.shape[3]
    segments = _segments(n, k.shape[2], start) if b * h * e else []
    if not segments:
        return _zeros(q, e), q.new_zeros(b, h, n)
    parts = [_forward(q[:, :, first:], k[:, :, begin:end], v[:, :, begin:end], _cut(mask, first, begin, end), causal, scale)
             for first, begin, end, causal in segments]
    out, lse = parts[0]
    for out_p, lse_p in parts[1:]:
        total = torch.logaddexp(lse, lse_p)
        safe = total.masked_fill(total == -torch.inf, 0.0)
        out = out * (lse - safe).exp_()[..., None] + out_p * (lse_p - safe).exp_()[..., None]
        lse = total
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    first = segments[0][0]
    if first:
        out, lse = pad(out, (0, 0, first, 0)), pad(lse, (first, 0))
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


def attend_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, start: int | None,
                    scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for the cotangent g of out, some heads or a block of rows of one at a time.

    Not by torch's own backward: that has the log-sum-exp in float32, which is an error in all weights of a row, up to thirty times
    plain torch's. Weights are computed anew; without a compiler the rows of a few queries in float64.
    """
    (b, h, n), (groups, m) = q.shape[:3], v.shape[1:3]
    if not b * groups * h * n:
        return tuple(_zeros(t, t.shape[3]) for t in (q, k, v))
    shared, grads = h // groups, [merged(t, t.shape[3]) for t in (q, k, v)]
    q, g, dq = (t.unflatten(1, (groups, shared)) for t in (q * scale, g, grads[0]))
    dk, dv = grads[1:]
    rows = max(1, min(n, max(64, STAYS // max(1, m)) // shared))
    # A mask is spread over one head at a time only.
    heads = max(1, STAYS // max(1, shared * rows * m)) if mask is None else 1
    row_gradients = _row_gradients_in_c if why_not("decode") is None else partial(_row_gradients, wide=n <= FEW)
    for some in _some_heads(b, groups, heads):
        for i in range(0, n, rows):
            here = slice(i, min(n, i + rows))
            end = m if start is None else max(0, min(m, start + here.stop))
            q_h, g_h = (t[(*some, slice(None), here)].flatten(2, 3).flatten(0, 1) for t in (q, g))
            k_h, v_h = (t[(*some, slice(end))].flatten(0, 1) for t in (k, v))
            hidden = _hidden(mask, some[0].start * groups + some[1].start, groups, shared, here, end, start)
            p, ds = row_gradients(q_h @ k_h.mT, g_h @ v_h.mT, hidden)
            own = dq[(*some, slice(None), here)]
            own.copy_((ds @ k_h).view(own.shape))
            for left, right, whole in ((ds, q_h, dk[some]), (p, g_h, dv[some])):
                seen = whole[:, :, :end]
                block = (left.mT @ right).view(seen.shape)
                if i:  # each block's sum is made, then added: in place, every product would be rounded to the size of the whole
                    seen += block
                    continue
                seen.copy_(block)
                whole[:, :, end:] = 0
    grads[0].mul_(scale)
    return tuple(grads)


def _some_heads(b: int, groups: int, count: int) -> list[tuple[slice, slice]]:
    """Sequences and key heads, about `count` heads at a time: whole sequences, or a part of one."""
    if count >= groups:
        return [(slice(i, i + count // groups), slice(0, groups)) for i in range(0, b, count // groups)]
    return [(slice(i, i + 1), slice(j, j + count)) for i in range(b) for j in range(0, groups, count)]


def _hidden(mask: Tensor | None, head: int, groups: int, shared: int, here: slice, end: int, start: int | None) -> Tensor | None:
    """Which of the keys before `end` the queries `here` of the heads that share a key head do not see, [shared rows, end]; or None."""
    rows, hidden = here.stop - here.start, None
    if start is not None and start + here.start < end - 1:
        hidden = (torch.arange(end) > start + torch.arange(here.start, here.stop)[:, None]).repeat(shared, 1)
    if mask is not None:
        part = mask[head // groups if mask.shape[0] > 1 else 0, :, here if mask.shape[2] > 1 else slice(None), :end]
        part = part[head % groups * shared:][:shared] if part.shape[0] > 1 else part
        unseen = ~part.expand(shared, rows, end).flatten(0, 1)
        hidden = unseen if hidden is None else hidden | unseen
    return hidden


def _row_gradients_in_c(scores: Tensor, slope: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """`_row_gradients` in one pass over each row, in float64."""
    if hidden is not None:
        scores = scores.masked_fill_(hidden, -torch.inf)
    rows, m = math.prod(scores.shape[:-1]), scores.shape[-1]
    call = function("decode", "try_row_gradients", scores.dtype, "ppiii")
    if m and call(address(scores), address(slope), rows, m, threads(16 * rows * m)):
        raise MemoryError(f"softmax_attention: no memory for two rows of {m} numbers")
    return scores, slope


def _row_gradients(scores: Tensor, slope: Tensor, hidden: Tensor | None, wide: bool) -> tuple[Tensor, Tensor]:
    """The weights of rows of scores, and the gradient of the scores given that of the weights."""
    dtype = scores.dtype
    if wide:
        scores, slope = scores.double(), slope.double()
    if hidden is not None:
        scores = scores.masked_fill_(hidden, -torch.inf)
    p = scores.softmax(-1)
    if hidden is not None:
        p.masked_fill_(hidden, 0.0)  # a row that sees nothing is NaN until then
    ds = torch._softmax_backward_data(slope, p, -1, p.dtype)
    ds.addcmul_(p, ds.sum(-1, keepdim=True), value=-1)  # it adds up to 0: csrc/softmax_tile.h
    return p.to(dtype), ds.to(dtype)


def tangent(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, tq: Tensor | None,
            tk: Tensor | None, tv: Tensor | None, start: int | None, scale: float) -> tuple[Tensor, Tensor]:
    """Tangents of out and of the logarithm of the row sums, a block of rows at a time."""
    t_out, t_lse = _zeros(out, out.shape[3]), torch.zeros_like(lse)
    for here, hidden in _row_blocks(q, k, mask, start):
        p, moved = _weights(q, k, lse, tq, tk, hidden, here, scale)
        t_lse[:, :, here] = moved.sum(-1).flatten(1, 2)
        block = _from_keys(moved, v) - t_lse[:, :, here, None] * out[:, :, here]
        t_out[:, :, here] = block if tv is None else block + _from_keys(p, tv)
    return t_out, t_lse


def second(g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, t_out: Tensor, t_lse: Tensor,
           tg: Tensor | None, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, start: int | None,
           scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents of the gradients of q, k and v, a block of rows at a time; the formulas are in csrc/softmax_second.c."""
    dq, dk, dv = _zeros(q, q.shape[3]), _zeros(k, k.shape[3]), _zeros(v, v.shape[3])
    groups = k.shape[1]
    for here, hidden in _row_blocks(q, k, mask, start):
        p, moved = _weights(q, k, lse, tq, tk, hidden, here, scale)
        moved = moved - p * _grouped(t_lse[:, :, here, None], groups)
        g_h, slope = g[:, :, here], _by_keys(g[:, :, here], v) - _grouped((g * out).sum(-1, keepdim=True)[:, :, here], groups)
        t_slope = -_grouped((g_h * t_out[:, :, here]).sum(-1, keepdim=True), groups)
        if tv is not None:
            t_slope = t_slope + _by_keys(g_h, tv)
        if tg is not None:
            t_slope = t_slope + _by_keys(tg[:, :, here], v) - _grouped((tg * out).sum(-1, keepdim=True)[:, :, here], groups)
            dv += _from_queries(p, tg[:, :, here])
        dv += _from_queries(moved, g_h)
        ds, tds = p * slope * scale, (moved * slope + p * t_slope) * scale
        dq[:, :, here] = _from_keys(tds, k) if tk is None else _from_keys(tds, k) + _from_keys(ds, tk)
        dk += _from_queries(tds, q[:, :, here])
        if tq is not None:
            dk += _from_queries(ds, tq[:, :, here])
    return dq, dk, dv


def _row_blocks(q: Tensor, k: Tensor, mask: Tensor | None, start: int | None) -> Iterator[tuple[slice, Tensor]]:
    """Slices of queries, so few that a table [b, h, rows, m] is small, and which keys they do not see [b, g, r, rows, m]."""
    b, h, n, _ = q.shape
    g, m = k.shape[1:3]
    rows = max(1, BLOCK // max(1, b * h * m))
    for i in range(0, n if g else 0, rows):
        here = slice(i, min(n, i + rows))
        hidden = torch.zeros((), dtype=torch.bool)
        if mask is not None:
            part = mask if mask.shape[2] == 1 else mask[:, :, here]
            hidden = ~(part[:, :, None] if part.shape[1] == 1 else _grouped(part, g))
        if start is not None:
            hidden = hidden | (torch.arange(m) > start + torch.arange(i, here.stop)[:, None])
        yield here, hidden


def _weights(q: Tensor, k: Tensor, lse: Tensor, tq: Tensor | None, tk: Tensor | None, hidden: Tensor, here: slice,
             scale: float) -> tuple[Tensor, Tensor]:
    """The weights of a block of queries, and each weight times its score's tangent."""
    p = (_by_keys(q[:, :, here], k) * scale - _grouped(lse[:, :, here, None], k.shape[1])).masked_fill(hidden, -torch.inf).exp()
    moved = torch.zeros_like(p)
    if tq is not None:
        moved += _by_keys(tq[:, :, here], k)
    if tk is not None:
        moved += _by_keys(q[:, :, here], tk)
    return p, moved * p * scale


def _grouped(t: Tensor, g: int) -> Tensor:
    return t.unflatten(1, (g, t.shape[1] // g))


def _by_keys(x: Tensor, y: Tensor) -> Tensor:
    """Products of queries and keys [b, g, r, n, m]."""
    return torch.einsum("bgrid,bgjd->bgrij", _grouped(x, y.shape[1]), y)


def _from_keys(p: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("bgrij,bgjd->bgrid", p, x).flatten(1, 2)


def _from_queries(p: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("bgrij,bgrid->bgjd", p, _grouped(x, p.shape[1]))
