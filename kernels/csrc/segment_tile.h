/* The tile of segment attention: 32 queries, or 16 of them, along the vector lanes, times up to KEYS keys from anywhere.
 *
 * Which keys a block of queries reads, and who sees which, is a list made beforehand (see segment_attention.c). Tiles and sums
 * are stored [key or channel][SPAN queries]; keys and values are read where they lie, one scalar for all queries. Included once
 * per precision, after softmax_tile.h, whose names it uses. */
#undef SPAN
#define SPAN 32 /* queries in a block: the bits of a mask word */

#ifndef FNATTN_SEGMENT_LISTS
#define FNATTN_SEGMENT_LISTS
/* A block of queries: how many there are, where their positions start in `data`, its tiles, and whether it ignores `keep`. */
typedef struct {
    int32_t rows, positions, first, end, free;
} segment_block;

/* A tile of keys: start + j stride, or data[index + j] if index >= 0; half 0 all queries, 1 the first 16, 2 the last 16;
 * data[mask + j] the queries that see key j if mask >= 0, else all do. */
typedef struct {
    int32_t start, stride, count, half, index, mask;
} segment_tile;

typedef struct {
    const int32_t *group; /* [b h]: the group of blocks that a head reads, or NULL: all read the first */
    const segment_block *blocks;
    const segment_tile *tiles;
    const int32_t *data;
    int64_t count; /* blocks in a group */
} segment_lists;

/* The kernels' arguments: an array of int64 numbers, laid out as this struct. b batch, h query heads, g key heads, n positions,
 * d width of q and k, e width of v, count blocks in a group, row keys in the tiles of the longest block. keep: bytes [b, n], 0 for
 * keys that are not there, or NULL. The tensors follow in the kernel's order. */
typedef struct {
    int64_t b, h, g, n, d, e, count, row, threads, keep, group, blocks, tiles, data;
    strided of[];
} segment_call;

#define UNPACK                                                                                                              \
    const int64_t b = call->b, h = call->h, g = call->g, d = call->d, e = call->e, count = call->count;                     \
    const int64_t threads = call->threads;                                                                                  \
    const strided *of = call->of;                                                                                           \
    const segment_lists lists = {(const int32_t *)(intptr_t)call->group, (const segment_block *)(intptr_t)call->blocks,     \
                                 (const segment_tile *)(intptr_t)call->tiles, (const int32_t *)(intptr_t)call->data, count}

/* The block that is number `turn` of a head, and what it may keep, or NULL. */
static inline const segment_block *segment_block_of(const segment_lists *lists, int64_t head, int64_t turn) {
    return lists->blocks + (lists->group ? lists->group[head] : 0) * lists->count + turn;
}

static inline const uint8_t *segment_kept(const segment_call *call, const segment_block *block, int64_t batch) {
    return call->keep && !block->free ? (const uint8_t *)(intptr_t)call->keep + batch * call->n : NULL;
}

enum { NOBODY, SOME, ALL };

/* The tile's keys, and a word for each with the queries that see it. Says whether any pair, or every one, is visible. */
static int segment_keys(const segment_lists *lists, const segment_tile *tile, const uint8_t *keep, int32_t *at, uint32_t *words) {
    const int32_t *index = lists->data + tile->index, *mask = lists->data + tile->mask;
    uint32_t any = 0, every = tile->mask < 0 ? ~0u : 0;
    for (int64_t j = 0; j < tile->count; j++) {
        at[j] = tile->index < 0 ? tile->start + (int32_t)j * tile->stride : index[j];
        words[j] = tile->mask < 0 ? ~0u : (uint32_t)mask[j];
    }
    if (keep)
        for (int64_t j = 0; j < tile->count; j++) {
            words[j] = keep[at[j]] ? words[j] : 0;
            every &= words[j];
        }
    for (int64_t j = 0; j < tile->count; j++) any |= words[j];
    return !any ? NOBODY : every ? ALL : SOME;
}
#endif

/* The largest register blocks; see MANY_ROWS in softmax_tile.h. Each product runs over the columns X vectors at a time. Scores read
 * rows from anywhere, whose addresses need registers too: FEW for them, MANY for what reads at fixed distances. */
