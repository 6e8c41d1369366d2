/* out_i = sum_{j <= i} (q_i . k_j) v_j (j >= i if reverse), as a running sum S += k_j v_j^T,
 * ROWS positions at a time: a vector of S is loaded once for all of them, takes in their keys and is read by their queries.
 * Where S is large, or the sequence too short to pay for it, in chunks: causal_chunks.h. One AVX-512 core, 8 heads, chunks against
 * the running sum: width 64, 16 positions 0.45 of the time, 1024 positions 0.78; width 128 0.23 and 0.72; width 32 0.84 and 1.22.
 *
 * q [b, h, n, d], k [b, g, n, d], v [b, g, n, e], out [b, h, n, e], all contiguous. If g < h, each key head serves h / g
 * query heads; if h < g, S sums over the g / h key heads of a query head. Where threads outnumber groups of heads they share the
 * columns of v, which do not meet. Rows of bfloat16 are widened ROWS positions at a time, and summed in float. */
#include "common.h"

#ifndef REAL
#if defined(__AVX512F__) || defined(__aarch64__)
#define ROWS 8 /* positions at a time: one register each for values and sums */
#else
#define ROWS 4
#endif
#define RECENT 64 /* a multiple of ROWS */
#define REAL float
#define NUM float
#define HALF 0
#define S(x) PASTE(fnattn_, x, _, f32)
#define VF vf32
#define LANES LANES_f32
#define WIDE 0
#include "causal_dot.c"
#undef REAL
#undef NUM
#undef HALF
#undef S
#undef VF
#undef VI
#undef INT
#undef LANES
#undef WIDE
#define REAL double
#define NUM double
#define HALF 0
#define S(x) PASTE(fnattn_, x, _, f64)
#define VF vf64
#define LANES LANES_f64
#define WIDE 1
#include "causal_dot.c"
#undef REAL
#undef NUM
#undef HALF
#undef S
#undef VF
#undef VI
#undef INT
#undef LANES
#undef WIDE
#define REAL float
#define NUM uint16_t
#define HALF 1
#define S(x) PASTE(fnattn_, x, _, bf16)
#define VF vf32
#define LANES LANES_f32
#define WIDE 0
#include "causal_dot.c"
#else
#include "gate_lanes.h"
#include "gate_rows.h"
#include "tiles.h"

/* Rows of q, k or out: from head to head, and from one position visited to the next. */
typedef struct {
    int64_t head, row;
} S(apart);

/* One vector of columns of `rows` positions. v: [keys][rows][width]. The first query head takes the keys in; the sums that it
 * reads on the way go to seen [d][rows] for the others. `one`: keys is 1, `alone`: queries is 1. */
INLINE void S(dot_rows)(const REAL *q, const REAL *k, const REAL *v, NUM *out, S(apart) in, S(apart) on, int64_t queries, int64_t keys,
                        int64_t d, int64_t size, const REAL *base, REAL *recent, int64_t width, VF *seen, const int rows, const int one,
                        const int alone) {
    int64_t step = in.row;
    for (int64_t r = 0; r < (alone ? 1 : queries); r++) {
        VF a[ROWS], x[ROWS];
#pragma GCC unroll 8
        for (int t = 0; t < rows; t++) {
            a[t] = (VF){0};
            if (one) x[t] = *(const VF *)(v + t * width);
        }
        /* One pointer per three rows: offsets 0, 1 and 2 strides are addressing modes, so few registers hold addresses. */
        const REAL *p = q + r * in.head, *q0[3] = {p, p + 3 * step, p + 6 * step}, *k0[3] = {k, k + 3 * step, k + 6 * step};
        if (r)
            for (int64_t i = 0; i < d; i++)
#pragma GCC unroll 8
                for (int t = 0; t < rows; t++) a[t] += q0[t / 3][t % 3 * step + i] * seen[i * rows + t];
        else
            for (int64_t i = 0; i < d; i++) {
                VF *own = (VF *)(recent + i * width), sum = *own, before = *(const VF *)(base + i * width), more[ROWS];
                for (int64_t s = 0; s < keys && !one; s++)
#pragma GCC unroll 8
                    for (int t = 0; t < rows; t++) {
                        VF product = k0[t / 3][s * in.head + t % 3 * step + i] * *(const VF *)(v + (s * rows + t) * width);
                        more[t] = s ? more[t] + product : product;
                    }
#pragma GCC unroll 8
                for (int t = 0; t < rows; t++) {
                    sum += one ? k0[t / 3][t % 3 * step + i] * x[t] : more[t];
                    VF all = before + sum;
                    if (!alone) seen[i * rows + t] = all;
                    a[t] += q0[t / 3][t % 3 * step + i] * all;
                }
                *own = sum;
            }
#pragma GCC unroll 8
        for (int t = 0; t < rows; t++) S(write)(out + r * on.head + t * on.row, a[t], size);
    }
}

/* Rows of bfloat16 [heads][rows][d] as floats, in the order in which they are visited. */
INLINE void S(widened)(REAL *to, const NUM *from, S(apart) apart, int64_t heads, int64_t rows, int64_t d) {
    for (int64_t s = 0; s < heads; s++)
        for (int64_t t = 0; t < rows; t++)
            for (int64_t i = 0; i < d; i += LANES) {
                int64_t count = min64(LANES, d - i);
                S(store)(to + (s * rows + t) * d + i, S(read)(from + s * apart.head + t * apart.row + i, count), count);
            }
}

