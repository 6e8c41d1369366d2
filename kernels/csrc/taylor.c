/* Taylor linear attention: out_i = sum_j p_ij v_j / max(sum_j p_ij, eps), p = 1 + s + s^2/2, s = scale q_i.k_j.
 *
 * A forward pass in chunks of CHUNK positions: inside a chunk p is evaluated as a polynomial of s; earlier chunks are read
 * from the state S = sum_j psi(k_j) [v_j, 1], because p = phi(q).psi(k) for the features 1, x_i, x_i x_j. All products of
 * matrices are one routine on data in the first-level cache, with positions in vector lanes. The first `near` positions read
 * earlier chunks as the own one, pair by pair: up to about d^2 / 4 of them that costs less than reading the state.
 *
 * Shapes, all contiguous: q [b, h, n, d], k [b, g, m, d], v [b, g, m, e], keep [b, m] or NULL, sums [b, g, F, e+1] or NULL,
 * out [b, h, n, e], den [b, h, n] (before the clamp). h is a multiple of g; each key head serves h / g query heads.
 * `hard`: keep is 0 or 1, and a key that is not there may hold anything. Functions return 0, or 1 if memory ran out. */
#include "common.h"

#ifndef REAL
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAVE_SHUFFLE
#endif
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
#define TILE 12 /* rows of a register tile: 24 sums and 2 factors of 32 registers */
#else
#define TILE 6
#endif
#define CHUNK 32
#define AT(x, offset) ((x) ? (x) + (offset) : NULL)
#define BLOCK_FEATURES 192
#define LONG 2048 /* sequences from here on keep what rounding loses of their states, which costs up to 15 % of the time */
#define STEPS 8 /* up to so many positions are taken one by one */
typedef int32_t vi32 __attribute__((vector_size(VECTOR_BYTES), aligned(4)));
typedef int64_t vi64 __attribute__((vector_size(VECTOR_BYTES), aligned(8)));

enum { FORWARD = 8, BACKWARD = 15, TANGENT = 18, SECOND = 22 }; /* how many parts of a workspace a pass uses */

#define REAL float
#define S(x) PASTE(fnattn_, x, _, f32)
#define VF vf32
#define VI vi32
#define LANES (VECTOR_BYTES / 4)
#include "taylor.c"
#undef REAL
#undef S
#undef VF
#undef VI
#undef LANES
#define REAL double
#define S(x) PASTE(fnattn_, x, _, f64)
#define VF vf64
#define VI vi64
#define LANES (VECTOR_BYTES / 8)
#include "taylor.c"
#else
#include "square.h"
#include "taylor_parts.h"
#include "taylor_pairs.h"
#include "taylor_step.h"

/* One thread's workspace. Names ending in T are in lanes, [width][CHUNK]. The change of a state lies behind the state, that of
 * a row of values behind the row, that of v1T and g1T before them: what both need is then one product of matrices. */
typedef struct {
    int64_t d, e1, ldv, stride, lost; /* ldv: row length of [v, 1]; stride: that of a state; lost: see tile */
    REAL *S, *R;                /* states over keys, and (backward) over queries */
    REAL *kk, *qq, *v1, *g1;    /* rows of one chunk: keys and queries doubled, values, gradients */
    REAL *qT, *kT, *v1T, *g1T;  /* lanes */
    REAL *s, *ds, *phi, *acc, *dx;
    REAL *dkk, *dqq, *dv1, *dqT, *dS, *dR, *dg1, *dkT, *dv1T, *dg1T, *ts, *tu, *tx; /* tangents */
    void *memory;
} S(work);

/* Whole cache lines, with room for a vector or two behind the end. */
static size_t S(bytes)(int64_t size) { return ((size_t)size * sizeof(REAL) + 2 * VECTOR_BYTES + 63) / 64 * 64; }

