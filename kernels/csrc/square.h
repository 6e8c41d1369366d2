/* Transposes one square of LANES x LANES, and tables made of them; included once per precision. */

/* Lane l of the exchange at distance B: the first row takes l or its partner's l - B, the second l + B or its own l. */
#define KEEP_(l, B, N) ((l) & (B) ? (N) + (l) - (B) : (l))
#define GIVE_(l, B, N) ((l) & (B) ? (N) + (l) : (l) + (B))
#define PICK2(F, a, b, B) __builtin_shufflevector(a, b, F(0, B, 2), F(1, B, 2))
#define PICK4(F, a, b, B) __builtin_shufflevector(a, b, F(0, B, 4), F(1, B, 4), F(2, B, 4), F(3, B, 4))
#define PICK8(F, a, b, B)                                                                                       \
    __builtin_shufflevector(a, b, F(0, B, 8), F(1, B, 8), F(2, B, 8), F(3, B, 8), F(4, B, 8), F(5, B, 8), F(6, B, 8), \
                            F(7, B, 8))
#define PICK16(F, a, b, B)                                                                                          \
    __builtin_shufflevector(a, b, F(0, B, 16), F(1, B, 16), F(2, B, 16), F(3, B, 16), F(4, B, 16), F(5, B, 16),     \
                            F(6, B, 16), F(7, B, 16), F(8, B, 16), F(9, B, 16), F(10, B, 16), F(11, B, 16),         \
                            F(12, B, 16), F(13, B, 16), F(14, B, 16), F(15, B, 16))
#define EXCHANGE(PICK, N, B)                                          \
    for (int i = 0; i < N; i++)                                       \
        if (!(i & B)) {                                               \
            VF a = m[i], b = m[i + B];                                \
            m[i] = PICK(KEEP_, a, b, B), m[i + B] = PICK(GIVE_, a, b, B); \
        }

static inline void S(square)(const REAL *in, int64_t ldi, REAL *out, int64_t ldo) {
#ifdef HAVE_SHUFFLE
    VF m[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) m[i] = *(const VF *)(in + i * ldi);
#if LANES == 16
#pragma GCC unroll 16
    EXCHANGE(PICK16, 16, 8)
#pragma GCC unroll 16
    EXCHANGE(PICK16, 16, 4)
#pragma GCC unroll 16
    EXCHANGE(PICK16, 16, 2)
#pragma GCC unroll 16
    EXCHANGE(PICK16, 16, 1)
#elif LANES == 8
#pragma GCC unroll 8
    EXCHANGE(PICK8, 8, 4)
#pragma GCC unroll 8
    EXCHANGE(PICK8, 8, 2)
#pragma GCC unroll 8
    EXCHANGE(PICK8, 8, 1)
#elif LANES == 4
#pragma GCC unroll 4
    EXCHANGE(PICK4, 4, 2)
#pragma GCC unroll 4
    EXCHANGE(PICK4, 4, 1)
#else
    EXCHANGE(PICK2, 2, 1)
#endif
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) *(VF *)(out + i * ldo) = m[i];
#else
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) out[i * ldo + j] = in[j * ldi + i];
#endif
}

/* to[c][i] = from[i][c] for i < rows, c < columns. */
static inline void S(turn)(REAL *to, int64_t to_row, const REAL *from, int64_t from_row, int64_t rows, int64_t columns) {
    const int64_t whole_rows = rows / LANES * LANES, whole_columns = columns / LANES * LANES;
    for (int64_t i = 0; i < whole_rows; i += LANES)
        for (int64_t c = 0; c < whole_columns; c += LANES) S(square)(from + i * from_row + c, from_row, to + c * to_row + i, to_row);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = i < whole_rows ? whole_columns : 0; c < columns; c++) to[c * to_row + i] = from[i * from_row + c];
}

#undef KEEP_
#undef GIVE_
#undef PICK2
#undef PICK4
#undef PICK8
#undef PICK16
#undef EXCHANGE
