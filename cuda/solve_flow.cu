// Solve: counts -> plan, one block a group.
#include "solve_general.cuh"

namespace lplb {
namespace {

// Counts in global memory, [n_sources][n_logical].
template <class Count>
struct CountMatrix {
    const Count *counts;
    int n_sources, n_logical;

    __device__ int64_t total(int expert) const {
        int64_t sum = 0;
        const Count *at = counts + expert;
        // Nobody promises that the column sum of 2^63 - 1 fits: each count is cut at 2^40, far beyond what a solve takes.
#pragma unroll 8
        for (int s = 0; s < n_sources; ++s, at += n_logical) sum += cut(*at);
        return sum;
    }
    __device__ int of(int source, int expert) const { return (int)cut(counts[(int64_t)source * n_logical + expert]); }

private:
    __device__ static int64_t cut(int32_t count) { return max(count, 0); }
    __device__ static int64_t cut(int64_t count) { return max(min(count, (int64_t)1 << 40), (int64_t)0); }
};

// Writes the plan to global memory.
struct PlanSink {
    int32_t *quota, *take;
    __device__ void put(int, int, int, int, int slot, int tokens, int own) {
        quota[slot] = tokens;
        take[slot] = own;
    }
};

template <int kSlots, class Count>
__global__ void solve_pairs(const __grid_constant__ PlanView plan, const __grid_constant__ CountMatrix<Count> loads,
                            const __grid_constant__ SolveOut out) {
    extern __shared__ int4 memory[];
    PairBlock<kSlots> block(plan, reinterpret_cast<int *>(memory), blockIdx.x, 1);
    int words[kSlots];
    if (warp_id() == 0) block.lane_words(blockIdx.x, words);
    block.clear();
    __syncthreads();
    block.gather(loads);
    __syncthreads();
    if (warp_id() == 0) block.solve(words, out);
    __syncthreads();
    PlanSink sink{plan.quota, plan.take};
    block.finish(loads, out, sink);
}

template <int kWords, class Count>
__global__ void solve_general(const __grid_constant__ PlanView plan, const __grid_constant__ CountMatrix<Count> loads,
                              const __grid_constant__ SolveOut out) {
    extern __shared__ int4 memory[];
    GeneralBlock<kWords> block(plan, reinterpret_cast<int *>(memory), blockIdx.x);
    block.clear();
    __syncthreads();
    block.gather(loads);
    __syncthreads();
    block.solve(out);
    __syncthreads();
    PlanSink sink{plan.quota, plan.take};
    block.finish(loads, out, sink);
}

// Column sums over their maximum, for several groups.
template <class Count>
__global__ void scale(const __grid_constant__ CountMatrix<Count> loads, float *scaled) {
    __shared__ int highest[32];
    int most = 0;
    for (int expert = threadIdx.x; expert < loads.n_logical; expert += blockDim.x) {
        most = max(most, (int)min(loads.total(expert), (int64_t)INT32_MAX));
    }
    most = warp_max(most);
    if (lane_id() == 0) highest[warp_id()] = most;
    __syncthreads();
    most = warp_max(lane_id() < blockDim.x / 32 ? highest[lane_id()] : 0);
    for (int expert = threadIdx.x; expert < loads.n_logical; expert += blockDim.x) {
        const int mine = (int)min(loads.total(expert), (int64_t)INT32_MAX);
        scaled[expert] = most > 0 ? __fdiv_rn(__int2float_rn(mine), __int2float_rn(most)) : 0.0f;
    }
}

int general_threads(const lplbk_shape &shape) {
    if (shape.group_size > 256 || shape.n_logical > 256) return 512;
    return 256;
}

int pair_threads(const lplbk_shape &shape) {
    const int slots = shape.group_size * (shape.n_logical / shape.ep_size);
    return min(max(round_up(slots, 32), 64), 512);
}

int shared_bytes(const lplbk_planner &planner) {
    switch (planner.shape.pair_slots) {
    case 2: return 4 * PairBlock<2>::words_of(planner.shape, 1);
    case 4: return 4 * PairBlock<4>::words_of(planner.shape, 1);
    case 8: return 4 * PairBlock<8>::words_of(planner.shape, 1);
    default: return 4 * GeneralBlock<0>::words_of(planner.shape, planner.layout);
    }
}

template <class Count>
using SolveKernel = void (*)(PlanView, CountMatrix<Count>, SolveOut);

template <class Count>
SolveKernel<Count> kernel_for(const lplbk_planner &planner) {
    switch (planner.shape.pair_slots) {
    case 2: return solve_pairs<2, Count>;
    case 4: return solve_pairs<4, Count>;
    case 8: return solve_pairs<8, Count>;
    }
    switch (planner.layout.mask_words) {
    case 1: return solve_general<1, Count>;
    case 2: return solve_general<2, Count>;
    default: return solve_general<0, Count>;
    }
}

template <class Count>
cudaError_t launch(const lplbk_planner &planner, const void *counts, int64_t n_sources, float *ratios, float *scaled, void *counter,
                   int32_t counter64, cudaStream_t stream) {
    const lplbk_shape &shape = planner.shape;
    const CountMatrix<Count> loads{static_cast<const Count *>(counts), (int)n_sources, shape.n_logical};
    const bool one_group = shape.n_groups == 1;
    if (scaled != nullptr && !one_group) scale<Count><<<1, 512, 0, stream>>>(loads, scaled);
    const SolveOut out{ratios, one_group ? scaled : nullptr, counter, counter64, (int)n_sources, true};
    const int threads = shape.pair_slots > 0 ? pair_threads(shape) : general_threads(shape);
    kernel_for<Count>(planner)<<<shape.n_groups, threads, shared_bytes(planner), stream>>>(view_of(planner), loads, out);
    return cudaGetLastError();
}

}  // namespace

int64_t solve_scratch_words(const lplbk_shape &shape) {
    if (shape.group_size <= 64) return 0;
    return 2 * (int64_t)shape.n_groups * shape.group_size * shape.group_size + shape.n_groups;
}

cudaError_t prepare_solve(const lplbk_planner &planner) {
    const int bytes = shared_bytes(planner);
    if (bytes > planner.info.shared_bytes) return cudaErrorInvalidConfiguration;
    cudaError_t error = cudaFuncSetAttribute(kernel_for<int32_t>(planner), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(kernel_for<int64_t>(planner), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    }
    return error;
}

}  // namespace lplb

extern "C" int32_t lplbk_solve(const lplbk_planner *planner, const void *counts, int32_t counts64, int64_t n_sources, float *ratios,
                               float *scaled, void *counter, int32_t counter64, void *stream) {
    lplb::OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return lplb::taken(on.error());
    const auto queue = static_cast<cudaStream_t>(stream);
    return lplb::taken(counts64 ? lplb::launch<int64_t>(*planner, counts, n_sources, ratios, scaled, counter, counter64, queue)
                                : lplb::launch<int32_t>(*planner, counts, n_sources, ratios, scaled, counter, counter64, queue));
}
