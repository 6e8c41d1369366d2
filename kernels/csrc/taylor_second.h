/* How the gradients of Taylor attention change when its inputs move; included once per precision by taylor.c.
 *
 * taylor_backward.h, differentiated product by product. A dot marks a change: S and R of the backward pass have companions
 * dS and dR, and inside a chunk ds = (1 + s) u becomes s. u + (1 + s) u. . keep is NULL or hard. Where the gradients themselves
 * are wanted too, they are read along: nearly all that they are made of is there anyway. */

typedef struct {
    S(backward) at; /* where; dq .. dsums0 receive the gradients themselves, or are NULL */
    const REAL *tout, *tden, *tq, *tk, *tv, *tsums0, *tgrad, *tgrad_sums;
    REAL *tdq, *tdk, *tdv, *tdsums0; /* the changes of the gradients */
} S(second);

/* dg1 = change of g1 = [g / den, -(g.out) / den], which must be loaded. */
static void S(load_gradient_along)(S(work) *w, const S(second) *a, int64_t at, int64_t n) {
    int64_t e = w->e1 - 1;
    REAL eps = a->at.eps;
    for (int64_t t = 0; t < CHUNK; t++) {
        REAL *row = w->dg1 + t * w->ldv, *g1 = w->g1 + t * w->ldv;
        memset(row, 0, (size_t)w->e1 * sizeof(REAL));
        if (t >= n) continue;
        REAL den = a->at.den[at + t], inverse = 1 / (den < eps ? eps : den), dot = 0;
        REAL rate = den >= eps ? a->tden[at + t] * inverse : 0;
        const REAL *out = a->at.out + (at + t) * e, *tout = a->tout + (at + t) * e;
        if (a->tgrad)
            for (int64_t c = 0; c < e; c++) row[c] = a->tgrad[(at + t) * e + c] * inverse;
        for (int64_t c = 0; c < e; c++) {
            row[c] -= rate * g1[c];
            dot += row[c] * out[c] + g1[c] * tout[c];
        }
        row[e] = den >= eps ? -dot : 0;
    }
}

static void S(second_keys)(S(work) *w, const S(second) *a, int64_t j, int64_t n) {
    const REAL *hard = a->at.hard ? a->at.keep + j : NULL;
    S(load_keys)(w, &a->at, j, n, 0);
    if (a->tk) S(load_rows)(w->dkk, a->tk + j * w->d, n, w->d, 1, hard, 0);
    else memset(w->dkk, 0, (size_t)(2 * w->d * CHUNK) * sizeof(REAL));
    for (int64_t t = 0; t < CHUNK; t++) {
        REAL *row = w->dv1 + t * w->ldv;
        int there = a->tv && t < n && !(hard && hard[t] == 0);
        for (int64_t c = 0; c < a->at.e; c++) row[c] = there ? a->tv[(j + t) * a->at.e + c] : 0;
        row[a->at.e] = 0; /* the 1 of [v, 1] does not move */
    }
}

static void S(second_queries)(S(work) *w, const S(second) *a, int64_t r, int64_t i, int64_t n) {
    S(load_queries)(w, &a->at, r, i, n, 0);
    if (a->tq) S(load_rows)(w->dqq, a->tq + (r * a->at.n + i) * w->d, n, w->d, a->at.scale, NULL, 0);
    else memset(w->dqq, 0, (size_t)(2 * w->d * CHUNK) * sizeof(REAL));
    S(load_gradient_along)(w, a, r * a->at.n + i, n);
}

/* Fills s, ts, ds and tu with p, its change, ds and its change: x and its values y in rows; zT and its values yT in lanes. */
static void S(second_pairs)(S(work) *w, const REAL *xx, const REAL *dxx, const REAL *y, const REAL *dy, const REAL *zT,
                               const REAL *dzT, const REAL *yT, const REAL *dyT, int64_t rows, int64_t L, int side) {
    int64_t d = w->d, e1 = w->e1, ldv = w->ldv;
    S(meet)(w->s, zT, xx, 2 * d, rows, d, L, side, 1);
    S(meet)(w->ts, dzT, xx, 2 * d, rows, d, L, side, 1);
    S(meet)(w->ts, zT, dxx, 2 * d, rows, d, L, side, 0);
    S(meet)(w->ds, yT, y, ldv, rows, e1, L, side, 1);
    S(meet)(w->tu, dyT, y, ldv, rows, e1, L, side, 1);
    S(meet)(w->tu, yT, dy, ldv, rows, e1, L, side, 0);
    S(score_second)(w->s, w->ts, w->ds, w->tu, rows, L, side);
}

