/*
 * tables.h: a planner's tables on the device, and the plan that the kernels leave there. Plain C: Swift writes the tables
 * (DeviceImage.swift), the kernels read them.
 */
#ifndef LPLB_TABLES_H
#define LPLB_TABLES_H

#include <stdint.h>

#ifdef __CUDACC__
#define LPLBK_BOTH static inline __host__ __device__
#else
#define LPLBK_BOTH static inline
#endif

enum { LPLBK_MAX_GROUP = 512, LPLBK_MAX_LOGICAL = 1024, LPLBK_MAX_PHYSICAL = 4096 }; /* LPLB_MAX_*_CUDA of lplb.h */
enum { LPLBK_MAX_INTERIOR_GROUP = 128 }; /* ranks of a group for LPLB_SOLVER_IPM */
enum { LPLBK_MAX_COLOURS = 8 };
enum { LPLBK_MAX_LAYOUT_ROWS = 8192 }; /* LPLB_MAX_LAYOUT_ROWS of lplb.h */

/* The sizes that a planner keeps for its life. */
typedef struct lplbk_shape {
    int32_t ep_size, group_size, n_groups, n_nodes, n_logical, n_physical;
    int32_t n_redundant;    /* slot classes of a rank (columns of r2o); 0: there are none */
    int32_t bundle_experts; /* in every bundle; more than 1 only where every bundle has two places */
    int32_t rank;           /* of the planner; -1: whole batch */
    int32_t colours;        /* 2, 4 or 8: under every placement LaneFlow solves all groups, with so many colours at most; 0: not so */
    int32_t max_bundles, max_arcs; /* of one group, for every placement that this planner can have */
    int32_t unit;           /* tokens of a unit, INT32_MAX: all that an expert has; 0 or 1: tokens are what is counted */
    uint64_t unit_inverse;  /* floor(2^64 / unit) + 1, where there are units */
} lplbk_shape;

/*
 * One blob of int32. The offsets, in words, follow from the shape, so that a new placement of the same planner changes contents only
 * and captured graphs stay valid. "Bundle", "arc", "colour" and "place" are those of Sources/LPLBSolver/Network.swift. A group's image
 * numbers bundles, arcs and ranks within the group; elsewhere bundle b of group g is g * max_bundles + b.
 */
typedef struct lplbk_layout {
    int32_t digest;       /* 1 word: what the last word of every rank's row of counts must be */
    int32_t n_bundled;    /* 1 word: experts in bundles */
    int32_t n_replicated; /* 1 word: these, and the experts whose copy is on the same rank as the original */
    int32_t ranked;       /* 1 word: 1: the ranks differ, see speed and fixed; 0: they are alike */
    int32_t code;         /* [n_logical] slot of an expert's only replica, or -1 - i: it is replicated expert i */
    int32_t replicated;   /* [n_logical][4] lplbk_expert of the replicated: bundle by bundle, then those that are in none */
    int32_t expert;       /* [n_logical][4] lplbk_expert of all, group by group; in each bundle by bundle, then the others by slot */
    int32_t slot_expert;  /* [n_physical] the expert whose place a slot is; -1: of none, since another slot of its rank holds that expert */
    int32_t class_bundle; /* [ep_size * n_redundant] bundle of a slot class, -1: none */
    int32_t speed;        /* [ep_size] of LPLB_SPEED_NORMAL */
    int32_t fixed;        /* [ep_size] units */
    int32_t image;        /* [n_groups][image_words] */
    int32_t image_words;
    /* Offsets inside an image, behind its header. With colours > 0 there are lanes only. */
    int32_t lanes;        /* [4 or 8][32] lplbk_lane; group_size <= 32. 4 where colours says 2 or 4 */
    int32_t rank_start;   /* [group_size + 1] into rank_arc */
    int32_t rank_arc;     /* [max_arcs] arc | bundle << 13 | flip << 31; flip: a pair whose second place has the lower rank */
    int32_t arc_rank;     /* [max_arcs] */
    int32_t arc_slot;     /* [max_arcs] slot of the place (of the bundle's first expert) | 1 << 31 if it is not the first place */
    int32_t bundle_start; /* [max_bundles + 1] into the arcs */
    int32_t mask;         /* [max_bundles][mask_words] group_size <= 64: bit r: the bundle has a place on rank r */
    int32_t mask_words;   /* 1, 2 or 0 */
    int32_t words;        /* of the whole blob */
} lplbk_layout;

