/* Forward-mode tangent of softmax attention, without an [n, m] table. With p_ij = exp(scale q_i . k_j - lse_i):
 *
 *     w_ij = p_ij scale (tq_i . k_j + q_i . tk_j)      t_lse_i = sum_j w_ij
 *     t_out_i = sum_j (w_ij v_j + p_ij tv_j) - t_lse_i out_i
 *
 * q, tq [b, h, n, d], k, tk [b, g, m, d], v, tv [b, g, m, e], out, t_out [b, h, n, e], lse, t_lse [b, h, n], contiguous; tq, tk,
 * tv may be NULL. mask: bytes [b, h, n, m] with strides (sb, sh, sn, 1), or NULL. causal: key j is seen if j <= start + i.
 *
 * A tile is a block of queries, which lie along the vector lanes, times a block of keys: only the queries need transposing,
 * and keys and values are read as they are. Tiles and accumulators are stored [key or channel][query]. */
#include "common.h"

#ifndef REAL
#define KEYS 64 /* keys in a tile */

#define REAL float
#define S(x) PASTE(fnattn_, x, _, f32)
#define VF vf32
#define LANES LANES_f32
#define INT int32_t
#define FRACTION_BITS 23
#define ROUNDER 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold */
#define LN2_HIGH 0.693359375f
#define LN2_LOW -2.12194440e-4f
#define LOWEST -87.0f
#define HIGHEST 88.0f
#define DEGREE 7
#include "softmax_tangent.c"
#undef REAL
#undef S
#undef VF
#undef LANES
#undef INT
#undef FRACTION_BITS
#undef ROUNDER
#undef LN2_HIGH
#undef LN2_LOW
#undef LOWEST
#undef HIGHEST
#undef DEGREE
#define REAL double
#define S(x) PASTE(fnattn_, x, _, f64)
#define VF vf64
#define LANES LANES_f64
#define INT int64_t
#define FRACTION_BITS 52
#define ROUNDER 6755399441055744.0
#define LN2_HIGH 6.93145751953125e-1
#define LN2_LOW 1.42860682030941723212e-6
#define LOWEST -708.0
#define HIGHEST 709.0
#define DEGREE 13
#include "softmax_tangent.c"
#else

typedef INT S(ints) __attribute__((vector_size(VECTOR_BYTES)));

static const REAL S(inverse)[] = {1., 1., 1. / 2, 1. / 3, 1. / 4, 1. / 5, 1. / 6, 1. / 7, 1. / 8, 1. / 9, 1. / 10, 1. / 11, 1. / 12, 1. / 13};

static inline VF S(select)(S(ints) yes, VF a, VF b) { return (VF)((yes & (S(ints))a) | (~yes & (S(ints))b)); }

/* 2^j times the Taylor polynomial of exp on [-ln 2 / 2, ln 2 / 2]: relative error of one or two units in the last place. */
static inline VF S(exponential)(VF x) {
    const VF lowest = (VF){0} + (REAL)LOWEST, highest = (VF){0} + (REAL)HIGHEST;
    x = S(select)(x < lowest, lowest, x);
    x = S(select)(x > highest, highest, x);
    VF shifted = x * (REAL)1.44269504088896340736 + (REAL)ROUNDER, j = shifted - (REAL)ROUNDER;
    x = (x - j * (REAL)LN2_HIGH) - j * (REAL)LN2_LOW;
    VF sum = (VF){0} + (REAL)1;
    for (int i = DEGREE; i > 0; i--) sum = sum * x * S(inverse)[i] + (REAL)1;
    return (VF)((S(ints))sum + ((S(ints))shifted << FRACTION_BITS));
}

/* c[r][0 .. 4 vectors) += sum_k a[r * row + k * column] b[k][..] for R rows; b and c have rows of `width`. */
#define MULTIPLY(R)                                                                                                      \
    {                                                                                                                    \
        VF sum[R][4];                                                                                                    \
        for (int r = 0; r < R; r++)                                                                                      \
            for (int x = 0; x < 4; x++) sum[r][x] = ((VF *)(c + (i + r) * width))[x];                                    \
        for (int64_t k = 0; k < inner; k++) {                                                                            \
            const VF *b_k = (const VF *)(b + k * width);                                                                 \
            VF b0 = b_k[0], b1 = b_k[1], b2 = b_k[2], b3 = b_k[3];                                                       \
            for (int r = 0; r < R; r++) {                                                                                \
                REAL w = a[(i + r) * row + k * column];                                                                  \
                sum[r][0] += w * b0, sum[r][1] += w * b1, sum[r][2] += w * b2, sum[r][3] += w * b3;                      \
            }                                                                                                            \
        }                                                                                                                \
        for (int r = 0; r < R; r++)                                                                                      \
            for (int x = 0; x < 4; x++) ((VF *)(c + (i + r) * width))[x] = sum[r][x];                                    \
    }

static void S(multiply)(REAL *restrict c, const REAL *restrict a, int64_t row, int64_t column, const REAL *restrict b,
                        int64_t rows, int64_t inner) {
    const int64_t width = 4 * LANES;
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) MULTIPLY(4)
    for (; i < rows; i++) MULTIPLY(1)
}

