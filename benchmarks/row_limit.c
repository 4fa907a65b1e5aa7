/* What the memory allows: how long one thread takes to copy, and then to update, random rows of a table.
 *
 *     cc -O3 -march=native row_limit.c -o row_limit
 *     ./row_limit ROWS DIM IDS REPETITIONS [FILE]
 *
 * A training step reads the rows that it looks up and, later, reads and writes them again. This program does that and
 * nothing else: for each batch of IDS ids it copies the rows to a contiguous array, then does w -= lr * g on the same rows.
 * Rows are prefetched AHEAD rows before their turn, since the processor cannot guess a random address. The table lies once
 * in pages of 4 KiB and once, where the kernel gives them, in huge pages, which spare most of the address translation.
 *
 * Every repetition takes other ids, so that none finds its rows in cache: uniform ones, or the next IDS of FILE, which holds
 * REPETITIONS * IDS native int64. Times are the thread's CPU time; one line of JSON has the medians, in ns per row.
 */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { AHEAD = 8, LINE = 64, HUGE_PAGE = 2 << 20 };

static void die(const char *what) {
    fprintf(stderr, "row_limit: %s: %s\n", what, errno ? strerror(errno) : "not what was expected");
    exit(1);
}

static double cpu_seconds(void) {
    struct timespec t;
    if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t)) die("clock_gettime");
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static size_t number(const char *text) {
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    if (errno || *end || value < 1 || value > 1LL << 40) die(text);
    return (size_t)value;
}

/* Memory that has been written once: a first touch would be measured as page faults. */
static float *filled(size_t count, float value) {
    float *memory = aligned_alloc(LINE, (count * sizeof(float) + LINE - 1) / LINE * LINE);
    if (!memory) die("aligned_alloc");
    for (size_t i = 0; i < count; i++) memory[i] = value;
    return memory;
}

static int64_t *draw_ids(size_t rows, size_t count, const char *path) {
    int64_t *ids = malloc(count * sizeof *ids);
    if (!ids) die("malloc");
    if (path) {
        FILE *file = fopen(path, "rb");
        if (!file) die(path);
        if (fread(ids, sizeof *ids, count, file) != count) die(path);
        fclose(file);
    }
    uint64_t state = 88172645463325252ULL; /* Marsaglia's xorshift */
    for (size_t i = 0; i < count; i++) {
        if (!path) {
            state ^= state << 13, state ^= state >> 7, state ^= state << 17;
            ids[i] = (int64_t)(state % rows);
        }
        if (ids[i] < 0 || (size_t)ids[i] >= rows) die("an id is out of range");
    }
    return ids;
}

static inline void prefetch_row(const float *row, size_t dim) {
    for (size_t k = 0; k < dim; k += LINE / sizeof *row) __builtin_prefetch(row + k);
}

static void copy_rows(const float *table, const int64_t *ids, size_t n, size_t dim, float *restrict out) {
    for (size_t i = 0; i < n; i++) {
        if (i + AHEAD < n) prefetch_row(table + (size_t)ids[i + AHEAD] * dim, dim);
        memcpy(out + i * dim, table + (size_t)ids[i] * dim, dim * sizeof *out);
    }
}

static void update_rows(float *table, const int64_t *ids, size_t n, size_t dim, const float *restrict grad) {
    for (size_t i = 0; i < n; i++) {
        if (i + AHEAD < n) prefetch_row(table + (size_t)ids[i + AHEAD] * dim, dim);
        float *restrict row = table + (size_t)ids[i] * dim;
        for (size_t k = 0; k < dim; k++) row[k] -= 0.01f * grad[i * dim + k];
    }
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, size_t n) {
    qsort(values, n, sizeof *values, ascending);
    return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

int main(int argc, char **argv) {
    if (argc < 5 || argc > 6) {
        fprintf(stderr, "usage: row_limit ROWS DIM IDS REPETITIONS [FILE]\n");
        return 2;
    }
    size_t rows = number(argv[1]), dim = number(argv[2]), n = number(argv[3]), repetitions = number(argv[4]);
    int64_t *ids = draw_ids(rows, n * repetitions, argc > 5 ? argv[5] : NULL);
    float *out = filled(n * dim, 0.0f), *grad = filled(n * dim, 0.5f);
    double *copy = malloc(repetitions * sizeof *copy), *update = malloc(repetitions * sizeof *update);
    if (!copy || !update) die("malloc");

    size_t bytes = rows * dim * sizeof(float);
    double best = 0;
    printf("{\"rows\": %zu, \"dim\": %zu, \"ids\": %zu, \"repetitions\": %zu", rows, dim, n, repetitions);
    for (int huge = 0; huge < 2; huge++) {
        char *mapped = mmap(NULL, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) die("mmap");
        float *table = (float *)(((uintptr_t)mapped + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1));
        if (madvise(table, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) && errno != EINVAL)
            die("madvise"); /* EINVAL: a kernel without huge pages has small ones either way */
        for (size_t i = 0; i < rows * dim; i++) table[i] = 1.0f;

        for (size_t r = 0; r < repetitions; r++) {
            double start = cpu_seconds();
            copy_rows(table, ids + r * n, n, dim, out);
            double between = cpu_seconds();
            update_rows(table, ids + r * n, n, dim, grad);
            copy[r] = between - start, update[r] = cpu_seconds() - between;
        }
        volatile float sink = out[n * dim - 1] + table[0]; /* so that no pass is left out */
        (void)sink;
        double c = 1e9 * median(copy, repetitions) / (double)n, u = 1e9 * median(update, repetitions) / (double)n;
        printf(", \"%s\": {\"copy_ns\": %.2f, \"update_ns\": %.2f}", huge ? "huge_pages" : "small_pages", c, u);
        if (!huge || c + u < best) best = c + u;
        if (munmap(mapped, bytes + HUGE_PAGE)) die("munmap");
    }
    printf(", \"step_ns\": %.2f}\n", best);
    free(ids), free(out), free(grad), free(copy), free(update);
    return 0;
}
