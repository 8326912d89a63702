// The flow algorithm for groups of at most 64 ranks with any number of places an expert: one or two warps, one lane a rank. Sets of ranks
// are bit masks in registers; tokens of arcs are in shared memory. The rule is that of Sources/LPLBSolver/FlowSolver.swift.
#pragma once

#include "flow_pair.cuh"
#include "flow_space.cuh"

namespace lplb {

// A set of ranks.
template <int kWords>
struct Ranks {
    unsigned word[kWords];

    __device__ bool empty() const {
        unsigned any = 0;
#pragma unroll
        for (int w = 0; w < kWords; ++w) any |= word[w];
        return any == 0;
    }
    __device__ Ranks operator&(const Ranks &other) const {
        Ranks both;
#pragma unroll
        for (int w = 0; w < kWords; ++w) both.word[w] = word[w] & other.word[w];
        return both;
    }
    __device__ Ranks without(const Ranks &other) const {
        Ranks rest;
#pragma unroll
        for (int w = 0; w < kWords; ++w) rest.word[w] = word[w] & ~other.word[w];
        return rest;
    }
    __device__ void operator|=(const Ranks &other) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) word[w] |= other.word[w];
    }
    __device__ int count() const {
        int n = 0;
#pragma unroll
        for (int w = 0; w < kWords; ++w) n += __popc(word[w]);
        return n;
    }
    __device__ int first() const {
        int rank = __ffs(word[0]) - 1;
#pragma unroll
        for (int w = 1; w < kWords; ++w) {
            if (rank < 0) rank = word[w] != 0 ? 32 * w + __ffs(word[w]) - 1 : -1;
        }
        return rank;
    }
    // How many of the set are below the rank.
    __device__ int below(int rank) const {
        int n = __popc(word[0] & (rank >= 32 ? ~0u : (1u << rank) - 1));
#pragma unroll
        for (int w = 1; w < kWords; ++w) {
            if (rank >= 32 * w) n += __popc(word[w] & (rank >= 32 * w + 32 ? ~0u : (1u << (rank - 32 * w)) - 1));
        }
        return n;
    }
    __device__ bool has(int rank) const {
        bool in = rank < 32 && (word[0] >> (rank & 31) & 1) != 0;
#pragma unroll
        for (int w = 1; w < kWords; ++w) in |= rank >> 5 == w && (word[w] >> (rank & 31) & 1) != 0;
        return in;
    }
    __device__ void add(int rank) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) word[w] |= rank >> 5 == w ? 1u << (rank & 31) : 0u;
    }
    __device__ void remove(int rank) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) word[w] &= rank >> 5 == w ? ~(1u << (rank & 31)) : ~0u;
    }
    __device__ static Ranks none() {
        Ranks set;
#pragma unroll
        for (int w = 0; w < kWords; ++w) set.word[w] = 0;
        return set;
    }
};

// kWords warps: the first ones of the block. All of them, and nobody else, call solve().
template <int kWords>
class MaskFlow {
public:
    using Set = Ranks<kWords>;
    FlowEnd end;
    Set witness;
    int load;   // of this lane's rank
    int total;  // of all ranks

    __device__ MaskFlow(const FlowTables &tables, const FlowSpace &space, int n_ranks)
        : t_(tables), s_(space), n_ranks_(n_ranks), rank_(threadIdx.x), valid_(threadIdx.x < n_ranks), parity_(0) {}

    // After split_evenly() and a barrier of the block.
    __device__ void solve() {
        const int base = valid_ ? s_.base[rank_] : 0;
        load = base + (valid_ ? s_.load[rank_] : 0);
        total = sum(load);
        const int highest_base = highest(base);
        end.bound = ceil_share(total, n_ranks_);
        witness = ballot(valid_);
        if (highest_base > end.bound) {
            end.bound = highest_base;
            const int first = ballot(valid_ && base == highest_base).first();
            witness = Set::none();
            witness.add(first);
        }
        end.rounds = 0;
        end.certified = 1;
        const int n_colours = t_.n_colours();
        if (n_colours > 0) {
#pragma unroll 1
            for (int sweep = 0; sweep < 2; ++sweep) {
                if (ballot(load > end.bound).empty()) return;
                s_.load[rank_] = load;
                sync();
#pragma unroll 1
                for (int colour = 0; colour < n_colours; ++colour) {
                    sweep_colour(t_, s_, colour, rank_, 32 * kWords);
                    sync();
                }
                load = valid_ ? s_.load[rank_] : 0;
            }
            if (ballot(load > end.bound).empty()) return;
            cut_prefixes(base);
        }
        // What ranks receive starts at zero (cleared with the space).
        rounds();
    }

