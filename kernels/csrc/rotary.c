/* Rotates the pairs (0, 1), (2, 3), ... of the first 2 f channels by the angles whose cosines and sines are given:
 *
 *     out_2c = x_2c cos_c - x_2c+1 sin_c        out_2c+1 = x_2c+1 cos_c + x_2c sin_c
 *
 * computed in REAL, x and out being NUM: REAL itself or, with HALF, bfloat16, the upper half of a float.
 * The other channels are copied, or set to 0 unless `rest`. x [b, h, n, d] with strides (sb, sh, sn, 1); cos, sin [b, n, f] with
 * stride st between batches (0 if shared); out [b, h, n, d] contiguous. */
#include "common.h"

#ifndef REAL
#define REAL float
#define NUM float
#define HALF 0
#define S(x) PASTE(fnattn_, x, _, f32)
#include "rotary.c"
#undef REAL
#undef NUM
#undef S
#define REAL double
#define NUM double
#define S(x) PASTE(fnattn_, x, _, f64)
#include "rotary.c"
#undef REAL
#undef NUM
#undef S
#undef HALF
#define REAL float
#define NUM uint16_t
#define HALF 1
#define S(x) PASTE(fnattn_, x, _, bf16)
#include "rotary.c"
#else

#if HALF
typedef uint32_t word __attribute__((aligned(2), may_alias));

/* bfloat16 in the upper half: to the nearest, from the middle to the even one; NaN stays NaN. */
static inline uint32_t rounded(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return (u + 0x7FFF + ((u >> 16) & 1)) | (x != x ? 0xFFFFFFFF : 0);
}

static inline float as_float(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* A pair is one word. */
static void S(rotate_row)(const NUM *restrict x, const REAL *restrict cos, const REAL *restrict sin, NUM *restrict out, int64_t f) {
    const word *from = (const word *)x;
    word *to = (word *)out;
    for (int64_t c = 0; c < f; c++) {
        REAL even = as_float(from[c] << 16), odd = as_float(from[c] & 0xFFFF0000);
        to[c] = (rounded(even * cos[c] - odd * sin[c]) >> 16) | (rounded(odd * cos[c] + even * sin[c]) & 0xFFFF0000);
    }
}
#else
static void S(rotate_row)(const NUM *restrict x, const REAL *restrict cos, const REAL *restrict sin, NUM *restrict out, int64_t f) {
    for (int64_t c = 0; c < f; c++) {
        REAL even = x[2 * c], odd = x[2 * c + 1];
        out[2 * c] = even * cos[c] - odd * sin[c];
        out[2 * c + 1] = odd * cos[c] + even * sin[c];
    }
}

#endif

void S(rotary)(const NUM *x, const REAL *cos, const REAL *sin, NUM *out, int64_t b, int64_t h, int64_t n, int64_t d, int64_t f,
               int64_t sb, int64_t sh, int64_t sn, int64_t st, int64_t rest, int64_t threads) {
    size_t others = (size_t)(d - 2 * f) * sizeof(NUM);
#pragma omp parallel for schedule(static) num_threads((int)min64(threads, max64(b * h, 1))) if (threads > 1 && b * h > 1)
    for (int64_t i = 0; i < b * h; i++) {
        const NUM *from = x + i / h * sb + i % h * sh;
        NUM *to = out + i * n * d;
        for (int64_t t = 0; t < n; t++, from += sn, to += d) {
            int64_t at = i / h * st + t * f;
            S(rotate_row)(from, cos + at, sin + at, to, f);
            if (others && rest) memcpy(to + 2 * f, from + 2 * f, others);
            else if (others) memset(to + 2 * f, 0, others);
        }
    }
}
#endif
