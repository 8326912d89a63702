/*
 * lplb: exact, certified load balancing for Mixture-of-Experts models. One batch is planned so:
 *
 *     const int32_t phy2log[6] = {0, 1, 2, 3, 0, 1};  // 4 experts on 2 ranks with 3 slots each: 0 and 1 have copies on rank 1
 *     int64_t ids[8] = {0, 0, 0, 0, 0, 1, 2, 3};      // the experts that a router chose
 *     lplb_config config = LPLB_CONFIG_INIT;
 *     config.ep_size = 2, config.n_logical = 4, config.n_physical = 6;
 *     char why[256]; lplb_planner *planner; lplb_group_info plan;
 *     if (lplb_planner_create(&config, &planner, why, sizeof why) != LPLB_OK) return puts(why), 1;
 *     lplb_planner_set_placement(planner, phy2log, 6, NULL);
 *     lplb_planner_run(planner, ids, LPLB_INT64, 8, NULL, ids, NULL, LPLB_INT64, 0, NULL);  // the ids are slots now, 4 on each rank
 *     lplb_planner_info(planner, NULL, &plan, 1, NULL);                                     // plan.max_load == plan.bound == 4: proven
 *     lplb_planner_destroy(planner);
 *
 * Whole programs: Tests/c/example.c (a batch on a cube), planner.hpp (a C++ class that owns a planner and throws), consumer.cpp (placement
 * by history, and the proof of a plan), connect.cpp (processes that join their GPUs).
 *
 * Every micro-batch routes a different number of tokens to each expert. Where an expert has replicas on several GPUs (ranks), lplb
 * decides which replica each token goes to, so that the busiest rank of each group has as little as is mathematically possible, and it
 * proves it: with each plan comes a set of ranks (the witness) from which anybody can recompute a lower bound equal to the result.
 *
 * Reading order: 1. version and status  2. planner: create, place  3. planner: plan (count, solve, redirect, run)  4. reading results
 *                5. placement alone  6. one-off solve  7. exchange: everybody's counts over NVLink
 *                8. replicas: weights and gradients of copies over NVLink
 *                9. layout: where the rows of a dispatch go
 *
 * Words
 *   rank              one GPU of the expert-parallel (EP) group; there are ep_size of them
 *   logical expert    an expert that the router selects, 0 .. n_logical-1
 *   physical expert   a slot that holds the weights of one logical expert; rank r owns the slots [r*n_local, (r+1)*n_local)
 *   replica           one of the physical experts of a logical expert that has several; the original comes first
 *   load              tokens per logical expert; a token routed to k experts counts k times
 *   r2o               [group_size][n_redundant]: slot d of rank r of a group replicates slot d of rank r2o[r][d] of the same group
 *   home              the replica of an expert that owns its weights in training; the other replicas are copies of it
 *   group             group_size consecutive ranks that balance among themselves; the groups are solved independently
 *   row               what a rank brings to an exchange: its counts [n_logical], then the digest of its placement and settings
 *
 * Rules that hold for every call
 *   - Every function that can fail returns lplb_status. LPLB_OK is 0. The words about the last failure on a planner are
 *     lplb_planner_error(planner); functions without a planner write them to `message`.
 *   - A failed call changes nothing: the planner keeps the placement and the plan it had. (Except that a launch which CUDA refuses in the
 *     middle of a call of section 3, LPLB_ERROR_CUDA, leaves a plan that nobody should use; the next solve or run makes a whole one.)
 *   - `stream` is a cudaStream_t (NULL: the default stream) and is ignored by CPU planners. On a CUDA planner all data pointers of sections 3
 *     and 8 are device pointers and the call returns before the work is done; on a CPU planner they are host pointers and the work is done
 *     when the call returns. The planner's device need not be the current one: a call makes it current while it works, and then the one
 *     that was. The stream must be of that device. The pointers of the sections 2, 4, 5 and 6 are always host pointers and these calls are synchronous.
 *   - Section 3 allocates nothing, waits for nothing and can be captured in a CUDA graph; so does section 8.
 *   - Threads: different planners may be used from different threads at the same time. Two calls on one planner at the same time are
 *     refused with LPLB_ERROR_BUSY, never corrupted. On CUDA a planner's work belongs to one stream order: calls on several streams
 *     need an event between them, as for any buffer.
 *   - Structs that begin with struct_size may be those of another version of this header. An older caller's is smaller and ends where
 *     one of our fields begins: the fields that are missing take the value that the initialiser macro sets, 0 where there is none. A newer
 *     caller's is larger, by a multiple of 8 bytes and up to 4096 in all: what lies beyond our fields must be 0. Of a struct that a call
 *     fills, the fields that both versions know are written, and 0 to those beyond ours; struct_size stays.
 *   - Equal inputs give equal bits: on every rank, on every run, on the CPU and on the GPU.
 */
#ifndef LPLB_H
#define LPLB_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- 1. Version and status -------------------------------------------------------------------------------------------------- */

#define LPLB_VERSION_MAJOR 0
#define LPLB_VERSION_MINOR 2
#define LPLB_VERSION_PATCH 0
/* 10000 * major + 100 * minor + patch */
#define LPLB_VERSION 200

/* Limits of one planner. Beyond them creation is refused with LPLB_ERROR_UNSUPPORTED. */
#define LPLB_MAX_RANKS 1024           /* ranks in one group; an EP group may hold many groups */
#define LPLB_MAX_EP_SIZE 8192         /* ranks in all */
#define LPLB_MAX_LOGICAL 4096
#define LPLB_MAX_PHYSICAL 8192
#define LPLB_MAX_RANKS_CUDA 512       /* the same limits of a CUDA planner */
#define LPLB_MAX_LOGICAL_CUDA 1024
#define LPLB_MAX_PHYSICAL_CUDA 4096
#define LPLB_MAX_LOAD (INT64_C(1) << 40)  /* tokens of one logical expert in a solve on the CPU; on CUDA a group's total stays below 2^31 */

typedef int32_t lplb_status;
enum {
    LPLB_OK = 0,
    LPLB_ERROR_INVALID_ARGUMENT = 1, /* an argument breaks a rule; the words name the argument, the rule and the value */
    LPLB_ERROR_UNSUPPORTED = 2,      /* valid, but beyond a limit of this library or of this planner's device */
    LPLB_ERROR_WRONG_ORDER = 3,      /* a call that needs another one before it, e.g. redirect before solve */
    LPLB_ERROR_BUSY = 4,             /* another thread is inside a call on this planner */
    LPLB_ERROR_OUT_OF_MEMORY = 5,
    LPLB_ERROR_NO_CUDA = 6,          /* built without CUDA, or this machine has no usable GPU or driver */
    LPLB_ERROR_CUDA = 7,             /* the CUDA runtime failed; the words hold its name for the error */
    LPLB_ERROR_TIMEOUT = 8,          /* a peer did not answer in time */
    LPLB_ERROR_INTERNAL = 9,         /* a defect of this library */
    LPLB_ERROR_DISAGREEMENT = 10,    /* ranks differ in what must be equal on all of them; the words name the ranks and what differs */
    LPLB_ERROR_PEER_LOST = 11        /* the connection to a peer broke, so that it is known not to answer */
};

/* LPLB_VERSION of the library that is loaded, to compare with the header's. Never fails. */
int32_t lplb_version(void);

/* Static text of a status, e.g. "invalid argument"; "unknown status" for other numbers. Never NULL, never freed. */
const char *lplb_status_string(lplb_status status);

/* One line about the build: version, CUDA version and architectures or "without CUDA", Swift version. Static. */
const char *lplb_build_info(void);

/* ---- 2. Planner: create and place ------------------------------------------------------------------------------------------- */

/* A planner holds one EP group's topology, its placement and the latest plan. Opaque. */
typedef struct lplb_planner lplb_planner;

typedef int32_t lplb_dtype;
enum { LPLB_INT32 = 0, LPLB_INT64 = 1 };

enum { LPLB_DEVICE_CPU = -1 };        /* lplb_config.device; 0 and above are CUDA ordinals */
enum { LPLB_WHOLE_BATCH = -1 };       /* lplb_config.rank: the ids are those of all ranks together */
enum { LPLB_SOLVER_FLOW = 0,          /* exact, integral, certified */
       LPLB_SOLVER_IPM = 1 };         /* interior point method, CUDA only: near-optimal, for comparison and cross-checks */

enum { LPLB_RECORD_HISTORY = 1,       /* lplb_config.record: tokens of each logical expert, added up over all plans */
       LPLB_RECORD_METRICS = 2 };     /* what the plans achieved, for lplb_planner_get_metrics; with unit 0 or 1 and without capacities */

