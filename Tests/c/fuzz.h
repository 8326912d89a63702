/* What fuzz.c is built from: a seeded generator, buffers that notice writes beyond their end, values that are likely to be wrong. */
#ifndef LPLB_TESTS_FUZZ_H
#define LPLB_TESTS_FUZZ_H

#include <inttypes.h>
#include <lplb.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t seed, state, iteration;

/* Ends the run, saying how to repeat it. */
static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    printf("fuzz: seed %" PRIu64 ", iteration %" PRIu64 ": ", seed, iteration);
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
    fflush(stdout);
    exit(1);
}

static uint64_t next(void) { /* splitmix64 */
    uint64_t z = (state += UINT64_C(0x9E3779B97F4A7C15));
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

static int64_t below(int64_t n) { return (int64_t)(next() % (uint64_t)n); }
static int chance(int one_in) { return below(one_in) == 0; }

/* A size that is not `right`: near it, negative, zero or enormous, but never between "small" and "beyond every limit", so that a call
   that accepts it after all finds its buffers in place. */
static int64_t wrong(int64_t right) {
    const int64_t values[] = {-1, 0, 1, right - 1, right + 1, 2 * right, -right, INT32_MIN, INT64_MIN, INT64_MIN + 1, INT64_MAX,
                              INT64_MAX - 1, INT64_C(1) << 33, INT64_C(1) << 40, INT64_C(1) << 62, -(INT64_C(1) << 32)};
    int64_t value;
    do value = values[below((int64_t)(sizeof values / sizeof *values))];
    while (value == right);
    return value;
}

/* A struct_size that no version of the struct has; twice the right one might be a later version's. */
static int64_t wrong_size(int64_t right) {
    int64_t value;
    do value = wrong(right);
    while (value == 2 * right);
    return value;
}

/* Buffers of exactly the size asked for, filled with random bytes. The address sanitizer sees any access beyond the end; without it a
   guard behind the end shows writes. Sizes that no call may accept get one element. */
#if defined(__SANITIZE_ADDRESS__)
#define GUARD 0
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define GUARD 0
#endif
#endif
#ifndef GUARD
#define GUARD 64
#endif

enum { MAX_BUFFERS = 16 };
static struct { unsigned char *memory; size_t size; } buffers[MAX_BUFFERS];
static int n_buffers;

static void *make(int64_t count, size_t element) {
    if (count < 0 || count > 1 << 20) count = 1;
    size_t size = (size_t)count * element;
    unsigned char *memory = malloc(size + GUARD + (size == 0));
    if (memory == NULL || n_buffers == MAX_BUFFERS) fail("no memory for the test itself");
    for (size_t i = 0; i < size; i += 8) {
        uint64_t word = next();
        memcpy(memory + i, &word, size - i < 8 ? size - i : 8);
    }
    memset(memory + size, 0xA5, GUARD);
    buffers[n_buffers].memory = memory;
    buffers[n_buffers++].size = size;
    return memory;
}

/* Frees all buffers of the call that is over. */
static void drop(const char *call) {
    while (n_buffers > 0) {
        n_buffers--;
        unsigned char *memory = buffers[n_buffers].memory;
        for (size_t i = 0; i < GUARD; i++)
            if (memory[buffers[n_buffers].size + i] != 0xA5) fail("%s wrote beyond the end of a buffer", call);
        free(memory);
    }
}

#endif
