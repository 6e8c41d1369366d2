"""Tangents of the gradients of attention over static lists, for Hessian-vector products without a table of scores.

With p, delta and the moves of segment_attention_device.py, and t_delta = sum of (tg * out + g * tout):

    ts = scale (tq k^T + q tk^T)        tp = p (ts - tlse)
    ds = p (g v^T - delta)              tds = tp (g v^T - delta) + p (tg v^T + g tv^T - t_delta)
    t_dq = scale (tds k + ds tk)        t_dk = scale (tds^T q + ds^T tq)        t_dv = tp^T g + p^T tg
"""

from __future__ import annotations

from .lang import jit, tl
from .segment_attention_device import _listed, _numbers, _product, _rows, _scores


@jit
def _pair(s, q, k, v, g, tq, tk, tv, tg, level, moved, less, less_moved, scale, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """p, tp, ds and tds of a tile of scores s."""
    p = tl.exp(s - level[:, None])
    tp = _product(tq, tl.trans(k), PRECISION, ACC) + _product(q, tl.trans(tk), PRECISION, ACC)
    tp = p * (tp * scale - moved[:, None])
    slope = _product(g, tl.trans(v), PRECISION, ACC) - less[:, None]
    turn = _product(tg, tl.trans(v), PRECISION, ACC) + _product(g, tl.trans(tv), PRECISION, ACC) - less_moved[:, None]
    return p, tp, p * slope, tp * slope + p * turn


@jit
def second_queries(q, k, v, keep, positions, tiles, runs, words, g, lse, delta, tq, tk, tv, tg, tlse, tdelta, dq, n, d, e, heads,
                   groups, group_b, group_h, free, scale, CAUSAL: tl.constexpr, KEEP: tl.constexpr, RUN: tl.constexpr,
                   N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """The tangent of dq."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = row // heads, row % heads
    source = b * groups + h * groups // heads
    tiles += ((b * group_b + h * group_h) * tl.num_programs(1) + tile) * 2
    first, total = tl.load(tiles), tl.load(tiles + 1) * RUN
    cols_d, cols_e, lane = tl.arange(0, D), tl.arange(0, E), tl.arange(0, N)
    i = tl.load(positions + tile * N + lane)
    q_i, g_i = _rows(q, row, i, n, d, cols_d, ACC), _rows(g, row, i, n, e, cols_e, ACC)
    tq_i, tg_i = _rows(tq, row, i, n, d, cols_d, ACC), _rows(tg, row, i, n, e, cols_e, ACC)
    level, less = _numbers(lse, row, i, n, ACC), _numbers(delta, row, i, n, ACC)
    moved, less_moved = _numbers(tlse, row, i, n, ACC), _numbers(tdelta, row, i, n, ACC)
    result = tl.zeros((N, D), ACC)
    for begin in range(0, total, M):
        j, word = _listed(runs + first, words + first, begin + tl.arange(0, M), total, n, RUN)
        k_j, v_j = _rows(k, source, j, n, d, cols_d, ACC), _rows(v, source, j, n, e, cols_e, ACC)
        tk_j, tv_j = _rows(tk, source, j, n, d, cols_d, ACC), _rows(tv, source, j, n, e, cols_e, ACC)
        seen = ((word[None, :] >> lane[:, None]) & 1) != 0
        s = _scores(q_i, k_j, i, j, seen, keep + b * n, free, scale, CAUSAL, KEEP, PRECISION, ACC)
        _, _, ds, tds = _pair(s, q_i, k_j, v_j, g_i, tq_i, tk_j, tv_j, tg_i, level, moved, less, less_moved, scale, PRECISION, ACC)
        result += _product(tds, k_j, PRECISION, ACC) + _product(ds, tk_j, PRECISION, ACC)
    tl.store(dq + (row * n + i[:, None]) * d + cols_d[None, :], result * scale, mask=(i >= 0)[:, None] & (cols_d < d)[None, :])


@jit
def second_keys(q, k, v, keep, positions, tiles, runs, words, g, lse, delta, tq, tk, tv, tg, tlse, tdelta, dk, dv, n, d, e, heads,
                groups, group_b, group_h, free, scale, CAUSAL: tl.constexpr, KEEP: tl.constexpr, RUN: tl.constexpr, N: tl.constexpr,
                M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """The tangents of dk and dv; one program as in backward_keys."""
    source, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, share = source // groups, heads // groups
    cols_d, cols_e, lane = tl.arange(0, D), tl.arange(0, E), tl.arange(0, M)
    j = tl.load(positions + tile * M + lane)
    k_j, v_j = _rows(k, source, j, n, d, cols_d, ACC), _rows(v, source, j, n, e, cols_e, ACC)
    tk_j, tv_j = _rows(tk, source, j, n, d, cols_d, ACC), _rows(tv, source, j, n, e, cols_e, ACC)
    result_k, result_v = tl.zeros((M, D), ACC), tl.zeros((M, E), ACC)
    for r in range(share):
        h = source % groups * share + r
        row = b * heads + h
        its = tiles + ((b * group_b + h * group_h) * tl.num_programs(1) + tile) * 2
        first, total = tl.load(its), tl.load(its + 1) * RUN
        for begin in range(0, total, N):
            i, word = _listed(runs + first, words + first, begin + tl.arange(0, N), total, n, RUN)
            q_i, g_i = _rows(q, row, i, n, d, cols_d, ACC), _rows(g, row, i, n, e, cols_e, ACC)
            tq_i, tg_i = _rows(tq, row, i, n, d, cols_d, ACC), _rows(tg, row, i, n, e, cols_e, ACC)
            level, less = _numbers(lse, row, i, n, ACC), _numbers(delta, row, i, n, ACC)
            moved, less_moved = _numbers(tlse, row, i, n, ACC), _numbers(tdelta, row, i, n, ACC)
            seen = ((word[:, None] >> lane[None, :]) & 1) != 0
            s = _scores(q_i, k_j, i, j, seen, keep + b * n, free, scale, CAUSAL, KEEP, PRECISION, ACC)
            p, tp, ds, tds = _pair(s, q_i, k_j, v_j, g_i, tq_i, tk_j, tv_j, tg_i, level, moved, less, less_moved, scale, PRECISION, ACC)
            result_v += _product(tl.trans(tp), g_i, PRECISION, ACC) + _product(tl.trans(p), tg_i, PRECISION, ACC)
            result_k += _product(tl.trans(tds), q_i, PRECISION, ACC) + _product(tl.trans(ds), tq_i, PRECISION, ACC)
    tl.store(dk + (source * n + j[:, None]) * d + cols_d[None, :], result_k * scale, mask=(j >= 0)[:, None] & (cols_d < d)[None, :])
    tl.store(dv + (source * n + j[:, None]) * e + cols_e[None, :], result_v, mask=(j >= 0)[:, None] & (cols_e < e)[None, :])
