// Where the rows of a dispatch go, see lplb.h, section 9; the oracle is Sources/LPLBSolver/DispatchLayout.swift.
//
// A choice's key is the rank and buffer row that it goes to. The choices are sorted by counting: each block tallies the keys of its run of
// choices, one block adds the tallies up, and each block then knows where its choices of a key begin. Choices without an expert have the
// last key. What arrives follows from the plan and the counts that it was made for, by the rule that every rank assigns its tokens by.
#include "backend.cuh"
#include "ids.cuh"
#include "launch.cuh"
#include "layout.cuh"
#include "solve/assign.cuh"
#include "solve/tables.cuh"

namespace lplb {
namespace {

constexpr int kThreads = 128;  // of a block that sorts
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 4096;  // choices that a block sorts at a time; each warp counts those of its part in 16 bits
constexpr int kSumThreads = 1024;

// What the kernels are given.
struct Work {
    lplbk_dispatch d;
    lplbk_shape shape;
    int n_local, n_keys, n_blocks;
    int64_t per_block;           // choices
    const int32_t *slot_expert;  // [n_physical]
    const int32_t *take, *quota, *kept, *sources;
    int32_t *tallies;            // [n_blocks][width()]
    int32_t *base;               // [n_keys + 1] choices of smaller keys

    // A tally's further columns: choices without an expert, and among them bad ids; slots that hold another expert.
    __host__ __device__ int none() const { return n_keys; }
    __host__ __device__ int bad() const { return n_keys + 1; }
    __host__ __device__ int other() const { return n_keys + 2; }
    __host__ __device__ int width() const { return n_keys + 3; }

