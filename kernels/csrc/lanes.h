/* The names of one precision, and the sum over the lanes of a vector; included once per precision with PRECISION 32 or 64. */
#undef REAL
#undef S
#undef VF
#undef LANES
#if PRECISION == 32
#define REAL float
#define S(x) PASTE(fnattn_, x, _, f32)
#define VF vf32
#define LANES LANES_f32
#else
#define REAL double
#define S(x) PASTE(fnattn_, x, _, f64)
#define VF vf64
#define LANES LANES_f64
#endif
#undef PARTS
#define PARTS (VECTOR_BYTES / 16)
typedef REAL S(quarter) __attribute__((vector_size(16)));

/* Sixteen bytes at a time, which the compiler keeps in registers. */
static inline REAL S(add_lanes)(VF x) {
    union { VF whole; S(quarter) part[PARTS]; } u = {.whole = x};
#if PARTS == 4
    S(quarter) sum = (u.part[0] + u.part[2]) + (u.part[1] + u.part[3]);
#elif PARTS == 2
    S(quarter) sum = u.part[0] + u.part[1];
#else
    S(quarter) sum = u.part[0];
#endif
#if PRECISION == 32
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
#else
    return sum[0] + sum[1];
#endif
}
