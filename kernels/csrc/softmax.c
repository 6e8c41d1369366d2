/* Softmax attention and its gradient, without an [n, m] table. With p_ij = exp(scale q_i . k_j - lse_i):
 *
 *     out_i = sum_j p_ij v_j      lse_i = log sum_j exp(scale q_i . k_j)      (0 and 0 for a query that sees no key)
 *     ds_ij = p_ij (g_i . v_j - g_i . out_i)      dq = scale ds k      dk = scale ds^T q      dv = p^T g
 *
 * q, dq [b, h, n, d], k, dk [b, g, m, d], v, dv [b, g, m, e], out, grad (g above) [b, h, n, e], lse [b, h, n], contiguous.
 * mask: bytes [b, h, n, m] with strides (sb, sh, sn, 1), or NULL. causal: key j is seen if j <= start + i.
 *
 * Forward: one task is a block of queries, with a running maximum. Backward: one task is a key head with all its queries, so
 * that nobody else adds to dk and dv, and the result does not depend on the number of threads. */
#ifndef PRECISION
#define PRECISION 32
#include "softmax.c"
#undef PRECISION
#define PRECISION 64
#include "softmax.c"
#else
#include "softmax_tile.h"

/* Adds a tile of scores p, already hidden where need be, and its values to the sums relative to the maximum `top`; leaves the
 * weights in p. */
static void S(add_tile)(REAL *p, const REAL *v, int64_t count, int64_t e, REAL *acc, REAL *sum, REAL *top) {
    const VF nothing = (VF){0} - (REAL)INFINITY;
    for (int x = 0; x < 4; x++) {
        VF old = ((VF *)top)[x], best = old;
        for (int64_t j = 0; j < count; j++) {
            VF score = ((VF *)(p + j * WIDTH))[x];
            best = S(select)(score > best, score, best);
        }
        VF base = S(select)(best == nothing, (VF){0}, best), shrink = S(exponential)(old - base), total = ((VF *)sum)[x] * shrink;
        for (int64_t j = 0; j < count; j++) {
            VF *p_j = (VF *)(p + j * WIDTH) + x;
            *p_j = S(exponential)(*p_j - base);
            total += *p_j;
        }
        for (int64_t c = 0; c < e; c++) ((VF *)(acc + c * WIDTH))[x] *= shrink;
        ((VF *)sum)[x] = total;
        ((VF *)top)[x] = best;
    }
    S(times_queries)(acc, v, 1, e, p, e, count);
}

void S(softmax)(const REAL *q, const REAL *k, const REAL *v, const uint8_t *mask, REAL *out, REAL *lse, int64_t b, int64_t h,
                int64_t g, int64_t n, int64_t m, int64_t d, int64_t e, int64_t sb, int64_t sh, int64_t sn, int64_t causal,
                int64_t start, int64_t threads, double scale) {
    const int64_t blocks = (n + WIDTH - 1) / WIDTH, tasks = b * h * blocks;
    if (!tasks || !g) return;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        REAL *memory = scratch((size_t)(WIDTH * (d + KEYS + e + 2)) * sizeof(REAL));
        if (!memory) abort();
        REAL *q_t = memory, *p = q_t + d * WIDTH, *acc = p + KEYS * WIDTH, *sum = acc + e * WIDTH, *top = sum + WIDTH;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            /* The last queries of a causal head have the most keys: first, so that no thread is left with them alone. */
            int64_t head = task / blocks, i0 = (blocks - 1 - task % blocks) * WIDTH, first = head * n + i0;
            int64_t rows = min64(WIDTH, n - i0), keys = head / h * g + head % h / (h / g);
            memset(q_t, 0, (size_t)(WIDTH * d) * sizeof(REAL));
            memset(acc, 0, (size_t)(WIDTH * (e + 1)) * sizeof(REAL));
            for (int64_t i = 0; i < WIDTH; i++) top[i] = -INFINITY;
            S(transpose)(q_t, q + first * d, rows, d, (REAL)scale);
            const uint8_t *seen = mask ? mask + head / h * sb + head % h * sh + i0 * sn : NULL;
            int64_t end = causal ? min64(m, start + i0 + rows) : m;
            for (int64_t j0 = 0; j0 < end; j0 += KEYS) {
                int64_t at = keys * m + j0, count = min64(KEYS, end - j0);
                memset(p, 0, (size_t)(count * WIDTH) * sizeof(REAL));
                S(times_queries)(p, k + at * d, d, 1, q_t, count, d);
                S(hide)(p, -INFINITY, rows, count, causal ? j0 - start - i0 : -m, seen ? seen + j0 : NULL, sn);
                S(add_tile)(p, v + at * e, count, e, acc, sum, top);
            }
            for (int64_t i = 0; i < rows; i++) {
                int empty = top[i] == -INFINITY;
                lse[first + i] = empty ? 0 : top[i] + (REAL)log((double)sum[i]);
                REAL share = empty ? 0 : 1 / sum[i];
                for (int64_t c = 0; c < e; c++) out[(first + i) * e + c] = acc[c * WIDTH + i] * share;
            }
        }
        free(memory);
    }
}

