/* Iterations whose eps is their own: an exponential of every entry, in sums and in gradients. Included once per precision by
 * coor_rows.h.
 *
 * 2^(x rate) as 2^whole 2^part: adding a large number leaves the whole part in the low bits of a sum, where shifted bits are an
 * exponent. Exponents are relative to a whole number `shift`, which that addition takes along. */

#undef STEPS
#undef SHIFT_MOST

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

/* What to add to a number up to SHIFT_MOST from `shift` for t of `whole`: 2^((x - shift) / STEPS) is then whole(x + this) part(rest). */
static inline VF S(shifted)(REAL shift) { return S(splat)((REAL)MAGIC + (STEPS > 1 ? 0 : WIDE ? 1023 : 127) - shift); }

/* sum_j 2^((min(s_j, cap) rate - shift) / STEPS) over a row; rate = STEPS LOG2_E / eps, shift a whole number up to SHIFT_MOST, and
 * nothing below `floor` if `clamp`. Ten or eleven operations an entry. */
static inline __attribute__((always_inline)) REAL S(hot_sum)(const VF *row, int64_t width, VF cap, VF floor, REAL shift, REAL rate,
                                                             const int clamp) {
    const VF scale = S(splat)(rate), magic = S(shifted)(shift);
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

/* An iteration of its own eps: the threshold before it, and the m + eps log k to which its weights refer. */
typedef struct {
    VF before, offset;
    REAL eps;
} S(hot);

/* D_j += mu w_j, w_j = exp((s_j - offset) / eps), for entries up to the threshold. Returns the sum of the others' weights, which the
 * threshold has in their place. `clamp` if some entry is below what `power` takes. */
static inline __attribute__((always_inline)) REAL S(hot_back)(const VF *row, VF *D, int64_t width, const S(hot) *hot, REAL mu,
                                                              const int clamp) {
    const REAL rate = (REAL)LOG2_E / hot->eps * STEPS, shift = (REAL)nearbyint(hot->offset[0] * rate);
    const VF low = hot->offset + (REAL)EXP_LOW * hot->eps, before = hot->before, one = S(splat)(1);
    VF up_to = {0};
    if (!(fabs((double)shift) < SHIFT_MOST)) {
        for (int64_t i = 0; i < width; i++) {
            const VF w = S(power)(S(most)(S(least)(row[i], before), low) - hot->offset, rate / STEPS);
            D[i] = ADD_WHERE(D[i], UP_TO(row[i], before), mu * w), up_to = ADD_WHERE(up_to, UP_TO(row[i], before), one);
        }
    } else {
        const VF magic = S(shifted)(shift), by = mu * S(part)(shift - hot->offset * rate);
        for (int64_t i = 0; i < width; i++) {
            const VF own = row[i];
            const __typeof__(UP_TO(own, before)) in = UP_TO(own, before);
            VF x = S(least)(own, before);
            if (clamp) x = S(most)(x, low);
            const VF t = x * rate + magic;
            D[i] = ADD_PRODUCT_WHERE(D[i], in, S(whole)(t), by * S(part)(x * rate - (t - magic))), up_to = ADD_WHERE(up_to, in, one);
        }
    }
    const REAL others = (REAL)(width * LANES) - S(total)(up_to);
    return others > 0 ? others * S(power)(S(most)(before - hot->offset, low - hot->offset), rate / STEPS)[0] : 0;
}
