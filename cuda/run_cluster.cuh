// The whole plan in one launch of one cluster of blocks: ids in, ids out.
//
// Every block counts its run of ids and adds up its share of the loads; the blocks read each other's shares from shared memory, and each
// solves for itself (the solver is deterministic, and waiting for another block's answer would take longer). While the first warps of a
// block solve, the others number the occurrences of replicated experts and rewrite all other ids, so that little is left to do when the
// plan is there. The ids stay in shared memory in between, 16 bits each; those of replicated experts are queued as well, since there are
// few of them as a rule. With an exchange the blocks send this rank's counts to the peers between them, and each waits for everybody's.
#pragma once

#include <type_traits>

#include "exchange.cuh"
#include "ids.cuh"
#include "solve_general.cuh"
#include "solve_pairs.cuh"

namespace lplb {
namespace fused {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxSolvers = 8;         // warps that solve; the others number and rewrite ids meanwhile
static_assert(kMaxSolvers < kWarps && kMaskWarps < kWarps, "somebody must rewrite the ids");
constexpr int kMaxGroups = 4 * kMaxSolvers;
static_assert(kMaxGroups <= 32, "a set of groups is a word");
constexpr int kMaxPerBlock = 1 << 14;  // ids; counters have 16 bits

struct FusedShape {
    int64_t n_ids;
    int per_block;  // ids, a multiple of 32
    int n_logical;
    int max_replicated;
    int n_bases;    // ranks: sums of single places
    const int *code;
    const int *n_replicated;
    const int *replicated;  // bundle_expert
    const int *expert_class, *expert_copy;
    const int *digest;
    int64_t *invalid;
};

// A queued id: its place in the block's run, and which occurrence of its expert in the warp's run it is.
struct Queued {
    unsigned word;
    __device__ unsigned place() const { return word & (kMaxPerBlock - 1); }
    __device__ unsigned number() const { return word / kMaxPerBlock; }
    __device__ static unsigned of(unsigned place, unsigned number) { return place | number * kMaxPerBlock; }
};

// Shared memory of a block beside the solver's, in words from the start.
struct FusedSpace {
    // code [n_logical] and home [n_logical] (16 bits): slot and rank of a single place, or which replicated expert it is.
    // step [max_replicated][4]: slot classes: tokens at the original, of both, their slots; else tokens taken from each arc.
    // kind [max_replicated]: slot class, -1 - rank of a copy beside its original. before: occurrences in earlier blocks.
    // counts [n_logical] of this block; packed: the same in 16 bits. share [n_bases + max_replicated]: this block's part of the
    // loads; shares: those of all blocks. With an exchange: totals [n_logical], and behind them the digest; everyone
    // [sources][n_logical].
    int code, home, step, kind, tokens, counts, share, packed, warp_counts, shares, before, queue, ids, totals, everyone, words;

