/* Sums sum_j min(E_j, M) for a threshold M that hardly moves any more; included once per precision by coor_tile.h.
 *
 * While M stays between low and high, an entry below low counts as itself and one from high on as M, whatever M is: only those
 * between need a look. A window keeps the sum of the former, the number of the latter, and the entries between. LANES rows share
 * the list, so it pays where few entries lie in the window of any row. Nothing is assumed about M: where it leaves the window in
 * some row, the sum runs over all entries, and another window follows. */

#ifndef WINDOW_AFTER
#define WINDOW_AFTER 6 /* iterations before the first window, in which M moves far; as many must be left for one to pay */
#endif

typedef struct {
    int64_t next;    /* the iteration at which a window may be made or made narrower */
    int64_t wait;    /* how many iterations later to try again: longer after each try that was of little use */
    int64_t count;   /* entries in `open`, the caller's memory; -1: there is no window */
    VF low, high;
    VF below, above; /* sum of the entries below low, number of those from high on */
} S(window);

/* For M, whose logarithm times eps moved from m[-2] over m[-1] to m[0]: as far as that leads if it slows down as it does, and the
 * same again. Inside an older window the entries between are all that is looked at. */
static void S(window_make)(S(window) *w, const VF *E, VF *open, int64_t n, VF M, const VF *m, REAL eps) {
    VF zero = {0}, one = S(splat)(1), step = m[0] - m[-1], before = m[-1] - m[-2];
    VF slack = (REAL)2e-4 * eps + (REAL)0.25 * S(most)(step, -step);
    VF ratio = S(least)(S(most)(step / S(pick)(before == 0, one, before), zero), S(splat)(0.9));
    VF reach = 2 * step * ratio / (1 - ratio);
    VF low = M * S(decay)(S(least)(reach, zero) - slack, (REAL)LOG2_E / eps);
    VF high = M * S(decay)(S(most)(reach, zero) + slack, (REAL)LOG2_E / eps);
    if (w->count < 0) {
        w->below = zero, w->above = zero;
    } else {
        E = open, n = w->count;
        low = S(most)(low, w->low), high = S(least)(high, w->high);
    }
    int64_t count = 0;
    for (int64_t j = 0; j < n; j++) {
        VF e = E[j];
        VI small = e < low, large = e >= high, between = ~(small | large);
        w->below += S(keep)(small, e), w->above += S(keep)(large, one);
        open[count] = S(keep)(between, e);
        count += S(any)(between);
    }
    w->low = low, w->high = high, w->count = count;
}

/* sum_j min(E_j, M) in iteration t of T. */
static inline VF S(window_sum)(S(window) *w, const VF *E, VF *open, int64_t n, VF M, const VF *m, REAL eps, int64_t t, int64_t T) {
    if (w->count >= 0 && S(any)((M < w->low) | (M > w->high))) w->count = -1, w->wait *= 2, w->next = t + w->wait / 4;
    if (t >= w->next && T - t >= WINDOW_AFTER) {
        S(window_make)(w, E, open, n, M, m, eps);
        if (2 * w->count > n) w->wait *= 2;
        w->next = 16 * w->count < n ? T : t + w->wait;
    }
    if (w->count < 0) return S(capped_sum)(E, n, M);
    return w->below + w->above * M + S(capped_sum)(open, w->count, M);
}

/* The way back through iterations of one eps: mu_t, the gradient of log k so far, and what E_j = exp((s_j - c) / eps) refers to. */
typedef struct {
    VF mu, dlogk, c, inverse_k;
    REAL eps;
} S(adjoint);

/* Iteration t: returns the coefficient that it gives to entries up to m[t - 1], and takes mu across; `above` entries lie above. */
static inline VF S(coefficient)(const S(adjoint) *a, const VF *m, int64_t t) {
    return a->mu * S(decay)(a->c - m[t], (REAL)LOG2_E / a->eps) * a->inverse_k;
}
static inline void S(across)(S(adjoint) *a, const VF *m, int64_t t, VF above) {
    a->dlogk -= a->mu * a->eps;
    a->mu *= above * S(decay)(m[t - 1] - m[t], (REAL)LOG2_E / a->eps) * a->inverse_k;
}

