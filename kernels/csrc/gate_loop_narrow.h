/* H_t = alpha_t H_{t-1} + k_t v_t, out_t = q_t Re H_t, one complex number per channel. Included once per precision.
 *
 * q, k, v: rows of c channels; a: rows of c pairs; any batch and row stride. Results contiguous: out [b, n, c], states and
 * products of gates [b, c, 2]. marks [b, ceil(n / EVERY), 2, c]: real and imaginary parts before every EVERY-th step. */

typedef struct {
    VF hr[VECTORS], hi[VECTORS], pr[VECTORS], pi[VECTORS];
} S(narrow_state);

INLINE void S(narrow_step)(const REAL *q, const REAL *k, const REAL *v, const REAL *a, REAL *out, VF *hr, VF *hi, VF *pr, VF *pi,
                           int64_t count) {
    S(gate) gate = S(make_gate)(S(load_pairs)(a, count));
    VF re = gate.size * gate.ux, im = gate.size * gate.uy;
    VF next = re * *hr - im * *hi + S(load)(k, count) * S(load)(v, count);
    *hi = re * *hi + im * *hr;
    *hr = next;
    VF turned = re * *pr - im * *pi;
    *pi = re * *pi + im * *pr;
    *pr = turned;
    S(store)(out, S(load)(q, count) * next, count);
}

static void S(split_pairs)(const REAL *from, VF *re, VF *im, int64_t width) {
    REAL *r = (REAL *)re, *m = (REAL *)im;
    for (int64_t j = 0; j < width; j++) r[j] = from[2 * j], m[j] = from[2 * j + 1];
}

static void S(join_pairs)(REAL *to, const VF *re, const VF *im, int64_t width) {
    const REAL *r = (const REAL *)re, *m = (const REAL *)im;
    for (int64_t j = 0; j < width; j++) to[2 * j] = r[j], to[2 * j + 1] = m[j];
}

void S(gate_loop_narrow)(const REAL *q, const REAL *k, const REAL *v, const REAL *a, const REAL *h0, REAL *out, REAL *last,
                         REAL *product, REAL *marks, int64_t b, int64_t n, int64_t c, int64_t q_batch, int64_t q_row,
                         int64_t k_batch, int64_t k_row, int64_t v_batch, int64_t v_row, int64_t a_batch, int64_t a_row,
                         int64_t threads) {
    int64_t blocks = (c + CHANNELS - 1) / CHANNELS, tasks = b * blocks, segments = (n + EVERY - 1) / EVERY;
#pragma omp parallel for num_threads((int)min64(threads, tasks)) schedule(static) if (threads > 1 && tasks > 1)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t i = task / blocks, from = task % blocks * CHANNELS, width = min64(CHANNELS, c - from), full = width / LANES * LANES;
        S(narrow_state) st;
        memset(&st, 0, sizeof st);
        for (int64_t j = 0; j < VECTORS; j++) st.pr[j] = S(all)(1);
        if (h0) S(split_pairs)(h0 + 2 * (i * c + from), st.hr, st.hi, width);
        for (int64_t t = 0; t < n; t++) {
            if (t % EVERY == 0) {
                REAL *mark = marks + (i * segments + t / EVERY) * 2 * c + from;
                memcpy(mark, st.hr, (size_t)width * sizeof(REAL));
                memcpy(mark + c, st.hi, (size_t)width * sizeof(REAL));
            }
            const REAL *q_t = ROW(q, i, t) + from, *k_t = ROW(k, i, t) + from, *v_t = ROW(v, i, t) + from;
            const REAL *a_t = ROW(a, i, t) + 2 * from;
            REAL *out_t = out + (i * n + t) * c + from;
#define CALL(count)                                                                                                       \
    (__builtin_prefetch(q_t + AHEAD * q_row + j), __builtin_prefetch(k_t + AHEAD * k_row + j),                            \
     __builtin_prefetch(v_t + AHEAD * v_row + j), __builtin_prefetch(a_t + AHEAD * a_row + 2 * j),                        \
     __builtin_prefetch(a_t + AHEAD * a_row + 2 * j + LANES),                                                             \
     S(narrow_step)(q_t + j, k_t + j, v_t + j, a_t + 2 * j, out_t + j, st.hr + j / LANES, st.hi + j / LANES, st.pr + j / LANES, \
                    st.pi + j / LANES, count))
            STEP(full, width, CALL);
#undef CALL
        }
        S(join_pairs)(last + 2 * (i * c + from), st.hr, st.hi, width);
        S(join_pairs)(product + 2 * (i * c + from), st.pr, st.pi, width);
    }
}

