/* Coordinate descent on LANES rows as they lie in memory; included once per precision by coor_descent.c after coor_tile.h.
 *
 * The same mathematics as `iterate` and `iterate_back`, without transposing: a vector holds LANES entries of one row, and numbers
 * of rows stay vectors with rows in lanes. What lies between thresholds is a list of each row's own, and lists do lie with
 * rows in lanes, so that late iterations cost few instructions. Pays for rows of several vectors: each sum of a row ends in
 * a sum across lanes.
 *
 * A row is `width` whole vectors. Rows that are not there (in the last block) act as rows without entries. */

#define SOME_ROWS 4 /* rows that stay in the first cache for several iterations */

#undef STEPS
#undef SHIFT_MOST
#undef ABOVE
#undef UP_TO
#undef COMPARE
#undef SQUEEZE
#undef ADD_WHERE

/* ------------------------------------------------------------------------------------------------- across lanes */

static inline REAL S(total)(VF x) {
#if defined(__AVX512F__)
    return X86(_mm512_reduce_add)((XF)x);
#else
    for (int w = LANES / 2; w; w /= 2)
        for (int l = 0; l < w; l++) x[l] += x[l + w];
    return x[0];
#endif
}

static inline REAL S(largest)(VF x) {
#if defined(__AVX512F__)
    return X86(_mm512_reduce_max)((XF)x);
#else
    REAL best = x[0];
    for (int l = 1; l < LANES; l++) best = x[l] > best ? x[l] : best;
    return best;
#endif
}

#if defined(__AVX512F__)
#define ABOVE(x, cap) COMPARE((XF)(x), (XF)(cap), _CMP_GT_OQ)
#define UP_TO(x, cap) COMPARE((XF)(x), (XF)(cap), _CMP_LE_OQ)
#define ADD_WHERE(a, where, x) (VF)X86(_mm512_mask_add)((XF)(a), where, (XF)(a), (XF)(x))
#if WIDE
#define COMPARE _mm512_cmp_pd_mask
#define SQUEEZE _mm512_maskz_compress_epi64
#else
#define COMPARE _mm512_cmp_ps_mask
#define SQUEEZE _mm512_maskz_compress_epi32
#endif
#else
#define ABOVE(x, cap) ((x) > (cap))
#define UP_TO(x, cap) ((x) <= (cap))
#define ADD_WHERE(a, where, x) ((a) + S(keep)(where, x))
#endif

#if !defined(__AVX512F__) /* whose comparisons give bits */
/* Bit l of the result: mask[l]. */
static inline unsigned S(bits)(VI mask) {
#if defined(__AVX__) && WIDE
    return (unsigned)_mm256_movemask_pd((__m256d)mask);
#elif defined(__AVX__)
    return (unsigned)_mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__) && WIDE
    return (unsigned)_mm_movemask_pd((__m128d)mask);
#elif defined(__SSE2__)
    return (unsigned)_mm_movemask_ps((__m128)mask);
#else
    unsigned found = 0;
    if (S(any)(mask))
        for (int l = 0; l < LANES; l++) found |= mask[l] ? 1u << l : 0;
    return found;
#endif
}
#endif

/* How many entries of a row exceed cap. */
static inline REAL S(count_above)(const VF *x, int64_t width, VF cap) {
    VF a = {0}, b = {0}, one = S(splat)(1);
    int64_t i = 0;
    for (; i + 2 <= width; i += 2) a = ADD_WHERE(a, ABOVE(x[i], cap), one), b = ADD_WHERE(b, ABOVE(x[i + 1], cap), one);
    if (i < width) a = ADD_WHERE(a, ABOVE(x[i], cap), one);
    return S(total)(a + b);
}

/* Places of the entries of a row with low < x <= high go to list [n + LANES]; returns their number, and in *above how many are
 * higher. If below is not NULL, *below is the sum of the others. */
