"""What the GPU runs of the gated loop with a complex gate per head: chunks of M positions, and a state for each.

With p_t the product of the gates from a chunk's start up to t, inside a chunk out = (q k^T * Re(p_t / p_s)) v, and the state H
that enters it adds q Re(p_t H). `gates` finds p, `sums` what each chunk adds to the state, `carry` the states, `outputs` the
rest; each has programs for all chunks at once, except `carry`, which has them for all numbers of a state. Gates are at least 1/2
in size, so 1 / p_s stays below 2^64.

Rows are read in the order [heads, n, width], heads including the batch. states [heads, chunks + 1, 2, d, e]: real parts, then
imaginary parts.
"""

from __future__ import annotations

from .gate_loop_gate import load_pairs, make_gate, store_pairs, times
from .lang import jit, tl

# M positions of a chunk, R rows of a tile, K numbers that one product sums over; D and E columns, filled up.


@jit
def tile(base, row, column, n, width, ACC: tl.constexpr):
    """These rows and columns of a [n, width] matrix, widened; zeros outside."""
    inside = (row < n)[:, None] & (column < width)[None, :]
    return tl.load(base + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(ACC)


@jit
def put(base, row, column, n, width, x):
    """Stores what `tile` loads."""
    tl.store(base + row[:, None] * width + column[None, :], x, mask=(row < n)[:, None] & (column < width)[None, :])


@jit
def inverse(pr, pi):
    """1 / p; |p| may be 2^-64, and its square must be a normal number."""
    sr, si = pr * 4294967296.0, pi * 4294967296.0
    scale = 4294967296.0 / (sr * sr + si * si)
    return sr * scale, -si * scale


@jit
def dot(x, y, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """x y."""
    return tl.dot(x, y, input_precision=PRECISION, out_dtype=ACC)


@jit
def gates(a, ta, p, ends, logs, log_ends, n, TANGENT: tl.constexpr, M: tl.constexpr, ACC: tl.constexpr):
    """p [heads, n, 2] and its last in each chunk; if TANGENT, sums of the tangent of log alpha likewise."""
    head, chunk, order = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, M)
    t = chunk * M + order
    inside, place, end = t < n, head * n + t, head * tl.num_programs(1) + chunk
    x, y = load_pairs(a, place, inside, 1.0, ACC)
    ux, uy, size, slow, over = make_gate(x, y, ACC)
    pr, pi = tl.where(inside, size * ux, 1.0), tl.where(inside, size * uy, 0.0)
    pr, pi = tl.associative_scan((pr, pi), 0, times)
    store_pairs(p, place, pr, pi, inside)
    # Beyond the end gates are 1.
    tl.store(ends + 2 * end, tl.sum(tl.where(order == M - 1, pr, 0.0), 0))
    tl.store(ends + 2 * end + 1, tl.sum(tl.where(order == M - 1, pi, 0.0), 0))
    if TANGENT:
        tx, ty = load_pairs(ta, place, inside, 0.0, ACC)
        along, angle = slow * (ux * tx + uy * ty), over * (ux * ty - uy * tx)
        store_pairs(logs, place, tl.cumsum(along, 0), tl.cumsum(angle, 0), inside)
        tl.store(log_ends + 2 * end, tl.sum(along, 0))
        tl.store(log_ends + 2 * end + 1, tl.sum(angle, 0))


@jit
def sums(x, y, p, ends, states, n, d, e, BACK: tl.constexpr, M: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
         E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """What each chunk adds: the sum of f_s x_s y_s^T with f = p_end / p_s, or conj(p_s) if BACK (x, y are then q and g)."""
    head, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    blocks = (e + E - 1) // E
    row = tl.program_id(2) // blocks * D + tl.arange(0, D)
    column = tl.program_id(2) % blocks * E + tl.arange(0, E)
    end = ends + (head * chunks + chunk) * 2
    end_r, end_i = tl.load(end), tl.load(end + 1)
    total_r, total_i = tl.zeros((D, E), ACC), tl.zeros((D, E), ACC)
    for first in range(0, M, R):
        s = chunk * M + first + tl.arange(0, R)
        pr, pi = load_pairs(p, head * n + s, s < n, 1.0, ACC)
        if BACK:
            fr, fi = pr, -pi
        else:
            wr, wi = inverse(pr, pi)
            fr, fi = times(end_r, end_i, wr, wi)
        x_s, y_s = tile(x + head * n * d, s, row, n, d, ACC), tile(y + head * n * e, s, column, n, e, ACC)
        total_r += dot(tl.trans(x_s * fr[:, None]), y_s, ACC, PRECISION)
        total_i += dot(tl.trans(x_s * fi[:, None]), y_s, ACC, PRECISION)
    place = states + (head * (chunks + 1) + chunk) * 2 * d * e
    put(place, row, column, d, e, total_r)
    put(place + d * e, row, column, d, e, total_i)


@jit
def carry(states, ends, first, last, product, chunks, size, START: tl.constexpr, REVERSE: tl.constexpr, B: tl.constexpr,
          ACC: tl.constexpr):
    """Puts the state before each chunk in the place of what the chunk adds; last [heads, d, e, 2] comes after all.

    REVERSE: from the last chunk to the first, with conjugate gates. product [heads, 2]: of all gates.
    """
    head, place = tl.program_id(0).to(tl.int64), tl.program_id(1) * B + tl.arange(0, B)
    real = place < size
    state_r, state_i = tl.zeros((B,), ACC), tl.zeros((B,), ACC)
    whole_r = tl.sum(state_r, 0) + 1.0
    whole_i = tl.sum(state_i, 0)
    if START:
        state_r, state_i = load_pairs(first, head * size + place, real, 0.0, ACC)
    for i in range(chunks):
        chunk = chunks - 1 - i if REVERSE else i
        here = states + (head * (chunks + 1) + chunk) * 2 * size + place
        own_r, own_i = tl.load(here, mask=real, other=0.0), tl.load(here + size, mask=real, other=0.0)
        tl.store(here, state_r, mask=real)
        tl.store(here + size, state_i, mask=real)
        gate_r = tl.load(ends + (head * chunks + chunk) * 2)
        gate_i = tl.load(ends + (head * chunks + chunk) * 2 + 1)
        if REVERSE:
            gate_i = -gate_i
        state_r, state_i = times(gate_r, gate_i, state_r, state_i)
        state_r, state_i = state_r + own_r, state_i + own_i
        whole_r, whole_i = times(whole_r, whole_i, gate_r, gate_i)
    here = states + (head * (chunks + 1) + chunks) * 2 * size + place
    tl.store(here, state_r, mask=real)
    tl.store(here + size, state_i, mask=real)
    store_pairs(last, head * size + place, state_r, state_i, real)
    if tl.program_id(1) == 0:
        tl.store(product + head * 2, whole_r)
        tl.store(product + head * 2 + 1, whole_i)


@jit
def decays(p, head, t, s, n, ACC: tl.constexpr):
    """p_t / p_s, zero where s > t."""
    pr, pi = load_pairs(p, head * n + t, t < n, 1.0, ACC)
    qr, qi = load_pairs(p, head * n + s, s < n, 1.0, ACC)
    wr, wi = inverse(qr, qi)
    re, im = times(pr[:, None], pi[:, None], wr[None, :], wi[None, :])
    seen = t[:, None] >= s[None, :]
    return tl.where(seen, re, 0.0), tl.where(seen, im, 0.0)


@jit
def outputs(q, k, v, p, states, out, n, d, e, chunks, M: tl.constexpr, R: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
            ACC: tl.constexpr, PRECISION: tl.constexpr):
    """out [heads, n, e]: one program has one tile of rows and one block of columns."""
    head, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * R
    column, t = tl.program_id(2) * E + tl.arange(0, E), start + tl.arange(0, R)
    chunk = start // M
    q, k, v, inner = q + head * n * d, k + head * n * d, v + head * n * e, tl.arange(0, K)
    state = states + (head * (chunks + 1) + chunk) * 2 * d * e
    read_r, read_i = tl.zeros((R, E), ACC), tl.zeros((R, E), ACC)
    for i in range(0, d, K):
        q_t = tile(q, t, i + inner, n, d, ACC)
        read_r += dot(q_t, tile(state, i + inner, column, d, e, ACC), ACC, PRECISION)
        read_i += dot(q_t, tile(state + d * e, i + inner, column, d, e, ACC), ACC, PRECISION)
    pr, pi = load_pairs(p, head * n + t, t < n, 1.0, ACC)
    total = pr[:, None] * read_r - pi[:, None] * read_i
    for first in range(chunk * M, start + R, K):
        s = first + inner
        scores = tl.zeros((R, K), ACC)
        for i in range(0, d, K):
            scores += dot(tile(q, t, i + inner, n, d, ACC), tl.trans(tile(k, s, i + inner, n, d, ACC)), ACC, PRECISION)
        re, im = decays(p, head, t, s, n, ACC)
        total += dot(scores * re, tile(v, s, column, n, e, ACC), ACC, PRECISION)
    put(out + head * n * e, t, column, n, e, total)
