/*
 * kernels.h: the private seam between the Swift core and the CUDA kernels. Plain C; no CUDA header, no Swift word. Nothing of it is exported.
 *
 * Every function returns an error number: 0 is success, LPLBK_NO_CUDA and LPLBK_UNSUPPORTED are ours, the others are the CUDA runtime's.
 * stub.c implements the same functions without CUDA: every call there returns LPLBK_NO_CUDA.
 * Functions with a `device` switch the calling thread to that device and back. Functions with a `stream` (a cudaStream_t) queue work on
 * it and return, unless their comment says that they wait.
 */
#ifndef LPLB_KERNELS_H
#define LPLB_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { LPLBK_NO_CUDA = -1, LPLBK_UNSUPPORTED = -2 };

/* What an error number means to the caller. */
enum { LPLBK_KIND_OK = 0, LPLBK_KIND_NO_CUDA = 1, LPLBK_KIND_OUT_OF_MEMORY = 2, LPLBK_KIND_UNSUPPORTED = 3, LPLBK_KIND_FAILED = 4 };
int32_t lplbk_error_kind(int32_t error);

/* The runtime's name of the error, e.g. "cudaErrorIllegalAddress". Static, never NULL. */
const char *lplbk_error_name(int32_t error);

/* The CUDA version that this was built with, e.g. 13000; 0 in the stub. */
int32_t lplbk_cuda_version(void);

/* The machine code in this build, e.g. "sm_80 sm_90 compute_120"; "" in the stub. Static. */
const char *lplbk_architectures(void);

/* ---- Device and memory ------------------------------------------------------------------------------------------------------ */

typedef struct lplbk_device_info {
    int32_t capability;   /* 90 for 9.0 */
    int32_t n_sms;
    int32_t shared_bytes; /* of one block, after opting in */
    int32_t max_cluster;  /* blocks in a cluster that this device can hold for the fused run; 1 without clusters */
} lplbk_device_info;

int32_t lplbk_device_count(int32_t *count);
int32_t lplbk_device_info_get(int32_t device, lplbk_device_info *info);

/* Zeroed memory. bytes 0 gives NULL. */
int32_t lplbk_alloc(int32_t device, int64_t bytes, void **memory);
/* Waits for the device to be idle. NULL is fine. */
int32_t lplbk_free(int32_t device, void *memory);
/* Both wait for the stream, copy, and wait for the copy. */
int32_t lplbk_upload(int32_t device, void *to, const void *from, int64_t bytes, void *stream);
int32_t lplbk_download(int32_t device, void *to, const void *from, int64_t bytes, void *stream);
/* Waits for the stream. */
int32_t lplbk_wait(int32_t device, void *stream);

/* ---- Planner on the device --------------------------------------------------------------------------------------------------- */

/*
 * Where the tables of a planner stand in its blob of int32: offsets in words, fixed by the capacities, so that a new placement of the
 * same planner changes the contents only and captured graphs stay valid. Arrays and words are those of the solver's tables. The sizes
 * that a placement can change are in the header (word indices LPLBK_HEADER_*), at the start of the blob.
 */
enum {
    LPLBK_HEADER_PLACES = 0,      /* nPlaces */
    LPLBK_HEADER_BUNDLES = 1,     /* nBundles */
    LPLBK_HEADER_ARCS = 2,        /* nArcs */
    LPLBK_HEADER_COLOURS = 3,     /* colour ranges of all groups */
    LPLBK_HEADER_SWEEPS = 4,      /* sweeps before the loop */
    LPLBK_HEADER_REPLICATED = 5,  /* experts with two or more places */
    LPLBK_HEADER_WORDS = 16
};

typedef struct lplbk_layout {
    int32_t words;               /* of the whole blob */
    /* places */
    int32_t expert_start;        /* [n_logical + 1] */
    int32_t place_slot;          /* [nPlaces] */
    int32_t place_rank;          /* [nPlaces] rank in EP */
    int32_t expert_bundle;       /* [n_logical] -1: single place */
    /* bundles */
    int32_t bundle_expert_start; /* [nBundles + 1] */
    int32_t bundle_expert;       /* [..] */
    int32_t bundle_start;        /* [nBundles + 1] first arc */
    int32_t group_bundle_start;  /* [n_groups + 1] */
    /* arcs */
    int32_t arc_rank;            /* [nArcs] rank in EP */
    int32_t arc_bundle;          /* [nArcs] */
    int32_t rank_start;          /* [ep_size + 1] */
    int32_t rank_arc;            /* [nArcs] */
    /* colours: bundles [colour_bundle[i], colour_bundle[i + 1]) for i in [group_colour_start[g], group_colour_start[g + 1]) */
    int32_t group_colour_start;  /* [n_groups + 1] */
    int32_t colour_bundle;       /* [colours + 1] */
    /* made for the device */
    int32_t expert_home;         /* [n_logical] rank in EP and group of the original */
    int32_t replicated;          /* [n_logical] index among the experts with two or more places, -1: single place */
    int32_t replicated_expert;   /* [replicated] the inverse */
    int32_t group_expert_start;  /* [n_groups + 1] */
    int32_t group_expert;        /* [n_logical] experts by group */
    int32_t lane;                /* topology, group_size <= 32: [n_groups][4 * n_redundant][32] see solve_flow_warp.cu */
} lplbk_layout;

