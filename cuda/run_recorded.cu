// The kernels of `run` for planners that record.
#include "run_block.cuh"

namespace lplb {

template RunKernel<false, true> run_kernel<false, true>(Solver);
template RunKernel<true, true> run_kernel<true, true>(Solver);

}  // namespace lplb
