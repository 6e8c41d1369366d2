/* Forward-mode tangent of softmax attention, without an [n, m] table. With p_ij = exp(scale q_i . k_j - lse_i):
 *
 *     w_ij = p_ij scale (tq_i . k_j + q_i . tk_j)      t_lse_i = sum_j w_ij
 *     t_out_i = sum_j (w_ij v_j + p_ij tv_j) - t_lse_i out_i
 *
 * q, tq [b, h, n, d], k, tk [b, g, m, d], v, tv [b, g, m, e], out, t_out [b, h, n, e], lse, t_lse [b, h, n, 1], read and written
 * where they lie; tq, tk, tv need not be there. See softmax_call.h. */
#ifndef PRECISION
#define PRECISION 32
#include "softmax_tangent.c"
#undef PRECISION
#define PRECISION 64
#include "softmax_tangent.c"
#else
#include "softmax_tile.h"

/* call->of: q, k, v, out, lse, tq, tk, tv; t_out, t_lse. */
void S(softmax_tangent)(const softmax_call *call, double scale) {
    SIZES;
    const strided *of = call->of;
    const int64_t blocks = (n + WIDTH - 1) / WIDTH, tasks = b * h * blocks;
    if (!tasks || !g) return;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        const int64_t near_size = S(nearby_size)(m, 2 * (d + e), blocks * (h / g));
        REAL *memory = scratch((size_t)(WIDTH * (2 * d + 2 * KEYS + e + 3) + near_size) * sizeof(REAL));
        if (!memory) abort();
        REAL *q_t = memory, *tq_t = q_t + d * WIDTH, *p = tq_t + d * WIDTH, *w = p + KEYS * WIDTH, *acc = w + KEYS * WIDTH;
        REAL *norm = acc + e * WIDTH, *rest = norm + WIDTH, *sum = rest + WIDTH;
        const strided *const read[] = {of + 1, of + 2, of + 6, of + 7};
        const int64_t widths[] = {d, e, d, e};
        S(nearby) rows_of = S(nearby_none)(near_size ? sum + WIDTH : NULL);
        unsigned mode = subnormals_off();
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            /* The last queries of a causal head have the most keys: first, so that no thread is left with them alone. */
            const int64_t i0 = (blocks - 1 - task % blocks) * WIDTH, rows = min64(WIDTH, n - i0);
            const int64_t batch = task / blocks / h, head = task / blocks % h, keys = head / (h / g);
            S(come_near)(&rows_of, read, widths, 4, m, batch, keys);
            const REAL *k = rows_of.at[0], *v = rows_of.at[1], *tk = rows_of.at[2], *tv = rows_of.at[3];
            const REAL *tq = S(head)(of + 5, batch, head);
            const int64_t k_row = rows_of.row[0], v_row = rows_of.row[1], tk_row = rows_of.row[2], tv_row = rows_of.row[3];
            const REAL *out = S(head)(of + 3, batch, head) + i0 * of[3].row;
            const double *lse = double_row(of + 4, batch, head, i0);
            const uint8_t *seen = mask_row(call, batch, head, i0);
            const int64_t end = causal ? min64(m, start + i0 + rows) : m, diagonal = causal ? start + i0 : m;
            S(queries)(q_t, NULL, 0, S(head)(of, batch, head) + i0 * of->row, of->row, rows, d, (REAL)scale);
            if (tq) S(queries)(tq_t, NULL, 0, tq + i0 * of[5].row, of[5].row, rows, d, (REAL)scale);
            memset(acc, 0, (size_t)(WIDTH * (e + 3)) * sizeof(REAL));
            for (int64_t i = 0; i < rows; i++) S(split)(lse[i * of[4].row], norm + i, rest + i);
            for (int64_t j0 = 0, x, count; j0 < end; j0 += count) {
                count = next_tile(j0, end, KEYS, diagonal, LANES, &x);
                S(scores)(p, k + j0 * k_row, k_row, q_t, count, d, x, 0);
                S(hide)(p, x, rows, count, j0 - diagonal, seen ? seen + j0 : NULL, call->mask.row);
                if (tq) S(scores)(w, k + j0 * k_row, k_row, tq_t, count, d, x, 0);
                if (tk) S(scores)(w, tk + j0 * tk_row, tk_row, q_t, count, d, x, tq != NULL);
                for (int64_t y = x; y < WIDTH; y += LANES) {
                    VF total = {0};
                    for (int64_t j = y; j < y + count * WIDTH; j += WIDTH) {
                        *(VF *)(p + j) = S(weight)(*(VF *)(p + j), norm + y, rest + y);
                        if (tq || tk) total += *(VF *)(w + j) *= *(VF *)(p + j);
                    }
                    *(VF *)(sum + y) += total;
                }
                if (tq || tk) S(values)(acc, v + j0 * v_row, v_row, w, count, e, x);
                if (tv) S(values)(acc, tv + j0 * tv_row, tv_row, p, count, e, x);
            }
            REAL *t_out = S(head)(of + 8, batch, head) + i0 * of[8].row;
            double *t_lse = double_row(of + 9, batch, head, i0);
            S(turn)(t_out, of[8].row, acc, WIDTH, e, rows);
            for (int64_t i = 0; i < rows; i++) {
                t_lse[i * of[9].row] = sum[i];
                for (int64_t c = 0; c < e; c++) t_out[i * of[8].row + c] -= sum[i] * out[i * of[3].row + c];
            }
        }
        subnormals_back(mode);
        free(memory);
    }
}
#endif
