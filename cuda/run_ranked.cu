// The kernels of `run` for planners whose ranks differ.
#include "run_block.cuh"

namespace lplb {

template RunKernel<false, false> run_kernel<false, false, true>(Solver);
template RunKernel<true, false> run_kernel<true, false, true>(Solver);

}  // namespace lplb
