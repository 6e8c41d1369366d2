"""What the GPU runs of the gated recurrence: a parallel scan of each chunk of positions, the state carried between chunks.

Positions are visited in order t = 0 ... n - 1, which are those from the end if REVERSE. One program has one batch element
and one block of channels. With LAG the gate of a position is that of the one visited before, and 1 at the first.
"""

from __future__ import annotations

from .lang import jit, tl

# T positions of a chunk, C channels of a block


@jit
def _after(a, x, b, y):
    """The step (a, x) and then (b, y) as one step h -> a b h + (b x + y)."""
    return a * b, b * x + y


@jit
def _after_pairs(ar, ai, xr, xi, br, bi, yr, yi):
    """The same for complex numbers."""
    return (ar * br - ai * bi, ar * bi + ai * br, br * xr - bi * xi + yr, br * xi + bi * xr + yi)


@jit
def scan(a, x, h0, h, n, c, START: tl.constexpr, REVERSE: tl.constexpr, LAG: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
         ACC: tl.constexpr):
    """h [b, n, c] from gates a and inputs x [b, n, c], starting from h0 [b, c] if START."""
    batch = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * C + tl.arange(0, C)
    real = column < c
    order = tl.arange(0, T)
    state = tl.zeros((C,), ACC)
    if START:
        state += tl.load(h0 + batch * c + column, mask=real, other=0.0).to(ACC)
    for first in range(0, n, T):
        t = first + order
        at = n - 1 - t if REVERSE else t
        inside = (t < n)[:, None] & real[None, :]
        place = (batch * n + at[:, None]) * c + column[None, :]
        step = tl.load(x + place, mask=inside, other=0.0).to(ACC)
        if LAG:
            had = inside & (t > 0)[:, None]
            gate = tl.load(a + place + (c if REVERSE else -c), mask=had, other=1.0).to(ACC)
        else:
            gate = tl.load(a + place, mask=inside, other=1.0).to(ACC)
        gate, step = tl.associative_scan((gate, step), 0, _after)
        step += gate * state[None, :]
        tl.store(h + place, step, mask=inside)
        # Beyond the end gates are 1 and inputs 0, so the last row always holds the state.
        state = tl.sum(tl.where((order == T - 1)[:, None], step, 0.0), 0)


@jit
def scan_pairs(a, x, h0, h, n, c, START: tl.constexpr, REVERSE: tl.constexpr, LAG: tl.constexpr, CONJUGATE: tl.constexpr,
               T: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """The same for [b, n, c, 2] and [b, c, 2], complex numbers as (re, im); gates conjugated if CONJUGATE."""
    batch = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * C + tl.arange(0, C)
    real = column < c
    order = tl.arange(0, T)
    state_r, state_i = tl.zeros((C,), ACC), tl.zeros((C,), ACC)
    if START:
        state_r += tl.load(h0 + (batch * c + column) * 2, mask=real, other=0.0).to(ACC)
        state_i += tl.load(h0 + (batch * c + column) * 2 + 1, mask=real, other=0.0).to(ACC)
    for first in range(0, n, T):
        t = first + order
        at = n - 1 - t if REVERSE else t
        inside = (t < n)[:, None] & real[None, :]
        place = ((batch * n + at[:, None]) * c + column[None, :]) * 2
        step_r = tl.load(x + place, mask=inside, other=0.0).to(ACC)
        step_i = tl.load(x + place + 1, mask=inside, other=0.0).to(ACC)
        had, gates = inside, a + place
        if LAG:
            had = inside & (t > 0)[:, None]
            gates = gates + (2 * c if REVERSE else -2 * c)
        gate_r = tl.load(gates, mask=had, other=1.0).to(ACC)
        gate_i = tl.load(gates + 1, mask=had, other=0.0).to(ACC)
        if CONJUGATE:
            gate_i = -gate_i
        gate_r, gate_i, step_r, step_i = tl.associative_scan((gate_r, gate_i, step_r, step_i), 0, _after_pairs)
        step_r += gate_r * state_r[None, :] - gate_i * state_i[None, :]
        step_i += gate_r * state_i[None, :] + gate_i * state_r[None, :]
        tl.store(h + place, step_r, mask=inside)
        tl.store(h + place + 1, step_i, mask=inside)
        last = (order == T - 1)[:, None]
        state_r = tl.sum(tl.where(last, step_r, 0.0), 0)
        state_i = tl.sum(tl.where(last, step_i, 0.0), 0)
