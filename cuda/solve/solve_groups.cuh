// The solve kernel: a block a group. It adds up the loads, solves, and writes the tokens of every slot.
#pragma once

#include "../metrics.cuh"
#include "solvers.cuh"
#include "split.cuh"

namespace lplb {

__device__ __forceinline__ void write_scaled(const PlanOut &out, int expert, int tokens, int highest) {
    out.scaled[expert] = highest > 0 ? __fdiv_rn(__int2float_rn(tokens), __int2float_rn(highest)) : 0.0f;
}

// One block's work, step by step. kPlain: one source, a planner without a rank, nothing but the plan to write; bundles are of one expert,
// or LaneFlow solves. kRanked: the ranks differ.
template <Solver kSolver, bool kPlain, bool kRecords, bool kRanked>
struct GroupSolve {
    static constexpr bool kLanes = by_lanes(kSolver);
    static constexpr int kApart = kLanes ? 32 : 0;  // threads of LaneFlow's warp, which holds no experts

    const Tables &t;
    const CountMatrix<true> &loads;
    const PlanOut &out;
    const RecordingOf<kRecords> &record;
    const int group;
    const GroupExperts experts;
    const SolveSpace space;
    const int first, stride;  // this thread's experts of the group
    const bool assigned;      // tokens of several sources are told apart
    Expert first_expert;
    CountMatrix<true>::Coming first_count;  // kPlain
    int64_t first_total = 0;                // otherwise
    OwnTokens own;
    bool overflow = false;

    __device__ GroupSolve(int4 *memory, const Tables &t, const CountMatrix<true> &loads, const PlanOut &out,
                          const RecordingOf<kRecords> &record)
        : t(t),
          loads(loads),
          out(out),
          record(record),
          group(blockIdx.x),
          experts(t, group, kLanes),
          space(reinterpret_cast<int *>(memory), t, kLanes, 1, experts.n),
          first((int)threadIdx.x - kApart),
          stride((int)blockDim.x - kApart),
          assigned(!kPlain && loads.n_sources > 1 && out.rank >= 0) {}

    // Calls visit(i, expert) for this thread's experts.
    template <class Visit>
    __device__ __forceinline__ void each_expert(Visit visit) const {
#pragma unroll 1
        for (int i = first; i < experts.n; i += stride) visit(i, i == first ? first_expert : t.expert(experts.first + i));
    }
    __device__ __forceinline__ void write(int slot, int tokens, int take) const {
        out.quota[slot] = tokens;
        out.take[slot] = take;
    }

    // Asks for the first expert's count.
    __device__ __forceinline__ void fetch() {
        if (first < 0 || first >= experts.n) return;
        if constexpr (kPlain) {
            first_count = loads.fetch(first_expert.id());
        } else {
            first_total = loads.template total<true>(first_expert.id());
        }
    }

    // Adds up the loads and writes the tokens of single places. Returns whether some of them are large.
    __device__ __forceinline__ bool add_up() {
        bool large = false;
        int highest = 0;
        each_expert([&](int i, const Expert &expert) {
            const int64_t total = i != first ? loads.template total<!kPlain>(expert.id()) : kPlain ? loads.total(first_count) : first_total;
            const int tokens = fitted(total);
            large |= total > kSurelyFits;
            highest = max(highest, tokens);
            space.tokens[i] = tokens;
            const int units = t.units(tokens);
            record.add_tokens(expert.id(), total);
            if (expert.bundled()) {
                atomicAdd(&space.sums.sum[expert.bundle() - group * t.shape.max_bundles], units);
                return;
            }
            atomicAdd(&space.sums.base[expert.rank() - group * t.shape.group_size], units);
            const int take = assigned ? loads.of(out.rank, expert.id()) : tokens;
            write(expert.slot(), tokens, take);
            if (!kPlain && out.rank >= 0) own.add(out, expert.rank(), take);
        });
        if (!kPlain && out.scaled != nullptr) atomicMax(space.sums.highest, highest);
        return large;
    }

    // Bundles of one expert and one source: tokens of arcs are tokens of slots.
    __device__ __forceinline__ int write_arcs() const {
        int moved = 0;
        const int n_arcs = space.image.n_arcs();
#pragma unroll 1
        for (int arc = threadIdx.x; arc < n_arcs; arc += blockDim.x) {
            const int tokens = space.flow.x[arc];
            moved += space.image.first_place(arc) ? 0 : tokens;
            write(space.image.slot(arc), tokens, tokens);
        }
        return moved;
    }

