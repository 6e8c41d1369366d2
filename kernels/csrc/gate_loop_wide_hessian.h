/* Forward mode through gate_loop_wide_backward: Hessian-vector products in two sweeps. Included once per precision.
 *
 * With l_t the tangent of log p_t, the products of gates move as p_t' = p_t l_t and z_t' = z_t (l_end - l_t). H and the gradient
 * R of the state have tangents T and R', sums of the same kind with one factor replaced at a time:
 *
 *     T_end  = p_end (T + l_end H) + sum_s [ z_s k_s' v_s^T + z_s' k_s v_s^T + z_s k_s v_s'^T ]
 *     R'     = conj(p_end) (R' + conj(l_end) R) + sum_t [ conj(p_t) q_t' g_t^T + conj(p_t') q_t g_t^T + conj(p_t) q_t g_t'^T ]
 *
 * and so for everything that the backward pass reads from them. A NULL tangent is zero. The gradients themselves are made on the
 * way, but for dv, and are written where they are wanted. */

/* The products of one row or column pair before and after their decay, and the tangents of both. */
static void S(decay_hessian)(REAL *scores, REAL *t_scores, REAL *d_scores, REAL *td_scores, const S(gates) *g,
                             const S(gate_tangents) *tg, VF *angle, VF *t_angle, REAL *turned, REAL *t_turned, int64_t rows) {
    VI lanes = S(lane_numbers)();
    memset(turned, 0, CHUNK * sizeof(REAL)), memset(t_turned, 0, CHUNK * sizeof(REAL));
    for (int64_t t = 0; t < rows; t++) {
        VF row = S(all)(0), t_row = S(all)(0);
        for (int64_t j = 0; j < up(up(t + 1, TILE), LANES); j += LANES) {
            int64_t at = t * CHUNK + j;
            VF x = S(load)(scores + at, LANES), tx = S(load)(t_scores + at, LANES);
            VF y = S(load)(d_scores + at, LANES), ty = S(load)(td_scores + at, LANES);
            VF wr = S(load)(g->wr + j, LANES), wi = S(load)(g->wi + j, LANES);
            VF dr = tg->lr[t] - S(load)(tg->lr + j, LANES), di = tg->li[t] - S(load)(tg->li + j, LANES);
            if (j + LANES > t) {
                VI seen = lanes + (INT)j <= (INT)t;
                x = S(select)(seen, x, S(all)(0)), tx = S(select)(seen, tx, S(all)(0));
                y = S(select)(seen, y, S(all)(0)), ty = S(select)(seen, ty, S(all)(0));
                wr = S(select)(seen, wr, S(all)(0)), wi = S(select)(seen, wi, S(all)(0));
            }
            VF re = wr * g->pr[t] - wi * g->pi[t], im = wi * g->pr[t] + wr * g->pi[t];
            VF t_re = re * dr - im * di, t_im = re * di + im * dr;
            VF turn = x * y * im, t_turn = (tx * y + x * ty) * im + x * y * t_im;
            S(store)(scores + at, x * re, LANES), S(store)(t_scores + at, tx * re + x * t_re, LANES);
            S(store)(d_scores + at, y * re, LANES), S(store)(td_scores + at, ty * re + y * t_re, LANES);
            S(store)(turned + j, S(load)(turned + j, LANES) + turn, LANES);
            S(store)(t_turned + j, S(load)(t_turned + j, LANES) + t_turn, LANES);
            row -= turn, t_row -= t_turn;
        }
        angle[t] = row, t_angle[t] = t_row;
    }
}

/* Scratch of one chunk; t_ marks tangents. */
typedef struct {
    REAL *q, *k, *v, *g, *tq, *tk, *tv, *tg, *xt, *two, *read, *t_read, *sent, *t_sent, *dq, *dk, *dv, *tdq, *tdk, *tdv;
    REAL *scores, *t_scores, *d_scores, *td_scores;
    VF angle[CHUNK], t_angle[CHUNK];
    REAL turned[CHUNK], t_turned[CHUNK];
    double log_size[CHUNK], log_angle[CHUNK], t_log_size[CHUNK], t_log_angle[CHUNK];
    S(gates) gates;
    S(gate_tangents) along;
} S(hessian_work);

