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

typedef struct {
    REAL *q, *k, *v, *g, *xt, *two, *read, *sent, *dq, *dk, *dv, *scores, *d_scores, *r;
    S(gates) gates;
    VF angle[CHUNK];
    REAL turned[CHUNK];
    double log_size[CHUNK], log_angle[CHUNK];
} S(back_work);

static S(back_work) *S(back_room)(int64_t dp, int64_t ep) {
    size_t head = (sizeof(S(back_work)) + 63) / 64 * 64;
    char *memory = scratch(head + (size_t)(2 * dp * ep + CHUNK * (10 * dp + 3 * ep + max64(dp, ep) + 2 * CHUNK)) * sizeof(REAL));
    if (!memory) abort();
    S(back_work) *w = (S(back_work) *)memory;
    w->q = (REAL *)(memory + head), w->k = w->q + CHUNK * dp, w->dq = w->k + CHUNK * dp, w->dk = w->dq + CHUNK * dp;
    w->two = w->dk + CHUNK * dp, w->read = w->two + CHUNK * 2 * dp, w->sent = w->read + CHUNK * 2 * dp;
    w->v = w->sent + CHUNK * 2 * dp, w->g = w->v + CHUNK * ep, w->dv = w->g + CHUNK * ep, w->xt = w->dv + CHUNK * ep;
    w->scores = w->xt + CHUNK * max64(dp, ep), w->d_scores = w->scores + CHUNK * CHUNK, w->r = w->d_scores + CHUNK * CHUNK;
    return w;
}

/* The state H behind a chunk (forward), or the gradient R of the state before it (backward), in place, or a part of either: `rows`
 * rows by `width` columns of real parts. x and y in scratch hold that part of k and v, or of q and g. One order of summing. */
static void S(back_advance)(S(back_work) *w, const REAL *x, const REAL *y, REAL *state, int64_t rows, int64_t width, int64_t dp,
                            int64_t m, int64_t forward) {
    const S(gates) *g = &w->gates;
    S(turn)(state, rows, 2 * dp, width, dp, g->er, forward ? g->ei : -g->ei);
    if (forward) S(double_rows)(x, g->zr, g->zi, 1, w->two, width, up(m, PAD));
    else S(double_rows)(x, g->pr, g->pi, -1, w->two, width, up(m, PAD));
    if (width == dp) S(times_left_transposed)(y, rows, w->two, 2 * dp, state, 2 * dp, rows, 2 * dp, m, 1, FULL);
    else
        for (int64_t c = 0; c < 2; c++)
            S(times_left_transposed)(y, rows, w->two + c * width, 2 * width, state + c * dp, 2 * dp, rows, width, m, 1, FULL);
}

/* Gradients of one chunk into scratch and da from q, k, v, g and the gates there. before: the state that enters, NULL for zero;
 * after: the one that leaves; rt: the gradient of the latter, NULL for zero. */
