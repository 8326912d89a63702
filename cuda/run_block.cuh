// The whole plan in one launch of one cluster of blocks: ids in, ids out.
//
// Every block counts its part of the ids and adds up their loads; the blocks read each other's loads from shared memory, and each solves
// for itself (the solver is deterministic, and waiting for another block's answer would take longer). While the first warps of a
// block solve, the others number the occurrences of replicated experts and rewrite all other ids, so that little is left to do when the
// plan is there. The ids stay in shared memory in between, 16 bits each; those of replicated experts are queued as well, since there are
// few of them as a rule. With an exchange the blocks send this rank's counts to the peers between them, and each waits for everybody's.
//
// The steps are ClusterRun's functions, in the order in which the kernel at the end calls them.
#pragma once

#include <type_traits>

#include "run_space.cuh"
#include "solve/split.cuh"

namespace lplb {

// An argument of kernels that may exchange counts.
struct NoExchange {};
template <bool kGathered>
using ExchangeView = std::conditional_t<kGathered, lplbk_exchange_view, NoExchange>;

// kGathered: the plan is made for everybody's counts, `given` in global memory or, where the view has ranks, exchanged here; else for those
// of the ids alone. kRanked: the ranks differ.
template <Solver kSolver, bool kGathered, bool kRecords, bool kRanked>
struct ClusterRun {
    static constexpr bool kLanes = by_lanes(kSolver);

    const Tables &t;
    const RunIds &in;
    const PlanOut &out;
    const ExchangeView<kGathered> &view;
    const RecordingOf<kRecords> &record;
    const bool exchanges;
    const int n_blocks, block, warp;
    const bool writes;  // this block writes the plan
    const int n_ranks, n_bundled;
    const int n_solvers, max_replicated;
    const RunSpace at;
    const SolveSpace space;
    int *const words;
    int *const code;
    uint16_t *const rank_of;
    int *const counts;
    int *const block_loads;
    unsigned *const packed;
    uint16_t *const kept_ids;
    unsigned *const my_counts;
    // This block's ids, and this warp's rows of 32 of them. Warps that solve have none.
    const int64_t start;
    const int n, first_row, last_row;
    unsigned *const my_queue;
    int n_queued = 0;
    int bad = 0;
    CountMatrix<false> gathered;
    OwnTokens own;
    unsigned overflow = 0;  // bit g: the total of group g does not fit 31 bits

    __device__ ClusterRun(int4 *memory, const Tables &t, const RunIds &in, const CountMatrix<false> &given, const PlanOut &out,
                          const ExchangeView<kGathered> &view, const RecordingOf<kRecords> &record)
        : t(t),
          in(in),
          out(out),
          view(view),
          record(record),
          exchanges(exchanging(view)),
          n_blocks((int)cluster_size()),
          block((int)cluster_rank()),
          warp(uniform_warp_id()),
          writes(block == 0),
          n_ranks(t.shape.ep_size),
          n_bundled(t.n_bundled()),
          n_solvers(kLanes ? min(t.shape.n_groups, kMaxSolvers) : kMaskWarps),
          max_replicated(t.max_replicated()),
          at(t.shape, t.at, kLanes, n_blocks, in.per_block, exchanges ? given.n_sources : 0),
          space(reinterpret_cast<int *>(memory), t, kLanes, t.shape.n_groups, max_replicated),
          words(reinterpret_cast<int *>(memory)),
          code(words + at.code),
          rank_of(reinterpret_cast<uint16_t *>(words + at.rank_of)),
          counts(words + at.counts),
          block_loads(words + at.block_loads),
          packed(reinterpret_cast<unsigned *>(words + at.packed)),
          kept_ids(reinterpret_cast<uint16_t *>(words + at.ids)),
          my_counts(reinterpret_cast<unsigned *>(words + at.warp_counts) + warp * counter_words(max_replicated)),
          start((int64_t)block * in.per_block),
          n((int)max(min(in.n - start, (int64_t)in.per_block), (int64_t)0)),
          first_row((warp - n_solvers) * rows_of_warp()),
          last_row(warp < n_solvers ? first_row : min(first_row + rows_of_warp(), rows())),
          my_queue(reinterpret_cast<unsigned *>(words + at.queue) + 32 * first_row),
          gathered(given) {}

