/* Softmax attention of a few queries over keys in two places: the first `first` of m in k, v and the others in k_late, v_late.
 *
 *     out_i = sum_j p_ij v_j        p_ij = exp(scale q_i . k_j) / sum over visible j of exp(scale q_i . k_j)
 *
 * q [b, h, n, d], k [b, g, room, d], v [b, g, room, e], k_late [b, g, late, d], v_late [b, g, late, e], out [b, h, n, e],
 * contiguous. mask: bytes [b, h, n, m] with strides (sb, sh, sn, 1), or NULL. Key j is seen if j <= start + i; 0 for a query that
 * sees no key.
 *
 * Its gradient and its tangent, with g the cotangent of out, and a dot for the change of a thing:
 *
 *     ds_ij = p_ij (g_i . v_j - sum_j p_ij g_i . v_j)     dq = scale ds k     dk = scale ds^T q     dv = p^T g
 *     out_i. = sum_j (w_ij v_j + p_ij v_j.)               w_ij = p_ij (x_ij - sum_j p_ij x_ij)      x = scale (q. k + q k.)
 *
 * `decode` also takes caches of bfloat16, with q and out in float.
 *
 * Keys and values are read once for all queries of a key head, in blocks that stay in the first cache. One task is a key head;
 * the lanes of a vector lie along the channels, so a single query fills them. */
#ifndef PRECISION
#define QUERIES 16 /* so many are few: what one key head's need beside them stays on the stack */
#define PRECISION 32
#include "decode.c"
#undef PRECISION
#define PRECISION 64
#include "decode.c"

/* In place, for rows of m numbers side by side: scores become weights, and the gradient of the weights that of the scores. In double
 * between the two: a score is rounded once by whoever made it, and its row's sum would be rounded again. */
#define ROW_GRADIENTS(NAME, REAL)                                                                               \
    int NAME(REAL *scores, REAL *slope, int64_t rows, int64_t m, int64_t threads) {                             \
        const int64_t row = (m + LANES_f64 - 1) / LANES_f64 * LANES_f64;                                        \
        int failed = 0;                                                                                         \
        _Pragma("omp parallel num_threads((int)min64(threads, rows)) if (threads > 1 && rows > 1)")             \
        {                                                                                                       \
            double *p = scratch((size_t)(2 * row) * sizeof(double)), *x = p + row;                              \
            if (!p) {                                                                                           \
                _Pragma("omp atomic write") failed = 1;                                                         \
            }                                                                                                   \
            unsigned mode = subnormals_off();                                                                   \
            _Pragma("omp for schedule(static)") for (int64_t i = 0; i < rows; i++) {                            \
                if (!p) continue;                                                                               \
                for (int64_t j = 0; j < m; j++) p[j] = scores[i * m + j], x[j] = slope[i * m + j];              \
                for (int64_t j = m; j < row; j++) p[j] = -INFINITY;                                             \
                fnattn_normalise_f64(p, row);                                                                   \
                fnattn_centre_f64(p, x, row, m);                                                                \
                for (int64_t j = 0; j < m; j++) scores[i * m + j] = (REAL)p[j], slope[i * m + j] = (REAL)x[j];  \
            }                                                                                                   \
            subnormals_back(mode);                                                                              \
            free(p);                                                                                            \
        }                                                                                                       \
        return failed;                                                                                          \
    }
ROW_GRADIENTS(fnattn_try_row_gradients_f32, float)
ROW_GRADIENTS(fnattn_try_row_gradients_f64, double)
#else
#include "softmax_tile.h"
#include "lanes.h"

