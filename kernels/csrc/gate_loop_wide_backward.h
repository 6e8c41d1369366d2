/* Gradients of gate_loop_wide. Included once per precision.
 *
 * Forward over the chunks to find the state H that enters each; then backward with R, the gradient of the state that leaves.
 * With S = q k^T, dS = g v^T, D = Re(p_t / p_s) and E = Im(p_t / p_s):
 *
 *     dq = (dS D) k + Re(p H) g      dk = (dS D)^T q + Re(conj(z) R) v      dv = (S D)^T g + Re(conj(z) R)^T k
 *
 * with z = p_end / p_s and R stored as the gradients of the real and of the imaginary part of the state. The loss sees the gates
 * through L_t = sum of log alpha: dL/d Re L_t = q.dq - k.dk, and the same with the decay turned by 90 degrees for Im L_t; what
 * lies behind the chunk counts as conj(H) R. These are summed from the chunk's end.
 *
 * States are transposed here, [e][2 d], so that the products run along d. */

/* t[s], u[s] of one row: dS -> dS D, S -> S D; the turned products go to `angle` (over the row) and `turned` (over columns). */
static void S(decay_back)(REAL *scores, REAL *d_scores, const S(gates) *g, VF *angle, REAL *turned, int64_t rows) {
    VI lanes = S(lane_numbers)();
    memset(turned, 0, CHUNK * sizeof(REAL));
    for (int64_t t = 0; t < rows; t++) {
        VF row = S(all)(0);
        for (int64_t j = 0; j < up(up(t + 1, TILE), LANES); j += LANES) {
            REAL *sc = scores + t * CHUNK + j, *ds = d_scores + t * CHUNK + j;
            VF x = S(load)(sc, LANES), y = S(load)(ds, LANES), wr = S(load)(g->wr + j, LANES), wi = S(load)(g->wi + j, LANES);
            if (j + LANES > t) {
                VI seen = lanes + (INT)j <= (INT)t;
                x = S(select)(seen, x, S(all)(0)), y = S(select)(seen, y, S(all)(0));
                wr = S(select)(seen, wr, S(all)(0)), wi = S(select)(seen, wi, S(all)(0));
            }
            VF re = wr * g->pr[t] - wi * g->pi[t], turn = x * y * (wi * g->pr[t] + wr * g->pi[t]);
            S(store)(sc, x * re, LANES), S(store)(ds, y * re, LANES);
            S(store)(turned + j, S(load)(turned + j, LANES) + turn, LANES);
            row -= turn;
        }
        angle[t] = row;
    }
}

/* What the entering state gives to dq, and the leaving state's gradient to dk; and each step's share of the gates' gradient. */
static void S(finish_rows)(const REAL *q, const REAL *k, REAL *dq, REAL *dk, const REAL *read, const REAL *sent, const S(gates) *g,
                           const VF *angle, const REAL *turned, double *log_size, double *log_angle, int64_t dp, int64_t m) {
    for (int64_t t = 0; t < m; t++) {
        VF sizes = S(all)(0), angles = angle[t];
        for (int64_t j = 0; j < dp; j += LANES) {
            VF x = S(load)(q + t * dp + j, LANES), y = S(load)(k + t * dp + j, LANES);
            VF re = S(load)(read + t * 2 * dp + j, LANES), im = S(load)(read + t * 2 * dp + dp + j, LANES);
            VF dx = S(load)(dq + t * dp + j, LANES) + re * g->pr[t] - im * g->pi[t];
            angles -= x * (re * g->pi[t] + im * g->pr[t]);
            re = S(load)(sent + t * 2 * dp + j, LANES), im = S(load)(sent + t * 2 * dp + dp + j, LANES);
            VF dy = S(load)(dk + t * dp + j, LANES) + re * g->zr[t] + im * g->zi[t];
            angles += y * (re * g->zi[t] - im * g->zr[t]);
            sizes += x * dx - y * dy;
            S(store)(dq + t * dp + j, dx, LANES), S(store)(dk + t * dp + j, dy, LANES);
        }
        log_size[t] = S(total)(sizes), log_angle[t] = S(total)(angles) + turned[t];
    }
}

/* Sum of conj(h) r over a state. */
static void S(meet)(const REAL *h, const REAL *r, int64_t e, int64_t dp, double sums[2]) {
    VF re = S(all)(0), im = S(all)(0);
    for (int64_t i = 0; i < e; i++)
        for (int64_t j = 0; j < dp; j += LANES) {
            VF hr = S(load)(h + i * 2 * dp + j, LANES), hi = S(load)(h + i * 2 * dp + dp + j, LANES);
            VF rr = S(load)(r + i * 2 * dp + j, LANES), ri = S(load)(r + i * 2 * dp + dp + j, LANES);
            re += hr * rr + hi * ri, im += hr * ri - hi * rr;
        }
    sums[0] = S(total)(re), sums[1] = S(total)(im);
}

