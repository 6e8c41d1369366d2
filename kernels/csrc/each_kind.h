/* Includes the file EACH_KIND once per kind NUM of number that weights and caches may have: REAL itself and, beside float, bfloat16 (HALF).
 * R(name) is the name of what depends on the kind. Once per precision. */
#define HALF 0
#define NUM REAL
#define R S
#include EACH_KIND
#undef HALF
#undef NUM
#undef R
#if PRECISION == 32
#define HALF 1
#define NUM uint16_t
#define R(x) PASTE(fnattn_, x, _, bf16)
#include EACH_KIND
#undef HALF
#undef NUM
#undef R
#endif
#undef EACH_KIND