static void S(second_query_gradient)(S(work) *w, const S(second) *a, int64_t r, int64_t i, int64_t n, int64_t keys, int past) {
    int64_t L = S(lanes)(n), d = w->d, at = (r * a->at.n + i) * d;
    REAL *own = a->at.dq ? w->dx : NULL;
    S(second_queries)(w, a, r, i, n);
    memset(w->tx, 0, (size_t)(d * CHUNK) * sizeof(REAL));
    if (own) memset(own, 0, (size_t)(d * CHUNK) * sizeof(REAL));
    S(transpose)(w->qq, 2 * d, w->qT, CHUNK, CHUNK, d);
    S(transpose)(w->dqq, 2 * d, w->dqT, CHUNK, CHUNK, d);
    S(transpose)(w->g1, w->ldv, w->g1T, CHUNK, CHUNK, w->e1);
    S(transpose)(w->dg1, w->ldv, w->dg1T, CHUNK, CHUNK, w->e1);
    if (past)
        S(read_state_back_along)(w->tx, own, w->qT, w->dqT, w->dg1T, w->S, w->stride, d, w->e1, L, w->phi);
    if (keys) {
        S(second_pairs)(w, w->kk, w->dkk, w->v1, w->dv1, w->qT, w->dqT, w->g1T, w->dg1T, keys, L, 1);
        S(gather)(w->tx, w->tu, w->kk, 2 * d, d, keys, L, 1);
        S(gather)(w->tx, w->ds, w->dkk, 2 * d, d, keys, L, 1);
        if (own) S(gather)(own, w->ds, w->kk, 2 * d, d, keys, L, 1);
    }
    S(write_query_gradient)(w->tx, a->tdq + at, n, d, a->at.scale);
    if (own) S(write_query_gradient)(own, a->at.dq + at, n, d, a->at.scale);
}

/* The queries of a chunk, loaded, enter R and dR. */
static void S(second_add_queries)(S(work) *w, int64_t n) {
    S(add_state)(w->R, w->stride, w->lost, w->qq, NULL, w->g1, w->ldv, n, w->d, 2 * w->e1, w->phi);
    S(add_state)(w->dR, w->stride, w->lost, w->qq, w->dqq, w->g1, w->ldv, n, w->d, w->e1, w->phi);
}

