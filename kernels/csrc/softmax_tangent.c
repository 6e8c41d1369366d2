/* Forward-mode tangent of softmax attention, without an [n, m] table. With p_ij = exp(scale q_i . k_j - lse_i):
 *
 *     w_ij = p_ij scale (tq_i . k_j + q_i . tk_j)      t_lse_i = sum_j w_ij
 *     t_out_i = sum_j (w_ij v_j + p_ij tv_j) - t_lse_i out_i
 *
 * q, tq [b, h, n, d], k, tk [b, g, m, d], v, tv [b, g, m, e], out, t_out [b, h, n, e], lse, t_lse [b, h, n], contiguous; tq, tk,
 * tv may be NULL. mask: bytes [b, h, n, m] with strides (sb, sh, sn, 1), or NULL. causal: key j is seen if j <= start + i. */
#ifndef PRECISION
#define PRECISION 32
#include "softmax_tangent.c"
#undef PRECISION
#define PRECISION 64
#include "softmax_tangent.c"
#else
#include "softmax_tile.h"

void S(softmax_tangent)(const REAL *q, const REAL *k, const REAL *v, const uint8_t *mask, const REAL *out, const REAL *lse,
                        const REAL *tq, const REAL *tk, const REAL *tv, REAL *t_out, REAL *t_lse, int64_t b, int64_t h,
                        int64_t g, int64_t n, int64_t m, int64_t d, int64_t e, int64_t sb, int64_t sh, int64_t sn,
                        int64_t causal, int64_t start, int64_t threads, double scale) {
    const int64_t blocks = (n + WIDTH - 1) / WIDTH, tasks = b * h * blocks;
    if (!tasks || !g) return;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        REAL *memory = scratch((size_t)(WIDTH * (2 * d + 2 * KEYS + e + 2)) * sizeof(REAL));
        if (!memory) abort();
        REAL *q_t = memory, *tq_t = q_t + d * WIDTH, *p = tq_t + d * WIDTH, *w = p + KEYS * WIDTH, *acc = w + KEYS * WIDTH;
        REAL *norm = acc + e * WIDTH, *sum = norm + WIDTH;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            /* The last queries of a causal head have the most keys: first, so that no thread is left with them alone. */
            int64_t head = task / blocks, i0 = (blocks - 1 - task % blocks) * WIDTH, first = head * n + i0;
            int64_t rows = min64(WIDTH, n - i0), keys = head / h * g + head % h / (h / g);
            memset(memory, 0, (size_t)(WIDTH * 2 * d) * sizeof(REAL));
            memset(acc, 0, (size_t)(WIDTH * (e + 2)) * sizeof(REAL));
            S(transpose)(q_t, q + first * d, rows, d, (REAL)scale);
            if (tq) S(transpose)(tq_t, tq + first * d, rows, d, (REAL)scale);
            memcpy(norm, lse + first, (size_t)rows * sizeof(REAL));
            const uint8_t *seen = mask ? mask + head / h * sb + head % h * sh + i0 * sn : NULL;
            int64_t end = causal ? min64(m, start + i0 + rows) : m;
            for (int64_t j0 = 0; j0 < end; j0 += KEYS) {
                int64_t at = keys * m + j0, count = min64(KEYS, end - j0);
                memset(p, 0, (size_t)(2 * KEYS * WIDTH) * sizeof(REAL));
                S(times_queries)(p, k + at * d, d, 1, q_t, count, d);
                if (tq) S(times_queries)(w, k + at * d, d, 1, tq_t, count, d);
                if (tk) S(times_queries)(w, tk + at * d, d, 1, q_t, count, d);
                S(hide)(p, -INFINITY, rows, count, causal ? j0 - start - i0 : -m, seen ? seen + j0 : NULL, sn);
                for (int64_t j = 0; j < count; j++)
                    for (int x = 0; x < 4; x++) {
                        VF *p_j = (VF *)(p + j * WIDTH) + x, *w_j = (VF *)(w + j * WIDTH) + x;
                        *p_j = S(exponential)(*p_j - ((VF *)norm)[x]);
                        *w_j *= *p_j;
                        ((VF *)sum)[x] += *w_j;
                    }
                S(times_queries)(acc, v + at * e, 1, e, w, e, count);
                if (tv) S(times_queries)(acc, tv + at * e, 1, e, p, e, count);
            }
            for (int64_t i = 0; i < rows; i++) {
                t_lse[first + i] = sum[i];
                for (int64_t c = 0; c < e; c++)
                    t_out[(first + i) * e + c] = acc[c * WIDTH + i] - sum[i] * out[(first + i) * e + c];
            }
        }
        free(memory);
    }
}
#endif
