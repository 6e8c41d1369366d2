"""What the GPU runs of the gated loop with one complex number per channel: a parallel scan of each tile of positions.

One program has one batch element, one segment of tiles and one block of channels; it carries a state from tile to tile. Where
there are many segments, each kernel runs twice: without OUT it only finds where each segment ends when it starts from zero,
`carry` joins these ends, and with OUT segments start from there. FINISH: write the ends.

marks [b, slots, 2, c]: the state before each tile, from which the other kernels rebuild states.
"""

from __future__ import annotations

from .gate_loop_gate import after_pairs, at_row, load_pairs, make_gate, store_pairs, times
from .lang import jit, tl

# T positions of a tile, C channels of a block. Segments are counted in the order in which they are visited.


@jit
def _alpha(a, place, mask, ACC: tl.constexpr):
    """alpha, 1 where masked; and the parts of the gate."""
    x, y = load_pairs(a, place, mask, 1.0, ACC)
    ux, uy, size, slow, inverse = make_gate(x, y, ACC)
    return tl.where(mask, size * ux, 1.0), tl.where(mask, size * uy, 0.0), ux, uy, size, slow, inverse


@jit
def _before(k, v, a, marks, place, mark, inside, c, real, T: tl.constexpr, ACC: tl.constexpr):
    """The state before each position of a tile."""
    had = inside & (tl.arange(0, T) > 0)[:, None]
    x = tl.load(k + place - c, mask=had, other=0.0).to(ACC) * tl.load(v + place - c, mask=had, other=0.0).to(ACC)
    br, bi, _, _, _, _, _ = _alpha(a, place - c, had, ACC)
    br, bi, xr, xi = tl.associative_scan((br, bi, x, x * 0.0), 0, after_pairs)
    mr = tl.load(marks + mark, mask=real, other=0.0).to(ACC)[None, :]
    mi = tl.load(marks + mark + c, mask=real, other=0.0).to(ACC)[None, :]
    hr, hi = times(br, bi, mr, mi)
    return hr + xr, hi + xi