static void S(back_chunk)(S(back_work) *w, const REAL *before, const REAL *after, const REAL *rt, const double fixed[2], REAL *da,
                          int64_t da_row, int64_t m, int64_t d, int64_t e, int64_t dp, int64_t ep) {
    const S(gates) *x = &w->gates;
    int64_t rows = up(m, PAD);
    S(transpose)(w->k, dp, w->xt, CHUNK, rows, dp);
    S(times)(w->q, dp, w->xt, CHUNK, w->scores, CHUNK, rows, rows, d, 0, RESULT_LOWER);
    S(transpose)(w->v, ep, w->xt, CHUNK, rows, ep);
    S(times)(w->g, ep, w->xt, CHUNK, w->d_scores, CHUNK, rows, rows, e, 0, RESULT_LOWER);
    S(decay_back)(w->scores, w->d_scores, x, w->angle, w->turned, rows);

    if (before) S(times)(w->g, ep, before, 2 * dp, w->read, 2 * dp, rows, 2 * dp, e, 0, FULL);
    else memset(w->read, 0, (size_t)(rows * 2 * dp) * sizeof(REAL));
    if (rt) S(times)(w->v, ep, rt, 2 * dp, w->sent, 2 * dp, rows, 2 * dp, e, 0, FULL);
    else memset(w->sent, 0, (size_t)(rows * 2 * dp) * sizeof(REAL));
    S(times)(w->d_scores, CHUNK, w->k, dp, w->dq, dp, rows, dp, rows, 0, LEFT_LOWER);
    S(times_left_transposed)(w->d_scores, CHUNK, w->q, dp, w->dk, dp, rows, dp, rows, 0, LEFT_UPPER);
    S(finish_rows)(w->q, w->k, w->dq, w->dk, w->read, w->sent, x, w->angle, w->turned, w->log_size, w->log_angle, dp, m);

    double sums[2] = {fixed[0], fixed[1]};
    if (rt) {
        double behind[2];
        S(transpose)(rt, 2 * dp, w->r, ep, ep, 2 * dp);
        S(double_rows)(w->k, x->zr, x->zi, 1, w->two, dp, rows);
        S(times)(w->two, 2 * dp, w->r, ep, w->dv, ep, rows, ep, 2 * dp, 0, FULL);
        S(meet)(after, rt, e, dp, behind);
        sums[0] += behind[0], sums[1] += behind[1];
    }
    S(times_left_transposed)(w->scores, CHUNK, w->g, ep, w->dv, ep, rows, ep, rows, rt != NULL, LEFT_UPPER);
    for (int64_t t = m - 1; t >= 0; t--) {
        sums[0] += w->log_size[t], sums[1] += w->log_angle[t];
        REAL ux = x->ux[t], uy = x->uy[t], inverse = x->inverse[t];
        REAL along = inverse ? (REAL)((1 - x->size[t]) * sums[0]) : 0, across = (REAL)(inverse * sums[1]);
        da[t * da_row] = ux * along - uy * across, da[t * da_row + 1] = uy * along + ux * across;
    }
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
    int64_t dp = s.dp, ep = s.ep, tasks = b * h, chunks = (n + s.m - 1) / s.m, size = 2 * dp * ep;
    /* With more threads than heads the states of all heads are kept, those of R too; first each thread works on a part of every
     * state, then on some chunks. The sums and their order are the same. */
    int64_t shared = threads > tasks && chunks > 1, team = shared ? threads : min64(threads, tasks);
    int64_t by_e = shared ? min64(ep / PAD, (threads + 1) / 2) : 1, by_d = shared ? min64(dp / PAD, (threads + by_e - 1) / by_e) : 1;
    int64_t parts = by_d * by_e, each = (chunks + 1) * size;
    REAL *all_h = NULL, *all_r = NULL;
    double *wholes = NULL;
    if (shared) {
        all_h = scratch((size_t)(tasks * each) * sizeof(REAL)), all_r = scratch((size_t)(tasks * each) * sizeof(REAL));
        wholes = scratch((size_t)(2 * tasks) * sizeof(double));
        if (!all_h || !all_r || !wholes) abort();
    }
#define LOAD(x, c, offset, ld, count) S(pack)(AT(x, i) + (c) * s.m * x##_row + (offset), x##_row, w->x, ld, m, count, up(m, PAD))
/* Asks for another chunk of an operand, so that it comes while this one is worked on; chunks beyond the ends have no rows. */
#define FETCH(x, c, width)                                                                                                  \
    if (HEADS > 1) S(fetch)(AT(x, i) + (c) * s.m * x##_row, x##_row, (c) < 0 ? 0 : min64(s.m, n - (c) * s.m), width)
#define LOAD_G(c, offset, ld, count)                             \
    do {                                                         \
        if (g) LOAD(g, c, offset, ld, count);                    \
        else memset(w->g, 0, (size_t)(up(m, PAD) * (ld)) * sizeof(REAL)); \
    } while (0)
#define START(states, from)                                          \
    do {                                                             \
        memset(states, 0, (size_t)size * sizeof(REAL));              \
        if (from) S(state_in)((from) + i * 2 * d * e, states, d, e, dp); \
    } while (0)
#define CHUNK_BACK(hs, rt)                                                                                                 \
    do {                                                                                                                   \
        LOAD(q, c, 0, dp, d), LOAD(k, c, 0, dp, d), LOAD(v, c, 0, ep, e);                                                  \
        LOAD_G(c, 0, ep, e);                                                                                               \
        double fixed[2] = {0, 0};                                                                                          \
        if (g_product) {                                                                                                   \
            const REAL *x = g_product + 2 * i;                                                                             \
            fixed[0] = x[0] * whole[0] + x[1] * whole[1], fixed[1] = x[1] * whole[0] - x[0] * whole[1];                    \
        }                                                                                                                  \
        S(back_chunk)(w, c || h0 ? (hs) + c * size : NULL, (hs) + (c + 1) * size, c < chunks - 1 || g_last ? (rt) : NULL, fixed, \
                      AT(da, i) + c * s.m * da_row, da_row, m, d, e, dp, ep);                                              \
        S(unpack)(w->dq, dp, dq + PLACE(dq, i, c * s.m), dq_row, m, d);                                                    \
        S(unpack)(w->dk, dp, dk + PLACE(dk, i, c * s.m), dk_row, m, d);                                                    \
        S(unpack)(w->dv, ep, dv + PLACE(dv, i, c * s.m), dv_row, m, e);                                                    \
    } while (0)
#pragma omp parallel num_threads((int)team) if (team > 1)
    {
        S(back_work) *w = S(back_room)(dp, ep);
        unsigned mode = subnormals_off();
        double ignored[2] = {1, 0};
        if (!shared) {
            REAL *hs = scratch((size_t)(each + size) * sizeof(REAL)), *rt = hs + each;
            if (!hs) abort();
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < tasks; i++) {
                double whole[2] = {1, 0};
                START(hs, h0);
                START(rt, g_last);
                for (int64_t c = 0; c < chunks; c++) {
                    int64_t m = min64(s.m, n - c * s.m);
                    S(chunk_gates)(AT(a, i) + c * s.m * a_row, a_row, m, &w->gates, whole);
                    if (c == chunks - 1 && !g_last) break; /* nobody asks for the last state */
                    LOAD(k, c, 0, dp, d), LOAD(v, c, 0, ep, e);
                    FETCH(k, c + 1, d);
                    FETCH(v, c + 1, e);
                    memcpy(hs + (c + 1) * size, hs + c * size, (size_t)size * sizeof(REAL));
                    S(back_advance)(w, w->k, w->v, hs + (c + 1) * size, ep, dp, dp, m, 1);
                }
                for (int64_t c = chunks - 1; c >= 0; c--) {
                    int64_t m = min64(s.m, n - c * s.m);
                    S(chunk_gates)(AT(a, i) + c * s.m * a_row, a_row, m, &w->gates, ignored);
                    FETCH(q, c - 1, d);
                    FETCH(k, c - 1, d);
                    CHUNK_BACK(hs, rt);
                    FETCH(v, c - 1, e);
                    if (g) FETCH(g, c - 1, e);
                    S(back_advance)(w, w->q, w->g, rt, ep, dp, dp, m, 0);
                }
                S(state_out)(rt, dh0 + i * 2 * d * e, d, e, dp);
            }
            free(hs);
        } else {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < tasks; i++) {
                START(all_h + i * each, h0);
                START(all_r + i * each + chunks * size, g_last);
                wholes[2 * i] = 1, wholes[2 * i + 1] = 0;
            }
#pragma omp for schedule(static)
            for (int64_t task = 0; task < 2 * tasks * parts; task++) { /* half of the threads for H, half for R */
                int64_t i = task % (tasks * parts) / parts, part = task % parts, forward = task < tasks * parts;
                int64_t e0 = part / by_d * (ep / PAD) / by_e * PAD, e1 = (part / by_d + 1) * (ep / PAD) / by_e * PAD;
                int64_t d0 = part % by_d * (dp / PAD) / by_d * PAD, d1 = (part % by_d + 1) * (dp / PAD) / by_d * PAD;
                int64_t seen_d = max64(0, min64(d, d1) - d0), seen_e = max64(0, min64(e, e1) - e0);
                REAL *own = (forward ? all_h : all_r) + i * each + e0 * 2 * dp + d0;
                for (int64_t turn = 0; turn < chunks; turn++) {
                    int64_t c = forward ? turn : chunks - 1 - turn, m = min64(s.m, n - c * s.m);
                    REAL *from = own + (forward ? c : c + 1) * size, *to = own + (forward ? c + 1 : c) * size;
                    S(chunk_gates)(AT(a, i) + c * s.m * a_row, a_row, m, &w->gates, forward && !part ? wholes + 2 * i : ignored);
                    if (forward) LOAD(k, c, d0, d1 - d0, seen_d), LOAD(v, c, e0, e1 - e0, seen_e);
                    else {
                        LOAD(q, c, d0, d1 - d0, seen_d);
                        LOAD_G(c, e0, e1 - e0, seen_e);
                    }
                    S(copy_part)(from, to, e1 - e0, d1 - d0, dp, 2 * dp);
                    S(back_advance)(w, forward ? w->k : w->q, forward ? w->v : w->g, to, e1 - e0, d1 - d0, dp, m, forward);
                }
            }
#pragma omp for schedule(static)
            for (int64_t task = 0; task < tasks * chunks; task++) {
                int64_t i = task / chunks, c = task % chunks, m = min64(s.m, n - c * s.m);
                const double *whole = wholes + 2 * i;
                S(chunk_gates)(AT(a, i) + c * s.m * a_row, a_row, m, &w->gates, ignored);
                CHUNK_BACK(all_h + i * each, all_r + i * each + (c + 1) * size);
                if (!c) S(state_out)(all_r + i * each, dh0 + i * 2 * d * e, d, e, dp);
            }
        }
        subnormals_back(mode);
        free(w);
    }
#undef LOAD
#undef FETCH
#undef LOAD_G
#undef START
#undef CHUNK_BACK
    free(all_h), free(all_r), free(wholes);
}
