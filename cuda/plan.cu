// The whole plan: `run`, in one launch where one cluster of blocks can do it, else in three; and preparing a planner.
//
// One launch: every block of the cluster counts its run of ids, reads the other blocks' counts from their shared memory, and solves for
// itself (the solver is deterministic, and waiting for another block's answer would take longer); its other warps number the occurrences
// of replicated experts meanwhile. The ids stay in shared memory in between, 16 bits each; those of replicated experts are also queued,
// since there are few of them as a rule and numbering is the work that costs. With an exchange the blocks send this rank's counts to the
// peers between them, and each waits for everybody's by itself.
#include <type_traits>

#include "exchange.cuh"
#include "ids.cuh"
#include "launch.cuh"
#include "multi.cuh"
#include "solve_general.cuh"
#include "solve_pairs.cuh"

namespace lplb {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxSolvers = 8;        // warps that solve; the others number occurrences
constexpr int kFusedIds = 1 << 17;     // beyond, three launches are faster (measured on an H200)
constexpr int kMaxWithoutCluster = 2048;  // ids that one block takes alone where there are no clusters
constexpr int kMaxPerBlock = 1 << 14;  // ids; counters have 16 bits

struct FusedShape {
    int64_t n_ids;
    int per_block;  // ids, a multiple of 32
    int n_logical;
    int max_replicated;
    const int *code;
    const int *n_replicated;
    int64_t *invalid;
};

// A queued id: its place in the block's run, and which occurrence of its expert in the warp's run it is.
struct Queued {
    unsigned word;
    __device__ unsigned place() const { return word & (kMaxPerBlock - 1); }
    __device__ unsigned number() const { return word / kMaxPerBlock; }
    __device__ static unsigned of(unsigned place, unsigned number) { return place | number * kMaxPerBlock; }
};

// A rewritten id among the kept ones: its slot, marked.
constexpr unsigned kSlotMark = 0x8000;
static_assert((kSlotMark | (LPLBK_MAX_PHYSICAL - 1)) < kBadId && LPLBK_MAX_LOGICAL <= kSlotMark, "kSlotMark");

// Shared memory of a block beside the solver's, in words from the start.
struct FusedSpace {
    int code, step, counts, packed, warp_counts, parts, total, before, queue, ids, everyone, words;

