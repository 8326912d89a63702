// The solve kernels for planners whose ranks may differ.
#include "solve_groups.cuh"

namespace lplb {

template SolveKernel<false> solve_kernel<true, false, true>(Solver);
template SolveKernel<true> solve_kernel<false, true, true>(Solver);

}  // namespace lplb