/* As finish_rows, and its tangent: leaves dq, dk, tdq and tdk, and each step's share of the gates' gradient. */
static void S(finish_hessian)(S(hessian_work) *w, int64_t dp, int64_t m) {
    const S(gates) *g = &w->gates;
    const S(gate_tangents) *tg = &w->along;
    for (int64_t t = 0; t < m; t++) {
        VF sizes = S(all)(0), t_sizes = S(all)(0), angles = w->angle[t], t_angles = w->t_angle[t];
        REAL lr = tg->lr[t], li = tg->li[t], dr = tg->lr[m - 1] - lr, di = tg->li[m - 1] - li;
        for (int64_t j = 0; j < dp; j += LANES) {
            int64_t at = t * dp + j, re_at = t * 2 * dp + j, im_at = re_at + dp;
            VF x = S(load)(w->q + at, LANES), tx = S(load)(w->tq + at, LANES);
            VF re = S(load)(w->read + re_at, LANES), im = S(load)(w->read + im_at, LANES);
            VF t_re = S(load)(w->t_read + re_at, LANES) + lr * re - li * im;
            VF t_im = S(load)(w->t_read + im_at, LANES) + lr * im + li * re;
            VF dx = S(load)(w->dq + at, LANES) + re * g->pr[t] - im * g->pi[t];
            VF tdx = S(load)(w->tdq + at, LANES) + t_re * g->pr[t] - t_im * g->pi[t];
            angles -= x * (re * g->pi[t] + im * g->pr[t]);
            t_angles -= tx * (re * g->pi[t] + im * g->pr[t]) + x * (t_re * g->pi[t] + t_im * g->pr[t]);
            S(store)(w->dq + at, dx, LANES), S(store)(w->tdq + at, tdx, LANES);

            VF y = S(load)(w->k + at, LANES), ty = S(load)(w->tk + at, LANES);
            re = S(load)(w->sent + re_at, LANES), im = S(load)(w->sent + im_at, LANES);
            t_re = S(load)(w->t_sent + re_at, LANES) + dr * re + di * im;
            t_im = S(load)(w->t_sent + im_at, LANES) + dr * im - di * re;
            VF dy = S(load)(w->dk + at, LANES) + re * g->zr[t] + im * g->zi[t];
            VF tdy = S(load)(w->tdk + at, LANES) + t_re * g->zr[t] + t_im * g->zi[t];
            angles += y * (re * g->zi[t] - im * g->zr[t]);
            t_angles += ty * (re * g->zi[t] - im * g->zr[t]) + y * (t_re * g->zi[t] - t_im * g->zr[t]);
            S(store)(w->dk + at, dy, LANES), S(store)(w->tdk + at, tdy, LANES);
            sizes += x * dx - y * dy, t_sizes += tx * dx + x * tdx - ty * dy - y * tdy;
        }
        w->log_size[t] = S(total)(sizes), w->log_angle[t] = S(total)(angles) + w->turned[t];
        w->t_log_size[t] = S(total)(t_sizes), w->t_log_angle[t] = S(total)(t_angles) + w->t_turned[t];
    }
}

/* state *= e and t_state = e t_state + te state, for rows of real parts, then imaginary parts. */
static void S(turn_both)(REAL *state, REAL *t_state, int64_t rows, int64_t half, REAL er, REAL ei, REAL ter, REAL tei) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < half; j += LANES) {
            int64_t at = r * 2 * half + j;
            VF re = S(load)(state + at, LANES), im = S(load)(state + at + half, LANES);
            VF tr = S(load)(t_state + at, LANES), ti = S(load)(t_state + at + half, LANES);
            S(store)(t_state + at, tr * er - ti * ei + re * ter - im * tei, LANES);
            S(store)(t_state + at + half, tr * ei + ti * er + re * tei + im * ter, LANES);
            S(store)(state + at, re * er - im * ei, LANES), S(store)(state + at + half, re * ei + im * er, LANES);
        }
}

/* da (unless NULL) and its tangent for one chunk from its sums of logarithms, from its last step back. sums, t_sums: what lies
 * behind it. */
