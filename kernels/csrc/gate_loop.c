/* The gated loops: real gates per channel (simple), complex gates per channel (narrow), complex gates per head (wide).
 * Those per channel also take rows of bfloat16. */
#include "common.h"

#ifndef REAL
#define REAL float
#define NUM float
#define HALF 0
#define S(x) PASTE(fnattn_, x, _, f32)
#define VF vf32
#define LANES LANES_f32
#define WIDE 0
#include "gate_loop.c"
#undef REAL
#undef NUM
#undef S
#undef VF
#undef VI
#undef INT
#undef LANES
#undef WIDE
#define REAL double
#define NUM double
#define S(x) PASTE(fnattn_, x, _, f64)
#define VF vf64
#define LANES LANES_f64
#define WIDE 1
#include "gate_loop.c"
#undef REAL
#undef NUM
#undef S
#undef VF
#undef VI
#undef INT
#undef LANES
#undef WIDE
#undef HALF
#define REAL float
#define NUM uint16_t
#define HALF 1
#define S(x) PASTE(fnattn_, x, _, bf16)
#define VF vf32
#define LANES LANES_f32
#define WIDE 0
#include "gate_loop.c"
#else
#include "gate_lanes.h"
#include "gate_rows.h"

#ifndef GATE_LOOP_ONCE
#define GATE_LOOP_ONCE
#define CHANNELS 512 /* channels of one task: rows stream through the first cache, 32 of them fit the second */
#define EVERY 32     /* steps between the saved states from which the backward pass starts again */
/* Rows of saved states: enough, and never 1, so that a tracer need not treat short sequences apart. */
#define MARKS(n) ((n) / EVERY + 2)
/* Rows to prefetch: so few that they wait in the first cache, which is smaller where vectors are, beside the states. */
#define AHEAD (VECTOR_BYTES == 64 ? 6 : 3)
#define VECTORS (CHANNELS / LANES)

/* One operand with its strides, in numbers: batch and row. The channels of a row lie side by side. */
#define ROW(x, i, t) ((x) + (i) * x##_batch + (t) * x##_row)
#define STEP(full, width, call)                               \
    do {                                                      \
        for (int64_t j = 0; j < (full); j += LANES) call(LANES); \
        if ((full) < (width)) {                               \
            int64_t j = (full);                               \
            call(((width) - j));                              \
        }                                                     \
    } while (0)
#endif

#include "gate_loop_simple.h"
#include "gate_loop_narrow.h"
#if !HALF
#include "tiles.h"
#include "gate_loop_wide.h"
#include "gate_loop_wide_backward.h"
#include "gate_loop_tangent.h"
#include "gate_loop_narrow_hessian.h"
#include "gate_loop_wide_hessian.h"
#endif
#endif