/* factor x [rows][d] into the rows of t, which are `width` wide. */
static void S(spread)(REAL *t, int64_t width, const REAL *x, int64_t rows, int64_t d, REAL factor) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < d; c++) t[i * width + c] = factor * x[i * d + c];
}

void S(softmax_backward)(const REAL *grad, const REAL *q, const REAL *k, const REAL *v, const uint8_t *mask, const REAL *out,
                         const REAL *lse, REAL *dq, REAL *dk, REAL *dv, int64_t b, int64_t h, int64_t g, int64_t n, int64_t m,
                         int64_t d, int64_t e, int64_t sb, int64_t sh, int64_t sn, int64_t causal, int64_t start,
                         int64_t threads, double scale) {
    const int64_t blocks = (n + WIDTH - 1) / WIDTH, tasks = b * g, shared = g ? h / g : 0;
    const int64_t wide_d = (d + LANES - 1) / LANES * LANES, wide_e = (e + LANES - 1) / LANES * LANES;
    if (!tasks) return;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        int64_t per_block = WIDTH * (2 * d + e + wide_d + wide_e + 2), tile = KEYS * WIDTH;
        REAL *memory = scratch((size_t)(per_block + 2 * tile + m * (wide_d + wide_e)) * sizeof(REAL));
        if (!memory) abort();
        REAL *q_t = memory, *g_t = q_t + d * WIDTH, *dq_t = g_t + e * WIDTH, *q_r = dq_t + d * WIDTH, *g_r = q_r + wide_d * WIDTH;
        REAL *norm = g_r + wide_e * WIDTH, *delta = norm + WIDTH, *p = delta + WIDTH, *ds = p + tile;
        REAL *dk_sum = ds + tile, *dv_sum = dk_sum + m * wide_d;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; task++) {
            const REAL *k_t = k + task * m * d, *v_t = v + task * m * e;
            memset(dk_sum, 0, (size_t)(m * (wide_d + wide_e)) * sizeof(REAL));
            for (int64_t block = 0; block < shared * blocks; block++) {
                int64_t head = task * shared + block / blocks, i0 = block % blocks * WIDTH, first = head * n + i0;
                int64_t rows = min64(WIDTH, n - i0), end = causal ? min64(m, start + i0 + rows) : m;
                memset(memory, 0, (size_t)per_block * sizeof(REAL));
                S(transpose)(q_t, q + first * d, rows, d, (REAL)scale);
                S(transpose)(g_t, grad + first * e, rows, e, 1);
                S(spread)(q_r, wide_d, q + first * d, rows, d, (REAL)scale);
                S(spread)(g_r, wide_e, grad + first * e, rows, e, 1);
                for (int64_t i = 0; i < rows; i++) {
                    norm[i] = lse[first + i];
                    for (int64_t c = 0; c < e; c++) delta[i] += grad[(first + i) * e + c] * out[(first + i) * e + c];
                }
                const uint8_t *seen = mask ? mask + head / h * sb + head % h * sh + i0 * sn : NULL;
                for (int64_t j0 = 0; j0 < end; j0 += KEYS) {
                    int64_t count = min64(KEYS, end - j0);
                    memset(p, 0, (size_t)(2 * tile) * sizeof(REAL));
                    S(times_queries)(p, k_t + j0 * d, d, 1, q_t, count, d);
                    S(times_queries)(ds, v_t + j0 * e, e, 1, g_t, count, e);
                    S(hide)(p, -INFINITY, rows, count, causal ? j0 - start - i0 : -m, seen ? seen + j0 : NULL, sn);
                    for (int64_t j = 0; j < count; j++)
                        for (int x = 0; x < 4; x++) {
                            VF *p_j = (VF *)(p + j * WIDTH) + x, *ds_j = (VF *)(ds + j * WIDTH) + x;
                            *p_j = S(exponential)(*p_j - ((VF *)norm)[x]);
                            *ds_j = *p_j * (*ds_j - ((VF *)delta)[x]);
                        }
                    S(times_queries)(dq_t, k_t + j0 * d, 1, d, ds, d, count);
                    S(multiply)(dk_sum + j0 * wide_d, wide_d, ds, WIDTH, 1, q_r, wide_d, count, rows, wide_d / LANES);
                    S(multiply)(dv_sum + j0 * wide_e, wide_e, p, WIDTH, 1, g_r, wide_e, count, rows, wide_e / LANES);
                }
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t c = 0; c < d; c++) dq[(first + i) * d + c] = (REAL)scale * dq_t[c * WIDTH + i];
            }
            for (int64_t j = 0; j < m; j++) {
                memcpy(dk + (task * m + j) * d, dk_sum + j * wide_d, (size_t)d * sizeof(REAL));
                memcpy(dv + (task * m + j) * e, dv_sum + j * wide_e, (size_t)e * sizeof(REAL));
            }
        }
        free(memory);
    }
}
#endif
