/* h_t = sigmoid(a_t) h_{t-1} + x_t, out_t = q_t h_t, per channel and real. Included once per precision.
 *
 * Rows of c channels with any batch and row stride; results contiguous. `reverse` visits the rows from the last to the
 * first. marks [b, MARKS(n), c]: the state before every EVERY-th step, counted in the direction of travel. */

INLINE void S(simple_step)(const NUM *q, const NUM *x, const NUM *a, NUM *out, VF *h, int64_t count) {
    *h = S(sigmoid)(S(read)(a, count)) * *h + S(read)(x, count);
    S(write)(out, S(read)(q, count) * *h, count);
}

void S(simple_gate_loop)(const NUM *q, const NUM *x, const NUM *a, const REAL *h0, NUM *out, REAL *last, REAL *marks,
                         int64_t b, int64_t n, int64_t c, int64_t q_batch, int64_t q_row, int64_t x_batch, int64_t x_row,
                         int64_t a_batch, int64_t a_row, int64_t reverse, int64_t threads) {
    int64_t most = task_channels(b, c, threads, CHANNELS), blocks = (c + most - 1) / most, tasks = b * blocks;
    int64_t one = reverse ? -1 : 1, first = reverse ? n - 1 : 0;
#pragma omp parallel for num_threads((int)min64(threads, tasks)) schedule(dynamic) if (threads > 1 && tasks > 1)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t i = task / blocks, from = task % blocks * most, width = min64(most, c - from), full = width / LANES * LANES;
        unsigned mode = subnormals_off();
        VF h[VECTORS] = {{0}};
        if (h0) memcpy(h, h0 + i * c + from, (size_t)width * sizeof(REAL));
        for (int64_t s = 0; s < n; s++) {
            int64_t t = first + one * s;
            if (s % EVERY == 0) memcpy(marks + (i * MARKS(n) + s / EVERY) * c + from, h, (size_t)width * sizeof(REAL));
            const NUM *q_t = ROW(q, i, t) + from, *x_t = ROW(x, i, t) + from, *a_t = ROW(a, i, t) + from;
            NUM *out_t = out + (i * n + t) * c + from;
#define CALL(count)                                                                                                   \
    (__builtin_prefetch(q_t + one * AHEAD * q_row + j), __builtin_prefetch(x_t + one * AHEAD * x_row + j),            \
     __builtin_prefetch(a_t + one * AHEAD * a_row + j), S(simple_step)(q_t + j, x_t + j, a_t + j, out_t + j, h + j / LANES, count))
            STEP(full, width, CALL);
#undef CALL
        }
        memcpy(last + i * c + from, h, (size_t)width * sizeof(REAL));
        subnormals_back(mode);
    }
}

INLINE void S(simple_again)(const NUM *x, const NUM *a, VF *h, VF *gates, VF *states, int64_t count) {
    *gates = S(sigmoid)(S(read)(a, count));
    *states = *h = *gates * *h + S(read)(x, count);
}

/* `carry` is the gradient of the state that leaves a step: what later steps add to it. */
INLINE void S(simple_back)(const NUM *q, const NUM *g, const VF *gates, const VF *states, const VF *before, VF *carry, NUM *dq,
                           NUM *dx, NUM *da, int64_t count) {
    VF g_t = g ? S(read)(g, count) : S(all)(0), gate = *gates;
    VF dh = S(read)(q, count) * g_t + *carry;
    S(write)(dq, g_t * *states, count);
    S(write)(dx, dh, count);
    S(write)(da, dh * *before * gate * ((REAL)1 - gate), count);
    *carry = gate * dh;
}

/* g [b, n, c] and g_last [b, c] may be NULL: zeros. */
void S(simple_gate_loop_backward)(const NUM *q, const NUM *x, const NUM *a, const REAL *marks, const NUM *g,
                                  const REAL *g_last, NUM *dq, NUM *dx, NUM *da, REAL *dh0, int64_t b, int64_t n, int64_t c,
                                  int64_t q_batch, int64_t q_row, int64_t x_batch, int64_t x_row, int64_t a_batch,
                                  int64_t a_row, int64_t g_batch, int64_t g_row, int64_t reverse, int64_t threads) {
    int64_t most = task_channels(b, c, threads, CHANNELS), blocks = (c + most - 1) / most, tasks = b * blocks;
    int64_t segments = (n + EVERY - 1) / EVERY;
    int64_t one = reverse ? -1 : 1, first = reverse ? n - 1 : 0;
#pragma omp parallel num_threads((int)min64(threads, tasks)) if (threads > 1 && tasks > 1)
    {
        VF *gates = scratch(sizeof(VF) * VECTORS * (2 * EVERY + 1)), *states = gates + VECTORS * EVERY; /* states[0]: the mark */
        if (!gates) abort();
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t i = task / blocks, from = task % blocks * most, width = min64(most, c - from);
            int64_t full = width / LANES * LANES;
            unsigned mode = subnormals_off();
            VF carry[VECTORS] = {{0}}, h[VECTORS] = {{0}};
            if (g_last) memcpy(carry, g_last + i * c + from, (size_t)width * sizeof(REAL));
            for (int64_t segment = segments - 1; segment >= 0; segment--) {
                int64_t start = segment * EVERY, steps = min64(EVERY, n - start);
                memcpy(h, marks + (i * MARKS(n) + segment) * c + from, (size_t)width * sizeof(REAL));
                memcpy(states, h, sizeof h);
                for (int64_t s = 0; s < steps; s++) {
                    int64_t t = first + one * (start + s);
                    const NUM *x_t = ROW(x, i, t) + from, *a_t = ROW(a, i, t) + from;
                    VF *gates_t = gates + s * VECTORS, *states_t = states + (s + 1) * VECTORS;
#define CALL(count)                                                                                             \
    (__builtin_prefetch(x_t + one * AHEAD * x_row + j), __builtin_prefetch(a_t + one * AHEAD * a_row + j),      \
     S(simple_again)(x_t + j, a_t + j, h + j / LANES, gates_t + j / LANES, states_t + j / LANES, count))
                    STEP(full, width, CALL);
#undef CALL
                }
                for (int64_t s = steps - 1; s >= 0; s--) {
                    int64_t t = first + one * (start + s), at = (i * n + t) * c + from;
                    const NUM *q_t = ROW(q, i, t) + from, *g_t = g ? ROW(g, i, t) + from : NULL;
                    const VF *gates_t = gates + s * VECTORS, *before = states + s * VECTORS, *states_t = before + VECTORS;
#define CALL(count)                                                                                                      \
    (__builtin_prefetch(q_t - one * AHEAD * q_row + j), __builtin_prefetch(g_t ? g_t - one * AHEAD * g_row + j : q_t),   \
     S(simple_back)(q_t + j, g_t ? g_t + j : g_t, gates_t + j / LANES, states_t + j / LANES, before + j / LANES,         \
                    carry + j / LANES, dq + at + j, dx + at + j, da + at + j, count))
                    STEP(full, width, CALL);
#undef CALL
                }
            }
            memcpy(dh0 + i * c + from, carry, (size_t)width * sizeof(REAL));
            subnormals_back(mode);
        }
        free(gates);
    }
}
