/* A layer, or a whole model, for one new position of a few sequences: a list of instructions, carried out one after the other.
 *
 * A step of generation is a dozen small products and one recurrence. Called one by one from Python each costs more than it
 * computes; here the list is one call. `code` holds instructions, each an opcode and its arguments as 64-bit numbers: counts,
 * strides in numbers, and places. A place is an address, 0 for nothing, or -1 - i for the i-th number of the scratch that this
 * function allocates. Rows are those of different sequences; a row's numbers lie side by side. Kernels of other files are
 * called by their address: instructions that begin with CALL. kernels/native/steps.py writes such lists, and says what each
 * instruction means.
 *
 * Weights and caches may be bfloat16: rows in the scratch, and the states of loops, are float then. */
#ifndef PRECISION
#include <stdint.h>
enum { NORM, LAYER_NORM, LINEAR, EMBED, COPY, ADD, MULTIPLY, GATE, TURN, APPEND, FLUSH, SHIFT, GATHER, SEEN, COMPLEX_PRODUCT,
       LAYOUT, MEET, HIDE, MIX, AVERAGE, SPARSITY, WIDEN_ROWS, NARROW_ROWS, CALL_TAYLOR, CALL_DECODE, CALL_SIMPLE, CALL_NARROW, CALL_WIDE,
       CALL_ITERATE, CALL_EXACT };
enum { IDENTITY, GELU, SILU };           /* what LINEAR does to its results */
enum { DONE, NO_MEMORY, OUT_OF_RANGE };  /* what the function returns */
#define PARALLEL_FROM (1 << 17)          /* multiply-adds below which a second thread is not worth waking */
#define PRECISION 32
#include "steps.c"
#undef PRECISION
#define PRECISION 64
#include "steps.c"
#else
#include "common.h"
#include "lanes.h"
#include "rms_row.h"
#undef ERF
#undef EXP
#undef LOG
#undef COS
#undef SIN
#if PRECISION == 32
#define ERF erff
#define EXP expf
#define LOG logf
#define COS cosf
#define SIN sinf
#else
#define ERF erf
#define EXP exp
#define LOG log
#define COS cos
#define SIN sin
#endif

typedef int (*S(taylor_fn))(const REAL *, const REAL *, const REAL *, const REAL *, const REAL *, REAL *, REAL *, REAL *, int64_t, int64_t,
                            int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double, double, int64_t);
typedef void (*S(simple_fn))(const REAL *, const REAL *, const REAL *, const REAL *, REAL *, REAL *, REAL *, int64_t, int64_t, int64_t,
                             int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
typedef void (*S(narrow_fn))(const REAL *, const REAL *, const REAL *, const REAL *, const REAL *, REAL *, REAL *, REAL *, REAL *,
                             int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
typedef void (*S(wide_fn))(const REAL *, const REAL *, const REAL *, const REAL *, const REAL *, REAL *, REAL *, REAL *, int64_t, int64_t,
                           int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                           int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
typedef void (*S(iterate_fn))(const REAL *, const REAL *, REAL *, REAL *, int64_t, int64_t, const double *, int64_t, int64_t);
typedef void (*S(exact_fn))(const REAL *, const REAL *, REAL *, REAL *, REAL *, int64_t, int64_t, double, int64_t);

static inline double S(double_of)(int64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* weight (x - mean) / std + bias, eps 1e-5, with the variance about the mean. */
static void S(layer_norm_row)(const REAL *x, const REAL *weight, const REAL *bias, REAL *y, int64_t k) {
    double sum = 0, squares = 0;
    for (int64_t c = 0; c < k; c++) sum += x[c];
    const REAL mean = (REAL)(sum / (double)k);
    for (int64_t c = 0; c < k; c++) squares += (double)(x[c] - mean) * (x[c] - mean);
    const REAL inverse = (REAL)(1 / sqrt(squares / (double)k + 1e-5));
    for (int64_t c = 0; c < k; c++) y[c] = (x[c] - mean) * inverse * weight[c] + bias[c];
}

static inline REAL S(logistic)(REAL x) { return 1 / (1 + EXP(-x)); }

/* y = act(y) + add, rows of m numbers */
static void S(finish)(REAL *y, const REAL *add, int64_t ldadd, int64_t rows, int64_t m, int64_t act) {
    for (int64_t i = 0; i < rows * m && act; i++)
        y[i] = act == GELU ? (REAL)0.5 * y[i] * (1 + ERF(y[i] * (REAL)0.70710678118654752440)) : y[i] * S(logistic)(y[i]);
    for (int64_t r = 0; r < rows && add; r++)
        for (int64_t c = 0; c < m; c++) y[r * m + c] += add[r * ldadd + c];
}

/* Turns the pairs of the first 2 f channels of every head by position times frequency; angles are floats in both precisions. */
static void S(turn)(REAL *x, const float *freqs, int64_t rows, int64_t heads, int64_t d, int64_t f, int64_t position) {
    for (int64_t c = 0; c < f; c++) {
        const float angle = (float)position * freqs[c];
        const REAL cosine = COS((REAL)angle), sine = SIN((REAL)angle);
        for (int64_t i = 0; i < rows * heads; i++) {
            REAL *pair = x + i * d + 2 * c, even = pair[0], odd = pair[1];
            pair[0] = even * cosine - odd * sine, pair[1] = odd * cosine + even * sine;
        }
    }
}

#define EACH_KIND "steps_code.h"
#include "each_kind.h"
#endif