    // n_sources: ranks whose counts are exchanged, 0: none are.
    __host__ __device__ FusedSpace(int solver_words, int n_logical, int max_replicated, int max_arcs, int n_blocks, int per_block,
                                   int n_sources) {
        int end = round_up(solver_words, 4);
        const auto section = [&end](int words) {
            const int start = end;
            end += round_up(words, 4);
            return start;
        };
        code = section(n_logical);
        step = section(max_arcs > 4 * max_replicated ? max_arcs : 4 * max_replicated);
        counts = section(n_logical);
        packed = section(counter_words(n_logical));
        warp_counts = section(kWarps * counter_words(max_replicated));
        parts = section(n_blocks * round_up(counter_words(n_logical), 4));
        total = section(2 * counter_words(n_logical));
        before = section(max_replicated);
        queue = section(per_block);
        ids = section(per_block / 2);
        everyone = section(n_sources * n_logical);
        words = end;
    }
};

// The tokens of the whole batch, in shared memory.
struct BatchLoads {
    const int *totals;
    template <bool kMany>
    __device__ int64_t total(int expert) const {
        return totals[expert];
    }
};

// Whose counts a plan is made for.
enum Source {
    kOwnIds,     // those of the ids alone
    kGiven,      // everybody's, in global memory
    kExchanged,  // everybody's, exchanged here
};
struct NoExchange {};
template <Source kSource>
using ExchangeView = std::conditional_t<kSource == kExchanged, lplbk_exchange_view, NoExchange>;

// kSlots > 0: PairFlow for all groups; else MaskFlow with kWords. given: of kGiven.
template <int kSlots, int kWords, Source kSource, class Id>
__global__ void __launch_bounds__(kThreads, 1)
    run_in_cluster(const Id *ids, Id *rewritten, const __grid_constant__ FusedShape f, const __grid_constant__ PairTables pairs,
                   const __grid_constant__ GeneralTables general, const __grid_constant__ CountMatrix<int32_t> given,
                   const __grid_constant__ PlanOut out, const __grid_constant__ ExchangeView<kSource> view) {
    constexpr bool kGathered = kSource != kOwnIds;
    extern __shared__ int4 memory[];
    int *const words = reinterpret_cast<int *>(memory);
    MARK(0);
    const int solver_words = kSlots > 0 ? PairSpace::words_of(general.shape, pairs.n_groups) : GeneralSpace::words_of(general.shape, general.at);
    const int n_blocks = (int)cluster_size(), block = (int)cluster_rank();
    const FusedSpace at(solver_words, f.n_logical, f.max_replicated, kSlots > 0 ? 0 : general.shape.max_arcs, n_blocks, f.per_block,
                        kSource == kExchanged ? given.n_sources : 0);
    const PairSpace pair_space(words, pairs);
    const GeneralSpace general_space(words, general);
    int *const code = words + at.code;
    int *const counts = words + at.counts;
    unsigned *const packed = reinterpret_cast<unsigned *>(words + at.packed);
    unsigned *const warp_counts = reinterpret_cast<unsigned *>(words + at.warp_counts);
    int *const totals = words + at.total;
    int *const before = words + at.before;
    uint16_t *const kept_ids = reinterpret_cast<uint16_t *>(words + at.ids);
    unsigned *const queue = reinterpret_cast<unsigned *>(words + at.queue);
    const int count_words = round_up(counter_words(f.n_logical), 4);
    const int row_words = counter_words(f.max_replicated);
    const bool writes = block == 0;
    const int n_solvers = kSlots > 0 ? min(pairs.n_groups, kMaxSolvers) : kWords;

    // Tables, cleared memory.
    int lanes[(kSlots > 0 ? kSlots : 1)];
    HomeEntry first_home;
    ExpertRecord first_record;
    if constexpr (kSlots > 0) {
        if (warp_id() < n_solvers) load_lanes<kSlots>(pairs, warp_id(), lanes);
        if (threadIdx.x < f.n_logical) first_home.word = pairs.home[threadIdx.x];
        pair_space.clear(pairs);
    } else {
        if (threadIdx.x < f.n_logical) first_record = record_of(general, threadIdx.x);
        general_space.open(words, general, 0);
    }
    const int n_replicated = *f.n_replicated;
#pragma unroll 1
    for (int e = threadIdx.x; e < f.n_logical; e += kThreads) code[e] = f.code[e];
#pragma unroll 1
    for (int i = threadIdx.x; i < at.parts - at.counts; i += kThreads) counts[i] = 0;  // packed and warp_counts follow
    wait_for_stream();
    exchange::Call call;
    if constexpr (kSource == kExchanged) call = exchange::begin(view);

    // Ids.
    const int64_t start = (int64_t)block * f.per_block;
    const int n = (int)max(min(f.n_ids - start, (int64_t)f.per_block), (int64_t)0);
    const int rows = ceil_div(n, 32);
    int bad = 0;
#pragma unroll 8
    for (int i = threadIdx.x; i < 32 * rows; i += kThreads) {
        const unsigned id = i < n ? packed_id(ids[start + i], f.n_logical) : kNoExpert;
        bad += id == kBadId;
        kept_ids[i] = (uint16_t)id;
    }
    let_next_start();
    MARK(1);
    __syncthreads();
    MARK(2);

    // Counts. Rows of 32 ids belong to warps from here on.
    const int rows_of_warp = ceil_div(rows, kWarps - n_solvers);
    const int first_row = (warp_id() - n_solvers) * rows_of_warp;
    const int last_row = warp_id() < n_solvers ? first_row : min(first_row + rows_of_warp, rows);
    unsigned *const my_queue = queue + 32 * first_row;  // warps that solve have none, and no rows
    int n_queued = 0;
#pragma unroll 4
    for (int row = first_row; row < last_row; ++row) {
        const unsigned id = kept_ids[32 * row + lane_id()];
        int c = 0;
        if (id < kBadId) {
            atomicAdd(&counts[id], 1);
            c = code[id];
        }
        const unsigned replicated = __ballot_sync(kFullWarp, c < 0);
        if (c < 0) my_queue[n_queued + __popc(replicated & lanes_below())] = Queued::of(32 * row + lane_id(), 0);
        n_queued += __popc(replicated);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < counter_words(f.n_logical); i += kThreads) {
        packed[i] = counts[2 * i] | (2 * i + 1 < f.n_logical ? counts[2 * i + 1] << 16 : 0);
    }
    MARK(3);
    cluster_arrive();
    cluster_wait();
    MARK(4);
    int4 *const parts = reinterpret_cast<int4 *>(words + at.parts);
#pragma unroll 1
    for (int b = warp_id(); b < n_blocks; b += kWarps) {
#pragma unroll 1
        for (int i = lane_id(); i < count_words / 4; i += 32) {
            parts[b * (count_words / 4) + i] = cluster_load(reinterpret_cast<const int4 *>(packed) + i, b);
        }
    }
    __syncthreads();
    MARK(5);
    cluster_arrive();  // this block has read the others; it waits for them before it ends
#pragma unroll 1
    for (int i = threadIdx.x; i < counter_words(f.n_logical); i += kThreads) {
        int low = 0, high = 0, low_before = 0, high_before = 0;
#pragma unroll 4
        for (int b = 0; b < n_blocks; ++b) {
            const unsigned both = reinterpret_cast<const unsigned *>(parts)[b * count_words + i];
            if (b == block) low_before = low, high_before = high;
            low += both & 0xffff;
            high += both >> 16;
        }
        totals[2 * i] = low;
        totals[2 * i + 1] = high;
        if (code[2 * i] < 0) before[-1 - code[2 * i]] = low_before;
        if (2 * i + 1 < f.n_logical && code[2 * i + 1] < 0) before[-1 - code[2 * i + 1]] = high_before;
    }
    __syncthreads();
    MARK(6);
    CountMatrix<int32_t> gathered = given;
    if constexpr (kSource == kExchanged) {
        int *const everyone = words + at.everyone;
        exchange::send(view, call, totals, 32 * (warp_id() * n_blocks + block) + lane_id(), n_blocks * kThreads);
        exchange::receive(view, call, totals, threadIdx.x, kThreads,
                          [&](int row, int column, int32_t count) { everyone[row * f.n_logical + column] = count; });
        __syncthreads();
        gathered.counts = everyone;
        // All blocks have met since they began.
        if (writes && threadIdx.x == 0) exchange::end(view, call);
    }

    // Loads of ranks and bundles; single places are done with.
    const BatchLoads batch{totals};
    const auto total_of = [&](int expert) -> int64_t {
        if constexpr (kGathered) {
            return gathered.total<true>(expert);
        } else {
            return batch.total<false>(expert);
        }
    };
    OwnTokens own;
    bool large = false;
    const auto put_single = [&](int expert, int slot, int place_rank, int tokens) {
        const int take = kGathered ? gathered.of(out.rank, expert) : tokens;
        if (!writes) return;
        out.quota[slot] = tokens;
        out.take[slot] = take;
        if (out.rank >= 0) own.add(out, place_rank, take);
    };
    int4 *const steps = reinterpret_cast<int4 *>(words + at.step);
    if constexpr (kSlots > 0) {
        const bool warp_on_one_rank = (pairs.n_own & 31) == 0;
#pragma unroll 1
        for (int i = threadIdx.x; i < f.n_logical; i += kThreads) {
            const HomeEntry home = i == threadIdx.x ? first_home : HomeEntry{pairs.home[i]};
            large |= gather_slot(pairs, pair_space, i, home, total_of(home.expert()), warp_on_one_rank, [&](const HomeEntry &home, int tokens) {
                put_single(home.expert(), home.slot(), home.slot() / out.n_local, tokens);
                // A copy beside its original: numbered like the replicated ones, but all go to the original.
                if (code[home.expert()] < 0) steps[-1 - code[home.expert()]] = make_int4(0, 0, home.slot(), home.slot());
            });
        }
    } else {
#pragma unroll 1
        for (int expert = threadIdx.x; expert < f.n_logical; expert += kThreads) {
            const ExpertRecord record = expert == threadIdx.x ? first_record : record_of(general, expert);
            const int64_t total = total_of(expert);
            const int tokens = fitted(total);
            large |= total > kSurelyFits;
            general_space.tokens[expert] = tokens;
            if (record.bundle() >= 0) {
                atomicAdd(&general_space.flow.sum[record.bundle()], tokens);
            } else {
                atomicAdd(&general_space.flow.base[record.rank()], tokens);
                put_single(expert, record.slot(), record.rank(), tokens);
            }
        }
    }
    bool overflow = false;
    if constexpr (kGathered) {
        if (__syncthreads_or(large)) {
            WideSum *wide = kSlots > 0 ? pair_space.wide : general_space.wide;
            for (int e = threadIdx.x; e < f.n_logical; e += kThreads) wide->add(total_of(e));
            __syncthreads();
            overflow = wide->overflow();
        }
    } else {
        __syncthreads();
    }
    MARK(7);

    // The first warps solve, the others number the occurrences of replicated experts.
    PairFlow<(kSlots > 0 ? kSlots : 1)> flow;
    if constexpr (kSlots > 0) {
        if (warp_id() < n_solvers && !overflow) {
#pragma unroll 1
            for (int group = warp_id(); group < pairs.n_groups; group += n_solvers) {
                if (group != warp_id()) load_lanes<kSlots>(pairs, group, lanes);
                solve_pair_group<kSlots>(pairs, pair_space, group, lanes, flow);
                if (writes) write_pair_info<kSlots>(out, group, flow);
            }
        }
    } else {
        if (!overflow) solve_general_group<kWords>(general, general_space, 0, out, writes);
    }
    if (overflow && writes) {
        for (int i = threadIdx.x; i < pairs.n_groups * LPLBK_INFO_WORDS; i += kThreads) out.group_info[i] = 0;
        if (threadIdx.x == 0) out.count_overflow();
    }
    // The others number what they queued, each warp from 0.
    const int bits = bits_for(n_replicated);
    unsigned *const my_counts = warp_counts + warp_id() * row_words;
#pragma unroll 1
    for (int first = 0; first < n_queued; first += 32) {
        const bool active = first + lane_id() < n_queued;
        const unsigned place = active ? my_queue[first + lane_id()] : 0;
        const int i = active ? -1 - code[kept_ids[place]] : 0;
        const unsigned number = occurrence(active, i, bits, reinterpret_cast<uint16_t *>(my_counts));
        if (active) my_queue[first + lane_id()] = Queued::of(place, number);
    }
    MARK(16);
    __syncthreads();
    MARK(17);

    // Occurrences in the warps before each warp.
#pragma unroll 1
    for (int i = threadIdx.x; i < n_replicated; i += kThreads) {
        uint16_t *column = reinterpret_cast<uint16_t *>(warp_counts) + i;
        unsigned count[kWarps];
#pragma unroll
        for (int w = 0; w < kWarps; ++w) count[w] = column[2 * w * row_words];
        unsigned sum = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            column[2 * w * row_words] = (uint16_t)sum;
            sum += count[w];
        }
    }

