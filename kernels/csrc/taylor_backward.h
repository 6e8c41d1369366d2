/* Gradients of Taylor attention; included once per precision by taylor.c.
 *
 * With g' = [g / den, -(g.out) / den] the gradient of p_ij is g'_i.[v_j, 1] =: u_ij, and that of s_ij is (1 + s_ij) u_ij.
 * Queries read the state S of the keys before them; keys read the state R = sum_i phi(q_i) g'_i of the queries after them,
 * which starts from the cotangent of the returned sums and ends as the gradient of the initial sums. The 1/2 on squares,
 * which belongs to psi(k), is kept inside R, so one routine serves both directions. */

/* g1[t] = [g / den, -(g.out) / den]; where the clamp holds, the normaliser has no gradient. */
static void S(load_gradient)(S(work) *w, const REAL *grad, const REAL *out, const REAL *den, int64_t n, REAL eps,
                             int64_t ahead) {
    int64_t e = w->e1 - 1;
    for (int64_t t = 0; t < CHUNK; t++) {
        REAL *row = w->g1 + t * w->ldv;
        if (t >= n) {
            memset(row, 0, (size_t)w->ldv * sizeof(REAL));
            continue;
        }
        REAL least = den[t] < eps ? eps : den[t], dot = 0; /* divides: times the inverse would be rounded twice */
        VF dots = {0};
        __builtin_prefetch(grad + (t + ahead) * e);
        __builtin_prefetch(out + (t + ahead) * e);
        int64_t c = 0;
        for (; c + LANES <= e; c += LANES) {
            VF x = *(const VF *)(grad + t * e + c) / least;
            *(VF *)(row + c) = x;
            dots += x * *(const VF *)(out + t * e + c);
        }
        for (; c < e; c++) {
            row[c] = grad[t * e + c] / least;
            dot += row[c] * out[t * e + c];
        }
        for (int l = 0; l < LANES; l++) dot += dots[l];
        row[e] = den[t] >= eps ? -dot : 0;
    }
}

/* Adds to dq (in dx) what the chunk's keys give the n queries in the lanes. */
static void S(query_gradient_inside)(S(work) *w, int64_t n, int64_t keys, int side) {
    int64_t L = S(lanes)(n), d = w->d;
    S(meet)(w->s, w->qT, w->kk, 2 * d, keys, d, L, side, 1);
    S(meet)(w->ds, w->g1T, w->v1, w->ldv, keys, w->e1, L, side, 1);
    S(score_gradient)(w->s, w->ds, keys, L, side);
    S(gather)(w->dx, w->ds, w->kk, 2 * d, d, keys, L, side);
}

/* dq = scale dx for n queries. */
static void S(write_query_gradient)(REAL *dx, REAL *dq, int64_t n, int64_t d, REAL scale) {
    for (int64_t i = 0; i < d * CHUNK; i++) dx[i] *= scale;
    S(transpose)(dx, CHUNK, dq, d, d, n);
}

/* Adds to dk (in dx) and d[v, 1] (in acc) what the n queries qq, g1 give the `keys` keys in the lanes. */
static void S(key_gradient_inside)(S(work) *w, int64_t n, int64_t keys, int side) {
    int64_t L = S(lanes)(keys), d = w->d;
    S(meet)(w->s, w->kT, w->qq, 2 * d, n, d, L, side, 1);
    S(meet)(w->ds, w->v1T, w->g1, w->ldv, n, w->e1, L, side, 1);
    S(score_gradient)(w->s, w->ds, n, L, side);
    S(gather)(w->dx, w->ds, w->qq, 2 * d, d, n, L, side);
    S(gather)(w->acc, w->s, w->g1, w->ldv, w->e1, n, L, side);
}

