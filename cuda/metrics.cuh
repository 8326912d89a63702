// What a planner records beside its plans: a history of the counts, and metrics. Both are sums of integers, so that they do not depend on
// the order in which threads add.
//
// A plan takes a few microseconds and runs each instruction once or twice, so code is what costs: most of it is fetched for the first time.
// Therefore a lane does the same for its value as every other lane, whatever the value means, and what adds a group is a call, which is
// out of the way where nothing is recorded.
#pragma once

#include "common.cuh"

namespace lplb {

namespace metrics {

// Ratios of loads to the mean, rounded down: load * ranks / total, for total > 0.
__device__ __forceinline__ unsigned over_mean(int load, int ranks, int total) {
    const unsigned long long scaled = (unsigned long long)load * (unsigned)ranks << LPLBK_METRIC_BITS;  // below 2^62
    double inverse;
    asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(inverse) : "d"((double)total));  // 20 bits or more; the next line doubles them
    inverse = fma(inverse, fma(-(double)total, inverse, 1.0), inverse);
    const unsigned about = (unsigned)((double)scaled * inverse);
    const long long rest = (long long)(scaled - (unsigned long long)about * (unsigned)total);
    return about - (rest < 0 ? 1 : 0) + (rest >= total ? 1 : 0);
}

// Adds a group to the totals [LPLBK_METRICS]. By a warp: `word` is the lane's word of the group's information.
static __device__ __noinline__ void add_group(unsigned long long *totals, int word, int ranks) {
    const int lane = lane_id(), total = __shfl_sync(kFullWarp, word, LPLBK_INFO_TOTAL);
    unsigned value = (unsigned)__shfl_sync(kFullWarp, word, lane & 15);
    const unsigned ratio = over_mean((int)value, ranks, total);
    if ((lane & 15) <= LPLBK_INFO_BOUND) value = total > 0 ? ratio : 0;
    if (lane == LPLBK_METRIC_GROUPS) value = total > 0 ? 1 : 0;
    if (lane < LPLBK_METRIC_HIGHEST) {
        atomicAdd(totals + lane, (unsigned long long)value);
    } else if ((lane & 15) <= LPLBK_INFO_BOUND) {
        atomicMax(totals + lane, (unsigned long long)value);
    }
}

// Writes a snapshot: the lane's value, the snapshot's number.
__device__ __forceinline__ void publish(lplbk_metrics_page *page, unsigned long long value, unsigned long long number) {
    const unsigned long long front = number << 32;
    reinterpret_cast<ulonglong2 *>(page->snapshot[number & 1])[lane_id()] = make_ulonglong2(front | (unsigned)value, front | value >> 32);
}

// With several blocks of a group each: adds what this block knows and returns whether it is the last one that does.
static __device__ __noinline__ bool last_block(unsigned long long *totals, int more, unsigned n_blocks) {
    if (more != 0) atomicAdd(totals + lane_id(), (unsigned long long)more);
    __threadfence();
    __syncwarp();
    unsigned before = 0;
    if (lane_id() == 0) before = atomicInc(reinterpret_cast<unsigned *>(totals + LPLBK_METRICS), n_blocks - 1);
    const bool last = __shfl_sync(kFullWarp, before, 0) == n_blocks - 1;
    __threadfence();
    return last;
}

}  // namespace metrics

// An argument of the kernels that plan.
struct Recording {
    unsigned long long *history;  // [n_logical] and the number of plans; nullptr: none is kept
    unsigned long long *totals;   // [LPLBK_METRICS] and a ticket of blocks; nullptr: no metrics are kept
    lplbk_metrics_page *page;     // in host memory
    int ranks;                    // of a group
    int n_logical;

    static Recording of(const lplbk_planner &planner) {
        return {reinterpret_cast<unsigned long long *>(planner.history), reinterpret_cast<unsigned long long *>(planner.metrics),
                reinterpret_cast<lplbk_metrics_page *>(planner.page), planner.shape.group_size, planner.shape.n_logical};
    }
    // Tokens of one expert from all ranks, by one thread a plan.
    __device__ __forceinline__ void add_tokens(int expert, int64_t tokens) const {
        if (history != nullptr) atomicAdd(history + expert, (unsigned long long)tokens);
    }
    // A group whose information is written, by one warp: the lane's word of it.
    __device__ __forceinline__ void add_group(int word) const {
        if (totals != nullptr) metrics::add_group(totals, word, ranks);
    }
    // The end of a plan, by one warp of each block, after all groups of the block were added. sums: LPLBK_INFO_MOVED and _OWN_RANK .. as far
    // as add_group did not have them.
    template <class Sums>
    __device__ __forceinline__ void end_plan(unsigned n_blocks, Sums sums) const {
        if (history != nullptr && blockIdx.x == 0 && lane_id() == 0) atomicAdd(history + n_logical, 1ull);
        if (totals == nullptr) return;
        const int lane = lane_id();
        int more = sums(lane);
        if (n_blocks > 1) {
            if (!metrics::last_block(totals, more, n_blocks)) return;
            more = 0;
        }
        if (lane == LPLBK_METRIC_PLANS || lane == LPLBK_METRIC_SEQUENCE) more = 1;
        const unsigned long long value = atomicAdd(totals + lane, (unsigned long long)more) + (unsigned long long)more;
        metrics::publish(page, value, __shfl_sync(kFullWarp, value, LPLBK_METRIC_SEQUENCE));
    }
};

// Ids out of range, counted for lplb_plan_info and, unless nullptr, on the page of the metrics. Atomic among the threads of the device,
// which are the only ones that write there while kernels run.
struct InvalidIds {
    unsigned long long *total, *shown;

    static InvalidIds of(const lplbk_planner &planner) {
        auto *page = reinterpret_cast<lplbk_metrics_page *>(planner.page);
        return {reinterpret_cast<unsigned long long *>(planner.counters + LPLBK_COUNTER_INVALID),
                page == nullptr ? nullptr : reinterpret_cast<unsigned long long *>(&page->invalid_ids)};
    }
    // By a whole warp: each thread's.
    __device__ __forceinline__ void add(int ids) const {
        const int sum = warp_sum(ids);
        if (lane_id() != 0 || sum == 0) return;
        atomicAdd(total, (unsigned long long)sum);
        if (shown != nullptr) atomicAdd(shown, (unsigned long long)sum);
    }
};

}  // namespace lplb
