/* Forward mode: tangents of the three loops' results. Included once per precision. A NULL tangent is zero.
 *
 * With lambda_t the tangent of log alpha_t, the state's tangent obeys T_t = alpha_t (T_{t-1} + lambda_t H_{t-1}) + (k_t v_t)'. */

INLINE VF S(load_or_zero)(const REAL *p, int64_t j, int64_t count) { return p ? S(load)(p + j, count) : S(all)(0); }

#define TANGENT_ROW(x, i, t, at) ((x) ? ROW(x, i, t) + (at) : NULL)

void S(simple_gate_loop_tangent)(const REAL *q, const REAL *x, const REAL *a, const REAL *h0, const REAL *tq, const REAL *tx,
                                 const REAL *ta, const REAL *th0, REAL *tout, REAL *tlast, int64_t b, int64_t n, int64_t c,
                                 int64_t q_batch, int64_t q_row, int64_t x_batch, int64_t x_row, int64_t a_batch, int64_t a_row,
                                 int64_t tq_batch, int64_t tq_row, int64_t tx_batch, int64_t tx_row, int64_t ta_batch,
                                 int64_t ta_row, int64_t reverse, int64_t threads) {
    int64_t most = task_channels(b, c, threads, CHANNELS), blocks = (c + most - 1) / most, tasks = b * blocks;
#pragma omp parallel for num_threads((int)min64(threads, tasks)) schedule(dynamic) if (threads > 1 && tasks > 1)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t i = task / blocks, from = task % blocks * most, width = min64(most, c - from), full = width / LANES * LANES;
        unsigned mode = subnormals_off();
        VF h[VECTORS] = {{0}}, th[VECTORS] = {{0}};
        if (h0) memcpy(h, h0 + i * c + from, (size_t)width * sizeof(REAL));
        if (th0) memcpy(th, th0 + i * c + from, (size_t)width * sizeof(REAL));
        for (int64_t s = 0; s < n; s++) {
            int64_t t = reverse ? n - 1 - s : s;
            const REAL *q_t = ROW(q, i, t) + from, *x_t = ROW(x, i, t) + from, *a_t = ROW(a, i, t) + from;
            const REAL *tq_t = TANGENT_ROW(tq, i, t, from), *tx_t = TANGENT_ROW(tx, i, t, from), *ta_t = TANGENT_ROW(ta, i, t, from);
            REAL *out_t = tout + (i * n + t) * c + from;
#define CALL(count)                                                                                                   \
    do {                                                                                                              \
        VF gate = S(sigmoid)(S(load)(a_t + j, count)), *h_j = h + j / LANES, *th_j = th + j / LANES;                  \
        VF turned = *th_j + ((REAL)1 - gate) * S(load_or_zero)(ta_t, j, count) * *h_j;                                \
        *th_j = gate * turned + S(load_or_zero)(tx_t, j, count);                                                      \
        *h_j = gate * *h_j + S(load)(x_t + j, count);                                                                 \
        S(store)(out_t + j, S(load)(q_t + j, count) * *th_j + S(load_or_zero)(tq_t, j, count) * *h_j, count);         \
    } while (0)
            STEP(full, width, CALL);
#undef CALL
        }
        memcpy(tlast + i * c + from, th, (size_t)width * sizeof(REAL));
        subnormals_back(mode);
    }
}

/* H, its tangent T, and the sum of lambda. */
typedef struct {
    VF hr[VECTORS], hi[VECTORS], tr[VECTORS], ti[VECTORS], lr[VECTORS], li[VECTORS];
} S(narrow_tangent_state);

typedef struct {
    const REAL *q, *k, *v, *a, *tq, *tk, *tv, *ta;
    REAL *out;
} S(tangent_rows);