    __device__ static bool exchanging(const NoExchange &) { return false; }
    __device__ static bool exchanging(const lplbk_exchange_view &view) { return view.n_ranks > 0; }
    __device__ int rows() const { return ceil_div(n, 32); }
    __device__ int rows_of_warp() const { return ceil_div(rows(), kRunWarps - n_solvers); }
    __device__ int4 *cuts() const { return reinterpret_cast<int4 *>(words + at.cut); }
    __device__ int *arc_take() const { return words + at.cut; }
    // Every block needs every expert's tokens on this rank: to exchange them, or to count their units.
    __device__ bool needs_totals() const { return exchanges || (!kGathered && !t.in_tokens()); }
    __device__ int bundle_of(int i) const { return kLanes ? words[at.bundle + i] : i; }
    __device__ int load_words() const { return round_up(n_ranks + max_replicated, 4); }
    __device__ bool overflows(int group) const { return overflow != 0 && (overflow >> group & 1) != 0; }
    __device__ void write(int slot, int rank, int tokens, int take) {
        out.quota[slot] = tokens;
        out.take[slot] = take;
        if (out.rank >= 0) own.add(out, rank, take);
    }

    // ---- Tables and cleared memory: before the stream's turn comes
    __device__ __forceinline__ void open() const {
        space.sums.clear(t.shape, t.shape.n_groups, threadIdx.x, kRunThreads);
        if constexpr (!kLanes) space.open_group(t, 0);
#pragma unroll 1
        for (int i = threadIdx.x; i < at.packed - at.counts; i += kRunThreads) counts[i] = 0;  // block_loads and warp_counts follow
#pragma unroll 1
        for (int e = threadIdx.x; e < t.shape.n_logical; e += kRunThreads) {
            int c = t.code(e);
            if (c < -n_bundled) c = t.replicated(-1 - c).slot();  // its copy is on the same rank, and takes nothing
            code[e] = c;
            rank_of[e] = (uint16_t)(c < 0 ? 0 : c / out.n_local);
        }
        if constexpr (kLanes) {
#pragma unroll 1
            for (int i = threadIdx.x; i < n_bundled; i += kRunThreads) {
                const Expert expert = t.replicated(i);
                words[at.bundle + i] = expert.bundle();
                cuts()[i] = make_int4(0, 0, expert.slot(), expert.copy_slot());
            }
        }
        if (exchanges && threadIdx.x == 0) words[at.totals + t.shape.n_logical] = t.words[t.at.digest];
    }

    // ---- Ids
    template <class Id>
    __device__ __forceinline__ void read_ids(const Id *ids) {
        if (n <= 4 * kRunThreads) {
            read_ids<4>(ids);
        } else {
            read_ids<16>(ids);
        }
    }
    // kBatch: loads in flight.
    template <int kBatch, class Id>
    __device__ __forceinline__ void read_ids(const Id *ids) {
        const int end = 32 * rows(), n_logical = t.shape.n_logical;
        ids += start;
#pragma unroll 1
        for (int first = threadIdx.x; first < end; first += kBatch * kRunThreads) {
            Id id[kBatch];
#pragma unroll
            for (int k = 0; k < kBatch; ++k) id[k] = first + k * kRunThreads < n ? ids[first + k * kRunThreads] : (Id)-1;
#pragma unroll
            for (int k = 0; k < kBatch; ++k) {
                if (first + k * kRunThreads >= end) break;
                const unsigned packed = packed_id(id[k], n_logical);
                bad += packed == kBadId;
                kept_ids[first + k * kRunThreads] = (uint16_t)packed;
            }
        }
    }

    // ---- Counts. Rows of 32 ids belong to warps from here on
    __device__ __forceinline__ void count() {
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
    }

