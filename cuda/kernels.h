/*
 * kernels.h: the private seam between the Swift core and a device's kernels: one struct of functions, NULL in a build without CUDA.
 * Plain C without any CUDA header. Nothing of it is exported.
 *
 * Functions return an error number: 0 is success, LPLBK_NO_CUDA and LPLBK_UNSUPPORTED are ours, the others are the CUDA runtime's.
 * Functions with a `device` or a planner switch the calling thread to that device and back. Functions with a `stream` (a cudaStream_t)
 * queue work on it and return, unless their comment says that they wait.
 */
#ifndef LPLB_KERNELS_H
#define LPLB_KERNELS_H

#include <stdint.h>

#include "exchange_view.h"
#include "metrics_view.h"
#include "replicas_view.h"
#include "tables.h"

#ifdef __cplusplus
extern "C" {
#endif

#ifdef __clang__
#define LPLBK_SET _Nonnull /* for Swift, which then calls a field like a function */
#else
#define LPLBK_SET
#endif

enum { LPLBK_NO_CUDA = -1, LPLBK_UNSUPPORTED = -2 };

/* What an error number means to the caller. */
enum { LPLBK_KIND_OK = 0, LPLBK_KIND_NO_CUDA = 1, LPLBK_KIND_OUT_OF_MEMORY = 2, LPLBK_KIND_UNSUPPORTED = 3, LPLBK_KIND_FAILED = 4 };

typedef struct lplbk_device_info {
    int32_t capability;   /* 90 for 9.0 */
    int32_t n_sms;
    int32_t shared_bytes; /* of one block, after opting in */
    int32_t max_cluster;  /* blocks in a cluster that this device can hold for the fused run; 1 without clusters */
} lplbk_device_info;

typedef struct lplbk_planner {
    int32_t device;
    int32_t solver;          /* LPLB_SOLVER_* */
    int32_t has_replicas;    /* 0: n_physical == n_logical, so that there is nothing to plan under any placement of this planner */
    int32_t fused_ids;       /* set by open: as many ids at most are planned in one launch */
    int32_t ranked;          /* 1: the ranks may differ. Chooses the kernels; what counts is the word in the tables, which graphs follow */
    int32_t unused;
    lplbk_shape shape;
    lplbk_layout layout;     /* the rest is set by open, but for info */
    lplbk_device_info info;
    int32_t *tables;         /* [layout.words] */
    int32_t *staged;         /* [layout.words] where place brings tables before they are taken over */
    int32_t *plan;           /* [lplbk_plan_words()]; the next four, kept and sources are parts of it */
    int64_t *counters;
    int32_t *group_info;     /* [n_groups][LPLBK_INFO_WORDS] */
    int32_t *quota;          /* [n_physical] tokens of each slot, all sources; zeroed when the placement changes */
    int32_t *take;           /* [n_physical] the same from this planner's source */
    int32_t *kept;           /* [ep_size][n_local] for layouts, see tables.h */
    int32_t *sources;        /* [1] */
    int32_t *scratch;
    int32_t *dispatch;       /* scratch memory of layouts */
    /* for rows whose digests differ */
    uint64_t report;         /* device address of an lplbk_report, 0: rows are never compared */
    int32_t traps;           /* 1: the kernel traps after reporting */
    /* what is recorded */
    int32_t keeps_history;
    uint64_t page;           /* device address of an lplbk_metrics_page, 0: no metrics are kept */
    int64_t *history;        /* [n_logical] and the number of plans, or NULL; set by open, as the next one */
    uint64_t *metrics;       /* [LPLBK_METRICS] totals, and a ticket; or NULL */
} lplbk_planner;

/* One lplb_layout, checked; pointers on the device. What its parts do not use may be anything. */
typedef struct lplbk_dispatch {
    const void *ids, *experts, *row_of_slot;
    int64_t n_ids;
    int32_t n_rows;
    int32_t ids64, row64;
    int32_t sends, receives, gathers, planned; /* parts, and whether `received` comes from the plan: 0 or 1 */
    int64_t *order;
    int32_t *sent, *received, *ends, *numbers;
    int64_t *by_row;
    int64_t n_by_row;
} lplbk_dispatch;

/* Of lplb.h. */
enum { LPLBK_LAYOUT_BAD_IDS = 1, LPLBK_LAYOUT_OTHER_EXPERTS = 2, LPLBK_LAYOUT_OTHER_PLAN = 4, LPLBK_LAYOUT_NO_PLAN = 8,
       LPLBK_LAYOUT_BAD_RECEIVED = 16, LPLBK_LAYOUT_BY_ROW_SHORT = 32, LPLBK_LAYOUT_RANKS = 8 };

typedef struct lplbk_backend {
    int32_t version;           /* of CUDA that this was built with, e.g. 13000 */
    const char *LPLBK_SET architectures; /* the machine code in this build, e.g. "sm_80 sm_90 compute_120" */

    int32_t (*LPLBK_SET error_kind)(int32_t error);
    const char *LPLBK_SET (*LPLBK_SET error_name)(int32_t error); /* the runtime's, e.g. "cudaErrorIllegalAddress". Static, never NULL */

    /* ---- Device and memory ---- */
    int32_t (*LPLBK_SET device_count)(int32_t *count);
    int32_t (*LPLBK_SET device_info)(int32_t device, lplbk_device_info *info);
    /* Zeroed memory. bytes 0 gives NULL. */
    int32_t (*LPLBK_SET alloc)(int32_t device, int64_t bytes, void **memory);
    /* Waits for the device to be idle. NULL is fine. */
    int32_t (*LPLBK_SET free)(int32_t device, void *memory);
    /* Both wait for the copy. */
    int32_t (*LPLBK_SET upload)(int32_t device, void *to, const void *from, int64_t bytes, void *stream);
    int32_t (*LPLBK_SET download)(int32_t device, void *to, const void *from, int64_t bytes, void *stream);
    /* Zeroed host memory that the device can write, and its address there. Ended by free_mapped. */
    int32_t (*LPLBK_SET alloc_mapped)(int32_t device, int64_t bytes, void **host, uint64_t *on_device);
    int32_t (*LPLBK_SET free_mapped)(int32_t device, void *host);

    /* ---- A planner on the device ---- */
    /* Sets the layout, allocates everything, and lets the kernels have the shared memory and clusters that they need. device, solver,
       has_replicas, shape and info must be set. LPLBK_UNSUPPORTED: its kernels do not fit the device. */
    int32_t (*LPLBK_SET open)(lplbk_planner *planner);
    /* Frees what open allocated; waits for the device. */
    void (*LPLBK_SET close)(lplbk_planner *planner);
    /* Another placement: tables [layout.words] in host memory, which all groups take over at once; quota, take and group_info become 0.
       Waits for the stream. A failure leaves the placement and the plan as they were. No capture. */
    int32_t (*LPLBK_SET place)(const lplbk_planner *planner, const int32_t *tables, void *stream);
    /* What the ranks may hold: numbers [2][ep_size] in host memory, speeds and what is fixed; ranked 0: they are alike. And the digest that
       goes with it. The plan stays. Waits for the stream. No capture. */
    int32_t (*LPLBK_SET set_capacity)(const lplbk_planner *planner, int32_t ranked, const int32_t *numbers, int32_t digest, void *stream);
    /* Waits for the device to be idle, then writes the digest. */
    int32_t (*LPLBK_SET set_digest)(const lplbk_planner *planner, int32_t digest);
    /* The plan [lplbk_plan_words()] as the stream leaves it. Waits. */
    int32_t (*LPLBK_SET read)(const lplbk_planner *planner, int32_t *plan, void *stream);
    /* The history [n_logical + 1] as the stream leaves it. Waits. */
    int32_t (*LPLBK_SET read_history)(const lplbk_planner *planner, int64_t *history, void *stream);

    /* ---- Launches: nothing waits, nothing allocates, all can be captured ---- */
    /* `..64`: 0 for int32, 1 for int64. Shapes and rules are those of lplb.h. n_ids < 2^31. */
    int32_t (*LPLBK_SET count)(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, int32_t *counts,
                               int32_t *cumulative, int64_t n_chunks, void *stream);
    /* This rank's row [n_logical + 1]: counts and digest. */
    int32_t (*LPLBK_SET count_row)(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, int32_t *row,
                                   void *stream);
    int32_t (*LPLBK_SET make_row)(const lplbk_planner *planner, const void *counts, int32_t counts64, int32_t *row, void *stream);
    int32_t (*LPLBK_SET solve)(const lplbk_planner *planner, const void *counts, int32_t counts64, int64_t n_sources, float *ratios,
                               float *scaled, void *counter, int32_t counter64, void *stream);
    /* For all ranks' rows, int32 [ep_size][n_logical + 1]. compare: 1 compares their digests with the planner's. */
    int32_t (*LPLBK_SET solve_rows)(const lplbk_planner *planner, const int32_t *rows, int32_t compare, float *ratios, float *scaled,
                                    void *counter, int32_t counter64, void *stream);
    int32_t (*LPLBK_SET redirect)(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, void *out,
                                  int64_t max_blocks, void *stream);
    int32_t (*LPLBK_SET redirect_by_ratio)(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids,
                                           const float *ratios, const int32_t *cumulative, int64_t n_chunks, void *out, void *stream);
    /* rows: NULL or as above. */
    int32_t (*LPLBK_SET run)(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, const int32_t *rows,
                             int32_t compare, void *out, void *counter, int32_t counter64, int64_t max_blocks, void *stream);
    /* run for the counts of all ranks, exchanged inside: one launch that counts, exchanges, solves and rewrites. The exchange is that of
       the planner's ranks. LPLBK_UNSUPPORTED where this takes several launches (several nodes, large sizes; nothing is queued then). */
    int32_t (*LPLBK_SET run_exchanging)(const lplbk_planner *planner, const lplbk_exchange_view *view, const void *ids, int32_t ids64,
                                        int64_t n_ids, void *out, void *counter, int32_t counter64, int64_t max_blocks, void *stream);
    int32_t (*LPLBK_SET lay_out)(const lplbk_planner *planner, const lplbk_dispatch *dispatch, void *stream);
    /* Zeroes the history, the metrics, or both; what is not kept is left out. */
    int32_t (*LPLBK_SET reset)(const lplbk_planner *planner, int32_t history, int32_t metrics, void *stream);

    /* ---- Buffers of an exchange, which peers write ---- */
    /* Memory of its own 2 MiB pages, so that exporting it shows the peers nothing else, filled by exchange_fill. */
    int32_t (*LPLBK_SET exchange_alloc)(int32_t device, int64_t words, uint32_t first_epoch, void **buffer);
    /* Makes every word one of the epoch before first_epoch; waits until that is done. */
    int32_t (*LPLBK_SET exchange_fill)(int32_t device, void *buffer, int64_t words, uint32_t first_epoch);
    /* Handle for other processes; made by exchange_alloc only. */
    int32_t (*LPLBK_SET exchange_export)(int32_t device, void *buffer, uint8_t *handle);
    int32_t (*LPLBK_SET exchange_import)(int32_t device, const uint8_t *handle, void **buffer);
    int32_t (*LPLBK_SET exchange_unimport)(int32_t device, void *buffer);
    /* The GPU's UUID, and a number of this boot of this host. */
    int32_t (*LPLBK_SET exchange_identity)(int32_t device, uint8_t *uuid, uint64_t *host);
    /* Whether `device` can write to the GPU `uuid`: reach 1 yes, 0 no, -1 that GPU is hidden from this process, so that only trying can
       tell. enable: also opens the way, for memory that is not imported (another device of this process). */
    int32_t (*LPLBK_SET exchange_reach)(int32_t device, const uint8_t *uuid, int32_t enable, int32_t *reach);
    /* Waits for the device to be idle; a device that has trapped counts as idle. */
    void (*LPLBK_SET exchange_settle)(int32_t device);

    /* ---- One exchange ---- */
    /* Makes the state and the host page and enters both in the view, and the device's capability. host: where the page is for the host. */
    int32_t (*LPLBK_SET exchange_open)(int32_t device, uint32_t first_epoch, lplbk_exchange_view *view, lplbk_exchange_host **host);
    /* Ends them, also after a trap (then the memory goes with the process). */
    int32_t (*LPLBK_SET exchange_close)(int32_t device, lplbk_exchange_view *view, lplbk_exchange_host *host);
    /* One call: sends counts [n_nodes][n_counts] and writes gathered [n_nodes][n_ranks][n_counts], both int32 on the device. digest: NULL,
       or what the last count of every row must be (on the device). blocks: 0 for as many as measured best. Can be captured. */
    int32_t (*LPLBK_SET exchange_launch)(int32_t device, const lplbk_exchange_view *view, const int32_t *counts, int32_t *gathered,
                                         const int32_t *digest, int32_t blocks, void *stream);

    /* ---- Replicas ---- */
    /* Loads the kernels. */
    int32_t (*LPLBK_SET replicas_prepare)(int32_t device);
    /* The allocation that holds `memory`. LPLBK_UNSUPPORTED: it is no memory of this device. */
    int32_t (*LPLBK_SET replicas_allocation)(int32_t device, const void *memory, uint64_t *base, int64_t *bytes);
    /* Copies the rows of a list (LPLBK_PULL_*), or adds those of LPLBK_PUSH and zeroes the copies, when all ranks have come; the exchange
       goes on by two epochs. replicas: on the device. blocks: 0 for as many as measured best. Can be captured. */
    int32_t (*LPLBK_SET replicas_pull)(int32_t device, const lplbk_exchange_view *view, lplbk_replicas *replicas, int32_t list,
                                       int32_t blocks, void *stream);
    int32_t (*LPLBK_SET replicas_push)(int32_t device, const lplbk_exchange_view *view, lplbk_replicas *replicas, int32_t blocks,
                                       void *stream);
} lplbk_backend;

/* The objects of cuda/ define it; a build without them has none. */
extern const lplbk_backend *lplbk_cuda_backend(void) __attribute__((weak, visibility("hidden")));
static inline const lplbk_backend *lplbk_cuda(void) { return lplbk_cuda_backend ? lplbk_cuda_backend() : 0; }

#ifdef __cplusplus
}
#endif

#endif /* LPLB_KERNELS_H */
