// A set of up to 64 ranks, in registers.
#pragma once

#include "../common.cuh"

namespace lplb {

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
    // Takes the lowest rank out; the set is not empty. position: how many of `all`, in which this set lies, are below that rank.
    __device__ __forceinline__ int pop(const Ranks &all, int &position) {
        if (kWords == 1 || word[0] != 0) {
            const unsigned below = (word[0] & -word[0]) - 1;
            word[0] &= word[0] - 1;
            position = __popc(all.word[0] & below);
            return __popc(below);
        }
        const unsigned below = (word[kWords - 1] & -word[kWords - 1]) - 1;
        word[kWords - 1] &= word[kWords - 1] - 1;
        position = __popc(all.word[0]) + __popc(all.word[kWords - 1] & below);
        return 32 + __popc(below);
    }
    __device__ void add(int rank) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) word[w] |= rank >> 5 == w ? 1u << (rank & 31) : 0u;
    }
    __device__ static Ranks none() {
        Ranks set;
#pragma unroll
        for (int w = 0; w < kWords; ++w) set.word[w] = 0;
        return set;
    }
};

}  // namespace lplb