@jit
def carry(products, ends, first, starts, last, whole, segments, c, START: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """From each segment's product of gates and end [b, segments, c, 2]: its start, and last and whole [b, c, 2] of all."""
    batch, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * C + tl.arange(0, C)
    real = column < c
    state_r, state_i = tl.zeros((C,), ACC), tl.zeros((C,), ACC)
    product_r, product_i = state_r + 1.0, state_i
    if START:
        state_r, state_i = load_pairs(first, batch * c + column, real, 0.0, ACC)
    for segment in range(segments):
        place = (batch * segments + segment) * c + column
        store_pairs(starts, place, state_r, state_i, real)
        gate_r, gate_i = load_pairs(products, place, real, 1.0, ACC)
        end_r, end_i = load_pairs(ends, place, real, 0.0, ACC)
        state_r, state_i = times(gate_r, gate_i, state_r, state_i)
        state_r, state_i = state_r + end_r, state_i + end_i
        product_r, product_i = times(gate_r, gate_i, product_r, product_i)
    store_pairs(last, batch * c + column, state_r, state_i, real)
    store_pairs(whole, batch * c + column, product_r, product_i, real)


@jit
def forward(q, k, v, a, starts, out, marks, ends, products, n, c, tiles, slots, START: tl.constexpr, OUT: tl.constexpr,
            FINISH: tl.constexpr, T: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """out [b, n, c] of q, k, v [b, n, c] and raw gates a [b, n, c, 2], from starts [b, segments, c, 2] if START."""
    batch, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.program_id(2) * C + tl.arange(0, C)
    real, order = column < c, tl.arange(0, T)
    edge = (batch * tl.num_programs(1) + segment) * c + column
    state_r, state_i = tl.zeros((C,), ACC), tl.zeros((C,), ACC)
    whole_r, whole_i = state_r + 1.0, state_i
    if START:
        state_r, state_i = load_pairs(starts, edge, real, 0.0, ACC)
    for tile in range(segment * tiles, (segment + 1) * tiles):
        t = tile * T + order
        inside = (t < n)[:, None] & real[None, :]
        place = (batch * n + t[:, None]) * c + column[None, :]
        if OUT:
            mark = (batch * slots + tile) * 2 * c + column
            # 0 * column here and below: in Triton's interpreter & of a mask and a number is a number, which from 3.9 on is no mask.
            begun = real & (tile * T + 0 * column < n)
            tl.store(marks + mark, state_r, mask=begun)
            tl.store(marks + mark + c, state_i, mask=begun)
        x = tl.load(k + place, mask=inside, other=0.0).to(ACC) * tl.load(v + place, mask=inside, other=0.0).to(ACC)
        gate_r, gate_i, _, _, _, _, _ = _alpha(a, place, inside, ACC)
        gate_r, gate_i, xr, xi = tl.associative_scan((gate_r, gate_i, x, x * 0.0), 0, after_pairs)
        hr, hi = times(gate_r, gate_i, state_r[None, :], state_i[None, :])
        hr, hi = hr + xr, hi + xi
        if OUT:
            tl.store(out + place, tl.load(q + place, mask=inside, other=0.0).to(ACC) * hr, mask=inside)
        # Beyond the end gates are 1 and inputs 0, so the last row always holds the state.
        state_r, state_i = at_row(hr, T - 1, T), at_row(hi, T - 1, T)
        whole_r, whole_i = times(whole_r, whole_i, at_row(gate_r, T - 1, T), at_row(gate_i, T - 1, T))
    if FINISH:
        store_pairs(ends, edge, state_r, state_i, real)
        store_pairs(products, edge, whole_r, whole_i, real)


@jit
def backward(q, k, v, a, marks, g, fixed, starts, dq, dk, dv, da, ends, products, n, c, tiles, slots, START: tl.constexpr,
             FIXED: tl.constexpr, OUT: tl.constexpr, FINISH: tl.constexpr, T: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """The gradients, visited from the end. The state is conj(alpha_t) times the gradient of h_t.

    fixed [b, c, 2], if FIXED: a gradient of log alpha that is the same at every position.
    """
    batch, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.program_id(2) * C + tl.arange(0, C)
    real, order = column < c, tl.arange(0, T)
    edge = (batch * tl.num_programs(1) + segment) * c + column
    state_r, state_i = tl.zeros((C,), ACC), tl.zeros((C,), ACC)
    whole_r, whole_i = state_r + 1.0, state_i
    if START:
        state_r, state_i = load_pairs(starts, edge, real, 0.0, ACC)
    for visit in range(segment * tiles, (segment + 1) * tiles):
        tile = (n + T - 1) // T - 1 - visit
        t = tile * T + order
        inside = ((t < n) & (t >= 0))[:, None] & real[None, :]
        place = (batch * n + t[:, None]) * c + column[None, :]
        gate_r, gate_i, ux, uy, size, slow, inverse = _alpha(a, place, inside, ACC)
        slope = tl.load(g + place, mask=inside, other=0.0).to(ACC)
        read = tl.load(q + place, mask=inside, other=0.0).to(ACC) * slope
        back_r, back_i, er, ei = tl.associative_scan((gate_r, -gate_i, gate_r * read, -gate_i * read), 0, after_pairs, reverse=True)
        sr, si = times(back_r, back_i, state_r[None, :], state_i[None, :])
        er, ei = er + sr, ei + si
        if OUT:
            mark = (batch * slots + tile) * 2 * c + column
            hr, hi = _before(k, v, a, marks, place, mark, inside, c, real & (tile + 0 * column >= 0), T, ACC)
            key = tl.load(k + place, mask=inside, other=0.0).to(ACC)
            value = tl.load(v + place, mask=inside, other=0.0).to(ACC)
            total = (er * ux - ei * uy) / size
            tl.store(dq + place, slope * (gate_r * hr - gate_i * hi + key * value), mask=inside)
            tl.store(dk + place, value * total, mask=inside)
            tl.store(dv + place, key * total, mask=inside)
            log_r, log_i = hr * er + hi * ei, hr * ei - hi * er
            if FIXED:
                fr, fi = load_pairs(fixed, batch * c + column, real, 0.0, ACC)
                log_r, log_i = log_r + fr[None, :], log_i + fi[None, :]
            along, across = slow * log_r, inverse * log_i
            store_pairs(da, place, ux * along - uy * across, uy * along + ux * across, inside)
        state_r, state_i = at_row(er, 0, T), at_row(ei, 0, T)
        whole_r, whole_i = times(whole_r, whole_i, at_row(back_r, 0, T), at_row(back_i, 0, T))
    if FINISH:
        store_pairs(ends, edge, state_r, state_i, real)
        store_pairs(products, edge, whole_r, whole_i, real)


@jit
def tangent(q, k, v, a, marks, tq, tk, tv, ta, starts, out, logs, ends, products, n, c, tiles, slots, START: tl.constexpr,
            OUT: tl.constexpr, FINISH: tl.constexpr, T: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """The tangent of out; logs [b, segments, c, 2]: that of the logarithm of the product of each segment's gates."""
    batch, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.program_id(2) * C + tl.arange(0, C)
    real, order = column < c, tl.arange(0, T)
    edge = (batch * tl.num_programs(1) + segment) * c + column
    state_r, state_i = tl.zeros((C,), ACC), tl.zeros((C,), ACC)
    whole_r, whole_i, log_r, log_i = state_r + 1.0, state_i, state_r, state_i
    if START:
        state_r, state_i = load_pairs(starts, edge, real, 0.0, ACC)
    for tile in range(segment * tiles, (segment + 1) * tiles):
        t = tile * T + order
        inside = (t < n)[:, None] & real[None, :]
        place = (batch * n + t[:, None]) * c + column[None, :]
        mark = (batch * slots + tile) * 2 * c + column
        hr, hi = _before(k, v, a, marks, place, mark, inside, c, real & (tile * T + 0 * column < n), T, ACC)
        gate_r, gate_i, ux, uy, size, slow, inverse = _alpha(a, place, inside, ACC)
        tx, ty = load_pairs(ta, place, inside, 0.0, ACC)
        lr, li = slow * (ux * tx + uy * ty), inverse * (ux * ty - uy * tx)
        key = tl.load(k + place, mask=inside, other=0.0).to(ACC)
        value = tl.load(v + place, mask=inside, other=0.0).to(ACC)
        hr, hi = times(gate_r, gate_i, hr, hi)
        push_r, push_i = times(lr, li, hr, hi)
        push_r += tl.load(tk + place, mask=inside, other=0.0).to(ACC) * value
        push_r += tl.load(tv + place, mask=inside, other=0.0).to(ACC) * key
        gate_r, gate_i, xr, xi = tl.associative_scan((gate_r, gate_i, push_r, push_i), 0, after_pairs)
        sr, si = times(gate_r, gate_i, state_r[None, :], state_i[None, :])
        xr, xi = xr + sr, xi + si
        if OUT:
            result = tl.load(q + place, mask=inside, other=0.0).to(ACC) * xr
            result += tl.load(tq + place, mask=inside, other=0.0).to(ACC) * (hr + key * value)
            tl.store(out + place, result, mask=inside)
        state_r, state_i = at_row(xr, T - 1, T), at_row(xi, T - 1, T)
        whole_r, whole_i = times(whole_r, whole_i, at_row(gate_r, T - 1, T), at_row(gate_i, T - 1, T))
        log_r, log_i = log_r + tl.sum(lr, 0), log_i + tl.sum(li, 0)
    if FINISH:
        store_pairs(ends, edge, state_r, state_i, real)
        store_pairs(products, edge, whole_r, whole_i, real)
        store_pairs(logs, edge, log_r, log_i, real)
