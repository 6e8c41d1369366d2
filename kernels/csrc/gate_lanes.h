/* Vectors of REAL for the gated recurrences: partial loads, pairs, exp, the gates. Included once per precision.
 *
 * Needs REAL, S, VF, LANES and WIDE (1 for double). Only GCC/Clang vector extensions. */

#ifndef FNATTN_GATE_LANES_ONCE
#define FNATTN_GATE_LANES_ONCE

#if VECTOR_BYTES == 32
#include <immintrin.h>
#endif

typedef int32_t vi32 __attribute__((vector_size(VECTOR_BYTES), aligned(4)));
typedef int64_t vi64 __attribute__((vector_size(VECTOR_BYTES), aligned(8)));

/* Lane numbers for: the even and odd lanes of two vectors, and the lower and upper halves of two vectors interleaved. */
#define EVEN_2 0, 2
#define ODD_2 1, 3
#define LOW_2 0, 2
#define HIGH_2 1, 3
#define EVEN_4 0, 2, 4, 6
#define ODD_4 1, 3, 5, 7
#define LOW_4 0, 4, 1, 5
#define HIGH_4 2, 6, 3, 7
#define EVEN_8 0, 2, 4, 6, 8, 10, 12, 14
#define ODD_8 1, 3, 5, 7, 9, 11, 13, 15
#define LOW_8 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_8 4, 12, 5, 13, 6, 14, 7, 15
#define EVEN_16 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD_16 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define LOW_16 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_16 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31

#define INLINE static inline __attribute__((always_inline))

/* Vectors of gates made side by side where registers are narrow; one of the widest is work enough. */
#define ABREAST (VECTOR_BYTES == 64 ? 1 : 4)

/* Channels of one task: `most`, or fewer, whole cache lines, if that leaves threads without a task. */
static inline int64_t task_channels(int64_t b, int64_t c, int64_t threads, int64_t most) {
    int64_t parts = b ? (threads + b - 1) / b : 1, blocks = (c + most - 1) / most;
    return !c || blocks >= parts ? most : min64(most, ((c + parts - 1) / parts + 63) / 64 * 64);
}
#endif

#if WIDE
#define VI vi64
#define INT int64_t
#else
#define VI vi32
#define INT int32_t
#endif

#undef EVEN
#undef ODD
#undef LOW
#undef HIGH
#if LANES == 16
#define EVEN EVEN_16
#define ODD ODD_16
#define LOW LOW_16
#define HIGH HIGH_16
#elif LANES == 8
#define EVEN EVEN_8
#define ODD ODD_8
#define LOW LOW_8
#define HIGH HIGH_8
#elif LANES == 4
#define EVEN EVEN_4
#define ODD ODD_4
#define LOW LOW_4
#define HIGH HIGH_4
#else
#define EVEN EVEN_2
#define ODD ODD_2
#define LOW LOW_2
#define HIGH HIGH_2
#endif

/* `count` is a constant LANES everywhere but in the last vector of a row. Whole vectors are moved as such: of a memcpy GCC
 * makes two halves through the stack where it is not told -march=native, three times slower. */
INLINE VF S(load)(const REAL *p, int64_t count) {
    if (count == LANES) return *(const VF *)p;
    VF x = {0};
    memcpy(&x, p, (size_t)count * sizeof(REAL));
    return x;
}

INLINE void S(store)(REAL *p, VF x, int64_t count) {
    if (count == LANES) *(VF *)p = x;
    else memcpy(p, &x, (size_t)count * sizeof(REAL));
}

typedef struct {
    VF re, im;
} S(pair);

