/* Tangent of the gradient of segment attention, which serves Hessian-vector products in either mode. With p and ds of
 * segment_attention.c, and the moves tg, tq, tk, tv of grad, q, k, v (any may be NULL):
 *
 *     ts_ij = scale (tq_i . k_j + q_i . tk_j)      tp_ij = p_ij (ts_ij - t_lse_i)
 *     tds_ij = tp_ij (g_i . v_j - g_i . out_i) + p_ij (tg_i . v_j + g_i . tv_j - tg_i . out_i - g_i . t_out_i)
 *     t_dq = scale (tds k + ds tk)      t_dk = scale (tds^T q + ds^T tq)      t_dv = tp^T g + p^T tg
 *
 * Included once per precision. One task is a key head, as in the gradient. */
static void S(segment_pair)(REAL *p, const REAL *k, int64_t k_row, const REAL *q_moved, const REAL *k_moved, int64_t moved_row,
                            const REAL *q_t, const int32_t *at, int64_t count, int64_t d, int64_t vectors) {
    if (q_moved) S(segment_scores)(p, k, k_row, at, q_moved, count, d, vectors, 0);
    if (k_moved) S(segment_scores)(p, k_moved, moved_row, at, q_t, count, d, vectors, q_moved != NULL);
    if (!q_moved && !k_moved)
        for (int64_t j = 0; j < count; j++) memset(p + j * SPAN, 0, (size_t)(vectors * LANES) * sizeof(REAL));
}