/*
 * What a rank's work costs. Without more said, its tokens, and all ranks are alike. Two things can differ, and the plan stays exact:
 *   unit        tokens that cost as one, such as the 64 or 128 rows to which a grouped product pads every expert. An expert with L tokens
 *               has ceil(L / unit) units (L: of all sources together). It is split in whole units; the last of its replicas that gets any
 *               takes the unit that is not full. LPLB_UNIT_EXPERTS: an expert that has tokens is one unit, and goes to one replica whole:
 *               the active experts of a decode step
 *   capacities  lplb_planner_set_capacity: ranks of different speed, or with other work of their own
 * A level T is a time, in 1/1024 of what a rank of normal speed takes for a unit. A rank may hold floor((T / 1024 - fixed) * speed / 1024)
 * units within T, which is at least the largest fixed of its group. The plan's level is as low as any split into units allows.
 */
enum { LPLB_UNIT_EXPERTS = -1 };      /* lplb_config.unit */
enum { LPLB_SPEED_NORMAL = 1024 };    /* of a rank; speeds lie in 1 .. LPLB_MAX_SPEED */
#define LPLB_MAX_SPEED 65536
#define LPLB_MAX_FIXED 16777216       /* units; the largest fixed cost of a rank */

typedef struct lplb_config {
    int64_t struct_size;   /* sizeof(lplb_config); LPLB_CONFIG_INIT sets it */
    int32_t device;        /* LPLB_DEVICE_CPU or a CUDA ordinal */
    int32_t solver;        /* LPLB_SOLVER_* */
    int64_t ep_size;       /* ranks */
    /* Which of them this planner plans for, when each rank has tokens of its own. LPLB_WHOLE_BATCH: the ids given are all there are: those of
       all ranks together, or the same on every rank, which then all choose the same replicas and exchange nothing. Ranks that hold the same
       tokens and name a rank each would take their tokens for different ones, and choose differently. */
    int64_t rank;
    int64_t n_nodes;       /* hosts; ranks of one host are consecutive; divides ep_size. 0: ep_size / 8 if that divides, else 1 */
    int64_t n_logical;     /* logical experts */
    int64_t n_physical;    /* physical experts, replicas included; a multiple of ep_size */
    int64_t group_size;    /* ranks that balance among themselves; divides ep_size. 0: ep_size */
    int64_t n_redundant;   /* columns of r2o; 0 when r2o is NULL. 0 with r2o given: a topology without replicas, which can be reordered */
    const int32_t *r2o;    /* host, [group_size][n_redundant], copied; NULL: general placement, see lplb_planner_set_placement */
    int64_t number;        /* any number that tells planners of equal settings apart, such as the layer's; equal on all ranks */
    int32_t policy;        /* CUDA: LPLB_EXCHANGE_TRAP or _REPORT, what a kernel does that finds ranks disagreeing in rows that the
                              caller gathered. With an exchange attached, that one's policy counts */
    int32_t unit;          /* tokens that cost as one, or LPLB_UNIT_EXPERTS; 0 or 1: tokens. Above 1 or -1: with LPLB_SOLVER_FLOW alone */
    int64_t record;        /* LPLB_RECORD_* added up: what the planner keeps beside its plans, see lplb_planner_history */
} lplb_config;

#define LPLB_CONFIG_INIT \
    { (int64_t)sizeof(lplb_config), LPLB_DEVICE_CPU, LPLB_SOLVER_FLOW, 0, LPLB_WHOLE_BATCH, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }

/*
 * Creates a planner. With r2o it is placed at once as lplb_planner_place(planner, NULL) would. Without r2o, and with as many physical
 * as logical experts, slot i holds expert i; otherwise lplb_planner_set_placement must come before any plan.
 * With r2o: n_logical is a multiple of ep_size, every column of r2o is a permutation of 0 .. group_size-1 (a self copy r2o[r][d] == r
 * is accepted and moves nothing), and the redundant slots of a rank, (n_physical - n_logical) / ep_size, are m * n_redundant for an
 * integer m >= 1 with m * n_redundant <= n_logical / ep_size.
 * message: NULL, or message_size bytes for the reason of a failure (cut to fit, always NUL-terminated).
 */
lplb_status lplb_planner_create(const lplb_config *config, lplb_planner **planner, char *message, int64_t message_size);

/* Ends a planner. NULL is fine. On CUDA waits for the planner's device to be idle. No other thread may be inside a call on it. */
void lplb_planner_destroy(lplb_planner *planner);

/* Words about the last failed call on this planner, "" if none failed. Owned by the planner, valid until its next call. Never NULL. */
const char *lplb_planner_error(const lplb_planner *planner);

/*
 * Places the experts by the topology. It needs r2o.
 * Without a history (NULL) the logical experts stand in order. With one, history [n_logical] (tokens of each expert over some past, finite,
 * >= 0), EPLB reorders them over the ranks, without replication, by n_group groups and n_nodes nodes; then every rank sorts its experts,
 * heaviest first. The first m*n_redundant experts of each rank have a copy: the expert in local slot j*n_redundant + d of rank r2o[q][d]
 * is copied to rank q of the same group, where it stands behind q's own experts at offset j*n_redundant + d.
 * The call may allocate. On CUDA it waits for the stream and then changes the tables in place, so captured graphs stay valid.
 */
lplb_status lplb_planner_place(lplb_planner *planner, const double *history, void *stream);

/*
 * Sets a general placement, on planners that were created without r2o: phy2log [n_physical], the logical expert that each slot holds.
 * It is int32, as lplb_place writes it; lplb_eplb_rebalance writes int64, as DeepSeek's EPLB does, whose values fit.
 * A slot with -1 is empty: no token goes there, and a rank that is gone has only such slots; so in sections 5 and 6 too. Every logical
 * expert stands at least once, and all replicas of an expert stand within one group. Several replicas of an expert on one rank are
 * accepted. The first of them takes that rank's share, since splitting it further would only cut that rank's work into smaller pieces.
 * Replicas are ordered by slot; the first is the original. The first call may allocate, later ones change the tables in place.
 */
lplb_status lplb_planner_set_placement(lplb_planner *planner, const int32_t *phy2log, int64_t n_physical, void *stream);

/*
 * What the ranks may hold, from the next plan on: speed [n_ranks], 1 .. LPLB_MAX_SPEED, how many units a rank does in the time in which a
 * normal one does 1024; fixed [n_ranks], 0 .. LPLB_MAX_FIXED units of a normal rank, the time that is gone before its first unit. NULL: all
 * LPLB_SPEED_NORMAL; all 0. Both NULL: the ranks are alike, as in a new planner. n_ranks is ep_size; host pointers, copied; the same on all
 * ranks, between the same plans (it is part of the digest). Stays through new placements; the latest plan stays readable.
 * The first call comes before the planner's first plan, or LPLB_ERROR_WRONG_ORDER: planners whose ranks may differ plan by other kernels,
 * and graphs that were captured before could not follow. Who knows no differences yet sets ranks that are alike (NULL, NULL) there.
 * LPLB_ERROR_UNSUPPORTED with LPLB_SOLVER_IPM. On CUDA waits for the stream, then updates the tables in place, so captured graphs follow.
 */
lplb_status lplb_planner_set_capacity(lplb_planner *planner, const int32_t *speed, const int32_t *fixed, int64_t n_ranks, void *stream);

/* The placement. phy2log [n_physical]; log2phy [n_logical][max_replicas], -1 padded, original first; logcnt [n_logical]: replicas. */
lplb_status lplb_planner_max_replicas(lplb_planner *planner, int64_t *max_replicas);
lplb_status lplb_planner_phy2log(lplb_planner *planner, int32_t *phy2log, int64_t n_physical);
lplb_status lplb_planner_log2phy(lplb_planner *planner, int32_t *log2phy, int64_t n_logical, int64_t max_replicas);
lplb_status lplb_planner_logcnt(lplb_planner *planner, int32_t *logcnt, int64_t n_logical);

/*
 * Ranks that plan together must have equal sizes, topology, solver, unit, number, placement, capacities and history. Two things see to it:
 *   - lplb_agree, before the planners are created: one gather of 1 KiB from each rank compares the settings, and says how the ranks lie
 *     on hosts.
 *   - The digest, at every exchange: a planner's digest is a number made from its settings, placement and capacities, and, once an exchange
 *     is attached, from how many planners were attached to that exchange before it. It travels as the last count of every row, and whoever
 *     plans from rows compares. So a rank with another placement is found, and so are equal layers that are called in another order. On
 *     the CPU the call fails with LPLB_ERROR_DISAGREEMENT on every rank; on CUDA the kernel traps or writes a report that the next call
 *     returns, by the policy.
 */

/*
 * A function of the caller's that brings `bytes` bytes of every rank to every rank: all [n_ranks][bytes] in rank order, this rank's own
 * ones included. Host memory; returns when `all` is there. 0, or any other number for a failure. All ranks call it alike.
 */
