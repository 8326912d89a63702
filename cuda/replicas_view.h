/*
 * replicas_view.h: what the host and the kernels share of replicas: which rows of which buffers go where. Plain C: Swift fills it in host
 * memory and uploads it, so that captured graphs read what the latest placement wrote; replicas.cu reads it on the device.
 */
#ifndef LPLB_REPLICAS_VIEW_H
#define LPLB_REPLICAS_VIEW_H

#include <stdint.h>

#include "exchange_view.h"

enum { LPLBK_REPLICAS_MAX_TENSORS = 32 };

/* What lplb.h says in LPLB_REPLICAS_* and LPLB_FLOAT*. */
enum { LPLBK_WEIGHTS = 0, LPLBK_GRADIENTS = 1 };
enum { LPLBK_FLOAT32 = 0, LPLBK_FLOAT64 = 1, LPLBK_FLOAT16 = 2, LPLBK_BFLOAT16 = 3 };

/* Lists of moves to this rank: to all its copies, to those that are new, and to its homes. */
enum { LPLBK_PULL_ALL = 0, LPLBK_PULL_NEW = 1, LPLBK_PUSH = 2, LPLBK_LISTS = 3 };

typedef struct lplbk_replicas_tensor {
    uint64_t buffer[LPLBK_EXCHANGE_MAX_RANKS]; /* every rank's, as addresses on this device */
    int64_t row_bytes;
    int32_t kind;
    int32_t dtype; /* of gradients */
} lplbk_replicas_tensor;

/* Row `row` of rank `rank` goes to row `target` here. */
typedef struct lplbk_move {
    int32_t rank, row, target;
} lplbk_move;

/* The moves of the lists stand behind it, `capacity` of each. */
typedef struct lplbk_replicas {
    int32_t digest[LPLBK_LISTS]; /* of the rows on all ranks, and of the list: what ranks compare; never 0 */
    int32_t n_moves[LPLBK_LISTS];
    int32_t n_tensors;
    int32_t capacity;
    lplbk_replicas_tensor tensors[LPLBK_REPLICAS_MAX_TENSORS];
} lplbk_replicas;

static inline int64_t lplbk_replicas_bytes(int64_t capacity) {
    return (int64_t)sizeof(lplbk_replicas) + LPLBK_LISTS * capacity * (int64_t)sizeof(lplbk_move);
}

#ifdef __CUDACC__
__host__ __device__
#endif
static inline lplbk_move *lplbk_replicas_moves(lplbk_replicas *replicas, int32_t list) {
    return (lplbk_move *)(replicas + 1) + (int64_t)list * replicas->capacity;
}

static inline lplbk_replicas_tensor *lplbk_replicas_tensor_at(lplbk_replicas *replicas, int32_t index) { return &replicas->tensors[index]; }
static inline void lplbk_replicas_set_list(lplbk_replicas *replicas, int32_t list, int32_t digest, int32_t n_moves) {
    replicas->digest[list] = digest;
    replicas->n_moves[list] = n_moves;
}
static inline void lplbk_replicas_set_buffer(lplbk_replicas *replicas, int32_t index, int32_t rank, const void *buffer) {
    replicas->tensors[index].buffer[rank] = (uint64_t)(uintptr_t)buffer;
}

#endif /* LPLB_REPLICAS_VIEW_H */
