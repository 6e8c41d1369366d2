/* Attention with coordinate descent: scores, choice and weighted sum for BLOCK = 2 LANES queries of one head at a time, with
 * queries in lanes; included once per precision by coor_descent.c after coor_tile.h and coor_exact.h.
 *
 * Tensors with rows anywhere, in `of`: q [b, h, n, d], k [b, g, m, d], v [b, g, m, e], their gradients or tangents, and out
 * [b, h, n, e] with its gradient. Contiguous: log_k [b, h, n] (k itself for the exact solver), keep [b, m] bytes or NULL, start
 * [b], marks [b, h, n, T] (exact: cut and m, T = 2). Query i of a sequence sees key j if j < nulls or j - nulls <= start + i, and
 * if keep[j]. */
#include "strided.h"
#include "head_rows.h"

#define BLOCK (2 * LANES)
#ifndef COOR_ROWS
#if defined(__AVX512F__) || defined(__aarch64__)
#define COOR_ROWS 12 /* 24 sums and 2 factors of 32 registers */
#else
#define COOR_ROWS 6
#endif
#endif

typedef struct {
    int64_t b, h, g, n, m, d, e, nulls, T, exact;
    REAL scale, eps;
    const double *schedule;
    const int64_t *start;
    const uint8_t *keep;
} S(problem);

/* ------------------------------------------------------------------------------------------- the one matrix product */

/* out[v ov + c oc] += sum_f X[v xv + f xf] B[c sc + f sf], c < mc, v < nv vectors, f < K; the sums in registers. */
static inline __attribute__((always_inline)) void S(block)(REAL *out, int64_t ov, int64_t oc, const REAL *X, int64_t xv, int64_t xf,
                                                           const REAL *B, int64_t sc, int64_t sf, int64_t K, const int nv,
                                                           const int mc) {
    VF a[COOR_ROWS][2];
#pragma GCC unroll 12
    for (int c = 0; c < mc; c++)
#pragma GCC unroll 2
        for (int v = 0; v < nv; v++) a[c][v] = *(const VF *)(out + v * ov + c * oc);
    for (int64_t f = 0; f < K; f++, X += xf, B += sf) {
        VF x[2];
#pragma GCC unroll 2
        for (int v = 0; v < nv; v++) x[v] = *(const VF *)(X + v * xv);
#pragma GCC unroll 12
        for (int c = 0; c < mc; c++) {
            REAL w = B[c * sc];
#pragma GCC unroll 2
            for (int v = 0; v < nv; v++) a[c][v] += w * x[v];
        }
    }
#pragma GCC unroll 12
    for (int c = 0; c < mc; c++)
#pragma GCC unroll 2
        for (int v = 0; v < nv; v++) *(VF *)(out + v * ov + c * oc) = a[c][v];
}

#define BLOCK_CASE(MC)                                                          \
    case MC:                                                                    \
        if (nv == 2) S(block)(out, ov, oc, X, xv, xf, B, sc, sf, K, 2, MC);     \
        else S(block)(out, ov, oc, X, xv, xf, B, sc, sf, K, 1, MC);             \
        break;

/* The same for M rows c and nv = 1 or 2 vectors. */
static __attribute__((noinline)) void S(product)(REAL *out, int64_t ov, int64_t oc, const REAL *X, int64_t xv, int64_t xf,
                                                 const REAL *B, int64_t sc, int64_t sf, int64_t M, int64_t K, int nv) {
    int64_t tiles = (M + COOR_ROWS - 1) / COOR_ROWS;
    for (int64_t i = 0, c = 0; i < tiles; i++) {
        int64_t size = (M - c + tiles - i - 1) / (tiles - i); /* even sizes: a last tile of one row would be slow */
        switch (size) {
            BLOCK_CASE(1) BLOCK_CASE(2) BLOCK_CASE(3) BLOCK_CASE(4) BLOCK_CASE(5) BLOCK_CASE(6)
#if COOR_ROWS > 6
            BLOCK_CASE(7) BLOCK_CASE(8) BLOCK_CASE(9) BLOCK_CASE(10) BLOCK_CASE(11) BLOCK_CASE(12)
#endif
        }
        c += size, out += size * oc, B += size * sc;
    }
}
#undef BLOCK_CASE

