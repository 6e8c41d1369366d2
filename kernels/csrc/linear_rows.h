/* Products of a few rows with a matrix, which is read once where it lies. Included after numbers.h, once per kind of number in the
 * matrix, by linear.c and steps.c. */

/* Outputs and rows of a tile: all its sums stay in registers, of which there are 32 with AVX-512 and 16 without. */
#undef OUTS
#define OUTS (VECTOR_BYTES == 64 ? 4 : 2)
#define ROWS 4

/* sum[o][r] = lanes of x_r . w_o; both counts are constants wherever this is called. Returns how far along k it came. */
static inline __attribute__((always_inline)) int64_t R(meet)(const int rows, const int outs, VF *restrict sums, const REAL *restrict x,
                                                             int64_t ldx, const NUM *restrict w, int64_t k) {
    VF sum[4][ROWS] = {{{0}}};
    int64_t c = 0;
    for (; c + LANES <= k; c += LANES) {
        VF x_c[ROWS];
        for (int r = 0; r < rows; r++) x_c[r] = *(const VF *)(x + r * ldx + c);
        for (int o = 0; o < outs; o++) {
            __builtin_prefetch(w + (outs + o) * k + c, 0, 3); /* the next strip, from afar */
            const VF w_c = R(several)(w + o * k + c);
            for (int r = 0; r < rows; r++) sum[o][r] += w_c * x_c[r];
        }
    }
    for (int o = 0; o < outs; o++)
        for (int r = 0; r < rows; r++) sums[o * rows + r] = sum[o][r];
    return c;
}

/* Not inlined: with what follows in sight the compiler keeps rows of x in memory. */
#define MEET(rows, outs)                                                                                                     \
    static __attribute__((noinline)) int64_t R(meet_##rows##_##outs)(VF *sums, const REAL *x, int64_t ldx, const NUM *w,     \
                                                                     int64_t k) {                                            \
        return R(meet)(rows, outs, sums, x, ldx, w, k);                                                                      \
    }
MEET(1, 1) MEET(2, 1) MEET(3, 1) MEET(4, 1) MEET(1, OUTS) MEET(2, OUTS) MEET(3, OUTS) MEET(4, OUTS)
#undef MEET
static int64_t (*const R(meets)[2][ROWS])(VF *, const REAL *, int64_t, const NUM *, int64_t) = {
    {R(meet_1_1), R(meet_2_1), R(meet_3_1), R(meet_4_1)},
    {R(meet_1_OUTS), R(meet_2_OUTS), R(meet_3_OUTS), R(meet_4_OUTS)},
};

#if VECTOR_BYTES == 64 && PRECISION == 32 && !HALF
/* The lanes of four vectors added up, in the order in which add_lanes does. */
static inline S(quarter) S(add_four)(const VF *x, int64_t step) {
    S(quarter) q[4];
    for (int i = 0; i < 4; i++) {
        union { VF whole; S(quarter) part[PARTS]; } u = {.whole = x[i * step]};
        q[i] = (u.part[0] + u.part[2]) + (u.part[1] + u.part[3]);
    }
    typedef int32_t picks __attribute__((vector_size(16)));
    const S(quarter) low = SHUFFLE(picks, q[0], q[1], 0, 4, 1, 5) + SHUFFLE(picks, q[0], q[1], 2, 6, 3, 7);
    const S(quarter) high = SHUFFLE(picks, q[2], q[3], 0, 4, 1, 5) + SHUFFLE(picks, q[2], q[3], 2, 6, 3, 7);
    return SHUFFLE(picks, low, high, 0, 1, 4, 5) + SHUFFLE(picks, low, high, 2, 3, 6, 7);
}
#endif

/* n rows with the same `outs` (1 or OUTS) rows of w, which stay in the first cache. */
static void R(strip)(int outs, const REAL *x, int64_t ldx, const NUM *w, const REAL *bias, REAL *y, int64_t n, int64_t k, int64_t m) {
    VF sums[OUTS * ROWS];
    for (int rows; n > 0; n -= rows, x += rows * ldx, y += rows * m) {
        rows = (int)min64(n, ROWS);
        const int64_t whole = R(meets)[outs == OUTS][rows - 1](sums, x, ldx, w, k);
#if VECTOR_BYTES == 64 && PRECISION == 32
        if (outs == OUTS && whole == k) {
            for (int r = 0; r < rows; r++) {
                S(quarter) total = S(add_four)(sums + r, rows);
                for (int o = 0; o < 4; o++) y[r * m + o] = total[o] + (bias ? bias[o] : 0);
            }
            continue;
        }
#endif
        for (int o = 0; o < outs; o++)
            for (int r = 0; r < rows; r++) {
                REAL total = S(add_lanes)(sums[o * rows + r]);
                for (int64_t c = whole; c < k; c++) total += R(single)(w + o * k + c) * x[r * ldx + c];
                y[r * m + o] = total + (bias ? bias[o] : 0);
            }
    }
}

/* What linear.c describes: x [b, n, k], w [1 or b, m, k], bias [1 or b, m] or NULL, y [b, n, m]. */
static void R(products)(const REAL *x, const NUM *w, const REAL *bias, REAL *y, int64_t b, int64_t n, int64_t m, int64_t k,
                        int64_t x_batch, int64_t ldx, int64_t w_batch, int64_t bias_batch, int64_t threads) {
    const int64_t strips = (m + OUTS - 1) / OUTS;
#pragma omp parallel for num_threads((int)threads) if (threads > 1) schedule(static)
    for (int64_t task = 0; task < b * strips; task++) {
        const int64_t entry = task / strips, o = task % strips * OUTS;
        const REAL *x_t = x + entry * x_batch, *bias_t = bias ? bias + entry * bias_batch + o : NULL;
        const NUM *w_t = w + entry * w_batch + o * k;
        REAL *y_t = y + entry * n * m + o;
        if (o + OUTS <= m)
            R(strip)(OUTS, x_t, ldx, w_t, bias_t, y_t, n, k, m);
        else
            for (int64_t i = 0; i < m - o; i++) R(strip)(1, x_t, ldx, w_t + i * k, bias_t ? bias_t + i : NULL, y_t + i, n, k, m);
    }
}
