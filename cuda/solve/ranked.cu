// The solve kernels for planners whose ranks differ.
#include "solve_groups.cuh"

namespace lplb {

template SolveKernel<false> solve_kernel<true, false, true>(Solver);
template SolveKernel<false> solve_kernel<false, false, true>(Solver);

}  // namespace lplb
