/* More threads than heads: a causal sequence in parts, each with the state of what is before it (for gradients, behind it too).
 * Included once per precision by taylor.c.
 *
 * First every part's own sum, then their running sums, then the parts as sequences of their own with carried sums. That makes
 * the states twice, so it is done only where threads would be idle; a part is at least SPLIT_FROM positions long. */
#define SPLIT_FROM 256

typedef struct {
    const REAL *q, *k, *v, *keep, *sums0, *out, *den, *grad, *grad_sums;
    int64_t b, h, g, n, d, e;
    int hard;
    REAL scale, eps;
    int64_t threads;
} S(inputs);

static int64_t S(parts)(int64_t threads, int64_t groups, int64_t n) { return groups ? min64(threads / groups, n / SPLIT_FROM) : 1; }

/* Where part p of so many begins: a whole number of chunks. */
static int64_t S(part_start)(int64_t p, int64_t parts, int64_t n) { return p == parts ? n : n * p / parts / CHUNK * CHUNK; }

/* sum[p] becomes what is before part p: `first` (NULL: nothing) and the sums of the parts 0 .. p-1, of `pieces` pieces each. */
static void S(running_sums)(REAL *sum, const REAL *first, int64_t parts, int64_t pieces, int64_t entries) {
    for (int64_t i = 0; i < entries; i++) {
        REAL total = first ? first[i] : 0;
        for (int64_t p = 0; p < parts; p++) {
            REAL own = 0;
            for (int64_t x = 0; x < pieces && p < parts - 1; x++) own += sum[(p * pieces + x) * entries + i];
            sum[p * pieces * entries + i] = total;
            total += own;
        }
    }
}

static int S(split_forward)(const S(inputs) *a, REAL *out, REAL *den, REAL *sums, int64_t parts, int64_t near) {
    int64_t d = a->d, e = a->e, n = a->n, groups = a->b * a->g, queries = a->h / a->g, entries = (1 + d + d * (d + 1) / 2) * (e + 1);
    int64_t pieces = parts == 2 ? 2 : 1; /* both threads work on the first half's sum */
    int64_t tasks = groups * parts * pieces;
    REAL *starts = scratch((size_t)(tasks * entries) * sizeof(REAL));
    if (!starts) return 1;
    int failed = 0;
#pragma omp parallel num_threads((int)a->threads)
    {
        S(work) w;
        int bad = S(work_new)(&w, d, e, FORWARD, n);
        if (bad) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t i = task / (parts * pieces), x = task % (parts * pieces), p = x / pieces;
            if (bad || p == parts - 1) continue;
            int64_t from = S(part_start)(x, parts * pieces, n), size = S(part_start)(x + 1, parts * pieces, n) - from, at = i * n + from;
            S(group_forward)(&w, NULL, a->k + at * d, a->v + at * e, a->keep ? a->keep + i / a->g * n + from : NULL, NULL, NULL, NULL,
                             starts + task * entries, 0, n, size, e, 0, a->hard, 1, a->scale, a->eps);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < groups; i++)
            S(running_sums)(starts + i * parts * pieces * entries, AT(a->sums0, i * entries), parts, pieces, entries);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < groups * parts; task++) {
            int64_t i = task / parts, p = task % parts, from = S(part_start)(p * pieces, parts * pieces, n);
            int64_t size = S(part_start)((p + 1) * pieces, parts * pieces, n) - from, at = i * n + from, row = i * queries * n + from;
            if (bad) continue;
            S(group_forward)(&w, a->q + row * d, a->k + at * d, a->v + at * e, a->keep ? a->keep + i / a->g * n + from : NULL,
                             p ? starts + task * pieces * entries : AT(a->sums0, i * entries), out + row * e, den + row,
                             p == parts - 1 ? sums + i * entries : NULL, queries, n, size, e, near, a->hard, 1, a->scale, a->eps);
        }
        if (!bad) free(w.memory);
    }
    free(starts);
    return failed;
}
