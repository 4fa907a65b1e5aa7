/* Rows looked up, merged and updated in one pass over memory; shardemb/native.py compiles this file and says what goes in.
 *
 * The rows of a large table are in no cache, so a step is bound by how many of them are on their way from memory at once:
 * each loop asks for the row AHEAD of the one it works on. */
#include <float.h>
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define AHEAD 8  /* rows */
#define DIGIT 11 /* bits sorted in a pass: 2048 counters stay in the first cache */

enum { SGD, ADAGRAD, ROWWISE_ADAGRAD, ADAM, ROWWISE_ADAM };

static inline void ask_to_read(const void *row, int64_t bytes) {
    for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch((const char *)row + k, 0);
}

static inline void ask_to_write(const void *row, int64_t bytes) {
    for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch((const char *)row + k, 1);
}

void gather(const char *table, int64_t bytes, const int64_t *rows, int64_t begin, int64_t end, char *out) {
    for (int64_t i = begin; i < end; i++) {
        if (i + AHEAD < end) ask_to_read(table + rows[i + AHEAD] * bytes, bytes);
        memcpy(out + i * bytes, table + rows[i] * bytes, bytes);
    }
}

void scatter(char *table, int64_t bytes, const int64_t *rows, int64_t begin, int64_t end, const char *in) {
    for (int64_t i = begin; i < end; i++) {
        if (i + AHEAD < end) ask_to_write(table + rows[i + AHEAD] * bytes, bytes);
        memcpy(table + rows[i] * bytes, in + i * bytes, bytes);
    }
}

/* A stable radix sort, low digits first; rows lie below num_rows, so that few passes do. The places of unique[u] in rows are
 * order[starts[u]] to order[starts[u + 1] - 1]; inverse[i] is the u of rows[i]. Returns how many are unique, -1 for no memory,
 * -2 for a row out of range. */
int64_t merge(const int64_t *rows, int64_t n, int64_t num_rows, int64_t *order, int64_t *unique, int64_t *starts,
              int64_t *inverse) {
    for (int64_t i = 0; i < n; i++)
        if (rows[i] < 0 || rows[i] >= num_rows) return -2;
    int64_t *scratch = malloc((4 * n + 1) * sizeof(int64_t));
    if (!scratch) return -1;
    int64_t *key = scratch, *place = key + n, *next_key = place + n, *next_place = next_key + n, *swap;
    memcpy(key, rows, n * sizeof(int64_t));
    for (int64_t i = 0; i < n; i++) place[i] = i;
    for (int shift = 0; shift < 63 && (num_rows - 1) >> shift > 0; shift += DIGIT) {
        int64_t to[1 << DIGIT] = {0}, total = 0;
        for (int64_t i = 0; i < n; i++) to[(key[i] >> shift) & ((1 << DIGIT) - 1)]++;
        for (int digit = 0; digit < 1 << DIGIT; digit++) {
            int64_t count = to[digit];
            to[digit] = total;
            total += count;
        }
        for (int64_t i = 0; i < n; i++) {
            int64_t at = to[(key[i] >> shift) & ((1 << DIGIT) - 1)]++;
            next_key[at] = key[i];
            next_place[at] = place[i];
        }
        swap = key, key = next_key, next_key = swap;
        swap = place, place = next_place, next_place = swap;
    }
    int64_t u = -1;
    for (int64_t i = 0; i < n; i++) {
        if (i == 0 || key[i] != key[i - 1]) {
            unique[++u] = key[i];
            starts[u] = i;
        }
        order[i] = place[i];
        inverse[place[i]] = u;
    }
    starts[++u] = n;
    free(scratch);
    return u;
}

/* The gradients of one row, added up in the order in which they came; `merged` is where, if there are several. */
static inline const float *sum_of(const float *grad, int64_t dim, const int64_t *order, int64_t begin, int64_t end,
                                  float *merged) {
    if (end - begin == 1) return grad + order[begin] * dim;
    memcpy(merged, grad + order[begin] * dim, dim * sizeof(float));
    for (int64_t i = begin + 1; i < end; i++) {
        if (i + AHEAD < end) ask_to_read(grad + order[i + AHEAD] * dim, dim * sizeof(float));
        const float *other = grad + order[i] * dim;
        for (int64_t k = 0; k < dim; k++) merged[k] += other[k];
    }
    return merged;
}

