// The solvers of a group, told apart by what they hold a set of ranks in, and what a kernel needs to use any of them.
#pragma once

#include "interior_point.cuh"
#include "lane_flow.cuh"
#include "mask_flow.cuh"
#include "plan_out.cuh"
#include "scan_flow.cuh"

namespace lplb {

enum Solver {
    kScan,           // ScanFlow, any size
    kInterior,       // InteriorPoint
    kTwoColours = 2, // LaneFlow under every placement
    kFourColours = 4,
    kEightColours = 8,
    kOneWord = 32,   // up to 32 ranks: LaneFlow where the placement allows it, else MaskFlow
    kTwoWords = 64,  // up to 64 ranks: MaskFlow
};
__host__ __device__ constexpr bool by_lanes(Solver solver) {
    return solver == kTwoColours || solver == kFourColours || solver == kEightColours;
}

inline Solver solver_of(const lplbk_planner &planner) {
    if (planner.solver != 0) return kInterior;  // LPLB_SOLVER_IPM
    if (planner.shape.colours > 0) return static_cast<Solver>(planner.shape.colours);
    return planner.layout.mask_words == 1 ? kOneWord : planner.layout.mask_words == 2 ? kTwoWords : kScan;
}

// Shared memory of a block that solves n_groups groups: [Sums][image][FlowSpace][tokens][IpmSpace], the image and FlowSpace where one group
// is solved by other means than LaneFlow.
struct SolveSpace {
    Sums sums;
    int *image_copy;
    Image image;
    FlowSpace flow;
    int *tokens;  // [n_tokens]
    double *real;

    __host__ __device__ static int words_of(const lplbk_shape &shape, const lplbk_layout &at, bool lanes, int n_groups, int n_tokens) {
        return Sums::words_of(shape, n_groups) + (lanes ? 0 : at.image_words + FlowSpace::words_of(shape)) + round_up(n_tokens, 4);
    }
    // memory: 16-byte aligned.
    __device__ SolveSpace(int *memory, const Tables &t, bool lanes, int n_groups, int n_tokens)
        : sums(memory, t.shape, n_groups),
          image_copy(sums.end),
          image(image_copy, t.at),
          flow(image_copy + t.at.image_words, t.shape, sums),
          tokens(lanes ? sums.end : flow.end),
          real(reinterpret_cast<double *>(tokens + round_up(n_tokens, 4))) {}

    // Fetches a group's image and clears its working arrays. By the whole block.
    __device__ __forceinline__ void open_group(const Tables &t, int group) const {
#pragma unroll 1
        for (int i = threadIdx.x; i < t.shape.group_size; i += blockDim.x) flow.speed[i] = t.speed(group)[i], flow.fixed[i] = t.fixed(group)[i];
        if (threadIdx.x == 0) *flow.differ = t.ranked();
        const int4 *from = reinterpret_cast<const int4 *>(t.image(group));
#pragma unroll 2
        for (int i = threadIdx.x; i < t.at.image_words / 4; i += blockDim.x) reinterpret_cast<int4 *>(image_copy)[i] = from[i];
        const int n = FlowSpace::cleared_words(t.shape);
#pragma unroll 1
        for (int i = threadIdx.x; i < n; i += blockDim.x) flow.words[i] = 0;
    }
};

// ---- LaneFlow: one warp a group

// Leaves x by place. sum, x: of the group.
template <int kColours, bool kLateCall, class Cap>
__device__ __forceinline__ void solve_by_lanes(LaneFlow<kColours, kLateCall, Cap> &flow, int n_ranks, const int *base, const int *sum, int *x) {
    flow.solve(lane_id() < n_ranks ? base[lane_id()] : 0, sum);
#pragma unroll
    for (int c = 0; c < kColours; ++c) {
        if (flow.bit[c] != 0) x[2 * flow.bundle[c] + (flow.is_copy[c] ? 1 : 0)] = flow.x[c];
    }
}

// What this lane's rank of a group may hold, where the ranks differ. Fetched with the lane's column.
struct RankNumbers {
    bool differ = false;
    int speed = 0, fixed = 0;

