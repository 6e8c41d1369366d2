"""What the GPU runs of the gated loop with one real number per channel; made like gate_loop_narrow_device.

Positions are visited in order t = 0 ... n - 1, which are those from the end if REVERSE. Gates may be 0: nothing is divided by
them. marks [b, slots, c]: the state before each tile.
"""

from __future__ import annotations

from .gate_loop_gate import after, at_row
from .lang import jit, tl

# T positions of a tile, C channels of a block. Segments are counted in the order in which they are visited.


@jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@jit
def _gates(a, place, mask, ACC: tl.constexpr):
    """sigmoid(a), 1 where masked."""
    return tl.where(mask, _sigmoid(tl.load(a + place, mask=mask, other=0.0).to(ACC)), 1.0)


@jit
def _place(batch, t, column, n, c, REVERSE: tl.constexpr):
    at = n - 1 - t if REVERSE else t
    return (batch * n + at[:, None]) * c + column[None, :]


@jit
def _before(x, a, marks, place, step, mark, inside, real, T: tl.constexpr, ACC: tl.constexpr):
    """The state before each position of a tile."""
    had = inside & (tl.arange(0, T) > 0)[:, None]
    push = tl.load(x + place - step, mask=had, other=0.0).to(ACC)
    gate, push = tl.associative_scan((_gates(a, place - step, had, ACC), push), 0, after)
    return gate * tl.load(marks + mark, mask=real, other=0.0).to(ACC)[None, :] + push


