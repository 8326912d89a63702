/* The seam of exchange_kernels.h without CUDA: every call says so. With CUDA this file is empty and the objects made by nvcc stand in. */
#include "exchange_kernels.h"

#include "kernels.h"

#ifndef LPLB_WITH_CUDA

#define UNUSED(x) (void)(x)

int32_t lplbk_exchange_alloc(int32_t device, int64_t words, uint32_t first_epoch, void **buffer) {
    UNUSED(device), UNUSED(words), UNUSED(first_epoch);
    *buffer = 0;
    return LPLBK_NO_CUDA;
}

int32_t lplbk_exchange_fill(int32_t device, void *buffer, int64_t words, uint32_t first_epoch) {
    UNUSED(device), UNUSED(buffer), UNUSED(words), UNUSED(first_epoch);
    return LPLBK_NO_CUDA;
}

int32_t lplbk_exchange_export(int32_t device, void *buffer, uint8_t *handle) {
    UNUSED(device), UNUSED(buffer), UNUSED(handle);
    return LPLBK_NO_CUDA;
}

int32_t lplbk_exchange_import(int32_t device, const uint8_t *handle, void **buffer) {
    UNUSED(device), UNUSED(handle);
    *buffer = 0;
    return LPLBK_NO_CUDA;
}

int32_t lplbk_exchange_unimport(int32_t device, void *buffer) {
    UNUSED(device), UNUSED(buffer);
    return LPLBK_NO_CUDA;
}

int32_t lplbk_exchange_identity(int32_t device, uint8_t *uuid, uint64_t *host) {
    UNUSED(device), UNUSED(uuid);
    *host = 0;
    return LPLBK_NO_CUDA;
}

int32_t lplbk_exchange_reach(int32_t device, const uint8_t *uuid, int32_t enable, int32_t *reach) {
    UNUSED(device), UNUSED(uuid), UNUSED(enable);
    *reach = 0;
    return LPLBK_NO_CUDA;
}

void lplbk_exchange_settle(int32_t device) { UNUSED(device); }

int32_t lplbk_exchange_open(int32_t device, uint32_t first_epoch, lplbk_exchange_view *view, lplbk_exchange_host **host) {
    UNUSED(device), UNUSED(first_epoch), UNUSED(view);
    *host = 0;
    return LPLBK_NO_CUDA;
}

int32_t lplbk_exchange_close(int32_t device, lplbk_exchange_view *view, lplbk_exchange_host *host) {
    UNUSED(device), UNUSED(view), UNUSED(host);
    return LPLBK_NO_CUDA;
}

int32_t lplbk_exchange_launch(int32_t device, const lplbk_exchange_view *view, const int32_t *counts, int32_t *gathered,
                              const int32_t *digest, int32_t blocks, void *stream) {
    UNUSED(device), UNUSED(view), UNUSED(counts), UNUSED(gathered), UNUSED(digest), UNUSED(blocks), UNUSED(stream);
    return LPLBK_NO_CUDA;
}

int32_t lplbk_run_exchanging(const lplbk_planner *planner, const lplbk_exchange_view *view, const void *ids, int32_t ids64, int64_t n_ids,
                             void *out, void *counter, int32_t counter64, int64_t max_blocks, void *stream) {
    UNUSED(planner), UNUSED(view), UNUSED(ids), UNUSED(ids64), UNUSED(n_ids), UNUSED(out), UNUSED(counter), UNUSED(counter64);
    UNUSED(max_blocks), UNUSED(stream);
    return LPLBK_NO_CUDA;
}

#endif
