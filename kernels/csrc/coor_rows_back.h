/* Gradients of coordinate descent on LANES rows as they lie in memory; included once per precision after coor_rows.h.
 *
 * While eps stands still, entries below a threshold take the same coefficient mu w / E, and from one iteration to the one before
 * it changes by a number of entries alone:
 *
 *     coef_{T-1} = mu_{T-1} / k       coef_{t-1} = coef_t (number of s_j > m_{t-1}) / k       mu_t = coef_t k exp((m_t - c) / eps)
 *
 * with c = m_T, to which E refers. So iterations are first counted, then what entries take is added up in one pass. */

#define MOST_PAIRS 40

/* What entries up to `cap` take, by row. */
typedef struct {
    VF cap[MOST_PAIRS], take[MOST_PAIRS];
    int64_t count;
} S(pairs);

/* Scratch: D [LANES width], open, sums, where [n + 4], list [n + LANES], above and coef [T]. */
typedef struct {
    VF *E, *D, *open, *sums, *above, *coef;
    VI *where;
    INT *list;
} S(work);

/* Iterations from .. t, of which the last has coefficient `coef`: returns that of the one before, and adds what entries between
 * their thresholds take to D. */
static VF S(window_rows_back)(const S(some) *s, const S(work) *of, S(pairs) *pairs, VF coef, VF inverse_k, const VF *m, int64_t from,
                              int64_t t) {
    VF low = m[from - 1], high = low, higher = {0}, total = {0}, minus = S(splat)(-1), never = S(splat)(NAN), *open = of->open;
    int64_t most = 0, found[LANES];
    for (int64_t i = from; i < t; i++) low = S(least)(m[i], low), high = S(most)(m[i], high);
    for (int64_t r = 0; r < s->count; r++) {
        const VF *row = S(row_of)(s, r);
        REAL above;
        found[r] = S(between)(row, s->width, low[r], high[r], of->list, &above, NULL);
        for (; most < found[r]; most++) open[most] = never;
        for (int64_t i = 0; i < found[r]; i++) {
            ((REAL *)(open + i))[r] = ((const REAL *)row)[of->list[i]];
            ((INT *)(of->where + i))[r] = of->list[i];
        }
        higher[r] = above + (REAL)found[r];
    }
    for (int64_t i = most; i < most + 4; i++) open[i] = never;
    for (int64_t i = from; i <= t; i++) {
        VF count = higher, cap = m[i - 1];
        for (int64_t j = 0; j < most; j++) count = ADD_WHERE(count, UP_TO(open[j], cap), minus);
        of->above[i] = count;
    }
    for (int64_t i = t; i >= from; i--) of->coef[i] = coef, total += coef, coef *= of->above[i] * inverse_k;
    for (int64_t j = 0; j < most; j += 4) {
        VF a = {0}, b = {0}, c = {0}, d = {0};
        for (int64_t i = from; i <= t; i++) {
            VF cap = m[i - 1], take = of->coef[i];
            a = ADD_WHERE(a, UP_TO(open[j], cap), take), b = ADD_WHERE(b, UP_TO(open[j + 1], cap), take);
            c = ADD_WHERE(c, UP_TO(open[j + 2], cap), take), d = ADD_WHERE(d, UP_TO(open[j + 3], cap), take);
        }
        of->sums[j] = a, of->sums[j + 1] = b, of->sums[j + 2] = c, of->sums[j + 3] = d;
    }
    for (int64_t r = 0; r < s->count; r++) {
        REAL *d = (REAL *)(of->D + r * s->width);
        for (int64_t i = 0; i < found[r]; i++) d[((INT *)(of->where + i))[r]] += ((REAL *)(of->sums + i))[r];
    }
    pairs->cap[pairs->count] = low, pairs->take[pairs->count++] = total;
    return coef;
}

/* Whether thresholds m[first - 1 .. T - 2], several of them, are within a few eps, so that few entries will lie between. */
static int S(near_each_other)(const VF *m, int64_t first, int64_t T, REAL eps) {
    if (T - first < 2) return 0;
    VF low = m[first - 1], high = low;
    for (int64_t t = first; t < T - 1; t++) low = S(least)(m[t], low), high = S(most)(m[t], high);
    return !S(any)(~(high - low <= 4 * eps)); /* not so with NaN, or a threshold of infinity */
}

/* to = E (D + what the pairs give to entries of row r). */
static void S(take_pairs)(const VF *row, const VF *E, const VF *D, VF *to, int64_t width, const S(pairs) *pairs, int64_t r) {
    int64_t i = 0;
    for (; i + 4 <= width; i += 4) {
        VF a = D[i], b = D[i + 1], c = D[i + 2], d = D[i + 3];
        for (int64_t p = 0; p < pairs->count; p++) {
            VF cap = S(splat)(pairs->cap[p][r]), take = S(splat)(pairs->take[p][r]);
            a = ADD_WHERE(a, UP_TO(row[i], cap), take), b = ADD_WHERE(b, UP_TO(row[i + 1], cap), take);
            c = ADD_WHERE(c, UP_TO(row[i + 2], cap), take), d = ADD_WHERE(d, UP_TO(row[i + 3], cap), take);
        }
        to[i] = a * E[i], to[i + 1] = b * E[i + 1], to[i + 2] = c * E[i + 2], to[i + 3] = d * E[i + 3];
    }
    for (; i < width; i++) {
        VF a = D[i];
        for (int64_t p = 0; p < pairs->count; p++) a = ADD_WHERE(a, UP_TO(row[i], S(splat)(pairs->cap[p][r])), S(splat)(pairs->take[p][r]));
        to[i] = a * E[i];
    }
}

