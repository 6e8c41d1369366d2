/* H_t = alpha_t H_{t-1} + k_t v_t^T, out_t = q_t^T Re H_t with one complex gate per head, in chunks. Included once per precision.
 *
 * Inside a chunk, with p_t the product of the gates from its start, out = (q k^T * Re(p_t / p_s)) v + q Re(p_t H), and the
 * state that leaves it is p_end H + sum_s (p_end / p_s) k_s v_s^T. Gates are at least 1/2 in size: 1 / p_s <= 2^CHUNK.
 *
 * A state in scratch memory is [2 rows][columns]: real parts over imaginary parts. */

#ifndef GATE_LOOP_WIDE_ONCE
#define GATE_LOOP_WIDE_ONCE
#define CHUNK 64
#define TOGETHER 32 /* chunks whose states are kept at a time where several threads share a head */
typedef struct {
    int64_t b, h, n, d, e, dp, ep, m; /* dp, ep: d and e padded; m: steps of a chunk */
} wide_sizes;

static inline wide_sizes wide_size(int64_t b, int64_t h, int64_t n, int64_t d, int64_t e) {
    /* A chunk costs m (d + e) / 2 inside and 4 d e outside: long chunks pay for wide heads. */
    int64_t m = d + e >= 64 ? 64 : 32;
    return (wide_sizes){b, h, n, d, e, up(d, PAD), up(e, PAD), m};
}

/* Heads that a thread takes by turns, a chunk of each: a row holds all heads side by side, so one after another is a walk with long
 * steps that misses the translation of addresses again for every head. As many as keep `bytes` of each in the second cache, and no
 * thread idle. One with the wide vectors that this was not measured with. */
#if VECTOR_BYTES == 64
#define HEADS 1
#else
#define HEADS 16
#endif
static inline int64_t heads_together(int64_t tasks, int64_t threads, int64_t bytes) {
    int64_t most = max64(1, min64(HEADS, (128 << 10) / max64(1, bytes))), rounds = (tasks + threads * most - 1) / (threads * most);
    return (tasks + threads * rounds - 1) / (threads * rounds);
}
#define AT(x, i) ((x) + (i) / s.h * x##_batch + (i) % s.h * x##_head)
#define PLACE(x, i, start) ((i) / s.h * x##_batch + (i) % s.h * x##_head + (start) * x##_row)
#endif

typedef struct {
    REAL pr[CHUNK], pi[CHUNK];                                 /* p_t */
    REAL wr[CHUNK], wi[CHUNK];                                 /* 1 / p_t */
    REAL zr[CHUNK], zi[CHUNK];                                 /* p_end / p_t */
    REAL ux[CHUNK], uy[CHUNK], size[CHUNK], inverse[CHUNK];    /* the gates */
    REAL er, ei;                                               /* p_end */
} S(gates);

/* The gates of `steps` steps; products in double, and zeros behind the end. `whole` *= p_end. */
static void S(chunk_gates)(const REAL *a, int64_t row, int64_t steps, S(gates) *g, double whole[2]) {
    REAL pairs[2 * CHUNK] = {0};
    memset(g, 0, sizeof *g);
    for (int64_t t = 0; t < steps; t++) pairs[2 * t] = a[t * row], pairs[2 * t + 1] = a[t * row + 1];
    for (int64_t t = 0; t < steps; t += LANES) {
        S(gate) x = S(make_gate)(S(load_pairs)(pairs + 2 * t, LANES), 1, NULL);
        S(store)(g->ux + t, x.ux, LANES), S(store)(g->uy + t, x.uy, LANES);
        S(store)(g->size + t, x.size, LANES), S(store)(g->inverse + t, x.inverse, LANES);
    }
    double pr = 1, pi = 0, ir[CHUNK], ii[CHUNK];
    for (int64_t t = 0; t < steps; t++) {
        double size = g->size[t], re = size * g->ux[t], im = size * g->uy[t], next = pr * re - pi * im;
        pi = pr * im + pi * re, pr = next;
        g->pr[t] = (REAL)pr, g->pi[t] = (REAL)pi;
        double over = 1 / (pr * pr + pi * pi);
        ir[t] = pr * over, ii[t] = -pi * over;
    }
    for (int64_t t = 0; t < steps; t++) {
        g->wr[t] = (REAL)ir[t], g->wi[t] = (REAL)ii[t];
        g->zr[t] = (REAL)(pr * ir[t] - pi * ii[t]), g->zi[t] = (REAL)(pr * ii[t] + pi * ir[t]);
    }
    g->er = (REAL)pr, g->ei = (REAL)pi;
    double next = whole[0] * pr - whole[1] * pi;
    whole[1] = whole[0] * pi + whole[1] * pr, whole[0] = next;
}