/* Writes dk, dv and dkeep of n keys from dx and acc = d(keep [v, 1]). */
static void S(write_key_gradient)(const REAL *dx, REAL *acc, const REAL *v, const REAL *keep, REAL *dk, REAL *dv, REAL *dkeep,
                                  int64_t n, int64_t d, int64_t e) {
    S(transpose)(dx, CHUNK, dk, d, d, n);
    if (dkeep)
        for (int64_t t = 0; t < n; t++) {
            REAL sum = acc[e * CHUNK + t];
            for (int64_t c = 0; c < e; c++) sum += acc[c * CHUNK + t] * v[t * e + c];
            dkeep[t] = sum;
        }
    if (keep)
        for (int64_t c = 0; c < e; c++)
            for (int64_t t = 0; t < n; t++) acc[c * CHUNK + t] = keep[t] == 0 ? 0 : keep[t] * acc[c * CHUNK + t];
    S(transpose)(acc, CHUNK, dv, e, e, n);
}

typedef struct {
    const REAL *q, *k, *v, *keep, *sums0, *out, *den, *grad, *grad_sums;
    REAL *dq, *dk, *dv, *dkeep, *dsums0;
    int64_t queries, n, m, e, near;
    int hard, causal;
    REAL scale, eps;
} S(backward);

static void S(load_keys)(S(work) *w, const S(backward) *a, int64_t j, int64_t size, int64_t ahead) {
    S(load_rows)(w->kk, a->k + j * w->d, size, w->d, 1, a->hard ? a->keep + j : NULL, ahead);
    S(load_values)(w->v1, w->ldv, a->v + j * a->e, size, a->e, a->keep ? a->keep + j : NULL, a->hard, ahead);
}

static void S(load_queries)(S(work) *w, const S(backward) *a, int64_t r, int64_t i, int64_t size, int64_t ahead) {
    int64_t at = r * a->n + i;
    S(load_rows)(w->qq, a->q + at * w->d, size, w->d, a->scale, NULL, ahead);
    S(load_gradient)(w, a->grad + at * a->e, a->out + at * a->e, a->den + at, size, a->eps, ahead);
}

/* dq of the chunk of queries from i on: from the state of the keys before (`past`), or from the chunks of keys j0 to j1. */
static void S(query_gradient)(S(work) *w, const S(backward) *a, int64_t r, int64_t i, int64_t n, int past, int64_t j0, int64_t j1) {
    int64_t d = w->d;
    S(load_queries)(w, a, r, i, n, CHUNK);
    memset(w->dx, 0, (size_t)(d * CHUNK) * sizeof(REAL));
    S(transpose)(w->qq, 2 * d, w->qT, CHUNK, CHUNK, d);
    S(transpose)(w->g1, w->ldv, w->g1T, CHUNK, CHUNK, w->e1);
    if (past) S(read_state_back)(w->dx, w->qT, w->g1T, w->S, w->stride, d, w->e1, S(lanes)(n), w->phi);
    for (int64_t j = j0; j < j1; j += CHUNK) { /* its own chunk last: it stays loaded */
        int64_t size = min64(CHUNK, j1 - j);
        if (j1 - j0 > CHUNK) S(load_keys)(w, a, j, size, CHUNK);
        S(query_gradient_inside)(w, n, size, j == i);
    }
    S(write_query_gradient)(w->dx, a->dq + (r * a->n + i) * d, n, d, a->scale);
}

