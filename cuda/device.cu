// Device and memory: the part of kernels.h that launches nothing.
#include <string.h>

#include "backend.cuh"
#include "common.cuh"

using lplb::NotRecorded;
using lplb::OnDevice;
using lplb::taken;

namespace {

// Compiled once for each target of the build; running it tells whether the build holds code for a device.
__global__ void code_for_this_device() {}

int32_t copy(int32_t device, void *to, const void *from, int64_t bytes, cudaMemcpyKind kind, void *stream) {
    OnDevice on(device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const auto queue = static_cast<cudaStream_t>(stream);
    cudaError_t error = bytes > 0 ? cudaMemcpyAsync(to, from, (size_t)bytes, kind, queue) : cudaSuccess;
    if (error == cudaSuccess) error = cudaStreamSynchronize(queue);
    return taken(error);
}

}  // namespace

extern "C" {

int32_t lplbk_error_kind(int32_t error) {
    switch (error) {
    case cudaSuccess:
        return LPLBK_KIND_OK;
    case cudaErrorMemoryAllocation:
        return LPLBK_KIND_OUT_OF_MEMORY;
    case LPLBK_UNSUPPORTED:
        return LPLBK_KIND_UNSUPPORTED;
    case LPLBK_NO_CUDA:
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice:
    case cudaErrorInitializationError:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
    case cudaErrorStubLibrary:
    case cudaErrorDevicesUnavailable:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorSystemNotReady:
        return LPLBK_KIND_NO_CUDA;
    default:
        return LPLBK_KIND_FAILED;
    }
}

const char *lplbk_error_name(int32_t error) {
    if (error == LPLBK_NO_CUDA) return "no CUDA";
    if (error == LPLBK_UNSUPPORTED) return "not supported";
    return cudaGetErrorName(static_cast<cudaError_t>(error));
}

int32_t lplbk_device_count(int32_t *count) {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    *count = error == cudaSuccess ? devices : 0;
    return taken(error);
}

int32_t lplbk_device_info_of(int32_t device, lplbk_device_info *info) {
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess && count == 0) error = cudaErrorNoDevice;
    if (error == cudaSuccess && (device < 0 || device >= count)) error = cudaErrorInvalidDevice;
    if (error != cudaSuccess) return taken(error);
    int major = 0, minor = 0, clusters = 0;
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&info->n_sms, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&info->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
    if (error == cudaSuccess) {
        OnDevice on(device);
        cudaFuncAttributes code;
        error = on.error() != cudaSuccess ? on.error() : cudaFuncGetAttributes(&code, code_for_this_device);
    }
    info->capability = 10 * major + minor;
    info->max_cluster = clusters ? 8 : 1;  // open asks for more where a device can
    return taken(error);
}

int32_t lplbk_alloc(int32_t device, int64_t bytes, void **memory) {
    *memory = nullptr;
    if (bytes <= 0) return 0;
    OnDevice on(device);
    if (on.error() != cudaSuccess) return taken(on.error());
    NotRecorded aside;
    cudaError_t error = cudaMalloc(memory, (size_t)bytes);
    if (error == cudaSuccess) {
        error = lplb::on_own_stream([&](cudaStream_t stream) { return cudaMemsetAsync(*memory, 0, (size_t)bytes, stream); });
        if (error != cudaSuccess) {
            cudaFree(*memory);
            *memory = nullptr;
        }
    }
    return taken(error);
}

int32_t lplbk_free(int32_t device, void *memory) {
    if (memory == nullptr) return 0;
    OnDevice on(device);
    if (on.error() != cudaSuccess) return taken(on.error());
    NotRecorded aside;
    cudaError_t error = cudaDeviceSynchronize();
    if (error == cudaSuccess) error = cudaFree(memory);
    return taken(error);
}

int32_t lplbk_upload(int32_t device, void *to, const void *from, int64_t bytes, void *stream) {
    return copy(device, to, from, bytes, cudaMemcpyHostToDevice, stream);
}

int32_t lplbk_download(int32_t device, void *to, const void *from, int64_t bytes, void *stream) {
    return copy(device, to, from, bytes, cudaMemcpyDeviceToHost, stream);
}

int32_t lplbk_alloc_mapped(int32_t device, int64_t bytes, void **host, uint64_t *on_device) {
    *host = nullptr;
    *on_device = 0;
    OnDevice on(device);
    if (on.error() != cudaSuccess) return taken(on.error());
    NotRecorded aside;
    void *page = nullptr, *there = nullptr;
    cudaError_t error = cudaHostAlloc(&page, (size_t)bytes, cudaHostAllocMapped | cudaHostAllocPortable);
    if (error == cudaSuccess) error = cudaHostGetDevicePointer(&there, page, 0);
    if (error != cudaSuccess) {
        if (page != nullptr) cudaFreeHost(page);
        return taken(error);
    }
    memset(page, 0, (size_t)bytes);
    *host = page;
    *on_device = (uint64_t)(uintptr_t)there;
    return 0;
}

int32_t lplbk_free_mapped(int32_t device, void *host) {
    if (host == nullptr) return 0;
    OnDevice on(device);
    if (on.error() != cudaSuccess) return taken(on.error());
    NotRecorded aside;
    return taken(cudaFreeHost(host));
}

}  // extern "C"
