// The whole plan: `run`, in one launch where one cluster of blocks can do it, else in three.
#include "backend.cuh"
#include "launch.cuh"
#include "multi.cuh"
#include "run_block.cuh"

namespace lplb {
namespace {

constexpr int kFusedIds = 1 << 17;        // beyond, three launches are faster (measured on an H200)
constexpr int kMaxWithoutCluster = 2048;  // ids that one block takes alone where there are no clusters

bool fused_shape(const lplbk_planner &planner) {
    const lplbk_shape &shape = planner.shape;
    const Solver solver = solver_of(planner);
    if (solver == kInterior || solver == kScan) return false;
    if (by_lanes(solver)) return shape.n_groups <= kMaxGroups;
    return shape.n_groups == 1 && shape.bundle_experts == 1;
}

struct FusedSize {
    int blocks, per_block;
};

FusedSize fused_size(const lplbk_planner &planner, int64_t n_ids, int64_t max_blocks) {
    int blocks = 1;
    const int most = max_blocks > 0 ? (int)min(max_blocks, (int64_t)planner.info.max_cluster) : planner.info.max_cluster;
    while (2 * blocks <= most && ceil_div64(n_ids, blocks) > 512) blocks *= 2;
    const int64_t per_block = max(ceil_div64(ceil_div64(n_ids, blocks), 32) * 32, (int64_t)32);
    return {blocks, (int)min(per_block, (int64_t)1 << 30)};
}

int64_t shared_bytes(const lplbk_planner &planner, const FusedSize &size, int n_sources) {
    const bool lanes = by_lanes(solver_of(planner));
    return 4ll * RunSpace(planner.shape, planner.layout, lanes, size.blocks, size.per_block, n_sources).words;
}

// Dynamic shared memory that a block can have.
int most_shared_bytes(const lplbk_planner &planner) { return planner.info.shared_bytes - Recording::shared_bytes(); }

// n_sources: as in RunSpace.
bool fused_fits(const lplbk_planner &planner, int64_t n_ids, int64_t max_blocks, int n_sources) {
    if (!fused_shape(planner) || n_ids > planner.fused_ids) return false;
    if (planner.info.max_cluster == 1 && n_ids > kMaxWithoutCluster) return false;
    const FusedSize size = fused_size(planner, n_ids, max_blocks);
    return size.per_block <= kMaxPerBlock && shared_bytes(planner, size, n_sources) <= most_shared_bytes(planner);
}

// What one call of `run` is given.
struct Call {
    const void *ids;
    int32_t ids64;
    int64_t n_ids;
    void *out;
    void *counter;
    int32_t counter64;
    int64_t max_blocks;
};

template <bool kGathered, bool kRecords>
cudaError_t run_fused_by(RunKernel<kGathered, kRecords> kernel, const lplbk_planner &planner, const Call &call, const int32_t *rows, bool compare,
                      const ExchangeView<kGathered> &view, cudaStream_t stream) {
    const FusedSize size = fused_size(planner, call.n_ids, call.max_blocks);
    const int n_sources = kGathered ? planner.shape.ep_size : 1;
    const RunIds ids{call.n_ids, size.per_block, call.ids64, InvalidIds::of(planner)};
    const CountMatrix<false> given{rows, n_sources, planner.shape.n_logical, planner.shape.n_logical + 1, 0};
    PlanOut out = PlanOut::of(planner, nullptr, nullptr, call.counter, call.counter64);
    if (compare) out.compare(planner);
    const int64_t bytes = shared_bytes(planner, size, kGathered && rows == nullptr ? n_sources : 0);
    return launch(planner.info, kernel, size.blocks, kRunThreads, (int)bytes, planner.info.max_cluster > 1 ? size.blocks : 0, stream,
                  call.ids, call.out, Tables(planner), ids, given, out, view, RecordingOf<kRecords>::of(planner));
}

template <bool kGathered>
cudaError_t run_fused(const lplbk_planner &planner, const Call &call, const int32_t *rows, bool compare,
                      const ExchangeView<kGathered> &view, cudaStream_t stream) {
    const Solver solver = solver_of(planner);
    if (planner.ranked || records(planner)) {
        const auto kernel = planner.ranked ? run_kernel<kGathered, true, true>(solver) : run_kernel<kGathered, true>(solver);
        return run_fused_by<kGathered, true>(kernel, planner, call, rows, compare, view, stream);
    }
    return run_fused_by<kGathered, false>(run_kernel<kGathered, false>(solver), planner, call, rows, compare, view, stream);
}

template <bool kGathered, bool kRecords, bool kRanked>
int32_t prepare_kernel(lplbk_planner &planner) {
    const auto kernel = run_kernel<kGathered, kRecords, kRanked>(solver_of(planner));
    // It has no other static shared memory: fused_fits() reckons with all that a block can have.
    const int32_t refused = allow_shared(planner.info, kernel, most_shared_bytes(planner));
    if (refused != 0 || planner.info.max_cluster == 1) return refused;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return taken(error);
    // The largest cluster that the device can hold with all the shared memory a block may ask for.
    for (int blocks = 16; blocks > 1; blocks /= 2) {
        cudaLaunchAttribute attribute;
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {(unsigned)blocks, 1, 1};
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3((unsigned)blocks);
        config.blockDim = dim3(kRunThreads);
        config.dynamicSmemBytes = (size_t)most_shared_bytes(planner);
        config.attrs = &attribute;
        config.numAttrs = 1;
        int clusters = 0;
        error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
        if (error == cudaSuccess && clusters > 0) {
            planner.info.max_cluster = min(blocks, planner.info.max_cluster);
            return 0;
        }
        cudaGetLastError();
    }
    planner.info.max_cluster = 1;
    return 0;
}

// After a launch that failed between count_chunks() and rewrite_chunks(): else the next plan would count on top of what is there.
cudaError_t clear_totals(const lplbk_planner &planner, cudaStream_t stream) {
    return cudaMemsetAsync(multi_scratch(planner).totals, 0, 4 * (size_t)planner.shape.n_logical, stream);
}

cudaError_t run_in_launches(const lplbk_planner &planner, const Call &call, const int32_t *rows, bool compare, cudaStream_t stream) {
    const Chunks chunks = chunks_of(planner, call.n_ids, call.max_blocks);
    cudaError_t error = count_chunks(planner, call.ids, call.ids64, call.n_ids, chunks, rows == nullptr, stream);
    if (error != cudaSuccess) return error;
    error = rows == nullptr ? solve_totals(planner, call.counter, call.counter64, stream)
                            : solve_rows(planner, rows, compare, nullptr, nullptr, call.counter, call.counter64, stream);
    if (error == cudaSuccess) error = rewrite_chunks(planner, call.ids, call.ids64, call.n_ids, chunks, call.out, rows == nullptr, stream);
    if (error != cudaSuccess && rows == nullptr) taken(clear_totals(planner, stream));
    return error;
}

}  // namespace

int32_t prepare_run(lplbk_planner &planner) {
    planner.fused_ids = kFusedIds;
    if (!fused_shape(planner)) return 0;
    if (planner.info.max_cluster > 1) planner.info.max_cluster = 16;
    int32_t error = records(planner) ? prepare_kernel<false, true, false>(planner) : prepare_kernel<false, false, false>(planner);
    if (error == 0) error = records(planner) ? prepare_kernel<true, true, false>(planner) : prepare_kernel<true, false, false>(planner);
    if (error == 0) error = prepare_kernel<false, true, true>(planner);
    return error != 0 ? error : prepare_kernel<true, true, true>(planner);
}

}  // namespace lplb

