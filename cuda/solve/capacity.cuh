// Capacity: what a rank may hold at level T, and the level that a set of ranks forces. The solvers compare loads with T by these alone, so
// that a rank's cost is known here and in Sources/LPLBSolver/Capacity.swift, and nowhere else.
#pragma once

#include "../common.cuh"

namespace lplb {

struct Capacity {
    int level;  // T

    __device__ __forceinline__ bool over(int /*rank*/, int load) const { return load > level; }
    __device__ __forceinline__ bool under(int /*rank*/, int load) const { return load < level; }
    // What the rank lacks to T; below 0: its excess.
    __device__ __forceinline__ int room(int /*rank*/, int load) const { return level - load; }
    // The load of a rank that is left with this excess.
    __device__ __forceinline__ int full(int /*rank*/, int excess) const { return level + excess; }

    // The least T at which so many ranks hold so many tokens: ceil(tokens / n_ranks) for 0 <= tokens < 2^31, 0 < n_ranks < 2^16, in unsigned,
    // since the sum below may pass 2^31.
    __device__ static __forceinline__ int forced(int tokens, int n_ranks) {
        return (int)(((unsigned)tokens + (unsigned)n_ranks - 1u) / (unsigned)n_ranks);
    }

    // What a rank gives to another one in a sweep, rounded toward zero; both ends see it with opposite signs.
    __device__ static __forceinline__ int evened(int load, int other_load) { return (load - other_load) / 2; }
};

// Capacity::forced() for many sums of one number of ranks, at most 2^10. Made before the hurry starts.
class ForcedByAll {
public:
    ForcedByAll() = default;
    __device__ explicit ForcedByAll(unsigned ranks) : ranks_(ranks), inverse_(0xffffffffu / ranks) {}
    __device__ __forceinline__ int operator()(int tokens) const {
        const unsigned a = (unsigned)tokens + ranks_ - 1;
        unsigned mean = __umulhi(a, inverse_);  // at most 2 too low
        unsigned rest = a - mean * ranks_;
        if (rest >= ranks_) ++mean, rest -= ranks_;
        if (rest >= ranks_) ++mean;
        return (int)mean;
    }

private:
    unsigned ranks_, inverse_;
};

// What a solve of a group leaves behind, the same in all threads.
struct FlowEnd : Capacity {  // level: the bound
    int rounds;
    int certified;
    int witness_size;
};

}  // namespace lplb