    // n_sources: ranks whose counts are exchanged, 0: none are.
    __host__ __device__ FusedSpace(int solver_words, int n_logical, int max_replicated, int n_bases, int max_arcs, int n_blocks,
                                   int per_block, int n_sources) {
        int end = round_up(solver_words, 4);
        const auto section = [&end](int words) {
            const int start = end;
            end += round_up(words, 4);
            return start;
        };
        code = section(n_logical);
        home = section(counter_words(n_logical));
        step = section(max_arcs > 4 * max_replicated ? max_arcs : 4 * max_replicated);
        kind = section(max_replicated);
        tokens = section(max_replicated);
        counts = section(n_logical);
        share = section(n_bases + max_replicated);
        warp_counts = section(kWarps * counter_words(max_replicated));
        packed = section(counter_words(n_logical));
        shares = section(n_blocks * round_up(n_bases + max_replicated, 4));
        before = section(max_replicated);
        queue = section(per_block);
        ids = section(per_block / 2);
        totals = section(n_sources > 0 ? n_logical + 1 : 0);
        everyone = section(n_sources * n_logical);
        words = end;
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
    constexpr bool kPairs = kSlots > 0;
    extern __shared__ int4 memory[];
    int *const words = reinterpret_cast<int *>(memory);
    MARK(0);
    const int solver_words =
        kPairs ? PairSpace::words_of(general.shape, pairs.n_groups) : GeneralSpace::words_of(general.shape, general.at);
    const int n_blocks = (int)cluster_size(), block = (int)cluster_rank();
    const FusedSpace at(solver_words, f.n_logical, f.max_replicated, f.n_bases, kPairs ? 0 : general.shape.max_arcs, n_blocks, f.per_block,
                        kSource == kExchanged ? given.n_sources : 0);
    const PairSpace pair_space(words, pairs);
    const GeneralSpace general_space(words, general);
    int *const code = words + at.code;
    uint16_t *const home = reinterpret_cast<uint16_t *>(words + at.home);
    int4 *const steps = reinterpret_cast<int4 *>(words + at.step);
    int *const arc_take = words + at.step;
    int *const kind = words + at.kind;
    int *const tokens = words + at.tokens;
    int *const counts = words + at.counts;
    int *const share = words + at.share;
    unsigned *const packed = reinterpret_cast<unsigned *>(words + at.packed);
    unsigned *const warp_counts = reinterpret_cast<unsigned *>(words + at.warp_counts);
    int *const before = words + at.before;
    uint16_t *const kept_ids = reinterpret_cast<uint16_t *>(words + at.ids);
    unsigned *const queue = reinterpret_cast<unsigned *>(words + at.queue);
    const int share_words = round_up(f.n_bases + f.max_replicated, 4);
    const int row_words = counter_words(f.max_replicated);
    const bool writes = block == 0;
    const int n_solvers = kPairs ? min(pairs.n_groups, kMaxSolvers) : kMaskWarps;
    const int warp = uniform_warp_id();
    const int n_replicated = *f.n_replicated;

    // ---- Tables and cleared memory: before the stream's turn comes
    int lanes[(kPairs ? kSlots : 1)] = {};
    if constexpr (kPairs) {
        if (warp < n_solvers) load_lanes<kSlots>(pairs, warp, lanes);
        pair_space.clear(pairs, threadIdx.x, kThreads);
    } else {
        general_space.open(words, general, 0);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < at.packed - at.counts; i += kThreads) counts[i] = 0;  // share and warp_counts follow
#pragma unroll 1
    for (int e = threadIdx.x; e < f.n_logical; e += kThreads) {
        const int c = f.code[e];
        code[e] = c;
        home[e] = (uint16_t)(c < 0 ? 0 : c / out.n_local);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < n_replicated; i += kThreads) {
        const int expert = f.replicated[i];
        if constexpr (kPairs) {
            const ExpertRecord record = record_of(general, expert);
            const bool paired = record.bundle() >= 0;
            kind[i] = paired ? f.expert_class[expert] : -1 - record.slot() / out.n_local;
            // A copy beside its original takes nothing.
            steps[i] = make_int4(0, 0, record.slot(), paired ? f.expert_copy[expert] : record.slot());
        } else if (i >= general.tables[general.at.image + LPLBK_IMAGE_BUNDLES]) {
            kind[i] = -1 - record_of(general, expert).slot() / out.n_local;
        }
    }
    if constexpr (kSource == kExchanged) {
        if (threadIdx.x == 0) words[at.totals + f.n_logical] = *f.digest;
    }
    wait_for_stream();
    exchange::Call call;
    if constexpr (kSource == kExchanged) call = exchange::begin(view);
    if constexpr (kSource == kGiven) {
        if (writes) compare_digests(given, out);
    }

    // ---- Ids
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

    // ---- Counts. Rows of 32 ids belong to warps from here on
    const int rows_of_warp = ceil_div(rows, kWarps - n_solvers);
    const int first_row = (warp - n_solvers) * rows_of_warp;
    const int last_row = warp < n_solvers ? first_row : min(first_row + rows_of_warp, rows);
    unsigned *const my_queue = queue + 32 * first_row;  // warps that solve have none, and no rows
    int n_queued = 0;
    constexpr int kBatch = 4;  // rows read before anything is written: the compiler must not turn the two around by itself
#pragma unroll 1
    for (int row = first_row; row < last_row; row += kBatch) {
        unsigned id[kBatch];
        int c[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) id[k] = row + k < last_row ? kept_ids[32 * (row + k) + lane_id()] : kNoExpert;
#pragma unroll
        for (int k = 0; k < kBatch; ++k) c[k] = id[k] < kBadId ? code[id[k]] : 0;
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            if (id[k] < kBadId) atomicAdd(&counts[id[k]], 1);
            const unsigned replicated = __ballot_sync(kFullWarp, c[k] < 0);
            if (c[k] < 0) my_queue[n_queued + __popc(replicated & lanes_below())] = Queued::of(32 * (row + k) + lane_id(), 0);
            n_queued += __popc(replicated);
        }
    }
    __syncthreads();

