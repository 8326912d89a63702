// The solve kernel by the interior point method.
#include "solve_groups.cuh"

namespace lplb {

SolveKernel interior_kernel() { return solve_groups<kInterior, false, false>; }

}  // namespace lplb
