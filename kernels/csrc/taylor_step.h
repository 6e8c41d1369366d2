/* Few positions at a time, as in generation; included once per precision by taylor.c.
 *
 * Works on the sums in their public order, row by row: each row takes in the new key and is read by the queries while it is
 * in a register. Turning a state round first would cost more than the step itself. */

#undef MOST_WIDE
#define MOST_WIDE 4

/* row[c] = from[c] + psi v1[c], and acc[r][c] += phi_r row[c] for every query head; `from` NULL means zero. */
static inline void S(step_row)(REAL *row, const REAL *from, const REAL *v1, REAL psi, REAL *acc, const REAL *phi,
                               int64_t queries, int64_t e1, int64_t ldv) {
    int64_t c = 0;
    for (; c + LANES <= e1; c += LANES) {
        VF x = psi * *(const VF *)(v1 + c);
        if (from) x += *(const VF *)(from + c);
        *(VF *)(row + c) = x;
        for (int64_t r = 0; r < queries; r++) *(VF *)(acc + r * ldv + c) += phi[r] * x;
    }
    for (; c < e1; c++) {
        REAL x = (from ? from[c] : 0) + psi * v1[c];
        row[c] = x;
        for (int64_t r = 0; r < queries; r++) acc[r * ldv + c] += phi[r] * x;
    }
}

/* Products of the features of k and q in their public order: psi of k, phi of q. */
static inline void S(step_features)(REAL *psi, REAL *phi, const REAL *k, const REAL *q, int64_t d) {
    *psi++ = 1, *phi++ = 1;
    for (int64_t i = 0; i < d; i++) psi[i] = k[i], phi[i] = q[i];
    psi += d, phi += d;
    for (int64_t i = 0; i < d; psi += d - i, phi += d - i, i++) {
        for (int64_t j = i; j < d; j++) psi[j - i] = k[i] * k[j], phi[j - i] = q[i] * q[j];
        *psi *= (REAL)0.5;
    }
}

/* As `step_row` for one query head, all features in one sweep with acc in registers: `wide` vectors and, if `odd`, one number more;
 * else the last vector ends with the row and may overlap the one before it. All of a row is read before any of it is written, so
 * `from` may be `row`. */
static inline __attribute__((always_inline)) void S(step_narrow)(REAL *row, const REAL *from, const REAL *psi, const REAL *phi,
                                                                 const REAL *v1, REAL *acc, int64_t features, int64_t e1,
                                                                 const int wide, const int odd) {
    VF sum[MOST_WIDE] = {{0}}, v[MOST_WIDE];
    REAL last = 0;
    int64_t at[MOST_WIDE];
    for (int u = 0; u < wide; u++) at[u] = odd || u < wide - 1 ? u * LANES : e1 - LANES, v[u] = *(const VF *)(v1 + at[u]);
    for (int64_t f = 0; f < features; f++, row += e1, from += e1) {
        const VF weight = (VF){0} + psi[f], read = (VF){0} + phi[f];
        VF x[MOST_WIDE];
        for (int u = 0; u < wide; u++) x[u] = weight * v[u] + *(const VF *)(from + at[u]);
        if (odd) {
            const REAL y = psi[f] * v1[e1 - 1] + from[e1 - 1];
            row[e1 - 1] = y, last += phi[f] * y;
        }
        for (int u = 0; u < wide; u++) *(VF *)(row + at[u]) = x[u], sum[u] += read * x[u];
    }
    for (int u = 0; u < wide; u++) *(VF *)(acc + at[u]) = sum[u];
    if (odd) acc[e1 - 1] = last;
}

