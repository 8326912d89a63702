// The memory of a solve of one group: its tables, copied into shared memory, and its working arrays.
#pragma once

#include "common.cuh"

namespace lplb {

// A group's image (kernels.h) in shared memory.
struct FlowTables {
    const int *header;
    const int *rank_start;
    const unsigned *rank_arc;
    const int *arc_rank;
    const int *arc_slot;
    const int *bundle_start;
    const unsigned *mask;

    __device__ FlowTables(const int *image, const lplbk_layout &at)
        : header(image),
          rank_start(image + at.rank_start),
          rank_arc(reinterpret_cast<const unsigned *>(image + at.rank_arc)),
          arc_rank(image + at.arc_rank),
          arc_slot(image + at.arc_slot),
          bundle_start(image + at.bundle_start),
          mask(reinterpret_cast<const unsigned *>(image + at.mask)) {}

    __device__ int n_bundles() const { return header[LPLBK_IMAGE_BUNDLES]; }
    __device__ int n_arcs() const { return header[LPLBK_IMAGE_ARCS]; }
    __device__ int n_colours() const { return header[LPLBK_IMAGE_COLOURS]; }
    __device__ int colour_start(int colour) const { return header[LPLBK_IMAGE_COLOUR + colour]; }
};

// One entry of rank_arc.
struct ArcEntry {
    unsigned word;
    __device__ int arc() const { return word & 0x1fff; }
    __device__ int bundle() const { return word >> 13 & 0x3ffff; }
    __device__ bool flipped() const { return word >> 31 != 0; }
};

constexpr int kMaskWarps = 8;  // that run MaskFlow

// Working arrays of a group, in words of shared memory. ranks: rounded up to whole warps.
struct FlowSpace {
    int *words;     // [64] exchange between warps, in MaskFlow the loads; 16-byte aligned
    int *base;      // [ranks] tokens of single places
    int *load;      // [ranks]
    int *received;  // ScanFlow: [2][ranks] in odd and even steps; MaskFlow: [2] RoundSums of odd and even rounds
    int *sum;       // [bundles] tokens of the bundle
    int *x;         // [arcs] tokens of a bundle on a rank
    int *extra;     // MaskFlow: a word a thread; ScanFlow: [ranks] level and [bundles] level

    __host__ __device__ static int ranks(int group_size) { return round_up(group_size, 32); }
    // MaskFlow's RoundSums: received, given and a set for each rank, two words for each bundle.
    __host__ __device__ static int round_words(int ranks, int bundles) { return (2 + ranks / 32) * ranks + 2 * bundles; }
    __host__ __device__ static int received_words(const lplbk_shape &shape) {
        const int n = ranks(shape.group_size);
        return 2 * (shape.group_size <= 64 ? round_words(n, shape.max_bundles) : n);
    }
    __host__ __device__ static int cleared_words(const lplbk_shape &shape) {
        return 64 + 2 * ranks(shape.group_size) + received_words(shape) + shape.max_bundles;
    }
    __host__ __device__ static int words_of(const lplbk_shape &shape) {
        const int n = ranks(shape.group_size);
        return cleared_words(shape) + shape.max_arcs + (shape.group_size <= 64 ? 32 * kMaskWarps : n + shape.max_bundles);
    }

    // memory: 16-byte aligned. The first cleared_words() are to be zero.
    __device__ FlowSpace(int *memory, const lplbk_shape &shape) {
        const int n = ranks(shape.group_size);
        words = memory;
        base = words + 64;
        load = base + n;
        received = load + n;
        sum = received + received_words(shape);
        x = sum + shape.max_bundles;
        extra = x + shape.max_arcs;
    }
};

// The even split, by all threads of the block: x, and load = the arcs' tokens on each rank (base not yet added). Starts with cleared loads.
__device__ __forceinline__ void split_evenly(const FlowTables &tables, const FlowSpace &space) {
    const int n_arcs = tables.n_arcs();
#pragma unroll 1
    for (int i = threadIdx.x; i < n_arcs; i += blockDim.x) {
        const ArcEntry entry{tables.rank_arc[i]};
        const int start = tables.bundle_start[entry.bundle()];
        const unsigned degree = tables.bundle_start[entry.bundle() + 1] - start;
        const unsigned sum = space.sum[entry.bundle()];
        const unsigned share = sum / degree;
        const int tokens = (int)(share + ((unsigned)(entry.arc() - start) < sum - share * degree ? 1u : 0u));
        space.x[entry.arc()] = tokens;
        atomicAdd(&space.load[tables.arc_rank[entry.arc()]], tokens);
    }
}

// One colour of a sweep: evens out the two ranks of each bundle. By the threads first, first + step, ..
__device__ __forceinline__ void sweep_colour(const FlowTables &tables, const FlowSpace &space, int colour, int first, int step) {
    const int end = tables.colour_start(colour + 1);
#pragma unroll 1
    for (int bundle = tables.colour_start(colour) + first; bundle < end; bundle += step) {
        const int arc = tables.bundle_start[bundle];
        const int u = tables.arc_rank[arc], v = tables.arc_rank[arc + 1];
        const int x = space.x[arc];
        const int sum = space.sum[bundle];
        const int difference = space.load[u] - space.load[v];
        const int moved = max(min(difference / 2, x), x - sum);
        space.x[arc] = x - moved;
        space.x[arc + 1] = sum - x + moved;
        space.load[u] -= moved;
        space.load[v] += moved;
    }
}

}  // namespace lplb
