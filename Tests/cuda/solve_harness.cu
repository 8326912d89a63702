// Solve kernels against the reference, then their times. Arguments: [instances per shape] [timed instances].
#include "harness.h"

using namespace harness;

static int failures = 0;

static void expect(bool ok, const string &where, const char *what, long long got, long long want) {
    if (ok) return;
    if (++failures <= 20) printf("WRONG %s: %s got %lld want %lld\n", where.c_str(), what, got, want);
}

static void compare(const Planner &planner, const reference::Plan &plan, const string &where) {
    const lplbk_shape &s = planner.p.shape;
    const auto quota = planner.read(planner.p.quota, s.n_physical);
    const auto take = planner.read(planner.p.take, s.n_physical);
    const auto info = planner.read(planner.p.group_info, s.n_groups * LPLBK_INFO_WORDS);
    for (int g = 0; g < s.n_groups; ++g) {
        const int32_t *i = &info[g * LPLBK_INFO_WORDS];
        const auto &want = plan.groups[g];
        expect(i[LPLBK_INFO_MAX_LOAD] == want.max_load, where, "max load", i[LPLBK_INFO_MAX_LOAD], want.max_load);
        expect(i[LPLBK_INFO_BOUND] == want.bound, where, "bound", i[LPLBK_INFO_BOUND], want.bound);
        expect(i[LPLBK_INFO_TOTAL] == want.total, where, "total", i[LPLBK_INFO_TOTAL], want.total);
        expect(i[LPLBK_INFO_MOVED] == want.moved, where, "moved", i[LPLBK_INFO_MOVED], want.moved);
        expect(i[LPLBK_INFO_ROUNDS] == want.rounds, where, "rounds", i[LPLBK_INFO_ROUNDS], want.rounds);
        expect(i[LPLBK_INFO_CERTIFIED] == want.certified, where, "certified", i[LPLBK_INFO_CERTIFIED], want.certified);
        int size = 0;
        for (int r = 0; r < s.group_size; ++r) {
            size += want.witness[r];
            const int bit = (uint32_t)i[LPLBK_INFO_WITNESS + r / 32] >> (r % 32) & 1;
            expect(bit == want.witness[r], where, "witness", bit, want.witness[r]);
        }
        expect(i[LPLBK_INFO_WITNESS_SIZE] == size, where, "witness size", i[LPLBK_INFO_WITNESS_SIZE], size);
    }
    int64_t own[3] = {0, 0, 0};
    const int n_local = s.n_physical / s.ep_size, per_node = s.ep_size / s.n_nodes;
    for (int slot = 0; slot < s.n_physical; ++slot) {
        expect(quota[slot] == plan.quota[slot], where, "quota", quota[slot], plan.quota[slot]);
        expect(take[slot] == plan.take[slot], where, "take", take[slot], plan.take[slot]);
        const int rank = slot / n_local;
        if (s.rank >= 0) own[rank == s.rank ? 0 : rank / per_node == s.rank / per_node ? 1 : 2] += plan.take[slot];
    }
    for (int k = 0; k < 3; ++k) {
        int64_t got = 0;
        for (int g = 0; g < s.n_groups; ++g) got += info[g * LPLBK_INFO_WORDS + LPLBK_INFO_OWN_RANK + k];
        expect(got == own[k], where, "tokens of the own rank by distance", got, own[k]);
    }
}

static vector<int64_t> matrix(Random &random, const vector<int64_t> &loads, int n_sources) {
    vector<int64_t> counts(loads.size() * n_sources, 0);
    for (size_t e = 0; e < loads.size(); ++e) {
        int64_t rest = loads[e];
        const int kind = random() % 4;
        for (int s = 0; s < n_sources; ++s) {
            int64_t mine = s == n_sources - 1 ? rest
                           : kind == 0        ? 0
                           : kind == 1        ? loads[e] / n_sources
                                              : random() % (2 * loads[e] / n_sources + 1);
            mine = std::min(mine, rest);
            counts[s * loads.size() + e] = mine;
            rest -= mine;
        }
        if (kind == 0) std::swap(counts[random() % n_sources * loads.size() + e], counts[(n_sources - 1) * loads.size() + e]);
    }
    return counts;
}

