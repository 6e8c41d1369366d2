/* What the positions of a chunk are to each other, pair by pair; included once per precision by taylor.c.
 *
 * A table [rows][CHUNK] holds one number for each position in a row and position in a lane. `side` says which pairs count: 1 a
 * lane and the rows up to its own (queries in lanes), -1 a lane and the rows from its own on (keys in lanes), 0 all. What lies
 * wholly on the other side, a quarter of the table by blocks of BLOCK, is neither made nor read. */
#define BLOCK (CHUNK / 2)

/* The lanes that the rows of the block around row j meet. */
static inline int64_t S(first_lane)(int64_t j, int side) { return side > 0 ? j / BLOCK * BLOCK : 0; }
static inline int64_t S(end_lane)(int64_t j, int64_t L, int side) { return side < 0 ? min64(L, (j / BLOCK + 1) * BLOCK) : L; }

/* table[j][l] += sum_f xT[f][l] y[j][f] for n rows y of ld numbers, f < K; = if `fresh`. */
static void S(meet)(REAL *table, const REAL *xT, const REAL *y, int64_t ld, int64_t n, int64_t K, int64_t L, int side, int fresh) {
    for (int64_t j = 0, step = side ? BLOCK : CHUNK; j < n; j += step) {
        int64_t l = S(first_lane)(j, side);
        S(mac)(table + j * CHUNK + l, CHUNK, xT + l, CHUNK, y + j * ld, ld, 1, min64(step, n - j), K, S(end_lane)(j, L, side) - l, fresh);
    }
}

/* out[c][l] += sum_j table[j][l] y[j][c] for c < M. */
static void S(gather)(REAL *out, const REAL *table, const REAL *y, int64_t ld, int64_t M, int64_t n, int64_t L, int side) {
    for (int64_t j = 0, step = side ? BLOCK : CHUNK; j < n; j += step) {
        int64_t l = S(first_lane)(j, side);
        S(mac)(out + l, CHUNK, table + j * CHUNK + l, CHUNK, y + j * ld, 1, ld, M, min64(step, n - j), S(end_lane)(j, L, side) - l, 0);
    }
}

/* Which of the lanes from l on see row j. */
static inline VI S(seen)(int64_t j, int64_t l, int side) {
    VI lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return side > 0 ? lane + (int)l >= (int)j : side < 0 ? lane + (int)l <= (int)j : lane >= 0;
}

#define EACH_PAIR(rows, L, side)           \
    for (int64_t j = 0; j < (rows); j++)   \
        for (int64_t l = S(first_lane)(j, side), end = S(end_lane)(j, L, side); l < end; l += LANES)

/* Scores s become p = 1 + s + s^2/2 for the pairs that count, 0 for others. */
static void S(polynomial)(REAL *s, int64_t rows, int64_t L, int side) {
    EACH_PAIR(rows, L, side) {
        VF *x = (VF *)(s + j * CHUNK + l), p = *x + 1;
        *x = (VF)((VI)((p * p + 1) * (REAL)0.5) & S(seen)(j, l, side));
    }
}

/* The same, and u becomes (1 + s) u: the gradient of p becomes that of s, or the change of s becomes that of p. */
static void S(score_gradient)(REAL *s, REAL *u, int64_t rows, int64_t L, int side) {
    EACH_PAIR(rows, L, side) {
        VF *x = (VF *)(s + j * CHUNK + l), *y = (VF *)(u + j * CHUNK + l), p = *x + 1;
        VI seen = S(seen)(j, l, side);
        *y = (VF)((VI)(*y * p) & seen);
        *x = (VF)((VI)((p * p + 1) * (REAL)0.5) & seen);
    }
}

/* Scores s, their change ts, the gradient u of p and its change tu become p, the change of p, the gradient of s and its change. */
static void S(score_second)(REAL *s, REAL *ts, REAL *u, REAL *tu, int64_t rows, int64_t L, int side) {
    EACH_PAIR(rows, L, side) {
        int64_t at = j * CHUNK + l;
        VF p = *(VF *)(s + at) + 1, t = *(VF *)(ts + at), y = *(VF *)(u + at), ty = *(VF *)(tu + at);
        VI seen = S(seen)(j, l, side);
        *(VF *)(s + at) = (VF)((VI)((p * p + 1) * (REAL)0.5) & seen);
        *(VF *)(ts + at) = (VF)((VI)(p * t) & seen);
        *(VF *)(u + at) = (VF)((VI)(p * y) & seen);
        *(VF *)(tu + at) = (VF)((VI)(t * y + p * ty) & seen);
    }
}

#undef EACH_PAIR
#undef BLOCK