static void S(gates_hessian)(const S(hessian_work) *w, const REAL *ta, int64_t ta_row, REAL *da, REAL *tda, int64_t da_row, int64_t m,
                             double sums[2], double t_sums[2]) {
    const S(gates) *g = &w->gates;
    for (int64_t t = m - 1; t >= 0; t--) {
        sums[0] += w->log_size[t], sums[1] += w->log_angle[t];
        t_sums[0] += w->t_log_size[t], t_sums[1] += w->t_log_angle[t];
        /* The gradient is u (slow L_r + i L_i / m), slow = 1 - size; a' moves m by `away` and turns u by `turn`. */
        REAL x = g->ux[t], y = g->uy[t], inverse = g->inverse[t], t_along = 0, t_across = 0;
        double slow = 1 - (double)g->size[t], away = 0, turn = 0, along = inverse ? slow * sums[0] : 0, across = inverse * sums[1];
        if (inverse) {
            if (ta) {
                away = x * ta[t * ta_row] + y * ta[t * ta_row + 1];
                turn = inverse * (x * ta[t * ta_row + 1] - y * ta[t * ta_row]);
            }
            t_along = (REAL)(slow * (t_sums[0] - g->size[t] * away * sums[0]) - turn * across);
            t_across = (REAL)(inverse * (t_sums[1] - away * across) + turn * along);
        }
        tda[t * da_row] = x * t_along - y * t_across, tda[t * da_row + 1] = y * t_along + x * t_across;
        if (da) da[t * da_row] = (REAL)(x * along - y * across), da[t * da_row + 1] = (REAL)(y * along + x * across);
    }
}

/* sums += x conj(y) for one pair each; NULL is zero. */
static void S(add_product)(double sums[2], const REAL *x, double yr, double yi) {
    if (x) sums[0] += x[0] * yr + x[1] * yi, sums[1] += x[1] * yr - x[0] * yi;
}

static REAL *S(take)(REAL **from, int64_t count) {
    REAL *x = *from;
    *from += count;
    return x;
}

static int64_t S(hessian_numbers)(int64_t dp, int64_t ep) {
    return CHUNK * (18 * dp + 6 * ep + max64(dp, ep) + 4 * CHUNK);
}

static void S(hessian_share)(S(hessian_work) *w, REAL *at, int64_t dp, int64_t ep) {
    REAL **keys[] = {&w->q, &w->k, &w->tq, &w->tk, &w->dq, &w->dk, &w->tdq, &w->tdk};
    REAL **pairs[] = {&w->two, &w->read, &w->t_read, &w->sent, &w->t_sent};
    REAL **values[] = {&w->v, &w->g, &w->tv, &w->tg, &w->dv, &w->tdv};
    REAL **squares[] = {&w->scores, &w->t_scores, &w->d_scores, &w->td_scores};
    for (int i = 0; i < 8; i++) *keys[i] = S(take)(&at, CHUNK * dp);
    for (int i = 0; i < 5; i++) *pairs[i] = S(take)(&at, CHUNK * 2 * dp);
    for (int i = 0; i < 6; i++) *values[i] = S(take)(&at, CHUNK * ep);
    for (int i = 0; i < 4; i++) *squares[i] = S(take)(&at, CHUNK * CHUNK);
    w->xt = at;
}

/* to = y state and t_to = ty state + y t_state for states [e][2 d]; zeros if there is no state yet. */
static void S(read_pair)(const REAL *y, const REAL *ty, const REAL *state, const REAL *t_state, REAL *to, REAL *t_to, int64_t dp,
                         int64_t ep, int64_t rows, int64_t e, int64_t any) {
    if (!any) {
        memset(to, 0, (size_t)(rows * 2 * dp) * sizeof(REAL)), memset(t_to, 0, (size_t)(rows * 2 * dp) * sizeof(REAL));
        return;
    }
    S(times)(y, ep, state, 2 * dp, to, 2 * dp, rows, 2 * dp, e, 0, FULL);
    S(times)(y, ep, t_state, 2 * dp, t_to, 2 * dp, rows, 2 * dp, e, 0, FULL);
    if (ty) S(times)(ty, ep, state, 2 * dp, t_to, 2 * dp, rows, 2 * dp, e, 1, FULL);
}

