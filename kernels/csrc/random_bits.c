/* Counter-based random numbers: Threefry-2x32 with 20 rounds, a pure function of (key, index).
 *
 * Word i of a key is threefry(key, (high half of i, low half of i)), so any part can be made on any thread, in any order,
 * and the result does not depend on their number. Keys are pairs of 32-bit words held in int64. */
#include "common.h"

typedef uint32_t vu32 __attribute__((vector_size(VECTOR_BYTES)));
#define LANES (VECTOR_BYTES / 4)
#define PARALLEL_FROM (1 << 16) /* words; below this a parallel region costs more than it saves */

#define ROTATE(x, r) (((x) << (r)) | ((x) >> (32 - (r))))
#define ROUND(r) x0 += x1, x1 = ROTATE(x1, r) ^ x0
#define FOUR(a, b, c, d) ROUND(a), ROUND(b), ROUND(c), ROUND(d)
#define ROUNDS                                                     \
    x0 += k0, x1 += k1;                                            \
    FOUR(13, 15, 26, 6), x0 += k1, x1 += k2 + 1u;                  \
    FOUR(17, 29, 16, 24), x0 += k2, x1 += k0 + 2u;                 \
    FOUR(13, 15, 26, 6), x0 += k0, x1 += k1 + 3u;                  \
    FOUR(17, 29, 16, 24), x0 += k1, x1 += k2 + 4u;                 \
    FOUR(13, 15, 26, 6), x0 += k2, x1 += k0 + 5u

typedef struct {
    uint32_t k0, k1, k2;
} Key;

static inline Key read_key(const int64_t *key) {
    Key k = {(uint32_t)key[0], (uint32_t)key[1], 0};
    k.k2 = k.k0 ^ k.k1 ^ 0x1BD11BDAu;
    return k;
}

/* The two words of each index first .. first+LANES-1; first is a multiple of LANES, so the high half is one number. */
static inline void words(Key key, uint64_t first, uint32_t *a, uint32_t *b) {
    const uint32_t k0 = key.k0, k1 = key.k1, k2 = key.k2;
    vu32 x0 = (vu32){0} + (uint32_t)(first >> 32), x1 = (vu32){0} + (uint32_t)first;
    for (int i = 0; i < LANES; i++) x1[i] += (uint32_t)i;
    ROUNDS;
    memcpy(a, &x0, sizeof x0);
    memcpy(b, &x1, sizeof x1);
}

/* Calls STORE(index within the key's row, word a, word b) for every number of every row. */
#define FILL(TYPE, WIDTH, STORE)                                                                        \
    const int64_t blocks = (n + LANES - 1) / LANES;                                                     \
    _Pragma("omp parallel for num_threads(threads) schedule(static) if(batch * n >= PARALLEL_FROM)")    \
    for (int64_t t = 0; t < batch * blocks; t++) {                                                      \
        const int64_t row = t / blocks, first = (t % blocks) * LANES, count = min64(LANES, n - first);  \
        uint32_t a[LANES], b[LANES];                                                                    \
        TYPE tile[LANES * WIDTH];                                                                       \
        words(read_key(keys + 2 * row), (uint64_t)first, a, b);                                         \
        for (int i = 0; i < LANES; i++) { STORE; }                                                      \
        memcpy(out + (row * n + first) * WIDTH, tile, (size_t)(count * WIDTH) * sizeof(TYPE));          \
    }

/* out [batch, n]: numbers in [0, 2^32). */
void fnattn_random_bits(const int64_t *keys, int64_t *out, int64_t batch, int64_t n, int threads) {
    FILL(int64_t, 1, tile[i] = (int64_t)(a[i] ^ b[i]))
}

/* out [batch, n, 2]: both words; as keys they are the children of a split. */
void fnattn_random_pairs(const int64_t *keys, int64_t *out, int64_t batch, int64_t n, int threads) {
    FILL(int64_t, 2, (tile[2 * i] = (int64_t)a[i], tile[2 * i + 1] = (int64_t)b[i]))
}

/* out [batch, n]: 23 random bits times 2^-23, in [0, 1). */
void fnattn_random_unit_f32(const int64_t *keys, float *out, int64_t batch, int64_t n, int threads) {
    FILL(float, 1, tile[i] = (float)(int32_t)((a[i] ^ b[i]) >> 9) * 0x1p-23f)
}

/* out [batch, n]: 52 random bits times 2^-52, in [0, 1). */
void fnattn_random_unit_f64(const int64_t *keys, double *out, int64_t batch, int64_t n, int threads) {
    FILL(double, 1, tile[i] = (double)(int64_t)(((uint64_t)a[i] << 32 | b[i]) >> 12) * 0x1p-52)
}

/* out [batch, 2]: the words of one index per key. */
void fnattn_random_fold(const int64_t *keys, const int64_t *data, int64_t *out, int64_t batch) {
    for (int64_t row = 0; row < batch; row++) {
        const Key key = read_key(keys + 2 * row);
        const uint32_t k0 = key.k0, k1 = key.k1, k2 = key.k2;
        uint32_t x0 = 0, x1 = (uint32_t)data[row];
        ROUNDS;
        out[2 * row] = x0;
        out[2 * row + 1] = x1;
    }
}