typedef int32_t (*lplb_gather)(void *context, const void *mine, void *all, int64_t bytes);

typedef struct lplb_agree_config {
    int64_t struct_size;       /* sizeof(lplb_agree_config); LPLB_AGREE_CONFIG_INIT sets it */
    const lplb_config *planner; /* what the planner will be created with. All but device, number and record is compared; rank:
                                   this rank's */
    const double *history;     /* NULL, or [n_logical] for lplb_planner_place: compared */
    const int32_t *phy2log;    /* NULL, or [n_physical] for lplb_planner_set_placement: compared */
    const char *settings;      /* NULL, or words about settings of the caller's own that must be equal; the first 95 bytes are compared */
    const char *failure;       /* NULL, or why this rank cannot go on: then every rank fails with these words. `planner` may be NULL */
    int64_t n_ranks;           /* ranks that gather, planner->ep_size of them; needed because `planner` may be NULL or differ */
    int64_t rank;              /* this one's place among them */
    lplb_gather gather;
    void *context;             /* handed to gather */
} lplb_agree_config;

#define LPLB_AGREE_CONFIG_INIT { (int64_t)sizeof(lplb_agree_config), 0, 0, 0, 0, 0, 0, 0, 0, 0 }

typedef struct lplb_agreement {
    int64_t struct_size;   /* sizeof(lplb_agreement) */
    int64_t n_nodes;       /* for lplb_config.n_nodes: that of `planner` where it is not 0; else n_hosts where the ranks of a host are
                              consecutive and as many on every host, else 1 */
    int64_t n_hosts;       /* different hosts among the ranks, told apart by what the kernel drew at boot, not by visible GPUs */
    int64_t number;        /* for lplb_config.number: the largest that a rank gave */
    lplb_dtype row_dtype;  /* in which rows travel: LPLB_INT32 */
    int32_t all_cuda;      /* 1: every rank's planner->device is a GPU */
} lplb_agreement;

/*
 * Compares the ranks' settings before planners are created; every rank calls it. LPLB_OK on all ranks, or the same failure and the same
 * words on all: LPLB_ERROR_DISAGREEMENT names what differs and on which ranks; a rank's own failure (`failure`, or a `planner` that breaks
 * a rule) gives its words and INVALID_ARGUMENT or UNSUPPORTED; LPLB_ERROR_PEER_LOST where `gather` failed (on this rank alone perhaps).
 * Host, synchronous, thread-safe.
 */
lplb_status lplb_agree(const lplb_agree_config *config, lplb_agreement *agreement, char *message, int64_t message_size);

/* int32 in a row: n_logical + 1. Never fails. */
int64_t lplb_counts_width(int64_t n_logical);

/* ---- 3. Planner: plan ------------------------------------------------------------------------------------------------------- */

/*
 * Ids: n_ids (at most 2^31 - 1) logical experts, -1 .. n_logical-1, in row-major order of whatever shape the caller has; -1 means "no
 * expert" and stays -1.
 * Any other id is never used as an index: it comes back as -1, and the call that rewrites it (redirect, redirect_by_ratio, run) counts it
 * in lplb_plan_info.invalid_ids. lplb_planner_count skips it, so that an id is counted once, whichever way it is planned.
 * max_blocks: upper bound of the CUDA blocks used, 0: as many as measured best. CPU planners ignore it.
 */

/*
 * counts[n_logical] (int32) = tokens per logical expert among the ids. cumulative: NULL, or int32 [n_chunks][n_logical]: the ids are cut
 * into n_chunks equal runs (of ceil(n_ids / n_chunks) ids, rounded up to a multiple of 1024; the last ones may be empty) and row i
 * counts the runs 0 .. i. n_chunks lies in 1 .. 65536 when cumulative is given. A CUDA planner must have a placement.
 */
lplb_status lplb_planner_count(lplb_planner *planner, const void *ids, lplb_dtype ids_dtype, int64_t n_ids, int32_t *counts,
                               int32_t *cumulative, int64_t n_chunks, void *stream);

/*
 * This rank's row [lplb_counts_width(n_logical)] (int32), for an exchange of the caller's own: its counts, and then the planner's digest.
 * count_row counts the ids; make_row takes counts [n_logical] (a count that does not fit int32 becomes -2^31: on the CPU every
 * rank refuses it; CUDA, which looks at no values, takes it for 0 like all negative counts).
 */
lplb_status lplb_planner_count_row(lplb_planner *planner, const void *ids, lplb_dtype ids_dtype, int64_t n_ids, int32_t *row,
                                   void *stream);
lplb_status lplb_planner_make_row(lplb_planner *planner, const void *counts, lplb_dtype counts_dtype, int32_t *row, void *stream);

/*
 * Solves every group for the given counts and keeps the plan. counts: [n_sources][n_logical] of dtype counts_dtype, each >= 0, where
 * n_sources is 1 (the counts of the whole batch) or ep_size (the counts of every rank, in rank order). The plan is the same for the
 * same column sums; with ep_size sources the tokens of this planner's rank are assigned too: own rank first, then own node, then the rest.
 * With 1 source and a rank given in the config, the source is that rank alone.
 * ratios: NULL, or float32 [n_group][group_size][n_redundant]: the share of the tokens of slot class d of a rank that stays at the
 *   original (1 where there are none). Topology planners only, without units of several tokens and without capacities.
 * scaled: NULL, or float32 [n_logical]: the column sums divided by their maximum (0 where that is 0).
 * counter: NULL, or one integer of dtype counter_dtype that grows by the number of groups solved.
 */
lplb_status lplb_planner_solve(lplb_planner *planner, const void *counts, lplb_dtype counts_dtype, int64_t n_sources, float *ratios,
                               float *scaled, void *counter, lplb_dtype counter_dtype, void *stream);

/*
 * The same for gathered rows [ep_size][lplb_counts_width(n_logical)] (int32), the rows of all ranks in rank order. Compares the digests:
 * where one differs, LPLB_ERROR_DISAGREEMENT on the CPU, before anything is changed; on CUDA by the planner's policy, see lplb_config.
 */
lplb_status lplb_planner_solve_rows(lplb_planner *planner, const int32_t *rows, float *ratios, float *scaled, void *counter,
                                    lplb_dtype counter_dtype, void *stream);

/*
 * Rewrites logical ids as physical ones by the latest plan. The k-th occurrence of an expert in ids goes to the replica whose interval
 * of the plan holds k, so the result does not depend on thread timing, and the loads of all ranks equal the plan exactly when ids are
 * those that were counted. Occurrences beyond the plan's count go to the original. out may equal ids.
 */
lplb_status lplb_planner_redirect(lplb_planner *planner, const void *ids, lplb_dtype ids_dtype, int64_t n_ids, void *out,
                                  int64_t max_blocks, void *stream);

/*
 * The same by ratios, without a plan: of the c occurrences of a replicated expert of slot class d of rank r in ids, the first
 * round(ratios[group][r][d] * c) go to the original and the others to the copy. Ratios are clamped to [0, 1]; NaN counts as 1.
 * ratios: float32 [n_group][group_size][n_redundant]. cumulative: as lplb_planner_count wrote it for the same ids and n_chunks. Refused
 * where units are not tokens, since shares are no whole units.
 */
lplb_status lplb_planner_redirect_by_ratio(lplb_planner *planner, const void *ids, lplb_dtype ids_dtype, int64_t n_ids,
                                           const float *ratios, const int32_t *cumulative, int64_t n_chunks, void *out, void *stream);

/*
 * Everything in one call: count, solve, redirect. gathered: NULL (the ids are all there is: one source), or int32
 * [ep_size][lplb_counts_width(n_logical)], the rows of all ranks, this rank's being that of ids (then nothing is counted here, and the
 * config's rank must be given); the digests are compared as in lplb_planner_solve_rows.
 * counter as in lplb_planner_solve. A planner without replicas (n_physical == n_logical) rewrites the ids and lets the counter grow, but
 * counts, exchanges and solves nothing, so there is no plan to read afterwards. With replicas it plans under every placement, also where
 * they happen to stand on one rank: what a captured graph does must not depend on the placement.
 */
lplb_status lplb_planner_run(lplb_planner *planner, const void *ids, lplb_dtype ids_dtype, int64_t n_ids, const int32_t *gathered,
                             void *out, void *counter, lplb_dtype counter_dtype, int64_t max_blocks, void *stream);

/* ---- 4. Reading results ----------------------------------------------------------------------------------------------------- */