    // none() for a slot whose row is none.
    __device__ __forceinline__ int key_of(int slot) const {
        const int rank = slot / n_local;
        int64_t row = slot - rank * n_local;
        if (d.row_of_slot != nullptr) {
            row = d.row64 ? static_cast<const int64_t *>(d.row_of_slot)[slot] : static_cast<const int32_t *>(d.row_of_slot)[slot];
        }
        return row >= 0 && row < d.n_rows ? rank * d.n_rows + (int)row : none();
    }
    template <class Id>
    __device__ __forceinline__ int key(Id id) const {
        return id >= 0 && id < (Id)shape.n_physical ? key_of((int)id) : none();
    }
};

// ---- Choices ------------------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) tally(const __grid_constant__ Work work) {
    extern __shared__ int counts[];  // [width()]
    for (int i = threadIdx.x; i < work.width(); i += kThreads) counts[i] = 0;
    wait_for_stream();
    let_next_start();
    __syncthreads();
    const int64_t start = blockIdx.x * work.per_block, end = min(start + work.per_block, work.d.n_ids);
    with_ids(work.d.ids, work.d.ids64, [&](auto *ids) {
        const auto *experts = static_cast<decltype(ids)>(work.d.experts);
        for (int64_t i = start + threadIdx.x; i < end; i += kThreads) {
            const auto id = ids[i];
            const int key = work.key(id);
            atomicAdd(&counts[key], 1);
            if (key == work.none() && id != -1) {
                atomicAdd(&counts[work.bad()], 1);
            } else if (experts != nullptr) {
                const int wanted = max(checked_id(experts[i], work.shape.n_logical), -1);
                if (wanted != (id == -1 ? -1 : work.slot_expert[id])) atomicAdd(&counts[work.other()], 1);
            }
        }
    });
    __syncthreads();
    int32_t *const row = work.tallies + (int64_t)blockIdx.x * work.width();
    for (int i = threadIdx.x; i < work.width(); i += kThreads) row[i] = counts[i];
}

__global__ void __launch_bounds__(kThreads) sort(const __grid_constant__ Work work) {
    extern __shared__ int base[];  // [n_keys + 1] where the tile's choices of a key begin
    const int n = work.n_keys + 1, row_words = counter_words(n), bits = bits_for(n);
    unsigned *const counts = reinterpret_cast<unsigned *>(base + n);  // [kWarps][row_words]
    uint16_t *const columns = reinterpret_cast<uint16_t *>(counts);
    unsigned *const mine = counts + warp_id() * row_words;
    wait_for_stream();
    let_next_start();
    const int32_t *const before = work.tallies + (int64_t)blockIdx.x * work.width();
    for (int k = threadIdx.x; k < n; k += kThreads) base[k] = work.base[k] + before[k];
    const int64_t block_start = blockIdx.x * work.per_block, block_end = min(block_start + work.per_block, work.d.n_ids);
    for (int64_t tile = block_start; tile < block_end; tile += kTile) {
        // The warps' parts of a tile that is not full are as long as they need to be.
        const int64_t length = min(block_end - tile, (int64_t)kTile);
        const int of_warp = round_up(ceil_div((int)length, kWarps), 32);
        const int64_t start = tile + (int64_t)warp_id() * of_warp, end = min(start + of_warp, tile + length);
        for (int i = threadIdx.x; i < kWarps * row_words; i += kThreads) counts[i] = 0;
        __syncthreads();
        with_ids(work.d.ids, work.d.ids64, [&](auto *ids) {
            for (int64_t i = start + lane_id(); i < end; i += 32) count_one(mine, work.key(ids[i]));
        });
        __syncthreads();
        // Counts of warps -> choices of earlier warps; base moves on to the next tile below.
        for (int k = threadIdx.x; k < n; k += kThreads) {
            unsigned sum = 0;
            for (int w = 0; w < kWarps; ++w) {
                uint16_t *const at = columns + 2 * w * row_words + k;
                const unsigned count = *at;
                *at = (uint16_t)sum;
                sum += count;
            }
        }
        __syncthreads();
        with_ids(work.d.ids, work.d.ids64, [&](auto *ids) {
            for (int64_t row = start; row < end; row += 32) {
                const int64_t i = row + lane_id();
                const bool active = i < end;
                const int key = active ? work.key(ids[i]) : 0;
                const unsigned number = occurrence(active, key, bits, reinterpret_cast<uint16_t *>(mine));
                if (active) work.d.order[base[key] + number] = i;
            }
        });
        __syncthreads();
        // The last warp has counted on from the others: its counter is the tile's.
        for (int k = threadIdx.x; k < n; k += kThreads) base[k] += columns[2 * (kWarps - 1) * row_words + k];
        __syncthreads();
    }
}

// ---- Sums, one block for what is sent and one for what is received ----------------------------------------------------------------

// Clears by_key [n_keys] and calls add(i) for each i below n, which adds something up there; by all threads.
template <class Add>
__device__ __forceinline__ void add_by_key(const Work &work, int *by_key, int n, Add add) {
    for (int k = threadIdx.x; k < work.n_keys; k += kSumThreads) by_key[k] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kSumThreads) add(i);
    __syncthreads();
}

