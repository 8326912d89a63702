/* The seam of kernels.h without CUDA: every call says so. With CUDA this file is empty and the objects made by nvcc stand in. */
#include "kernels.h"

#ifndef LPLB_WITH_CUDA

#define UNUSED(x) (void)(x)

int32_t lplbk_error_kind(int32_t error) {
    if (error == 0) return LPLBK_KIND_OK;
    return error == LPLBK_UNSUPPORTED ? LPLBK_KIND_UNSUPPORTED : LPLBK_KIND_NO_CUDA;
}

const char *lplbk_error_name(int32_t error) {
    return error == 0 ? "no error" : error == LPLBK_UNSUPPORTED ? "not supported" : "built without CUDA";
}

int32_t lplbk_cuda_version(void) { return 0; }

const char *lplbk_architectures(void) { return ""; }

int32_t lplbk_device_count(int32_t *count) {
    *count = 0;
    return LPLBK_NO_CUDA;
}

int32_t lplbk_device_info_get(int32_t device, lplbk_device_info *info) {
    UNUSED(device), UNUSED(info);
    return LPLBK_NO_CUDA;
}

int32_t lplbk_alloc(int32_t device, int64_t bytes, void **memory) {
    UNUSED(device), UNUSED(bytes);
    *memory = 0;
    return LPLBK_NO_CUDA;
}

int32_t lplbk_free(int32_t device, void *memory) {
    UNUSED(device), UNUSED(memory);
    return LPLBK_NO_CUDA;
}

int32_t lplbk_upload(int32_t device, void *to, const void *from, int64_t bytes, void *stream) {
    UNUSED(device), UNUSED(to), UNUSED(from), UNUSED(bytes), UNUSED(stream);
    return LPLBK_NO_CUDA;
}

int32_t lplbk_download(int32_t device, void *to, const void *from, int64_t bytes, void *stream) {
    UNUSED(device), UNUSED(to), UNUSED(from), UNUSED(bytes), UNUSED(stream);
    return LPLBK_NO_CUDA;
}

int32_t lplbk_alloc_mapped(int32_t device, int64_t bytes, void **host, uint64_t *on_device) {
    UNUSED(device), UNUSED(bytes);
    *host = 0;
    *on_device = 0;
    return LPLBK_NO_CUDA;
}

int32_t lplbk_free_mapped(int32_t device, void *host) {
    UNUSED(device), UNUSED(host);
    return LPLBK_NO_CUDA;
}

int32_t lplbk_write_word(int32_t device, int32_t *to, int32_t word) {
    UNUSED(device), UNUSED(to), UNUSED(word);
    return LPLBK_NO_CUDA;
}

int32_t lplbk_wait(int32_t device, void *stream) {
    UNUSED(device), UNUSED(stream);
    return LPLBK_NO_CUDA;
}

int64_t lplbk_scratch_words(const lplbk_planner *planner) {
    UNUSED(planner);
    return 0;
}

int32_t lplbk_prepare(lplbk_planner *planner) {
    UNUSED(planner);
    return LPLBK_NO_CUDA;
}

int32_t lplbk_place(const lplbk_planner *planner, const int32_t *tables, void *stream) {
    UNUSED(planner), UNUSED(tables), UNUSED(stream);
    return LPLBK_NO_CUDA;
}

int32_t lplbk_count(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, int32_t *counts, int32_t *cumulative,
                    int64_t n_chunks, void *stream) {
    UNUSED(planner), UNUSED(ids), UNUSED(ids64), UNUSED(n_ids), UNUSED(counts), UNUSED(cumulative), UNUSED(n_chunks), UNUSED(stream);
    return LPLBK_NO_CUDA;
}

int32_t lplbk_solve(const lplbk_planner *planner, const void *counts, int32_t counts64, int64_t n_sources, float *ratios, float *scaled,
                    void *counter, int32_t counter64, void *stream) {
    UNUSED(planner), UNUSED(counts), UNUSED(counts64), UNUSED(n_sources), UNUSED(ratios), UNUSED(scaled), UNUSED(counter);
    UNUSED(counter64), UNUSED(stream);
    return LPLBK_NO_CUDA;
}

int32_t lplbk_redirect(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, void *out, int64_t max_blocks,
                       void *stream) {
    UNUSED(planner), UNUSED(ids), UNUSED(ids64), UNUSED(n_ids), UNUSED(out), UNUSED(max_blocks), UNUSED(stream);
    return LPLBK_NO_CUDA;
}

int32_t lplbk_redirect_by_ratio(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, const float *ratios,
                                const int32_t *cumulative, int64_t n_chunks, void *out, void *stream) {
    UNUSED(planner), UNUSED(ids), UNUSED(ids64), UNUSED(n_ids), UNUSED(ratios), UNUSED(cumulative), UNUSED(n_chunks), UNUSED(out);
    UNUSED(stream);
    return LPLBK_NO_CUDA;
}

int32_t lplbk_count_row(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, int32_t *row, void *stream) {
    UNUSED(planner), UNUSED(ids), UNUSED(ids64), UNUSED(n_ids), UNUSED(row), UNUSED(stream);
    return LPLBK_NO_CUDA;
}

int32_t lplbk_make_row(const lplbk_planner *planner, const void *counts, int32_t counts64, int32_t *row, void *stream) {
    UNUSED(planner), UNUSED(counts), UNUSED(counts64), UNUSED(row), UNUSED(stream);
    return LPLBK_NO_CUDA;
}

int32_t lplbk_solve_rows(const lplbk_planner *planner, const int32_t *rows, int32_t compare, float *ratios, float *scaled, void *counter,
                         int32_t counter64, void *stream) {
    UNUSED(planner), UNUSED(rows), UNUSED(compare), UNUSED(ratios), UNUSED(scaled), UNUSED(counter), UNUSED(counter64), UNUSED(stream);
    return LPLBK_NO_CUDA;
}

int32_t lplbk_run(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, const int32_t *rows, int32_t compare,
                  void *out, void *counter, int32_t counter64, int64_t max_blocks, void *stream) {
    UNUSED(planner), UNUSED(ids), UNUSED(ids64), UNUSED(n_ids), UNUSED(rows), UNUSED(compare), UNUSED(out), UNUSED(counter);
    UNUSED(counter64);
    UNUSED(max_blocks), UNUSED(stream);
    return LPLBK_NO_CUDA;
}

#endif
