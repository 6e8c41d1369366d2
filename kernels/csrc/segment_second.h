/* Tangent of the gradient of segment attention, which serves Hessian-vector products in either mode. With p and ds of
 * segment_attention.c, and the moves tg, tq, tk, tv of grad, q, k, v (any may be NULL):
 *
 *     ts_ij = scale (tq_i . k_j + q_i . tk_j)      tp_ij = p_ij (ts_ij - t_lse_i)
 *     tds_ij = tp_ij (g_i . v_j - g_i . out_i) + p_ij (tg_i . v_j + g_i . tv_j - tg_i . out_i - g_i . t_out_i)
 *     t_dq = scale (tds k + ds tk)      t_dk = scale (tds^T q + ds^T tq)      t_dv = tp^T g + p^T tg
 *
 * Included once per precision. One task is a key head, as in the gradient. */
static void S(segment_pair)(REAL *p, const REAL *k, const REAL *q_moved, const REAL *k_moved, const REAL *q_t, const int32_t *at,
                            int64_t count, int64_t d, int64_t vectors) {
    if (q_moved) S(segment_scores)(p, k, at, q_moved, count, d, vectors, 0);
    if (k_moved) S(segment_scores)(p, k_moved, at, q_t, count, d, vectors, q_moved != NULL);
    if (!q_moved && !k_moved)
        for (int64_t j = 0; j < count; j++) memset(p + j * SPAN, 0, (size_t)(vectors * LANES) * sizeof(REAL));
}