    // The tokens of all replicated experts; returns those that this thread's experts have beyond their first places.
    __device__ __forceinline__ int write_bundled() {
        int moved = 0;
        each_expert([&](int i, const Expert &expert) {
            if (!expert.bundled()) return;
            const int bundle = expert.bundle() - group * t.shape.max_bundles;
            const int arc = kLanes ? 2 * bundle : space.image.bundle_start[bundle];
            const int n_places = kLanes ? 2 : space.image.bundle_start[bundle + 1] - arc;
            const bool by_arc = !kLanes && t.shape.bundle_experts == 1;  // else there are two places, and the expert knows both
            const Split quota = Split::of(t, space.sums, bundle, space.sums.x + arc, space.tokens, i, kLanes, overflow);
            const auto slot = [&](int j) { return by_arc ? space.image.slot(arc + j) : j == 0 ? expert.slot() : expert.copy_slot(); };
            const auto rank = [&](int j) {
                return by_arc ? group * t.shape.group_size + space.image.arc_rank[arc + j] : slot(j) / out.n_local;
            };
            const auto emit = [&](int j, int take) {
                if (assigned && overflow) take = j == 0 ? loads.of(out.rank, expert.id()) : 0;
                const int tokens = quota(j);
                moved += j > 0 ? tokens : 0;
                write(slot(j), tokens, take);
                if (!kPlain && out.rank >= 0) own.add(out, rank(j), take);
            };
            if (!kPlain && assigned) {
                const auto count = [&](int s) { return loads.of(s, expert.id()); };
                assign_tokens(n_places, quota, rank, count, out.rank, out.per_node, emit);
            } else if (kLanes) {
                const int first_place = quota(0), second_place = quota(1);
                emit(0, first_place);
                emit(1, second_place);
            } else {
#pragma unroll 1
                for (int j = 0; j < n_places; ++j) emit(j, quota(j));
            }
        });
        return moved;
    }

    // Of each slot class, the part that stays at the original.
    __device__ __forceinline__ void write_ratios() const {
        const int classes = t.shape.group_size * t.shape.n_redundant;
#pragma unroll 1
        for (int i = threadIdx.x; i < classes; i += blockDim.x) {
            const int bundle = t.words[t.at.class_bundle + group * classes + i] - group * t.shape.max_bundles;
            float ratio = 1.0f;
            if (bundle >= 0 && !overflow && space.sums.sum[bundle] != 0) {
                const int arc = kLanes ? 2 * bundle : space.image.bundle_start[bundle];
                ratio = __fdiv_rn(__int2float_rn(space.sums.x[arc]), __int2float_rn(space.sums.sum[bundle]));
            }
            out.ratios[group * classes + i] = ratio;
        }
    }

