// Counting ids. Every block counts chunks of ids in shared memory; the last block to finish adds the chunks up.
#include "ids.cuh"
#include "backend.cuh"
#include "launch.cuh"
#include "multi.cuh"

namespace lplb {
namespace {

constexpr int kThreads = 512;

struct CountOut {
    int32_t *rows;        // [n_chunks][n_logical], the counts of each chunk; nullptr: none
    int32_t *totals;      // [n_logical]
    bool sum_rows;        // the last block writes the sums of rows to totals
    bool add_totals;      // every block adds its counts to totals
    bool cumulative;      // the last block turns rows into running sums
    unsigned *ticket;     // for sum_rows; 0 between launches
    const int32_t *digest; // written behind the totals by the last block; nullptr: not so
};

__global__ void __launch_bounds__(kThreads) count_ids(const void *ids, int ids64, int64_t n_ids, int64_t chunk_length, int n_chunks,
                                                      int n_logical, const __grid_constant__ CountOut out) {
    extern __shared__ int histogram[];
    __shared__ int is_last;
    wait_for_stream();
    let_next_start();
    for (int chunk = blockIdx.x; chunk < n_chunks; chunk += gridDim.x) {
        for (int e = threadIdx.x; e < n_logical; e += kThreads) histogram[e] = 0;
        __syncthreads();
        const int64_t end = min((chunk + 1) * chunk_length, n_ids);
        with_ids(ids, ids64, [&](auto *ids) {
#pragma unroll 4
            for (int64_t i = chunk * chunk_length + threadIdx.x; i < end; i += kThreads) {
                const unsigned id = packed_id(ids[i], n_logical);
                if (id < kBadId) atomicAdd(&histogram[id], 1);  // what has no place here is noticed by whoever rewrites it
            }
        });
        __syncthreads();
        for (int e = threadIdx.x; e < n_logical; e += kThreads) {
            const int count = histogram[e];
            if (out.rows != nullptr) out.rows[(int64_t)chunk * n_logical + e] = count;
            if (out.add_totals && count != 0) atomicAdd(&out.totals[e], count);
        }
    }
    if (!out.sum_rows) return;

    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(out.ticket, 1u) == gridDim.x - 1;
        if (is_last) *out.ticket = 0;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    for (int e = threadIdx.x; e < n_logical; e += kThreads) {
        int sum = 0;
        int32_t *at = out.rows + e;
        constexpr int kBatch = 16;  // loads in flight
        for (int chunk = 0; chunk < n_chunks; chunk += kBatch) {
            int count[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) count[i] = chunk + i < n_chunks ? __ldcg(at + (int64_t)(chunk + i) * n_logical) : 0;
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                sum += count[i];
                if (out.cumulative && chunk + i < n_chunks) at[(int64_t)(chunk + i) * n_logical] = sum;
            }
        }
        out.totals[e] = sum;
    }
    if (out.digest != nullptr && threadIdx.x == 0) out.totals[n_logical] = *out.digest;
}

// One source's counts as a row. A count that does not fit becomes -2^31, as on the CPU.
__global__ void make_row(const void *counts, int counts64, int n_logical, const int32_t *digest, int32_t *row) {
    wait_for_stream();
    let_next_start();
    for (int e = threadIdx.x; e < n_logical; e += blockDim.x) {
        const int64_t count = counts64 ? static_cast<const int64_t *>(counts)[e] : static_cast<const int32_t *>(counts)[e];
        row[e] = count == (int32_t)count ? (int32_t)count : INT32_MIN;
    }
    if (threadIdx.x == 0) row[n_logical] = *digest;
}

cudaError_t count(const lplbk_planner &planner, const void *ids, int32_t ids64, int64_t n_ids, const Chunks &chunks, const CountOut &out,
                  cudaStream_t stream) {
    const int blocks = min(chunks.n, 4 * planner.info.n_sms);
    return launch(planner.info, count_ids, blocks, kThreads, 4 * planner.shape.n_logical, 0, stream, ids, ids64, n_ids,
                  chunks.length, chunks.n, planner.shape.n_logical, out);
}

}  // namespace

Chunks chunks_of(const lplbk_planner &planner, int64_t n_ids, int64_t max_blocks) {
    int64_t n = min((int64_t)kMaxChunks, (int64_t)planner.info.n_sms);
    if (max_blocks > 0) n = min(n, max_blocks);
    n = max(min(n, ceil_div64(n_ids, 2048)), (int64_t)1);
    const int64_t length = ceil_div64(ceil_div64(n_ids, n), 32) * 32;
    return {max(length, (int64_t)32), (int)max(ceil_div64(n_ids, max(length, (int64_t)32)), (int64_t)1)};
}

cudaError_t count_chunks(const lplbk_planner &planner, const void *ids, int32_t ids64, int64_t n_ids, const Chunks &chunks, bool add_totals,
                       cudaStream_t stream) {
    const MultiScratch scratch = multi_scratch(planner);
    const CountOut out{scratch.rows, scratch.totals, false, add_totals, false, nullptr, nullptr};
    return count(planner, ids, ids64, n_ids, chunks, out, stream);
}

}  // namespace lplb

namespace {

int32_t count_all(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, int32_t *counts, int32_t *cumulative,
                  int64_t n_chunks, const int32_t *digest, void *stream) {
    using namespace lplb;
    OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const MultiScratch scratch = multi_scratch(*planner);
    Chunks chunks = chunks_of(*planner, n_ids, 64);
    const bool sums = cumulative != nullptr;
    if (sums) chunks = {max(ceil_div64(ceil_div64(n_ids, n_chunks), 1024) * 1024, (int64_t)1024), (int)n_chunks};
    const CountOut out{sums ? cumulative : scratch.rows, counts, true, false, sums, scratch.ticket, digest};
    return taken(count(*planner, ids, ids64, n_ids, chunks, out, static_cast<cudaStream_t>(stream)));
}

}  // namespace

extern "C" int32_t lplbk_count(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, int32_t *counts,
                               int32_t *cumulative, int64_t n_chunks, void *stream) {
    return count_all(planner, ids, ids64, n_ids, counts, cumulative, n_chunks, nullptr, stream);
}

extern "C" int32_t lplbk_count_row(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, int32_t *row,
                                   void *stream) {
    return count_all(planner, ids, ids64, n_ids, row, nullptr, 0, planner->tables + planner->layout.digest, stream);
}

extern "C" int32_t lplbk_make_row(const lplbk_planner *planner, const void *counts, int32_t counts64, int32_t *row, void *stream) {
    using namespace lplb;
    OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const int32_t *digest = planner->tables + planner->layout.digest;
    return taken(launch(planner->info, make_row, 1, 256, 0, 0, static_cast<cudaStream_t>(stream), counts, counts64,
                        planner->shape.n_logical, digest, row));
}
