// Rewriting ids by a plan, in launches of many blocks. A block owns a chunk of ids and takes it tile by tile; within a tile every warp owns
// consecutive rows of 32 ids.
#include "ids.cuh"
#include "backend.cuh"
#include "launch.cuh"
#include "metrics.cuh"
#include "multi.cuh"
#include "solve/tables.cuh"

namespace lplb {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 4096;  // ids
constexpr int kRowsOfWarp = kTile / 32 / kWarps;
constexpr int kOfThread = ceil_div(LPLBK_MAX_LOGICAL, kThreads);  // experts

// Shared memory of a rewriting block.
struct RewriteSpace {
    int *code;        // [n_logical]
    int2 *range;      // [max_replicated] first cut and one past the last
    int2 *cut;        // [n_physical] places: tokens up to and with it, slot
    unsigned *base;   // [max_replicated] occurrences before the tile
    unsigned *counts; // [kWarps][counter_words(max_replicated)]
    int row_words;

    static __host__ __device__ int words_of(const lplbk_shape &shape) {
        const int n = Tables::max_replicated(shape);
        return round_up(shape.n_logical, 2) + 2 * n + 2 * shape.n_physical + n + kWarps * counter_words(n);
    }
    __device__ RewriteSpace(int *memory, const Tables &t) {
        code = memory;
        range = reinterpret_cast<int2 *>(memory + round_up(t.shape.n_logical, 2));
        cut = range + t.max_replicated();
        base = reinterpret_cast<unsigned *>(cut + t.shape.n_physical);
        counts = base + t.max_replicated();
        row_words = counter_words(t.max_replicated());
    }
};

// Where the occurrences of replicated expert i go: fills cuts and returns the range of them.
struct ByPlan {
    const int32_t *take;  // [n_physical]

    __device__ int2 cuts(const Tables &t, int i, const Expert &expert, int2 *cut) const {
        if (!expert.bundled()) {
            cut[2 * i] = make_int2(INT32_MAX, expert.slot());
            return make_int2(2 * i, 2 * i + 1);
        }
        const int group = expert.bundle() / t.shape.max_bundles, bundle = expert.bundle() - group * t.shape.max_bundles;
        const Image image(t.image(group), t.at);
        const bool pair = t.shape.n_redundant > 0;  // the expert knows its two places
        const int first = pair ? 0 : image.bundle_start[bundle], n = pair ? 2 : image.bundle_start[bundle + 1] - first;
        // Arcs and pairs of replicated experts are never more than slots.
        const int start = pair ? 2 * i : group * t.shape.max_arcs + first;
        int sum = 0;
        for (int j = 0; j < n; ++j) {
            const int slot = !pair ? image.slot(first + j) : j == 0 ? expert.slot() : expert.copy_slot();
            sum += take[slot];
            cut[start + j] = make_int2(sum, slot);
        }
        return make_int2(start, start + n);
    }
};
struct ByRatio {
    const float *ratios;
    const int32_t *totals;  // [n_logical]

