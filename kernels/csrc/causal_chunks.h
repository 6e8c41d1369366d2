/* The same sums in chunks of CHUNK positions, by products of small matrices: out = tril(q k^T) v + q S, then S += k^T v. A sequence
 * of one chunk needs no S. Included once per kind of number.
 *
 * In scratch memory d and e are padded to dp and ep, rows to whole tiles. Each chunk's part of S is summed by itself, so that a long
 * sequence is as precise as a short one. */

#ifndef CAUSAL_CHUNKS_ONCE
#define CAUSAL_CHUNKS_ONCE
#define CHUNK 64
#endif

typedef struct {
    REAL *q, *k, *kt, *v, *out, *scores, *sum, *more;
} S(chunk_room);

static size_t S(chunk_numbers)(int64_t dp, int64_t ep) { return (size_t)(CHUNK * (3 * dp + 2 * ep + CHUNK) + 2 * dp * ep); }

static S(chunk_room) S(chunk_rooms)(REAL *p, int64_t dp, int64_t ep) {
    S(chunk_room) w = {p, p + CHUNK * dp};
    w.kt = w.k + CHUNK * dp, w.v = w.kt + CHUNK * dp, w.out = w.v + CHUNK * ep, w.scores = w.out + CHUNK * ep;
    w.sum = w.scores + CHUNK * CHUNK, w.more = w.sum + dp * ep;
    return w;
}

/* Rows of numbers where they lie, if they need neither padding nor widening, else in `room` [padded][ld], with zeros around them. */
static const REAL *S(chunk_rows)(const NUM *from, int64_t stride, REAL *room, int64_t ld, int64_t rows, int64_t width, int64_t padded) {
    if (!HALF && stride == ld && width == ld && rows == padded) return (const REAL *)from;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < ld; j += LANES) {
            VF x = {0};
            if (j + LANES <= width) x = S(read)(from + r * stride + j, LANES);
            else if (j < width) x = S(read)(from + r * stride + j, width - j);
            S(store)(room + r * ld + j, x, LANES);
        }
    memset(room + rows * ld, 0, (size_t)((padded - rows) * ld) * sizeof(REAL));
    return room;
}

/* Zeros in place of scores of later keys, as far as a tile of the next product reads. */
static void S(lower)(REAL *scores, int64_t rows) {
    for (int64_t t = 0; t < rows; t++)
        memset(scores + t * CHUNK + t + 1, 0, (size_t)(up(up(t + 1, TILE), LANES) - t - 1) * sizeof(REAL));
}

/* One (batch, group), `part` columns of v and out. One of queries and keys is 1. */
static void S(dot_chunks)(const NUM *q, const NUM *k, const NUM *v, NUM *out, int64_t queries, int64_t keys, int64_t n, int64_t d,
                          int64_t e, int64_t part, int reverse, const S(chunk_room) *w, int64_t dp, int64_t ep) {
    int64_t d_row = reverse ? -d : d, e_row = reverse ? -e : e;
    for (int64_t start = 0; start < n; start += CHUNK) {
        int64_t m = min64(CHUNK, n - start), rows = up(m, PAD), t = reverse ? n - 1 - start : start, last = start + m == n;
        const REAL *qc = NULL;
        for (int64_t s = 0; s < keys; s++) {
            const REAL *kc = S(chunk_rows)(k + (s * n + t) * d, d_row, w->k, dp, m, d, rows);
            const REAL *vc = S(chunk_rows)(v + (s * n + t) * e, e_row, w->v, ep, m, part, rows);
            S(transpose)(kc, dp, w->kt, CHUNK, rows, dp);
            for (int64_t r = 0; r < queries; r++) {
                if (!s) qc = S(chunk_rows)(q + (r * n + t) * d, d_row, w->q, dp, m, d, rows);
                S(times)(qc, dp, w->kt, CHUNK, w->scores, CHUNK, rows, rows, d, 0, RESULT_LOWER);
                S(lower)(w->scores, rows);
                if (!s && start) S(times)(qc, dp, w->sum, ep, w->out, ep, rows, ep, d, 0, FULL);
                S(times)(w->scores, CHUNK, vc, ep, w->out, ep, rows, ep, rows, s || start, LEFT_LOWER);
                if (s < keys - 1) continue;
                for (int64_t i = 0; i < m; i++)
                    for (int64_t j = 0; j < part; j += LANES) {
                        NUM *to = out + (r * n + t) * e + i * e_row + j;
                        VF x = S(load)(w->out + i * ep + j, LANES);
                        if (j + LANES <= part) S(write)(to, x, LANES);
                        else S(write)(to, x, part - j);
                    }
            }
            if (!last) S(times_left_transposed)(kc, dp, vc, ep, w->more, ep, dp, ep, m, s > 0, FULL);
        }
        if (last) break;
        for (int64_t i = 0; i < dp * ep; i += LANES) {
            VF x = S(load)(w->more + i, LANES);
            S(store)(w->sum + i, start ? S(load)(w->sum + i, LANES) + x : x, LANES);
        }
    }
}
