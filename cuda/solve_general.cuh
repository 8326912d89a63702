// Solving any placement: a block a group; the block adds up loads and writes tokens, its first warps run MaskFlow (up to 64 ranks) or all
// of them ScanFlow or InteriorPoint.
#pragma once

#include "flow_ipm.cuh"
#include "flow_mask.cuh"
#include "flow_scan.cuh"
#include "solve_common.cuh"

namespace lplb {

// How a group is solved: by MaskFlow with that many words, by ScanFlow, by InteriorPoint.
enum General { kScan = 0, kOneWord = 1, kTwoWords = 2, kInterior = 3 };

struct GeneralTables {
    lplbk_shape shape;
    lplbk_layout at;
    const int *tables;
};

// One expert's record in the tables.
struct ExpertRecord {
    int4 word;
    __device__ int bundle() const { return word.x; }  // < 0: single place
    __device__ int rank() const { return -1 - word.x; }
    __device__ int places() const { return word.y & 0xffff; }
    __device__ int group() const { return word.y >> 16; }
    __device__ int first_place() const { return word.z; }
    __device__ int slot() const { return word.w; }
};

// Shared memory of a group: [16 words][image][FlowSpace][tokens].
struct GeneralSpace {
    int *start;
    WideSum *wide;
    int *own;      // [3]
    int *highest;
    int *moved;
    int *image;
    int *tokens;   // [n_logical]
    FlowTables tables;
    FlowSpace flow;

    __host__ __device__ static int words_of(const lplbk_shape &shape, const lplbk_layout &at) {
        return 16 + at.image_words + round_up(shape.n_logical, 4) + FlowSpace::words_of(shape);
    }
    // memory: 16-byte aligned.
    __device__ GeneralSpace(int *memory, const GeneralTables &t)
        : start(memory),
          wide(reinterpret_cast<WideSum *>(memory)),
          own(memory + 3),
          highest(memory + 6),
          moved(memory + 7),
          image(memory + 16),
          tokens(image + t.at.image_words),
          tables(image, t.at),
          flow(tokens + round_up(t.shape.n_logical, 4), t.shape) {}

    // Clears the working arrays and fetches the tables.
    __device__ void open(int *memory, const GeneralTables &t, int group) const {
        const int4 *from = reinterpret_cast<const int4 *>(t.tables + t.at.image + (int64_t)group * t.at.image_words);
#pragma unroll 2
        for (int i = threadIdx.x; i < t.at.image_words / 4; i += blockDim.x) reinterpret_cast<int4 *>(image)[i] = from[i];
        if (threadIdx.x < 16) memory[threadIdx.x] = 0;
        const int n = FlowSpace::cleared_words(t.shape);
#pragma unroll 1
        for (int i = threadIdx.x; i < n; i += blockDim.x) flow.words[i] = 0;
    }
};

__device__ __forceinline__ ExpertRecord record_of(const GeneralTables &t, int expert) {
    return {reinterpret_cast<const int4 *>(t.tables + t.at.expert)[expert]};
}
__device__ __forceinline__ int2 place_of(const GeneralTables &t, int place) {
    return reinterpret_cast<const int2 *>(t.tables + t.at.place)[place];
}

// The same by one warp, for a group that PairFlow takes. (Placements whose experts have two places at most are common, and twice as fast.)
__device__ __forceinline__ void solve_as_pairs(const GeneralTables &t, const GeneralSpace &space, int *info, bool ours, bool write) {
    constexpr int kSlots = LPLBK_MAX_COLOURS;
    int words[kSlots];
#pragma unroll
    for (int c = 0; c < kSlots; ++c) words[c] = space.image[t.at.pair_lanes + 32 * c + lane_id()];
    PairFlow<kSlots, true> flow;
    flow.open(words, t.shape.group_size);
    flow.solve(lane_id() < t.shape.group_size ? space.flow.base[lane_id()] : 0, space.flow.sum);
#pragma unroll
    for (int c = 0; c < kSlots; ++c) {
        if (flow.bit[c] != 0) space.flow.x[2 * flow.slot_class[c] + (flow.is_copy[c] ? 1 : 0)] = flow.x[c];
    }
    if (!write) return;
    const int max_load = warp_max(flow.load);
    flow.end.witness_size = __popc(flow.witness);
    const int value = lane_id() == LPLBK_INFO_WITNESS ? (int)flow.witness : info_word(lane_id(), max_load, flow.end, flow.total, 0);
    if (ours) info[lane_id()] = value;
}

// The space of InteriorPoint stands behind the general one.
__host__ __device__ inline int interior_words(const lplbk_shape &shape, const lplbk_layout &at) {
    return round_up(GeneralSpace::words_of(shape, at), 2) + 2 * (int)IpmSpace::doubles_of(shape);
}

// Writes a group's witness, one bit a thread; by the whole block.
__device__ __forceinline__ void write_witness(int *info, bool in_witness) {
    const unsigned witness = __ballot_sync(kFullWarp, in_witness);
    if (lane_id() == 0 && warp_id() < LPLBK_INFO_WORDS - LPLBK_INFO_WITNESS) info[LPLBK_INFO_WITNESS + warp_id()] = witness;
}

// Solves a group and writes its information. By the whole block, between barriers of the caller; ends without one.
template <int kGeneral>
__device__ __forceinline__ void solve_general_group(const GeneralTables &t, const GeneralSpace &space, int group, const PlanOut &out,
                                                    bool write) {
    const int n_ranks = t.shape.group_size;
    int *info = out.info(group);
    const int word = threadIdx.x;
    const bool ours = word != LPLBK_INFO_MOVED && (word < LPLBK_INFO_OWN_RANK || word > LPLBK_INFO_OTHER_NODES || out.rank < 0);
    if constexpr (kGeneral == kInterior) {
        double *memory = reinterpret_cast<double *>(space.start + round_up(GeneralSpace::words_of(t.shape, t.at), 2));
        const IpmSpace real(memory, t.shape);
        InteriorPoint method(space.tables, space.flow, real, n_ranks);
        method.solve();
        if (!write) return;
        if (word < LPLBK_INFO_WITNESS && ours) info[word] = info_word(word, method.max_load, method.end, method.total, 0);
        write_witness(info, method.in_witness);
        if (threadIdx.x == 0) out.count_solved();
        return;
    }
    if constexpr (kGeneral == kOneWord) {
        if (space.tables.header[LPLBK_IMAGE_PAIRS] != 0) {
            if (threadIdx.x < 32) solve_as_pairs(t, space, info, ours, write);
            if (threadIdx.x == 0 && write) out.count_solved();
            return;
        }
    }
    split_evenly(space.tables, space.flow);
    __syncthreads();
    if constexpr (kGeneral == kOneWord || kGeneral == kTwoWords) {
        constexpr int kWords = kGeneral;
        if (threadIdx.x >= 32 * kMaskWarps) return;
        MaskFlow<kWords> flow(space.tables, space.flow, n_ranks);
        flow.solve();
        if (!write || threadIdx.x >= 32) return;
        const int max_load = flow.max_load();
        flow.end.witness_size = flow.witness.count();
        int value = info_word(word, max_load, flow.end, flow.total, 0);
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            if (word == LPLBK_INFO_WITNESS + w) value = flow.witness.word[w];
        }
        if (ours) info[word] = value;
    } else if constexpr (kGeneral == kScan) {
        ScanFlow flow(space.tables, space.flow, t.shape);
        flow.solve();
        if (!write) return;
        const int max_load = flow.max_load();
        if (word < LPLBK_INFO_WITNESS && ours) info[word] = info_word(word, max_load, flow.end, flow.total, 0);
        write_witness(info, flow.in_witness);
    }
    if (threadIdx.x == 0) out.count_solved();
}