/* In tokens, also where the cost is another one; lplb_level then says what was reached and proven. */
typedef struct lplb_group_info {
    int64_t max_load;      /* the most tokens of a rank under the plan */
    int64_t bound;         /* T: no split of these replicas can have a smaller maximum. With units or capacities, which need not have
                              the fewest tokens at most: total / group_size, rounded up */
    int64_t total;         /* tokens of all ranks of the group; the mean is total / group_size */
    int64_t moved;         /* tokens that do not go to the original of their expert */
    int64_t rounds;        /* rounds of the solver's loop; a diagnosis of speed, no part of the result */
    int32_t certified;     /* 1: max_load == bound, or with units or capacities reached == bound of lplb_level, proven by the witness */
    int32_t witness_size;  /* ranks in the witness */
    /* Bit r: rank r of the group is in the witness S. With load(S) = the tokens that cannot leave S (of experts whose replicas all lie in
       S), ceil(load(S) / |S|) == bound. In general, with the units that cannot leave S: bound of lplb_level is the least level at which
       the ranks of S may hold them together. */
    uint32_t witness[LPLB_MAX_RANKS / 32];
} lplb_group_info;

/* What a group's plan costs, in 1/1024 of the time that a rank of normal speed takes for a unit. */
typedef struct lplb_level {
    int64_t reached;       /* of the rank that takes longest */
    int64_t bound;         /* no split into units has a lower level */
    int64_t mean;          /* what it would be if every expert had a replica on every rank */
} lplb_level;

typedef struct lplb_plan_info {
    int64_t struct_size;   /* sizeof(lplb_plan_info); LPLB_PLAN_INFO_INIT sets it */
    int64_t n_groups;
    int64_t invalid_ids;   /* ids out of range that were rewritten since the planner was created */
    /* Where the tokens of this planner's rank go; all zero for LPLB_WHOLE_BATCH. */
    int64_t own_rank;
    int64_t own_node;      /* another rank of the same node */
    int64_t other_nodes;
    int64_t overflow;      /* CUDA: groups not solved since the planner was created, whose total did not fit 31 bits: their tokens stay
                              at the originals, their lplb_group_info is zero, and the counter does not count them */
} lplb_plan_info;

#define LPLB_PLAN_INFO_INIT { (int64_t)sizeof(lplb_plan_info), 0, 0, 0, 0, 0, 0 }

/*
 * The latest plan: plan NULL or one struct, groups NULL or [n_groups] with n_groups = ep_size / group_size. On CUDA waits for the stream.
 * LPLB_ERROR_WRONG_ORDER before the first plan, and on the CPU after a new placement until it is planned with. On CUDA, where a captured
 * graph may plan at any time, everything reads as 0 from a new placement until then.
 */
lplb_status lplb_planner_info(lplb_planner *planner, lplb_plan_info *plan, lplb_group_info *groups, int64_t n_groups, void *stream);

/* The levels of the latest plan, [n_groups]; under the capacities that it was made for. As lplb_planner_info. */
lplb_status lplb_planner_levels(lplb_planner *planner, lplb_level *levels, int64_t n_groups, void *stream);

/* The latest plan's tokens per physical expert over all sources, [n_physical]. On CUDA waits for the stream. */
lplb_status lplb_planner_split(lplb_planner *planner, int64_t *tokens, int64_t n_physical, void *stream);

/* The part of it that comes from this planner's rank (LPLB_WHOLE_BATCH: all of it), [n_physical]. On CUDA waits for the stream. */
lplb_status lplb_planner_assignment(lplb_planner *planner, int64_t *tokens, int64_t n_physical, void *stream);

/*
 * History: tokens[n_logical] = the tokens of each logical expert, summed over the ranks as the solves saw them and over all plans since
 * the planner was created or its history was reset, for lplb_place. Needs LPLB_RECORD_HISTORY in the config and a planner with replicas
 * (others count nothing). Plans of captured graphs are added up as well, since the kernels that plan add; new placements change nothing.
 * at: how many plans must be in it, LPLB_ANY_PLAN: however many there are. plans: NULL, or their number.
 * The ranks make the same plans in the same order, each in its own time. The history is read where the call stands in the stream, so
 * ranks that call at the same place of their program read the same numbers, and ranks that do not would place experts differently; `at`
 * is how a rank notices: LPLB_ERROR_WRONG_ORDER, and nothing is written, if there are more or fewer plans. On CUDA waits for the stream.
 */
#define LPLB_ANY_PLAN (-1)
lplb_status lplb_planner_history(lplb_planner *planner, int64_t at, int64_t *tokens, int64_t n_logical, int64_t *plans, void *stream);

/* Ratios of lplb_metrics are integers, in units of 1 / LPLB_METRICS_ONE and rounded down, so that their sums are exact. */
#define LPLB_METRICS_ONE (INT64_C(1) << 22)

/* What the plans have achieved since the planner was created or its metrics were reset, added up. */
typedef struct lplb_metrics {
    int64_t struct_size;   /* sizeof(lplb_metrics); LPLB_METRICS_INIT sets it */
    int64_t plans;
    int64_t groups;        /* groups that were solved and had tokens: those that the ratios are of */
    int64_t imbalance_sum; /* of max_load / mean, see lplb_group_info */
    int64_t imbalance_max;
    int64_t gap_sum;       /* of bound / mean - 1: what only another placement could win */
    int64_t gap_max;
    int64_t tokens;        /* of all ranks */
    int64_t moved;         /* of them, not to the original of their expert */
    int64_t own_rank;      /* where the tokens of this planner's rank went, as in lplb_plan_info */
    int64_t own_node;
    int64_t other_nodes;
    int64_t uncertified;   /* groups without a proof that no split is better: of LPLB_SOLVER_IPM only */
    int64_t overflow;      /* CUDA: groups that were not solved, as in lplb_plan_info; counted in none of the above but own_rank and so on */
    int64_t invalid_ids;   /* as in lplb_plan_info; also of calls that make no plan */
} lplb_metrics;

#define LPLB_METRICS_INIT { (int64_t)sizeof(lplb_metrics), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }

/*
 * The metrics after the latest plan that is done; LPLB_RECORD_METRICS in the config, else all is 0. Reads host memory only: no CUDA call,
 * no waiting, from any thread at any time, also while another one is inside a call on this planner and after the device has failed. All
 * numbers but invalid_ids are of one moment.
 */
lplb_status lplb_planner_get_metrics(const lplb_planner *planner, lplb_metrics *metrics);

/*
 * Starts the history, the metrics, or both anew: record is LPLB_RECORD_* added up; what the planner does not keep is left out. Queued on
 * the stream as a plan is: allocates nothing, waits for nothing, can be captured.
 */
lplb_status lplb_planner_reset(lplb_planner *planner, int64_t record, void *stream);

/* ---- 5. Placement alone ----------------------------------------------------------------------------------------------------- */

/*
 * EPLB for several layers at once: which expert each of n_physical slots on n_ranks ranks holds. weight: [n_layers][n_logical] float32,
 * finite, >= 0. Where n_nodes divides n_groups it is hierarchical (groups of experts to nodes, replicas inside the node, slots to ranks),
 * otherwise global. Ties go to the lowest index.
 * It writes phy2log [n_layers][n_physical], replica [n_layers][n_physical] (which replica of its expert a slot is, from 0) and logcnt
 * [n_layers][n_logical]; each may be NULL. log2phy follows: log2phy[layer][phy2log[p]][replica[p]] = p. All are int64, as in DeepSeek's
 * EPLB. lplb_place with LPLB_PLACE_DEEPSEEK writes the same placement as int32, which lplb_planner_set_placement takes.
 * n_logical <= n_physical <= 2^20; n_ranks divides n_physical; if hierarchical, n_nodes divides n_ranks and n_groups divides n_logical.
 * Host, synchronous, thread-safe.
 */
lplb_status lplb_eplb_rebalance(const float *weight, int64_t n_layers, int64_t n_logical, int64_t n_physical, int64_t n_groups,
                                int64_t n_nodes, int64_t n_ranks, int64_t *phy2log, int64_t *replica, int64_t *logcnt, char *message,
                                int64_t message_size);

/*
 * Homes of a general placement phy2log [n_physical] on ep_size ranks: homes [n_logical] = for each expert the slot that owns its weights,
 * its gradient and its optimizer state. Every rank owns n_logical / ep_size experts where the replicas allow it (remainders go to the
 * lowest ranks); otherwise the largest number of a rank is as small as it can be. Where there is a choice, the replica that comes first in
 * its rank's block is the home, which for a placement by a topology is the original.
 * former: NULL, or [n_logical] slots, e.g. the homes under another placement of this shape: an expert stays on that rank where it still
 * stands there and the numbers allow it, so that little optimizer state has to move.
 * Equal inputs give equal homes. ep_size is at most LPLB_MAX_RANKS. Host, synchronous, allocates, thread-safe.
 */
lplb_status lplb_placement_homes(const int32_t *phy2log, int64_t n_physical, int64_t n_logical, int64_t ep_size, const int32_t *former,
                                 int32_t *homes, char *message, int64_t message_size);

