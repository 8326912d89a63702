/*
 * metrics_view.h: the metrics of a planner as the kernels and the host share them. Plain C: the device writes the page, or the CPU
 * planner does, and any thread reads it at any time.
 *
 * Protocol. A page holds two snapshots, of the even and of the odd sequence numbers. A snapshot has two words of 8 bytes for each value,
 * and each word is half of the value behind the sequence number of its snapshot: number << 32 | half. Such a word is written and read
 * whole, so that nothing else has to order the writes, and a snapshot is whole if and only if all its words carry one number. While one
 * snapshot is being written the other one stays, so that there is always one to read, also when the device has died in the middle of a
 * kernel. (A word left from 2^32 snapshots ago would carry the same number.)
 */
#ifndef LPLB_METRICS_VIEW_H
#define LPLB_METRICS_VIEW_H

#include <stdint.h>

/*
 * Values, 64 bits each. The first are sums over all groups of all plans of what tables.h has in the word of that number
 * (LPLBK_INFO_MAX_LOAD ..), but that of max_load and bound their ratios to the mean are added up; groups without tokens have none.
 */
enum {
    LPLBK_METRIC_IMBALANCE = 0, LPLBK_METRIC_BOUND = 1, LPLBK_METRIC_TOKENS = 2, LPLBK_METRIC_MOVED = 3, LPLBK_METRIC_CERTIFIED = 5,
    LPLBK_METRIC_OWN_RANK = 7, LPLBK_METRIC_OWN_NODE = 8, LPLBK_METRIC_OTHER_NODES = 9, LPLBK_METRIC_OVERFLOW = 10,
    LPLBK_METRIC_PLANS = 11,
    LPLBK_METRIC_GROUPS = 12,   /* with tokens */
    LPLBK_METRIC_SEQUENCE = 15, /* of the snapshot; never reset */
    LPLBK_METRIC_HIGHEST = 16,  /* the highest ratios: of max_load, and then of the bound */
    LPLBK_METRICS = 32          /* one a lane of the warp that writes them */
};

/* Fractional bits of ratios. On CUDA a ratio fits 32 bits: there a group has at most 2^9 ranks. */
enum { LPLBK_METRIC_BITS = 22 };

typedef struct lplbk_metrics_page {
    uint64_t snapshot[2][2 * LPLBK_METRICS]; /* by the sequence number's parity: value i in the words 2i (low half) and 2i + 1 */
    uint64_t invalid_ids;                    /* is counted by calls that make no plan, too, and so stands alone */
} lplbk_metrics_page;

/* 1: the snapshot of this parity is whole, and its values are in `values`. */
static inline int32_t lplbk_metrics_whole(const lplbk_metrics_page *page, int32_t parity, uint64_t *values) {
    uint64_t number = 0;
    for (int32_t i = 0; i < 2 * LPLBK_METRICS; ++i) {
        const uint64_t word = __atomic_load_n(&page->snapshot[parity][i], __ATOMIC_RELAXED);
        if (i == 0) number = word >> 32;
        if (word >> 32 != number) return 0;
        values[i / 2] = i % 2 == 0 ? (uint32_t)word : values[i / 2] | word << 32;
    }
    return 1;
}

/* The latest whole snapshot. One that is being written is waited for, but not for long: its writer may be dead. */
static inline void lplbk_metrics_read(const lplbk_metrics_page *page, uint64_t *values) {
    uint64_t found[2][LPLBK_METRICS];
    for (int32_t attempt = 0;; ++attempt) {
        const int32_t even = lplbk_metrics_whole(page, 0, found[0]), odd = lplbk_metrics_whole(page, 1, found[1]);
        if ((even && odd) || (attempt >= 1000 && (even || odd))) {
            const int32_t later = (int64_t)(found[1][LPLBK_METRIC_SEQUENCE] - found[0][LPLBK_METRIC_SEQUENCE]) > 0;
            const int32_t which = even && odd ? later : odd;
            for (int32_t i = 0; i < LPLBK_METRICS; ++i) values[i] = found[which][i];
            return;
        }
    }
}

/* Writes the next snapshot; values[LPLBK_METRIC_SEQUENCE] is its number. One writer at a time. */
static inline void lplbk_metrics_write(lplbk_metrics_page *page, const uint64_t *values) {
    const uint64_t number = values[LPLBK_METRIC_SEQUENCE];
    for (int32_t i = 0; i < 2 * LPLBK_METRICS; ++i) {
        const uint64_t half = i % 2 == 0 ? (uint32_t)values[i / 2] : values[i / 2] >> 32;
        __atomic_store_n(&page->snapshot[number & 1][i], number << 32 | half, __ATOMIC_RELAXED);
    }
}

static inline uint64_t lplbk_metrics_invalid(const lplbk_metrics_page *page) {
    return __atomic_load_n(&page->invalid_ids, __ATOMIC_RELAXED);
}
static inline void lplbk_metrics_set_invalid(lplbk_metrics_page *page, uint64_t ids) {
    __atomic_store_n(&page->invalid_ids, ids, __ATOMIC_RELAXED);
}

#endif /* LPLB_METRICS_VIEW_H */
