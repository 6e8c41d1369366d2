"""What the GPU runs of Taylor attention: sums of each segment of positions, and what rows read from them and from their own segment.

With p(s) = 1 + s + s^2 / 2 = psi(a) . phi(b), three sums serve value, gradient and tangent, for queries as for keys:

    states    H_f = sum_t psi_f(x_t) [y_t, z_t]                                one sum per segment
    gather    [out_i, out_z_i] = sum_j p(a_i . b_j) [y_j, z_j]                 out and its denominator; dv
    slope     da_i = sum_j (1 + a_i . b_j) ([u_i, r_i] . [y_j, z_j]) b_j       dq; dk

Row i sees the rows j <= i of the other side, or j >= i if REVERSE, or all if not CAUSAL: those of its own segment one by one,
the rest through the sum of their H, the place `visit` of held. With ALONG the operands t... are the changes of those without
the t, and each result is the change of the result. Features are 1, d channels, d (d + 1) / 2 products of channels i <= j; the
squares are halved in psi, not in phi. z is the last column, apart from y so that e stays a power of 2.
"""

from __future__ import annotations

from .lang import jit, tl

# N rows of a program; M rows of the other side in a tile; K channels, features or positions that one product sums over;
# D and E widths, filled up with zeros. One row of this side meets GROUP rows of the other; SHARE rows meet the same ones.


@jit
def _rows(base, row, at, count, width, columns, other, ACC: tl.constexpr):
    """Rows `at`, these columns, of the row-th [count, width] matrix, widened; `other` outside, for the column -1 too."""
    inside = (at < count)[:, None] & ((columns >= 0) & (columns < width))[None, :]
    return tl.load(base + (row * count + at[:, None]) * width + columns[None, :], mask=inside, other=other).to(ACC)


@jit
def _entries(base, row, at, count, ACC: tl.constexpr):
    """Entries `at` of the row-th vector [count], widened; zeros outside."""
    return tl.load(base + row * count + at, mask=at < count, other=0.0).to(ACC)


@jit
def _table(x, x_row, i, n, y, y_row, j, m, width, N: tl.constexpr, M: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr,
           PRECISION: tl.constexpr):
    """Products of the rows i of x with the rows j of y: [N, M]."""
    table = tl.zeros((N, M), ACC)
    for first in range(0, width, K):
        columns = first + tl.arange(0, K)
        x_i, y_j = _rows(x, x_row, i, n, width, columns, 0.0, ACC), _rows(y, y_row, j, m, width, columns, 0.0, ACC)
        table += tl.dot(x_i, tl.trans(y_j), input_precision=PRECISION, out_dtype=ACC)
    return table


@jit
def _place(i, j, d):
    """Which feature the product of the channels i <= j is."""
    return 1 + d + i * d - i * (i - 1) // 2 + j - i


@jit
def _factors(f, d):
    """The channels i <= j whose product feature f is; -1 stands for a factor of 1."""
    # At the first product of row i the root of left + 4 is 2 d + 1 - 2 i: a little less keeps it off whole numbers.
    left = (2 * d + 1) * (2 * d + 1) - 8 * (f - 1 - d) - 4
    i = ((2 * d + 1 - tl.sqrt(tl.maximum(left, 0).to(tl.float32))) * 0.5).to(tl.int32)
    return tl.where(f > d, i, -1), tl.where(f > d, f - _place(i, i, d) + i, f - 1)


@jit
def _phi(x, row, at, count, d, i, j, ACC: tl.constexpr):
    """Products of the channels i and j of the rows `at`. What does not exist is finite, not zero."""
    return _rows(x, row, at, count, d, i, 1.0, ACC) * _rows(x, row, at, count, d, j, 1.0, ACC)


