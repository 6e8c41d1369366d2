/* Forward mode through gate_loop_narrow_backward: Hessian-vector products in one sweep. Included once per precision.
 *
 * With G the gradient of the state and ' for tangents, alpha' = alpha lambda, and the gate's gradient summed as logs L:
 *
 *     G_t = q_t g_t + conj(alpha_{t+1}) G_{t+1}          L_t = conj(alpha_t H_{t-1}) G_t + W
 *
 * every line is differentiated by the product rule. A NULL tangent is zero. marks, t_marks: H and H' before every EVERY-th step. */

typedef struct {
    VF hr, hi, tr, ti;         /* H and H' */
    VF ux, uy, size, inverse;  /* the gate */
    VF along, across;          /* lambda */
} S(twice_kept);

typedef struct {
    VF gr[VECTORS], gi[VECTORS], tr[VECTORS], ti[VECTORS]; /* what later steps add to G and G' */
    VF wr[VECTORS], wi[VECTORS], twr[VECTORS], twi[VECTORS];
    VF mr[VECTORS], mi[VECTORS], tmr[VECTORS], tmi[VECTORS]; /* marks */
} S(twice_state);

typedef struct {
    const REAL *q, *k, *v, *a, *g, *tq, *tk, *tv, *ta, *tg;
    REAL *dq, *dk, *dv, *da;
} S(twice_rows);

INLINE void S(twice_again)(const S(twice_rows) *r, int64_t j, VF hr, VF hi, VF tr, VF ti, S(twice_kept) *kept, int64_t count) {
    S(gate) gate = S(make_gate)(S(load_gates)(r->a + 2 * j, count), 1, NULL);
    VF re = gate.size * gate.ux, im = gate.size * gate.uy, along = S(all)(0), across = S(all)(0);
    if (r->ta) {
        S(pair) da = S(load_pairs)(r->ta + 2 * j, count);
        along = ((REAL)1 - gate.size) * (gate.ux * da.re + gate.uy * da.im);
        across = gate.inverse * (gate.ux * da.im - gate.uy * da.re);
        along = S(select)(gate.inverse == (REAL)0, S(all)(0), along);
        tr += along * hr - across * hi, ti += along * hi + across * hr;
    }
    VF key = S(load)(r->k + j, count), value = S(load)(r->v + j, count);
    VF push = S(load_or_zero)(r->tk, j, count) * value + key * S(load_or_zero)(r->tv, j, count);
    *kept = (S(twice_kept)){re * hr - im * hi + key * value, re * hi + im * hr, re * tr - im * ti + push, re * ti + im * tr,
                            gate.ux, gate.uy, gate.size, gate.inverse, along, across};
}

INLINE void S(twice_back)(const S(twice_rows) *r, int64_t j, const S(twice_kept) *x, S(twice_state) *st, int64_t p, int64_t count) {
    VF q = S(load)(r->q + j, count), k = S(load)(r->k + j, count), v = S(load)(r->v + j, count), g = S(load_or_zero)(r->g, j, count);
    VF tq = S(load_or_zero)(r->tq, j, count), tk = S(load_or_zero)(r->tk, j, count), tv = S(load_or_zero)(r->tv, j, count);
    VF tg = S(load_or_zero)(r->tg, j, count);
    VF gr = q * g + st->gr[p], gi = st->gi[p], tgr = tq * g + q * tg + st->tr[p], tgi = st->ti[p];
    S(store)(r->dq + j, tg * x->hr + g * x->tr, count);
    S(store)(r->dk + j, tv * gr + v * tgr, count);
    S(store)(r->dv + j, tk * gr + k * tgr, count);
    /* What was carried into the step, alpha H: H without the step's own product. */
    VF br = x->hr - k * v, bi = x->hi, tbr = x->tr - tk * v - k * tv, tbi = x->ti;
    VF lr = br * gr + bi * gi + st->wr[p], li = br * gi - bi * gr + st->wi[p];
    VF tlr = tbr * gr + tbi * gi + br * tgr + bi * tgi + st->twr[p], tli = tbr * gi - tbi * gr + br * tgi - bi * tgr + st->twi[p];
    /* The gradient is u (slow L_r + i L_i / m), slow = 1 - size; a' moves m by `away` and turns u by `across`. */
    VF ux = x->ux, uy = x->uy, inverse = x->inverse, slow = (REAL)1 - x->size, away = S(all)(0);
    VI zero = inverse == (REAL)0;
    if (r->ta) {
        S(pair) da = S(load_pairs)(r->ta + 2 * j, count);
        away = ux * da.re + uy * da.im;
    }
    VF along = slow * lr, across = inverse * li;
    VF t_along = slow * (tlr - x->size * away * lr) - x->across * across;
    VF t_across = inverse * (tli - away * across) + x->across * along;
    t_along = S(select)(zero, S(all)(0), t_along), t_across = S(select)(zero, S(all)(0), t_across);
    S(store_pairs)(r->da + 2 * j, ux * t_along - uy * t_across, uy * t_along + ux * t_across, count);
    /* Carried on: conj(alpha) G and its tangent conj(alpha) (G' + conj(lambda) G). */
    VF re = x->size * ux, im = x->size * uy;
    tgr += x->along * gr + x->across * gi, tgi += x->along * gi - x->across * gr;
    st->gr[p] = re * gr + im * gi, st->gi[p] = re * gi - im * gr;
    st->tr[p] = re * tgr + im * tgi, st->ti[p] = re * tgi - im * tgr;
}

