// Weights and gradients of copies: kernels that read the peers' rows over NVLink, between two meetings of all ranks.
//
// A meeting is one call of an exchange that carries one count, the digest of what the ranks are about to do (exchange.cuh). At the first
// one the rows of all ranks are ready: every rank's kernel comes behind what its stream wrote to them. After the second one all ranks have
// read. So a pull takes two epochs of the exchange, and a rank that does not come ends the others by the exchange's time limit and policy.
//
// Every block goes through the whole list of moves, and a thread has the same part of a row in every move. So the sums of one home row,
// which are several moves, need no order among threads, and while one move ends the next one's loads are under way.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "backend.cuh"
#include "common.cuh"
#include "exchange.cuh"

using lplb::OnDevice;
using lplb::taken;

namespace {

constexpr int kThreads = 512;
constexpr int kBlocks = 16;      // enough loads under way for NVLink; the other multiprocessors are left to others
constexpr int kInFlight = 8;     // loads of 16 bytes of one thread
constexpr int kZeroBlocks = 256; // local memory wants more writers than NVLink readers

// Not kept in L1, where nobody would read it again. Ordered behind the meeting, since it is volatile.
__device__ __forceinline__ uint4 load(const uint4 *from) {
    uint4 bits;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "l"(from)
                 : "memory");
    return bits;
}

