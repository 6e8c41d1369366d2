/* The fixed point of coordinate descent on a tile of rows in lanes; included once per precision after coor_tile.h.
 *
 *     y_j = min(1, exp((s_j - m) / eps)),   sum_j y_j = k        m = eps (log sum_{s_j <= cut} exp(s_j / eps) - log(k - capped))
 *
 * Entries above `cut` are capped at 1. Starting with none, those that exceed the threshold m join them: their number only
 * grows and stays below k, so this ends, after few rounds. A row of at most k entries is capped as a whole: cut = -infinity. */

/* m for the entries up to `cut`, of which `capped` lie above and `top` is the largest below. */
static inline VF S(threshold)(const VF *s, int64_t n, VF cut, VF capped, VF top, VF k, REAL eps) {
    VF sum = {0}, zero = {0};
    REAL inverse = 1 / eps;
    for (int64_t j = 0; j < n; j++) sum += S(keep)(s[j] <= cut, S(exponential)(S(least)(zero, s[j] - top) * inverse));
    VF rest = k - capped;
    /* Rows without an active entry have nothing to take a logarithm of, and no use for the result. */
    return top + eps * (S(logarithm)(S(pick)(sum > 0, sum, zero + 1)) - S(logarithm)(S(pick)(rest > 0, rest, zero + 1)));
}

/* Number of entries above `cut`, and the largest at or below it (0 if there is none). */
static inline VF S(above)(const VF *s, int64_t n, VF cut, VF *top) {
    VF low = S(splat)(-INFINITY), best = low, count = {0}, one = S(splat)(1);
    for (int64_t j = 0; j < n; j++) {
        VI in = s[j] <= cut;
        count += S(keep)(~in, one);
        best = S(most)(S(pick)(in, s[j], low), best);
    }
    *top = S(pick)(best > low, best, (VF){0});
    return count;
}

/* y, and per row cut and m, from s. */
static void S(exact)(const VF *s, VF *restrict y, int64_t n, VF k, REAL eps, VF *cut_out, VF *m_out) {
    S(rows) r = S(look)(s, n);
    VF zero = {0}, one = S(splat)(1), count = r.count - r.none, top = r.top, capped = {0};
    VI saturated = count <= k;
    VF cut = S(pick)(saturated, S(splat)(-INFINITY), S(splat)(INFINITY));
    VF m = S(threshold)(s, n, cut, capped, top, k, eps);
    VI moving = count > k;
    while (S(any)(moving)) {
        VF now = S(above)(s, n, m, &top);
        /* Rounding may bring the number to k, or back: the row has converged then. */
        moving = moving & (now > capped) & (now < k);
        cut = S(pick)(moving, m, cut), capped = S(pick)(moving, now, capped);
        if (S(any)(moving)) m = S(pick)(moving, S(threshold)(s, n, cut, capped, top, k, eps), m);
    }
    *cut_out = cut, *m_out = m * r.clean;
    REAL inverse = 1 / eps;
    for (int64_t j = 0; j < n; j++) {
        VF e = S(exponential)(S(least)(zero, s[j] - m) * inverse);
        y[j] = S(pick)((s[j] > cut) & (s[j] > S(splat)(-INFINITY)), one, e) * r.clean;
    }
}

/* The gradient of `exact`: on entry ds holds the cotangent g of y, on return, with a the entries up to `cut`,
 *
 *     ds = y_a / eps (g_a - dk)        dk = sum y_a g_a / sum y_a
 *
 * If y is not NULL it receives y. Returns dk. */
static VF S(exact_back)(const VF *s, VF *restrict ds, VF *restrict E, VF *restrict y, int64_t n, REAL eps, VF cut, VF m) {
    VF zero = {0}, one = S(splat)(1), low = S(splat)(-INFINITY), weight = {0}, dot = {0};
    REAL inverse = 1 / eps;
    for (int64_t j = 0; j < n; j++) {
        VI in = s[j] <= cut;
        VF e = S(exponential)(S(least)(zero, s[j] - m) * inverse);
        if (y) y[j] = S(pick)(~in & (s[j] > low), one, e);
        e = S(keep)(in, e);
        E[j] = e, weight += e, dot += e * ds[j];
    }
    VF dk = S(pick)(weight > 0, dot / S(pick)(weight > 0, weight, one), zero) + (m - m);
    for (int64_t j = 0; j < n; j++) ds[j] = E[j] * (ds[j] - dk) * inverse;
    return dk;
}
