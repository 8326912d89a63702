// Clocks of the phases of a kernel, for the harnesses: -DLPLB_PROFILE. MARK(i) notes the clock of the first thread of the first block.
#pragma once

#ifdef LPLB_PROFILE
namespace lplb {
static __device__ long long profile_marks[32];
}
#define MARK(i)                                                                       \
    do {                                                                              \
        if (threadIdx.x == 0 && blockIdx.x == 0) ::lplb::profile_marks[i] = clock64(); \
    } while (0)
#define PROFILE_READER(name) \
    extern "C" void name(long long *marks) { cudaMemcpyFromSymbol(marks, ::lplb::profile_marks, sizeof(::lplb::profile_marks)); }
#else
#define MARK(i) \
    do {        \
    } while (0)
#define PROFILE_READER(name)
#endif