static void S(group_backward)(S(work) *w, const S(backward) *a) {
    int64_t d = w->d, n = a->n, m = a->m, e = a->e, near = a->causal ? a->near : 0;
    int keep_S = !a->causal || a->sums0 || m > near, keep_R = !a->causal || a->dsums0 || a->grad_sums || m > near;
    S(to_state)(w->S, w->stride, w->lost, a->sums0, d, w->e1, 1);
    S(to_state)(w->R, w->stride, w->lost, a->grad_sums, d, w->e1, (REAL)0.5);
    for (int64_t j = 0; j < m; j += CHUNK) {
        int64_t size = min64(CHUNK, m - j);
        S(load_keys)(w, a, j, size, CHUNK);
        int pairs = j < near && !a->sums0;
        for (int64_t r = 0; r < a->queries && a->causal; r++)
            S(query_gradient)(w, a, r, j, size, !pairs && (j || a->sums0), pairs ? 0 : j, j + size);
        if (keep_S && (!a->causal || j + CHUNK < m))
            S(add_state)(w->S, w->stride, w->lost, w->kk, NULL, w->v1, w->ldv, size, d, w->e1, w->phi);
    }
    for (int64_t r = 0; r < a->queries && !a->causal; r++)
        for (int64_t i = 0; i < n; i += CHUNK) {
            int64_t size = min64(CHUNK, n - i);
            S(query_gradient)(w, a, r, i, size, 1, 0, 0);
            S(add_state)(w->R, w->stride, w->lost, w->qq, NULL, w->g1, w->ldv, size, d, w->e1, w->phi);
        }
    for (int64_t j = (m - 1) / CHUNK * CHUNK; j >= 0 && m; j -= CHUNK) {
        int64_t size = min64(CHUNK, m - j), L = S(lanes)(size);
        int pairs = m - j <= near && !a->grad_sums, future = !pairs && (!a->causal || a->grad_sums || j + CHUNK < m);
        S(load_keys)(w, a, j, size, -CHUNK);
        S(transpose)(w->kk, 2 * d, w->kT, CHUNK, CHUNK, d);
        S(transpose)(w->v1, w->ldv, w->v1T, CHUNK, CHUNK, w->e1);
        memset(w->dx, 0, (size_t)(d * CHUNK) * sizeof(REAL));
        memset(w->acc, 0, (size_t)(w->e1 * CHUNK) * sizeof(REAL));
        if (future) {
            S(read_state)(w->acc, w->kT, NULL, w->R, w->stride, d, w->e1, L, w->phi);
            S(read_state_back)(w->dx, w->kT, w->v1T, w->R, w->stride, d, w->e1, L, w->phi);
        }
        for (int64_t r = 0; r < a->queries && a->causal; r++) {
            for (int64_t i = pairs ? (m - 1) / CHUNK * CHUNK : j; i >= j; i -= CHUNK) {
                int64_t n_i = min64(CHUNK, m - i); /* a part of a sequence ends before n */
                S(load_queries)(w, a, r, i, n_i, -CHUNK);
                S(key_gradient_inside)(w, n_i, size, i == j ? -1 : 0);
            }
            if (keep_R && (j || a->dsums0)) S(add_state)(w->R, w->stride, w->lost, w->qq, NULL, w->g1, w->ldv, size, d, w->e1, w->phi);
        }
        S(write_key_gradient)(w->dx, w->acc, a->v + j * e, AT(a->keep, j), a->dk + j * d, a->dv + j * e, AT(a->dkeep, j), size, d, e);
    }
    if (a->dsums0) S(from_state)(a->dsums0, w->R, w->stride, d, w->e1, 2);
}

/* sums = sum phi(q) g'^T over a part's queries, in the public order. */
static void S(query_sums)(S(work) *w, const S(backward) *a, REAL *sums) {
    S(to_state)(w->R, w->stride, w->lost, NULL, w->d, w->e1, 1);
    for (int64_t i = 0; i < a->m; i += CHUNK)
        for (int64_t r = 0; r < a->queries; r++) {
            int64_t size = min64(CHUNK, a->m - i);
            S(load_queries)(w, a, r, i, size, CHUNK);
            S(add_state)(w->R, w->stride, w->lost, w->qq, NULL, w->g1, w->ldv, size, w->d, w->e1, w->phi);
        }
    S(from_state)(sums, w->R, w->stride, w->d, w->e1, 2);
}

