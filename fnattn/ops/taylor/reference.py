"""Taylor attention and its gradients in plain torch: what the kernels must compute, and all derivatives beyond theirs.

Chunked: inside a chunk of l positions the polynomial is taken of the [l, l] scores; what earlier chunks hold is read
from the running sum of psi(k) [v, 1]^T. Splits and concatenations, not slices: the gradient of a slice is as long as
what it was cut from, which would make a backward pass quadratic in the number of chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# b batch, h query heads, g key heads, r = h / g, n queries, m keys, d width of q and k, e width of v,
# F = 1 + d + d (d + 1) / 2 features, c chunks of l positions
CHUNK = 64
EPS = 1e-5


def reference(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None, sums: Tensor | None = None,
              hard: bool = False, causal: bool = True, scale: float = 1.0, eps: float = EPS,
              chunk: int = CHUNK) -> tuple[Tensor, Tensor, Tensor]:
    """(out [b, h, n, e], den [b, h, n] before the clamp, sums). With one chunk for all it is the quadratic form."""
    n, groups = q.shape[2], k.shape[1]
    chunk = _chunk_for(n, chunk) if causal else chunk
    queries, keys, values = _operands(scale * q, k, v, keep, hard, causal, chunk)
    acc, _, total = _accumulate(queries, keys, values, sums, q.shape[1] // groups if groups else 1, causal, chunk)
    num, den = _join(acc, q.shape[1], n).split([v.shape[3], 1], -1)
    return num / den.clamp_min(eps), den.squeeze(-1), total


def gradients(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, sums: Tensor | None, out: Tensor, den: Tensor,
              grad: Tensor, grad_sums: Tensor | None, hard: bool = False, causal: bool = True, scale: float = 1.0,
              eps: float = EPS, chunk: int = CHUNK) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, keep and sums for cotangents of out and of the returned sums.

    With g' = [g / den, -(g . out) / den] the gradient of p_ij is u_ij = g'_i . [v_j, 1], and that of s_ij is
    (1 + s_ij) u_ij. out and den are not read but computed again, so that differentiating this function sees through
    them.
    """
    (b, h, n, _), (_, g, m, e) = q.shape, v.shape
    chunk = _chunk_for(n, chunk) if causal else chunk
    repeat = h // g if g else 1
    queries, keys, values = _operands(scale * q, k, v, keep, hard, causal, chunk)
    acc, states, _ = _accumulate(queries, keys, values, sums, repeat, causal, chunk)
    num, den = _join(acc, h, n).split([e, 1], -1)
    safe = den.clamp_min(eps)
    g_den = torch.where(den >= eps, -(grad * (num / safe)).sum(-1, keepdim=True), 0.0)
    g_rows = _query_chunks(torch.cat((grad, g_den), -1) / safe, g, causal, chunk)  # g'

    after, d_sums = _from_later(features(queries, False).mT @ g_rows, grad_sums, causal)
    d_queries = features_back(queries, g_rows @ states.mT, False)
    d_keys = features_back(keys, values @ after.mT, True)
    d_values = features(keys, True) @ after
    if causal:
        scores = queries @ keys.mT
        d_scores = _past((1 + scores) * (g_rows @ values.mT), repeat)
        d_queries = d_queries + d_scores @ keys
        d_keys = d_keys + d_scores.mT @ queries
        d_values = d_values + _past(polynomial(scores), repeat).mT @ g_rows
    dq = scale * _join(d_queries, h, n)
    dk = _join(d_keys, g, m)
    d_values = _join(d_values, g, m)
    dv, d_one = d_values.split([e, 1], -1)
    d_keep = q.new_empty(b, 0)
    if keep is not None:
        weight = keep[:, None, :, None]
        if hard:
            dk, dv = torch.where(weight != 0, dk, 0.0), torch.where(weight != 0, dv, 0.0)
        else:
            d_keep = ((dv * v).sum(-1) + d_one.squeeze(-1)).sum(1)
            dv = weight * dv
    return dq, dk, dv, d_keep, q.new_empty(b, 0, 0, 0) if sums is None else d_sums


