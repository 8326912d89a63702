// The flow algorithm for groups of more than 64 ranks: the whole block, one thread a rank, levels and tokens in shared memory. Built for
// reach, not for the last microsecond. The rule is that of Sources/LPLBSolver/FlowSolver.swift.
#pragma once

#include "space.cuh"

namespace lplb {

template <class Cap = Capacity>
class ScanFlow {
public:
    FlowEndOf<Cap> end;
    bool in_witness;  // this thread's rank
    int load;         // of this thread's rank
    int total;        // of all ranks

    __device__ ScanFlow(const Image &tables, const FlowSpace &space, const lplbk_shape &shape)
        : t_(tables),
          s_(space),
          n_ranks_(shape.group_size),
          rank_(threadIdx.x),
          valid_(threadIdx.x < shape.group_size),
          first_(valid_ ? tables.rank_start[rank_] : 0),
          last_(valid_ ? tables.rank_start[rank_ + 1] : 0),
          level_of_(space.extra),
          bundle_level_(space.extra + FlowSpace::ranks(shape.group_size)) {}

    // By all threads of the block, at least one a rank, after split_evenly() and a barrier.
    __device__ void solve() {
        const int base = valid_ ? s_.base[rank_] : 0;
        load = valid_ ? base + s_.load[rank_] : 0;
        total = across(load, false);
        in_witness = valid_;
        end.witness_size = n_ranks_;
        if constexpr (Cap::kRanked) {
            begin_ranked(base);
        } else {
            const int highest_base = across(base, true);
            end.level = Capacity::forced(total, n_ranks_);
            if (highest_base > end.level) {
                end.level = highest_base;
                witness_is_first(valid_ && base == highest_base);
            }
        }
        end.rounds = 0;
        end.certified = 1;
        const int n_colours = t_.n_colours();
        if (n_colours > 0) {
            for (int sweep = 0; sweep < 2; ++sweep) {
                if (!__syncthreads_or(valid_ && end.over(rank_, load))) return;
                if (valid_) s_.load[rank_] = load;
                __syncthreads();
                for (int colour = 0; colour < n_colours; ++colour) {
                    sweep_colour(end, t_, s_, colour, threadIdx.x, blockDim.x);
                    __syncthreads();
                }
                if (valid_) load = s_.load[rank_];
            }
        }
        rounds();
    }

    // Of all ranks. By the same threads as solve().
    __device__ int max_load() { return across(valid_ ? load : 0, true); }

private:
    static constexpr int kJoined = 32;  // word of s_.words: searched_ at the latest level that a rank joined; across() uses those before it

    const Image &t_;
    const FlowSpace &s_;
    const int n_ranks_;
    const int rank_;
    const bool valid_;
    const int first_, last_;  // of its arcs
    int searched_ = 0;        // levels of all searches so far
    int *level_of_;
    int *bundle_level_;

    __device__ int across(int value, bool highest) {
        const int n_warps = blockDim.x / 32;
        value = highest ? warp_max(value) : warp_sum(value);
        if (lane_id() == 0) s_.words[warp_id()] = value;
        __syncthreads();
        int joined = lane_id() < n_warps ? s_.words[lane_id()] : 0;  // values are never negative
        joined = highest ? warp_max(joined) : warp_sum(joined);
        __syncthreads();
        return joined;
    }

    __device__ void witness_is_first(bool chosen) {
        in_witness = rank_ == n_ranks_ - across(chosen ? n_ranks_ - rank_ : 0, true);
        end.witness_size = 1;
    }

    // The first level where the ranks differ.
    __device__ void begin_ranked(int base) {
        const auto max_of = [&](int value) { return across(value, true); };
        const auto sum = [&](int value) { return across(value, false); };
        end.open(
            *s_.differ != 0, [&](int r) { return s_.speed[r]; }, [&](int r) { return s_.fixed[r]; }, n_ranks_, rank_, s_.caps,
            true, max_of, sum);
        end.begin(total, n_ranks_, sum);
        const bool over = valid_ && end.over(rank_, base);
        if (!__syncthreads_or(over)) return;
        const int64_t level = over ? end.level_of(base, 0) : 0, highest = Cap::highest(level, max_of);
        witness_is_first(over && level == highest);
        end.set(highest);
    }