static void check(const string &name, const reference::Instance &in, Random &random, int n) {
    Planner planner(in);
    const lplbk_shape &s = in.shape;
    Buffer<float> ratios(std::max(1, s.ep_size * s.n_redundant)), scaled(s.n_logical);
    Buffer<int32_t> counter(1);
    Buffer<int64_t> counts64(s.n_logical * s.ep_size);
    Buffer<int32_t> counts32(s.n_logical * s.ep_size);
    const int before = failures;
    int64_t rounds = 0, most = 0;
    for (int i = 0; i < n; ++i) {
        const int family = i % kFamilies;
        const double mean = family == kLarge ? 0 : (random() % 3 == 0 ? 5 : 1500);
        auto load = loads(random, s.n_logical, family, std::max(mean, 1.0));
        const int n_sources = s.ep_size <= 64 && i % 2 == 1 ? s.ep_size : 1;
        const auto counts = n_sources > 1 ? matrix(random, load, n_sources) : load;
        const auto plan = reference::solve(in, counts, n_sources);
        const bool wide = i % 3 == 0;
        if (wide) {
            counts64.set(counts);
        } else {
            counts32.set(vector<int32_t>(counts.begin(), counts.end()));
        }
        CHECK(lplbk_solve(&planner.p, wide ? (void *)counts64.data : (void *)counts32.data, wide, n_sources,
                          s.n_redundant ? ratios.data : nullptr, scaled.data, counter.data, 0, nullptr));
        const string where = name + " " + name_of(family) + " #" + std::to_string(i);
        compare(planner, plan, where);
        for (auto &g : plan.groups) rounds += g.rounds, most = std::max(most, g.rounds);
        const auto got_scaled = scaled.get();
        const int64_t highest = *std::max_element(load.begin(), load.end());
        for (int e = 0; e < s.n_logical; ++e) {
            const float want = highest ? (float)load[e] / (float)highest : 0.0f;
            expect(got_scaled[e] == want, where, "scaled", (long long)(1e6 * got_scaled[e]), (long long)(1e6 * want));
        }
        if (s.n_redundant) {
            const auto got = ratios.get();
            vector<float> want(s.ep_size * s.n_redundant, 1.0f);
            for (size_t u = 0; u < in.bundles.size(); ++u) {
                const int slot = in.bundles[u].first_slot;
                const int64_t sum = plan.x[u][0] + plan.x[u][1];
                if (sum) want[slot / in.n_local() * s.n_redundant + slot % in.n_local()] = (float)plan.x[u][0] / (float)sum;
            }
            for (size_t k = 0; k < want.size(); ++k)
                expect(got[k] == want[k], where, "ratio", (long long)(1e6 * got[k]), (long long)(1e6 * want[k]));
        }
    }
    expect(counter.get()[0] == n * s.n_groups, name, "counter", counter.get()[0], n * s.n_groups);
    printf("%-44s colours %d masks %d: %d solves, mean rounds %.1f, most %lld, %s\n", name.c_str(), s.colours, planner.p.layout.mask_words,
           n, (double)rounds / n / s.n_groups, (long long)most, failures == before ? "equal" : "DIFFERENT");
    fflush(stdout);
}

