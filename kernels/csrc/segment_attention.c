/* Softmax attention where lists say which keys each block of queries reads: value, gradient and tangent without an [n, n] table.
 * With p_ij = exp(scale q_i . k_j - lse_i) over the pairs that are seen:
 *
 *     out_i = sum_j p_ij v_j      lse_i = log sum_j exp(scale q_i . k_j)      (0 and 0 for a query that sees no key)
 *     ds_ij = p_ij (g_i . v_j - g_i . out_i)      dq = scale ds k      dk = scale ds^T q      dv = p^T g
 *
 * q, dq [b, h, n, d], k, dk [b, g, n, d], v, dv [b, g, n, e], out, grad (g above) [b, h, n, e], lse [b, h, n, 1], read and written
 * where they lie. The arguments and the lists: see segment_tile.h.
 *
 * The tangents of value and gradient: segment_tangent.h, segment_second.h.
 *
 * Forward and tangent: one task is a block of queries of a head. Backward: one task is a key head with all its queries, so that
 * nobody else adds to dk and dv, and the result does not depend on the number of threads. */
#ifndef PRECISION
#define PRECISION 32
#include "segment_attention.c"
#undef PRECISION
#define PRECISION 64
#include "segment_attention.c"
#else
#include "softmax_tile.h"
#include "segment_tile.h"
#include "segment_tangent.h"
#include "segment_second.h"

/* Turns a tile of scores into weights relative to the running maximum `top`, and adds them to `sum`; shrink: what earlier sums are
 * to be multiplied by. */
static void S(segment_weigh)(REAL *p, int64_t count, int64_t vectors, REAL *sum, REAL *top, REAL *shrink) {
    const VF nothing = (VF){0} - (REAL)INFINITY;
    for (int64_t x = 0; x < vectors; x++) {
        VF old = ((VF *)top)[x], best = S(largest_of)(p + x * LANES, SPAN, count, old);
        VF base = S(select)(best == nothing, (VF){0}, best), less = S(exponential)(old - base), total = {0};
        for (int64_t j = 0; j < count; j++) {
            VF *p_j = (VF *)(p + j * SPAN) + x;
            *p_j = S(exponential)(*p_j - base);
            total += *p_j;
        }
        ((VF *)shrink)[x] = less;
        ((VF *)sum)[x] = ((VF *)sum)[x] * less + total;
        ((VF *)top)[x] = best;
    }
}

