/* Small matrix products and transpositions in scratch memory. Included once per precision.
 *
 * Matrices are row-major; columns are padded to whole vectors and rows to whole tiles, so there are no tails. */

#ifndef TILES_ONCE
#define TILES_ONCE
#if VECTOR_BYTES == 64
#define TILE 8 /* rows of one tile: 8 x 2 vectors of sums fit 32 registers, 4 x 2 fit 16 */
#else
#define TILE 4
#endif
/* Says that a vector is wanted in a register: GCC would read the right side again for every row, more loads than there is time for. */
#if defined(__AVX__) && VECTOR_BYTES == 32
#define KEPT(x) __asm__("" : "+x"(x))
#else
#define KEPT(x)
#endif
#define PAD (TILE > 16 ? TILE : 16)

/* Which part of a product of a lower triangle is needed. */
enum { FULL, RESULT_LOWER, LEFT_LOWER, LEFT_UPPER };

static inline int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
#endif

/* c[TILE][vectors] (+)= a[TILE][depth] b[depth][vectors], with a[r][k] at a + r ra + k ca. */
INLINE void S(tile)(const REAL *a, int64_t ra, int64_t ca, const REAL *b, int64_t ldb, REAL *c, int64_t ldc, int64_t depth, int add,
                    const int vectors) {
    VF sum[TILE][2];
#pragma GCC unroll 8
    for (int r = 0; r < TILE; r++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) sum[r][j] = add ? S(load)(c + r * ldc + j * LANES, LANES) : S(all)(0);
    for (int64_t k = 0; k < depth; k++) {
        VF right[2];
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) {
            right[j] = S(load)(b + k * ldb + j * LANES, LANES);
            KEPT(right[j]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < TILE; r++) {
            REAL left = a[r * ra + k * ca];
#pragma GCC unroll 2
            for (int j = 0; j < vectors; j++) sum[r][j] += left * right[j];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < TILE; r++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) S(store)(c + r * ldc + j * LANES, sum[r][j], LANES);
}

INLINE void S(product_rows)(const REAL *a, int64_t ra, int64_t ca, const REAL *b, int64_t ldb, REAL *c, int64_t ldc, int64_t rows,
                            int64_t columns, int64_t depth, int add, int part) {
    for (int64_t i = 0; i < rows; i += TILE) {
        int64_t width = part == RESULT_LOWER ? min64(columns, up(i + TILE, LANES)) : columns;
        int64_t from = part == LEFT_UPPER ? min64(i, depth) : 0, to = part == LEFT_LOWER ? min64(depth, i + TILE) : depth, j = 0;
        const REAL *left = a + i * ra + from * ca, *right = b + from * ldb;
        for (; j + 2 * LANES <= width; j += 2 * LANES) S(tile)(left, ra, ca, right + j, ldb, c + i * ldc + j, ldc, to - from, add, 2);
        if (j < width) S(tile)(left, ra, ca, right + j, ldb, c + i * ldc + j, ldc, to - from, add, 1);
    }
}

/* c (+)= a b with a by rows, */
static void S(times)(const REAL *a, int64_t lda, const REAL *b, int64_t ldb, REAL *c, int64_t ldc, int64_t rows, int64_t columns,
                     int64_t depth, int add, int part) {
    S(product_rows)(a, lda, 1, b, ldb, c, ldc, rows, columns, depth, add, part);
}

/* and c (+)= a^T b, a by rows: rows counts c's rows, which are a's columns. */
static void S(times_left_transposed)(const REAL *a, int64_t lda, const REAL *b, int64_t ldb, REAL *c, int64_t ldc, int64_t rows,
                                     int64_t columns, int64_t depth, int add, int part) {
    S(product_rows)(a, 1, lda, b, ldb, c, ldc, rows, columns, depth, add, part);
}

/* to[j][i] = from[i][j] for i < rows, j < columns, both whole numbers of vectors. */
static void S(transpose)(const REAL *from, int64_t lda, REAL *to, int64_t ldb, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i += LANES)
        for (int64_t j = 0; j < columns; j += LANES) {
            VF x[LANES], y[LANES];
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) x[r] = S(load)(from + (i + r) * lda + j, LANES);
            /* Interleaving the two halves log2(LANES) times is a transposition. */
#pragma GCC unroll 4
            for (int round = 1; round < LANES; round *= 2) {
#pragma GCC unroll 8
                for (int r = 0; r < LANES / 2; r++) {
                    y[2 * r] = SHUFFLE(VI, x[r], x[r + LANES / 2], LOW);
                    y[2 * r + 1] = SHUFFLE(VI, x[r], x[r + LANES / 2], HIGH);
                }
#pragma GCC unroll 16
                for (int r = 0; r < LANES; r++) x[r] = y[r];
            }
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) S(store)(to + (j + r) * ldb + i, x[r], LANES);
        }
}

INLINE REAL S(total)(VF x) {
    REAL t[LANES];
    memcpy(t, &x, sizeof x);
#pragma GCC unroll 4
    for (int w = LANES / 2; w; w /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < w; i++) t[i] += t[i + w];
    return t[0];
}

/* The first `rows` rows of an operand with row stride `stride` into [padded_rows][ld], the rest zero. */
static void S(pack)(const REAL *from, int64_t stride, REAL *to, int64_t ld, int64_t rows, int64_t width, int64_t padded_rows) {
    int64_t full = width / LANES * LANES;
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t j = 0; j < full; j += LANES) S(store)(to + r * ld + j, S(load)(from + r * stride + j, LANES), LANES);
        for (int64_t j = full; j < width; j++) to[r * ld + j] = from[r * stride + j];
        for (int64_t j = width; j < ld; j++) to[r * ld + j] = 0;
    }
    if (padded_rows > rows) memset(to + rows * ld, 0, (size_t)((padded_rows - rows) * ld) * sizeof(REAL));
}

/* The same rows where they are if they lie side by side and need no padding, else packed into `room`; NULL counts as zeros. */
static const REAL *S(packed)(const REAL *from, int64_t stride, REAL *room, int64_t ld, int64_t rows, int64_t width, int64_t padded_rows) {
    if (from && stride == ld && width == ld && rows == padded_rows) return from;
    if (from) S(pack)(from, stride, room, ld, rows, width, padded_rows);
    else memset(room, 0, (size_t)(padded_rows * ld) * sizeof(REAL));
    return room;
}

/* Asks for rows that will be wanted soon. */
static void S(fetch)(const REAL *from, int64_t stride, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < width; j += 64 / (int64_t)sizeof(REAL)) __builtin_prefetch(from + r * stride + j, 0, 2);
}

/* And `rows` rows of a result back. */
static void S(unpack)(const REAL *from, int64_t ld, REAL *to, int64_t stride, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; r++) memcpy(to + r * stride, from + r * ld, (size_t)width * sizeof(REAL));
}