/* to[t] = (x_t re_t, sign x_t im_t): rows of dp numbers become rows of 2 dp. */
static void S(double_rows)(const REAL *x, const REAL *re, const REAL *im, REAL sign, REAL *to, int64_t dp, int64_t rows) {
    for (int64_t t = 0; t < rows; t++)
        for (int64_t j = 0; j < dp; j += LANES) {
            VF y = S(load)(x + t * dp + j, LANES);
            S(store)(to + t * 2 * dp + j, y * re[t], LANES);
            S(store)(to + t * 2 * dp + dp + j, y * (sign * im[t]), LANES);
        }
}

/* state *= er + i ei for `rows` rows, `row` apart, of `width` real parts; the imaginary ones lie `imag` behind them. */
static void S(turn)(REAL *state, int64_t rows, int64_t row, int64_t width, int64_t imag, REAL er, REAL ei) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < width; j += LANES) {
            REAL *re = state + r * row + j, *im = re + imag;
            VF x = S(load)(re, LANES), y = S(load)(im, LANES);
            S(store)(re, x * er - y * ei, LANES), S(store)(im, x * ei + y * er, LANES);
        }
}

INLINE VI S(lane_numbers)(void) {
    VI x;
    for (int i = 0; i < LANES; i++) x[i] = i;
    return x;
}

/* scores[t][s] *= Re(p_t / p_s) for s <= t, and 0 for the s > t that a tile of the next product reads. */
static void S(decay)(REAL *scores, const S(gates) *g, int64_t rows) {
    VI lanes = S(lane_numbers)();
    for (int64_t t = 0; t < rows; t++)
        for (int64_t j = 0; j < up(up(t + 1, TILE), LANES); j += LANES) {
            VF x = S(load)(scores + t * CHUNK + j, LANES);
            x *= S(load)(g->wr + j, LANES) * g->pr[t] - S(load)(g->wi + j, LANES) * g->pi[t];
            if (j + LANES > t) x = S(select)(lanes + (INT)j <= (INT)t, x, S(all)(0));
            S(store)(scores + t * CHUNK + j, x, LANES);
        }
}

/* A state [d][e] of pairs, or NULL for zero, into scratch [2 dp][ep]. */
static void S(plain_state_in)(const REAL *from, REAL *to, int64_t d, int64_t e, int64_t dp, int64_t ep) {
    memset(to, 0, (size_t)(2 * dp * ep) * sizeof(REAL));
    if (!from) return;
    for (int64_t r = 0; r < d; r++)
        for (int64_t j = 0; j < e; j++)
            for (int64_t c = 0; c < 2; c++) to[(c * dp + r) * ep + j] = from[2 * (r * e + j) + c];
}

/* A part of a state: `rows` rows of `width` real parts, `row` apart; imaginary parts `imag` behind. */
static void S(copy_part)(const REAL *from, REAL *to, int64_t rows, int64_t width, int64_t imag, int64_t row) {
    for (int64_t c = 0; c < 2; c++)
        for (int64_t r = 0; r < rows; r++)
            memcpy(to + c * imag + r * row, from + c * imag + r * row, (size_t)width * sizeof(REAL));
}

typedef struct {
    REAL *q, *k, *kt, *two, *v, *out, *scores;
    S(gates) gates;
} S(wide_work);

static S(wide_work) *S(wide_room)(int64_t dp, int64_t ep) {
    size_t head = (sizeof(S(wide_work)) + 63) / 64 * 64;
    char *memory = scratch(head + (size_t)(CHUNK * (5 * dp + 2 * ep + CHUNK)) * sizeof(REAL));
    if (!memory) abort();
    S(wide_work) *w = (S(wide_work) *)memory;
    w->q = (REAL *)(memory + head), w->k = w->q + CHUNK * dp, w->kt = w->k + CHUNK * dp, w->two = w->kt + CHUNK * dp;
    w->v = w->two + CHUNK * 2 * dp, w->out = w->v + CHUNK * ep, w->scores = w->out + CHUNK * ep;
    return w;
}