/* out [M][width] += B X over one half of a tile: X [LANES][width] rows, B [M][LANES]. */
static void S(rows_product)(REAL *out, const REAL *X, const VF *B, int64_t M, int64_t width) {
    for (int64_t c = 0; c < width; c += 2 * LANES)
        S(product)(out + c, LANES, width, X + c, LANES, width, (const REAL *)B, LANES, 1, M, LANES, c + LANES < width ? 2 : 1);
}

/* --------------------------------------------------------------------------------------------------------- pieces */

static inline int64_t S(padded)(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/* Row `first` of a head. */
static inline REAL *S(row)(const strided *t, int64_t batch, int64_t head, int64_t first) {
    return (REAL *)(intptr_t)t->address + batch * t->batch + head * t->head + first * t->row;
}

/* count rows, `step` numbers apart, -> out [width][BLOCK] times scale, 0 in the lanes that are left. */
static void S(lanes_of)(const REAL *rows, int64_t step, int64_t count, int64_t width, REAL scale, REAL *out) {
    if (count < BLOCK) memset(out, 0, (size_t)(BLOCK * width) * sizeof(REAL));
    S(turn)(out, BLOCK, rows, step, count, width);
    for (int64_t c = 0; c < width * BLOCK && scale != 1; c += LANES) *(VF *)(out + c) *= scale;
}

/* in [width][BLOCK], multiplied by scale, -> count rows, `step` numbers apart. */
static void S(rows_of)(REAL *in, int64_t count, int64_t width, REAL scale, REAL *rows, int64_t step) {
    for (int64_t c = 0; c < width * BLOCK && scale != 1; c += LANES) *(VF *)(in + c) *= scale;
    S(turn)(rows, step, in, BLOCK, width, count);
}

/* count rows, `step` numbers apart, times scale -> out [BLOCK][padded width], 0 elsewhere. */
static void S(pad_rows)(const REAL *rows, int64_t step, int64_t count, int64_t width, REAL scale, REAL *out) {
    int64_t wide = S(padded)(width);
    memset(out, 0, (size_t)(BLOCK * wide) * sizeof(REAL));
    for (int64_t l = 0; l < count; l++)
        for (int64_t c = 0; c < width; c++) out[l * wide + c] = scale * rows[l * step + c];
}

/* Scores of queries i0 .. with the keys that any of them sees, as nv tiles [m]; returns the number of keys. */
static int64_t S(scores)(const S(problem) *p, int64_t batch, int64_t i0, int nv, const REAL *k, int64_t k_row,
                         const REAL *q_lanes, VF *s) {
    int64_t common = max64(p->nulls, min64(p->m, p->nulls + p->start[batch] + i0 + 1)), keys = p->m;
    if (p->start[batch] + i0 + BLOCK < p->m - p->nulls) keys = max64(p->nulls, p->nulls + p->start[batch] + i0 + BLOCK);
    const uint8_t *keep = p->keep ? p->keep + batch * p->m : NULL;
    VF low = S(splat)(-INFINITY);
    memset(s, 0, (size_t)keys * sizeof(VF));
    memset(s + p->m, 0, (size_t)keys * sizeof(VF));
    S(product)((REAL *)s, p->m * LANES, LANES, q_lanes, LANES, BLOCK, k, k_row, 1, keys, p->d, nv);
    for (int64_t j = common; j < keys; j++)
        for (int64_t l = 0; l < nv * LANES; l++)
            if (j - p->nulls > p->start[batch] + i0 + l) s[(l / LANES) * p->m + j][l % LANES] = -INFINITY;
    if (keep)
        for (int64_t j = 0; j < keys; j++)
            if (!keep[j]) s[j] = low, s[p->m + j] = low;
    return keys;
}

/* ------------------------------------------------------------------------------------------------- forward, backward */

/* of: q, k, v, out. */
void S(coor_attention)(const strided *of, const REAL *log_k, const uint8_t *keep, const int64_t *start, REAL *marks, int64_t b,
                       int64_t h, int64_t g, int64_t n, int64_t m, int64_t d, int64_t e, int64_t nulls, double scale, int64_t exact,
                       const double *schedule, int64_t T, int64_t threads) {
    S(problem) p = {b, h, g, n, m, d, e, nulls, exact ? 2 : T, exact, (REAL)scale, (REAL)schedule[T], schedule, start, keep};
    int64_t blocks = (n + BLOCK - 1) / BLOCK;
    if (!b || !h || !n) return;
#pragma omp parallel num_threads((int)min64(threads, b * h * blocks)) if (threads > 1 && b * h * blocks > 1)
    {
        const int64_t near_size = S(nearby_size)(m, d + e, blocks * (h / g));
        VF *s = S(tiles)(5, m, p.T + 2 * d + 2 * e + S(padded)(near_size) / LANES), *y = s + 2 * m, *open = y + 2 * m, *mark = open + m;
        REAL *q_lanes = (REAL *)(mark + p.T), *sum = q_lanes + d * BLOCK;
        const strided *const read[] = {of + 1, of + 2};
        const int64_t widths[] = {d, e};
        S(nearby) near = S(nearby_none)(near_size ? sum + e * BLOCK : NULL);
        unsigned mode = subnormals_off();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < b * h * blocks; i++) {
            int64_t head = i / blocks, i0 = (blocks - 1 - i % blocks) * BLOCK, count = min64(BLOCK, n - i0), batch = head / h;
            int64_t own = head % h, kv = own / (h / g), row = head * n + i0;
            S(lanes_of)(S(row)(of, batch, own, i0), of[0].row, count, d, p.scale, q_lanes);
            S(come_near)(&near, read, widths, 2, m, batch, kv);
            int nv = count > LANES ? 2 : 1;
            int64_t keys = S(scores)(&p, batch, i0, nv, near.at[0], near.row[0], q_lanes, s);
            for (int64_t half = 0; half * LANES < count; half++) {
                int64_t first = row + half * LANES, some = min64(LANES, count - half * LANES);
                VF lk;
                S(gather)(log_k + first, some, 1, &lk, (REAL)(p.exact != 0));
                if (exact) S(exact)(s + half * m, y + half * m, keys, lk, p.eps, mark, mark + 1);
                else S(iterate)(s + half * m, y + half * m, open, keys, lk, schedule, T, mark);
                S(scatter)(mark, some, p.T, marks + first * p.T);
            }
            memset(sum, 0, (size_t)(e * BLOCK) * sizeof(REAL));
            S(product)(sum, LANES, BLOCK, (const REAL *)y, m * LANES, LANES, near.at[1], 1, near.row[1], e, keys, nv);
            S(rows_of)(sum, count, e, 1, S(row)(of + 3, batch, own, i0), of[3].row);
        }
        subnormals_back(mode);
        free(s);
    }
}

