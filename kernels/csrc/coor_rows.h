/* Coordinate descent on LANES rows as they lie in memory; included once per precision by coor_descent.c after coor_tile.h.
 *
 * The same mathematics as `iterate` and `iterate_back`, without transposing: a vector holds LANES entries of one row, and numbers
 * of rows stay vectors with rows in lanes. What lies between thresholds is a list of each row's own, and lists do lie with
 * rows in lanes, so that late iterations cost few instructions. Pays for rows of several vectors: each sum of a row ends in
 * a sum across lanes.
 *
 * A row is `width` whole vectors. Rows that are not there (in the last block) act as rows without entries. */

#define SOME_ROWS 4 /* rows that stay in the first cache for several iterations */

#include "coor_lanes.h"
#include "coor_hot.h"

/* LANES rows of `step` numbers, of which `count` are there. */
typedef struct {
    const REAL *first;
    int64_t step, count, width;
} S(some);

/* Asks for the same place of the rows after these, while there is work in registers; once for two vectors that share a line. */
#define SOON(s, row, i) \
    do if (VECTOR_BYTES == 64 || (i) % 2 == 0) __builtin_prefetch((row) + (s)->count * (s)->step / LANES + (i), 0, 2); while (0)

/* Where results go. Results too many for caches bypass them if they can: what is written as a whole need not be read before. */
typedef struct {
    REAL *first;
    int64_t step;
    int bypass;
} S(results);

static inline void S(put)(VF *to, VF x, int bypass) {
#if defined(__AVX512F__)
    if (bypass) X86(_mm512_stream)((REAL *)to, (XF)x);
    else *to = x;
#elif defined(__AVX__)
    if (bypass) X86(_mm256_stream)((REAL *)to, (XF)x);
    else *to = x;
#elif defined(__SSE2__)
    if (bypass) _mm_stream_si128((__m128i *)to, (__m128i)x);
    else *to = x;
#else
    (void)bypass, *to = x;
#endif
}

/* After the last of a block: other threads see what bypassed caches. */
static inline void S(settle)(const S(results) *of) {
#if defined(__SSE2__)
    if (of->bypass) _mm_sfence();
#else
    (void)of;
#endif
}

static inline const VF *S(row_of)(const S(some) *of, int64_t r) { return (const VF *)(of->first + r * of->step); }

static S(rows) S(look_rows)(const S(some) *s) {
    VF low = S(splat)(-INFINITY), one = S(splat)(1), top = low, bottom = {0}, count = {0}, sum = {0}, clean = one;
    for (int64_t r = 0; r < s->count; r++) {
        const VF *row = S(row_of)(s, r);
        VF t = low, u = S(splat)(INFINITY), c = {0}, a = {0};
        for (int64_t i = 0; i < s->width; i++) t = S(most)(row[i], t), u = S(least)(row[i], u), a += row[i];
        top[r] = S(largest)(t), bottom[r] = -S(largest)(-u), sum[r] = S(total)(a), count[r] = (REAL)(s->width * LANES);
        if (isfinite(sum[r])) continue; /* then all entries are numbers and there */
        VI nan = {0};
        a = c;
        for (int64_t i = 0; i < s->width; i++) {
            VF x = row[i];
            VI there = x != low;
            c += S(keep)(there, one), a += S(keep)(there, x);
            nan |= x != x;
        }
        count[r] = S(total)(c), sum[r] = S(total)(a);
        if (S(any)(nan)) clean[r] = NAN;
    }
    VI none = count == 0;
    count = S(pick)(none, one, count);
    S(rows) found = {S(pick)(none, (VF){0}, top), bottom, count, sum / count, S(keep)(none, one), clean};
    return found;
}

/* E_j = exp((s_j - at) / eps) of a row, and sum_j min(E_j, cap); `clamp` if some exponent leaves the range of `power`. */
static inline __attribute__((always_inline)) REAL S(powers)(const S(some) *s, const VF *row, VF *E, VF cap, VF at, REAL rate,
                                                            const int clamp) {
    VF a = {0}, b = {0};
    int64_t i = 0;
    for (; i + 2 <= s->width; i += 2) {
        SOON(s, row, i);
        SOON(s, row, i + 1);
        VF x = row[i] - at, z = row[i + 1] - at;
        E[i] = x = clamp ? S(decay)(x, rate) : S(power)(x, rate), E[i + 1] = z = clamp ? S(decay)(z, rate) : S(power)(z, rate);
        a += S(least)(x, cap), b += S(least)(z, cap);
    }
    if (i < s->width) E[i] = S(decay)(row[i] - at, rate), a += S(least)(E[i], cap);
    return S(total)(a + b);
}