void sum_rows(const float *grad, int64_t dim, const int64_t *order, const int64_t *starts, int64_t begin, int64_t end,
              float *out) {
    for (int64_t u = begin; u < end; u++) {
        if (u + AHEAD < end) ask_to_read(grad + order[starts[u + AHEAD]] * dim, dim * sizeof(float));
        const float *g = sum_of(grad, dim, order, starts[u], starts[u + 1], out + u * dim);
        if (g != out + u * dim) memcpy(out + u * dim, g, dim * sizeof(float));
    }
}

static inline float sum_of_squares(const float *x, int64_t dim) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t k = 0; k < dim; k++) total += x[k] * x[k];
    return total;
}

static inline float mean_square(const float *g, int64_t dim) { return dim ? sum_of_squares(g, dim) / dim : 0; }

/* torch.nn.functional.normalize of one row; NaN stays NaN. */
static inline void make_unit(float *w, int64_t dim) {
    const float norm = sqrtf(sum_of_squares(w, dim)), length = norm < 1e-12f ? 1e-12f : norm;
    for (int64_t k = 0; k < dim; k++) w[k] /= length;
}

void make_units(float *weight, int64_t dim, const int64_t *rows, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
        if (i + AHEAD < end) ask_to_write(weight + rows[i + AHEAD] * dim, dim * sizeof(float));
        make_unit(weight + rows[i] * dim, dim);
    }
}

/* For each unique row from begin to end: add its gradients up, decay, update, make it a unit vector if `unit`; `out`, if given,
 * gets a copy of the new rows. */
void update(int rule, float *weight, float *first, float *second, int64_t dim, const float *grad, const int64_t *order,
            const int64_t *unique, const int64_t *starts, int64_t begin, int64_t end, float lr, float eps, float keep,
            float new1, float new2, int unit, float *merged, float *out) {
    const int64_t bytes = dim * sizeof(float);
    const int64_t wide1 = rule == ADAGRAD || rule == ADAM || rule == ROWWISE_ADAM ? bytes : rule == ROWWISE_ADAGRAD ? 4 : 0;
    const int64_t wide2 = rule == ADAM ? bytes : rule == ROWWISE_ADAM ? 4 : 0;
    for (int64_t u = begin; u < end; u++) {
        if (u + AHEAD < end) {
            const int64_t next = unique[u + AHEAD];
            ask_to_read(grad + order[starts[u + AHEAD]] * dim, bytes);
            ask_to_write(weight + next * dim, bytes);
            ask_to_write((char *)first + next * wide1, wide1);
            ask_to_write((char *)second + next * wide2, wide2);
        }
        const float *restrict g = sum_of(grad, dim, order, starts[u], starts[u + 1], merged);
        float *restrict w = weight + unique[u] * dim;
        float *restrict a = (float *)((char *)first + unique[u] * wide1);
        float *restrict b = (float *)((char *)second + unique[u] * wide2);
        if (keep != 1)
            for (int64_t k = 0; k < dim; k++) w[k] *= keep;
        if (rule == SGD) {
            for (int64_t k = 0; k < dim; k++) w[k] -= lr * g[k];
        } else if (rule == ADAGRAD) {
            for (int64_t k = 0; k < dim; k++) {
                a[k] += g[k] * g[k];
                w[k] -= lr * g[k] / (sqrtf(a[k]) + eps);
            }
        } else if (rule == ROWWISE_ADAGRAD) {
            *a += mean_square(g, dim);
            const float rate = lr / (sqrtf(*a) + eps);
            for (int64_t k = 0; k < dim; k++) w[k] -= rate * g[k];
        } else if (rule == ADAM) {
            for (int64_t k = 0; k < dim; k++) {
                a[k] += new1 * (g[k] - a[k]);
                b[k] += new2 * (g[k] * g[k] - b[k]);
                w[k] -= lr * a[k] / (sqrtf(b[k]) + eps);
            }
        } else {
            *b += new2 * (mean_square(g, dim) - *b);
            const float rate = lr / (sqrtf(*b) + eps);
            for (int64_t k = 0; k < dim; k++) {
                a[k] += new1 * (g[k] - a[k]);
                w[k] -= rate * a[k];
            }
        }
        if (unit) make_unit(w, dim);
        if (out) memcpy(out + (u - begin) * dim, w, bytes);
    }
}

