/* Building blocks of the Taylor kernels; included once per precision by taylor.c.
 *
 * A chunk holds CHUNK positions. Two layouts of a chunk occur: rows [t][width], one position per row, and lanes
 * [width][CHUNK], one position per vector lane. Features are ordered by rotation inside the kernels: block r holds
 * x_i x_{(i+r) mod d} for all i, so that building them is one product of two shifted rows and needs no index table:
 *     r = 0 .. d/2 (for even d the last has d/2 entries), then the d linear features, then the constant.
 * A state is kept transposed, [e+1][stride] with stride = number of features rounded up to whole vectors, plus one. */

/* ------------------------------------------------------------------------------------------- the one matrix product */

/* out[c][lane] += sum_f X[f][lane] * B[c, f] for mc rows and nv vectors, with the sums in registers; = if `fresh`. With `apart`
 * the products are summed by themselves and then added, so that a state is rounded once per chunk; if it is 2 (Kahan), what that
 * rounding loses stays `fresh` numbers behind out. No product meets these additions that the compiler could merge with them. */
static inline __attribute__((always_inline)) void S(tile)(REAL *out, int64_t ldo, const REAL *X, int64_t ldx, const REAL *B,
                                                          int64_t sc, int64_t sf, int64_t K, int64_t fresh,
                                                          const int nv, const int mc, const int apart) {
    VF a[TILE][2];
#pragma GCC unroll 12
    for (int c = 0; c < mc; c++)
#pragma GCC unroll 2
        for (int v = 0; v < nv; v++)
            a[c][v] = apart == 2  ? -*(const VF *)(out + c * ldo + v * LANES + fresh)
                      : apart || fresh ? (VF){0}
                                       : *(const VF *)(out + c * ldo + v * LANES);
    /* One pointer per three rows: offsets 0, 1 and 2 strides are addressing modes, so few registers hold addresses. */
    const REAL *p[4] = {B, B + 3 * sc, B + 6 * sc, B + 9 * sc};
    for (int64_t f = 0; f < K; f++) {
        VF x[2];
#pragma GCC unroll 2
        for (int v = 0; v < nv; v++) x[v] = *(const VF *)(X + v * LANES);
#pragma GCC unroll 12
        for (int c = 0; c < mc; c++) {
            REAL w = p[c / 3][(c % 3) * sc];
#pragma GCC unroll 2
            for (int v = 0; v < nv; v++) a[c][v] += w * x[v];
        }
        X += ldx;
#pragma GCC unroll 4
        for (int i = 0; i < (mc + 2) / 3; i++) p[i] += sf;
    }
#pragma GCC unroll 12
    for (int c = 0; c < mc; c++)
#pragma GCC unroll 2
        for (int v = 0; v < nv; v++) {
            VF *o = (VF *)(out + c * ldo + v * LANES), own = a[c][v], before = apart ? *o : (VF){0}, sum = apart ? before + own : own;
            if (apart == 2) *(VF *)(out + c * ldo + v * LANES + fresh) = (sum - before) - own;
            *o = sum;
        }
}

#define TILES(SC, SF, APART, MC)                                                                                          \
    for (l = 0; l + 2 * LANES <= L; l += 2 * LANES) S(tile)(o + l, ldo, X + l, ldx, b, SC, SF, K, fresh, 2, MC, APART);   \
    if (l < L) S(tile)(o + l, ldo, X + l, ldx, b, SC, SF, K, fresh, 1, MC, APART);
#define TILE_CASE(MC)                                        \
    case MC:                                                 \
        if (apart == 1) {                                    \
            TILES(1, sf, 1, MC)                              \
        } else if (apart) {                                  \
            TILES(1, sf, 2, MC)                              \
        } else if (sc == 1) {                                \
            TILES(1, sf, 0, MC)                              \
        } else {                                             \
            TILES(sc, 1, 0, MC)                              \
        }                                                    \
        break;

