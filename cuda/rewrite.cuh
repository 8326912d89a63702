// What rewriting kernels share: the tables of a block in shared memory, and where the occurrences of an expert go by the plan.
#pragma once

#include "ids.cuh"
#include "multi.cuh"
#include "solve/tables.cuh"

namespace lplb {

constexpr int kRewriteThreads = 512;
constexpr int kRewriteWarps = kRewriteThreads / 32;

// Shared memory of a rewriting block.
struct RewriteSpace {
    int *code;        // [n_logical]
    int2 *range;      // [max_replicated] first cut and one past the last
    int2 *cut;        // [n_physical] places: tokens up to and with it, slot
    unsigned *base;   // [max_replicated] occurrences before the tile
    unsigned *counts; // [kRewriteWarps][counter_words(max_replicated)]
    int *totals;      // [max_replicated] occurrences in the block, for blocks of a cluster
    int row_words;

    static __host__ __device__ int words_of(const lplbk_shape &shape) {
        const int n = Tables::max_replicated(shape);
        return round_up(shape.n_logical, 2) + 2 * n + 2 * shape.n_physical + n + kRewriteWarps * counter_words(n) + n;
    }
    __device__ RewriteSpace(int *memory, const Tables &t) {
        code = memory;
        range = reinterpret_cast<int2 *>(memory + round_up(t.shape.n_logical, 2));
        cut = range + t.max_replicated();
        base = reinterpret_cast<unsigned *>(cut + t.shape.n_physical);
        row_words = counter_words(t.max_replicated());
        counts = base + t.max_replicated();
        totals = reinterpret_cast<int *>(counts + kRewriteWarps * row_words);
    }

    // Counts of the block's warps -> occurrences before each warp; returns those of expert i in all of them.
    __device__ unsigned number_warps(int i) const {
        uint16_t *const column = reinterpret_cast<uint16_t *>(counts) + i;
        unsigned count[kRewriteWarps];
#pragma unroll
        for (int w = 0; w < kRewriteWarps; ++w) count[w] = column[2 * w * row_words];
        unsigned sum = 0;
#pragma unroll
        for (int w = 0; w < kRewriteWarps; ++w) {
            column[2 * w * row_words] = (uint16_t)sum;
            sum += count[w];
        }
        return sum;
    }
    // Where occurrence `number` of replicated expert i goes.
    __device__ int slot_of(int i, int64_t number) const {
        const int2 places = range[i];
        for (int p = places.x; p < places.y; ++p) {
            if (number < cut[p].x) return cut[p].y;
        }
        return cut[places.x].y;
    }
};

// Where the occurrences of a replicated expert go, in two steps: its places, which need the tables alone, and how many go to each.
struct ByPlan {
    const int32_t *take;  // [n_physical]

    // Writes the slots of the places of replicated expert i to its cuts and returns the range of them.
    __device__ int2 places(const Tables &t, int i, int2 *cut) const {
        const Expert expert = t.replicated(i);
        if (!expert.bundled()) {
            cut[2 * i].y = expert.slot();
            return make_int2(2 * i, 2 * i + 1);
        }
        if (t.shape.n_redundant > 0) {  // the expert knows its two places
            cut[2 * i].y = expert.slot();
            cut[2 * i + 1].y = expert.copy_slot();
            return make_int2(2 * i, 2 * i + 2);
        }
        const int group = expert.bundle() / t.shape.max_bundles, bundle = expert.bundle() - group * t.shape.max_bundles;
        const Image image(t.image(group), t.at);
        const int first = image.bundle_start[bundle], n = image.bundle_start[bundle + 1] - first;
        // Arcs and pairs of replicated experts are never more than slots.
        const int start = group * t.shape.max_arcs + first;
#pragma unroll 4
        for (int j = 0; j < n; ++j) cut[start + j].y = image.slot(first + j);
        return make_int2(start, start + n);
    }
    // Writes how many occurrences go to the places up to and with each.
    __device__ void cuts(const Tables &, int, const int2 &range, int2 *cut) const {
        int sum = 0;
#pragma unroll 4
        for (int p = range.x; p < range.y; ++p) {
            sum += take[cut[p].y];
            cut[p].x = sum;
        }
    }
};

}  // namespace lplb
