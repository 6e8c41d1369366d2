/* Coordinate descent along rows: s [rows, n] -> y [rows, n], LANES rows at a time; the mathematics is in coor_tile.h, and again
 * for long rows, without transposing, in coor_rows.h and coor_rows_back.h.
 *
 * Arrays are contiguous. Thresholds m are [rows, T] (cut and m of the exact solver: [rows] each). */
#include "common.h"

#ifndef REAL
#define REAL float
#define INT int32_t
#define WIDE 0
#define S(x) PASTE(fnattn_, x, _, f32)
#define VF vf32
#define VI coor_vi32
#define LANES (VECTOR_BYTES / 4)
#ifndef HAVE_SHUFFLE
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAVE_SHUFFLE
#endif
#endif
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
#define VECTOR_BITS 512
#else
#define VECTOR_BITS 256
#endif
typedef int32_t coor_vi32 __attribute__((vector_size(VECTOR_BYTES), aligned(4)));
typedef int64_t coor_vi64 __attribute__((vector_size(VECTOR_BYTES), aligned(8)));
#include "coor_descent.c"
#undef REAL
#undef INT
#undef WIDE
#undef S
#undef VF
#undef VI
#undef LANES
#undef ROWS_FROM
#undef ROWS_BACK_FROM
#undef BYPASS_FROM
#define REAL double
#define INT int64_t
#define WIDE 1
#define S(x) PASTE(fnattn_, x, _, f64)
#define VF vf64
#define VI coor_vi64
#define LANES (VECTOR_BYTES / 8)
#include "coor_descent.c"
#else
#include "square.h"

#include "coor_tile.h"
#include "coor_exact.h"
#include "coor_tangent.h"
#include "coor_rows.h"
#include "coor_rows_back.h"

/* tile[j][l] = rows[l][j] for l < count; the other lanes repeat `fill`. */
static void S(gather)(const REAL *rows, int64_t count, int64_t n, VF *tile, REAL fill) {
    int64_t j = 0;
    if (count == LANES)
        for (; j + LANES <= n; j += LANES) S(square)(rows + j, n, (REAL *)(tile + j), LANES);
    for (; j < n; j++)
        for (int64_t l = 0; l < LANES; l++) tile[j][l] = l < count ? rows[l * n + j] : fill;
}

static void S(scatter)(const VF *tile, int64_t count, int64_t n, REAL *rows) {
    int64_t j = 0;
    if (count == LANES)
        for (; j + LANES <= n; j += LANES) S(square)((const REAL *)(tile + j), LANES, rows + j, n);
    for (; j < n; j++)
        for (int64_t l = 0; l < count; l++) rows[l * n + j] = tile[j][l];
}

/* Tiles of n vectors each, and one more of T vectors for thresholds. */
static VF *S(tiles)(int64_t count, int64_t n, int64_t T) {
    VF *memory = scratch((size_t)(count * n + T) * sizeof(VF));
    if (!memory) abort();
    return memory;
}

/* Rows of at least so many vectors, and of whole ones, are worked on as they lie; others are transposed. */
#if defined(__AVX512F__)
#define ROWS_FROM 8
#define ROWS_BACK_FROM 4
#else
#define ROWS_FROM 32
#define ROWS_BACK_FROM 16
#endif
#define BYPASS_FROM (4 << 20) /* bytes of results of which little stays in caches */

/* Rows first .. of all. */
static inline S(some) S(some_of)(const REAL *all, int64_t first, int64_t count, int64_t n) {
    return (S(some)){all + first * n, n, count, n / LANES};
}

static inline S(results) S(results_of)(REAL *all, int64_t first, int64_t n, int64_t rows) {
    int bypass = rows * n * (int64_t)sizeof(REAL) >= BYPASS_FROM && (uintptr_t)all % VECTOR_BYTES == 0;
    return (S(results)){all + first * n, n, bypass};
}

static INT *S(places)(int64_t n) {
    INT *memory = scratch((size_t)(n + LANES) * sizeof(INT));
    if (!memory) abort();
    return memory;
}

void S(coor_iterate)(const REAL *s, const REAL *log_k, REAL *y, REAL *m, int64_t rows, int64_t n, const double *eps, int64_t T,
                     int64_t threads) {
    int64_t blocks = (rows + LANES - 1) / LANES;
    const int lie = n % LANES == 0 && n / LANES >= ROWS_FROM;
    if (!rows || !n) return;
#pragma omp parallel num_threads((int)min64(threads, blocks)) if (threads > 1 && blocks > 1)
    {
        VF *tile = S(tiles)(3, n, T), *out = tile + n, *open = out + n, *marks = open + n;
        INT *list = S(places)(n);
        unsigned mode = subnormals_off();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < blocks; i++) {
            int64_t first = i * LANES, count = min64(LANES, rows - first);
            VF lk;
            S(gather)(log_k + first, count, 1, &lk, 0);
            if (lie) {
                S(some) of = S(some_of)(s, first, count, n);
                S(results) to = S(results_of)(y, first, n, rows);
                S(iterate_rows)(&of, &to, tile, open, list, lk, eps, T, marks);
            } else {
                S(gather)(s + first * n, count, n, tile, 0);
                S(iterate)(tile, out, open, n, lk, eps, T, marks);
                S(scatter)(out, count, n, y + first * n);
            }
            S(scatter)(marks, count, T, m + first * T);
        }
        subnormals_back(mode);
        free(list), free(tile);
    }
}

