// The exchange of counts among ranks: the stand-alone kernel, and the memory, handles and launches behind kernels.h.
#include <cuda_runtime.h>
#include <stdio.h>
#include <string.h>

#include "common.cuh"
#include "exchange.cuh"
#include "backend.cuh"
#include "launch.cuh"

using lplb::NotRecorded;
using lplb::on_own_stream;
using lplb::OnDevice;
using lplb::taken;

namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxBlocks = 4;             // the kernel spins: it must leave the GPU to others
constexpr int kPiecesPerWarpAndBlock = 8; // beyond that another block is worth it

// What the rail before this kernel may have left undone. What it did not bring must not travel on, or the other ranks of the node would
// plan with zeros. A rail without a word for it is asked for by the host's page, whose abort is set before the rail is aborted. The same in
// all threads of the block.
enum RailEnd : uint32_t { kRailFine, kRailGaveUp /* its missing rows are zeros */, kRailUnknown /* its rows may be of an earlier call */ };

__device__ RailEnd rail_end(const lplbk_exchange_view &view, const exchange::Call &call) {
    __shared__ RailEnd end;
    if (threadIdx.x == 0) {
        end = kRailFine;
        if (view.rail_failed != 0) {
            if (call.fault == 0 && *reinterpret_cast<volatile const uint32_t *>(view.rail_failed) != 0) {
                end = kRailGaveUp;  // its own report says more than ours could
                atomicCAS(&reinterpret_cast<lplbk_exchange_state *>(view.state)->fault, LPLBK_EXCHANGE_FINE, LPLBK_EXCHANGE_TIMED_OUT);
            }
        } else if (call.fault != 0) {
            end = kRailUnknown;
        } else if (*reinterpret_cast<volatile uint32_t *>(&reinterpret_cast<lplbk_exchange_host *>(view.host)->abort) != 0) {
            end = kRailUnknown;
            exchange::detail::give_up(view, LPLBK_EXCHANGE_ABORTED, -1, call.epoch, 0);
        }
    }
    __syncthreads();
    return end;
}

__global__ void __launch_bounds__(kMaxThreads)
    exchange_kernel(const __grid_constant__ lplbk_exchange_view view, const int32_t *counts, int32_t *gathered, const int32_t *digest) {
    lplb::wait_for_stream();
    exchange::Call call = exchange::begin(view);
    const RailEnd rail = view.n_nodes > 1 ? rail_end(view, call) : kRailFine;
    call.fault |= rail;
    const int thread = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    const int n_threads = (int)(gridDim.x * blockDim.x);
    exchange::send(view, call, counts, thread, n_threads);
    lplb::let_next_start();
    // A call that failed before hands over zeros, which are nobody's digest.
    const int compared = digest != nullptr && call.fault == 0 ? view.n_counts - 1 : -1;
    exchange::receive(view, call, counts, thread, n_threads, [&](int row, int column, int32_t count) {
        gathered[(int64_t)row * view.n_counts + column] = count;
        if (column == compared && count != *digest) exchange::disagree(view, call.epoch, row);
    });
    if (rail == kRailUnknown) {  // each thread clears what receive() let it write of those rows
        for (int word = thread; word < view.n_words; word += n_threads) {
            gathered[(int64_t)(word / view.n_counts * view.n_ranks + view.rank) * view.n_counts + word % view.n_counts] = 0;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) exchange::end_of_block(view, call, gridDim.x);
}

__global__ void fill_kernel(uint64_t *buffer, int64_t words, uint64_t word) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += (int64_t)gridDim.x * blockDim.x) buffer[i] = word;
}

constexpr int64_t kPage = int64_t{2} << 20;

}  // namespace

