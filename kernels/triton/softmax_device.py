"""What the GPU runs of softmax attention: tiles of scores, never a table of them.

A query row keeps its largest score and its sum; `lse` is the logarithm of the sum of exponentials, -infinity for a row that
sees no key. Every kernel but the first computes p = exp(score - lse) anew. Mask strides of 0 stand for axes that it shares.
"""

from __future__ import annotations

from .lang import jit, tl

# N queries and M keys of a tile; D and E widths, filled up with zeros


@jit
def _rows(base, row, at, count, width, columns, ACC: tl.constexpr):
    """Rows `at` of the row-th [count, width] matrix, widened; zeros outside."""
    inside = (at < count)[:, None] & (columns < width)[None, :]
    return tl.load(base + (row * count + at[:, None]) * width + columns[None, :], mask=inside, other=0.0).to(ACC)


@jit
def _scores(q, k, i, j, n, m, mask, mask_n, mask_m, start, scale, CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
            ACC: tl.constexpr):
    """Scaled products of a tile, -infinity where a query does not see a key."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * scale
    seen = (i < n)[:, None] & (j < m)[None, :]
    if CAUSAL:
        seen = seen & (j[None, :] <= start + i[:, None])
    if MASK:
        at = i[:, None].to(tl.int64) * mask_n + j[None, :].to(tl.int64) * mask_m
        seen = seen & (tl.load(mask + at, mask=seen, other=0) != 0)
    return tl.where(seen, s, -float("inf"))


@jit
def _last(m, start, i, CAUSAL: tl.constexpr):
    """One more than the last key that some query up to i sees."""
    return tl.minimum(m, tl.maximum(start + i + 1, 0)) if CAUSAL else m


@jit
def attend(q, k, v, mask, out, lse, n, m, d, e, heads, groups, start, scale, mask_b, mask_h, mask_n, mask_m, CAUSAL: tl.constexpr,
           MASK: tl.constexpr, N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr,
           PRECISION: tl.constexpr):
    """out [b, heads, n, e] and lse [b, heads, n]."""
    row = tl.program_id(0).to(tl.int64)
    b, h = row // heads, row % heads
    source = b * groups + h * groups // heads
    mask += b * mask_b + h * mask_h
    cols_d, cols_e = tl.arange(0, D), tl.arange(0, E)
    i = tl.program_id(1) * N + tl.arange(0, N)
    q_i = _rows(q, row, i, n, d, cols_d, ACC)
    top, total, result = tl.full((N,), -float("inf"), ACC), tl.zeros((N,), ACC), tl.zeros((N, E), ACC)
    for first in range(0, _last(m, start, tl.program_id(1) * N + N - 1, CAUSAL), M):
        j = first + tl.arange(0, M)
        k_j, v_j = _rows(k, source, j, m, d, cols_d, ACC), _rows(v, source, j, m, e, cols_e, ACC)
        s = _scores(q_i, k_j, i, j, n, m, mask, mask_n, mask_m, start, scale, CAUSAL, MASK, PRECISION, ACC)
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        p, kept = tl.exp(s - base[:, None]), tl.exp(top - base)
        total = total * kept + tl.sum(p, 1)
        result = result * kept[:, None] + tl.dot(p, v_j, input_precision=PRECISION, out_dtype=ACC)
        top = higher
    empty = total == 0.0
    result = result / tl.where(empty, 1.0, total)[:, None]
    tl.store(out + (row * n + i[:, None]) * e + cols_e[None, :], result, mask=(i < n)[:, None] & (cols_e < e)[None, :])
    tl.store(lse + row * n + i, tl.where(empty, -float("inf"), top + tl.log(tl.where(empty, 1.0, total))), mask=i < n)


@jit
def backward_queries(q, k, v, mask, g, lse, delta, dq, n, m, d, e, heads, groups, start, scale, mask_b, mask_h, mask_n, mask_m,
                     CAUSAL: tl.constexpr, MASK: tl.constexpr, N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
                     ACC: tl.constexpr, PRECISION: tl.constexpr):
    """dq, given the gradient g of out and delta = sum of g * out."""
    row = tl.program_id(0).to(tl.int64)
    b, h = row // heads, row % heads
    source = b * groups + h * groups // heads
    mask += b * mask_b + h * mask_h
    cols_d, cols_e = tl.arange(0, D), tl.arange(0, E)
    i = tl.program_id(1) * N + tl.arange(0, N)
    q_i, g_i = _rows(q, row, i, n, d, cols_d, ACC), _rows(g, row, i, n, e, cols_e, ACC)
    level = tl.load(lse + row * n + i, mask=i < n, other=0.0)
    level = tl.where(level == -float("inf"), 0.0, level)
    less = tl.load(delta + row * n + i, mask=i < n, other=0.0)
    result = tl.zeros((N, D), ACC)
    for first in range(0, _last(m, start, tl.program_id(1) * N + N - 1, CAUSAL), M):
        j = first + tl.arange(0, M)
        k_j, v_j = _rows(k, source, j, m, d, cols_d, ACC), _rows(v, source, j, m, e, cols_e, ACC)
        s = _scores(q_i, k_j, i, j, n, m, mask, mask_n, mask_m, start, scale, CAUSAL, MASK, PRECISION, ACC)
        slope = tl.dot(g_i, tl.trans(v_j), input_precision=PRECISION, out_dtype=ACC) - less[:, None]
        slope = tl.exp(s - level[:, None]) * slope
        result += tl.dot(slope, k_j, input_precision=PRECISION, out_dtype=ACC)
    tl.store(dq + (row * n + i[:, None]) * d + cols_d[None, :], result * scale, mask=(i < n)[:, None] & (cols_d < d)[None, :])


@jit
def backward_keys(q, k, v, mask, g, lse, delta, dk, dv, n, m, d, e, heads, groups, start, scale, mask_b, mask_h, mask_n, mask_m,
                  CAUSAL: tl.constexpr, MASK: tl.constexpr, N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
                  ACC: tl.constexpr, PRECISION: tl.constexpr):
    """dk and dv: one program sums over all query heads of its key head, in a fixed order."""
    source = tl.program_id(0).to(tl.int64)
    share = heads // groups
    b = source // groups
    cols_d, cols_e = tl.arange(0, D), tl.arange(0, E)
    j = tl.program_id(1) * M + tl.arange(0, M)
    k_j, v_j = _rows(k, source, j, m, d, cols_d, ACC), _rows(v, source, j, m, e, cols_e, ACC)
    result_k, result_v = tl.zeros((M, D), ACC), tl.zeros((M, E), ACC)
    begin = tl.maximum(tl.program_id(1) * M - start, 0) // N * N if CAUSAL else 0
    for r in range(share):
        h = source % groups * share + r
        row = b * heads + h
        for first in range(begin, n, N):
            i = first + tl.arange(0, N)
            q_i, g_i = _rows(q, row, i, n, d, cols_d, ACC), _rows(g, row, i, n, e, cols_e, ACC)
            level = tl.load(lse + row * n + i, mask=i < n, other=0.0)
            level = tl.where(level == -float("inf"), 0.0, level)
            less = tl.load(delta + row * n + i, mask=i < n, other=0.0)
            s = _scores(q_i, k_j, i, j, n, m, mask + b * mask_b + h * mask_h, mask_n, mask_m, start, scale, CAUSAL, MASK, PRECISION, ACC)
            p = tl.exp(s - level[:, None])
            result_v += tl.dot(tl.trans(p), g_i, input_precision=PRECISION, out_dtype=ACC)
            slope = p * (tl.dot(g_i, tl.trans(v_j), input_precision=PRECISION, out_dtype=ACC) - less[:, None])
            result_k += tl.dot(tl.trans(slope), q_i, input_precision=PRECISION, out_dtype=ACC)
    tl.store(dk + (source * m + j[:, None]) * d + cols_d[None, :], result_k * scale, mask=(j < m)[:, None] & (cols_d < d)[None, :])
    tl.store(dv + (source * m + j[:, None]) * e + cols_e[None, :], result_v, mask=(j < m)[:, None] & (cols_e < e)[None, :])


@jit
def tangent(q, k, v, mask, out, lse, tq, tk, tv, tout, tlse, n, m, d, e, heads, groups, start, scale, mask_b, mask_h, mask_n, mask_m,
            CAUSAL: tl.constexpr, MASK: tl.constexpr, N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
            ACC: tl.constexpr, PRECISION: tl.constexpr):
    """The tangents of out and lse."""
    row = tl.program_id(0).to(tl.int64)
    b, h = row // heads, row % heads
    source = b * groups + h * groups // heads
    mask += b * mask_b + h * mask_h
    cols_d, cols_e = tl.arange(0, D), tl.arange(0, E)
    i = tl.program_id(1) * N + tl.arange(0, N)
    q_i, tq_i = _rows(q, row, i, n, d, cols_d, ACC), _rows(tq, row, i, n, d, cols_d, ACC)
    level = tl.load(lse + row * n + i, mask=i < n, other=0.0)
    level = tl.where(level == -float("inf"), 0.0, level)
    moved, result = tl.zeros((N,), ACC), tl.zeros((N, E), ACC)
    for first in range(0, _last(m, start, tl.program_id(1) * N + N - 1, CAUSAL), M):
        j = first + tl.arange(0, M)
        k_j, v_j = _rows(k, source, j, m, d, cols_d, ACC), _rows(v, source, j, m, e, cols_e, ACC)
        tk_j, tv_j = _rows(tk, source, j, m, d, cols_d, ACC), _rows(tv, source, j, m, e, cols_e, ACC)
        s = _scores(q_i, k_j, i, j, n, m, mask, mask_n, mask_m, start, scale, CAUSAL, MASK, PRECISION, ACC)
        p = tl.exp(s - level[:, None])
        step = tl.dot(tq_i, tl.trans(k_j), input_precision=PRECISION, out_dtype=ACC)
        step += tl.dot(q_i, tl.trans(tk_j), input_precision=PRECISION, out_dtype=ACC)
        step = p * step * scale
        moved += tl.sum(step, 1)
        result += tl.dot(step, v_j, input_precision=PRECISION, out_dtype=ACC)
        result += tl.dot(p, tv_j, input_precision=PRECISION, out_dtype=ACC)
    result -= moved[:, None] * _rows(out, row, i, n, e, cols_e, ACC)
    tl.store(tout + (row * n + i[:, None]) * e + cols_e[None, :], result, mask=(i < n)[:, None] & (cols_e < e)[None, :])
    tl.store(tlse + row * n + i, moved, mask=i < n)