__device__ void add_sent(const Work &work, int *by_key) {
    const int32_t *const tallies = work.tallies;
    if (work.d.planned) {
        add_by_key(work, by_key, work.shape.n_physical, [&](int slot) {
            const int key = work.key_of(slot);
            if (key != work.none()) atomicAdd(&by_key[key], work.take[slot]);
        });
    }
    bool other_plan = false;
    int before = 0;
    for (int first = 0; first <= work.n_keys; first += kSumThreads) {
        const int key = first + (int)threadIdx.x;
        int total = 0;
        for (int b = 0; key <= work.n_keys && b < work.n_blocks; b += 8) {
            int32_t *const at = work.tallies + (int64_t)b * work.width() + key;
            int count[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) count[j] = b + j < work.n_blocks ? at[(int64_t)j * work.width()] : 0;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                if (b + j < work.n_blocks) at[(int64_t)j * work.width()] = total;
                total += count[j];
            }
        }
        int sum;
        const int start = before + block_prefix(total, &sum);
        if (key <= work.n_keys) work.base[key] = start;
        if (key < work.n_keys) {
            work.d.sent[key] = total;
            other_plan |= work.d.planned && total != by_key[key];
        }
        before += sum;
    }
    other_plan = __syncthreads_or(other_plan);  // base is there, too
    int32_t *const numbers = work.d.numbers;
    for (int r = threadIdx.x; r < work.shape.ep_size; r += kSumThreads) {
        numbers[LPLBK_LAYOUT_RANKS + r] = work.base[(r + 1) * work.d.n_rows] - work.base[r * work.d.n_rows];
    }
    if (warp_id() != 0) return;
    int bad = 0, other = 0;
    for (int b = lane_id(); b < work.n_blocks; b += 32) {
        bad += tallies[(int64_t)b * work.width() + work.bad()];
        other += tallies[(int64_t)b * work.width() + work.other()];
    }
    bad = warp_sum(bad);
    other = warp_sum(other);
    if (lane_id() != 0) return;
    numbers[0] = (bad > 0 ? LPLBK_LAYOUT_BAD_IDS : 0) | (other > 0 ? LPLBK_LAYOUT_OTHER_EXPERTS : 0) |
                 (other_plan ? LPLBK_LAYOUT_OTHER_PLAN : 0);
    numbers[2] = bad;
    numbers[3] = other;
    numbers[4] = work.base[work.n_keys];
    numbers[6] = 0;
}

// Tokens that `source` sends to slot j of this rank, by the latest plan.
__device__ int planned_tokens(const Work &work, const Tables &t, int source, int j) {
    const int rank = max(work.shape.rank, 0), slot = rank * work.n_local + j;
    const int n_sources = *work.sources;
    if (n_sources <= 1) return n_sources == 1 && source == rank ? work.quota[slot] : 0;
    const int id = work.slot_expert[slot];
    if (id < 0) return 0;
    const auto count = [&](int s) { return work.kept[s * work.n_local + j]; };
    const int code = t.code(id);
    if (code >= 0) return count(source);
    const Expert expert = t.replicated(-1 - code);
    if (!expert.bundled()) return count(source);
    const int group = expert.bundle() / t.shape.max_bundles, bundle = expert.bundle() - group * t.shape.max_bundles;
    const Image image(t.image(group), t.at);
    const bool pair = t.shape.n_redundant > 0;  // the expert knows its two places
    const int first = pair ? 0 : image.bundle_start[bundle], n = pair ? 2 : image.bundle_start[bundle + 1] - first;
    const auto place = [&](int p) { return !pair ? image.slot(first + p) : p == 0 ? expert.slot() : expert.copy_slot(); };
    // All tokens at the first place: so it is, too, where the counts were beyond what can be solved, and then quotas tell nothing.
    bool split = false;
    for (int p = 1; p < n; ++p) split |= work.quota[place(p)] != 0;
    if (!split) return place(0) == slot ? count(source) : 0;
    int tokens = 0;
    assign_tokens(
        n, [&](int p) { return work.quota[place(p)]; }, [&](int p) { return place(p) / work.n_local; }, count, source,
        t.shape.ep_size / t.shape.n_nodes, [&](int p, int mine) { tokens = place(p) == slot ? mine : tokens; });
    return tokens;
}

