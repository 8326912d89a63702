// Preparing a planner.
#include "common.cuh"

namespace lplb {
int64_t solve_scratch_words(const lplbk_shape &shape);
cudaError_t prepare_solve(const lplbk_planner &planner);
}  // namespace lplb

extern "C" {

int64_t lplbk_scratch_words(const lplbk_planner *planner) { return lplb::solve_scratch_words(planner->shape); }

int32_t lplbk_prepare(lplbk_planner *planner) {
    lplb::OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return lplb::taken(on.error());
    return lplb::taken(lplb::prepare_solve(*planner));
}
}