@jit
def carry(products, ends, first, starts, last, segments, c, START: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """From each segment's product of gates and end [b, segments, c]: its start, and last [b, c]."""
    batch, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * C + tl.arange(0, C)
    real = column < c
    state = tl.zeros((C,), ACC)
    if START:
        state += tl.load(first + batch * c + column, mask=real, other=0.0).to(ACC)
    for segment in range(segments):
        place = (batch * segments + segment) * c + column
        tl.store(starts + place, state, mask=real)
        state = state * tl.load(products + place, mask=real, other=1.0) + tl.load(ends + place, mask=real, other=0.0)
    tl.store(last + batch * c + column, state, mask=real)


@jit
def forward(q, x, a, starts, out, marks, ends, products, n, c, tiles, slots, REVERSE: tl.constexpr, START: tl.constexpr,
            OUT: tl.constexpr, FINISH: tl.constexpr, T: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """out [b, n, c] of q, x and a before the sigmoid [b, n, c], from starts [b, segments, c] if START."""
    batch, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.program_id(2) * C + tl.arange(0, C)
    real, order = column < c, tl.arange(0, T)
    edge = (batch * tl.num_programs(1) + segment) * c + column
    state = tl.zeros((C,), ACC)
    whole = state + 1.0
    if START:
        state += tl.load(starts + edge, mask=real, other=0.0).to(ACC)
    for tile in range(segment * tiles, (segment + 1) * tiles):
        t = tile * T + order
        inside = (t < n)[:, None] & real[None, :]
        place = _place(batch, t, column, n, c, REVERSE)
        if OUT:
            tl.store(marks + (batch * slots + tile) * c + column, state, mask=real & (tile * T + 0 * column < n))
        push = tl.load(x + place, mask=inside, other=0.0).to(ACC)
        gate, push = tl.associative_scan((_gates(a, place, inside, ACC), push), 0, after)
        push += gate * state[None, :]
        if OUT:
            tl.store(out + place, tl.load(q + place, mask=inside, other=0.0).to(ACC) * push, mask=inside)
        # Beyond the end gates are 1 and inputs 0, so the last row always holds the state.
        state = at_row(push, T - 1, T)
        whole = whole * at_row(gate, T - 1, T)
    if FINISH:
        tl.store(ends + edge, state, mask=real)
        tl.store(products + edge, whole, mask=real)


@jit
def backward(q, x, a, marks, g, starts, dq, dx, da, ends, products, n, c, tiles, slots, REVERSE: tl.constexpr,
             START: tl.constexpr, OUT: tl.constexpr, FINISH: tl.constexpr, T: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """The gradients, tiles visited from the last one on. The state is the gate of a position times the gradient of its h."""
    batch, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.program_id(2) * C + tl.arange(0, C)
    real, order = column < c, tl.arange(0, T)
    edge = (batch * tl.num_programs(1) + segment) * c + column
    step = -c if REVERSE else c  # from a position to the one visited after it
    state = tl.zeros((C,), ACC)
    whole = state + 1.0
    if START:
        state += tl.load(starts + edge, mask=real, other=0.0).to(ACC)
    for visit in range(segment * tiles, (segment + 1) * tiles):
        tile = (n + T - 1) // T - 1 - visit
        t = tile * T + order
        inside = ((t < n) & (t >= 0))[:, None] & real[None, :]
        place = _place(batch, t, column, n, c, REVERSE)
        slope = tl.load(g + place, mask=inside, other=0.0).to(ACC)
        total = tl.load(q + place, mask=inside, other=0.0).to(ACC) * slope
        next_gate = _gates(a, place + step, inside & ((t + 1 < n) & (order < T - 1))[:, None], ACC)
        next_gate, total = tl.associative_scan((next_gate, total), 0, after, reverse=True)
        total += next_gate * state[None, :]
        raw = tl.load(a + place, mask=inside, other=0.0).to(ACC)
        gate = tl.where(inside, _sigmoid(raw), 1.0)
        if OUT:
            mark = (batch * slots + tile) * c + column
            h = _before(x, a, marks, place, step, mark, inside, real & (tile + 0 * column >= 0), T, ACC)
            push = tl.load(x + place, mask=inside, other=0.0).to(ACC)
            tl.store(dq + place, slope * (gate * h + push), mask=inside)
            tl.store(dx + place, total, mask=inside)
            tl.store(da + place, total * h * gate * _sigmoid(-raw), mask=inside)
        state = at_row(gate * total, 0, T)
        whole = whole * at_row(gate * next_gate, 0, T)
    if FINISH:
        tl.store(ends + edge, state, mask=real)
        tl.store(products + edge, whole, mask=real)


@jit
def tangent(q, x, a, marks, tq, tx, ta, starts, out, ends, products, n, c, tiles, slots, REVERSE: tl.constexpr,
            START: tl.constexpr, OUT: tl.constexpr, FINISH: tl.constexpr, T: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """The tangent of out."""
    batch, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.program_id(2) * C + tl.arange(0, C)
    real, order = column < c, tl.arange(0, T)
    edge = (batch * tl.num_programs(1) + segment) * c + column
    step = -c if REVERSE else c
    state = tl.zeros((C,), ACC)
    whole = state + 1.0
    if START:
        state += tl.load(starts + edge, mask=real, other=0.0).to(ACC)
    for tile in range(segment * tiles, (segment + 1) * tiles):
        t = tile * T + order
        inside = (t < n)[:, None] & real[None, :]
        place = _place(batch, t, column, n, c, REVERSE)
        mark = (batch * slots + tile) * c + column
        h = _before(x, a, marks, place, step, mark, inside, real & (tile * T + 0 * column < n), T, ACC)
        raw = tl.load(a + place, mask=inside, other=0.0).to(ACC)
        gate = tl.where(inside, _sigmoid(raw), 1.0)
        moved = gate * h
        push = tl.load(tx + place, mask=inside, other=0.0).to(ACC)
        push += tl.load(ta + place, mask=inside, other=0.0).to(ACC) * _sigmoid(-raw) * moved
        gate, push = tl.associative_scan((gate, push), 0, after)
        push += gate * state[None, :]
        if OUT:
            result = tl.load(q + place, mask=inside, other=0.0).to(ACC) * push
            now = moved + tl.load(x + place, mask=inside, other=0.0).to(ACC)
            result += tl.load(tq + place, mask=inside, other=0.0).to(ACC) * now
            tl.store(out + place, result, mask=inside)
        state = at_row(push, T - 1, T)
        whole = whole * at_row(gate, T - 1, T)
    if FINISH:
        tl.store(ends + edge, state, mask=real)
        tl.store(products + edge, whole, mask=real)
