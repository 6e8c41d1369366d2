"""What the GPU runs of coordinate descent: one program has one row, which stays in registers through all iterations.

The state of a row is its threshold m; the mathematics is in fnattn/ops/_coor_math.py. `epsilons` are n_iters + 1 numbers. An
entry of -infinity is not there; in a row without entries sums run over all of it, so that no logarithm is infinite.
"""

from __future__ import annotations

from .lang import jit, tl

# N entries of a row, filled up


@jit
def _row(s, n, N: tl.constexpr, ACC: tl.constexpr):
    """A row with 0 for entries that are not there, which ones are, and which ones sums run over."""
    column = tl.arange(0, N)
    row = tl.load(s + tl.program_id(0).to(tl.int64) * n + column, mask=column < n, other=-float("inf")).to(ACC)
    there = row != -float("inf")
    some = tl.max(there.to(tl.int32), 0) > 0
    return tl.where(there, row, 0.0), there, there | ((column < n) & (some == 0))


@jit
def iterate(s, log_k, epsilons, y, m, n, n_iters, N: tl.constexpr, ACC: tl.constexpr):
    """y [rows, n] and the thresholds m [rows, n_iters]."""
    row = tl.program_id(0).to(tl.int64)
    x, there, counted = _row(s, n, N, ACC)
    level = tl.load(log_k + row)
    found = tl.load(epsilons) * (tl.log(tl.sum(counted.to(ACC), 0)) - level)
    tl.store(m + row * n_iters, found)
    for t in range(1, n_iters):
        eps = tl.load(epsilons + t)
        scaled = tl.where(counted, tl.where(x <= found, x, found) / eps, -float("inf"))
        top = tl.max(scaled, 0)
        found = eps * (tl.log(tl.sum(tl.exp(scaled - top), 0)) + top - level)
        tl.store(m + row * n_iters + t, found)
    result = tl.where(there, tl.exp(tl.where(x <= found, x - found, 0.0) / tl.load(epsilons + n_iters)), 0.0)
    # Comparisons hide a NaN score; it belongs into the whole row.
    bad = tl.max((x != x).to(tl.int32), 0) > 0
    column = tl.arange(0, N)
    tl.store(y + row * n + column, tl.where(bad, float("nan"), result), mask=column < n)


@jit
def iterate_back(s, log_k, epsilons, m, g, ds, dlog_k, n, n_iters, N: tl.constexpr, ACC: tl.constexpr):
    """The gradients of s and log_k from those of y."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, N)
    x, there, counted = _row(s, n, N, ACC)
    level = tl.load(log_k + row)
    m += row * n_iters
    found = tl.load(m + n_iters - 1)
    last = tl.load(epsilons + n_iters)
    active = there & (x <= found)
    slope = tl.load(g + row * n + column, mask=column < n, other=0.0).to(ACC)
    slope = tl.where(active, tl.exp(tl.where(active, x - found, 0.0) / last) * slope / last, 0.0)
    mu = -tl.sum(slope, 0)
    total = mu * 0.0
    for i in range(1, n_iters):
        t = n_iters - i
        eps, before = tl.load(epsilons + t), tl.load(m + t - 1)
        below = x <= before
        weight = tl.exp(tl.where(counted, (tl.where(below, x, before) - found) / eps - level, -float("inf")))
        total -= mu * eps
        slope += tl.where(below & there, mu * weight, 0.0)
        mu = tl.sum(tl.where(below, 0.0, mu * weight), 0)
        found = before
    tl.store(dlog_k + row, total - mu * tl.load(epsilons))
    tl.store(ds + row * n + column, slope, mask=column < n)


@jit
def tangent(s, log_k, epsilons, m, ts, tlog_k, ty, n, n_iters, N: tl.constexpr, ACC: tl.constexpr):
    """The tangent of y from those of s and log_k."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, N)
    x, there, counted = _row(s, n, N, ACC)
    level, push = tl.load(log_k + row), tl.load(tlog_k + row)
    moved = tl.load(ts + row * n + column, mask=column < n, other=0.0).to(ACC)
    moved = tl.where(there, moved, 0.0)
    m += row * n_iters
    before = tl.load(m)
    change = -tl.load(epsilons) * push
    for t in range(1, n_iters):
        eps, found = tl.load(epsilons + t), tl.load(m + t)
        below = x <= before
        weight = tl.exp(tl.where(counted, (tl.where(below, x, before) - found) / eps - level, -float("inf")))
        change = tl.sum(weight * tl.where(below, moved, change), 0) - eps * push
        before = found
    last = tl.load(epsilons + n_iters)
    active = there & (x <= before)
    result = tl.exp(tl.where(active, x - before, 0.0) / last) * (moved - change) / last
    tl.store(ty + row * n + column, tl.where(active, result, 0.0), mask=column < n)


