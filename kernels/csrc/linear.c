/* y = x w^T + bias for a few rows x, as in a step of generation: reads the weights once, where they are.
 *
 * Libraries for large products first copy the weights into an order of their own, which for a row or two takes longer than the
 * product. x [b, n, k] with rows in one piece, w [1 or b, m, k] and bias [1 or b, m] contiguous (a stride of 0 between batch
 * entries: the same for all), y [b, n, m] contiguous; w may be bfloat16 where the others are float. One task is a block of OUTS
 * outputs of one batch entry; the lanes of a vector lie along k. */
#ifndef PRECISION
#define PRECISION 32
#include "linear.c"
#undef PRECISION
#define PRECISION 64
#include "linear.c"
#elif !defined(NUM)
#include "common.h"
#include "lanes.h"
#define EACH_KIND "linear.c"
#include "each_kind.h"
#else
#include "numbers.h"
#include "linear_rows.h"

void R(linear)(const REAL *x, const NUM *w, const REAL *bias, REAL *y, int64_t b, int64_t n, int64_t m, int64_t k, int64_t x_batch,
               int64_t ldx, int64_t w_batch, int64_t bias_batch, int64_t threads) {
    R(products)(x, w, bias, y, b, n, m, k, x_batch, ldx, w_batch, bias_batch, threads);
}
#endif