    // Of all ranks. By the same threads as solve().
    __device__ int max_load() { return highest(load); }

private:
    static constexpr int kKept = 8;  // arcs of a rank whose table entries stay in registers

    const FlowTables &t_;
    const FlowSpace &s_;
    const int n_ranks_;
    const int rank_;
    const bool valid_;
    int parity_;

    __device__ static void sync() {
        if (kWords == 1) {
            __syncwarp();
        } else {
            asm volatile("bar.sync 1, %0;" ::"r"(32 * kWords) : "memory");
        }
    }

    __device__ Set ballot(bool predicate) {
        Set set;
        const unsigned mine = __ballot_sync(kFullWarp, predicate);
        if (kWords == 1) {
            set.word[0] = mine;
        } else {
            int *words = s_.words + 8 * parity_;
            if (lane_id() == 0) words[warp_id()] = mine;
            sync();
#pragma unroll
            for (int w = 0; w < kWords; ++w) set.word[w] = words[w];
            parity_ ^= 1;
        }
        return set;
    }

    __device__ int sum(int value) { return across(warp_sum(value), [](int a, int b) { return a + b; }); }
    __device__ int highest(int value) { return across(warp_max(value), [](int a, int b) { return max(a, b); }); }

    template <class Join>
    __device__ int across(int value, Join join) {
        if (kWords == 1) return value;
        int *words = s_.words + 8 * parity_;
        if (lane_id() == 0) words[warp_id()] = value;
        sync();
        int joined = words[0];
#pragma unroll
        for (int w = 1; w < kWords; ++w) joined = join(joined, words[w]);
        parity_ ^= 1;
        return joined;
    }

    __device__ Set mask_of(int bundle) const {
        Set set;
        if (kWords == 2) {
            const uint2 both = reinterpret_cast<const uint2 *>(t_.mask)[bundle];
            set.word[0] = both.x;
            set.word[kWords - 1] = both.y;
        } else {
            set.word[0] = t_.mask[bundle];
        }
        return set;
    }

    // The best lower bound among the sets of the n busiest ranks.
    __device__ void cut_prefixes(int base) {
        int *position = s_.extra, *added = s_.extra + 32 * kWords;
        s_.load[rank_] = load;
        sync();
        int before = 0;
#pragma unroll 4
        for (int q = 0; q < n_ranks_; ++q) {
            const int other = s_.load[q];
            before += other > load || (other == load && q < rank_);
        }
        if (!valid_) before = rank_;
        position[rank_] = before;
        added[before] = base;
        sync();
        const int n_bundles = t_.n_bundles();
#pragma unroll 1
        for (int bundle = rank_; bundle < n_bundles; bundle += 32 * kWords) {
            const int arc = t_.bundle_start[bundle];
            atomicAdd(&added[max(position[t_.arc_rank[arc]], position[t_.arc_rank[arc + 1]])], s_.sum[bundle]);
        }
        sync();
        int inside = warp_prefix(added[rank_]);
        if (kWords > 1) {
            if (lane_id() == 31) s_.words[16 + warp_id()] = inside;
            sync();
            for (int w = 0; w < warp_id(); ++w) inside += s_.words[16 + w];
        }
        const int candidate = valid_ ? ceil_share(inside, rank_ + 1) : 0;
        const int best = highest(candidate);
        if (best > end.bound) {
            const int n = ballot(candidate == best).first() + 1;
            end.bound = best;
            witness = ballot(before < n);
        }
    }

