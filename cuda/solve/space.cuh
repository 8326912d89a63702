// The shared memory of a block that solves: what it adds up, the same for every solver, and the working arrays of a solver of one group.
#pragma once

#include "capacity.cuh"
#include "tables.cuh"

namespace lplb {

// An exact sum of counts for the rare case that it may not fit 31 bits: high * 2^16 + low.
struct WideSum {
    int high, low, broken;

    __device__ void add(int64_t tokens) {
        if (tokens > INT32_MAX) atomicOr(&broken, 1);
        atomicAdd(&high, (int)(min(tokens, (int64_t)INT32_MAX) >> 16));
        atomicAdd(&low, (int)(tokens & 0xffff));
    }
    __device__ bool overflow() const { return broken != 0 || ((int64_t)high << 16) + low > INT32_MAX; }
};

// What is added up for n_groups groups. Ranks, bundles and arcs are counted from those of the first one.
struct Sums {
    WideSum *wide;     // by group; used only where kSurelyFits says no
    int *own;          // [3] see OwnTokens
    int *highest;      // tokens of the most loaded expert
    int *moved;
    int *base;         // by rank: tokens of the experts whose only place is there
    int *sum;          // by bundle: tokens
    int *x;            // by arc: tokens. LaneFlow: by place, two a bundle
    int *end;

    __host__ __device__ static int cleared_words(const lplbk_shape &shape, int n_groups) {
        return round_up(3 * n_groups + 5, 4) + n_groups * (shape.group_size + shape.max_bundles);
    }
    // A multiple of 4.
    __host__ __device__ static int words_of(const lplbk_shape &shape, int n_groups) {
        return round_up(cleared_words(shape, n_groups) + n_groups * shape.max_arcs, 4);
    }
    // memory: 16-byte aligned.
    __device__ Sums(int *memory, const lplbk_shape &shape, int n_groups) {
        wide = reinterpret_cast<WideSum *>(memory);
        own = memory + 3 * n_groups;
        highest = own + 3;
        moved = highest + 1;
        base = memory + round_up(3 * n_groups + 5, 4);
        sum = base + n_groups * shape.group_size;
        x = memory + cleared_words(shape, n_groups);
        end = memory + words_of(shape, n_groups);
    }
    // What a group's information gets last, LPLBK_INFO_MOVED (LaneFlow knows it before) and _OWN_RANK .. where the planner has a rank; else 0.
    __device__ __forceinline__ int late_word(int word, bool lanes, int rank) const {
        if (word == LPLBK_INFO_MOVED && !lanes) return *moved;
        return rank >= 0 && word >= LPLBK_INFO_OWN_RANK && word <= LPLBK_INFO_OTHER_NODES ? own[word - LPLBK_INFO_OWN_RANK] : 0;
    }
    // By the threads first, first + stride, ..
    __device__ void clear(const lplbk_shape &shape, int n_groups, int first, int stride) const {
        const int n = cleared_words(shape, n_groups);
#pragma unroll 1
        for (int i = first; i < n; i += stride) reinterpret_cast<int *>(wide)[i] = 0;
    }
};

constexpr int kMaskWarps = 8;  // that run MaskFlow

// Working arrays of MaskFlow, ScanFlow and InteriorPoint for one group, behind its image. ranks: rounded up to whole warps.
struct FlowSpace {
    const int *base;  // [group_size] ranks, bundles and arcs are those of the group
    const int *sum;
    int *x;
    int *words;     // [64] exchange between warps, in MaskFlow the loads; 16-byte aligned
    int *load;      // [ranks]
    int *received;  // ScanFlow: [2][ranks] in odd and even steps; MaskFlow: [2] RoundSums of odd and even rounds
    int *extra;     // MaskFlow: a word a thread; ScanFlow: [ranks] level and [bundles] level
    int *speed;     // [ranks] of the group, see RankedCapacity; set by SolveSpace::open_group
    int *fixed;     // [ranks]
    int *caps;      // [ranks]
    int *differ;    // [1] 1: the ranks differ
    int *end;

    __host__ __device__ static int ranks(int group_size) { return round_up(group_size, 32); }
    // MaskFlow's RoundSums: received, given and a set for each rank, two words for each bundle.
    __host__ __device__ static int round_words(int ranks, int bundles) { return (2 + ranks / 32) * ranks + 2 * bundles; }
    __host__ __device__ static int received_words(const lplbk_shape &shape) {
        const int n = ranks(shape.group_size);
        return 2 * (shape.group_size <= 64 ? round_words(n, shape.max_bundles) : n);
    }
    __host__ __device__ static int cleared_words(const lplbk_shape &shape) { return 64 + ranks(shape.group_size) + received_words(shape); }
    // A multiple of 4.
    __host__ __device__ static int words_of(const lplbk_shape &shape) {
        const int n = ranks(shape.group_size);
        return round_up(cleared_words(shape) + extra_words(shape) + 3 * n + 1, 4);
    }
    __host__ __device__ static int extra_words(const lplbk_shape &shape) {
        return shape.group_size <= 64 ? 32 * kMaskWarps : ranks(shape.group_size) + shape.max_bundles;
    }

    // memory: 16-byte aligned. The first cleared_words() are to be zero.
    __device__ FlowSpace(int *memory, const lplbk_shape &shape, const Sums &sums)
        : base(sums.base),
          sum(sums.sum),
          x(sums.x),
          words(memory),
          load(words + 64),
          received(load + ranks(shape.group_size)),
          extra(received + received_words(shape)),
          speed(extra + extra_words(shape)),
          fixed(speed + ranks(shape.group_size)),
          caps(fixed + ranks(shape.group_size)),
          differ(caps + ranks(shape.group_size)),
          end(memory + words_of(shape)) {}
};

// The even split, by all threads of the block: x, and load = the arcs' tokens on each rank (base not yet added). Starts with cleared loads.
__device__ __forceinline__ void split_evenly(const Image &image, const FlowSpace &space) {
    const int n_arcs = image.n_arcs();
#pragma unroll 1
    for (int i = threadIdx.x; i < n_arcs; i += blockDim.x) {
        const ArcEntry entry{image.rank_arc[i]};
        const int start = image.bundle_start[entry.bundle()];
        const unsigned degree = image.bundle_start[entry.bundle() + 1] - start;
        const unsigned sum = space.sum[entry.bundle()];
        const unsigned share = sum / degree;
        const int tokens = (int)(share + ((unsigned)(entry.arc() - start) < sum - share * degree ? 1u : 0u));
        space.x[entry.arc()] = tokens;
        atomicAdd(&space.load[image.arc_rank[entry.arc()]], tokens);
    }
}

// One colour of a sweep: evens out the two ranks of each bundle. By the threads first, first + step, ..
template <class Cap>
__device__ __forceinline__ void sweep_colour(const Cap &caps, const Image &image, const FlowSpace &space, int colour, int first, int step) {
    const int end = image.colour_start(colour + 1);
#pragma unroll 1
    for (int bundle = image.colour_start(colour) + first; bundle < end; bundle += step) {
        const int arc = image.bundle_start[bundle];
        const int u = image.arc_rank[arc], v = image.arc_rank[arc + 1];
        const int x = space.x[arc];
        const int sum = space.sum[bundle];
        const int evened = Cap::evened(caps.more_at(u, space.load[u]), caps.more_at(v, space.load[v]));
        const int moved = max(min(evened, x), x - sum);
        space.x[arc] = x - moved;
        space.x[arc + 1] = sum - x + moved;
        space.load[u] -= moved;
        space.load[v] += moved;
    }
}

}  // namespace lplb
