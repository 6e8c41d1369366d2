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

/* e^x to 1e-7 for x from -87 to 0, in the fewest operations that any kernel here spends on one (coor_hot.h tells how). */
#define MAGIC 12582912.0f /* 1.5 * 2^23: rounds to an integer in the low bits */
#if defined(__AVX512F__)
#include <immintrin.h>
/* The bits of 2^(i / 32), less i << 18. */
static const int32_t roots[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};

static inline vf32 exponential(vf32 x) {
    const __m512i low = *(const __m512i *)roots, high = *(const __m512i *)(roots + 16);
    const vf32 t = x * (32 * 1.44269504f) + MAGIC, r = x * (32 * 1.44269504f) - (t - MAGIC);
    const vi32 whole = (vi32)_mm512_permutex2var_epi32(low, (__m512i)t, high) + ((vi32)t << 18);
    return (vf32)whole * ((r * 2.3459617e-4f + 2.1661167e-2f) * r + 1.0f);
}
#else
static inline vf32 exponential(vf32 x) {
    const float magic = MAGIC + 127; /* the bias of exponents */
    const vf32 t = x * 1.44269504f + magic, r = x * 1.44269504f - (t - magic);
    vf32 p = r * 1.3276472e-3f + 9.675541e-3f;
    p = p * r + 5.550713e-2f, p = p * r + 2.402212e-1f, p = p * r + 6.9314694e-1f;
    return (vf32)((vi32)t << 23) * (p * r + 1.0000001f);
}
#endif

/* CELLS exponentials per round. */
float fnattn_peak_exp_f32(int64_t rounds, float x) {
    float cells[CELLS] __attribute__((aligned(64)));
    for (int i = 0; i < CELLS; i++) cells[i] = -x * (float)i / CELLS;
    vf32 even = {0}, odd = {0};
    for (int64_t r = 0; r < rounds; r++) {
        for (int i = 0; i < CELLS; i += 2 * LANES_f32) {
            even += exponential(*(vf32 *)(cells + i));
            odd += exponential(*(vf32 *)(cells + i + LANES_f32));
        }
        cells[r % CELLS] -= 1e-6f; /* or the compiler would see that every round is the same */
    }
    even += odd;
    float total = 0;
    for (int i = 0; i < LANES_f32; i++) total += even[i];
    return total;
}