static inline __attribute__((always_inline)) void S(tiles)(REAL *out, int64_t ldo, const REAL *X, int64_t ldx, const REAL *B,
                                                           int64_t sc, int64_t sf, int64_t M, int64_t K, int64_t L, int64_t fresh,
                                                           const int apart) {
    int64_t tiles = (M + TILE - 1) / TILE, l;
    for (int64_t i = 0, c = 0; i < tiles; i++) {
        int64_t size = (M - c + tiles - i - 1) / (tiles - i); /* even sizes: a last tile of one row would be slow */
        REAL *o = out + c * ldo;
        const REAL *b = B + c * sc;
        switch (size) {
            TILE_CASE(1) TILE_CASE(2) TILE_CASE(3) TILE_CASE(4) TILE_CASE(5) TILE_CASE(6)
#if TILE > 6
            TILE_CASE(7) TILE_CASE(8) TILE_CASE(9) TILE_CASE(10) TILE_CASE(11) TILE_CASE(12)
#endif
        }
        c += size;
    }
}

#undef TILES
#undef TILE_CASE

/* out[c][l] += sum_f X[f][l] B[c * sc + f * sf], c < M, f < K, l < L; = if `fresh`. L is a multiple of LANES, and sc or sf
 * is 1. */
static __attribute__((noinline)) void S(mac)(REAL *out, int64_t ldo, const REAL *X, int64_t ldx, const REAL *B, int64_t sc,
                                             int64_t sf, int64_t M, int64_t K, int64_t L, int fresh) {
    S(tiles)(out, ldo, X, ldx, B, sc, sf, M, K, L, fresh, 0);
}

/* out[c][l] += sum_f X[f][l] B[c + f * sf], each entry rounded once; the second keeps what that loses `lost` numbers behind. */
static __attribute__((noinline)) void S(add)(REAL *out, int64_t ldo, const REAL *X, int64_t ldx, const REAL *B, int64_t sf,
                                             int64_t M, int64_t K, int64_t L) {
    S(tiles)(out, ldo, X, ldx, B, 1, sf, M, K, L, 0, 1);
}

static __attribute__((noinline)) void S(add_kept)(REAL *out, int64_t ldo, const REAL *X, int64_t ldx, const REAL *B, int64_t sf,
                                                  int64_t M, int64_t K, int64_t L, int64_t lost) {
    S(tiles)(out, ldo, X, ldx, B, 1, sf, M, K, L, lost, 2);
}

/* --------------------------------------------------------------------------------------------------- moving chunks */

/* out[c][r] = in[r][c], r < rows, c < cols. */
static void S(transpose)(const REAL *in, int64_t ldi, REAL *out, int64_t ldo, int64_t rows, int64_t cols) {
    for (int64_t r = 0; r < rows; r += LANES)
        for (int64_t c = 0; c < cols; c += LANES) {
            int64_t nr = min64(LANES, rows - r), nc = min64(LANES, cols - c);
            if (nr == LANES && nc == LANES) {
                S(square)(in + r * ldi + c, ldi, out + c * ldo + r, ldo);
                continue;
            }
            for (int64_t i = 0; i < nc; i++)
                for (int64_t j = 0; j < nr; j++) out[(c + i) * ldo + r + j] = in[(r + j) * ldi + c + i];
        }
}

/* The two below may write up to LANES - 1 numbers behind a row: the next row comes after it, and buffers have room. */

/* xx[t] = scale * [x_t, x_t]: doubled rows, so that any rotation of x_t is one slice. Rows from n on are zero, and so are
 * rows that `hard` says are not there. Rows `ahead` of these will be wanted next. */
static void S(load_rows)(REAL *xx, const REAL *x, int64_t n, int64_t d, REAL scale, const REAL *hard, int64_t ahead) {
    for (int64_t t = 0; t < n; t++, x += d) {
        REAL *row = xx + t * 2 * d;
        __builtin_prefetch(x + ahead * d);
        if (hard && hard[t] == 0) {
            memset(row, 0, (size_t)(2 * d) * sizeof(REAL));
            continue;
        }
        int64_t i = 0;
        for (; i + LANES <= d; i += LANES) *(VF *)(row + i) = scale * *(const VF *)(x + i);
        for (; i < d; i++) row[i] = scale * x[i];
        for (i = 0; i < d; i += LANES) *(VF *)(row + d + i) = *(const VF *)(row + i);
    }
    if (n < CHUNK) memset(xx + n * 2 * d, 0, (size_t)((CHUNK - n) * 2 * d) * sizeof(REAL));
}