/* call->of: q, k, v; out, lse. */
void S(segment_attention)(const segment_call *call, double scale) {
    UNPACK;
    const int64_t tasks = b * h * count;
    if (!tasks) return;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        const int64_t near_size = S(nearby_size)(call->n, d + e, count * (h / g));
        REAL *memory = scratch((size_t)(SPAN * (d + KEYS + e + 3 + max64(d, e)) + near_size) * sizeof(REAL));
        if (!memory) abort();
        REAL *q_t = memory, *p = q_t + d * SPAN, *acc = p + KEYS * SPAN, *sum = acc + e * SPAN, *top = sum + SPAN;
        REAL *shrink = top + SPAN, *rows = shrink + SPAN;
        int32_t at[KEYS];
        uint32_t words[KEYS];
        const strided *const read[] = {of + 1, of + 2};
        const int64_t widths[] = {d, e};
        S(nearby) rows_of = S(nearby_none)(near_size ? rows + max64(d, e) * SPAN : NULL);
        unsigned mode = subnormals_off();
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t batch = task / count / h, head = task / count % h, keys = head / (h / g);
            const segment_block *block = segment_block_of(&lists, batch * h + head, task % count);
            const int32_t *positions = lists.data + block->positions;
            const uint8_t *kept = segment_kept(call, block, batch);
            S(come_near)(&rows_of, read, widths, 2, call->n, batch, keys);
            const REAL *k = rows_of.at[0], *v = rows_of.at[1];
            REAL *out = S(head)(of + 3, batch, head);
            double *lse = double_row(of + 4, batch, head, 0);
            S(segment_queries)(q_t, rows, d, S(head)(of, batch, head), of->row, positions, block->rows, d, (REAL)scale);
            memset(acc, 0, (size_t)(SPAN * (e + 1)) * sizeof(REAL));
            for (int64_t i = 0; i < SPAN; i++) top[i] = -INFINITY;
            for (const segment_tile *tile = lists.tiles + block->first; tile < lists.tiles + block->end; tile++) {
                const int seen = segment_keys(&lists, tile, kept, at, words);
                if (seen == NOBODY) continue;
                const int64_t x = tile->half == 2 ? SPAN / 2 : 0, vectors = (tile->half ? SPAN / 2 : SPAN) / LANES;
                S(segment_scores)(p + x, k, rows_of.row[0], at, q_t + x, tile->count, d, vectors, 0);
                if (seen == SOME) S(segment_hide)(p + x, words, x, tile->count, vectors);
                S(segment_weigh)(p + x, tile->count, vectors, sum + x, top + x, shrink + x);
                S(segment_values)(acc + x, v, rows_of.row[1], at, p + x, shrink + x, tile->count, e, vectors);
            }
            for (int64_t i = 0; i < SPAN; i++) {
                const int empty = top[i] == -INFINITY;
                if (i < block->rows) lse[positions[i] * of[4].row] = empty ? 0 : (double)top[i] + log((double)sum[i]);
                sum[i] = empty ? 0 : 1 / sum[i];
            }
            S(segment_results)(acc, rows, e, out, of[3].row, positions, block->rows, sum);
        }
        subnormals_back(mode);
        free(memory);
    }
}