INLINE void S(narrow_tangent_step)(const S(tangent_rows) *r, int64_t j, const S(narrow_tangent_state) *from, S(narrow_tangent_state) *to,
                                   const int careful, VI *odd, int64_t count) {
    int64_t p = j / LANES;
    S(gate) gate = S(make_gate)(S(load_gates)(r->a + 2 * j, count), careful, odd);
    VF re = gate.size * gate.ux, im = gate.size * gate.uy, hr = from->hr[p], hi = from->hi[p], tr = from->tr[p], ti = from->ti[p];
    if (r->ta) {
        S(pair) da = S(load_pairs)(r->ta + 2 * j, count);
        VF along = ((REAL)1 - gate.size) * (gate.ux * da.re + gate.uy * da.im);
        VF across = gate.inverse * (gate.ux * da.im - gate.uy * da.re);
        if (careful) along = S(select)(gate.inverse == (REAL)0, S(all)(0), along);
        tr += along * hr - across * hi, ti += along * hi + across * hr;
        to->lr[p] = from->lr[p] + along, to->li[p] = from->li[p] + across;
    }
    VF key = S(load)(r->k + j, count), value = S(load)(r->v + j, count);
    hr = re * hr - im * hi + key * value, hi = re * hi + im * from->hr[p];
    VF next = re * tr - im * ti + S(load_or_zero)(r->tk, j, count) * value + key * S(load_or_zero)(r->tv, j, count);
    to->hr[p] = hr, to->hi[p] = hi, to->tr[p] = next, to->ti[p] = re * ti + im * tr;
    S(store)(r->out + j, S(load)(r->q + j, count) * next + S(load_or_zero)(r->tq, j, count) * hr, count);
}

/* `logs` [b, c, 2]: the sum of lambda, which is the tangent of log(product). t_marks: tangents of the forward pass's marks. */
void S(gate_loop_narrow_tangent)(const REAL *q, const REAL *k, const REAL *v, const REAL *a, const REAL *h0, const REAL *tq,
                                 const REAL *tk, const REAL *tv, const REAL *ta, const REAL *th0, REAL *tout, REAL *tlast, REAL *logs,
                                 REAL *t_marks, int64_t b, int64_t n, int64_t c, int64_t q_batch, int64_t q_row, int64_t k_batch,
                                 int64_t k_row,
                                 int64_t v_batch, int64_t v_row, int64_t a_batch, int64_t a_row, int64_t tq_batch, int64_t tq_row,
                                 int64_t tk_batch, int64_t tk_row, int64_t tv_batch, int64_t tv_row, int64_t ta_batch,
                                 int64_t ta_row, int64_t threads) {
    int64_t most = task_channels(b, c, threads, CHANNELS), blocks = (c + most - 1) / most, tasks = b * blocks;
#pragma omp parallel for num_threads((int)min64(threads, tasks)) schedule(dynamic) if (threads > 1 && tasks > 1)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t i = task / blocks, from = task % blocks * most, width = min64(most, c - from), full = width / LANES * LANES;
        unsigned mode = subnormals_off();
        S(narrow_tangent_state) st[2]; /* before and after a step, by turns */
        memset(st, 0, sizeof st);
        if (h0) S(split_pairs)(h0 + 2 * (i * c + from), st[0].hr, st[0].hi, width);
        if (th0) S(split_pairs)(th0 + 2 * (i * c + from), st[0].tr, st[0].ti, width);
        int64_t slow = 0;
        for (int64_t t = 0; t < n; t++) {
            const S(narrow_tangent_state) *now = st + t % 2;
            S(narrow_tangent_state) *next = st + (t + 1) % 2;
            if (t % EVERY == 0) {
                REAL *mark = t_marks + (i * MARKS(n) + t / EVERY) * 2 * c + from;
                memcpy(mark, now->tr, (size_t)width * sizeof(REAL));
                memcpy(mark + c, now->ti, (size_t)width * sizeof(REAL));
            }
            S(tangent_rows) r = {ROW(q, i, t) + from, ROW(k, i, t) + from, ROW(v, i, t) + from, ROW(a, i, t) + 2 * from,
                                 TANGENT_ROW(tq, i, t, from), TANGENT_ROW(tk, i, t, from), TANGENT_ROW(tv, i, t, from),
                                 TANGENT_ROW(ta, i, t, 2 * from), tout + (i * n + t) * c + from};
#define FAST(count, vectors) S(narrow_tangent_step)(&r, j, now, next, 0, &odd, count)
#define CAREFUL(count) S(narrow_tangent_step)(&r, j, now, next, 1, &odd, count)
            FAST_OR_CAREFUL(slow, FAST, CAREFUL, 1);
#undef FAST
#undef CAREFUL
        }
        const S(narrow_tangent_state) *end = st + n % 2;
        S(join_pairs)(tlast + 2 * (i * c + from), end->tr, end->ti, width);
        S(join_pairs)(logs + 2 * (i * c + from), end->lr, end->li, width);
        subnormals_back(mode);
    }
}

