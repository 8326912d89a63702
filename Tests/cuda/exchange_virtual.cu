// The exchange protocol with virtual ranks on one GPU: blocks (or streams) as ranks, buffers side by side in one allocation.
//
//   nvcc -arch=native -O3 -Icuda Tests/cuda/exchange_virtual.cu cuda/exchange.cu <kernels' error functions> -o exchange_virtual
//   exchange_virtual           everything
//   exchange_virtual blocks    only what runs inside one launch: for compute-sanitizer, which may put launches one after the other
//
// Prints one line a case; exits with 1 if any failed.
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#include "backend.cuh"
#include "exchange.cuh"

#define CUDA(call)                                                                                    \
    do {                                                                                              \
        const cudaError_t error_ = (call);                                                            \
        if (error_ != cudaSuccess) {                                                                  \
            fprintf(stderr, "%s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_)); \
            exit(2);                                                                                  \
        }                                                                                             \
    } while (0)

#define SEAM(call)                                                              \
    do {                                                                        \
        const int32_t error_ = (call);                                          \
        if (error_ != 0) {                                                      \
            fprintf(stderr, "%s:%d %s: %d\n", __FILE__, __LINE__, #call, error_); \
            exit(2);                                                            \
        }                                                                       \
    } while (0)

namespace {

bool g_failed = false;

void verdict(const char *name, bool fine, const char *detail) {
    printf("%-8s %-64s %s\n", fine ? "ok" : "FAILED", name, detail);
    fflush(stdout);
    g_failed = g_failed || !fine;
}

// What rank `rank` brings to round `round` at word `word`; negative counts occur too, so that all 32 bits are carried.
__host__ __device__ inline int32_t count_of(uint32_t round, int rank, int word) {
    uint32_t x = round * 0x9E3779B9u ^ (uint32_t)rank * 0x85EBCA6Bu ^ (uint32_t)word * 0xC2B2AE35u;
    x ^= x >> 16, x *= 0x7FEB352Du, x ^= x >> 15, x *= 0x846CA68Bu, x ^= x >> 16;
    return (int32_t)x;
}

// All ranks of a group on device 0.
struct Group {
    std::vector<lplbk_exchange_view> views;
    std::vector<lplbk_exchange_host *> hosts;
    std::vector<void *> buffers;
    lplbk_exchange_view *device_views = nullptr;

    Group(int n_ranks, int n_nodes, int n_counts, uint32_t first_epoch, uint64_t timeout_ms, int policy) {
        const int64_t words = lplbk_exchange_buffer_words(n_ranks, n_nodes, n_counts);
        views.resize(n_ranks), hosts.resize(n_ranks), buffers.resize(n_ranks);
        for (void *&buffer : buffers) SEAM(lplbk_exchange_alloc(0, words, first_epoch, &buffer));
        for (int rank = 0; rank < n_ranks; ++rank) {
            lplbk_exchange_view &view = views[rank];
            memset(&view, 0, sizeof view);
            for (int peer = 0; peer < n_ranks; ++peer) view.peer[peer] = (uint64_t)(uintptr_t)buffers[peer];
            view.timeout_ns = timeout_ms * 1000000;
            view.rank = rank, view.n_ranks = n_ranks, view.n_nodes = n_nodes, view.n_counts = n_counts;
            view.n_words = n_nodes * n_counts, view.n_packets = (view.n_words + 1) / 2, view.policy = policy;
            SEAM(lplbk_exchange_open(0, first_epoch, &view, &hosts[rank]));
        }
        CUDA(cudaMalloc(&device_views, n_ranks * sizeof views[0]));
        CUDA(cudaMemcpy(device_views, views.data(), n_ranks * sizeof views[0], cudaMemcpyHostToDevice));
    }
    ~Group() {
        for (size_t rank = 0; rank < views.size(); ++rank) {
            SEAM(lplbk_exchange_close(0, &views[rank], hosts[rank]));
            CUDA(cudaFree(buffers[rank]));
        }
        CUDA(cudaFree(device_views));
    }
    int n_ranks() const { return (int)views.size(); }
    int64_t gathered_words() const { return (int64_t)views[0].n_words * n_ranks(); }
};

// ---- Blocks as ranks -----------------------------------------------------------------------------------------------------------

// Block b is rank b. `rounds` exchanges in a row, each rank with its own random delays; wrong counts are added up in errors.
// absent: a rank that stops taking part before the last round. skew: longest delay before a round in ns.
__global__ void __launch_bounds__(1024)
    rounds_kernel(const lplbk_exchange_view *views, int32_t *counts, int32_t *gathered, uint32_t rounds, uint32_t skew, int absent,
                  unsigned long long *errors) {
    const lplbk_exchange_view &view = views[blockIdx.x];
    int32_t *mine = counts + (int64_t)blockIdx.x * view.n_words;
    int32_t *all = gathered + (int64_t)blockIdx.x * view.n_words * view.n_ranks;
    for (uint32_t round = 0; round < rounds; ++round) {
        if ((int)blockIdx.x == absent && round + 1 == rounds) break;
        if (skew != 0) __nanosleep((uint32_t)count_of(round, (int)blockIdx.x, -1) % skew);
        const exchange::Call call = exchange::begin(view);
        for (int word = threadIdx.x; word < view.n_words; word += blockDim.x) mine[word] = count_of(round, view.rank, word);
        __syncthreads();
        exchange::send(view, call, mine, threadIdx.x, blockDim.x);
        exchange::receive(view, call, mine, threadIdx.x, blockDim.x,
                          [&](int row, int column, int32_t count) { all[row * view.n_counts + column] = count; });
        __syncthreads();
        if (threadIdx.x == 0) exchange::end(view, call);
        if (absent < 0) {
            unsigned long long wrong = 0;
            for (int i = threadIdx.x; i < view.n_words * view.n_ranks; i += blockDim.x) {
                const int row = i / view.n_counts, node = row / view.n_ranks, source = row % view.n_ranks;
                wrong += all[i] != count_of(round, source, node * view.n_counts + i % view.n_counts);
            }
            if (wrong != 0) atomicAdd(errors, wrong);
        }
        __syncthreads();
    }
}

void run_blocks(int n_ranks, int n_nodes, int n_counts, uint32_t rounds, uint32_t skew, uint32_t first_epoch, int threads) {
    Group group(n_ranks, n_nodes, n_counts, first_epoch, 60000, LPLBK_EXCHANGE_REPORT);
    int32_t *counts, *gathered;
    unsigned long long *errors, wrong = 0;
    CUDA(cudaMalloc(&counts, group.gathered_words() * 4));
    CUDA(cudaMalloc(&gathered, group.gathered_words() * 4 * n_ranks));
    CUDA(cudaMalloc(&errors, sizeof *errors));
    CUDA(cudaMemset(errors, 0, sizeof *errors));
    cudaEvent_t start, stop;
    CUDA(cudaEventCreate(&start));
    CUDA(cudaEventCreate(&stop));
    CUDA(cudaEventRecord(start));
    rounds_kernel<<<n_ranks, threads>>>(group.device_views, counts, gathered, rounds, skew, -1, errors);
    CUDA(cudaGetLastError());
    CUDA(cudaEventRecord(stop));
    CUDA(cudaDeviceSynchronize());
    float ms = 0;
    CUDA(cudaEventElapsedTime(&ms, start, stop));
    CUDA(cudaMemcpy(&wrong, errors, sizeof wrong, cudaMemcpyDeviceToHost));
    bool quiet = true;
    for (auto *host : group.hosts) quiet = quiet && host->report.code == LPLBK_EXCHANGE_FINE;
    uint32_t epoch;
    CUDA(cudaMemcpy(&epoch, (void *)(uintptr_t)group.views[0].state, sizeof epoch, cudaMemcpyDeviceToHost));
    char name[160], detail[160];
    snprintf(name, sizeof name, "blocks: %d ranks, %d nodes, %d counts, from epoch %u, skew %u ns", n_ranks, n_nodes, n_counts,
             first_epoch, skew);
    snprintf(detail, sizeof detail, "%u rounds, %llu wrong, %.2f us a round", rounds, wrong, ms * 1e3 / rounds);
    verdict(name, wrong == 0 && quiet && epoch == first_epoch + rounds, detail);
    CUDA(cudaEventDestroy(start));
    CUDA(cudaEventDestroy(stop));
    CUDA(cudaFree(counts));
    CUDA(cudaFree(gathered));
    CUDA(cudaFree(errors));
}

bool right_or_zero(const std::vector<int32_t> &all, const Group &group, int rank, int absent, uint32_t round) {
    const int n_words = group.views[0].n_words, n_ranks = group.n_ranks();
    for (int source = 0; source < n_ranks; ++source) {
        for (int word = 0; word < n_words; ++word) {
            const int32_t got = all[((int64_t)rank * n_ranks + source) * n_words + word];
            if (got != (source == absent ? 0 : count_of(round, source, word))) return false;
        }
    }
    return true;
}

// One rank does not come (or the host gives up): every other one reports it and ends; later calls do not wait.
void run_missing(bool abort_instead, int abort_after_ms = 0) {
    const int n_ranks = 4, n_counts = 64, absent = 2;
    const uint32_t rounds = 3;
    Group group(n_ranks, 1, n_counts, 1, abort_instead ? 0 : 30, LPLBK_EXCHANGE_REPORT);
    int32_t *counts, *gathered;
    unsigned long long *errors;
    CUDA(cudaMalloc(&counts, group.gathered_words() * 4));
    CUDA(cudaMalloc(&gathered, group.gathered_words() * 4 * n_ranks));
    CUDA(cudaMalloc(&errors, sizeof *errors));
    // On a thread of its own, since a checker may make the launch wait for its kernel.
    std::thread aborter([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(abort_after_ms));
        for (auto *host : group.hosts) *(volatile uint32_t *)&host->abort = abort_instead;
    });
    rounds_kernel<<<n_ranks, 256>>>(group.device_views, counts, gathered, rounds, 0, absent, errors);
    CUDA(cudaGetLastError());
    CUDA(cudaDeviceSynchronize());
    aborter.join();
    std::vector<int32_t> all(group.gathered_words() * n_ranks);
    CUDA(cudaMemcpy(all.data(), gathered, all.size() * 4, cudaMemcpyDeviceToHost));
    bool fine = true;
    for (int rank = 0; rank < n_ranks; ++rank) {
        const volatile lplbk_report &host = group.hosts[rank]->report;
        if (rank == absent) {
            fine = fine && host.code == LPLBK_EXCHANGE_FINE;
            continue;
        }
        const int code = abort_instead ? LPLBK_EXCHANGE_ABORTED : LPLBK_EXCHANGE_TIMED_OUT;
        fine = fine && host.code == code && host.rank == rank && host.peer == absent && host.epoch == rounds;
        fine = fine && (abort_instead || (host.waited_ns >= 30000000 && host.waited_ns < 2000000000));
        fine = fine && right_or_zero(all, group, rank, absent, rounds - 1);
    }
    char detail[160];
    snprintf(detail, sizeof detail, "rank 0: code %d, peer %d, epoch %u, waited %.2f ms", group.hosts[0]->report.code, group.hosts[0]->report.peer,
             group.hosts[0]->report.epoch, group.hosts[0]->report.waited_ns * 1e-6);
    verdict(abort_instead ? "blocks: a missing rank, no limit, the host aborts" : "blocks: a missing rank, limit 30 ms", fine, detail);

    // The exchange stays down: a call on the stream comes back at once, with this rank's own counts alone.
    const auto before = std::chrono::steady_clock::now();
    SEAM(lplbk_exchange_launch(0, &group.views[0], counts, gathered, nullptr, 0, nullptr));
    CUDA(cudaDeviceSynchronize());
    const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - before).count();
    CUDA(cudaMemcpy(all.data(), gathered, group.gathered_words() * 4, cudaMemcpyDeviceToHost));
    fine = ms < 20;
    for (int i = 0; i < group.gathered_words(); ++i) fine = fine && all[i] == (i < n_counts ? count_of(rounds - 1, 0, i) : 0);
    snprintf(detail, sizeof detail, "%.3f ms", ms);
    verdict("blocks: the next call does not wait", fine, detail);
    CUDA(cudaFree(counts));
    CUDA(cudaFree(gathered));
    CUDA(cudaFree(errors));
}

// ---- Streams as ranks: the stand-alone kernel, eager and in graphs ----------------------------------------------------------------

__global__ void fill_counts(int32_t *counts, int n_words, const uint32_t *round, int rank) {
    for (int word = threadIdx.x; word < n_words; word += blockDim.x) counts[word] = count_of(*round, rank, word);
}

__global__ void check_counts(const int32_t *gathered, int n_words, int n_ranks, uint32_t *round, unsigned long long *errors) {
    const uint32_t now = *round;
    for (int i = threadIdx.x; i < n_words * n_ranks; i += blockDim.x) {
        if (gathered[i] != count_of(now, i / n_words, i % n_words)) atomicAdd(errors, 1ull);
    }
    __syncthreads();
    if (threadIdx.x == 0) *round = now + 1;
}

void run_streams(int n_ranks, int n_counts, int blocks, uint32_t first_epoch) {
    Group group(n_ranks, 1, n_counts, first_epoch, 20000, LPLBK_EXCHANGE_REPORT);
    std::vector<cudaStream_t> streams(n_ranks);
    std::vector<int32_t *> counts(n_ranks), gathered(n_ranks);
    std::vector<uint32_t *> rounds(n_ranks);
    std::vector<cudaGraphExec_t> graphs(n_ranks);
    unsigned long long *errors, wrong = 0;
    CUDA(cudaMalloc(&errors, sizeof *errors));
    CUDA(cudaMemset(errors, 0, sizeof *errors));
    const auto call = [&](int rank) {
        fill_counts<<<1, 256, 0, streams[rank]>>>(counts[rank], n_counts, rounds[rank], rank);
        SEAM(lplbk_exchange_launch(0, &group.views[rank], counts[rank], gathered[rank], nullptr, blocks, streams[rank]));
        check_counts<<<1, 256, 0, streams[rank]>>>(gathered[rank], n_counts, n_ranks, rounds[rank], errors);
    };
    const int per_graph = 16;
    for (int rank = 0; rank < n_ranks; ++rank) {
        CUDA(cudaStreamCreateWithFlags(&streams[rank], cudaStreamNonBlocking));
        CUDA(cudaMalloc(&counts[rank], n_counts * 4));
        CUDA(cudaMalloc(&gathered[rank], group.gathered_words() * 4));
        CUDA(cudaMalloc(&rounds[rank], 4));
        CUDA(cudaMemset(rounds[rank], 0, 4));
        cudaGraph_t graph;
        CUDA(cudaStreamBeginCapture(streams[rank], cudaStreamCaptureModeThreadLocal));
        for (int i = 0; i < per_graph; ++i) call(rank);
        CUDA(cudaStreamEndCapture(streams[rank], &graph));
        CUDA(cudaGraphInstantiate(&graphs[rank], graph, 0));
        CUDA(cudaGraphDestroy(graph));
    }
    CUDA(cudaDeviceSynchronize());
    uint32_t expected = 0;
    srand(1);
    for (int step = 0; step < 300; ++step) {
        const bool replay = rand() % 2 == 0;
        const int odd = 1 + rand() % 3;
        std::vector<int> order(n_ranks);
        for (int i = 0; i < n_ranks; ++i) order[i] = i;
        for (int i = n_ranks - 1; i > 0; --i) std::swap(order[i], order[rand() % (i + 1)]);
        for (int rank : order) {
            if (replay) CUDA(cudaGraphLaunch(graphs[rank], streams[rank]));
            for (int i = 0; i < odd; ++i) call(rank);
        }
        expected += (replay ? per_graph : 0) + odd;
        if (step % 16 == 15) CUDA(cudaDeviceSynchronize());
    }
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaMemcpy(&wrong, errors, sizeof wrong, cudaMemcpyDeviceToHost));
    bool fine = wrong == 0;
    for (int rank = 0; rank < n_ranks; ++rank) {
        uint32_t round, epoch;
        CUDA(cudaMemcpy(&round, rounds[rank], 4, cudaMemcpyDeviceToHost));
        CUDA(cudaMemcpy(&epoch, (void *)(uintptr_t)group.views[rank].state, 4, cudaMemcpyDeviceToHost));
        fine = fine && round == expected && epoch == first_epoch + expected && group.hosts[rank]->report.code == LPLBK_EXCHANGE_FINE;
        CUDA(cudaGraphExecDestroy(graphs[rank]));
        CUDA(cudaStreamDestroy(streams[rank]));
        CUDA(cudaFree(counts[rank]));
        CUDA(cudaFree(gathered[rank]));
        CUDA(cudaFree(rounds[rank]));
    }
    CUDA(cudaFree(errors));
    char name[160], detail[160];
    snprintf(name, sizeof name, "streams: %d ranks, %d counts, %d blocks, graphs and eager, from epoch %u", n_ranks, n_counts, blocks,
             first_epoch);
    snprintf(detail, sizeof detail, "%u calls a rank, %llu wrong", expected, wrong);
    verdict(name, fine, detail);
}

// A call of one rank in a graph: what launch, two loads and the write cost without any peer.
void time_alone() {
    Group group(1, 1, 256, 1, 1000, LPLBK_EXCHANGE_REPORT);
    int32_t *counts, *gathered;
    CUDA(cudaMalloc(&counts, 1024));
    CUDA(cudaMalloc(&gathered, 1024));
    CUDA(cudaMemset(counts, 0, 1024));
    cudaStream_t stream;
    CUDA(cudaStreamCreate(&stream));
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < 100; ++i) SEAM(lplbk_exchange_launch(0, &group.views[0], counts, gathered, nullptr, 0, stream));
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t start, stop;
    CUDA(cudaEventCreate(&start));
    CUDA(cudaEventCreate(&stop));
    std::vector<float> times;
    for (int i = 0; i < 50; ++i) {
        CUDA(cudaEventRecord(start, stream));
        CUDA(cudaGraphLaunch(exec, stream));
        CUDA(cudaEventRecord(stop, stream));
        CUDA(cudaStreamSynchronize(stream));
        float ms;
        CUDA(cudaEventElapsedTime(&ms, start, stop));
        times.push_back(ms * 10);
    }
    std::sort(times.begin(), times.end());
    char detail[160];
    snprintf(detail, sizeof detail, "%.2f us a call, median of 50 graphs of 100", times[times.size() / 2]);
    verdict("alone: one rank, 256 counts, graph", true, detail);
    CUDA(cudaGraphExecDestroy(exec));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaStreamDestroy(stream));
    CUDA(cudaFree(counts));
    CUDA(cudaFree(gathered));
}

