/* H_t = alpha_t H_{t-1} + k_t v_t, out_t = q_t Re H_t, one complex number per channel. Included once per precision.
 *
 * q, k, v: rows of c channels; a: rows of c pairs; any batch and row stride. Results contiguous: out [b, n, c], states and
 * products of gates [b, c, 2]. marks [b, MARKS(n), 2, c]: real and imaginary parts before every EVERY-th step. */

typedef struct {
    VF hr[VECTORS], hi[VECTORS], pr[VECTORS], pi[VECTORS];
} S(narrow_state);

/* Raw gates; behind the end of a row ones, which no branch need look at. */
INLINE S(pair) S(load_gates)(const NUM *a, int64_t count) {
    if (count == LANES) return S(read_pairs)(a, LANES);
    NUM padded[2 * LANES];
    for (int i = 0; i < 2 * LANES; i++) padded[i] = i < 2 * count ? a[i] : ONE;
    return S(read_pairs)(padded, LANES);
}

/* The gates of `vectors` vectors side by side, each of `count` channels. */
INLINE void S(side_gates)(const NUM *a, S(gate) *gates, const int careful, VI *odd, int64_t count, const int vectors) {
    S(pair) raw[ABREAST];
#pragma GCC unroll 4
    for (int u = 0; u < vectors; u++) raw[u] = S(load_gates)(a + u * 2 * LANES, count);
    S(make_gates)(raw, gates, careful, odd, vectors);
}

/* Asks for some numbers that will be read, or written, soon. */
INLINE void S(soon)(const NUM *p, int64_t numbers) {
    for (int64_t i = 0; i < numbers; i += 64 / (int64_t)sizeof(NUM)) __builtin_prefetch(p + i);
}

INLINE void S(soon_written)(const NUM *p, int64_t numbers) {
    for (int64_t i = 0; i < numbers; i += 64 / (int64_t)sizeof(NUM)) __builtin_prefetch(p + i, 1);
}

INLINE void S(narrow_step)(const NUM *q, const NUM *k, const NUM *v, const NUM *a, NUM *out, const S(narrow_state) *from,
                           S(narrow_state) *to, int64_t i, const int careful, VI *odd, int64_t count, const int vectors) {
    S(gate) gates[ABREAST];
    S(side_gates)(a, gates, careful, odd, count, vectors);
#pragma GCC unroll 4
    for (int u = 0; u < vectors; u++, i++, q += LANES, k += LANES, v += LANES, out += LANES) {
        VF re = gates[u].size * gates[u].ux, im = gates[u].size * gates[u].uy;
        VF hr = from->hr[i], hi = from->hi[i], pr = from->pr[i], pi = from->pi[i];
        VF next = re * hr - im * hi + S(read)(k, count) * S(read)(v, count);
        to->hr[i] = next, to->hi[i] = re * hi + im * hr;
        to->pr[i] = re * pr - im * pi, to->pi[i] = re * pi + im * pr;
        S(write)(out, S(read)(q, count) * next, count);
    }
}

/* Ordinary rows take the fast gates, `abreast` vectors at a time. A row with a gate near zero or beyond reach is done again with care,
 * and so are the rows that follow it, without trying first. */
#define FAST_OR_CAREFUL(slow, call_fast, call_careful, abreast)                                    \
    do {                                                                                           \
        if (!slow) {                                                                               \
            VI odd = {0};                                                                          \
            int64_t j = 0;                                                                         \
            for (; j + (abreast) * LANES <= full; j += (abreast) * LANES) call_fast(LANES, abreast); \
            if ((abreast) > 1)                                                                     \
                for (; j < full; j += LANES) call_fast(LANES, 1);                                  \
            if (j < width) call_fast(width - j, 1);                                                \
            if (!S(any)(odd)) break;                                                               \
            slow = EVERY;                                                                          \
        }                                                                                          \
        VI odd = {0};                                                                              \
        STEP(full, width, call_careful);                                                           \
        slow--;                                                                                    \
    } while (0)