/* xT = scale * x in lanes; `rows` is room for doubled rows. */
static void S(load_lanes)(REAL *xT, REAL *rows, const REAL *x, int64_t n, int64_t d, REAL scale) {
    if (n < CHUNK) {
        S(load_rows)(rows, x, n, d, scale, NULL, 0);
        S(transpose)(rows, 2 * d, xT, CHUNK, CHUNK, d);
        return;
    }
    for (int64_t i = 0; i < CHUNK * d; i += 64 / (int64_t)sizeof(REAL)) __builtin_prefetch(x + CHUNK * d + i);
    S(transpose)(x, d, xT, CHUNK, CHUNK, d);
    for (int64_t i = 0; i < d * CHUNK; i += LANES) *(VF *)(xT + i) *= scale;
}

/* v1[t] = keep_t [v_t, 1] in rows of ldv; a key that is not there may hold anything, NaN included. */
static void S(load_values)(REAL *v1, int64_t ldv, const REAL *v, int64_t n, int64_t e, const REAL *keep, int hard,
                           int64_t ahead) {
    if (n < CHUNK) memset(v1 + n * ldv, 0, (size_t)((CHUNK - n) * ldv) * sizeof(REAL));
    for (int64_t t = 0; t < n; t++, v += e) {
        REAL w = keep ? keep[t] : 1, *row = v1 + t * ldv;
        __builtin_prefetch(v + ahead * e);
        if (hard && w == 0) {
            memset(row, 0, (size_t)ldv * sizeof(REAL));
            continue;
        }
        int64_t c = 0;
        for (; c + LANES <= e; c += LANES) *(VF *)(row + c) = w * *(const VF *)(v + c);
        for (; c < e; c++) row[c] = w * v[c];
        row[e] = w;
    }
}

/* -------------------------------------------------------------------------------------------------------- features */

static inline int64_t S(rotation_size)(int64_t r, int64_t d) { return 2 * r == d ? d / 2 : d; }

/* phi = x y for `rows` rows of L lanes, or with dx and dy the change of that. */
static inline void S(products)(REAL *phi, const REAL *x, const REAL *y, const REAL *dx, const REAL *dy, int64_t rows, int64_t L) {
    if (L == CHUNK) L *= rows, rows = rows > 0; /* one long row */
    for (int64_t r = 0; r < rows; r++)
        if (dx)
            for (int64_t l = r * CHUNK; l < r * CHUNK + L; l += LANES)
                *(VF *)(phi + l) = *(const VF *)(dx + l) * *(const VF *)(y + l) + *(const VF *)(x + l) * *(const VF *)(dy + l);
        else
            for (int64_t l = r * CHUNK; l < r * CHUNK + L; l += LANES) *(VF *)(phi + l) = *(const VF *)(x + l) * *(const VF *)(y + l);
}

/* Quadratic features of rotations r0 .. r1-1 in lanes: phi[f][CHUNK] from xT [d][CHUNK]; with dxT their change when x moves
 * along dx. */
static void S(features_lanes)(REAL *phi, const REAL *xT, const REAL *dxT, int64_t d, int64_t r0, int64_t r1, int64_t L) {
    for (int64_t r = r0; r < r1; r++) {
        int64_t size = S(rotation_size)(r, d), first = min64(size, d - r); /* then i + r begins again at 0 */
        S(products)(phi, xT, xT + r * CHUNK, dxT, AT(dxT, r * CHUNK), first, L);
        S(products)(phi + first * CHUNK, xT + first * CHUNK, xT, AT(dxT, first * CHUNK), dxT, size - first, L);
        phi += size * CHUNK;
    }
}

/* The same in rows, phi[t][ld] from doubled rows xx, weighted (1/2 on squares); with the linear features and the constant
 * behind them if `last`. The row's end up to ld is zero. Writes behind the last row as load_rows does. */
static void S(features_rows)(REAL *phi, int64_t ld, const REAL *xx, const REAL *dxx, int64_t n, int64_t d, int64_t r0,
                             int64_t r1,
                             int last) {
    for (int64_t t = 0; t < n; t++, phi += ld) {
        const REAL *x = xx + t * 2 * d, *dx = dxx ? dxx + t * 2 * d : NULL;
        for (int64_t i = (d - 1) / LANES * LANES; i >= 0; i -= LANES) { /* the last first: it writes into the next rotation */
            VF own = *(const VF *)(x + i), move = dx ? *(const VF *)(dx + i) : own;
            REAL *at = phi + i;
            if (dx)
                for (int64_t r = r0; r < r1; r++, at += d)
                    *(VF *)at = move * *(const VF *)(x + r + i) + own * *(const VF *)(dx + r + i);
            else
                for (int64_t r = r0; r < r1; r++, at += d) *(VF *)at = own * *(const VF *)(x + r + i);
        }
        if (!r0)
            for (int64_t i = 0; i < d; i++) phi[i] *= (REAL)0.5;
        REAL *out = phi + (r1 - r0) * d;
        if (!last) {
            for (REAL *end = phi + ld; out < end; out++) *out = 0;
            continue;
        }
        out -= d - S(rotation_size)(r1 - 1, d);
        for (int64_t i = 0; i < d; i += LANES) *(VF *)(out + i) = *(const VF *)((dx ? dx : x) + i);
        *(VF *)(out + d) = (VF){dx ? 0 : 1};
    }
}

