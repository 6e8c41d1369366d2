/* Softmax attention, its tangent along with it, and its gradient, without an [n, m] table. With p_ij = exp(scale q_i . k_j - lse_i):
 *
 *     out_i = sum_j p_ij v_j      lse_i = log sum_j exp(scale q_i . k_j)      (0 and 0 for a query that sees no key)
 *     ds_ij = p_ij (g_i . v_j - g_i . out_i)      dq = scale ds k      dk = scale ds^T q      dv = p^T g
 *
 * The tangents of out and lse: see softmax_tangent.c, which computes them where out and lse are there already.
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

#undef SLACK
#define SLACK 8

/* Turns a tile of scores, already hidden where need be, into weights relative to `top` of queries x .. WIDTH, adds them to `sum`, and
 * with w, their tangents, makes that p w and adds it to t_sum. `top` follows the maximum of each query when that has grown by more
 * than SLACK: then what was summed before shrinks. Weights are at most exp(SLACK), and most tiles shrink nothing. */
static inline void S(weigh)(REAL *p, REAL *w, int64_t count, int64_t e, int64_t x, REAL *acc, REAL *t_acc, REAL *sum, REAL *t_sum,
                            REAL *top) {
    const VF nothing = (VF){0} - (REAL)INFINITY;
    for (; x < WIDTH; x += LANES) {
        const VF old = *(VF *)(top + x);
        VF best = S(largest_of)(p + x, WIDTH, count, old), total = {0}, t_total = {0};
        const S(ints) grown = best > old + (REAL)SLACK;
        best = S(select)(grown, best, old);
        const VF base = S(select)(best == nothing, (VF){0}, best);
        if (S(any)(grown)) {
            const VF shrink = S(exponential)(old - base);
            for (int64_t c = x; c < x + e * WIDTH; c += WIDTH) *(VF *)(acc + c) *= shrink;
            *(VF *)(sum + x) *= shrink;
            *(VF *)(top + x) = best;
            for (int64_t c = x; w && c < x + e * WIDTH; c += WIDTH) *(VF *)(t_acc + c) *= shrink;
            if (w) *(VF *)(t_sum + x) *= shrink;
        }
        for (int64_t j = x; j < x + count * WIDTH; j += WIDTH) {
            const VF p_j = *(VF *)(p + j) = S(exponential)(*(VF *)(p + j) - base);
            total += p_j;
            if (w) t_total += *(VF *)(w + j) *= p_j;
        }
        *(VF *)(sum + x) += total;
        if (w) *(VF *)(t_sum + x) += t_total;
    }
}

/* call->of: q, k, v; out, lse, and if moving: tq, tk, tv; t_out, t_lse. */
static void S(attend)(const softmax_call *call, double scale, int moving) {
    SIZES;
    const strided *of = call->of, none = {0}, *moves = of + 5;
    const strided *of_tq = moving ? moves : &none, *of_tk = moving ? moves + 1 : &none, *of_tv = moving ? moves + 2 : &none;
    const int64_t blocks = (n + WIDTH - 1) / WIDTH, tasks = b * h * blocks;
    if (!tasks || !g) return;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        const int64_t near_size = S(nearby_size)(m, (1 + moving) * (d + e), blocks * (h / g));
        REAL *memory = scratch((size_t)(WIDTH * (1 + moving) * (d + KEYS + e + 2) + near_size) * sizeof(REAL));
        if (!memory) abort();
        REAL *q_t = memory, *p = q_t + d * WIDTH, *acc = p + KEYS * WIDTH, *sum = acc + e * WIDTH, *top = sum + WIDTH;
        REAL *tq_t = top + WIDTH, *w = tq_t + d * WIDTH, *t_acc = w + KEYS * WIDTH, *t_sum = t_acc + e * WIDTH;
        const strided *const read[] = {of + 1, of + 2, of_tk, of_tv};
        const int64_t widths[] = {d, e, d, e};
        S(nearby) rows_of = S(nearby_none)(near_size ? memory + WIDTH * (1 + moving) * (d + KEYS + e + 2) : NULL);
        unsigned mode = subnormals_off();
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            /* The last queries of a causal head have the most keys: first, so that no thread is left with them alone. */
            const int64_t i0 = (blocks - 1 - task % blocks) * WIDTH, rows = min64(WIDTH, n - i0);
            const int64_t batch = task / blocks / h, head = task / blocks % h, keys = head / (h / g);
            S(come_near)(&rows_of, read, widths, moving ? 4 : 2, m, batch, keys);
            const REAL *k = rows_of.at[0], *v = rows_of.at[1], *tq = S(head)(of_tq, batch, head);
            const REAL *tk = moving ? rows_of.at[2] : NULL, *tv = moving ? rows_of.at[3] : NULL;
            const int64_t k_row = rows_of.row[0], v_row = rows_of.row[1], tk_row = rows_of.row[2], tv_row = rows_of.row[3];
            const uint8_t *seen = mask_row(call, batch, head, i0);
            const int64_t end = causal ? min64(m, start + i0 + rows) : m, diagonal = causal ? start + i0 : m;
            S(queries)(q_t, NULL, 0, S(head)(of, batch, head) + i0 * of->row, of->row, rows, d, (REAL)scale);
            if (tq) S(queries)(tq_t, NULL, 0, tq + i0 * of_tq->row, of_tq->row, rows, d, (REAL)scale);
            memset(acc, 0, (size_t)(WIDTH * (e + 1)) * sizeof(REAL));
            if (moving) memset(t_acc, 0, (size_t)(WIDTH * (e + 1)) * sizeof(REAL));
            for (int64_t i = 0; i < WIDTH; i++) top[i] = -INFINITY;
            for (int64_t j0 = 0, x, count; j0 < end; j0 += count) {
                count = next_tile(j0, end, KEYS, diagonal, LANES, &x);
                S(scores)(p, k + j0 * k_row, k_row, q_t, count, d, x, 0);
                S(hide)(p, x, rows, count, j0 - diagonal, seen ? seen + j0 : NULL, call->mask.row);
                if (tq) S(scores)(w, k + j0 * k_row, k_row, tq_t, count, d, x, 0);
                if (tk) S(scores)(w, tk + j0 * tk_row, tk_row, q_t, count, d, x, tq != NULL);
                if (tq || tk) S(weigh)(p, w, count, e, x, acc, t_acc, sum, t_sum, top);
                else S(weigh)(p, NULL, count, e, x, acc, NULL, sum, NULL, top);
                S(values)(acc, v + j0 * v_row, v_row, p, count, e, x);
                if (tq || tk) S(values)(t_acc, v + j0 * v_row, v_row, w, count, e, x);
                if (tv) S(values)(t_acc, tv + j0 * tv_row, tv_row, p, count, e, x);
            }
            double *lse = double_row(of + 4, batch, head, i0);
            for (int64_t i = 0; i < rows; i++) {
                const int empty = top[i] == -INFINITY;
                lse[i * of[4].row] = empty ? 0 : (double)top[i] + log((double)sum[i]);
                sum[i] = empty ? 0 : 1 / sum[i];
            }
            for (int64_t c = 0; c < e * WIDTH; c += WIDTH)
                for (int64_t x = 0; x < WIDTH; x += LANES) *(VF *)(acc + c + x) *= *(VF *)(sum + x);
            S(turn)(S(head)(of + 3, batch, head) + i0 * of[3].row, of[3].row, acc, WIDTH, e, rows);
            if (!moving) continue;
            double *t_lse = double_row(moves + 4, batch, head, i0);
            for (int64_t i = 0; i < rows; i++) t_lse[i * moves[4].row] = t_sum[i] *= sum[i];
            for (int64_t c = 0; c < e * WIDTH; c += WIDTH)
                for (int64_t x = 0; x < WIDTH; x += LANES) {
                    VF *moved = (VF *)(t_acc + c + x);
                    *moved = *moved * *(VF *)(sum + x) - *(VF *)(t_sum + x) * *(VF *)(acc + c + x);
                }
            S(turn)(S(head)(moves + 3, batch, head) + i0 * moves[3].row, moves[3].row, t_acc, WIDTH, e, rows);
        }
        subnormals_back(mode);
        free(memory);
    }
}