    // Tokens of replicated experts.
    int moved = 0;
    int *const arc_take = words + at.step;
    if constexpr (kSlots > 0) {
#pragma unroll 1
        for (int i = threadIdx.x; i < f.n_logical; i += kThreads) {
            const HomeEntry home = i == threadIdx.x ? first_home : HomeEntry{pairs.home[i]};
            if (!home.paired()) continue;
            const int2 quota = pair_quotas(pairs, pair_space, i, home, overflow);
            int2 take = quota;
            const int ranks[2] = {home.slot() / out.n_local, home.copy_slot() / out.n_local};
            if constexpr (kGathered) {
                assign_tokens(
                    2, [&](int j) { return j == 0 ? quota.x : quota.y; }, [&](int j) { return j == 0 ? ranks[0] : ranks[1]; },
                    [&](int s) { return gathered.of(s, home.expert()); }, out.rank, out.per_node,
                    [&](int j, int tokens) { (j == 0 ? take.x : take.y) = tokens; });
            }
            steps[-1 - code[home.expert()]] = make_int4(take.x, take.x + take.y, home.slot(), home.copy_slot());
            if (!writes) continue;
            out.quota[home.slot()] = quota.x;
            out.quota[home.copy_slot()] = quota.y;
            out.take[home.slot()] = take.x;
            out.take[home.copy_slot()] = take.y;
            if (out.rank >= 0) {
                own.add(out, ranks[0], take.x);
                own.add(out, ranks[1], take.y);
            }
        }
    } else if (!kGathered) {
        const int n_arcs = general_space.tables.n_arcs();
#pragma unroll 1
        for (int arc = threadIdx.x; arc < n_arcs; arc += kThreads) {
            const int word = general_space.tables.arc_slot[arc];
            const int tokens = general_space.flow.x[arc];
            arc_take[arc] = tokens;
            moved += word < 0 ? tokens : 0;
            if (!writes) continue;
            out.quota[word & 0x7fffffff] = tokens;
            out.take[word & 0x7fffffff] = tokens;
            if (out.rank >= 0) own.add(out, general_space.tables.arc_rank[arc], tokens);
        }
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < general_space.tables.n_bundles(); i += kThreads) {
            const int first = general_space.tables.bundle_start[i];
            const int n_places = general_space.tables.bundle_start[i + 1] - first;
            const int expert = (general.tables + general.at.bundle_expert)[i];
            const auto quota = [&](int j) { return overflow ? (j == 0 ? general_space.tokens[expert] : 0) : general_space.flow.x[first + j]; };
            assign_tokens(
                n_places, quota, [&](int j) { return general_space.tables.arc_rank[first + j]; }, [&](int s) { return gathered.of(s, expert); },
                out.rank, out.per_node, [&](int j, int take) {
                    const int slot = general_space.tables.arc_slot[first + j] & 0x7fffffff;
                    arc_take[first + j] = take;
                    moved += j > 0 ? quota(j) : 0;
                    if (!writes) return;
                    out.quota[slot] = quota(j);
                    out.take[slot] = take;
                    if (out.rank >= 0) own.add(out, general_space.tables.arc_rank[first + j], take);
                });
        }
    }
    if (writes && (kSlots == 0 || out.rank >= 0)) {
        int *shared_own = kSlots > 0 ? pair_space.own : general_space.own;
        if (kSlots == 0) {
            const int sum = warp_sum(moved);
            if (lane_id() == 0 && sum != 0) atomicAdd(general_space.moved, sum);
        }
        if (out.rank >= 0) own.join(shared_own);
        __syncthreads();
        if (kSlots == 0 && threadIdx.x == 0) out.group_info[LPLBK_INFO_MOVED] = *general_space.moved;
        // The sums over all groups stand in the first one: they are only ever read added up.
        if (out.rank >= 0 && threadIdx.x < 3) {
            for (int group = 0; group < pairs.n_groups; ++group) {
                out.info(group)[LPLBK_INFO_OWN_RANK + threadIdx.x] = group == 0 ? shared_own[threadIdx.x] : 0;
            }
        }
    }
    __syncthreads();
    MARK(18);

    // Slots of the queued ids.