    // ---- This block's loads: tokens of single places by rank, tokens of bundled experts
    __device__ __forceinline__ void add_loads() const {
#pragma unroll 1
        for (int first = 0; first < t.shape.n_logical; first += kRunThreads) {
            const int expert = first + threadIdx.x;
            const int c = expert < t.shape.n_logical ? code[expert] : -1;
            const int mine = expert < t.shape.n_logical ? counts[expert] : 0;
            if (expert < t.shape.n_logical && c < 0) block_loads[n_ranks - 1 - c] = mine;
            // The experts of a warp's lanes often are on one rank: then their sum is added in one go.
            const unsigned singles = __ballot_sync(kFullWarp, c >= 0);
            const int rank = c >= 0 ? rank_of[expert] : 0;
            const int first_rank = __shfl_sync(kFullWarp, rank, singles == 0 ? 0 : __ffs(singles) - 1);
            if (__all_sync(kFullWarp, c < 0 || rank == first_rank)) {
                const int sum = warp_sum(c < 0 ? 0 : mine);
                if (lane_id() == 0 && sum != 0) atomicAdd(&block_loads[first_rank], sum);
            } else if (c >= 0 && mine != 0) {
                atomicAdd(&block_loads[rank], mine);
            }
        }
        if (n_blocks == 1 && !needs_totals()) return;
#pragma unroll 1
        for (int i = threadIdx.x; i < counter_words(t.shape.n_logical); i += kRunThreads) {
            packed[i] = counts[2 * i] | (2 * i + 1 < t.shape.n_logical ? counts[2 * i + 1] << 16 : 0);
        }
    }

    // ---- Those of the other blocks
    __device__ __forceinline__ void fetch_loads() const {
        int4 *const all_loads = reinterpret_cast<int4 *>(words + at.all_loads);
#pragma unroll 1
        for (int b = warp; b < n_blocks; b += kRunWarps) {
#pragma unroll 1
            for (int i = lane_id(); i < load_words() / 4; i += 32) {
                all_loads[b * (load_words() / 4) + i] = cluster_load(reinterpret_cast<const int4 *>(block_loads) + i, b);
            }
        }
        if (!needs_totals()) return;
        for (int i = threadIdx.x; i < counter_words(t.shape.n_logical); i += kRunThreads) {
            const int2 both = totals_of(i);
            words[at.totals + 2 * i] = both.x;
            if (2 * i + 1 < t.shape.n_logical) words[at.totals + 2 * i + 1] = both.y;
        }
    }
    // Tokens of the experts 2 word and 2 word + 1 in all blocks.
    __device__ __forceinline__ int2 totals_of(int word) const {
        int low = 0, high = 0;
#pragma unroll 4
        for (int b = 0; b < n_blocks; ++b) {
            const unsigned both = cluster_load(packed + word, b);
            low += both & 0xffff;
            high += both >> 16;
        }
        return make_int2(low, high);
    }

    // ---- Those of the other ranks
    __device__ __forceinline__ void exchange_counts(const exchange::Call &call) {
        int *const everyone = words + at.everyone;
        const int *totals = words + at.totals;
        const int n_logical = t.shape.n_logical;
        exchange::send(view, call, totals, 32 * (warp_id() * n_blocks + block) + lane_id(), n_blocks * kRunThreads);
        exchange::receive(view, call, totals, threadIdx.x, kRunThreads, [&](int row, int column, int32_t count) {
            if (column < n_logical) {
                everyone[row * n_logical + column] = count;
            } else if (count != totals[n_logical]) {
                exchange::disagree(view, call.epoch, row);
            }
        });
        __syncthreads();
        gathered.counts = everyone;
        gathered.width = n_logical;  // their digests are not kept
        // All blocks have met since they began.
        if (writes && threadIdx.x == 0) exchange::end(view, call);
    }