static void S(group_second)(S(work) *w, const S(second) *a) {
    const S(backward) *at = &a->at;
    int64_t d = w->d, n = at->n, m = at->m, e = at->e;
    S(to_state)(w->S, w->stride, w->lost, at->sums0, d, w->e1, 1);
    S(to_state)(w->dS, w->stride, w->lost, a->tsums0, d, w->e1, 1);
    S(to_state)(w->R, w->stride, w->lost, at->grad_sums, d, w->e1, (REAL)0.5);
    S(to_state)(w->dR, w->stride, w->lost, a->tgrad_sums, d, w->e1, (REAL)0.5);
    for (int64_t j = 0; j < m; j += CHUNK) {
        int64_t size = min64(CHUNK, m - j);
        S(second_keys)(w, a, j, size);
        for (int64_t r = 0; r < at->queries && at->causal; r++)
            S(second_query_gradient)(w, a, r, j, size, size, j || at->sums0 || a->tsums0);
        if (at->causal && j + CHUNK >= m) continue;
        S(add_state)(w->S, w->stride, w->lost, w->kk, NULL, w->v1, w->ldv, size, d, 2 * w->e1, w->phi);
        S(add_state)(w->dS, w->stride, w->lost, w->kk, w->dkk, w->v1, w->ldv, size, d, w->e1, w->phi);
    }
    for (int64_t r = 0; r < at->queries && !at->causal; r++)
        for (int64_t i = 0; i < n; i += CHUNK) {
            int64_t size = min64(CHUNK, n - i);
            S(second_query_gradient)(w, a, r, i, size, 0, 1);
            S(second_add_queries)(w, size);
        }
    for (int64_t j = (m - 1) / CHUNK * CHUNK; j >= 0 && m; j -= CHUNK) {
        int64_t size = min64(CHUNK, m - j), L = S(lanes)(size);
        S(second_keys)(w, a, j, size);
        S(transpose)(w->kk, 2 * d, w->kT, CHUNK, CHUNK, d);
        S(transpose)(w->dkk, 2 * d, w->dkT, CHUNK, CHUNK, d);
        S(transpose)(w->v1, w->ldv, w->v1T, CHUNK, CHUNK, w->e1);
        S(transpose)(w->dv1, w->ldv, w->dv1T, CHUNK, CHUNK, w->e1);
        REAL *own = at->dk ? w->dx : NULL, *along = w->acc + (own ? w->e1 * CHUNK : 0); /* as in tangent_chunk */
        memset(w->tx, 0, (size_t)(d * CHUNK) * sizeof(REAL));
        if (own) memset(own, 0, (size_t)(d * CHUNK) * sizeof(REAL));
        memset(w->acc, 0, (size_t)((own ? 2 : 1) * w->e1 * CHUNK) * sizeof(REAL));
        if (!at->causal || at->grad_sums || a->tgrad_sums || j + CHUNK < m) {
            if (own) S(read_state)(w->acc, w->kT, NULL, w->R, w->stride, d, 2 * w->e1, L, w->phi);
            else S(read_state)(along, w->kT, NULL, w->dR, w->stride, d, w->e1, L, w->phi);
            S(read_state)(along, w->kT, w->dkT, w->R, w->stride, d, w->e1, L, w->phi);
            S(read_state_back_along)(w->tx, own, w->kT, w->dkT, w->dv1T, w->R, w->stride, d, w->e1, L, w->phi);
        }
        for (int64_t r = 0; r < at->queries && at->causal; r++) {
            S(second_queries)(w, a, r, j, size);
            S(second_pairs)(w, w->qq, w->dqq, w->g1, w->dg1, w->kT, w->dkT, w->v1T, w->dv1T, size, L, -1);
            S(gather)(w->tx, w->tu, w->qq, 2 * d, d, size, L, -1);
            S(gather)(w->tx, w->ds, w->dqq, 2 * d, d, size, L, -1);
            S(gather)(along, w->ts, w->g1, w->ldv, w->e1, size, L, -1);
            if (own) {
                S(gather)(own, w->ds, w->qq, 2 * d, d, size, L, -1);
                S(gather)(w->acc, w->s, w->g1, w->ldv, 2 * w->e1, size, L, -1);
            } else
                S(gather)(along, w->s, w->dg1, w->ldv, w->e1, size, L, -1);
            if (j || a->tdsums0) S(second_add_queries)(w, size);
        }
        S(write_key_gradient)(w->tx, along, NULL, AT(at->keep, j), a->tdk + j * d, a->tdv + j * e, NULL, size, d, e);
        if (own) S(write_key_gradient)(own, w->acc, NULL, AT(at->keep, j), at->dk + j * d, at->dv + j * e, NULL, size, d, e);
    }
    if (at->dsums0) S(from_state)(at->dsums0, w->R, w->stride, d, w->e1, 2);
    if (a->tdsums0) S(from_state)(a->tdsums0, w->dR, w->stride, d, w->e1, 2);
}

int S(try_taylor_second)(const REAL *q, const REAL *k, const REAL *v, const REAL *keep, const REAL *sums0, const REAL *out,
                         const REAL *den, const REAL *grad, const REAL *grad_sums, const REAL *tout, const REAL *tden,
                         const REAL *tq, const REAL *tk, const REAL *tv, const REAL *tsums0, const REAL *tgrad,
                         const REAL *tgrad_sums, REAL *tdq, REAL *tdk, REAL *tdv, REAL *tdsums0, REAL *dq, REAL *dk, REAL *dv,
                         REAL *dsums0, int64_t b, int64_t h, int64_t g, int64_t n, int64_t m, int64_t d, int64_t e, int64_t hard,
                         int64_t causal, double scale, double eps, int64_t threads) {
    int64_t queries = g ? h / g : 0, entries = (1 + d + d * (d + 1) / 2) * (e + 1);
    int failed = 0;
#pragma omp parallel num_threads((int)max64(1, min64(threads, b * g))) if (threads > 1 && b * g > 1)
    {
        S(work) w;
        int bad = S(work_new)(&w, d, e, SECOND, max64(n, m));
        if (bad) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < b * g; i++) {
            int64_t x = i * queries * n, y = i * m, z = i * entries;
            S(second) a = {{q + x * d, k + y * d, v + y * e, AT(keep, i / g * m), AT(sums0, z), out + x * e, den + x,
                            grad + x * e, AT(grad_sums, z), AT(dq, x * d), AT(dk, y * d), AT(dv, y * e), NULL, AT(dsums0, z), queries,
                            n, m, e, 0, (int)hard, (int)causal, (REAL)scale, (REAL)eps},
                           tout + x * e, tden + x, AT(tq, x * d), AT(tk, y * d), AT(tv, y * e), AT(tsums0, z),
                           AT(tgrad, x * e), AT(tgrad_sums, z), tdq + x * d, tdk + y * d, tdv + y * e, AT(tdsums0, z)};
            if (!bad) S(group_second)(&w, &a);
        }
        if (!bad) free(w.memory);
    }
    return failed;
}
