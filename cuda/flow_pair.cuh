// The flow algorithm for groups of at most 32 ranks in which every bundle has two places and the colours are at most 8: one warp, one lane
// a rank, everything in registers.
//
// Slot c of a lane is its arc of colour c. A colour is a matching, so slot c of a rank and slot c of its partner are the two arcs of one
// bundle, and one shuffle a slot carries what one of them gives to the other. Arcs stand in colour order on every rank, as in the tables.
// The rule itself is that of Sources/LPLBSolver/FlowSolver.swift; every step here has its counterpart there.
#pragma once

#include "common.cuh"

namespace lplb {

// What a solve of a group leaves behind, the same in all threads.
struct FlowEnd {
    int bound;
    int rounds;
    int certified;
    int witness_size;
};

// kLateCall: the late passes are a call. In the kernels of topologies that costs more than it saves, beside MaskFlow it saves more.
template <int kSlots, bool kLateCall = false>
struct PairFlow {
    int partner[kSlots];
    unsigned bit[kSlots];  // of the partner; 0: no arc in this slot
    int slot_class[kSlots];
    bool is_copy[kSlots];
    int sum[kSlots];  // tokens of the bundle
    int x[kSlots];    // of them on this rank
    int load;         // of this rank
    int total;        // of all ranks
    unsigned witness;
    FlowEnd end;

    // words: the lane's column of the table `lanes`. All that can be done before the loads are known.
    __device__ __forceinline__ void open(const int (&words)[kSlots], int n_ranks) {
        n_ranks_ = n_ranks;
        everybody_ = n_ranks == 32 ? kFullWarp : (1u << n_ranks) - 1;
        mean_ = ShareOf(n_ranks);
#pragma unroll
        for (int c = 0; c < kSlots; ++c) {
            partner[c] = words[c] & 31;
            slot_class[c] = words[c] >> LPLBK_LANE_CLASS & 0xffff;
            is_copy[c] = (words[c] >> LPLBK_LANE_COPY & 1) != 0;
            bit[c] = (words[c] >> LPLBK_LANE_ARC & 1) != 0 ? 1u << partner[c] : 0u;
        }
    }

    // base: tokens of this rank's single places; class_sum: tokens of each slot class.
    __device__ __forceinline__ void solve(int base, const int *class_sum) {
        load = base;
#pragma unroll
        for (int c = 0; c < kSlots; ++c) {
            sum[c] = bit[c] != 0 ? class_sum[slot_class[c]] : 0;
            x[c] = is_copy[c] ? sum[c] >> 1 : (sum[c] + 1) >> 1;
            load += x[c];
        }
        total = warp_sum(load);
        const int highest_base = warp_max(base);
        end.bound = mean_(total);
        witness = everybody_;
        if (highest_base > end.bound) {
            end.bound = highest_base;
            witness = 1u << (__ffs(__ballot_sync(kFullWarp, base == highest_base)) - 1);
        }
        end.rounds = 0;
        end.certified = 1;
        MARK(8);
#pragma unroll 1
        for (int sweep = 0; sweep < 2; ++sweep) {
            if (!__any_sync(kFullWarp, load > end.bound)) return;
            // Slots without an arc, and colours that there are not, have the rank itself for a partner: nothing moves.
#pragma unroll
            for (int c = 0; c < kSlots; ++c) even_out(c);
        }
        if (!__any_sync(kFullWarp, load > end.bound)) return;
        MARK(9);
        if constexpr (kLateCall) {
            if (!rounds<false>(LPLBK_PLAIN_ROUNDS)) {
                PairFlow late = *this;  // a copy in memory, so that this one stays in registers
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
    ShareOf mean_;  // of all ranks

    // Both ends see the same numbers with opposite signs, and rounding toward zero and clipping are odd.
    __device__ __forceinline__ void even_out(int c) {
        const int difference = load - __shfl_sync(kFullWarp, load, partner[c]);
        const int moved = max(min(difference / 2, x[c]), x[c] - sum[c]);
        x[c] -= moved;
        load -= moved;
    }

    // The passes after the plain ones, as a call.
    __device__ __noinline__ void late_rounds() {
        if (!rounds<true>(lplbk_max_rounds(n_ranks_))) end.certified = 0;
    }

    // Passes until no rank is above the bound (true), or there have been `limit`. kLate: those after the plain ones. Lanes without a rank pass for ranks below the bound that nobody knows.
    template <bool kLate>
    __device__ __forceinline__ bool rounds(int limit) {
#pragma unroll 1
        for (;;) {
            const int bound = end.bound;
            const unsigned over = __ballot_sync(kFullWarp, load > bound);
            if (over == 0) return true;
            if (end.rounds == limit) return false;
            ++end.rounds;

            int room[kSlots];
            unsigned adjacent = 0;
#pragma unroll
            for (int c = 0; c < kSlots; ++c) {
                room[c] = bound - __shfl_sync(kFullWarp, load, partner[c]);
                if (x[c] > 0) adjacent |= bit[c];
            }
            unsigned front = __ballot_sync(kFullWarp, load < bound);
            unsigned waiting = over;
            unsigned toward = 0;  // the ranks one level nearer
            int level = load < bound ? 0 : -1;
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
                end.bound = ceil_share(tokens, __popc(witness));
                continue;
            }

            // Arcs towards the next level do not change before their rank's own step, so what they can carry is known now.
            int available[kSlots], before[kSlots];
            int so_far = 0;
#pragma unroll
            for (int c = 0; c < kSlots; ++c) {
                available[c] = (bit[c] & toward) != 0 ? (level == 1 ? min(x[c], room[c]) : x[c]) : 0;
                before[c] = so_far;
                so_far += available[c];
            }
#pragma unroll 1
            for (int step = levels; step >= 1; --step) {
                const int excess = level == step ? load - bound : 0;
                int given[kSlots];
#pragma unroll
                for (int c = 0; c < kSlots; ++c) {
                    given[c] = min(max(excess - before[c], 0), available[c]);
                }
#pragma unroll
                for (int c = 0; c < kSlots; ++c) {
                    const int change = __shfl_sync(kFullWarp, given[c], partner[c]) - given[c];
                    x[c] += change;
                    load += change;
                }
            }
            if constexpr (kLate) spill(bound, level);
        }
    }

    // After the wave: what ranks of level 1 have above the bound flows on through the ranks of level 0, each of which keeps what it lacks.
    __device__ __forceinline__ void spill(int bound, int level) {
        bool gives = level == 1 && load > bound;
        unsigned takers = __ballot_sync(kFullWarp, level == 0);
#pragma unroll 1
        do {
            int rest = gives ? load - bound : 0;
            int given[kSlots];
#pragma unroll
            for (int c = 0; c < kSlots; ++c) {
                const int lacks = max(bound - __shfl_sync(kFullWarp, load, partner[c]), 0);
                given[c] = (bit[c] & takers) != 0 ? min(rest, min(x[c], lacks)) : 0;
                rest -= given[c];
            }
#pragma unroll
            for (int c = 0; c < kSlots; ++c) {
                const int more = (bit[c] & takers) != 0 ? min(rest, x[c] - given[c]) : 0;
                given[c] += more;
                rest -= more;
            }
#pragma unroll
            for (int c = 0; c < kSlots; ++c) {
                const int change = __shfl_sync(kFullWarp, given[c], partner[c]) - given[c];
                x[c] += change;
                load += change;
            }
            gives = (takers >> lane_id() & 1) != 0 && load > bound;
            takers &= ~__ballot_sync(kFullWarp, gives);
        } while (__any_sync(kFullWarp, gives));
    }
};

}  // namespace lplb