/*
 * Rows: where the experts lie in the buffers [n_rows, ...] that a rank keeps for training. rows [ep_size][1 + n_rows]: for each rank first
 * how many rows are for the experts whose home it is, then the expert in each row, -1 for a row that is not in use; the copies come behind
 * the own ones. n_rows is n_physical / ep_size + 2 * slack.
 * slack: by how many a rank's number of own experts may change in a later placement; as many rows stay free among the own ones and
 * among the copies.
 * former: NULL, or the rows under the placement before. Then the numbers of own rows stay, and experts that stay own, or copies, keep their
 * rows; a placement that does not fit is refused. homes [n_logical]: as by lplb_placement_homes, near to the former ones.
 * row_of_slot [n_physical]: the row of each slot's expert on its rank, -1 for an empty slot. homes and row_of_slot may be NULL; rows may be
 * former.
 * Equal inputs give equal rows. Host, synchronous, allocates, thread-safe; so is the next call.
 */
lplb_status lplb_placement_rows(const int32_t *phy2log, int64_t n_physical, int64_t n_logical, int64_t ep_size, int64_t slack,
                                const int32_t *former, int32_t *rows, int32_t *homes, int32_t *row_of_slot, char *message,
                                int64_t message_size);

enum { LPLB_MOVES_PULL = 0,   /* weights from homes to copies; with former only to those that did not lie there before */
       LPLB_MOVES_PUSH = 1,   /* gradients from copies to homes; former is NULL */
       LPLB_MOVES_HOMES = 2   /* experts whose home goes to another rank than in former */ };

/*
 * Which rows of a buffer go where: moves [n_moves][5] = round, source rank, source row, target rank, target row, in the order of the
 * rounds; room for [ep_size * n_rows][5]. In one round no rank sends twice and none receives twice. LPLB_MOVES_PULL and _HOMES take the
 * fewest rounds that there can be; in LPLB_MOVES_PUSH what comes to one home row comes from the lowest rank first, since sums depend on
 * their order.
 */
lplb_status lplb_placement_moves(int32_t kind, const int32_t *rows, const int32_t *former, int64_t n_logical, int64_t ep_size,
                                 int64_t n_rows, int32_t *moves, int64_t *n_moves, char *message, int64_t message_size);

/* Policies of lplb_place: what a placement is made for. */
enum {
    LPLB_PLACE_FLOW = 0,     /* exact dispatch under loads that drift: the best of several candidates, scored by the solver */
    LPLB_PLACE_BALANCED = 1, /* an even split over replicas: the lightest heaviest rank */
    LPLB_PLACE_DEEPSEEK = 2, /* DeepSeek's EPLB, as lplb_eplb_rebalance */
    LPLB_PLACE_REPAIR = 3    /* few changes to the previous placement, where the solver's witness shows that it is tight */
};

/* max_moves of a placement that may only give a slot to experts which no rank holds any more. */
#define LPLB_PLACE_KEEP (-2)

/* What lplb_place shall do. Begin with LPLB_PLACE_CONFIG_INIT; 0 stands for the default everywhere. */
typedef struct lplb_place_config {
    int64_t struct_size;
    int32_t policy;      /* LPLB_PLACE_... */
    int32_t even_homes;  /* 1: for training, where every rank shall own equally many experts, or as many +-1 where they do not divide. flow
                            and balanced swap a few slots where that is needed; a placement that does not allow it is refused; 0: no */
    int64_t n_snapshots; /* 0: one */
    int64_t n_layers;
    int64_t n_logical;
    int64_t n_ranks;
    int64_t n_slots;           /* the most slots of a rank: phy2log has n_ranks * n_slots entries a layer */
    const int64_t *slots;      /* NULL: every rank has n_slots; or [n_ranks], 0 .. n_slots, 0 for a dead rank */
    int64_t n_nodes;           /* hosts, whose ranks are consecutive; 0: one */
    int64_t n_groups;          /* groups of experts selected together; where n_nodes divides it, balanced and deepseek keep a group on one host; 0: one */
    const int32_t *previous;   /* NULL, or the placement in force, [n_layers][n_ranks * n_slots] */
    int64_t max_moves;         /* the most experts that may come new to a rank, over all layers; 0 or -1: any number; LPLB_PLACE_KEEP:
                                  none. Not with deepseek */
    double tolerance;          /* of balanced: by how much of the mean the heaviest rank may exceed it; 0: .0005; below 0: none */
} lplb_place_config;
#define LPLB_PLACE_CONFIG_INIT { (int64_t)sizeof(lplb_place_config), LPLB_PLACE_FLOW, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }

/* What one layer's placement is worth on the history that it was made from. */
typedef struct lplb_place_report {
    double even_balance;  /* mean / max load of the ranks that have slots, with an even split over replicas */
    double exact_balance; /* the same with the exact split */
    int64_t duplicates;   /* slots that hold an expert which their rank also holds in another slot */
    int64_t moves;        /* experts on ranks that did not hold them in the previous placement */
} lplb_place_report;

/*
 * Places all layers by one policy. history: [n_snapshots][n_layers][n_logical] float64, tokens per expert, finite, >= 0. phy2log:
 * [n_layers][n_ranks * n_slots], written: the expert of each slot, -1 where a rank has no such slot or nothing to put there. reports:
 * NULL, which saves the solver's time for them, or [n_layers]. Placements of LPLB_PLACE_FLOW and LPLB_PLACE_REPAIR are for exact dispatch:
 * with an even split they can be worse than those of LPLB_PLACE_BALANCED. With previous, experts that stay on a rank stay in their slot;
 * those that no rank holds any more get a slot whatever max_moves is, and count. LPLB_PLACE_REPAIR needs previous, and moves 1% of the slots
 * where max_moves is not given. LPLB_PLACE_FLOW with max_moves repairs, too, and LPLB_PLACE_BALANCED goes towards the best even split.
 * What ranks with equally many slots are called is free (never with deepseek): with previous and without max_moves they are named so that
 * many experts stay; without previous so that copies of an expert stand on different hosts and, with flow or even_homes, so that over all
 * layers no rank has more copies to send or to get than others.
 * Equal inputs give equal placements. After an error nothing is written. Host, synchronous, allocates, thread-safe.
 */
lplb_status lplb_place(const lplb_place_config *config, const double *history, int32_t *phy2log, lplb_place_report *reports,
                       char *message, int64_t message_size);

/*
 * What a placement of all layers is worth, whoever made it, and what to know of it. The arguments come first; then the results, host,
 * written, each NULL where it is not wanted. Begin with LPLB_PLACEMENT_REPORT_INIT.
 */
typedef struct lplb_placement_report {
    int64_t struct_size;
    int64_t n_snapshots;    /* 0: one */
    int64_t n_layers;
    int64_t n_logical;
    int64_t n_ranks;
    int64_t n_slots;        /* slots that a rank has in phy2log */
    int64_t n_nodes;        /* hosts, whose ranks are consecutive; 0: one */
    const int32_t *phy2log; /* [n_layers][n_ranks * n_slots], every expert at least once in each layer, -1 for an empty slot */
    const double *history;  /* [n_snapshots][n_layers][n_logical] tokens per expert; NULL: no balance and nothing about tokens is wanted */
    double *even_balance;   /* [n_layers]: mean / max load of the ranks that hold experts, with an even split over replicas */
    double *exact_balance;  /* [n_layers]: the same with the exact split */
    int64_t *duplicates;    /* [n_layers]: slots that hold an expert which their rank also holds in another slot */
    int32_t *homes;         /* [n_layers][n_logical]: the slot of each expert's home, as by lplb_placement_homes */
    int64_t *pulls;         /* [n_layers][n_ranks]: copies of other ranks' experts on the rank: weights that arrive in a pull, gradients that
                               leave in a push */
    int64_t *pushes;        /* [n_layers][n_ranks]: copies of the rank's experts on other ranks: gradients that arrive in a push, weights
                               that leave in a pull */
    double *leaves_rank;    /* [n_layers]: share of the tokens that leave their rank with the exact split, where every rank that holds experts */
    double *leaves_node;    /*   brings the same number of tokens of each expert; and of those that leave their host */
    double *inbound;        /* [n_layers][n_ranks]: the tokens that then reach the rank from others, over the mean load */
} lplb_placement_report;
#define LPLB_PLACEMENT_REPORT_INIT { (int64_t)sizeof(lplb_placement_report), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }

/* Writes the results that report names. After an error nothing is written. Host, synchronous, allocates, thread-safe. */
lplb_status lplb_placement_judge(const lplb_placement_report *report, char *message, int64_t message_size);

/* ---- 6. One-off solve ------------------------------------------------------------------------------------------------------- */