@jit
def _phi_along(x, tx, row, at, count, d, i, j, ACC: tl.constexpr):
    """Change of _phi."""
    change = _rows(tx, row, at, count, d, i, 0.0, ACC) * _rows(x, row, at, count, d, j, 1.0, ACC)
    return change + _rows(x, row, at, count, d, i, 1.0, ACC) * _rows(tx, row, at, count, d, j, 0.0, ACC)


@jit
def _seen(i, j, m, REVERSE: tl.constexpr):
    """Whether row i may see row j of its segment: [N, M]."""
    seen = j[None, :] >= i[:, None] if REVERSE else j[None, :] <= i[:, None]
    return seen & (j < m)[None, :]


@jit
def _within(start, m, length, N: tl.constexpr, REVERSE: tl.constexpr):
    """First and last + 1 of the rows that the N rows from `start` may see in their segment."""
    first = start if REVERSE else start // length * length
    return first, tl.minimum(m, start // length * length + length if REVERSE else start + N)


@jit
def _visit(start, length, visits, CAUSAL: tl.constexpr, REVERSE: tl.constexpr):
    """The place of the sum that the rows of a segment read: before their own in the order of visits, or the last one."""
    segment = start // length
    if CAUSAL:
        visit = visits - 2 - segment if REVERSE else segment
    else:
        visit = visits - 1
    return visit


@jit
def states(x, y, z, tx, ty, tz, held, held_z, n, d, e, features, segments, length, ALONG: tl.constexpr, REVERSE: tl.constexpr,
           GROUP: tl.constexpr, F: tl.constexpr, K: tl.constexpr, E: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """H of each segment and of F features: held [rows, 1 + segments, features, e], held_z without the last axis.

    x [rows * GROUP, n, d], y [rows * GROUP, n, e] and z [rows * GROUP, n] are summed over the group. Places follow the order of
    visits; the first one is left for what came before.
    """
    row, segment = (tl.program_id(0) // segments).to(tl.int64), tl.program_id(0) % segments
    f, columns = tl.program_id(1) * F + tl.arange(0, F), tl.arange(0, E)
    i, j = _factors(f, d)
    total, total_z = tl.zeros((F, E), ACC), tl.zeros((K, F), ACC)
    for member in range(GROUP):
        source = row * GROUP + member
        for first in range(segment * length, tl.minimum(n, segment * length + length), K):
            t = first + tl.arange(0, K)
            phi, y_t = _phi(x, source, t, n, d, i, j, ACC), _rows(y, source, t, n, e, columns, 0.0, ACC)
            if ALONG:
                ty_t = _rows(ty, source, t, n, e, columns, 0.0, ACC)
                total += tl.dot(tl.trans(phi), ty_t, input_precision=PRECISION, out_dtype=ACC)
                total_z += phi * _entries(tz, source, t, n, ACC)[:, None]
                phi = _phi_along(x, tx, source, t, n, d, i, j, ACC)
            total += tl.dot(tl.trans(phi), y_t, input_precision=PRECISION, out_dtype=ACC)
            total_z += phi * _entries(z, source, t, n, ACC)[:, None]
    weight = tl.where((f > d) & (i == j), 0.5, 1.0).to(ACC)
    place = (row * (segments + 1) + (segments - segment if REVERSE else segment + 1)) * features + f
    inside = (f < features)[:, None] & (columns < e)[None, :]
    tl.store(held + place[:, None] * e + columns[None, :], total * weight[:, None], mask=inside)
    tl.store(held_z + place, tl.sum(total_z, 0) * weight, mask=f < features)


@jit
def add_up(sums, visits, width, W: tl.constexpr):
    """Running sums over the second axis of sums [rows, visits, width], in place."""
    column = tl.program_id(1) * W + tl.arange(0, W)
    place = sums + tl.program_id(0).to(tl.int64) * visits * width + column
    total = tl.load(place, mask=column < width, other=0.0)
    for _ in range(1, visits):
        place += width
        total += tl.load(place, mask=column < width, other=0.0)
        tl.store(place, total, mask=column < width)


@jit
def gather(a, b, y, z, ta, tb, ty, tz, held, held_z, t_held, t_held_z, out, out_z, n, m, d, e, features, visits, length, tiles,
           INTER: tl.constexpr, CAUSAL: tl.constexpr, REVERSE: tl.constexpr, ALONG: tl.constexpr, EPS: tl.constexpr,
           SHARE: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, M: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
           ACC: tl.constexpr, PRECISION: tl.constexpr):
    """out [rows, n, e] and out_z [rows, n] for a [rows, n, d], b [.., m, d], y [.., m, e], z [.., m]; out is
    divided by out_z, which counts as EPS at least, if EPS."""
    row, start = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * N
    i, columns = start + tl.arange(0, N), tl.arange(0, E)
    result, result_z = tl.zeros((N, E), ACC), tl.zeros((N,), ACC)
    if INTER:
        state = row // SHARE * visits + _visit(start, length, visits, CAUSAL, REVERSE)
        parts = tl.zeros((N, K), ACC)
        for first in range(0, features, K):
            f = first + tl.arange(0, K)
            one, two = _factors(f, d)
            phi, h = _phi(a, row, i, n, d, one, two, ACC), _rows(held, state, f, features, e, columns, 0.0, ACC)
            h_z = _entries(held_z, state, f, features, ACC)
            if ALONG:
                th = _rows(t_held, state, f, features, e, columns, 0.0, ACC)
                result += tl.dot(phi, th, input_precision=PRECISION, out_dtype=ACC)
                parts += phi * _entries(t_held_z, state, f, features, ACC)[None, :]
                phi = _phi_along(a, ta, row, i, n, d, one, two, ACC)
            result += tl.dot(phi, h, input_precision=PRECISION, out_dtype=ACC)
            parts += phi * h_z[None, :]
        result_z += tl.sum(parts, 1)
    if CAUSAL:
        lowest, beyond = _within(start, m, length, N, REVERSE)
        parts = tl.zeros((N, M), ACC)
        for member in range(GROUP):
            source = row // SHARE * GROUP + member
            for first in range(lowest, beyond, M):
                j = first + tl.arange(0, M)
                seen = _seen(i, j, m, REVERSE)
                s = _table(a, row, i, n, b, source, j, m, d, N, M, K, ACC, PRECISION)
                p = tl.where(seen, 1 + s + s * s * 0.5, 0.0)
                y_j, z_j = _rows(y, source, j, m, e, columns, 0.0, ACC), _entries(z, source, j, m, ACC)
                if ALONG:
                    result += tl.dot(p, _rows(ty, source, j, m, e, columns, 0.0, ACC), input_precision=PRECISION, out_dtype=ACC)
                    parts += p * _entries(tz, source, j, m, ACC)[None, :]
                    ts = _table(ta, row, i, n, b, source, j, m, d, N, M, K, ACC, PRECISION)
                    ts += _table(a, row, i, n, tb, source, j, m, d, N, M, K, ACC, PRECISION)
                    p = tl.where(seen, (1 + s) * ts, 0.0)
                result += tl.dot(p, y_j, input_precision=PRECISION, out_dtype=ACC)
                parts += p * z_j[None, :]
        result_z += tl.sum(parts, 1)
    if EPS > 0:
        result = result / tl.maximum(result_z, tl.full((N,), EPS, ACC))[:, None]
    tl.store(out + (row * n + i[:, None]) * e + columns[None, :], result, mask=(i < n)[:, None] & (columns < e)[None, :])
    tl.store(out_z + row * n + i, result_z, mask=i < n)


@jit
def slope(a, b, y, z, u, r, ta, tb, ty, tz, tu, tr, held, held_z, t_held, t_held_z, da, n, m, d, e, features, visits, length, tiles,
          INTER: tl.constexpr, CAUSAL: tl.constexpr, REVERSE: tl.constexpr, ALONG: tl.constexpr, SHARE: tl.constexpr,
          GROUP: tl.constexpr, N: tl.constexpr, M: tl.constexpr, K: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr,
          PRECISION: tl.constexpr):
    """da [rows, n, d] for a [rows, n, d] with its u [rows, n, e], r [rows, n], and b, y, z as in `gather`."""
    row, start = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * N
    i, columns = start + tl.arange(0, N), tl.arange(0, D)
    r_i = _entries(r, row, i, n, ACC)
    tr_i = _entries(tr, row, i, n, ACC) if ALONG else r_i
    result = tl.zeros((N, D), ACC)
    if INTER:
        state = row // SHARE * visits + _visit(start, length, visits, CAUSAL, REVERSE)
        # A channel meets all channels, whichever of the two comes first; -1: the features that are single channels.
        for channel in range(-1, d):
            low, high = tl.minimum(columns, channel), tl.maximum(columns, channel)
            f = tl.where(columns < d, _place(low, high, d) if channel >= 0 else 1 + columns, features)
            twice = tl.where(columns == channel, 2.0, 1.0).to(ACC)[None, :]
            w = r_i[:, None] * _entries(held_z, state, f, features, ACC)[None, :]
            w += _table(u, row, i, n, held, state, f, features, e, N, D, K, ACC, PRECISION)
            here = (i < n) & (channel >= 0)
            if ALONG:
                tw = tr_i[:, None] * _entries(held_z, state, f, features, ACC)[None, :]
                tw += r_i[:, None] * _entries(t_held_z, state, f, features, ACC)[None, :]
                tw += _table(tu, row, i, n, held, state, f, features, e, N, D, K, ACC, PRECISION)
                tw += _table(u, row, i, n, t_held, state, f, features, e, N, D, K, ACC, PRECISION)
                result += tl.load(ta + (row * n + i) * d + channel, mask=here, other=0.0).to(ACC)[:, None] * w * twice
                w = tw
            result += tl.load(a + (row * n + i) * d + channel, mask=here, other=1.0).to(ACC)[:, None] * w * twice
    if CAUSAL:
        lowest, beyond = _within(start, m, length, N, REVERSE)
        for member in range(GROUP):
            source = row // SHARE * GROUP + member
            for first in range(lowest, beyond, M):
                j = first + tl.arange(0, M)
                seen = _seen(i, j, m, REVERSE)
                s = 1 + _table(a, row, i, n, b, source, j, m, d, N, M, K, ACC, PRECISION)
                z_j = _entries(z, source, j, m, ACC)
                w = r_i[:, None] * z_j[None, :] + _table(u, row, i, n, y, source, j, m, e, N, M, K, ACC, PRECISION)
                ds, b_j = tl.where(seen, s * w, 0.0), _rows(b, source, j, m, d, columns, 0.0, ACC)
                if ALONG:
                    tb_j = _rows(tb, source, j, m, d, columns, 0.0, ACC)
                    result += tl.dot(ds, tb_j, input_precision=PRECISION, out_dtype=ACC)
                    ts = _table(ta, row, i, n, b, source, j, m, d, N, M, K, ACC, PRECISION)
                    ts += _table(a, row, i, n, tb, source, j, m, d, N, M, K, ACC, PRECISION)
                    tw = tr_i[:, None] * z_j[None, :] + r_i[:, None] * _entries(tz, source, j, m, ACC)[None, :]
                    tw += _table(tu, row, i, n, y, source, j, m, e, N, M, K, ACC, PRECISION)
                    tw += _table(u, row, i, n, ty, source, j, m, e, N, M, K, ACC, PRECISION)
                    ds = tl.where(seen, ts * w + s * tw, 0.0)
                result += tl.dot(ds, b_j, input_precision=PRECISION, out_dtype=ACC)
    tl.store(da + (row * n + i[:, None]) * d + columns[None, :], result, mask=(i < n)[:, None] & (columns < d)[None, :])
