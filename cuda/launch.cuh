// Launching kernels.
#pragma once

#include "common.cuh"

namespace lplb {

// Lets a kernel be launched with as much dynamic shared memory as a block can have on the current device. The attribute belongs to the
// kernel, which all planners of the device share: set to the need of one planner, it would refuse the launches of a larger one made
// before. needed: bytes of this planner; LPLBK_UNSUPPORTED where they do not fit beside the kernel's own static shared memory.
template <class... Parameters>
int32_t allow_shared(const lplbk_device_info &info, void (*kernel)(Parameters...), int64_t needed) {
    cudaFuncAttributes code;
    cudaError_t error = cudaFuncGetAttributes(&code, kernel);
    if (error != cudaSuccess) return taken(error);
    const int most = info.shared_bytes - (int)code.sharedSizeBytes;
    if (needed > most) return LPLBK_UNSUPPORTED;
    return taken(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
}

// Launches a kernel that begins with wait_for_stream(): where the device can, its preparations overlap the end of the kernel before it.
// cluster: blocks of a cluster, 0: no clusters.
template <class... Parameters, class... Arguments>
cudaError_t launch(const lplbk_device_info &info, void (*kernel)(Parameters...), int blocks, int threads, int shared_bytes, int cluster,
                   cudaStream_t stream, Arguments... arguments) {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = (size_t)shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    if (info.capability >= 90) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 0) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {(unsigned)cluster, 1, 1};
    }
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace lplb
