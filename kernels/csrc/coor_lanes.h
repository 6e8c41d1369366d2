/* Across the lanes of a vector, for rows as they lie: sums, counts, comparisons, and where entries between two numbers are. Included
 * once per precision by coor_rows.h. */

#undef ABOVE
#undef UP_TO
#undef COMPARE
#undef SQUEEZE
#undef ADD_WHERE
#undef ADD_PRODUCT_WHERE

static inline REAL S(total)(VF x) {
#if defined(__AVX512F__)
    return X86(_mm512_reduce_add)((XF)x);
#else
    for (int w = LANES / 2; w; w /= 2)
        for (int l = 0; l < w; l++) x[l] += x[l + w];
    return x[0];
#endif
}

static inline REAL S(largest)(VF x) {
#if defined(__AVX512F__)
    return X86(_mm512_reduce_max)((XF)x);
#else
    REAL best = x[0];
    for (int l = 1; l < LANES; l++) best = x[l] > best ? x[l] : best;
    return best;
#endif
}

#if defined(__AVX512F__)
#define ABOVE(x, cap) COMPARE((XF)(x), (XF)(cap), _CMP_GT_OQ)
#define UP_TO(x, cap) COMPARE((XF)(x), (XF)(cap), _CMP_LE_OQ)
#define ADD_WHERE(a, where, x) (VF)X86(_mm512_mask_add)((XF)(a), where, (XF)(a), (XF)(x))
#define ADD_PRODUCT_WHERE(a, where, x, y) (VF)X86(_mm512_mask3_fmadd)((XF)(x), (XF)(y), (XF)(a), where)
#if WIDE
#define COMPARE _mm512_cmp_pd_mask
#define SQUEEZE _mm512_maskz_compress_epi64
#else
#define COMPARE _mm512_cmp_ps_mask
#define SQUEEZE _mm512_maskz_compress_epi32
#endif
#else
#define ABOVE(x, cap) ((x) > (cap))
#define UP_TO(x, cap) ((x) <= (cap))
#define ADD_WHERE(a, where, x) ((a) + S(keep)(where, x))
#define ADD_PRODUCT_WHERE(a, where, x, y) ((a) + S(keep)(where, x) * (y))
#endif

#if !defined(__AVX512F__) /* whose comparisons give bits */
/* Bit l of the result: mask[l]. */
static inline unsigned S(bits)(VI mask) {
#if defined(__AVX__) && WIDE
    return (unsigned)_mm256_movemask_pd((__m256d)mask);
#elif defined(__AVX__)
    return (unsigned)_mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__) && WIDE
    return (unsigned)_mm_movemask_pd((__m128d)mask);
#elif defined(__SSE2__)
    return (unsigned)_mm_movemask_ps((__m128)mask);
#else
    unsigned found = 0;
    if (S(any)(mask))
        for (int l = 0; l < LANES; l++) found |= mask[l] ? 1u << l : 0;
    return found;
#endif
}
#endif

/* How many entries of a row exceed cap. */
static inline REAL S(count_above)(const VF *x, int64_t width, VF cap) {
#if defined(__AVX512F__)
    VF a = {0}, b = {0}, one = S(splat)(1);
    int64_t i = 0;
    for (; i + 2 <= width; i += 2) a = ADD_WHERE(a, ABOVE(x[i], cap), one), b = ADD_WHERE(b, ABOVE(x[i + 1], cap), one);
    if (i < width) a = ADD_WHERE(a, ABOVE(x[i], cap), one);
    return S(total)(a + b);
#else /* a comparison gives -1 or 0 */
    VI a = {0}, b = {0};
    int64_t i = 0, count = 0;
    for (; i + 2 <= width; i += 2) a -= x[i] > cap, b -= x[i + 1] > cap;
    if (i < width) a -= x[i] > cap;
    a += b;
    for (int l = 0; l < LANES; l++) count += a[l];
    return (REAL)count;
#endif
}

/* Places of the entries of a row with low < x <= high go to list [n + LANES]; returns their number, and in *above how many are
 * higher. If below is not NULL, *below is the sum of the others. */
static inline __attribute__((always_inline)) int64_t S(between)(const VF *x, int64_t width, REAL low, REAL high, INT *list,
                                                                REAL *above, REAL *below) {
    VF floor = S(splat)(low), ceiling = S(splat)(high), sum = {0};
    int64_t count = 0, higher = 0;
#if defined(__AVX512F__)
    VI place = {0};
    for (int l = 0; l < LANES; l++) place[l] = l;
    for (int64_t i = 0; i < width; i++, place += LANES) {
        unsigned up = ABOVE(x[i], floor), over = ABOVE(x[i], ceiling), found = up & ~over;
        if (below) sum = ADD_WHERE(sum, ~up, x[i]);
        *(VI *)(list + count) = (VI)SQUEEZE(found, (__m512i)place);
        count += __builtin_popcount(found), higher += __builtin_popcount(over);
    }
#else
    VI more = {0};
    for (int64_t i = 0; i < width;) { /* bits first: where the next entry lies is foreseen once in 64 places */
        const int64_t first = i * LANES;
        uint64_t found = 0;
        for (int at = 0; at < 64 && i < width; at += LANES, i++) {
            VI up = x[i] > floor, over = x[i] > ceiling;
            if (below) sum += S(keep)(~up, x[i]);
            more -= over;
            found |= (uint64_t)S(bits)(up & ~over) << at;
        }
        for (; found; found &= found - 1) list[count++] = (INT)(first + __builtin_ctzll(found));
    }
    for (int l = 0; l < LANES; l++) higher += more[l];
#endif
    *above = (REAL)higher;
    if (below) *below = S(total)(sum);
    return count;
}
