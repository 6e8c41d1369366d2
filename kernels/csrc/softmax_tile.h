/* A tile of softmax attention: a block of queries, which lie along the vector lanes, times a block of keys.
 *
 * Tiles and sums are stored [key or channel][query], with rows of WIDTH queries. So only the queries of a block are transposed,
 * once, while keys and values are read as they are, one scalar for all queries. Included once per precision, with PRECISION 32
 * or 64; defines REAL, S(name), VF, LANES, WIDTH and static functions of that precision. */
#include "common.h"
#include "softmax_call.h"

#ifndef KEYS
#define KEYS 64 /* keys in a tile */
#endif

#undef REAL
#undef S
#undef VF
#undef LANES
#undef INT
#undef FRACTION_BITS
#undef ROUNDER
#undef LOWEST
#undef WIDTH
#if PRECISION == 32
#define REAL float
#define S(x) PASTE(fnattn_, x, _, f32)
#define VF vf32
#define LANES LANES_f32
#define INT int32_t
#define FRACTION_BITS 23
#define ROUNDER 12583039.0f /* 1.5 * 2^23 + 127: adding it rounds to an integer; the low bits then hold that and an exponent's bias */
#define LOWEST -88.0296919f /* -127 log 2 */
#else
#define REAL double
#define S(x) PASTE(fnattn_, x, _, f64)
#define VF vf64
#define LANES LANES_f64
#define INT int64_t
#define FRACTION_BITS 52
#define ROUNDER 6755399441056767.0
#define LOWEST -709.08956571282406
#endif
#define WIDTH (4 * LANES)

typedef INT S(ints) __attribute__((vector_size(VECTOR_BYTES)));

static inline VF S(select)(S(ints) yes, VF a, VF b) { return (VF)((yes & (S(ints))a) | (~yes & (S(ints))b)); }

static inline int S(any)(S(ints) yes) {
    INT found = 0;
    for (int i = 0; i < LANES; i++) found |= yes[i];
    return found != 0;
}

#if !defined(HAVE_SHUFFLE) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAVE_SHUFFLE
#endif
#endif
#include "square.h"
#include "extremes.h"
#include "head_rows.h"

/* exp of what is not far above 0, as 2^(j + r) with |r| <= 1/2; 0 from LOWEST down, where the bits of 2^j are all 0. In float32 off by
 * 4e-8 (2 + |x|) of itself, twice that without fused multiply-adds: nothing that a sum of weights up to 1 would notice. */
static inline VF S(exponential)(VF x) {
#if PRECISION == 32
    static const float factor[] = {1.5356861e-4f, 1.3398959e-3f, 9.618423e-3f, 5.5503324e-2f, 2.4022648e-1f, 6.931472e-1f, 1}; /* minimax */
#else
    static const double factor[] = {1.3691488853904128e-12, 2.5678435993488206e-11, 4.4455382718708116e-10, 7.0549116208011233e-9,
                                    1.0178086009239699e-7, 1.3215486790144309e-6, 1.5252733804059841e-5, 1.5403530393381609e-4,
                                    1.3333558146428443e-3, 9.6181291076284771e-3, 5.5504108664821580e-2, 2.4022650695910072e-1,
                                    6.9314718055994531e-1, 1}; /* (log 2)^i / i! */
#endif
    const REAL log2_e = (REAL)1.44269504088896340736;
    x = S(most)((VF){0} + (REAL)LOWEST, x);
    const VF shifted = x * log2_e + (REAL)ROUNDER, r = x * log2_e - (shifted - (REAL)ROUNDER);
    VF sum = (VF){0} + factor[0];
    for (int i = 1; i < (int)(sizeof factor / sizeof *factor); i++) sum = sum * r + factor[i];
    return (VF)((S(ints))shifted << FRACTION_BITS) * sum;
}

/* exp(score - level), level a row's log-sum-exp. A level in the hundreds, rounded, would be an error in all weights of the row: so it
 * is two numbers, the second what the first lacks. */
static inline VF S(weight)(VF score, const REAL *level, const REAL *rest) {
    return S(exponential)((score - *(const VF *)level) - *(const VF *)rest);
}

/* level and rest of row i. */
static inline void S(split)(double lse, REAL *level, REAL *rest) {
    *level = (REAL)lse;
    *rest = (REAL)(lse - (double)*level);
}

