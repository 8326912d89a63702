// What one launch of the whole plan is given, and the shared memory of its blocks.
#pragma once

#include "ids.cuh"
#include "metrics.cuh"
#include "solve/solvers.cuh"

namespace lplb {

constexpr int kRunThreads = 512;
constexpr int kRunWarps = kRunThreads / 32;
constexpr int kMaxSolvers = 8;  // warps that solve; the others number and rewrite ids meanwhile
static_assert(kMaxSolvers < kRunWarps && kMaskWarps < kRunWarps, "somebody must rewrite the ids");
constexpr int kMaxGroups = 4 * kMaxSolvers;
static_assert(kMaxGroups <= 32, "a set of groups is a word");
constexpr int kMaxPerBlock = 1 << 14;  // ids; counters have 16 bits

struct RunIds {
    int64_t n;
    int per_block;  // a multiple of 32
    int wide;       // 1: they are int64
    InvalidIds invalid;
};

// A queued id: its place in the block's part, and which occurrence of its expert in the warp's part it is.
struct Queued {
    unsigned word;
    __device__ unsigned place() const { return word & (kMaxPerBlock - 1); }
    __device__ unsigned number() const { return word / kMaxPerBlock; }
    __device__ static unsigned of(unsigned place, unsigned number) { return place | number * kMaxPerBlock; }
};

// Shared memory of a block behind SolveSpace, in words from the start.
struct RunSpace {
    // code [n_logical] and rank_of [n_logical] (16 bits): slot and rank of a single place, or which bundled expert it is.
    // cut: LaneFlow: [max_replicated][4] tokens at the first place, at both, their slots; else by arc, tokens taken from it.
    // bundle [max_replicated]: LaneFlow's, of a bundled expert. before: occurrences in earlier blocks.
    // counts [n_logical] of this block; packed: the same in 16 bits. block_loads [n_ranks + max_replicated]; all_loads: those of all
    // blocks. totals [n_logical] with an exchange, and behind them the digest, or with
    // units of several tokens. With an exchange: everyone [sources][n_logical].
    int code, rank_of, cut, bundle, counts, block_loads, packed, warp_counts, all_loads, before, queue, ids, totals, everyone, words;

    // n_sources: ranks whose counts are exchanged, 0: none are.
    __host__ __device__ RunSpace(const lplbk_shape &shape, const lplbk_layout &at, bool lanes, int n_blocks, int per_block, int n_sources) {
        const int n_logical = shape.n_logical, max_replicated = Tables::max_replicated(shape);
        int end = SolveSpace::words_of(shape, at, lanes, shape.n_groups, max_replicated);
        const auto section = [&end](int words) {
            const int start = end;
            end += round_up(words, 4);
            return start;
        };
        code = section(n_logical);
        rank_of = section(counter_words(n_logical));
        cut = section(lanes ? 4 * max_replicated : shape.max_arcs);
        bundle = section(lanes ? max_replicated : 0);
        counts = section(n_logical);
        block_loads = section(shape.ep_size + max_replicated);
        warp_counts = section(kRunWarps * counter_words(max_replicated));
        packed = section(counter_words(n_logical));
        all_loads = section(n_blocks * round_up(shape.ep_size + max_replicated, 4));
        before = section(max_replicated);
        queue = section(per_block);
        ids = section(per_block / 2);
        totals = section(n_sources > 0 || shape.unit > 1 ? n_logical + 1 : 0);
        everyone = section(n_sources * n_logical);
        words = end;
    }
};

}  // namespace lplb
