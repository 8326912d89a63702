// Solve: counts -> plan, one block a group.
#include "launch.cuh"
#include "multi.cuh"
#include "solve_general.cuh"
#include "solve_pairs.cuh"

namespace lplb {
namespace {

__device__ __forceinline__ void write_scaled(const PlanOut &out, int expert, int tokens, int highest) {
    out.scaled[expert] = highest > 0 ? __fdiv_rn(__int2float_rn(tokens), __int2float_rn(highest)) : 0.0f;
}

// kPlain: one source, a planner without a rank, and nothing but the plan to write. The first warp solves, the others hold one original slot
// a thread.
template <int kSlots, bool kPlain, class Count>
__global__ void __launch_bounds__(512, 1)
    solve_pairs(const __grid_constant__ PairTables tables, const __grid_constant__ CountMatrix<Count> loads,
                const __grid_constant__ PlanOut out) {
    extern __shared__ int4 memory[];
    MARK(0);
    PairTables t = tables;
    const int slots = t.n_ranks * t.n_own;
    const int group = blockIdx.x;
    const bool solver = uniform_warp_id() < t.n_groups;  // one group a block, one warp a group
    const int first_slot = (int)threadIdx.x - 32, stride = (int)blockDim.x - 32;
    t.home += group * slots;
    t.first_group = group;
    const PairSpace space(reinterpret_cast<int *>(memory), t);
    const bool assigned = !kPlain && loads.n_sources > 1 && out.rank >= 0;
    const bool warp_on_one_rank = (t.n_own & 31) == 0;
    int lanes[kSlots] = {};
    HomeEntry first_home{make_int4(0, 0, 0, 0)};
    if (solver) {
        load_lanes<kSlots>(t, group, lanes);
    } else {
        if (first_slot < slots) first_home.word = t.home[first_slot];
        space.clear(t, first_slot, stride);
    }
    wait_for_stream();
    if (!kPlain && blockIdx.x == 0) compare_digests(loads, out);
    const auto tokens_of = [&](const HomeEntry &home, bool &large) {
        if constexpr (kPlain && sizeof(Count) == 4) {
            const int tokens = max((int)loads.counts[home.expert()], 0);
            large |= tokens > kSurelyFits;
            return tokens;
        } else {
            const int64_t total = loads.template total<!kPlain>(home.expert());
            large |= total > kSurelyFits;
            return fitted(total);
        }
    };
    bool large = false;
    int first_tokens = 0;
    if (!solver && first_slot < slots) first_tokens = tokens_of(first_home, large);
    let_next_start();
    PairFlow<kSlots> flow;
    flow.open(lanes, t.n_ranks);
    MARK(1);
    __syncthreads();
    MARK(2);
    OwnTokens own;
    int highest = 0;
    if (!solver) {
#pragma unroll 1
        for (int i = first_slot; i < slots; i += stride) {
            const HomeEntry home = i == first_slot ? first_home : HomeEntry{t.home[i]};
            const int tokens = i == first_slot ? first_tokens : tokens_of(home, large);
            gather_slot(space, i, home, tokens, warp_on_one_rank);
            if (!home.paired()) {
                const int take = assigned ? loads.of(out.rank, home.expert()) : tokens;
                out.quota[home.slot()] = tokens;
                out.take[home.slot()] = take;
                if (!kPlain && out.rank >= 0) own.add(out, group * t.n_ranks + home.rank(), take);
            }
            if (!kPlain) highest = max(highest, tokens);
        }
        if (!kPlain && out.scaled != nullptr) atomicMax(space.highest, highest);
    }
    bool overflow = false;
    MARK(3);
    if (__syncthreads_or(large)) {
        if (!solver) {
#pragma unroll 1
            for (int i = first_slot; i < slots; i += stride) space.wide->add(loads.template total<!kPlain>(HomeEntry{t.home[i]}.expert()));
        }
        __syncthreads();
        overflow = space.wide->overflow();
    }
    MARK(4);
    // A vote is one number for the warp, and the compiler knows it.
    if (solver && !__any_sync(kFullWarp, overflow)) solve_pair_group<kSlots>(t, space, 0, flow);
    MARK(5);
    __syncthreads();
    MARK(6);
    if (solver) {
        if (!overflow) {
            write_pair_info<kSlots>(out, group, flow);
        } else {
            write_overflow(out, group);
        }
    } else {
#pragma unroll 1
        for (int i = first_slot; i < slots; i += stride) {
            const HomeEntry home = i == first_slot ? first_home : HomeEntry{t.home[i]};
            if (!kPlain && out.scaled != nullptr) write_scaled(out, home.expert(), space.tokens[i], *space.highest);
            if (!home.paired()) continue;
            const int2 quota = pair_quotas(t, space, i, home, overflow);
            int2 take = quota;
            if constexpr (!kPlain) {
                const int ranks[2] = {home.slot() / out.n_local, home.copy_slot() / out.n_local};
                if (assigned && overflow) {
                    take = make_int2(loads.of(out.rank, home.expert()), 0);
                } else if (assigned) {
                    assign_tokens(
                        2, [&](int j) { return j == 0 ? quota.x : quota.y; }, [&](int j) { return j == 0 ? ranks[0] : ranks[1]; },
                        [&](int s) { return loads.of(s, home.expert()); }, out.rank, out.per_node,
                        [&](int j, int tokens) { (j == 0 ? take.x : take.y) = tokens; });
                }
                if (out.rank >= 0) {
                    own.add(out, ranks[0], take.x);
                    own.add(out, ranks[1], take.y);
                }
            }
            out.quota[home.slot()] = quota.x;
            out.quota[home.copy_slot()] = quota.y;
            out.take[home.slot()] = take.x;
            out.take[home.copy_slot()] = take.y;
        }
        if (!kPlain && out.ratios != nullptr) write_pair_ratios(t, space, out, first_slot, stride, overflow);
    }
    if (!kPlain && out.rank >= 0) {
        own.join(space.own);
        __syncthreads();
        if (threadIdx.x < 3) out.info(group)[LPLBK_INFO_OWN_RANK + threadIdx.x] = space.own[threadIdx.x];
    }
    MARK(7);
}

// kSimple: one source and bundles of one expert, so tokens of arcs are tokens of slots.
template <int kGeneral, bool kSimple, class Count>
__global__ void __launch_bounds__(512, 1)
    solve_general(const __grid_constant__ GeneralTables t, const __grid_constant__ CountMatrix<Count> loads,
                  const __grid_constant__ PlanOut out) {
    extern __shared__ int4 memory[];
    int *const words = reinterpret_cast<int *>(memory);
    const int group = blockIdx.x;
    const int n_logical = t.shape.n_logical;
    const GeneralSpace space(words, t);
    MARK(0);
    ExpertRecord first_record;
    if (threadIdx.x < n_logical) first_record = record_of(t, threadIdx.x);
    space.open(words, t, group);
    wait_for_stream();
    if (!kSimple && blockIdx.x == 0) compare_digests(loads, out);
    int64_t first_total = 0;
    if (threadIdx.x < n_logical && first_record.group() == group) first_total = loads.template total<!kSimple>(threadIdx.x);
    let_next_start();
    MARK(1);
    __syncthreads();
    MARK(2);
    const bool assigned = !kSimple && loads.n_sources > 1 && out.rank >= 0;
    OwnTokens own;
    bool large = false;
    int highest = 0;
#pragma unroll 1
    for (int expert = threadIdx.x; expert < n_logical; expert += blockDim.x) {
        const bool first = expert == threadIdx.x;
        const ExpertRecord record = first ? first_record : record_of(t, expert);
        if (record.group() != group) continue;
        const int64_t total = first ? first_total : loads.template total<!kSimple>(expert);
        const int tokens = fitted(total);
        large |= total > kSurelyFits;
        highest = max(highest, tokens);
        space.tokens[expert] = tokens;
        if (record.bundle() >= 0) {
            atomicAdd(&space.flow.sum[record.bundle()], tokens);
        } else {
            atomicAdd(&space.flow.base[record.rank()], tokens);
            const int take = assigned ? loads.of(out.rank, expert) : tokens;
            out.quota[record.slot()] = tokens;
            out.take[record.slot()] = take;
            if (out.rank >= 0) own.add(out, group * t.shape.group_size + record.rank(), take);
        }
    }
    if (out.scaled != nullptr) atomicMax(space.highest, highest);
    bool overflow = false;
    MARK(3);
    if (__syncthreads_or(large)) {
#pragma unroll 1
        for (int expert = threadIdx.x; expert < n_logical; expert += blockDim.x) {
            if (record_of(t, expert).group() == group) space.wide->add(loads.template total<!kSimple>(expert));
        }
        __syncthreads();
        overflow = space.wide->overflow();
    }
    MARK(4);
    if (!overflow) {
        solve_general_group<kGeneral>(t, space, group, out, true);
    } else if (threadIdx.x < 32) {
        write_overflow(out, group);
    }
    MARK(5);
    __syncthreads();
    MARK(6);
    int moved = 0;
    if constexpr (kSimple) {
        const int n_arcs = space.tables.n_arcs();
#pragma unroll 1
        for (int arc = threadIdx.x; arc < n_arcs; arc += blockDim.x) {
            const int word = space.tables.arc_slot[arc];
            const int slot = word & 0x7fffffff;
            int tokens = space.flow.x[arc];
            if (!overflow) {
                moved += word < 0 ? tokens : 0;
                out.quota[slot] = tokens;
                out.take[slot] = tokens;
                if (out.rank >= 0) own.add(out, group * t.shape.group_size + space.tables.arc_rank[arc], tokens);
            }
        }
    }
    if (!kSimple || overflow) {
#pragma unroll 1
        for (int expert = threadIdx.x; expert < n_logical; expert += blockDim.x) {
            const ExpertRecord record = record_of(t, expert);
            if (record.group() != group || record.bundle() < 0) continue;
            const GeneralQuota quota = quota_of(t, space, group, expert, record, overflow);
            const auto emit = [&](int j, int take) {
                if (assigned && overflow) take = j == 0 ? loads.of(out.rank, expert) : 0;
                const int2 place = place_of(t, record.first_place() + j);
                const int tokens = quota(j);
                moved += j > 0 ? tokens : 0;
                out.quota[place.x] = tokens;
                out.take[place.x] = take;
                if (out.rank >= 0) own.add(out, place.y, take);
            };
            if (!kSimple && assigned) {
                assign_tokens(
                    record.places(), quota, [&](int j) { return place_of(t, record.first_place() + j).y; },
                    [&](int s) { return loads.of(s, expert); }, out.rank, out.per_node, emit);
            } else {
#pragma unroll 1
                for (int j = 0; j < record.places(); ++j) emit(j, quota(j));
            }
        }
    }
    if (out.ratios != nullptr) write_general_ratios(t, space, group, out, overflow);
    if (out.scaled != nullptr) {
#pragma unroll 1
        for (int expert = threadIdx.x; expert < n_logical; expert += blockDim.x) {
            write_scaled(out, expert, space.tokens[expert], *space.highest);
        }
    }
    const int sum = warp_sum(moved);
    if (lane_id() == 0 && sum != 0) atomicAdd(space.moved, sum);
    if (out.rank >= 0) own.join(space.own);
    __syncthreads();
    if (threadIdx.x == 0) out.info(group)[LPLBK_INFO_MOVED] = *space.moved;
    if (out.rank >= 0 && threadIdx.x < 3) out.info(group)[LPLBK_INFO_OWN_RANK + threadIdx.x] = space.own[threadIdx.x];
    MARK(7);
}

// Column sums over their maximum, for several groups.
template <class Count>
__global__ void scale(const __grid_constant__ CountMatrix<Count> loads, const __grid_constant__ PlanOut out) {
    __shared__ int highest[32];
    wait_for_stream();
    int most = 0;
    for (int expert = threadIdx.x; expert < loads.n_logical; expert += blockDim.x)
        most = max(most, fitted(loads.template total<true>(expert)));
    most = warp_max(most);
    if (lane_id() == 0) highest[warp_id()] = most;
    __syncthreads();
    most = warp_max(lane_id() < blockDim.x / 32 ? highest[lane_id()] : 0);
    for (int expert = threadIdx.x; expert < loads.n_logical; expert += blockDim.x) {
        write_scaled(out, expert, fitted(loads.template total<true>(expert)), most);
    }
}

constexpr int kSolverInterior = 1;  // LPLB_SOLVER_IPM
constexpr int kMaxInteriorGroup = LPLBK_MAX_INTERIOR_GROUP;

static_assert(32 * kMaskWarps <= 256, "general_threads: MaskFlow's warps must be there");

int general_threads(const lplbk_planner &planner) {
    const lplbk_shape &shape = planner.shape;
    if (planner.solver == kSolverInterior) return shape.group_size <= 32 ? 128 : 256;  // its sums over the block are many
    return shape.group_size > 256 || shape.n_logical > 256 ? 512 : 256;
}

int pair_threads(const lplbk_shape &shape) {
    const int slots = shape.group_size * (shape.n_logical / shape.ep_size);
    return min(32 + round_up(slots, 32), 512);
}

bool interior(const lplbk_planner &planner) { return planner.solver == kSolverInterior; }
bool by_pairs(const lplbk_planner &planner) { return planner.shape.pair_slots > 0 && !interior(planner); }

int64_t shared_bytes(const lplbk_planner &planner) {
    if (interior(planner)) return 4ll * interior_words(planner.shape, planner.layout);
    return 4 * (by_pairs(planner) ? PairSpace::words_of(planner.shape, 1) : GeneralSpace::words_of(planner.shape, planner.layout));
}

template <bool kPlain, class Count>
auto pair_kernel(int pair_slots) {
    return pair_slots == 2   ? solve_pairs<2, kPlain, Count>
           : pair_slots == 4 ? solve_pairs<4, kPlain, Count>
                             : solve_pairs<8, kPlain, Count>;
}

template <bool kSimple, class Count>
auto general_kernel(const lplbk_planner &planner) {
    if (interior(planner)) return solve_general<kInterior, kSimple, Count>;
    return planner.layout.mask_words == 1   ? solve_general<kOneWord, kSimple, Count>
           : planner.layout.mask_words == 2 ? solve_general<kTwoWords, kSimple, Count>
                                            : solve_general<kScan, kSimple, Count>;
}

// What is solved for: counts, or rows whose digests are compared or not.
enum Kind { kCounts, kRows, kComparedRows };

template <class Count>
cudaError_t solve(const lplbk_planner &planner, const void *counts, int64_t n_sources, Kind kind, float *ratios, float *scaled,
                  void *counter, int32_t counter64, cudaStream_t stream) {
    const lplbk_shape &shape = planner.shape;
    const int width = kind == kCounts ? shape.n_logical : shape.n_logical + 1;
    const CountMatrix<Count> loads{static_cast<const Count *>(counts), (int)n_sources, shape.n_logical, width};
    PlanOut out = PlanOut::of(planner, ratios, scaled, counter, counter64);
    if (kind == kComparedRows) out.compare(planner);
    if (scaled != nullptr && shape.n_groups > 1) {
        const cudaError_t error = launch(planner.info, scale<Count>, 1, 512, 0, 0, stream, loads, out);
        if (error != cudaSuccess) return error;
        out.scaled = nullptr;
    }
    const int bytes = (int)shared_bytes(planner);
    if (by_pairs(planner)) {
        const PairTables tables{reinterpret_cast<const int4 *>(planner.tables + planner.layout.home),
                                planner.tables + planner.layout.lanes,
                                1,
                                0,
                                shape.group_size,
                                shape.n_redundant,
                                shape.n_logical / shape.ep_size,
                                shape.combined};
        const bool plain = n_sources == 1 && kind == kCounts && shape.rank < 0 && ratios == nullptr && out.scaled == nullptr;
        const auto kernel = plain ? pair_kernel<true, Count>(shape.pair_slots) : pair_kernel<false, Count>(shape.pair_slots);
        return launch(planner.info, kernel, shape.n_groups, pair_threads(shape), bytes, 0, stream, tables, loads, out);
    }
    const GeneralTables tables{shape, planner.layout, planner.tables};
    const bool simple = n_sources == 1 && kind == kCounts && shape.combined <= 1;
    const auto kernel = simple ? general_kernel<true, Count>(planner) : general_kernel<false, Count>(planner);
    return launch(planner.info, kernel, shape.n_groups, general_threads(planner), bytes, 0, stream, tables, loads, out);
}

template <class Count>
int32_t prepare(const lplbk_planner &planner) {
    const int64_t bytes = shared_bytes(planner);
    if (by_pairs(planner)) {
        const int32_t error = allow_shared(planner.info, pair_kernel<false, Count>(planner.shape.pair_slots), bytes);
        return error != 0 ? error : allow_shared(planner.info, pair_kernel<true, Count>(planner.shape.pair_slots), bytes);
    }
    const int32_t error = allow_shared(planner.info, general_kernel<false, Count>(planner), bytes);
    return error != 0 ? error : allow_shared(planner.info, general_kernel<true, Count>(planner), bytes);
}

}  // namespace

cudaError_t solve_totals(const lplbk_planner &planner, void *counter, int32_t counter64, cudaStream_t stream) {
    return solve<int32_t>(planner, multi_scratch(planner).totals, 1, kCounts, nullptr, nullptr, counter, counter64, stream);
}

cudaError_t solve_rows(const lplbk_planner &planner, const int32_t *rows, bool compare, float *ratios, float *scaled, void *counter,
                       int32_t counter64, cudaStream_t stream) {
    const Kind kind = compare ? kComparedRows : kRows;
    return solve<int32_t>(planner, rows, planner.shape.ep_size, kind, ratios, scaled, counter, counter64, stream);
}

int32_t prepare_solve(const lplbk_planner &planner) {
    if (interior(planner) && planner.shape.group_size > kMaxInteriorGroup) return LPLBK_UNSUPPORTED;
    const int32_t error = prepare<int32_t>(planner);
    return error != 0 ? error : prepare<int64_t>(planner);
}

}  // namespace lplb

extern "C" int32_t lplbk_solve(const lplbk_planner *planner, const void *counts, int32_t counts64, int64_t n_sources, float *ratios,
                               float *scaled, void *counter, int32_t counter64, void *stream) {
    lplb::OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return lplb::taken(on.error());
    const auto queue = static_cast<cudaStream_t>(stream);
    const auto solve = counts64 ? lplb::solve<int64_t> : lplb::solve<int32_t>;
    return lplb::taken(solve(*planner, counts, n_sources, lplb::kCounts, ratios, scaled, counter, counter64, queue));
}

extern "C" int32_t lplbk_solve_rows(const lplbk_planner *planner, const int32_t *rows, int32_t compare, float *ratios, float *scaled,
                                    void *counter, int32_t counter64, void *stream) {
    lplb::OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return lplb::taken(on.error());
    return lplb::taken(lplb::solve_rows(*planner, rows, compare != 0, ratios, scaled, counter, counter64,
                                        static_cast<cudaStream_t>(stream)));
}

PROFILE_READER(lplbk_profile_solve)