extern "C" {

int32_t lplbk_exchange_fill(int32_t device, void *buffer, int64_t words, uint32_t first_epoch) {
    const OnDevice on(device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const NotRecorded aside;
    const uint64_t word = (uint64_t)(first_epoch - 1u) << 32;
    return taken(on_own_stream([&](cudaStream_t stream) {
        fill_kernel<<<64, 256, 0, stream>>>(static_cast<uint64_t *>(buffer), words, word);
        return cudaGetLastError();
    }));
}

int32_t lplbk_exchange_alloc(int32_t device, int64_t words, uint32_t first_epoch, void **buffer) {
    *buffer = nullptr;
    const OnDevice on(device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const NotRecorded aside;
    const int64_t bytes = (words * 8 + kPage - 1) / kPage * kPage;
    void *memory = nullptr;
    const cudaError_t error = cudaMalloc(&memory, (size_t)bytes);
    if (error != cudaSuccess) return taken(error);
    const int32_t filled = lplbk_exchange_fill(device, memory, words, first_epoch);
    if (filled != 0) {
        cudaFree(memory);
        return filled;
    }
    *buffer = memory;
    return 0;
}

int32_t lplbk_exchange_export(int32_t device, void *buffer, uint8_t *handle) {
    static_assert(sizeof(cudaIpcMemHandle_t) == LPLBK_EXCHANGE_HANDLE_BYTES, "the handle travels as 64 bytes");
    const OnDevice on(device);
    if (on.error() != cudaSuccess) return taken(on.error());
    cudaIpcMemHandle_t made;
    const cudaError_t error = cudaIpcGetMemHandle(&made, buffer);
    if (error == cudaSuccess) memcpy(handle, &made, sizeof made);
    return taken(error);
}

int32_t lplbk_exchange_import(int32_t device, const uint8_t *handle, void **buffer) {
    *buffer = nullptr;
    const OnDevice on(device);
    if (on.error() != cudaSuccess) return taken(on.error());
    cudaIpcMemHandle_t given;
    memcpy(&given, handle, sizeof given);
    return taken(cudaIpcOpenMemHandle(buffer, given, cudaIpcMemLazyEnablePeerAccess));
}

int32_t lplbk_exchange_unimport(int32_t device, void *buffer) {
    const OnDevice on(device);
    if (on.error() != cudaSuccess) return taken(on.error());
    return taken(cudaIpcCloseMemHandle(buffer));
}

int32_t lplbk_exchange_identity(int32_t device, uint8_t *uuid, uint64_t *host) {
    cudaDeviceProp properties;
    const cudaError_t error = cudaGetDeviceProperties(&properties, device);
    if (error != cudaSuccess) return taken(error);
    memcpy(uuid, properties.uuid.bytes, LPLBK_EXCHANGE_UUID_BYTES);
    // FNV-1a of the id that the kernel draws at every boot: equal in all containers of a host, different between hosts.
    uint64_t hash = 14695981039346656037ull;
    if (FILE *file = fopen("/proc/sys/kernel/random/boot_id", "r")) {
        for (int byte = fgetc(file); byte != EOF; byte = fgetc(file)) hash = (hash ^ (uint64_t)byte) * 1099511628211ull;
        fclose(file);
    }
    *host = hash;
    return 0;
}

int32_t lplbk_exchange_reach(int32_t device, const uint8_t *uuid, int32_t enable, int32_t *reach) {
    *reach = -1;
    const OnDevice on(device);
    if (on.error() != cudaSuccess) return taken(on.error());
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    for (int other = 0; error == cudaSuccess && other < count; ++other) {
        cudaDeviceProp properties;
        error = cudaGetDeviceProperties(&properties, other);
        if (error != cudaSuccess || memcmp(properties.uuid.bytes, uuid, LPLBK_EXCHANGE_UUID_BYTES) != 0) continue;
        int can = other == device;
        if (other != device) {
            error = cudaDeviceCanAccessPeer(&can, device, other);
            if (error == cudaSuccess && can && enable) {
                error = cudaDeviceEnablePeerAccess(other, 0);
                if (error == cudaErrorPeerAccessAlreadyEnabled) error = cudaSuccess, (void)cudaGetLastError();
            }
        }
        *reach = can;
        break;
    }
    return taken(error);
}

void lplbk_exchange_settle(int32_t device) {
    const OnDevice on(device);
    const NotRecorded aside;
    if (on.error() == cudaSuccess) (void)taken(cudaDeviceSynchronize());
}

int32_t lplbk_exchange_open(int32_t device, uint32_t first_epoch, lplbk_exchange_view *view, lplbk_exchange_host **host) {
    const OnDevice on(device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const NotRecorded aside;
    void *state = nullptr, *page = nullptr, *page_on_device = nullptr;
    const lplbk_exchange_state fresh = {first_epoch, LPLBK_EXCHANGE_FINE, 0, 0};
    // Loads the kernel now: loading it at the first call would wait for whatever spins on the device, another exchange for one.
    cudaFuncAttributes code;
    cudaError_t error = cudaFuncGetAttributes(&code, exchange_kernel);
    int major = 0, minor = 0;
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error == cudaSuccess) error = cudaMalloc(&state, sizeof fresh);
    if (error == cudaSuccess) {
        error = on_own_stream(
            [&](cudaStream_t stream) { return cudaMemcpyAsync(state, &fresh, sizeof fresh, cudaMemcpyHostToDevice, stream); });
    }
    if (error == cudaSuccess) error = cudaHostAlloc(&page, sizeof(lplbk_exchange_host), cudaHostAllocMapped | cudaHostAllocPortable);
    if (error == cudaSuccess) error = cudaHostGetDevicePointer(&page_on_device, page, 0);
    if (error != cudaSuccess) {
        if (page != nullptr) cudaFreeHost(page);
        if (state != nullptr) cudaFree(state);
        return taken(error);
    }
    memset(page, 0, sizeof(lplbk_exchange_host));
    view->state = (uint64_t)(uintptr_t)state;
    view->host = (uint64_t)(uintptr_t)page_on_device;
    view->capability = 10 * major + minor;
    *host = static_cast<lplbk_exchange_host *>(page);
    return 0;
}

int32_t lplbk_exchange_close(int32_t device, lplbk_exchange_view *view, lplbk_exchange_host *host) {
    const OnDevice on(device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const NotRecorded aside;
    const cudaError_t error = cudaFree((void *)(uintptr_t)view->state);
    const cudaError_t host_error = cudaFreeHost(host);
    view->state = 0;
    view->host = 0;
    return taken(error != cudaSuccess ? error : host_error);
}

int32_t lplbk_exchange_launch(int32_t device, const lplbk_exchange_view *view, const int32_t *counts, int32_t *gathered,
                              const int32_t *digest, int32_t blocks, void *stream) {
    const OnDevice on(device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const int pieces = (view->n_packets + 31) / 32 * (view->n_ranks > 1 ? view->n_ranks - 1 : 1);
    const int warps = pieces < kMaxThreads / 32 ? pieces : kMaxThreads / 32;
    if (blocks <= 0) {
        blocks = (pieces + warps * kPiecesPerWarpAndBlock - 1) / (warps * kPiecesPerWarpAndBlock);
        if (blocks > kMaxBlocks) blocks = kMaxBlocks;
    }
    lplbk_device_info info = {};
    info.capability = view->capability;
    return taken(lplb::launch(info, exchange_kernel, blocks, warps * 32, 0, 0, static_cast<cudaStream_t>(stream), *view, counts, gathered,
                              digest));
}

}  // extern "C"
