// The layout of a dispatch: its memory, and sums.
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

// Prefix sum of `value` over the threads of a block, without this thread's own; sum: of all of them. Whole blocks of at most 1,024 threads.
static __device__ int block_prefix(int value, int *sum) {
    __shared__ int of_warp[33];
    const int upto = warp_prefix(value);
    __syncthreads();  // the sums of the call before have been read
    if (lane_id() == 31) of_warp[warp_id()] = upto;
    __syncthreads();
    if (warp_id() == 0) {
        const int mine = lane_id() < (int)(blockDim.x >> 5) ? of_warp[lane_id()] : 0;
        const int all = warp_prefix(mine);
        __syncwarp();
        of_warp[lane_id()] = all - mine;
        if (lane_id() == 31) of_warp[32] = all;
    }
    __syncthreads();
    *sum = of_warp[32];
    return of_warp[warp_id()] + upto - value;
}

__device__ __forceinline__ int64_t wide_warp_sum(int64_t value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
    return value;
}

__device__ __forceinline__ int32_t clamped(int64_t value) { return (int32_t)max(min(value, (int64_t)INT32_MAX), (int64_t)INT32_MIN); }

}  // namespace lplb
