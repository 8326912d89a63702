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

// Units on the arcs of bundles of one expert become tokens: the last place that has any takes the unit that is not full. tokens: of the
// bundles' experts. By all threads of the block, between barriers.
__device__ __forceinline__ void arcs_to_tokens(const Tables &t, const Image &image, int *x, const int *tokens) {
    const int n_bundles = image.n_bundles();
#pragma unroll 1
    for (int bundle = threadIdx.x; bundle < n_bundles; bundle += blockDim.x) {
        int units = 0, before = 0;
        const int end = image.bundle_start[bundle + 1];
#pragma unroll 1
        for (int arc = image.bundle_start[bundle]; arc < end; ++arc) {
            units += x[arc];
            const int up_to = t.tokens_in(units, tokens[bundle]);
            x[arc] = up_to - before;
            before = up_to;
        }
    }
}

// Tokens of each place of a replicated expert.
struct Split {
    const int *x;        // of the bundle's arcs; nullptr: all tokens are at the first place
    int tokens, second;  // second: what goes to the second place where a bundle has several experts, else -1

    // Of expert i of `tokens`, in which the experts of the bundles come first, bundle by bundle. arcs: x of its bundle; in_units: they are
    // units, and there are two. (Of bundles of several experts they always are.)
    __device__ static __forceinline__ Split of(const Tables &t, const Sums &sums, int bundle, const int *arcs, const int *tokens, int i,
                                               bool in_units, bool overflow) {
        if (overflow) return {nullptr, tokens[i], -1};
        int second = -1;
        if (t.shape.bundle_experts > 1) {
            int before = 0;
#pragma unroll 1
            for (int k = i - i % t.shape.bundle_experts; k < i; ++k) before += t.units(tokens[k]);
            const int units = t.units(tokens[i]);
            second = part_of(arcs[1], before, units, sums.sum[bundle]);
            if (!t.in_tokens()) second = tokens[i] - t.tokens_in(units - second, tokens[i]);
        } else if (in_units && !t.in_tokens()) {
            second = tokens[i] - t.tokens_in(arcs[0], tokens[i]);
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
