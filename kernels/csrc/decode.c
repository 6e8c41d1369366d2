/* Softmax attention of a few queries over keys in two places: the first `first` of m in k, v and the others in k_late, v_late.
 *
 *     out_i = sum_j p_ij v_j        p_ij = exp(scale q_i . k_j) / sum over visible j of exp(scale q_i . k_j)
 *
 * q [b, h, n, d], k [b, g, room, d], v [b, g, room, e], k_late [b, g, late, d], v_late [b, g, late, e], out [b, h, n, e],
 * contiguous. mask: bytes [b, h, n, m] with strides (sb, sh, sn, 1), or NULL. Key j is seen if j <= start + i; 0 for a query that
 * sees no key.
 *
 * Keys and values are read once for all queries of a key head, in blocks that stay in the first cache. One task is a key head;
 * the lanes of a vector lie along the channels, so a single query fills them. */
#ifndef PRECISION
#define PRECISION 32
#include "decode.c"
#undef PRECISION
#define PRECISION 64
#include "decode.c"
#else
#include "softmax_tile.h"
#include "lanes.h"
#include "decode_rows.h"

/* Scores to weights that add up to 1, or all 0 if none is above -infinity. `count` is a multiple of LANES. */
static void S(normalise)(REAL *p, int64_t count) {
    VF best = *(VF *)p, total = {0};
    for (int64_t j = LANES; j < count; j += LANES) best = S(select)(*(VF *)(p + j) > best, *(VF *)(p + j), best);
    REAL top = best[0];
    for (int i = 1; i < LANES; i++) top = best[i] > top ? best[i] : top;
    if (top == -(REAL)INFINITY) {
        memset(p, 0, (size_t)count * sizeof(REAL));
        return;
    }
    for (int64_t j = 0; j < count;) {
        VF sum = {0};
        for (int64_t stop = min64(count, j + KEYS); j < stop; j += LANES) sum += *(VF *)(p + j) = S(exponential)(*(VF *)(p + j) - top);
        total += sum;
    }
    const REAL part = (REAL)1 / S(add_lanes)(total);
    for (int64_t j = 0; j < count; j += LANES) *(VF *)(p + j) *= part;
}

int S(try_decode)(const REAL *q, const REAL *k, const REAL *v, const REAL *k_late, const REAL *v_late, const uint8_t *mask,
                  REAL *out, int64_t b, int64_t h, int64_t g, int64_t n, int64_t d, int64_t e, int64_t room, int64_t late,
                  int64_t first, int64_t m, int64_t sb, int64_t sh, int64_t sn, int64_t start, int64_t threads, double scale) {
    const int64_t r = h / g, rows = r * n, row = (m + LANES - 1) / LANES * LANES;
    int failed = 0;
    memset(out, 0, (size_t)(b * h * n * e) * sizeof(REAL));
    if (!rows || !m) return 0;
#pragma omp parallel num_threads((int)min64(threads, b * g)) if (threads > 1 && b * g > 1)
    {
        REAL *scores = scratch((size_t)(rows * row) * sizeof(REAL));
        if (!scores) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < b * g; task++) {
            if (!scores) continue;
            const REAL *q_t = q + task * rows * d;
            REAL *out_t = out + task * rows * e;
            for (int64_t j = 0, stop; j < m; j = stop) {
                stop = min64(j + KEYS, j < first ? first : m);
                const REAL *k_j = j < first ? k + (task * room + j) * d : k_late + (task * late + j - first) * d;
                for (int64_t i = 0; i < rows; i++) S(score_keys)(q_t + i * d, k_j, stop - j, d, (REAL)scale, scores + i * row + j);
            }
            for (int64_t i = 0; i < rows; i++) {
                REAL *p = scores + i * row;
                const int64_t head = task % g * r + i / n, end = max64(0, min64(m, start + i % n + 1));
                const uint8_t *seen = mask ? mask + task / g * sb + head * sh + i % n * sn : NULL;
                for (int64_t j = end; j < row; j++) p[j] = -(REAL)INFINITY;
                if (seen)
                    for (int64_t j = 0; j < end; j++) p[j] = seen[j] ? p[j] : -(REAL)INFINITY;
                S(normalise)(p, row);
            }
            for (int64_t j = 0, stop; j < m; j = stop) {
                stop = min64(j + KEYS, j < first ? first : m);
                const REAL *v_j = j < first ? v + (task * room + j) * e : v_late + (task * late + j - first) * e;
                for (int64_t i = 0; i < rows; i++) S(sum_values)(out_t + i * e, scores + i * row + j, v_j, stop - j, e);
            }
        }
        free(scores);
    }
    return failed;
}
#endif
