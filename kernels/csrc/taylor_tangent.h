/* Tangents of Taylor attention: how out and the sums change when the inputs move; included once per precision by taylor.c.
 *
 * With a dot for the change of a thing, the state's change is dS = sum_j psi(k_j) [v_j, 1]. + psi(k_j). [v_j, 1], the queries
 * read phi(q) dS + phi(q). S, and inside a chunk p. = (1 + s) s. with s. = q..k + q.k. Where the value itself is wanted too, it is
 * read along: state and change lie side by side, so it takes features, scores and passes over the data that are made anyway. */

typedef struct {
    const REAL *q, *k, *v, *keep, *sums0, *tq, *tk, *tv, *tkeep, *tsums0;
    REAL *out, *den, *tout, *tden, *tsums, *sums; /* sums NULL: out and den are given, else they are made */
    int64_t queries, n, m, e, near;
    int hard, causal;
    REAL scale, eps;
} S(tangent);

/* dv1 = keep [tv, 0] + tkeep [v, 1] for one chunk. */
static void S(load_value_tangents)(S(work) *w, const S(tangent) *a, int64_t j, int64_t n) {
    int64_t e = a->e;
    for (int64_t t = 0; t < CHUNK; t++) {
        REAL *row = w->dv1 + t * w->ldv, weight = t < n && a->keep ? a->keep[j + t] : 1;
        int there = t < n && !(a->hard && weight == 0);
        const REAL *tv = AT(a->tv, (j + t) * e), *v = a->v + (j + t) * e;
        if (there && tv) {
            __builtin_prefetch(tv + CHUNK * e);
            for (int64_t c = 0; c < e; c++) row[c] = weight * tv[c];
        } else
            memset(row, 0, (size_t)e * sizeof(REAL));
        row[e] = 0;
        if (!there || !a->tkeep) continue;
        for (int64_t c = 0; c < e; c++) row[c] += a->tkeep[j + t] * v[c];
        row[e] += a->tkeep[j + t];
    }
}

/* Writes tout and tden of n rows. acc holds what the weights sum to, [num, den], and its change behind it; `num` becomes out. */
static void S(write_tangent)(S(work) *w, const S(tangent) *a, int64_t at, int64_t n) {
    int64_t e = a->e;
    REAL *out = w->acc, *along = out + w->e1 * CHUNK, *sum = along + e * CHUNK, den[CHUNK] = {0}, inverse[CHUNK], ratio[CHUNK];
    if (a->sums) S(write_out)(w, a->out + at * e, a->den + at, n, a->eps);
    else S(transpose)(a->out + at * e, e, out, CHUNK, n, e);
    memcpy(den, a->den + at, (size_t)n * sizeof(REAL));
    memcpy(a->tden + at, sum, (size_t)n * sizeof(REAL));
    for (int64_t t = 0; t < CHUNK; t++) {
        inverse[t] = 1 / (den[t] < a->eps ? a->eps : den[t]);
        ratio[t] = den[t] >= a->eps ? sum[t] * inverse[t] : 0; /* where the clamp holds, the normaliser stays */
    }
    for (int64_t c = 0; c < e * CHUNK; c += CHUNK)
        for (int64_t t = 0; t < CHUNK; t++) along[c + t] = inverse[t] * along[c + t] - ratio[t] * out[c + t];
    S(transpose)(along, CHUNK, a->tout + at * e, e, e, n);
}

static void S(tangent_keys)(S(work) *w, const S(tangent) *a, int64_t j, int64_t size) {
    const REAL *hard = a->hard ? a->keep + j : NULL;
    S(load_rows)(w->kk, a->k + j * w->d, size, w->d, 1, hard, CHUNK);
    S(load_values)(w->v1, w->ldv, a->v + j * a->e, size, a->e, AT(a->keep, j), a->hard, CHUNK);
    if (a->tk) S(load_rows)(w->dkk, a->tk + j * w->d, size, w->d, 1, hard, CHUNK);
    if (a->tv || a->tkeep) S(load_value_tangents)(w, a, j, size);
}

/* Columns of dv1 that are not zero. */
static inline int64_t S(moving)(const S(work) *w, const S(tangent) *a) { return a->tkeep ? w->e1 : a->tv ? w->e1 - 1 : 0; }

/* What the queries in the lanes take from the loaded chunk of keys. */
static void S(tangent_pairs)(S(work) *w, const S(tangent) *a, REAL *along, int64_t keys, int64_t L, int side) {
    int64_t d = w->d, values = S(moving)(w, a);
    S(meet)(w->s, w->qT, w->kk, 2 * d, keys, d, L, side, 1);
    if (a->tq) S(meet)(w->ds, w->dqT, w->kk, 2 * d, keys, d, L, side, 1);
    if (a->tk) S(meet)(w->ds, w->qT, w->dkk, 2 * d, keys, d, L, side, !a->tq);
    if (!a->tq && !a->tk) memset(w->ds, 0, (size_t)(keys * CHUNK) * sizeof(REAL));
    S(score_gradient)(w->s, w->ds, keys, L, side);
    if (a->tq || a->tk) S(gather)(along, w->ds, w->v1, w->ldv, w->e1, keys, L, side);
    if (a->sums) S(gather)(w->acc, w->s, w->v1, w->ldv, w->e1 + S(moving)(w, a), keys, L, side);
    else if (values) S(gather)(along, w->s, w->dv1, w->ldv, S(moving)(w, a), keys, L, side);
}