/* Rows of one chunk's results from q, k, v and the gates in scratch and the state that enters. */
static void S(wide_outputs)(S(wide_work) *w, const REAL *state, REAL *out, int64_t out_row, int64_t m, int64_t d, int64_t e,
                            int64_t dp, int64_t ep) {
    int64_t rows = up(m, PAD);
    S(transpose)(w->k, dp, w->kt, CHUNK, rows, dp);
    S(times)(w->q, dp, w->kt, CHUNK, w->scores, CHUNK, rows, rows, d, 0, RESULT_LOWER);
    S(decay)(w->scores, &w->gates, rows);
    if (state) {
        S(double_rows)(w->q, w->gates.pr, w->gates.pi, -1, w->two, dp, rows);
        S(times)(w->two, 2 * dp, state, ep, w->out, ep, rows, ep, 2 * dp, 0, FULL);
    }
    S(times)(w->scores, CHUNK, w->v, ep, w->out, ep, rows, ep, rows, state != NULL, LEFT_LOWER);
    S(unpack)(w->out, ep, out, out_row, m, e);
}

/* The state behind a chunk, in place, or a part of it: `width` rows of real parts by `columns`, imaginary parts `imag` behind.
 * k and v in scratch hold that part of them. Every number is summed in one order, whatever the part. */
static void S(wide_advance)(S(wide_work) *w, REAL *state, int64_t width, int64_t columns, int64_t imag, int64_t row, int64_t m) {
    S(double_rows)(w->k, w->gates.zr, w->gates.zi, 1, w->two, width, up(m, PAD));
    S(turn)(state, width, row, columns, imag, w->gates.er, w->gates.ei);
    for (int64_t c = 0; c < 2; c++)
        S(times_left_transposed)(w->two + c * width, 2 * width, w->v, columns, state + c * imag, row, width, columns, m, 1, FULL);
}

