// Small helpers of all kernels.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "kernels.h"
#include "profile.cuh"

#ifndef LPLB_MAX_GROUP_CUDA
#define LPLB_MAX_GROUP_CUDA 512  // LPLB_MAX_RANKS_CUDA of lplb.h
#endif

namespace lplb {

constexpr unsigned kFullWarp = 0xffffffffu;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t ceil_div64(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_id() { return threadIdx.x >> 5; }
// The same as warp_id(), but known to the compiler to be one number for the warp, so that what depends on it is not taken for divergent.
__device__ __forceinline__ int uniform_warp_id() { return __reduce_max_sync(kFullWarp, (int)(threadIdx.x >> 5)); }
__device__ __forceinline__ unsigned lanes_below() {
    unsigned mask;
    asm("mov.u32 %0, %%lanemask_lt;" : "=r"(mask));
    return mask;
}

__device__ __forceinline__ int warp_sum(int value) { return __reduce_add_sync(kFullWarp, value); }
__device__ __forceinline__ int warp_max(int value) { return __reduce_max_sync(kFullWarp, value); }

// Inclusive prefix sum over the lanes of a warp.
__device__ __forceinline__ int warp_prefix(int value) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(kFullWarp, value, step);
        if (lane_id() >= step) value += below;
    }
    return value;
}

// One id of the caller as a logical expert, -1 (none) or -2 (out of range: never to be used as an index).
template <class Id>
__device__ __forceinline__ int checked_id(Id id, int n_logical) {
    if (id >= 0 && id < (Id)n_logical) return (int)id;
    return id == (Id)-1 ? -1 : -2;
}

// Waits until the kernels before this one in the stream are through; tables may be read before that, nothing else.
__device__ __forceinline__ void wait_for_stream() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream start its own preparations, if it was launched to do so.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- Clusters (compute capability 9.0 and above; elsewhere a cluster is one block) -------------------------------------------------

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define LPLB_CLUSTERS 1
#endif

__device__ __forceinline__ unsigned cluster_rank() {
#ifdef LPLB_CLUSTERS
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return 0;
#endif
}

__device__ __forceinline__ unsigned cluster_size() {
#ifdef LPLB_CLUSTERS
    unsigned size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
#else
    return 1;
#endif
}

// What the threads of the cluster wrote to shared memory before arrive() can be read by all of them after wait(). The fence is for shared
// memory alone: releasing global memory too, as arrive does by itself, takes the better part of a microsecond.
__device__ __forceinline__ void cluster_arrive() {
#if defined(LPLB_CLUSTERS) && defined(LPLB_PLAIN_BARRIERS)
    // For racecheck, which may not follow the pair below: a report that this build does not have is the tool's.
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#elif defined(LPLB_CLUSTERS)
    asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#ifdef LPLB_CLUSTERS
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// The word at the same place in the shared memory of another block of the cluster.
__device__ __forceinline__ unsigned cluster_load(const unsigned *shared, unsigned rank) {
#ifdef LPLB_CLUSTERS
    const uint32_t here = (uint32_t)__cvta_generic_to_shared(shared);
    uint32_t there;
    unsigned value;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(there) : "memory");
    return value;
#else
    return *shared;
#endif
}

// The four words at the same place in the shared memory of another block of the cluster. 16-byte aligned.
__device__ __forceinline__ int4 cluster_load(const int4 *shared, unsigned rank) {
#ifdef LPLB_CLUSTERS
    const uint32_t here = (uint32_t)__cvta_generic_to_shared(shared);
    uint32_t there;
    int4 value;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(there)
                 : "memory");
    return value;
#else
    return *shared;
#endif
}

// ---- Host ---------------------------------------------------------------------------------------------------------------------

// Switches the calling thread to a device and back.
class OnDevice {
public:
    explicit OnDevice(int device) {
        error_ = cudaGetDevice(&before_);
        if (error_ == cudaSuccess && before_ != device) {
            error_ = cudaSetDevice(device);
            changed_ = error_ == cudaSuccess;
        }
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice &) = delete;
    OnDevice &operator=(const OnDevice &) = delete;
    cudaError_t error() const { return error_; }

private:
    int before_ = 0;
    bool changed_ = false;
    cudaError_t error_;
};

// Allocating and freeing are legal while another thread records a graph, if this thread says that it does not mean to record them.
class NotRecorded {
public:
    NotRecorded() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    ~NotRecorded() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    NotRecorded(const NotRecorded &) = delete;
    NotRecorded &operator=(const NotRecorded &) = delete;

private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Queues work and waits for it, on a stream of our own: the default stream may be one that somebody else's work waits for, and it waits
// for all other work of the device, an exchange that waits for its peers among it.
template <class Queue>
cudaError_t on_own_stream(Queue &&queue) {
    cudaStream_t stream;
    cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (error != cudaSuccess) return error;
    error = queue(stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
    return error;
}

// The error of a call or launch; takes it off the runtime's record, so that it is not reported again by somebody else's call.
inline int32_t taken(cudaError_t error) {
    if (error != cudaSuccess) cudaGetLastError();
    return (int32_t)error;
}

}  // namespace lplb