/* tout and tden of the chunk of queries from i on: from the states of the keys before (`past`) and the chunks of keys j0 to j1. */
static void S(tangent_chunk)(S(work) *w, const S(tangent) *a, int64_t r, int64_t i, int64_t n, int past, int64_t j0, int64_t j1) {
    int64_t L = S(lanes)(n), d = w->d, at = r * a->n + i;
    S(load_lanes)(w->qT, w->qq, a->q + at * d, n, d, a->scale);
    if (a->tq) S(load_lanes)(w->dqT, w->qq, a->tq + at * d, n, d, a->scale);
    int values = a->tv || a->tkeep;
    int both = a->sums != NULL;
    REAL *along = w->acc + w->e1 * CHUNK;
    memset(w->acc, 0, (size_t)(2 * w->e1 * CHUNK) * sizeof(REAL));
    if (past) {
        if (both) S(read_state)(w->acc, w->qT, NULL, w->S, w->stride, d, 2 * w->e1, L, w->phi);
        else if (values || a->tk || a->tsums0) S(read_state)(along, w->qT, NULL, w->dS, w->stride, d, w->e1, L, w->phi);
        if (a->tq) S(read_state)(along, w->qT, w->dqT, w->S, w->stride, d, w->e1, L, w->phi);
    }
    for (int64_t j = j0; j < j1; j += CHUNK) { /* its own chunk last: it stays loaded */
        int64_t size = min64(CHUNK, j1 - j);
        if (j1 - j0 > CHUNK) S(tangent_keys)(w, a, j, size);
        S(tangent_pairs)(w, a, along, size, L, j == i);
    }
    S(write_tangent)(w, a, at, n);
}

static void S(group_tangent)(S(work) *w, const S(tangent) *a) {
    int64_t d = w->d;
    S(to_state)(w->S, w->stride, w->lost, a->sums0, d, w->e1, 1);
    S(to_state)(w->dS, w->stride, w->lost, a->tsums0, d, w->e1, 1);
    for (int64_t j = 0; j < a->m; j += CHUNK) {
        int64_t size = min64(CHUNK, a->m - j);
        S(tangent_keys)(w, a, j, size);
        int carried = a->sums0 || a->tsums0, pairs = j < a->near && !carried;
        for (int64_t r = 0; r < a->queries && a->causal; r++)
            S(tangent_chunk)(w, a, r, j, size, !pairs && (j || carried), pairs ? 0 : j, j + size);
        S(add_state)(w->S, w->stride, w->lost, w->kk, NULL, w->v1, w->ldv, size, d, w->e1 + S(moving)(w, a), w->phi);
        if (a->tk) S(add_state)(w->dS, w->stride, w->lost, w->kk, w->dkk, w->v1, w->ldv, size, d, w->e1, w->phi);
    }
    for (int64_t r = 0; r < a->queries && !a->causal; r++)
        for (int64_t i = 0; i < a->n; i += CHUNK) S(tangent_chunk)(w, a, r, i, min64(CHUNK, a->n - i), 1, 0, 0);
    S(from_state)(a->tsums, w->dS, w->stride, d, w->e1, 1);
    if (a->sums) S(from_state)(a->sums, w->S, w->stride, d, w->e1, 1);
}

int S(try_taylor_tangent)(const REAL *q, const REAL *k, const REAL *v, const REAL *keep, const REAL *sums0, REAL *out,
                          REAL *den, const REAL *tq, const REAL *tk, const REAL *tv, const REAL *tkeep,
                          const REAL *tsums0,
                          REAL *tout, REAL *tden, REAL *tsums, REAL *sums, int64_t b, int64_t h, int64_t g, int64_t n, int64_t m, int64_t d,
                          int64_t e, int64_t near, int64_t hard, int64_t causal, double scale, double eps, int64_t threads) {
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
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < b * g; i++) {
            int64_t x = i * queries * n, y = i * m;
            S(tangent) a = {q + x * d, k + y * d, v + y * e, AT(keep, i / g * m), AT(sums0, i * entries), AT(tq, x * d),
                            AT(tk, y * d), AT(tv, y * e), AT(tkeep, i / g * m), AT(tsums0, i * entries), out + x * e, den + x,
                            tout + x * e, tden + x, tsums + i * entries, AT(sums, i * entries), queries, n, m, e, near, (int)hard,
                            (int)causal, (REAL)scale, (REAL)eps};
            if (!bad) S(group_tangent)(&w, &a);
        }
        if (!bad) free(w.memory);
    }
    return failed;
}