static void S(split_pairs)(const REAL *from, VF *re, VF *im, int64_t width) {
    REAL *r = (REAL *)re, *m = (REAL *)im;
    for (int64_t j = 0; j < width; j++) r[j] = from[2 * j], m[j] = from[2 * j + 1];
}

static void S(join_pairs)(REAL *to, const VF *re, const VF *im, int64_t width) {
    const REAL *r = (const REAL *)re, *m = (const REAL *)im;
    for (int64_t j = 0; j < width; j++) to[2 * j] = r[j], to[2 * j + 1] = m[j];
}

void S(gate_loop_narrow)(const NUM *q, const NUM *k, const NUM *v, const NUM *a, const REAL *h0, NUM *out, REAL *last,
                         REAL *product, REAL *marks, int64_t b, int64_t n, int64_t c, int64_t q_batch, int64_t q_row,
                         int64_t k_batch, int64_t k_row, int64_t v_batch, int64_t v_row, int64_t a_batch, int64_t a_row,
                         int64_t threads) {
    int64_t most = task_channels(b, c, threads, CHANNELS), blocks = (c + most - 1) / most, tasks = b * blocks;
#pragma omp parallel for num_threads((int)min64(threads, tasks)) schedule(dynamic) if (threads > 1 && tasks > 1)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t i = task / blocks, from = task % blocks * most, width = min64(most, c - from), full = width / LANES * LANES;
        unsigned mode = subnormals_off();
        S(narrow_state) st[2]; /* before and after a step, by turns */
        memset(st, 0, sizeof st);
        for (int64_t j = 0; j < VECTORS; j++) st[0].pr[j] = S(all)(1);
        if (h0) S(split_pairs)(h0 + 2 * (i * c + from), st[0].hr, st[0].hi, width);
        int64_t slow = 0;
        for (int64_t t = 0; t < n; t++) {
            S(narrow_state) *now = st + t % 2, *next = st + (t + 1) % 2;
            if (t % EVERY == 0) {
                REAL *mark = marks + (i * MARKS(n) + t / EVERY) * 2 * c + from;
                memcpy(mark, now->hr, (size_t)width * sizeof(REAL));
                memcpy(mark + c, now->hi, (size_t)width * sizeof(REAL));
            }
            const NUM *q_t = ROW(q, i, t) + from, *k_t = ROW(k, i, t) + from, *v_t = ROW(v, i, t) + from;
            const NUM *a_t = ROW(a, i, t) + 2 * from;
            NUM *out_t = out + (i * n + t) * c + from;
#define ALL(count, careful, vectors) \
    S(narrow_step)(q_t + j, k_t + j, v_t + j, a_t + 2 * j, out_t + j, now, next, j / LANES, careful, &odd, count, vectors)
#define FAST(count, vectors)                                                                                             \
    (S(soon)(q_t + AHEAD * q_row + j, (vectors) * LANES), S(soon)(k_t + AHEAD * k_row + j, (vectors) * LANES),           \
     S(soon)(v_t + AHEAD * v_row + j, (vectors) * LANES), S(soon)(a_t + AHEAD * a_row + 2 * j, (vectors) * 2 * LANES),   \
     S(soon_written)(out_t + AHEAD * c + j, (vectors) * LANES), ALL(count, 0, vectors))
#define CAREFUL(count) ALL(count, 1, 1)
            FAST_OR_CAREFUL(slow, FAST, CAREFUL, ABREAST);
#undef ALL
#undef FAST
#undef CAREFUL
        }
        S(join_pairs)(last + 2 * (i * c + from), st[n % 2].hr, st[n % 2].hi, width);
        S(join_pairs)(product + 2 * (i * c + from), st[n % 2].pr, st[n % 2].pi, width);
        subnormals_back(mode);
    }
}

/* What the way back needs of one step, one vector of channels. */
typedef struct {
    VF hr, hi, ux, uy, size, inverse;
} S(narrow_kept);

