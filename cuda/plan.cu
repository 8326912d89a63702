// The whole plan: `run`, in one launch where one cluster of blocks can do it, else in three; and preparing a planner.
#include "launch.cuh"
#include "multi.cuh"
#include "run_cluster.cuh"

namespace lplb {
namespace {

using namespace fused;

constexpr int kFusedIds = 1 << 17;        // beyond, three launches are faster (measured on an H200)
constexpr int kMaxWithoutCluster = 2048;  // ids that one block takes alone where there are no clusters

template <class Id, Source kSource>
auto fused_kernel(const lplbk_planner &planner) {
    switch (planner.shape.pair_slots) {
    case 2:
        return run_in_cluster<2, 0, kSource, Id>;
    case 4:
        return run_in_cluster<4, 0, kSource, Id>;
    case 8:
        return run_in_cluster<8, 0, kSource, Id>;
    default:
        return planner.layout.mask_words == 1 ? run_in_cluster<0, 1, kSource, Id> : run_in_cluster<0, 2, kSource, Id>;
    }
}

bool fused_shape(const lplbk_planner &planner) {
    const lplbk_shape &shape = planner.shape;
    if (planner.solver != 0) return false;  // LPLB_SOLVER_FLOW only
    if (shape.pair_slots > 0) return shape.n_groups <= kMaxGroups;
    return shape.n_groups == 1 && planner.layout.mask_words > 0 && shape.combined <= 1;
}

int max_replicated(const lplbk_shape &shape) { return max(1, min(shape.n_logical, shape.n_physical - shape.n_logical)); }

FusedSpace space_of(const lplbk_planner &planner, int n_blocks, int per_block, int n_sources) {
    const lplbk_shape &shape = planner.shape;
    const bool pairs = shape.pair_slots > 0;
    const int solver_words = pairs ? PairSpace::words_of(shape, shape.n_groups) : GeneralSpace::words_of(shape, planner.layout);
    return FusedSpace(solver_words, shape.n_logical, max_replicated(shape), shape.ep_size, pairs ? 0 : shape.max_arcs, n_blocks, per_block,
                      n_sources);
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

template <class Id, Source kSource>
cudaError_t launch_fused(const lplbk_planner &planner, const void *ids, int64_t n_ids, const int32_t *given, bool compare, void *out,
                         void *counter, int32_t counter64, int64_t max_blocks, const ExchangeView<kSource> &view, cudaStream_t stream) {
    const lplbk_shape &shape = planner.shape;
    const lplbk_layout &at = planner.layout;
    const FusedSize size = fused_size(planner, n_ids, max_blocks);
    const int *tables = planner.tables;
    const FusedShape fused{n_ids,
                           size.per_block,
                           shape.n_logical,
                           max_replicated(shape),
                           shape.ep_size,
                           tables + at.code,
                           tables + at.n_replicated,
                           tables + at.bundle_expert,
                           tables + at.expert_class,
                           tables + at.expert_copy,
                           tables + at.digest,
                           planner.counters + LPLBK_COUNTER_INVALID};
    const PairTables pairs{reinterpret_cast<const int4 *>(planner.tables + at.home),
                           planner.tables + at.lanes,
                           shape.n_groups,
                           0,
                           shape.group_size,
                           shape.n_redundant,
                           shape.n_logical / shape.ep_size,
                           shape.combined};
    const GeneralTables general{shape, at, planner.tables};
    // Exchanged rows are kept in shared memory without their digests.
    const CountMatrix<int32_t> matrix{given, kSource == kOwnIds ? 1 : shape.ep_size, shape.n_logical,
                                      kSource == kGiven ? shape.n_logical + 1 : shape.n_logical};
    PlanOut plan = PlanOut::of(planner, nullptr, nullptr, counter, counter64);
    if (kSource == kGiven && compare) plan.compare(planner);
    const int words = space_of(planner, size.blocks, size.per_block, kSource == kExchanged ? shape.ep_size : 0).words;
    return launch(planner.info, fused_kernel<Id, kSource>(planner), size.blocks, kThreads, 4 * words,
                  planner.info.max_cluster > 1 ? size.blocks : 0, stream, static_cast<const Id *>(ids), static_cast<Id *>(out), fused,
                  pairs, general, matrix, plan, view);
}

template <class Id, Source kSource>
int32_t prepare_fused_kernel(lplbk_planner &planner) {
    const auto kernel = fused_kernel<Id, kSource>(planner);
    // It has no static shared memory: fused_fits() reckons with all that a block can have.
    const int32_t refused = allow_shared(planner.info, kernel, planner.info.shared_bytes);
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
        config.blockDim = dim3(kThreads);
        config.dynamicSmemBytes = (size_t)planner.info.shared_bytes;
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

// n_sources: as in FusedSpace.
bool fused_fits(const lplbk_planner &planner, int64_t n_ids, int64_t max_blocks, int n_sources) {
    if (!fused_shape(planner) || n_ids > planner.fused_ids) return false;
    if (planner.info.max_cluster == 1 && n_ids > kMaxWithoutCluster) return false;
    const FusedSize size = fused_size(planner, n_ids, max_blocks);
    if (size.per_block > kMaxPerBlock) return false;
    return 4 * space_of(planner, size.blocks, size.per_block, n_sources).words <= planner.info.shared_bytes;
}

// Takes over staged tables; what was planned before is void.
__global__ void __launch_bounds__(kThreads) adopt(const __grid_constant__ lplbk_planner planner) {
    wait_for_stream();
    const int first = blockIdx.x * kThreads + threadIdx.x, stride = gridDim.x * kThreads;
    for (int i = first; i < planner.layout.words; i += stride) planner.tables[i] = planner.staged[i];
    for (int slot = first; slot < planner.shape.n_physical; slot += stride) planner.quota[slot] = planner.take[slot] = 0;
    for (int i = first; i < planner.shape.n_groups * LPLBK_INFO_WORDS; i += stride) planner.group_info[i] = 0;
}

// After a launch that failed between count_runs() and rewrite_runs(): else the next plan would count on top of what is there.
cudaError_t clear_totals(const lplbk_planner &planner, cudaStream_t stream) {
    return cudaMemsetAsync(multi_scratch(planner).totals, 0, 4 * (size_t)planner.shape.n_logical, stream);
}

}  // namespace

bool fused_possible(const lplbk_planner &planner, int64_t n_ids, int64_t max_blocks) { return fused_fits(planner, n_ids, max_blocks, 0); }

cudaError_t run_fused(const lplbk_planner &planner, const void *ids, int32_t ids64, int64_t n_ids, const int32_t *rows, bool compare,
                      void *out, void *counter, int32_t counter64, int64_t max_blocks, cudaStream_t stream) {
    // The rows of one rank are its own ids' counts.
    const bool many = rows != nullptr && planner.shape.ep_size > 1;
    if (many) {
        const auto run = ids64 ? launch_fused<int64_t, kGiven> : launch_fused<int32_t, kGiven>;
        return run(planner, ids, n_ids, rows, compare, out, counter, counter64, max_blocks, {}, stream);
    }
    const auto run = ids64 ? launch_fused<int64_t, kOwnIds> : launch_fused<int32_t, kOwnIds>;
    return run(planner, ids, n_ids, nullptr, false, out, counter, counter64, max_blocks, {}, stream);
}

int32_t prepare_fused(lplbk_planner &planner) {
    planner.fused_ids = kFusedIds;
    if (!fused_shape(planner)) return 0;
    if (planner.info.max_cluster > 1) planner.info.max_cluster = 16;
    int32_t error = prepare_fused_kernel<int64_t, kOwnIds>(planner);
    if (error == 0) error = prepare_fused_kernel<int32_t, kOwnIds>(planner);
    if (error == 0) error = prepare_fused_kernel<int64_t, kGiven>(planner);
    if (error == 0) error = prepare_fused_kernel<int32_t, kGiven>(planner);
    if (error == 0) error = prepare_fused_kernel<int64_t, kExchanged>(planner);
    if (error == 0) error = prepare_fused_kernel<int32_t, kExchanged>(planner);
    return error;
}

}  // namespace lplb

extern "C" {

int64_t lplbk_scratch_words(const lplbk_planner *planner) {
    return lplb::multi_scratch_words(planner->shape);
}

int32_t lplbk_prepare(lplbk_planner *planner) {
    lplb::OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return lplb::taken(on.error());
    int32_t error = lplb::prepare_solve(*planner);
    if (error == 0) error = lplb::prepare_rewrite(*planner);
    if (error == 0) error = lplb::prepare_fused(*planner);
    return error;
}

int32_t lplbk_place(const lplbk_planner *planner, const int32_t *tables, void *stream) {
    using namespace lplb;
    int32_t error = lplbk_upload(planner->device, planner->staged, tables, 4ll * planner->layout.words, stream);
    if (error != 0) return error;
    OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const int blocks = max(1, min(ceil_div(planner->layout.words, kThreads), planner->info.n_sms));
    error = taken(launch(planner->info, adopt, blocks, kThreads, 0, 0, static_cast<cudaStream_t>(stream), *planner));
    return error != 0 ? error : lplbk_wait(planner->device, stream);
}

int32_t lplbk_run(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, const int32_t *rows, int32_t compare,
                  void *out, void *counter, int32_t counter64, int64_t max_blocks, void *stream) {
    using namespace lplb;
    OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const auto queue = static_cast<cudaStream_t>(stream);
    if (!planner->has_replicas) return taken(rewrite_plainly(*planner, ids, ids64, n_ids, out, counter, counter64, max_blocks, queue));
    if (fused_possible(*planner, n_ids, max_blocks)) {
        return taken(run_fused(*planner, ids, ids64, n_ids, rows, compare != 0, out, counter, counter64, max_blocks, queue));
    }
    const Runs runs = runs_of(*planner, n_ids, max_blocks);
    cudaError_t error = count_runs(*planner, ids, ids64, n_ids, runs, rows == nullptr, queue);
    if (error != cudaSuccess) return taken(error);
    error = rows == nullptr ? solve_totals(*planner, counter, counter64, queue)
                            : solve_rows(*planner, rows, compare != 0, nullptr, nullptr, counter, counter64, queue);
    if (error == cudaSuccess) error = rewrite_runs(*planner, ids, ids64, n_ids, runs, out, rows == nullptr, queue);
    if (error != cudaSuccess && rows == nullptr) taken(clear_totals(*planner, queue));
    return taken(error);
}

int32_t lplbk_run_exchanging(const lplbk_planner *planner, const lplbk_exchange_view *view, const void *ids, int32_t ids64, int64_t n_ids,
                             void *out, void *counter, int32_t counter64, int64_t max_blocks, void *stream) {
    using namespace lplb;
    if (!planner->has_replicas || view->n_nodes != 1 || !fused_fits(*planner, n_ids, max_blocks, view->n_ranks)) return LPLBK_UNSUPPORTED;
    OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const auto run = ids64 ? launch_fused<int64_t, kExchanged> : launch_fused<int32_t, kExchanged>;
    return taken(run(*planner, ids, n_ids, nullptr, false, out, counter, counter64, max_blocks, *view, static_cast<cudaStream_t>(stream)));
}
}

PROFILE_READER(lplbk_profile_run)