__device__ void add_received(const Work &work, const Tables &t, int *by_key) {
    const int ep_size = work.shape.ep_size, n_rows = work.d.n_rows, rank = max(work.shape.rank, 0);
    int32_t *const received = work.d.received, *const numbers = work.d.numbers;
    if (work.d.planned) {
        add_by_key(work, by_key, ep_size * work.n_local, [&](int i) {
            const int source = i / work.n_local, j = i - source * work.n_local, key = work.key_of(rank * work.n_local + j);
            if (key != work.none()) atomicAdd(&by_key[source * n_rows + key - rank * n_rows], planned_tokens(work, t, source, j));
        });
        for (int k = threadIdx.x; k < work.n_keys; k += kSumThreads) received[k] = by_key[k];
        __syncthreads();
    }
    // A warp for each rank, and then for each row.
    bool negative = false;
    for (int item = warp_id(); item < ep_size + n_rows; item += kSumThreads / 32) {
        const bool of_rank = item < ep_size;
        const int n = of_rank ? n_rows : ep_size, first = of_rank ? item * n_rows : item - ep_size, step = of_rank ? 1 : n_rows;
        int64_t sum = 0;
        for (int i = lane_id(); i < n; i += 32) {
            const int tokens = received[first + i * step];
            negative |= tokens < 0;
            sum += tokens;
        }
        sum = wide_warp_sum(sum);
        if (lane_id() == 0) numbers[LPLBK_LAYOUT_RANKS + ep_size + item] = clamped(sum);
    }
    negative = __syncthreads_or(negative);
    if (warp_id() != 0) return;
    int64_t total = 0;
    for (int first = 0; first < n_rows; first += 32) {
        const int row = first + lane_id();
        int64_t upto = row < n_rows ? numbers[LPLBK_LAYOUT_RANKS + 2 * ep_size + row] : 0;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int64_t below = __shfl_up_sync(kFullWarp, upto, step);
            if (lane_id() >= step) upto += below;
        }
        if (row < n_rows) work.d.ends[row] = clamped(total + upto);
        total += __shfl_sync(kFullWarp, upto, 31);
    }
    if (lane_id() != 0) return;
    numbers[1] = (work.d.planned && *work.sources == 0 ? LPLBK_LAYOUT_NO_PLAN : 0) |
                 (negative || total > INT32_MAX ? LPLBK_LAYOUT_BAD_RECEIVED : 0) |
                 (work.d.gathers && total > work.d.n_by_row ? LPLBK_LAYOUT_BY_ROW_SHORT : 0);
    numbers[5] = clamped(total);
    numbers[7] = 0;
}

__global__ void __launch_bounds__(kSumThreads) add_up(const __grid_constant__ Work work, const __grid_constant__ Tables t) {
    extern __shared__ int by_key[];  // [n_keys]
    wait_for_stream();
    let_next_start();
    if (work.d.sends && blockIdx.x == 0) {
        add_sent(work, by_key);
    } else {
        add_received(work, t, by_key);
    }
}

// ---- Received rows --------------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) gather(const __grid_constant__ Work work) {
    // A part is the rows of one rank for one buffer row. starts [n_keys + 1]: where it begins in by_row, parts by row and then rank;
    // arrives [n_keys]: where it begins among the rows as they come, parts by rank and then row.
    extern __shared__ int starts[];
    const int n = work.n_keys, ep_size = work.shape.ep_size, n_rows = work.d.n_rows;
    int *const arrives = starts + n + 1;
    wait_for_stream();
    let_next_start();
    int before = 0, before_arriving = 0;
    for (int first = 0; first < n; first += kThreads) {
        const int part = first + (int)threadIdx.x, row = part / ep_size, rank = part - row * ep_size;
        int sum;
        const int start = before + block_prefix(part < n ? max(work.d.received[rank * n_rows + row], 0) : 0, &sum);
        before += sum;
        const int arrive = before_arriving + block_prefix(part < n ? max(work.d.received[part], 0) : 0, &sum);
        before_arriving += sum;
        if (part < n) starts[part] = start, arrives[part] = arrive;
    }
    if (threadIdx.x == 0) starts[n] = before;
    __syncthreads();
    for (int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x; i < work.d.n_by_row; i += (int64_t)gridDim.x * kThreads) {
        int64_t from = i;
        if (i < before) {
            int low = 0, high = n;  // starts[low] <= i < starts[high]
            while (high - low > 1) {
                const int middle = (low + high) / 2;
                if (starts[middle] <= i) {
                    low = middle;
                } else {
                    high = middle;
                }
            }
            const int row = low / ep_size, rank = low - row * ep_size;
            from = arrives[rank * n_rows + row] + (i - starts[low]);
        }
        work.d.by_row[i] = from;
    }
}

