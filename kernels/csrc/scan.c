/* h_t = m_t h_{t-1} + x_t along rows of channels, real and complex.
 *
 * a, x: n rows of c numbers (pairs: c complex numbers, (re, im) side by side) per batch element, the rows any stride
 * apart; h contiguous. m_t is a_t, or with `lag` the a of the row visited before; `conjugate` takes its conjugate.
 * Rows of bfloat16 are summed in float: h keeps the sums, `rounded` gets what they are in bfloat16; else it is not used.
 * `reverse` visits the rows from the last to the first. h0 [b, c] may be NULL. The row of h written last is in the first
 * cache, so it carries the state. */
#include "common.h"

#ifndef REAL
#define REAL float
#define NUM float
#define HALF 0
#define S(x) PASTE(fnattn_, x, _, f32)
#define VF vf32
#define LANES LANES_f32
#define WIDE 0
#include "scan.c"
#undef REAL
#undef NUM
#undef S
#undef VF
#undef VI
#undef INT
#undef LANES
#undef WIDE
#define REAL double
#define NUM double
#define S(x) PASTE(fnattn_, x, _, f64)
#define VF vf64
#define LANES LANES_f64
#define WIDE 1
#include "scan.c"
#undef REAL
#undef NUM
#undef S
#undef VF
#undef VI
#undef INT
#undef LANES
#undef WIDE
#undef HALF
#define REAL float
#define NUM uint16_t
#define HALF 1
#define S(x) PASTE(fnattn_, x, _, bf16)
#define VF vf32
#define LANES LANES_f32
#define WIDE 0
#include "scan.c"
#else
#include "gate_lanes.h"
#include "gate_rows.h"

#ifndef SCAN_ONCE
#define SCAN_ONCE
#define CHANNELS 512 /* channels of one task: a row of them is a few pages that the prefetcher follows */
#define AHEAD 6      /* rows to prefetch */
#endif

INLINE void S(scan_vector)(const NUM *a, const NUM *x, const REAL *before, REAL *h, NUM *rounded, int64_t count) {
    VF y = S(read)(x, count);
    if (before) y += (a ? S(read)(a, count) : S(all)(1)) * S(load)(before, count);
    S(store)(h, y, count);
    if (HALF) S(write)(rounded, y, count);
}

INLINE void S(scan_pairs_vector)(const NUM *a, const NUM *x, const REAL *before, REAL *h, NUM *rounded, REAL sign, int64_t count) {
    S(pair) y = S(read_pairs)(x, count);
    if (before) {
        S(pair) p = S(load_pairs)(before, count), m = {S(all)(1), S(all)(0)};
        if (a) m = S(read_pairs)(a, count);
        m.im *= sign;
        y.re += m.re * p.re - m.im * p.im;
        y.im += m.re * p.im + m.im * p.re;
    }
    S(store_pairs)(h, y.re, y.im, count);
    if (HALF) S(write_pairs)(rounded, y.re, y.im, count);
}

void S(scan)(const NUM *a, const NUM *x, const REAL *h0, REAL *h, NUM *rounded, int64_t b, int64_t n, int64_t c, int64_t a_batch,
             int64_t a_row, int64_t x_batch, int64_t x_row, int64_t reverse, int64_t pairs, int64_t lag, int64_t conjugate,
             int64_t threads) {
    int64_t most = task_channels(b, c, threads, CHANNELS), blocks = (c + most - 1) / most, two = pairs ? 2 : 1, tasks = b * blocks;
    if (!tasks || !n) return;
    REAL sign = conjugate ? -1 : 1;
#pragma omp parallel for num_threads((int)min64(threads, tasks)) schedule(static) if (threads > 1 && tasks > 1)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t i = task / blocks, from = task % blocks * most, width = min64(most, c - from), full = width / LANES * LANES;
        unsigned mode = subnormals_off();
        int64_t h_row = reverse ? -c * two : c * two, ar = reverse ? -a_row : a_row, xr = reverse ? -x_row : x_row;
        int64_t first = reverse ? n - 1 : 0;
        const NUM *pa = a + i * a_batch + first * a_row + from * two, *px = x + i * x_batch + first * x_row + from * two;
        const REAL *before = h0 ? h0 + (i * c + from) * two : NULL;
        int64_t at = (i * n + first) * c * two + from * two;
        REAL *ph = h + at;
        NUM *pr = HALF ? rounded + at : NULL;
        for (int64_t t = 0; t < n; t++) {
            const NUM *m = lag ? (t ? pa - ar : NULL) : pa;
            int64_t j = 0;
            if (pairs) {
                for (; j < full; j += LANES) {
                    __builtin_prefetch(pa + AHEAD * ar + 2 * j), __builtin_prefetch(px + AHEAD * xr + 2 * j);
                    S(scan_pairs_vector)(m ? m + 2 * j : m, px + 2 * j, before ? before + 2 * j : before, ph + 2 * j,
                                         HALF ? pr + 2 * j : pr, sign, LANES);
                }
                if (j < width)
                    S(scan_pairs_vector)
                    (m ? m + 2 * j : m, px + 2 * j, before ? before + 2 * j : before, ph + 2 * j, HALF ? pr + 2 * j : pr, sign, width - j);
            } else {
                for (; j < full; j += LANES) {
                    __builtin_prefetch(pa + AHEAD * ar + j), __builtin_prefetch(px + AHEAD * xr + j);
                    S(scan_vector)(m ? m + j : m, px + j, before ? before + j : before, ph + j, HALF ? pr + j : pr, LANES);
                }
                if (j < width) S(scan_vector)(m ? m + j : m, px + j, before ? before + j : before, ph + j,
                                               HALF ? pr + j : pr, width - j);
            }
            before = ph;
            pa += ar, px += xr, ph += h_row;
            if (HALF) pr += h_row;
        }
        subnormals_back(mode);
    }
}
#endif
