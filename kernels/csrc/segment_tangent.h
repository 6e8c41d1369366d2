/* Forward-mode tangent of segment attention, with the weights p of segment_attention.c:
 *
 *     w_ij = p_ij scale (tq_i . k_j + q_i . tk_j)      t_lse_i = sum_j w_ij
 *     t_out_i = sum_j (w_ij v_j + p_ij tv_j) - t_lse_i out_i
 *
 * tq, tk, tv are shaped like q, k, v and may be NULL. Included once per precision. */
void S(segment_attention_tangent)(const REAL *q, const REAL *k, const REAL *v, const uint8_t *keep, const int32_t *group,
                                  const int32_t *blocks, const int32_t *tiles, const int32_t *data, const REAL *out,
                                  const REAL *lse, const REAL *tq, const REAL *tk, const REAL *tv, REAL *t_out, REAL *t_lse,
                                  int64_t b, int64_t h, int64_t g, int64_t n, int64_t d, int64_t e, int64_t count, int64_t threads,
                                  double scale) {
    const segment_lists lists = {group, (const segment_block *)blocks, (const segment_tile *)tiles, data, count};
    const int64_t tasks = b * h * count;
    if (!tasks) return;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        REAL *memory = scratch((size_t)(SPAN * (2 * d + 2 * KEYS + e + 2)) * sizeof(REAL));
        if (!memory) abort();
        REAL *q_t = memory, *tq_t = q_t + d * SPAN, *p = tq_t + d * SPAN, *w = p + KEYS * SPAN, *acc = w + KEYS * SPAN;
        REAL *norm = acc + e * SPAN, *sum = norm + SPAN;
        int32_t at[KEYS];
        uint32_t words[KEYS];
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t head = task / count, key_head = head / h * g + head % h / (h / g), keys = key_head * n;
            const segment_block *block = lists.blocks + (group ? group[head] : 0) * count + task % count;
            const int32_t *positions = data + block->positions;
            const uint8_t *kept = keep && !block->free ? keep + head / h * n : NULL;
            S(segment_queries)(q_t, NULL, 0, q + head * n * d, positions, block->rows, d, (REAL)scale);
            if (tq) S(segment_queries)(tq_t, NULL, 0, tq + head * n * d, positions, block->rows, d, (REAL)scale);
            memset(acc, 0, (size_t)(SPAN * (e + 2)) * sizeof(REAL));
            for (int64_t i = 0; i < block->rows; i++) norm[i] = lse[head * n + positions[i]];
            for (const segment_tile *tile = lists.tiles + block->first; tile < lists.tiles + block->end; tile++) {
                const int seen = segment_keys(&lists, tile, kept, at, words);
                if (seen == NOBODY) continue;
                const int64_t x = tile->half == 2 ? SPAN / 2 : 0, queries = tile->half ? SPAN / 2 : SPAN, vectors = queries / LANES;
                S(segment_scores)(p + x, k + keys * d, at, q_t + x, tile->count, d, vectors, 0);
                if (tq) S(segment_scores)(w + x, k + keys * d, at, tq_t + x, tile->count, d, vectors, 0);
                if (tk) S(segment_scores)(w + x, tk + keys * d, at, q_t + x, tile->count, d, vectors, tq != NULL);
                if (seen == SOME) S(segment_hide)(p + x, words, x, tile->count, vectors);
                for (int64_t y = x; y < x + queries; y += LANES) {
                    VF total = *(VF *)(sum + y);
                    for (int64_t j = 0; j < tile->count; j++) {
                        VF *p_j = (VF *)(p + j * SPAN + y), *w_j = (VF *)(w + j * SPAN + y);
                        *p_j = S(exponential)(*p_j - *(VF *)(norm + y));
                        *w_j = tq || tk ? *w_j * *p_j : (VF){0};
                        total += *w_j;
                    }
                    *(VF *)(sum + y) = total;
                }
                if (tq || tk) S(segment_values)(acc + x, v + keys * e, at, w + x, NULL, tile->count, e, vectors);
                if (tv) S(segment_values)(acc + x, tv + keys * e, at, p + x, NULL, tile->count, e, vectors);
            }
            for (int64_t i = 0; i < block->rows; i++) {
                const int64_t row = head * n + positions[i];
                t_lse[row] = sum[i];
                for (int64_t c = 0; c < e; c++) t_out[row * e + c] = acc[c * SPAN + i] - sum[i] * out[row * e + c];
            }
        }
        free(memory);
    }
}