/* call->of: grad, q, k, v, out, lse, t_out, t_lse, tg, tq, tk, tv; t_dq, t_dk, t_dv. */
void S(segment_attention_second)(const segment_call *call, double scale) {
    UNPACK;
    const int64_t n = call->n, tasks = b * g, shared = g ? h / g : 0;
    const int64_t wide_d = (d + LANES - 1) / LANES * LANES, wide_e = (e + LANES - 1) / LANES * LANES;
    if (!tasks) return;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        const int64_t own_d = wide_d == d ? 0 : n * wide_d, own_e = wide_e == e ? 0 : n * wide_e;
        const int64_t block_size = SPAN * (3 * d + 2 * e + 2 * wide_d + 2 * wide_e + 4 * KEYS + 5);
        REAL *memory = scratch((size_t)(block_size + own_d + own_e) * sizeof(REAL));
        if (!memory) abort();
        REAL *q_r = memory, *tq_r = q_r + wide_d * SPAN, *g_r = tq_r + wide_d * SPAN, *tg_r = g_r + wide_e * SPAN;
        REAL *p = tg_r + wide_e * SPAN, *ds = p + KEYS * SPAN, *tp = ds + KEYS * SPAN, *tds = tp + KEYS * SPAN;
        REAL *q_t = tds + KEYS * SPAN, *tq_t = q_t + d * SPAN, *g_t = tq_t + d * SPAN, *tg_t = g_t + e * SPAN;
        REAL *dq_t = tg_t + e * SPAN, *norm = dq_t + d * SPAN, *rest = norm + SPAN, *t_norm = rest + SPAN, *delta = t_norm + SPAN;
        REAL *t_delta = delta + SPAN, *own = t_delta + SPAN;
        int32_t at[KEYS];
        uint32_t words[KEYS];
        unsigned mode = subnormals_off();
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t batch = task / g, keys = task % g, k_row = of[2].row, v_row = of[3].row, tk_row = of[10].row, tv_row = of[11].row;
            const REAL *k = S(head)(of + 2, batch, keys), *v = S(head)(of + 3, batch, keys);
            const REAL *tk = S(head)(of + 10, batch, keys), *tv = S(head)(of + 11, batch, keys);
            const S(sums) dk = S(sums_of)(of + 13, batch, keys, own_d ? own : NULL, n, d, wide_d);
            const S(sums) dv = S(sums_of)(of + 14, batch, keys, own_e ? own + own_d : NULL, n, e, wide_e);
            for (int64_t turn = 0; turn < shared * count; turn++) {
                const int64_t head = keys * shared + turn / count;
                const segment_block *block = segment_block_of(&lists, batch * h + head, turn % count);
                const int32_t *positions = lists.data + block->positions;
                const uint8_t *kept = segment_kept(call, block, batch);
                const REAL *grad = S(head)(of, batch, head), *out = S(head)(of + 4, batch, head);
                const double *lse = double_row(of + 5, batch, head, 0), *t_lse = double_row(of + 7, batch, head, 0);
                const REAL *t_out = S(head)(of + 6, batch, head);
                const REAL *tg = S(head)(of + 8, batch, head), *tq = S(head)(of + 9, batch, head);
                REAL *dq = S(head)(of + 12, batch, head);
                S(segment_queries)(q_t, q_r, wide_d, S(head)(of + 1, batch, head), of[1].row, positions, block->rows, d, (REAL)scale);
                S(segment_queries)(g_t, g_r, wide_e, grad, of->row, positions, block->rows, e, 1);
                if (tq) S(segment_queries)(tq_t, tq_r, wide_d, tq, of[9].row, positions, block->rows, d, (REAL)scale);
                if (tg) S(segment_queries)(tg_t, tg_r, wide_e, tg, of[8].row, positions, block->rows, e, 1);
                memset(dq_t, 0, (size_t)(SPAN * (d + 5)) * sizeof(REAL));
                for (int64_t i = 0; i < block->rows; i++) {
                    const REAL *grad_i = grad + positions[i] * of->row, *out_i = out + positions[i] * of[4].row;
                    const REAL *t_out_i = t_out + positions[i] * of[6].row, *tg_i = tg ? tg + positions[i] * of[8].row : NULL;
                    S(split)(lse[positions[i] * of[5].row], norm + i, rest + i);
                    t_norm[i] = (REAL)t_lse[positions[i] * of[7].row];
                    delta[i] = (REAL)S(product)(grad_i, out_i, e);
                    t_delta[i] = (REAL)(S(product)(grad_i, t_out_i, e) + (tg_i ? S(product)(tg_i, out_i, e) : 0));
                }
                for (const segment_tile *tile = lists.tiles + block->first; tile < lists.tiles + block->end; tile++) {
                    const int seen = segment_keys(&lists, tile, kept, at, words);
                    if (seen == NOBODY) continue;
                    const int64_t x = tile->half == 2 ? SPAN / 2 : 0, size = tile->count;
                    const int64_t queries = tile->half ? SPAN / 2 : SPAN, vectors = queries / LANES;
                    S(segment_scores)(p + x, k, k_row, at, q_t + x, size, d, vectors, 0);
                    S(segment_scores)(ds + x, v, v_row, at, g_t + x, size, e, vectors, 0);
                    S(segment_pair)(tp + x, k, k_row, tq ? tq_t + x : NULL, tk, tk_row, q_t + x, at, size, d, vectors);
                    S(segment_pair)(tds + x, v, v_row, tg ? tg_t + x : NULL, tv, tv_row, g_t + x, at, size, e, vectors);
                    if (seen == SOME) S(segment_hide)(p + x, words, x, size, vectors);
                    for (int64_t y = x; y < x + queries; y += LANES) {
                        const VF t_norm_y = *(VF *)(t_norm + y);
                        const VF delta_y = *(VF *)(delta + y), t_delta_y = *(VF *)(t_delta + y);
                        for (int64_t j = y; j < y + size * SPAN; j += SPAN) {
                            const VF p_j = S(weight)(*(VF *)(p + j), norm + y, rest + y), tp_j = p_j * (*(VF *)(tp + j) - t_norm_y);
                            const VF slope = *(VF *)(ds + j) - delta_y;
                            *(VF *)(p + j) = p_j;
                            *(VF *)(tp + j) = tp_j;
                            *(VF *)(ds + j) = p_j * slope;
                            *(VF *)(tds + j) = tp_j * slope + p_j * (*(VF *)(tds + j) - t_delta_y);
                        }
                    }
                    S(segment_values)(dq_t + x, k, k_row, at, tds + x, NULL, size, d, vectors);
                    if (tk) S(segment_values)(dq_t + x, tk, tk_row, at, ds + x, NULL, size, d, vectors);
                    S(segment_spread)(dk, at, tds + x, q_r + x * wide_d, size, queries, wide_d);
                    if (tq) S(segment_spread)(dk, at, ds + x, tq_r + x * wide_d, size, queries, wide_d);
                    S(segment_spread)(dv, at, tp + x, g_r + x * wide_e, size, queries, wide_e);
                    if (tg) S(segment_spread)(dv, at, p + x, tg_r + x * wide_e, size, queries, wide_e);
                }
                for (int64_t i = 0; i < SPAN; i++) norm[i] = (REAL)scale;
                S(segment_results)(dq_t, q_t, d, dq, of[12].row, positions, block->rows, norm);
            }
            S(sums_back)(of + 13, batch, keys, dk, n, d);
            S(sums_back)(of + 14, batch, keys, dv, n, e);
        }
        subnormals_back(mode);
        free(memory);
    }
}