/* dq .. dh0: the gradients themselves, in memory as their changes, or all NULL. */
void S(gate_loop_wide_hessian)(
    const REAL *q, const REAL *k, const REAL *v, const REAL *a, const REAL *h0, const REAL *g, const REAL *g_last,
    const REAL *g_product, const REAL *tq, const REAL *tk, const REAL *tv, const REAL *ta, const REAL *th0, const REAL *tg,
    const REAL *tg_last, const REAL *tg_product, REAL *tdq, REAL *tdk, REAL *tdv, REAL *tda, REAL *tdh0, REAL *dq, REAL *dk, REAL *dv,
    REAL *da, REAL *dh0, int64_t b, int64_t h, int64_t n, int64_t d, int64_t e, int64_t q_batch, int64_t q_head, int64_t q_row, int64_t k_batch, int64_t k_head, int64_t k_row,
    int64_t v_batch, int64_t v_head, int64_t v_row, int64_t a_batch, int64_t a_head, int64_t a_row, int64_t g_batch, int64_t g_head,
    int64_t g_row, int64_t tq_batch, int64_t tq_head, int64_t tq_row, int64_t tk_batch, int64_t tk_head, int64_t tk_row,
    int64_t tv_batch, int64_t tv_head, int64_t tv_row, int64_t ta_batch, int64_t ta_head, int64_t ta_row, int64_t tg_batch,
    int64_t tg_head, int64_t tg_row, int64_t dq_batch, int64_t dq_head, int64_t dq_row, int64_t dk_batch, int64_t dk_head,
    int64_t dk_row, int64_t dv_batch, int64_t dv_head, int64_t dv_row, int64_t da_batch, int64_t da_head, int64_t da_row,
    int64_t threads) {
    wide_sizes s = wide_size(b, h, n, d, e);
    int64_t dp = s.dp, ep = s.ep, tasks = b * h, chunks = (n + s.m - 1) / s.m, state = 2 * dp * ep;
    int64_t before = h0 || th0, behind = g_last || tg_last; /* whether there is a state to start from, on either end */
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        REAL *states = scratch((size_t)((2 * chunks + 6) * state + S(hessian_numbers)(dp, ep)) * sizeof(REAL)), *rest = states;
        S(hessian_work) *w = scratch(sizeof(S(hessian_work)));
        if (!states || !w) abort();
        /* H and T of every chunk, R and R' as [e][2 d] and as [2 d][e] */
        REAL *hs = S(take)(&rest, (chunks + 1) * state), *ts = S(take)(&rest, (chunks + 1) * state);
        REAL *rt = S(take)(&rest, state), *trt = S(take)(&rest, state), *r = S(take)(&rest, state), *tr = S(take)(&rest, state);
        S(hessian_share)(w, rest, dp, ep);
        const S(gates) *x = &w->gates;
        const S(gate_tangents) *tx = &w->along;
        unsigned mode = subnormals_off();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < tasks; i++) {
            double whole[2] = {1, 0}, logs[2] = {0, 0}, ignored[2];
            memset(hs, 0, (size_t)state * sizeof(REAL)), memset(ts, 0, (size_t)state * sizeof(REAL));
            memset(rt, 0, (size_t)state * sizeof(REAL)), memset(trt, 0, (size_t)state * sizeof(REAL));
            if (h0) S(state_in)(h0 + i * 2 * d * e, hs, d, e, dp);
            if (th0) S(state_in)(th0 + i * 2 * d * e, ts, d, e, dp);
            if (g_last) S(state_in)(g_last + i * 2 * d * e, rt, d, e, dp);
            if (tg_last) S(state_in)(tg_last + i * 2 * d * e, trt, d, e, dp);
            for (int64_t c = 0; c < chunks; c++) {
                int64_t start = c * s.m, m = min64(s.m, n - start), rows = up(m, PAD);
                REAL *next = hs + (c + 1) * state, *t_next = ts + (c + 1) * state;
                S(chunk_gates)(AT(a, i) + start * a_row, a_row, m, &w->gates, whole);
                S(chunk_gate_tangents)(TANGENT_AT(ta, i, start), ta_row, m, x, &w->along, logs);
                if (c == chunks - 1 && !behind) break; /* nobody asks for the last state */
                S(pack)(AT(k, i) + start * k_row, k_row, w->k, dp, m, d, rows);
                S(pack)(AT(v, i) + start * v_row, v_row, w->v, ep, m, e, rows);
                S(pack_or_zero)(TANGENT_AT(tk, i, start), tk_row, w->tk, dp, m, d, rows);
                memcpy(next, hs + c * state, (size_t)state * sizeof(REAL)), memcpy(t_next, ts + c * state, (size_t)state * sizeof(REAL));
                S(turn_both)(next, t_next, e, dp, x->er, x->ei, tx->er, tx->ei);
                S(double_rows_twice)(w->tk, x->zr, x->zi, w->k, tx->zr, tx->zi, 1, w->two, dp, rows);
                S(times_left_transposed)(w->v, ep, w->two, 2 * dp, t_next, 2 * dp, ep, 2 * dp, m, 1, FULL);
                S(double_rows)(w->k, x->zr, x->zi, 1, w->two, dp, rows);
                S(times_left_transposed)(w->v, ep, w->two, 2 * dp, next, 2 * dp, ep, 2 * dp, m, 1, FULL);
                if (!tv) continue;
                S(pack)(AT(tv, i) + start * tv_row, tv_row, w->tv, ep, m, e, rows);
                S(times_left_transposed)(w->tv, ep, w->two, 2 * dp, t_next, 2 * dp, ep, 2 * dp, m, 1, FULL);
            }
            /* What the product of all gates gives to every logarithm: fixed = g_product conj(whole), whole' = whole logs. */
            double fixed[2] = {0, 0}, t_fixed[2] = {0, 0};
            S(add_product)(fixed, g_product ? g_product + 2 * i : NULL, whole[0], whole[1]);
            S(add_product)(t_fixed, tg_product ? tg_product + 2 * i : NULL, whole[0], whole[1]);
            S(add_product)(t_fixed, g_product ? g_product + 2 * i : NULL, whole[0] * logs[0] - whole[1] * logs[1],
                           whole[0] * logs[1] + whole[1] * logs[0]);
            for (int64_t c = chunks - 1; c >= 0; c--) {
                int64_t start = c * s.m, m = min64(s.m, n - start), rows = up(m, PAD);
                const REAL *at_h = hs + c * state, *at_t = ts + c * state;
                ignored[0] = 1, ignored[1] = 0;
                S(chunk_gates)(AT(a, i) + start * a_row, a_row, m, &w->gates, ignored);
                S(chunk_gate_tangents)(TANGENT_AT(ta, i, start), ta_row, m, x, &w->along, ignored);
                S(pack)(AT(q, i) + start * q_row, q_row, w->q, dp, m, d, rows);
                S(pack)(AT(k, i) + start * k_row, k_row, w->k, dp, m, d, rows);
                S(pack)(AT(v, i) + start * v_row, v_row, w->v, ep, m, e, rows);
                S(pack_or_zero)(TANGENT_AT(g, i, start), g_row, w->g, ep, m, e, rows);
                S(pack_or_zero)(TANGENT_AT(tq, i, start), tq_row, w->tq, dp, m, d, rows);
                S(pack_or_zero)(TANGENT_AT(tk, i, start), tk_row, w->tk, dp, m, d, rows);
                S(pack_or_zero)(TANGENT_AT(tv, i, start), tv_row, w->tv, ep, m, e, rows);
                S(pack_or_zero)(TANGENT_AT(tg, i, start), tg_row, w->tg, ep, m, e, rows);

                S(transpose)(w->k, dp, w->xt, CHUNK, rows, dp);
                S(times)(w->q, dp, w->xt, CHUNK, w->scores, CHUNK, rows, rows, d, 0, RESULT_LOWER);
                S(times)(w->tq, dp, w->xt, CHUNK, w->t_scores, CHUNK, rows, rows, d, 0, RESULT_LOWER);
                S(transpose)(w->tk, dp, w->xt, CHUNK, rows, dp);
                S(times)(w->q, dp, w->xt, CHUNK, w->t_scores, CHUNK, rows, rows, d, 1, RESULT_LOWER);
                S(transpose)(w->v, ep, w->xt, CHUNK, rows, ep);
                S(times)(w->g, ep, w->xt, CHUNK, w->d_scores, CHUNK, rows, rows, e, 0, RESULT_LOWER);
                if (tg) S(times)(w->tg, ep, w->xt, CHUNK, w->td_scores, CHUNK, rows, rows, e, 0, RESULT_LOWER);
                S(transpose)(w->tv, ep, w->xt, CHUNK, rows, ep);
                S(times)(w->g, ep, w->xt, CHUNK, w->td_scores, CHUNK, rows, rows, e, tg != NULL, RESULT_LOWER);
                S(decay_hessian)(w->scores, w->t_scores, w->d_scores, w->td_scores, x, tx, w->angle, w->t_angle, w->turned,
                                 w->t_turned, rows);

                S(read_pair)(w->g, tg ? w->tg : NULL, at_h, at_t, w->read, w->t_read, dp, ep, rows, e, c || before);
                S(read_pair)(w->v, tv ? w->tv : NULL, rt, trt, w->sent, w->t_sent, dp, ep, rows, e, c < chunks - 1 || behind);
                S(times)(w->d_scores, CHUNK, w->k, dp, w->dq, dp, rows, dp, rows, 0, LEFT_LOWER);
                S(times)(w->td_scores, CHUNK, w->k, dp, w->tdq, dp, rows, dp, rows, 0, LEFT_LOWER);
                S(times)(w->d_scores, CHUNK, w->tk, dp, w->tdq, dp, rows, dp, rows, 1, LEFT_LOWER);
                S(times_left_transposed)(w->d_scores, CHUNK, w->q, dp, w->dk, dp, rows, dp, rows, 0, LEFT_UPPER);
                S(times_left_transposed)(w->td_scores, CHUNK, w->q, dp, w->tdk, dp, rows, dp, rows, 0, LEFT_UPPER);
                S(times_left_transposed)(w->d_scores, CHUNK, w->tq, dp, w->tdk, dp, rows, dp, rows, 1, LEFT_UPPER);
                S(finish_hessian)(w, dp, m);

                S(times_left_transposed)(w->t_scores, CHUNK, w->g, ep, w->tdv, ep, rows, ep, rows, 0, LEFT_UPPER);
                if (tg) S(times_left_transposed)(w->scores, CHUNK, w->tg, ep, w->tdv, ep, rows, ep, rows, 1, LEFT_UPPER);
                if (dq) S(times_left_transposed)(w->scores, CHUNK, w->g, ep, w->dv, ep, rows, ep, rows, 0, LEFT_UPPER);
                double sums[2] = {fixed[0], fixed[1]}, t_sums[2] = {t_fixed[0], t_fixed[1]}, part[2];
                if (c < chunks - 1 || behind) {
                    S(transpose)(rt, 2 * dp, r, ep, ep, 2 * dp), S(transpose)(trt, 2 * dp, tr, ep, ep, 2 * dp);
                    S(double_rows)(w->k, x->zr, x->zi, 1, w->two, dp, rows);
                    S(times)(w->two, 2 * dp, tr, ep, w->tdv, ep, rows, ep, 2 * dp, 1, FULL);
                    if (dq) S(times)(w->two, 2 * dp, r, ep, w->dv, ep, rows, ep, 2 * dp, 1, FULL);
                    S(double_rows_twice)(w->tk, x->zr, x->zi, w->k, tx->zr, tx->zi, 1, w->two, dp, rows);
                    S(times)(w->two, 2 * dp, r, ep, w->tdv, ep, rows, ep, 2 * dp, 1, FULL);
                    S(meet)(at_h + state, rt, e, dp, part), sums[0] += part[0], sums[1] += part[1];
                    S(meet)(at_t + state, rt, e, dp, part), t_sums[0] += part[0], t_sums[1] += part[1];
                    S(meet)(at_h + state, trt, e, dp, part), t_sums[0] += part[0], t_sums[1] += part[1];
                }
                S(gates_hessian)(w, TANGENT_AT(ta, i, start), ta_row, TANGENT_AT(da, i, start), PLACE(da, i, start) + tda, da_row, m, sums,
                                 t_sums);
                S(unpack)(w->tdq, dp, tdq + PLACE(dq, i, start), dq_row, m, d);
                S(unpack)(w->tdk, dp, tdk + PLACE(dk, i, start), dk_row, m, d);
                S(unpack)(w->tdv, ep, tdv + PLACE(dv, i, start), dv_row, m, e);
                if (dq) {
                    S(unpack)(w->dq, dp, dq + PLACE(dq, i, start), dq_row, m, d);
                    S(unpack)(w->dk, dp, dk + PLACE(dk, i, start), dk_row, m, d);
                    S(unpack)(w->dv, ep, dv + PLACE(dv, i, start), dv_row, m, e);
                }
                S(turn_both)(rt, trt, e, dp, x->er, -x->ei, tx->er, -tx->ei);
                S(double_rows_twice)(w->tq, x->pr, x->pi, w->q, tx->pr, tx->pi, -1, w->two, dp, rows);
                S(times_left_transposed)(w->g, ep, w->two, 2 * dp, trt, 2 * dp, ep, 2 * dp, m, 1, FULL);
                S(double_rows)(w->q, x->pr, x->pi, -1, w->two, dp, rows);
                S(times_left_transposed)(w->g, ep, w->two, 2 * dp, rt, 2 * dp, ep, 2 * dp, m, 1, FULL);
                if (tg) S(times_left_transposed)(w->tg, ep, w->two, 2 * dp, trt, 2 * dp, ep, 2 * dp, m, 1, FULL);
            }
            S(state_out)(trt, tdh0 + i * 2 * d * e, d, e, dp);
            if (dh0) S(state_out)(rt, dh0 + i * 2 * d * e, d, e, dp);
        }
        subnormals_back(mode);
        free(states), free(w);
    }
}
