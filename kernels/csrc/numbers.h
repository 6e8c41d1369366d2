/* Numbers that kernels read where they lie and compute with as REAL. Included after lanes.h once per kind NUM of them: REAL itself or,
 * with HALF, bfloat16. Names of what depends on the kind are R(name), of the rest S(name). */
#if HALF
#include "halves.h"
typedef uint16_t R(halves) __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2)));
typedef uint32_t R(words) __attribute__((vector_size(VECTOR_BYTES), aligned(4)));
static inline VF R(several)(const NUM *x) { return (VF)WIDEN(*(const R(halves) *)x, R(words)); }
static inline REAL R(single)(const NUM *x) {
    const uint32_t word = (uint32_t)*x << 16;
    REAL whole;
    memcpy(&whole, &word, sizeof whole);
    return whole;
}
/* The nearest, of two as near the even one. */
static inline NUM R(rounded)(REAL x) {
    uint32_t word;
    memcpy(&word, &x, sizeof word);
    const uint32_t near = word + 0x7FFF + (word >> 16 & 1), nan = word | 0x400000;
    return (NUM)((x == x ? near : nan) >> 16);
}
#else
static inline VF R(several)(const NUM *x) { return *(const VF *)x; }
static inline REAL R(single)(const NUM *x) { return *x; }
static inline NUM R(rounded)(REAL x) { return x; }
#endif