    // ---- Loads
    __device__ __forceinline__ void add_up() {
#pragma unroll 1
        for (int i = threadIdx.x; i < n_ranks + n_bundled; i += kRunThreads) {
            int sum = 0, sum_before = 0;
#pragma unroll 4
            for (int b = 0; b < n_blocks; ++b) {
                if (b == block) sum_before = sum;
                sum += words[at.all_loads + b * load_words() + i];
            }
            if (i >= n_ranks) words[at.before + i - n_ranks] = sum_before;
            if constexpr (!kGathered) {
                if (i >= n_ranks) {
                    add_bundled(i - n_ranks, sum);
                } else if (sum != 0 && t.in_tokens()) {
                    atomicAdd(&space.sums.base[i], sum);
                }
            }
        }
        if constexpr (kGathered) {
            add_up_gathered();
        } else {
            if (!t.in_tokens()) add_units_of_singles();
            __syncthreads();
        }
    }
    __device__ __forceinline__ void add_units_of_singles() const {
#pragma unroll 1
        for (int expert = threadIdx.x; expert < t.shape.n_logical; expert += kRunThreads) {
            const int units = code[expert] < 0 ? 0 : t.units(words[at.totals + expert]);
            if (units != 0) atomicAdd(&space.sums.base[rank_of[expert]], units);
        }
    }
    __device__ __forceinline__ void add_bundled(int i, int mine) const {
        space.tokens[i] = mine;
        if constexpr (kLanes) {
            atomicAdd(&space.sums.sum[bundle_of(i)], t.units(mine));
        } else {
            space.sums.sum[i] = t.units(mine);
        }
    }
    __device__ __forceinline__ void add_up_gathered() {
        const int n_logical = t.shape.n_logical;
        bool large = false;
#pragma unroll 1
        for (int expert = threadIdx.x; expert < n_logical; expert += kRunThreads) {
            const int64_t total = gathered.total<true>(expert);
            const int all = fitted(total), c = code[expert];
            large |= total > kSurelyFits;
            if (writes) record.add_tokens(expert, total);
            if (c < 0) {
                add_bundled(-1 - c, all);
            } else {
                atomicAdd(&space.sums.base[rank_of[expert]], t.units(all));
                if (writes) write(c, rank_of[expert], all, gathered.of(out.rank, expert));
            }
        }
        if (!__syncthreads_or(large)) return;
#pragma unroll 1
        for (int expert = threadIdx.x; expert < n_logical; expert += kRunThreads) {
            const int c = code[expert];
            const int group = !kLanes ? 0 : c < 0 ? bundle_of(-1 - c) / t.shape.max_bundles : rank_of[expert] / t.shape.group_size;
            space.sums.wide[group].add(gathered.total<true>(expert));
        }
        __syncthreads();
#pragma unroll 1
        for (int group = 0; group < t.shape.n_groups; ++group) overflow |= space.sums.wide[group].overflow() ? 1u << group : 0;
    }

    // ---- The first warps solve
    template <class Flow, int kColours>
    __device__ __forceinline__ void solve(Flow &flow, int (&column)[kColours]) const {
        if constexpr (kLanes) {
            const lplbk_shape &shape = t.shape;
#pragma unroll 1
            for (int group = warp; warp < n_solvers && group < shape.n_groups; group += n_solvers) {
                if (overflows(group)) continue;
                if (group != warp) {
                    Image(t.image(group), t.at).load_lanes(column);
                    flow.open(column, shape.group_size);
                    if constexpr (kRanked) {
                        RankNumbers numbers;
                        numbers.fetch(t, group);
                        numbers.open(flow, shape.group_size);
                    }
                }
                solve_by_lanes(flow, shape.group_size, space.sums.base + group * shape.group_size,
                               space.sums.sum + group * shape.max_bundles, space.sums.x + group * shape.max_arcs);
                if (writes && shape.n_groups > n_solvers) write_lane_info(out, group, flow);
            }
        } else {
            if (overflow == 0) solve_group<kSolver, kRanked>(t, space, 0, out, writes);
        }
        if (overflow == 0 || !writes) return;
#pragma unroll 1
        for (int group = warp; group < t.shape.n_groups; group += kRunWarps) {
            if (overflows(group)) write_overflow(out, group);
        }
    }

    // ---- The others number what they queued, each warp from 0, rewrite what needs no plan, and write the tokens of single places
    __device__ __forceinline__ void number_queued() const {
        const int bits = bits_for(n_bundled);
#pragma unroll 1
        for (int first = 0; first < n_queued; first += 32) {
            const bool active = first + lane_id() < n_queued;
            const unsigned place = active ? my_queue[first + lane_id()] : 0;
            const int i = active ? -1 - code[kept_ids[place]] : 0;
            const unsigned number = occurrence(active, i, bits, reinterpret_cast<uint16_t *>(my_counts));
            if (active) my_queue[first + lane_id()] = Queued::of(place, number);
        }
    }
    template <class Id>
    __device__ __forceinline__ void rewrite_singles(Id *rewritten) const {
#pragma unroll 4
        for (int row = first_row; row < last_row; ++row) {
            const int i = 32 * row + lane_id();
            const unsigned id = kept_ids[i];
            const int slot = id < kBadId ? code[id] : -1;
            if (i < n && (slot >= 0 || id >= kBadId)) rewritten[start + i] = (Id)slot;
        }
    }
    __device__ __forceinline__ void write_singles() {
        if (warp < n_solvers) return;
#pragma unroll 1
        for (int i = threadIdx.x - 32 * n_solvers; i < counter_words(t.shape.n_logical); i += kRunThreads - 32 * n_solvers) {
            const int2 both =
                n_blocks > 1 ? totals_of(i) : make_int2(counts[2 * i], 2 * i + 1 < t.shape.n_logical ? counts[2 * i + 1] : 0);
            record.add_tokens(2 * i, both.x);
            if (2 * i + 1 < t.shape.n_logical) record.add_tokens(2 * i + 1, both.y);
            if (code[2 * i] >= 0) write(code[2 * i], rank_of[2 * i], both.x, both.x);
            if (2 * i + 1 < t.shape.n_logical && code[2 * i + 1] >= 0) write(code[2 * i + 1], rank_of[2 * i + 1], both.y, both.y);
        }
    }