    __device__ int2 cuts(const Tables &, int i, const Expert &expert, int2 *cut) const {
        const float ratio = ratios[expert.slot_class()];
        const double share = ratio != ratio ? 1.0 : min(max((double)ratio, 0.0), 1.0);
        const int kept = (int)floor(__dadd_rn(__dmul_rn(share, (double)totals[expert.id()]), 0.5));
        cut[2 * i] = make_int2(kept, expert.slot());
        cut[2 * i + 1] = make_int2(INT32_MAX, expert.copy_slot());
        return make_int2(2 * i, 2 * i + 2);
    }
};

struct RewriteChunks {
    int64_t n_ids, length;
    int n;
    const int32_t *rows;      // [n][n_logical] counts of each chunk, or running sums
    bool rows_are_sums;
    int32_t *cleared;         // [n_logical] or nullptr
    InvalidIds invalid;
};

template <class Rule>
__global__ void __launch_bounds__(kThreads) rewrite(const void *ids, int ids64, void *out, const __grid_constant__ Tables t,
                                                    const __grid_constant__ RewriteChunks chunks, const __grid_constant__ Rule rule) {
    extern __shared__ int4 memory[];
    RewriteSpace space(reinterpret_cast<int *>(memory), t);
    const int n_replicated = t.n_replicated(), n_logical = t.shape.n_logical;
    for (int e = threadIdx.x; e < n_logical; e += kThreads) space.code[e] = t.code(e);
    wait_for_stream();
    let_next_start();
    const int bits = bits_for(n_replicated);
    for (int i = threadIdx.x; i < n_replicated; i += kThreads) space.range[i] = rule.cuts(t, i, t.replicated(i), space.cut);
    int bad = 0;
    for (int chunk = blockIdx.x; chunk < chunks.n; chunk += gridDim.x) {
        __syncthreads();
        // Occurrences before this chunk: one warp an expert.
        for (int i = warp_id(); i < n_replicated; i += kWarps) {
            const int32_t *column = chunks.rows + t.replicated(i).id();
            int before = 0;
            if (chunks.rows_are_sums) {
                before = chunk > 0 ? column[(int64_t)(chunk - 1) * n_logical] : 0;
            } else {
                for (int r = lane_id(); r < chunk; r += 32) before += column[(int64_t)r * n_logical];
                before = warp_sum(before);
            }
            if (lane_id() == 0) space.base[i] = before;
        }
        const int64_t chunk_end = min((chunk + 1) * chunks.length, chunks.n_ids);
        for (int64_t tile = chunk * chunks.length; tile < chunk_end; tile += kTile) {
            for (int i = threadIdx.x; i < kWarps * space.row_words; i += kThreads) space.counts[i] = 0;
            __syncthreads();
            unsigned id[kRowsOfWarp];
            const int64_t first = tile + warp_id() * (kRowsOfWarp * 32) + lane_id();
            with_ids(ids, ids64, [&](auto *ids) {
#pragma unroll
                for (int r = 0; r < kRowsOfWarp; ++r) {
                    id[r] = kNoExpert;
                    if (first + 32 * r < chunk_end) id[r] = packed_id(ids[first + 32 * r], n_logical);
                }
            });
            unsigned *const mine = space.counts + warp_id() * space.row_words;
            int code[kRowsOfWarp];
#pragma unroll
            for (int r = 0; r < kRowsOfWarp; ++r) {
                bad += id[r] == kBadId;
                code[r] = id[r] < kBadId ? space.code[id[r]] : 0;
                if (code[r] < 0) count_one(mine, -1 - code[r]);
            }
            __syncthreads();
            // Counts of warps -> occurrences before each warp; base is that of the whole tile until the next one.
            uint16_t *const columns = reinterpret_cast<uint16_t *>(space.counts);
            unsigned in_tile[kOfThread] = {};
#pragma unroll
            for (int n = 0; n < kOfThread; ++n) {
                const int i = threadIdx.x + n * kThreads;
                if (i >= n_replicated) break;
                unsigned sum = 0;
                for (int w = 0; w < kWarps; ++w) {
                    uint16_t *at = columns + 2 * w * space.row_words + i;
                    const unsigned count = *at;
                    *at = (uint16_t)sum;
                    sum += count;
                }
                in_tile[n] = sum;
            }
            __syncthreads();
#pragma unroll
            for (int r = 0; r < kRowsOfWarp; ++r) {
                const bool replicated = code[r] < 0;
                int slot = id[r] < kBadId ? code[r] : -1;
                if (__any_sync(kFullWarp, replicated)) {
                    const int i = replicated ? -1 - code[r] : 0;
                    const unsigned k = occurrence(replicated, i, bits, reinterpret_cast<uint16_t *>(mine));
                    if (replicated) {
                        const int2 range = space.range[i];
                        const int64_t number = (int64_t)space.base[i] + k;
                        slot = space.cut[range.x].y;
                        for (int p = range.x; p < range.y; ++p) {
                            const int2 cut = space.cut[p];
                            if (number < cut.x) {
                                slot = cut.y;
                                break;
                            }
                        }
                    }
                }
                if (first + 32 * r < chunk_end) store_id(out, ids64, first + 32 * r, slot);
            }
            __syncthreads();
#pragma unroll
            for (int n = 0; n < kOfThread; ++n) {
                if (threadIdx.x + n * kThreads < n_replicated) space.base[threadIdx.x + n * kThreads] += in_tile[n];
            }
        }
    }
    chunks.invalid.add(bad);
    if (chunks.cleared != nullptr && blockIdx.x == 0) {
        for (int e = threadIdx.x; e < n_logical; e += kThreads) chunks.cleared[e] = 0;
    }
}

__global__ void __launch_bounds__(kThreads) rewrite_slots(const void *ids, int ids64, void *out, int64_t n_ids, const int *code,
                                                          int n_logical, InvalidIds invalid, void *counter, int counter64, int n_groups) {
    extern __shared__ int slots[];
    for (int e = threadIdx.x; e < n_logical; e += kThreads) slots[e] = code[e];
    wait_for_stream();
    let_next_start();
    __syncthreads();
    int bad = 0;
    const int64_t stride = (int64_t)gridDim.x * kThreads;
    with_ids(ids, ids64, [&](auto *ids) {
        using Id = std::remove_const_t<std::remove_pointer_t<decltype(ids)>>;
#pragma unroll 4
        for (int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x; i < n_ids; i += stride) {
            const unsigned id = packed_id(ids[i], n_logical);
            bad += id == kBadId;
            static_cast<Id *>(out)[i] = (Id)(id < kBadId ? slots[id] : -1);
        }
    });
    invalid.add(bad);
    if (counter != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
        if (counter64) {
            atomicAdd(static_cast<unsigned long long *>(counter), (unsigned long long)n_groups);
        } else {
            atomicAdd(static_cast<int *>(counter), n_groups);
        }
    }
}

int shared_bytes(const lplbk_planner &planner) { return 4 * RewriteSpace::words_of(planner.shape); }

template <class Rule>
cudaError_t launch_rewrite(const lplbk_planner &planner, const void *ids, int32_t ids64, void *out, const RewriteChunks &chunks,
                           const Rule &rule, cudaStream_t stream) {
    return launch(planner.info, rewrite<Rule>, min(chunks.n, 4 * planner.info.n_sms), kThreads, shared_bytes(planner), 0, stream,
                  ids, ids64, out, Tables(planner), chunks, rule);
}

}  // namespace

