/* Rows of numbers as they lie in memory, for the gated recurrences. Included once per kind of number, after gate_lanes.h.
 *
 * NUM is REAL itself or, with HALF, bfloat16: the upper half of a float. Sums and states are REAL in every case. */

#if HALF
#if VECTOR_BYTES == 64 || defined(__AVX2__) || (VECTOR_BYTES == 16 && defined(__SSE2__))
#include <immintrin.h>
#endif
/* Halves to the upper halves of words, zeros below; and back. Intrinsics where GCC does not find the instruction by itself. */
#if VECTOR_BYTES == 64
#define WIDEN(x, words) (words) _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)(x)), 16)
#define NARROW(x, halves) (halves) _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)(x), 16))
#elif defined(__AVX2__)
#define WIDEN(x, words) (words) _mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)(x)), 16)
#define PACKED(x) _mm256_packs_epi32(x, x)
#define NARROW(x, halves) \
    (halves) _mm256_castsi256_si128(_mm256_permute4x64_epi64(PACKED(_mm256_srai_epi32((__m256i)(x), 16)), 0x08))
#elif VECTOR_BYTES == 16 && defined(__SSE2__)
#define WIDEN(x, words) (words) _mm_unpacklo_epi16(_mm_setzero_si128(), (__m128i){(long long)(x), 0})
#define PACKED(x) _mm_packs_epi32(x, x)
#define NARROW(x, halves) (halves)(PACKED(_mm_srai_epi32((__m128i)(x), 16))[0])
#else
#define WIDEN(x, words) (__builtin_convertvector(x, words) << 16)
#define NARROW(x, halves) __builtin_convertvector((x) >> 16, halves)
#endif
typedef uint16_t S(halves) __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2)));
typedef uint32_t S(words) __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));
#undef ONE
#define ONE 0x3F80

/* bfloat16 in the upper half of each word: to the nearest, from the middle to the even one; NaN stays NaN. */
INLINE S(words) S(rounded)(VF x) {
    S(words) u = (S(words))x;
    return (u + 0x7FFF + ((u >> 16) & 1)) | (S(words))(x != x);
}

INLINE VF S(read)(const NUM *p, int64_t count) {
    S(halves) x = {0};
    if (count == LANES) x = *(const S(halves) *)p;
    else memcpy(&x, p, (size_t)count * sizeof(NUM));
    return (VF)WIDEN(x, S(words));
}

INLINE void S(write)(NUM *p, VF x, int64_t count) {
    S(halves) y = NARROW(S(rounded)(x), S(halves));
    if (count == LANES) *(S(halves) *)p = y;
    else memcpy(p, &y, (size_t)count * sizeof(NUM));
}

/* A pair is one word: its parts need no shuffle, only a shift and a mask. */
INLINE S(pair) S(read_pairs)(const NUM *p, int64_t count) {
    S(words) x = {0};
    if (count == LANES) x = *(const S(words) *)p;
    else memcpy(&x, p, 2 * (size_t)count * sizeof(NUM));
    return (S(pair)){(VF)(x << 16), (VF)(x & 0xFFFF0000)};
}

INLINE void S(write_pairs)(NUM *p, VF re, VF im, int64_t count) {
    S(words) x = (S(rounded)(re) >> 16) | (S(rounded)(im) & 0xFFFF0000);
    if (count == LANES) *(S(words) *)p = x;
    else memcpy(p, &x, 2 * (size_t)count * sizeof(NUM));
}
#else
#undef ONE
#define ONE 1
INLINE VF S(read)(const NUM *p, int64_t count) { return S(load)(p, count); }
INLINE void S(write)(NUM *p, VF x, int64_t count) { S(store)(p, x, count); }
INLINE S(pair) S(read_pairs)(const NUM *p, int64_t count) { return S(load_pairs)(p, count); }
INLINE void S(write_pairs)(NUM *p, VF re, VF im, int64_t count) { S(store_pairs)(p, re, im, count); }
#endif