/* `count` complex numbers stored as (re, im), (re, im), ... */
INLINE S(pair) S(load_pairs)(const REAL *p, int64_t count) {
    VF two[2] = {{0}, {0}};
    if (count == LANES) two[0] = *(const VF *)p, two[1] = *(const VF *)(p + LANES);
    else memcpy(two, p, 2 * (size_t)count * sizeof(REAL));
#if VECTOR_BYTES == 32
    /* Halves first: they come from memory in place, where lanes taken across a whole register are slow. */
#if WIDE
    VF low = SHUFFLE(VI, two[0], two[1], 0, 1, 4, 5), high = SHUFFLE(VI, two[0], two[1], 2, 3, 6, 7);
    return (S(pair)){SHUFFLE(VI, low, high, 0, 4, 2, 6), SHUFFLE(VI, low, high, 1, 5, 3, 7)};
#else
    VF low = SHUFFLE(VI, two[0], two[1], 0, 1, 2, 3, 8, 9, 10, 11), high = SHUFFLE(VI, two[0], two[1], 4, 5, 6, 7, 12, 13, 14, 15);
    return (S(pair)){SHUFFLE(VI, low, high, 0, 2, 8, 10, 4, 6, 12, 14), SHUFFLE(VI, low, high, 1, 3, 9, 11, 5, 7, 13, 15)};
#endif
#else
    return (S(pair)){SHUFFLE(VI, two[0], two[1], EVEN), SHUFFLE(VI, two[0], two[1], ODD)};
#endif
}

INLINE void S(store_pairs)(REAL *p, VF re, VF im, int64_t count) {
    VF two[2] = {SHUFFLE(VI, re, im, LOW), SHUFFLE(VI, re, im, HIGH)};
    if (count == LANES) *(VF *)p = two[0], *(VF *)(p + LANES) = two[1];
    else memcpy(p, two, 2 * (size_t)count * sizeof(REAL));
}

INLINE VF S(all)(REAL x) { return (VF){0} + x; }

INLINE VF S(select)(VI mask, VF yes, VF no) { return (VF)(((VI)yes & mask) | ((VI)no & ~mask)); }

/* exp(x) for x <= 0 to about one unit in the last place; below the smallest normal number it stays there. Without `careful`
 * x must not be as low as that. */
INLINE VF S(exp_down)(VF x, const int careful) {
#if WIDE
    const REAL floor_at = -708.0, magic = 6755399441055744.0, ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
#else
    const REAL floor_at = -87.0f, magic = 12582912.0f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
#endif
    if (careful) x = S(select)(x < floor_at, S(all)(floor_at), x);
    VF shifted = x * (REAL)1.44269504088896340736 + magic; /* the integer nearest to x / ln 2 sits in the low bits */
    VF n = shifted - magic;
    VF r = x - n * ln2_high - n * ln2_low, r2 = r * r;
    /* Taylor's series in pairs: short chains of dependent products. */
    VF y = (r * (REAL)(1.0 / 5040.0) + (REAL)(1.0 / 720.0)) * r2 + (r * (REAL)(1.0 / 120.0) + (REAL)(1.0 / 24.0));
#if WIDE
    VF top = (r * (1.0 / 6227020800.0) + 1.0 / 479001600.0) * r2 + (r * (1.0 / 39916800.0) + 1.0 / 3628800.0);
    top = top * r2 + (r * (1.0 / 362880.0) + 1.0 / 40320.0);
    y += top * (r2 * r2);
#endif
    y = y * (r2 * r2) + ((r * (REAL)(1.0 / 6.0) + (REAL)0.5) * r2 + (r + (REAL)1));
    return (VF)((VI)y + ((VI)shifted << (WIDE ? 52 : 23)));
}

/* x^-1/2 for normal x > 0: a guess from the exponent, then Newton steps. Neither compiler's vector types have a sqrt.
 * Where there is an instruction for the guess, that: less than half the operations. */
INLINE VF S(inverse_root)(VF x) {
#if WIDE
    VF y = (VF)(0x5FE6EB50C7B537A9 - ((VI)x >> 1));
    VF half = x * 0.5;
    for (int i = 0; i < 4; i++) y = y * (1.5 - half * y * y);
    return y + 0.5 * y * (1.0 - x * y * y);
#elif VECTOR_BYTES == 32
    VF y = (VF)_mm256_rsqrt_ps((__m256)x), rest = 1.0f - x * y * y; /* twelve bits, and two terms of the series of (1 - rest)^-1/2 */
    return y + y * rest * (0.375f * rest + 0.5f);
#else
    VF y = (VF)(0x5F375A86 - ((VI)x >> 1));
    VF half = x * 0.5f;
    for (int i = 0; i < 2; i++) y = y * (1.5f - half * y * y);
    return y + 0.5f * y * (1.0f - x * y * y);
#endif
}

