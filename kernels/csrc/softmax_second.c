/* Tangent of the gradient of softmax attention, which serves Hessian-vector products in either mode, without an [n, m] table. With
 * p, ds and lse of softmax.c, and the moves tg, tq, tk, tv of grad, q, k, v (any need not be there):
 *
 *     ts_ij = scale (tq_i . k_j + q_i . tk_j)      tp_ij = p_ij (ts_ij - t_lse_i)
 *     tds_ij = tp_ij (g_i . v_j - g_i . out_i) + p_ij (tg_i . v_j + g_i . tv_j - tg_i . out_i - g_i . t_out_i)
 *     t_dq = scale (tds k + ds tk)      t_dk = scale (tds^T q + ds^T tq)      t_dv = tp^T g + p^T tg
 *
 * Tensors as in softmax.c, t_out, t_lse the tangents of out and lse. One task is a key head, as in the gradient. */
#ifndef PRECISION
#define PRECISION 32
#include "softmax_second.c"
#undef PRECISION
#define PRECISION 64
#include "softmax_second.c"
#else
#include "softmax_tile.h"

/* p = k q_moved + k_moved q_t, either or none of which is there. */
static void S(pair)(REAL *p, const REAL *k, int64_t k_row, const REAL *q_moved, const REAL *k_moved, int64_t moved_row,
                    const REAL *q_t, int64_t count, int64_t d, int64_t x) {
    if (q_moved) S(scores)(p, k, k_row, q_moved, count, d, x, 0);
    if (k_moved) S(scores)(p, k_moved, moved_row, q_t, count, d, x, q_moved != NULL);
    if (!q_moved && !k_moved) memset(p, 0, (size_t)(count * WIDTH) * sizeof(REAL));
}

