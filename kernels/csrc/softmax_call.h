/* What the kernels of softmax attention are called with: an array of int64 numbers, laid out as these structs. */
#ifndef FNATTN_SOFTMAX_CALL_H
#define FNATTN_SOFTMAX_CALL_H

#include "strided.h"

/* b batch, h query heads, g key heads, n queries, m keys, d width of q and k, e width of v; causal: query i sees key j if
 * j <= start + i. mask: bytes [b, h, n, m], strides of 0 for axes that it shares. The tensors follow in the kernel's order. */
typedef struct {
    int64_t b, h, g, n, m, d, e, causal, start, threads;
    strided mask, of[];
} softmax_call;

#define SIZES                                                                                                            \
    const int64_t b = call->b, h = call->h, g = call->g, n = call->n, m = call->m, d = call->d, e = call->e;             \
    const int64_t causal = call->causal, start = call->start, threads = call->threads

/* The mask's row of query i of a head of the batch, or NULL. */
static inline const uint8_t *mask_row(const softmax_call *call, int64_t batch, int64_t head, int64_t i) {
    const strided *t = &call->mask;
    return t->address ? (const uint8_t *)(intptr_t)t->address + batch * t->batch + head * t->head + i * t->row : NULL;
}

#define SLICE 16 /* keys of a tile on the diagonal */

/* How many keys, from j0 on, the next tile of a block has; *x: the first query, a multiple of `lanes`, that sees any of them. The
 * first query of the block sees the keys up to `diagonal`; around it tiles are short, and queries that see nothing are left out. */
static inline int64_t next_tile(int64_t j0, int64_t end, int64_t keys, int64_t diagonal, int64_t lanes, int64_t *x) {
    const int64_t before = diagonal + 1 - j0, count = min64(keys, end - j0);
    *x = before > 0 ? 0 : (1 - before) / lanes * lanes;
    return count <= before ? count : min64(count, max64(SLICE, before / SLICE * SLICE));
}
#endif