#pragma unroll 1
    for (int q = lane_id(); q < n_queued; q += 32) {
        const Queued entry{my_queue[q]};
        const int i = -1 - code[kept_ids[entry.place()]];
        const int number = (int)(before[i] + reinterpret_cast<const uint16_t *>(my_counts)[i] + entry.number());
        int slot;
        if constexpr (kSlots > 0) {
            const int4 step = steps[i];
            slot = number >= step.x && number < step.y ? step.w : step.z;
        } else {
            if (i < general_space.tables.n_bundles()) {
                const int first = general_space.tables.bundle_start[i], last = general_space.tables.bundle_start[i + 1];
                int left = number, there = first;
#pragma unroll 1
                for (int arc = first; arc < last; ++arc) {
                    left -= arc_take[arc];
                    if (left < 0) {
                        there = arc;
                        break;
                    }
                }
                slot = general_space.tables.arc_slot[there] & 0x7fffffff;
            } else {
                slot = record_of(general, kept_ids[entry.place()]).slot();  // its copy is beside the original
            }
        }
        kept_ids[entry.place()] = (uint16_t)(kSlotMark | slot);
    }
    __syncthreads();
    MARK(23);

    // Rewrite.
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += kThreads) {
        const unsigned id = kept_ids[i];
        int slot = -1;
        if (id < kSlotMark) {
            slot = code[id];
        } else if (id < kBadId) {
            slot = id - kSlotMark;
        }
        rewritten[start + i] = (Id)slot;
    }
    bad = warp_sum(bad);
    if (lane_id() == 0 && bad != 0) atomicAdd(reinterpret_cast<unsigned long long *>(f.invalid), (unsigned long long)bad);
    MARK(19);
    cluster_wait();
    MARK(20);
}