/* hr, hi: the states before the step. */
INLINE void S(narrow_again)(const NUM *k, const NUM *v, const NUM *a, const VF *hr, const VF *hi, int64_t apart, S(narrow_kept) *kept,
                            const int careful, VI *odd, int64_t count, const int vectors) {
    S(gate) gates[ABREAST];
    S(side_gates)(a, gates, careful, odd, count, vectors);
#pragma GCC unroll 4
    for (int u = 0; u < vectors; u++, hr += apart, hi += apart, k += LANES, v += LANES) {
        VF re = gates[u].size * gates[u].ux, im = gates[u].size * gates[u].uy;
        kept[u] = (S(narrow_kept)){re * *hr - im * *hi + S(read)(k, count) * S(read)(v, count), re * *hi + im * *hr, gates[u].ux,
                                   gates[u].uy, gates[u].size, gates[u].inverse};
    }
}

typedef struct {
    const NUM *q, *k, *v, *g;
    NUM *dq, *dk, *dv, *da;
} S(narrow_rows);

/* carry: gradient of the state that leaves the step. wr, wi: gradient of log(product), the same at every step. */
INLINE void S(narrow_back)(const S(narrow_rows) *r, int64_t j, const S(narrow_kept) *kept, VF before_re, VF before_im, VF *carry_re,
                           VF *carry_im, VF wr, VF wi, int64_t count) {
    VF g = r->g ? S(read)(r->g + j, count) : S(all)(0);
    VF dr = S(read)(r->q + j, count) * g + *carry_re, di = *carry_im;
    VF ux = kept->ux, uy = kept->uy, size = kept->size, inverse = kept->inverse;
    S(write)(r->dq + j, g * kept->hr, count);
    S(write)(r->dk + j, S(read)(r->v + j, count) * dr, count);
    S(write)(r->dv + j, S(read)(r->k + j, count) * dr, count);
    VF gre = dr * before_re + di * before_im, gim = di * before_re - dr * before_im;
    VF along = ((REAL)1 - size) * (size * (ux * gre + uy * gim) + wr);
    VF across = inverse * (size * (ux * gim - uy * gre) + wi);
    along = S(select)(inverse == (REAL)0, S(all)(0), along);
    S(write_pairs)(r->da + 2 * j, ux * along - uy * across, uy * along + ux * across, count);
    *carry_re = size * (ux * dr + uy * di);
    *carry_im = size * (ux * di - uy * dr);
}