def tangents(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, sums: Tensor | None, out: Tensor, den: Tensor,
             tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, tkeep: Tensor | None, tsums: Tensor | None,
             hard: bool = False, causal: bool = True, scale: float = 1.0, eps: float = EPS,
             chunk: int = CHUNK) -> tuple[Tensor, Tensor, Tensor]:
    """Change of (out, den, sums) when q, k, v, keep and sums move along tq, tk, tv, tkeep, tsums (None: do not move).

    With a dot for a change: p. = (1 + s) s. and s. = q..k + q.k. inside a chunk, phi. S + phi S. between chunks. out and
    den are not read but computed again, as in `gradients`.
    """
    (_, h, n, _), (_, g, _, e) = q.shape, v.shape
    chunk = _chunk_for(n, chunk) if causal else chunk
    repeat = h // g if g else 1
    queries, keys, values = _operands(scale * q, k, v, keep, hard, causal, chunk)
    acc, states, _ = _accumulate(queries, keys, values, sums, repeat, causal, chunk)
    moves = _operands_along(q, k, v, keep, tq, tk, tv, tkeep, scale, hard, causal, chunk)
    t_acc, _, t_total = _accumulate_along((queries, keys, values), moves, states, tsums, repeat, causal)
    num, den = _join(acc, h, n).split([e, 1], -1)
    t_num, t_den = _join(t_acc, h, n).split([e, 1], -1)
    safe = den.clamp_min(eps)
    t_out = (t_num - torch.where(den >= eps, t_den, 0.0) * (num / safe)) / safe
    return t_out, t_den.squeeze(-1), t_total


# ----------------------------------------------------------------------------------------------------------- features


