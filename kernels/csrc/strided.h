/* Tensors that a kernel reads and writes where they lie. */
#ifndef FNATTN_STRIDED_H
#define FNATTN_STRIDED_H

#include <stdint.h>

/* A tensor [batch, head, row, width], its rows in one piece each and anywhere: `address` of the first number (0: there is no
 * such tensor), and how many numbers lie from one index to the next. */
typedef struct {
    int64_t address, batch, head, row;
} strided;

/* Row i of one head of a tensor of doubles. */
static inline double *double_row(const strided *t, int64_t batch, int64_t head, int64_t i) {
    return (double *)(intptr_t)t->address + batch * t->batch + head * t->head + i * t->row;
}
#endif