/* lambda summed from the chunk's start, `logs`; and the tangents of p and of z = p_end / p: p l_t and z (l_end - l_t). */
typedef struct {
    REAL lr[CHUNK], li[CHUNK], pr[CHUNK], pi[CHUNK], zr[CHUNK], zi[CHUNK], er, ei;
} S(gate_tangents);

static void S(chunk_gate_tangents)(const REAL *ta, int64_t row, int64_t steps, const S(gates) *g, S(gate_tangents) *tg,
                                   double whole[2]) {
    memset(tg, 0, sizeof *tg);
    double lr = 0, li = 0;
    for (int64_t t = 0; t < steps; t++) {
        if (ta && g->inverse[t] != 0) {
            double x = g->ux[t], y = g->uy[t], re = ta[t * row], im = ta[t * row + 1];
            lr += (1 - (double)g->size[t]) * (x * re + y * im), li += g->inverse[t] * (x * im - y * re);
        }
        tg->lr[t] = (REAL)lr, tg->li[t] = (REAL)li;
        tg->pr[t] = (REAL)(g->pr[t] * lr - g->pi[t] * li), tg->pi[t] = (REAL)(g->pr[t] * li + g->pi[t] * lr);
    }
    for (int64_t t = 0; t < steps; t++) {
        double dr = lr - tg->lr[t], di = li - tg->li[t];
        tg->zr[t] = (REAL)(g->zr[t] * dr - g->zi[t] * di), tg->zi[t] = (REAL)(g->zr[t] * di + g->zi[t] * dr);
    }
    tg->er = (REAL)(g->er * lr - g->ei * li), tg->ei = (REAL)(g->er * li + g->ei * lr);
    whole[0] += lr, whole[1] += li;
}

/* to[t] = x_t (re_t, sign im_t) + y_t (yre_t, sign yim_t), as in double_rows. */
static void S(double_rows_twice)(const REAL *x, const REAL *re, const REAL *im, const REAL *y, const REAL *yre, const REAL *yim,
                                 REAL sign, REAL *to, int64_t dp, int64_t rows) {
    for (int64_t t = 0; t < rows; t++)
        for (int64_t j = 0; j < dp; j += LANES) {
            VF u = S(load)(x + t * dp + j, LANES), w = S(load)(y + t * dp + j, LANES);
            S(store)(to + t * 2 * dp + j, u * re[t] + w * yre[t], LANES);
            S(store)(to + t * 2 * dp + dp + j, (u * im[t] + w * yim[t]) * sign, LANES);
        }
}

/* scores S, S' -> S D and S' D + S D', with D' = D (l_t - l_s), for s <= t, else 0. */
static void S(decay_tangent)(REAL *scores, REAL *t_scores, const S(gates) *g, const S(gate_tangents) *tg, int64_t rows) {
    VI lanes = S(lane_numbers)();
    for (int64_t t = 0; t < rows; t++)
        for (int64_t j = 0; j < up(up(t + 1, TILE), LANES); j += LANES) {
            REAL *sc = scores + t * CHUNK + j, *ts = t_scores + t * CHUNK + j;
            VF x = S(load)(sc, LANES), y = S(load)(ts, LANES), wr = S(load)(g->wr + j, LANES), wi = S(load)(g->wi + j, LANES);
            VF dr = tg->lr[t] - S(load)(tg->lr + j, LANES), di = tg->li[t] - S(load)(tg->li + j, LANES);
            VF re = wr * g->pr[t] - wi * g->pi[t], im = wi * g->pr[t] + wr * g->pi[t];
            y = y * re + x * (re * dr - im * di), x *= re;
            if (j + LANES > t) {
                VI seen = lanes + (INT)j <= (INT)t;
                x = S(select)(seen, x, S(all)(0)), y = S(select)(seen, y, S(all)(0));
            }
            S(store)(sc, x, LANES), S(store)(ts, y, LANES);
        }
}

static void S(pack_or_zero)(const REAL *from, int64_t stride, REAL *to, int64_t ld, int64_t rows, int64_t width, int64_t padded) {
    if (from) S(pack)(from, stride, to, ld, rows, width, padded);
    else memset(to, 0, (size_t)(padded * ld) * sizeof(REAL));
}