/* call->of: grad, q, k, v, out, lse, t_out, t_lse, tg, tq, tk, tv; t_dq, t_dk, t_dv. */
void S(softmax_second)(const softmax_call *call, double scale) {
    SIZES;
    const strided *of = call->of;
    const int64_t blocks = (n + WIDTH - 1) / WIDTH, tasks = b * g, shared = g ? h / g : 0;
    const int64_t wide_d = (d + LANES - 1) / LANES * LANES, wide_e = (e + LANES - 1) / LANES * LANES;
    const int64_t own_d = wide_d == d ? 0 : m * wide_d, own_e = wide_e == e ? 0 : m * wide_e;
    if (!tasks) return;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        const int64_t block_size = WIDTH * (3 * d + 2 * e + 2 * wide_d + 2 * wide_e + 4 * KEYS + 5);
        REAL *memory = scratch((size_t)(block_size + own_d + own_e) * sizeof(REAL));
        if (!memory) abort();
        REAL *q_r = memory, *tq_r = q_r + wide_d * WIDTH, *g_r = tq_r + wide_d * WIDTH, *tg_r = g_r + wide_e * WIDTH;
        REAL *p = tg_r + wide_e * WIDTH, *ds = p + KEYS * WIDTH, *tp = ds + KEYS * WIDTH, *tds = tp + KEYS * WIDTH;
        REAL *q_t = tds + KEYS * WIDTH, *tq_t = q_t + d * WIDTH, *g_t = tq_t + d * WIDTH, *tg_t = g_t + e * WIDTH;
        REAL *dq_t = tg_t + e * WIDTH, *norm = dq_t + d * WIDTH, *rest = norm + WIDTH, *t_norm = rest + WIDTH, *delta = t_norm + WIDTH;
        REAL *t_delta = delta + WIDTH, *own = t_delta + WIDTH;
        unsigned mode = subnormals_off();
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t batch = task / g, keys = task % g, k_row = of[2].row, v_row = of[3].row, tk_row = of[10].row, tv_row = of[11].row;
            const REAL *k = S(head)(of + 2, batch, keys), *v = S(head)(of + 3, batch, keys);
            const REAL *tk = S(head)(of + 10, batch, keys), *tv = S(head)(of + 11, batch, keys);
            const S(sums) dk = S(sums_of)(of + 13, batch, keys, own_d ? own : NULL, m, d, wide_d);
            const S(sums) dv = S(sums_of)(of + 14, batch, keys, own_e ? own + own_d : NULL, m, e, wide_e);
            for (int64_t block = 0; block < shared * blocks; block++) {
                const int64_t head = keys * shared + block / blocks, i0 = block % blocks * WIDTH, rows = min64(WIDTH, n - i0);
                const int64_t end = causal ? min64(m, start + i0 + rows) : m, diagonal = causal ? start + i0 : m;
                const REAL *grad = S(head)(of, batch, head) + i0 * of->row, *out = S(head)(of + 4, batch, head) + i0 * of[4].row;
                const double *lse = double_row(of + 5, batch, head, i0), *t_lse = double_row(of + 7, batch, head, i0);
                const REAL *t_out = S(head)(of + 6, batch, head) + i0 * of[6].row;
                const REAL *tg = S(head)(of + 8, batch, head), *tq = S(head)(of + 9, batch, head);
                const uint8_t *seen = mask_row(call, batch, head, i0);
                S(queries)(q_t, q_r, wide_d, S(head)(of + 1, batch, head) + i0 * of[1].row, of[1].row, rows, d, (REAL)scale);
                S(queries)(g_t, g_r, wide_e, grad, of->row, rows, e, 1);
                if (tq) S(queries)(tq_t, tq_r, wide_d, tq + i0 * of[9].row, of[9].row, rows, d, (REAL)scale);
                if (tg) S(queries)(tg_t, tg_r, wide_e, tg += i0 * of[8].row, of[8].row, rows, e, 1);
                memset(dq_t, 0, (size_t)(WIDTH * (d + 5)) * sizeof(REAL));
                for (int64_t i = 0; i < rows; i++) {
                    S(split)(lse[i * of[5].row], norm + i, rest + i);
                    t_norm[i] = (REAL)t_lse[i * of[7].row];
                    delta[i] = (REAL)S(product)(grad + i * of->row, out + i * of[4].row, e);
                    t_delta[i] = (REAL)(S(product)(grad + i * of->row, t_out + i * of[6].row, e) +
                                        (tg ? S(product)(tg + i * of[8].row, out + i * of[4].row, e) : 0));
                }
                for (int64_t j0 = 0, x, count; j0 < end; j0 += count) {
                    count = next_tile(j0, end, KEYS, diagonal, LANES, &x);
                    S(scores)(p, k + j0 * k_row, k_row, q_t, count, d, x, 0);
                    S(scores)(ds, v + j0 * v_row, v_row, g_t, count, e, x, 0);
                    S(pair)(tp, k + j0 * k_row, k_row, tq ? tq_t : NULL, tk ? tk + j0 * tk_row : NULL, tk_row, q_t, count, d, x);
                    S(pair)(tds, v + j0 * v_row, v_row, tg ? tg_t : NULL, tv ? tv + j0 * tv_row : NULL, tv_row, g_t, count, e, x);
                    S(hide)(p, x, rows, count, j0 - diagonal, seen ? seen + j0 : NULL, call->mask.row);
                    for (int64_t y = x; y < WIDTH; y += LANES) {
                        const VF t_norm_y = *(VF *)(t_norm + y);
                        const VF delta_y = *(VF *)(delta + y), t_delta_y = *(VF *)(t_delta + y);
                        for (int64_t j = y; j < y + count * WIDTH; j += WIDTH) {
                            const VF p_j = S(weight)(*(VF *)(p + j), norm + y, rest + y), tp_j = p_j * (*(VF *)(tp + j) - t_norm_y);
                            const VF slope = *(VF *)(ds + j) - delta_y;
                            *(VF *)(p + j) = p_j;
                            *(VF *)(tp + j) = tp_j;
                            *(VF *)(ds + j) = p_j * slope;
                            *(VF *)(tds + j) = tp_j * slope + p_j * (*(VF *)(tds + j) - t_delta_y);
                        }
                    }
                    S(values)(dq_t, k + j0 * k_row, k_row, tds, count, d, x);
                    if (tk) S(values)(dq_t, tk + j0 * tk_row, tk_row, ds, count, d, x);
                    S(keys)(dk.at + j0 * dk.row, dk.row, tds, q_r, wide_d, count, rows, x);
                    if (tq) S(keys)(dk.at + j0 * dk.row, dk.row, ds, tq_r, wide_d, count, rows, x);
                    S(keys)(dv.at + j0 * dv.row, dv.row, tp, g_r, wide_e, count, rows, x);
                    if (tg) S(keys)(dv.at + j0 * dv.row, dv.row, p, tg_r, wide_e, count, rows, x);
                }
                S(times)(dq_t, d, (REAL)scale);
                S(turn)(S(head)(of + 12, batch, head) + i0 * of[12].row, of[12].row, dq_t, WIDTH, d, rows);
            }
            S(sums_back)(of + 13, batch, keys, dk, m, d);
            S(sums_back)(of + 14, batch, keys, dv, m, e);
        }
        subnormals_back(mode);
        free(memory);
    }
}
#endif
