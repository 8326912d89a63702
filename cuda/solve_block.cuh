// A block's work around the flow: tokens of ranks and bundles before it, tokens of places and the plan's information after it.
//
// Loads:  int64_t total(expert), the tokens of an expert; int of(source, expert), those of one source (only with several sources).
// Sink:   void put(expert, i, j, slot, quota, take): place j of n of an expert; i numbers the experts that have several places.
#pragma once

#include "assign.cuh"
#include "flow_mask.cuh"
#include "flow_scan.cuh"

namespace lplb {

struct PlanView {
    lplbk_shape shape;
    lplbk_layout at;
    const int32_t *tables;
    int32_t *quota, *take, *group_info;
    int64_t *counters;
    int32_t *scratch;
};

inline PlanView view_of(const lplbk_planner &planner) {
    return {planner.shape, planner.layout, planner.tables, planner.quota, planner.take, planner.group_info, planner.counters, planner.scratch};
}

struct SolveOut {
    float *ratios;
    float *scaled;  // in a launch of one group only
    void *counter;
    int32_t counter64;
    int32_t n_sources;
    bool write;  // this block writes the plan to memory
};

// Words shared by all ways to solve.
struct Tally {
    int total_high, total_low;  // total = high * 2^16 + low
    int highest;                // tokens of the most loaded expert
    int too_many;               // an expert has more than 2^31 - 1
    int moved, own_rank, own_node, other_nodes;

    __device__ bool overflow() const { return too_many != 0 || ((int64_t)total_high << 16) + total_low > INT32_MAX; }
};
constexpr int kTallyWords = sizeof(Tally) / 4;

// Tokens as int; marks what does not fit.
__device__ __forceinline__ int fitted(int64_t tokens, Tally &tally) {
    if (tokens <= INT32_MAX) return (int)tokens;
    tally.too_many = 1;
    return INT32_MAX;
}

// Adds a thread's sums to the tally; whole warps only.
__device__ __forceinline__ void tally_total(Tally &tally, int high, int low, int highest) {
    high = warp_sum(high);
    low = warp_sum(low);
    highest = warp_max(highest);
    if (lane_id() == 0) {
        atomicAdd(&tally.total_high, high + (low >> 16));
        atomicAdd(&tally.total_low, low & 0xffff);
        atomicMax(&tally.highest, highest);
    }
}

// Sums of the tokens that one thread placed.
struct Placed {
    int moved = 0, own_rank = 0, own_node = 0, other_nodes = 0;

    __device__ void add(const lplbk_shape &shape, int place_rank, int take) {
        const int per_node = shape.ep_size / shape.n_nodes;
        if (place_rank == shape.rank) {
            own_rank += take;
        } else if (place_rank / per_node == shape.rank / per_node) {
            own_node += take;
        } else {
            other_nodes += take;
        }
    }
    __device__ void join(Tally &tally, bool with_moved, bool with_own) const {
        if (with_moved) {
            const int sum = warp_sum(moved);
            if (lane_id() == 0) atomicAdd(&tally.moved, sum);
        }
        if (with_own) {
            const int a = warp_sum(own_rank), b = warp_sum(own_node), c = warp_sum(other_nodes);
            if (lane_id() == 0) {
                atomicAdd(&tally.own_rank, a);
                atomicAdd(&tally.own_node, b);
                atomicAdd(&tally.other_nodes, c);
            }
        }
    }
};

// One word of a group's information, by the thread that holds it.
__device__ __forceinline__ int info_word(int word, int max_load, const FlowEnd &end, int total, int moved) {
    switch (word) {
    case LPLBK_INFO_MAX_LOAD: return max_load;
    case LPLBK_INFO_BOUND: return end.bound;
    case LPLBK_INFO_TOTAL: return total;
    case LPLBK_INFO_MOVED: return moved;
    case LPLBK_INFO_ROUNDS: return end.rounds;
    case LPLBK_INFO_CERTIFIED: return end.certified;
    case LPLBK_INFO_WITNESS_SIZE: return end.witness_size;
    default: return 0;
    }
}

__device__ __forceinline__ void count_solved(const SolveOut &out, int groups) {
    if (out.counter == nullptr) return;
    if (out.counter64) {
        atomicAdd(static_cast<unsigned long long *>(out.counter), (unsigned long long)groups);
    } else {
        atomicAdd(static_cast<int *>(out.counter), groups);
    }
}

// floor(x * part / whole) for 0 <= x, part <= whole < 2^31.
__device__ __forceinline__ int share_of(int x, int part, int whole) {
    if (whole == 0) return 0;
    int64_t share = (int64_t)((double)x * (double)part / (double)whole);
    const int64_t rest = (int64_t)x * part - share * whole;
    if (rest < 0) --share;
    if (rest >= whole) ++share;
    return (int)share;
}

// ---- One warp a group: topologies that PairFlow takes ---------------------------------------------------------------------------

// Solves the groups first_group .. first_group + n_groups - 1 of a topology, warp w the group first_group + w, ...
template <int kSlots>
struct PairBlock {
    const PlanView &plan;
    const int first_group, n_groups;
    const int n_own, n_copied;  // original slots of a rank, replicated ones among them
    Tally *tally;               // [n_groups]
    int *base;                  // [n_groups * group_size]
    int *class_sum;             // [n_groups * group_size * n_redundant]
    int *class_kept;            // the same: tokens that stay at the original; -1: class without a copy
    int *class_rank;            // the same: rank in group of the copy
    int *prefixes;              // [n_groups][32]
    int *tokens;                // [n_groups * group_size * n_own] by original slot