void run_leak() {
    size_t before = 0, after = 0, total;
    for (int i = 0; i < 52; ++i) {
        { Group group(8, 1, 256, 1, 1000, LPLBK_EXCHANGE_REPORT); }
        if (i == 1) CUDA(cudaMemGetInfo(&before, &total));
    }
    CUDA(cudaMemGetInfo(&after, &total));
    char detail[160];
    snprintf(detail, sizeof detail, "free memory %zu -> %zu bytes", before, after);
    verdict("create and destroy 50 times", after == before, detail);
}

// Last, since the context does not survive it: the report does.
void run_trap() {
    Group *group = new Group(2, 1, 16, 7, 20, LPLBK_EXCHANGE_TRAP);  // never freed: its context is gone
    int32_t *counts, *gathered;
    CUDA(cudaMalloc(&counts, 64));
    CUDA(cudaMalloc(&gathered, 128));
    CUDA(cudaMemset(counts, 0, 64));
    SEAM(lplbk_exchange_launch(0, &group->views[1], counts, gathered, nullptr, 0, nullptr));
    const cudaError_t error = cudaDeviceSynchronize();
    const lplbk_report &host = group->hosts[1]->report;
    char detail[160];
    snprintf(detail, sizeof detail, "%s; code %d, rank %d, peer %d, epoch %u, waited %.2f ms", cudaGetErrorName(error), host.code,
             host.rank, host.peer, host.epoch, host.waited_ns * 1e-6);
    verdict("trap: the report can be read after it",
            error != cudaSuccess && host.code == LPLBK_EXCHANGE_TIMED_OUT && host.rank == 1 && host.peer == 0 && host.epoch == 7, detail);
}

}  // namespace

