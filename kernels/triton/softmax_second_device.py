"""What the GPU runs for the tangent of softmax attention's gradient: tiles as in softmax_device.py.

With p the weights, g the gradient of out, and the moves tg, tq, tk, tv of g, q, k, v:

    ts_ij = scale (tq_i . k_j + q_i . tk_j)      tp_ij = p_ij (ts_ij - t_lse_i)
    ds_ij = p_ij (g_i . v_j - delta_i)           tds_ij = tp_ij (g_i . v_j - delta_i) + p_ij (tg_i . v_j + g_i . tv_j - t_delta_i)
    t_dq = scale (tds k + ds tk)      t_dk = scale (tds^T q + ds^T tq)      t_dv = tp^T g + p^T tg
"""

from __future__ import annotations

from .lang import jit, tl
from .softmax_device import _last, _rows, _scores

# N queries and M keys of a tile; D and E widths, filled up with zeros


@jit
def _level(numbers, row, i, n):
    """A number per query of the tile; 0 for the -infinity of a row that sees no key, and outside."""
    found = tl.load(numbers + row * n + i, mask=i < n, other=0.0)
    return tl.where(found == -float("inf"), 0.0, found)


@jit
def _moves(s, q, tq, k, tk, g, tg, v, tv, level, t_level, less, t_less, scale, G_MOVES: tl.constexpr, PRECISION: tl.constexpr,
           ACC: tl.constexpr):
    """p, tp, ds and tds of a tile with scores s."""
    p = tl.exp(s - level[:, None])
    moved = tl.dot(tq, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
    moved += tl.dot(q, tl.trans(tk), input_precision=PRECISION, out_dtype=ACC)
    moved = p * (moved * scale - t_level[:, None])
    slope = tl.dot(g, tl.trans(v), input_precision=PRECISION, out_dtype=ACC) - less[:, None]
    t_slope = tl.dot(g, tl.trans(tv), input_precision=PRECISION, out_dtype=ACC) - t_less[:, None]
    if G_MOVES:
        t_slope += tl.dot(tg, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
    return p, moved, p * slope, moved * slope + p * t_slope


@jit
def second_queries(q, k, v, mask, g, lse, delta, t_lse, t_delta, tg, tq, tk, tv, dq, n, m, d, e, heads, groups, start, scale, mask_b,
                   mask_h, mask_n, mask_m, CAUSAL: tl.constexpr, MASK: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
                   D: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, G_MOVES: tl.constexpr):
    """t_dq, given delta = sum of g * out and its tangent."""
    row = tl.program_id(0).to(tl.int64)
    b, h = row // heads, row % heads
    source = b * groups + h * groups // heads
    mask += b * mask_b + h * mask_h
    cols_d, cols_e = tl.arange(0, D), tl.arange(0, E)
    i = tl.program_id(1) * N + tl.arange(0, N)
    q_i, g_i = _rows(q, row, i, n, d, cols_d, ACC), _rows(g, row, i, n, e, cols_e, ACC)
    tq_i, tg_i = _rows(tq, row, i, n, d, cols_d, ACC), _rows(tg, row, i, n, e, cols_e, ACC)
    level, t_level = _level(lse, row, i, n), _level(t_lse, row, i, n)
    less, t_less = _level(delta, row, i, n), _level(t_delta, row, i, n)
    result = tl.zeros((N, D), ACC)
    for first in range(0, _last(m, start, tl.program_id(1) * N + N - 1, CAUSAL), M):
        j = first + tl.arange(0, M)
        k_j, v_j = _rows(k, source, j, m, d, cols_d, ACC), _rows(v, source, j, m, e, cols_e, ACC)
        tk_j, tv_j = _rows(tk, source, j, m, d, cols_d, ACC), _rows(tv, source, j, m, e, cols_e, ACC)
        s = _scores(q_i, k_j, i, j, n, m, mask, mask_n, mask_m, start, scale, CAUSAL, MASK, PRECISION, ACC)
        p, tp, ds, tds = _moves(s, q_i, tq_i, k_j, tk_j, g_i, tg_i, v_j, tv_j, level, t_level, less, t_less, scale, G_MOVES, PRECISION,
                                ACC)
        result += tl.dot(tds, k_j, input_precision=PRECISION, out_dtype=ACC)
        result += tl.dot(ds, tk_j, input_precision=PRECISION, out_dtype=ACC)
    tl.store(dq + (row * n + i[:, None]) * d + cols_d[None, :], result * scale, mask=(i < n)[:, None] & (cols_d < d)[None, :])


@jit
def second_keys(q, k, v, mask, g, lse, delta, t_lse, t_delta, tg, tq, tk, tv, dk, dv, n, m, d, e, heads, groups, start, scale, mask_b,
                mask_h, mask_n, mask_m, CAUSAL: tl.constexpr, MASK: tl.constexpr, N: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
                E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, G_MOVES: tl.constexpr):
    """t_dk and t_dv: one program sums over all query heads of its key head, in a fixed order."""
    source = tl.program_id(0).to(tl.int64)
    share = heads // groups
    b = source // groups
    cols_d, cols_e = tl.arange(0, D), tl.arange(0, E)
    j = tl.program_id(1) * M + tl.arange(0, M)
    k_j, v_j = _rows(k, source, j, m, d, cols_d, ACC), _rows(v, source, j, m, e, cols_e, ACC)
    tk_j, tv_j = _rows(tk, source, j, m, d, cols_d, ACC), _rows(tv, source, j, m, e, cols_e, ACC)
    result_k, result_v = tl.zeros((M, D), ACC), tl.zeros((M, E), ACC)
    begin = tl.maximum(tl.program_id(1) * M - start, 0) // N * N if CAUSAL else 0
    for r in range(share):
        h = source % groups * share + r
        row = b * heads + h
        for first in range(begin, n, N):
            i = first + tl.arange(0, N)
            q_i, g_i = _rows(q, row, i, n, d, cols_d, ACC), _rows(g, row, i, n, e, cols_e, ACC)
            tq_i, tg_i = _rows(tq, row, i, n, d, cols_d, ACC), _rows(tg, row, i, n, e, cols_e, ACC)
            level, t_level = _level(lse, row, i, n), _level(t_lse, row, i, n)
            less, t_less = _level(delta, row, i, n), _level(t_delta, row, i, n)
            s = _scores(q_i, k_j, i, j, n, m, mask + b * mask_b + h * mask_h, mask_n, mask_m, start, scale, CAUSAL, MASK, PRECISION, ACC)
            p, tp, ds, tds = _moves(s, q_i, tq_i, k_j, tk_j, g_i, tg_i, v_j, tv_j, level, t_level, less, t_less, scale, G_MOVES,
                                    PRECISION, ACC)
            if G_MOVES:
                result_v += tl.dot(tl.trans(p), tg_i, input_precision=PRECISION, out_dtype=ACC)
            result_v += tl.dot(tl.trans(tp), g_i, input_precision=PRECISION, out_dtype=ACC)
            result_k += tl.dot(tl.trans(ds), tq_i, input_precision=PRECISION, out_dtype=ACC)
            result_k += tl.dot(tl.trans(tds), q_i, input_precision=PRECISION, out_dtype=ACC)
    tl.store(dk + (source * m + j[:, None]) * d + cols_d[None, :], result_k * scale, mask=(j < m)[:, None] & (cols_d < d)[None, :])
    tl.store(dv + (source * m + j[:, None]) * e + cols_e[None, :], result_v, mask=(j < m)[:, None] & (cols_e < e)[None, :])
