/*
 * kernels.h: the private seam between the Swift core and the CUDA kernels. Plain C without any CUDA header. Nothing of it is exported.
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

#ifdef __CUDACC__
#define LPLBK_BOTH static inline __host__ __device__
#else
#define LPLBK_BOTH static inline
#endif

enum { LPLBK_NO_CUDA = -1, LPLBK_UNSUPPORTED = -2 };

enum { LPLBK_MAX_INTERIOR_GROUP = 128 }; /* ranks of a group for LPLB_SOLVER_IPM */

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
/* Zeroed host memory that the device can write, and its address there. Ended by lplbk_free_mapped. */
int32_t lplbk_alloc_mapped(int32_t device, int64_t bytes, void **host, uint64_t *on_device);
int32_t lplbk_free_mapped(int32_t device, void *host);
/* Waits for the device to be idle, then writes one word. */
int32_t lplbk_write_word(int32_t device, int32_t *to, int32_t word);
/* Waits for the stream. */
int32_t lplbk_wait(int32_t device, void *stream);

/* ---- Planner on the device --------------------------------------------------------------------------------------------------- */

enum { LPLBK_MAX_GROUP = 512, LPLBK_MAX_LOGICAL = 1024, LPLBK_MAX_PHYSICAL = 4096 }; /* LPLB_MAX_*_CUDA of lplb.h */

/* The sizes that a planner keeps for its life. */
typedef struct lplbk_shape {
    int32_t ep_size, group_size, n_groups, n_nodes, n_logical, n_physical;
    int32_t n_redundant;  /* columns of r2o; 0: general placement */
    int32_t combined;     /* topology: experts in a slot class (m); 0 in general placements */
    int32_t rank;         /* of the planner; -1: whole batch */
    int32_t pair_slots;   /* topology, at most 32 ranks in a group and at most 8 colours: the colours rounded up to 2, 4 or 8; else 0 */
    int32_t max_bundles, max_arcs; /* of one group, for every placement this planner can have */
} lplbk_shape;

/*
 * The tables of a planner on the device: one blob of int32. Offsets in words, fixed by the shape, so that a new placement of the same
 * planner changes contents only and captured graphs stay valid. "bundle", "arc", "colour", "place" as in the solver's tables; inside a
 * group's image bundles and arcs are numbered from 0 in that group and ranks are those of the group.
 */
typedef struct lplbk_layout {
    int32_t n_replicated;  /* one word: experts in bundle_expert */
    int32_t digest;        /* one word: what the last word of every rank's row must be */
    int32_t code;          /* [n_logical]: slot of the only replica; -1 - i: expert i of bundle_expert */
    int32_t expert;        /* [n_logical][4]: bundle, or -1 - rank in group if single; places | group << 16; first place; its slot */
    int32_t place;         /* [n_physical][2]: slot, rank in EP */
    int32_t bundle_expert_start; /* [n_groups * max_bundles + 1] of bundle group * max_bundles + b: its experts are .. */
    int32_t bundle_expert; /* [n_logical] .. here, bundle by bundle; then a topology's experts whose copy is on their own rank */
    int32_t home;          /* [n_logical][4] topology, by original slot, [ep_size][n_logical / ep_size]: lplbk_home; else unused */
    int32_t expert_class;  /* [n_logical] topology: EP rank * n_redundant + d, -1: not replicated; else -1 */
    int32_t expert_copy;   /* [n_logical] topology: slot of the copy, -1: none; else -1 */
    int32_t lanes;         /* [n_groups][pair_slots][32] lplbk_lane */
    int32_t image;         /* [n_groups][image_words] */
    int32_t image_words;
    /* offsets inside an image */
    int32_t rank_start;    /* [group_size + 1] into rank_arc */
    int32_t rank_arc;      /* [max_arcs] arc | bundle << 13 | flip << 31; flip: a pair whose second place has the lower rank */
    int32_t arc_rank;      /* [max_arcs] */
    int32_t arc_slot;      /* [max_arcs] slot of the place, | 1 << 31 if it is not the first of its bundle (bundles of one expert) */
    int32_t bundle_start;  /* [max_bundles + 1] into the arcs */
    int32_t mask;          /* [max_bundles][mask_words] group_size <= 64: bit r: the bundle has a place on rank r; else absent */
    int32_t mask_words;    /* 1, 2 or 0 */
    int32_t pair_lanes;    /* [LPLBK_MAX_COLOURS][32] lplbk_lane, slot_class being the bundle; group_size <= 32 and pair_slots 0 only */
    int32_t words;         /* of the whole blob */
} lplbk_layout;

