// Capacity: what a rank may hold at level T, and the level that a set of ranks forces. The solvers compare loads with T by these alone, so
// that a rank's cost is known here and in Sources/LPLBSolver/Capacity.swift, and nowhere else. Capacity: all ranks are alike;
// RankedCapacity: they differ.
#pragma once

#include <type_traits>

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
// and where there are two, the one 32 further. The others' caps are in shared memory, where anybody asks for them. kMany: there may be more
// than 64 ranks.
template <int kWords, bool kMany = false>
struct RankedCapacity {
    static constexpr bool kRanked = true;
    static constexpr int kBits = 20;

    int64_t level;  // T
    int64_t mean;   // the first one, which all ranks together force
    int64_t least;  // no T is below: the latest start of a rank
    bool differ;    // the ranks do; else each is of normal speed, since this is a graph of a time when they differed
    int total;      // tokens of all ranks; caps above it count as that
    int *caps;      // [ranks] in shared memory, or nullptr
    bool writes;    // this thread writes its ranks' caps there
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

    // speed_of(rank), fixed_of(rank): of those that there are. max_of(value), sum(value): of all ranks' values. All that can be done before the loads are known.
    template <class SpeedOf, class FixedOf, class Max, class Sum>
    __device__ __forceinline__ void open(bool they_differ, SpeedOf speed_of, FixedOf fixed_of, int n_ranks, int first_rank, int *shared,
                                         bool writes_shared, Max max_of, Sum sum) {
        differ = they_differ;
        caps = shared;
        writes = writes_shared;
        first = first_rank;
        int latest = 0;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            const int rank = first + 32 * w;
            speed[w] = rank < n_ranks ? speed_of(rank) : 0;
            const int units = rank < n_ranks ? fixed_of(rank) : 0;
            start[w] = (int64_t)units << 10;
            latest = max(latest, units);
        }
        least = (int64_t)max_of(latest) << 10;
        everybody_ = together([](int) { return true; }, sum);
    }

    // The first T, for tokens of which none is bound to a rank.
    template <class Sum>
    __device__ __forceinline__ void begin(int tokens, int n_ranks, Sum sum) {
        total = tokens;
        find(tokens, [](int) { return true; }, n_ranks, everybody_, sum);
        mean = level;
    }
    template <class Inside, class Sum>
    __device__ __forceinline__ void raise(int tokens, Inside inside, int n_ranks, Sum sum) {
        find(tokens, inside, n_ranks, together(inside, sum), sum);
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
        for (int w = 0; w < kWords; ++w) set_cap(w, held(w), 0);
    }

private:
    // Of the ranks of a set: speeds, starts times speeds, and 1 / the speeds.
    struct Together {
        int speeds;
        int64_t starts;
        double inverse;
    };
    Together everybody_;

    // What a rank may hold at T, and the part of a unit, in 2^-20, that was rounded away.
    struct Held {
        uint64_t units;
        unsigned part;
    };
    __device__ __forceinline__ Held held(int w) const {
        const uint64_t time = (uint64_t)(level - start[w]);
        const uint64_t low = (time & UINT32_MAX) * (unsigned)speed[w], high = (uint64_t)(unsigned)(time >> 32) * (unsigned)speed[w];
        return {(high << (32 - kBits)) + (low >> kBits), (unsigned)low & ((1u << kBits) - 1)};
    }
    // rise: how far T has risen since.
    __device__ __forceinline__ void set_cap(int w, const Held &at, int rise) {
        const uint64_t units = at.units + ((at.part + (uint64_t)(unsigned)rise * (unsigned)speed[w]) >> kBits);
        cap[w] = speed[w] > 0 ? (int)min(units, (uint64_t)total) : INT32_MAX;
        if (writes && speed[w] > 0) caps[first + 32 * w] = cap[w];
    }

    template <class Inside, class Sum>
    __device__ __forceinline__ Together together(Inside inside, Sum sum) const {
        int my_speed = 0;
        uint64_t my_start = 0;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            my_speed += inside(w) ? speed[w] : 0;
            my_start += inside(w) ? (uint64_t)(start[w] >> 10) * (unsigned)speed[w] : 0;  // below 2^41
        }
        Together all;
        all.speeds = sum(my_speed);
        all.starts = 0;
        if (least > 0) {
            const int64_t high = sum((int)(my_start >> 20)), low = sum((int)(my_start & 0xfffff));
            all.starts = ((high << 20) + low) << 10;
        }
        // Newton's steps from a float's reciprocal, each of which doubles the bits that are right.
        const double speeds = all.speeds;
        all.inverse = __frcp_rn((float)all.speeds);
#pragma unroll
        for (int step = 0; step < 2; ++step) all.inverse = fma(fma(-speeds, all.inverse, 1.0), all.inverse, all.inverse);
        return all;
    }

    // Raises T to the least one at which n_ranks ranks, those with inside(w), may hold so many tokens.
    template <class Inside, class Sum>
    __device__ __forceinline__ void find(int tokens, Inside inside, int n_ranks, const Together &all, Sum sum) {
        // Without rounding T would be this / speeds. The product is off by less than 3, since no number here needs more than 56 bits.
        const int64_t need = ((int64_t)tokens << kBits) + all.starts;
        level = max(least, (int64_t)((double)need * all.inverse) - 4);
        Held at[kWords];
        unsigned parts = 0;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            at[w] = held(w);
            parts += inside(w) ? at[w].part : 0;
        }
        const int64_t lacking = tokens - ((level * all.speeds - all.starts - sum((int)parts)) >> kBits);
        int rise = 0;
        if (lacking > 0) {
            // Each cap is rounded down, by less than a unit: a unit more for each is enough. At 1/kSteps, 2/kSteps .. of what is left.
            constexpr int kSums = kMany ? 2 : 4, kSumBits = 32 / kSums;  // no sum is above 2 * ranks + 16 * ranks / 16
            int fails = 0;
            rise = (int)(n_ranks * (double)(1 << kBits) * all.inverse) + 16;
#pragma unroll 1
            while (rise - fails > 1) {
                const int step = (unsigned)(rise - fails + kSums) / (kSums + 1);
                unsigned sums = 0;
#pragma unroll
                for (int k = 1; k <= kSums; ++k) {
#pragma unroll
                    for (int w = 0; w < kWords; ++w) {
                        const unsigned more = (at[w].part + (unsigned)(fails + k * step) * (unsigned)speed[w]) >> kBits;
                        sums += inside(w) ? more << (kSumBits * (k - 1)) : 0;
                    }
                }
                sums = (unsigned)sum((int)sums);
                int n_fail = 0;
#pragma unroll
                for (int k = 0; k < kSums; ++k) n_fail += (int)(sums >> (kSumBits * k) & ((1u << kSumBits) - 1)) < (int)lacking;
                fails += n_fail * step;
                rise = min(rise, fails + step);
            }
        }
        level += rise;
#pragma unroll
        for (int w = 0; w < kWords; ++w) set_cap(w, at[w], rise);
    }
};
template <bool kRanked, int kWords, bool kMany = false>
using CapacityOf = std::conditional_t<kRanked, RankedCapacity<kWords, kMany>, Capacity>;

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