    __host__ __device__ static int words_of(const lplbk_shape &shape, int n_groups) {
        const int ranks = n_groups * shape.group_size;
        return n_groups * (kTallyWords + 32) + ranks * (1 + 3 * shape.n_redundant + shape.n_logical / shape.ep_size);
    }

    __device__ PairBlock(const PlanView &plan, int *memory, int first_group, int n_groups)
        : plan(plan), first_group(first_group), n_groups(n_groups), n_own(plan.shape.n_logical / plan.shape.ep_size),
          n_copied(plan.shape.combined * plan.shape.n_redundant) {
        const int ranks = n_groups * plan.shape.group_size;
        const int classes = ranks * plan.shape.n_redundant;
        tally = reinterpret_cast<Tally *>(memory);
        base = memory + n_groups * kTallyWords;
        class_sum = base + ranks;
        class_kept = class_sum + classes;
        class_rank = class_kept + classes;
        prefixes = class_rank + classes;
        tokens = prefixes + 32 * n_groups;
    }

    // Before anything else; then a barrier. Leaves tokens[] alone.
    __device__ void clear() {
        int *const memory = reinterpret_cast<int *>(tally);
        const int classes = n_groups * plan.shape.group_size * plan.shape.n_redundant;
        for (int i = threadIdx.x; i < (int)(class_kept - memory); i += blockDim.x) memory[i] = 0;
        for (int i = threadIdx.x; i < classes; i += blockDim.x) class_kept[i] = -1;
    }

    // The warp's column of `lanes`; early, since it comes from far.
    __device__ void lane_words(int group, int (&words)[kSlots]) const {
        const int *lanes = plan.tables + plan.at.lanes + group * (kSlots * 32) + lane_id();
#pragma unroll
        for (int c = 0; c < kSlots; ++c) words[c] = lanes[32 * c];
    }

    // Adds up the loads. `home` words: expert | 1 << 31 if it has two places. Barriers before and after are the caller's.
    template <class Loads>
    __device__ void gather(const Loads &loads) {
        const int slots = n_groups * plan.shape.group_size * n_own;
        const int *home = plan.tables + plan.at.home + first_group * plan.shape.group_size * n_own;
        const int n_redundant = plan.shape.n_redundant;
        for (int first = 0; first < slots; first += blockDim.x) {
            const int i = first + threadIdx.x;
            const int word = i < slots ? home[i] : 0;
            const int rank = i / n_own;
            const int offset = i - rank * n_own;
            const int group = n_groups == 1 ? 0 : rank / plan.shape.group_size;
            const int mine = i < slots ? fitted(loads.total(word & 0x7fffffff), tally[group]) : 0;
            const bool paired = word < 0;
            if (i < slots) tokens[i] = mine;
            if (paired) {
                int *sum = &class_sum[rank * n_redundant + offset % n_redundant];
                if (plan.shape.combined == 1) {
                    *sum = mine;
                } else {
                    atomicAdd(sum, mine);
                }
            }
            const int alone = paired ? 0 : mine;
            if ((n_own & 31) == 0) {  // a warp stays on one rank
                const int sum = warp_sum(alone);
                if (lane_id() == 0 && i < slots) atomicAdd(&base[rank], sum);
            } else if (alone != 0) {
                atomicAdd(&base[rank], alone);
            }
            if (n_groups == 1) {
                tally_total(tally[0], mine >> 16, mine & 0xffff, mine);
            } else if (i < slots) {
                atomicAdd(&tally[group].total_high, mine >> 16);
                atomicAdd(&tally[group].total_low, mine & 0xffff);
            }
        }
    }