/* `length`: positions that enter a state. */
static int S(work_new)(S(work) *w, int64_t d, int64_t e, int count, int64_t length) {
    int64_t F = 1 + d + d * (d + 1) / 2, c = CHUNK, two = count >= TANGENT ? 2 : 1;
    w->d = d, w->e1 = e + 1, w->ldv = (two * w->e1 + LANES - 1) / LANES * LANES;
    w->stride = (F + LANES - 1) / LANES * LANES + LANES, w->lost = length > LONG ? two * w->e1 * w->stride : 0;
    int64_t block = max64(BLOCK_FEATURES, d) + 2 * d + 1 + LANES;
    REAL **parts[] = {&w->S, &w->kk, &w->qq, &w->v1, &w->qT, &w->s, &w->phi, &w->acc, &w->R, &w->g1, &w->kT, &w->v1T, &w->g1T,
                      &w->ds, &w->dx, &w->dkk, &w->dqq, &w->dqT, &w->dkT, &w->ts, &w->tu, &w->tx};
    int64_t sizes[] = {two * w->e1 * w->stride + w->lost, 2 * d * c, 2 * d * c, w->ldv * c, d * c, c * c, block * c, two * w->e1 * c,
                       two * w->e1 * w->stride + w->lost, w->ldv * c, d * c, two * w->e1 * c, two * w->e1 * c, c * c, d * c,
                       2 * d * c, 2 * d * c, d * c, d * c, c * c, c * c, d * c};
    size_t total = 0;
    for (int i = 0; i < count; i++) total += S(bytes)(sizes[i]);
    if (!(w->memory = scratch(total))) return 1;
    char *at = w->memory;
    for (int i = 0; i < count; i++) *parts[i] = (REAL *)at, at += S(bytes)(sizes[i]);
    if (two == 2) {
        w->dS = w->S + w->e1 * w->stride, w->dR = w->R + w->e1 * w->stride, w->dv1 = w->v1 + w->e1, w->dg1 = w->g1 + w->e1;
        w->dv1T = w->v1T, w->v1T += w->e1 * c, w->dg1T = w->g1T, w->g1T += w->e1 * c;
    }
    return 0;
}

