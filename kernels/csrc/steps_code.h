/* What steps.c describes: the list itself. Included once per kind NUM of number in weights and caches. */
#include "numbers.h"
#include "decode_rows.h"
#include "linear_rows.h"

typedef int (*R(decode_fn))(const REAL *, const NUM *, const NUM *, const NUM *, const NUM *, const uint8_t *, REAL *, int64_t, int64_t,
                            int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                            int64_t, double);

static void R(widen)(const NUM *x, REAL *y, int64_t count) {
    for (int64_t c = 0; c < count; c++) y[c] = R(single)(x + c);
}

int R(try_steps)(const int64_t *code, int64_t length, int64_t space, int64_t threads) {
    REAL *const scratch_at = scratch((size_t)space * sizeof(REAL));
    if (!scratch_at) return NO_MEMORY;
    int failed = DONE;
#define AT(i) (code[i] < 0 ? scratch_at + (-1 - code[i]) : (REAL *)(intptr_t)code[i])
#define NUMS(i) ((NUM *)AT(i)) /* weights, caches, and what becomes part of one */
#define KERNEL(kind) ((S(kind##_fn))(intptr_t)code[1])
    for (const int64_t *end = code + length; code < end && !failed;) switch (code[0]) {
        case NORM: { /* x, ldx, gamma, y, rows, k */
            for (int64_t r = 0; r < code[5]; r++) S(norm_row)(AT(1) + r * code[2], AT(3), AT(4) + r * code[6], code[6]);
            code += 7;
            break;
        }
        case LAYER_NORM: { /* x, ldx, weight, bias, y, rows, k */
            for (int64_t r = 0; r < code[6]; r++) S(layer_norm_row)(AT(1) + r * code[2], AT(3), AT(4), AT(5) + r * code[7], code[7]);
            code += 8;
            break;
        }
        case LINEAR: { /* x, ldx, w, bias, add, ldadd, y, rows, parts, m, k, act */
            /* parts [rows, m] of y follow each other, as do those of w */
            const int64_t rows = code[8], parts = code[9], m = code[10], k = code[11];
            for (int64_t p = 0; p < parts; p++)
                R(products)(AT(1), NUMS(3) + p * m * k, AT(4), AT(7) + p * rows * m, 1, rows, m, k, 0, code[2], 0, 0,
                            rows * m * k < PARALLEL_FROM ? 1 : threads);
            S(finish)(AT(7), AT(5), code[6], rows, m, code[12]);
            code += 13;
            break;
        }
        case EMBED: { /* ids: int64, their stride, table, its rows, y, rows, k */
            const int64_t *ids = (const int64_t *)(intptr_t)code[1];
            for (int64_t r = 0; r < code[6]; r++) {
                const int64_t id = ids[r * code[2]];
                if (id < 0 || id >= code[4]) failed = OUT_OF_RANGE;
                else R(widen)(NUMS(3) + id * code[7], AT(5) + r * code[7], code[7]);
            }
            code += 8;
            break;
        }
        case COPY: { /* x, ldx, y, ldy, rows, k */
            for (int64_t r = 0; r < code[5]; r++) memcpy(AT(3) + r * code[4], AT(1) + r * code[2], (size_t)code[6] * sizeof(REAL));
            code += 7;
            break;
        }
        case ADD: { /* y, x, ldx, rows, k */
            S(finish)(AT(1), AT(2), code[3], code[4], code[5], IDENTITY);
            code += 6;
            break;
        }
        case MULTIPLY: { /* y, by, count */
            REAL *y = AT(1);
            const REAL *by = AT(2);
            for (int64_t i = 0; i < code[3]; i++) y[i] *= by[i];
            code += 4;
            break;
        }
        case GATE: { /* y, gates, heads of all rows, d */
            REAL *y = AT(1);
            for (int64_t i = 0; i < code[3]; i++) {
                const REAL open = S(logistic)(AT(2)[i]);
                for (int64_t c = 0; c < code[4]; c++) y[i * code[4] + c] *= open;
            }
            code += 5;
            break;
        }
        case TURN: { /* x, freqs, rows, heads, d, f, position */
            S(turn)(AT(1), (const float *)(intptr_t)code[2], code[3], code[4], code[5], code[6], code[7]);
            code += 8;
            break;
        }
        case APPEND: { /* late, x, y, heads of all rows, w, d, at: y is late [heads, w, d] with x [heads, d] as row `at` of each */
            const int64_t w = code[5], d = code[6];
            memcpy(NUMS(3), NUMS(1), (size_t)(code[4] * w * d) * sizeof(NUM));
            for (int64_t i = 0; i < code[4]; i++) memcpy(NUMS(3) + (i * w + code[7]) * d, NUMS(2) + i * d, (size_t)d * sizeof(NUM));
            code += 8;
            break;
        }
        case FLUSH: { /* main, late, x, y, heads of all rows, room, w, d, first: y is main with late, its last row x, from row `first` on */
            const int64_t room = code[6], w = code[7], d = code[8], first = code[9];
            const size_t row = (size_t)d * sizeof(NUM);
            for (int64_t i = 0; i < code[5]; i++) {
                NUM *y = NUMS(4) + i * room * d;
                const NUM *main = NUMS(1) + i * room * d;
                memcpy(y, main, (size_t)first * row);
                memcpy(y + first * d, NUMS(2) + i * w * d, (size_t)(w - 1) * row);
                memcpy(y + (first + w - 1) * d, NUMS(3) + i * d, row);
                memcpy(y + (first + w) * d, main + (first + w) * d, (size_t)(room - first - w) * row);
            }
            code += 10;
            break;
        }
        case SHIFT: { /* old, x, y, heads of all rows, w, d: y is old [w, d] without its first row, and x after it */
            const int64_t w = code[5], d = code[6];
            for (int64_t i = 0; i < code[4]; i++) {
                NUM *y = NUMS(3) + i * w * d;
                memcpy(y, NUMS(1) + (i * w + 1) * d, (size_t)((w - 1) * d) * sizeof(NUM));
                memcpy(y + (w - 1) * d, NUMS(2) + i * d, (size_t)d * sizeof(NUM));
            }
            code += 7;
            break;
        }
        case GATHER: { /* from, x, slots, y, heads of all rows, w, d, picks */
            /* row p of y is row slots[p] of from [w, d], or x where that is w */
            const int64_t *slots = (const int64_t *)(intptr_t)code[3], w = code[6], d = code[7], picks = code[8];
            for (int64_t i = 0; i < code[5]; i++)
                for (int64_t p = 0; p < picks; p++) {
                    const NUM *row = slots[p] == w ? NUMS(2) + i * d : NUMS(1) + (i * w + slots[p]) * d;
                    memcpy(NUMS(4) + (i * picks + p) * d, row, (size_t)d * sizeof(NUM));
                }
            code += 9;
            break;
        }
        case SEEN: { /* text, t, image, w, slots, picks, all, y, rows */
            /* masks of bytes, y [rows, t + picks]: what is new is seen, with `all` every slot */
            const int64_t *slots = (const int64_t *)(intptr_t)code[5], t = code[2], w = code[4], picks = code[6];
            uint8_t *y = (uint8_t *)AT(8);
            for (int64_t r = 0; r < code[9]; r++, y += t + picks) {
                const uint8_t *image = (const uint8_t *)(intptr_t)code[3] + r * w;
                memcpy(y, (const uint8_t *)(intptr_t)code[1] + r * t, (size_t)t);
                for (int64_t p = 0; p < picks; p++) y[t + p] = code[7] || slots[p] == w || image[slots[p]];
            }
            code += 10;
            break;
        }
        case COMPLEX_PRODUCT: { /* y, by, count: pairs */
            REAL *y = AT(1);
            const REAL *by = AT(2);
            for (int64_t i = 0; i < 2 * code[3]; i += 2) {
                const REAL re = y[i] * by[i] - y[i + 1] * by[i + 1], im = y[i] * by[i + 1] + y[i + 1] * by[i];
                y[i] = re, y[i + 1] = im;
            }
            code += 4;
            break;
        }
        case LAYOUT: { /* layout, its heads, blocks, row, block, visible, its stride, y, rows, m */
            /* masks of bytes, y [rows, heads, m]: blocks that are there in this row of the layout [heads, blocks, blocks], and seen */
            const uint8_t *layout = (const uint8_t *)(intptr_t)code[1], *visible = (const uint8_t *)(intptr_t)code[6];
            const int64_t heads = code[2], blocks = code[3], block = code[5], m = code[10];
            uint8_t *y = (uint8_t *)AT(8);
            for (int64_t r = 0; r < code[9]; r++) {
                int any = 0;
                for (int64_t h = 0; h < heads; h++, y += m)
                    for (int64_t j = 0; j < m; j++)
                        any |= y[j] = layout[(h * blocks + code[4]) * blocks + j / block] && visible[r * code[7] + j];
                if (!any) failed = OUT_OF_RANGE;
            }
            code += 11;
            break;
        }
        case MEET: { /* q, keys, from one sequence and head to the next, s, b, h, g, d, count, m, first, scale as bits */
            /* s [b, h, m] from number `first` of a row on: scale q . k for `count` keys */
            const int64_t h = code[7], r = h / code[8], d = code[9];
            for (int64_t i = 0; i < code[6] * h; i++)
                R(score_keys)(AT(1) + i * d, NUMS(2) + i / h * code[3] + i % h / r * code[4], code[10], d, (REAL)S(double_of)(code[13]),
                        AT(5) + i * code[11] + code[12]);
            code += 14;
            break;
        }
        case HIDE: { /* s, visible, its stride, b, h, m, first: s [b, h, m] is -infinity for what is not visible [b, m - first] */
            const uint8_t *visible = (const uint8_t *)(intptr_t)code[2];
            const int64_t h = code[5], m = code[6], first = code[7];
            for (int64_t i = 0; i < code[4] * h; i++)
                for (int64_t j = first; j < m; j++)
                    if (!visible[i / h * code[3] + j - first]) AT(1)[i * m + j] = -(REAL)INFINITY;
            code += 8;
            break;
        }
        case MIX: { /* s, values, from one sequence and head to the next, y, b, h, g, d, count, m, first */
            /* y [b, h, d] += the sum of `count` values weighted by s [b, h, m] from number `first` of a row on; = if that is 0 */
            const int64_t h = code[7], r = h / code[8], d = code[9];
            if (!code[12]) memset(AT(5), 0, (size_t)(code[6] * h * d) * sizeof(REAL));
            for (int64_t i = 0; i < code[6] * h; i++)
                R(sum_values)(AT(5) + i * d, AT(1) + i * code[11] + code[12], NUMS(2) + i / h * code[3] + i % h / r * code[4], code[10], d);
            code += 13;
            break;
        }
        case AVERAGE: { /* y, s, rows, d, m: y [rows, d] divided by the sums of s [rows, m] that are above 0 */
            for (int64_t i = 0; i < code[3]; i++) {
                REAL total = 0;
                for (int64_t j = 0; j < code[5]; j++) total += AT(2)[i * code[5] + j];
                for (int64_t c = 0; c < code[4] && total > 0; c++) AT(1)[i * code[4] + c] /= total;
            }
            code += 6;
            break;
        }
        case SPARSITY: { /* y, gates, count, most, least as bits, whether its logarithm is wanted */
            /* y = 1 + (most - 1) sigmoid(gates), or `most` without gates, and at least `least` */
            const REAL most = (REAL)S(double_of)(code[4]), least = (REAL)S(double_of)(code[5]);
            for (int64_t i = 0; i < code[3]; i++) {
                REAL k = code[2] ? S(logistic)(AT(2)[i]) * (most - 1) + 1 : most;
                k = k < least ? least : k;
                AT(1)[i] = code[6] ? LOG(k) : k;
            }
            code += 7;
            break;
        }
        case WIDEN_ROWS: { /* x, ldx, y, ldy, rows, k: of weights and caches' numbers, y of the scratch's */
            for (int64_t r = 0; r < code[5]; r++) R(widen)(NUMS(1) + r * code[2], AT(3) + r * code[4], code[6]);
            code += 7;
            break;
        }
        case NARROW_ROWS: { /* x, ldx, y, ldy, rows, k: the other way */
            for (int64_t r = 0; r < code[5]; r++)
                for (int64_t c = 0; c < code[6]; c++) NUMS(3)[r * code[4] + c] = R(rounded)(AT(1)[r * code[2] + c]);
            code += 7;
            break;
        }
        case CALL_TAYLOR: { /* kernel, q, k, v, sums, out, den, new sums, b, h, g, d, scale, eps as bits */
            const int64_t b = code[9], h = code[10], g = code[11], d = code[12];
            const int64_t work = b * max64(h, g) * (1 + d + d * (d + 1) / 2) * (d + 1);
            failed = KERNEL(taylor)(AT(2), AT(3), AT(4), NULL, AT(5), AT(6), AT(7), AT(8), b, h, g, 1, 1, d, d, 0, 0, 1, S(double_of)(code[13]),
                                    S(double_of)(code[14]), work < PARALLEL_FROM ? 1 : threads);
            code += 15;
            break;
        }
        case CALL_DECODE: { /* kernel, q, k, v, k late, v late, */
            /* visible, from one sequence and head to the next, out, b, h, g, d, room, late, first, m, scale as bits */
            const int64_t b = code[11], h = code[12], d = code[14], m = code[18];
            failed = ((R(decode_fn))(intptr_t)code[1])(AT(2), NUMS(3), NUMS(4), NUMS(5), NUMS(6), (const uint8_t *)AT(7), AT(10), b, h,
                                                       code[13], 1, d, d, code[15], code[16], code[17], m, code[8], code[9], 0, m - 1,
                                                       b * h * m * 2 * d < PARALLEL_FROM ? 1 : threads, S(double_of)(code[19]));
            code += 20;
            break;
        }
        case CALL_SIMPLE: { /* kernel, q, x, a, h0, out, last, marks, rows, c */
            const int64_t c = code[10];
            KERNEL(simple)(AT(2), AT(3), AT(4), AT(5), AT(6), AT(7), AT(8), code[9], 1, c, c, c, c, c, c, c, 0, 1);
            code += 11;
            break;
        }
        case CALL_NARROW: { /* kernel, q, k, v, a, h0, out, last, product, marks, rows, c */
            const int64_t c = code[12];
            KERNEL(narrow)(AT(2), AT(3), AT(4), AT(5), AT(6), AT(7), AT(8), AT(9), AT(10), code[11], 1, c, c, c, c, c, c, c, 2 * c, 2 * c, 1);
            code += 13;
            break;
        }
        case CALL_WIDE: { /* kernel, q, k, v, a, h0, out, last, product, rows, h, d */
            const int64_t h = code[11], d = code[12], row = h * d, b = code[10];
            KERNEL(wide)(AT(2), AT(3), AT(4), AT(5), AT(6), AT(7), AT(8), AT(9), b, h, 1, d, d, row, d, d, row, d, d, row, d, d, 2 * h, 2, 2,
                         row, d, row, b * h * d * d * 4 < PARALLEL_FROM ? 1 : threads);
            code += 13;
            break;
        }
        case CALL_ITERATE: { /* kernel, s, log k, y, marks, rows, m, schedule, T */
            const int64_t rows = code[6], m = code[7], T = code[9];
            KERNEL(iterate)(AT(2), AT(3), AT(4), AT(5), rows, m, (const double *)(intptr_t)code[8], T, rows * m * T < PARALLEL_FROM ? 1 : threads);
            code += 10;
            break;
        }
        case CALL_EXACT: { /* kernel, s, k, y, cuts, thresholds, rows, m, eps as bits */
            const int64_t rows = code[7], m = code[8];
            KERNEL(exact)(AT(2), AT(3), AT(4), AT(5), AT(6), rows, m, S(double_of)(code[9]), rows * m * 8 < PARALLEL_FROM ? 1 : threads);
            code += 10;
            break;
        }
        default: failed = NO_MEMORY; /* not written by steps.py */
    }
#undef AT
#undef NUMS
#undef KERNEL
    free(scratch_at);
    return failed;
}