/* g [b, n, c], g_last, g_product [b, c, 2] may be NULL: zeros. product is what the forward pass returned. */
void S(gate_loop_narrow_backward)(const NUM *q, const NUM *k, const NUM *v, const NUM *a, const REAL *marks,
                                  const REAL *product, const NUM *g, const REAL *g_last, const REAL *g_product, NUM *dq, NUM *dk,
                                  NUM *dv, NUM *da, REAL *dh0, int64_t b, int64_t n, int64_t c, int64_t q_batch, int64_t q_row,
                                  int64_t k_batch, int64_t k_row, int64_t v_batch, int64_t v_row, int64_t a_batch, int64_t a_row,
                                  int64_t g_batch, int64_t g_row, int64_t threads) {
    int64_t most = task_channels(b, c, threads, CHANNELS), blocks = (c + most - 1) / most, tasks = b * blocks;
    int64_t segments = (n + EVERY - 1) / EVERY;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        S(narrow_kept) *kept = scratch(sizeof(S(narrow_kept)) * VECTORS * EVERY);
        if (!kept) abort();
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t i = task / blocks, from = task % blocks * most, width = min64(most, c - from);
            int64_t full = width / LANES * LANES;
            unsigned mode = subnormals_off();
            VF carry_re[VECTORS] = {{0}}, carry_im[VECTORS] = {{0}};
            int64_t slow = 0;
            VF wr[VECTORS], wi[VECTORS], mark_re[VECTORS], mark_im[VECTORS];
            memset(wr, 0, sizeof wr), memset(wi, 0, sizeof wi);
            memset(mark_re, 0, sizeof mark_re), memset(mark_im, 0, sizeof mark_im);
            if (g_last) S(split_pairs)(g_last + 2 * (i * c + from), carry_re, carry_im, width);
            if (g_product)
                for (int64_t j = 0; j < width; j++) {
                    const REAL *g_j = g_product + 2 * (i * c + from + j), *p_j = product + 2 * (i * c + from + j);
                    ((REAL *)wr)[j] = g_j[0] * p_j[0] + g_j[1] * p_j[1];
                    ((REAL *)wi)[j] = g_j[1] * p_j[0] - g_j[0] * p_j[1];
                }
            for (int64_t segment = segments - 1; segment >= 0; segment--) {
                int64_t start = segment * EVERY, steps = min64(EVERY, n - start);
                const REAL *mark = marks + (i * MARKS(n) + segment) * 2 * c + from;
                memcpy(mark_re, mark, (size_t)width * sizeof(REAL));
                memcpy(mark_im, mark + c, (size_t)width * sizeof(REAL));
                for (int64_t s = 0; s < steps; s++) {
                    int64_t t = start + s;
                    const NUM *k_t = ROW(k, i, t) + from, *v_t = ROW(v, i, t) + from, *a_t = ROW(a, i, t) + 2 * from;
                    S(narrow_kept) *kept_t = kept + s * VECTORS, *kept_b = s ? kept_t - VECTORS : NULL;
#define BEFORE(part, mark) (kept_b ? &kept_b[j / LANES].part : &mark[j / LANES])
#define ALL(count, careful, vectors)                                                                                           \
    S(narrow_again)(k_t + j, v_t + j, a_t + 2 * j, BEFORE(hr, mark_re), BEFORE(hi, mark_im), apart, kept_t + j / LANES, careful, \
                    &odd, count, vectors)
#define FAST(count, vectors)                                                                                           \
    (S(soon)(k_t + AHEAD * k_row + j, (vectors) * LANES), S(soon)(v_t + AHEAD * v_row + j, (vectors) * LANES),         \
     S(soon)(a_t + AHEAD * a_row + 2 * j, (vectors) * 2 * LANES), ALL(count, 0, vectors))
#define CAREFUL(count) ALL(count, 1, 1)
                    int64_t apart = kept_b ? sizeof(S(narrow_kept)) / sizeof(VF) : 1; /* of neighbouring states */
                    FAST_OR_CAREFUL(slow, FAST, CAREFUL, ABREAST);
#undef ALL
#undef FAST
#undef CAREFUL
                }
                for (int64_t s = steps - 1; s >= 0; s--) {
                    int64_t t = start + s, at = (i * n + t) * c + from;
                    S(narrow_rows) r = {ROW(q, i, t) + from, ROW(k, i, t) + from, ROW(v, i, t) + from, g ? ROW(g, i, t) + from : NULL,
                                        dq + at, dk + at, dv + at, da + 2 * at};
                    const S(narrow_kept) *kept_t = kept + s * VECTORS, *kept_b = s ? kept_t - VECTORS : NULL;
#define CALL(count)                                                                                                        \
    (__builtin_prefetch(r.q - AHEAD * q_row + j), __builtin_prefetch(r.g ? r.g - AHEAD * g_row + j : r.q),                 \
     __builtin_prefetch(r.dq - AHEAD * c + j, 1), __builtin_prefetch(r.dk - AHEAD * c + j, 1),                             \
     __builtin_prefetch(r.dv - AHEAD * c + j, 1), __builtin_prefetch(r.da - AHEAD * 2 * c + 2 * j, 1),                     \
     __builtin_prefetch(r.da - AHEAD * 2 * c + 2 * j + LANES, 1),                                                          \
     S(narrow_back)(&r, j, kept_t + j / LANES, *BEFORE(hr, mark_re), *BEFORE(hi, mark_im), carry_re + j / LANES,           \
                    carry_im + j / LANES, wr[j / LANES], wi[j / LANES], count))
                    STEP(full, width, CALL);
#undef CALL
#undef BEFORE
                }
            }
            S(join_pairs)(dh0 + 2 * (i * c + from), carry_re, carry_im, width);
            subnormals_back(mode);
        }
        free(kept);
    }
}
