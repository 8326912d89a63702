// The rail by NVSHMEM; rail.h describes it. Symmetric memory of one rail, in one allocation:
//   signal  [2 parities][n_nodes]             the number of the call that what has arrived belongs to
//   data    [2 parities][n_nodes][n_counts]   what each node has sent here
//   source  [2 parities][n_counts]            what this rank sends, where NVSHMEM can read it
// Two parities are enough for the same reason as in exchange_view.h, for `source` too: whoever sends call E + 2 has received E + 1 from
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
    uint32_t fault;  // LPLB_EXCHANGE_*; once set, calls neither send nor wait
};

// Host memory that the device can write.
struct Page {
    uint32_t abort;  // host -> device: stop waiting
    uint32_t unused[15];
    int32_t code, node;  // device -> host; code is written last
    uint64_t epoch, waited_ns;
};

struct View {
    int32_t *data;
    uint64_t *signal;
    int32_t *source;
    const int32_t *pes;
    State *state;
    Page *page;
    uint64_t timeout_ns;
    int32_t n_nodes, node, n_counts, policy;
};

struct Rail {
    View view;
    int32_t device;
    Page *page;       // the host's address
    void *symmetric;  // signal, data and source
    char words[256];
};

__device__ uint64_t now_ns() {
    uint64_t time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

__device__ void give_up(const View &view, uint32_t code, int node, uint64_t epoch, uint64_t waited_ns) {
    if (atomicCAS(&view.state->fault, (uint32_t)LPLB_EXCHANGE_FINE, code) == LPLB_EXCHANGE_FINE) {
        volatile Page *page = view.page;
        page->node = node;
        page->epoch = epoch;
        page->waited_ns = waited_ns;
        __threadfence_system();
        page->code = (int32_t)code;
        __threadfence_system();
    }
    if (code == LPLB_EXCHANGE_TIMED_OUT && view.policy == LPLB_EXCHANGE_TRAP) {  // never after an abort: the host wants its context back
        while (((volatile Page *)view.page)->code == LPLB_EXCHANGE_FINE) __nanosleep(100);
        __trap();
    }
}

__device__ bool await(const View &view, uint64_t *signal, int node, uint64_t epoch) {
    uint64_t since = 0;
    for (uint32_t polls = 1; nvshmem_signal_fetch(signal) < epoch; ++polls) {
        if (polls % kPollsBetweenLooks != 0) continue;
        const uint64_t now = now_ns();
        if (since == 0) since = now;
        const bool aborted = ((volatile Page *)view.page)->abort != 0;
        if (aborted || (view.timeout_ns != 0 && now - since >= view.timeout_ns)) {
            give_up(view, aborted ? LPLB_EXCHANGE_ABORTED : LPLB_EXCHANGE_TIMED_OUT, node, epoch, now - since);
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

// What the device wrote when it gave up: code first, and the rest only once that is there.
int32_t fault_of(const Rail *rail) { return __atomic_load_n(&rail->page->code, __ATOMIC_ACQUIRE); }

bool aborted(const Rail *rail) { return __atomic_load_n(&rail->page->abort, __ATOMIC_ACQUIRE) != 0; }

int32_t all_gather(void *context, const int32_t *counts, int32_t *gathered, int64_t n_counts, void *stream) {
    Rail *rail = static_cast<Rail *>(context);
    if (const int32_t code = fault_of(rail)) {
        const Page *page = rail->page;
        snprintf(rail->words, sizeof rail->words, "node %d waited %.0f ms for node %d in call %llu%s", rail->view.node,
                 (double)page->waited_ns * 1e-6, page->node, (unsigned long long)page->epoch,
                 code == LPLB_EXCHANGE_ABORTED ? ", then the host aborted it" : "; it is late, stuck or gone");
        return LPLB_ERROR_TIMEOUT;
    }
    if (aborted(rail)) {
        snprintf(rail->words, sizeof rail->words, "the host aborted it");
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

void abort_waiting(void *context) { __atomic_store_n(&static_cast<Rail *>(context)->page->abort, 1u, __ATOMIC_RELEASE); }

void report(void *context, lplb_exchange_report *found) {
    const Rail *rail = static_cast<Rail *>(context);
    const int32_t code = fault_of(rail);
    if (code == LPLB_EXCHANGE_FINE) return;
    found->code = code;
    found->peer_node = rail->page->node;
    found->epoch = (uint32_t)rail->page->epoch;
    found->waited_ns = (int64_t)rail->page->waited_ns;
}

// What this rank alone has allocated.
void free_local(Rail *rail) {
    if (rail->view.pes != nullptr) cudaFree(const_cast<int32_t *>(rail->view.pes));
    if (rail->view.state != nullptr) cudaFree(rail->view.state);
    if (rail->page != nullptr) cudaFreeHost(rail->page);
    free(rail);
}

void destroy(void *context) {
    Rail *rail = static_cast<Rail *>(context);
    int before = 0;
    const bool known = cudaGetDevice(&before) == cudaSuccess;
    if (cudaSetDevice(rail->device) != cudaSuccess || cudaDeviceSynchronize() != cudaSuccess) {
        free(rail);  // the context is lost, and all its memory with it
        return;
    }
    // nvshmem_free waits for all PEs. Where one of them did not come before, it may never come; then the memory stays until NVSHMEM ends.
    if (fault_of(rail) == LPLB_EXCHANGE_FINE && !aborted(rail)) nvshmem_free(rail->symmetric);
    free_local(rail);
    if (known) cudaSetDevice(before);
}

// Copies to the device on a stream of our own: the default stream waits for all other work, an exchange that waits for its peers among it.
cudaError_t copy(void *to, const void *from, size_t bytes) {
    cudaStream_t stream;
    cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (error != cudaSuccess) return error;
    error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
    return error;
}

// Sets a variable of the environment for as long as NVSHMEM reads it.
class Setting {
public:
    Setting(const char *name, const char *value, bool override) : name_(name) {
        const char *before = getenv(name);
        if (before != nullptr && !override) return;
        had_ = before != nullptr;
        if (had_) snprintf(before_, sizeof before_, "%s", before);
        changed_ = setenv(name, value, 1) == 0;
    }
    ~Setting() {
        if (changed_ && had_) setenv(name_, before_, 1);
        if (changed_ && !had_) unsetenv(name_);
    }
    Setting(const Setting &) = delete;
    Setting &operator=(const Setting &) = delete;

private:
    const char *name_;
    char before_[256];
    bool had_ = false, changed_ = false;
};

// For those who start NVSHMEM: no multicast, and no gigabyte of heap for a few kilobytes unless somebody has said how much.
struct StartSettings {
    const Setting multicast{"NVSHMEM_DISABLE_NVLS", "1", true};
    const Setting heap{"NVSHMEM_SYMMETRIC_SIZE", "67108864", false};
};

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
    const StartSettings settings;
    nvshmemx_uniqueid_t made = NVSHMEMX_UNIQUEID_INITIALIZER;
    if (nvshmemx_get_uniqueid(&made) != 0) return fail(message, message_size, "NVSHMEM: %s", "no unique id");
    memcpy(id, &made, sizeof made);
    return 0;
}

int32_t lplb_nvshmem_start(int32_t device, const void *id, int32_t rank, int32_t n_ranks, char *message, int64_t message_size) {
    const StartSettings settings;
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
    const State fresh = {1, LPLB_EXCHANGE_FINE};
    int32_t *device_pes = nullptr;
    void *device_page = nullptr;
    cudaError_t error = cudaMalloc(&view.state, sizeof fresh);
    if (error == cudaSuccess) error = copy(view.state, &fresh, sizeof fresh);
    if (error == cudaSuccess) error = cudaMalloc(&device_pes, (size_t)n_nodes * sizeof *pes);
    view.pes = device_pes;
    if (error == cudaSuccess) error = copy(device_pes, pes, (size_t)n_nodes * sizeof *pes);
    if (error == cudaSuccess) error = cudaHostAlloc(&rail->page, sizeof *rail->page, cudaHostAllocMapped | cudaHostAllocPortable);
    if (error == cudaSuccess) error = cudaHostGetDevicePointer(&device_page, rail->page, 0);
    cudaFuncAttributes code;  // loads the kernel now, while nothing spins
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&code, rail_kernel);
    if (error != cudaSuccess) {
        (void)cudaGetLastError();  // it is reported here, and must not be again by somebody else's call
        free_local(rail);
        return fail(message, message_size, "NVSHMEM: %s", cudaGetErrorName(error));
    }
    memset(rail->page, 0, sizeof *rail->page);
    view.page = static_cast<Page *>(device_page);
    memset(ops, 0, sizeof *ops);
    ops->struct_size = (int64_t)sizeof *ops;
    ops->context = rail;
    ops->all_gather = all_gather;
    ops->error = error_words;
    ops->destroy = destroy;
    ops->abort = abort_waiting;
    ops->report = report;
    ops->failed = &view.state->fault;
    return 0;
}

int32_t lplb_nvshmem_rail_connect(const lplb_rail_ops *ops, char *message, int64_t message_size) {
    Rail *rail = static_cast<Rail *>(ops->context);
    View &view = rail->view;
    const size_t signals = 2 * (size_t)view.n_nodes, source = 2 * (size_t)view.n_counts;
    const size_t data = (signals * (size_t)view.n_counts + 3) / 4 * 4;  // so that every part is aligned to 16 bytes
    // Of the memory every PE gets the same, or none does.
    rail->symmetric = nvshmem_calloc(1, signals * sizeof(uint64_t) + (data + source) * sizeof(int32_t));
    if (rail->symmetric == nullptr) return fail(message, message_size, "NVSHMEM: %s", "its symmetric heap is full (NVSHMEM_SYMMETRIC_SIZE)");
    view.signal = static_cast<uint64_t *>(rail->symmetric);
    view.data = reinterpret_cast<int32_t *>(view.signal + signals);
    view.source = view.data + data;
    return 0;
}

void lplb_nvshmem_rail_limits(const lplb_rail_ops *ops, int32_t policy, int64_t timeout_ms) {
    View &view = static_cast<Rail *>(ops->context)->view;
    view.policy = policy;
    view.timeout_ns = (uint64_t)timeout_ms * 1000000;
}

}  // extern "C"
