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

    // The least T at which so many ranks hold so many tokens.
    __device__ static __forceinline__ int forced(int tokens, int n_ranks) { return ceil_share(tokens, n_ranks); }

    // What a rank gives to another one in a sweep, rounded toward zero; both ends see it with opposite signs.
    __device__ static __forceinline__ int evened(int load, int other_load) { return (load - other_load) / 2; }
};

// What a solve of a group leaves behind, the same in all threads.
struct FlowEnd : Capacity {  // level: the bound
    int rounds;
    int certified;
    int witness_size;
};

}  // namespace lplb