/* out[i][lane] += d(sum_f W[f] phi_f(x)) / dx_i over rotations r0 .. r1-1: every pair feature feeds both its factors. */
static void S(features_back)(REAL *out, const REAL *W, const REAL *xT, int64_t d, int64_t r0, int64_t r1, int64_t L) {
    for (int64_t i = 0; i < d; i++)
        for (int64_t l = 0; l < L; l += LANES) {
            VF a = *(const VF *)(out + i * CHUNK + l), b = {0};
            const REAL *w = W + l;
            for (int64_t r = r0; r < r1; r++) {
                int64_t up = i + r < d ? i + r : i + r - d, down = i >= r ? i - r : i - r + d, size = S(rotation_size)(r, d);
                if (i < size) a += *(const VF *)(w + i * CHUNK) * *(const VF *)(xT + up * CHUNK + l);
                if (down < size) b += *(const VF *)(w + down * CHUNK) * *(const VF *)(xT + down * CHUNK + l);
                w += size * CHUNK;
            }
            *(VF *)(out + i * CHUNK + l) = a + b;
        }
}

/* ----------------------------------------------------------------------------------------------------------- states */

/* Place of the product x_i x_j in the public order [1, x, x_i x_j (i <= j, row-major)]. */
static inline int64_t S(public_place)(int64_t i, int64_t j, int64_t d) {
    int64_t a = min64(i, j), b = max64(i, j);
    return 1 + d + a * d - a * (a - 1) / 2 + b - a;
}

/* Public sums [F][e+1] <-> state [e+1][stride]; `squares` multiplies the entries of x_i^2. A NULL `from` means zero. */
static void S(to_state)(REAL *state, int64_t stride, int64_t lost, const REAL *from, int64_t d, int64_t e1, REAL squares) {
    memset(state, 0, (size_t)(e1 * stride) * sizeof(REAL));
    if (lost) memset(state + lost, 0, (size_t)(e1 * stride) * sizeof(REAL));
    if (!from) return;
    int64_t f = 0;
    for (int64_t r = 0; r <= d / 2; r++)
        for (int64_t i = 0; i < S(rotation_size)(r, d); i++, f++) {
            const REAL *row = from + S(public_place)(i, (i + r) % d, d) * e1;
            for (int64_t c = 0; c < e1; c++) state[c * stride + f] = r ? row[c] : squares * row[c];
        }
    for (int64_t i = 0; i <= d; i++)
        for (int64_t c = 0; c < e1; c++) state[c * stride + f + i] = from[(i < d ? 1 + i : 0) * e1 + c];
}

static void S(from_state)(REAL *to, const REAL *state, int64_t stride, int64_t d, int64_t e1, REAL squares) {
    int64_t f = 0;
    for (int64_t r = 0; r <= d / 2; r++)
        for (int64_t i = 0; i < S(rotation_size)(r, d); i++, f++) {
            REAL *row = to + S(public_place)(i, (i + r) % d, d) * e1;
            for (int64_t c = 0; c < e1; c++) row[c] = r ? state[c * stride + f] : squares * state[c * stride + f];
        }
    for (int64_t i = 0; i <= d; i++)
        for (int64_t c = 0; c < e1; c++) to[(i < d ? 1 + i : 0) * e1 + c] = state[c * stride + f + i];
}

/* How the rotations are cut into blocks whose features fit in the first-level cache. */
static inline int64_t S(block_rotations)(int64_t d) { return max64(1, BLOCK_FEATURES / d); }

/* out[c][lane] += sum_f phi_f(x) state[c][f]: what the positions in the lanes read from a state; with dxT the change of that
 * when x moves along dx. */