cudaError_t rewrite_chunks(const lplbk_planner &planner, const void *ids, int32_t ids64, int64_t n_ids, const Chunks &chunks, void *out,
                         bool clear_totals, cudaStream_t stream) {
    const MultiScratch scratch = multi_scratch(planner);
    const RewriteChunks work{
        n_ids, chunks.length, chunks.n, scratch.rows, false, clear_totals ? scratch.totals : nullptr, InvalidIds::of(planner)};
    return launch_rewrite(planner, ids, ids64, out, work, ByPlan{planner.take}, stream);
}

cudaError_t rewrite_plainly(const lplbk_planner &planner, const void *ids, int32_t ids64, int64_t n_ids, void *out, void *counter,
                            int32_t counter64, int64_t max_blocks, cudaStream_t stream) {
    int64_t blocks = min(ceil_div64(n_ids, 2 * kThreads), (int64_t)4 * planner.info.n_sms);
    if (max_blocks > 0) blocks = min(blocks, max_blocks);
    blocks = max(blocks, (int64_t)1);
    const int n_logical = planner.shape.n_logical;
    const int *code = planner.tables + planner.layout.code;
    return launch(planner.info, rewrite_slots, (int)blocks, kThreads, 4 * n_logical, 0, stream, ids, ids64, out, n_ids, code,
                  n_logical, InvalidIds::of(planner), counter, counter64, planner.shape.n_groups);
}

int32_t prepare_rewrite(const lplbk_planner &planner) {
    const int32_t error = allow_shared(planner.info, rewrite<ByPlan>, shared_bytes(planner));
    return error != 0 ? error : allow_shared(planner.info, rewrite<ByRatio>, shared_bytes(planner));
}

}  // namespace lplb

extern "C" int32_t lplbk_redirect(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, void *out,
                                  int64_t max_blocks, void *stream) {
    using namespace lplb;
    if (n_ids == 0) return 0;
    OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const auto queue = static_cast<cudaStream_t>(stream);
    if (!planner->has_replicas) return taken(rewrite_plainly(*planner, ids, ids64, n_ids, out, nullptr, 0, max_blocks, queue));
    const Chunks chunks = chunks_of(*planner, n_ids, max_blocks);
    const cudaError_t error = count_chunks(*planner, ids, ids64, n_ids, chunks, false, queue);
    return taken(error != cudaSuccess ? error : rewrite_chunks(*planner, ids, ids64, n_ids, chunks, out, false, queue));
}

extern "C" int32_t lplbk_redirect_by_ratio(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, const float *ratios,
                                           const int32_t *cumulative, int64_t n_chunks, void *out, void *stream) {
    using namespace lplb;
    if (n_ids == 0) return 0;
    OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const int64_t length = ceil_div64(ceil_div64(n_ids, n_chunks), 1024) * 1024;
    const RewriteChunks chunks{n_ids, length, (int)n_chunks, cumulative, true, nullptr, InvalidIds::of(*planner)};
    const ByRatio rule{ratios, cumulative + (n_chunks - 1) * planner->shape.n_logical};
    return taken(launch_rewrite(*planner, ids, ids64, out, chunks, rule, static_cast<cudaStream_t>(stream)));
}
