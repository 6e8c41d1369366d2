/* Forward-mode tangent of segment attention, with the weights p of segment_attention.c:
 *
 *     w_ij = p_ij scale (tq_i . k_j + q_i . tk_j)      t_lse_i = sum_j w_ij
 *     t_out_i = sum_j (w_ij v_j + p_ij tv_j) - t_lse_i out_i
 *
 * tq, tk, tv are shaped like q, k, v and may be NULL. Included once per precision. */
/* call->of: q, k, v, out, lse, tq, tk, tv; t_out, t_lse. */
void S(segment_attention_tangent)(const segment_call *call, double scale) {
    UNPACK;
    const int64_t tasks = b * h * count;
    if (!tasks) return;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        const int64_t near_size = S(nearby_size)(call->n, 2 * (d + e), count * (h / g));
        REAL *memory = scratch((size_t)(SPAN * (2 * d + 2 * KEYS + e + 4 + max64(d, e)) + near_size) * sizeof(REAL));
        if (!memory) abort();
        REAL *q_t = memory, *tq_t = q_t + d * SPAN, *p = tq_t + d * SPAN, *w = p + KEYS * SPAN, *acc = w + KEYS * SPAN;
        REAL *norm = acc + e * SPAN, *rest = norm + SPAN, *sum = rest + SPAN;
        REAL *ones = sum + SPAN, *rows = ones + SPAN;
        int32_t at[KEYS];
        uint32_t words[KEYS];
        const strided *const read[] = {of + 1, of + 2, of + 6, of + 7};
        const int64_t widths[] = {d, e, d, e};
        S(nearby) rows_of = S(nearby_none)(near_size ? rows + max64(d, e) * SPAN : NULL);
        for (int64_t i = 0; i < SPAN; i++) ones[i] = 1;
        unsigned mode = subnormals_off();
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t batch = task / count / h, head = task / count % h, keys = head / (h / g);
            const segment_block *block = segment_block_of(&lists, batch * h + head, task % count);
            const int32_t *positions = lists.data + block->positions;
            const uint8_t *kept = segment_kept(call, block, batch);
            S(come_near)(&rows_of, read, widths, 4, call->n, batch, keys);
            const REAL *k = rows_of.at[0], *v = rows_of.at[1], *tk = rows_of.at[2], *tv = rows_of.at[3];
            const int64_t k_row = rows_of.row[0], v_row = rows_of.row[1], tk_row = rows_of.row[2], tv_row = rows_of.row[3];
            const REAL *out = S(head)(of + 3, batch, head);
            const double *lse = double_row(of + 4, batch, head, 0);
            const REAL *tq = S(head)(of + 5, batch, head);
            REAL *t_out = S(head)(of + 8, batch, head);
            double *t_lse = double_row(of + 9, batch, head, 0);
            S(segment_queries)(q_t, rows, d, S(head)(of, batch, head), of->row, positions, block->rows, d, (REAL)scale);
            if (tq) S(segment_queries)(tq_t, rows, d, tq, of[5].row, positions, block->rows, d, (REAL)scale);
            memset(acc, 0, (size_t)(SPAN * (e + 3)) * sizeof(REAL));
            for (int64_t i = 0; i < block->rows; i++) S(split)(lse[positions[i] * of[4].row], norm + i, rest + i);
            for (const segment_tile *tile = lists.tiles + block->first; tile < lists.tiles + block->end; tile++) {
                const int seen = segment_keys(&lists, tile, kept, at, words);
                if (seen == NOBODY) continue;
                const int64_t x = tile->half == 2 ? SPAN / 2 : 0, queries = tile->half ? SPAN / 2 : SPAN, vectors = queries / LANES;
                S(segment_scores)(p + x, k, k_row, at, q_t + x, tile->count, d, vectors, 0);
                if (tq) S(segment_scores)(w + x, k, k_row, at, tq_t + x, tile->count, d, vectors, 0);
                if (tk) S(segment_scores)(w + x, tk, tk_row, at, q_t + x, tile->count, d, vectors, tq != NULL);
                if (seen == SOME) S(segment_hide)(p + x, words, x, tile->count, vectors);
                for (int64_t y = x; y < x + queries; y += LANES) {
                    VF total = {0};
                    for (int64_t j = 0; j < tile->count; j++) {
                        VF *p_j = (VF *)(p + j * SPAN + y), *w_j = (VF *)(w + j * SPAN + y);
                        *p_j = S(weight)(*p_j, norm + y, rest + y);
                        *w_j = tq || tk ? *w_j * *p_j : (VF){0};
                        total += *w_j;
                    }
                    *(VF *)(sum + y) += total;
                }
                if (tq || tk) S(segment_values)(acc + x, v, v_row, at, w + x, NULL, tile->count, e, vectors);
                if (tv) S(segment_values)(acc + x, tv, tv_row, at, p + x, NULL, tile->count, e, vectors);
            }
            S(segment_results)(acc, rows, e, t_out, of[8].row, positions, block->rows, ones);
            for (int64_t i = 0; i < block->rows; i++) {
                const REAL *out_i = out + positions[i] * of[3].row;
                REAL *t_out_i = t_out + positions[i] * of[8].row;
                t_lse[positions[i] * of[9].row] = sum[i];
                for (int64_t c = 0; c < e; c++) t_out_i[c] -= sum[i] * out_i[c];
            }
        }
        subnormals_back(mode);
        free(memory);
    }
}