/*
 * The best split of loads [n_logical] (each 0 .. LPLB_MAX_LOAD) over a general placement phy2log [n_physical] on ep_size ranks, one
 * group. tokens: NULL or [n_physical], the tokens of each slot. info: NULL or one struct. Host, synchronous, allocates, thread-safe.
 */
lplb_status lplb_solve(const int64_t *loads, int64_t n_logical, const int32_t *phy2log, int64_t n_physical, int64_t ep_size,
                       int64_t *tokens, lplb_group_info *info, char *message, int64_t message_size);

/* The same for other costs than tokens. */
typedef struct lplb_solve_config {
    int64_t struct_size;     /* sizeof(lplb_solve_config); LPLB_SOLVE_CONFIG_INIT sets it */
    const int64_t *loads;    /* [n_logical]; with speed or fixed at most 2^42 tokens in all */
    const int32_t *phy2log;  /* [n_physical] */
    int64_t n_logical;
    int64_t n_physical;
    int64_t ep_size;
    int32_t unit;            /* as in lplb_config */
    int32_t unused;          /* 0 */
    const int32_t *speed;    /* [ep_size] as in lplb_planner_set_capacity, or NULL */
    const int32_t *fixed;
    int64_t *tokens;         /* written: NULL or [n_physical], the tokens of each slot */
    lplb_group_info *info;   /* written: NULL or one */
    lplb_level *level;       /* written: NULL or one */
} lplb_solve_config;

#define LPLB_SOLVE_CONFIG_INIT { (int64_t)sizeof(lplb_solve_config), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }

/* Solves what the config says. Host, synchronous, allocates, thread-safe. */
lplb_status lplb_solve_with(const lplb_solve_config *config, char *message, int64_t message_size);

/* ---- 7. Exchange -------------------------------------------------------------------------------------------------------------- */

/*
 * Every rank's counts on every rank, in about one NVLink round trip: each rank stores its counts straight into a small buffer on every
 * other GPU of its NVLink domain, and waits until everybody's have arrived in its own. No host, no collective library, no multicast.
 *
 *   1. connect        maps the peers' buffers and tries the exchange, given a function that gathers bytes. In steps of one's own: create
 *                     with pointers that somebody else mapped, or begin -> gather the blobs -> finish with CUDA IPC
 *   2. all_gather     or lplb_planner_attach_exchange, and lplb_planner_run does it inside
 *   3. the end        wait for the streams, a barrier of the ranks, close, a barrier, destroy
 *
 * One exchange serves one stream order: its calls follow one another, in the same order and number on all ranks, eager or replayed from
 * CUDA graphs in any mixture. Work on several streams at once needs an exchange for each. Calls on one exchange from two threads at once
 * are refused with LPLB_ERROR_BUSY (abort and report may come from any thread at any time).
 * With several nodes the ranks are numbered node by node, as many in each; the counts go along the rail first (the same local rank of the
 * other nodes, by lplb_rail_ops), then over NVLink.
 */
#define LPLB_EXCHANGE_MAX_RANKS 72      /* of one NVLink domain */
#define LPLB_EXCHANGE_MAX_NODES 1024
#define LPLB_EXCHANGE_BLOB_BYTES 128

typedef struct lplb_exchange lplb_exchange;

enum {
    LPLB_EXCHANGE_TRAP = 0,   /* a time-out ends the kernel with a trap: the CUDA context is lost, nothing goes on with wrong counts */
    LPLB_EXCHANGE_REPORT = 1  /* it is only reported: the counts that are missing read as 0, later calls wait for nothing */
};

enum { LPLB_EXCHANGE_FINE = 0, LPLB_EXCHANGE_TIMED_OUT = 1, LPLB_EXCHANGE_ABORTED = 2, LPLB_EXCHANGE_LOST = 3,
       LPLB_EXCHANGE_DISAGREED = 4 };

typedef struct lplb_exchange_report {
    int64_t struct_size;   /* sizeof(lplb_exchange_report) */
    int32_t code;          /* LPLB_EXCHANGE_FINE, _TIMED_OUT, _ABORTED, _LOST: a rail's connection broke; or _DISAGREED: the
                              row of `peer` came from a planner with another digest */
    int32_t rank;          /* that waited, numbered in its NVLink domain */
    int32_t peer;          /* the first one found missing, numbered in its own NVLink domain; -1: not known */
    uint32_t epoch;        /* number of the call */
    int64_t waited_ns;
    int32_t peer_node;     /* the NVLink domain of `peer`, another one where a rail ended the exchange; -1: not known */
    int32_t reserved;      /* 0 */
} lplb_exchange_report;

/* The other nodes' counts. Any library can stand behind it; it lives as long as the exchange. */
typedef struct lplb_rail_ops {
    int64_t struct_size;   /* sizeof(lplb_rail_ops) */
    void *context;         /* handed to the functions */
    /*
     * Queues on `stream`: gathered[node][n_counts] = counts[n_counts] of this rank's local rank on every node, this one included; int32
     * device pointers. 0, or a failure: LPLB_ERROR_TIMEOUT and LPLB_ERROR_PEER_LOST end the exchange and come back to the caller as they
     * are, any other number as LPLB_ERROR_CUDA. Called by lplb_exchange_all_gather, in graph capture too.
     */
    int32_t (*all_gather)(void *context, const int32_t *counts, int32_t *gathered, int64_t n_counts, void *stream);
    const char *(*error)(void *context); /* NULL, or words about the last failure */
    void (*destroy)(void *context);      /* NULL, or called by lplb_exchange_destroy */
    /*
     * NULL, or ends all waiting of the rail on this rank, now and in future, and makes destroy wait for no other rank. Called by
     * lplb_exchange_abort from any thread, also beside all_gather; it may come several times.
     */
    void (*abort)(void *context);
    /*
     * NULL, or what ended the rail on the device: code, peer_node (the node that was missing), epoch and waited_ns of the report. Reads
     * host memory only, from any thread; the rest of the report is filled by the exchange.
     */
    void (*report)(void *context, lplb_exchange_report *report);
    /*
     * NULL, or a word of device memory that is not 0 once the rail has given up waiting. The exchange then sends nothing on, so that the
     * ranks of this node time out as well instead of planning with zeros.
     */
    const uint32_t *failed;
} lplb_rail_ops;

typedef struct lplb_exchange_config {
    int64_t struct_size;   /* sizeof(lplb_exchange_config); LPLB_EXCHANGE_CONFIG_INIT sets it */
    int32_t device;        /* CUDA ordinal */
    int32_t policy;        /* LPLB_EXCHANGE_TRAP or LPLB_EXCHANGE_REPORT */
    int64_t n_ranks;       /* ranks of this NVLink domain, 1 .. LPLB_EXCHANGE_MAX_RANKS */
    int64_t rank;          /* this one's number among them */
    int64_t n_counts;      /* int32 from each rank, 1 .. LPLB_MAX_LOGICAL + 1; for planners lplb_counts_width(n_logical) */
    int64_t n_nodes;       /* NVLink domains, 1 .. LPLB_EXCHANGE_MAX_NODES; above 1 needs a rail */
    int64_t node;          /* this one's number among them */
    int64_t timeout_ms;    /* longest wait for a peer on the device's clock; 0: no limit */
    int64_t first_epoch;   /* number of the first call, 0 .. 2^32-1, the same on all ranks; any value works, tests use some near 2^32 */
    const lplb_rail_ops *rail; /* NULL: one node. Copied; once the exchange exists it owns the context, after a failure it does not */
} lplb_exchange_config;

#define LPLB_EXCHANGE_CONFIG_INIT { (int64_t)sizeof(lplb_exchange_config), 0, LPLB_EXCHANGE_TRAP, 0, 0, 0, 1, 0, 30000, 1, 0 }

typedef struct lplb_connect_config {
    int64_t struct_size;   /* sizeof(lplb_connect_config); LPLB_CONNECT_CONFIG_INIT sets it */
    int32_t device;        /* this rank's CUDA ordinal, or LPLB_DEVICE_CPU, with which no rank can be connected */
    int32_t policy;        /* as in lplb_exchange_config, from connect's return on; so is timeout_ms */
    int64_t n_ranks;       /* ranks that gather, all NVLink domains together */
    int64_t rank;          /* this one's place among them; they are numbered node by node */
    int64_t n_counts;      /* int32 from each rank; for planners lplb_counts_width(n_logical) */
    int64_t n_nodes;       /* NVLink domains, equal runs of ranks; 0: one for each host */
    int64_t timeout_ms;    /* the trial waits for as long as well, but not above 30 s */
    int64_t first_epoch;
    const lplb_rail_ops *rail; /* NULL: one node. Once connected the exchange owns the context; after any failure it is the caller's */
    const char *failure;   /* NULL, or why this rank cannot take part: then no rank is connected, and all get these words */
    lplb_gather gather;
    void *context;         /* handed to gather */
} lplb_connect_config;