template <class Id, Source kSource>
auto fused_kernel(const lplbk_planner &planner) {
    switch (planner.shape.pair_slots) {
    case 2: return run_in_cluster<2, 0, kSource, Id>;
    case 4: return run_in_cluster<4, 0, kSource, Id>;
    case 8: return run_in_cluster<8, 0, kSource, Id>;
    default: return planner.layout.mask_words == 1 ? run_in_cluster<0, 1, kSource, Id> : run_in_cluster<0, 2, kSource, Id>;
    }
}

bool fused_shape(const lplbk_planner &planner) {
    const lplbk_shape &shape = planner.shape;
    if (planner.solver != 0) return false;  // LPLB_SOLVER_FLOW only
    if (shape.pair_slots > 0) return shape.n_groups <= 4 * kMaxSolvers;
    return shape.n_groups == 1 && planner.layout.mask_words > 0 && shape.combined <= 1;
}

int max_replicated(const lplbk_shape &shape) { return max(1, min(shape.n_logical, shape.n_physical - shape.n_logical)); }

FusedSpace space_of(const lplbk_planner &planner, int n_blocks, int per_block, int n_sources) {
    const lplbk_shape &shape = planner.shape;
    const bool pairs = shape.pair_slots > 0;
    const int solver_words = pairs ? PairSpace::words_of(shape, shape.n_groups) : GeneralSpace::words_of(shape, planner.layout);
    return FusedSpace(solver_words, shape.n_logical, max_replicated(shape), pairs ? 0 : shape.max_arcs, n_blocks, per_block,
                      n_sources);
}