/* Words of an image's header. IMAGE_COLOUR + c: first bundle of colour c, one more than there are colours. */
enum {
    LPLBK_IMAGE_BUNDLES = 0, LPLBK_IMAGE_ARCS = 1,
    LPLBK_IMAGE_COLOURS = 2, /* 0: the group does not sweep */
    LPLBK_IMAGE_PAIRS = 3,   /* 1: the lanes are set, and LaneFlow solves the group */
    LPLBK_IMAGE_FIRST_EXPERT = 4, LPLBK_IMAGE_EXPERTS = 5, /* the group's part of `expert` */
    LPLBK_IMAGE_COLOUR = 16, LPLBK_IMAGE_HEADER_WORDS = 32
};

/* Words of one expert: its id; its bundle, or -1 - rank (in EP) if it has one place; slot of the first place | slot of the copy in a
   topology << 16, or LPLBK_NO_SLOT there; its slot class, or -1. */
enum { LPLBK_NO_SLOT = 0xffff };
static inline void lplbk_expert(int32_t *words, int32_t expert, int32_t place, int32_t slot, int32_t copy, int32_t slot_class) {
    words[0] = expert;
    words[1] = place;
    words[2] = (int32_t)((uint32_t)slot | (uint32_t)copy << 16);
    words[3] = slot_class;
}

/* For the arc of colour c on a rank: where its bundle's other place is, and which bundle. A rank without such an arc is its own partner. */
enum { LPLBK_LANE_BUNDLE = 8, LPLBK_LANE_COPY = 24, LPLBK_LANE_ARC = 25 };
static inline int32_t lplbk_lane(int32_t partner, int32_t bundle, int32_t is_copy) {
    return partner | bundle << LPLBK_LANE_BUNDLE | is_copy << LPLBK_LANE_COPY | 1 << LPLBK_LANE_ARC;
}
static inline int32_t lplbk_no_lane(int32_t rank) { return rank; }

static inline int32_t lplbk_section(int32_t *end, int64_t words) {
    const int32_t start = *end;
    *end += (int32_t)((words + 3) / 4 * 4); /* sections start at 16 bytes */
    return start;
}

static inline lplbk_layout lplbk_layout_of(const lplbk_shape *shape) {
    lplbk_layout at;
    int32_t end = 0;
    const int32_t lanes_only = shape->colours > 0;
    const int64_t ranks = lanes_only ? 0 : shape->group_size + 1, arcs = lanes_only ? 0 : shape->max_arcs;
    const int64_t bundles = lanes_only ? 0 : shape->max_bundles + 1;
    at.mask_words = lanes_only ? 0 : shape->group_size <= 32 ? 1 : shape->group_size <= 64 ? 2 : 0;
    lplbk_section(&end, LPLBK_IMAGE_HEADER_WORDS);
    at.lanes = lplbk_section(&end, 32 * (shape->group_size > 32 ? 0 : lanes_only && shape->colours <= 4 ? 4 : LPLBK_MAX_COLOURS));
    at.rank_start = lplbk_section(&end, ranks);
    at.rank_arc = lplbk_section(&end, arcs);
    at.arc_rank = lplbk_section(&end, arcs);
    at.arc_slot = lplbk_section(&end, arcs);
    at.bundle_start = lplbk_section(&end, bundles);
    at.mask = lplbk_section(&end, bundles * at.mask_words);
    at.image_words = end;
    end = 0;
    at.digest = end++;
    at.n_bundled = end++;
    at.n_replicated = end++;
    at.ranked = end++;
    at.code = lplbk_section(&end, shape->n_logical);
    at.replicated = lplbk_section(&end, 4ll * shape->n_logical);
    at.expert = lplbk_section(&end, 4ll * shape->n_logical);
    at.slot_expert = lplbk_section(&end, shape->n_physical);
    at.class_bundle = lplbk_section(&end, (int64_t)shape->ep_size * shape->n_redundant);
    at.speed = lplbk_section(&end, shape->ep_size);
    at.fixed = lplbk_section(&end, shape->ep_size);
    at.image = lplbk_section(&end, (int64_t)shape->n_groups * at.image_words);
    at.words = end;
    return at;
}

