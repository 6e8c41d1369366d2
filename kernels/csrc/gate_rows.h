/* Rows of numbers as they lie in memory, for the gated recurrences. Included once per kind of number, after gate_lanes.h.
 *
 * NUM is REAL itself or, with HALF, bfloat16: the upper half of a float. Sums and states are REAL in every case. */

#if HALF
#include "halves.h"
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
#if defined(__AVX512BF16__) && VECTOR_BYTES == 64
    S(halves) y = (S(halves))_mm512_cvtneps_pbh((__m512)x);
#else
    S(halves) y = NARROW(S(rounded)(x), S(halves));
#endif
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