struct FusedSize {
    int blocks, per_block;
};

FusedSize fused_size(const lplbk_planner &planner, int64_t n_ids, int64_t max_blocks) {
    int blocks = 1;
    const int most = max_blocks > 0 ? (int)min(max_blocks, (int64_t)planner.info.max_cluster) : planner.info.max_cluster;
    while (2 * blocks <= most && ceil_div64(n_ids, blocks) > 512) blocks *= 2;
    const int64_t per_block = max(ceil_div64(ceil_div64(n_ids, blocks), 32) * 32, (int64_t)32);
    return {blocks, (int)min(per_block, (int64_t)1 << 30)};
}

template <class Id, Source kSource>
cudaError_t launch_fused(const lplbk_planner &planner, const void *ids, int64_t n_ids, const int32_t *given, void *out, void *counter,
                         int32_t counter64, int64_t max_blocks, const ExchangeView<kSource> &view, cudaStream_t stream) {
    const lplbk_shape &shape = planner.shape;
    const lplbk_layout &at = planner.layout;
    const FusedSize size = fused_size(planner, n_ids, max_blocks);
    const FusedShape fused{n_ids, size.per_block, shape.n_logical, max_replicated(shape), planner.tables + at.code,
                           planner.tables + at.n_replicated, planner.counters + LPLBK_COUNTER_INVALID};
    const PairTables pairs{reinterpret_cast<const int4 *>(planner.tables + at.home), planner.tables + at.lanes, shape.n_groups, 0,
                           shape.group_size, shape.n_redundant, shape.n_logical / shape.ep_size, shape.combined};
    const GeneralTables general{shape, at, planner.tables, planner.scratch};
    const CountMatrix<int32_t> matrix{given, kSource == kOwnIds ? 1 : shape.ep_size, shape.n_logical};
    const PlanOut plan = PlanOut::of(planner, nullptr, nullptr, counter, counter64);
    const int words = space_of(planner, size.blocks, size.per_block, kSource == kExchanged ? shape.ep_size : 0).words;
    return launch(planner.info, fused_kernel<Id, kSource>(planner), size.blocks, kThreads, 4 * words,
                  planner.info.max_cluster > 1 ? size.blocks : 0, stream, static_cast<const Id *>(ids), static_cast<Id *>(out), fused,
                  pairs, general, matrix, plan, view);
}

