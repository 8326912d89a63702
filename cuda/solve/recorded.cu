// The solve kernels for planners that record.
#include "solve_groups.cuh"

namespace lplb {

template SolveKernel<true> solve_kernel<false, true>(Solver);

}  // namespace lplb
