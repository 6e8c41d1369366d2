/* Coordinate descent on a tile of rows in lanes; included once per precision by coor_descent.c and coor_attention.c.
 *
 * A tile is [n][LANES]: entry j of LANES different rows side by side, so that thresholds, logarithms and exponentials of
 * rows are vectors too. An entry of -infinity is not there. With m = -a, upstream's b = -relu(s + a) gives
 * s + b = min(s, m), and the iteration is a fixed point in one number per row:
 *
 *     m_1 = eps_1 (log n - log k)        m_t = eps_t (log sum_j exp(min(s_j, m_{t-1}) / eps_t) - log k)
 *     y_j = exp(min(s_j - m_T, 0) / eps_{T+1})
 *
 * While eps stands still, E_j = exp((s_j - c) / eps) is taken once and an iteration is M <- sum_j min(E_j, M) / k.
 *
 * A threshold above all entries caps none: what follows does not depend on it, neither m_t nor a derivative. So iterations of which
 * that is known beforehand are left out, and their thresholds are INFINITY: below a first threshold all for k <= 1, else the hot ones
 * of a schedule. No iteration is left out because thresholds have settled: what the last one gives is what is returned. */

#undef X86
#undef XF
#undef EXP_LOW
#undef EXP_HIGH
#undef REACH
#undef MAGIC
#undef LN2_HIGH
#undef LN2_LOW
#undef FRACTION
#undef LOG_TERMS
#undef ROOT_HALF
#undef LOG2_E
#define LOG2_E 1.44269504088896340736
#if WIDE
#define X86(name) PASTE(name, _, p, d)
#define XF PASTE(__m, VECTOR_BITS, d, )
#define EXP_LOW -708.0
#define EXP_HIGH 600.0
#define REACH 300.0 /* exponents beyond which a new reference point is taken */
#define MAGIC 6755399441055744.0
#define LN2_HIGH 0.693145751953125
#define LN2_LOW 1.42860682030941723212e-6
#define FRACTION 52
#define LOG_TERMS 12
#define ROOT_HALF 0x3fe6a09e667f3bcd /* the bits of sqrt(1/2) */
#else
#define X86(name) PASTE(name, _, p, s)
#define XF PASTE(__m, VECTOR_BITS, , )
#define EXP_LOW -87.0
#define EXP_HIGH 80.0
#define REACH 40.0
#define MAGIC 12582912.0
#define LN2_HIGH 0.693359375
#define LN2_LOW -2.12194440e-4
#define FRACTION 23
#define LOG_TERMS 5
#define ROOT_HALF 0x3f3504f3
#endif

static inline VF S(splat)(double x) { return (REAL)x - (VF){0}; } /* x + 0 would be an addition: -0 + 0 is not -0 */
static inline VF S(pick)(VI mask, VF yes, VF no) { return (VF)((mask & (VI)yes) | (~mask & (VI)no)); }
static inline VF S(keep)(VI mask, VF yes) { return (VF)(mask & (VI)yes); }
#include "extremes.h"
static inline int S(any)(VI mask) {
#if defined(__AVX512F__) && WIDE
    return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX__)
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    int found = 0;
    for (int l = 0; l < LANES; l++) found |= mask[l] != 0;
    return found;
#endif
}

/* 2^r for |r| <= 1/2. About 1 ulp. */
static inline VF S(fraction)(VF r) {
#if WIDE
    static const double terms[] = {1.3691488853904128e-12, 2.5678435993488206e-11, 4.4455382718708116e-10, 7.0549116208011233e-9,
                                   1.0178086009239699e-7, 1.3215486790144309e-6, 1.5252733804059841e-5, 1.5403530393381609e-4,
                                   1.3333558146428443e-3, 9.6181291076284771e-3, 5.5504108664821580e-2, 2.4022650695910072e-1,
                                   6.9314718055994531e-1, 1}; /* (log 2)^i / i! */
#else
    static const float terms[] = {1.5356861e-4f, 1.3398959e-3f, 9.618423e-3f, 5.5503324e-2f, 2.4022648e-1f, 6.931472e-1f, 1}; /* minimax */
#endif
    VF p = S(splat)(terms[0]);
#pragma GCC unroll 16
    for (int i = 1; i < (int)(sizeof terms / sizeof *terms); i++) p = p * r + terms[i];
    return p;
}