/* Words of an image's header; IMAGE_COLOUR + c: first bundle of colour c, one more than there are colours. */
enum { LPLBK_IMAGE_BUNDLES = 0, LPLBK_IMAGE_ARCS = 1, LPLBK_IMAGE_COLOURS = 2 /* 0: the group does not sweep */,
       LPLBK_IMAGE_PAIRS = 3 /* 1: the group sweeps and pair_lanes are set */, LPLBK_IMAGE_COLOUR = 16, LPLBK_IMAGE_HEADER_WORDS = 32 };
enum { LPLBK_MAX_COLOURS = 8 };

/* Passes of the solver's loop by its plain rule; in later ones excess spills, and the bound is raised only when nothing else is left. */
enum { LPLBK_PLAIN_ROUNDS = 32 };

/* More passes than there can be (FlowSolver.swift has the proof): a guard that is never met. As in the solver's tables. */
LPLBK_BOTH int32_t lplbk_max_rounds(int32_t group_size) {
    return LPLBK_PLAIN_ROUNDS + (group_size + 1) * (group_size * group_size + 2);
}

/* One word of `lanes` for the arc of colour c on a rank: where its bundle's other place is. A rank without it is its own partner. */
enum { LPLBK_LANE_CLASS = 8, LPLBK_LANE_COPY = 24, LPLBK_LANE_ARC = 25 };
static inline int32_t lplbk_lane(int32_t partner, int32_t slot_class, int32_t is_copy) {
    return partner | slot_class << LPLBK_LANE_CLASS | is_copy << LPLBK_LANE_COPY | 1 << LPLBK_LANE_ARC;
}
static inline int32_t lplbk_no_lane(int32_t rank) { return rank; }

/* Words of `home`: expert | 1 << 31 if it has two places; rank in group | slot class << 16 (rank in group * n_redundant + d; any class if
   it has one place); slot; slot of the copy, or -1. */
static inline void lplbk_home(int32_t *words, int32_t expert, int32_t paired, int32_t rank, int32_t slot_class, int32_t slot,
                              int32_t copy) {
    words[0] = paired ? (int32_t)((uint32_t)expert | 0x80000000u) : expert;
    words[1] = (int32_t)((uint32_t)rank | (uint32_t)slot_class << 16);
    words[2] = slot;
    words[3] = copy;
}

static inline int32_t lplbk_section(int32_t *end, int64_t words) {
    const int32_t start = *end;
    *end += (int32_t)((words + 3) / 4 * 4); /* sections start at 16 bytes */
    return start;
}

