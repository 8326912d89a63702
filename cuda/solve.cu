// Solve: counts -> plan, one block a group.
#include "backend.cuh"
#include "launch.cuh"
#include "multi.cuh"
#include "solve/solve_groups.cuh"

namespace lplb {
namespace {

// Column sums over their maximum, for several groups.
__global__ void scale(const __grid_constant__ CountMatrix<true> loads, const __grid_constant__ PlanOut out) {
    __shared__ int highest[32];
    wait_for_stream();
    int most = 0;
    for (int expert = threadIdx.x; expert < loads.n_logical; expert += blockDim.x)
        most = max(most, fitted(loads.template total<true>(expert)));
    most = warp_max(most);
    if (lane_id() == 0) highest[warp_id()] = most;
    __syncthreads();
    most = warp_max(lane_id() < blockDim.x / 32 ? highest[lane_id()] : 0);
    for (int expert = threadIdx.x; expert < loads.n_logical; expert += blockDim.x) {
        write_scaled(out, expert, fitted(loads.template total<true>(expert)), most);
    }
}

static_assert(32 * kMaskWarps <= 256, "threads_of: MaskFlow's warps must be there");

int threads_of(const lplbk_shape &shape, Solver solver) {
    if (by_lanes(solver)) return min(32 + round_up(shape.n_logical / shape.n_groups, 32), 512);
    if (solver == kInterior) return shape.group_size <= 32 ? 128 : 256;  // its sums over the block are many
    return shape.group_size > 256 || shape.n_logical > 256 ? 512 : 256;
}

int64_t shared_bytes(const lplbk_planner &planner, Solver solver) {
    const lplbk_shape &shape = planner.shape;
    const int tokens = by_lanes(solver) ? shape.n_logical / shape.n_groups : shape.n_logical;
    const int64_t words = SolveSpace::words_of(shape, planner.layout, by_lanes(solver), 1, tokens);
    return 4 * words + (solver == kInterior ? 8 * IpmSpace::doubles_of(shape) : 0);
}

// What is solved for: counts, or rows whose digests are compared or not.
enum Kind { kCounts, kRows, kComparedRows };

cudaError_t solve(const lplbk_planner &planner, const void *counts, int32_t counts64, int64_t n_sources, Kind kind, float *ratios,
                  float *scaled, void *counter, int32_t counter64, cudaStream_t stream) {
    const lplbk_shape &shape = planner.shape;
    const int width = kind == kCounts ? shape.n_logical : shape.n_logical + 1;
    const CountMatrix<true> loads{static_cast<const int32_t *>(counts), (int)n_sources, shape.n_logical, width, counts64};
    PlanOut out = PlanOut::of(planner, ratios, scaled, counter, counter64);
    if (kind == kComparedRows) out.compare(planner);
    if (scaled != nullptr && shape.n_groups > 1) {
        const cudaError_t error = launch(planner.info, scale, 1, 512, 0, 0, stream, loads, out);
        if (error != cudaSuccess) return error;
        out.scaled = nullptr;
    }
    const Solver solver = solver_of(planner);
    const bool plain = n_sources == 1 && kind == kCounts && shape.rank < 0 && ratios == nullptr && out.scaled == nullptr &&
                       (shape.bundle_experts == 1 || by_lanes(solver));
    const auto start = [&](auto kernel, auto record) {
        return launch(planner.info, kernel, shape.n_groups, threads_of(shape, solver), (int)shared_bytes(planner, solver), 0, stream,
                      Tables(planner), loads, out, record);
    };
    if (planner.ranked && plain && !records(planner)) return start(solve_kernel<true, false, true>(solver), NoRecording());
    if (planner.ranked) return start(solve_kernel<false, true, true>(solver), Recording::of(planner));
    if (records(planner)) return start(solve_kernel<false, true>(solver), Recording::of(planner));
    return start(plain ? solve_kernel<true, false>(solver) : solve_kernel<false, false>(solver), NoRecording());
}

}  // namespace

cudaError_t solve_totals(const lplbk_planner &planner, void *counter, int32_t counter64, cudaStream_t stream) {
    return solve(planner, multi_scratch(planner).totals, 0, 1, kCounts, nullptr, nullptr, counter, counter64, stream);
}

cudaError_t solve_rows(const lplbk_planner &planner, const int32_t *rows, bool compare, float *ratios, float *scaled, void *counter,
                       int32_t counter64, cudaStream_t stream) {
    const Kind kind = compare ? kComparedRows : kRows;
    return solve(planner, rows, 0, planner.shape.ep_size, kind, ratios, scaled, counter, counter64, stream);
}

int32_t prepare_solve(const lplbk_planner &planner) {
    const Solver solver = solver_of(planner);
    if (solver == kInterior && planner.shape.group_size > LPLBK_MAX_INTERIOR_GROUP) return LPLBK_UNSUPPORTED;
    const int64_t bytes = shared_bytes(planner, solver);
    int32_t error = 0;
    for (const auto kernel : {solve_kernel<false, false>(solver), solve_kernel<true, false>(solver), solve_kernel<true, false, true>(solver)}) {
        if (error == 0) error = allow_shared(planner.info, kernel, bytes);
    }
    for (const auto kernel : {solve_kernel<false, true>(solver), solve_kernel<false, true, true>(solver)}) {
        if (error == 0) error = allow_shared(planner.info, kernel, bytes);
    }
    return error;
}

}  // namespace lplb

extern "C" int32_t lplbk_solve(const lplbk_planner *planner, const void *counts, int32_t counts64, int64_t n_sources, float *ratios,
                               float *scaled, void *counter, int32_t counter64, void *stream) {
    lplb::OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return lplb::taken(on.error());
    return lplb::taken(lplb::solve(*planner, counts, counts64, n_sources, lplb::kCounts, ratios, scaled, counter, counter64,
                                   static_cast<cudaStream_t>(stream)));
}

extern "C" int32_t lplbk_solve_rows(const lplbk_planner *planner, const int32_t *rows, int32_t compare, float *ratios, float *scaled,
                                    void *counter, int32_t counter64, void *stream) {
    lplb::OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return lplb::taken(on.error());
    return lplb::taken(lplb::solve_rows(*planner, rows, compare != 0, ratios, scaled, counter, counter64,
                                        static_cast<cudaStream_t>(stream)));
}

PROFILE_READER(lplbk_profile_solve)