#undef PRODUCT_COLUMNS
#undef FEW
#undef MANY
#if WIDEST == 4
#define FEW(X) (X == 4 ? 4 : 8)
#define MANY(X) (X == 4 ? 6 : 12)
#define PRODUCT_COLUMNS(PRODUCT, NEXT, MOST)                                                                     \
    for (; vectors >= 4; vectors -= 4, NEXT(4)) { int64_t i = 0; PRODUCT(MOST(4), 4) PRODUCT(1, 4) }             \
    for (; vectors >= 2; vectors -= 2, NEXT(2)) { int64_t i = 0; PRODUCT(MOST(2), 2) PRODUCT(4, 2) PRODUCT(1, 2) } \
    for (; vectors >= 1; vectors -= 1, NEXT(1)) { int64_t i = 0; PRODUCT(MOST(1), 1) PRODUCT(1, 1) }
#else
#define FEW(X) 6
#define MANY(X) (X == 2 ? 6 : 8)
#define PRODUCT_COLUMNS(PRODUCT, NEXT, MOST)                                                                     \
    for (; vectors >= 2; vectors -= 2, NEXT(2)) { int64_t i = 0; PRODUCT(MOST(2), 2) PRODUCT(4, 2) PRODUCT(1, 2) } \
    for (; vectors >= 1; vectors -= 1, NEXT(1)) { int64_t i = 0; PRODUCT(MOST(1), 1) PRODUCT(1, 1) }
#endif

#undef SCORES
#undef SCORES_NEXT
#define SCORES_NEXT(X) p += X * LANES, q_t += X * LANES
#define SCORES(R, X)                                                                                \
    for (; i + R <= count; i += R) {                                                                \
        const REAL *row[R];                                                                         \
        VF sum[R][X];                                                                               \
        for (int r = 0; r < R; r++) row[r] = k + at[i + r] * k_row;                                 \
        for (int r = 0; r < R; r++)                                                                 \
            for (int x = 0; x < X; x++) sum[r][x] = (VF){0};                                        \
        for (int64_t c = 0; c < d; c++) {                                                           \
            VF q_c[X];                                                                              \
            for (int x = 0; x < X; x++) q_c[x] = ((const VF *)(q_t + c * SPAN))[x];                 \
            for (int r = 0; r < R; r++)                                                             \
                for (int x = 0; x < X; x++) sum[r][x] += row[r][c] * q_c[x];                        \
        }                                                                                           \
        for (int r = 0; r < R; r++)                                                                 \
            for (int x = 0; x < X; x++) {                                                           \
                VF *p_r = (VF *)(p + (i + r) * SPAN) + x;                                           \
                *p_r = more ? *p_r + sum[r][x] : sum[r][x];                                         \
            }                                                                                       \
    }

/* p [count][queries] = (more: +=) k[at] q_t, the scores of keys, whose rows lie k_row apart, with queries q_t [d][queries]. */
static void S(segment_scores)(REAL *restrict p, const REAL *restrict k, int64_t k_row, const int32_t *restrict at,
                              const REAL *restrict q_t, int64_t count, int64_t d, int64_t vectors, int more) {
    PRODUCT_COLUMNS(SCORES, SCORES_NEXT, FEW)
}

#undef VALUES
#undef VALUES_NEXT
#define VALUES_NEXT(X) acc += X * LANES, p += X * LANES, shrink += shrink ? X * LANES : 0
#define VALUES(R, X)                                                                                \
    for (; i + R <= e; i += R) {                                                                    \
        VF sum[R][X];                                                                               \
        for (int r = 0; r < R; r++)                                                                 \
            for (int x = 0; x < X; x++) sum[r][x] = (VF){0};                                        \
        for (int64_t j = 0; j < count; j++) {                                                       \
            const REAL *v_j = v + at[j] * v_row + i;                                                \
            VF p_j[X];                                                                              \
            for (int x = 0; x < X; x++) p_j[x] = ((const VF *)(p + j * SPAN))[x];                   \
            for (int r = 0; r < R; r++)                                                             \
                for (int x = 0; x < X; x++) sum[r][x] += v_j[r] * p_j[x];                           \
        }                                                                                           \
        for (int r = 0; r < R; r++)                                                                 \
            for (int x = 0; x < X; x++) {                                                           \
                VF *acc_r = (VF *)(acc + (i + r) * SPAN) + x;                                       \
                *acc_r = (shrink ? *acc_r * ((const VF *)shrink)[x] : *acc_r) + sum[r][x];          \
            }                                                                                       \
    }