/* x [rows][d] into the columns of t [d][width]; the columns that are left stay what they are. */
static void S(transpose)(REAL *t, const REAL *x, int64_t rows, int64_t d) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < d; c++) t[c * 4 * LANES + i] = x[i * d + c];
}

typedef struct {
    int64_t rows, d, e, sn;    /* queries in the block, widths, stride of the mask's rows */
    REAL scale;
    REAL *q, *tq, *p, *w, *acc; /* [d][width], [d][width], [KEYS][width], [KEYS][width], [e][width] */
    REAL *lse, *sum;           /* [width] */
} S(block);

/* Adds the keys [0, count) to the block's sums; `visible` queries from the end see key 0, and one fewer each key on. */
static void S(add_keys)(const S(block) *s, const REAL *k, const REAL *tk, const REAL *v, const REAL *tv, const uint8_t *mask,
                        int64_t count, int64_t hidden) {
    const int64_t width = 4 * LANES, d = s->d, e = s->e;
    memset(s->p, 0, (size_t)(count * width) * sizeof(REAL));
    memset(s->w, 0, (size_t)(count * width) * sizeof(REAL));
    S(multiply)(s->p, k, d, 1, s->q, count, d);
    if (s->tq) S(multiply)(s->w, k, d, 1, s->tq, count, d);
    if (tk) S(multiply)(s->w, tk, d, 1, s->q, count, d);
    for (int64_t j = 0; j < count; j++) {
        REAL *p = s->p + j * width, *w = s->w + j * width;
        for (int x = 0; x < 4; x++) ((VF *)p)[x] = S(exponential)(((VF *)p)[x] * s->scale - ((VF *)s->lse)[x]);
        for (int64_t i = 0; i < min64(width, hidden + j); i++) p[i] = 0;
        if (mask && s->sn)
            for (int64_t i = 0; i < s->rows; i++) p[i] = mask[i * s->sn + j] ? p[i] : 0;
        else if (mask && !mask[j])
            memset(p, 0, (size_t)width * sizeof(REAL));
        for (int x = 0; x < 4; x++) {
            VF slope = ((VF *)p)[x] * ((VF *)w)[x] * s->scale;
            ((VF *)w)[x] = slope;
            ((VF *)s->sum)[x] += slope;
        }
    }
    S(multiply)(s->acc, v, 1, e, s->w, e, count);
    if (tv) S(multiply)(s->acc, tv, 1, e, s->p, e, count);
}

void S(softmax_tangent)(const REAL *q, const REAL *k, const REAL *v, const uint8_t *mask, const REAL *out, const REAL *lse,
                        const REAL *tq, const REAL *tk, const REAL *tv, REAL *t_out, REAL *t_lse, int64_t b, int64_t h,
                        int64_t g, int64_t n, int64_t m, int64_t d, int64_t e, int64_t sb, int64_t sh, int64_t sn,
                        int64_t causal, int64_t start, int64_t threads, double scale) {
    const int64_t width = 4 * LANES, blocks = (n + width - 1) / width, tasks = b * h * blocks;
    if (!tasks || !g) return;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        REAL *memory = scratch((size_t)(width * (2 * d + 2 * KEYS + e + 2)) * sizeof(REAL));
        if (!memory) abort();
        S(block) s = {0, d, e, sn, (REAL)scale, memory, NULL, NULL, NULL, NULL, NULL, NULL};
        REAL *moved = s.q + d * width;
        s.p = moved + d * width, s.w = s.p + KEYS * width, s.acc = s.w + KEYS * width;
        s.lse = s.acc + e * width, s.sum = s.lse + width;
        s.tq = tq ? moved : NULL;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            /* The last queries of a causal head have the most keys: first, so that no thread is left with them alone. */
            int64_t head = task / blocks, i0 = (blocks - 1 - task % blocks) * width, first = head * n + i0;
            int64_t key_head = head / h * g + head % h / (h / g);
            s.rows = min64(width, n - i0);
            memset(memory, 0, (size_t)(width * 2 * d) * sizeof(REAL));
            memset(s.acc, 0, (size_t)(width * (e + 2)) * sizeof(REAL));
            S(transpose)(s.q, q + first * d, s.rows, d);
            if (tq) S(transpose)(s.tq, tq + first * d, s.rows, d);
            memcpy(s.lse, lse + first, (size_t)s.rows * sizeof(REAL));
            const uint8_t *rows = mask ? mask + head / h * sb + head % h * sh + i0 * sn : NULL;
            int64_t end = causal ? min64(m, start + i0 + s.rows) : m;
            for (int64_t j0 = 0; j0 < end; j0 += KEYS) {
                int64_t at = key_head * m + j0;
                S(add_keys)(&s, k + at * d, tk ? tk + at * d : NULL, v + at * e, tv ? tv + at * e : NULL, rows ? rows + j0 : NULL,
                            min64(KEYS, end - j0), causal ? j0 - start - i0 : -m);
            }
            for (int64_t i = 0; i < s.rows; i++) {
                t_lse[first + i] = s.sum[i];
                for (int64_t c = 0; c < e; c++)
                    t_out[(first + i) * e + c] = s.acc[c * width + i] - s.sum[i] * out[(first + i) * e + c];
            }
        }
        free(memory);
    }
}
#endif
