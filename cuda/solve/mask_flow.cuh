// The flow algorithm for groups of at most 64 ranks with any number of places an expert: eight warps. The rule is that of
// Sources/LPLBSolver/FlowSolver.swift.
//
// Every warp keeps the loads and levels of all ranks, a rank (or two) a lane, sets of ranks as bit masks, and so comes to the same
// decisions without asking the others. The arcs of a rank, in their order, are shared out over the warps: thread (row, rank) has the arcs
// row * chunk and following, as a rule one at most. What needs several arcs (where a rank can push to, what a bundle has room for, how much
// the arcs of a rank before one can carry) is added up in shared memory, where the tokens of arcs are too.
//
// Few threads have tokens to move at a time, so a round takes as long as the longest chain of instructions between two barriers: one thread
// that serves one receiver after another.
#pragma once

#include "rank_set.cuh"
#include "space.cuh"

namespace lplb {

// By the first kMaskWarps warps of the block; all of them, and nobody else, call solve(). Its results are complete in the first warp; the
// others may leave it earlier.
template <int kWords, class Cap = Capacity>
class MaskFlow {
public:
    using Set = Ranks<kWords>;
    FlowEndOf<Cap> end;
    Set witness;
    int load[kWords];  // of the ranks lane, lane + 32
    int total;         // of all ranks

    __device__ MaskFlow(const Image &tables, const FlowSpace &space, int n_ranks)
        : t_(tables), s_(space), n_ranks_(n_ranks), row_(warp_id() / kWords), half_(warp_id() % kWords), rank_(32 * half_ + lane_id()) {
        const int degree = rank_ < n_ranks ? t_.rank_start[rank_ + 1] - t_.rank_start[rank_] : 0;
        int most = 0;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            most = max(most, rank(w) < n_ranks ? t_.rank_start[rank(w) + 1] - t_.rank_start[rank(w)] : 0);
        }
        most = warp_max(most);
        const int chunk = ceil_div(most, kRows);
        n_rows_ = most > 0 ? ceil_div(most, chunk) : 1;
        single_ = chunk <= 1;
        if constexpr (Cap::kRanked) {
            end.open(
                *space.differ != 0, [&](int r) { return space.speed[r]; }, [&](int r) { return space.fixed[r]; }, n_ranks, lane_id(),
                space.caps, warp_id() == 0, warp_max, warp_sum);  // every warp comes to the same
        }
        n_arcs_ = max(min(degree - row_ * chunk, chunk), 0);
        arcs_ = t_.rank_arc + (n_arcs_ > 0 ? t_.rank_start[rank_] + row_ * chunk : 0);
        first_ = arc_at(0);
    }

    // After split_evenly() and a barrier of the block. The space must have been cleared.
    __device__ void solve() {
        if (row_ >= n_rows_) return;
        int base[kWords], highest_base = 0;
        total = 0;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            base[w] = rank(w) < n_ranks_ ? s_.base[rank(w)] : 0;
            load[w] = rank(w) < n_ranks_ ? base[w] + s_.load[rank(w)] : 0;
            total += load[w];
            highest_base = max(highest_base, base[w]);
        }
        total = warp_sum(total);
        highest_base = warp_max(highest_base);
        witness = those([&](int w) { return rank(w) < n_ranks_; });
        if constexpr (Cap::kRanked) {
            begin_ranked(base);
        } else {
            end.level = Capacity::forced(total, n_ranks_);
            if (highest_base > end.level) {
                end.level = highest_base;
                witness_is(those([&](int w) { return rank(w) < n_ranks_ && base[w] == highest_base; }).first());
            }
        }
        end.rounds = 0;
        end.certified = 1;
        if (t_.n_colours() > 0) {
#pragma unroll 1
            for (int sweep = 0; sweep < 2; ++sweep) {
                if (over().empty()) return;
                sync();  // everybody has read the loads
                sweep_once();
            }
        }
        if (single_) {
            rounds<true>();
        } else {
            rounds<false>();
        }
    }

    // Of all ranks. By a whole warp.
    __device__ int max_load() const {
        int most = 0;
#pragma unroll
        for (int w = 0; w < kWords; ++w) most = max(most, load[w]);
        return warp_max(most);
    }