    // By the warps that have a group. words: of the first one, from lane_words().
    __device__ void solve(int (&words)[kSlots], const SolveOut &out) {
        const int n_ranks = plan.shape.group_size, n_redundant = plan.shape.n_redundant;
        for (int group = warp_id(); group < n_groups; group += blockDim.x / 32) {
            if (group != warp_id()) lane_words(first_group + group, words);
            PairFlow<kSlots> flow;
            flow.open(words);
            const bool valid = lane_id() < n_ranks;
            const int rank = group * n_ranks + lane_id();
            const int *header = plan.tables + plan.at.image + (int64_t)(first_group + group) * plan.at.image_words;
            const int n_colours = header[LPLBK_IMAGE_COLOURS], max_rounds = header[LPLBK_IMAGE_MAX_ROUNDS];
            const int own_base = valid ? base[rank] : 0;
            if (tally[group].overflow()) {
                if (valid) {
#pragma unroll
                    for (int c = 0; c < kSlots; ++c) {
                        if (flow.bit[c] != 0 && !flow.is_copy[c]) store_class(flow, c, group, INT32_MAX);
                    }
                }
                if (out.write) store_overflow(group);
                continue;
            }
            flow.solve(n_ranks, n_colours, max_rounds, own_base, class_sum + group * n_ranks * n_redundant, prefixes + 32 * group);
            int moved = 0;
#pragma unroll
            for (int c = 0; c < kSlots; ++c) {
                if (flow.bit[c] == 0) continue;
                if (flow.is_copy[c]) {
                    moved += flow.x[c];
                } else {
                    store_class(flow, c, group, flow.x[c]);
                }
            }
            if (!out.write) continue;
            moved = warp_sum(moved);
            const int total = (tally[group].total_high << 16) + tally[group].total_low;
            const int max_load = warp_max(flow.load);
            flow.end.witness_size = __popc(flow.witness);
            int *info = plan.group_info + (first_group + group) * LPLBK_INFO_WORDS;
            const int word = lane_id();
            const int value = word == LPLBK_INFO_WITNESS ? (int)flow.witness : info_word(word, max_load, flow.end, total, moved);
            if (word < LPLBK_INFO_OWN_RANK || word > LPLBK_INFO_OTHER_NODES || plan.shape.rank < 0) info[word] = value;
            if (lane_id() == 0) count_solved(out, 1);
        }
    }