    // What all tokens together tell.
    __device__ __forceinline__ void write_sums(int moved) const {
        if (!kLanes) {
            const int sum = warp_sum(moved);
            if (lane_id() == 0 && sum != 0) atomicAdd(space.sums.moved, sum);
        }
        if (!kPlain && out.rank >= 0) own.join(space.sums.own);
        __syncthreads();
        if (!kLanes && threadIdx.x == 0) out.info(group)[LPLBK_INFO_MOVED] = *space.sums.moved;
        if (!kPlain && out.rank >= 0 && threadIdx.x < 3) out.info(group)[LPLBK_INFO_OWN_RANK + threadIdx.x] = space.sums.own[threadIdx.x];
    }
};

template <Solver kSolver, bool kPlain, bool kRecords, bool kRanked>
__global__ void __launch_bounds__(512, 1)
    solve_groups(const __grid_constant__ Tables t, const __grid_constant__ CountMatrix<true> loads, const __grid_constant__ PlanOut out,
                 const __grid_constant__ RecordingOf<kRecords> record) {
    using Work = GroupSolve<kSolver, kPlain, kRecords, kRanked>;
    extern __shared__ int4 memory[];
    MARK(0);
    Work work(memory, t, loads, out, record);
    const SolveSpace &space = work.space;
    const int group = work.group;
    const bool solves = Work::kLanes && uniform_warp_id() == 0;
    constexpr int kColours = Work::kLanes ? (int)kSolver : 1;
    int column[kColours] = {};
    LaneFlow<kColours, false, CapacityOf<kRanked, 1>> flow;
    [[maybe_unused]] RankNumbers numbers;
    if (solves) {
        Image(t.image(group), t.at).load_lanes(column);
        if constexpr (kRanked) numbers.fetch(t, group);
    } else {
        if (work.first < work.experts.n) work.first_expert = t.expert(work.experts.first + work.first);
        space.sums.clear(t.shape, 1, work.first, work.stride);
    }
    if constexpr (!Work::kLanes) space.open_group(t, group);
    record.open();
    wait_for_stream();
    let_next_start();
    if (!kPlain && blockIdx.x == 0) compare_digests(loads, out);
    work.fetch();
    if constexpr (Work::kLanes) flow.open(column, t.shape.group_size);
    if constexpr (Work::kLanes && kRanked) {
        if (solves) numbers.open(flow, t.shape.group_size);
    }
    MARK(1);
    __syncthreads();
    MARK(2);
    const bool large = !solves && work.add_up();
    MARK(3);
    if (__syncthreads_or(large)) {
        if (!solves) {
            work.each_expert([&](int, const Expert &expert) { space.sums.wide->add(loads.template total<!kPlain>(expert.id())); });
        }
        __syncthreads();
        work.overflow = space.sums.wide->overflow();
    }
    MARK(4);
    if constexpr (Work::kLanes) {
        // A vote is one number for the warp, and the compiler knows it.
        if (solves && !__any_sync(kFullWarp, work.overflow)) {
            solve_by_lanes(flow, t.shape.group_size, space.sums.base, space.sums.sum, space.sums.x);
        }
    } else if (!work.overflow) {
        solve_group<kSolver, kRanked>(t, space, group, out, true);
    }
    MARK(5);
    __syncthreads();
    if constexpr (!Work::kLanes) {
        if (!t.in_tokens() && t.shape.bundle_experts == 1 && !work.overflow) {
            arcs_to_tokens(t, space.image, space.flow.x, space.tokens);
            __syncthreads();
        }
    }
    MARK(6);
    if (work.overflow && threadIdx.x < 32) {
        write_overflow(out, group);
    } else if constexpr (Work::kLanes) {
        if (solves) write_lane_info(out, group, flow);
    }
    int moved = 0;
    if (!solves && blockIdx.x == 0) keep_counts(t, out, loads, work.assigned, work.first, work.stride);
    if (!solves) {
        if constexpr (kPlain && !Work::kLanes) {
            moved = work.overflow ? work.write_bundled() : work.write_arcs();
        } else {
            moved = work.write_bundled();
        }
        if (!kPlain && out.scaled != nullptr) {
            work.each_expert([&](int i, const Expert &expert) { write_scaled(out, expert.id(), space.tokens[i], *space.sums.highest); });
        }
    }
    if (!kPlain && out.ratios != nullptr) work.write_ratios();
    const bool recording = kRecords && threadIdx.x < 32;  // the warp that writes the group's information
    const unsigned long long before = recording && gridDim.x == 1 ? record.before() : 0;
    if (recording) record.add_group(out.info(group), Work::kLanes, work.overflow);
    if (!(kPlain && Work::kLanes)) work.write_sums(moved);
    if (recording) {
        const int more = space.sums.late_word(lane_id(), Work::kLanes, out.rank);
        if (gridDim.x == 1) {
            record.end_plan(before, more);
        } else {
            record.end_plan_of_blocks(more);
        }
    }
    MARK(7);
}

template <bool kRecords>
using SolveKernel = void (*)(Tables, CountMatrix<true>, PlanOut, RecordingOf<kRecords>);

// InteriorPoint's, compiled in a file of its own.
template <bool kRecords>
SolveKernel<kRecords> interior_kernel();
extern template SolveKernel<false> interior_kernel<false>();
extern template SolveKernel<true> interior_kernel<true>();

// The one table of solvers. kRanked: for planners whose ranks may differ.
template <bool kPlain, bool kRecords, bool kRanked = false>
SolveKernel<kRecords> solve_kernel(Solver solver) {
    switch (solver) {
    case kTwoColours:
        return solve_groups<kTwoColours, kPlain, kRecords, kRanked>;
    case kFourColours:
        return solve_groups<kFourColours, kPlain, kRecords, kRanked>;
    case kEightColours:
        return solve_groups<kEightColours, kPlain, kRecords, kRanked>;
    case kOneWord:
        return solve_groups<kOneWord, kPlain, kRecords, kRanked>;
    case kTwoWords:
        return solve_groups<kTwoWords, kPlain, kRecords, kRanked>;
    case kInterior:
        return interior_kernel<kRecords>();
    default:
        return solve_groups<kScan, kPlain, kRecords, kRanked>;
    }
}

// Compiled in files of their own.
extern template SolveKernel<true> solve_kernel<false, true>(Solver);
extern template SolveKernel<false> solve_kernel<true, false, true>(Solver);
extern template SolveKernel<true> solve_kernel<false, true, true>(Solver);

}  // namespace lplb