    // ---- What a layout will ask for
    __device__ __forceinline__ void keep() const {
        if (!writes || warp < n_solvers) return;
        const int first = threadIdx.x - 32 * n_solvers, stride = kRunThreads - 32 * n_solvers;
        if constexpr (kGathered) {
            keep_counts(t, out, gathered, gathered.n_sources > 1, first, stride);
        } else if (first == 0) {
            *out.sources = 1;
        }
    }

    // ---- Occurrences in the warps before each warp, by the last threads
    __device__ __forceinline__ void number_warps() const {
        const int row_words = counter_words(max_replicated);
#pragma unroll 1
        for (int i = kRunThreads - 1 - (int)threadIdx.x; i < n_bundled; i += kRunThreads) {
            uint16_t *column = reinterpret_cast<uint16_t *>(words + at.warp_counts) + i;
            unsigned count[kRunWarps];
#pragma unroll
            for (int w = 0; w < kRunWarps; ++w) count[w] = column[2 * w * row_words];
            unsigned sum = 0;
#pragma unroll
            for (int w = 0; w < kRunWarps; ++w) {
                column[2 * w * row_words] = (uint16_t)sum;
                sum += count[w];
            }
        }
    }

    // ---- Tokens of bundled experts: of LaneFlow's, which have two places each; or of all others. Returns what was moved.
    __device__ __forceinline__ int split_pairs() {
        const lplbk_shape &shape = t.shape;
#pragma unroll 1
        for (int i = (int)threadIdx.x - 32 * n_solvers; i >= 0 && i < n_bundled; i += kRunThreads - 32 * n_solvers) {
            const int bundle = bundle_of(i), group = shape.n_groups == 1 ? 0 : bundle / shape.max_bundles;
            const int slots[2] = {cuts()[i].z, cuts()[i].w};
            const int ranks[2] = {slots[0] / out.n_local, slots[1] / out.n_local};
            const int *const arcs = space.sums.x + group * shape.max_arcs + 2 * (bundle - group * shape.max_bundles);
            const Split quota = Split::of(t, space.sums, bundle, arcs, space.tokens, i, true, overflows(group));
            const int quotas[2] = {quota(0), quota(1)};
            int take[2] = {quotas[0], quotas[1]};
            if constexpr (kGathered) {
                const int expert = t.replicated(i).id();
                if (overflows(group)) {
                    take[0] = gathered.of(out.rank, expert), take[1] = 0;
                } else {
                    assign_tokens(
                        2, [&](int j) { return j == 0 ? quotas[0] : quotas[1]; }, [&](int j) { return j == 0 ? ranks[0] : ranks[1]; },
                        [&](int s) { return gathered.of(s, expert); }, out.rank, out.per_node, [&](int j, int mine) { take[j] = mine; });
                }
            }
            cuts()[i] = make_int4(take[0], take[0] + take[1], slots[0], slots[1]);
            if (!writes) continue;
            write(slots[0], ranks[0], quotas[0], take[0]);
            write(slots[1], ranks[1], quotas[1], take[1]);
        }
        return 0;
    }
    __device__ __forceinline__ int split_arcs() {
        const Image &image = space.image;
        int moved = 0;
        const auto put = [&](int arc, int tokens, int take) {
            arc_take()[arc] = take;
            moved += image.first_place(arc) ? 0 : tokens;
            if (writes) write(image.slot(arc), image.arc_rank[arc], tokens, take);
        };
        if constexpr (!kGathered) {
            const int n_arcs = image.n_arcs();
#pragma unroll 1
            for (int arc = threadIdx.x; arc < n_arcs; arc += kRunThreads) put(arc, space.flow.x[arc], space.flow.x[arc]);
        } else {
#pragma unroll 1
            for (int i = threadIdx.x; i < n_bundled; i += kRunThreads) {
                const int first = image.bundle_start[i], n_places = image.bundle_start[i + 1] - first;
                const int expert = t.replicated(i).id();
                const auto quota = [&](int j) { return overflow != 0 ? (j == 0 ? space.tokens[i] : 0) : space.flow.x[first + j]; };
                assign_tokens(
                    n_places, quota, [&](int j) { return image.arc_rank[first + j]; }, [&](int s) { return gathered.of(s, expert); },
                    out.rank, out.per_node, [&](int j, int take) {
                        if (overflow != 0) take = j == 0 ? gathered.of(out.rank, expert) : 0;
                        put(first + j, quota(j), take);
                    });
            }
        }
        return moved;
    }
    __device__ __forceinline__ void write_sums(int moved) const {
        if (!writes || (kLanes && out.rank < 0)) return;
        if (!kLanes) {
            const int sum = warp_sum(moved);
            if (lane_id() == 0 && sum != 0) atomicAdd(space.sums.moved, sum);
        }
        if (out.rank >= 0) own.join(space.sums.own);
        __syncthreads();
        if (!kLanes && threadIdx.x == 0) out.group_info[LPLBK_INFO_MOVED] = *space.sums.moved;
        // The sums over all groups stand in the first one: they are only ever read added up.
        if (out.rank >= 0 && threadIdx.x < 3) {
            for (int group = 0; group < t.shape.n_groups; ++group) {
                out.info(group)[LPLBK_INFO_OWN_RANK + threadIdx.x] = group == 0 ? space.sums.own[threadIdx.x] : 0;
            }
        }
    }

