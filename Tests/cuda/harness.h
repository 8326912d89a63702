// Shared by the CUDA harnesses: planners on the device, random instances, timing. Building one, and its short suite under a sanitizer:
//   nvcc -arch=native -O3 -std=c++17 -lineinfo -Icuda Tests/cuda/run_harness.cu cuda/*.cu cuda/solve/*.cu -o run_harness
//   compute-sanitizer --tool racecheck --error-exitcode 9 ./run_harness 4 0 2000    (memcheck, synccheck, initcheck alike)
// -DLPLB_PLAIN_BARRIERS: cluster barriers in a form that racecheck surely follows. Tests/python/test_gpu_kernels.py does all this.
#pragma once

#include <cuda_runtime.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>

#include "reference.h"

namespace harness {

using std::string;
using std::vector;

#define CHECK(call)                                                                                    \
    do {                                                                                               \
        const int error_ = (int)(call);                                                                \
        if (error_ != 0) {                                                                             \
            printf("%s:%d: %s: %d %s\n", __FILE__, __LINE__, #call, error_, lplbk_error_name(error_)); \
            exit(2);                                                                                   \
        }                                                                                              \
    } while (0)

template <class T>
struct Buffer {
    T *data = nullptr;
    size_t count = 0;
    explicit Buffer(size_t count = 0) : count(count) { CHECK(lplbk_alloc(0, count * sizeof(T), (void **)&data)); }
    explicit Buffer(const vector<T> &from) : Buffer(from.size()) { set(from); }
    ~Buffer() { lplbk_free(0, data); }
    Buffer(Buffer &&other) : data(other.data), count(other.count) { other.data = nullptr; }
    Buffer(const Buffer &) = delete;
    void set(const vector<T> &from) { CHECK(lplbk_upload(0, data, from.data(), from.size() * sizeof(T), nullptr)); }
    vector<T> get() const {
        vector<T> to(count);
        CHECK(lplbk_download(0, to.data(), data, count * sizeof(T), nullptr));
        return to;
    }
};

struct Planner {
    lplbk_planner p{};
    explicit Planner(const reference::Instance &in, int solver = 0) {
        p.shape = in.shape;
        if (solver != 0) p.shape.colours = 0;  // the interior point method reads all of an image
        p.solver = solver;
        p.has_replicas = in.shape.n_physical > in.shape.n_logical;
        CHECK(lplbk_device_info_of(0, &p.info));
        CHECK(lplbk_open(&p));
        place(in);
    }
    void place(reference::Instance in) {
        in.shape.colours = p.shape.colours;
        const vector<int32_t> t = reference::tables(in);
        CHECK(lplbk_place(&p, t.data(), nullptr));
    }
    ~Planner() { lplbk_close(&p); }
    Planner(const Planner &) = delete;
    template <class T>
    vector<T> read(const T *from, size_t count) const {
        vector<T> to(count);
        CHECK(lplbk_download(0, to.data(), from, count * sizeof(T), nullptr));
        return to;
    }
};

using Random = std::mt19937_64;

inline vector<int> cube() { return {3, 6, 0, 7, 1, 4, 2, 5, 7, 0, 4, 1, 5, 2, 6, 3}; }
inline vector<int> ring(int n) {
    vector<int> r2o;
    for (int r = 0; r < n; ++r) r2o.push_back((r + 1) % n);
    return r2o;
}
inline vector<int> hypercube() {
    const int a[16] = {3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14};
    vector<int> r2o;
    for (int r = 0; r < 16; ++r) r2o.push_back(a[r]), r2o.push_back((r + 12) % 16);
    return r2o;
}
inline vector<int> torus(int m, int n) {
    vector<int> r2o;
    for (int i = 0; i < m; ++i) {
        for (int j = 0; j < n; ++j) r2o.push_back((i + 1) % m * n + j), r2o.push_back(i * n + (j + 1) % n);
    }
    return r2o;
}
inline vector<int> random_columns(Random &random, int n, int columns) {
    vector<int> r2o(n * columns), p(n);
    for (int d = 0; d < columns; ++d) {
        std::iota(p.begin(), p.end(), 0);
        std::shuffle(p.begin(), p.end(), random);
        for (int r = 0; r < n; ++r) r2o[r * columns + d] = p[r];
    }
    return r2o;
}
inline vector<int> random_order(Random &random, int n) {
    vector<int> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    return order;
}

// Greedy replication and packing, as EPLB does it in one group.
inline vector<int> eplb(const vector<double> &weight, int n_physical, int n_ranks) {
    const int n = weight.size();
    vector<int> copies(n, 1), item(n);
    std::iota(item.begin(), item.end(), 0);
    for (int k = n; k < n_physical; ++k) {
        int most = 0;
        for (int e = 1; e < n; ++e) {
            if (weight[e] / copies[e] > weight[most] / copies[most]) most = e;
        }
        ++copies[most];
        item.push_back(most);
    }
    std::stable_sort(item.begin(), item.end(), [&](int a, int b) { return weight[a] / copies[a] > weight[b] / copies[b]; });
    vector<double> load(n_ranks, 0);
    vector<vector<int>> slots(n_ranks);
    for (int e : item) {
        int best = -1;
        for (int r = 0; r < n_ranks; ++r) {
            if ((int)slots[r].size() < n_physical / n_ranks && (best < 0 || load[r] < load[best])) best = r;
        }
        load[best] += weight[e] / copies[e];
        slots[best].push_back(e);
    }
    vector<int> phy2log;
    for (auto &s : slots) phy2log.insert(phy2log.end(), s.begin(), s.end());
    return phy2log;
}
// Every expert once, the rest anywhere; several replicas of an expert may share a rank. Groups keep their own experts.
inline vector<int> random_placement(Random &random, int n_logical, int n_physical, int n_groups) {
    const int slots = n_physical / n_groups, experts = n_logical / n_groups;
    vector<int> phy2log;
    for (int g = 0; g < n_groups; ++g) {
        vector<int> mine;
        const int hot = 1 + random() % experts;
        for (int i = 0; i < slots; ++i) mine.push_back(g * experts + (i < experts ? i : (int)(random() % hot)));
        std::shuffle(mine.begin(), mine.end(), random);
        phy2log.insert(phy2log.end(), mine.begin(), mine.end());
    }
    return phy2log;
}

// A placement by the ranks of each expert of several places, and one expert more on each rank. Free slots repeat an expert of their rank.
inline reference::Instance network(int n, const vector<vector<int>> &bundles) {
    vector<vector<int>> held(n);
    for (size_t e = 0; e < bundles.size(); ++e) {
        for (int r : bundles[e]) held[r].push_back(e);
    }
    size_t slots = 0;
    for (int r = 0; r < n; ++r) held[r].push_back(bundles.size() + r), slots = std::max(slots, held[r].size());
    vector<int> phy2log;
    for (auto &experts : held) {
        experts.resize(slots, experts.back());
        phy2log.insert(phy2log.end(), experts.begin(), experts.end());
    }
    return reference::general(n, n, 1, -1, bundles.size() + n, phy2log);
}

// Chains, rings and trees of ranks: what takes the solver many passes.
inline vector<std::pair<string, vector<vector<int>>>> networks(int n) {
    const auto tree = [n](auto parent) {
        vector<vector<int>> bundles;
        for (int r = 1; r < n; ++r) bundles.push_back({parent(r), r});
        return bundles;
    };
    const auto path = tree([](int r) { return r - 1; });
    vector<vector<int>> ring = path, twice = path, band = path, triples;
    ring.push_back({n - 1, 0});
    for (auto &pair : path) twice.push_back({pair[1], pair[0]});
    for (int r = 3; r < n; ++r) band.push_back({r - 3, r});
    for (int r = 2; r < n; ++r) triples.push_back({r - 2, r - 1, r});
    return {{"path", path},
            {"ring", ring},
            {"path twice", twice},
            {"comb", tree([n](int r) { return r < n / 2 ? r - 1 : r - n / 2; })},
            {"binary tree", tree([](int r) { return (r - 1) / 2; })},
            {"spider", tree([](int r) { return r <= 4 ? 0 : r - 4; })},
            {"band", band},
            {"triples", triples}};
}

// One small change of the loads.
inline vector<int64_t> changed(Random &random, vector<int64_t> loads) {
    const size_t first = random() % loads.size(), end = std::min(loads.size(), first + 16);
    const int64_t most[] = {1, 100, 10000, 1000000}, level = random() % most[random() % 4], step = random() % 1000;
    const int kind = random() % 4;
    if (kind == 0) loads[first] = level;
    if (kind == 1) loads[first] = loads[first] * (50 + random() % 100) / 100;
    for (size_t e = first; kind >= 2 && e < end; ++e) loads[e] = level + (kind == 3 ? step * (e - first) : 0);
    return loads;
}

enum Family { kNormal, kZipf, kLogNormal, kZero, kEqual, kOneHot, kSparse, kTiny, kLarge, kFamilies };
inline const char *name_of(int family) {
    static const char *names[] = {"normal", "zipf 0.8", "log-normal", "zero", "equal", "one-hot", "sparse", "tiny", "large"};
    return names[family];
}

inline vector<int64_t> loads(Random &random, int n, int family, double mean = 1000) {
    std::normal_distribution<double> normal;
    vector<double> w(n, 1);
    vector<int64_t> tokens(n, 0);
    switch (family) {
    case kNormal:
        for (auto &v : w) v = std::max(0.0, 1 + 0.3 * normal(random));
        break;
    case kZipf: {
        const vector<int> p = random_order(random, n);
        for (int i = 0; i < n; ++i) w[p[i]] = std::pow(i + 1, -0.8);
        break;
    }
    case kLogNormal:
        for (auto &v : w) v = std::exp(normal(random));
        break;
    case kZero:
        return tokens;
    case kEqual:
        for (auto &t : tokens) t = (int64_t)mean;
        return tokens;
    case kOneHot:
        tokens[random() % n] = (int64_t)(mean * n);
        return tokens;
    case kSparse:
        for (auto &t : tokens) t = random() % 8 == 0 ? random() % (int)(8 * mean) : 0;
        return tokens;
    case kTiny:
        for (auto &t : tokens) t = random() % 4;
        return tokens;
    case kLarge:
        for (auto &t : tokens) t = random() % (uint64_t)(2147483647 / n);
        return tokens;
    }
    const double sum = std::accumulate(w.begin(), w.end(), 0.0);
    for (int i = 0; i < n; ++i) {
        const double mu = w[i] / sum * n * mean;
        tokens[i] = std::max(0.0, std::floor(mu + std::sqrt(mu) * normal(random) + 0.5));
    }
    return tokens;
}

// Median and 99th percentile.
struct Spread {
    double p50, p99, max;
};
inline Spread spread(vector<double> v) {
    std::sort(v.begin(), v.end());
    return {v[v.size() / 2], v[v.size() * 99 / 100], v.back()};
}

// Microseconds per call of `work(i)` for i in 0 .. n-1, each measured as `repeats` calls in a graph, best of 3 replays.
template <class Work>
vector<double> time_in_graphs(int n, int repeats, Work work) {
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    cudaEvent_t start, stop;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&stop));
    vector<double> times;
    for (int i = 0; i < n; ++i) {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        for (int k = 0; k < repeats; ++k) work(i, stream);
        CHECK(cudaStreamEndCapture(stream, &graph));
        CHECK(cudaGraphInstantiate(&exec, graph, 0));
        vector<double> runs;
        for (int k = 0; k < 4; ++k) {
            CHECK(cudaEventRecord(start, stream));
            CHECK(cudaGraphLaunch(exec, stream));
            CHECK(cudaEventRecord(stop, stream));
            CHECK(cudaStreamSynchronize(stream));
            float ms;
            CHECK(cudaEventElapsedTime(&ms, start, stop));
            if (k > 0) runs.push_back(1000.0 * ms / repeats);
        }
        std::sort(runs.begin(), runs.end());
        times.push_back(runs[runs.size() / 2]);
        CHECK(cudaGraphExecDestroy(exec));
        CHECK(cudaGraphDestroy(graph));
    }
    CHECK(cudaEventDestroy(start));
    CHECK(cudaEventDestroy(stop));
    CHECK(cudaStreamDestroy(stream));
    return times;
}

}  // namespace harness