/* to (+)= x conj(y), for `width` pairs. */
static void S(add_logs)(VF *re, VF *im, const REAL *x, const REAL *y, int64_t width) {
    if (!x || !y) return;
    for (int64_t j = 0; j < width; j++) {
        ((REAL *)re)[j] += x[2 * j] * y[2 * j] + x[2 * j + 1] * y[2 * j + 1];
        ((REAL *)im)[j] += x[2 * j + 1] * y[2 * j] - x[2 * j] * y[2 * j + 1];
    }
}

#define AT_PAIRS(x) ((x) ? (x) + 2 * (i * c + from) : NULL)

void S(gate_loop_narrow_hessian)(const REAL *q, const REAL *k, const REAL *v, const REAL *a, const REAL *marks, const REAL *product,
                                 const REAL *g, const REAL *g_last, const REAL *g_product, const REAL *tq, const REAL *tk,
                                 const REAL *tv, const REAL *ta, const REAL *t_marks, const REAL *t_product, const REAL *tg,
                                 const REAL *tg_last, const REAL *tg_product, REAL *dq, REAL *dk, REAL *dv, REAL *da, REAL *dh0,
                                 int64_t b, int64_t n, int64_t c, int64_t q_batch, int64_t q_row, int64_t k_batch, int64_t k_row,
                                 int64_t v_batch, int64_t v_row, int64_t a_batch, int64_t a_row, int64_t g_batch, int64_t g_row,
                                 int64_t tq_batch, int64_t tq_row, int64_t tk_batch, int64_t tk_row, int64_t tv_batch, int64_t tv_row,
                                 int64_t ta_batch, int64_t ta_row, int64_t tg_batch, int64_t tg_row, int64_t threads) {
    int64_t most = task_channels(b, c, threads, CHANNELS), blocks = (c + most - 1) / most, tasks = b * blocks;
    int64_t segments = (n + EVERY - 1) / EVERY;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        S(twice_kept) *kept = scratch(sizeof(S(twice_kept)) * VECTORS * EVERY);
        S(twice_state) *st = scratch(sizeof(S(twice_state)));
        if (!kept || !st) abort();
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t i = task / blocks, from = task % blocks * most, width = min64(most, c - from);
            int64_t full = width / LANES * LANES;
            unsigned mode = subnormals_off();
            memset(st, 0, sizeof *st);
            if (g_last) S(split_pairs)(AT_PAIRS(g_last), st->gr, st->gi, width);
            if (tg_last) S(split_pairs)(AT_PAIRS(tg_last), st->tr, st->ti, width);
            S(add_logs)(st->wr, st->wi, AT_PAIRS(g_product), AT_PAIRS(product), width);
            S(add_logs)(st->twr, st->twi, AT_PAIRS(tg_product), AT_PAIRS(product), width);
            S(add_logs)(st->twr, st->twi, AT_PAIRS(g_product), AT_PAIRS(t_product), width);
            for (int64_t segment = segments - 1; segment >= 0; segment--) {
                int64_t start = segment * EVERY, steps = min64(EVERY, n - start), mark = (i * MARKS(n) + segment) * 2 * c + from;
                size_t bytes = (size_t)width * sizeof(REAL);
                memcpy(st->mr, marks + mark, bytes), memcpy(st->mi, marks + mark + c, bytes);
                if (t_marks) memcpy(st->tmr, t_marks + mark, bytes), memcpy(st->tmi, t_marks + mark + c, bytes);
                for (int64_t turn = 0; turn < 2 * steps; turn++) { /* up through the segment, then down */
                    int64_t s = turn < steps ? turn : 2 * steps - 1 - turn, t = start + s, at = (i * n + t) * c + from;
                    S(twice_rows) r = {ROW(q, i, t) + from, ROW(k, i, t) + from, ROW(v, i, t) + from, ROW(a, i, t) + 2 * from,
                                       TANGENT_ROW(g, i, t, from), TANGENT_ROW(tq, i, t, from), TANGENT_ROW(tk, i, t, from),
                                       TANGENT_ROW(tv, i, t, from), TANGENT_ROW(ta, i, t, 2 * from), TANGENT_ROW(tg, i, t, from),
                                       dq + at, dk + at, dv + at, da + 2 * at};
                    S(twice_kept) *kept_t = kept + s * VECTORS, *kept_b = s ? kept_t - VECTORS : NULL;
#define UP(count)                                                                                                         \
    do {                                                                                                                  \
        int64_t p = j / LANES;                                                                                            \
        if (kept_b) S(twice_again)(&r, j, kept_b[p].hr, kept_b[p].hi, kept_b[p].tr, kept_b[p].ti, kept_t + p, count);     \
        else S(twice_again)(&r, j, st->mr[p], st->mi[p], st->tmr[p], st->tmi[p], kept_t + p, count);                      \
    } while (0)
#define DOWN(count) S(twice_back)(&r, j, kept_t + j / LANES, st, j / LANES, count)
                    if (turn < steps) STEP(full, width, UP);
                    else STEP(full, width, DOWN);
#undef UP
#undef DOWN
                }
            }
            S(join_pairs)(dh0 + 2 * (i * c + from), st->tr, st->ti, width);
            subnormals_back(mode);
        }
        free(kept), free(st);
    }
}
