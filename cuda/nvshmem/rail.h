/*
 * liblplb_nvshmem.so: an optional rail for lplb_exchange (lplb_rail_ops of lplb.h) by NVSHMEM's put-with-signal, sent by the GPU. A library
 * of its own, loaded with dlopen, so that liblplb.so needs no NVSHMEM. All functions return 0 or another number with words in `message`
 * (NULL, or message_size bytes), unless said otherwise. One thread at a time.
 */
#ifndef LPLB_NVSHMEM_RAIL_H
#define LPLB_NVSHMEM_RAIL_H

#include <stdint.h>

#include "lplb.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Number of this interface, to compare before anything else is called. */
#define LPLB_NVSHMEM_ABI 2
int32_t lplb_nvshmem_abi(void);

/* 1 if NVSHMEM is running in this process, whoever started it. */
int32_t lplb_nvshmem_started(void);

/* This process's PE, -1 where NVSHMEM is not running. */
int32_t lplb_nvshmem_pe(void);

/* 128 bytes, made by one rank and given to all of them for start. */
int32_t lplb_nvshmem_unique_id(void *id, char *message, int64_t message_size);

/*
 * Starts NVSHMEM on `n_ranks` processes, this one being PE `rank` on the CUDA device. Collective. Multicast stays off. The environment is
 * as before when this and unique_id return.
 */
int32_t lplb_nvshmem_start(int32_t device, const void *id, int32_t rank, int32_t n_ranks, char *message, int64_t message_size);

/*
 * A rail of n_nodes nodes: pes[n_nodes] are the PEs of this local rank on every node. Local, so that it may fail on one rank alone; connect
 * follows once it has succeeded on all of them, or ops->destroy. timeout_ms and the policy (at first LPLB_EXCHANGE_REPORT) as in
 * lplb_exchange_config.
 */
int32_t lplb_nvshmem_rail_create(int32_t device, const int32_t *pes, int64_t n_nodes, int64_t node, int64_t n_counts, int64_t timeout_ms,
                                 lplb_rail_ops *ops, char *message, int64_t message_size);

/*
 * Allocates from the symmetric heap, so all PEs of the NVSHMEM world call it with equal sizes; it fails on all of them or on none. From then
 * on ops->destroy too comes on all PEs together, unless the rail has timed out or ops->abort came before: then it waits for nobody, and
 * the symmetric memory stays allocated. NVSHMEM goes on running.
 */
int32_t lplb_nvshmem_rail_connect(const lplb_rail_ops *ops, char *message, int64_t message_size);

/* For calls and captures from now on. */
void lplb_nvshmem_rail_limits(const lplb_rail_ops *ops, int32_t policy, int64_t timeout_ms);

#ifdef __cplusplus
}
#endif

#endif /* LPLB_NVSHMEM_RAIL_H */