/* Scores to weights that add up to 1, or all 0 if none is above -infinity. `count` is a multiple of LANES. */
static void S(normalise)(REAL *p, int64_t count) {
    VF best = *(VF *)p, total = {0};
    for (int64_t j = LANES; j < count; j += LANES) best = S(select)(*(VF *)(p + j) > best, *(VF *)(p + j), best);
    REAL top = best[0];
    for (int i = 1; i < LANES; i++) top = best[i] > top ? best[i] : top;
    if (top == -(REAL)INFINITY) { /* no key is visible, or the scores of those that are are NaN, which is above nothing */
        REAL weight = 0;
        for (int64_t j = 0; j < count; j++) weight = p[j] == p[j] ? weight : p[j];
        for (int64_t j = 0; j < count; j++) p[j] = weight;
        return;
    }
    for (int64_t j = 0; j < count;) {
        VF sum = {0};
        for (int64_t stop = min64(count, j + KEYS); j < stop; j += LANES) sum += *(VF *)(p + j) = S(exponential)(*(VF *)(p + j) - top);
        total += sum;
    }
    const REAL part = (REAL)1 / S(add_lanes)(total);
    for (int64_t j = 0; j < count; j += LANES) *(VF *)(p + j) *= part;
}

#define HALF 0
#define NUM REAL
#define R S
#include "decode_cache.h"

/* x_j = p_j (x_j - sum_j p_j x_j), whose own sum, 0 but for rounding, is taken off once more. */
static void S(centre)(const REAL *p, REAL *x, int64_t row, int64_t m) {
    for (int64_t j = m; j < row; j++) x[j] = 0;
    for (int again = 0; again < 2; again++) {
        REAL mean = 0;
        for (int64_t j = 0; j < row;) {
            VF sum = {0};
            for (int64_t stop = min64(row, j + KEYS); j < stop; j += LANES)
                sum += again ? *(VF *)(x + j) : *(const VF *)(p + j) * *(VF *)(x + j);
            mean += S(add_lanes)(sum);
        }
        for (int64_t j = 0; j < row; j += LANES)
            *(VF *)(x + j) = again ? *(VF *)(x + j) - *(const VF *)(p + j) * mean : *(const VF *)(p + j) * (*(VF *)(x + j) - mean);
    }
}

/* to_j = factor sum_i table_ij x_i for the keys of one part, `from` being its first, and 0 in the rows behind its `count`. */
static void S(spread)(const REAL *table, const REAL *x, int64_t rows, int64_t row, int64_t from, int64_t count, int64_t room, int64_t width,
                      REAL factor, REAL *to) {
    /* What fills no vector: the last vector of a row is written as a whole, in narrow rows over what follows, which comes later. */
    const int64_t tails = width % LANES && rows <= QUERIES ? S(rows_with_tail)(count, width) : 0;
    const S(tail) tail = S(tail_of)(width);
    VF x_tail[QUERIES] = {{0}};
    for (int64_t i = 0; i < rows && tails; i++)
        for (int64_t l = 0; tail.at + l < width && l < LANES; l++) x_tail[i][l] = x[i * width + tail.at + l];
    for (int64_t j = 0; j < count; j++, to += width) {
        const REAL *share = table + from + j;
        int64_t c = 0;
        for (; c + LANES <= width; c += LANES) {
            VF sum = {0};
            for (int64_t i = 0; i < rows; i++) sum += share[i * row] * *(const VF *)(x + i * width + c);
            *(VF *)(to + c) = factor * sum;
        }
        if (j < tails) {
            VF sum = {0};
            for (int64_t i = 0; i < rows; i++) sum += share[i * row] * x_tail[i];
            *(VF *)(to + tail.at) = factor * sum;
            continue;
        }
        for (; c < width; c++) {
            REAL sum = 0;
            for (int64_t i = 0; i < rows; i++) sum += share[i * row] * x[i * width + c];
            to[c] = factor * sum;
        }
    }
    memset(to, 0, (size_t)((room - count) * width) * sizeof(REAL));
}