void S(segment_attention_second)(const REAL *grad, const REAL *q, const REAL *k, const REAL *v, const uint8_t *keep,
                                 const int32_t *group, const int32_t *blocks, const int32_t *tiles, const int32_t *data,
                                 const REAL *out, const REAL *lse, const REAL *t_out, const REAL *t_lse, const REAL *tg,
                                 const REAL *tq, const REAL *tk, const REAL *tv, REAL *dq, REAL *dk, REAL *dv, int64_t b, int64_t h,
                                 int64_t g, int64_t n, int64_t d, int64_t e, int64_t count, int64_t threads, double scale) {
    const segment_lists lists = {group, (const segment_block *)blocks, (const segment_tile *)tiles, data, count};
    const int64_t tasks = b * g, shared = g ? h / g : 0;
    const int64_t wide_d = (d + LANES - 1) / LANES * LANES, wide_e = (e + LANES - 1) / LANES * LANES;
    if (!tasks) return;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        const int64_t own_d = wide_d == d ? 0 : n * wide_d, own_e = wide_e == e ? 0 : n * wide_e;
        const int64_t block_size = SPAN * (3 * d + 2 * e + 2 * wide_d + 2 * wide_e + 4 * KEYS + 4);
        REAL *memory = scratch((size_t)(block_size + own_d + own_e) * sizeof(REAL));
        if (!memory) abort();
        REAL *q_r = memory, *tq_r = q_r + wide_d * SPAN, *g_r = tq_r + wide_d * SPAN, *tg_r = g_r + wide_e * SPAN;
        REAL *p = tg_r + wide_e * SPAN, *ds = p + KEYS * SPAN, *tp = ds + KEYS * SPAN, *tds = tp + KEYS * SPAN;
        REAL *q_t = tds + KEYS * SPAN, *tq_t = q_t + d * SPAN, *g_t = tq_t + d * SPAN, *tg_t = g_t + e * SPAN;
        REAL *dq_t = tg_t + e * SPAN, *norm = dq_t + d * SPAN, *t_norm = norm + SPAN, *delta = t_norm + SPAN;
        REAL *t_delta = delta + SPAN, *rest = t_delta + SPAN;
        int32_t at[KEYS];
        uint32_t words[KEYS];
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; task++) {
            const REAL *k_h = k + task * n * d, *v_h = v + task * n * e;
            const REAL *tk_h = tk ? tk + task * n * d : NULL, *tv_h = tv ? tv + task * n * e : NULL;
            REAL *dk_h = own_d ? rest : dk + task * n * d, *dv_h = own_e ? rest + own_d : dv + task * n * e;
            memset(dk_h, 0, (size_t)(n * wide_d) * sizeof(REAL));
            memset(dv_h, 0, (size_t)(n * wide_e) * sizeof(REAL));
            for (int64_t turn = 0; turn < shared * count; turn++) {
                const int64_t head = task * shared + turn / count;
                const segment_block *block = lists.blocks + (group ? group[head] : 0) * count + turn % count;
                const int32_t *positions = data + block->positions;
                const uint8_t *kept = keep && !block->free ? keep + head / h * n : NULL;
                S(segment_queries)(q_t, q_r, wide_d, q + head * n * d, positions, block->rows, d, (REAL)scale);
                S(segment_queries)(g_t, g_r, wide_e, grad + head * n * e, positions, block->rows, e, 1);
                if (tq) S(segment_queries)(tq_t, tq_r, wide_d, tq + head * n * d, positions, block->rows, d, (REAL)scale);
                if (tg) S(segment_queries)(tg_t, tg_r, wide_e, tg + head * n * e, positions, block->rows, e, 1);
                memset(dq_t, 0, (size_t)(SPAN * (d + 4)) * sizeof(REAL));
                for (int64_t i = 0; i < block->rows; i++) {
                    const int64_t row = head * n + positions[i];
                    norm[i] = lse[row];
                    t_norm[i] = t_lse[row];
                    for (int64_t c = row * e; c < (row + 1) * e; c++) {
                        delta[i] += grad[c] * out[c];
                        t_delta[i] += grad[c] * t_out[c] + (tg ? tg[c] * out[c] : 0);
                    }
                }
                for (const segment_tile *tile = lists.tiles + block->first; tile < lists.tiles + block->end; tile++) {
                    const int seen = segment_keys(&lists, tile, kept, at, words);
                    if (seen == NOBODY) continue;
                    const int64_t x = tile->half == 2 ? SPAN / 2 : 0, size = tile->count;
                    const int64_t queries = tile->half ? SPAN / 2 : SPAN, vectors = queries / LANES;
                    S(segment_scores)(p + x, k_h, at, q_t + x, size, d, vectors, 0);
                    S(segment_scores)(ds + x, v_h, at, g_t + x, size, e, vectors, 0);
                    S(segment_pair)(tp + x, k_h, tq ? tq_t + x : NULL, tk_h, q_t + x, at, size, d, vectors);
                    S(segment_pair)(tds + x, v_h, tg ? tg_t + x : NULL, tv_h, g_t + x, at, size, e, vectors);
                    if (seen == SOME) S(segment_hide)(p + x, words, x, size, vectors);
                    for (int64_t y = x; y < x + queries; y += LANES) {
                        const VF norm_y = *(VF *)(norm + y), t_norm_y = *(VF *)(t_norm + y);
                        const VF delta_y = *(VF *)(delta + y), t_delta_y = *(VF *)(t_delta + y);
                        for (int64_t j = y; j < y + size * SPAN; j += SPAN) {
                            const VF p_j = S(exponential)(*(VF *)(p + j) - norm_y), tp_j = p_j * (*(VF *)(tp + j) - t_norm_y);
                            const VF slope = *(VF *)(ds + j) - delta_y;
                            *(VF *)(p + j) = p_j;
                            *(VF *)(tp + j) = tp_j;
                            *(VF *)(ds + j) = p_j * slope;
                            *(VF *)(tds + j) = tp_j * slope + p_j * (*(VF *)(tds + j) - t_delta_y);
                        }
                    }
                    S(segment_values)(dq_t + x, k_h, at, tds + x, NULL, size, d, vectors);
                    if (tk) S(segment_values)(dq_t + x, tk_h, at, ds + x, NULL, size, d, vectors);
                    S(segment_spread)(dk_h, at, tds + x, q_r + x * wide_d, size, queries, wide_d);
                    if (tq) S(segment_spread)(dk_h, at, ds + x, tq_r + x * wide_d, size, queries, wide_d);
                    S(segment_spread)(dv_h, at, tp + x, g_r + x * wide_e, size, queries, wide_e);
                    if (tg) S(segment_spread)(dv_h, at, p + x, tg_r + x * wide_e, size, queries, wide_e);
                }
                for (int64_t i = 0; i < block->rows; i++)
                    for (int64_t c = 0; c < d; c++) dq[(head * n + positions[i]) * d + c] = (REAL)scale * dq_t[c * SPAN + i];
            }
            for (int64_t j = 0; j < n; j++) {
                if (own_d) memcpy(dk + (task * n + j) * d, dk_h + j * wide_d, (size_t)d * sizeof(REAL));
                if (own_e) memcpy(dv + (task * n + j) * e, dv_h + j * wide_e, (size_t)e * sizeof(REAL));
            }
        }
        free(memory);
    }
}