    // ---- Slots of the queued ids
    template <class Id>
    __device__ __forceinline__ void rewrite_queued(Id *rewritten) const {
#pragma unroll 2
        for (int q = lane_id(); q < n_queued; q += 32) {
            const Queued entry{my_queue[q]};
            const int i = -1 - code[kept_ids[entry.place()]];
            const int number = (int)(words[at.before + i] + reinterpret_cast<const uint16_t *>(my_counts)[i] + entry.number());
            rewritten[start + entry.place()] = (Id)slot_of(i, number);
        }
    }
    __device__ __forceinline__ int slot_of(int i, int number) const {
        if constexpr (kLanes) {
            const int4 cut = cuts()[i];
            return number >= cut.x && number < cut.y ? cut.w : cut.z;
        } else {
            const int first = space.image.bundle_start[i], last = space.image.bundle_start[i + 1];
            int left = number, there = first;
#pragma unroll 1
            for (int arc = first; arc < last; ++arc) {
                left -= arc_take()[arc];
                if (left < 0) {
                    there = arc;
                    break;
                }
            }
            return space.image.slot(there);
        }
    }
    // The groups for the metrics, by the warps that solve, which have no ids; the rest of their information is still to come.
    __device__ __forceinline__ void record_groups() const {
        for (int group = warp; group < t.shape.n_groups; group += n_solvers) record.add_group(out.info(group), kLanes, overflows(group));
    }
};

template <Solver kSolver, bool kGathered, bool kRecords, bool kRanked>
__global__ void __launch_bounds__(kRunThreads, 1)
    run_in_cluster(const void *ids, void *rewritten, const __grid_constant__ Tables t, const __grid_constant__ RunIds in,
                   const __grid_constant__ CountMatrix<false> given, const __grid_constant__ PlanOut out,
                   const __grid_constant__ ExchangeView<kGathered> view, const __grid_constant__ RecordingOf<kRecords> record) {
    using Run = ClusterRun<kSolver, kGathered, kRecords, kRanked>;
    extern __shared__ int4 memory[];
    MARK(0);
    Run run(memory, t, in, given, out, view, record);
    constexpr int kColours = Run::kLanes ? (int)kSolver : 1;
    int column[kColours] = {};
    LaneFlow<kColours, false, CapacityOf<kRanked, 1>> flow;
    if (Run::kLanes && run.warp < run.n_solvers) Image(t.image(run.warp), t.at).load_lanes(column);
    [[maybe_unused]] RankNumbers numbers;
    if constexpr (kRanked && Run::kLanes) {
        if (run.warp < min(run.n_solvers, t.shape.n_groups)) numbers.fetch(t, run.warp);
    }
    run.open();
    record.open();
    wait_for_stream();
    exchange::Call call{};
    if constexpr (kGathered) {
        if (run.exchanges) call = exchange::begin(view);
        if (run.writes) compare_digests(given, out);
    }
    with_ids(ids, in.wide, [&](auto *ids) { run.read_ids(ids); });
    let_next_start();
    MARK(1);
    __syncthreads();
    MARK(2);
    run.count();
    __syncthreads();
    run.add_loads();
    MARK(3);
    cluster_arrive();
    if constexpr (Run::kLanes) flow.open(column, t.shape.group_size);
    if constexpr (Run::kLanes && kRanked) {
        if (run.warp < min(run.n_solvers, t.shape.n_groups)) numbers.open(flow, t.shape.group_size);
    }
    cluster_wait();
    MARK(4);
    run.fetch_loads();
    // A block that has read what it needs of the others says so; nobody ends before all have. The first block still reads counts. (All
    // warps of a block say it between the same barriers: when some said it later, compute-sanitizer came to no end.)
    const bool reads_later = !kGathered && run.writes;
    if (!reads_later) cluster_arrive();
    __syncthreads();
    MARK(5);
    if constexpr (kGathered) {
        if (run.exchanges) run.exchange_counts(call);
    }
    run.add_up();
    MARK(7);
    run.solve(flow, column);
    run.number_queued();
    with_ids(rewritten, in.wide, [&](auto *rewritten) { run.rewrite_singles(rewritten); });
    if (reads_later) run.write_singles();
    run.keep();
    MARK(16);
    __syncthreads();
    MARK(17);
    if (reads_later) cluster_arrive();
    if constexpr (Run::kLanes) {
        const bool solved = run.warp < run.n_solvers && !run.overflows(run.warp);
        if (solved && run.writes && t.shape.n_groups <= run.n_solvers) write_lane_info(out, run.warp, flow);
    }
    if constexpr (!Run::kLanes) {
        if (!t.in_tokens() && run.overflow == 0) {
            arcs_to_tokens(t, run.space.image, run.space.flow.x, run.space.tokens);
            __syncthreads();
        }
    }
    const bool recording = kRecords && run.writes && run.warp < run.n_solvers;
    const unsigned long long before = recording && run.warp == 0 ? record.before() : 0;
    if (recording) run.record_groups();
    run.number_warps();
    run.write_sums(Run::kLanes ? run.split_pairs() : run.split_arcs());
    __syncthreads();
    MARK(18);
    if (recording && run.warp == 0) record.end_plan(before, run.space.sums.late_word(lane_id(), Run::kLanes, out.rank));
    with_ids(rewritten, in.wide, [&](auto *rewritten) { run.rewrite_queued(rewritten); });
    in.invalid.add(run.bad);
    MARK(19);
    cluster_wait();
    MARK(20);
}

template <bool kGathered, bool kRecords>
using RunKernel = void (*)(const void *, void *, Tables, RunIds, CountMatrix<false>, PlanOut, ExchangeView<kGathered>, RecordingOf<kRecords>);

// kRanked: for planners whose ranks may differ, which record where that is asked for.
template <bool kGathered, bool kRecords, bool kRanked = false>
RunKernel<kGathered, kRecords> run_kernel(Solver solver) {
    switch (solver) {
    case kTwoColours:
    case kFourColours:
        return run_in_cluster<kFourColours, kGathered, kRecords, kRanked>;
    case kEightColours:
        return run_in_cluster<kEightColours, kGathered, kRecords, kRanked>;
    case kOneWord:
        return run_in_cluster<kOneWord, kGathered, kRecords, kRanked>;
    default:
        return run_in_cluster<kTwoWords, kGathered, kRecords, kRanked>;
    }
}

// Compiled in files of their own.
extern template RunKernel<false, true> run_kernel<false, true>(Solver);
extern template RunKernel<true, true> run_kernel<true, true>(Solver);
extern template RunKernel<false, true> run_kernel<false, true, true>(Solver);
extern template RunKernel<true, true> run_kernel<true, true, true>(Solver);

}  // namespace lplb
