// The tables of a planner (tables.h) as the kernels read them.
#pragma once

#include "../common.cuh"

namespace lplb {

// One expert's entry.
struct Expert {
    int4 word;
    __device__ int id() const { return word.x; }
    __device__ bool bundled() const { return word.y >= 0; }
    __device__ int bundle() const { return word.y; }        // over all groups; if bundled
    __device__ int rank() const { return -1 - word.y; }     // in EP; if not
    __device__ int slot() const { return word.z & 0xffff; }
    __device__ int copy_slot() const { return (int)((unsigned)word.z >> 16); }
    __device__ int slot_class() const { return word.w; }
};

// All tables; an argument of the kernels.
struct Tables {
    lplbk_shape shape;
    lplbk_layout at;
    const int *words;
    int group_experts;  // experts of each group; 0: the groups differ, see their images

    explicit Tables(const lplbk_planner &planner)
        : shape(planner.shape),
          at(planner.layout),
          words(planner.tables),
          group_experts(shape.n_groups == 1 || shape.n_redundant > 0 ? shape.n_logical / shape.n_groups : 0) {}

    __device__ int code(int expert) const { return words[at.code + expert]; }
    __device__ int n_bundled() const { return words[at.n_bundled]; }
    __device__ int n_replicated() const { return words[at.n_replicated]; }
    __device__ Expert replicated(int i) const { return {reinterpret_cast<const int4 *>(words + at.replicated)[i]}; }
    __device__ Expert expert(int i) const { return {reinterpret_cast<const int4 *>(words + at.expert)[i]}; }
    __device__ const int *image(int group) const { return words + at.image + (int64_t)group * at.image_words; }
    // Read before the stream's turn comes, like all tables.
    __device__ bool ranked() const { return words[at.ranked] != 0; }
    __device__ const int *speed(int group) const { return words + at.speed + group * shape.group_size; }
    __device__ const int *fixed(int group) const { return words + at.fixed + group * shape.group_size; }

    // Units of an expert with so many tokens, and its tokens in the first so many units.
    __device__ bool in_tokens() const { return shape.unit <= 1; }
    __device__ __forceinline__ int units(int tokens) const {
        if (in_tokens()) return tokens;
        return (int)__umul64hi((uint64_t)((unsigned)tokens + (unsigned)(shape.unit - 1)), shape.unit_inverse);  // exact below 2^32
    }
    __device__ __forceinline__ int tokens_in(int units, int tokens) const {
        return (int)min((unsigned)units * (unsigned)shape.unit, (unsigned)tokens);  // units * unit < tokens + unit
    }
    __host__ __device__ int n_local() const { return shape.n_physical / shape.ep_size; }
    // Experts that can be replicated under some placement; at least 1, so that arrays are not empty.
    __host__ __device__ int max_replicated() const { return max_replicated(shape); }
    __host__ __device__ static int max_replicated(const lplbk_shape &shape) {
        const int copies = shape.n_physical - shape.n_logical;
        return copies < 1 ? 1 : copies < shape.n_logical ? copies : shape.n_logical;
    }
};

// The experts of a group, as a part of the table of all.
struct GroupExperts {
    int first, n;
    // alike: all groups have as many.
    __device__ GroupExperts(const Tables &t, int group, bool alike) : first(group * t.group_experts), n(t.group_experts) {
        if (alike || n > 0) return;
        first = t.image(group)[LPLBK_IMAGE_FIRST_EXPERT];
        n = t.image(group)[LPLBK_IMAGE_EXPERTS];
    }
};

// A group's image.
struct Image {
    const int *header;
    const int *lanes;
    const int *rank_start;
    const unsigned *rank_arc;
    const int *arc_rank;
    const int *arc_slot;
    const int *bundle_start;
    const unsigned *mask;

    __device__ Image(const int *image, const lplbk_layout &at)
        : header(image),
          lanes(image + at.lanes),
          rank_start(image + at.rank_start),
          rank_arc(reinterpret_cast<const unsigned *>(image + at.rank_arc)),
          arc_rank(image + at.arc_rank),
          arc_slot(image + at.arc_slot),
          bundle_start(image + at.bundle_start),
          mask(reinterpret_cast<const unsigned *>(image + at.mask)) {}

    __device__ int n_bundles() const { return header[LPLBK_IMAGE_BUNDLES]; }
    __device__ int n_arcs() const { return header[LPLBK_IMAGE_ARCS]; }
    __device__ int n_colours() const { return header[LPLBK_IMAGE_COLOURS]; }
    __device__ bool pairs() const { return header[LPLBK_IMAGE_PAIRS] != 0; }
    __device__ int colour_start(int colour) const { return header[LPLBK_IMAGE_COLOUR + colour]; }
    __device__ int slot(int arc) const { return arc_slot[arc] & 0x7fffffff; }
    __device__ bool first_place(int arc) const { return arc_slot[arc] >= 0; }

    // This lane's column of `lanes`.
    template <int kColours>
    __device__ __forceinline__ void load_lanes(int (&column)[kColours]) const {
#pragma unroll
        for (int c = 0; c < kColours; ++c) column[c] = lanes[32 * c + lane_id()];
    }
};

// One entry of rank_arc.
struct ArcEntry {
    unsigned word;
    __device__ int arc() const { return word & 0x1fff; }
    __device__ int bundle() const { return word >> 13 & 0x3ffff; }
    __device__ bool flipped() const { return word >> 31 != 0; }
};

}  // namespace lplb