def pairs(d: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Rows i and columns j of the products x_i x_j with i <= j, row-major."""
    i, j = torch.triu_indices(d, d, device=like.device).unbind(0)
    return i, j


def features(x: Tensor, weighted: bool) -> Tensor:
    """phi(x) = [1, x, x_i x_j (i <= j)], or psi(x) with squares halved: [..., d] -> [..., F]."""
    i, j = pairs(x.shape[-1], x)
    second = x.index_select(-1, i) * x.index_select(-1, j)
    if weighted:
        second = torch.where(i == j, 0.5 * second, second)
    one, _ = torch.ones_like(x).split([1, x.shape[-1] - 1], -1)
    return torch.cat((one, x, second), -1)


def features_along(x: Tensor, t: Tensor, weighted: bool) -> Tensor:
    """Change of the features when x moves along t: [..., d] -> [..., F]."""
    i, j = pairs(x.shape[-1], x)
    second = t.index_select(-1, i) * x.index_select(-1, j) + x.index_select(-1, i) * t.index_select(-1, j)
    if weighted:
        second = torch.where(i == j, 0.5 * second, second)
    none, _ = torch.zeros_like(x).split([1, x.shape[-1] - 1], -1)
    return torch.cat((none, t, second), -1)


def features_back(x: Tensor, grad: Tensor, weighted: bool) -> Tensor:
    """Gradient of x [..., d] from that of its features [..., F]: every product feeds both its factors."""
    d = x.shape[-1]
    _, linear, second = grad.split([1, d, grad.shape[-1] - d - 1], -1)
    return linear + pairs_back(x, second, weighted)


def pairs_back(x: Tensor, second: Tensor, weighted: bool) -> Tensor:
    """The part of features_back that comes from the products, [..., d (d + 1) / 2]; bilinear."""
    d = x.shape[-1]
    i, j = pairs(d, x)
    if not weighted:
        second = torch.where(i == j, 2 * second, second)
    at = torch.arange(d, device=x.device)
    low, high = torch.minimum(at[:, None], at), torch.maximum(at[:, None], at)
    place = low * d - low * (low - 1) // 2 + high - low  # of x_low x_high among the products
    table = second.index_select(-1, place.flatten()).unflatten(-1, (d, d))
    return (table @ x.unsqueeze(-1)).squeeze(-1)


def polynomial(scores: Tensor) -> Tensor:
    """exp to second order: 1 + s + s^2 / 2, which is positive everywhere."""
    return 1 + scores + scores.square() / 2


# ------------------------------------------------------------------------------------------------------------- chunks


def _operands(q, k, v, keep, hard, causal, chunk):
    """Queries [b, g, c, r * l, d], keys [b, g, c, l, d] and values = keep [v, 1] as [b, g, c, l, e + 1]."""
    one, _ = torch.ones_like(k).split([1, k.shape[3] - 1], -1)
    values = torch.cat((v, one), -1)
    if keep is not None:
        weight = keep[:, None, :, None]
        if hard:  # not a product: a key that is not there may hold anything, NaN included
            k, values = torch.where(weight != 0, k, 0.0), torch.where(weight != 0, values, 0.0)
        else:
            values = weight * values
    queries = _query_chunks(q, k.shape[1], causal, chunk)
    return queries, _key_chunks(k, causal, chunk), _key_chunks(values, causal, chunk)


def _chunk_for(length: int, chunk: int) -> int:
    """No longer than the sequence. torch.export takes it whole: it cannot prove that padding fits every free length."""
    return length if torch.compiler.is_exporting() else min(chunk, max(length, 1))


def _key_chunks(x: Tensor, causal: bool, chunk: int) -> Tensor:
    """[..., m, w] -> [..., c, l, w]; rows that fill the last chunk are zero, and so count for nothing."""
    if not causal:
        return x.unsqueeze(-3)
    if torch.compiler.is_exporting():
        return x.unsqueeze(-3)
    count = (x.shape[-2] + chunk - 1) // chunk
    return pad(x, (0, 0, 0, count * chunk - x.shape[-2])).unflatten(-2, (count, chunk))


def _query_chunks(x: Tensor, groups: int, causal: bool, chunk: int) -> Tensor:
    """[b, h, n, w] -> [b, g, c, r * l, w]: heads that share a key head become rows, so keys are never repeated."""
    x = x.unflatten(1, (groups, x.shape[1] // groups if groups else 1))
    return _key_chunks(x, causal, chunk).transpose(2, 3).flatten(3, 4)


def _join(x: Tensor, heads: int, length: int) -> Tensor:
    """[b, g, c, r * l, w] -> [b, h, length, w], the inverse of both splits."""
    if heads == 0:
        return x.reshape(x.shape[0], 0, length, x.shape[4])
    repeat = heads // x.shape[1] if x.shape[1] else 1
    x = x.unflatten(3, (repeat, x.shape[3] // repeat))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2).narrow(2, 0, length)


def _past(table: Tensor, repeat: int) -> Tensor:
    """Zero where a key comes after its query: [..., r * l, l]."""
    at = torch.arange(table.shape[-1], device=table.device)
    return torch.where(at.repeat(repeat)[:, None] >= at, table, 0.0)


def _accumulate(queries, keys, values, sums, repeat, causal, chunk):
    """sum_j p_ij [v_j, 1] as chunks [b, g, c, r * l, e + 1], the states that the chunks read, and the final sums."""
    added = features(keys, True).mT @ values  # [b, g, c, F, e + 1]
    start = torch.zeros_like(added.sum(2)) if sums is None else sums
    if causal:
        states = torch.cat((start.unsqueeze(2), added), 2).cumsum(2)
        states, total = states.split([added.shape[2], 1], 2)
        acc = _past(polynomial(queries @ keys.mT), repeat) @ values
        if sums is not None or added.shape[2] > 1:
            acc = acc + features(queries, False) @ states
        return acc, states, total.squeeze(2)
    total = start + added.squeeze(2)
    if keys.shape[3] <= chunk:
        acc = polynomial(queries @ keys.mT) @ values
        return (acc if sums is None else acc + features(queries, False) @ sums.unsqueeze(2)), total.unsqueeze(2), total
    return features(queries, False) @ total.unsqueeze(2), total.unsqueeze(2), total


def _from_later(added: Tensor, last: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """Sums of phi(q) g'^T [b, g, c, F, e + 1] over the chunks after each, and over all; `last` comes after all of them."""
    last = torch.zeros_like(added.sum(2)) if last is None else last
    if not causal:
        total = added.squeeze(2) + last
        return total.unsqueeze(2), total
    after = torch.cat((added, last.unsqueeze(2)), 2).flip(2).cumsum(2).flip(2)
    first, after = after.split([1, added.shape[2]], 2)
    return after, first.squeeze(2)


# ------------------------------------------------------------------------------------------------------------ tangents


def _operands_along(q, k, v, keep, tq, tk, tv, tkeep, scale, hard, causal, chunk):
    """Change of _operands; a tangent of None is zero."""
    tq, tk, tv = (torch.zeros_like(x) if t is None else t for x, t in ((q, tq), (k, tk), (v, tv)))
    one, _ = torch.ones_like(k).split([1, k.shape[3] - 1], -1)
    moved = torch.cat((tv, torch.zeros_like(one)), -1)
    if keep is not None:
        weight = keep[:, None, :, None]
        if hard:
            tk, moved = torch.where(weight != 0, tk, 0.0), torch.where(weight != 0, moved, 0.0)
        else:
            moved = weight * moved
            if tkeep is not None:
                moved = moved + tkeep[:, None, :, None] * torch.cat((v, one), -1)
    return (_query_chunks(scale * tq, k.shape[1], causal, chunk), _key_chunks(tk, causal, chunk),
            _key_chunks(moved, causal, chunk))


def _accumulate_along(operands, moves, states, tsums, repeat, causal):
    """Change of _accumulate's three results."""
    (queries, keys, values), (t_queries, t_keys, t_values) = operands, moves
    added = features_along(keys, t_keys, True).mT @ values + features(keys, True).mT @ t_values
    start = torch.zeros_like(added.sum(2)) if tsums is None else tsums
    t_states, t_total = torch.cat((start.unsqueeze(2), added), 2).cumsum(2).split([added.shape[2], 1], 2)
    if not causal:
        t_states = t_total
    t_acc = features(queries, False) @ t_states + features_along(queries, t_queries, False) @ states
    if causal:
        scores, t_scores = queries @ keys.mT, t_queries @ keys.mT + queries @ t_keys.mT
        t_acc = t_acc + _past((1 + scores) * t_scores, repeat) @ values + _past(polynomial(scores), repeat) @ t_values
    return t_acc, t_states, t_total.squeeze(2)
