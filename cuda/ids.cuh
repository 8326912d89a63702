// Reading, counting and numbering expert ids. The k-th occurrence of an expert is counted in row-major order: blocks and warps own
// consecutive runs of ids, and prefix sums over blocks and warps tell each where its occurrences start.
#pragma once

#include "common.cuh"

namespace lplb {

// Ids in shared memory: 16 bits each.
constexpr unsigned kNoExpert = 0xffff;
constexpr unsigned kBadId = 0xfffe;

template <class Id>
__device__ __forceinline__ unsigned packed_id(Id id, int n_logical) {
    if (id >= 0 && id < (Id)n_logical) return (unsigned)id;
    return id == (Id)-1 ? kNoExpert : kBadId;
}

// Calls visit() with ids as what they are, int64 or int32: the choice stands before the loop, whose loads then go out together.
template <class Visit>
__device__ __forceinline__ void with_ids(const void *ids, int wide, Visit visit) {
    if (wide) {
        visit(static_cast<const int64_t *>(ids));
    } else {
        visit(static_cast<const int32_t *>(ids));
    }
}
template <class Visit>
__device__ __forceinline__ void with_ids(void *ids, int wide, Visit visit) {
    if (wide) {
        visit(static_cast<int64_t *>(ids));
    } else {
        visit(static_cast<int32_t *>(ids));
    }
}
__device__ __forceinline__ void store_id(void *ids, int wide, int64_t i, int slot) {
    if (wide) {
        static_cast<int64_t *>(ids)[i] = slot;
    } else {
        static_cast<int32_t *>(ids)[i] = slot;
    }
}

// Counters of 16 bits, two in a word.
__device__ __forceinline__ void count_one(unsigned *counters, int index) { atomicAdd(&counters[index >> 1], 1u << (16 * (index & 1))); }

__host__ __device__ constexpr int counter_words(int n) { return (n + 1) / 2; }

// Bits that tell numbers below n apart.
__device__ __forceinline__ int bits_for(int n) { return n <= 1 ? 0 : 32 - __clz(n - 1); }

// The lanes of the warp that hold the same number as this one, among those that are active. (match.any takes a turn for each different
// number, more than the few votes here.)
__device__ __forceinline__ unsigned lanes_alike(bool active, unsigned number, int bits) {
    unsigned alike = __ballot_sync(kFullWarp, active);
#pragma unroll 1
    for (int b = 0; b < bits; ++b) {
        const bool set = (number >> b & 1) != 0;
        const unsigned vote = __ballot_sync(kFullWarp, set);
        alike &= set ? vote : ~vote;
    }
    return alike;
}

// The number of this occurrence of a replicated expert within the run that `next` counts, for 32 consecutive ids, one a lane; advances
// next.
__device__ __forceinline__ unsigned occurrence(bool active, int replicated, int bits, uint16_t *next) {
    const unsigned alike = lanes_alike(active, (unsigned)replicated, bits);
    const unsigned before = __popc(alike & lanes_below());
    const unsigned start = active ? next[replicated] : 0;
    __syncwarp();
    if (active && before == 0) next[replicated] = (uint16_t)(start + __popc(alike));
    __syncwarp();
    return start + before;
}

}  // namespace lplb
