"""What the GPU runs of causal linear attention: products inside chunks, and running sums of k v^T between them.

Positions are visited in order t = 0 ... n - 1, which are those from the end if REVERSE. One program has one query head, one
segment of chunks and one block of value columns. Where there are fewer query heads than key heads, a program sums over its
group of key heads.
"""

from __future__ import annotations

from .lang import jit, tl

# C positions of a chunk, D width of q and k and E width of a block of v, both filled up with zeros


@jit
def _tile(base, start, n, width, column, rows_mask, REVERSE: tl.constexpr, ACC: tl.constexpr):
    """Rows visited at `start` of a [n, width] matrix, these columns, widened; zeros outside."""
    at = n - 1 - start if REVERSE else start
    inside = rows_mask[:, None] & (column < width)[None, :]
    return tl.load(base + at[:, None].to(tl.int64) * width + column[None, :], mask=inside, other=0.0).to(ACC)


@jit
def sums(k, v, states, n, d, e, heads, groups, chunks, REVERSE: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr,
         D: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """Each segment's sum of k v^T: states [b, heads, segments, d, e]."""
    row, segment = tl.program_id(0), tl.program_id(1)
    segments = tl.num_programs(1)
    cols_d, cols_e = tl.arange(0, D), tl.program_id(2) * E + tl.arange(0, E)
    batch, head = row // heads, row % heads
    total = tl.zeros((D, E), ACC)
    for chunk in range(segment * chunks, (segment + 1) * chunks):
        t = chunk * C + tl.arange(0, C)
        for i in range(GROUP):
            source = (batch * groups + head * groups // heads + i).to(tl.int64) * n
            k_c = _tile(k + source * d, t, n, d, cols_d, t < n, REVERSE, ACC)
            v_c = _tile(v + source * e, t, n, e, cols_e, t < n, REVERSE, ACC)
            total += tl.dot(tl.trans(k_c), v_c, input_precision=PRECISION, out_dtype=ACC)
    place = (row.to(tl.int64) * segments + segment) * d * e
    inside = (cols_d < d)[:, None] & (cols_e < e)[None, :]
    tl.store(states + place + cols_d[:, None] * e + cols_e[None, :], total, mask=inside)


@jit
def outputs(q, k, v, states, out, n, d, e, heads, groups, state_heads, chunks, REVERSE: tl.constexpr, GROUP: tl.constexpr,
            STATES: tl.constexpr, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """out [b, heads, n, e], each segment starting from its `states` [b, state_heads, segments, d, e] if there are any."""
    row, segment = tl.program_id(0), tl.program_id(1)
    segments = tl.num_programs(1)
    cols_d, cols_e = tl.arange(0, D), tl.program_id(2) * E + tl.arange(0, E)
    batch, head = row // heads, row % heads
    order = tl.arange(0, C)
    total = tl.zeros((D, E), ACC)
    if STATES:
        place = ((batch * state_heads + head * state_heads // heads).to(tl.int64) * segments + segment) * d * e
        held = (cols_d < d)[:, None] & (cols_e < e)[None, :]
        total += tl.load(states + place + cols_d[:, None] * e + cols_e[None, :], mask=held, other=0.0)
    for chunk in range(segment * chunks, (segment + 1) * chunks):
        t = chunk * C + order
        q_c = _tile(q + row.to(tl.int64) * n * d, t, n, d, cols_d, t < n, REVERSE, ACC)
        result = tl.dot(q_c, total, input_precision=PRECISION, out_dtype=ACC)
        for i in range(GROUP):
            source = (batch * groups + head * groups // heads + i).to(tl.int64) * n
            k_c = _tile(k + source * d, t, n, d, cols_d, t < n, REVERSE, ACC)
            v_c = _tile(v + source * e, t, n, e, cols_e, t < n, REVERSE, ACC)
            scores = tl.dot(q_c, tl.trans(k_c), input_precision=PRECISION, out_dtype=ACC)
            scores = tl.where(order[:, None] >= order[None, :], scores, 0.0)
            result += tl.dot(scores, v_c, input_precision=PRECISION, out_dtype=ACC)
            total += tl.dot(tl.trans(k_c), v_c, input_precision=PRECISION, out_dtype=ACC)
        at = n - 1 - t if REVERSE else t
        inside = (t < n)[:, None] & (cols_e < e)[None, :]
        tl.store(out + (row.to(tl.int64) * n + at[:, None]) * e + cols_e[None, :], result, mask=inside)