// The interior point method: every expert keeps its tokens, the bound is a bound, and how near both are to the optimum.
static void check_interior(const string &name, const reference::Instance &in, Random &random, int n) {
    Planner planner(in, 1);
    const lplbk_shape &s = in.shape;
    Buffer<int32_t> counts(s.n_logical);
    Buffer<float> ratios(std::max(1, s.ep_size * s.n_redundant));
    int64_t most_steps = 0, over = 0, under = 0, certified = 0;
    double steps = 0, gap = 0;
    const int before = failures;
    for (int i = 0; i < n; ++i) {
        const int family = i % kFamilies;
        const auto load = loads(random, s.n_logical, family, 1500);
        const auto plan = reference::solve(in, load, 1);
        counts.set(vector<int32_t>(load.begin(), load.end()));
        vector<int32_t> first;
        for (int pass = 0; pass < 2; ++pass) {
            CHECK(lplbk_solve(&planner.p, counts.data, 0, 1, s.n_redundant ? ratios.data : nullptr, nullptr, nullptr, 0, nullptr));
            const auto quota = planner.read(planner.p.quota, s.n_physical);
            if (pass == 1) expect(quota == first, name, "the same twice", 0, 0);
            first = quota;
        }
        const string where = name + " " + name_of(family) + " #" + std::to_string(i);
        vector<int64_t> rank(s.ep_size, 0);
        for (int e = 0; e < s.n_logical; ++e) {
            int64_t sum = 0;
            for (size_t j = 0; j < in.place_slot[e].size(); ++j) {
                const int64_t q = first[in.place_slot[e][j]];
                expect(q >= 0, where, "quota below 0", q, 0);
                sum += q;
                rank[in.place_rank[e][j]] += q;
            }
            expect(sum == load[e], where, "tokens of an expert", sum, load[e]);
        }
        for (float r : ratios.get()) expect(!s.n_redundant || (r >= 0 && r <= 1), where, "ratio", (long long)(1e6 * r), 0);
        const auto info = planner.read(planner.p.group_info, s.n_groups * LPLBK_INFO_WORDS);
        for (int g = 0; g < s.n_groups; ++g) {
            const int32_t *at = &info[g * LPLBK_INFO_WORDS];
            const int64_t best = plan.groups[g].max_load;
            const int64_t peak = *std::max_element(rank.begin() + g * s.group_size, rank.begin() + (g + 1) * s.group_size);
            expect(at[LPLBK_INFO_MAX_LOAD] == peak, where, "max load", at[LPLBK_INFO_MAX_LOAD], peak);
            expect(at[LPLBK_INFO_BOUND] <= best, where, "bound", at[LPLBK_INFO_BOUND], best);
            expect(peak <= best + 1 + best / 1000 + s.max_bundles, where, "far from the best", peak, best);
            expect(at[LPLBK_INFO_CERTIFIED] == (peak == at[LPLBK_INFO_BOUND]), where, "certified", at[LPLBK_INFO_CERTIFIED], peak);
            most_steps = std::max<int64_t>(most_steps, at[LPLBK_INFO_ROUNDS]);
            steps += at[LPLBK_INFO_ROUNDS];
            over = std::max(over, peak - best);
            under += at[LPLBK_INFO_BOUND] < best;
            certified += at[LPLBK_INFO_CERTIFIED];
            gap = std::max(gap, best ? (double)(peak - best) / best : 0.0);
            // The witness is a set of ranks whose own tokens give the bound.
            int64_t inside = 0, size = 0;
            const auto in_set = [&](int r) {
                return ((uint32_t)at[LPLBK_INFO_WITNESS + r % s.group_size / 32] >> (r % 32 % s.group_size) & 1) != 0;
            };
            for (int r = 0; r < s.group_size; ++r) size += in_set(r);
            for (int e = 0; e < s.n_logical; ++e) {
                bool all = in.place_rank[e][0] / s.group_size == g;
                for (int r : in.place_rank[e]) all = all && in_set(r - g * s.group_size);
                if (all) inside += load[e];
            }
            expect(size == at[LPLBK_INFO_WITNESS_SIZE] && size > 0, where, "witness size", at[LPLBK_INFO_WITNESS_SIZE], size);
            if (size > 0)
                expect((inside + size - 1) / size == at[LPLBK_INFO_BOUND], where, "witness", (inside + size - 1) / size,
                       at[LPLBK_INFO_BOUND]);
        }
    }
    printf(
        "interior %-35s %d solves: steps %.1f, most %lld; max load over the best by %lld tokens at most (%.4f%%), bound below it %lld "
        "times, "
        "certified %lld, %s\n",
        name.c_str(), n, steps / n / s.n_groups, (long long)most_steps, (long long)over, 100 * gap, (long long)under, (long long)certified,
        failures == before ? "right" : "WRONG");
    fflush(stdout);
}

static void overflow() {
    Random random(3);
    for (int kind = 0; kind < 2; ++kind) {
        const auto in = kind ? reference::topology(8, 8, 2, cube(), 64, 1, 1, -1, random_order(random, 64))
                             : reference::general(8, 8, 1, -1, 64, random_placement(random, 64, 80, 1));
        Planner planner(in);
        vector<int64_t> counts(64, 1);
        counts[7] = 1ll << 33;
        Buffer<int64_t> device(counts);
        Buffer<int64_t> counter(1);
        CHECK(lplbk_solve(&planner.p, device.data, 1, 1, nullptr, nullptr, counter.data, 1, nullptr));
        const auto counters = planner.read(planner.p.counters, LPLBK_COUNTERS);
        const auto quota = planner.read(planner.p.quota, in.shape.n_physical);
        expect(counters[LPLBK_COUNTER_OVERFLOW] == 1, "overflow", "counter", counters[LPLBK_COUNTER_OVERFLOW], 1);
        expect(counter.get()[0] == 0, "overflow", "solved", counter.get()[0], 0);
        for (int e = 0; e < 64; ++e) {
            const int want = e == 7 ? INT32_MAX : 1;
            expect(quota[in.place_slot[e][0]] == want, "overflow", "at the original", quota[in.place_slot[e][0]], want);
        }
    }
}

