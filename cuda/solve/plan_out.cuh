// Where a plan is written, and what is written beside the tokens: the information of a group, and rows whose digests differ.
#pragma once

#include "counts.cuh"
#include "../exchange.cuh"
#include "space.cuh"

namespace lplb {

// Where a solve writes.
struct PlanOut {
    int32_t *quota, *take, *kept, *sources, *group_info;
    int64_t *counters;
    void *counter;
    float *ratios;
    float *scaled;  // in a launch of one group only
    int32_t counter64;
    int32_t rank;   // of the planner, -1: whole batch
    int32_t per_node;    // ranks of a node
    int32_t node_start;  // first rank of the planner's node
    int32_t n_local;     // slots of a rank
    // For rows that are compared, see compare_digests; else nullptr.
    const int32_t *digest;
    lplbk_report *report;
    int32_t traps;

    static PlanOut of(const lplbk_planner &planner, float *ratios, float *scaled, void *counter, int32_t counter64) {
        const lplbk_shape &shape = planner.shape;
        const int per_node = shape.ep_size / shape.n_nodes;
        return {planner.quota,
                planner.take,
                planner.kept,
                planner.sources,
                planner.group_info,
                planner.counters,
                counter,
                ratios,
                scaled,
                counter64,
                shape.rank,
                per_node,
                shape.rank < 0 ? 0 : shape.rank / per_node * per_node,
                shape.n_physical / shape.ep_size,
                nullptr,
                reinterpret_cast<lplbk_report *>(planner.report),
                planner.traps};
    }
    void compare(const lplbk_planner &planner) { digest = report != nullptr ? planner.tables + planner.layout.digest : nullptr; }

    __device__ void count_solved() const {
        if (counter == nullptr) return;
        if (counter64) {
            atomicAdd(static_cast<unsigned long long *>(counter), 1ull);
        } else {
            atomicAdd(static_cast<int *>(counter), 1);
        }
    }
    __device__ void count_overflow() const { atomicAdd(reinterpret_cast<unsigned long long *>(counters + LPLBK_COUNTER_OVERFLOW), 1ull); }
    __device__ int *info(int group) const { return group_info + group * LPLBK_INFO_WORDS; }
    // The tokens of the planner's rank are written by those who write all tokens; without a rank nobody does.
    __device__ bool writes_word(int word) const { return word < LPLBK_INFO_OWN_RANK || word > LPLBK_INFO_OTHER_NODES || rank < 0; }
};

// Compares the digests behind the counts of all sources with the planner's own, and reports the first that differs. One warp.
static __device__ __noinline__ void compare_digests(const int32_t *digests, int n_sources, int width, const int32_t *own, int rank,
                                                    lplbk_report *report, bool traps) {
    const int32_t wanted = *own;
    for (int first = 0; first < n_sources; first += 32) {
        const int source = first + lane_id();
        const bool differs = source < n_sources && digests[(int64_t)source * width] != wanted;
        const unsigned others = __ballot_sync(kFullWarp, differs);
        if (others == 0) continue;
        if (lane_id() == 0) {
            exchange::detail::note(report, LPLBK_EXCHANGE_DISAGREED, rank, first + __ffs(others) - 1, 0, 0);
            if (traps) exchange::detail::trap_soon();
        }
        return;
    }
}

// By all threads of a block; its last warp does it.
template <bool kAnyWidth>
__device__ __forceinline__ void compare_digests(const CountMatrix<kAnyWidth> &rows, const PlanOut &out) {
    if (out.digest != nullptr && uniform_warp_id() == (int)(blockDim.x >> 5) - 1) {
        compare_digests(rows.counts + rows.n_logical, rows.n_sources, rows.width, out.digest, out.rank, out.report, out.traps != 0);
    }
}

// Keeps what a layout of this plan will ask for: whose counts it was made for and, where several ranks' tokens are told apart, their counts
// of the experts of this rank's slots. By the threads first, first + 1 ..., `stride` of them.
template <bool kAnyWidth>
__device__ __forceinline__ void keep_counts(const Tables &t, const PlanOut &out, const CountMatrix<kAnyWidth> &counts, bool several,
                                            int first, int stride) {
    if (first == 0) *out.sources = several ? counts.n_sources : 1;
    if (!several) return;
#pragma unroll 1
    for (int i = first; i < counts.n_sources * out.n_local; i += stride) {
        const int source = i / out.n_local, expert = t.words[t.at.slot_expert + out.rank * out.n_local + i - source * out.n_local];
        out.kept[i] = expert < 0 ? 0 : counts.of(source, expert);
    }
}

// With no expert above this a group's total is below 2^31, since a planner has at most 2^10 experts.
constexpr int kSurelyFits = 1 << 20;
static_assert((int64_t)kSurelyFits * LPLBK_MAX_LOGICAL < INT32_MAX, "kSurelyFits");

__device__ __forceinline__ int fitted(int64_t tokens) { return (int)min(tokens, (int64_t)INT32_MAX); }

// Tokens of the planner's own source by distance of the rank they go to: own rank, own node, other nodes. Summed by every thread, then in
// shared memory.
struct OwnTokens {
    int of[3] = {0, 0, 0};

    __device__ void add(const PlanOut &out, int place_rank, int take) {
        const bool own = place_rank == out.rank;
        const bool near = !own && (unsigned)(place_rank - out.node_start) < (unsigned)out.per_node;
        of[0] += own ? take : 0;
        of[1] += near ? take : 0;
        of[2] += own || near ? 0 : take;
    }
    // Whole warps.
    __device__ void join(int *shared) const {
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            const int sum = warp_sum(of[k]);
            if (lane_id() == 0 && sum != 0) atomicAdd(&shared[k], sum);
        }
    }
};

// One word of a group's information.
template <class End>
__device__ __forceinline__ int info_word(int word, int max_load, const End &end, int total, int moved) {
    int value = 0;
    if (word == LPLBK_INFO_MAX_LOAD) value = max_load;
    if constexpr (End::kRanked) {
        if (word == LPLBK_INFO_BOUND) value = end.differ ? max_load : (int)(end.level >> 10);
        if (end.differ) {
            if (word == LPLBK_INFO_RANKED) value = 1;
            if (word == LPLBK_INFO_LEVEL) value = (int)end.level;
            if (word == LPLBK_INFO_LEVEL + 1) value = (int)(end.level >> 32);
            if (word == LPLBK_INFO_MEAN) value = (int)end.mean;
            if (word == LPLBK_INFO_MEAN + 1) value = (int)(end.mean >> 32);
        }
    } else {
        if (word == LPLBK_INFO_BOUND) value = end.level;
    }
    if (word == LPLBK_INFO_TOTAL) value = total;
    if (word == LPLBK_INFO_MOVED) value = moved;
    if (word == LPLBK_INFO_ROUNDS) value = end.rounds;
    if (word == LPLBK_INFO_CERTIFIED) value = end.certified;
    if (word == LPLBK_INFO_WITNESS_SIZE) value = end.witness_size;
    return value;
}

// By one warp: the information of a group whose total does not fit 31 bits.
__device__ __forceinline__ void write_overflow(const PlanOut &out, int group) {
    out.info(group)[lane_id()] = 0;
    if (lane_id() == 0) out.count_overflow();
}

}  // namespace lplb