static void S(read_state)(REAL *out, const REAL *xT, const REAL *dxT, const REAL *state, int64_t stride, int64_t d, int64_t e1,
                          int64_t L, REAL *phi) {
    int64_t total = d / 2 + 1, step = S(block_rotations)(d), quadratic = d * (d + 1) / 2;
    for (int64_t c = 0; c < e1 && !dxT; c++)
        for (int64_t l = 0; l < L; l += LANES) *(VF *)(out + c * CHUNK + l) += state[c * stride + quadratic + d];
    S(mac)(out, CHUNK, dxT ? dxT : xT, CHUNK, state + quadratic, stride, 1, e1, d, L, 0);
    for (int64_t r = 0; r < total; r += step) {
        int64_t r1 = min64(total, r + step), size = min64(r1 * d, quadratic) - r * d;
        S(features_lanes)(phi, xT, dxT, d, r, r1, L);
        S(mac)(out, CHUNK, phi, CHUNK, state + r * d, stride, 1, e1, size, L, 0);
    }
}

/* state[c][f] += sum_t weighted phi_f(x_t) values[t][c]: n positions enter a state; with dxx the change of their features. */
static void S(add_state)(REAL *state, int64_t stride, int64_t lost, const REAL *xx, const REAL *dxx, const REAL *values,
                         int64_t ldv, int64_t n, int64_t d, int64_t e1, REAL *phi) {
    int64_t total = d / 2 + 1, step = S(block_rotations)(d), quadratic = d * (d + 1) / 2;
    for (int64_t r = 0; r < total; r += step) {
        int64_t r1 = min64(total, r + step), last = r1 == total, size = (last ? quadratic + d + 1 : r1 * d) - r * d;
        int64_t ld = (size + LANES - 1) / LANES * LANES;
        S(features_rows)(phi, ld, xx, dxx, n, d, r, r1, (int)last);
        if (lost) S(add_kept)(state + r * d, stride, phi, ld, values, ldv, e1, n, ld, lost);
        else S(add)(state + r * d, stride, phi, ld, values, ldv, e1, n, ld);
    }
}

/* out[i][lane] += d(sum_f phi_f(x) sum_c y_c state[c][f]) / dx_i, with y [e1][CHUNK] in lanes. */
static void S(read_state_back)(REAL *out, const REAL *xT, const REAL *yT, const REAL *state, int64_t stride, int64_t d,
                               int64_t e1, int64_t L, REAL *W) {
    int64_t total = d / 2 + 1, step = S(block_rotations)(d), quadratic = d * (d + 1) / 2;
    S(mac)(out, CHUNK, yT, CHUNK, state + quadratic, 1, stride, d, e1, L, 0);
    for (int64_t r = 0; r < total; r += step) {
        int64_t r1 = min64(total, r + step), size = min64(r1 * d, quadratic) - r * d;
        S(mac)(W, CHUNK, yT, CHUNK, state + r * d, 1, stride, size, e1, L, 1);
        S(features_back)(out, W, xT, d, r, r1, L);
    }
}

/* The change of that when x, y and the state move along dx, dyT (before yT in memory) and the rows behind the state; that itself
 * is added to `own`, unless it is NULL. */
static void S(read_state_back_along)(REAL *out, REAL *own, const REAL *xT, const REAL *dxT, const REAL *dyT, const REAL *state,
                                     int64_t stride, int64_t d, int64_t e1, int64_t L, REAL *W) {
    int64_t total = d / 2 + 1, step = S(block_rotations)(d), quadratic = d * (d + 1) / 2;
    const REAL *yT = dyT + e1 * CHUNK;
    S(mac)(out, CHUNK, dyT, CHUNK, state + quadratic, 1, stride, d, 2 * e1, L, 0);
    if (own) S(mac)(own, CHUNK, yT, CHUNK, state + quadratic, 1, stride, d, e1, L, 0);
    for (int64_t r = 0; r < total; r += step) {
        int64_t r1 = min64(total, r + step), size = min64(r1 * d, quadratic) - r * d;
        S(mac)(W, CHUNK, dyT, CHUNK, state + r * d, 1, stride, size, 2 * e1, L, 1);
        S(features_back)(out, W, xT, d, r, r1, L);
        S(mac)(W, CHUNK, yT, CHUNK, state + r * d, 1, stride, size, e1, L, 1);
        S(features_back)(out, W, dxT, d, r, r1, L);
        if (own) S(features_back)(own, W, xT, d, r, r1, L);
    }
}
