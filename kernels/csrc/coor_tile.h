/* Coordinate descent on a tile of rows in lanes; included once per precision by coor_descent.c and coor_attention.c.
 *
 * A tile is [n][LANES]: entry j of LANES different rows side by side, so that thresholds, logarithms and exponentials of
 * rows are vectors too. An entry of -infinity is not there. With m = -a, upstream's b = -relu(s + a) gives
 * s + b = min(s, m), and the iteration is a fixed point in one number per row:
 *
 *     m_1 = eps_1 (log n - log k)        m_t = eps_t (log sum_j exp(min(s_j, m_{t-1}) / eps_t) - log k)
 *     y_j = exp(min(s_j - m_T, 0) / eps_{T+1})
 *
 * While eps stands still, E_j = exp((s_j - c) / eps) is taken once and an iteration is M <- sum_j min(E_j, M) / k. */

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

static inline VF S(splat)(double x) { return (VF){0} + (REAL)x; }
static inline VF S(pick)(VI mask, VF yes, VF no) { return (VF)((mask & (VI)yes) | (~mask & (VI)no)); }
static inline VF S(keep)(VI mask, VF yes) { return (VF)(mask & (VI)yes); }
/* a < b ? a : b and a > b ? a : b, so that b = NaN stays NaN. Compilers do not find the one instruction by themselves. */
static inline VF S(least)(VF a, VF b) {
#if defined(__AVX512F__)
    return (VF)X86(_mm512_min)((XF)a, (XF)b);
#elif defined(__AVX__)
    return (VF)X86(_mm256_min)((XF)a, (XF)b);
#else
    return S(pick)(a < b, a, b);
#endif
}
static inline VF S(most)(VF a, VF b) {
#if defined(__AVX512F__)
    return (VF)X86(_mm512_max)((XF)a, (XF)b);
#elif defined(__AVX__)
    return (VF)X86(_mm256_max)((XF)a, (XF)b);
#else
    return S(pick)(a > b, a, b);
#endif
}
static inline int S(any)(VI mask) {
    int found = 0;
    for (int l = 0; l < LANES; l++) found |= mask[l] != 0;
    return found;
}

/* e^x for x in [EXP_LOW, EXP_HIGH]. About 1 ulp. */
static inline VF S(power)(VF x) {
    VF t = x * (REAL)1.44269504088896340736 + (REAL)MAGIC, whole = t - (REAL)MAGIC;
    VF r = x - whole * (REAL)LN2_HIGH;
    r = r - whole * (REAL)LN2_LOW;
#if WIDE
    static const double inverse_factorial[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                                               1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1, 1};
    VF p = S(splat)(inverse_factorial[0]);
#pragma GCC unroll 16
    for (int i = 1; i < 14; i++) p = p * r + (REAL)inverse_factorial[i];
#else
    VF p = S(splat)(1.9875691500e-4);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
#endif
    return (VF)((VI)p + ((VI)t << FRACTION));
}

/* e^x; 0 below EXP_LOW, e^EXP_HIGH above EXP_HIGH. */
static inline VF S(exponential)(VF x) {
    VI alive = x > S(splat)(EXP_LOW);
    return S(keep)(alive, S(power)(S(most)(S(least)(x, S(splat)(EXP_HIGH)), S(splat)(EXP_LOW))));
}

/* e^x for x <= 0 as a term of a sum in which nobody notices e^EXP_LOW: that is what smaller ones become. */
static inline VF S(term)(VF x) { return S(power)(S(most)(x, S(splat)(EXP_LOW))); }

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
    VF top;   /* largest entry; 0 in rows without entries */
    VF count; /* entries that are there; 1 in rows without */
    VF none;  /* 1 in rows without entries, else 0: their sums start at 1, so that no logarithm sees 0 */
    VF clean; /* 1, or NaN in rows that hold one */
} S(rows);