/* One block of queries of one head: dq, the gradient of log k, and its part of dk and dv [m][padded width]. of: q, k, v, grad, dq. */
static void S(attention_block_back)(const S(problem) *p, int64_t batch, int64_t head, int64_t i0, const strided *of,
                                    const S(nearby) *near, const REAL *log_k, const REAL *marks, REAL *dlogk, REAL *dk, REAL *dv, VF *memory) {
    int64_t m = p->m, d = p->d, e = p->e, count = min64(BLOCK, p->n - i0), row = (batch * p->h + head) * p->n + i0;
    const REAL *q = S(row)(of, batch, head, i0), *grad = S(row)(of + 3, batch, head, i0), *k = near->at[0], *v = near->at[1];
    VF *s = memory, *ds = s + 2 * m, *E = ds + 2 * m, *y = E + m, *open = y + m, *mark = open + 2 * m + 1;
    REAL *lanes = (REAL *)(mark + p->T), *q_rows = lanes + max64(d, e) * BLOCK, *g_rows = q_rows + S(padded)(d) * BLOCK;
    S(lanes_of)(q, of[0].row, count, d, p->scale, lanes);
    int nv = count > LANES ? 2 : 1;
    int64_t keys = S(scores)(p, batch, i0, nv, k, near->row[0], lanes, s);
    S(lanes_of)(grad, of[3].row, count, e, 1, lanes);
    memset(ds, 0, (size_t)keys * sizeof(VF));
    memset(ds + m, 0, (size_t)keys * sizeof(VF));
    S(product)((REAL *)ds, m * LANES, LANES, lanes, LANES, BLOCK, v, near->row[1], 1, keys, e, nv);
    S(pad_rows)(q, of[0].row, count, d, p->scale, q_rows);
    S(pad_rows)(grad, of[3].row, count, e, 1, g_rows);
    for (int64_t half = 0; half * LANES < count; half++) {
        int64_t first = row + half * LANES, some = min64(LANES, count - half * LANES);
        VF lk, slope;
        S(gather)(log_k + first, some, 1, &lk, 1);
        S(gather)(marks + first * p->T, some, p->T, mark, 0);
        if (p->exact) slope = S(exact_back)(s + half * m, ds + half * m, E, y, keys, p->eps, mark[0], mark[1]);
        else slope = S(iterate_back)(s + half * m, ds + half * m, E, y, open, keys, lk, p->schedule, p->T, mark);
        S(scatter)(&slope, some, 1, dlogk + first);
        S(rows_product)(dv, g_rows + half * LANES * S(padded)(e), y, keys, S(padded)(e));
        S(rows_product)(dk, q_rows + half * LANES * S(padded)(d), ds + half * m, keys, S(padded)(d));
    }
    memset(lanes, 0, (size_t)(d * BLOCK) * sizeof(REAL));
    S(product)(lanes, LANES, BLOCK, (const REAL *)ds, m * LANES, LANES, k, 1, near->row[0], d, keys, nv);
    S(rows_of)(lanes, count, d, p->scale, S(row)(of + 4, batch, head, i0), of[4].row);
}

