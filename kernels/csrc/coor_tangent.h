/* Tangents of coordinate descent on a tile of rows in lanes; included once per precision after coor_exact.h.
 *
 *     m_1' = -eps_1 (log k)'      m_t' = sum_j w_tj (s_j' if s_j <= m_{t-1} else m_{t-1}') - eps_t (log k)'
 *     y_j' = y_j (s_j' - m_T') / eps on s_j <= m_T                with the weights w_tj of `iterate_back` */

/* y' in place of s', from the thresholds that `iterate` left. P [n] and open [2 n] are scratch. */
static void S(iterate_tangent)(const VF *s, VF *restrict ds, VF *restrict P, VF *open, int64_t n, VF log_k, VF dlogk, const double *eps,
                               int64_t T, const VF *m) {
    VF zero = {0}, one = S(splat)(1), dm = dlogk * (REAL)-eps[0], last = m[T - 1];
    S(stage) of = {zero, S(exponential)(-log_k), (REAL)eps[T]};
    int64_t begin = max64(S(begun)(m, T), 1), first = max64(S(last_stage)(eps, T), begin), t = begin;
    for (; t < first; t++) {
        VF before = m[t - 1], offset = m[t] + (REAL)eps[t] * log_k, capped = zero, sum = zero, low = S(splat)((REAL)(EXP_LOW * eps[t]));
        REAL rate = (REAL)(LOG2_E / eps[t]);
        for (int64_t j = 0; j < n; j++) {
            VI in = s[j] <= before;
            VF w = S(power)(S(most)(S(least)(s[j], before) - offset, low), rate);
            sum += S(keep)(in, w * ds[j]), capped += S(keep)(~in, w);
        }
        dm = sum + capped * dm - (REAL)eps[t] * dlogk;
    }
    while (t < T) {
        if (t == first || !S(in_reach)(&of, m[t])) {
            of.c = S(near)(&of, m[t]);
            for (int64_t j = 0; j < n; j++) P[j] = S(decay)(s[j] - of.c, (REAL)LOG2_E / of.eps) * ds[j];
        }
        int64_t to = t;
        while (t >= first + WINDOW_AFTER && to + 1 < T && to - first < 4 * (t - first) && S(in_reach)(&of, m[to + 1])) to++;
        dm = S(window_tangent)(&of, dm, dlogk, s, P, open, n, m, t, to);
        t = to + 1;
    }
    VF clean = one + (last - last);
    for (int64_t j = 0; j < n; j++)
        ds[j] = S(keep)(s[j] <= last, S(decay)(s[j] - last, (REAL)(LOG2_E / eps[T])) * (ds[j] - dm) * (REAL)(1 / eps[T])) * clean;
}

/* y' in place of s', for the fixed point: with a the entries up to `cut`, m' = (sum y_a s_a' - eps k') / sum y_a. */
static void S(exact_tangent)(const VF *s, VF *restrict ds, VF *restrict E, int64_t n, VF dk, REAL eps, VF cut, VF m) {
    VF zero = {0}, one = S(splat)(1), weight = {0}, dot = {0};
    REAL inverse = 1 / eps;
    for (int64_t j = 0; j < n; j++) {
        VF e = S(keep)(s[j] <= cut, S(exponential)(S(least)(zero, s[j] - m) * inverse));
        E[j] = e, weight += e, dot += e * ds[j];
    }
    VF dm = (dot - eps * dk) / S(pick)(weight > 0, weight, one) + (m - m);
    for (int64_t j = 0; j < n; j++) ds[j] = E[j] * (ds[j] - dm) * inverse;
}

/* y from s, given the last threshold m and, for the fixed point, the cut above which all is 1. */
static void S(weights)(const VF *s, VF *restrict y, int64_t n, REAL eps, VF cut, VF m) {
    VF zero = {0}, one = S(splat)(1), low = S(splat)(-INFINITY);
    REAL inverse = 1 / eps;
    for (int64_t j = 0; j < n; j++)
        y[j] = S(pick)((s[j] > cut) & (s[j] > low), one, S(exponential)(S(least)(zero, s[j] - m) * inverse));
}
