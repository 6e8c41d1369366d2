/* The smaller and the larger of two vectors, and the largest of a column; included once per precision, which has REAL, S(name), VF.
 *
 * least: a < b ? a : b, most: a > b ? a : b, so that b = NaN stays NaN. Compilers do not find the one instruction by themselves. */
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#undef EXTREME
#if defined(__AVX512F__)
#define EXTREME(name, a, b) \
    return sizeof(REAL) == 4 ? (VF)_mm512_##name##_ps((__m512)(a), (__m512)(b)) : (VF)_mm512_##name##_pd((__m512d)(a), (__m512d)(b))
#elif defined(__AVX__)
#define EXTREME(name, a, b) \
    return sizeof(REAL) == 4 ? (VF)_mm256_##name##_ps((__m256)(a), (__m256)(b)) : (VF)_mm256_##name##_pd((__m256d)(a), (__m256d)(b))
#elif defined(__SSE2__)
#define EXTREME(name, a, b) \
    return sizeof(REAL) == 4 ? (VF)_mm_##name##_ps((__m128)(a), (__m128)(b)) : (VF)_mm_##name##_pd((__m128d)(a), (__m128d)(b))
#endif

static inline VF S(least)(VF a, VF b) {
#ifdef EXTREME
    EXTREME(min, a, b);
#else
    const __typeof__(a < b) yes = a < b;
    return (VF)((yes & (__typeof__(yes))a) | (~yes & (__typeof__(yes))b));
#endif
}

static inline VF S(most)(VF a, VF b) {
#ifdef EXTREME
    EXTREME(max, a, b);
#else
    const __typeof__(a > b) yes = a > b;
    return (VF)((yes & (__typeof__(yes))a) | (~yes & (__typeof__(yes))b));
#endif
}

/* The largest of `count` vectors, `row` numbers apart, and of `best`; NaN passes a number by. Four at a time: one depends on the last. */
static inline VF S(largest_of)(const REAL *x, int64_t row, int64_t count, VF best) {
    VF a = best, b = best, c = best, d = best;
    for (; count >= 4; count -= 4, x += 4 * row) {
        a = S(most)(*(const VF *)x, a), b = S(most)(*(const VF *)(x + row), b);
        c = S(most)(*(const VF *)(x + 2 * row), c), d = S(most)(*(const VF *)(x + 3 * row), d);
    }
    for (; count > 0; count--, x += row) a = S(most)(*(const VF *)x, a);
    return S(most)(S(most)(a, b), S(most)(c, d));
}