/* Whether the coefficient of iteration t stays in the range of numbers. */
static inline int S(in_reach)(const S(adjoint) *a, const VF *m, int64_t t) {
    VF far = S(splat)((REAL)REACH * a->eps);
    return !S(any)((m[t] - a->c > far) | (a->c - m[t] > far));
}

/* E for another reference, and the sums so far in its terms. An entry far above it takes no more coefficients (weights are at most
 * 1): its E only carries the sum so far. */
static void S(refer)(S(adjoint) *a, const VF *s, VF *ds, VF *E, int64_t n, VF c) {
    VF high = S(splat)((REAL)(REACH + 20) * a->eps);
    for (int64_t j = 0; j < n; j++) {
        VF e = S(decay)(S(least)(s[j] - c, high), (REAL)LOG2_E / a->eps);
        ds[j] = S(keep)(e > 0, E[j] * ds[j] / e);
        E[j] = e;
    }
    a->c = c;
}

/* Iterations from .. t at once. Their thresholds are known: entries up to the lowest take all coefficients, those above the highest
 * none, and only those between are compared with each. */
static void S(window_back)(S(adjoint) *a, const VF *s, VF *ds, VF *open, int64_t n, const VF *m, int64_t from, int64_t t) {
    VF zero = {0}, one = S(splat)(1), never = S(splat)(INFINITY), low = m[t - 1], high = low, upper = zero, total = zero;
    VF *sums = open + n;
    for (int64_t i = from; i < t; i++) low = S(least)(m[i - 1], low), high = S(most)(m[i - 1], high);
    int64_t count = 0;
    for (int64_t j = 0; j < n; j++) {
        VI up = ~(s[j] <= low), between = up & (s[j] <= high);
        upper += S(keep)(up, one);
        open[count] = S(pick)(between, s[j], never);
        count += S(any)(between);
    }
    memset(sums, 0, (size_t)(count + 1) * sizeof(VF));
    for (; t >= from; t--) {
        VF before = m[t - 1], coefficient = S(coefficient)(a, m, t), taken = zero;
        for (int64_t i = 0; i < count; i++) {
            VI in = open[i] <= before;
            sums[i] += S(keep)(in, coefficient), taken += S(keep)(in, one);
        }
        total += coefficient;
        S(across)(a, m, t, upper - taken);
    }
    count = 0;
    for (int64_t j = 0; j < n; j++) {
        VI in = s[j] <= low, between = ~in & (s[j] <= high);
        ds[j] += S(pick)(in, total, S(keep)(between, sums[count]));
        count += S(any)(between);
    }
}

/* Takes the adjoint back through iteration t, or through several; returns the one before. */
static int64_t S(still_back)(S(adjoint) *a, const VF *s, VF *ds, VF *E, VF *open, int64_t n, const VF *m, const double *eps, int64_t t) {
    if (!S(in_reach)(a, m, t)) S(refer)(a, s, ds, E, n, m[t]);
    int64_t first = t, from = t;
    while (first > 1 && eps[first - 1] == eps[t]) first--;
    while (from > first + WINDOW_AFTER && from > first + (t - first) / 4 && S(in_reach)(a, m, from - 1)) from--;
    if (from < t) {
        S(window_back)(a, s, ds, open, n, m, from, t);
        return from - 1;
    }
    VF before = m[t - 1], coefficient = S(coefficient)(a, m, t), one = S(splat)(1), above = {0}, other = {0};
    int64_t j = 0;
    for (; j + 2 <= n; j += 2) {
        VI in = s[j] <= before, also = s[j + 1] <= before;
        ds[j] += S(keep)(in, coefficient), ds[j + 1] += S(keep)(also, coefficient);
        above += S(keep)(~in, one), other += S(keep)(~also, one);
    }
    if (j < n) {
        VI in = s[j] <= before;
        ds[j] += S(keep)(in, coefficient), above += S(keep)(~in, one);
    }
    S(across)(a, m, t, above + other);
    return t - 1;
}
