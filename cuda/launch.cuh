// Launching kernels.
#pragma once

#include "common.cuh"

namespace lplb {

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