/* e^(x rate / LOG2_E) = 2^(x rate) for exponents from EXP_LOW to EXP_HIGH: rate = LOG2_E / eps saves the division. */
static inline VF S(power)(VF x, REAL rate) {
    VF t = x * rate + (REAL)MAGIC, whole = t - (REAL)MAGIC;
    return (VF)((VI)S(fraction)(x * rate - whole) + ((VI)t << FRACTION));
}

/* e^(x rate / LOG2_E); 0 below EXP_LOW, e^EXP_HIGH above EXP_HIGH. */
static inline VF S(decay)(VF x, REAL rate) {
    VF low = S(splat)((REAL)(EXP_LOW * LOG2_E) / rate), high = S(splat)((REAL)(EXP_HIGH * LOG2_E) / rate);
    return S(keep)(x > low, S(power)(S(most)(S(least)(x, high), low), rate));
}

/* e^x, in the same bounds. */
static inline VF S(exponential)(VF x) { return S(decay)(x, (REAL)LOG2_E); }

/* log x for normal x > 0, as e log 2 + 2 artanh((f - 1) / (f + 1)) with f in [sqrt(1/2), sqrt(2)). */
static inline VF S(logarithm)(VF x) {
    VI exponent = ((VI)x - (INT)ROOT_HALF) >> FRACTION;
    VF f = (VF)((VI)x - (exponent << FRACTION)), e = __builtin_convertvector(exponent, VF);
    VF z = (f - 1) / (f + 1), zz = z * z, p = S(splat)(1.0 / (2 * LOG_TERMS + 1));
#pragma GCC unroll 16
    for (int i = LOG_TERMS - 1; i >= 0; i--) p = p * zz + (REAL)(1.0 / (2 * i + 1));
    return e * (REAL)LN2_HIGH + (e * (REAL)LN2_LOW + 2 * z * p);
}

/* What one look at a tile tells about its rows. */
typedef struct {
    VF top;    /* largest entry; 0 in rows without entries */
    VF bottom; /* smallest, absent ones too; not looked for in tiles */
    VF count;  /* entries that are there; 1 in rows without */
    VF mean;   /* of the entries that are there */
    VF none;   /* 1 in rows without entries, else 0: their sums start at 1, so that no logarithm sees 0 */
    VF clean;  /* 1, or NaN in rows that hold one */
} S(rows);

static inline S(rows) S(look)(const VF *s, int64_t n) {
    VF low = S(splat)(-INFINITY), top = low, count = {0}, sum = {0}, one = S(splat)(1);
    VI nan = {0};
    for (int64_t j = 0; j < n; j++) {
        VF x = s[j];
        VI there = x != low;
        top = S(most)(x, top);
        count += S(keep)(there, one), sum += S(keep)(there, x);
        nan |= x != x;
    }
    VI none = count == 0;
    count = S(pick)(none, one, count);
    S(rows) r = {S(pick)(none, (VF){0}, top), low, count, sum / count, S(keep)(none, one), S(pick)(nan, S(splat)(NAN), one)};
    return r;
}

/* The first iteration that has to be run: for each before it, it is known that the threshold lies above all entries. Known by
 * log sum_j exp(s_j / eps), which is at least the largest entry / eps, and at least log n + the mean / eps (Jensen). Where rows
 * differ, their own first iterations go to `first`, and the least is returned. */
static inline int64_t S(first_iteration)(const S(rows) *r, VF log_k, const double *eps, int64_t T, VI *first) {
    VF room = S(logarithm)(r->count) - log_k;
    VI open = r->top < S(splat)(INFINITY), counted = {0}; /* where every threshold so far lies above; how many do */
    int64_t least = 0;
    for (int64_t t = 0; t < T - 1 && S(any)(open); t++) {
        VF now = S(splat)((REAL)eps[t]), m = t ? S(most)(r->top - now * log_k, r->mean + now * room) : now * room;
        open &= m >= r->top;
        counted -= open;
        least += !S(any)(~open);
    }
    *first = counted;
    return least;
}

