// The flow algorithm for groups of at most 32 ranks in which every bundle has two places and the colours are at most 8: one warp, one lane
// a rank, everything in registers.
//
// Of each colour a lane has one arc at most. A colour is a matching, so the arcs of colour c of a rank and of its partner are the two arcs
// of one bundle, and one shuffle a colour carries what one of them gives to the other. Arcs stand in colour order on every rank, as in
// the tables.
// The rule itself is that of Sources/LPLBSolver/FlowSolver.swift; every step here has its counterpart there.
#pragma once

#include "capacity.cuh"

namespace lplb {

// kLateCall: the late passes are a call. In a kernel that has no other solver that costs more than it saves, beside MaskFlow it saves more.
template <int kColours, bool kLateCall = false, class Cap = Capacity>
struct LaneFlow {
    int partner[kColours];
    unsigned bit[kColours];  // of the partner; 0: no arc of this colour
    int bundle[kColours];    // in the group
    bool is_copy[kColours];
    int sum[kColours];  // tokens of the bundle
    int x[kColours];    // of them on this rank
    int load;         // of this rank
    int total;        // of all ranks
    unsigned witness;
    FlowEndOf<Cap> end;

    // words: the lane's column of the image's lanes. All that can be done before the loads are known.
    __device__ __forceinline__ void open(const int (&words)[kColours], int n_ranks) {
        n_ranks_ = n_ranks;
        everybody_ = n_ranks == 32 ? kFullWarp : (1u << n_ranks) - 1;
        forced_by_all_ = ForcedByAll(n_ranks);
#pragma unroll
        for (int c = 0; c < kColours; ++c) {
            partner[c] = words[c] & 31;
            bundle[c] = words[c] >> LPLBK_LANE_BUNDLE & 0xffff;
            is_copy[c] = (words[c] >> LPLBK_LANE_COPY & 1) != 0;
            bit[c] = (words[c] >> LPLBK_LANE_ARC & 1) != 0 ? 1u << partner[c] : 0u;
        }
    }

    // base: tokens of this rank's single places; sums: tokens of each bundle.
    __device__ __forceinline__ void solve(int base, const int *sums) {
        load = base;
#pragma unroll
        for (int c = 0; c < kColours; ++c) {
            sum[c] = bit[c] != 0 ? sums[bundle[c]] : 0;
            x[c] = is_copy[c] ? sum[c] >> 1 : (int)(((unsigned)sum[c] + 1) >> 1);
            load += x[c];
        }
        total = warp_sum(load);
        const int highest_base = warp_max(base);
        witness = everybody_;
        if constexpr (Cap::kRanked) {
            end.begin(total, n_ranks_, warp_sum);
            if (__any_sync(kFullWarp, end.over(lane_id(), base))) {
                const int64_t level = end.over(lane_id(), base) ? end.level_of(base, 0) : 0;
                const int64_t highest = Cap::highest(level, warp_max);
                witness = 1u << (__ffs(__ballot_sync(kFullWarp, level == highest)) - 1);
                end.set(highest);
            }
        } else {
            end.level = forced_by_all_(total);
            if (highest_base > end.level) {
                end.level = highest_base;
                witness = 1u << (__ffs(__ballot_sync(kFullWarp, base == highest_base)) - 1);
            }
        }
        end.rounds = 0;
        end.certified = 1;
        MARK(8);
#pragma unroll 1
        for (int sweep = 0; sweep < 2; ++sweep) {
            if (!__any_sync(kFullWarp, end.over(lane_id(), load))) return;
            // A rank without an arc of this colour is its own partner: nothing moves.
#pragma unroll
            for (int c = 0; c < kColours; ++c) even_out(c);
        }
        if (!__any_sync(kFullWarp, end.over(lane_id(), load))) return;
        MARK(9);
        if constexpr (kLateCall) {
            if (!rounds<false>(LPLBK_PLAIN_ROUNDS)) {
                LaneFlow late = *this;  // a copy in memory, so that this one stays in registers
                late.late_rounds();
                *this = late;
            }
        } else {
            if (!rounds<false>(LPLBK_PLAIN_ROUNDS) && !rounds<true>(lplbk_max_rounds(n_ranks_))) end.certified = 0;
        }
    }

private:
    int n_ranks_;
    unsigned everybody_;
    ForcedByAll forced_by_all_;

    // Both ends see the same numbers with opposite signs, and rounding toward zero and clipping are odd.
    __device__ __forceinline__ void even_out(int c) {
        const int more = end.more(lane_id(), load);
        const int evened = Cap::evened(more, __shfl_sync(kFullWarp, more, partner[c]));
        const int moved = max(min(evened, x[c]), x[c] - sum[c]);
        x[c] -= moved;
        load -= moved;
    }