private:
    static constexpr int kRows = kMaskWarps / kWords;
    static constexpr int kRanks = 32 * kWords;

    struct Arc {
        ArcEntry entry;
        Set mask;  // of the bundle; empty: there is no such arc
    };

    const Image t_;  // by value, for the copy that runs the late passes
    const FlowSpace s_;
    const int n_ranks_;
    // This thread's arcs: n_arcs_ of rank_ at arcs_.
    const int row_, half_, rank_;
    int n_rows_, n_arcs_;
    const unsigned *arcs_;
    bool single_;  // no thread has more than one
    Arc first_;

    __device__ static int rank(int w) { return 32 * w + lane_id(); }

    __device__ void witness_is(int rank) {
        witness = Set::none();
        witness.add(rank);
    }

    // The first level where the ranks differ.
    __device__ void begin_ranked(const int (&base)[kWords]) {
        end.begin(total, n_ranks_, warp_sum);
        if (those([&](int w) { return end.over(rank(w), base[w]); }).empty()) return;
        int64_t level[kWords], mine = 0;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            level[w] = end.over(rank(w), base[w]) ? end.level_of(base[w], w) : 0;
            mine = max(mine, level[w]);
        }
        const int64_t highest = Cap::highest(mine, warp_max);
        witness_is(those([&](int w) { return level[w] == highest; }).first());
        end.set(highest);
    }

    // Of the warps that take part.
    __device__ void sync() const { asm volatile("bar.sync 1, %0;" ::"r"(32 * kWords * n_rows_) : "memory"); }

    // The ranks for which condition(w) holds, rank being 32 w + lane.
    template <class Condition>
    __device__ static Set those(Condition condition) {
        Set set;
#pragma unroll
        for (int w = 0; w < kWords; ++w) set.word[w] = __ballot_sync(kFullWarp, condition(w));
        return set;
    }
    // Lanes without a rank have no tokens, and the bound is never negative.
    __device__ Set over() const {
        return those([&](int w) { return end.over(rank(w), load[w]); });
    }

    // Of this thread's rank; without an index, which would take the array out of the registers.
    __device__ int of_my_rank(const int (&each)[kWords]) const { return half_ == 0 ? each[0] : each[kWords - 1]; }
    __device__ Set of_my_rank(const Set (&each)[kWords]) const {
        Set set;
#pragma unroll
        for (int v = 0; v < kWords; ++v) set.word[v] = half_ == 0 ? each[0].word[v] : each[kWords - 1].word[v];
        return set;
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

    __device__ Arc arc_at(int k) const {
        if (k >= n_arcs_) return {{0}, Set::none()};
        const ArcEntry entry{arcs_[k]};
        return {entry, mask_of(entry.bundle())};
    }

    __device__ void sweep_once() {
        if (row_ == 0) s_.load[rank_] = of_my_rank(load);
        sync();
        const int n_colours = t_.n_colours();
#pragma unroll 1
        for (int colour = 0; colour < n_colours; ++colour) {
            sweep_colour(end, t_, s_, colour, threadIdx.x, 32 * kWords * n_rows_);
            sync();
        }
#pragma unroll
        for (int w = 0; w < kWords; ++w) load[w] = s_.load[rank(w)];
    }

    // Calls visit() for the arcs of this thread. kSingle: there is at most one.
    template <bool kSingle, class Visit>
    __device__ __forceinline__ void each_arc(Visit visit) const {
        if (n_arcs_ > 0) visit(first_);
        if constexpr (!kSingle) {
#pragma unroll 1
            for (int k = 1; k < n_arcs_; ++k) visit(arc_at(k));
        }
    }

    // What the warps add up in one round; cleared in the round before.
    struct RoundSums {
        int received[kRanks];
        int given[kRanks];
        unsigned reach[kWords][kRanks];  // ranks that the rank can push to: those of its arcs with tokens
        int2 room[1];                    // [bundles] what ranks of the bundle lack to the bound: low 16 bits, the others
    };

    template <bool kSingle>
    __device__ __forceinline__ void rounds() {
        RoundSums *sums = reinterpret_cast<RoundSums *>(s_.received);
        RoundSums *next = reinterpret_cast<RoundSums *>(s_.received + FlowSpace::round_words(kRanks, t_.n_bundles()));
        Set above = over();
        rounds<kSingle, false>(LPLBK_PLAIN_ROUNDS, above, sums, next);
        if (above.empty()) return;
        MaskFlow late = *this;  // a copy in memory, so that this one stays in registers
        late.late_rounds<kSingle>(sums, next);
        end = late.end;
        witness = late.witness;
#pragma unroll
        for (int w = 0; w < kWords; ++w) load[w] = late.load[w];
    }

    // The passes after the plain ones: rare, and a call, so that they cost the others nothing.
    template <bool kSingle>
    __device__ __noinline__ void late_rounds(RoundSums *sums, RoundSums *next) {
        Set above = over();
        rounds<kSingle, true>(lplbk_max_rounds(n_ranks_), above, sums, next);
        if (!above.empty()) end.certified = 0;
    }

    // Passes until no rank is above the bound, or there have been `limit`. kLate: those after the plain ones.
    template <bool kSingle, bool kLate>
    __device__ __forceinline__ void rounds(int limit, Set &above, RoundSums *&sums, RoundSums *&next) {
        int *const loads = s_.words;  // [ranks] at the beginning of the round
        int *const carried = s_.extra;  // [rows][ranks]
#pragma unroll 1
        while (!above.empty() && end.rounds < limit) {
            const int tokens = n_arcs_ > 0 ? s_.x[first_.entry.arc()] : 0;
            Set reach = tokens > 0 ? first_.mask : Set::none();
#pragma unroll 1
            for (int k = 1; k < (kSingle ? 1 : n_arcs_); ++k) {
                const Arc arc = arc_at(k);
                if (s_.x[arc.entry.arc()] > 0) reach |= arc.mask;
            }
#pragma unroll
            for (int v = 0; v < kWords; ++v) {
                if (reach.word[v] != 0) atomicOr(&sums->reach[v][rank_], reach.word[v]);
            }
            const int lacks = end.room(rank_, of_my_rank(load));
            if (lacks > 0) {
                each_arc<kSingle>([&](const Arc &arc) {
                    int2 *const room = &sums->room[arc.entry.bundle()];
                    atomicAdd(&room->x, lacks & 0xffff);
                    if (lacks >> 16 != 0) atomicAdd(&room->y, lacks >> 16);
                });
            }
            if (row_ == 0) loads[rank_] = of_my_rank(load);
            sync();
            if (row_ == n_rows_ - 1) {
                next->received[rank_] = next->given[rank_] = 0;
#pragma unroll
                for (int v = 0; v < kWords; ++v) next->reach[v][rank_] = 0;
            }
            each_arc<kSingle>([&](const Arc &arc) { next->room[arc.entry.bundle()] = make_int2(0, 0); });  // a bundle's arcs alike
            Set adjacent[kWords];
#pragma unroll
            for (int w = 0; w < kWords; ++w) {
#pragma unroll
                for (int v = 0; v < kWords; ++v) adjacent[w].word[v] = sums->reach[v][rank(w)];
            }
            int level[kWords];
            Set toward[kWords];  // the ranks one level nearer
            ++end.rounds;
            const int levels = search<kLate>(adjacent, above, level, toward);
            if (levels > 0) {
                wave<kSingle>(tokens, levels, of_my_rank(level), of_my_rank(toward), *sums, carried);
                if constexpr (kLate) spill<kSingle>(level, *sums, loads, carried);
            } else {
                sync();  // the next sums are clear
            }
            above = over();
            RoundSums *const cleared = next;
            next = sums;
            sums = cleared;
        }
    }

    // The levels of the ranks and the last of them; 0: a rank above the bound has none, and the bound is now that of the cut. `above` is
    // not empty. (Lanes without a rank pass for ranks below the bound that no bundle knows.)
    template <bool kLate>
    __device__ __forceinline__ int search(const Set (&adjacent)[kWords], const Set &above, int (&level)[kWords], Set (&toward)[kWords]) {
        Set front = those([&](int w) { return end.under(rank(w), load[w]); });
        Set waiting = above;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            level[w] = end.under(rank(w), load[w]) ? 0 : -1;
            toward[w] = Set::none();
        }
        int levels = 0;
#pragma unroll 1
        do {
            const auto joins = [&](int w) { return level[w] < 0 && !(adjacent[w] & front).empty(); };
            const Set joined = those(joins);
            if (joined.empty()) {
                if (kLate && !above.without(waiting).empty()) break;
                const auto inside = [&](int w) { return level[w] < 0; };
                int held = 0;
#pragma unroll
                for (int w = 0; w < kWords; ++w) held += inside(w) ? load[w] : 0;
                witness = those(inside);
                end.raise(warp_sum(held), inside, witness.count(), warp_sum);
                return 0;
            }
            ++levels;
#pragma unroll
            for (int w = 0; w < kWords; ++w) {
                if (joins(w)) {
                    level[w] = levels;
                    toward[w] = front;
                }
            }
            front = joined;
            waiting = waiting.without(joined);
        } while (!waiting.empty());
        return levels;
    }

    // tokens: of this thread's first arc; my_level, my_toward: of its rank.
    template <bool kSingle>
    __device__ __forceinline__ void wave(int tokens, int levels, int my_level, const Set &my_toward, RoundSums &sums, int *carried) {
        // What the arcs can carry does not change before their rank's own step: all, or at the last step what there is room for.
        int mine = 0;
        if (my_level > 0) {
            mine = carries(tokens, first_, my_toward, my_level, sums.room);
#pragma unroll 1
            for (int k = 1; k < (kSingle ? 1 : n_arcs_); ++k) {
                const Arc arc = arc_at(k);
                mine += carries(s_.x[arc.entry.arc()], arc, my_toward, my_level, sums.room);
            }
        }
        carried[kRanks * row_ + rank_] = mine;
        sync();
        int kept = end.room(rank_, of_my_rank(load));  // of what the rank will have received, this is for it and its earlier arcs
#pragma unroll
        for (int j = 0; j < kRows - 1; ++j) {
            if (j < row_) kept += carried[kRanks * j + rank_];
        }
#pragma unroll 1
        for (int step = levels; step >= 1; --step) {
            if (my_level == step) {
                const int share = min(sums.received[rank_] - kept, mine);
                if (share > 0) {
                    atomicAdd(&sums.given[rank_], share);
                    give<kSingle, false>(share, tokens, my_toward, step, sums.received);
                }
            }
            sync();
        }
#pragma unroll
        for (int w = 0; w < kWords; ++w) load[w] += sums.received[rank(w)] - sums.given[rank(w)];
    }

    // After the wave: what ranks of level 1 have above the bound flows on through the ranks of level 0, each of which keeps what it lacks.
    template <bool kSingle>
    __device__ __forceinline__ void spill(const int (&level)[kWords], RoundSums &sums, int *loads, int *carried) {
        if (those([&](int w) { return (level[w] == 0 || level[w] == 1) && end.over(rank(w), load[w]); }).empty()) return;
        int gives[kWords];
#pragma unroll
        for (int w = 0; w < kWords; ++w) gives[w] = level[w] == 1 && end.over(rank(w), load[w]);
        Set takers = those([&](int w) { return level[w] == 0; });
        int origin[kWords];  // loads at the beginning of the round
#pragma unroll
        for (int w = 0; w < kWords; ++w) origin[w] = load[w] - sums.received[rank(w)] + sums.given[rank(w)];
        Set givers;
        do {
            if (row_ == 0) loads[rank_] = of_my_rank(load);
            sync();
            // First no more than the takers lack, then the rest.
#pragma unroll 1
            for (int turn = 1; turn <= 2; ++turn) {
                int mine = 0;
                if (of_my_rank(gives) != 0) {
                    each_arc<kSingle>([&](const Arc &arc) { mine += pours(s_.x[arc.entry.arc()], arc.mask & takers, turn == 1); });
                }
                carried[kRanks * row_ + rank_] = mine;
                sync();
                int others = end.room(rank_, of_my_rank(load));
#pragma unroll
                for (int j = 0; j < kRows - 1; ++j) {
                    if (j < row_) others += carried[kRanks * j + rank_];
                }
                const int share = min(-others, mine);
                if (share > 0) {
                    atomicAdd(&sums.given[rank_], share);
                    give<kSingle, true>(share, s_.x[first_.entry.arc()], takers, turn, sums.received);
                }
                sync();
#pragma unroll
                for (int w = 0; w < kWords; ++w) load[w] = origin[w] + sums.received[rank(w)] - sums.given[rank(w)];
            }
#pragma unroll
            for (int w = 0; w < kWords; ++w) gives[w] = (takers.word[w] >> lane_id() & 1) != 0 && end.over(rank(w), load[w]);
            givers = those([&](int w) { return gives[w] != 0; });
            takers = takers.without(givers);
        } while (!givers.empty());
    }

    // Of x tokens on an arc, what can go to the ranks in `targets`: all, or if capped what they lack.
    __device__ __forceinline__ int pours(int x, Set targets, bool capped) const {
        if (x == 0 || targets.empty()) return 0;
        if (!capped) return x;
        unsigned lacks = 0;
        while (!targets.empty() && lacks < (unsigned)x) {
            int position;
            const int q = targets.pop(targets, position);
            lacks += (unsigned)max(end.room_at(q, s_.words[q]), 0);
        }
        return (int)min((unsigned)x, lacks);
    }

    // Of x tokens on an arc, what can go to the ranks in `toward`: all, or at the last step what the bundle has room for.
    __device__ __forceinline__ int carries(int x, const Arc &arc, const Set &toward, int step, const int2 *room) const {
        if ((arc.mask & toward).empty()) return 0;
        if (step > 1) return x;
        const int2 both = room[arc.entry.bundle()];
        return (int)min((unsigned)x, both.y > 0x7fff ? 0x7fffffffu : ((unsigned)both.y << 16) + (unsigned)both.x);
    }

    // Gives `share` tokens, which this thread's arcs can carry, to the ranks in `toward`, arc by arc and rank by rank. tokens: of the first
    // arc. kSpills: some of them may be above the bound.
    template <bool kSingle, bool kSpills>
    __device__ __forceinline__ void give(int share, int tokens, const Set &toward, int step, int *received) const {
        if constexpr (kSingle) {
            give_by<kSpills>(first_, tokens, share, toward, step, received);
        } else {
#pragma unroll 1
            for (int k = 0; k < n_arcs_ && share > 0; ++k) {
                const Arc arc = arc_at(k);
                const int x = s_.x[arc.entry.arc()];
                if (!(arc.mask & toward).empty() && x > 0) share -= give_by<kSpills>(arc, x, share, toward, step, received);
            }
        }
    }

    // The same by one arc with x tokens and somebody to give them to; returns how many.
    template <bool kSpills>
    __device__ __forceinline__ int give_by(const Arc &arc, int x, int share, const Set &toward, int step, int *received) const {
        Set targets = arc.mask & toward;
        const int here = arc.mask.below(rank_);
        int *const at_start = &s_.x[arc.entry.flipped() ? arc.entry.arc() + here : arc.entry.arc() - here];
        const int direction = arc.entry.flipped() ? -1 : 1;
        const int most = min(x, share);
        int rest = most, position;
        int q = targets.pop(arc.mask, position);
        int load = s_.words[q];
#pragma unroll 1
        for (;;) {
            const bool more = !targets.empty();
            int next_position = 0, next_q = q;
            if (more) next_q = targets.pop(arc.mask, next_position);
            const int next_load = s_.words[next_q];  // under way while this one is served
            const int room = end.room_at(q, load), lacks = kSpills ? max(room, 0) : room;
            const int amount = step > 1 ? rest : min(rest, lacks);
            atomicAdd(at_start + direction * position, amount);
            atomicAdd(&received[q], amount);
            rest -= amount;
            if (rest == 0 || !more) break;
            q = next_q, position = next_position, load = next_load;
        }
        s_.x[arc.entry.arc()] = x - most + rest;
        return most - rest;
    }
};

}  // namespace lplb
