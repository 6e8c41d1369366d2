/* Few queries and the two parts of a cache: their scores, and their averages of its rows. Included once per kind of number in the
 * cache, as numbers.h is; the macros at its end are undefined by whoever includes it. */
#include "numbers.h"
#include "decode_rows.h"

/* What all three kernels are called with. */
typedef struct {
    const REAL *q;
    const NUM *k, *v, *k_late, *v_late;
    const uint8_t *mask;
    int64_t b, h, g, n, d, e, room, late, first, m, sb, sh, sn, start;
    REAL scale;
} R(cache);

/* The rows of part `main` or `late`, `width` numbers each, of key head `task` from position j on, and in *stop where a block ends. */
static inline const NUM *R(block_of)(const R(cache) *a, const NUM *main, const NUM *late, int64_t width, int64_t task, int64_t j,
                                      int64_t *stop) {
    *stop = min64(j + KEYS, j < a->first ? a->first : a->m);
    return j < a->first ? main + (task * a->room + j) * width : late + (task * a->late + j - a->first) * width;
}

/* table [rows][row] = (more: +=) factor x . y_j over the keys, for rows of x [rows][width] and the two parts of y; spare [KEYS]. */
static void R(meet_cache)(const R(cache) *a, const REAL *x, const NUM *main, const NUM *late, int64_t width, REAL factor, int64_t task,
                          int64_t rows, int64_t row, int more, REAL *spare, REAL *table) {
    for (int64_t j = 0, stop; j < a->m; j = stop) {
        const NUM *y = R(block_of)(a, main, late, width, task, j, &stop);
        for (int64_t i = 0; i < rows; i++) {
            REAL *to = table + i * row + j;
            R(score_keys)(x + i * width, y, stop - j, width, factor, more ? spare : to);
            for (int64_t l = 0; more && l < stop - j; l++) to[l] += spare[l];
        }
    }
}

/* out [rows][width] += table times the two parts of y. */
static void R(mix_cache)(const R(cache) *a, const REAL *table, const NUM *main, const NUM *late, int64_t width, int64_t task,
                         int64_t rows, int64_t row, REAL *out) {
    for (int64_t j = 0, stop; j < a->m; j = stop) {
        const NUM *y = R(block_of)(a, main, late, width, task, j, &stop);
        for (int64_t i = 0; i < rows; i++) R(sum_values)(out + i * width, table + i * row + j, y, stop - j, width);
    }
}

/* The weights p [rows][row] of the queries of a key head. */
static void R(weights_of)(const R(cache) *a, int64_t task, int64_t rows, int64_t row, REAL *p) {
    const int64_t r = a->h / a->g, n = a->n;
    R(meet_cache)(a, a->q + task * rows * a->d, a->k, a->k_late, a->d, a->scale, task, rows, row, 0, NULL, p);
    for (int64_t i = 0; i < rows; i++, p += row) {
        const int64_t head = task % a->g * r + i / n, end = max64(0, min64(a->m, a->start + i % n + 1));
        const uint8_t *seen = a->mask ? a->mask + task / a->g * a->sb + head * a->sh + i % n * a->sn : NULL;
        for (int64_t j = end; j < row; j++) p[j] = -(REAL)INFINITY;
        if (seen)
            for (int64_t j = 0; j < end; j++) p[j] = seen[j] ? p[j] : -(REAL)INFINITY;
        S(normalise)(p, row);
    }
}

#define CACHE(a)                                                                                                               \
    const R(cache) a = {q, k, v, k_late, v_late, mask, b, h, g, n, d, e, room, late, first, m, sb, sh, sn, start, (REAL)scale}; \
    const int64_t rows = h / g * n, row = (m + LANES - 1) / LANES * LANES;                                                     \
    int failed = 0

/* Scratch for `tables` tables, and KEYS numbers; says so where there is none. */
#define TABLES(memory, tables)                                                     \
    REAL *memory = scratch((size_t)((tables) * rows * row + KEYS) * sizeof(REAL)); \
    if (!memory) {                                                                 \
        _Pragma("omp atomic write") failed = 1;                                    \
    }

int R(try_decode)(const REAL *q, const NUM *k, const NUM *v, const NUM *k_late, const NUM *v_late, const uint8_t *mask, REAL *out,
                  int64_t b, int64_t h, int64_t g, int64_t n, int64_t d, int64_t e, int64_t room, int64_t late, int64_t first, int64_t m,
                  int64_t sb, int64_t sh, int64_t sn, int64_t start, int64_t threads, double scale) {
    CACHE(a);
    memset(out, 0, (size_t)(b * h * n * e) * sizeof(REAL));
    if (!rows || !m) return 0;
#pragma omp parallel num_threads((int)min64(threads, b * g)) if (threads > 1 && b * g > 1)
    {
        TABLES(p, 1)
        unsigned mode = subnormals_off();
#pragma omp for schedule(static)
        for (int64_t task = 0; task < b * g; task++) {
            if (!p) continue;
            R(weights_of)(&a, task, rows, row, p);
            R(mix_cache)(&a, p, v, v_late, e, task, rows, row, out + task * rows * e);
        }
        subnormals_back(mode);
        free(p);
    }
    return failed;
}