    // ---- This block's share of the loads: tokens of single places by rank, tokens of replicated experts
#pragma unroll 1
    for (int first = 0; first < f.n_logical; first += kThreads) {
        const int expert = first + threadIdx.x;
        const int c = expert < f.n_logical ? code[expert] : -1;
        const int mine = expert < f.n_logical ? counts[expert] : 0;
        if (expert < f.n_logical && c < 0) share[f.n_bases - 1 - c] = mine;
        // The experts of a warp's lanes often are on one rank: then their sum is added in one go.
        const unsigned singles = __ballot_sync(kFullWarp, c >= 0);
        const int rank = c >= 0 ? home[expert] : 0;
        const int first_rank = __shfl_sync(kFullWarp, rank, singles == 0 ? 0 : __ffs(singles) - 1);
        if (__all_sync(kFullWarp, c < 0 || rank == first_rank)) {
            const int sum = warp_sum(c < 0 ? 0 : mine);
            if (lane_id() == 0 && sum != 0) atomicAdd(&share[first_rank], sum);
        } else if (c >= 0 && mine != 0) {
            atomicAdd(&share[rank], mine);
        }
    }
    if (n_blocks > 1 || kSource == kExchanged) {
#pragma unroll 1
        for (int i = threadIdx.x; i < counter_words(f.n_logical); i += kThreads) {
            packed[i] = counts[2 * i] | (2 * i + 1 < f.n_logical ? counts[2 * i + 1] << 16 : 0);
        }
    }
    MARK(3);
    cluster_arrive();
    PairFlow<(kPairs ? kSlots : 1)> flow;
    if constexpr (kPairs) flow.open(lanes, pairs.n_ranks);
    cluster_wait();
    MARK(4);
    int4 *const shares = reinterpret_cast<int4 *>(words + at.shares);
#pragma unroll 1
    for (int b = warp; b < n_blocks; b += kWarps) {
#pragma unroll 1
        for (int i = lane_id(); i < share_words / 4; i += 32) {
            shares[b * (share_words / 4) + i] = cluster_load(reinterpret_cast<const int4 *>(share) + i, b);
        }
    }
    // Tokens of experts i = 2 word and 2 word + 1 in all blocks.
    const auto totals_of = [&](int word) {
        int low = 0, high = 0;
#pragma unroll 4
        for (int b = 0; b < n_blocks; ++b) {
            const unsigned both = cluster_load(packed + word, b);
            low += both & 0xffff;
            high += both >> 16;
        }
        return make_int2(low, high);
    };
    if constexpr (kSource == kExchanged) {
        for (int i = threadIdx.x; i < counter_words(f.n_logical); i += kThreads) {
            const int2 both = totals_of(i);
            words[at.totals + 2 * i] = both.x;
            if (2 * i + 1 < f.n_logical) words[at.totals + 2 * i + 1] = both.y;
        }
    }
    // A block that has read what it needs of the others says so; nobody ends before all have. The first block still reads counts. (All
    // warps of a block say it between the same barriers: when some said it later, compute-sanitizer came to no end.)
    const bool reads_later = kSource == kOwnIds && writes;
    if (!reads_later) cluster_arrive();
    __syncthreads();
    MARK(5);

