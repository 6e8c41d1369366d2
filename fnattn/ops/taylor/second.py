"""How the gradients of Taylor attention change when its inputs move: second derivatives in plain torch, product rule by
product rule. One function serves both ways to a Hessian-vector product, because a Hessian is symmetric.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import (
    CHUNK,
    EPS,
    _accumulate,
    _accumulate_along,
    _chunk_for,
    _from_later,
    _join,
    _operands,
    _operands_along,
    _past,
    _query_chunks,
    features,
    features_along,
    features_back,
    pairs_back,
    polynomial,
)


def gradient_tangents(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, sums: Tensor | None, out: Tensor, den: Tensor,
                      grad: Tensor, grad_sums: Tensor | None, tout: Tensor, tden: Tensor, tq: Tensor | None,
                      tk: Tensor | None, tv: Tensor | None, tsums: Tensor | None, tgrad: Tensor | None,
                      tgrad_sums: Tensor | None, hard: bool = False, causal: bool = True, scale: float = 1.0,
                      eps: float = EPS, chunk: int = CHUNK) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Change of the gradients of q, k, v and sums when q, k, v, sums and the cotangents move (None: do not move).

    keep is None or hard. out, den, tout and tden are not read but computed again, as in `gradients`.
    """
    (b, h, n, _), (_, g, m, e) = q.shape, v.shape
    chunk = _chunk_for(n, chunk) if causal else chunk
    repeat = h // g if g else 1
    operands = queries, keys, values = _operands(scale * q, k, v, keep, hard, causal, chunk)
    acc, states, _ = _accumulate(queries, keys, values, sums, repeat, causal, chunk)
    moves = t_queries, t_keys, t_values = _operands_along(q, k, v, keep, tq, tk, tv, None, scale, hard, causal, chunk)
    t_acc, t_states, _ = _accumulate_along(operands, moves, states, tsums, repeat, causal)

    num, den = _join(acc, h, n).split([e, 1], -1)
    t_num, t_den = _join(t_acc, h, n).split([e, 1], -1)
    free, safe = den >= eps, den.clamp_min(eps)
    t_den = torch.where(free, t_den, 0.0)
    out = num / safe
    t_out = (t_num - t_den * out) / safe
    over = grad / safe
    t_over = ((0.0 if tgrad is None else tgrad) - over * t_den) / safe
    last = torch.where(free, -(over * out).sum(-1, keepdim=True), 0.0)
    t_last = torch.where(free, -(t_over * out + over * t_out).sum(-1, keepdim=True), 0.0)
    rows = _query_chunks(torch.cat((over, last), -1), g, causal, chunk)
    t_rows = _query_chunks(torch.cat((t_over, t_last), -1), g, causal, chunk)

    phi, t_phi = features(queries, False), features_along(queries, t_queries, False)
    psi, t_psi = features(keys, True), features_along(keys, t_keys, True)
    after, _ = _from_later(phi.mT @ rows, grad_sums, causal)
    t_after, t_dsums = _from_later(t_phi.mT @ rows + phi.mT @ t_rows, tgrad_sums, causal)
    d = q.shape[3]
    t_dq = features_back(queries, t_rows @ states.mT + rows @ t_states.mT, False)
    t_dq = t_dq + pairs_back(t_queries, _second(rows @ states.mT, d), False)
    t_dk = features_back(keys, t_values @ after.mT + values @ t_after.mT, True)
    t_dk = t_dk + pairs_back(t_keys, _second(values @ after.mT, d), True)
    t_dv = t_psi @ after + psi @ t_after
    if causal:
        s, t_s = queries @ keys.mT, t_queries @ keys.mT + queries @ t_keys.mT
        u, t_u = rows @ values.mT, t_rows @ values.mT + rows @ t_values.mT
        ds, t_ds = _past((1 + s) * u, repeat), _past(t_s * u + (1 + s) * t_u, repeat)
        t_dq = t_dq + t_ds @ keys + ds @ t_keys
        t_dk = t_dk + t_ds.mT @ queries + ds.mT @ t_queries
        t_dv = t_dv + _past((1 + s) * t_s, repeat).mT @ rows + _past(polynomial(s), repeat).mT @ t_rows
    t_dq, t_dk = scale * _join(t_dq, h, n), _join(t_dk, g, m)
    t_dv, _ = _join(t_dv, g, m).split([e, 1], -1)
    if keep is not None:
        there = keep[:, None, :, None] != 0
        t_dk, t_dv = torch.where(there, t_dk, 0.0), torch.where(there, t_dv, 0.0)
    return t_dq, t_dk, t_dv, q.new_empty(b, 0, 0, 0) if sums is None else t_dsums


def _second(table: Tensor, d: int) -> Tensor:
    """The entries of the products in a row of features."""
    _, second = table.split([1 + d, table.shape[-1] - d - 1], -1)
    return second