extern "C" int32_t lplbk_run(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, const int32_t *rows,
                             int32_t compare, void *out, void *counter, int32_t counter64, int64_t max_blocks, void *stream) {
    using namespace lplb;
    OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const auto queue = static_cast<cudaStream_t>(stream);
    if (!planner->has_replicas) return taken(rewrite_plainly(*planner, ids, ids64, n_ids, out, counter, counter64, max_blocks, queue));
    const Call call{ids, ids64, n_ids, out, counter, counter64, max_blocks};
    if (!fused_fits(*planner, n_ids, max_blocks, 0)) return taken(run_in_launches(*planner, call, rows, compare != 0, queue));
    // The rows of one rank are its own ids' counts.
    const bool gathered = rows != nullptr && planner->shape.ep_size > 1;
    return taken(gathered ? run_fused<true>(*planner, call, rows, compare != 0, {}, queue)
                          : run_fused<false>(*planner, call, nullptr, false, {}, queue));
}

extern "C" int32_t lplbk_run_exchanging(const lplbk_planner *planner, const lplbk_exchange_view *view, const void *ids, int32_t ids64,
                                        int64_t n_ids, void *out, void *counter, int32_t counter64, int64_t max_blocks, void *stream) {
    using namespace lplb;
    if (!planner->has_replicas || view->n_nodes != 1 || !fused_fits(*planner, n_ids, max_blocks, view->n_ranks)) return LPLBK_UNSUPPORTED;
    OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const Call call{ids, ids64, n_ids, out, counter, counter64, max_blocks};
    return taken(run_fused<true>(*planner, call, nullptr, false, *view, static_cast<cudaStream_t>(stream)));
}

PROFILE_READER(lplbk_profile_run)