    // ---- Loads
    CountMatrix<int32_t> gathered = given;
    if constexpr (kSource == kExchanged) {
        int *const everyone = words + at.everyone;
        const int *totals = words + at.totals;
        exchange::send(view, call, totals, 32 * (warp_id() * n_blocks + block) + lane_id(), n_blocks * kThreads);
        exchange::receive(view, call, totals, threadIdx.x, kThreads, [&](int row, int column, int32_t count) {
            if (column < f.n_logical) {
                everyone[row * f.n_logical + column] = count;
            } else if (count != totals[f.n_logical]) {
                exchange::disagree(view, call.epoch, row);
            }
        });
        __syncthreads();
        gathered.counts = everyone;
        // All blocks have met since they began.
        if (writes && threadIdx.x == 0) exchange::end(view, call);
    }
    int *const base = kPairs ? pair_space.base : general_space.flow.base;
    OwnTokens own;
    const auto add_replicated = [&](int i, int mine) {
        tokens[i] = mine;
        if constexpr (kPairs) {
            atomicAdd(kind[i] >= 0 ? &pair_space.class_sum[kind[i]] : &base[-1 - kind[i]], mine);
        } else if (i < general_space.tables.n_bundles()) {
            general_space.flow.sum[i] = mine;
        } else {
            atomicAdd(&base[-1 - kind[i]], mine);
        }
    };
    const auto put_single = [&](int expert, int all, int take) {
        out.quota[code[expert]] = all;
        out.take[code[expert]] = take;
        if (out.rank >= 0) own.add(out, home[expert], take);
    };
#pragma unroll 1
    for (int i = threadIdx.x; i < f.n_bases + n_replicated; i += kThreads) {
        int sum = 0, sum_before = 0;
#pragma unroll 4
        for (int b = 0; b < n_blocks; ++b) {
            if (b == block) sum_before = sum;
            sum += reinterpret_cast<const int *>(shares)[b * share_words + i];
        }
        if (i >= f.n_bases) before[i - f.n_bases] = sum_before;
        if constexpr (!kGathered) {
            if (i >= f.n_bases) {
                add_replicated(i - f.n_bases, sum);
            } else if (sum != 0) {
                atomicAdd(&base[i], sum);
            }
        }
    }
    unsigned overflow = 0;  // bit g: the total of group g does not fit 31 bits
    if constexpr (kGathered) {
        bool large = false;
#pragma unroll 1
        for (int expert = threadIdx.x; expert < f.n_logical; expert += kThreads) {
            const int64_t total = gathered.total<true>(expert);
            const int all = fitted(total);
            large |= total > kSurelyFits;
            if (code[expert] < 0) {
                add_replicated(-1 - code[expert], all);
            } else {
                atomicAdd(&base[home[expert]], all);
                if (writes) put_single(expert, all, gathered.of(out.rank, expert));
            }
        }
        if (__syncthreads_or(large)) {
            WideSum *wide = kPairs ? pair_space.wide : general_space.wide;
#pragma unroll 1
            for (int expert = threadIdx.x; expert < f.n_logical; expert += kThreads) {
                const int i = -1 - code[expert];
                const int rank = !kPairs ? 0 : i < 0 ? home[expert] : kind[i] < 0 ? -1 - kind[i] : kind[i] / pairs.n_redundant;
                wide[kPairs ? rank / pairs.n_ranks : 0].add(gathered.total<true>(expert));
            }
            __syncthreads();
#pragma unroll 1
            for (int group = 0; group < pairs.n_groups; ++group) overflow |= wide[group].overflow() ? 1u << group : 0;
        }
    } else {
        __syncthreads();
    }
    MARK(7);

    // ---- The first warps solve
    if constexpr (kPairs) {
        if (warp < n_solvers) {
#pragma unroll 1
            for (int group = warp; group < pairs.n_groups; group += n_solvers) {
                if ((overflow >> group & 1) != 0) continue;
                if (group != warp) {
                    load_lanes<kSlots>(pairs, group, lanes);
                    flow.open(lanes, pairs.n_ranks);
                }
                solve_pair_group<kSlots>(pairs, pair_space, group, flow);
                if (writes && pairs.n_groups > n_solvers) write_pair_info<kSlots>(out, group, flow);
            }
        }
    } else {
        if (overflow == 0) solve_general_group<kWords>(general, general_space, 0, out, writes);
    }
    if (overflow != 0 && writes) {
#pragma unroll 1
        for (int group = warp; group < pairs.n_groups; group += kWarps) {
            if ((overflow >> group & 1) != 0) write_overflow(out, group);
        }
    }