__global__ void empty() {}

static void timing(const string &name, const vector<reference::Instance> &placements, int family, int n, double mean, Random &random,
                   int solver = 0) {
    vector<std::unique_ptr<Planner>> planners;
    for (auto &in : placements) planners.push_back(std::make_unique<Planner>(in, solver));
    const int n_logical = placements[0].shape.n_logical;
    vector<int32_t> all;
    for (int i = 0; i < n; ++i) {
        for (int64_t t : loads(random, n_logical, family, mean)) all.push_back((int32_t)t);
    }
    Buffer<int32_t> counts(all);
    Buffer<int64_t> counter(1);
    const auto times = time_in_graphs(n, 20, [&](int i, cudaStream_t stream) {
        CHECK(lplbk_solve(&planners[i % planners.size()]->p, counts.data + (size_t)i * n_logical, 0, 1, nullptr, nullptr, counter.data, 1,
                          stream));
    });
    // The same with an empty kernel of the ordinary kind after each, less that kernel: what a solve among other people's kernels takes.
    const auto apart = time_in_graphs(n / 4 + 1, 20, [&](int i, cudaStream_t stream) {
        CHECK(lplbk_solve(&planners[i % planners.size()]->p, counts.data + (size_t)i * n_logical, 0, 1, nullptr, nullptr, counter.data, 1,
                          stream));
        empty<<<1, 32, 0, stream>>>();
    });
    static const double empty_us = spread(time_in_graphs(8, 200, [](int, cudaStream_t s) { empty<<<1, 32, 0, s>>>(); })).p50;
    const Spread t = spread(times);
    printf("TIME %-36s %-10s p50 %6.2f p99 %6.2f max %6.2f us, p50 apart %6.2f\n", name.c_str(), name_of(family), t.p50, t.p99, t.max,
           spread(apart).p50 - empty_us);
    fflush(stdout);
}

// Worst cases: loads that rise along chains of ranks, then changes of them that do not make the passes fewer. Most of what is compared is
// beyond the passes that usual loads take. The slowest is timed, beside usual loads on an EPLB placement of as many ranks.
static void worst_cases(int n, int changes, bool timed, Random &random) {
    const int before = failures;
    int64_t most = 0, compared = 0;
    double slowest = 0;
    string slowest_name;
    for (auto &[name, bundles] : networks(n)) {
        const auto in = network(n, bundles);
        Planner planner(in);
        vector<int64_t> worst(in.shape.n_logical);
        for (size_t e = 0; e < worst.size(); ++e) {
            worst[e] = e < bundles.size() ? (int64_t)(100000 * std::sqrt((double)bundles[e].back() / n)) : 0;
        }
        int64_t passes = -1;
        Buffer<int32_t> counts(in.shape.n_logical);
        for (int i = 0; i <= changes; ++i) {
            const auto load = i == 0 ? worst : changed(random, worst);
            const auto plan = reference::solve(in, load, 1);
            if (plan.groups[0].rounds < passes) continue;
            passes = plan.groups[0].rounds;
            worst = load;
            counts.set(vector<int32_t>(load.begin(), load.end()));
            CHECK(lplbk_solve(&planner.p, counts.data, 0, 1, nullptr, nullptr, nullptr, 0, nullptr));
            compare(planner, plan, name + " of " + std::to_string(n) + " #" + std::to_string(i));
            ++compared;
        }
        expect(passes <= n / 2 + 64, name, "passes", passes, n / 2 + 64);
        most = std::max(most, passes);
        if (!timed) continue;
        const auto times = time_in_graphs(1, 20, [&](int, cudaStream_t stream) {
            CHECK(lplbk_solve(&planner.p, counts.data, 0, 1, nullptr, nullptr, nullptr, 0, stream));
        });
        if (times[0] > slowest) slowest = times[0], slowest_name = name;
        printf("TIME worst, %-20s %4d ranks: %3lld passes %8.2f us\n", name.c_str(), n, (long long)passes, times[0]);
    }
    printf("%-44s %lld solves, most %lld, %s\n", ("worst cases, " + std::to_string(n) + " ranks").c_str(), (long long)compared,
           (long long)most, failures == before ? "equal" : "DIFFERENT");
    if (timed) {
        const auto history = loads(random, 256, kZipf);
        const vector<double> weight(history.begin(), history.end());
        const int slots = (std::max(320, 4 * n) + n - 1) / n * n;
        timing("EPLB 256 on " + std::to_string(n), {reference::general(n, n, 1, -1, 256, eplb(weight, slots, n))}, kNormal, 64, 2000, random);
        printf("TIME worst of %d ranks: %.2f us, %s\n", n, slowest, slowest_name.c_str());
    }
    fflush(stdout);
}

