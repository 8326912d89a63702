// What all solve kernels share: their arguments, the counts they read, the information they write.
#pragma once

#include "assign.cuh"
#include "exchange.cuh"
#include "flow_pair.cuh"

namespace lplb {

// Counts, [n_sources][width], of which the first n_logical of each source count; what is behind them is its digest.
template <class Count>
struct CountMatrix {
    const Count *counts;
    int n_sources, n_logical, width;

    // Tokens of an expert. Each count is cut at 2^40, far beyond what a solve takes, so that no sum leaves 64 bits.
    template <bool kMany>
    __device__ __forceinline__ int64_t total(int expert) const {
        if (!kMany) return cut(counts[expert]);
        int64_t sum = 0;
        const Count *at = counts + expert;
#pragma unroll 8
        for (int s = 0; s < n_sources; ++s, at += width) sum += cut(*at);
        return sum;
    }
    __device__ int of(int source, int expert) const { return (int)cut(counts[(int64_t)source * width + expert]); }

private:
    __device__ static int64_t cut(int32_t count) { return max(count, 0); }
    __device__ static int64_t cut(int64_t count) { return max(min(count, (int64_t)1 << 40), (int64_t)0); }
};

// Where a solve writes.
struct PlanOut {
    int32_t *quota, *take, *group_info;
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
};

// Compares the digests behind the counts of all sources with the planner's own, and reports the first that differs. One warp.
template <class Count>
static __device__ __noinline__ void compare_digests(const Count *digests, int n_sources, int width, const int32_t *own, int rank,
                                                    lplbk_report *report, bool traps) {
    const int32_t wanted = *own;
    for (int first = 0; first < n_sources; first += 32) {
        const int source = first + lane_id();
        const bool differs = source < n_sources && (int32_t)digests[(int64_t)source * width] != wanted;
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
template <class Count>
__device__ __forceinline__ void compare_digests(const CountMatrix<Count> &rows, const PlanOut &out) {
    if (out.digest != nullptr && uniform_warp_id() == (int)(blockDim.x >> 5) - 1) {
        compare_digests(rows.counts + rows.n_logical, rows.n_sources, rows.width, out.digest, out.rank, out.report, out.traps != 0);
    }
}

// With no expert above this a group's total is below 2^31, since a planner has at most 2^10 experts.
constexpr int kSurelyFits = 1 << 20;
static_assert((int64_t)kSurelyFits * LPLBK_MAX_LOGICAL < INT32_MAX, "kSurelyFits");

// An exact sum of counts for the rare case that it may not fit 31 bits: high * 2^16 + low.
struct WideSum {
    int high, low, broken;

    __device__ void add(int64_t tokens) {
        if (tokens > INT32_MAX) atomicOr(&broken, 1);
        atomicAdd(&high, (int)(min(tokens, (int64_t)INT32_MAX) >> 16));
        atomicAdd(&low, (int)(tokens & 0xffff));
    }
    __device__ bool overflow() const { return broken != 0 || ((int64_t)high << 16) + low > INT32_MAX; }
};

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
__device__ __forceinline__ int info_word(int word, int max_load, const FlowEnd &end, int total, int moved) {
    int value = 0;
    if (word == LPLBK_INFO_MAX_LOAD) value = max_load;
    if (word == LPLBK_INFO_BOUND) value = end.bound;
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

// floor(x * part / whole) for 0 <= x, part <= whole < 2^31, whole > 0; inverse: 1.0 / whole.
__device__ __forceinline__ int floor_share(int x, int part, int whole, double inverse) {
    const int64_t product = (int64_t)x * part;
    int64_t share = (int64_t)((double)product * inverse);
    const int64_t rest = product - share * whole;
    if (rest < 0) --share;
    if (rest >= whole) ++share;
    return (int)share;
}

// Of x tokens that a bundle of `whole` tokens sends to its second place: the part of the expert that has `tokens`, `before` being those of
// the experts before it.
static __device__ __noinline__ int share_of(int x, int before, int tokens, int whole) {
    if (whole == 0) return 0;
    const double inverse = 1.0 / whole;
    return floor_share(x, before + tokens, whole, inverse) - floor_share(x, before, whole, inverse);
}

}  // namespace lplb