#define LPLB_CONNECT_CONFIG_INIT \
    { (int64_t)sizeof(lplb_connect_config), LPLB_DEVICE_CPU, LPLB_EXCHANGE_TRAP, 0, 0, 0, 0, 30000, 1, 0, 0, 0, 0 }

/*
 * An exchange that works, or the reason why there is none; every rank calls it. Compares what the ranks ask for, maps their buffers by CUDA
 * IPC and uses the exchange a few times, comparing what it brings with what `gather` brings. The same status and words on all ranks:
 *   LPLB_OK                       *exchange is ready
 *   LPLB_ERROR_UNSUPPORTED        it cannot be here (a rank on the CPU, several hosts and no rail, GPUs without a path to each other,
 *                                 a trial that failed ...): the caller brings the counts by its own means
 *   LPLB_ERROR_DISAGREEMENT       n_counts, n_nodes, first_epoch, policy or the presence of a rail differ
 *   LPLB_ERROR_INVALID_ARGUMENT   a rank's config breaks a rule
 * On this rank alone perhaps: LPLB_ERROR_PEER_LOST where `gather` failed. Then *exchange may be one of which only destroy is left, once no
 * rank is in this call any more, since its memory may still be written until then; after the other failures it is NULL and nothing is left.
 * A rank that is called without config, exchange or gather, or with a wrong struct_size, n_ranks or rank, fails and meets nobody.
 * Host, synchronous, allocates, uses the device's default stream.
 */
lplb_status lplb_exchange_connect(const lplb_connect_config *config, lplb_exchange **exchange, char *message, int64_t message_size);

/* Bytes of the buffer that every rank needs for this config (aligned to 16). */
lplb_status lplb_exchange_buffer_bytes(const lplb_exchange_config *config, int64_t *bytes, char *message, int64_t message_size);

/*
 * From pointers: buffers[n_ranks] are addresses on this device of every rank's buffer of lplb_exchange_buffer_bytes, the own one among
 * them, mapped for reading and writing over NVLink (by CUDA virtual memory, IPC, PyTorch symmetric memory, nvshmem_ptr). They stay the
 * caller's and must outlive the exchange. This fills the own buffer and waits for that; no rank may call all_gather before all ranks have
 * returned from create, so a barrier of the caller's comes in between. Allocates. message as in lplb_planner_create.
 */
lplb_status lplb_exchange_create(const lplb_exchange_config *config, void *const *buffers, lplb_exchange **exchange, char *message,
                                 int64_t message_size);

/*
 * With CUDA IPC, for processes of one host: begin allocates the own buffer (2 MiB or more by cudaMalloc) and writes what the others must
 * know to blob (LPLB_EXCHANGE_BLOB_BYTES). The caller gathers the blobs of all ranks, in rank order, and gives them to finish, which maps
 * the peers' buffers; after it all_gather may be called at once. Ranks that are on another host, that disagree about the config, or whose
 * GPUs cannot reach each other are refused in words; after a refusal only destroy is left.
 */
lplb_status lplb_exchange_begin(const lplb_exchange_config *config, lplb_exchange **exchange, void *blob, char *message,
                                int64_t message_size);
lplb_status lplb_exchange_finish(lplb_exchange *exchange, const void *blobs);

/*
 * gathered[n_nodes * n_ranks][n_counts] = the counts[n_counts] of every rank, in rank order; int32 device pointers. Queues one kernel of
 * few blocks on the stream (after the rail's work where there are several nodes) and returns. Can be captured; allocates nothing.
 * LPLB_ERROR_TIMEOUT once an earlier call has timed out or was aborted, LPLB_ERROR_PEER_LOST once a rail has lost its connection, with
 * the words of lplb_exchange_report.
 */
lplb_status lplb_exchange_all_gather(lplb_exchange *exchange, const int32_t *counts, int32_t *gathered, void *stream);

/* Policy and time limit of the calls (and captures) from now on. */
lplb_status lplb_exchange_set_limits(lplb_exchange *exchange, int32_t policy, int64_t timeout_ms);

/*
 * Ends all waiting on this rank, now and in future; never traps. For a host that knows that a peer is gone. What was queued behind goes on
 * with zeros for the missing counts, later calls fail with LPLB_ERROR_TIMEOUT. Over NVLink within a millisecond; a rail as soon as its
 * library can (lplb_rail_ops.abort: NVSHMEM's within a millisecond too, NCCL's when the communicator has been torn down); one without
 * abort waits on, and what it brings then is not used.
 */
void lplb_exchange_abort(lplb_exchange *exchange);

/* What ended the exchange, if anything did. Reads host memory only: no CUDA call, no waiting, and it works after a trap too. */
lplb_status lplb_exchange_get_report(const lplb_exchange *exchange, lplb_exchange_report *report);

/*
 * Unmaps the peers' buffers, after waiting for the device; no call can follow but report and destroy. The caller waits for its streams and
 * for a barrier of the ranks before (nobody may still write to a buffer), and for another one after it, before destroy frees the own
 * buffer. A call that another thread is inside finishes first. CUDA graphs that hold calls of this exchange must not be replayed any more.
 * NULL is fine.
 */
void lplb_exchange_close(lplb_exchange *exchange);

/*
 * Ends the exchange; closes it if nobody did. Planners that it is attached to refuse to run until another is attached, and may be
 * destroyed before or after. Where a planner is inside a call with it, that call finishes first. NULL is fine.
 */
void lplb_exchange_destroy(lplb_exchange *exchange);

/* Words about the last failed call on this exchange, "" if none failed. As lplb_planner_error. */
const char *lplb_exchange_error(const lplb_exchange *exchange);

/*
 * From now on lplb_planner_run of this CUDA planner, where `gathered` is NULL, exchanges the counts itself: all ranks must then call it in
 * the same order. The planner was created with a rank, on the exchange's device; n_counts is lplb_counts_width of its n_logical,
 * n_nodes * n_ranks its ep_size, and its rank is node * n_ranks + rank. Several planners of one stream order may share an exchange; all
 * ranks attach them in the same order. exchange NULL: as before. Waits for the planner's device.
 */
lplb_status lplb_planner_attach_exchange(lplb_planner *planner, lplb_exchange *exchange);

/* ---- 8. Replicas -------------------------------------------------------------------------------------------------------------- */

/*
 * Weights and gradients of copies, for processes of one host: buffers [n_rows][row_bytes] on every rank, laid out by lplb_placement_rows
 * and mapped by all ranks, between which kernels copy and add over NVLink.
 *
 *   1. create     on an exchange of one node and one count, by which the ranks wait for each other on the device. Its time limit, policy,
 *                 report and abort are those of the replicas: a rank that is late, lost or in another call ends the calls of the others
 *   2. add        once for each buffer, all ranks together: memory of the library's, or the caller's where it can be mapped
 *   3. place      which row holds what; at the start and after each new placement
 *   4. pull, push as often as wanted, eager or from CUDA graphs, also from graphs captured before a new placement
 *   5. the end    wait for the streams, close, a barrier of the ranks, destroy, then the exchange
 *
 * All ranks make the same calls in the same order, which belong to one stream order with the other uses of the exchange.
 */
#define LPLB_REPLICAS_MAX_TENSORS 32

typedef struct lplb_replicas lplb_replicas;

typedef int32_t lplb_float;
enum { LPLB_FLOAT32 = 0, LPLB_FLOAT64 = 1, LPLB_FLOAT16 = 2, LPLB_BFLOAT16 = 3 };

enum { LPLB_REPLICAS_WEIGHTS = 0, LPLB_REPLICAS_GRADIENTS = 1 };

typedef struct lplb_replicas_config {
    int64_t struct_size;     /* sizeof(lplb_replicas_config); LPLB_REPLICAS_CONFIG_INIT sets it */
    lplb_exchange *exchange; /* with n_nodes 1 and n_counts 1; outlives the replicas */
    int64_t n_logical;
    int64_t n_rows;          /* of each buffer on each rank */
    int64_t blocks;          /* CUDA blocks that copy, each of 512 threads; 0: as many as measured best */
} lplb_replicas_config;

#define LPLB_REPLICAS_CONFIG_INIT { (int64_t)sizeof(lplb_replicas_config), 0, 0, 0, 0 }

