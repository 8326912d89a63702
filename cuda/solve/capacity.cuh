// Capacity: what a rank may hold at level T, and the level that a set of ranks forces. The solvers compare loads with T by these alone, so
// that a rank's cost is known here and in Sources/LPLBSolver/Capacity.swift, and nowhere else. Capacity: all ranks are alike;
// RankedCapacity: they differ.
#pragma once

#include "../common.cuh"

namespace lplb {

struct Capacity {
    static constexpr bool kRanked = false;
    int level;  // T, in units

    __device__ __forceinline__ bool over(int /*rank*/, int load) const { return load > level; }
    __device__ __forceinline__ bool under(int /*rank*/, int load) const { return load < level; }
    // What the rank lacks to T; below 0: its excess.
    __device__ __forceinline__ int room(int /*rank*/, int load) const { return level - load; }
    // The same of a rank that is not this thread's.
    __device__ __forceinline__ int room_at(int /*rank*/, int load) const { return level - load; }
    // The load of a rank that is left with this excess.
    __device__ __forceinline__ int full(int /*rank*/, int excess) const { return level + excess; }

    // T becomes the least level at which n_ranks ranks, those with inside(w), may hold so many tokens. sum(value): of all ranks' values.
    template <class Inside, class Sum>
    __device__ __forceinline__ void raise(int tokens, Inside /*inside*/, int n_ranks, Sum /*sum*/) {
        level = forced(tokens, n_ranks);
    }
    // The least T at which so many ranks hold so many tokens: ceil(tokens / n_ranks) for 0 <= tokens < 2^31, 0 < n_ranks < 2^16, in unsigned,
    // since the sum below may pass 2^31.
    __device__ static __forceinline__ int forced(int tokens, int n_ranks) {
        return (int)(((unsigned)tokens + (unsigned)n_ranks - 1u) / (unsigned)n_ranks);
    }

    // What a rank gives to another one in a sweep: half the difference of what they have more than others, rounded toward zero; both ends
    // see it with opposite signs.
    __device__ __forceinline__ int more(int /*rank*/, int load) const { return load; }
    __device__ __forceinline__ int more_at(int /*rank*/, int load) const { return load; }
    __device__ static __forceinline__ int evened(int more, int other_more) { return (more - other_more) / 2; }
};

// Ranks that differ: a rank may hold floor((T - start) * speed / 2^20) units, T counting 1/1024 unit. A thread knows kWords ranks: its own,
// and where there are two, the one 32 further. The others' caps are in shared memory, where anybody asks for them.
template <int kWords>
struct RankedCapacity {
    static constexpr bool kRanked = true;
    static constexpr int kBits = 20;

    int64_t level;  // T
    int64_t mean;   // the first one, which all ranks together force
    int64_t least;  // no T is below: the latest start of a rank
    int total;      // tokens of all ranks; caps above it count as that
    int *caps;      // [ranks] in shared memory, or nullptr
    int first;      // this thread's first rank
    int speed[kWords];  // 0: there is no such rank. It passes for one with room
    int64_t start[kWords];
    int cap[kWords];

    __device__ __forceinline__ int cap_of(int rank) const { return kWords == 1 || rank < 32 ? cap[0] : cap[kWords - 1]; }
    __device__ __forceinline__ bool over(int rank, int load) const { return load > cap_of(rank); }
    __device__ __forceinline__ bool under(int rank, int load) const { return load < cap_of(rank); }
    __device__ __forceinline__ int room(int rank, int load) const { return cap_of(rank) - load; }
    __device__ __forceinline__ int room_at(int rank, int load) const { return caps[rank] - load; }
    __device__ __forceinline__ int full(int rank, int excess) const { return cap_of(rank) + excess; }
    __device__ __forceinline__ int more(int rank, int load) const { return load - cap_of(rank); }
    __device__ __forceinline__ int more_at(int rank, int load) const { return load - caps[rank]; }
    __device__ static __forceinline__ int evened(int more, int other_more) { return (int)(((int64_t)more - other_more) / 2); }

    // speeds, fixed: [n_ranks]. max(value): of all ranks' values.
    template <class Max>
    __device__ __forceinline__ void open(const int *speeds, const int *fixed, int n_ranks, int first_rank, int *shared, Max max_of) {
        caps = shared;
        first = first_rank;
        int latest = 0;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            const int rank = first + 32 * w;
            speed[w] = rank < n_ranks ? speeds[rank] : 0;
            const int units = rank < n_ranks ? fixed[rank] : 0;
            start[w] = (int64_t)units << 10;
            latest = max(latest, units);
        }
        least = (int64_t)max_of(latest) << 10;
    }