/* call->of: q, k, v; out, lse. */
void S(softmax)(const softmax_call *call, double scale) { S(attend)(call, scale, 0); }

/* call->of: q, k, v; out, lse; tq, tk, tv; t_out, t_lse. */
void S(softmax_along)(const softmax_call *call, double scale) { S(attend)(call, scale, 1); }

/* call->of: grad, q, k, v, out, lse; dq, dk, dv. */
void S(softmax_backward)(const softmax_call *call, double scale) {
    SIZES;
    const strided *of = call->of;
    const int64_t blocks = (n + WIDTH - 1) / WIDTH, tasks = b * g, shared = g ? h / g : 0;
    const int64_t wide_d = (d + LANES - 1) / LANES * LANES, wide_e = (e + LANES - 1) / LANES * LANES;
    const int64_t near_size = S(nearby_size)(m, d + e, blocks * shared), near = near_size > 0;
    const int64_t tables = WIDTH * (2 * d + e + wide_d + wide_e + 4 + 2 * m);
    const int sum_near = near && (tables + near_size + m * (wide_d + wide_e)) * (int64_t)sizeof(REAL) <= NEARBY_IN_ALL;
    /* Sums of dk and dv are taken in place, unless a row is no whole number of vectors, or they are better taken nearby. */
    const int64_t own_d = wide_d == d && (!sum_near || of[7].row == d) ? 0 : m * wide_d;
    const int64_t own_e = wide_e == e && (!sum_near || of[8].row == e) ? 0 : m * wide_e;
    if (!tasks) return;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        REAL *memory = scratch((size_t)(tables + own_d + own_e + near_size) * sizeof(REAL));
        if (!memory) abort();
        REAL *q_r = memory, *g_r = q_r + wide_d * WIDTH, *q_t = g_r + wide_e * WIDTH, *g_t = q_t + d * WIDTH, *dq_t = g_t + e * WIDTH;
        REAL *norm = dq_t + d * WIDTH, *rest = norm + WIDTH, *delta = rest + WIDTH, *lost = delta + WIDTH, *p_all = lost + WIDTH;
        REAL *ds_all = p_all + m * WIDTH, *own = ds_all + m * WIDTH;
        const strided *const read[] = {of + 2, of + 3};
        const int64_t widths[] = {d, e};
        S(nearby) rows_of = S(nearby_none)(near ? own + own_d + own_e : NULL);
        unsigned mode = subnormals_off();
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t batch = task / g, keys = task % g;
            S(come_near)(&rows_of, read, widths, 2, m, batch, keys);
            const REAL *k = rows_of.at[0], *v = rows_of.at[1];
            const int64_t k_row = rows_of.row[0], v_row = rows_of.row[1];
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
        subnormals_back(mode);
        free(memory);
    }
}
#endif
