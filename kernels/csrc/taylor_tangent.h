/* Tangents of Taylor attention: how out and the sums change when the inputs move; included once per precision by taylor.c.
 *
 * With a dot for the change of a thing, the state's change is dS = sum_j psi(k_j) [v_j, 1]. + psi(k_j). [v_j, 1], the queries
 * read phi(q) dS + phi(q). S, and inside a chunk p. = (1 + s) s. with s. = q..k + q.k. Where the value itself is wanted too, it is
 * read along: state and change lie side by side, so it takes features, scores and passes over the data that are made anyway. */

typedef struct {
    const REAL *q, *k, *v, *keep, *sums0, *tq, *tk, *tv, *tkeep, *tsums0;
    REAL *out, *den, *tout, *tden, *tsums, *sums; /* sums NULL: out and den are given, else they are made */
    int64_t queries, n, m, e;
    int hard, causal;
    REAL scale, eps;
} S(tangent);

/* dv1 = keep [tv, 0] + tkeep [v, 1] for one chunk. */
static void S(load_value_tangents)(S(work) *w, const S(tangent) *a, int64_t j, int64_t n) {
    for (int64_t t = 0; t < CHUNK; t++) {
        REAL *row = w->dv1 + t * w->ldv, weight = t < n && a->keep ? a->keep[j + t] : 1;
        int there = t < n && !(a->hard && weight == 0);
        for (int64_t c = 0; c < a->e; c++) row[c] = there && a->tv ? weight * a->tv[(j + t) * a->e + c] : 0;
        row[a->e] = 0;
        if (!there || !a->tkeep) continue;
        for (int64_t c = 0; c < a->e; c++) row[c] += a->tkeep[j + t] * a->v[(j + t) * a->e + c];
        row[a->e] += a->tkeep[j + t];
    }
}

/* tout and tden of one chunk of queries, from the chunk of keys (if causal) and from the states. */
static void S(tangent_chunk)(S(work) *w, const S(tangent) *a, int64_t r, int64_t i, int64_t n, int64_t keys, int past) {
    int64_t L = S(lanes)(n), d = w->d, at = r * a->n + i;
    S(load_lanes)(w->qT, w->qq, a->q + at * d, n, d, a->scale);
    if (a->tq) S(load_lanes)(w->dqT, w->qq, a->tq + at * d, n, d, a->scale);
    int values = a->tv || a->tkeep;
    int both = a->sums != NULL;
    REAL *along = w->acc + (both ? w->e1 * CHUNK : 0);
    memset(w->acc, 0, (size_t)((both ? 2 : 1) * w->e1 * CHUNK) * sizeof(REAL));
    if (past) {
        if (both) S(read_state)(w->acc, w->qT, NULL, w->S, w->stride, d, 2 * w->e1, L, w->phi);
        else if (values || a->tk || a->tsums0) S(read_state)(along, w->qT, NULL, w->dS, w->stride, d, w->e1, L, w->phi);
        if (a->tq) S(read_state)(along, w->qT, w->dqT, w->S, w->stride, d, w->e1, L, w->phi);
    }
    if (keys) {
        S(mac)(w->s, CHUNK, w->qT, CHUNK, w->kk, 2 * d, 1, keys, d, L, 1);
        if (a->tq) S(mac)(w->ds, CHUNK, w->dqT, CHUNK, w->kk, 2 * d, 1, keys, d, L, 1);
        if (a->tk) S(mac)(w->ds, CHUNK, w->qT, CHUNK, w->dkk, 2 * d, 1, keys, d, L, !a->tq);
        if (!a->tq && !a->tk) memset(w->ds, 0, (size_t)(keys * CHUNK) * sizeof(REAL));
        S(score_gradient)(w->s, w->ds, keys, L, 1);
        if (a->tq || a->tk) S(mac)(along, CHUNK, w->ds, CHUNK, w->v1, 1, w->ldv, w->e1, keys, L, 0);
        if (both) S(mac)(w->acc, CHUNK, w->s, CHUNK, w->v1, 1, w->ldv, values ? 2 * w->e1 : w->e1, keys, L, 0);
        else if (values) S(mac)(along, CHUNK, w->s, CHUNK, w->dv1, 1, w->ldv, w->e1, keys, L, 0);
    }
    if (both) S(write_out)(w, a->out + at * a->e, a->den + at, n, a->eps);
    REAL inverse[CHUNK], *sum = along + a->e * CHUNK, *tout = a->tout + at * a->e;
    const REAL *den = a->den + at, *out = a->out + at * a->e;
    memcpy(a->tden + at, sum, (size_t)n * sizeof(REAL));
    for (int64_t t = 0; t < n; t++) inverse[t] = 1 / (den[t] > a->eps ? den[t] : a->eps);
    S(transpose)(along, CHUNK, tout, a->e, a->e, n);
    for (int64_t t = 0; t < n; t++, tout += a->e, out += a->e) {
        REAL ratio = den[t] >= a->eps ? sum[t] * inverse[t] : 0; /* where the clamp holds, the normaliser stays */
        int64_t c = 0;
        for (; c + LANES <= a->e; c += LANES) *(VF *)(tout + c) = inverse[t] * *(VF *)(tout + c) - ratio * *(const VF *)(out + c);
        for (; c < a->e; c++) tout[c] = inverse[t] * tout[c] - ratio * out[c];
    }
}

