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

/* Bounds of a window for M, whose logarithm times eps moved from m[-2] over m[-1] to m[0]: as far as that leads if it slows down as
 * it does, and the same again. */
static inline void S(window_bounds)(VF M, const VF *m, REAL eps, VF *low, VF *high) {
    VF zero = {0}, one = S(splat)(1), step = m[0] - m[-1], before = m[-1] - m[-2];
    VF slack = (REAL)2e-4 * eps + (REAL)0.25 * S(most)(step, -step);
    VF ratio = S(least)(S(most)(step / S(pick)(before == 0, one, before), zero), S(splat)(0.9));
    VF reach = 2 * step * ratio / (1 - ratio);
    *low = M * S(decay)(S(least)(reach, zero) - slack, (REAL)LOG2_E / eps);
    *high = M * S(decay)(S(most)(reach, zero) + slack, (REAL)LOG2_E / eps);
}

/* A window for M. Inside an older window the entries between are all that is looked at. */
static inline __attribute__((always_inline)) void S(window_make)(S(window) *w, const VF *E, VF *open, int64_t n, VF M, const VF *m,
                                                                 REAL eps) {
    VF one = S(splat)(1), below = {0}, above = {0}, low, high;
    S(window_bounds)(M, m, eps, &low, &high);
    if (w->count >= 0) {
        E = open, n = w->count, below = w->below, above = w->above;
        low = S(most)(low, w->low), high = S(least)(high, w->high);
    }
    int64_t count = 0;
    for (int64_t j = 0; j < n; j++) {
        VF e = E[j];
        VI small = e < low, large = e >= high, between = ~(small | large);
        below += S(keep)(small, e), above += S(keep)(large, one);
        open[count] = S(keep)(between, e);
        count += S(any)(between);
    }
    w->low = low, w->high = high, w->below = below, w->above = above, w->count = count;
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

/* Iterations of one eps and what E_j = exp((s_j - c) / eps) refers to. */
typedef struct {
    VF c, inverse_k;
    REAL eps;
} S(stage);

/* exp((x - m) / eps) / k: for x = c what makes a weight of E, for x = m_{t-1} the weight of a capped entry. */
static inline VF S(weight)(const S(stage) *of, VF x, VF m) {
    return S(decay)(x - m, (REAL)LOG2_E / of->eps) * of->inverse_k;
}

/* Whether weights in terms of E stay in the range of numbers for the threshold m, where it is one. */
static inline int S(in_reach)(const S(stage) *of, VF m) {
    VF far = S(splat)((REAL)REACH * of->eps);
    return !S(any)(((m - of->c > far) & (m < S(splat)(INFINITY))) | (of->c - m > far));
}

/* m as a reference; where it is none, the one there was. */
static inline VF S(near)(const S(stage) *of, VF m) { return S(pick)(m == S(splat)(INFINITY), of->c, m); }

/* The first iteration that was run for any row: see `first_iteration`. */
static inline int64_t S(begun)(const VF *m, int64_t T) {
    int64_t begin = 0;
    while (begin < T - 1 && !S(any)(m[begin] != S(splat)(INFINITY))) begin++;
    return begin;
}

/* The first iteration of the eps at the end. */
static inline int64_t S(last_stage)(const double *eps, int64_t T) {
    int64_t first = T;
    while (first > 1 && eps[first - 1] == eps[T]) first--;
    return first;
}

/* For thresholds m[from - 1 .. to - 1]: entries up to the lowest, `low`, are below all of them, those above `high` above all. */
typedef struct {
    VF low, high, upper; /* upper: number of entries above low */
    int64_t count;       /* entries between */
} S(gap);

/* Entries between go to `open`, with NaN in the lanes of others, which is below no threshold; if of is not NULL, their values there go to `values`, and the
 * sum of those at or below low to *below. */
static S(gap) S(gap_of)(const VF *s, const VF *of, int64_t n, const VF *m, int64_t from, int64_t to, VF *open, VF *values, VF *below) {
    VF zero = {0}, one = S(splat)(1), never = S(splat)(NAN);
    S(gap) g = {m[from - 1], m[from - 1], zero, 0};
    for (int64_t t = from; t < to; t++) g.low = S(least)(m[t], g.low), g.high = S(most)(m[t], g.high);
    for (int64_t j = 0; j < n; j++) {
        VI up = ~(s[j] <= g.low), between = up & (s[j] <= g.high);
        g.upper += S(keep)(up, one);
        open[g.count] = S(pick)(between, s[j], never);
        if (of) values[g.count] = of[j], *below += S(keep)(~up, of[j]);
        g.count += S(any)(between);
    }
    return g;
}

/* Iterations from .. t of the gradient at once: mu goes back across them, and ds gets the sums of the coefficients that entries take. */
static VF S(window_back)(const S(stage) *of, VF mu, const VF *s, VF *ds, VF *open, int64_t n, const VF *m, int64_t from, int64_t t,
                          VF *sum_mu) {
    VF zero = {0}, one = S(splat)(1), total = zero, *sums = open + n;
    S(gap) g = S(gap_of)(s, NULL, n, m, from, t, open, NULL, NULL);
    memset(sums, 0, (size_t)(g.count + 1) * sizeof(VF));
    for (; t >= from; t--) {
        VF before = m[t - 1], coefficient = mu * S(weight)(of, of->c, m[t]), taken = zero;
        for (int64_t i = 0; i < g.count; i++) {
            VI in = open[i] <= before;
            sums[i] += S(keep)(in, coefficient), taken += S(keep)(in, one);
        }
        total += coefficient, *sum_mu += mu;
        mu *= (g.upper - taken) * S(weight)(of, before, m[t]);
    }
    int64_t i = 0;
    for (int64_t j = 0; j < n; j++) {
        VI in = s[j] <= g.low, between = ~in & (s[j] <= g.high);
        ds[j] += S(pick)(in, total, S(keep)(between, sums[i]));
        i += S(any)(between);
    }
    return mu;
}

/* Iterations t .. to of the tangent at once, with P = E s'. Returns the tangent of m[to]. */
static VF S(window_tangent)(const S(stage) *of, VF dm, VF dlogk, const VF *s, const VF *P, VF *open, int64_t n, const VF *m, int64_t t,
                             int64_t to) {
    VF below = {0}, one = S(splat)(1), *values = open + n;
    S(gap) g = S(gap_of)(s, P, n, m, t, to, open, values, &below);
    for (; t <= to; t++) {
        VF before = m[t - 1], sum = below, taken = {0};
        for (int64_t i = 0; i < g.count; i++) {
            VI in = open[i] <= before;
            sum += S(keep)(in, values[i]), taken += S(keep)(in, one);
        }
        dm = sum * S(weight)(of, of->c, m[t]) + (g.upper - taken) * S(weight)(of, before, m[t]) * dm - of->eps * dlogk;
    }
    return dm;
}