/* grad like out; dq, dk, dv, dk_late, dv_late like their namesakes. */
int S(try_decode_backward)(const REAL *grad, const REAL *q, const REAL *k, const REAL *v, const REAL *k_late, const REAL *v_late,
                           const uint8_t *mask, REAL *dq, REAL *dk, REAL *dv, REAL *dk_late, REAL *dv_late, int64_t b, int64_t h, int64_t g,
                           int64_t n, int64_t d, int64_t e, int64_t room, int64_t late, int64_t first, int64_t m, int64_t sb, int64_t sh,
                           int64_t sn, int64_t start, int64_t threads, double scale) {
    CACHE(a);
    memset(dq, 0, (size_t)(b * h * n * d) * sizeof(REAL));
#pragma omp parallel num_threads((int)max64(1, min64(threads, b * g))) if (threads > 1 && b * g > 1)
    {
        TABLES(p, 2)
        REAL *ds = p + rows * row, *spare = ds + rows * row;
        unsigned mode = subnormals_off();
#pragma omp for schedule(static)
        for (int64_t task = 0; task < b * g; task++) {
            if (!p) continue;
            const REAL *q_t = q + task * rows * d, *g_t = grad + task * rows * e;
            if (rows && m) S(weights_of)(&a, task, rows, row, p);
            S(meet_cache)(&a, g_t, v, v_late, e, 1, task, rows, row, 0, spare, ds);
            for (int64_t i = 0; i < rows; i++) S(centre)(p + i * row, ds + i * row, row, m);
            S(mix_cache)(&a, ds, k, k_late, d, task, rows, row, dq + task * rows * d);
            for (int64_t c = 0; c < rows * d; c++) dq[task * rows * d + c] *= a.scale;
            S(spread)(ds, q_t, rows, row, 0, first, room, d, a.scale, dk + task * room * d);
            S(spread)(ds, q_t, rows, row, first, m - first, late, d, a.scale, dk_late + task * late * d);
            S(spread)(p, g_t, rows, row, 0, first, room, e, 1, dv + task * room * e);
            S(spread)(p, g_t, rows, row, first, m - first, late, e, 1, dv_late + task * late * e);
        }
        subnormals_back(mode);
        free(p);
    }
    return failed;
}

/* tq, tk, tv, tk_late, tv_late like their namesakes; t_out like out. */
int S(try_decode_tangent)(const REAL *q, const REAL *k, const REAL *v, const REAL *k_late, const REAL *v_late, const uint8_t *mask,
                          const REAL *tq, const REAL *tk, const REAL *tv, const REAL *tk_late, const REAL *tv_late, REAL *t_out, int64_t b,
                          int64_t h, int64_t g, int64_t n, int64_t d, int64_t e, int64_t room, int64_t late, int64_t first, int64_t m,
                          int64_t sb, int64_t sh, int64_t sn, int64_t start, int64_t threads, double scale) {
    CACHE(a);
    memset(t_out, 0, (size_t)(b * h * n * e) * sizeof(REAL));
    if (!rows || !m) return 0;
#pragma omp parallel num_threads((int)min64(threads, b * g)) if (threads > 1 && b * g > 1)
    {
        TABLES(p, 2)
        REAL *w = p + rows * row, *spare = w + rows * row;
        unsigned mode = subnormals_off();
#pragma omp for schedule(static)
        for (int64_t task = 0; task < b * g; task++) {
            if (!p) continue;
            REAL *out = t_out + task * rows * e;
            S(weights_of)(&a, task, rows, row, p);
            S(meet_cache)(&a, tq + task * rows * d, k, k_late, d, a.scale, task, rows, row, 0, spare, w);
            S(meet_cache)(&a, q + task * rows * d, tk, tk_late, d, a.scale, task, rows, row, 1, spare, w);
            for (int64_t i = 0; i < rows; i++) S(centre)(p + i * row, w + i * row, row, m);
            S(mix_cache)(&a, w, v, v_late, e, task, rows, row, out);
            S(mix_cache)(&a, p, tv, tv_late, e, task, rows, row, out);
        }
        subnormals_back(mode);
        free(p);
    }
    return failed;
}
#undef HALF
#undef NUM
#undef R
#undef CACHE
#undef TABLES

#if PRECISION == 32 /* averages of rows of bfloat16; queries and results are floats */
#define HALF 1
#define NUM uint16_t
#define R(x) PASTE(fnattn_, x, _, bf16)
#include "decode_cache.h"
#undef HALF
#undef NUM
#undef R
#undef CACHE
#undef TABLES
#endif
#endif