void S(coor_iterate_back)(const REAL *s, const REAL *log_k, const REAL *m, const REAL *g, REAL *ds, REAL *dlogk, int64_t rows,
                          int64_t n, const double *eps, int64_t T, int64_t threads) {
    int64_t blocks = (rows + LANES - 1) / LANES;
    const int lie = n % LANES == 0 && n / LANES >= ROWS_BACK_FROM;
    if (!rows || !n) return;
#pragma omp parallel num_threads((int)min64(threads, blocks)) if (threads > 1 && blocks > 1)
    {
        VF *tile = S(tiles)(6, n, 3 * T + 12), *grad = tile + n, *E = grad + n, *open = E + n, *marks = open + 3 * n + 12;
        S(work) work = {tile, grad, open, open + n + 4, marks + T, marks + 2 * T, (VI *)(open + 2 * n + 8), S(places)(n)};
        unsigned mode = subnormals_off();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < blocks; i++) {
            int64_t first = i * LANES, count = min64(LANES, rows - first), done = 0;
            VF lk, slope;
            S(gather)(log_k + first, count, 1, &lk, 0);
            S(gather)(m + first * T, count, T, marks, 0);
            if (lie) {
                S(some) of = S(some_of)(s, first, count, n), by = S(some_of)(g, first, count, n);
                S(results) to = S(results_of)(ds, first, n, rows);
                done = S(iterate_rows_back)(&of, &by, &to, &work, lk, eps, T, marks, &slope);
            }
            if (!done) {
                S(gather)(s + first * n, count, n, tile, 0);
                S(gather)(g + first * n, count, n, grad, 0);
                slope = S(iterate_back)(tile, grad, E, NULL, open, n, lk, eps, T, marks);
                S(scatter)(grad, count, n, ds + first * n);
            }
            S(scatter)(&slope, count, 1, dlogk + first);
        }
        subnormals_back(mode);
        free(work.list), free(tile);
    }
}

void S(coor_exact)(const REAL *s, const REAL *k, REAL *y, REAL *cut, REAL *m, int64_t rows, int64_t n, double eps,
                   int64_t threads) {
    int64_t blocks = (rows + LANES - 1) / LANES;
    if (!rows || !n) return;
#pragma omp parallel num_threads((int)min64(threads, blocks)) if (threads > 1 && blocks > 1)
    {
        VF *tile = S(tiles)(2, n, 0), *out = tile + n;
        unsigned mode = subnormals_off();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < blocks; i++) {
            int64_t first = i * LANES, count = min64(LANES, rows - first);
            VF kk, edge, level;
            S(gather)(k + first, count, 1, &kk, 1);
            S(gather)(s + first * n, count, n, tile, 0);
            S(exact)(tile, out, n, kk, (REAL)eps, &edge, &level);
            S(scatter)(out, count, n, y + first * n);
            S(scatter)(&edge, count, 1, cut + first);
            S(scatter)(&level, count, 1, m + first);
        }
        subnormals_back(mode);
        free(tile);
    }
}

void S(coor_exact_back)(const REAL *s, const REAL *cut, const REAL *m, const REAL *g, REAL *ds, REAL *dk, int64_t rows, int64_t n,
                        double eps, int64_t threads) {
    int64_t blocks = (rows + LANES - 1) / LANES;
    if (!rows || !n) return;
#pragma omp parallel num_threads((int)min64(threads, blocks)) if (threads > 1 && blocks > 1)
    {
        VF *tile = S(tiles)(3, n, 0), *grad = tile + n, *E = grad + n;
        unsigned mode = subnormals_off();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < blocks; i++) {
            int64_t first = i * LANES, count = min64(LANES, rows - first);
            VF edge, level;
            S(gather)(cut + first, count, 1, &edge, 0);
            S(gather)(m + first, count, 1, &level, 0);
            S(gather)(s + first * n, count, n, tile, 0);
            S(gather)(g + first * n, count, n, grad, 0);
            VF gradient_k = S(exact_back)(tile, grad, E, NULL, n, (REAL)eps, edge, level);
            S(scatter)(grad, count, n, ds + first * n);
            S(scatter)(&gradient_k, count, 1, dk + first);
        }
        subnormals_back(mode);
        free(tile);
    }
}

/* ds (log_k, dlogk: k and k' if exact) -> dy; m [rows, T], or [rows, 2] with cut and threshold if exact. */
void S(coor_tangent)(const REAL *s, const REAL *log_k, const REAL *m, const REAL *ds, const REAL *dlogk, REAL *dy, int64_t rows,
                     int64_t n, int64_t exact, const double *eps, int64_t T, int64_t threads) {
    int64_t blocks = (rows + LANES - 1) / LANES, count_m = exact ? 2 : T;
    if (!rows || !n) return;
#pragma omp parallel num_threads((int)min64(threads, blocks)) if (threads > 1 && blocks > 1)
    {
        VF *tile = S(tiles)(5, n, count_m), *tangent = tile + n, *spare = tangent + n, *open = spare + n, *marks = open + 2 * n;
        unsigned mode = subnormals_off();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < blocks; i++) {
            int64_t first = i * LANES, count = min64(LANES, rows - first);
            VF lk, dlk;
            S(gather)(log_k + first, count, 1, &lk, 0);
            S(gather)(dlogk + first, count, 1, &dlk, 0);
            S(gather)(s + first * n, count, n, tile, 0);
            S(gather)(ds + first * n, count, n, tangent, 0);
            S(gather)(m + first * count_m, count, count_m, marks, 0);
            if (exact) S(exact_tangent)(tile, tangent, spare, n, dlk, (REAL)eps[T], marks[0], marks[1]);
            else S(iterate_tangent)(tile, tangent, spare, open, n, lk, dlk, eps, T, marks);
            S(scatter)(tangent, count, n, dy + first * n);
        }
        subnormals_back(mode);
        free(tile);
    }
}

#include "coor_attention.h"
#endif