    // Tokens of every place. After a barrier.
    template <class Loads, class Sink>
    __device__ void finish(const Loads &loads, const SolveOut &out, Sink &sink) {
        const lplbk_shape &shape = plan.shape;
        const int n_redundant = shape.n_redundant;
        const int n_local = shape.n_physical / shape.ep_size;
        const int first_rank = first_group * shape.group_size;
        const int slots = n_groups * shape.group_size * n_own;
        const int *home = plan.tables + plan.at.home + first_rank * n_own;
        const bool assigned = out.n_sources > 1 && shape.rank >= 0;
        Placed placed;
        for (int i = threadIdx.x; i < slots; i += blockDim.x) {
            const int rank = i / n_own;
            const int offset = i - rank * n_own;
            const int group = n_groups == 1 ? 0 : rank / shape.group_size;
            const int word = home[i];
            const int expert = word & 0x7fffffff;
            const int mine = tokens[i];
            const int slot = (first_rank + rank) * n_local + offset;
            const int replicated = (first_rank + rank) * n_copied + offset;
            if (word >= 0) {
                const int take = assigned ? loads.of(shape.rank, expert) : mine;
                sink.put(expert, -1, 0, 1, slot, mine, take);
                if (shape.rank >= 0) placed.add(shape, first_rank + rank, take);
                continue;
            }
            const int of_class = rank * n_redundant + offset % n_redundant;
            const int kept = class_kept[of_class], sum = class_sum[of_class];
            const int copy_rank = first_rank + group * shape.group_size + class_rank[of_class];
            const int copy_slot = copy_rank * n_local + n_own + offset;
            int quota[2] = {mine, 0};
            if (kept != INT32_MAX) {
                if (shape.combined == 1) {
                    quota[0] = kept;
                } else {
                    int before = 0;
                    for (int k = i - offset + offset % n_redundant; k < i; k += n_redundant) before += tokens[k];
                    quota[0] = mine - (share_of(sum - kept, before + mine, sum) - share_of(sum - kept, before, sum));
                }
                quota[1] = mine - quota[0];
            }
            int take[2] = {quota[0], quota[1]};
            if (assigned) {
                assign_tokens(
                    2, [&](int j) { return quota[j]; }, [&](int j) { return j == 0 ? first_rank + rank : copy_rank; },
                    [&](int s) { return loads.of(s, expert); }, shape.rank, shape.ep_size / shape.n_nodes,
                    [&](int j, int tokens) { take[j] = tokens; });
            }
            sink.put(expert, replicated, 0, 2, slot, quota[0], take[0]);
            sink.put(expert, replicated, 1, 2, copy_slot, quota[1], take[1]);
            if (shape.rank >= 0) {
                placed.add(shape, first_rank + rank, take[0]);
                placed.add(shape, copy_rank, take[1]);
            }
        }
        if (!out.write) return;
        if (out.ratios != nullptr) {
            for (int i = threadIdx.x; i < n_groups * shape.group_size * n_redundant; i += blockDim.x) {
                const int kept = class_kept[i], sum = class_sum[i];
                out.ratios[first_rank * n_redundant + i] =
                    kept < 0 || kept == INT32_MAX || sum == 0 ? 1.0f : __fdiv_rn(__int2float_rn(kept), __int2float_rn(sum));
            }
        }
        if (out.scaled != nullptr) {
            const float highest = __int2float_rn(tally[0].highest);
            for (int i = threadIdx.x; i < slots; i += blockDim.x) {
                out.scaled[home[i] & 0x7fffffff] = highest > 0 ? __fdiv_rn(__int2float_rn(tokens[i]), highest) : 0.0f;
            }
        }
        if (shape.rank >= 0) own_tokens(placed);
    }

private:
    __device__ void store_class(const PairFlow<kSlots> &flow, int c, int group, int kept) {
        const int of_class = group * plan.shape.group_size * plan.shape.n_redundant + flow.slot_class[c];
        class_kept[of_class] = kept;
        class_rank[of_class] = flow.partner[c];
    }

    __device__ void store_overflow(int group) {
        plan.group_info[(first_group + group) * LPLBK_INFO_WORDS + lane_id()] = 0;
        if (lane_id() == 0) {
            atomicAdd(reinterpret_cast<unsigned long long *>(plan.counters + LPLBK_COUNTER_OVERFLOW), 1ull);
        }
    }

    // The sums of all groups of the block go to its first one: they are only ever read added up.
    __device__ void own_tokens(const Placed &placed) {
        placed.join(tally[0], false, true);
        __syncthreads();
        if (threadIdx.x < n_groups) {
            int *info = plan.group_info + (first_group + threadIdx.x) * LPLBK_INFO_WORDS;
            info[LPLBK_INFO_OWN_RANK] = threadIdx.x == 0 ? tally[0].own_rank : 0;
            info[LPLBK_INFO_OWN_NODE] = threadIdx.x == 0 ? tally[0].own_node : 0;
            info[LPLBK_INFO_OTHER_NODES] = threadIdx.x == 0 ? tally[0].other_nodes : 0;
        }
    }
};

}  // namespace lplb