# ------------------------------------------------------------------------------------------------ the fixed point


@jit
def _threshold(x, there, edge, room, eps):
    """m such that the entries up to `edge` sum to `room`. Where there are none, or no room, a number without a use."""
    below = there & (x <= edge)
    top = tl.max(tl.where(below, x, -float("inf")), 0)
    top = tl.where(top > -float("inf"), top, 0.0)
    total = tl.sum(tl.where(below, tl.exp((tl.where(below, x, top) - top) / eps), 0.0), 0)
    return top + eps * (tl.log(tl.where(total > 0, total, 1.0)) - tl.log(tl.where(room > 0, room, 1.0)))


@jit
def exact(s, k, epsilons, y, cut, m, n, N: tl.constexpr, ACC: tl.constexpr):
    """y, and per row the cut, above which entries are capped, and the threshold.

    Starting with none, entries that exceed the threshold are capped: their number only grows and stays below k, so this ends,
    after few rounds. A row of at most k entries is capped as a whole: its cut is -infinity.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, N)
    x, there, _ = _row(s, n, N, ACC)
    goal, eps = tl.load(k + row), tl.load(epsilons)
    count = tl.sum(there.to(ACC), 0)
    edge = tl.where(count > goal, float("inf"), -float("inf")).to(ACC)
    capped = count * 0.0
    level = _threshold(x, there, edge, goal, eps)
    moving = count > goal
    while moving:
        above = tl.sum((there & (x > level)).to(ACC), 0)
        # Rounding may bring the number to k, or back: the row has converged then.
        moving = (above > capped) & (above < goal)
        edge, capped = tl.where(moving, level, edge), tl.where(moving, above, capped)
        level = tl.where(moving, _threshold(x, there, edge, goal - capped, eps), level)
    # Comparisons hide a NaN score; it belongs into the whole row.
    bad = tl.max((x != x).to(tl.int32), 0) > 0
    level = tl.where(bad, float("nan"), level)
    tl.store(cut + row, edge)
    tl.store(m + row, level)
    free = tl.exp(tl.minimum(x - level, 0.0) / eps)
    result = tl.where(there, tl.where(x > edge, 1.0, free), 0.0)
    tl.store(y + row * n + column, tl.where(bad, float("nan"), result), mask=column < n)


@jit
def _free(s, epsilons, cut, m, n, N: tl.constexpr, ACC: tl.constexpr):
    """y of the entries that are not capped, 0 elsewhere; their sum, 1 if it is 0; eps."""
    row = tl.program_id(0).to(tl.int64)
    x, there, _ = _row(s, n, N, ACC)
    eps, level = tl.load(epsilons), tl.load(m + row)
    y = tl.where(there & (x <= tl.load(cut + row)), tl.exp(tl.minimum(x - level, 0.0) / eps), 0.0)
    weight = tl.sum(y, 0)
    # A bad row has a NaN threshold.
    return y + (level - level), tl.where(weight > 0, weight, 1.0), eps


@jit
def exact_back(s, k, epsilons, cut, m, g, ds, dk, n, N: tl.constexpr, ACC: tl.constexpr):
    """The gradients of s and k from that of y."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, N)
    y, weight, eps = _free(s, epsilons, cut, m, n, N, ACC)
    slope = tl.load(g + row * n + column, mask=column < n, other=0.0).to(ACC)
    total = tl.sum(y * slope, 0) / weight
    tl.store(dk + row, total)
    tl.store(ds + row * n + column, y / eps * (slope - total), mask=column < n)


@jit
def exact_tangent(s, k, epsilons, cut, m, ts, tk, ty, n, N: tl.constexpr, ACC: tl.constexpr):
    """The tangent of y from those of s and k."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, N)
    y, weight, eps = _free(s, epsilons, cut, m, n, N, ACC)
    moved = tl.load(ts + row * n + column, mask=column < n, other=0.0).to(ACC)
    change = (tl.sum(y * moved, 0) - eps * tl.load(tk + row)) / weight
    tl.store(ty + row * n + column, y / eps * (moved - change), mask=column < n)