/* of: q, k, v, grad, dq, dk, dv. */
void S(coor_attention_back)(const strided *of, const REAL *log_k, const uint8_t *keep, const int64_t *start, const REAL *marks,
                            REAL *dlogk, int64_t b, int64_t h, int64_t g, int64_t n, int64_t m, int64_t d, int64_t e, int64_t nulls,
                            double scale, int64_t exact, const double *schedule, int64_t T, int64_t threads) {
    S(problem) p = {b, h, g, n, m, d, e, nulls, exact ? 2 : T, exact, (REAL)scale, (REAL)schedule[T], schedule, start, keep};
    int64_t wide_d = S(padded)(d), wide_e = S(padded)(e), group = h / g;
    if (!b || !h) return;
#pragma omp parallel num_threads((int)min64(threads, b * g)) if (threads > 1 && b * g > 1)
    {
        int64_t parts = p.T + 1 + 2 * (max64(d, e) + wide_d + wide_e), sums = m * (wide_d + wide_e) / LANES;
        int64_t near_size = S(nearby_size)(m, d + e, (n + BLOCK - 1) / BLOCK * group);
        if ((8 * m + parts + sums) * (int64_t)sizeof(VF) + near_size * (int64_t)sizeof(REAL) > NEARBY_IN_ALL) near_size = 0;
        VF *memory = S(tiles)(8, m, parts + sums + S(padded)(near_size) / LANES);
        REAL *sum_k = (REAL *)(memory + 8 * m + parts), *sum_v = sum_k + m * wide_d;
        const strided *const read[] = {of + 1, of + 2};
        const int64_t widths[] = {d, e};
        S(nearby) near = S(nearby_none)(near_size ? sum_v + m * wide_e : NULL);
        unsigned mode = subnormals_off();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < b * g; i++) {
            memset(sum_k, 0, (size_t)sums * sizeof(VF));
            S(come_near)(&near, read, widths, 2, m, i / g, i % g);
            for (int64_t r = 0; r < group; r++)
                for (int64_t i0 = 0; i0 < n; i0 += BLOCK)
                    S(attention_block_back)(&p, i / g, i % g * group + r, i0, of, &near, log_k, marks, dlogk, sum_k, sum_v, memory);
            for (int64_t j = 0; j < m; j++) {
                memcpy(S(row)(of + 5, i / g, i % g, j), sum_k + j * wide_d, (size_t)d * sizeof(REAL));
                memcpy(S(row)(of + 6, i / g, i % g, j), sum_v + j * wide_e, (size_t)e * sizeof(REAL));
            }
        }
        subnormals_back(mode);
        free(memory);
    }
}