static void S(group_tangent)(S(work) *w, const S(tangent) *a) {
    int64_t d = w->d;
    int values = a->tv || a->tkeep;
    S(to_state)(w->S, w->stride, w->lost, a->sums0, d, w->e1, 1);
    S(to_state)(w->dS, w->stride, w->lost, a->tsums0, d, w->e1, 1);
    for (int64_t j = 0; j < a->m; j += CHUNK) {
        int64_t size = min64(CHUNK, a->m - j);
        const REAL *hard = a->hard ? a->keep + j : NULL;
        S(load_rows)(w->kk, a->k + j * d, size, d, 1, hard, CHUNK);
        S(load_values)(w->v1, w->ldv, a->v + j * a->e, size, a->e, a->keep ? a->keep + j : NULL, a->hard, CHUNK);
        if (a->tk) S(load_rows)(w->dkk, a->tk + j * d, size, d, 1, hard, CHUNK);
        if (values) S(load_value_tangents)(w, a, j, size);
        for (int64_t r = 0; r < a->queries && a->causal; r++)
            S(tangent_chunk)(w, a, r, j, size, size, j || a->sums0 || a->tsums0);
        S(add_state)(w->S, w->stride, w->lost, w->kk, NULL, w->v1, w->ldv, size, d, values ? 2 * w->e1 : w->e1, w->phi);
        if (a->tk) S(add_state)(w->dS, w->stride, w->lost, w->kk, w->dkk, w->v1, w->ldv, size, d, w->e1, w->phi);
    }
    for (int64_t r = 0; r < a->queries && !a->causal; r++)
        for (int64_t i = 0; i < a->n; i += CHUNK) S(tangent_chunk)(w, a, r, i, min64(CHUNK, a->n - i), 0, 1);
    S(from_state)(a->tsums, w->dS, w->stride, d, w->e1, 1);
    if (a->sums) S(from_state)(a->sums, w->S, w->stride, d, w->e1, 1);
}

int S(try_taylor_tangent)(const REAL *q, const REAL *k, const REAL *v, const REAL *keep, const REAL *sums0, REAL *out,
                          REAL *den, const REAL *tq, const REAL *tk, const REAL *tv, const REAL *tkeep,
                          const REAL *tsums0,
                          REAL *tout, REAL *tden, REAL *tsums, REAL *sums, int64_t b, int64_t h, int64_t g, int64_t n, int64_t m, int64_t d,
                          int64_t e, int64_t hard, int64_t causal, double scale, double eps, int64_t threads) {
    int64_t queries = g ? h / g : 0, entries = (1 + d + d * (d + 1) / 2) * (e + 1);
    int failed = 0;
#pragma omp parallel num_threads((int)max64(1, min64(threads, b * g))) if (threads > 1 && b * g > 1)
    {
        S(work) w;
        int bad = S(work_new)(&w, d, e, TANGENT, max64(n, m));
        if (bad) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < b * g; i++) {
            int64_t x = i * queries * n, y = i * m;
            S(tangent) a = {q + x * d, k + y * d, v + y * e, AT(keep, i / g * m), AT(sums0, i * entries), AT(tq, x * d),
                            AT(tk, y * d), AT(tv, y * e), AT(tkeep, i / g * m), AT(tsums0, i * entries), out + x * e, den + x,
                            tout + x * e, tden + x, tsums + i * entries, AT(sums, i * entries), queries, n, m, e, (int)hard,
                            (int)causal, (REAL)scale, (REAL)eps};
            if (!bad) S(group_tangent)(&w, &a);
        }
        if (!bad) free(w.memory);
    }
    return failed;
}
