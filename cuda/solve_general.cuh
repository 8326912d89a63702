// A block's work around the flow for any placement: one group, solved by MaskFlow (up to 64 ranks) or ScanFlow.
#pragma once

#include "solve_block.cuh"

namespace lplb {

// kWords: words of a rank mask, 1 or 2; 0: ScanFlow.
template <int kWords>
struct GeneralBlock {
    const PlanView &plan;
    const int group;
    Tally *tally;
    int *image;
    int *tokens;  // [n_logical]
    FlowTables tables;
    FlowSpace space;
    int *cleared_from;

    __host__ __device__ static int words_of(const lplbk_shape &shape, const lplbk_layout &at) {
        return round_up(kTallyWords, 4) + at.image_words + shape.n_logical + FlowSpace::words_of(shape);
    }

    // memory: 16-byte aligned.
    __device__ GeneralBlock(const PlanView &plan, int *memory, int group)
        : plan(plan), group(group), tally(reinterpret_cast<Tally *>(memory)), image(memory + round_up(kTallyWords, 4)),
          tokens(image + plan.at.image_words), tables(image, plan.at), space(tokens + plan.shape.n_logical, plan.shape) {}

    // Clears the working arrays and fetches the tables; then a barrier.
    __device__ void clear() {
        int *const cleared = space.sum;
        const int n_cleared = FlowSpace::cleared_words(plan.shape);
        const int4 *from = reinterpret_cast<const int4 *>(plan.tables + plan.at.image + (int64_t)group * plan.at.image_words);
        for (int i = threadIdx.x; i < plan.at.image_words / 4; i += blockDim.x) reinterpret_cast<int4 *>(image)[i] = from[i];
        for (int i = threadIdx.x; i < kTallyWords; i += blockDim.x) reinterpret_cast<int *>(tally)[i] = 0;
        for (int i = threadIdx.x; i < n_cleared; i += blockDim.x) cleared[i] = 0;
    }

    __device__ int4 record(int expert) const { return reinterpret_cast<const int4 *>(plan.tables + plan.at.expert)[expert]; }
    __device__ int2 place(int index) const { return reinterpret_cast<const int2 *>(plan.tables + plan.at.place)[index]; }
    __device__ bool is_here(int expert) const {
        return plan.shape.n_groups == 1 || plan.tables[plan.at.expert_group + expert] == group;
    }

    // Adds up the loads. Whole warps, the barriers before and after are the caller's.
    template <class Loads>
    __device__ void gather(const Loads &loads) {
        for (int first = 0; first < plan.shape.n_logical; first += blockDim.x) {
            const int expert = first + threadIdx.x;
            int mine = 0;
            if (expert < plan.shape.n_logical && is_here(expert)) {
                const int bundle = record(expert).x;
                mine = fitted(loads.total(expert), *tally);
                tokens[expert] = mine;
                if (mine != 0) atomicAdd(bundle >= 0 ? &space.sum[bundle] : &space.base[-1 - bundle], mine);
            }
            tally_total(*tally, mine >> 16, mine & 0xffff, mine);
        }
    }

    // By the whole block, after a barrier; ends before one.
    __device__ void solve(const SolveOut &out) {
        if (tally->overflow()) {
            if (out.write && threadIdx.x < LPLBK_INFO_WORDS) {
                plan.group_info[group * LPLBK_INFO_WORDS + threadIdx.x] = 0;
                if (threadIdx.x == 0) {
                    atomicAdd(reinterpret_cast<unsigned long long *>(plan.counters + LPLBK_COUNTER_OVERFLOW), 1ull);
                }
            }
            return;
        }
        split_evenly(tables, space);
        __syncthreads();
        const int n_ranks = plan.shape.group_size;
        int *info = plan.group_info + group * LPLBK_INFO_WORDS;
        const int total = (tally->total_high << 16) + tally->total_low;
        if constexpr (kWords > 0) {
            if (threadIdx.x >= 32 * kWords) return;
            MaskFlow<kWords> flow(tables, space, n_ranks);
            flow.solve();
            if (!out.write) return;
            const int max_load = flow.max_load();
            flow.end.witness_size = flow.witness.count();
            if (threadIdx.x < LPLBK_INFO_WORDS) {
                int value = info_word(threadIdx.x, max_load, flow.end, total, 0);
#pragma unroll
                for (int w = 0; w < kWords; ++w) {
                    if (threadIdx.x == LPLBK_INFO_WITNESS + w) value = flow.witness.word[w];
                }
                write_info(info, value);
            }
        } else {
            uint2 *given = reinterpret_cast<uint2 *>(plan.scratch) + (int64_t)group * n_ranks * n_ranks;
            unsigned *stamps = reinterpret_cast<unsigned *>(reinterpret_cast<uint2 *>(plan.scratch) +
                                                            (int64_t)plan.shape.n_groups * n_ranks * n_ranks);
            ScanFlow flow(tables, space, plan.shape, given, stamps + group);
            flow.solve();
            if (!out.write) return;
            const int max_load = flow.max_load();
            if (threadIdx.x < LPLBK_INFO_WITNESS) write_info(info, info_word(threadIdx.x, max_load, flow.end, total, 0));
            const unsigned witness = __ballot_sync(kFullWarp, flow.in_witness);
            if (lane_id() == 0 && warp_id() < LPLBK_INFO_WORDS - LPLBK_INFO_WITNESS) info[LPLBK_INFO_WITNESS + warp_id()] = witness;
        }
        if (threadIdx.x == 0) count_solved(out, 1);
    }