    // ---- The others number what they queued, each warp from 0, rewrite what needs no plan, and write the tokens of single places
    const int bits = bits_for(n_replicated);
    unsigned *const my_counts = warp_counts + warp * row_words;
#pragma unroll 1
    for (int first = 0; first < n_queued; first += 32) {
        const bool active = first + lane_id() < n_queued;
        const unsigned place = active ? my_queue[first + lane_id()] : 0;
        const int i = active ? -1 - code[kept_ids[place]] : 0;
        const unsigned number = occurrence(active, i, bits, reinterpret_cast<uint16_t *>(my_counts));
        if (active) my_queue[first + lane_id()] = Queued::of(place, number);
    }
#pragma unroll 4
    for (int row = first_row; row < last_row; ++row) {
        const int i = 32 * row + lane_id();
        const unsigned id = kept_ids[i];
        const int slot = id < kBadId ? code[id] : -1;
        if (i < n && (slot >= 0 || id >= kBadId)) rewritten[start + i] = (Id)slot;
    }
    if (reads_later && warp >= n_solvers) {
#pragma unroll 1
        for (int i = threadIdx.x - 32 * n_solvers; i < counter_words(f.n_logical); i += kThreads - 32 * n_solvers) {
            const int2 both = n_blocks > 1 ? totals_of(i) : make_int2(counts[2 * i], 2 * i + 1 < f.n_logical ? counts[2 * i + 1] : 0);
            if (code[2 * i] >= 0) put_single(2 * i, both.x, both.x);
            if (2 * i + 1 < f.n_logical && code[2 * i + 1] >= 0) put_single(2 * i + 1, both.y, both.y);
        }
    }
    MARK(16);
    __syncthreads();
    MARK(17);
    if (reads_later) cluster_arrive();