template <class Id, Source kSource>
cudaError_t prepare_fused_kernel(lplbk_planner &planner) {
    const auto kernel = fused_kernel<Id, kSource>(planner);
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, planner.info.shared_bytes);
    if (error != cudaSuccess || planner.info.max_cluster == 1) return error;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
    // The largest cluster that the device can hold with all the shared memory a block may ask for.
    for (int blocks = 16; blocks > 1; blocks /= 2) {
        cudaLaunchAttribute attribute;
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {(unsigned)blocks, 1, 1};
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3((unsigned)blocks);
        config.blockDim = dim3(kThreads);
        config.dynamicSmemBytes = (size_t)planner.info.shared_bytes;
        config.attrs = &attribute;
        config.numAttrs = 1;
        int clusters = 0;
        error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
        if (error == cudaSuccess && clusters > 0) {
            planner.info.max_cluster = min(blocks, planner.info.max_cluster);
            return cudaSuccess;
        }
        cudaGetLastError();
    }
    planner.info.max_cluster = 1;
    return cudaSuccess;
}

// n_sources: as in FusedSpace.
bool fused_fits(const lplbk_planner &planner, int64_t n_ids, int64_t max_blocks, int n_sources) {
    if (!fused_shape(planner) || n_ids > planner.fused_ids) return false;
    if (planner.info.max_cluster == 1 && n_ids > kMaxWithoutCluster) return false;
    const FusedSize size = fused_size(planner, n_ids, max_blocks);
    if (size.per_block > kMaxPerBlock) return false;
    return 4 * space_of(planner, size.blocks, size.per_block, n_sources).words <= planner.info.shared_bytes;
}

}  // namespace

bool fused_possible(const lplbk_planner &planner, int64_t n_ids, int64_t max_blocks) {
    return fused_fits(planner, n_ids, max_blocks, 0);
}

cudaError_t run_fused(const lplbk_planner &planner, const void *ids, int32_t ids64, int64_t n_ids, const int32_t *gathered, void *out,
                      void *counter, int32_t counter64, int64_t max_blocks, cudaStream_t stream) {
    const bool many = gathered != nullptr && planner.shape.ep_size > 1;
    if (ids64) {
        return many ? launch_fused<int64_t, kGiven>(planner, ids, n_ids, gathered, out, counter, counter64, max_blocks, {}, stream)
                    : launch_fused<int64_t, kOwnIds>(planner, ids, n_ids, gathered, out, counter, counter64, max_blocks, {}, stream);
    }
    return many ? launch_fused<int32_t, kGiven>(planner, ids, n_ids, gathered, out, counter, counter64, max_blocks, {}, stream)
                : launch_fused<int32_t, kOwnIds>(planner, ids, n_ids, gathered, out, counter, counter64, max_blocks, {}, stream);
}