/* One position: k [d], qs [queries][d] scaled, v1 = keep [v, 1]. */
static void S(step)(REAL *sums, const REAL *from, const REAL *k, const REAL *qs, const REAL *v1, REAL *acc, REAL *phi,
                    REAL *psi, int64_t queries, int64_t d, int64_t e1, int64_t ldv) {
    const int64_t features = 1 + d + d * (d + 1) / 2;
    const int odd = e1 % LANES == 1;
    if (queries == 1 && from && e1 >= LANES && (e1 - odd + LANES - 1) / LANES <= MOST_WIDE) {
        S(step_features)(psi, psi + features, k, qs, d);
#define NARROW_STEP(WIDE_, ODD) S(step_narrow)(sums, from, psi, psi + features, v1, acc, features, e1, WIDE_, ODD)
        switch ((e1 - odd + LANES - 1) / LANES * 2 + odd) {
            case 2: NARROW_STEP(1, 0); return;
            case 3: NARROW_STEP(1, 1); return;
            case 4: NARROW_STEP(2, 0); return;
            case 5: NARROW_STEP(2, 1); return;
            case 6: NARROW_STEP(3, 0); return;
            case 7: NARROW_STEP(3, 1); return;
            case 8: NARROW_STEP(MOST_WIDE, 0); return;
            default: NARROW_STEP(MOST_WIDE, 1); return;
        }
#undef NARROW_STEP
    }
    memset(acc, 0, (size_t)(queries * ldv) * sizeof(REAL));
    for (int64_t r = 0; r < queries; r++) phi[r] = 1;
    S(step_row)(sums, from, v1, 1, acc, phi, queries, e1, ldv);
    for (int64_t i = 0; i < d; i++) {
        int64_t at = (1 + i) * e1;
        for (int64_t r = 0; r < queries; r++) phi[r] = qs[r * d + i];
        S(step_row)(sums + at, from ? from + at : NULL, v1, k[i], acc, phi, queries, e1, ldv);
    }
    int64_t at = (1 + d) * e1;
    for (int64_t i = 0; i < d; i++)
        for (int64_t j = i; j < d; j++, at += e1) {
            for (int64_t r = 0; r < queries; r++) phi[r] = qs[r * d + i] * qs[r * d + j];
            S(step_row)(sums + at, from ? from + at : NULL, v1, k[i] * k[j] * (i == j ? (REAL)0.5 : 1), acc, phi, queries, e1,
                        ldv);
        }
}

/* acc[c] = sum_j p(q.k_j) v1[j][c] over n keys. */
static void S(step_pairs)(REAL *acc, const REAL *q, const REAL *k, const REAL *keep, const REAL *v1, int64_t n, int64_t d, int64_t e1,
                          int64_t ldv, int hard) {
    memset(acc, 0, (size_t)e1 * sizeof(REAL));
    for (int64_t j = 0; j < n; j++) {
        if (hard && keep[j] == 0) continue;
        REAL s = 0; /* in the order in which the gradient does */
        for (int64_t i = 0; i < d; i++) s += q[i] * k[j * d + i];
        s += 1;
        REAL p = (s * s + 1) * (REAL)0.5;
        for (int64_t c = 0; c < e1; c++) acc[c] += p * v1[j * ldv + c];
    }
}

/* n positions one after the other. `space` holds what step_space says. */
static inline int64_t S(step_space)(int64_t queries, int64_t d,
                                    int64_t ldv) { return queries * (ldv + d + 1) + 2 * d + ldv * CHUNK + 2 * (1 + d + d * (d + 1) / 2); }

static void S(group_steps)(REAL *space, const REAL *q, const REAL *k, const REAL *v, const REAL *keep, const REAL *sums0,
                           REAL *out,
                           REAL *den, REAL *sums, int64_t queries, int64_t n, int64_t d, int64_t e, int hard, REAL scale,
                           REAL eps) {
    int64_t ldv = (e + LANES) / LANES * LANES;
    REAL *acc = space, *qs = acc + queries * ldv, *phi = qs + queries * d, *kk = phi + queries, *v1 = kk + 2 * d, *psi = v1 + ldv * CHUNK;
    S(load_values)(v1, ldv, v, n, e, keep, hard, 0);
    for (int64_t t = 0; t < n; t++) {
        int gone = hard && keep[t] == 0;
        for (int64_t i = 0; i < d; i++) kk[i] = gone ? 0 : k[t * d + i];
        for (int64_t r = 0; r < queries; r++)
            for (int64_t i = 0; i < d; i++) qs[r * d + i] = scale * q[(r * n + t) * d + i];
        /* Nothing before: few pairs, which are fewer roundings than so many features. */
        S(step)(sums, t ? sums : sums0, kk, qs, v1 + t * ldv, acc, phi, psi, sums0 ? queries : 0, d, e + 1, ldv);
        for (int64_t r = 0; r < queries; r++) {
            REAL *row = acc + r * ldv;
            if (!sums0) S(step_pairs)(row, qs + r * d, k, keep, v1, t + 1, d, e + 1, ldv, hard);
            REAL sum = row[e], least = sum < eps ? eps : sum;
            den[r * n + t] = sum;
            for (int64_t c = 0; c < e; c++) out[(r * n + t) * e + c] = row[c] / least;
        }
    }
}