/* The gradient of s, for cotangents g of y, in ds, and that of log k; as `iterate_back` has them. Returns 0, and has done nothing, if
 * thresholds are too far apart for one E. */
static int S(iterate_rows_back)(const S(some) *s, const S(some) *g, const S(results) *ds, const S(work) *of, VF log_k,
                                const double *eps, int64_t T, const VF *m, VF *dlogk_out) {
    VF zero = {0}, one = S(splat)(1), none = S(splat)(-INFINITY), last = m[T - 1], mu = zero, dlogk = zero, clean = one + (last - last);
    VF bottom = zero;
    S(stage) at = {last, S(exponential)(-log_k), (REAL)eps[T]};
    int64_t begin = S(begun)(m, T), first = max64(S(last_stage)(eps, T), begin), width = s->width;
    REAL rate = (REAL)(LOG2_E / eps[T]), inverse = (REAL)(1 / eps[T]);
    for (int64_t t = first; t < T; t++)
        if (!S(in_reach)(&at, m[t])) return 0;
    const int64_t alone = S(near_each_other)(m, first, T, at.eps) ? first : min64(T, first + WINDOW_AFTER + 1);
    for (int64_t t = first; t < alone; t++) of->above[t] = zero;
    for (int64_t r = 0; r < s->count; r++) {
        const VF *row = S(row_of)(s, r), *grad = S(row_of)(g, r);
        VF *E = of->E + r * width, *D = of->D + r * width, edge = S(splat)(last[r]), sum = zero, lowest = S(splat)(INFINITY);
#pragma GCC unroll 2
        for (int64_t i = 0; i < width; i++) {
            SOON(s, row, i);
            SOON(g, grad, i);
            VF e = S(decay)(row[i] - edge, rate), d = S(keep)(row[i] <= edge, grad[i] * inverse);
            sum += e * d, lowest = S(least)(row[i], lowest);
            E[i] = e, D[i] = first < T ? d : e * d;
        }
        mu[r] = -S(total)(sum), bottom[r] = -S(largest)(-lowest);
        for (int64_t t = first; t < alone; t++) ((REAL *)(of->above + t))[r] = S(count_above)(row, width, S(splat)(m[t - 1][r]));
    }
    S(pairs) pairs = {.count = 0};
    if (first < T) {
        VF coef = mu * at.inverse_k, k = S(exponential)(log_k), sum_mu = zero;
        for (int64_t t = T - 1; t >= first;) {
            int64_t from = t;
            while (from > (alone == first ? first : max64(first + WINDOW_AFTER, first + (t - first) / 4))) from--;
            if (from < t) coef = S(window_rows_back)(s, of, &pairs, coef, at.inverse_k, m, from, t);
            else {
                pairs.cap[pairs.count] = m[t - 1], pairs.take[pairs.count++] = of->coef[t] = coef;
                coef *= of->above[t] * at.inverse_k;
            }
            t = from - 1;
        }
        for (int64_t t = first; t < T; t++) sum_mu += of->coef[t] * S(decay)(m[t] - last, rate);
        dlogk = sum_mu * -at.eps * k;
        mu = of->coef[first] * S(decay)(m[first] - last, rate) * k; /* not from `coef`, which may be beyond range here */
        mu *= of->above[first] * S(weight)(&at, m[first - 1], m[first]);
    }
    for (int64_t r = 0; r < s->count; r++) {
        const VF *row = S(row_of)(s, r);
        VF *D = of->D + r * width, *out = (VF *)(ds->first + r * ds->step);
        if (first < T) S(take_pairs)(row, of->E + r * width, D, D, width, &pairs, r);
        for (int64_t t = first - 1; t > 0 && mu[r] != 0; t--) { /* a threshold that caps no entry ends it: see `first_iteration` */
            const S(hot) hot = {S(splat)(m[t - 1][r]), S(splat)(m[t][r] + (REAL)eps[t] * log_k[r]), (REAL)eps[t]};
            const REAL above = bottom[r] - hot.offset[0] > (REAL)EXP_LOW * hot.eps ? S(hot_back)(row, D, width, &hot, mu[r], 0)
                                                                                   : S(hot_back)(row, D, width, &hot, mu[r], 1);
            dlogk[r] -= mu[r] * (REAL)eps[t], mu[r] *= above;
        }
        VF sound = S(splat)(clean[r]);
        for (int64_t i = 0; i < width; i++) S(put)(out + i, S(keep)(row[i] != none, D[i]) * sound, ds->bypass);
    }
    *dlogk_out = (dlogk - mu * (REAL)eps[0]) * clean;
    return 1;
}