int32_t prepare_fused(lplbk_planner &planner) {
    planner.fused_ids = kFusedIds;
    if (!fused_shape(planner)) return 0;
    if (planner.info.max_cluster > 1) planner.info.max_cluster = 16;
    cudaError_t error = prepare_fused_kernel<int64_t, kOwnIds>(planner);
    if (error == cudaSuccess) error = prepare_fused_kernel<int32_t, kOwnIds>(planner);
    if (error == cudaSuccess) error = prepare_fused_kernel<int64_t, kGiven>(planner);
    if (error == cudaSuccess) error = prepare_fused_kernel<int32_t, kGiven>(planner);
    if (error == cudaSuccess) error = prepare_fused_kernel<int64_t, kExchanged>(planner);
    if (error == cudaSuccess) error = prepare_fused_kernel<int32_t, kExchanged>(planner);
    return taken(error);
}

}  // namespace lplb

extern "C" {

int64_t lplbk_scratch_words(const lplbk_planner *planner) {
    return lplb::round_up((int)lplb::solve_scratch_words(planner->shape), 4) + lplb::multi_scratch_words(planner->shape);
}

int32_t lplbk_prepare(lplbk_planner *planner) {
    lplb::OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return lplb::taken(on.error());
    int32_t error = lplb::prepare_solve(*planner);
    if (error == 0) error = lplb::prepare_rewrite(*planner);
    if (error == 0) error = lplb::prepare_fused(*planner);
    return error;
}

int32_t lplbk_run(const lplbk_planner *planner, const void *ids, int32_t ids64, int64_t n_ids, const int32_t *gathered, void *out, void *counter,
                  int32_t counter64, int64_t max_blocks, void *stream) {
    using namespace lplb;
    OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const auto queue = static_cast<cudaStream_t>(stream);
    if (!planner->has_replicas) return taken(rewrite_plainly(*planner, ids, ids64, n_ids, out, counter, counter64, max_blocks, queue));
    if (fused_possible(*planner, n_ids, max_blocks)) {
        return taken(run_fused(*planner, ids, ids64, n_ids, gathered, out, counter, counter64, max_blocks, queue));
    }
    const Runs runs = runs_of(*planner, n_ids, max_blocks);
    cudaError_t error = count_runs(*planner, ids, ids64, n_ids, runs, gathered == nullptr, queue);
    if (error == cudaSuccess) {
        error = gathered == nullptr ? solve_totals(*planner, counter, counter64, queue)
                                    : solve_gathered(*planner, gathered, counter, counter64, queue);
    }
    if (error == cudaSuccess) error = rewrite_runs(*planner, ids, ids64, n_ids, runs, out, gathered == nullptr, queue);
    return taken(error);
}

int32_t lplbk_run_exchanging(const lplbk_planner *planner, const lplbk_exchange_view *view, const void *ids, int32_t ids64, int64_t n_ids,
                             void *out, void *counter, int32_t counter64, int64_t max_blocks, void *stream) {
    using namespace lplb;
    if (!planner->has_replicas || view->n_nodes != 1 || !fused_fits(*planner, n_ids, max_blocks, view->n_ranks)) return LPLBK_UNSUPPORTED;
    OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const auto run = ids64 ? launch_fused<int64_t, kExchanged> : launch_fused<int32_t, kExchanged>;
    return taken(run(*planner, ids, n_ids, nullptr, out, counter, counter64, max_blocks, *view, static_cast<cudaStream_t>(stream)));
}
}

PROFILE_READER(lplbk_profile_run)