struct Large {
    int words[128];
};
__global__ void one_load(const int *from, int *to) { to[threadIdx.x] = from[threadIdx.x]; }
__global__ void two_loads(const int *index, const int *from, int *to) { to[threadIdx.x] = from[index[threadIdx.x]]; }
__global__ void large_arguments(const __grid_constant__ Large large, const int *from, int *to) {
    to[threadIdx.x] = from[threadIdx.x] + large.words[5] + large.words[60] + large.words[120];
}
__global__ void spin(int n, long long *clocks) {
    const long long start = clock64();
    int x = threadIdx.x;
    for (int i = 0; i < n; ++i) x = x * 3 + 1;
    clocks[0] = clock64() - start;
    clocks[1] = x;
}

// What any kernel of this shape costs on this machine: launch, a trip to memory, two dependent ones.
static void floors() {
    Buffer<int> a(1024), b(1024), c(1024);
    const auto show = [](const char *name, vector<double> times) { printf("FLOOR %-28s %.2f us\n", name, spread(times).p50); };
    show("empty", time_in_graphs(8, 200, [](int, cudaStream_t s) { empty<<<1, 32, 0, s>>>(); }));
    show("empty, 256 threads", time_in_graphs(8, 200, [](int, cudaStream_t s) { empty<<<1, 256, 0, s>>>(); }));
    show("load, store", time_in_graphs(8, 200, [&](int, cudaStream_t s) { one_load<<<1, 256, 0, s>>>(a.data, b.data); }));
    show("load, load, store", time_in_graphs(8, 200, [&](int, cudaStream_t s) { two_loads<<<1, 256, 0, s>>>(c.data, a.data, b.data); }));
    show("load, store, 512 B arguments",
         time_in_graphs(8, 200, [&](int, cudaStream_t s) { large_arguments<<<1, 256, 0, s>>>(Large{}, a.data, b.data); }));
    Buffer<long long> clocks(2);
    cudaEvent_t start, stop;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&stop));
    for (int i = 0; i < 3; ++i) {
        CHECK(cudaEventRecord(start));
        spin<<<1, 32>>>(1000000, clocks.data);
        CHECK(cudaEventRecord(stop));
        CHECK(cudaEventSynchronize(stop));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, start, stop));
        printf("FLOOR clock %.0f MHz\n", clocks.get()[0] / ms / 1000);
    }
}

#ifdef LPLB_PROFILE
extern "C" void lplbk_profile_solve(long long *marks);

static void profile(const string &name, const reference::Instance &in, int family, Random &random) {
    Planner planner(in);
    const int n = 64, n_logical = in.shape.n_logical;
    vector<int32_t> all;
    for (int i = 0; i < n; ++i) {
        for (int64_t t : loads(random, n_logical, family, 2000)) all.push_back((int32_t)t);
    }
    Buffer<int32_t> counts(all);
    double sum[32] = {};
    int seen[32] = {};
    for (int i = 0; i < n; ++i) {
        for (int k = 0; k < 8; ++k)
            CHECK(lplbk_solve(&planner.p, counts.data + i * n_logical, 0, 1, nullptr, nullptr, nullptr, 0, nullptr));
        CHECK(cudaDeviceSynchronize());
        long long marks[32];
        lplbk_profile_solve(marks);
        for (int k = 1; k < 32; ++k) {
            if (marks[k] > marks[0]) sum[k] += marks[k] - marks[0], ++seen[k];
        }
    }
    printf("PROFILE %-28s %-10s", name.c_str(), name_of(family));
    for (int k = 1; k < 32; ++k) {
        if (seen[k]) printf(" %d:%.0f(%d)", k, sum[k] / seen[k], seen[k]);
    }
    printf("\n");
}
#endif

