// Solving topologies of small groups: the block adds up loads and writes tokens, one warp a group runs PairFlow.
#pragma once

#include "solve_common.cuh"

namespace lplb {

struct PairTables {
    const int4 *home;   // of the first group
    const int *lanes;   // of the first group
    int n_groups;       // solved by this block
    int first_group;
    int n_ranks;        // of a group
    int n_redundant;
    int n_own;          // original slots of a rank
    int combined;
};

// Shared memory of a block that solves n_groups groups.
struct PairSpace {
    WideSum *wide;    // [n_groups] used only where kSurelyFits says no
    int *own;         // [3] see OwnTokens
    int *highest;     // tokens of the most loaded expert
    int *base;        // [n_groups * n_ranks] tokens of single places
    int *class_sum;   // [n_groups * n_ranks * n_redundant] tokens of a slot class
    int *class_kept;  // the same: of them at the original
    int *tokens;      // [n_groups * n_ranks * n_own] by original slot

    __host__ __device__ static int cleared_words(int n_groups, int n_ranks, int n_redundant) {
        return 3 * n_groups + 4 + n_groups * n_ranks * (1 + n_redundant);
    }
    __host__ __device__ static int words_of(const lplbk_shape &shape, int n_groups) {
        const int ranks = n_groups * shape.group_size;
        return cleared_words(n_groups, shape.group_size, shape.n_redundant) + ranks * shape.n_redundant +
               ranks * (shape.n_logical / shape.ep_size);
    }

    // memory: 16-byte aligned.
    __device__ PairSpace(int *memory, const PairTables &t) {
        const int ranks = t.n_groups * t.n_ranks;
        wide = reinterpret_cast<WideSum *>(memory);
        own = memory + 3 * t.n_groups;
        highest = own + 3;
        base = highest + 1;
        class_sum = base + ranks;
        class_kept = class_sum + ranks * t.n_redundant;
        tokens = class_kept + ranks * t.n_redundant;
    }
    // By the threads first, first + stride, ..
    __device__ void clear(const PairTables &t, int first, int stride) const {
        const int n = cleared_words(t.n_groups, t.n_ranks, t.n_redundant);
#pragma unroll 1
        for (int i = first; i < n; i += stride) reinterpret_cast<int *>(wide)[i] = 0;
    }
};

struct HomeEntry {
    int4 word;
    __device__ int expert() const { return word.x & 0x7fffffff; }
    __device__ bool paired() const { return word.x < 0; }
    __device__ int rank() const { return word.y & 0xffff; }
    __device__ int slot_class() const { return word.y >> 16; }
    __device__ int slot() const { return word.z; }
    __device__ int copy_slot() const { return word.w; }
};

// Adds the tokens of original slot i of the only group to the loads. Single places are the caller's to write.
__device__ __forceinline__ void gather_slot(const PairSpace &space, int i, const HomeEntry &home, int tokens, bool warp_on_one_rank) {
    space.tokens[i] = tokens;
    if (home.paired()) atomicAdd(&space.class_sum[home.slot_class()], tokens);
    const int alone = home.paired() ? 0 : tokens;
    if (warp_on_one_rank) {
        const int sum = warp_sum(alone);
        if (lane_id() == 0) atomicAdd(&space.base[home.rank()], sum);
    } else if (alone != 0) {
        atomicAdd(&space.base[home.rank()], alone);
    }
}

// The lane's column of `lanes`.
template <int kSlots>
__device__ __forceinline__ void load_lanes(const PairTables &t, int group, int (&words)[kSlots]) {
    const int *lanes = t.lanes + group * (kSlots * 32) + lane_id();
#pragma unroll
    for (int c = 0; c < kSlots; ++c) words[c] = lanes[32 * c];
}

// By one warp: solves one group of the block and leaves class_kept.
template <int kSlots>
__device__ __forceinline__ void solve_pair_group(const PairTables &t, const PairSpace &space, int group, PairFlow<kSlots> &flow) {
    const int classes = t.n_ranks * t.n_redundant;
    flow.solve(lane_id() < t.n_ranks ? space.base[group * t.n_ranks + lane_id()] : 0, space.class_sum + group * classes);
#pragma unroll
    for (int c = 0; c < kSlots; ++c) {
        if (flow.bit[c] != 0 && !flow.is_copy[c]) space.class_kept[group * classes + flow.slot_class[c]] = flow.x[c];
    }
}

// By the same warp, later: the group's information.
template <int kSlots>
__device__ __forceinline__ void write_pair_info(const PlanOut &out, int group, const PairFlow<kSlots> &flow) {
    int copied = 0;
#pragma unroll
    for (int c = 0; c < kSlots; ++c) {
        if (flow.is_copy[c]) copied += flow.x[c];
    }
    const int moved = warp_sum(copied);
    const int max_load = warp_max(flow.load);
    FlowEnd end = flow.end;
    end.witness_size = __popc(flow.witness);
    const int word = lane_id();
    const int value = word == LPLBK_INFO_WITNESS ? (int)flow.witness : info_word(word, max_load, end, flow.total, moved);
    if (word < LPLBK_INFO_OWN_RANK || word > LPLBK_INFO_OTHER_NODES || out.rank < 0) out.info(group)[word] = value;
    if (lane_id() == 0) out.count_solved();
}

// Tokens of the two places of a replicated expert in original slot i of the only group. overflow: all stays at the original.
__device__ __forceinline__ int2 pair_quotas(const PairTables &t, const PairSpace &space, int i, const HomeEntry &home, bool overflow) {
    const int tokens = space.tokens[i];
    if (overflow) return make_int2(tokens, 0);
    const int sum = space.class_sum[home.slot_class()];
    int copied = sum - space.class_kept[home.slot_class()];
    if (t.combined > 1) {
        // The class's experts stand n_redundant slots apart; those before this one come first.
        const int first = home.rank() * t.n_own + home.slot_class() - home.rank() * t.n_redundant;
        int before = 0;
#pragma unroll 1
        for (int k = first; k < i; k += t.n_redundant) before += space.tokens[k];
        copied = share_of(copied, before, tokens, sum);
    }
    return make_int2(tokens - copied, copied);
}

// Ratios of all classes of the block.
__device__ __forceinline__ void write_pair_ratios(const PairTables &t, const PairSpace &space, const PlanOut &out, int first, int stride,
                                                  bool overflow) {
    const int classes = t.n_groups * t.n_ranks * t.n_redundant;
#pragma unroll 1
    for (int i = first; i < classes; i += stride) {
        const int rank = i / t.n_redundant;
        const HomeEntry home{t.home[rank * t.n_own + i - rank * t.n_redundant]};
        const int sum = space.class_sum[i];
        out.ratios[t.first_group * t.n_ranks * t.n_redundant + i] =
            home.paired() && !overflow && sum != 0 ? __fdiv_rn(__int2float_rn(space.class_kept[i]), __int2float_rn(sum)) : 1.0f;
    }
}

}  // namespace lplb
