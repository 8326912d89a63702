// A planner's memory on the device, and the placement that it plans for.
#include "backend.cuh"
#include "launch.cuh"
#include "layout.cuh"
#include "multi.cuh"

namespace lplb {
namespace {

constexpr int kThreads = 512;

// Takes over staged tables; what was planned before is void. The counters stay.
__global__ void __launch_bounds__(kThreads) adopt(const __grid_constant__ lplbk_planner planner) {
    wait_for_stream();
    const int first = blockIdx.x * kThreads + threadIdx.x, stride = gridDim.x * kThreads;
    for (int i = first; i < planner.layout.words; i += stride) planner.tables[i] = planner.staged[i];
    const int words = lplbk_plan_words(&planner.shape);
    for (int i = lplbk_plan_info() + first; i < words; i += stride) planner.plan[i] = 0;
}

// Takes over staged capacities and the digest that goes with them.
__global__ void __launch_bounds__(kThreads) adopt_capacity(const __grid_constant__ lplbk_planner planner) {
    wait_for_stream();
    const lplbk_layout &at = planner.layout;
    if (threadIdx.x == 0) planner.tables[at.digest] = planner.staged[at.digest], planner.tables[at.ranked] = planner.staged[at.ranked];
    for (int r = threadIdx.x; r < planner.shape.ep_size; r += kThreads) {
        planner.tables[at.speed + r] = planner.staged[at.speed + r];
        planner.tables[at.fixed + r] = planner.staged[at.fixed + r];
    }
}

int32_t prepare(lplbk_planner &planner) {
    OnDevice on(planner.device);
    if (on.error() != cudaSuccess) return taken(on.error());
    int32_t error = prepare_solve(planner);
    if (error == 0) error = prepare_rewrite(planner);
    if (error == 0) error = prepare_layout(planner);
    return error != 0 ? error : prepare_run(planner);
}

// All in one piece of memory: [plan][tables][staged][scratch][dispatch][history][metrics], each at 16 bytes.
int32_t allocate(lplbk_planner &planner) {
    int32_t end = 0;
    const int32_t plan = lplbk_section(&end, lplbk_plan_words(&planner.shape));
    const int32_t tables = lplbk_section(&end, planner.layout.words), staged = lplbk_section(&end, planner.layout.words);
    const int32_t scratch = lplbk_section(&end, multi_scratch_words(planner.shape));
    const int32_t dispatch = lplbk_section(&end, dispatch_words(planner.shape));
    const int32_t history = lplbk_section(&end, planner.keeps_history ? 2 * (planner.shape.n_logical + 1) : 0);
    const int32_t metrics = lplbk_section(&end, planner.page != 0 ? 2 * (LPLBK_METRICS + 1) : 0);
    void *memory = nullptr;
    const int32_t error = lplbk_alloc(planner.device, 4ll * end, &memory);
    if (error != 0) return error;
    int32_t *const words = static_cast<int32_t *>(memory);
    planner.plan = words + plan;
    planner.counters = reinterpret_cast<int64_t *>(planner.plan);
    planner.group_info = planner.plan + lplbk_plan_info();
    planner.quota = planner.plan + lplbk_plan_quota(&planner.shape);
    planner.take = planner.plan + lplbk_plan_take(&planner.shape);
    planner.kept = planner.plan + lplbk_plan_kept(&planner.shape);
    planner.sources = planner.plan + lplbk_plan_sources(&planner.shape);
    planner.tables = words + tables;
    planner.staged = words + staged;
    planner.scratch = words + scratch;
    planner.dispatch = words + dispatch;
    planner.history = planner.keeps_history ? reinterpret_cast<int64_t *>(words + history) : nullptr;
    planner.metrics = planner.page != 0 ? reinterpret_cast<uint64_t *>(words + metrics) : nullptr;
    return 0;
}

}  // namespace
}  // namespace lplb

extern "C" {

int32_t lplbk_open(lplbk_planner *planner) {
    planner->layout = lplbk_layout_of(&planner->shape);
    const int32_t error = lplb::prepare(*planner);
    return error != 0 ? error : lplb::allocate(*planner);
}

void lplbk_close(lplbk_planner *planner) {
    lplbk_free(planner->device, planner->plan);
    planner->plan = nullptr;
}

int32_t lplbk_place(const lplbk_planner *planner, const int32_t *tables, void *stream) {
    using namespace lplb;
    OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const auto queue = static_cast<cudaStream_t>(stream);
    cudaError_t error = cudaMemcpyAsync(planner->staged, tables, 4ull * planner->layout.words, cudaMemcpyHostToDevice, queue);
    if (error != cudaSuccess) return taken(error);
    const int blocks = max(1, min(ceil_div(planner->layout.words, kThreads), planner->info.n_sms));
    error = launch(planner->info, adopt, blocks, kThreads, 0, 0, queue, *planner);
    return taken(error != cudaSuccess ? error : cudaStreamSynchronize(queue));
}

int32_t lplbk_set_capacity(const lplbk_planner *planner, int32_t ranked, const int32_t *numbers, int32_t digest, void *stream) {
    using namespace lplb;
    OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const auto queue = static_cast<cudaStream_t>(stream);
    const lplbk_layout &at = planner->layout;
    cudaError_t error = cudaSuccess;
    const auto stage = [&](int32_t section, const int32_t *words, int32_t n) {
        if (error != cudaSuccess) return;
        error = cudaMemcpyAsync(planner->staged + section, words, 4 * (size_t)n, cudaMemcpyHostToDevice, queue);
    };
    stage(at.digest, &digest, 1);
    stage(at.ranked, &ranked, 1);
    stage(at.speed, numbers, planner->shape.ep_size);
    stage(at.fixed, numbers + planner->shape.ep_size, planner->shape.ep_size);
    if (error == cudaSuccess) error = launch(planner->info, adopt_capacity, 1, kThreads, 0, 0, queue, *planner);
    return taken(error != cudaSuccess ? error : cudaStreamSynchronize(queue));
}

int32_t lplbk_set_digest(const lplbk_planner *planner, int32_t digest) {
    using namespace lplb;
    OnDevice on(planner->device);
    if (on.error() != cudaSuccess) return taken(on.error());
    const NotRecorded aside;
    const cudaError_t error = cudaDeviceSynchronize();
    if (error != cudaSuccess) return taken(error);
    int32_t *const to = planner->tables + planner->layout.digest;
    return taken(on_own_stream(
        [&](cudaStream_t stream) { return cudaMemcpyAsync(to, &digest, sizeof digest, cudaMemcpyHostToDevice, stream); }));
}

int32_t lplbk_read(const lplbk_planner *planner, int32_t *plan, void *stream) {
    return lplbk_download(planner->device, plan, planner->plan, 4ll * lplbk_plan_words(&planner->shape), stream);
}

int32_t lplbk_read_history(const lplbk_planner *planner, int64_t *history, void *stream) {
    return lplbk_download(planner->device, history, planner->history, 8ll * (planner->shape.n_logical + 1), stream);
}
}