// ---- Launches -------------------------------------------------------------------------------------------------------------------

int64_t sort_bytes(int n_keys) { return 4ll * (n_keys + 1 + kWarps * counter_words(n_keys + 1)); }
int64_t gather_bytes(int n_keys) { return 4ll * (2 * n_keys + 1); }

Work work_of(const lplbk_planner &planner, const lplbk_dispatch &dispatch) {
    Work work{};
    work.d = dispatch;
    work.shape = planner.shape;
    work.n_local = planner.shape.n_physical / planner.shape.ep_size;
    work.n_keys = planner.shape.ep_size * dispatch.n_rows;
    work.slot_expert = planner.tables + planner.layout.slot_expert;
    work.take = planner.take;
    work.quota = planner.quota;
    work.kept = planner.kept;
    work.sources = planner.sources;
    work.base = planner.dispatch;
    work.tallies = planner.dispatch + work.n_keys + 1;
    // As many blocks as the scratch memory has rows for, of at least 512 choices each.
    const int64_t room = (dispatch_words(planner.shape) - work.n_keys - 1) / work.width();
    const int64_t blocks = min(min(ceil_div64(dispatch.n_ids, 512), room), (int64_t)kDispatchBlocks);
    if (blocks > 0) {
        work.per_block = ceil_div64(ceil_div64(dispatch.n_ids, blocks), 32) * 32;
        work.n_blocks = (int)ceil_div64(dispatch.n_ids, work.per_block);
    }
    return work;
}

cudaError_t lay_out(const lplbk_planner &planner, const lplbk_dispatch &dispatch, cudaStream_t stream) {
    const Work work = work_of(planner, dispatch);
    const lplbk_device_info &info = planner.info;
    cudaError_t error = cudaSuccess;
    if (dispatch.sends && work.n_blocks > 0) {
        error = launch(info, tally, work.n_blocks, kThreads, 4 * work.width(), 0, stream, work);
    }
    if (error == cudaSuccess && (dispatch.sends || dispatch.receives)) {
        const int blocks = dispatch.sends && dispatch.receives ? 2 : 1;
        error = launch(info, add_up, blocks, kSumThreads, 4 * work.n_keys, 0, stream, work, Tables(planner));
    }
    if (error == cudaSuccess && dispatch.sends && work.n_blocks > 0) {
        error = launch(info, sort, work.n_blocks, kThreads, (int)sort_bytes(work.n_keys), 0, stream, work);
    }
    if (error == cudaSuccess && dispatch.gathers && dispatch.n_by_row > 0) {
        const int blocks = (int)min(ceil_div64(dispatch.n_by_row, 8 * kThreads), (int64_t)2 * info.n_sms);
        error = launch(info, gather, blocks, kThreads, (int)gather_bytes(work.n_keys), 0, stream, work);
    }
    return error;
}

}  // namespace

int32_t prepare_layout(const lplbk_planner &planner) {
    const int most = LPLBK_MAX_LAYOUT_ROWS;
    const int32_t error = allow_shared(planner.info, sort, sort_bytes(most));
    return error != 0 ? error : allow_shared(planner.info, gather, gather_bytes(most));
}

}  // namespace lplb

extern "C" int32_t lplbk_lay_out(const lplbk_planner *planner, const lplbk_dispatch *dispatch, void *stream) {
    lplb::OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return lplb::taken(on.error());
    return lplb::taken(lplb::lay_out(*planner, *dispatch, static_cast<cudaStream_t>(stream)));
}
