/* Keys and values of one head where products read them fast; included once per precision by softmax_tile.h and coor_attention.h.
 *
 * Rows of a packed projection lie kilobytes apart: a tile of them touches a page per row and few sets of the first cache. Products
 * that read them for several blocks of queries are a fifth faster from a copy of the head, whose rows lie side by side. One head at
 * a time is copied by each thread, if it fits the second cache beside what else is there. Sums for rows of keys are better taken
 * nearby too, under the same condition. */

#ifndef NEARBY_BYTES
#define NEARBY_BYTES (1 << 20)
#define NEARBY_IN_ALL (3 << 19) /* with whatever else a thread has */
#define NEARBY_BLOCKS 4 /* blocks of queries for which a copy pays */
#define NEARBY_TENSORS 4
#define AHEAD 32 /* rows */
#endif

typedef struct {
    REAL *own;                        /* memory for copies, or NULL: rows are read where they lie */
    int64_t batch, head;              /* whose rows these are */
    const REAL *at[NEARBY_TENSORS];   /* first rows, or NULL for tensors that are not there */
    int64_t row[NEARBY_TENSORS];      /* from one row to the next */
} S(nearby);

/* How many numbers `own` needs for m rows of tensors with `width` numbers in all, of which `blocks` blocks of queries read each head. */
static inline int64_t S(nearby_size)(int64_t m, int64_t width, int64_t blocks) {
    return blocks >= NEARBY_BLOCKS && m * width * (int64_t)sizeof(REAL) <= NEARBY_BYTES ? m * width : 0;
}

static inline S(nearby) S(nearby_none)(REAL *own) { return (S(nearby)){.own = own, .batch = -1, .head = -1}; }

/* Makes `to` the m rows of a head of these tensors. */
static void S(come_near)(S(nearby) *to, const strided *const *tensors, const int64_t *width, int count, int64_t m, int64_t batch,
                         int64_t head) {
    if (to->batch == batch && to->head == head) return;
    to->batch = batch, to->head = head;
    REAL *own = to->own;
    for (int i = 0; i < count; i++) {
        const strided *t = tensors[i];
        const REAL *from = t->address ? (const REAL *)(intptr_t)t->address + batch * t->batch + head * t->head : NULL;
        to->at[i] = from, to->row[i] = t->row;
        if (!own || !from || t->row == width[i]) continue;
        for (int64_t j = 0; j < m; j++) {
            for (int64_t c = 0; c < width[i]; c += 64 / (int64_t)sizeof(REAL)) /* no processor foresees rows this far apart */
                __builtin_prefetch(from + min64(j + AHEAD, m - 1) * t->row + c, 0, 2);
            memcpy(own + j * width[i], from + j * t->row, (size_t)width[i] * sizeof(REAL));
        }
        to->at[i] = own, to->row[i] = width[i];
        own += m * width[i];
    }
}