    // The first T, for tokens of which none is bound to a rank.
    template <class Sum>
    __device__ __forceinline__ void begin(int tokens, int n_ranks, Sum sum) {
        total = tokens;
        raise(tokens, [&](int w) { return speed[w] > 0; }, n_ranks, sum);
        mean = level;
    }

    // The least T at which this thread's rank may hold so many tokens.
    __device__ __forceinline__ int64_t level_of(int tokens, int w) const {
        const int64_t time = (((int64_t)tokens << kBits) + speed[w] - 1) / speed[w];
        return max(least, start[w] + time);
    }
    // The largest of all threads' values, none negative. max_of(value): of such values below 2^31.
    template <class Max>
    __device__ __forceinline__ static int64_t highest(int64_t value, Max max_of) {
        const int high = max_of((int)(value >> 31));
        const int low = max_of((int)(value >> 31) == high ? (int)(value & INT32_MAX) : 0);
        return (int64_t)high << 31 | low;
    }

    __device__ __forceinline__ void set(int64_t new_level) {
        level = new_level;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            uint64_t part;
            cap[w] = speed[w] > 0 ? held(w, part) : INT32_MAX;
            if (caps != nullptr && speed[w] > 0) caps[first + 32 * w] = cap[w];
        }
    }

    template <class Inside, class Sum>
    __device__ __forceinline__ void raise(int tokens, Inside inside, int n_ranks, Sum sum) {
        int my_speed = 0;
        uint64_t my_start = 0;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            if (!inside(w)) continue;
            my_speed += speed[w];
            my_start += (uint64_t)(start[w] >> 10) * speed[w];  // below 2^41
        }
        const int speeds = sum(my_speed);
        int64_t need = (int64_t)tokens << kBits;
        if (least > 0) {
            const int64_t high = sum((int)(my_start >> 20)), low = sum((int)(my_start & 0xfffff));
            need += ((high << 20) + low) << 10;
        }
        // Without rounding T would be need / speeds. This is it or up to 8 less: all numbers are below 2^56.
        const double inverse = 1.0 / speeds;
        level = max(least, (int64_t)((double)need * inverse) - 4);
        int low = 0, high = 0;
        unsigned parts[kWords];
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            uint64_t part = 0;
            const int units = inside(w) ? held(w, part) : 0;
            parts[w] = (unsigned)part;
            low += units & 0xffff;
            high += units >> 16;
        }
        const int64_t lacking = tokens - (((int64_t)sum(high) << 16) + sum(low));
        if (lacking > 0) {
            // Each cap is rounded down, by less than a unit: a unit more for each is enough. So the sums below stay below 2^31.
            int fails = 0, holds = (int)(n_ranks * (double)(1 << kBits) * inverse) + 16;
#pragma unroll 1
            while (holds - fails > 1) {
                const int middle = (fails + holds) >> 1;
                unsigned more = 0;
#pragma unroll
                for (int w = 0; w < kWords; ++w) more += inside(w) ? (parts[w] + (unsigned)middle * (unsigned)speed[w]) >> kBits : 0;
                if (sum((int)more) >= lacking) {
                    holds = middle;
                } else {
                    fails = middle;
                }
            }
            level += holds;
        }
        set(level);
    }

private:
    // The cap at T; part: of a unit, in 2^-20, that was rounded away.
    __device__ __forceinline__ int held(int w, uint64_t &part) const {
        const uint64_t time = (uint64_t)(level - start[w]), low = time * (uint64_t)speed[w], high = __umul64hi(time, (uint64_t)speed[w]);
        part = low & ((1u << kBits) - 1);
        return (int)min((high << (64 - kBits)) | (low >> kBits), (uint64_t)total);
    }
};

// Capacity::forced() for many sums of one number of ranks, at most 2^10. Made before the hurry starts.
class ForcedByAll {
public:
    ForcedByAll() = default;
    __device__ explicit ForcedByAll(unsigned ranks) : ranks_(ranks), inverse_(0xffffffffu / ranks) {}
    __device__ __forceinline__ int operator()(int tokens) const {
        const unsigned a = (unsigned)tokens + ranks_ - 1;
        unsigned mean = __umulhi(a, inverse_);  // at most 2 too low
        unsigned rest = a - mean * ranks_;
        if (rest >= ranks_) ++mean, rest -= ranks_;
        if (rest >= ranks_) ++mean;
        return (int)mean;
    }

private:
    unsigned ranks_, inverse_;
};

// What a solve of a group leaves behind, the same in all threads.
template <class Cap>
struct FlowEndOf : Cap {  // level: the bound
    int rounds;
    int certified;
    int witness_size;
};
using FlowEnd = FlowEndOf<Capacity>;

}  // namespace lplb
