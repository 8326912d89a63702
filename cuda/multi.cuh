// The plan in several launches: counts of chunks, solve, rewriting. Shared between count.cu, solve.cu, rewrite.cu and run.cu.
#pragma once

#include "common.cuh"

namespace lplb {

constexpr int kMaxChunks = 256;

// n chunks of `length` ids each, a multiple of 32; the last one may be shorter.
struct Chunks {
    int64_t length;
    int n;
};

// Chunks for launches of several blocks.
Chunks chunks_of(const lplbk_planner &planner, int64_t n_ids, int64_t max_blocks);

// A planner's scratch memory.
struct MultiScratch {
    int32_t *rows;    // [kMaxChunks][n_logical]
    int32_t *totals;  // [n_logical], zero between calls
    unsigned *ticket;
};

inline int64_t multi_scratch_words(const lplbk_shape &shape) { return (int64_t)(kMaxChunks + 1) * shape.n_logical + 4; }

inline MultiScratch multi_scratch(const lplbk_planner &planner) {
    int32_t *start = planner.scratch;
    return {start, start + (int64_t)kMaxChunks * planner.shape.n_logical,
            reinterpret_cast<unsigned *>(start + (int64_t)(kMaxChunks + 1) * planner.shape.n_logical)};
}

// Counts every chunk into scratch.rows and, with add_totals, all of them into scratch.totals. Invalid ids are counted by rewrite_chunks().
cudaError_t count_chunks(const lplbk_planner &planner, const void *ids, int32_t ids64, int64_t n_ids, const Chunks &chunks, bool add_totals,
                       cudaStream_t stream);

// Solves for the counts in scratch.totals (one source).
cudaError_t solve_totals(const lplbk_planner &planner, void *counter, int32_t counter64, cudaStream_t stream);
// Solves for all ranks' rows [ep_size][n_logical + 1]; compare: their digests with the planner's.
cudaError_t solve_rows(const lplbk_planner &planner, const int32_t *rows, bool compare, float *ratios, float *scaled, void *counter,
                       int32_t counter64, cudaStream_t stream);

// Rewrites ids by the plan; scratch.rows as count_chunks() left them. clear_totals: zeroes scratch.totals for the next count_chunks().
cudaError_t rewrite_chunks(const lplbk_planner &planner, const void *ids, int32_t ids64, int64_t n_ids, const Chunks &chunks, void *out,
                         bool clear_totals, cudaStream_t stream);
// Rewrites ids where no expert has a second place. counter: grows by the number of groups.
cudaError_t rewrite_plainly(const lplbk_planner &planner, const void *ids, int32_t ids64, int64_t n_ids, void *out, void *counter,
                            int32_t counter64, int64_t max_blocks, cudaStream_t stream);

// Let the kernels have the shared memory that this planner needs; LPLBK_UNSUPPORTED where they cannot.
int32_t prepare_solve(const lplbk_planner &planner);
int32_t prepare_rewrite(const lplbk_planner &planner);
int32_t prepare_redirect(const lplbk_planner &planner);
// Also sets fused_ids, and max_cluster of info.
int32_t prepare_run(lplbk_planner &planner);

}  // namespace lplb