/* The gradient of a row's scores has the sum 0, which rounding takes from it: the more, the more of the weight one key has, for
 * there g . v_j - delta cancels, and delta = g . out is as exact as `out` was stored. So a row is walked twice. First, for queries
 * x .. end of a tile with rows of `row`: scores p become weights, slopes g . v_j in ds become p (g . v_j - delta), and `lost` is what
 * these add up to. Then `refine` takes that back from all weights: as if delta had been the sum of p_j g . v_j, with twice the digits. */
static inline void S(slopes)(REAL *p, REAL *ds, int64_t row, int64_t count, int64_t x, int64_t end, const REAL *level, const REAL *rest,
                             const REAL *delta, REAL *lost) {
    for (; x < end; x += LANES) {
        const VF delta_x = *(const VF *)(delta + x);
        VF total = {0};
        for (int64_t j = x; j < x + count * row; j += row) {
            const VF p_j = *(VF *)(p + j) = S(weight)(*(VF *)(p + j), level + x, rest + x);
            total += *(VF *)(ds + j) = p_j * (*(VF *)(ds + j) - delta_x);
        }
        *(VF *)(lost + x) += total;
    }
}

static inline void S(refine)(REAL *ds, const REAL *p, int64_t row, int64_t count, int64_t x, int64_t end, const REAL *lost) {
    for (int64_t j = 0; j < count * row; j += row)
        for (int64_t y = x; y < end; y += LANES) *(VF *)(ds + j + y) -= *(const VF *)(p + j + y) * *(const VF *)(lost + y);
}

/* x . y, added up in the order in which `multiply` does. */
static inline REAL S(product)(const REAL *x, const REAL *y, int64_t count) {
    REAL sum = 0;
    for (int64_t c = 0; c < count; c++) sum += x[c] * y[c];
    return sum;
}

/* c[r][0 .. X vectors) = (more: +=) sum_k a[r * row + k * column] b[k][..] for the R rows from i on, as many sums in registers. Each
 * sum starts at zero and is added as a whole: of a long row of tiles, errors grow with a tile's keys and with the tiles, not both. */
#define MULTIPLY(R, X)                                                                                                      \
    for (; i + R <= rows; i += R) {                                                                                         \
        VF sum[R][X];                                                                                                       \
        for (int r = 0; r < R; r++)                                                                                         \
            for (int x = 0; x < X; x++) sum[r][x] = (VF){0};                                                                \
        for (int64_t k = 0; k < inner; k++) {                                                                               \
            VF b_k[X];                                                                                                      \
            for (int x = 0; x < X; x++) b_k[x] = ((const VF *)(b + k * b_row))[x];                                          \
            for (int r = 0; r < R; r++)                                                                                     \
                for (int x = 0; x < X; x++) sum[r][x] += a[(i + r) * row + k * column] * b_k[x];                            \
        }                                                                                                                   \
        for (int r = 0; r < R; r++)                                                                                         \
            for (int x = 0; x < X; x++) {                                                                                   \
                VF *c_r = (VF *)(c + (i + r) * c_row) + x;                                                                  \
                *c_r = more ? *c_r + sum[r][x] : sum[r][x];                                                                 \
            }                                                                                                               \
    }

/* Sums that fit the registers: 32 vectors with AVX-512, 16 else. */
#if VECTOR_BYTES == 64
#define WIDEST 4
#define MANY_ROWS(X) (X == 4 ? 6 : 12)
#else
#define WIDEST 2
#define MANY_ROWS(X) (X == 2 ? 6 : 8)
#endif

#define COLUMNS(X)                                             \
    for (; vectors >= X; vectors -= X, c += X * LANES, b += X * LANES) { \
        int64_t i = 0;                                         \
        MULTIPLY(MANY_ROWS(X), X)                              \
        MULTIPLY(4, X)                                         \
        MULTIPLY(1, X)                                         \
    }

/* c [rows][vectors] = (more: +=) a [rows][inner] b [inner][vectors]; the rows of c and b start c_row and b_row numbers apart. */
static void S(multiply)(REAL *restrict c, int64_t c_row, const REAL *restrict a, int64_t row, int64_t column,
                        const REAL *restrict b, int64_t b_row, int64_t rows, int64_t inner, int64_t vectors, int more) {
#if WIDEST == 4
    COLUMNS(4)
#endif
    COLUMNS(2)
    COLUMNS(1)
}

