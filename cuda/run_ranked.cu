// The kernels of `run` for planners whose ranks may differ.
#include "run_block.cuh"

namespace lplb {

template RunKernel<false, true> run_kernel<false, true, true>(Solver);
template RunKernel<true, true> run_kernel<true, true, true>(Solver);

}  // namespace lplb