/* ---- What a plan leaves: one block of int32, [counters][group_info][quota][take][kept][sources] ---------------------------------- */

/* Words of the information of one group. Loads are units (of the lanes' experts, MOVED is too; of others it is tokens). Where the ranks
   differ, RANKED is 1, LEVEL the bound in 1/1024 unit and MEAN its first value, low word first; BOUND is MAX_LOAD then. */
enum {
    LPLBK_INFO_MAX_LOAD = 0, LPLBK_INFO_BOUND = 1, LPLBK_INFO_TOTAL = 2, LPLBK_INFO_MOVED = 3, LPLBK_INFO_ROUNDS = 4,
    LPLBK_INFO_CERTIFIED = 5, LPLBK_INFO_WITNESS_SIZE = 6,
    LPLBK_INFO_OWN_RANK = 7, LPLBK_INFO_OWN_NODE = 8, LPLBK_INFO_OTHER_NODES = 9, /* tokens of this planner's rank, by where they go */
    LPLBK_INFO_RANKED = 10, LPLBK_INFO_LEVEL = 12, LPLBK_INFO_MEAN = 14,
    LPLBK_INFO_WITNESS = 16, /* 16 words, bit r: rank r of the group */
    LPLBK_INFO_WORDS = 32
};

/* The counters that live as long as the planner, int64 each. */
enum { LPLBK_COUNTER_INVALID = 0, LPLBK_COUNTER_OVERFLOW = 1, LPLBK_COUNTERS = 8 };

/* Offsets in words. */
LPLBK_BOTH int32_t lplbk_plan_info(void) { return 2 * LPLBK_COUNTERS; }
LPLBK_BOTH int32_t lplbk_plan_quota(const lplbk_shape *shape) { return lplbk_plan_info() + shape->n_groups * LPLBK_INFO_WORDS; }
LPLBK_BOTH int32_t lplbk_plan_take(const lplbk_shape *shape) { return lplbk_plan_quota(shape) + shape->n_physical; }
/* [ep_size][n_local]: for each slot of the planner's rank, the counts of its expert on all ranks; valid with several sources. */
LPLBK_BOTH int32_t lplbk_plan_kept(const lplbk_shape *shape) { return lplbk_plan_take(shape) + shape->n_physical; }
/* 1 word: how many ranks' counts the plan was made for, 1 or ep_size; 0: there is no plan. */
LPLBK_BOTH int32_t lplbk_plan_sources(const lplbk_shape *shape) { return lplbk_plan_kept(shape) + shape->n_physical; }
LPLBK_BOTH int32_t lplbk_plan_words(const lplbk_shape *shape) { return lplbk_plan_sources(shape) + 1; }

/* ---- The solver's loop ----------------------------------------------------------------------------------------------------------- */

/* Passes by the plain rule; in later ones excess spills, and the bound is raised only when nothing else is left. */
enum { LPLBK_PLAIN_ROUNDS = 32 };

/* More passes than there can be (FlowSolver.swift has the proof): a guard that is never met. */
LPLBK_BOTH int32_t lplbk_max_rounds(int32_t group_size) {
    return LPLBK_PLAIN_ROUNDS + (group_size + 1) * (group_size * group_size + 2);
}

#endif /* LPLB_TABLES_H */