/* What the way back needs of one step, one vector of channels. */
typedef struct {
    VF hr, hi, ux, uy, size, inverse;
} S(narrow_kept);

INLINE void S(narrow_again)(const REAL *k, const REAL *v, const REAL *a, VF *hr, VF *hi, S(narrow_kept) *kept, int64_t count) {
    S(gate) gate = S(make_gate)(S(load_pairs)(a, count));
    VF re = gate.size * gate.ux, im = gate.size * gate.uy;
    VF next = re * *hr - im * *hi + S(load)(k, count) * S(load)(v, count);
    *hi = re * *hi + im * *hr;
    *hr = next;
    *kept = (S(narrow_kept)){*hr, *hi, gate.ux, gate.uy, gate.size, gate.inverse};
}

typedef struct {
    const REAL *q, *k, *v, *g;
    REAL *dq, *dk, *dv, *da;
} S(narrow_rows);

/* carry: gradient of the state that leaves the step. wr, wi: gradient of log(product), the same at every step. */
INLINE void S(narrow_back)(const S(narrow_rows) *r, int64_t j, const S(narrow_kept) *kept, VF before_re, VF before_im, VF *carry_re,
                           VF *carry_im, VF wr, VF wi, int64_t count) {
    VF g = r->g ? S(load)(r->g + j, count) : S(all)(0);
    VF dr = S(load)(r->q + j, count) * g + *carry_re, di = *carry_im;
    VF ux = kept->ux, uy = kept->uy, size = kept->size, inverse = kept->inverse;
    S(store)(r->dq + j, g * kept->hr, count);
    S(store)(r->dk + j, S(load)(r->v + j, count) * dr, count);
    S(store)(r->dv + j, S(load)(r->k + j, count) * dr, count);
    VF gre = dr * before_re + di * before_im, gim = di * before_re - dr * before_im;
    VF along = ((REAL)1 - size) * (size * (ux * gre + uy * gim) + wr);
    VF across = inverse * (size * (ux * gim - uy * gre) + wi);
    along = S(select)(inverse == (REAL)0, S(all)(0), along);
    S(store_pairs)(r->da + 2 * j, ux * along - uy * across, uy * along + ux * across, count);
    *carry_re = size * (ux * dr + uy * di);
    *carry_im = size * (ux * di - uy * dr);
}