static inline lplbk_layout lplbk_layout_of(const lplbk_shape *shape) {
    lplbk_layout at;
    int32_t end = 0;
    at.mask_words = shape->group_size <= 32 ? 1 : shape->group_size <= 64 ? 2 : 0;
    lplbk_section(&end, LPLBK_IMAGE_HEADER_WORDS);
    at.rank_start = lplbk_section(&end, shape->group_size + 1);
    at.rank_arc = lplbk_section(&end, shape->max_arcs);
    at.arc_rank = lplbk_section(&end, shape->max_arcs);
    at.arc_slot = lplbk_section(&end, shape->max_arcs);
    at.bundle_start = lplbk_section(&end, shape->max_bundles + 1);
    at.mask = lplbk_section(&end, (int64_t)shape->max_bundles * at.mask_words);
    at.pair_lanes = lplbk_section(&end, shape->group_size <= 32 && shape->pair_slots == 0 ? LPLBK_MAX_COLOURS * 32 : 0);
    at.image_words = end;
    end = 0;
    at.n_replicated = lplbk_section(&end, 1);
    at.digest = lplbk_section(&end, 1);
    at.code = lplbk_section(&end, shape->n_logical);
    at.expert = lplbk_section(&end, (int64_t)shape->n_logical * 4);
    at.place = lplbk_section(&end, (int64_t)shape->n_physical * 2);
    at.bundle_expert_start = lplbk_section(&end, (int64_t)shape->n_groups * shape->max_bundles + 1);
    at.bundle_expert = lplbk_section(&end, shape->n_logical);
    at.home = lplbk_section(&end, (int64_t)shape->n_logical * 4);
    at.expert_class = lplbk_section(&end, shape->n_logical);
    at.expert_copy = lplbk_section(&end, shape->n_logical);
    at.lanes = lplbk_section(&end, (int64_t)shape->n_groups * shape->pair_slots * 32);
    at.image = lplbk_section(&end, (int64_t)shape->n_groups * at.image_words);
    at.words = end;
    return at;
}

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

typedef struct lplbk_planner {
    int32_t device;
    int32_t solver;          /* LPLB_SOLVER_* */
    int32_t has_replicas;    /* 0: n_physical == n_logical, so that there is nothing to plan under any placement of this planner */
    int32_t fused_ids;       /* set by lplbk_prepare: as many ids at most are planned in one launch */
    lplbk_shape shape;
    lplbk_layout layout;
    lplbk_device_info info;
    /* device memory, made with lplbk_alloc */
    int32_t *tables;         /* [layout.words] */
    int32_t *quota;          /* [n_physical] tokens of each slot, all sources; zeroed when the placement changes */
    int32_t *take;           /* [n_physical] the same from this planner's source */
    int32_t *group_info;     /* [n_groups][LPLBK_INFO_WORDS] */
    int64_t *counters;       /* [LPLBK_COUNTER_WORDS] */
    int32_t *scratch;        /* [lplbk_scratch_words()] */
    int32_t *staged;         /* [layout.words] where lplbk_place brings tables before they are taken over */
    /* for rows whose digests differ */
    uint64_t report;         /* device address of an lplbk_report, 0: rows are never compared */
    int32_t traps;           /* 1: the kernel traps after reporting */
} lplbk_planner;

/* Words of scratch memory; the shape must be set. */
int64_t lplbk_scratch_words(const lplbk_planner *planner);

/* Whether the kernels can serve this planner on its device: 0, LPLBK_UNSUPPORTED or a CUDA error. Also opts in to the shared memory and
   cluster sizes they need, and sets info.max_cluster and fused_ids. Comes once, before the first launch. */
int32_t lplbk_prepare(lplbk_planner *planner);

/*
 * Another placement: tables [layout.words] in host memory. Waits for the stream; then takes the tables over and zeroes quota, take and
 * group_info, all in one launch, and waits for it. A failure leaves the placement and the plan as they were. No capture.
 */
int32_t lplbk_place(const lplbk_planner *planner, const int32_t *tables, void *stream);

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
/* This rank's row [n_logical + 1]: counts and digest. */
int32_t lplbk_count_row(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, int32_t *row, void *stream);
int32_t lplbk_make_row(const lplbk_planner *planner, const void *counts, int32_t counts64, int32_t *row, void *stream);
/* Solves for all ranks' rows, int32 [ep_size][n_logical + 1]. compare: 1 compares their digests with the planner's. */
int32_t lplbk_solve_rows(const lplbk_planner *planner, const int32_t *rows, int32_t compare, float *ratios, float *scaled, void *counter,
                         int32_t counter64, void *stream);
/* rows: NULL or as above. */
int32_t lplbk_run(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, const int32_t *rows, int32_t compare,
                  void *out, void *counter, int32_t counter64, int64_t max_blocks, void *stream);

#ifdef __cplusplus
}
#endif

#endif /* LPLB_KERNELS_H */