int main(int argc, char **argv) {
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);  // streams that share a hardware queue would wait for each other
    const bool blocks_only = argc > 1 && strcmp(argv[1], "blocks") == 0;
    const uint32_t scale = blocks_only ? 1 : 20;
    for (uint32_t first_epoch : {1u, 0xFFFFFFF0u, 0xFFFFFFFFu, 0u}) run_blocks(8, 1, 256, 100 * scale, 3000, first_epoch, 1024);
    run_blocks(8, 1, 256, 100 * scale, 0, 1, 896);
    run_blocks(2, 1, 256, 100 * scale, 0, 1, 128);
    run_blocks(1, 1, 256, 10, 0, 1, 64);
    run_blocks(2, 1, 1, 100 * scale, 500, 0xFFFFFFFEu, 32);
    run_blocks(3, 1, 257, 100 * scale, 2000, 5, 96);
    run_blocks(4, 2, 63, 100 * scale, 2000, 5, 256);
    run_blocks(4, 3, 64, 100 * scale, 2000, 5, 512);
    run_blocks(5, 1, 4096, 10 * scale, 2000, 5, 1024);
    run_blocks(72, 1, 256, 10 * scale, 2000, 0xFFFFFFF8u, 1024);
    run_missing(false);
    run_missing(true, blocks_only ? 3000 : 100);
    if (!blocks_only) {
        run_streams(8, 256, 0, 1);
        run_streams(8, 255, 3, 0xFFFFFFF0u);
        run_streams(2, 1024, 2, 1);
        time_alone();
        run_leak();
        run_trap();
    }
    printf("%s\n", g_failed ? "FAILED" : "all fine");
    return g_failed ? 1 : 0;
}