    // The passes after the plain ones, as a call.
    __device__ __noinline__ void late_rounds() {
        if (!rounds<true>(lplbk_max_rounds(n_ranks_))) end.certified = 0;
    }

    // Passes until no rank is above the bound (true), or there have been `limit`. kLate: those after the plain ones. Lanes without a rank
    // pass for ranks below the bound that nobody knows.
    template <bool kLate>
    __device__ __forceinline__ bool rounds(int limit) {
#pragma unroll 1
        for (;;) {
            const int my_room = end.room(lane_id(), load);
            const unsigned over = __ballot_sync(kFullWarp, my_room < 0);
            if (over == 0) return true;
            if (end.rounds == limit) return false;
            ++end.rounds;

            int room[kColours];
            unsigned adjacent = 0;
#pragma unroll
            for (int c = 0; c < kColours; ++c) {
                room[c] = __shfl_sync(kFullWarp, my_room, partner[c]);
                if (x[c] > 0) adjacent |= bit[c];
            }
            unsigned front = __ballot_sync(kFullWarp, my_room > 0);
            unsigned waiting = over;
            unsigned toward = 0;  // the ranks one level nearer
            int level = my_room > 0 ? 0 : -1;
            int levels = 0;
#pragma unroll 1
            do {
                const bool joins = level < 0 && (adjacent & front) != 0;
                const unsigned joined = __ballot_sync(kFullWarp, joins);
                if (joined == 0) break;
                ++levels;
                if (joins) {
                    level = levels;
                    toward = front;
                }
                front = joined;
                waiting &= ~joined;
            } while (waiting != 0);
            if (waiting != 0 && (!kLate || waiting == over)) {
                const bool inside = level < 0;
                const int tokens = warp_sum(inside ? load : 0);
                witness = __ballot_sync(kFullWarp, inside);
                end.raise(tokens, [&](int) { return inside; }, __popc(witness), warp_sum);
                continue;
            }

            // Arcs towards the next level do not change before their rank's own step, so what they can carry is known now.
            int available[kColours], before[kColours];
            int so_far = 0;
#pragma unroll
            for (int c = 0; c < kColours; ++c) {
                available[c] = (bit[c] & toward) != 0 ? (level == 1 ? min(x[c], room[c]) : x[c]) : 0;
                before[c] = so_far;
                so_far += available[c];
            }
#pragma unroll 1
            for (int step = levels; step >= 1; --step) {
                const int excess = level == step ? -end.room(lane_id(), load) : 0;
                int given[kColours];
#pragma unroll
                for (int c = 0; c < kColours; ++c) {
                    given[c] = min(max(excess - before[c], 0), available[c]);
                }
#pragma unroll
                for (int c = 0; c < kColours; ++c) {
                    const int change = __shfl_sync(kFullWarp, given[c], partner[c]) - given[c];
                    x[c] += change;
                    load += change;
                }
            }
            if constexpr (kLate) spill(level);
        }
    }

    // After the wave: what ranks of level 1 have above the bound flows on through the ranks of level 0, each of which keeps what it lacks.
    __device__ __forceinline__ void spill(int level) {
        bool gives = level == 1 && end.over(lane_id(), load);
        unsigned takers = __ballot_sync(kFullWarp, level == 0);
#pragma unroll 1
        do {
            const int my_room = end.room(lane_id(), load);
            int rest = gives ? -my_room : 0;
            int given[kColours];
#pragma unroll
            for (int c = 0; c < kColours; ++c) {
                const int lacks = max(__shfl_sync(kFullWarp, my_room, partner[c]), 0);
                given[c] = (bit[c] & takers) != 0 ? min(rest, min(x[c], lacks)) : 0;
                rest -= given[c];
            }
#pragma unroll
            for (int c = 0; c < kColours; ++c) {
                const int more = (bit[c] & takers) != 0 ? min(rest, x[c] - given[c]) : 0;
                given[c] += more;
                rest -= more;
            }
#pragma unroll
            for (int c = 0; c < kColours; ++c) {
                const int change = __shfl_sync(kFullWarp, given[c], partner[c]) - given[c];
                x[c] += change;
                load += change;
            }
            gives = (takers >> lane_id() & 1) != 0 && end.over(lane_id(), load);
            takers &= ~__ballot_sync(kFullWarp, gives);
        } while (__any_sync(kFullWarp, gives));
    }
};

}  // namespace lplb
