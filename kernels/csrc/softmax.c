/* Softmax attention and its gradient, without an [n, m] table. With p_ij = exp(scale q_i . k_j - lse_i):
 *
 *     out_i = sum_j p_ij v_j      lse_i = log sum_j exp(scale q_i . k_j)      (0 and 0 for a query that sees no key)
 *     ds_ij = p_ij (g_i . v_j - g_i . out_i)      dq = scale ds k      dk = scale ds^T q      dv = p^T g
 *
 * q, dq [b, h, n, d], k, dk [b, g, m, d], v, dv [b, g, m, e], out, grad (g above) [b, h, n, e], lse [b, h, n, 1], read and written
 * where they lie; see softmax_call.h.
 *
 * Forward: one task is a block of queries, with a running maximum. Backward: one task is a key head with all its queries, so
 * that nobody else adds to dk and dv, and the result does not depend on the number of threads; of one block of queries it keeps the
 * weights for all keys. */
#ifndef PRECISION
#define PRECISION 32
#include "softmax.c"
#undef PRECISION
#define PRECISION 64
#include "softmax.c"
#else
#include "softmax_tile.h"

/* Turns a tile of scores, already hidden where need be, into weights relative to the running maximum `top` of queries x .. WIDTH,
 * adds them to `sum`, and shrinks what was summed before. */
static void S(weigh)(REAL *p, int64_t count, int64_t e, int64_t x, REAL *acc, REAL *sum, REAL *top) {
    const VF nothing = (VF){0} - (REAL)INFINITY;
    for (; x < WIDTH; x += LANES) {
        VF old = *(VF *)(top + x), best = old;
        for (int64_t j = 0; j < count; j++) {
            VF score = *(VF *)(p + j * WIDTH + x);
            best = S(select)(score > best, score, best);
        }
        VF base = S(select)(best == nothing, (VF){0}, best), shrink = S(exponential)(old - base), total = {0};
        for (int64_t j = 0; j < count; j++) {
            VF *p_j = (VF *)(p + j * WIDTH + x);
            *p_j = S(exponential)(*p_j - base);
            total += *p_j;
        }
        for (int64_t c = 0; c < e; c++) *(VF *)(acc + c * WIDTH + x) *= shrink;
        *(VF *)(sum + x) = *(VF *)(sum + x) * shrink + total;
        *(VF *)(top + x) = best;
    }
}

/* call->of: q, k, v; out, lse. */
void S(softmax)(const softmax_call *call, double scale) {
    SIZES;
    const strided *of = call->of;
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
            const int64_t i0 = (blocks - 1 - task % blocks) * WIDTH, rows = min64(WIDTH, n - i0);
            const int64_t batch = task / blocks / h, head = task / blocks % h, keys = head / (h / g);
            const REAL *k = S(head)(of + 1, batch, keys), *v = S(head)(of + 2, batch, keys);
            const uint8_t *seen = mask_row(call, batch, head, i0);
            const int64_t end = causal ? min64(m, start + i0 + rows) : m, diagonal = causal ? start + i0 : m;
            S(queries)(q_t, NULL, 0, S(head)(of, batch, head) + i0 * of->row, of->row, rows, d, (REAL)scale);
            memset(acc, 0, (size_t)(WIDTH * (e + 1)) * sizeof(REAL));
            for (int64_t i = 0; i < WIDTH; i++) top[i] = -INFINITY;
            for (int64_t j0 = 0, x, count; j0 < end; j0 += count) {
                count = next_tile(j0, end, KEYS, diagonal, LANES, &x);
                S(scores)(p, k + j0 * of[1].row, of[1].row, q_t, count, d, x, 0);
                S(hide)(p, x, rows, count, j0 - diagonal, seen ? seen + j0 : NULL, call->mask.row);
                S(weigh)(p, count, e, x, acc, sum, top);
                S(values)(acc, v + j0 * of[2].row, of[2].row, p, count, e, x);
            }
            REAL *out = S(head)(of + 3, batch, head) + i0 * of[3].row;
            double *lse = double_row(of + 4, batch, head, i0);
            for (int64_t i = 0; i < rows; i++) {
                const int empty = top[i] == -INFINITY;
                lse[i * of[4].row] = empty ? 0 : (double)top[i] + log((double)sum[i]);
                sum[i] = empty ? 0 : 1 / sum[i];
            }
            for (int64_t c = 0; c < e; c++)
                for (int64_t x = 0; x < WIDTH; x += LANES) *(VF *)(acc + c * WIDTH + x) *= *(VF *)(sum + x);
            S(turn)(out, of[3].row, acc, WIDTH, e, rows);
        }
        free(memory);
    }
}