static inline int64_t S(lanes)(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/* acc += what the queries qT (n of them, scaled) take from the chunk's keys. */
static void S(attend_chunk)(S(work) *w, int64_t n, int64_t keys, int side) {
    int64_t L = S(lanes)(n);
    S(meet)(w->s, w->qT, w->kk, 2 * w->d, keys, w->d, L, side, 1);
    S(polynomial)(w->s, keys, L, side);
    S(gather)(w->acc, w->s, w->v1, w->ldv, w->e1, keys, L, side);
}

/* Everything that the queries qT (n of them, scaled) take from the chunk's keys and from the state: acc [e+1] lanes. */
static void S(attend)(S(work) *w, int64_t n, int64_t keys, int causal, int past) {
    int64_t L = S(lanes)(n);
    memset(w->acc, 0, (size_t)(w->e1 * CHUNK) * sizeof(REAL));
    if (past) S(read_state)(w->acc, w->qT, NULL, w->S, w->stride, w->d, w->e1, L, w->phi);
    if (causal) S(attend_chunk)(w, n, keys, 1);
}

/* Divides by the normaliser and writes n rows. */
static void S(write_out)(S(work) *w, REAL *out, REAL *den, int64_t n, REAL eps) {
    int64_t e = w->e1 - 1;
    REAL *sum = w->acc + e * CHUNK, least[CHUNK];
    memcpy(den, sum, (size_t)n * sizeof(REAL));
    for (int64_t t = 0; t < CHUNK; t++) least[t] = sum[t] < eps ? eps : sum[t]; /* NaN stays */
    for (int64_t c = 0; c < e; c++)
        for (int64_t t = 0; t < CHUNK; t++) w->acc[c * CHUNK + t] /= least[t];
    S(transpose)(w->acc, CHUNK, out, e, e, n);
}

static void S(keys_of)(S(work) *w, const REAL *k, const REAL *v, const REAL *keep, int64_t j, int64_t size, int64_t e, int hard) {
    S(load_rows)(w->kk, k + j * w->d, size, w->d, 1, hard ? keep + j : NULL, CHUNK);
    S(load_values)(w->v1, w->ldv, v + j * e, size, e, keep ? keep + j : NULL, hard, CHUNK);
}

static void S(group_forward)(S(work) *w, const REAL *q, const REAL *k, const REAL *v, const REAL *keep, const REAL *sums0,
                             REAL *out, REAL *den, REAL *sums, int64_t queries, int64_t n, int64_t m, int64_t e, int64_t near,
                             int hard, int causal, REAL scale, REAL eps) {
    int64_t d = w->d;
    S(to_state)(w->S, w->stride, w->lost, sums0, d, w->e1, 1);
    for (int64_t j = 0; j < m; j += CHUNK) {
        int64_t size = min64(CHUNK, m - j);
        S(keys_of)(w, k, v, keep, j, size, e, hard);
        for (int64_t r = 0; r < queries && causal; r++) {
            S(load_lanes)(w->qT, w->qq, q + (r * n + j) * d, size, d, scale);
            if (j && j < near && !sums0) {
                memset(w->acc, 0, (size_t)(w->e1 * CHUNK) * sizeof(REAL));
                for (int64_t i = 0; i <= j; i += CHUNK) { /* its own chunk last: it stays loaded */
                    S(keys_of)(w, k, v, keep, i, i < j ? CHUNK : size, e, hard);
                    S(attend_chunk)(w, size, i < j ? CHUNK : size, i == j);
                }
            } else
                S(attend)(w, size, size, 1, j || sums0);
            S(write_out)(w, out + (r * n + j) * e, den + r * n + j, size, eps);
        }
        S(add_state)(w->S, w->stride, w->lost, w->kk, NULL, w->v1, w->ldv, size, d, w->e1, w->phi);
    }
    for (int64_t r = 0; r < queries && !causal; r++)
        for (int64_t i = 0; i < n; i += CHUNK) {
            int64_t size = min64(CHUNK, n - i);
            S(load_lanes)(w->qT, w->qq, q + (r * n + i) * d, size, d, scale);
            S(attend)(w, size, 0, 0, 1);
            S(write_out)(w, out + (r * n + i) * e, den + r * n + i, size, eps);
        }
    if (sums) S(from_state)(sums, w->S, w->stride, d, w->e1, 1);
}

#include "taylor_split.h"

int S(try_taylor_forward)(const REAL *q, const REAL *k, const REAL *v, const REAL *keep, const REAL *sums0, REAL *out,
                          REAL *den,
                          REAL *sums, int64_t b, int64_t h, int64_t g, int64_t n, int64_t m, int64_t d, int64_t e, int64_t near,
                          int64_t hard, int64_t causal, double scale, double eps, int64_t threads) {
    int64_t queries = g ? h / g : 0, entries = (1 + d + d * (d + 1) / 2) * (e + 1);
    int64_t parts = causal ? S(parts)(threads, b * g, n) : 1;
    if (parts > 1) {
        S(inputs) a = {q, k, v, keep, sums0, NULL, NULL, NULL, NULL, b, h, g, n, d, e, (int)hard, (REAL)scale, (REAL)eps, threads};
        return S(split_forward)(&a, out, den, sums, parts, near);
    }
    int failed = 0;
#pragma omp parallel num_threads((int)max64(1, min64(threads, b * g))) if (threads > 1 && b * g > 1)
    {
        S(work) w;
        int steps = causal && n > 0 && n <= STEPS;
        REAL *space = steps ? scratch((size_t)S(step_space)(queries, d, (e + LANES) / LANES * LANES) * sizeof(REAL)) : NULL;
        int bad = steps ? !space : S(work_new)(&w, d, e, FORWARD, m);
        if (bad) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < b * g; i++)
            if (steps && !bad)
                S(group_steps)(space, q + i * queries * n * d, k + i * m * d, v + i * m * e, keep ? keep + i / g * m : NULL,
                               sums0 ? sums0 + i * entries : NULL, out + i * queries * n * e, den + i * queries * n,
                               sums + i * entries, queries, n, d, e, (int)hard, (REAL)scale, (REAL)eps);
            else if (!bad)
                S(group_forward)(&w, q + i * queries * n * d, k + i * m * d, v + i * m * e, keep ? keep + i / g * m : NULL,
                                 sums0 ? sums0 + i * entries : NULL, out + i * queries * n * e, den + i * queries * n,
                                 sums + i * entries, queries, n, m, e, near, (int)hard, (int)causal, (REAL)scale, (REAL)eps);
        if (!bad) free(steps ? (void *)space : w.memory);
    }
    return failed;
}

#include "taylor_backward.h"
#include "taylor_tangent.h"
#include "taylor_second.h"
#endif