/* call->of: grad, q, k, v, out, lse; dq, dk, dv. */
void S(segment_attention_backward)(const segment_call *call, double scale) {
    UNPACK;
    const int64_t n = call->n, tasks = b * g, shared = g ? h / g : 0, row = call->row;
    const int64_t wide_d = (d + LANES - 1) / LANES * LANES, wide_e = (e + LANES - 1) / LANES * LANES;
    const int64_t tables = SPAN * (2 * d + e + wide_d + wide_e + 2 * row + 4);
    if (!tasks) return;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        const int64_t near_size = S(nearby_size)(n, d + e, count * shared), near = near_size > 0;
        const int sum_near = near && (tables + near_size + n * (wide_d + wide_e)) * (int64_t)sizeof(REAL) <= NEARBY_IN_ALL;
        /* Sums in place, unless a row is no whole number of vectors, or they are better taken nearby. */
        const int64_t own_d = wide_d == d && (!sum_near || of[7].row == d) ? 0 : n * wide_d;
        const int64_t own_e = wide_e == e && (!sum_near || of[8].row == e) ? 0 : n * wide_e;
        REAL *memory = scratch((size_t)(tables + own_d + own_e + near_size) * sizeof(REAL));
        if (!memory) abort();
        REAL *q_r = memory, *g_r = q_r + wide_d * SPAN, *q_t = g_r + wide_e * SPAN, *g_t = q_t + d * SPAN, *dq_t = g_t + e * SPAN;
        REAL *norm = dq_t + d * SPAN, *rest = norm + SPAN, *delta = rest + SPAN, *lost = delta + SPAN, *p_all = lost + SPAN;
        REAL *ds_all = p_all + row * SPAN, *own = ds_all + row * SPAN;
        int32_t at[KEYS];
        uint32_t words[KEYS];
        const strided *const read[] = {of + 2, of + 3};
        const int64_t widths[] = {d, e};
        S(nearby) rows_of = S(nearby_none)(near ? own + own_d + own_e : NULL);
        unsigned mode = subnormals_off();
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t batch = task / g, keys = task % g;
            S(come_near)(&rows_of, read, widths, 2, n, batch, keys);
            const REAL *k = rows_of.at[0], *v = rows_of.at[1];
            const int64_t k_row = rows_of.row[0], v_row = rows_of.row[1];
            const S(sums) dk = S(sums_of)(of + 7, batch, keys, own_d ? own : NULL, n, d, wide_d);
            const S(sums) dv = S(sums_of)(of + 8, batch, keys, own_e ? own + own_d : NULL, n, e, wide_e);
            for (int64_t turn = 0; turn < shared * count; turn++) {
                const int64_t head = keys * shared + turn / count;
                const segment_block *block = segment_block_of(&lists, batch * h + head, turn % count);
                const int32_t *positions = lists.data + block->positions;
                const uint8_t *kept = segment_kept(call, block, batch);
                const REAL *grad = S(head)(of, batch, head), *out = S(head)(of + 4, batch, head);
                const double *lse = double_row(of + 5, batch, head, 0);
                REAL *dq = S(head)(of + 6, batch, head);
                S(segment_queries)(q_t, q_r, wide_d, S(head)(of + 1, batch, head), of[1].row, positions, block->rows, d, (REAL)scale);
                S(segment_queries)(g_t, g_r, wide_e, grad, of->row, positions, block->rows, e, 1);
                memset(dq_t, 0, (size_t)(SPAN * (d + 4)) * sizeof(REAL));
                for (int64_t i = 0; i < block->rows; i++) {
                    S(split)(lse[positions[i] * of[5].row], norm + i, rest + i);
                    delta[i] = (REAL)S(product)(grad + positions[i] * of->row, out + positions[i] * of[4].row, e);
                }
                int64_t done = 0;
                for (const segment_tile *tile = lists.tiles + block->first; tile < lists.tiles + block->end; done += tile++->count) {
                    const int seen = segment_keys(&lists, tile, kept, at, words);
                    if (seen == NOBODY) continue;
                    REAL *p = p_all + done * SPAN, *ds = ds_all + done * SPAN;
                    const int64_t x = tile->half == 2 ? SPAN / 2 : 0;
                    const int64_t queries = tile->half ? SPAN / 2 : SPAN, vectors = queries / LANES;
                    S(segment_scores)(p + x, k, k_row, at, q_t + x, tile->count, d, vectors, 0);
                    S(segment_scores)(ds + x, v, v_row, at, g_t + x, tile->count, e, vectors, 0);
                    if (seen == SOME) S(segment_hide)(p + x, words, x, tile->count, vectors);
                    S(slopes)(p, ds, SPAN, tile->count, x, x + queries, norm, rest, delta, lost);
                }
                done = 0;
                for (const segment_tile *tile = lists.tiles + block->first; tile < lists.tiles + block->end; done += tile++->count) {
                    if (segment_keys(&lists, tile, kept, at, words) == NOBODY) continue;
                    REAL *p = p_all + done * SPAN, *ds = ds_all + done * SPAN;
                    const int64_t x = tile->half == 2 ? SPAN / 2 : 0;
                    const int64_t queries = tile->half ? SPAN / 2 : SPAN, vectors = queries / LANES;
                    S(refine)(ds, p, SPAN, tile->count, x, x + queries, lost);
                    S(segment_values)(dq_t + x, k, k_row, at, ds + x, NULL, tile->count, d, vectors);
                    S(segment_spread)(dk, at, ds + x, q_r + x * wide_d, tile->count, queries, wide_d);
                    S(segment_spread)(dv, at, p + x, g_r + x * wide_e, tile->count, queries, wide_e);
                }
                for (int64_t i = 0; i < SPAN; i++) norm[i] = (REAL)scale;
                S(segment_results)(dq_t, q_t, d, dq, of[6].row, positions, block->rows, norm);
            }
            S(sums_back)(of + 7, batch, keys, dk, n, d);
            S(sums_back)(of + 8, batch, keys, dv, n, e);
        }
        subnormals_back(mode);
        free(memory);
    }
}
#endif
