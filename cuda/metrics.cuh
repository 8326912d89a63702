// What a planner records beside its plans: a history of the counts, and metrics. Both are sums of integers, so that they do not depend on
// the order in which threads add.
//
// Kernels that record are others than those that do not, so that what nobody asks for costs nothing. In those that do, the metrics of a plan
// are added up in shared memory by warps that have nothing else to do, and one warp adds them to the totals at the end.
#pragma once

#include <type_traits>

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

// Writes a snapshot: the lane's value, the snapshot's number.
__device__ __forceinline__ void publish(lplbk_metrics_page *page, unsigned long long value, unsigned long long number) {
    const unsigned long long front = number << 32;
    reinterpret_cast<ulonglong2 *>(page->snapshot[number & 1])[lane_id()] = make_ulonglong2(front | (unsigned)value, front | value >> 32);
}

// [LPLBK_METRICS] what this plan adds, in shared memory; the highest ratios in the low halves.
__device__ __forceinline__ unsigned long long *increments() {
    __shared__ unsigned long long of[LPLBK_METRICS];
    return of;
}

}  // namespace metrics

// An argument of the kernels that plan and record.
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
    static int shared_bytes() { return 8 * LPLBK_METRICS; }

    // Before a barrier; by all threads.
    __device__ __forceinline__ void open() const {
        if (threadIdx.x < LPLBK_METRICS) metrics::increments()[threadIdx.x] = 0;
    }
    // Tokens of one expert from all ranks, by one thread a plan.
    __device__ __forceinline__ void add_tokens(int expert, int64_t tokens) const {
        if (history != nullptr) atomicAdd(history + expert, (unsigned long long)tokens);
    }
    // A group, by the warp that wrote its information, or after a barrier: all but what Sums::late_word() has. lanes: LaneFlow solves.
    __device__ __forceinline__ void add_group(const int *info, bool lanes, bool overflow) const {
        if (totals == nullptr) return;
        __syncwarp();
        const int lane = lane_id(), word = __ldcg(info + (lane & 15)), total = __shfl_sync(kFullWarp, word, LPLBK_INFO_TOTAL);
        const unsigned ratio = total > 0 ? metrics::over_mean(word, ranks, total) : 0;
        unsigned long long *const sum = metrics::increments() + lane;
        if (lane <= LPLBK_INFO_BOUND) {
            atomicAdd(sum, (unsigned long long)ratio);
        } else if (lane <= LPLBK_INFO_CERTIFIED) {
            if (lanes || lane != LPLBK_INFO_MOVED) atomicAdd(sum, (unsigned long long)word);
        } else if (lane == LPLBK_METRIC_OVERFLOW || lane == LPLBK_METRIC_GROUPS) {
            atomicAdd(sum, lane == LPLBK_METRIC_GROUPS ? (total > 0 ? 1ull : 0ull) : overflow ? 1ull : 0ull);
        } else if (lane >= LPLBK_METRIC_HIGHEST && (lane & 15) <= LPLBK_INFO_BOUND) {
            atomicMax(reinterpret_cast<unsigned *>(sum), ratio);
        }
    }
    // The lane's total before this plan, by the warp that will end it.
    __device__ __forceinline__ unsigned long long before() const { return totals != nullptr ? __ldcg(totals + lane_id()) : 0; }

    // The end of a plan of one block, by one warp, after a barrier behind add_group. more: Sums::late_word() of the lane.
    __device__ __forceinline__ void end_plan(unsigned long long before, int more) const {
        count_plan();
        if (totals == nullptr) return;
        const int lane = lane_id();
        const unsigned long long plan = metrics::increments()[lane] + (unsigned)more;
        const bool counts = lane == LPLBK_METRIC_PLANS || lane == LPLBK_METRIC_SEQUENCE;
        show(lane < LPLBK_METRIC_HIGHEST ? before + plan + (counts ? 1 : 0) : max(before, plan));
    }
    // The end of a plan of several blocks, by one warp of each of them: the last one shows what all have added.
    __device__ __forceinline__ void end_plan_of_blocks(int more) const {
        if (blockIdx.x == 0) count_plan();
        if (totals == nullptr) return;
        const int lane = lane_id();
        const unsigned long long plan = metrics::increments()[lane] + (unsigned)more;
        if (lane < LPLBK_METRIC_HIGHEST) {
            if (plan != 0) atomicAdd(totals + lane, plan);
        } else if (plan != 0) {
            atomicMax(totals + lane, plan);
        }
        __threadfence();
        __syncwarp();
        unsigned come = 0;
        if (lane == 0) come = atomicInc(reinterpret_cast<unsigned *>(totals + LPLBK_METRICS), gridDim.x - 1);
        if (__shfl_sync(kFullWarp, come, 0) != gridDim.x - 1) return;
        __threadfence();
        const bool counts = lane == LPLBK_METRIC_PLANS || lane == LPLBK_METRIC_SEQUENCE;
        show(__ldcg(totals + lane) + (counts ? 1 : 0));
    }

private:
    __device__ __forceinline__ void count_plan() const {
        if (history != nullptr && lane_id() == 0) atomicAdd(history + n_logical, 1ull);
    }
    __device__ __forceinline__ void show(unsigned long long value) const {
        __stcg(totals + lane_id(), value);
        metrics::publish(page, value, __shfl_sync(kFullWarp, value, LPLBK_METRIC_SEQUENCE));
    }
};

// Of the kernels that plan and record nothing.
struct NoRecording {
    static NoRecording of(const lplbk_planner &) { return {}; }
    static int shared_bytes() { return 0; }
    __device__ __forceinline__ void open() const {}
    __device__ __forceinline__ void add_tokens(int, int64_t) const {}
    __device__ __forceinline__ void add_group(const int *, bool, bool) const {}
    __device__ __forceinline__ unsigned long long before() const { return 0; }
    __device__ __forceinline__ void end_plan(unsigned long long, int) const {}
    __device__ __forceinline__ void end_plan_of_blocks(int) const {}
};

template <bool kRecords>
using RecordingOf = std::conditional_t<kRecords, Recording, NoRecording>;

inline bool records(const lplbk_planner &planner) { return planner.keeps_history != 0 || planner.page != 0; }

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
