/* One query and the rows of a cache: scores, and sums of values. The lanes of a vector lie along the channels, so a single query
 * fills them. Included after numbers.h once per kind of number in the cache. */

/* Asks for what lies so far behind x: rows of a cache come from afar, and pages end where the processor stops looking ahead. */
#define FROM_AFAR(x) __builtin_prefetch((const char *)(x) + 1024, 0, 3)

/* Channels of a row that fill no vector: the vector that ends with the row, or in narrow rows begins with it, and which of its lanes
 * are those channels. */
typedef struct {
    int64_t at;                                /* its first channel */
    __typeof__((VF){0} == (VF){0}) lanes;      /* all bits or none */
} R(tail);

static inline R(tail) R(tail_of)(int64_t width) {
    R(tail) t = {width < LANES ? 0 : width - LANES, {0}};
    for (int l = 0; l < LANES; l++) t.lanes[l] = -(t.at + l >= width - width % LANES && t.at + l < width);
    return t;
}

static inline VF R(tail_channels)(const R(tail) *t, const NUM *row) {
    return (VF)((__typeof__(t->lanes))R(several)(row + t->at) & t->lanes);
}

/* How many of `count` rows have a whole vector from their tail's first channel on: what lies behind the last may be nobody's. */
static inline int64_t R(rows_with_tail)(int64_t count, int64_t width) {
    return width >= LANES ? count : width ? max64(0, count - (LANES - 1) / width) : 0;
}

/* score[j] = scale q . k_j for `count` keys. */
static void R(score_keys)(const REAL *restrict q, const NUM *restrict k, int64_t count, int64_t d, REAL scale, REAL *restrict score) {
    const int64_t whole = d - d % LANES, vectors = whole < d ? R(rows_with_tail)(count, d) : count;
    const R(tail) tail = R(tail_of)(d);
    VF q_tail = {0};
    for (int l = 0; l < LANES; l++)
        if (tail.lanes[l]) q_tail[l] = q[tail.at + l];
    int64_t j = 0;
    for (; j + 4 <= vectors; j += 4, k += 4 * d) {
        VF sum[4] = {{0}};
        for (int64_t c = 0; c < whole; c += LANES) {
            VF q_c = *(const VF *)(q + c);
            for (int x = 0; x < 4; x++) FROM_AFAR(k + x * d + c);
            for (int x = 0; x < 4; x++) sum[x] += q_c * R(several)(k + x * d + c);
        }
        for (int x = 0; x < 4 && whole < d; x++) sum[x] += q_tail * R(tail_channels)(&tail, k + x * d);
        for (int x = 0; x < 4; x++) score[j + x] = S(add_lanes)(sum[x]) * scale;
    }
    for (; j < count; j++, k += d) {
        VF sum = {0};
        for (int64_t c = 0; c < whole; c += LANES) sum += *(const VF *)(q + c) * R(several)(k + c);
        double rest = S(add_lanes)(sum); /* what fills no vector is summed without rounding */
        for (int64_t c = whole; c < d; c++) rest += (double)q[c] * R(single)(k + c);
        score[j] = (REAL)(rest * scale);
    }
}

/* out += sum_j p_j v_j, the sum by itself first: what is added to out are few large parts. */
static void R(sum_values)(REAL *restrict out, const REAL *restrict p, const NUM *restrict v, int64_t count, int64_t e) {
    int64_t c = 0;
#define CHANNELS(X)                                                             \
    for (; c + X * LANES <= e; c += X * LANES) {                                \
        VF sum[X] = {{0}};                                                      \
        for (int64_t j = 0; j < count; j++)                                     \
            for (int x = 0; x < X; x++) {                                       \
                const NUM *v_j = v + j * e + c + x * LANES;                     \
                FROM_AFAR(v_j), sum[x] += p[j] * R(several)(v_j);              \
            }                                                                   \
        for (int x = 0; x < X; x++) *(VF *)(out + c + x * LANES) += sum[x];     \
    }
    CHANNELS(8)
    CHANNELS(4)
    CHANNELS(1)
#undef CHANNELS
    if (c == e) return;
    const R(tail) tail = R(tail_of)(e);
    const int64_t vectors = R(rows_with_tail)(count, e);
    VF sum = {0};
    for (int64_t j = 0; j < vectors; j++) sum += p[j] * R(several)(v + j * e + tail.at);
    for (int l = 0; l < LANES; l++)
        if (tail.lanes[l]) {
            REAL rest = sum[l];
            for (int64_t j = vectors; j < count; j++) rest += p[j] * R(single)(v + j * e + tail.at + l);
            out[tail.at + l] += rest;
        }
}
#undef FROM_AFAR
