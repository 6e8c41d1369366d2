/* Shared by all C kernels: plain C ABI, no torch or Python headers.
 *
 * Each kernel file includes itself once per precision with REAL set to float or double; NAME(x) then gives the exported
 * symbol fnattn_x_f32 or fnattn_x_f64. VF is a vector of REAL exactly as wide as the machine's registers: a wider vector
 * type is split by the compiler through memory and is far slower than scalar code. */
#ifndef FNATTN_COMMON_H
#define FNATTN_COMMON_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#define PASTE_(a, b, c, d) a##b##c##d
#define PASTE(a, b, c, d) PASTE_(a, b, c, d)

typedef float vf32 __attribute__((vector_size(VECTOR_BYTES), aligned(4)));
typedef double vf64 __attribute__((vector_size(VECTOR_BYTES), aligned(8)));
#define LANES_f32 (VECTOR_BYTES / 4)
#define LANES_f64 (VECTOR_BYTES / 8)

/* Lanes of two vectors by number; VI: the type of the numbers where they must be a vector. */
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(VI, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(VI, a, b, ...) __builtin_shuffle(a, b, (VI){__VA_ARGS__})
#endif

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

/* Between these two, what would be subnormal is zero, in this thread. A state that decays to nothing passes through many such
 * numbers, and x86 takes a hundred cycles for each. */
#ifdef __SSE2__
#include <xmmintrin.h>
static inline unsigned subnormals_off(void) {
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8000);
    return before;
}
static inline void subnormals_back(unsigned before) { _mm_setcsr(before); }
#else
static inline unsigned subnormals_off(void) { return 0; }
static inline void subnormals_back(unsigned before) { (void)before; }
#endif

/* Memory for one thread's scratch, aligned to a cache line; the caller checks for NULL. */
static inline void *scratch(size_t bytes) {
    void *p = NULL;
    return posix_memalign(&p, 64, bytes ? bytes : 64) ? NULL : p;
}

#endif
