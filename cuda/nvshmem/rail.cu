// The rail by NVSHMEM; rail.h describes it. Symmetric memory of one rail:
//   data    [2 parities][n_nodes][n_counts]   what each node has sent here
//   signal  [2 parities][n_nodes]             the number of the call that it belongs to
//   source  [2 parities][n_counts]            what this rank sends, where NVSHMEM can read it
// Two parities are enough for the same reason as in exchange_kernels.h, for `source` too: whoever sends call E + 2 has received E + 1 from
// everybody, who had received its E before.
#include "rail.h"

#include <cuda_runtime.h>
#include <nvshmem.h>
#include <nvshmemx.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace {

constexpr int kThreads = 256;
constexpr uint32_t kPollsBetweenLooks = 1024;

struct State {
    uint64_t epoch;  // of the next call
    uint32_t fault;
};

// Host memory that the device writes. code comes last.
struct Fault {
    int32_t code, node;
    uint64_t epoch, waited_ns;
};

struct View {
    int32_t *data;
    uint64_t *signal;
    int32_t *source;
    const int32_t *pes;
    State *state;
    Fault *fault;
    uint64_t timeout_ns;
    int32_t n_nodes, node, n_counts, policy;
};

struct Rail {
    View view;
    int32_t device;
    Fault *fault;  // the host's address
    char words[256];
};

__device__ uint64_t now_ns() {
    uint64_t time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

__device__ void give_up(const View &view, int node, uint64_t epoch, uint64_t waited_ns) {
    if (atomicCAS(&view.state->fault, 0u, 1u) == 0) {
        volatile Fault *fault = view.fault;
        fault->node = node;
        fault->epoch = epoch;
        fault->waited_ns = waited_ns;
        __threadfence_system();
        fault->code = LPLB_EXCHANGE_TIMED_OUT;
        __threadfence_system();
    }
    if (view.policy == LPLB_EXCHANGE_TRAP) {
        while (((volatile Fault *)view.fault)->code == 0) __nanosleep(100);
        __trap();
    }
}

__device__ bool await(const View &view, uint64_t *signal, int node, uint64_t epoch) {
    uint64_t since = 0;
    for (uint32_t polls = 1; nvshmem_signal_fetch(signal) < epoch; ++polls) {
        if (polls % kPollsBetweenLooks != 0) continue;
        const uint64_t now = now_ns();
        if (since == 0) since = now;
        if (view.timeout_ns != 0 && now - since >= view.timeout_ns) {
            give_up(view, node, epoch, now - since);
            return false;
        }
    }
    nvshmem_signal_wait_until(signal, NVSHMEM_CMP_GE, epoch);  // it is there; orders what came with it
    return true;
}

__global__ void __launch_bounds__(kThreads) rail_kernel(const View view, const int32_t *counts, int32_t *gathered) {
    const uint64_t epoch = view.state->epoch;
    const bool fine = view.state->fault == 0;
    const int parity = (int)(epoch & 1);
    int32_t *source = view.source + (int64_t)parity * view.n_counts;
    int32_t *data = view.data + (int64_t)parity * view.n_nodes * view.n_counts;
    uint64_t *signal = view.signal + (int64_t)parity * view.n_nodes;
    for (int i = threadIdx.x; i < view.n_counts; i += kThreads) {
        source[i] = counts[i];
        gathered[(int64_t)view.node * view.n_counts + i] = counts[i];
    }
    __threadfence_system();
    __syncthreads();
    for (int ahead = 1 + (int)threadIdx.x / 32; fine && ahead < view.n_nodes; ahead += kThreads / 32) {
        const int node = (view.node + ahead) % view.n_nodes;
        nvshmemx_putmem_signal_warp(data + (int64_t)view.node * view.n_counts, source, view.n_counts * sizeof(int32_t), signal + view.node,
                                    epoch, NVSHMEM_SIGNAL_SET, view.pes[node]);
    }
    for (int first = 0; first < view.n_nodes; first += kThreads) {
        const int node = first + (int)threadIdx.x;
        bool here = fine && node < view.n_nodes;
        if (here && node != view.node) here = await(view, signal + node, node, epoch);
        __shared__ bool arrived[kThreads];
        arrived[threadIdx.x] = here;
        __syncthreads();
        for (int64_t i = threadIdx.x; i < (int64_t)min(kThreads, view.n_nodes - first) * view.n_counts; i += kThreads) {
            const int other = first + (int)(i / view.n_counts);
            const int64_t at = (int64_t)first * view.n_counts + i;
            if (other != view.node) gathered[at] = arrived[other - first] ? data[at] : 0;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) view.state->epoch = epoch + 1;
}

int32_t fail(char *message, int64_t size, const char *format, const char *words) {
    if (message != nullptr && size > 0) snprintf(message, (size_t)size, format, words);
    return 1;
}

int32_t all_gather(void *context, const int32_t *counts, int32_t *gathered, int64_t n_counts, void *stream) {
    Rail *rail = static_cast<Rail *>(context);
    const volatile Fault *fault = rail->fault;
    if (fault->code != 0) {
        snprintf(rail->words, sizeof rail->words, "node %d waited %.0f ms for node %d in call %llu; it is late, stuck or gone",
                 rail->view.node, (double)fault->waited_ns * 1e-6, fault->node, (unsigned long long)fault->epoch);
        return LPLB_ERROR_TIMEOUT;
    }
    if (n_counts != rail->view.n_counts) {
        snprintf(rail->words, sizeof rail->words, "made for %d counts, not for %lld", rail->view.n_counts, (long long)n_counts);
        return LPLB_ERROR_INVALID_ARGUMENT;
    }
    int before = 0;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess && before != rail->device) error = cudaSetDevice(rail->device);
    if (error == cudaSuccess) {
        rail_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(rail->view, counts, gathered);
        error = cudaGetLastError();
        if (before != rail->device) cudaSetDevice(before);
    }
    if (error == cudaSuccess) return 0;
    snprintf(rail->words, sizeof rail->words, "%s", cudaGetErrorName(error));
    return LPLB_ERROR_CUDA;
}

const char *error_words(void *context) { return static_cast<Rail *>(context)->words; }

void destroy(void *context) {
    Rail *rail = static_cast<Rail *>(context);
    if (cudaSetDevice(rail->device) == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess) {
        nvshmem_free(rail->view.data);
        nvshmem_free(rail->view.signal);
        nvshmem_free(rail->view.source);
        cudaFree(const_cast<int32_t *>(rail->view.pes));
        cudaFree(rail->view.state);
        cudaFreeHost(rail->fault);
    }
    free(rail);
}

// Gives this library's device code the state of the NVSHMEM that runs, or starts it by `attributes`. The inline functions of nvshmem.h end
// the process on a failure; this returns it.
int32_t join(unsigned flags, nvshmemx_init_attr_t *attributes) {
    int provided;
    const nvshmemi_version_t version = {NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION, NVSHMEM_VENDOR_PATCH_VERSION};
    return nvshmemi_init_thread(NVSHMEM_THREAD_SERIALIZED, &provided, flags, attributes, version);
}

bool g_joined = false;

}  // namespace