static inline S(rows) S(look)(const VF *s, int64_t n) {
    VF low = S(splat)(-INFINITY), top = low, count = {0}, one = S(splat)(1);
    VI nan = {0};
    for (int64_t j = 0; j < n; j++) {
        VF x = s[j];
        top = S(most)(x, top);
        count += S(keep)(x != low, one);
        nan |= x != x;
    }
    VI none = count == 0;
    S(rows) r = {S(pick)(none, (VF){0}, top), S(pick)(none, one, count), S(keep)(none, one),
                 S(pick)(nan, S(splat)(NAN), one)};
    return r;
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

/* y from s; eps[T + 1] is the schedule, its last entry for y. Thresholds go to m[T]. */
static void S(iterate)(const VF *s, VF *restrict y, int64_t n, VF log_k, const double *eps, int64_t T, VF *m_out) {
    S(rows) r = S(look)(s, n);
    VF m = (REAL)eps[0] * (S(logarithm)(r.count) - log_k), c = {0}, M = {0}, inverse_k = S(exponential)(-log_k);
    const VF high = S(splat)(WIDE ? 1e150 : 1e18), low = S(splat)(WIDE ? 1e-150 : 1e-18);
    int fresh = 0; /* y holds E for this eps and the reference c */
    m_out[0] = m;
    for (int64_t t = 1; t < T; t++) {
        REAL inverse = (REAL)(1 / eps[t]);
        int still = eps[t] == eps[t + 1];
        if (still && !fresh) {
            c = S(least)(r.top, m);
            for (int64_t j = 0; j < n; j++) y[j] = S(exponential)((s[j] - c) * inverse);
            M = S(exponential)((m - c) * inverse);
            fresh = 1;
        }
        if (fresh) {
            M = (S(capped_sum)(y, n, M) + r.none) * inverse_k;
            m = c + (REAL)eps[t] * S(logarithm)(M);
            fresh = still && !S(any)((M > high) | (M < low));
        } else {
            c = S(least)(r.top, m);
            VF a = r.none, b = {0};
            int64_t j = 0;
            for (; j + 2 <= n; j += 2) {
                a += S(term)((S(least)(s[j], m) - c) * inverse);
                b += S(term)((S(least)(s[j + 1], m) - c) * inverse);
            }
            if (j < n) a += S(term)((S(least)(s[j], m) - c) * inverse);
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
        REAL inverse = (REAL)(1 / eps[T]);
        for (int64_t j = 0; j < n; j++) y[j] = S(exponential)(S(least)(zero, s[j] - m) * inverse) * r.clean;
    }
}

/* The gradient of `iterate`, from the thresholds it left. On entry ds holds the cotangent of y; on return the gradient of s.
 * E [n] is scratch; if y is not NULL it receives y. Returns the gradient of log k.
 *
 *     h = y g / eps on s <= m_T       mu_T = -sum h       w_tj = exp((min(s_j, m_{t-1}) - m_t) / eps_t - log k)
 *     ds_j = h_j + sum_t mu_t w_tj [s_j <= m_{t-1}]       mu_{t-1} = mu_t sum_j w_tj [s_j > m_{t-1}]       dlogk = -sum mu_t eps_t
 *
 * While eps stands still, w_tj = E_j coef_t below the threshold, so ds holds sums of coefficients and meets E at the end. */
static VF S(iterate_back)(const VF *s, VF *ds, VF *E, VF *y, int64_t n, VF log_k, const double *eps, int64_t T, const VF *m) {
    VF zero = {0}, one = S(splat)(1), last = m[T - 1], c = last, mu = {0}, dlogk = {0};
    REAL inverse = (REAL)(1 / eps[T]);
    int still = T > 1 && eps[T] == eps[T - 1];
    for (int64_t j = 0; j < n; j++) {
        VF e = S(exponential)((s[j] - last) * inverse), d = S(keep)(s[j] <= last, ds[j] * inverse);
        if (y) y[j] = S(least)(one, e);
        mu -= e * d;
        E[j] = e, ds[j] = still ? d : e * d;
    }
    for (int64_t t = T - 1; t > 0; t--) {
        VF before = m[t - 1], now = m[t];
        dlogk -= mu * (REAL)eps[t];
        if (still && eps[t] != eps[T]) {
            for (int64_t j = 0; j < n; j++) ds[j] *= E[j];
            still = 0;
        }
        inverse = (REAL)(1 / eps[t]);
        if (still) {
            VF away = (now - c) * inverse;
            if (S(any)((away > S(splat)(REACH)) | (away < S(splat)(-REACH)))) {
                /* The coefficients would leave the range of numbers: a new reference, and the sums so far in terms of it. An
                 * entry far above it takes no more coefficients (weights are at most 1): its E only carries the sum so far. */
                for (int64_t j = 0; j < n; j++) {
                    VF e = S(exponential)(S(least)((s[j] - now) * inverse, S(splat)(REACH + 20)));
                    ds[j] = S(keep)(e > 0, E[j] * ds[j] / e);
                    E[j] = e;
                }
                c = now, away = zero;
            }
            VF coef = mu * S(exponential)(-away - log_k), a = {0}, b = {0};
            int64_t j = 0;
            for (; j + 2 <= n; j += 2) {
                VI in = s[j] <= before, also = s[j + 1] <= before;
                ds[j] += S(keep)(in, coef), ds[j + 1] += S(keep)(also, coef);
                a += S(keep)(~in, one), b += S(keep)(~also, one);
            }
            if (j < n) {
                VI in = s[j] <= before;
                ds[j] += S(keep)(in, coef), a += S(keep)(~in, one);
            }
            mu *= (a + b) * S(exponential)((before - now) * inverse - log_k);
        } else {
            VF above = {0}, offset = now * inverse + log_k;
            for (int64_t j = 0; j < n; j++) {
                VI in = s[j] <= before;
                VF w = S(exponential)(S(least)(s[j], before) * inverse - offset);
                ds[j] += S(keep)(in, mu * w);
                above += S(keep)(~in, w);
            }
            mu *= above;
        }
    }
    VF clean = one + (last - last);
    for (int64_t j = 0; j < n; j++) ds[j] = (still ? ds[j] * E[j] : ds[j]) * clean;
    return (dlogk - mu * (REAL)eps[0]) * clean;
}