/* acc [e][queries] = acc shrink + v[at]^T p, a weighted sum of values, whose rows lie v_row apart; shrink [queries] or NULL. */
static void S(segment_values)(REAL *restrict acc, const REAL *restrict v, int64_t v_row, const int32_t *restrict at,
                              const REAL *restrict p, const REAL *restrict shrink, int64_t count, int64_t e, int64_t vectors) {
    PRODUCT_COLUMNS(VALUES, VALUES_NEXT, MANY)
}

#undef SPREAD
#undef SPREAD_NEXT
#define SPREAD_NEXT(X) dk += X * LANES, q += X * LANES
#define SPREAD(R, X)                                                                                \
    for (; i + R <= count; i += R) {                                                                \
        REAL *row[R];                                                                               \
        VF sum[R][X];                                                                               \
        for (int r = 0; r < R; r++) row[r] = dk + at[i + r] * dk_row;                               \
        for (int r = 0; r < R; r++)                                                                 \
            for (int x = 0; x < X; x++) sum[r][x] = (VF){0};                                        \
        for (int64_t y = 0; y < queries; y++) {                                                     \
            VF q_y[X];                                                                              \
            for (int x = 0; x < X; x++) q_y[x] = ((const VF *)(q + y * width))[x];                  \
            for (int r = 0; r < R; r++)                                                             \
                for (int x = 0; x < X; x++) sum[r][x] += p[(i + r) * SPAN + y] * q_y[x];            \
        }                                                                                           \
        for (int r = 0; r < R; r++)                                                                 \
            for (int x = 0; x < X; x++) ((VF *)row[r])[x] += sum[r][x];                             \
    }

/* dk[at] += p q, a sum over queries: p [count][queries], q [queries][width], width a whole number of vectors. */
static void S(segment_spread)(S(sums) sums, const int32_t *restrict at, const REAL *restrict p, const REAL *restrict q,
                              int64_t count, int64_t queries, int64_t width) {
    REAL *restrict dk = sums.at;
    const int64_t dk_row = sums.row;
    int64_t vectors = width / LANES;
    PRODUCT_COLUMNS(SPREAD, SPREAD_NEXT, FEW)
}

/* -infinity over the scores of the pairs that words, shifted to the tile's first query, do not name. */
static void S(segment_hide)(REAL *p, const uint32_t *words, int64_t first, int64_t count, int64_t vectors) {
    const VF nothing = (VF){0} - (REAL)INFINITY;
    S(ints) bits;
    for (int i = 0; i < LANES; i++) bits[i] = (INT)1 << i;
    for (int64_t j = 0; j < count; j++) {
        if (words[j] == ~0u) continue;
        for (int64_t x = 0; x < vectors; x++) {
            VF *p_j = (VF *)(p + j * SPAN) + x;
            *p_j = S(select)(((INT)(words[j] >> (first + x * LANES)) & bits) != 0, *p_j, nothing);
        }
    }
}

/* rows of x, x_row apart, times factor into r [SPAN][width], zeros where there is none, and from there into the columns of t [d][SPAN]. */
static void S(segment_queries)(REAL *t, REAL *r, int64_t width, const REAL *x, int64_t x_row, const int32_t *positions, int64_t rows,
                               int64_t d, REAL factor) {
    if (rows < SPAN || width > d) memset(r, 0, (size_t)(SPAN * width) * sizeof(REAL));
    for (int64_t i = 0; i < rows; i++) {
        const REAL *x_i = x + positions[i] * x_row;
        for (int64_t c = 0; c < d; c++) r[i * width + c] = factor * x_i[c];
    }
    S(turn)(t, SPAN, r, width, SPAN, d);
}

/* The columns of t [width][SPAN], each times its factor, into rows of x, x_row apart. r [SPAN][width] is scratch. */
static void S(segment_results)(REAL *t, REAL *r, int64_t width, REAL *x, int64_t x_row, const int32_t *positions, int64_t rows,
                               const REAL *factor) {
    for (int64_t c = 0; c < width * SPAN; c += SPAN)
        for (int64_t y = 0; y < SPAN; y += LANES) *(VF *)(t + c + y) *= *(const VF *)(factor + y);
    S(turn)(r, width, t, SPAN, width, SPAN);
    for (int64_t i = 0; i < rows; i++) memcpy(x + positions[i] * x_row, r + i * width, (size_t)width * sizeof(REAL));
}