/* The tangent of out along tq, tk, tv and tlog_k. of: q, k, v, tq, tk, tv, the tangent. */
void S(coor_attention_tangent)(const strided *of, const REAL *log_k, const uint8_t *keep, const int64_t *start, const REAL *marks,
                               const REAL *tlog_k, int64_t b, int64_t h, int64_t g, int64_t n, int64_t m, int64_t d, int64_t e,
                               int64_t nulls, double scale, int64_t exact, const double *schedule, int64_t T, int64_t threads) {
    S(problem) p = {b, h, g, n, m, d, e, nulls, exact ? 2 : T, exact, (REAL)scale, (REAL)schedule[T], schedule, start, keep};
    int64_t blocks = (n + BLOCK - 1) / BLOCK;
    if (!b || !h || !n) return;
#pragma omp parallel num_threads((int)min64(threads, b * h * blocks)) if (threads > 1 && b * h * blocks > 1)
    {
        VF *s = S(tiles)(9, m, p.T + 4 * d + 2 * e), *ts = s + 2 * m, *y = ts + 2 * m, *P = y + 2 * m, *open = P + m, *mark = open + 2 * m;
        REAL *q_lanes = (REAL *)(mark + p.T), *tq_lanes = q_lanes + d * BLOCK, *sum = tq_lanes + d * BLOCK;
        unsigned mode = subnormals_off();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < b * h * blocks; i++) {
            int64_t head = i / blocks, i0 = (blocks - 1 - i % blocks) * BLOCK, count = min64(BLOCK, n - i0), batch = head / h;
            int64_t own = head % h, kv = own / (h / g), row = head * n + i0;
            int nv = count > LANES ? 2 : 1;
            const REAL *k = S(row)(of + 1, batch, kv, 0), *tk = S(row)(of + 4, batch, kv, 0);
            S(lanes_of)(S(row)(of, batch, own, i0), of[0].row, count, d, p.scale, q_lanes);
            S(lanes_of)(S(row)(of + 3, batch, own, i0), of[3].row, count, d, p.scale, tq_lanes);
            int64_t keys = S(scores)(&p, batch, i0, nv, k, of[1].row, q_lanes, s);
            memset(ts, 0, (size_t)keys * sizeof(VF));
            memset(ts + m, 0, (size_t)keys * sizeof(VF));
            S(product)((REAL *)ts, m * LANES, LANES, tq_lanes, LANES, BLOCK, k, of[1].row, 1, keys, d, nv);
            S(product)((REAL *)ts, m * LANES, LANES, q_lanes, LANES, BLOCK, tk, of[4].row, 1, keys, d, nv);
            for (int64_t half = 0; half < nv; half++) {
                int64_t first = row + half * LANES, some = min64(LANES, count - half * LANES);
                VF lk, dlk, *at = s + half * m, *tangent = ts + half * m;
                S(gather)(log_k + first, some, 1, &lk, 1);
                S(gather)(tlog_k + first, some, 1, &dlk, 0);
                S(gather)(marks + first * p.T, some, p.T, mark, 0);
                S(weights)(at, y + half * m, keys, p.eps, exact ? mark[0] : S(splat)(INFINITY), mark[p.T - 1]);
                if (exact) S(exact_tangent)(at, tangent, P, keys, dlk, p.eps, mark[0], mark[1]);
                else S(iterate_tangent)(at, tangent, P, open, keys, lk, dlk, schedule, T, mark);
            }
            memset(sum, 0, (size_t)(e * BLOCK) * sizeof(REAL));
            S(product)(sum, LANES, BLOCK, (const REAL *)ts, m * LANES, LANES, S(row)(of + 2, batch, kv, 0), 1, of[2].row, e, keys, nv);
            S(product)(sum, LANES, BLOCK, (const REAL *)y, m * LANES, LANES, S(row)(of + 5, batch, kv, 0), 1, of[5].row, e, keys, nv);
            S(rows_of)(sum, count, e, 1, S(row)(of + 6, batch, own, i0), of[6].row);
        }
        subnormals_back(mode);
        free(s);
    }
}
#undef BLOCK
