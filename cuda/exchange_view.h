/*
 * exchange_view.h: what the host and the kernels share of an exchange of counts among ranks. Plain C: Swift fills the structs,
 * exchange.cuh reads them on the device.
 *
 * Protocol. Every rank has a buffer that its peers write: [2 parities][n_ranks sources][n_packets] packets of 16 bytes, a packet being
 * two words epoch << 32 | count. A call stores its packets into every peer's buffer at the parity of its epoch, and polls its own buffer
 * until the words of all sources carry that epoch. Data and flag are one 8-byte word, which arrives whole, so nothing else orders them.
 * Two parities make a trailing barrier unnecessary: a rank sends epoch E + 2 after it has received E + 1 from everybody, and a peer sends
 * E + 1 after it has finished reading E, since both are calls of one stream order. (With one parity a fast rank overwrites a packet that a
 * slow one still waits for, and both wait for ever.) Words left from before E carry another epoch; a new buffer is filled with the epoch
 * before the first, so that this also holds for 0, which comes after 2^32 - 1.
 */
#ifndef LPLB_EXCHANGE_VIEW_H
#define LPLB_EXCHANGE_VIEW_H

#include <stdint.h>

enum { LPLBK_EXCHANGE_MAX_RANKS = 72, LPLBK_EXCHANGE_HANDLE_BYTES = 64, LPLBK_EXCHANGE_UUID_BYTES = 16 };

/* What to do when a peer does not answer in time. */
enum { LPLBK_EXCHANGE_TRAP = 0, LPLBK_EXCHANGE_REPORT = 1 };

/* Why an exchange ended. */
enum { LPLBK_EXCHANGE_FINE = 0, LPLBK_EXCHANGE_TIMED_OUT = 1, LPLBK_EXCHANGE_ABORTED = 2, LPLBK_EXCHANGE_DISAGREED = 4 };

/* What a kernel found wrong, in host memory that the device can write. code is written last. */
typedef struct lplbk_report {
    int32_t code;   /* LPLBK_EXCHANGE_* */
    int32_t rank;   /* that found it */
    int32_t peer;   /* whose counts were missing, or whose digest differs; the first one that was noticed; -1: not known */
    uint32_t epoch; /* of the exchange's call */
    uint64_t waited_ns;
} lplbk_report;

/* A report that the device may be writing: code first, and the rest only once it is there. (Elsewhere than on x86 plain loads may be
   swapped.) */
static inline int32_t lplbk_report_code(const lplbk_report *report) { return __atomic_load_n(&report->code, __ATOMIC_ACQUIRE); }
static inline lplbk_report lplbk_report_read(const lplbk_report *report) {
    lplbk_report seen = {0, 0, 0, 0, 0};
    const int32_t code = lplbk_report_code(report);
    if (code != 0) seen = *report;
    seen.code = code;
    return seen;
}

/* Device memory of one exchange, private to its rank. */
typedef struct lplbk_exchange_state {
    uint32_t epoch;  /* of the next call; advanced by the kernel, so that graph replays and eager calls mix */
    uint32_t fault;  /* LPLBK_EXCHANGE_*; once set, calls neither send nor wait */
    uint32_t ticket; /* blocks of the call in flight that are through */
    uint32_t unused;
} lplbk_exchange_state;

/* Host memory that the device can write: it stays readable after a trap. */
typedef struct lplbk_exchange_host {
    uint32_t abort; /* host -> device: stop waiting */
    uint32_t unused[15];
    lplbk_report report; /* device -> host */
} lplbk_exchange_host;

static inline const lplbk_report *lplbk_exchange_report_of(const lplbk_exchange_host *page) { return &page->report; }

/* What the host wrote before is there for a device that sees the flag. */
static inline void lplbk_exchange_host_abort(lplbk_exchange_host *page) { __atomic_store_n(&page->abort, 1, __ATOMIC_RELEASE); }

/* All that a kernel needs, passed by value (640 bytes). Addresses are device addresses on the rank's device. */
typedef struct lplbk_exchange_view {
    uint64_t peer[LPLBK_EXCHANGE_MAX_RANKS]; /* every rank's buffer; peer[rank] is the own one */
    uint64_t state;                          /* lplbk_exchange_state */
    uint64_t host;                           /* lplbk_exchange_host */
    uint64_t rail_failed;                    /* 0, or a word that is not 0 once the rail has given up (lplb_rail_ops.failed) */
    uint64_t timeout_ns;                     /* 0: none */
    int32_t rank, n_ranks;                   /* of the NVLink stage */
    int32_t n_nodes;                         /* rows of n_counts that every rank brings, one a node, gathered along the rail before */
    int32_t n_counts;
    int32_t n_words;                         /* n_nodes * n_counts: counts from each rank */
    int32_t n_packets;                       /* (n_words + 1) / 2 */
    int32_t policy;                          /* LPLBK_EXCHANGE_TRAP or _REPORT */
    int32_t capability;                      /* of the device, as in lplbk_device_info; set by lplbk_exchange_open */
} lplbk_exchange_view;

/* 8-byte words in a buffer that peers write. */
static inline int64_t lplbk_exchange_buffer_words(int64_t n_ranks, int64_t n_nodes, int64_t n_counts) {
    return 2 * n_ranks * 2 * ((n_nodes * n_counts + 1) / 2);
}

#endif /* LPLB_EXCHANGE_VIEW_H */
