/* What this machine can do at most: multiply-adds and exponentials per second in registers and first-level cache. Each
 * function does a known number of operations and returns something that depends on all of them. */
#include "common.h"

#define CHAINS 12 /* enough independent sums to hide the latency of one multiply-add */
#define CELLS 2048

/* 2 * CHAINS * lanes flops per round. */
int64_t fnattn_peak_lanes_f32(void) { return LANES_f32; }

/* Named one by one: an array of them would live in memory. */
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)

float fnattn_peak_fma_f32(int64_t rounds, float x) {
    vf32 factor = (vf32){} + x;
#define START(i) vf32 sum##i = factor * (float)i;
#define STEP(i) sum##i = sum##i * factor + factor;
#define TAKE(i) all += sum##i;
    EACH(START)
    for (int64_t r = 0; r < rounds; r++) { EACH(STEP) }
    vf32 all = {};
    EACH(TAKE)
    float total = 0;
    for (int i = 0; i < LANES_f32; i++) total += all[i];
    return total;
}

typedef int32_t vi32 __attribute__((vector_size(VECTOR_BYTES), aligned(4)));

/* e^x to 2e-7 for |x| < 87: 2^n from the exponent's bits, the rest by a polynomial. */
static inline vf32 exponential(vf32 x) {
    vf32 shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to an integer in the low bits */
    vf32 n = shifted - 12582912.0f;
    vf32 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf32 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vf32)(((vi32)shifted << 23) + 0x3f800000);
}

/* CELLS exponentials per round. */
float fnattn_peak_exp_f32(int64_t rounds, float x) {
    float cells[CELLS] __attribute__((aligned(64)));
    for (int i = 0; i < CELLS; i++) cells[i] = -x * (float)i / CELLS;
    for (int64_t r = 0; r < rounds; r++)
        for (int i = 0; i < CELLS; i += LANES_f32) {
            vf32 *at = (vf32 *)(cells + i);
            *at = exponential(*at) - 1.0f;
        }
    float total = 0;
    for (int i = 0; i < CELLS; i++) total += cells[i];
    return total;
}
