// From the tokens of a bundle's arcs to those of an expert's places.
#pragma once

#include "assign.cuh"
#include "space.cuh"

namespace lplb {

// floor(x * part / whole) for 0 <= x, part <= whole < 2^31, whole > 0; inverse: 1.0 / whole.
__device__ __forceinline__ int floor_part(int x, int part, int whole, double inverse) {
    const int64_t product = (int64_t)x * part;
    int64_t share = (int64_t)((double)product * inverse);
    const int64_t rest = product - share * whole;
    if (rest < 0) --share;
    if (rest >= whole) ++share;
    return (int)share;
}

// Of x tokens that a bundle of `whole` tokens sends to its second place: the part of the expert that has `tokens`, `before` being those of
// the experts before it.
static __device__ __noinline__ int part_of(int x, int before, int tokens, int whole) {
    if (whole == 0) return 0;
    const double inverse = 1.0 / whole;
    return floor_part(x, before + tokens, whole, inverse) - floor_part(x, before, whole, inverse);
}

// Tokens of each place of a replicated expert.
struct Split {
    const int *x;        // of the bundle's arcs; nullptr: all tokens are at the first place
    int tokens, second;  // second: what goes to the second place where a bundle has several experts, else -1

    // Of expert i of `tokens`, in which the experts of the bundles come first, bundle by bundle. arcs: x of its bundle.
    __device__ static __forceinline__ Split of(const Tables &t, const Sums &sums, int bundle, const int *arcs, const int *tokens, int i,
                                               bool overflow) {
        if (overflow) return {nullptr, tokens[i], -1};
        int second = -1;
        if (t.shape.bundle_experts > 1) {
            int before = 0;
#pragma unroll 1
            for (int k = i - i % t.shape.bundle_experts; k < i; ++k) before += tokens[k];
            second = part_of(arcs[1], before, tokens[i], sums.sum[bundle]);
        }
        return {arcs, tokens[i], second};
    }
    __device__ int operator()(int j) const {
        if (x == nullptr) return j == 0 ? tokens : 0;
        if (second >= 0) return j == 0 ? tokens - second : second;
        return x[j];
    }
};

}  // namespace lplb
