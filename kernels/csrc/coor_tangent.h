/* Tangents of coordinate descent on a tile of rows in lanes; included once per precision after coor_exact.h.
 *
 *     m_1' = -eps_1 (log k)'      m_t' = sum_j w_tj (s_j' if s_j <= m_{t-1} else m_{t-1}') - eps_t (log k)'
 *     y_j' = y_j (s_j' - m_T') / eps on s_j <= m_T                with the weights w_tj of `iterate_back` */

/* y' in place of s', from the thresholds that `iterate` left. P [n] is scratch. */
static void S(iterate_tangent)(const VF *s, VF *restrict ds, VF *restrict P, int64_t n, VF log_k, VF dlogk, const double *eps,
                               int64_t T, const VF *m) {
    VF zero = {0}, one = S(splat)(1), c = {0}, dm = dlogk * (REAL)-eps[0], last = m[T - 1];
    int fresh = 0; /* P holds exp((s - c) / eps) s' for this eps */
    for (int64_t t = 1; t < T; t++) {
        VF before = m[t - 1], now = m[t], capped = {0}, sum = {0};
        REAL inverse = (REAL)(1 / eps[t]);
        if (fresh || eps[t] == eps[t + 1]) {
            VF away = (now - c) * inverse;
            if (!fresh || S(any)((away > S(splat)(REACH)) | (away < S(splat)(-REACH)))) {
                c = now, away = zero;
                for (int64_t j = 0; j < n; j++) P[j] = S(exponential)((s[j] - c) * inverse) * ds[j];
            }
            for (int64_t j = 0; j < n; j++) {
                VI in = s[j] <= before;
                sum += S(keep)(in, P[j]), capped += S(keep)(~in, one);
            }
            sum *= S(exponential)(-away - log_k), capped *= S(exponential)((before - now) * inverse - log_k);
            fresh = eps[t] == eps[t + 1];
        } else {
            for (int64_t j = 0; j < n; j++) {
                VI in = s[j] <= before;
                VF w = S(exponential)((S(least)(s[j], before) - now) * inverse - log_k);
                sum += S(keep)(in, w * ds[j]), capped += S(keep)(~in, w);
            }
        }
        dm = sum + capped * dm - (REAL)eps[t] * dlogk;
    }
    REAL inverse = (REAL)(1 / eps[T]);
    VF clean = one + (last - last);
    for (int64_t j = 0; j < n; j++)
        ds[j] = S(keep)(s[j] <= last, S(exponential)((s[j] - last) * inverse) * (ds[j] - dm) * inverse) * clean;
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
