"""What the GPU runs of the gradients of the gated loop with a complex gate per head; see gate_loop_heads_device.

`r` are the gradients of the states that leave the chunks, found by `sums` and `carry` run from the end. With S = q k^T,
dS = g v^T and D_ts = p_t / p_s the gates' gradients are sums over later positions of

    d log size = q_t . dq_t - k_t . dk_t        d angle = -q_t . dq'_t + k_t . dk'_t

where ' puts the imaginary part of D in the place of the real one; what lies behind a chunk counts through conj(H) r.
"""

from __future__ import annotations

from .gate_loop_gate import load_pairs, make_gate, store_pairs, times
from .gate_loop_heads_device import decays, dot, inverse, put, tile
from .lang import jit, tl

# M positions of a chunk, R rows of a tile, K numbers that one product sums over; D and E columns, filled up.


@jit
def queries(q, k, v, g, p, states, dq, logs, n, d, e, chunks, M: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
            D: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """dq, and what queries give to the gates: logs [heads, n, 2]."""
    head, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * R
    column, t = tl.arange(0, D), start + tl.arange(0, R)
    chunk = start // M
    q, k, v, g, inner = q + head * n * d, k + head * n * d, v + head * n * e, g + head * n * e, tl.arange(0, K)
    state = states + (head * (chunks + 1) + chunk) * 2 * d * e
    read_r, read_i = tl.zeros((R, D), ACC), tl.zeros((R, D), ACC)
    for i in range(0, e, K):
        g_t = tile(g, t, i + inner, n, e, ACC)
        # The state transposed: its rows are columns here.
        inside = (i + inner < e)[:, None] & (column < d)[None, :]
        place = state + column[None, :] * e + (i + inner)[:, None]
        read_r += dot(g_t, tl.load(place, mask=inside, other=0.0), ACC, PRECISION)
        read_i += dot(g_t, tl.load(place + d * e, mask=inside, other=0.0), ACC, PRECISION)
    pr, pi = load_pairs(p, head * n + t, t < n, 1.0, ACC)
    total = pr[:, None] * read_r - pi[:, None] * read_i
    read_i = pi[:, None] * read_r + pr[:, None] * read_i
    turn = tl.zeros((R,), ACC)
    for first in range(chunk * M, start + R, K):
        s = first + inner
        slope, scores = tl.zeros((R, K), ACC), tl.zeros((R, K), ACC)
        for i in range(0, e, K):
            slope += dot(tile(g, t, i + inner, n, e, ACC), tl.trans(tile(v, s, i + inner, n, e, ACC)), ACC, PRECISION)
        for i in range(0, d, K):
            scores += dot(tile(q, t, i + inner, n, d, ACC), tl.trans(tile(k, s, i + inner, n, d, ACC)), ACC, PRECISION)
        re, im = decays(p, head, t, s, n, ACC)
        total += dot(slope * re, tile(k, s, column, n, d, ACC), ACC, PRECISION)
        turn += tl.sum(slope * scores * im, 1)
    put(dq + head * n * d, t, column, n, d, total)
    q_t = tile(q, t, column, n, d, ACC)
    store_pairs(logs, head * n + t, tl.sum(q_t * total, 1), -turn - tl.sum(q_t * read_i, 1), t < n)


@jit
def keys(q, k, v, g, p, ends, r, dk, dv, logs, n, d, e, chunks, M: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
         D: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """dk and dv; logs becomes the sum of what queries and keys give to the gates."""
    head, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * R
    column, column_e, s = tl.arange(0, D), tl.arange(0, E), start + tl.arange(0, R)
    chunk = start // M
    q, k, v, g, inner = q + head * n * d, k + head * n * d, v + head * n * e, g + head * n * e, tl.arange(0, K)
    r += (head * (chunks + 1) + chunk) * 2 * d * e
    pr, pi = load_pairs(p, head * n + s, s < n, 1.0, ACC)
    wr, wi = inverse(pr, pi)
    end = ends + (head * chunks + chunk) * 2
    zr, zi = times(tl.load(end), tl.load(end + 1), wr, wi)
    sent_r, sent_i = tl.zeros((R, D), ACC), tl.zeros((R, D), ACC)
    for i in range(0, e, K):
        v_s = tile(v, s, i + inner, n, e, ACC)
        inside = (i + inner < e)[:, None] & (column < d)[None, :]
        place = r + column[None, :] * e + (i + inner)[:, None]
        sent_r += dot(v_s, tl.load(place, mask=inside, other=0.0), ACC, PRECISION)
        sent_i += dot(v_s, tl.load(place + d * e, mask=inside, other=0.0), ACC, PRECISION)
    total = zr[:, None] * sent_r + zi[:, None] * sent_i
    sent_i = zi[:, None] * sent_r - zr[:, None] * sent_i
    value = tl.zeros((R, E), ACC)
    for i in range(0, d, K):
        k_s = tile(k, s, i + inner, n, d, ACC)
        value += dot(k_s * zr[:, None], tile(r, i + inner, column_e, d, e, ACC), ACC, PRECISION)
        value += dot(k_s * zi[:, None], tile(r + d * e, i + inner, column_e, d, e, ACC), ACC, PRECISION)
    turn = tl.zeros((R,), ACC)
    for first in range(start, min((chunk + 1) * M, n), K):
        t = first + inner
        slope, scores = tl.zeros((R, K), ACC), tl.zeros((R, K), ACC)
        for i in range(0, e, K):
            slope += dot(tile(v, s, i + inner, n, e, ACC), tl.trans(tile(g, t, i + inner, n, e, ACC)), ACC, PRECISION)
        for i in range(0, d, K):
            scores += dot(tile(k, s, i + inner, n, d, ACC), tl.trans(tile(q, t, i + inner, n, d, ACC)), ACC, PRECISION)
        re, im = decays(p, head, t, s, n, ACC)
        re, im = tl.trans(re), tl.trans(im)
        total += dot(slope * re, tile(q, t, column, n, d, ACC), ACC, PRECISION)
        value += dot(scores * re, tile(g, t, column_e, n, e, ACC), ACC, PRECISION)
        turn += tl.sum(slope * scores * im, 1)
    put(dk + head * n * d, s, column, n, d, total)
    put(dv + head * n * e, s, column_e, n, e, value)
    k_s = tile(k, s, column, n, d, ACC)
    log_r, log_i = load_pairs(logs, head * n + s, s < n, 0.0, ACC)
    log_r -= tl.sum(k_s * total, 1)
    log_i += turn + tl.sum(k_s * sent_i, 1)
    store_pairs(logs, head * n + s, log_r, log_i, s < n)


@jit
def gates_back(a, logs, states, r, fixed, da, n, chunks, size, FIXED: tl.constexpr, M: tl.constexpr, B: tl.constexpr,
               ACC: tl.constexpr):
    """da from logs. fixed [heads, 2], if FIXED: a gradient of log alpha that is the same at every position."""
    head, chunk, order = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, M)
    left = states + (head * (chunks + 1) + chunk + 1) * 2 * size
    r += (head * (chunks + 1) + chunk) * 2 * size
    behind_r, behind_i = tl.zeros((B,), ACC), tl.zeros((B,), ACC)
    for i in range(0, size, B):
        place = i + tl.arange(0, B)
        real = place < size
        hr, hi = tl.load(left + place, mask=real, other=0.0), tl.load(left + size + place, mask=real, other=0.0)
        rr, ri = tl.load(r + place, mask=real, other=0.0), tl.load(r + size + place, mask=real, other=0.0)
        behind_r += hr * rr + hi * ri
        behind_i += hr * ri - hi * rr
    t = chunk * M + order
    log_r, log_i = load_pairs(logs, head * n + t, t < n, 0.0, ACC)
    log_r = tl.cumsum(log_r, 0, reverse=True) + tl.sum(behind_r, 0)
    log_i = tl.cumsum(log_i, 0, reverse=True) + tl.sum(behind_i, 0)
    if FIXED:
        log_r += tl.load(fixed + 2 * head)
        log_i += tl.load(fixed + 2 * head + 1)
    x, y = load_pairs(a, head * n + t, t < n, 1.0, ACC)
    ux, uy, _, slow, over = make_gate(x, y, ACC)
    along, across = slow * log_r, over * log_i
    store_pairs(da, head * n + t, ux * along - uy * across, uy * along + ux * across, t < n)


@jit
def tangent_sums(k, v, tk, tv, p, ends, logs, log_ends, states, moves, n, d, e, M: tl.constexpr, R: tl.constexpr,
                 D: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """What each chunk adds to the tangent of the state."""
    head, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    blocks = (e + E - 1) // E
    row = tl.program_id(2) // blocks * D + tl.arange(0, D)
    column = tl.program_id(2) % blocks * E + tl.arange(0, E)
    end = (head * chunks + chunk) * 2
    end_r, end_i = tl.load(ends + end), tl.load(ends + end + 1)
    far_r, far_i = tl.load(log_ends + end), tl.load(log_ends + end + 1)
    move_r, move_i = times(end_r, end_i, far_r, far_i)
    place = (head * (chunks + 1) + chunk) * 2 * d * e
    hr, hi = tile(states + place, row, column, d, e, ACC), tile(states + place + d * e, row, column, d, e, ACC)
    total_r, total_i = times(move_r, move_i, hr, hi)
    for first in range(0, M, R):
        s = chunk * M + first + tl.arange(0, R)
        pr, pi = load_pairs(p, head * n + s, s < n, 1.0, ACC)
        lr, li = load_pairs(logs, head * n + s, s < n, 0.0, ACC)
        wr, wi = inverse(pr, pi)
        zr, zi = times(end_r, end_i, wr, wi)
        tzr, tzi = times(zr, zi, far_r - lr, far_i - li)
        k_s, tk_s = tile(k + head * n * d, s, row, n, d, ACC), tile(tk + head * n * d, s, row, n, d, ACC)
        v_s, tv_s = tile(v + head * n * e, s, column, n, e, ACC), tile(tv + head * n * e, s, column, n, e, ACC)
        total_r += dot(tl.trans(tk_s * zr[:, None] + k_s * tzr[:, None]), v_s, ACC, PRECISION)
        total_r += dot(tl.trans(k_s * zr[:, None]), tv_s, ACC, PRECISION)
        total_i += dot(tl.trans(tk_s * zi[:, None] + k_s * tzi[:, None]), v_s, ACC, PRECISION)
        total_i += dot(tl.trans(k_s * zi[:, None]), tv_s, ACC, PRECISION)
    put(moves + place, row, column, d, e, total_r)
    put(moves + place + d * e, row, column, d, e, total_i)


@jit
def tangent_outputs(q, k, v, tq, tk, tv, p, logs, states, moves, out, n, d, e, chunks, M: tl.constexpr, R: tl.constexpr,
                    K: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """The tangent of out; moves: tangents of states."""
    head, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * R
    column, t = tl.program_id(2) * E + tl.arange(0, E), start + tl.arange(0, R)
    chunk, inner = start // M, tl.arange(0, K)
    q, k, v = q + head * n * d, k + head * n * d, v + head * n * e
    tq, tk, tv = tq + head * n * d, tk + head * n * d, tv + head * n * e
    place = (head * (chunks + 1) + chunk) * 2 * d * e
    states += place
    moves += place
    read_r, read_i = tl.zeros((R, E), ACC), tl.zeros((R, E), ACC)
    push_r, push_i = tl.zeros((R, E), ACC), tl.zeros((R, E), ACC)
    for i in range(0, d, K):
        q_t, tq_t = tile(q, t, i + inner, n, d, ACC), tile(tq, t, i + inner, n, d, ACC)
        hr, hi = tile(states, i + inner, column, d, e, ACC), tile(states + d * e, i + inner, column, d, e, ACC)
        read_r += dot(q_t, hr, ACC, PRECISION)
        read_i += dot(q_t, hi, ACC, PRECISION)
        push_r += dot(tq_t, hr, ACC, PRECISION) + dot(q_t, tile(moves, i + inner, column, d, e, ACC), ACC, PRECISION)
        push_i += dot(tq_t, hi, ACC, PRECISION) + dot(q_t, tile(moves + d * e, i + inner, column, d, e, ACC), ACC, PRECISION)
    pr, pi = load_pairs(p, head * n + t, t < n, 1.0, ACC)
    lr, li = load_pairs(logs, head * n + t, t < n, 0.0, ACC)
    tpr, tpi = times(pr, pi, lr, li)
    total = pr[:, None] * push_r - pi[:, None] * push_i + tpr[:, None] * read_r - tpi[:, None] * read_i
    for first in range(chunk * M, start + R, K):
        s = first + inner
        scores, moved = tl.zeros((R, K), ACC), tl.zeros((R, K), ACC)
        for i in range(0, d, K):
            q_t, k_s = tile(q, t, i + inner, n, d, ACC), tl.trans(tile(k, s, i + inner, n, d, ACC))
            scores += dot(q_t, k_s, ACC, PRECISION)
            moved += dot(tile(tq, t, i + inner, n, d, ACC), k_s, ACC, PRECISION)
            moved += dot(q_t, tl.trans(tile(tk, s, i + inner, n, d, ACC)), ACC, PRECISION)
        re, im = decays(p, head, t, s, n, ACC)
        sr, si = load_pairs(logs, head * n + s, s < n, 0.0, ACC)
        moved = moved * re + scores * (re * (lr[:, None] - sr[None, :]) - im * (li[:, None] - si[None, :]))
        total += dot(moved, tile(v, s, column, n, e, ACC), ACC, PRECISION)
        total += dot(scores * re, tile(tv, s, column, n, e, ACC), ACC, PRECISION)
    put(out + head * n * e, t, column, n, e, total)