/* sum_j min(e_j, cap): four sums in flight. */
static inline VF S(capped_sum)(const VF *e, int64_t n, VF cap) {
    VF a = {0}, b = {0}, c = {0}, d = {0};
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        a += S(least)(e[j], cap), b += S(least)(e[j + 1], cap);
        c += S(least)(e[j + 2], cap), d += S(least)(e[j + 3], cap);
    }
    for (; j < n; j++) a += S(least)(e[j], cap);
    return (a + b) + (c + d);
}

#include "coor_window.h"

/* y from s; eps[T + 1] is the schedule, its last entry for y. Thresholds go to m[T]. open [n] is scratch. */
static void S(iterate)(const VF *s, VF *restrict y, VF *restrict open, int64_t n, VF log_k, const double *eps, int64_t T, VF *m_out) {
    S(rows) r = S(look)(s, n);
    VI own;
    int64_t begin = S(first_iteration)(&r, log_k, eps, T, &own);
    VF m = (REAL)eps[0] * (S(logarithm)(r.count) - log_k), c = {0}, M = {0}, inverse_k = S(exponential)(-log_k);
    const VF high = S(splat)(WIDE ? 1e150 : 1e18), low = S(splat)(WIDE ? 1e-150 : 1e-18);
    S(window) w = {.next = WINDOW_AFTER, .wait = WINDOW_AFTER, .count = -1};
    int fresh = 0; /* y holds E for this eps and the reference c */
    m_out[0] = m;
    for (int64_t t = 0; t < begin; t++) m_out[t] = m = S(splat)(INFINITY);
    for (int64_t t = max64(begin, 1); t < T; t++) {
        REAL rate = (REAL)(LOG2_E / eps[t]);
        int still = eps[t] == eps[t + 1];
        if (still && !fresh) {
            c = S(least)(r.top, m);
            for (int64_t j = 0; j < n; j++) y[j] = S(decay)(s[j] - c, rate);
            M = S(decay)(m - c, rate);
            w.count = -1, w.next = max64(w.next, t + 2), fresh = 1;
        }
        if (fresh) {
            M = (S(window_sum)(&w, y, open, n, M, m_out + t - 1, (REAL)eps[t], t, T) + r.none) * inverse_k;
            m = c + (REAL)eps[t] * S(logarithm)(M);
            fresh = still && !S(any)((M > high) | (M < low));
        } else {
            VF a = r.none, b = {0}, least = S(splat)((REAL)(EXP_LOW * eps[t])); /* nobody notices e^EXP_LOW in the sum */
            int64_t j = 0;
            c = S(least)(r.top, m);
            for (; j + 2 <= n; j += 2) {
                a += S(power)(S(most)(S(least)(s[j], m) - c, least), rate);
                b += S(power)(S(most)(S(least)(s[j + 1], m) - c, least), rate);
            }
            if (j < n) a += S(power)(S(most)(S(least)(s[j], m) - c, least), rate);
            m = c + (REAL)eps[t] * (S(logarithm)(a + b) - log_k);
        }
        m_out[t] = m;
    }
    m_out[T - 1] = m * r.clean;
    VF one = S(splat)(1), zero = {0};
    if (fresh) {
        VF inverse = r.clean / M;
        for (int64_t j = 0; j < n; j++) y[j] = S(least)(one, y[j] * inverse);
    } else {
        REAL rate = (REAL)(LOG2_E / eps[T]);
        for (int64_t j = 0; j < n; j++) y[j] = S(decay)(S(least)(zero, s[j] - m), rate) * r.clean;
    }
}

/* E for another reference, and the sums so far in its terms. An entry far above it takes no more coefficients (weights are at most
 * 1): its E only carries the sum so far. */