/* Some iterations M <- (sum_j min(E_j, M) + none) / k of the rows `of`, a few rows at a time: M [steps] with rows in lanes, from cap
 * on. If s is not NULL, E is taken from it first. */
static void S(sweep)(const S(some) *s, const S(rows) *of, VF *E, int64_t count, int64_t width, VF c, REAL rate, VF cap, VF inverse_k,
                     VF *M, int64_t steps) {
    const REAL *start = (const REAL *)&cap, *ones = (const REAL *)&of->none, *factor = (const REAL *)&inverse_k;
    const REAL low = (REAL)(EXP_LOW * LOG2_E) / rate, high = (REAL)(EXP_HIGH * LOG2_E) / rate;
    for (int64_t i = 0; i < steps; i++) M[i] = of->none * inverse_k;
    for (int64_t first = 0; first < count; first += SOME_ROWS) {
        int64_t end = min64(count, first + SOME_ROWS), from = 0;
        if (s)
            for (int64_t r = first; r < end; r++) {
                const VF *row = S(row_of)(s, r), at = S(splat)(c[r]), most = S(splat)(start[r]);
                VF *e = E + r * width;
                const int inside = of->bottom[r] - c[r] > low && of->top[r] - c[r] < high;
                const REAL sum = inside ? S(powers)(s, row, e, most, at, rate, 0) : S(powers)(s, row, e, most, at, rate, 1);
                ((REAL *)M)[r] = (sum + ones[r]) * factor[r];
                from = 1;
            }
        for (int64_t k = from; k < steps; k++) {
            const REAL *before = k ? (const REAL *)(M + k - 1) : start;
            for (int64_t r = first; r < end; r++)
                ((REAL *)(M + k))[r] = (S(total)(S(capped_sum)(E + r * width, width, S(splat)(before[r]))) + ones[r]) * factor[r];
        }
    }
}

/* A first window, from rows as they lie: `open` gets each row's own entries between low and high, rows in lanes. */
static void S(window_rows)(S(window) *w, const VF *E, int64_t count, int64_t width, VF *open, INT *list, VF M, const VF *m, REAL eps) {
    S(window_bounds)(M, m, eps, &w->low, &w->high);
    w->below = w->above = (VF){0}, w->count = 0;
    for (int64_t r = 0; r < count; r++) {
        const REAL *e = (const REAL *)(E + r * width);
        REAL above, below;
        int64_t found = S(between)(E + r * width, width, w->low[r], w->high[r], list, &above, &below);
        for (; w->count < found; w->count++) open[w->count] = (VF){0};
        for (int64_t i = 0; i < found; i++) ((REAL *)(open + i))[r] = e[list[i]];
        w->above[r] = above, w->below[r] = below;
    }
}

