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
#else
static inline VF R(several)(const NUM *x) { return *(const VF *)x; }
static inline REAL R(single)(const NUM *x) { return *x; }
#endif