/* A state [d][e] of pairs into scratch [e][2 dp], which is zero outside; and back. */
static void S(state_in)(const REAL *from, REAL *to, int64_t d, int64_t e, int64_t dp) {
    for (int64_t r = 0; r < d; r++)
        for (int64_t j = 0; j < e; j++)
            for (int64_t c = 0; c < 2; c++) to[j * 2 * dp + c * dp + r] = from[2 * (r * e + j) + c];
}

static void S(state_out)(const REAL *from, REAL *to, int64_t d, int64_t e, int64_t dp) {
    for (int64_t r = 0; r < d; r++)
        for (int64_t j = 0; j < e; j++)
            for (int64_t c = 0; c < 2; c++) to[2 * (r * e + j) + c] = from[j * 2 * dp + c * dp + r];
}

void S(gate_loop_wide_backward)(const REAL *q, const REAL *k, const REAL *v, const REAL *a, const REAL *h0, const REAL *g,
                                const REAL *g_last, const REAL *g_product, REAL *dq, REAL *dk, REAL *dv, REAL *da, REAL *dh0, int64_t b,
                                int64_t h, int64_t n, int64_t d, int64_t e, int64_t q_batch, int64_t q_head, int64_t q_row,
                                int64_t k_batch, int64_t k_head, int64_t k_row, int64_t v_batch, int64_t v_head, int64_t v_row,
                                int64_t a_batch, int64_t a_head, int64_t a_row, int64_t g_batch, int64_t g_head, int64_t g_row,
                                int64_t dq_batch, int64_t dq_head, int64_t dq_row, int64_t dk_batch, int64_t dk_head, int64_t dk_row,
                                int64_t dv_batch, int64_t dv_head, int64_t dv_row, int64_t da_batch, int64_t da_head, int64_t da_row,
                                int64_t threads) {
    wide_sizes s = wide_size(b, h, n, d, e);
    int64_t dp = s.dp, ep = s.ep, tasks = b * h, chunks = (n + s.m - 1) / s.m, state = 2 * dp * ep;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        size_t numbers = (size_t)((chunks + 3) * state + CHUNK * (11 * dp + 4 * ep + 2 * CHUNK));
        REAL *states = scratch(numbers * sizeof(REAL));
        if (!states) abort();
        REAL *rt = states + (chunks + 1) * state, *r = rt + state; /* R as [e][2 d] and as [2 d][e] */
        REAL *qc = r + state, *kc = qc + CHUNK * dp, *xt = kc + CHUNK * dp, *two = xt + CHUNK * max64(dp, ep);
        REAL *read = two + CHUNK * 2 * dp, *sent = read + CHUNK * 2 * dp, *dqc = sent + CHUNK * 2 * dp, *dkc = dqc + CHUNK * dp;
        REAL *vc = dkc + CHUNK * dp, *gc = vc + CHUNK * ep, *dvc = gc + CHUNK * ep;
        REAL *scores = dvc + CHUNK * ep, *d_scores = scores + CHUNK * CHUNK;
        S(gates) gates;
        VF angle[CHUNK];
        REAL turned[CHUNK];
        double log_size[CHUNK], log_angle[CHUNK], behind[2], whole[2], fixed[2];
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tasks; i++) {
            whole[0] = 1, whole[1] = 0;
            memset(states, 0, (size_t)state * sizeof(REAL)), memset(rt, 0, (size_t)state * sizeof(REAL));
            if (h0) S(state_in)(h0 + i * 2 * d * e, states, d, e, dp);
            for (int64_t c = 0; c < chunks; c++) {
                int64_t start = c * s.m, m = min64(s.m, n - start), rows = up(m, PAD);
                REAL *next = states + (c + 1) * state;
                S(chunk_gates)(AT(a, i) + start * a_row, a_row, m, &gates, whole);
                S(pack)(AT(k, i) + start * k_row, k_row, kc, dp, m, d, rows);
                S(pack)(AT(v, i) + start * v_row, v_row, vc, ep, m, e, rows);
                S(double_rows)(kc, gates.zr, gates.zi, 1, two, dp, rows);
                memcpy(next, states + c * state, (size_t)state * sizeof(REAL));
                S(turn)(next, e, 2 * dp, dp, dp, gates.er, gates.ei);
                S(times_left_transposed)(vc, ep, two, 2 * dp, next, 2 * dp, ep, 2 * dp, m, 1, FULL);
            }
            fixed[0] = fixed[1] = 0;
            if (g_product) {
                const REAL *x = g_product + 2 * i;
                fixed[0] = x[0] * whole[0] + x[1] * whole[1], fixed[1] = x[1] * whole[0] - x[0] * whole[1];
            }
            if (g_last) S(state_in)(g_last + i * 2 * d * e, rt, d, e, dp);
            for (int64_t c = chunks - 1; c >= 0; c--) {
                int64_t start = c * s.m, m = min64(s.m, n - start), rows = up(m, PAD);
                double ignored[2] = {1, 0};
                S(chunk_gates)(AT(a, i) + start * a_row, a_row, m, &gates, ignored);
                S(pack)(AT(q, i) + start * q_row, q_row, qc, dp, m, d, rows);
                S(pack)(AT(k, i) + start * k_row, k_row, kc, dp, m, d, rows);
                S(pack)(AT(v, i) + start * v_row, v_row, vc, ep, m, e, rows);
                if (g) S(pack)(AT(g, i) + start * g_row, g_row, gc, ep, m, e, rows);
                else memset(gc, 0, (size_t)(rows * ep) * sizeof(REAL));
                S(transpose)(kc, dp, xt, CHUNK, rows, dp);
                S(times)(qc, dp, xt, CHUNK, scores, CHUNK, rows, rows, d, 0, RESULT_LOWER);
                S(transpose)(vc, ep, xt, CHUNK, rows, ep);
                S(times)(gc, ep, xt, CHUNK, d_scores, CHUNK, rows, rows, e, 0, RESULT_LOWER);
                S(decay_back)(scores, d_scores, &gates, angle, turned, rows);

                S(times)(gc, ep, states + c * state, 2 * dp, read, 2 * dp, rows, 2 * dp, e, 0, FULL);
                S(times)(vc, ep, rt, 2 * dp, sent, 2 * dp, rows, 2 * dp, e, 0, FULL);
                S(times)(d_scores, CHUNK, kc, dp, dqc, dp, rows, dp, rows, 0, LEFT_LOWER);
                S(times_left_transposed)(d_scores, CHUNK, qc, dp, dkc, dp, rows, dp, rows, 0, LEFT_UPPER);
                S(finish_rows)(qc, kc, dqc, dkc, read, sent, &gates, angle, turned, log_size, log_angle, dp, m);

                S(transpose)(rt, 2 * dp, r, ep, ep, 2 * dp);
                S(double_rows)(kc, gates.zr, gates.zi, 1, two, dp, rows);
                S(times)(two, 2 * dp, r, ep, dvc, ep, rows, ep, 2 * dp, 0, FULL);
                S(times_left_transposed)(scores, CHUNK, gc, ep, dvc, ep, rows, ep, rows, 1, LEFT_UPPER);

                S(meet)(states + (c + 1) * state, rt, e, dp, behind);
                double size_sum = behind[0] + fixed[0], angle_sum = behind[1] + fixed[1];
                REAL *da_c = AT(da, i) + start * da_row;
                for (int64_t t = m - 1; t >= 0; t--) {
                    size_sum += log_size[t], angle_sum += log_angle[t];
                    REAL x = gates.ux[t], y = gates.uy[t], inverse = gates.inverse[t];
                    REAL along = inverse ? (REAL)((1 - gates.size[t]) * size_sum) : 0, across = (REAL)(inverse * angle_sum);
                    da_c[t * da_row] = x * along - y * across, da_c[t * da_row + 1] = y * along + x * across;
                }
                for (int64_t t = 0; t < m; t++) {
                    memcpy(AT(dq, i) + (start + t) * dq_row, dqc + t * dp, (size_t)d * sizeof(REAL));
                    memcpy(AT(dk, i) + (start + t) * dk_row, dkc + t * dp, (size_t)d * sizeof(REAL));
                    memcpy(AT(dv, i) + (start + t) * dv_row, dvc + t * ep, (size_t)e * sizeof(REAL));
                }
                S(double_rows)(qc, gates.pr, gates.pi, -1, two, dp, rows);
                S(turn)(rt, e, 2 * dp, dp, dp, gates.er, -gates.ei);
                S(times_left_transposed)(gc, ep, two, 2 * dp, rt, 2 * dp, ep, 2 * dp, m, 1, FULL);
            }
            S(state_out)(rt, dh0 + i * 2 * d * e, d, e, dp);
        }
        free(states);
    }
}