    // ---- Tokens of replicated experts; occurrences in the warps before each warp, by the last threads; what the solvers found out
    if constexpr (kPairs) {
        const bool solved = warp < n_solvers && (overflow >> warp & 1) == 0;
        if (solved && writes && pairs.n_groups <= n_solvers) write_pair_info<kSlots>(out, warp, flow);
    }
    const int first_worker = kPairs ? 32 * n_solvers : 0;
#pragma unroll 1
    for (int i = kThreads - 1 - (int)threadIdx.x; i < n_replicated; i += kThreads) {
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
    int moved = 0;
    if constexpr (kPairs) {
#pragma unroll 1
        for (int i = (int)threadIdx.x - first_worker; i >= 0 && i < n_replicated; i += kThreads - first_worker) {
            const int all = tokens[i], of_class = kind[i];
            const int slot = steps[i].z, copy_slot = steps[i].w;
            int copied = 0;
            const bool stays = of_class < 0 || (overflow != 0 && (overflow >> of_class / (pairs.n_ranks * pairs.n_redundant) & 1) != 0);
            if (!stays) {
                const int sum = pair_space.class_sum[of_class];
                copied = sum - pair_space.class_kept[of_class];
                if (pairs.combined > 1) {
                    int earlier = 0;  // the experts of a class are numbered one after the other
                    for (int k = i - 1; k >= 0 && kind[k] == of_class; --k) earlier += tokens[k];
                    copied = share_of(copied, earlier, all, sum);
                }
            }
            int take[2] = {all - copied, copied};
            const int ranks[2] = {slot / out.n_local, copy_slot / out.n_local};
            if constexpr (kGathered) {
                const int expert = f.replicated[i];
                if (!stays) {
                    assign_tokens(
                        2, [&](int j) { return j == 0 ? all - copied : copied; }, [&](int j) { return j == 0 ? ranks[0] : ranks[1]; },
                        [&](int s) { return gathered.of(s, expert); }, out.rank, out.per_node, [&](int j, int mine) { take[j] = mine; });
                } else {
                    take[0] = gathered.of(out.rank, expert);
                }
            }
            steps[i] = make_int4(take[0], take[0] + take[1], slot, copy_slot);
            if (!writes) continue;
            out.quota[slot] = all - copied;
            out.take[slot] = take[0];
            if (of_class >= 0) {
                out.quota[copy_slot] = copied;
                out.take[copy_slot] = take[1];
            }
            if (out.rank >= 0) {
                own.add(out, ranks[0], take[0]);
                own.add(out, ranks[1], take[1]);
            }
        }
    } else {
        const int n_bundles = general_space.tables.n_bundles();
        if (!kGathered) {
            const int n_arcs = general_space.tables.n_arcs();
#pragma unroll 1
            for (int arc = threadIdx.x; arc < n_arcs; arc += kThreads) {
                const int word = general_space.tables.arc_slot[arc];
                const int mine = general_space.flow.x[arc];
                arc_take[arc] = mine;
                moved += word < 0 ? mine : 0;
                if (!writes) continue;
                out.quota[word & 0x7fffffff] = mine;
                out.take[word & 0x7fffffff] = mine;
                if (out.rank >= 0) own.add(out, general_space.tables.arc_rank[arc], mine);
            }
        } else {
#pragma unroll 1
            for (int i = threadIdx.x; i < n_bundles; i += kThreads) {
                const int first = general_space.tables.bundle_start[i];
                const int n_places = general_space.tables.bundle_start[i + 1] - first;
                const int expert = f.replicated[i];
                const auto quota = [&](int j) { return overflow != 0 ? (j == 0 ? tokens[i] : 0) : general_space.flow.x[first + j]; };
                assign_tokens(
                    n_places, quota, [&](int j) { return general_space.tables.arc_rank[first + j]; },
                    [&](int s) { return gathered.of(s, expert); }, out.rank, out.per_node,
                    [&](int j, int take) {
                        if (overflow != 0) take = j == 0 ? gathered.of(out.rank, expert) : 0;
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
        // Copies beside their original.
        if (writes) {
            for (int i = n_bundles + threadIdx.x; i < n_replicated; i += kThreads) {
                const int expert = f.replicated[i];
                const int take = kGathered ? gathered.of(out.rank, expert) : tokens[i];
                const int slot = record_of(general, expert).slot();
                out.quota[slot] = tokens[i];
                out.take[slot] = take;
                if (out.rank >= 0) own.add(out, -1 - kind[i], take);
            }
        }
    }
    if (writes && (!kPairs || out.rank >= 0)) {
        int *shared_own = kPairs ? pair_space.own : general_space.own;
        if (!kPairs) {
            const int sum = warp_sum(moved);
            if (lane_id() == 0 && sum != 0) atomicAdd(general_space.moved, sum);
        }
        if (out.rank >= 0) own.join(shared_own);
        __syncthreads();
        if (!kPairs && threadIdx.x == 0) out.group_info[LPLBK_INFO_MOVED] = *general_space.moved;
        // The sums over all groups stand in the first one: they are only ever read added up.
        if (out.rank >= 0 && threadIdx.x < 3) {
            for (int group = 0; group < pairs.n_groups; ++group) {
                out.info(group)[LPLBK_INFO_OWN_RANK + threadIdx.x] = group == 0 ? shared_own[threadIdx.x] : 0;
            }
        }
    }
    __syncthreads();
    MARK(18);

    // ---- Slots of the queued ids
#pragma unroll 2
    for (int q = lane_id(); q < n_queued; q += 32) {
        const Queued entry{my_queue[q]};
        const int i = -1 - code[kept_ids[entry.place()]];
        const int number = (int)(before[i] + reinterpret_cast<const uint16_t *>(my_counts)[i] + entry.number());
        int slot;
        if constexpr (kPairs) {
            const int4 step = steps[i];
            slot = number >= step.x && number < step.y ? step.w : step.z;
        } else if (i < general_space.tables.n_bundles()) {
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
            slot = record_of(general, kept_ids[entry.place()]).slot();
        }
        rewritten[start + entry.place()] = (Id)slot;
    }
    bad = warp_sum(bad);
    if (lane_id() == 0 && bad != 0) atomicAdd(reinterpret_cast<unsigned long long *>(f.invalid), (unsigned long long)bad);
    MARK(19);
    cluster_wait();
    MARK(20);
}

}  // namespace fused
}  // namespace lplb
