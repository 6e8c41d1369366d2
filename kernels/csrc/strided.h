/* Tensors that a kernel reads and writes where they lie. */
#ifndef FNATTN_STRIDED_H
#define FNATTN_STRIDED_H

#include <stdint.h>

/* A tensor [batch, head, row, width], its rows in one piece each and anywhere: `address` of the first number (0: there is no
 * such tensor), and how many numbers lie from one index to the next. */
typedef struct {
    int64_t address, batch, head, row;
} strided;
#endif