// Sums of elements, rounded to nearest as PyTorch rounds them, and of the elements in 32 bits.
__device__ __forceinline__ float sum(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double sum(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ __half sum(__half a, __half b) { return __float2half_rn(__fadd_rn(__half2float(a), __half2float(b))); }
__device__ __forceinline__ __nv_bfloat16 sum(__nv_bfloat16 a, __nv_bfloat16 b) {
    return __float2bfloat16_rn(__fadd_rn(__bfloat162float(a), __bfloat162float(b)));
}

template <class T>
__device__ __forceinline__ T element(uint32_t word) {
    if constexpr (std::is_same_v<T, __half>) {
        return __ushort_as_half((unsigned short)word);
    } else {
        return __ushort_as_bfloat16((unsigned short)word);
    }
}
__device__ __forceinline__ unsigned short bits_of(__half value) { return __half_as_ushort(value); }
__device__ __forceinline__ unsigned short bits_of(__nv_bfloat16 value) { return __bfloat16_as_ushort(value); }

template <class T>
__device__ __forceinline__ uint32_t sum_word(uint32_t a, uint32_t b) {
    if constexpr (sizeof(T) == 4) {
        return __float_as_uint(sum(__uint_as_float(a), __uint_as_float(b)));
    } else {
        const auto low = sum(element<T>(a), element<T>(b)), high = sum(element<T>(a >> 16), element<T>(b >> 16));
        return (uint32_t)bits_of(low) | (uint32_t)bits_of(high) << 16;
    }
}

// How rows arrive: as they are, or added to what is there.
struct Copied {
    using Element = uint8_t;
    static constexpr bool kAdds = false;
    static __device__ __forceinline__ uint4 of(uint4, uint4 theirs) { return theirs; }
    static __device__ __forceinline__ uint8_t of(uint8_t, uint8_t theirs) { return theirs; }
};

template <class T>
struct Added {
    using Element = T;
    static constexpr bool kAdds = true;
    static __device__ __forceinline__ uint4 of(uint4 mine, uint4 theirs) {
        if constexpr (sizeof(T) == 8) {
            const double low = sum(__hiloint2double((int)mine.y, (int)mine.x), __hiloint2double((int)theirs.y, (int)theirs.x));
            const double high = sum(__hiloint2double((int)mine.w, (int)mine.z), __hiloint2double((int)theirs.w, (int)theirs.z));
            return make_uint4((uint32_t)__double2loint(low), (uint32_t)__double2hiint(low), (uint32_t)__double2loint(high),
                              (uint32_t)__double2hiint(high));
        } else {
            return make_uint4(sum_word<T>(mine.x, theirs.x), sum_word<T>(mine.y, theirs.y), sum_word<T>(mine.z, theirs.z),
                              sum_word<T>(mine.w, theirs.w));
        }
    }
    static __device__ __forceinline__ T of(T mine, T theirs) { return sum(mine, theirs); }
};

// A row of a peer's to a row here, by all threads of the grid.
template <class How>
__device__ __forceinline__ void take_row(uint64_t to_row, uint64_t from_row, int64_t bytes) {
    const int64_t thread = (int64_t)blockIdx.x * kThreads + threadIdx.x, step = (int64_t)gridDim.x * kThreads;
    if (bytes % 16 != 0) {
        auto *to = reinterpret_cast<typename How::Element *>(to_row);
        auto *from = reinterpret_cast<const typename How::Element *>(from_row);
        for (int64_t i = thread; i < bytes / (int64_t)sizeof *to; i += step) to[i] = How::of(to[i], from[i]);
        return;
    }
    auto *to = reinterpret_cast<uint4 *>(to_row);
    auto *from = reinterpret_cast<const uint4 *>(from_row);
    const int64_t last = bytes / 16 - 1;
#pragma unroll 1
    for (int64_t first = thread; first <= last; first += kInFlight * step) {
        uint4 theirs[kInFlight], mine[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {  // beyond the end the last ones again: a load that may not come costs registers
            const int64_t at = first + i * step < last ? first + i * step : last;
            theirs[i] = load(from + at);
            if constexpr (How::kAdds) mine[i] = load(to + at);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            if (first + i * step <= last) to[first + i * step] = How::of(mine[i], theirs[i]);
        }
    }
}

// Calls body(move, tensor) for the moves of a list and the tensors of a kind.
template <class Body>
__device__ __forceinline__ void each(lplbk_replicas *replicas, int list, int kind, Body &&body) {
    const lplbk_move *moves = lplbk_replicas_moves(replicas, list);
    const int n_moves = replicas->n_moves[list], n_tensors = replicas->n_tensors;
#pragma unroll 1
    for (int move = 0; move < n_moves; ++move) {
#pragma unroll 1
        for (int tensor = 0; tensor < n_tensors; ++tensor) {
            if (replicas->tensors[tensor].kind == kind) body(moves[move], replicas->tensors[tensor]);
        }
    }
}

// Waits for all ranks, in each block that calls it; `sends` in one block of this rank. True, in all threads of the block, where all have
// come with this word. What this rank's stream and this block did before is seen by those who have met, and what they did by this block.
__device__ bool meet(const lplbk_exchange_view &view, const exchange::Call &call, const int32_t *word, bool sends) {
    bool agreed = true;
    if (sends) {
        __threadfence_system();
        exchange::send(view, call, word, (int)threadIdx.x, kThreads);
    }
    const bool came = exchange::receive<1>(view, call, word, (int)threadIdx.x, kThreads, [&](int rank, int, int32_t theirs) {
        if (theirs == *word) return;
        agreed = false;
        exchange::disagree(view, call.epoch, rank);  // unless there is a fault already, as where zeros stand for what is missing
    });
    __threadfence_system();
    return __syncthreads_and(came && agreed) != 0;
}

// Calls work() between two meetings of all ranks; ends the call.
template <class Work>
__device__ __forceinline__ void between_meetings(const lplbk_exchange_view &view, int32_t digest, Work &&work) {
    __shared__ alignas(8) int32_t word[2];  // one is sent; the compiler loads it as a pair, as it does with counts
    __shared__ bool is_last;
    auto *state = reinterpret_cast<lplbk_exchange_state *>(view.state);
    const exchange::Call before = exchange::begin(view);
    if (threadIdx.x < 2) word[threadIdx.x] = threadIdx.x == 0 ? digest : 0;
    __syncthreads();
    if (meet(view, before, word, blockIdx.x == 0)) work();
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        is_last = atomicAdd(&state->ticket, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (!is_last) return;
    // A rank on which a block gave up says nothing, so that all others give up, too.
    const exchange::Call after = {before.epoch + 1, *reinterpret_cast<volatile uint32_t *>(&state->fault)};
    meet(view, after, word, true);
    if (threadIdx.x == 0) {
        state->ticket = 0;
        exchange::end(view, after);
    }
}

__global__ void __launch_bounds__(kThreads, 1)
    pull_kernel(const __grid_constant__ lplbk_exchange_view view, lplbk_replicas *replicas, int list) {
    between_meetings(view, replicas->digest[list], [&] {
        each(replicas, list, LPLBK_WEIGHTS, [&](const lplbk_move &move, const lplbk_replicas_tensor &tensor) {
            const uint64_t to = tensor.buffer[view.rank] + (uint64_t)(move.target * tensor.row_bytes);
            take_row<Copied>(to, tensor.buffer[move.rank] + (uint64_t)(move.row * tensor.row_bytes), tensor.row_bytes);
        });
    });
}

__global__ void __launch_bounds__(kThreads, 1) push_kernel(const __grid_constant__ lplbk_exchange_view view, lplbk_replicas *replicas) {
    between_meetings(view, replicas->digest[LPLBK_PUSH], [&] {
        each(replicas, LPLBK_PUSH, LPLBK_GRADIENTS, [&](const lplbk_move &move, const lplbk_replicas_tensor &tensor) {
            const uint64_t to = tensor.buffer[view.rank] + (uint64_t)(move.target * tensor.row_bytes);
            const uint64_t from = tensor.buffer[move.rank] + (uint64_t)(move.row * tensor.row_bytes);
            switch (tensor.dtype) {
            case LPLBK_FLOAT32:
                return take_row<Added<float>>(to, from, tensor.row_bytes);
            case LPLBK_FLOAT64:
                return take_row<Added<double>>(to, from, tensor.row_bytes);
            case LPLBK_FLOAT16:
                return take_row<Added<__half>>(to, from, tensor.row_bytes);
            default:
                return take_row<Added<__nv_bfloat16>>(to, from, tensor.row_bytes);
            }
        });
    });
}

// The gradients of this rank's copies, which all homes have read, unless the push failed.
__global__ void __launch_bounds__(kThreads, 1) zero_kernel(uint64_t state, int rank, lplbk_replicas *replicas) {
    if (*reinterpret_cast<volatile const uint32_t *>(&reinterpret_cast<lplbk_exchange_state *>(state)->fault) != 0) return;
    const int64_t thread = (int64_t)blockIdx.x * kThreads + threadIdx.x, n_threads = (int64_t)gridDim.x * kThreads;
    each(replicas, LPLBK_PULL_ALL, LPLBK_GRADIENTS, [&](const lplbk_move &move, const lplbk_replicas_tensor &tensor) {
        const uint64_t row = tensor.buffer[rank] + (uint64_t)(move.target * tensor.row_bytes);
        if (tensor.row_bytes % 16 == 0) {
            for (int64_t i = thread; i < tensor.row_bytes / 16; i += n_threads) reinterpret_cast<uint4 *>(row)[i] = make_uint4(0, 0, 0, 0);
        } else {
            for (int64_t i = thread; i < tensor.row_bytes; i += n_threads) reinterpret_cast<uint8_t *>(row)[i] = 0;
        }
    });
}

// A function of the driver, without linking to it; NULL where there is none.
void *driver_function(const char *name) {
    void *found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
    taken(error);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? found : nullptr;
}

// The allocation that CUDA IPC can map and that memory lies in.
int32_t range_of(const void *memory, uint64_t *base, size_t *bytes) {
    using Address = unsigned long long;
    constexpr int kIsLegacyIpcCapable = 10;  // CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE
    const auto attribute = reinterpret_cast<int (*)(void *, int, Address)>(driver_function("cuPointerGetAttribute"));
    const auto range = reinterpret_cast<int (*)(Address *, size_t *, Address)>(driver_function("cuMemGetAddressRange"));
    const auto address = (Address)(uintptr_t)memory;
    int is_capable = 0;
    Address start = 0;
    if (!attribute || attribute(&is_capable, kIsLegacyIpcCapable, address) != 0 || is_capable == 0) return LPLBK_UNSUPPORTED;
    if (!range || range(&start, bytes, address) != 0) return LPLBK_UNSUPPORTED;
    *base = start;
    return 0;
}

}  // namespace

extern "C" {

int32_t lplbk_replicas_prepare(int32_t device) {
    const OnDevice on(device);
    if (on.error() != cudaSuccess) return taken(on.error());
    // Loading a kernel at its first call would wait for whatever spins on the device.
    cudaFuncAttributes code;
    cudaError_t error = cudaFuncGetAttributes(&code, pull_kernel);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&code, push_kernel);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&code, zero_kernel);
    return taken(error);
}

int32_t lplbk_replicas_allocation(int32_t device, const void *memory, uint64_t *base, int64_t *bytes) {
    const OnDevice on(device);
    if (on.error() != cudaSuccess) return taken(on.error());
    cudaPointerAttributes attributes;
    const cudaError_t error = cudaPointerGetAttributes(&attributes, memory);
    if (error != cudaSuccess) return taken(error);
    if (attributes.type != cudaMemoryTypeDevice || attributes.device != device) return LPLBK_UNSUPPORTED;
    size_t size = 0;
    const int32_t failed = range_of(memory, base, &size);
    *bytes = (int64_t)size;
    return failed;
}

int32_t lplbk_replicas_pull(int32_t device, const lplbk_exchange_view *view, lplbk_replicas *replicas, int32_t list, int32_t blocks,
                            void *stream) {
    const OnDevice on(device);
    if (on.error() != cudaSuccess) return taken(on.error());
    pull_kernel<<<blocks > 0 ? blocks : kBlocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*view, replicas, list);
    return taken(cudaGetLastError());
}

int32_t lplbk_replicas_push(int32_t device, const lplbk_exchange_view *view, lplbk_replicas *replicas, int32_t blocks, void *stream) {
    const OnDevice on(device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const auto queue = static_cast<cudaStream_t>(stream);
    push_kernel<<<blocks > 0 ? blocks : kBlocks, kThreads, 0, queue>>>(*view, replicas);
    cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) {
        zero_kernel<<<kZeroBlocks, kThreads, 0, queue>>>(view->state, view->rank, replicas);
        error = cudaGetLastError();
    }
    return taken(error);
}

}  // extern "C"