static void S(refer)(S(stage) *of, const VF *s, VF *ds, VF *E, int64_t n, VF c) {
    VF high = S(splat)((REAL)(REACH + 20) * of->eps);
    for (int64_t j = 0; j < n; j++) {
        VF e = S(decay)(S(least)(s[j] - c, high), (REAL)LOG2_E / of->eps);
        ds[j] = S(keep)(e > 0, E[j] * ds[j] / e);
        E[j] = e;
    }
    of->c = c;
}

/* The gradient of `iterate`, from the thresholds it left. On entry ds holds the cotangent of y; on return the gradient of s.
 * E [n] and open [2 n + 1] are scratch; if y is not NULL it receives y. Returns the gradient of log k.
 *
 *     h = y g / eps on s <= m_T       mu_T = -sum h       w_tj = exp((min(s_j, m_{t-1}) - m_t) / eps_t - log k)
 *     ds_j = h_j + sum_t mu_t w_tj [s_j <= m_{t-1}]       mu_{t-1} = mu_t sum_j w_tj [s_j > m_{t-1}]       dlogk = -sum mu_t eps_t
 *
 * While eps stands still, w_tj = E_j coef_t below the threshold, so ds holds sums of coefficients and meets E at the end. */
static VF S(iterate_back)(const VF *s, VF *ds, VF *E, VF *y, VF *open, int64_t n, VF log_k, const double *eps, int64_t T, const VF *m) {
    VF zero = {0}, one = S(splat)(1), none = S(splat)(-INFINITY), last = m[T - 1], mu = zero, sum_mu = zero, dlogk = zero;
    S(stage) of = {last, S(exponential)(-log_k), (REAL)eps[T]};
    int64_t begin = S(begun)(m, T), first = max64(S(last_stage)(eps, T), begin), t = T - 1;
    for (int64_t j = 0; j < n; j++) {
        VF e = S(decay)(s[j] - last, (REAL)(LOG2_E / eps[T])), d = S(keep)(s[j] <= last, ds[j] * (REAL)(1 / eps[T]));
        if (y) y[j] = S(least)(one, e);
        mu -= e * d;
        E[j] = e, ds[j] = first < T ? d : e * d;
    }
    while (t >= first) {
        if (!S(in_reach)(&of, m[t])) S(refer)(&of, s, ds, E, n, S(near)(&of, m[t]));
        int64_t from = t;
        while (from > first + WINDOW_AFTER && from > first + (t - first) / 4 && S(in_reach)(&of, m[from - 1])) from--;
        if (from < t) mu = S(window_back)(&of, mu, s, ds, open, n, m, from, t, &sum_mu);
        else {
            VF before = m[t - 1], coefficient = mu * S(weight)(&of, of.c, m[t]), above = zero;
            for (int64_t j = 0; j < n; j++) {
                VI in = s[j] <= before;
                ds[j] += S(keep)(in, coefficient), above += S(keep)(~in, one);
            }
            sum_mu += mu, mu *= above * S(weight)(&of, before, m[t]);
        }
        t = from - 1;
    }
    dlogk -= sum_mu * of.eps;
    if (first < T)
        for (int64_t j = 0; j < n; j++) ds[j] *= E[j];
    for (; t >= max64(begin, 1); t--) {
        VF before = m[t - 1], offset = m[t] + (REAL)eps[t] * log_k, above = zero, low = S(splat)((REAL)(EXP_LOW * eps[t]));
        REAL rate = (REAL)(LOG2_E / eps[t]);
        for (int64_t j = 0; j < n; j++) {
            VI in = s[j] <= before;
            VF w = S(power)(S(most)(S(least)(s[j], before) - offset, low), rate);
            ds[j] += S(keep)(in, mu * w), above += S(keep)(~in, w);
        }
        dlogk -= mu * (REAL)eps[t], mu *= above;
    }
    VF clean = one + (last - last);
    for (int64_t j = 0; j < n; j++) ds[j] = S(keep)(s[j] != none, ds[j]) * clean;
    return (dlogk - mu * (REAL)eps[0]) * clean;
}