/* y from s, as `iterate` has it. E [n], open [n] and list [n + LANES] are scratch. */
static void S(iterate_rows)(const S(some) *s, const S(results) *y, VF *E, VF *open, INT *list, VF log_k, const double *eps,
                            int64_t T, VF *m_out) {
    int64_t width = s->width, count = s->count, raw = 1; /* from m_out[raw] on there is M while `fresh` */
    S(rows) r = S(look_rows)(s);
    VI own;
    const int64_t begin = S(first_iteration)(&r, log_k, eps, T, &own);
    VF m = (REAL)eps[0] * (S(logarithm)(r.count) - log_k), c = {0}, M = {0}, inverse_k = S(exponential)(-log_k), zero = {0};
    const VF high = S(splat)(WIDE ? 1e150 : 1e18), low = S(splat)(WIDE ? 1e-150 : 1e-18), one = S(splat)(1);
    S(window) w = {.next = WINDOW_AFTER, .wait = WINDOW_AFTER, .count = -1};
    int fresh = 0;
    m_out[0] = m;
    for (int64_t t = 0; t < begin; t++) m_out[t] = m = S(splat)(INFINITY);
    for (int64_t t = max64(begin, 1); t < T;) {
        REAL rate = (REAL)(LOG2_E / eps[t]), now = (REAL)eps[t];
        int still = eps[t] == eps[t + 1], anew = still && !fresh;
        if (!anew && !fresh) {
            VF a = r.none;
            const REAL least = (REAL)(EXP_LOW * eps[t]); /* nobody notices e^EXP_LOW in the sum */
            c = S(least)(r.top, m);
            for (int64_t l = 0; l < count; l++) {
                if (t < own[l]) continue;
                const VF *row = S(row_of)(s, l), cap = S(splat)(m[l]), floor = S(splat)(c[l] + least);
                const REAL fine = STEPS * rate, shift = (REAL)nearbyint(c[l] * (double)fine);
                if (!(fabs((double)shift) < SHIFT_MOST)) {
                    a[l] += S(far_sum)(row, width, cap, S(splat)(c[l]), rate);
                    continue;
                }
                a[l] += r.bottom[l] > floor[0] ? S(hot_sum)(row, width, cap, floor, shift, fine, 0)
                                               : S(hot_sum)(row, width, cap, floor, shift, fine, 1);
                c[l] = (REAL)(shift / (double)fine); /* which `shift` is exactly */
            }
            m = c + now * (S(logarithm)(a) - log_k);
            m_out[t] = m = S(pick)(own > (INT)t, S(splat)(INFINITY), m), t++;
            continue;
        }
        int64_t steps = 1;
        if (anew) {
            c = S(least)(r.top, m), M = S(decay)(m - c, rate), raw = t, fresh = 1;
            w.count = -1, w.next = max64(w.next, t + 2);
        }
        if (w.count >= 0 && S(any)((M < w.low) | (M > w.high))) w.count = -1, w.wait *= 2, w.next = t + w.wait / 4;
        if (t >= w.next && T - t >= WINDOW_AFTER) {
            for (; raw < t; raw++) m_out[raw] = c + now * S(logarithm)(m_out[raw]);
            if (w.count < 0) S(window_rows)(&w, E, count, width, open, list, M, m_out + t - 1, now);
            else S(window_make)(&w, E, open, 0, M, m_out + t - 1, now);
            if (2 * w.count > width * LANES) w.wait *= 2;
            w.next = 16 * w.count < width * LANES ? T : t + w.wait;
        }
        if (w.count >= 0) {
            M = (w.below + w.above * M + S(capped_sum)(open, w.count, M) + r.none) * inverse_k;
            m_out[t] = M;
        } else {
            int64_t end = t + 1;
            while (end < T && eps[end] == eps[t] && (end < w.next || T - end < WINDOW_AFTER)) end++;
            steps = end - t;
            S(sweep)(anew ? s : NULL, &r, E, count, width, c, rate, M, inverse_k, m_out + t, steps);
        }
        for (int64_t i = 0; i < steps && fresh; i++, t++) {
            M = m_out[t];
            fresh = eps[t] == eps[t + 1] && !S(any)((M > high) | (M < low));
        }
        if (!fresh || t == T) {
            for (; raw < t; raw++) m_out[raw] = c + now * S(logarithm)(m_out[raw]);
            m = m_out[t - 1];
        }
    }
    if (T > 1 && fresh) m = m_out[T - 1];
    m_out[T - 1] = m * r.clean;
    VF inverse = r.clean / M;
    REAL rate = (REAL)(LOG2_E / eps[T]);
    for (int64_t l = 0; l < count; l++) {
        const VF *row = fresh ? E + l * width : S(row_of)(s, l), at = S(splat)(fresh ? inverse[l] : m[l]), clean = S(splat)(r.clean[l]);
        VF *out = (VF *)(y->first + l * y->step);
        if (fresh)
            for (int64_t i = 0; i < width; i++) S(put)(out + i, S(least)(one, row[i] * at), y->bypass);
        else
            for (int64_t i = 0; i < width; i++) S(put)(out + i, S(decay)(S(least)(zero, row[i] - at), rate) * clean, y->bypass);
    }
}