/* Of each row from begin to end, `width` scores apart, of which n count: how many are above and equal to its true score, and
 * how many are finite; added to out's three lines of `rows` numbers. */
void count_better(const float *scores, int64_t width, int64_t n, const float *truth, int64_t rows, int64_t begin, int64_t end,
                  int64_t *out) {
    for (int64_t i = begin; i < end; i++) {
        const float *s = scores + i * width, t = truth[i];
        int32_t better = 0, equal = 0, finite = 0;
#pragma omp simd reduction(+ : better, equal, finite)
        for (int64_t k = 0; k < n; k++) {
            better += s[k] > t;
            equal += s[k] == t;
            finite += fabsf(s[k]) <= FLT_MAX;
        }
        out[i] += better;
        out[rows + i] += equal;
        out[2 * rows + i] += finite;
    }
}

#define LANES 8
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t bits __attribute__((vector_size(4 * LANES)));

/* |d| or d^2, added to sum. */
static inline lanes add_lanes(lanes sum, lanes d, int absolute) {
    return absolute ? sum + (lanes)((bits)d & 0x7fffffff) : sum + d * d;
}

/* Distances of the queries from begin to end to n rows: of absolute values, or else of squares under a root. Four queries and two
 * rows at a time, the last ones several times over: all pairs are summed up in the same order, so equal rows are equally far. */
void distances(const float *query, const float *rows, int64_t dim, int64_t n, int absolute, int64_t begin, int64_t end,
               float *out) {
    const int64_t block = dim < 128 ? 64 : 8192 / (dim + 1) + 2, whole = dim / LANES * LANES;
    for (int64_t first = 0; first < n; first += block) /* as many rows as stay in the first cache */
        for (int64_t i = begin; i < end; i += 4)
            for (int64_t j = first; j < first + block && j < n; j += 2) {
                const float *q[4], *r[2];
                for (int a = 0; a < 4; a++) q[a] = query + (i + a < end ? i + a : end - 1) * dim;
                for (int b = 0; b < 2; b++) r[b] = rows + (j + b < n ? j + b : n - 1) * dim;
                lanes sum[4][2] = {0};
                for (int64_t k = 0; k < whole; k += LANES)
                    for (int a = 0; a < 4; a++)
                        for (int b = 0; b < 2; b++)
                            sum[a][b] = add_lanes(sum[a][b], *(const loose *)(q[a] + k) - *(const loose *)(r[b] + k), absolute);
                for (int a = 0; a < 4 && i + a < end; a++)
                    for (int b = 0; b < 2 && j + b < n; b++) {
                        float total = 0;
                        for (int lane = 0; lane < LANES; lane++) total += sum[a][b][lane];
                        for (int64_t k = whole; k < dim; k++) {
                            const float d = q[a][k] - r[b][k];
                            total += absolute ? fabsf(d) : d * d;
                        }
                        out[(i + a) * n + j + b] = absolute ? total : sqrtf(total);
                    }
            }
}

/* Flags in memory that several processes share: what was written before a flag was raised is there for who sees it raised. */
void raise_flag(int64_t *flag, int64_t value) { __atomic_store_n(flag, value, __ATOMIC_RELEASE); }

/* Waits, awake for the first part of the time, until all flags have reached a value; returns how many have, in order. */
int64_t flags_raised(int64_t *const *flags, int64_t n, int64_t value, int64_t awake_ns, int64_t limit_ns) {
    struct timespec start = {0}, now, nap = {0, 25000};
    for (int64_t i = 0; i < n; i++)
        while (__atomic_load_n(flags[i], __ATOMIC_ACQUIRE) < value) {
            if (!limit_ns) return i;
            clock_gettime(CLOCK_MONOTONIC, &now);
            if (!start.tv_sec) start = now;
            int64_t waited = (now.tv_sec - start.tv_sec) * 1000000000 + now.tv_nsec - start.tv_nsec;
            if (waited > limit_ns) return i;
            if (waited < awake_ns) sched_yield();
            else {
                nap.tv_nsec = waited < 10000000 ? 25000 : 1000000;
                nanosleep(&nap, 0);
            }
        }
    return n;
}