#define TANGENT_AT(x, i, start) ((x) ? (x) + PLACE(x, i, start) : NULL)

/* Asks for the next chunk of an operand: between products, so that it comes while they are made. */
#define FETCH(x, width) if (x) S(fetch)(x + PLACE(x, i, start + m), x##_row, later, width)

/* out, last, product: what the forward pass gives, or NULL. tout lies in memory as out does. If they are given, logs receives the
 * tangent of the product, else that of its logarithm. */
void S(gate_loop_wide_tangent)(const REAL *q, const REAL *k, const REAL *v, const REAL *a, const REAL *h0, const REAL *tq,
                               const REAL *tk, const REAL *tv, const REAL *ta, const REAL *th0, REAL *tout, REAL *tlast, REAL *logs,
                               REAL *out, REAL *last, REAL *product, int64_t b, int64_t h, int64_t n, int64_t d, int64_t e,
                               int64_t q_batch, int64_t q_head, int64_t q_row, int64_t k_batch, int64_t k_head, int64_t k_row,
                               int64_t v_batch, int64_t v_head, int64_t v_row, int64_t a_batch, int64_t a_head, int64_t a_row, int64_t tq_batch, int64_t tq_head, int64_t tq_row,
                               int64_t tk_batch, int64_t tk_head, int64_t tk_row, int64_t tv_batch, int64_t tv_head, int64_t tv_row,
                               int64_t ta_batch, int64_t ta_head, int64_t ta_row, int64_t out_batch, int64_t out_head,
                               int64_t out_row, int64_t threads) {
    wide_sizes s = wide_size(b, h, n, d, e);
    int64_t dp = s.dp, ep = s.ep, tasks = b * h, size = 2 * dp * ep;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        REAL *state = scratch((size_t)(2 * size + CHUNK * (8 * dp + 3 * ep + 2 * CHUNK)) * sizeof(REAL));
        if (!state) abort();
        REAL *t_state = state + size, *q_room = t_state + size, *k_room = q_room + CHUNK * dp, *tq_room = k_room + CHUNK * dp;
        REAL *tk_room = tq_room + CHUNK * dp, *kt = tk_room + CHUNK * dp, *tkt = kt + CHUNK * dp, *two = tkt + CHUNK * dp;
        REAL *v_room = two + CHUNK * 2 * dp, *tv_room = v_room + CHUNK * ep, *oc = tv_room + CHUNK * ep;
        REAL *scores = oc + CHUNK * ep, *t_scores = scores + CHUNK * CHUNK;
        S(gates) g;
        S(gate_tangents) tg;
        unsigned mode = subnormals_off();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < tasks; i++) {
            double gates[2] = {1, 0}, whole[2] = {0, 0};
            S(plain_state_in)(h0 ? h0 + i * 2 * d * e : NULL, state, d, e, dp, ep);
            S(plain_state_in)(th0 ? th0 + i * 2 * d * e : NULL, t_state, d, e, dp, ep);
            for (int64_t start = 0; start < n; start += s.m) {
                int64_t m = min64(s.m, n - start), rows = up(m, PAD);
                S(chunk_gates)(AT(a, i) + start * a_row, a_row, m, &g, gates);
                S(chunk_gate_tangents)(TANGENT_AT(ta, i, start), ta_row, m, &g, &tg, whole);
                int64_t later = min64(s.m, n - start - m), past = start || h0 || th0; /* whether there is a state to read */
                const REAL *qc = S(packed)(q + PLACE(q, i, start), q_row, q_room, dp, m, d, rows);
                const REAL *kc = S(packed)(k + PLACE(k, i, start), k_row, k_room, dp, m, d, rows);
                const REAL *vc = S(packed)(v + PLACE(v, i, start), v_row, v_room, ep, m, e, rows);
                const REAL *tqc = S(packed)(TANGENT_AT(tq, i, start), tq_row, tq_room, dp, m, d, rows);
                const REAL *tkc = S(packed)(TANGENT_AT(tk, i, start), tk_row, tk_room, dp, m, d, rows);
                const REAL *tvc = S(packed)(TANGENT_AT(tv, i, start), tv_row, tv_room, ep, m, e, rows);
                S(transpose)(kc, dp, kt, CHUNK, rows, dp);
                S(times)(qc, dp, kt, CHUNK, scores, CHUNK, rows, rows, d, 0, RESULT_LOWER);
                FETCH(q, d);
                S(times)(tqc, dp, kt, CHUNK, t_scores, CHUNK, rows, rows, d, 0, RESULT_LOWER);
                if (tk) {
                    S(transpose)(tkc, dp, tkt, CHUNK, rows, dp);
                    S(times)(qc, dp, tkt, CHUNK, t_scores, CHUNK, rows, rows, d, 1, RESULT_LOWER);
                }
                FETCH(k, d);
                S(decay_tangent)(scores, t_scores, &g, &tg, rows);
                S(double_rows_twice)(tqc, g.pr, g.pi, qc, tg.pr, tg.pi, -1, two, dp, rows);
                if (past) S(times)(two, 2 * dp, state, ep, oc, ep, rows, ep, 2 * dp, 0, FULL);
                FETCH(v, e);
                S(double_rows)(qc, g.pr, g.pi, -1, two, dp, rows);
                if (past) S(times)(two, 2 * dp, t_state, ep, oc, ep, rows, ep, 2 * dp, 1, FULL);
                FETCH(tq, d);
                S(times)(t_scores, CHUNK, vc, ep, oc, ep, rows, ep, rows, past, LEFT_LOWER);
                if (tv) S(times)(scores, CHUNK, tvc, ep, oc, ep, rows, ep, rows, 1, LEFT_LOWER);
                S(unpack)(oc, ep, tout + PLACE(out, i, start), out_row, m, e);
                if (out) {
                    if (past) S(times)(two, 2 * dp, state, ep, oc, ep, rows, ep, 2 * dp, 0, FULL);
                    S(times)(scores, CHUNK, vc, ep, oc, ep, rows, ep, rows, past, LEFT_LOWER);
                    S(unpack)(oc, ep, out + PLACE(out, i, start), out_row, m, e);
                }

                for (int64_t j = 0; j < dp * ep; j += LANES) {
                    VF re = S(load)(state + j, LANES), im = S(load)(state + dp * ep + j, LANES);
                    VF tr = S(load)(t_state + j, LANES), ti = S(load)(t_state + dp * ep + j, LANES);
                    S(store)(t_state + j, tr * g.er - ti * g.ei + re * tg.er - im * tg.ei, LANES);
                    S(store)(t_state + dp * ep + j, tr * g.ei + ti * g.er + re * tg.ei + im * tg.er, LANES);
                }
                FETCH(tk, d);
                S(turn)(state, 1, 0, dp * ep, dp * ep, g.er, g.ei);
                S(double_rows_twice)(tkc, g.zr, g.zi, kc, tg.zr, tg.zi, 1, two, dp, rows);
                S(times_left_transposed)(two, 2 * dp, vc, ep, t_state, ep, 2 * dp, ep, m, 1, FULL);
                FETCH(tv, e);
                S(double_rows)(kc, g.zr, g.zi, 1, two, dp, rows);
                if (tv) S(times_left_transposed)(two, 2 * dp, tvc, ep, t_state, ep, 2 * dp, ep, m, 1, FULL);
                S(times_left_transposed)(two, 2 * dp, vc, ep, state, ep, 2 * dp, ep, m, 1, FULL);
            }
            for (int64_t r = 0; r < d; r++)
                for (int64_t j = 0; j < e; j++)
                    for (int64_t c = 0; c < 2; c++) tlast[2 * ((i * d + r) * e + j) + c] = t_state[(c * dp + r) * ep + j];
            if (out) {
                for (int64_t r = 0; r < d; r++)
                    for (int64_t j = 0; j < e; j++)
                        for (int64_t c = 0; c < 2; c++) last[2 * ((i * d + r) * e + j) + c] = state[(c * dp + r) * ep + j];
                product[2 * i] = (REAL)gates[0], product[2 * i + 1] = (REAL)gates[1];
                double re = gates[0] * whole[0] - gates[1] * whole[1];
                whole[1] = gates[0] * whole[1] + gates[1] * whole[0], whole[0] = re;
            }
            logs[2 * i] = (REAL)whole[0], logs[2 * i + 1] = (REAL)whole[1];
        }
        subnormals_back(mode);
        free(state);
    }
}

#undef FETCH