typedef struct lplb_replicas_tensor {
    int64_t struct_size;     /* sizeof(lplb_replicas_tensor); LPLB_REPLICAS_TENSOR_INIT sets it */
    int32_t kind;            /* LPLB_REPLICAS_WEIGHTS: pulled; LPLB_REPLICAS_GRADIENTS: pushed */
    lplb_float dtype;        /* of gradients; weights are bytes */
    int64_t row_bytes;       /* fastest in multiples of 16 */
    void *memory;            /* NULL: the library gives zeroed memory. Else [n_rows][row_bytes] on the exchange's device, aligned to 16,
                                from cudaMalloc, which outlives the replicas. CUDA IPC cannot map other memory (CUDA's virtual memory,
                                which PyTorch takes with expandable_segments; cudaMallocAsync; managed memory): it is refused */
    const char *failure;     /* NULL, or why this rank cannot take part: then all ranks get these words */
    lplb_gather gather;
    void *context;           /* handed to gather */
} lplb_replicas_tensor;

#define LPLB_REPLICAS_TENSOR_INIT { (int64_t)sizeof(lplb_replicas_tensor), LPLB_REPLICAS_WEIGHTS, LPLB_FLOAT32, 0, 0, 0, 0, 0 }

/* message as in lplb_planner_create. Allocates. */
lplb_status lplb_replicas_create(const lplb_replicas_config *config, lplb_replicas **replicas, char *message, int64_t message_size);

/*
 * One more buffer, whose address here comes back in *memory. Collective: fails on all ranks alike, and then nothing is left of it, unless
 * `gather` failed (LPLB_ERROR_PEER_LOST, on this rank alone perhaps): then what peers may have mapped stays until destroy.
 * LPLB_ERROR_UNSUPPORTED: memory that cannot be mapped. LPLB_ERROR_DISAGREEMENT: the ranks describe different tensors. Host, synchronous,
 * allocates; waits for the device.
 */
lplb_status lplb_replicas_add(lplb_replicas *replicas, const lplb_replicas_tensor *tensor, void **memory);

/*
 * rows [n_ranks][1 + n_rows] of lplb_placement_rows, host, the same on all ranks. Moves no tensor. Waits for the stream, then writes the
 * tables in place, so that captured graphs follow. Ranks that pull or push under different rows are found out on the device.
 */
lplb_status lplb_replicas_place(lplb_replicas *replicas, const int32_t *rows, void *stream);

/*
 * All weights from homes to copies; only_new not 0: to copies alone that did not lie in the same row under the rows before. Homes' weights
 * are read once the streams of all ranks have come to this call; the streams go on when all have read. Queues one kernel; allocates
 * nothing; can be captured. LPLB_ERROR_TIMEOUT, _PEER_LOST or _DISAGREEMENT where an earlier call has failed on the device.
 */
lplb_status lplb_replicas_pull(lplb_replicas *replicas, int32_t only_new, void *stream);

/*
 * Gradients of copies are added to those of their homes, from the lowest rank to the highest, each sum rounded to dtype as PyTorch does,
 * and are zero then. As pull, in two kernels. The owner zeroes its copies, since writing zeros back would take the link of the others' reads.
 */
lplb_status lplb_replicas_push(lplb_replicas *replicas, void *stream);

/*
 * Unmaps the peers' memory, after waiting for the device; only destroy can follow. Before the own memory is freed all ranks must have
 * closed. CUDA graphs that hold calls of these replicas must not be replayed any more. NULL is fine.
 */
void lplb_replicas_close(lplb_replicas *replicas);

/* Closes if nobody did, and frees the memory that the library gave. NULL is fine. */
void lplb_replicas_destroy(lplb_replicas *replicas);

/* Words about the last failed call, "" if none failed. As lplb_planner_error. */
const char *lplb_replicas_error(const lplb_replicas *replicas);
/* ---- 9. Layout ---------------------------------------------------------------------------------------------------------------- */

/*
 * Where the rows of a dispatch go, for an all-to-all of rows and a grouped product behind it. A choice is one of n_ids pairs of a token and
 * an expert, a row is one choice's token on its way. Each rank holds its experts in buffers of n_rows rows of weights, in which slot p lies
 * at row_of_slot[p], and sends its rows by rank and, for each rank, by buffer row.
 *
 * The assignment follows from the plan and from all ranks' counts, which travelled when it was made. So each rank knows, without asking
 * again, how many rows every other rank sends it for each of its slots: `received` is written from the latest plan. That holds where every
 * rank lays out the ids that it counted and rewrote by that plan. It does not where there is no plan (lplb_planner_run of a planner without
 * replicas), for ids of an earlier plan, and for a planner of the whole batch of several ranks: then set `exchanged`, let each rank bring
 * `sent` to the others by an all-to-all, and give what arrived as `received`. Or keep the layout itself for as long as the ids.
 *
 * Values on a device can be looked at by nobody before the work is done: what is wrong with them stands in `numbers`, on CPU planners too.
 */
#define LPLB_MAX_LAYOUT_ROWS 8192     /* ep_size * n_rows */

enum { LPLB_LAYOUT_SENT = 1,          /* lplb_layout.parts: order and sent, from ids */
       LPLB_LAYOUT_RECEIVED = 2,      /* received (if it is not given) and ends */
       LPLB_LAYOUT_BY_ROW = 4 };      /* by_row, from received */

enum { LPLB_LAYOUT_BAD_IDS = 1,       /* numbers[0]: some ids are neither -1 nor a slot (or the row of a slot is none); they count as -1 */
       LPLB_LAYOUT_OTHER_EXPERTS = 2, /* some slots do not hold the expert that `experts` says */
       LPLB_LAYOUT_OTHER_PLAN = 4,    /* the ids are not those of the latest plan, so `received` does not belong to them */
       LPLB_LAYOUT_NO_PLAN = 8,       /* numbers[1]: on CUDA, a placement has come and no plan since */
       LPLB_LAYOUT_BAD_RECEIVED = 16, /* a number in `received` is negative, or all together are above 2^31 - 1 */
       LPLB_LAYOUT_BY_ROW_SHORT = 32  /* n_by_row is below the rows received */ };

/* Words of lplb_layout.numbers. LPLB_LAYOUT_RANKS: rows sent to each rank [ep_size], received from each [ep_size], received for each buffer
   row [n_rows]. SENT and RECEIVED write their words each. */
enum { LPLB_LAYOUT_N_BAD_IDS = 2, LPLB_LAYOUT_N_OTHER_EXPERTS = 3, LPLB_LAYOUT_N_SENT = 4, LPLB_LAYOUT_N_RECEIVED = 5,
       LPLB_LAYOUT_RANKS = 8 };

typedef struct lplb_layout {
    int64_t struct_size;   /* sizeof(lplb_layout); LPLB_LAYOUT_INIT sets it */
    const void *ids;       /* [n_ids] slots, -1: no expert; as lplb_planner_run or lplb_planner_redirect wrote them */
    const void *experts;   /* NULL, or [n_ids] of the same dtype: the ids' logical experts, to be compared (-1 or out of range: none) */
    const void *row_of_slot; /* NULL: the slots of a rank in order; or [n_physical], 0 .. n_rows-1 each, anything for empty slots */
    int64_t n_ids;
    int64_t n_rows;        /* buffer rows of a rank; 0: its slots, n_physical / ep_size */
    lplb_dtype ids_dtype;
    lplb_dtype row_dtype;  /* of row_of_slot */
    int32_t parts;         /* LPLB_LAYOUT_*; 0: SENT and RECEIVED. Only what a part uses has to be there */
    int32_t exchanged;     /* 1: `received` is given. 0: it is written, by the latest plan, and `sent` is compared with that plan */
    int64_t *order;        /* [n_ids] the choices by rank and buffer row, stable; those without an expert last */
    int32_t *sent;         /* [ep_size][n_rows] rows for each buffer row of each rank */
    int32_t *received;     /* [ep_size][n_rows] rows from each rank for each buffer row of this one */
    int32_t *ends;         /* [n_rows] rows received for the buffer rows 0 .. i: the offsets of a grouped product */
    int32_t *numbers;      /* [LPLB_LAYOUT_RANKS + 2 * ep_size + n_rows], for a copy to the host */
    /* [n_by_row] the rows as they come, by rank and then buffer row, brought together by buffer row and then rank: output[i] =
       arrived[by_row[i]]. Behind the rows received, by_row[i] = i, so that with a larger n_by_row it is a permutation too. */
    int64_t *by_row;
    int64_t n_by_row;      /* at most 2^31 - 1 */
} lplb_layout;

#define LPLB_LAYOUT_INIT { (int64_t)sizeof(lplb_layout), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }

/*
 * Computes the parts of a layout. LPLB_ERROR_WRONG_ORDER where RECEIVED needs a plan and there is none. A CPU planner may allocate in the
 * first call with so many rows. Equal bits on the CPU and on the GPU, unless numbers[0] or numbers[1] names a problem: then only these two
 * are certain, and no other array holds a number outside its range of indices.
 */
lplb_status lplb_planner_layout(lplb_planner *planner, const lplb_layout *layout, void *stream);

#ifdef __cplusplus
}
#endif

#endif /* LPLB_H */
