// Redirect: ids by the latest plan, in one launch of one cluster of blocks where that is enough, else in two of many blocks.
//
// In the cluster every block owns consecutive ids and every warp of it consecutive rows of 32, which stay in registers. The blocks tell
// each other how often each replicated expert occurs in them; while they wait for that they number the occurrences of their own ids.
#include "backend.cuh"
#include "launch.cuh"
#include "metrics.cuh"
#include "rewrite.cuh"

namespace lplb {
namespace {

constexpr int kMostRows = 8;  // of a warp; with more of them, two launches of many blocks are faster (measured on an H200)
constexpr int kMostBlocks = 16;
constexpr int kIdsOfBlock = 512;  // as few at least, where there are several blocks

struct RedirectIds {
    int64_t n;
    int rows;  // of a warp
    int wide;  // 1: they are int64
    InvalidIds invalid;
};

// occurrence() for rows of 32 ids, one after the other: which lanes hold the same number is found for all of them together.
template <int kRows>
__device__ __forceinline__ void number_rows(const int (&code)[kRows], int bits, uint16_t *next, unsigned (&number)[kRows]) {
    unsigned alike[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) alike[r] = __ballot_sync(kFullWarp, code[r] < 0);
#pragma unroll 1
    for (int b = 0; b < bits; ++b) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const bool set = (~code[r] >> b & 1) != 0;  // ~code: which replicated expert it is
            const unsigned vote = __ballot_sync(kFullWarp, set);
            alike[r] &= set ? vote : ~vote;
        }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const unsigned before = __popc(alike[r] & lanes_below());
        const unsigned start = code[r] < 0 ? next[~code[r]] : 0;
        __syncwarp();
        if (code[r] < 0 && before == 0) next[~code[r]] = (uint16_t)(start + __popc(alike[r]));
        __syncwarp();
        number[r] = start + before;
    }
}

template <int kRows>
__global__ void __launch_bounds__(kRewriteThreads, 1)
    redirect_in_cluster(const void *ids, void *out, const __grid_constant__ Tables t, const __grid_constant__ RedirectIds in,
                        const __grid_constant__ ByPlan plan) {
    extern __shared__ int4 memory[];
    const RewriteSpace space(reinterpret_cast<int *>(memory), t);
    const int n_replicated = t.n_replicated(), n_logical = t.shape.n_logical, block = (int)cluster_rank();
    for (int e = threadIdx.x; e < n_logical; e += kRewriteThreads) space.code[e] = t.code(e);
    for (int i = threadIdx.x; i < n_replicated; i += kRewriteThreads) {
        space.range[i] = plan.places(t, i, space.cut);
        space.base[i] = 0;
    }
    for (int i = threadIdx.x; i < kRewriteWarps * space.row_words; i += kRewriteThreads) space.counts[i] = 0;
    wait_for_stream();

    const int64_t first = (int64_t)(block * kRewriteWarps + warp_id()) * in.rows * 32 + lane_id();
    unsigned id[kRows];
    with_ids(ids, in.wide, [&](auto *ids) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            id[r] = kNoExpert;
            if (r < in.rows && first + 32 * r < in.n) id[r] = packed_id(ids[first + 32 * r], n_logical);
        }
    });
    let_next_start();
    for (int i = threadIdx.x; i < n_replicated; i += kRewriteThreads) plan.cuts(t, i, space.range[i], space.cut);
    __syncthreads();

    // Counts of the warps; ids without a choice are through.
    unsigned *const mine = space.counts + warp_id() * space.row_words;
    int code[kRows], bad = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        bad += id[r] == kBadId;
        code[r] = id[r] < kBadId ? space.code[id[r]] : 0;
        if (code[r] < 0) count_one(mine, -1 - code[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        if (r < in.rows && first + 32 * r < in.n && code[r] >= 0) {
            store_id(out, in.wide, first + 32 * r, id[r] < kBadId ? code[r] : -1);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n_replicated; i += kRewriteThreads) space.totals[i] = (int)space.number_warps(i);
    cluster_arrive();
    __syncthreads();

    unsigned number[kRows];
    number_rows(code, bits_for(n_replicated), reinterpret_cast<uint16_t *>(mine), number);
    cluster_wait();
    for (int b = warp_id(); b < block; b += kRewriteWarps) {
        for (int i = lane_id(); i < n_replicated; i += 32) {
            const unsigned before = cluster_load(reinterpret_cast<const unsigned *>(space.totals) + i, b);
            if (before != 0) atomicAdd(&space.base[i], before);
        }
    }
    // This block has read what it needs of the others; nobody ends before all have.
    cluster_arrive();
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        if (code[r] >= 0) continue;
        const int i = -1 - code[r];
        store_id(out, in.wide, first + 32 * r, space.slot_of(i, (int64_t)space.base[i] + number[r]));
    }
    in.invalid.add(bad);
    cluster_wait();
}

using RedirectKernel = void (*)(const void *, void *, Tables, RedirectIds, ByPlan);

RedirectKernel kernel_of(int rows) {
    return rows <= 4 ? redirect_in_cluster<4> : redirect_in_cluster<kMostRows>;
}

int shared_bytes(const lplbk_planner &planner) { return 4 * RewriteSpace::words_of(planner.shape); }

// Blocks of the cluster; 0: the ids are too many for one.
int blocks_of(const lplbk_planner &planner, int64_t n_ids, int64_t max_blocks) {
    int most = min(planner.info.max_cluster, kMostBlocks), blocks = 1;
    if (max_blocks > 0) most = (int)min((int64_t)most, max_blocks);
    while (2 * blocks <= most && ceil_div64(n_ids, blocks) > kIdsOfBlock) blocks *= 2;
    return n_ids <= (int64_t)blocks * kRewriteWarps * kMostRows * 32 ? blocks : 0;
}

cudaError_t redirect_fused(const lplbk_planner &planner, const void *ids, int32_t ids64, int64_t n_ids, void *out, int blocks,
                           cudaStream_t stream) {
    const int rows = (int)ceil_div64(n_ids, (int64_t)blocks * kRewriteThreads);
    const RedirectIds in{n_ids, rows, ids64, InvalidIds::of(planner)};
    return launch(planner.info, kernel_of(rows), blocks, kRewriteThreads, shared_bytes(planner), planner.info.max_cluster > 1 ? blocks : 0,
                  stream, ids, out, Tables(planner), in, ByPlan{planner.take});
}

}  // namespace

int32_t prepare_redirect(const lplbk_planner &planner) {
    for (int rows : {4, kMostRows}) {
        const int32_t error = allow_shared(planner.info, kernel_of(rows), shared_bytes(planner));
        if (error != 0) return error;
        if (planner.info.max_cluster == 1) continue;
        const cudaError_t refused = cudaFuncSetAttribute(kernel_of(rows), cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        if (refused != cudaSuccess) return taken(refused);
    }
    return 0;
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
    const int blocks = blocks_of(*planner, n_ids, max_blocks);
    if (blocks > 0) return taken(redirect_fused(*planner, ids, ids64, n_ids, out, blocks, queue));
    const Chunks chunks = chunks_of(*planner, n_ids, max_blocks);
    const cudaError_t error = count_chunks(*planner, ids, ids64, n_ids, chunks, false, queue);
    return taken(error != cudaSuccess ? error : rewrite_chunks(*planner, ids, ids64, n_ids, chunks, out, false, queue));
}
