"""What the GPU runs of attention over static lists: tiles of scores, never a table of them.

A list names, for a tile of positions on one side, the positions on the other side that any of them sees or is seen by. It is made
of runs of RUN consecutive positions, run r being RUN r, RUN r + 1, ...; the bits of a run's word say which members of the tile
it belongs to. CAUSAL takes away keys after the query, KEEP keys that are not there, but for queries before `free`.

`lse` is the logarithm of the sum of exponentials, 0 for a row that sees no key. Every kernel but the first computes
p = exp(score - lse) anew. A position of -1 is a place that nothing fills.
"""

from __future__ import annotations

from .lang import jit, tl

# N queries and M keys of a tile; D and E widths, filled up with zeros; RUN positions of a run


@jit
def _rows(base, row, at, count, width, columns, ACC: tl.constexpr):
    """Rows `at` of the row-th [count, width] matrix, widened; zeros for rows of -1."""
    inside = (at >= 0)[:, None] & (columns < width)[None, :]
    return tl.load(base + (row * count + at[:, None]) * width + columns[None, :], mask=inside, other=0.0).to(ACC)


@jit
def _numbers(base, row, at, count, ACC: tl.constexpr):
    """Numbers `at` of the row-th of vectors of `count`; zeros for -1."""
    return tl.load(base + row * count + at, mask=at >= 0, other=0.0).to(ACC)