/* call->of: grad, q, k, v, out, lse; dq, dk, dv. */
void S(softmax_backward)(const softmax_call *call, double scale) {
    SIZES;
    const strided *of = call->of;
    const int64_t blocks = (n + WIDTH - 1) / WIDTH, tasks = b * g, shared = g ? h / g : 0;
    const int64_t wide_d = (d + LANES - 1) / LANES * LANES, wide_e = (e + LANES - 1) / LANES * LANES;
    /* Sums of dk and dv are taken in place, unless a row is no whole number of vectors. */
    const int64_t own_d = wide_d == d ? 0 : m * wide_d, own_e = wide_e == e ? 0 : m * wide_e;
    if (!tasks) return;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        REAL *memory = scratch((size_t)(WIDTH * (2 * d + e + wide_d + wide_e + 4 + 2 * m) + own_d + own_e) * sizeof(REAL));
        if (!memory) abort();
        REAL *q_r = memory, *g_r = q_r + wide_d * WIDTH, *q_t = g_r + wide_e * WIDTH, *g_t = q_t + d * WIDTH, *dq_t = g_t + e * WIDTH;
        REAL *norm = dq_t + d * WIDTH, *rest = norm + WIDTH, *delta = rest + WIDTH, *lost = delta + WIDTH, *p_all = lost + WIDTH;
        REAL *ds_all = p_all + m * WIDTH, *own = ds_all + m * WIDTH;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t batch = task / g, keys = task % g, k_row = of[2].row, v_row = of[3].row;
            const REAL *k = S(head)(of + 2, batch, keys), *v = S(head)(of + 3, batch, keys);
            const S(sums) dk = S(sums_of)(of + 7, batch, keys, own_d ? own : NULL, m, d, wide_d);
            const S(sums) dv = S(sums_of)(of + 8, batch, keys, own_e ? own + own_d : NULL, m, e, wide_e);
            for (int64_t block = 0; block < shared * blocks; block++) {
                const int64_t head = keys * shared + block / blocks, i0 = block % blocks * WIDTH, rows = min64(WIDTH, n - i0);
                const int64_t end = causal ? min64(m, start + i0 + rows) : m, diagonal = causal ? start + i0 : m;
                const REAL *grad = S(head)(of, batch, head) + i0 * of->row, *out = S(head)(of + 4, batch, head) + i0 * of[4].row;
                const double *lse = double_row(of + 5, batch, head, i0);
                const uint8_t *seen = mask_row(call, batch, head, i0);
                S(queries)(q_t, q_r, wide_d, S(head)(of + 1, batch, head) + i0 * of[1].row, of[1].row, rows, d, (REAL)scale);
                S(queries)(g_t, g_r, wide_e, grad, of->row, rows, e, 1);
                memset(dq_t, 0, (size_t)(WIDTH * (d + 4)) * sizeof(REAL));
                for (int64_t i = 0; i < rows; i++) {
                    S(split)(lse[i * of[5].row], norm + i, rest + i);
                    delta[i] = (REAL)S(product)(grad + i * of->row, out + i * of[4].row, e);
                }
                for (int64_t j0 = 0, x, count; j0 < end; j0 += count) {
                    REAL *p = p_all + j0 * WIDTH, *ds = ds_all + j0 * WIDTH;
                    count = next_tile(j0, end, KEYS, diagonal, LANES, &x);
                    S(scores)(p, k + j0 * k_row, k_row, q_t, count, d, x, 0);
                    S(scores)(ds, v + j0 * v_row, v_row, g_t, count, e, x, 0);
                    S(hide)(p, x, rows, count, j0 - diagonal, seen ? seen + j0 : NULL, call->mask.row);
                    S(slopes)(p, ds, WIDTH, count, x, WIDTH, norm, rest, delta, lost);
                }
                for (int64_t j0 = 0, x, count; j0 < end; j0 += count) {
                    REAL *p = p_all + j0 * WIDTH, *ds = ds_all + j0 * WIDTH;
                    count = next_tile(j0, end, KEYS, diagonal, LANES, &x);
                    S(refine)(ds, p, WIDTH, count, x, WIDTH, lost);
                    S(values)(dq_t, k + j0 * k_row, k_row, ds, count, d, x);
                    S(keys)(dk.at + j0 * dk.row, dk.row, ds, q_r, wide_d, count, rows, x);
                    S(keys)(dv.at + j0 * dv.row, dv.row, p, g_r, wide_e, count, rows, x);
                }
                S(times)(dq_t, d, (REAL)scale);
                S(turn)(S(head)(of + 6, batch, head) + i0 * of[6].row, of[6].row, dq_t, WIDTH, d, rows);
            }
            S(sums_back)(of + 7, batch, keys, dk, m, d);
            S(sums_back)(of + 8, batch, keys, dv, m, e);
        }
        free(memory);
    }
}
#endif
