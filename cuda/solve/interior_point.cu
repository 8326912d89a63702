// The solve kernel by the interior point method.
#include "solve_groups.cuh"

namespace lplb {

template <bool kRecords>
SolveKernel<kRecords> interior_kernel() {
    return solve_groups<kInterior, false, kRecords, false>;
}
template SolveKernel<false> interior_kernel<false>();
template SolveKernel<true> interior_kernel<true>();

}  // namespace lplb
