/* One row of root-mean-square normalisation; included once per precision by rms_norm.c and steps.c. */

/* sum_c x_c y_c, and with z not NULL sum_c x_c y_c z_c */
static inline REAL S(dot)(const REAL *x, const REAL *y, const REAL *z, int64_t d) {
    VF a = {0}, b = {0};
    int64_t c = 0;
    for (; c + 2 * LANES <= d; c += 2 * LANES) {
        VF left = *(const VF *)(x + c) * *(const VF *)(y + c), right = *(const VF *)(x + c + LANES) * *(const VF *)(y + c + LANES);
        a += z ? left * *(const VF *)(z + c) : left, b += z ? right * *(const VF *)(z + c + LANES) : right;
    }
    REAL sum = S(add_lanes)(a + b);
    for (; c < d; c++) sum += x[c] * y[c] * (z ? z[c] : 1);
    return sum;
}

/* s of a row; *moves: whether it depends on it. */
static inline REAL S(scale)(const REAL *x, int64_t d, int *moves) {
    const double mean = (double)S(dot)(x, x, NULL, d) / (double)d, least = 1e-24 / (double)d;
    *moves = mean >= least;
    return (REAL)(1 / sqrt(mean < least ? least : mean)); /* so written, NaN stays NaN */
}

/* y = gamma x s */
static void S(norm_row)(const REAL *x, const REAL *gamma, REAL *y, int64_t d) {
    int moves;
    const REAL s = S(scale)(x, d, &moves);
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES) *(VF *)(y + c) = *(const VF *)(x + c) * s * *(const VF *)(gamma + c);
    for (; c < d; c++) y[c] = x[c] * s * gamma[c];
}