@jit
def _listed(runs, words, slot, total, n, RUN: tl.constexpr):
    """The positions in the slots of a list of `total`, and their words."""
    there = slot < total
    at = tl.load(runs + slot // RUN, mask=there, other=0) * RUN + slot % RUN
    there = there & (at < n)
    return tl.where(there, at, -1), tl.load(words + slot // RUN, mask=there, other=0)


@jit
def _scores(q, k, i, j, seen, keep, free, scale, CAUSAL: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """Scaled products of a tile, -infinity where a query does not see a key."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * scale
    if CAUSAL:
        seen = seen & (j[None, :] <= i[:, None])
    if KEEP:
        kept = tl.load(keep + j, mask=j >= 0, other=0) != 0
        seen = seen & (kept[None, :] | (i < free)[:, None])
    return tl.where(seen, s, -float("inf"))


@jit
def _product(a, b, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """The matrix product a b."""
    # Without it the compiler loads the operands of several products at once, more than there are registers.
    tl.debug_barrier()
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=ACC)


@jit
def attend(q, k, v, keep, positions, tiles, runs, words, out, lse, n, d, e, heads, groups, group_b, group_h, free, scale,
           CAUSAL: tl.constexpr, KEEP: tl.constexpr, RUN: tl.constexpr, N: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
           E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """out [b, heads, n, e] and lse [b, heads, n]."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = row // heads, row % heads
    source = b * groups + h * groups // heads
    tiles += ((b * group_b + h * group_h) * tl.num_programs(1) + tile) * 2
    first, total = tl.load(tiles), tl.load(tiles + 1) * RUN
    cols_d, cols_e, lane = tl.arange(0, D), tl.arange(0, E), tl.arange(0, N)
    i = tl.load(positions + tile * N + lane)
    q_i = _rows(q, row, i, n, d, cols_d, ACC)
    top, sums, result = tl.full((N,), -float("inf"), ACC), tl.zeros((N,), ACC), tl.zeros((N, E), ACC)
    for begin in range(0, total, M):
        j, word = _listed(runs + first, words + first, begin + tl.arange(0, M), total, n, RUN)
        k_j, v_j = _rows(k, source, j, n, d, cols_d, ACC), _rows(v, source, j, n, e, cols_e, ACC)
        seen = ((word[None, :] >> lane[:, None]) & 1) != 0
        s = _scores(q_i, k_j, i, j, seen, keep + b * n, free, scale, CAUSAL, KEEP, PRECISION, ACC)
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        p, kept = tl.exp(s - base[:, None]), tl.exp(top - base)
        sums = sums * kept + tl.sum(p, 1)
        result = result * kept[:, None] + _product(p, v_j, PRECISION, ACC)
        top = higher
    empty = sums == 0.0
    result = result / tl.where(empty, 1.0, sums)[:, None]
    tl.store(out + (row * n + i[:, None]) * e + cols_e[None, :], result, mask=(i >= 0)[:, None] & (cols_e < e)[None, :])
    tl.store(lse + row * n + i, tl.where(empty, 0.0, top + tl.log(tl.where(empty, 1.0, sums))), mask=i >= 0)


@jit
def backward_queries(q, k, v, keep, positions, tiles, runs, words, g, lse, delta, dq, n, d, e, heads, groups, group_b, group_h, free,
                     scale, CAUSAL: tl.constexpr, KEEP: tl.constexpr, RUN: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
                     D: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """dq, given the gradient g of out and delta = sum of g * out."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = row // heads, row % heads
    source = b * groups + h * groups // heads
    tiles += ((b * group_b + h * group_h) * tl.num_programs(1) + tile) * 2
    first, total = tl.load(tiles), tl.load(tiles + 1) * RUN
    cols_d, cols_e, lane = tl.arange(0, D), tl.arange(0, E), tl.arange(0, N)
    i = tl.load(positions + tile * N + lane)
    q_i, g_i = _rows(q, row, i, n, d, cols_d, ACC), _rows(g, row, i, n, e, cols_e, ACC)
    level, less = _numbers(lse, row, i, n, ACC), _numbers(delta, row, i, n, ACC)
    result = tl.zeros((N, D), ACC)
    for begin in range(0, total, M):
        j, word = _listed(runs + first, words + first, begin + tl.arange(0, M), total, n, RUN)
        k_j, v_j = _rows(k, source, j, n, d, cols_d, ACC), _rows(v, source, j, n, e, cols_e, ACC)
        seen = ((word[None, :] >> lane[:, None]) & 1) != 0
        s = _scores(q_i, k_j, i, j, seen, keep + b * n, free, scale, CAUSAL, KEEP, PRECISION, ACC)
        slope = _product(g_i, tl.trans(v_j), PRECISION, ACC) - less[:, None]
        result += _product(tl.exp(s - level[:, None]) * slope, k_j, PRECISION, ACC)
    tl.store(dq + (row * n + i[:, None]) * d + cols_d[None, :], result * scale, mask=(i >= 0)[:, None] & (cols_d < d)[None, :])


@jit
def backward_keys(q, k, v, keep, positions, tiles, runs, words, g, lse, delta, dk, dv, n, d, e, heads, groups, group_b, group_h, free,
                  scale, CAUSAL: tl.constexpr, KEEP: tl.constexpr, RUN: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
                  D: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """dk and dv: one program sums over all query heads of its key head, in a fixed order. The lists are those of keys."""
    source, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, share = source // groups, heads // groups
    cols_d, cols_e, lane = tl.arange(0, D), tl.arange(0, E), tl.arange(0, M)
    j = tl.load(positions + tile * M + lane)
    k_j, v_j = _rows(k, source, j, n, d, cols_d, ACC), _rows(v, source, j, n, e, cols_e, ACC)
    result_k, result_v = tl.zeros((M, D), ACC), tl.zeros((M, E), ACC)
    for r in range(share):
        h = source % groups * share + r
        row = b * heads + h
        its = tiles + ((b * group_b + h * group_h) * tl.num_programs(1) + tile) * 2
        first, total = tl.load(its), tl.load(its + 1) * RUN
        for begin in range(0, total, N):
            i, word = _listed(runs + first, words + first, begin + tl.arange(0, N), total, n, RUN)
            q_i, g_i = _rows(q, row, i, n, d, cols_d, ACC), _rows(g, row, i, n, e, cols_e, ACC)
            level, less = _numbers(lse, row, i, n, ACC), _numbers(delta, row, i, n, ACC)
            seen = ((word[:, None] >> lane[None, :]) & 1) != 0
            s = _scores(q_i, k_j, i, j, seen, keep + b * n, free, scale, CAUSAL, KEEP, PRECISION, ACC)
            p = tl.exp(s - level[:, None])
            result_v += _product(tl.trans(p), g_i, PRECISION, ACC)
            slope = p * (_product(g_i, tl.trans(v_j), PRECISION, ACC) - less[:, None])
            result_k += _product(tl.trans(slope), q_i, PRECISION, ACC)
    tl.store(dk + (source * n + j[:, None]) * d + cols_d[None, :], result_k * scale, mask=(j >= 0)[:, None] & (cols_d < d)[None, :])
    tl.store(dv + (source * n + j[:, None]) * e + cols_e[None, :], result_v, mask=(j >= 0)[:, None] & (cols_e < e)[None, :])


@jit
def tangent(q, k, v, keep, positions, tiles, runs, words, out, lse, tq, tk, tv, tout, tlse, n, d, e, heads, groups, group_b, group_h,
            free, scale, CAUSAL: tl.constexpr, KEEP: tl.constexpr, RUN: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
            D: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """The tangents of out and lse."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = row // heads, row % heads
    source = b * groups + h * groups // heads
    tiles += ((b * group_b + h * group_h) * tl.num_programs(1) + tile) * 2
    first, total = tl.load(tiles), tl.load(tiles + 1) * RUN
    cols_d, cols_e, lane = tl.arange(0, D), tl.arange(0, E), tl.arange(0, N)
    i = tl.load(positions + tile * N + lane)
    q_i, tq_i = _rows(q, row, i, n, d, cols_d, ACC), _rows(tq, row, i, n, d, cols_d, ACC)
    level = _numbers(lse, row, i, n, ACC)
    moved, result = tl.zeros((N,), ACC), tl.zeros((N, E), ACC)
    for begin in range(0, total, M):
        j, word = _listed(runs + first, words + first, begin + tl.arange(0, M), total, n, RUN)
        k_j, v_j = _rows(k, source, j, n, d, cols_d, ACC), _rows(v, source, j, n, e, cols_e, ACC)
        tk_j, tv_j = _rows(tk, source, j, n, d, cols_d, ACC), _rows(tv, source, j, n, e, cols_e, ACC)
        seen = ((word[None, :] >> lane[:, None]) & 1) != 0
        s = _scores(q_i, k_j, i, j, seen, keep + b * n, free, scale, CAUSAL, KEEP, PRECISION, ACC)
        p = tl.exp(s - level[:, None])
        step = _product(tq_i, tl.trans(k_j), PRECISION, ACC) + _product(q_i, tl.trans(tk_j), PRECISION, ACC)
        step = p * step * scale
        moved += tl.sum(step, 1)
        result += _product(step, v_j, PRECISION, ACC) + _product(p, tv_j, PRECISION, ACC)
    result -= moved[:, None] * _rows(out, row, i, n, e, cols_e, ACC)
    tl.store(tout + (row * n + i[:, None]) * e + cols_e[None, :], result, mask=(i >= 0)[:, None] & (cols_e < e)[None, :])
    tl.store(tlse + row * n + i, moved, mask=i >= 0)
