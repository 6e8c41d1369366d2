/* y = gamma x s, s = 1 / sqrt(max(mean of x^2, 1e-24 / d)), along rows, and its gradient.
 *
 * x, y, g, dx [b, n, d], gamma [1 or b, d] (a stride of 0 between batch entries: the same for all), dgamma [b, d]; contiguous.
 * With u = g gamma, whose part along x the norm takes away:
 *
 *     dx = s (u - x s^2 mean(x u)), or s u where s does not move        dgamma = sum over rows of g x s
 *
 * One task is a strip of STRIP rows of a batch entry. Sums over rows are those of GROUP rows, added up in double, strip by strip:
 * no bit depends on the number of threads. */
#ifndef PRECISION
#define PRECISION 32
#include "rms_norm.c"
#undef PRECISION
#define PRECISION 64
#include "rms_norm.c"
#else
#include "common.h"
#include "lanes.h"
#include "rms_row.h"

#define STRIP 1024
#define GROUP 32

void S(rms_norm)(const REAL *x, const REAL *gamma, REAL *y, int64_t b, int64_t n, int64_t d, int64_t gamma_batch, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < b * n; i++) S(norm_row)(x + i * d, gamma + i / n * gamma_batch, y + i * d, d);
}

/* sums: [b, strips, d] doubles, one row for each strip; `part` [d] is scratch. */
static void S(strip_back)(const REAL *x, const REAL *gamma, const REAL *g, REAL *dx, double *sums, REAL *part, int64_t rows, int64_t d) {
    memset(sums, 0, (size_t)d * sizeof(double));
    for (int64_t i = 0; i < rows; i++, x += d, g += d, dx += d) {
        int moves;
        if (i % GROUP == 0) memset(part, 0, (size_t)d * sizeof(REAL));
        const REAL s = S(scale)(x, d, &moves);
        const REAL along = moves ? s * s * S(dot)(x, g, gamma, d) / (REAL)d : 0;
        int64_t c = 0;
        for (; c + LANES <= d; c += LANES) {
            const VF x_c = *(const VF *)(x + c), g_c = *(const VF *)(g + c);
            *(VF *)(dx + c) = s * (g_c * *(const VF *)(gamma + c) - x_c * along);
            *(VF *)(part + c) += g_c * (x_c * s);
        }
        for (; c < d; c++) dx[c] = s * (g[c] * gamma[c] - x[c] * along), part[c] += g[c] * (x[c] * s);
        if (i % GROUP == GROUP - 1 || i == rows - 1)
            for (c = 0; c < d; c++) sums[c] += part[c];
    }
}

/* Returns 1 if there is no memory. */
int S(try_rms_norm_back)(const REAL *x, const REAL *gamma, const REAL *g, REAL *dx, REAL *dgamma, int64_t b, int64_t n, int64_t d,
                         int64_t gamma_batch, int64_t threads) {
    const int64_t strips = (n + STRIP - 1) / STRIP;
    double *sums = scratch((size_t)(b * strips * d) * sizeof(double));
    REAL *parts = scratch((size_t)(b * strips * d) * sizeof(REAL));
    if (!sums || !parts) {
        free(sums), free(parts);
        return 1;
    }
#pragma omp parallel for num_threads((int)threads) if (threads > 1) schedule(static)
    for (int64_t task = 0; task < b * strips; task++) {
        const int64_t entry = task / strips, first = task % strips * STRIP, at = (entry * n + first) * d;
        S(strip_back)(x + at, gamma + entry * gamma_batch, g + at, dx + at, sums + task * d, parts + task * d, min64(STRIP, n - first), d);
    }
    for (int64_t entry = 0; entry < b; entry++)
        for (int64_t c = 0; c < d; c++) {
            double sum = 0;
            for (int64_t strip = 0; strip < strips; strip++) sum += sums[(entry * strips + strip) * d + c];
            dgamma[entry * d + c] = (REAL)sum;
        }
    free(sums), free(parts);
    return 0;
}
#endif
