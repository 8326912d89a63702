// Memory of the layout of a dispatch, and what the solvers keep for it.
#pragma once

#include "common.cuh"

namespace lplb {

constexpr int kDispatchBlocks = 64;

// Scratch memory: for as many blocks with buffers of up to twice a rank's slots, for fewer blocks with larger ones, and always for one.
inline int64_t dispatch_words(const lplbk_shape &shape) {
    const int64_t keys = 2ll * shape.n_physical, most = LPLBK_MAX_LAYOUT_ROWS;
    const int64_t usual = keys + 1 + kDispatchBlocks * (keys + 3), one = 2 * most + 4;
    return usual > one ? usual : one;
}

// Lets the kernels have the shared memory that they may need.
int32_t prepare_layout(const lplbk_planner &planner);

}  // namespace lplb