// Tokens of place j of a replicated expert; second: what goes to the second place of a bundle of several experts, else -1.
struct GeneralQuota {
    const int *x;  // of the bundle's arcs; nullptr: all at the original
    int tokens, second;
    __device__ int operator()(int j) const {
        if (x == nullptr) return j == 0 ? tokens : 0;
        if (second >= 0) return j == 0 ? tokens - second : second;
        return x[j];
    }
};

__device__ __forceinline__ GeneralQuota quota_of(const GeneralTables &t, const GeneralSpace &space, int group, int expert,
                                                 const ExpertRecord &record, bool overflow) {
    const int tokens = space.tokens[expert];
    if (overflow) return {nullptr, tokens, -1};
    const int arc = space.tables.bundle_start[record.bundle()];
    int second = -1;
    if (t.shape.combined > 1) {
        const int *experts = t.tables + t.at.bundle_expert;
        int before = 0;
#pragma unroll 1
        for (int k = t.tables[t.at.bundle_expert_start + group * t.shape.max_bundles + record.bundle()]; experts[k] != expert; ++k) {
            before += space.tokens[experts[k]];
        }
        const int x = space.flow.x[arc + 1], sum = space.flow.sum[record.bundle()];
        second = share_of(x, before, tokens, sum);
    }
    return {space.flow.x + arc, tokens, second};
}

__device__ __forceinline__ void write_general_ratios(const GeneralTables &t, const GeneralSpace &space, int group, const PlanOut &out,
                                                     bool overflow) {
    const lplbk_shape &shape = t.shape;
    const int n_own = shape.n_logical / shape.ep_size;
    const int4 *home = reinterpret_cast<const int4 *>(t.tables + t.at.home) + group * shape.group_size * n_own;
#pragma unroll 1
    for (int i = threadIdx.x; i < shape.group_size * shape.n_redundant; i += blockDim.x) {
        const int rank = i / shape.n_redundant;
        const int word = home[rank * n_own + i - rank * shape.n_redundant].x;
        float ratio = 1.0f;
        if (word < 0 && !overflow) {
            const int bundle = record_of(t, word & 0x7fffffff).bundle();
            const int sum = space.flow.sum[bundle];
            if (sum != 0) ratio = __fdiv_rn(__int2float_rn(space.flow.x[space.tables.bundle_start[bundle]]), __int2float_rn(sum));
        }
        out.ratios[group * shape.group_size * shape.n_redundant + i] = ratio;
    }
}

}  // namespace lplb
