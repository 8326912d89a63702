// The table of functions that kernels.h describes.
#include <cuda_runtime.h>

#include "backend.cuh"

#ifndef LPLB_ARCHITECTURES
#define LPLB_ARCHITECTURES "unknown architectures"  // the build names them: -DLPLB_ARCHITECTURES='"sm_80 ..."'
#endif

extern "C" const lplbk_backend *lplbk_cuda_backend(void) {
    static const lplbk_backend backend = {
        CUDART_VERSION,
        LPLB_ARCHITECTURES,
        lplbk_error_kind,
        lplbk_error_name,
        lplbk_device_count,
        lplbk_device_info_of,
        lplbk_alloc,
        lplbk_free,
        lplbk_upload,
        lplbk_download,
        lplbk_alloc_mapped,
        lplbk_free_mapped,
        lplbk_open,
        lplbk_close,
        lplbk_place,
        lplbk_set_capacity,
        lplbk_set_digest,
        lplbk_read,
        lplbk_read_history,
        lplbk_count,
        lplbk_count_row,
        lplbk_make_row,
        lplbk_solve,
        lplbk_solve_rows,
        lplbk_redirect,
        lplbk_redirect_by_ratio,
        lplbk_run,
        lplbk_run_exchanging,
        lplbk_lay_out,
        lplbk_reset,
        lplbk_exchange_alloc,
        lplbk_exchange_fill,
        lplbk_exchange_export,
        lplbk_exchange_import,
        lplbk_exchange_unimport,
        lplbk_exchange_identity,
        lplbk_exchange_reach,
        lplbk_exchange_settle,
        lplbk_exchange_open,
        lplbk_exchange_close,
        lplbk_exchange_launch,
        lplbk_replicas_prepare,
        lplbk_replicas_allocation,
        lplbk_replicas_pull,
        lplbk_replicas_push,
    };
    return &backend;
}