static inline __attribute__((always_inline)) int64_t S(between)(const VF *x, int64_t width, REAL low, REAL high, INT *list,
                                                                REAL *above, REAL *below) {
    VF floor = S(splat)(low), ceiling = S(splat)(high), sum = {0};
    int64_t count = 0, higher = 0;
#if defined(__AVX512F__)
    VI place = {0};
    for (int l = 0; l < LANES; l++) place[l] = l;
    for (int64_t i = 0; i < width; i++, place += LANES) {
        unsigned up = ABOVE(x[i], floor), over = ABOVE(x[i], ceiling), found = up & ~over;
        if (below) sum = ADD_WHERE(sum, ~up, x[i]);
        *(VI *)(list + count) = (VI)SQUEEZE(found, (__m512i)place);
        count += __builtin_popcount(found), higher += __builtin_popcount(over);
    }
#else
    VI more = {0};
    for (int64_t i = 0; i < width;) { /* bits first: where the next entry lies is foreseen once in 64 places */
        const int64_t first = i * LANES;
        uint64_t found = 0;
        for (int at = 0; at < 64 && i < width; at += LANES, i++) {
            VI up = x[i] > floor, over = x[i] > ceiling;
            if (below) sum += S(keep)(~up, x[i]);
            more -= over;
            found |= (uint64_t)S(bits)(up & ~over) << at;
        }
        for (; found; found &= found - 1) list[count++] = (INT)(first + __builtin_ctzll(found));
    }
    for (int l = 0; l < LANES; l++) higher += more[l];
#endif
    *above = (REAL)higher;
    if (below) *below = S(total)(sum);
    return count;
}

/* ------------------------------------------------------------------------------------------------- forward */

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

#if defined(__AVX512F__) && !WIDE
#define STEPS 32
/* The bits of 2^(i / 32), less i << 18: adding (32 e + i) << 18 gives 2^(e + i / 32). */
static const int32_t S(roots)[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};

/* 2^(t / 32) for the whole number in the low bits of t, and 2^(r / 32) for |r| <= 1/2, to 6e-8. */
static inline __attribute__((always_inline)) VF S(whole)(VF t) {
    const __m512i low = *(const __m512i *)S(roots), high = *(const __m512i *)(S(roots) + 16);
    return (VF)((VI)_mm512_permutex2var_epi32(low, (__m512i)t, high) + ((VI)t << 18));
}

static inline VF S(part)(VF r) { return (r * 2.3459617e-4f + 2.1661167e-2f) * r + 1.0f; }
#else
#define STEPS 1
/* 2^(t - bias) for the whole number in the low bits of t, and 2^r for |r| <= 1/2, in float32 to 1e-7. */
static inline VF S(whole)(VF t) { return (VF)((VI)t << FRACTION); }

static inline VF S(part)(VF r) {
#if WIDE
    return S(fraction)(r);
#else
    VF p = r * 1.3276472e-3f + 9.675541e-3f;
    p = p * r + 5.550713e-2f, p = p * r + 2.402212e-1f, p = p * r + 6.9314694e-1f;
    return p * r + 1.0000001f;
#endif
}
#endif
#define SHIFT_MOST (WIDE ? 562949953421312.0 : 2097152.0) /* a quarter of what MAGIC still rounds to whole numbers */

/* sum_j 2^((min(s_j, cap) rate - shift) / STEPS) over a row; rate = STEPS LOG2_E / eps, shift a whole number up to SHIFT_MOST, and
 * nothing below `floor` if `clamp`. Ten or eleven operations an entry; thirteen if cap were taken from s first. */
static inline __attribute__((always_inline)) REAL S(hot_sum)(const VF *row, int64_t width, VF cap, VF floor, REAL shift, REAL rate,
                                                             const int clamp) {
    const REAL bias = STEPS > 1 ? 0 : WIDE ? 1023 : 127;
    const VF scale = S(splat)(rate), magic = S(splat)((REAL)MAGIC + bias - shift);
    VF a = {0}, b = {0};
#define TERM(sum, entry)                                      \
    do {                                                      \
        VF x = S(least)(entry, cap);                          \
        if (clamp) x = S(most)(x, floor);                     \
        VF t = x * scale + magic, r = x * scale - (t - magic); \
        sum += S(whole)(t) * S(part)(r);                      \
    } while (0)
    int64_t i = 0;
    for (; i + 2 <= width; i += 2) {
        TERM(a, row[i]);
        TERM(b, row[i + 1]);
    }
    if (i < width) TERM(a, row[i]);
#undef TERM
    return S(total)(a + b);
}

/* The same for entries so far from 0 that no shift is exact, of exp((min(s_j, cap) - at) / eps). */
static REAL S(far_sum)(const VF *row, int64_t width, VF cap, VF at, REAL rate) {
    VF a = {0};
    for (int64_t i = 0; i < width; i++) a += S(decay)(S(least)(row[i], cap) - at, rate);
    return S(total)(a);
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
                const VF *row = S(row_of)(s, l), cap = S(splat)(m[l]), floor = S(splat)(c[l] + least);
                const REAL fine = STEPS * rate, shift = (REAL)nearbyint(c[l] * (double)fine);
                if (t < own[l]) continue;
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