/* Words of the information of one group on the device (int32). */
enum {
    LPLBK_INFO_MAX_LOAD = 0, LPLBK_INFO_BOUND = 1, LPLBK_INFO_TOTAL = 2, LPLBK_INFO_MOVED = 3, LPLBK_INFO_ROUNDS = 4,
    LPLBK_INFO_CERTIFIED = 5, LPLBK_INFO_WITNESS_SIZE = 6,
    LPLBK_INFO_OWN_RANK = 7, LPLBK_INFO_OWN_NODE = 8, LPLBK_INFO_OTHER_NODES = 9, /* tokens of this planner's rank */
    LPLBK_INFO_WITNESS = 16, /* 16 words, bit r: rank r of the group */
    LPLBK_INFO_WORDS = 32
};

/* Words of the counters that live as long as the planner (int64). */
enum { LPLBK_COUNTER_INVALID = 0, LPLBK_COUNTER_OVERFLOW = 1, LPLBK_COUNTER_WORDS = 8 };

typedef struct lplbk_planner {
    int32_t device;
    int32_t solver;          /* LPLB_SOLVER_* */
    int32_t ep_size, group_size, n_groups, n_nodes, n_logical, n_physical;
    int32_t n_redundant;     /* 0: general placement */
    int32_t combined;        /* experts in a bundle of a topology; 0 in general placements */
    int32_t rank;            /* of the planner, -1: whole batch */
    int32_t replicas;        /* 0: there are none, for any placement that this planner can have */
    int32_t max_bundles, max_arcs, max_degree; /* capacities; max_degree: arcs of a bundle */
    lplbk_device_info info;
    lplbk_layout layout;
    /* device memory */
    int32_t *tables;         /* layout.words */
    int32_t *quota;          /* [n_physical] tokens of each slot, all sources */
    int32_t *take;           /* [n_physical] the same from this planner's source */
    int32_t *group_info;     /* [n_groups][LPLBK_INFO_WORDS] */
    int64_t *counters;       /* [LPLBK_COUNTER_WORDS] */
    int32_t *scratch;        /* lplbk_scratch_words() */
} lplbk_planner;

/* Words of scratch memory that the planner needs; everything else in it but the device memory must be set. */
int32_t lplbk_scratch_words(const lplbk_planner *planner, int64_t *words);

/* Whether the kernels can serve this planner on its device. 0, LPLBK_UNSUPPORTED, or a CUDA error. Prepares the kernels (opts in to their
   shared memory), so it comes once before the first launch on a device. */
int32_t lplbk_prepare(const lplbk_planner *planner);

/* ---- Launches: nothing waits, nothing allocates, all can be captured --------------------------------------------------------- */
/* `..64`: 0 for int32, 1 for int64. Shapes and rules are those of lplb.h. n_ids < 2^31. */

int32_t lplbk_count(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, int32_t *counts, int32_t *cumulative,
                    int64_t n_chunks, void *stream);
int32_t lplbk_solve(const lplbk_planner *planner, const void *counts, int32_t counts64, int64_t n_sources, float *ratios, float *scaled,
                    void *counter, int32_t counter64, void *stream);
int32_t lplbk_redirect(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, void *out, int64_t max_blocks,
                       void *stream);
int32_t lplbk_redirect_by_ratio(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, const float *ratios,
                                const int32_t *cumulative, int64_t n_chunks, void *out, void *stream);
/* gathered: NULL or int32 [ep_size][n_logical]. */
int32_t lplbk_run(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, const int32_t *gathered, void *out,
                  void *counter, int32_t counter64, int64_t max_blocks, void *stream);

#ifdef __cplusplus
}
#endif

#endif /* LPLB_KERNELS_H */