/* g [b, n, c], g_last, g_product [b, c, 2] may be NULL: zeros. product is what the forward pass returned. */
void S(gate_loop_narrow_backward)(const REAL *q, const REAL *k, const REAL *v, const REAL *a, const REAL *marks,
                                  const REAL *product, const REAL *g, const REAL *g_last, const REAL *g_product, REAL *dq, REAL *dk,
                                  REAL *dv, REAL *da, REAL *dh0, int64_t b, int64_t n, int64_t c, int64_t q_batch, int64_t q_row,
                                  int64_t k_batch, int64_t k_row, int64_t v_batch, int64_t v_row, int64_t a_batch, int64_t a_row,
                                  int64_t g_batch, int64_t g_row, int64_t threads) {
    int64_t blocks = (c + CHANNELS - 1) / CHANNELS, tasks = b * blocks, segments = (n + EVERY - 1) / EVERY;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        S(narrow_kept) *kept = scratch(sizeof(S(narrow_kept)) * VECTORS * EVERY);
        if (!kept) abort();
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t i = task / blocks, from = task % blocks * CHANNELS, width = min64(CHANNELS, c - from);
            int64_t full = width / LANES * LANES;
            S(narrow_state) st;        /* hr, hi: the state; pr, pi: the gradient carried back */
            VF wr[VECTORS], wi[VECTORS], mark_re[VECTORS], mark_im[VECTORS];
            memset(&st, 0, sizeof st), memset(wr, 0, sizeof wr), memset(wi, 0, sizeof wi);
            memset(mark_re, 0, sizeof mark_re), memset(mark_im, 0, sizeof mark_im);
            if (g_last) S(split_pairs)(g_last + 2 * (i * c + from), st.pr, st.pi, width);
            if (g_product)
                for (int64_t j = 0; j < width; j++) {
                    const REAL *g_j = g_product + 2 * (i * c + from + j), *p_j = product + 2 * (i * c + from + j);
                    ((REAL *)wr)[j] = g_j[0] * p_j[0] + g_j[1] * p_j[1];
                    ((REAL *)wi)[j] = g_j[1] * p_j[0] - g_j[0] * p_j[1];
                }
            for (int64_t segment = segments - 1; segment >= 0; segment--) {
                int64_t start = segment * EVERY, steps = min64(EVERY, n - start);
                const REAL *mark = marks + (i * segments + segment) * 2 * c + from;
                memcpy(mark_re, mark, (size_t)width * sizeof(REAL));
                memcpy(mark_im, mark + c, (size_t)width * sizeof(REAL));
                memcpy(st.hr, mark_re, sizeof mark_re);
                memcpy(st.hi, mark_im, sizeof mark_im);
                for (int64_t s = 0; s < steps; s++) {
                    int64_t t = start + s;
                    const REAL *k_t = ROW(k, i, t) + from, *v_t = ROW(v, i, t) + from, *a_t = ROW(a, i, t) + 2 * from;
                    S(narrow_kept) *kept_t = kept + s * VECTORS;
#define CALL(count)                                                                                                    \
    (__builtin_prefetch(k_t + AHEAD * k_row + j), __builtin_prefetch(v_t + AHEAD * v_row + j),                         \
     __builtin_prefetch(a_t + AHEAD * a_row + 2 * j), __builtin_prefetch(a_t + AHEAD * a_row + 2 * j + LANES),         \
     S(narrow_again)(k_t + j, v_t + j, a_t + 2 * j, st.hr + j / LANES, st.hi + j / LANES, kept_t + j / LANES, count))
                    STEP(full, width, CALL);
#undef CALL
                }
                for (int64_t s = steps - 1; s >= 0; s--) {
                    int64_t t = start + s, at = (i * n + t) * c + from;
                    S(narrow_rows) r = {ROW(q, i, t) + from, ROW(k, i, t) + from, ROW(v, i, t) + from, g ? ROW(g, i, t) + from : NULL,
                                        dq + at, dk + at, dv + at, da + 2 * at};
                    const S(narrow_kept) *kept_t = kept + s * VECTORS, *kept_b = kept_t - VECTORS;
#define CALL(count)                                                                                                        \
    (__builtin_prefetch(r.q - AHEAD * q_row + j), __builtin_prefetch(r.g ? r.g - AHEAD * g_row + j : r.q),                 \
     S(narrow_back)(&r, j, kept_t + j / LANES, s ? kept_b[j / LANES].hr : mark_re[j / LANES],                              \
                    s ? kept_b[j / LANES].hi : mark_im[j / LANES], st.pr + j / LANES, st.pi + j / LANES, wr[j / LANES],    \
                    wi[j / LANES], count))
                    STEP(full, width, CALL);
#undef CALL
                }
            }
            S(join_pairs)(dh0 + 2 * (i * c + from), st.pr, st.pi, width);
        }
        free(kept);
    }
}