int main(int argc, char **argv) {
    const int n = argc > 1 ? atoi(argv[1]) : 300, timed = argc > 2 ? atoi(argv[2]) : 512;
    Random random(1);
    const auto topology = [&](const string &name, int ep, int group, int d, const vector<int> &r2o, int own, int m, int nodes, int rank,
                              int count) {
        check(name, reference::topology(ep, group, d, r2o, own * ep, m, nodes, rank, random_order(random, own * ep)), random, count);
    };
    if (n > 0) {
        topology("cube 8x2, 8 a rank", 8, 8, 2, cube(), 8, 1, 1, 3, n);
        topology("cube 8x2, 32 a rank", 8, 8, 2, cube(), 32, 1, 2, 5, n);
        topology("cube 8x2, 32 a rank, m 3", 8, 8, 2, cube(), 32, 3, 2, -1, n);
        topology("ring 8x1, 8 a rank", 8, 8, 1, ring(8), 8, 1, 1, -1, n);
        topology("ring 7x1, 5 a rank, m 5", 7, 7, 1, ring(7), 5, 5, 1, 6, n);
        topology("ring 2x1", 2, 2, 1, ring(2), 4, 2, 1, 0, n);
        topology("hypercube 16x2, 16 a rank", 16, 16, 2, hypercube(), 16, 1, 2, 9, n);
        topology("torus 8x4x2, 8 a rank", 32, 32, 2, torus(8, 4), 8, 2, 4, 17, n);
        topology("4 cubes, 32 ranks", 32, 8, 2, cube(), 8, 2, 4, 20, n / 2);
        topology("torus 8x8x2, 64 ranks", 64, 64, 2, torus(8, 8), 4, 1, 8, 11, n / 2);
        topology("torus 16x16x2, 256 ranks", 256, 256, 2, torus(16, 16), 4, 2, 32, -1, n / 6);
        for (int k = 0; k < 12; ++k) {
            const int g = 2 + random() % 31, d = 1 + random() % 4, m = 1 + random() % 3;
            topology("random columns " + std::to_string(g) + "x" + std::to_string(d) + " m " + std::to_string(m), g, g, d,
                     random_columns(random, g, d), m * d + random() % 5, m, 1, (int)(random() % g), n / 6);
        }
        const auto placement = [&](const string &name, int ep, int group, int nodes, int rank, int logical, const vector<int> &phy2log,
                                   int count) { check(name, reference::general(ep, group, nodes, rank, logical, phy2log), random, count); };
        for (int k = 0; k < 6; ++k) {
            const auto weight = [&] {
                const auto t = loads(random, 256, k % 3);
                return vector<double>(t.begin(), t.end());
            }();
            placement("EPLB 256/32/288", 32, 32, 4, 13, 256, eplb(weight, 288, 32), n / 6);
            placement("EPLB 256/32/320", 32, 32, 4, -1, 256, eplb(weight, 320, 32), n / 6);
            placement("EPLB 256/64/320", 64, 64, 8, 63, 256, eplb(weight, 320, 64), n / 6);
        }
        placement("random 64 on 8, 80 slots", 8, 8, 1, 2, 64, random_placement(random, 64, 80, 1), n / 2);
        placement("random 12 on 6, 48 slots", 6, 6, 3, 2, 12, random_placement(random, 12, 48, 1), n / 2);
        placement("random 4 groups of 8, 96 of 64", 32, 8, 4, 9, 64, random_placement(random, 64, 96, 4), n / 2);
        placement("random 256 on 40, 400 slots", 40, 40, 5, 39, 256, random_placement(random, 256, 400, 1), n / 3);
        placement("random 256 on 128, 512 slots", 128, 128, 16, -1, 256, random_placement(random, 256, 512, 1), n / 12);
        placement("random 1024 on 512, 4096 slots", 512, 512, 64, -1, 1024, random_placement(random, 1024, 4096, 1), n / 30 + 1);
        placement("1 rank", 1, 1, 1, 0, 4, {0, 1, 2, 3, 0}, 9);
        for (int ranks : {7, 16, 32, 33, 64, 72, 128, 256}) worst_cases(ranks, ranks > 128 ? n : 3 * n, timed > 0, random);
        overflow();
        const auto order = [&](int n) { return random_order(random, n); };
        check_interior("cube 8x2, 8 a rank", reference::topology(8, 8, 2, cube(), 64, 1, 1, 2, order(64)), random, n / 2);
        check_interior("cube 8x2, 32 a rank, m 3", reference::topology(8, 8, 2, cube(), 256, 3, 1, -1, order(256)), random, n / 2);
        check_interior("ring 8x1, 8 a rank", reference::topology(8, 8, 1, ring(8), 64, 1, 1, -1, order(64)), random, n / 2);
        check_interior("4 cubes", reference::topology(32, 8, 2, cube(), 256, 1, 1, -1, order(256)), random, n / 4);
        check_interior("torus 8x4x2, 8 a rank", reference::topology(32, 32, 2, torus(8, 4), 256, 1, 1, -1, order(256)), random, n / 4);
        check_interior("torus 10x12x2", reference::topology(120, 120, 2, torus(10, 12), 480, 1, 1, -1, order(480)), random, n / 12);
        check_interior("random 64 on 8, 80 slots", reference::general(8, 8, 1, 1, 64, random_placement(random, 64, 80, 1)), random, n / 4);
        const auto history = loads(random, 256, kZipf);
        const vector<double> weight(history.begin(), history.end());
        check_interior("EPLB 256/32/320", reference::general(32, 32, 4, -1, 256, eplb(weight, 320, 32)), random, n / 4);
        check_interior("EPLB 256/64/320", reference::general(64, 64, 4, -1, 256, eplb(weight, 320, 64)), random, n / 8);
        printf("%d wrong\n", failures);
    }
    if (timed > 0) {
        floors();
        const auto identity = [](int n) {
            vector<int> order(n);
            std::iota(order.begin(), order.end(), 0);
            return order;
        };
#ifdef LPLB_PROFILE
        for (int family : {kNormal, kZipf}) {
            profile("cube 8x2, 8 a rank", reference::topology(8, 8, 2, cube(), 64, 1, 1, -1, identity(64)), family, random);
            profile("cube 8x2, 32 a rank", reference::topology(8, 8, 2, cube(), 256, 1, 1, -1, identity(256)), family, random);
            profile("torus", reference::topology(32, 32, 2, torus(8, 4), 256, 1, 4, -1, identity(256)), family, random);
            const auto h = loads(random, 256, family);
            profile("EPLB 32/320", reference::general(32, 32, 4, -1, 256, eplb(vector<double>(h.begin(), h.end()), 320, 32)), family,
                    random);
        }
        return 0;
#endif
        for (int family : {kNormal, kZipf, kLogNormal}) {
            timing("cube 8x2, 8 a rank", {reference::topology(8, 8, 2, cube(), 64, 1, 1, -1, identity(64))}, family, timed, 2000, random);
            timing("cube 8x2, 32 a rank", {reference::topology(8, 8, 2, cube(), 256, 1, 1, -1, identity(256))}, family, timed, 2000,
                   random);
            timing("interior, cube 8x2, 8 a rank", {reference::topology(8, 8, 2, cube(), 64, 1, 1, -1, identity(64))}, family, timed / 8,
                   2000, random, 1);
            timing("ring 8x1, 8 a rank", {reference::topology(8, 8, 1, ring(8), 64, 1, 1, -1, identity(64))}, family, timed, 2000, random);
            timing("hypercube 16x2, 16 a rank", {reference::topology(16, 16, 2, hypercube(), 256, 1, 2, -1, identity(256))}, family, timed,
                   2000, random);
            timing("torus 8x4x2, 8 a rank", {reference::topology(32, 32, 2, torus(8, 4), 256, 1, 4, -1, identity(256))}, family, timed,
                   2000, random);
        }
        for (int family : {kNormal, kZipf, kLogNormal}) {
            for (auto [ranks, slots] : {std::pair{32, 288}, {32, 320}, {64, 320}}) {
                // Placed for one load, then another of the same family, and for the drifted loads of the placement's own history.
                vector<reference::Instance> placements;
                for (int k = 0; k < 8; ++k) {
                    const auto h = loads(random, 256, family);
                    placements.push_back(
                        reference::general(ranks, ranks, ranks / 8, -1, 256, eplb(vector<double>(h.begin(), h.end()), slots, ranks)));
                }
                if (slots == 320) timing("interior, EPLB 256 on " + std::to_string(ranks), placements, family, timed / 8, 2000, random, 1);
                timing("EPLB 256 on " + std::to_string(ranks) + ", " + std::to_string(slots) + " slots", placements, family, timed, 2000,
                       random);
            }
        }
    }
    return failures != 0;
}
