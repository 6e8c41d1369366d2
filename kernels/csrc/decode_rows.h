/* One query and the rows of a cache: scores, and sums of values. The lanes of a vector lie along the channels, so a single query
 * fills them. Included once per precision after lanes.h. */

/* Asks for what lies so far behind x: rows of a cache come from afar, and pages end where the processor stops looking ahead. */
#define FROM_AFAR(x) __builtin_prefetch((const char *)(x) + 1024, 0, 3)

/* score[j] = scale q . k_j for `count` keys. */
static void S(score_keys)(const REAL *restrict q, const REAL *restrict k, int64_t count, int64_t d, REAL scale, REAL *restrict score) {
    int64_t j = 0, whole = d - d % LANES;
    for (; j + 4 <= count; j += 4, k += 4 * d) {
        VF sum[4] = {{0}};
        for (int64_t c = 0; c < whole; c += LANES) {
            VF q_c = *(const VF *)(q + c);
            for (int x = 0; x < 4; x++) FROM_AFAR(k + x * d + c);
            for (int x = 0; x < 4; x++) sum[x] += q_c * *(const VF *)(k + x * d + c);
        }
        for (int x = 0; x < 4; x++) {
            double rest = S(add_lanes)(sum[x]); /* what fills no vector is summed without rounding */
            for (int64_t c = whole; c < d; c++) rest += (double)q[c] * k[x * d + c];
            score[j + x] = (REAL)(rest * scale);
        }
    }
    for (; j < count; j++, k += d) {
        VF sum = {0};
        for (int64_t c = 0; c < whole; c += LANES) sum += *(const VF *)(q + c) * *(const VF *)(k + c);
        double rest = S(add_lanes)(sum);
        for (int64_t c = whole; c < d; c++) rest += (double)q[c] * k[c];
        score[j] = (REAL)(rest * scale);
    }
}

/* out += sum_j p_j v_j, the sum by itself first: what is added to out are few large parts. */
static void S(sum_values)(REAL *restrict out, const REAL *restrict p, const REAL *restrict v, int64_t count, int64_t e) {
    int64_t c = 0;
#define CHANNELS(X)                                                                                    \
    for (; c + X * LANES <= e; c += X * LANES) {                                                       \
        VF sum[X] = {{0}};                                                                             \
        for (int64_t j = 0; j < count; j++)                                                            \
            for (int x = 0; x < X; x++) {                                                              \
                const REAL *v_j = v + j * e + c + x * LANES;                                           \
                FROM_AFAR(v_j), sum[x] += p[j] * *(const VF *)v_j;                                     \
            }                                                                                          \
        for (int x = 0; x < X; x++) *(VF *)(out + c + x * LANES) += sum[x];                            \
    }
    CHANNELS(8)
    CHANNELS(4)
    CHANNELS(1)
#undef CHANNELS
    for (; c < e; c++) {
        REAL sum = 0;
        for (int64_t j = 0; j < count; j++) sum += p[j] * v[j * e + c];
        out[c] += sum;
    }
}
#undef FROM_AFAR