void S(gate_loop_wide)(const REAL *q, const REAL *k, const REAL *v, const REAL *a, const REAL *h0, REAL *out, REAL *last,
                       REAL *product, int64_t b, int64_t h, int64_t n, int64_t d, int64_t e, int64_t q_batch, int64_t q_head,
                       int64_t q_row, int64_t k_batch, int64_t k_head, int64_t k_row, int64_t v_batch, int64_t v_head, int64_t v_row,
                       int64_t a_batch, int64_t a_head, int64_t a_row, int64_t out_batch, int64_t out_head, int64_t out_row,
                       int64_t threads) {
    wide_sizes s = wide_size(b, h, n, d, e);
    int64_t dp = s.dp, ep = s.ep, tasks = b * h, size = 2 * dp * ep, chunks = (n + s.m - 1) / s.m;
/* Asks for the rows of the next turn between products, so that they come while products are made. */
#define FETCH(x, width) S(fetch)(x + PLACE(x, i_next, next), x##_row, later, width)
#define LAST(i, state)                                                                                             \
    for (int64_t r = 0; r < d; r++)                                                                                \
        for (int64_t j = 0; j < e; j++)                                                                            \
            for (int64_t c = 0; c < 2; c++) last[2 * (((i)*d + r) * e + j) + c] = (state)[(c * dp + r) * ep + j]
    if (threads <= tasks || chunks == 1) { /* a thread per head or several heads */
        int64_t together = heads_together(tasks, min64(threads, tasks), size * (int64_t)sizeof(REAL));
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
        {
            REAL *states = scratch((size_t)(together * size) * sizeof(REAL));
            S(wide_work) *w = S(wide_room)(dp, ep);
            unsigned mode = subnormals_off();
            if (!states) abort();
#pragma omp for schedule(dynamic)
            for (int64_t first = 0; first < tasks; first += together) {
                int64_t end = min64(tasks, first + together);
                double wholes[HEADS][2];
                for (int64_t i = first; i < end; i++) {
                    wholes[i - first][0] = 1, wholes[i - first][1] = 0;
                    S(plain_state_in)(h0 ? h0 + i * 2 * d * e : NULL, states + (i - first) * size, d, e, dp, ep);
                }
                for (int64_t turn = 0; turn < chunks * (end - first); turn++) {
                    int64_t i = first + turn % (end - first), start = turn / (end - first) * s.m;
                    int64_t m = min64(s.m, n - start), rows = up(m, PAD);
                    int64_t i_next = i + 1 < end ? i + 1 : first, next = i + 1 < end ? start : start + s.m, later = min64(s.m, n - next);
                    REAL *state = states + (i - first) * size;
                    S(chunk_gates)(AT(a, i) + start * a_row, a_row, m, &w->gates, wholes[i - first]);
                    S(pack)(AT(q, i) + start * q_row, q_row, w->q, dp, m, d, rows);
                    S(pack)(AT(k, i) + start * k_row, k_row, w->k, dp, m, d, rows);
                    S(pack)(AT(v, i) + start * v_row, v_row, w->v, ep, m, e, rows);
                    if (HEADS > 1) FETCH(q, d), FETCH(a, 2);
                    S(wide_outputs)(w, start || h0 ? state : NULL, AT(out, i) + start * out_row, out_row, m, d, e, dp, ep);
                    if (HEADS > 1) FETCH(k, d), FETCH(v, e);
                    S(wide_advance)(w, state, dp, ep, dp * ep, ep, m);
                }
                for (int64_t i = first; i < end; i++) {
                    LAST(i, states + (i - first) * size);
                    product[2 * i] = (REAL)wholes[i - first][0], product[2 * i + 1] = (REAL)wholes[i - first][1];
                }
            }
            subnormals_back(mode);
            free(states), free(w);
        }
        return;
    }
    /* More threads than heads. By turns, up to TOGETHER chunks at a time: the states, each thread a part of every state; and the
     * results, each thread some chunks. The same sums in the same order as above. */
    int64_t keep = min64(chunks, TOGETHER), by_d = min64(dp / PAD, threads), by_e = min64(ep / PAD, (threads + by_d - 1) / by_d);
    int64_t parts = by_d * by_e;
    REAL *states = scratch((size_t)(tasks * (keep + 1) * size) * sizeof(REAL));
    double *wholes = scratch((size_t)(2 * tasks) * sizeof(double));
    if (!states || !wholes) abort();
    for (int64_t i = 0; i < tasks; i++) {
        S(plain_state_in)(h0 ? h0 + i * 2 * d * e : NULL, states + i * (keep + 1) * size, d, e, dp, ep);
        wholes[2 * i] = 1, wholes[2 * i + 1] = 0;
    }
#pragma omp parallel num_threads((int)threads)
    {
        S(wide_work) *w = S(wide_room)(dp, ep);
        unsigned mode = subnormals_off();
        for (int64_t first = 0; first < chunks; first += keep) {
            int64_t count = min64(keep, chunks - first);
#pragma omp for schedule(static)
            for (int64_t task = 0; task < tasks * parts; task++) {
                int64_t i = task / parts, part = task % parts, unit_d = dp / PAD, unit_e = ep / PAD;
                int64_t d0 = part / by_e * unit_d / by_d * PAD, d1 = (part / by_e + 1) * unit_d / by_d * PAD;
                int64_t e0 = part % by_e * unit_e / by_e * PAD, e1 = (part % by_e + 1) * unit_e / by_e * PAD;
                REAL *own = states + i * (keep + 1) * size + d0 * ep + e0;
                double ignored[2] = {1, 0};
                if (first) S(copy_part)(own + keep * size, own, d1 - d0, e1 - e0, dp * ep, ep);
                for (int64_t c = 0; c < count; c++) {
                    int64_t start = (first + c) * s.m, m = min64(s.m, n - start), rows = up(m, PAD);
                    S(chunk_gates)(AT(a, i) + start * a_row, a_row, m, &w->gates, part ? ignored : wholes + 2 * i);
                    S(pack)(AT(k, i) + start * k_row + d0, k_row, w->k, d1 - d0, m, max64(0, min64(d, d1) - d0), rows);
                    S(pack)(AT(v, i) + start * v_row + e0, v_row, w->v, e1 - e0, m, max64(0, min64(e, e1) - e0), rows);
                    S(copy_part)(own + c * size, own + (c + 1) * size, d1 - d0, e1 - e0, dp * ep, ep);
                    S(wide_advance)(w, own + (c + 1) * size, d1 - d0, e1 - e0, dp * ep, ep, m);
                }
            }
#pragma omp for schedule(static)
            for (int64_t task = 0; task < tasks * count; task++) {
                int64_t i = task / count, c = task % count, start = (first + c) * s.m, m = min64(s.m, n - start), rows = up(m, PAD);
                double ignored[2] = {1, 0};
                S(chunk_gates)(AT(a, i) + start * a_row, a_row, m, &w->gates, ignored);
                S(pack)(AT(q, i) + start * q_row, q_row, w->q, dp, m, d, rows);
                S(pack)(AT(k, i) + start * k_row, k_row, w->k, dp, m, d, rows);
                S(pack)(AT(v, i) + start * v_row, v_row, w->v, ep, m, e, rows);
                const REAL *state = states + (i * (keep + 1) + c) * size;
                S(wide_outputs)(w, start || h0 ? state : NULL, AT(out, i) + start * out_row, out_row, m, d, e, dp, ep);
            }
        }
        subnormals_back(mode);
        free(w);
    }
    for (int64_t i = 0; i < tasks; i++) {
        LAST(i, states + (i * (keep + 1) + (chunks - 1) % keep + 1) * size);
        product[2 * i] = (REAL)wholes[2 * i], product[2 * i + 1] = (REAL)wholes[2 * i + 1];
    }
#undef FETCH
#undef LAST
    free(states), free(wholes);
}
