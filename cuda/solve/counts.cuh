// The counts that a plan is made for.
#pragma once

#include "../common.cuh"

namespace lplb {

// [n_sources][width], of which the first n_logical of each source count; what is behind them is its digest. kAnyWidth: the counts are int64
// if `wide`; otherwise they are always int32.
template <bool kAnyWidth>
struct CountMatrix {
    const int32_t *counts;
    int n_sources, n_logical, width;
    int wide;

    // One source's count of an expert on its way: nothing waits for it before it is looked at.
    struct Coming {
        int32_t narrow;
        int64_t broad;
    };
    __device__ __forceinline__ Coming fetch(int expert) const {
        Coming count;
        if (wide) {
            count.broad = reinterpret_cast<const int64_t *>(counts)[expert];
        } else {
            count.narrow = counts[expert];
        }
        return count;
    }
    __device__ __forceinline__ int64_t total(const Coming &count) const { return wide ? cut(count.broad) : cut(count.narrow); }

    // Tokens of an expert. Each count is cut at 2^40, far beyond what a solve takes, so that no sum leaves 64 bits. kMany: there may be
    // several sources.
    template <bool kMany>
    __device__ __forceinline__ int64_t total(int expert) const {
        if constexpr (kAnyWidth) {
            if (wide) return sum<kMany>(reinterpret_cast<const int64_t *>(counts) + expert);
        }
        return sum<kMany>(counts + expert);
    }
    __device__ __forceinline__ int of(int source, int expert) const {
        const int64_t at = (int64_t)source * width + expert;
        if constexpr (kAnyWidth) {
            if (wide) return (int)cut(reinterpret_cast<const int64_t *>(counts)[at]);
        }
        return (int)cut(counts[at]);
    }

private:
    template <bool kMany, class Count>
    __device__ __forceinline__ int64_t sum(const Count *at) const {
        if (!kMany) return cut(*at);
        int64_t sum = 0;
#pragma unroll 8
        for (int s = 0; s < n_sources; ++s, at += width) sum += cut(*at);
        return sum;
    }
    __device__ static int64_t cut(int32_t count) { return max(count, 0); }
    __device__ static int64_t cut(int64_t count) { return max(min(count, (int64_t)1 << 40), (int64_t)0); }
};

}  // namespace lplb