/* As split_forward; parts are numbered from the end where sums over queries are taken. */
static int S(split_backward)(const S(inputs) *x, REAL *dq, REAL *dk, REAL *dv, REAL *dkeep, REAL *dsums0, int64_t parts) {
    int64_t d = x->d, e = x->e, n = x->n, groups = x->b * x->g, queries = x->h / x->g, entries = (1 + d + d * (d + 1) / 2) * (e + 1);
    REAL *before = scratch((size_t)(2 * groups * parts * entries) * sizeof(REAL)), *behind = before + groups * parts * entries;
    if (!before) return 1;
    int failed = 0;
#pragma omp parallel num_threads((int)x->threads)
    {
        S(work) w;
        int bad = S(work_new)(&w, d, e, BACKWARD, n);
        if (bad) {
#pragma omp atomic write
            failed = 1;
        }
        for (int phase = 0; phase < 2; phase++) {
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < groups * parts * (2 - phase); task++) {
                int64_t i = task / parts % groups, p = task % parts, from = S(part_start)(p, parts, n);
                int64_t size = S(part_start)(p + 1, parts, n) - from, at = i * n + from, row = i * queries * n + from;
                int64_t own = i * parts + p, last = i * parts + parts - 1 - p;
                const REAL *keep = x->keep ? x->keep + i / x->g * n + from : NULL;
                S(backward) a = {x->q + row * d, x->k + at * d, x->v + at * e, keep,
                                 p ? before + own * entries : AT(x->sums0, i * entries), x->out + row * e, x->den + row,
                                 x->grad + row * e, p < parts - 1 ? behind + last * entries : AT(x->grad_sums, i * entries),
                                 dq + row * d, dk + at * d, dv + at * e, AT(dkeep, at), p ? NULL : AT(dsums0, i * entries), queries, n,
                                 size, e, 0, x->hard, 1, x->scale, x->eps};
                if (bad) continue;
                if (phase) S(group_backward)(&w, &a);
                else if (task >= groups * parts) p ? S(query_sums)(&w, &a, behind + last * entries) : (void)0;
                else if (p < parts - 1)
                    S(group_forward)(&w, NULL, a.k, a.v, keep, NULL, NULL, NULL, before + own * entries, 0, n, size, e, 0, x->hard, 1,
                                     x->scale, x->eps);
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < (phase ? 0 : groups); i++) {
                S(running_sums)(before + i * parts * entries, AT(x->sums0, i * entries), parts, 1, entries);
                S(running_sums)(behind + i * parts * entries, AT(x->grad_sums, i * entries), parts, 1, entries);
            }
        }
        if (!bad) free(w.memory);
    }
    free(before);
    return failed;
}

int S(try_taylor_backward)(const REAL *q, const REAL *k, const REAL *v, const REAL *keep, const REAL *sums0, const REAL *out,
                           const REAL *den, const REAL *grad, const REAL *grad_sums, REAL *dq, REAL *dk, REAL *dv, REAL *dkeep,
                           REAL *dsums0, int64_t b, int64_t h, int64_t g, int64_t n, int64_t m, int64_t d, int64_t e,
                           int64_t near, int64_t hard, int64_t causal, double scale, double eps, int64_t threads) {
    int64_t queries = g ? h / g : 0, entries = (1 + d + d * (d + 1) / 2) * (e + 1);
    int64_t parts = causal ? S(parts)(threads, b * g, n) : 1;
    if (parts > 1) {
        S(inputs) a = {q, k, v, keep, sums0, out, den, grad, grad_sums, b, h, g, n, d, e, (int)hard, (REAL)scale, (REAL)eps, threads};
        return S(split_backward)(&a, dq, dk, dv, dkeep, dsums0, parts);
    }
    int failed = 0;
#pragma omp parallel num_threads((int)max64(1, min64(threads, b * g))) if (threads > 1 && b * g > 1)
    {
        S(work) w;
        int bad = S(work_new)(&w, d, e, BACKWARD, max64(n, m));
        if (bad) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < b * g; i++) {
            int64_t x = i * queries * n;
            S(backward) a = {q + x * d, k + i * m * d, v + i * m * e, keep ? keep + i / g * m : NULL,
                             sums0 ? sums0 + i * entries : NULL, out + x * e, den + x, grad + x * e,
                             grad_sums ? grad_sums + i * entries : NULL, dq + x * d, dk + i * m * d, dv + i * m * e,
                             dkeep ? dkeep + i * m : NULL, dsums0 ? dsums0 + i * entries : NULL, queries, n, m, e, near, (int)hard,
                             (int)causal, (REAL)scale, (REAL)eps};
            if (!bad) S(group_backward)(&w, &a);
        }
        if (!bad) free(w.memory);
    }
    return failed;
}
