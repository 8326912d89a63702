// Resetting what a planner records.
#include "backend.cuh"
#include "launch.cuh"
#include "metrics.cuh"

namespace lplb {
namespace {

constexpr int kThreads = 256;

// The sequence number goes on, so that readers see another snapshot.
__global__ void __launch_bounds__(kThreads) clear(unsigned long long *history, int n, unsigned long long *totals, lplbk_metrics_page *page) {
    wait_for_stream();
    let_next_start();
    if (history != nullptr) {
        for (int i = threadIdx.x; i < n; i += kThreads) history[i] = 0;
    }
    if (totals == nullptr || threadIdx.x >= 32) return;
    const unsigned long long number = totals[LPLBK_METRIC_SEQUENCE] + 1;
    const unsigned long long value = lane_id() == LPLBK_METRIC_SEQUENCE ? number : 0;
    __syncwarp();
    totals[lane_id()] = value;
    metrics::publish(page, value, number);
    if (lane_id() == 0) page->invalid_ids = 0;
}

}  // namespace
}  // namespace lplb

extern "C" int32_t lplbk_reset(const lplbk_planner *planner, int32_t history, int32_t metrics, void *stream) {
    using namespace lplb;
    OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const Recording record = Recording::of(*planner);
    return taken(launch(planner->info, clear, 1, kThreads, 0, 0, static_cast<cudaStream_t>(stream), history ? record.history : nullptr,
                        planner->shape.n_logical + 1, metrics ? record.totals : nullptr, record.page));
}
