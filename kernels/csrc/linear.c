/* y = x w^T + bias for a few rows x, as in a step of generation: reads the weights once, where they are.
 *
 * Libraries for large products first copy the weights into an order of their own, which for a row or two takes longer than the
 * product. x [b, n, k] with rows in one piece, w [1 or b, m, k] and bias [1 or b, m] contiguous (a stride of 0 between batch
 * entries: the same for all), y [b, n, m] contiguous. One task is a block of OUTS outputs of one batch entry; the lanes of a
 * vector lie along k. */
#ifndef PRECISION
#define PRECISION 32
#include "linear.c"
#undef PRECISION
#define PRECISION 64
#include "linear.c"
#else
#include "common.h"
#include "lanes.h"

/* Outputs and rows of a tile: all its sums stay in registers, of which there are 32 with AVX-512 and 16 without. */
#undef OUTS
#define OUTS (VECTOR_BYTES == 64 ? 4 : 2)
#define ROWS 4

/* sum[o][r] = lanes of x_r . w_o; both counts are constants wherever this is called. Returns how far along k it came. */
static inline __attribute__((always_inline)) int64_t S(meet)(const int rows, const int outs, VF *restrict sums, const REAL *restrict x,
                                                             int64_t ldx, const REAL *restrict w, int64_t k) {
    VF sum[4][ROWS] = {{{0}}};
    int64_t c = 0;
    for (; c + LANES <= k; c += LANES) {
        VF x_c[ROWS];
        for (int r = 0; r < rows; r++) x_c[r] = *(const VF *)(x + r * ldx + c);
        for (int o = 0; o < outs; o++) {
            const VF w_c = *(const VF *)(w + o * k + c);
            for (int r = 0; r < rows; r++) sum[o][r] += w_c * x_c[r];
        }
    }
    for (int o = 0; o < outs; o++)
        for (int r = 0; r < rows; r++) sums[o * rows + r] = sum[o][r];
    return c;
}

/* Not inlined: with what follows in sight the compiler keeps rows of x in memory. */
#define MEET(rows, outs)                                                                                                     \
    static __attribute__((noinline)) int64_t S(meet_##rows##_##outs)(VF *sums, const REAL *x, int64_t ldx, const REAL *w,    \
                                                                     int64_t k) {                                            \
        return S(meet)(rows, outs, sums, x, ldx, w, k);                                                                      \
    }
MEET(1, 1) MEET(2, 1) MEET(3, 1) MEET(4, 1) MEET(1, OUTS) MEET(2, OUTS) MEET(3, OUTS) MEET(4, OUTS)
#undef MEET
static int64_t (*const S(meets)[2][ROWS])(VF *, const REAL *, int64_t, const REAL *, int64_t) = {
    {S(meet_1_1), S(meet_2_1), S(meet_3_1), S(meet_4_1)},
    {S(meet_1_OUTS), S(meet_2_OUTS), S(meet_3_OUTS), S(meet_4_OUTS)},
};

/* n rows with the same `outs` (1 or OUTS) rows of w, which stay in the first cache. */
static void S(strip)(int outs, const REAL *x, int64_t ldx, const REAL *w, const REAL *bias, REAL *y, int64_t n, int64_t k, int64_t m) {
    VF sums[OUTS * ROWS];
    for (int rows; n > 0; n -= rows, x += rows * ldx, y += rows * m) {
        rows = (int)min64(n, ROWS);
        const int64_t whole = S(meets)[outs == OUTS][rows - 1](sums, x, ldx, w, k);
        for (int o = 0; o < outs; o++)
            for (int r = 0; r < rows; r++) {
                REAL total = S(add_lanes)(sums[o * rows + r]);
                for (int64_t c = whole; c < k; c++) total += w[o * k + c] * x[r * ldx + c];
                y[r * m + o] = total + (bias ? bias[o] : 0);
            }
    }
}

void S(linear)(const REAL *x, const REAL *w, const REAL *bias, REAL *y, int64_t b, int64_t n, int64_t m, int64_t k, int64_t x_batch,
               int64_t ldx, int64_t w_batch, int64_t bias_batch, int64_t threads) {
    const int64_t strips = (m + OUTS - 1) / OUTS;
#pragma omp parallel for num_threads((int)threads) if (threads > 1) schedule(static)
    for (int64_t task = 0; task < b * strips; task++) {
        const int64_t entry = task / strips, o = task % strips * OUTS;
        const REAL *x_t = x + entry * x_batch, *w_t = w + entry * w_batch + o * k, *bias_t = bias ? bias + entry * bias_batch + o : NULL;
        REAL *y_t = y + entry * n * m + o;
        if (o + OUTS <= m)
            S(strip)(OUTS, x_t, ldx, w_t, bias_t, y_t, n, k, m);
        else
            for (int64_t i = 0; i < m - o; i++) S(strip)(1, x_t, ldx, w_t + i * k, bias_t ? bias_t + i : NULL, y_t + i, n, k, m);
    }
}
#endif