extern "C" {

int32_t lplb_nvshmem_abi(void) { return LPLB_NVSHMEM_ABI; }

int32_t lplb_nvshmem_started(void) {
    const int status = nvshmemx_init_status();
    return status >= NVSHMEM_STATUS_IS_INITIALIZED && status != NVSHMEM_STATUS_INVALID;
}

int32_t lplb_nvshmem_pe(void) { return lplb_nvshmem_started() ? nvshmem_my_pe() : -1; }

int32_t lplb_nvshmem_unique_id(void *id, char *message, int64_t message_size) {
    static_assert(sizeof(nvshmemx_uniqueid_t) == 128, "the id travels as 128 bytes");
    nvshmemx_uniqueid_t made = NVSHMEMX_UNIQUEID_INITIALIZER;
    if (nvshmemx_get_uniqueid(&made) != 0) return fail(message, message_size, "NVSHMEM: %s", "no unique id");
    memcpy(id, &made, sizeof made);
    return 0;
}

int32_t lplb_nvshmem_start(int32_t device, const void *id, int32_t rank, int32_t n_ranks, char *message, int64_t message_size) {
    setenv("NVSHMEM_DISABLE_NVLS", "1", 1);
    if (cudaSetDevice(device) != cudaSuccess) return fail(message, message_size, "NVSHMEM: %s", "the device cannot be set");
    nvshmemx_uniqueid_t given;
    memcpy(&given, id, sizeof given);
    nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
    if (nvshmemx_set_attr_uniqueid_args(rank, n_ranks, &given, &attributes) != 0 ||
        join(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes) != 0) {
        return fail(message, message_size, "NVSHMEM: %s", "it does not start (NVSHMEM_DEBUG=INFO says more)");
    }
    g_joined = true;
    return 0;
}

int32_t lplb_nvshmem_rail_create(int32_t device, const int32_t *pes, int64_t n_nodes, int64_t node, int64_t n_counts, int64_t timeout_ms,
                                 lplb_rail_ops *ops, char *message, int64_t message_size) {
    if (!lplb_nvshmem_started()) return fail(message, message_size, "NVSHMEM: %s", "it is not running");
    if (cudaSetDevice(device) != cudaSuccess) return fail(message, message_size, "NVSHMEM: %s", "the device cannot be set");
    if (!g_joined && join(0, nullptr) != 0) return fail(message, message_size, "NVSHMEM: %s", "the one that is running cannot be joined");
    g_joined = true;
    for (int64_t i = 0; i < n_nodes; ++i) {
        if (pes[i] < 0 || pes[i] >= nvshmem_n_pes()) return fail(message, message_size, "NVSHMEM: %s", "a node's PE is not in its world");
    }
    Rail *rail = static_cast<Rail *>(calloc(1, sizeof(Rail)));
    if (rail == nullptr) return fail(message, message_size, "NVSHMEM: %s", "out of memory");
    rail->device = device;
    View &view = rail->view;
    view.n_nodes = (int32_t)n_nodes, view.node = (int32_t)node, view.n_counts = (int32_t)n_counts;
    view.policy = LPLB_EXCHANGE_REPORT;
    view.timeout_ns = (uint64_t)timeout_ms * 1000000;
    view.data = static_cast<int32_t *>(nvshmem_calloc((size_t)(2 * n_nodes * n_counts), sizeof(int32_t)));
    view.signal = static_cast<uint64_t *>(nvshmem_calloc((size_t)(2 * n_nodes), sizeof(uint64_t)));
    view.source = static_cast<int32_t *>(nvshmem_calloc((size_t)(2 * n_counts), sizeof(int32_t)));
    const State fresh = {1, 0};
    int32_t *device_pes = nullptr;
    void *device_fault = nullptr;
    cudaError_t error = view.data && view.signal && view.source ? cudaSuccess : cudaErrorMemoryAllocation;
    if (error == cudaSuccess) error = cudaMalloc(&view.state, sizeof fresh);
    if (error == cudaSuccess) error = cudaMemcpy(view.state, &fresh, sizeof fresh, cudaMemcpyHostToDevice);
    if (error == cudaSuccess) error = cudaMalloc(&device_pes, (size_t)n_nodes * sizeof *pes);
    if (error == cudaSuccess) error = cudaMemcpy(device_pes, pes, (size_t)n_nodes * sizeof *pes, cudaMemcpyHostToDevice);
    if (error == cudaSuccess) error = cudaHostAlloc(&rail->fault, sizeof *rail->fault, cudaHostAllocMapped | cudaHostAllocPortable);
    if (error == cudaSuccess) error = cudaHostGetDevicePointer(&device_fault, rail->fault, 0);
    cudaFuncAttributes code;  // loads the kernel now, while nothing spins
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&code, rail_kernel);
    if (error != cudaSuccess) {
        // The symmetric memory stays: freeing it takes all PEs, and they may have succeeded.
        free(rail);
        return fail(message, message_size, "NVSHMEM: %s", cudaGetErrorName(error));
    }
    memset(rail->fault, 0, sizeof *rail->fault);
    view.pes = device_pes;
    view.fault = static_cast<Fault *>(device_fault);
    memset(ops, 0, sizeof *ops);
    ops->struct_size = (int64_t)sizeof *ops;
    ops->context = rail;
    ops->all_gather = all_gather;
    ops->error = error_words;
    ops->destroy = destroy;
    return 0;
}

void lplb_nvshmem_rail_limits(const lplb_rail_ops *ops, int32_t policy, int64_t timeout_ms) {
    View &view = static_cast<Rail *>(ops->context)->view;
    view.policy = policy;
    view.timeout_ns = (uint64_t)timeout_ms * 1000000;
}

}  // extern "C"