/* Products of keys k, whose rows lie k_row apart, with queries x .. WIDTH of a block: p [count][WIDTH] = (more: +=) k q_t. */
static inline void S(scores)(REAL *p, const REAL *k, int64_t k_row, const REAL *q_t, int64_t count, int64_t d, int64_t x, int more) {
    S(multiply)(p + x, WIDTH, k, k_row, 1, q_t + x, WIDTH, count, d, (WIDTH - x) / LANES, more);
}

/* Sums over keys for queries x .. WIDTH: acc [e][WIDTH] += v^T p. */
static inline void S(values)(REAL *acc, const REAL *v, int64_t v_row, const REAL *p, int64_t count, int64_t e, int64_t x) {
    S(multiply)(acc + x, WIDTH, v, 1, v_row, p + x, WIDTH, e, count, (WIDTH - x) / LANES, 1);
}

/* Sums over queries x .. rows: dk += p q_r, with the queries in the rows of q_r [WIDTH][wide]. */
static inline void S(keys)(REAL *dk, int64_t dk_row, const REAL *p, const REAL *q_r, int64_t wide, int64_t count, int64_t rows,
                           int64_t x) {
    S(multiply)(dk, dk_row, p + x, WIDTH, 1, q_r + x * wide, wide, count, rows - x, wide / LANES, 1);
}

/* t [d][WIDTH] times a number. */
static inline void S(times)(REAL *t, int64_t d, REAL factor) {
    for (int64_t c = 0; c < d * WIDTH; c += LANES) *(VF *)(t + c) *= factor;
}

/* factor x into the columns of t [d][WIDTH], the rest zeros, and, if there is a place, into the rows of r [WIDTH][wide]. */
static void S(queries)(REAL *t, REAL *r, int64_t wide, const REAL *x, int64_t x_row, int64_t rows, int64_t d, REAL factor) {
    if (rows < WIDTH) memset(t, 0, (size_t)(WIDTH * d) * sizeof(REAL));
    S(turn)(t, WIDTH, x, x_row, rows, d);
    if (factor != 1) S(times)(t, d, factor);
    if (!r) return;
    if (wide > d) memset(r, 0, (size_t)(WIDTH * wide) * sizeof(REAL));
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < d; c++) r[i * wide + c] = factor * x[i * x_row + c];
}

/* The rows of one head of a tensor, or NULL. */
static inline REAL *S(head)(const strided *t, int64_t batch, int64_t head) {
    return t->address ? (REAL *)(intptr_t)t->address + batch * t->batch + head * t->head : NULL;
}

/* -infinity over what may not be seen in a tile of `count` keys by queries x .. rows: key j by the first `hidden` + j queries, and
 * what the mask says; its rows, one per query, are `stride` apart. */
static inline void S(hide)(REAL *tile, int64_t x, int64_t rows, int64_t count, int64_t hidden, const uint8_t *mask, int64_t stride) {
    for (int64_t j = 0; j < count; j++, tile += WIDTH) {
        for (int64_t i = x; i < min64(WIDTH, hidden + j); i++) tile[i] = -INFINITY;
        if (mask && stride)
            for (int64_t i = x; i < rows; i++) tile[i] = mask[i * stride + j] ? tile[i] : -INFINITY;
        else if (mask && !mask[j])
            for (int64_t i = x; i < WIDTH; i++) tile[i] = -INFINITY;
    }
}

/* Where sums over queries, a row per key, are taken. */
typedef struct {
    REAL *at;
    int64_t row;
} S(sums);

/* Zeros for the rows of one head of a result: the rows themselves, or `own`, whose rows are as wide as whole vectors. */
static inline S(sums) S(sums_of)(const strided *t, int64_t batch, int64_t head, REAL *own, int64_t rows, int64_t d, int64_t wide) {
    const S(sums) found = {own ? own : S(head)(t, batch, head), own ? wide : t->row};
    for (int64_t j = 0; j < rows; j++) memset(found.at + j * found.row, 0, (size_t)(own ? wide : d) * sizeof(REAL));
    return found;
}

/* The sums into the result, if they are not there already. */
static inline void S(sums_back)(const strided *t, int64_t batch, int64_t head, S(sums) sums, int64_t rows, int64_t d) {
    REAL *to = S(head)(t, batch, head);
    for (int64_t j = 0; j < rows && sums.at != to; j++) memcpy(to + j * t->row, sums.at + j * sums.row, (size_t)d * sizeof(REAL));
}
