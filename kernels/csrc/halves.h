/* bfloat16 is the upper half of a float: vectors of halves to vectors of words, zeros below, and back. Intrinsics where GCC does not
 * find the instruction by itself. */
#ifndef FNATTN_HALVES_H
#define FNATTN_HALVES_H
#if VECTOR_BYTES == 64 || defined(__AVX2__) || (VECTOR_BYTES == 16 && defined(__SSE2__))
#include <immintrin.h>
#endif
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
#endif
