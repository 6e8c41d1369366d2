/* H_t = alpha_t H_{t-1} + k_t v_t^T, out_t = q_t^T Re H_t with one complex gate per head, in chunks. Included once per precision.
 *
 * Inside a chunk, with p_t the product of the gates from its start, out = (q k^T * Re(p_t / p_s)) v + q Re(p_t H), and the
 * state that leaves it is p_end H + sum_s (p_end / p_s) k_s v_s^T. Gates are at least 1/2 in size: 1 / p_s <= 2^CHUNK.
 *
 * A state in scratch memory is [2 rows][columns]: real parts over imaginary parts. */

#ifndef GATE_LOOP_WIDE_ONCE
#define GATE_LOOP_WIDE_ONCE
#define CHUNK 64
typedef struct {
    int64_t b, h, n, d, e, dp, ep, m; /* dp, ep: d and e padded; m: steps of a chunk */
} wide_sizes;

static inline wide_sizes wide_size(int64_t b, int64_t h, int64_t n, int64_t d, int64_t e) {
    /* A chunk costs m (d + e) / 2 inside and 4 d e outside: long chunks pay for wide heads. */
    int64_t m = d + e >= 64 ? 64 : 32;
    return (wide_sizes){b, h, n, d, e, up(d, PAD), up(e, PAD), m};
}
#define AT(x, i) ((x) + (i) / s.h * x##_batch + (i) % s.h * x##_head)
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

/* state *= er + i ei, for real and imaginary parts of `count` numbers each, in rows of 2 x `half` or in two blocks. */
static void S(turn)(REAL *state, int64_t rows, int64_t row, int64_t half, REAL er, REAL ei) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < half; j += LANES) {
            REAL *re = state + r * row + j, *im = re + half;
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

void S(gate_loop_wide)(const REAL *q, const REAL *k, const REAL *v, const REAL *a, const REAL *h0, REAL *out, REAL *last,
                       REAL *product, int64_t b, int64_t h, int64_t n, int64_t d, int64_t e, int64_t q_batch, int64_t q_head,
                       int64_t q_row, int64_t k_batch, int64_t k_head, int64_t k_row, int64_t v_batch, int64_t v_head, int64_t v_row,
                       int64_t a_batch, int64_t a_head, int64_t a_row, int64_t out_batch, int64_t out_head, int64_t out_row,
                       int64_t threads) {
    wide_sizes s = wide_size(b, h, n, d, e);
    int64_t dp = s.dp, ep = s.ep, tasks = b * h;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        size_t numbers = (size_t)(2 * dp * ep + CHUNK * (7 * dp + 2 * ep + CHUNK));
        REAL *state = scratch(numbers * sizeof(REAL));
        if (!state) abort();
        REAL *qc = state + 2 * dp * ep, *kc = qc + CHUNK * dp, *kt = kc + CHUNK * dp, *two = kt + CHUNK * dp;
        REAL *vc = two + CHUNK * 2 * dp, *oc = vc + CHUNK * ep, *scores = oc + CHUNK * ep;
        S(gates) g;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tasks; i++) {
            double whole[2] = {1, 0};
            memset(state, 0, (size_t)(2 * dp * ep) * sizeof(REAL));
            if (h0)
                for (int64_t r = 0; r < d; r++)
                    for (int64_t j = 0; j < e; j++)
                        for (int64_t c = 0; c < 2; c++) state[(c * dp + r) * ep + j] = h0[2 * ((i * d + r) * e + j) + c];
            for (int64_t start = 0; start < n; start += s.m) {
                int64_t m = min64(s.m, n - start), rows = up(m, PAD);
                S(chunk_gates)(AT(a, i) + start * a_row, a_row, m, &g, whole);
                S(pack)(AT(q, i) + start * q_row, q_row, qc, dp, m, d, rows);
                S(pack)(AT(k, i) + start * k_row, k_row, kc, dp, m, d, rows);
                S(pack)(AT(v, i) + start * v_row, v_row, vc, ep, m, e, rows);
                S(transpose)(kc, dp, kt, CHUNK, rows, dp);
                S(times)(qc, dp, kt, CHUNK, scores, CHUNK, rows, rows, d, 0, RESULT_LOWER);
                S(decay)(scores, &g, rows);
                S(double_rows)(qc, g.pr, g.pi, -1, two, dp, rows);
                S(times)(two, 2 * dp, state, ep, oc, ep, rows, ep, 2 * dp, 0, FULL);
                S(times)(scores, CHUNK, vc, ep, oc, ep, rows, ep, rows, 1, LEFT_LOWER);
                REAL *o = out + i / h * out_batch + i % h * out_head + start * out_row;
                for (int64_t t = 0; t < m; t++) memcpy(o + t * out_row, oc + t * ep, (size_t)e * sizeof(REAL));
                S(double_rows)(kc, g.zr, g.zi, 1, two, dp, rows);
                S(turn)(state, 1, 0, dp * ep, g.er, g.ei);
                S(times_left_transposed)(two, 2 * dp, vc, ep, state, ep, 2 * dp, ep, m, 1, FULL);
            }
            for (int64_t r = 0; r < d; r++)
                for (int64_t j = 0; j < e; j++)
                    for (int64_t c = 0; c < 2; c++) last[2 * ((i * d + r) * e + j) + c] = state[(c * dp + r) * ep + j];
            product[2 * i] = (REAL)whole[0], product[2 * i + 1] = (REAL)whole[1];
        }
        free(state);
    }
}