    __device__ void rounds() {
        const int n_bundles = t_.n_bundles(), max_rounds = lplbk_max_rounds(n_ranks_);
        for (;;) {
            const bool over = valid_ && end.over(rank_, load);
            // This barrier also ends the reading of loads and levels of the round before.
            if (!__syncthreads_or(over)) break;
            if (end.rounds == max_rounds) {
                end.certified = 0;
                break;
            }
            ++end.rounds;
            for (int bundle = threadIdx.x; bundle < n_bundles; bundle += blockDim.x) bundle_level_[bundle] = INT32_MAX;
            int level = valid_ && end.under(rank_, load) ? 0 : -1;
            if (valid_) {
                s_.load[rank_] = load;
                level_of_[rank_] = level;
            }
            __syncthreads();
            bool cut = false;
            const int levels = search(over, level, cut);
            if (cut && (end.rounds <= LPLBK_PLAIN_ROUNDS || !__syncthreads_or(over && level >= 0))) {
                in_witness = valid_ && level < 0;
                const int held = across(in_witness ? load : 0, false);
                end.witness_size = __syncthreads_count(in_witness);
                end.raise(held, [&](int) { return in_witness; }, end.witness_size, [&](int value) { return across(value, false); });
                continue;
            }
            for (int step = levels; step >= 1; --step) {
                int *received = s_.received + (step & 1) * FlowSpace::ranks(n_ranks_);
                if (level == step && end.over(rank_, load)) give(step - 1, step == 1, received);
                __syncthreads();
                if (valid_) {
                    load += received[rank_];
                    received[rank_] = 0;
                }
            }
            if (end.rounds > LPLBK_PLAIN_ROUNDS) spill(level);
        }
    }

    // Levels of the ranks, from those of level 0 on, until no rank above the bound (`over`) is without; cut: some are left. Returns the
    // last level.
    __device__ int search(bool over, int &level, bool &cut) {
        for (int levels = 0;; ++levels) {
            if (level == levels) {
                for (int i = first_; i < last_; ++i) atomicMin(&bundle_level_[ArcEntry{t_.rank_arc[i]}.bundle()], levels);
            }
            __syncthreads();
            bool joins = false;
            if (level < 0) {
                for (int i = first_; i < last_ && !joins; ++i) {
                    const ArcEntry entry{t_.rank_arc[i]};
                    joins = bundle_level_[entry.bundle()] == levels && s_.x[entry.arc()] > 0;
                }
            }
            if (joins) level_of_[rank_] = level = levels + 1;
            ++searched_;
            if (__any_sync(kFullWarp, joins) && lane_id() == 0) atomicMax(&s_.words[kJoined], searched_);
            const bool waiting = __syncthreads_or(over && level < 0);
            cut = s_.words[kJoined] != searched_;
            if (cut) return levels;
            if (!waiting) return levels + 1;
        }
    }

    // After the wave: what ranks of level 1 have above the bound flows on through the ranks of level 0, each of which keeps what it lacks.
    // From here on level 0 in shared memory says that a rank can still receive.
    __device__ void spill(int level) {
        bool gives = level == 1 && end.over(rank_, load), takes = valid_ && level == 0;
        int *received = s_.received;
        if (takes) s_.load[rank_] = load;
        __syncthreads();
        do {
            if (gives) {
                give(0, true, received);
                if (end.over(rank_, load)) give(0, false, received);
            }
            __syncthreads();
            gives = false;
            if (takes) {
                load += received[rank_];
                received[rank_] = 0;
                s_.load[rank_] = load;
                gives = end.over(rank_, load);
            }
            if (gives) {
                takes = false;
                level_of_[rank_] = -1;
            }
        } while (__syncthreads_or(gives));
    }

    // Gives what this rank has above the bound to ranks of the level `target`, one nearer, arc by arc; capped: no more than they lacked
    // at the beginning of the step, from each arc on its own.
    __device__ void give(int target, bool capped, int *received) {
        int excess = -end.room(rank_, load);
        for (int i = first_; i < last_ && excess > 0; ++i) {
            const ArcEntry entry{t_.rank_arc[i]};
            // A bundle that tokens can still come through has no rank nearer than the level it was first met at.
            if (bundle_level_[entry.bundle()] != target) continue;
            int tokens = s_.x[entry.arc()];
            if (tokens <= 0) continue;
            const int arcs_end = t_.bundle_start[entry.bundle() + 1];
            for (int arc = t_.bundle_start[entry.bundle()]; arc < arcs_end && tokens > 0 && excess > 0; ++arc) {
                const int q = t_.arc_rank[arc];
                if (level_of_[q] != target) continue;
                const int amount = min(min(excess, tokens), capped ? max(end.room_at(q, s_.load[q]), 0) : INT32_MAX);
                atomicAdd(&s_.x[arc], amount);
                atomicAdd(&received[q], amount);
                tokens -= amount;
                excess -= amount;
            }
            s_.x[entry.arc()] = tokens;
        }
        load = end.full(rank_, excess);
    }
};

}  // namespace lplb