    __device__ void rounds() {
        const int first = valid_ ? t_.rank_start[rank_] : 0;
        const int degree = valid_ ? t_.rank_start[rank_ + 1] - first : 0;
        ArcEntry kept[kKept];
        Set kept_mask[kKept];
#pragma unroll
        for (int i = 0; i < kKept; ++i) {
            kept[i].word = i < degree ? t_.rank_arc[first + i] : 0;
            kept_mask[i] = i < degree ? mask_of(kept[i].bundle()) : Set::none();
        }
        const int max_rounds = lplbk_max_rounds(n_ranks_);
#pragma unroll 1
        for (;;) {
            const int bound = end.bound;
            s_.load[rank_] = load;
            const Set over = ballot(valid_ && load > bound);
            if (over.empty()) return;
            if (end.rounds == max_rounds) break;
            ++end.rounds;

            Set adjacent = Set::none();
            int tokens[kKept];
#pragma unroll
            for (int i = 0; i < kKept; ++i) tokens[i] = i < degree ? s_.x[kept[i].arc()] : 0;
#pragma unroll
            for (int i = 0; i < kKept; ++i) {
                if (tokens[i] > 0) adjacent |= kept_mask[i];
            }
#pragma unroll 1
            for (int i = kKept; i < degree; ++i) {
                const ArcEntry entry{t_.rank_arc[first + i]};
                if (s_.x[entry.arc()] > 0) adjacent |= mask_of(entry.bundle());
            }
            Set front = ballot(valid_ && load < bound);
            Set reached = front;
            Set toward = Set::none();  // the ranks one level nearer
            int level = load < bound ? 0 : -1;
            int levels = 0;
            bool cut = false;
#pragma unroll 1
            while (!over.without(reached).empty()) {
                const bool joins = level < 0 && !(adjacent & front).empty();
                const Set joined = ballot(joins);
                if (joined.empty()) {
                    cut = true;
                    break;
                }
                ++levels;
                if (joins) {
                    level = levels;
                    toward = front;
                }
                front = joined;
                reached |= joined;
            }
            if (cut) {
                const bool inside = valid_ && level < 0;
                const int held = sum(inside ? load : 0);
                witness = ballot(inside);
                end.bound = ceil_share(held, witness.count());
                continue;
            }
            if (kWords == 1) __syncwarp();  // the loads are published; with two warps the ballots were barriers
#pragma unroll 1
            for (int step = levels; step >= 1; --step) {
                int excess = level == step ? load - bound : 0;
                int *received = s_.received + (step & 1) * 32 * kWords;
                if (excess > 0) {
                    push(excess, toward, step == 1, received, first, degree, kept, kept_mask);
                    load = bound + excess;
                }
                sync();
                load += received[rank_];
                received[rank_] = 0;
            }
            // Odd and even steps have buffers of their own, so the next step may fill one while slow lanes still empty the other; the last
            // step of this round and the first of the next have barriers between them.
        }
        end.certified = 0;
    }

    // Gives up to `excess` tokens of this rank to the ranks in `toward`, arc by arc. limited: no more than the receiver has room for.
    __device__ __forceinline__ void push(int &excess, const Set &toward, bool limited, int *received, int first, int degree,
                                         const ArcEntry (&kept)[kKept], const Set (&kept_mask)[kKept]) {
        const int bound = end.bound;
        int *given = s_.extra + rank_;  // [receiver][giver]; valid where `touched` says so
        Set touched = Set::none();
        unsigned useful = 0;
#pragma unroll
        for (int i = 0; i < kKept; ++i) {
            if (i < degree && s_.x[kept[i].arc()] > 0 && !(kept_mask[i] & toward).empty()) useful |= 1u << i;
        }
        int later = kKept;
#pragma unroll 1
        while (excess > 0) {
            int i;
            if (useful != 0) {
                i = __ffs(useful) - 1;
                useful &= useful - 1;
            } else if (later < degree) {
                i = later++;
            } else {
                break;
            }
            const ArcEntry entry{t_.rank_arc[first + i]};
            const Set mask = mask_of(entry.bundle());
            Set candidates = mask & toward;
            int tokens = s_.x[entry.arc()];
            const int here = mask.below(rank_);
#pragma unroll 1
            while (tokens > 0 && excess > 0 && !candidates.empty()) {
                const int q = candidates.first();
                candidates.remove(q);
                int amount = min(excess, tokens);
                if (limited) {
                    const int before = touched.has(q) ? given[q * 32 * kWords] : 0;
                    amount = min(amount, bound - s_.load[q] - before);
                    if (amount <= 0) continue;
                    touched.add(q);
                    given[q * 32 * kWords] = before + amount;
                }
                const int distance = mask.below(q) - here;
                atomicAdd(&s_.x[entry.flipped() ? entry.arc() - distance : entry.arc() + distance], amount);
                atomicAdd(&received[q], amount);
                tokens -= amount;
                excess -= amount;
            }
            s_.x[entry.arc()] = tokens;
        }
    }
};

}  // namespace lplb