/* 1 / (1 + exp(-x)), right to the last places at both ends. */
INLINE VF S(sigmoid)(VF x) {
    VI sign = x < (REAL)0;
    VF e = S(exp_down)(S(select)(sign, x, -x), 1), inverse = (REAL)1 / ((REAL)1 + e);
    return S(select)(sign, e * inverse, inverse);
}

/* The complex gate alpha = size (ux + i uy), size = sigmoid(|a|), (ux, uy) = a / |a|, inverse = 1 / |a|.
 *
 * `careful`: any a. |a| < 2^-100 counts as 0: direction (1, 0), and `inverse`, through which alone the direction's derivative
 * goes, is 0. Squares of the other tiny and of huge numbers are taken after a scaling by a power of two.
 * Otherwise: a in the ordinary range, and lanes where it is not are marked in *odd. */
typedef struct {
    VF ux, uy, size, inverse;
} S(gate);

INLINE S(gate) S(careful_gate)(S(pair) a) {
#if WIDE
    const REAL low = 0, up = 1, high = 0x1p1000, down = 0x1p-600, up_again = 0x1p600, none = 0x1p-200;
#else
    const REAL low = 0x1p-100f, up = 0x1p80f, high = 0x1p100f, down = 0x1p-80f, up_again = 0x1p80f, none = 0x1p-40f;
#endif
    S(gate) g;
    VF square = a.re * a.re + a.im * a.im;
    VI tiny = square < low, huge = square > high;
    VF scale = S(select)(tiny, S(all)(up), S(select)(huge, S(all)(down), S(all)(1)));
    VF back = S(select)(tiny, S(all)((REAL)1 / up), S(select)(huge, S(all)(up_again), S(all)(1)));
    VF x = a.re * scale, y = a.im * scale;
    square = x * x + y * y;
    VI zero = square < none;
    square = S(select)(zero, S(all)(1), square);
    VF root = S(inverse_root)(square);
    g.ux = S(select)(zero, S(all)(1), x * root);
    g.uy = S(select)(zero, S(all)(0), y * root);
    g.inverse = S(select)(zero, S(all)(0), root * scale);
    VF length = S(select)(zero, S(all)(0), square * root * back);
    g.size = (REAL)1 / ((REAL)1 + S(exp_down)(-length, 1));
    return g;
}

/* Several at a time, stage by stage: one gate is a chain of some thirty dependent operations, and the processor looks ahead over too
 * few of the next vectors' to keep busy. */
INLINE void S(make_gates)(const S(pair) *a, S(gate) *g, const int careful, VI *odd, const int vectors) {
    const REAL far = WIDE ? 490000 : 6400;
    VF square[ABREAST];
    if (careful) {
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) g[i] = S(careful_gate)(a[i]);
        return;
    }
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i++) {
        square[i] = a[i].re * a[i].re + a[i].im * a[i].im;
        *odd |= (square[i] < (REAL)0x1p-100) | ~(square[i] < far); /* nan is odd */
        g[i].inverse = S(inverse_root)(square[i]);
        g[i].ux = a[i].re * g[i].inverse, g[i].uy = a[i].im * g[i].inverse;
    }
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i++) g[i].size = (REAL)1 / ((REAL)1 + S(exp_down)(-square[i] * g[i].inverse, 0));
}

INLINE S(gate) S(make_gate)(S(pair) a, const int careful, VI *odd) {
    S(gate) g;
    S(make_gates)(&a, &g, careful, odd, 1);
    return g;
}

INLINE int S(any)(VI mask) {
    int64_t part[VECTOR_BYTES / 8], all = 0;
    memcpy(part, &mask, sizeof mask);
    for (int i = 0; i < VECTOR_BYTES / 8; i++) all |= part[i];
    return all != 0;
}