/* One (batch, group), `part` columns of v and out from the first of them on, whose rows are e apart. The sum is in two halves, so
 * that a long one is as precise as a short one: that of the last RECENT positions, and that of all before, to which it is added
 * then. base and recent are [d][width] with width = part rounded up to whole vectors, zeroed by the caller, like `values`. */
static void S(dot_group)(const NUM *q, const NUM *k, const NUM *v, NUM *out, int64_t queries, int64_t keys, int64_t n, int64_t d,
                         int64_t e, int64_t part, int reverse, REAL *base, REAL *values, int64_t width) {
    REAL *recent = base + d * width, *wide = values + keys * ROWS * width;
    VF *seen = (VF *)(wide + (HALF ? (queries + keys) * ROWS * d : 0));
    S(apart) there = {n * d, reverse ? -d : d}, on = {n * e, reverse ? -e : e};
    for (int64_t at = 0, rows; at < n; at += rows) {
        rows = n - at < ROWS ? 1 : ROWS;
        int64_t t = reverse ? n - 1 - at : at;
        for (int64_t s = 0; s < keys; s++)
            for (int64_t i = 0; i < rows; i++) {
                const NUM *row = v + (s * n + t) * e + i * on.row;
                if (HALF) S(widened)(values + (s * rows + i) * width, row, there, 1, 1, part);
                else memcpy(values + (s * rows + i) * width, row, (size_t)part * sizeof(REAL));
            }
        const REAL *q_rows = (const REAL *)(q + t * d), *k_rows = (const REAL *)(k + t * d);
        S(apart) in = there;
        if (HALF) {
            in = (S(apart)){rows * d, d};
            S(widened)(wide, q + t * d, there, queries, rows, d);
            S(widened)(wide + queries * rows * d, k + t * d, there, keys, rows, d);
            q_rows = wide, k_rows = wide + queries * rows * d;
        }
        for (int64_t c = 0; c < width; c += LANES) {
            int64_t size = min64(LANES, part - c);
#define DOT(COUNT, ONE, ALONE)                                                                                                     \
    S(dot_rows)(q_rows, k_rows, values + c, out + t * e + c, in, on, queries, keys, d, size, base + c, recent + c, width, seen, COUNT, \
                ONE, ALONE)
            if (rows > 1) {
                if (keys > 1) DOT(ROWS, 0, 1);
                else if (queries > 1) DOT(ROWS, 1, 0);
                else DOT(ROWS, 1, 1);
            } else if (keys > 1) DOT(1, 0, 1);
            else if (queries > 1) DOT(1, 1, 0);
            else DOT(1, 1, 1);
#undef DOT
        }
        if ((at + rows) % RECENT) continue;
        for (int64_t i = 0; i < d * width; i += LANES) {
            *(VF *)(base + i) += *(VF *)(recent + i);
            *(VF *)(recent + i) = (VF){0};
        }
    }
}

#include "causal_chunks.h"

void S(causal_dot)(const NUM *q, const NUM *k, const NUM *v, NUM *out, int64_t b, int64_t h, int64_t g, int64_t n, int64_t d,
                   int64_t e, int64_t reverse, int64_t threads) {
    if (!b || !h || !g || !n || !e) return;
    int64_t groups = min64(h, g), queries = h / groups, keys = g / groups, vectors = (e + LANES - 1) / LANES;
    /* Parts of whole vectors; the last may end in a piece of one. */
    int64_t parts = threads > b * groups ? min64(vectors, (threads + b * groups - 1) / (b * groups)) : 1, tasks = b * groups * parts;
    size_t numbers = (size_t)(2 * d + keys * ROWS) * (size_t)((vectors + parts - 1) / parts * LANES);
    size_t seen = queries > 1 ? (size_t)(d * ROWS * LANES) : 0, wide = HALF ? (size_t)((queries + keys) * ROWS * d) : 0;
    int64_t chunked = d * e >= 4096 || (d * e >= 1024 && n >= 4 && n <= CHUNK), dp = up(d, PAD), most = up((vectors + parts - 1) / parts * LANES, PAD);
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        REAL *state = scratch((chunked ? S(chunk_numbers)(dp, most) : numbers + wide + seen) * sizeof(REAL));
        if (!state) abort();
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t i = task / parts, part = task % parts, from = part * vectors / parts * LANES, to = (part + 1) * vectors / parts * LANES;
            const NUM *q_i = q + i * queries * n * d, *k_i = k + i * keys * n * d, *v_i = v + i * keys * n * e + from;
            NUM *out_i = out + i * queries * n * e + from;
            if (chunked) {
                int64_t ep = up(to - from, PAD);
                S(chunk_room) w = S(chunk_rooms)(state, dp, ep);
                S(dot_chunks)(q_i, k_i, v_i, out_i, queries, keys, n, d, e, min64(e, to) - from, (int)reverse, &w, dp, ep);
                continue;
            }
            memset(state, 0, numbers * sizeof(REAL));
            S(dot_group)(q_i, k_i, v_i, out_i, queries, keys, n, d, e, min64(e, to) - from, (int)reverse, state,
                         state + 2 * d * (to - from), to - from);
        }
        free(state);
    }
}
#endif
