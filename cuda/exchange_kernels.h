/*
 * exchange_kernels.h: the private seam of the exchange of counts among ranks, beside kernels.h and under its rules (error numbers,
 * devices, streams). Plain C: Swift fills the structs, exchange.cuh reads them on the device.
 *
 * Protocol. Every rank has a buffer that its peers write: [2 parities][n_ranks sources][n_packets] packets of 16 bytes, a packet being
 * two words epoch << 32 | count. A call stores its packets into every peer's buffer at the parity of its epoch, and polls its own buffer
 * until the words of all sources carry that epoch. Data and flag are one 8-byte word, which arrives whole, so nothing else orders them.
 * Two parities make a trailing barrier unnecessary: a rank sends epoch E + 2 after it has received E + 1 from everybody, and a peer sends
 * E + 1 after it has finished reading E, since both are calls of one stream order. (With one parity a fast rank overwrites a packet that a
 * slow one still waits for, and both wait for ever.) Words left from before E carry another epoch; a new buffer is filled with the epoch
 * before the first, so that this also holds for 0, which comes after 2^32 - 1.
 */
#ifndef LPLB_EXCHANGE_KERNELS_H
#define LPLB_EXCHANGE_KERNELS_H

#include <stdint.h>

#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { LPLBK_EXCHANGE_MAX_RANKS = 72, LPLBK_EXCHANGE_HANDLE_BYTES = 64, LPLBK_EXCHANGE_UUID_BYTES = 16 };

/* What to do when a peer does not answer in time. */
enum { LPLBK_EXCHANGE_TRAP = 0, LPLBK_EXCHANGE_REPORT = 1 };

/* Why an exchange ended. */
enum { LPLBK_EXCHANGE_FINE = 0, LPLBK_EXCHANGE_TIMED_OUT = 1, LPLBK_EXCHANGE_ABORTED = 2, LPLBK_EXCHANGE_DISAGREED = 4 };

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

/* ---- Buffers that peers write ------------------------------------------------------------------------------------------------ */

/* Memory of its own 2 MiB pages, so that exporting it shows the peers nothing else, filled by lplbk_exchange_fill. */
int32_t lplbk_exchange_alloc(int32_t device, int64_t words, uint32_t first_epoch, void **buffer);
/* Makes every word one of the epoch before first_epoch; waits until that is done. */
int32_t lplbk_exchange_fill(int32_t device, void *buffer, int64_t words, uint32_t first_epoch);
/* Handle for other processes; made by lplbk_exchange_alloc only. */
int32_t lplbk_exchange_export(int32_t device, void *buffer, uint8_t *handle);
int32_t lplbk_exchange_import(int32_t device, const uint8_t *handle, void **buffer);
int32_t lplbk_exchange_unimport(int32_t device, void *buffer);

/* The GPU's UUID, and a number of this boot of this host. */
int32_t lplbk_exchange_identity(int32_t device, uint8_t *uuid, uint64_t *host);
/* Whether `device` can write to the GPU `uuid`: reach 1 yes, 0 no, -1 that GPU is hidden from this process, so that only trying can
   tell. enable: also opens the way, for memory that is not imported (another device of this process). */
int32_t lplbk_exchange_reach(int32_t device, const uint8_t *uuid, int32_t enable, int32_t *reach);

/* Waits for the device to be idle; a device that has trapped counts as idle. */
void lplbk_exchange_settle(int32_t device);

/* ---- One exchange ------------------------------------------------------------------------------------------------------------ */

/* Makes the state and the host page and enters both in the view, and the device's capability. host: where the page is for the host. */
int32_t lplbk_exchange_open(int32_t device, uint32_t first_epoch, lplbk_exchange_view *view, lplbk_exchange_host **host);
/* Ends them, also after a trap (then the memory goes with the process). */
int32_t lplbk_exchange_close(int32_t device, lplbk_exchange_view *view, lplbk_exchange_host *host);

/*
 * One call: sends counts [n_nodes][n_counts] and writes gathered [n_nodes][n_ranks][n_counts], both int32 on the device. digest: NULL, or
 * what the last count of every row must be (on the device). blocks: 0 for as many as measured best. Can be captured; allocates nothing.
 */
int32_t lplbk_exchange_launch(int32_t device, const lplbk_exchange_view *view, const int32_t *counts, int32_t *gathered,
                              const int32_t *digest, int32_t blocks, void *stream);

/*
 * lplbk_run for the counts of all ranks, exchanged inside: one launch that counts, exchanges, solves and rewrites. The exchange is that of
 * the planner's ranks. LPLBK_UNSUPPORTED where this takes several launches (several nodes, large sizes; nothing is queued then).
 */
int32_t lplbk_run_exchanging(const lplbk_planner *planner, const lplbk_exchange_view *view, const void *ids, int32_t ids64, int64_t n_ids,
                             void *out, void *counter, int32_t counter64, int64_t max_blocks, void *stream);

#ifdef __cplusplus
}
#endif

#endif /* LPLB_EXCHANGE_KERNELS_H */
