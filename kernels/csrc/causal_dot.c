/* out_i = sum_{j <= i} (q_i . k_j) v_j (j >= i if reverse), as a running sum S += k_j v_j^T.
 *
 * q [b, h, n, d], k [b, g, n, d], v [b, g, n, e], out [b, h, n, e], all contiguous. If g < h, each key head serves h / g
 * query heads; if h < g, S sums over the g / h key heads of a query head. Where threads outnumber groups of heads they share the
 * columns of v, which do not meet. */
#include "common.h"

#ifndef REAL
#define REAL float
#define S(x) PASTE(fnattn_, x, _, f32)
#define VF vf32
#define LANES LANES_f32
#include "causal_dot.c"
#undef REAL
#undef S
#undef VF
#undef LANES
#define REAL double
#define S(x) PASTE(fnattn_, x, _, f64)
#define VF vf64
#define LANES LANES_f64
#include "causal_dot.c"
#else

/* One (batch, group), `part` columns of v and out from the first of them on, whose rows are e apart: `state` is [d][width] with
 * width = part rounded up to whole vectors, zeroed by the caller. */
static void S(dot_group)(const REAL *q, const REAL *k, const REAL *v, REAL *out, int64_t queries, int64_t keys, int64_t n,
                         int64_t d, int64_t e, int64_t part, int reverse, REAL *state, REAL *row, int64_t width) {
    int64_t vectors = width / LANES;
    for (int64_t step = 0; step < n; step++) {
        int64_t t = reverse ? n - 1 - step : step;
        for (int64_t r = 0; r < keys; r++) {
            const REAL *k_t = k + (r * n + t) * d;
            memcpy(row, v + (r * n + t) * e, (size_t)part * sizeof(REAL));
            for (int64_t i = 0; i < d; i++) {
                VF *s = (VF *)(state + i * width);
                const VF *x = (const VF *)row;
                REAL w = k_t[i];
                for (int64_t c = 0; c < vectors; c++) s[c] += w * x[c];
            }
        }
        for (int64_t r = 0; r < queries; r++) {
            const REAL *q_t = q + (r * n + t) * d;
            REAL *o = out + (r * n + t) * e;
            int64_t c = 0;
            for (; c + 4 <= vectors; c += 4) {
                VF a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0};
                for (int64_t i = 0; i < d; i++) {
                    const VF *s = (const VF *)(state + i * width) + c;
                    REAL w = q_t[i];
                    a0 += w * s[0], a1 += w * s[1], a2 += w * s[2], a3 += w * s[3];
                }
                VF a[4] = {a0, a1, a2, a3};
                memcpy(o + c * LANES, a, (size_t)min64(4 * LANES, part - c * LANES) * sizeof(REAL));
            }
            for (; c < vectors; c++) {
                VF a = {0};
                for (int64_t i = 0; i < d; i++) a += q_t[i] * ((const VF *)(state + i * width))[c];
                memcpy(o + c * LANES, &a, (size_t)min64(LANES, part - c * LANES) * sizeof(REAL));
            }
        }
    }
}

void S(causal_dot)(const REAL *q, const REAL *k, const REAL *v, REAL *out, int64_t b, int64_t h, int64_t g, int64_t n, int64_t d,
                   int64_t e, int64_t reverse, int64_t threads) {
    if (!b || !h || !g || !n || !e) return;
    int64_t groups = min64(h, g), queries = h / groups, keys = g / groups, vectors = (e + LANES - 1) / LANES;
    /* Parts of whole vectors; the last may end in a piece of one. */
    int64_t parts = threads > b * groups ? min64(vectors, (threads + b * groups - 1) / (b * groups)) : 1, tasks = b * groups * parts;
    size_t numbers = (size_t)(d + 1) * (size_t)((vectors + parts - 1) / parts * LANES);
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        REAL *state = scratch(numbers * sizeof(REAL));
        if (!state) abort();
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t i = task / parts, part = task % parts, from = part * vectors / parts * LANES, to = (part + 1) * vectors / parts * LANES;
            memset(state, 0, numbers * sizeof(REAL));
            S(dot_group)(q + i * queries * n * d, k + i * keys * n * d, v + i * keys * n * e + from, out + i * queries * n * e + from,
                         queries, keys, n, d, e, min64(e, to) - from, (int)reverse, state, state + d * (to - from), to - from);
        }
        free(state);
    }
}
#endif