    __device__ __forceinline__ void fetch(const Tables &t, int group) {
        differ = t.ranked();
        if (lane_id() < t.shape.group_size) speed = t.speed(group)[lane_id()], fixed = t.fixed(group)[lane_id()];
    }
    // Before the loads are known. By a whole warp.
    template <class Flow>
    __device__ __forceinline__ void open(Flow &flow, int n_ranks) const {
        flow.end.open(
            differ, [&](int) { return speed; }, [&](int) { return fixed; }, n_ranks, lane_id(), nullptr, false, warp_max, warp_sum);
    }
};

// The group's information, by the warp that solved it.
template <int kColours, bool kLateCall, class Cap>
__device__ __forceinline__ void write_lane_info(const PlanOut &out, int group, const LaneFlow<kColours, kLateCall, Cap> &flow) {
    int copied = 0;
#pragma unroll
    for (int c = 0; c < kColours; ++c) {
        if (flow.is_copy[c]) copied += flow.x[c];
    }
    const int moved = warp_sum(copied);
    const int max_load = warp_max(flow.load);
    FlowEndOf<Cap> end = flow.end;
    end.witness_size = __popc(flow.witness);
    const int word = lane_id();
    const int value = word == LPLBK_INFO_WITNESS ? (int)flow.witness : info_word(word, max_load, end, flow.total, moved);
    if (out.writes_word(word)) out.info(group)[word] = value;
    if (lane_id() == 0) out.count_solved();
}

// ---- The others: a block a group

// Writes a group's witness, one bit a thread; by the whole block.
__device__ __forceinline__ void write_witness(int *info, bool in_witness) {
    const unsigned witness = __ballot_sync(kFullWarp, in_witness);
    if (lane_id() == 0 && warp_id() < LPLBK_INFO_WORDS - LPLBK_INFO_WITNESS) info[LPLBK_INFO_WITNESS + warp_id()] = witness;
}

template <bool kRanked>
__device__ __forceinline__ void solve_pairs(const Tables &t, const SolveSpace &space, int group, const PlanOut &out, bool write) {
    int column[LPLBK_MAX_COLOURS];
    space.image.load_lanes(column);
    LaneFlow<LPLBK_MAX_COLOURS, true, CapacityOf<kRanked, 1>> flow;
    flow.open(column, t.shape.group_size);
    if constexpr (kRanked) {
        const int rank = min(lane_id(), t.shape.group_size - 1);
        RankNumbers{*space.flow.differ != 0, space.flow.speed[rank], space.flow.fixed[rank]}.open(flow, t.shape.group_size);
    }
    solve_by_lanes(flow, t.shape.group_size, space.flow.base, space.flow.sum, space.flow.x);
    if (write) write_lane_info(out, group, flow);
}

template <int kWords, bool kRanked>
__device__ __forceinline__ void solve_by_masks(const Tables &t, const SolveSpace &space, int group, const PlanOut &out, bool write) {
    MaskFlow<kWords, CapacityOf<kRanked, kWords>> flow(space.image, space.flow, t.shape.group_size);
    flow.solve();
    if (!write || threadIdx.x >= 32) return;
    const int word = threadIdx.x, max_load = flow.max_load();
    flow.end.witness_size = flow.witness.count();
    int value = info_word(word, max_load, flow.end, flow.total, 0);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
        if (word == LPLBK_INFO_WITNESS + w) value = flow.witness.word[w];
    }
    if (out.writes_word(word)) out.info(group)[word] = value;
}

// Of ScanFlow or InteriorPoint, by the whole block.
template <class Flow>
__device__ __forceinline__ void write_block_info(const PlanOut &out, int group, const Flow &flow, int max_load) {
    const int word = threadIdx.x;
    if (word < LPLBK_INFO_WITNESS && out.writes_word(word)) out.info(group)[word] = info_word(word, max_load, flow.end, flow.total, 0);
    write_witness(out.info(group), flow.in_witness);
}

// Solves a group and writes its information, but for the tokens moved. By the whole block, between barriers of the caller; ends without
// one.
template <Solver kSolver, bool kRanked>
__device__ __forceinline__ void solve_group(const Tables &t, const SolveSpace &space, int group, const PlanOut &out, bool write) {
    static_assert(!by_lanes(kSolver), "LaneFlow takes a warp");
    if constexpr (kSolver == kInterior) {
        const IpmSpace real(space.real, t.shape);
        InteriorPoint method(space.image, space.flow, real, t.shape.group_size);
        method.solve();
        if (write) write_block_info(out, group, method, method.max_load);
    } else {
        if (kSolver == kOneWord && space.image.pairs()) {  // common placements, and twice as fast
            if (threadIdx.x < 32) solve_pairs<kRanked>(t, space, group, out, write);
            return;
        }
        split_evenly(space.image, space.flow);
        __syncthreads();
        if constexpr (kSolver == kScan) {
            ScanFlow<CapacityOf<kRanked, 1, true>> flow(space.image, space.flow, t.shape);
            flow.solve();
            const int max_load = flow.max_load();
            if (write) write_block_info(out, group, flow, max_load);
        } else if (threadIdx.x < 32 * kMaskWarps) {
            solve_by_masks<kSolver / 32, kRanked>(t, space, group, out, write);
        }
    }
    if (threadIdx.x == 0 && write) out.count_solved();
}

}  // namespace lplb