    // Tokens of every place of the group. After a barrier; by the whole block.
    template <class Loads, class Sink>
    __device__ void finish(const Loads &loads, const SolveOut &out, Sink &sink) {
        const lplbk_shape &shape = plan.shape;
        const bool assigned = out.n_sources > 1 && shape.rank >= 0;
        const bool overflow = tally->overflow();
        Placed placed;
        for (int expert = threadIdx.x; expert < shape.n_logical; expert += blockDim.x) {
            if (!is_here(expert)) continue;
            const int4 at = record(expert);
            const int mine = tokens[expert];
            const int n = at.z;
            if (n == 1) {
                const int2 where = place(at.y);
                const int take = assigned ? loads.of(shape.rank, expert) : mine;
                sink.put(expert, -1, 0, 1, where.x, mine, take);
                if (shape.rank >= 0) placed.add(shape, where.y, take);
                continue;
            }
            const int arc = tables.bundle_start[at.x];
            int moved_pair = -1;  // of a bundle of several experts: what goes to the second place
            if (shape.combined > 1) {
                const int *experts = plan.tables + plan.at.bundle_expert;
                int before = 0;
                for (int k = plan.tables[plan.at.bundle_expert_start + group * shape.max_bundles + at.x]; experts[k] != expert; ++k) {
                    before += tokens[experts[k]];
                }
                const int x = space.x[arc + 1], sum = space.sum[at.x];
                moved_pair = share_of(x, before + mine, sum) - share_of(x, before, sum);
            }
            const auto quota = [&](int j) {
                if (overflow) return j == 0 ? mine : 0;
                if (moved_pair >= 0) return j == 0 ? mine - moved_pair : moved_pair;
                return space.x[arc + j];
            };
            const auto emit = [&](int j, int take) {
                const int2 where = place(at.y + j);
                const int tokens_there = quota(j);
                if (j > 0) placed.moved += tokens_there;
                sink.put(expert, at.w, j, n, where.x, tokens_there, take);
                if (shape.rank >= 0) placed.add(shape, where.y, take);
            };
            if (assigned) {
                assign_tokens(
                    n, quota, [&](int j) { return place(at.y + j).y; }, [&](int s) { return loads.of(s, expert); }, shape.rank,
                    shape.ep_size / shape.n_nodes, emit);
            } else {
                for (int j = 0; j < n; ++j) emit(j, quota(j));
            }
        }
        if (!out.write) return;
        if (out.ratios != nullptr) write_ratios(out, overflow);
        if (out.scaled != nullptr) {
            const float highest = __int2float_rn(tally->highest);
            for (int expert = threadIdx.x; expert < shape.n_logical; expert += blockDim.x) {
                out.scaled[expert] = highest > 0 ? __fdiv_rn(__int2float_rn(tokens[expert]), highest) : 0.0f;
            }
        }
        placed.join(*tally, true, shape.rank >= 0);
        __syncthreads();
        if (threadIdx.x == 0) {
            int *info = plan.group_info + group * LPLBK_INFO_WORDS;
            info[LPLBK_INFO_MOVED] = tally->moved;
            info[LPLBK_INFO_OWN_RANK] = tally->own_rank;
            info[LPLBK_INFO_OWN_NODE] = tally->own_node;
            info[LPLBK_INFO_OTHER_NODES] = tally->other_nodes;
        }
    }

private:
    // MOVED and the OWN words come from finish().
    __device__ void write_info(int *info, int value) const {
        const int word = threadIdx.x;
        if (word != LPLBK_INFO_MOVED && (word < LPLBK_INFO_OWN_RANK || word > LPLBK_INFO_OTHER_NODES)) info[word] = value;
    }

    __device__ void write_ratios(const SolveOut &out, bool overflow) {
        const lplbk_shape &shape = plan.shape;
        const int n_own = shape.n_logical / shape.ep_size;
        const int *home = plan.tables + plan.at.home;
        for (int i = threadIdx.x; i < shape.group_size * shape.n_redundant; i += blockDim.x) {
            const int rank = i / shape.n_redundant;
            const int word = home[(group * shape.group_size + rank) * n_own + i - rank * shape.n_redundant];
            float ratio = 1.0f;
            if (word < 0 && !overflow) {
                const int bundle = record(word & 0x7fffffff).x;
                const int sum = space.sum[bundle];
                if (sum != 0) ratio = __fdiv_rn(__int2float_rn(space.x[tables.bundle_start[bundle]]), __int2float_rn(sum));
            }
            out.ratios[group * shape.group_size * shape.n_redundant + i] = ratio;
        }
    }
};

}  // namespace lplb
