// count, redirect, redirect_by_ratio and run against the reference, then times of run. Arguments: [checks per shape] [timed inputs]
// [most ids of a check].
#include "harness.h"

using namespace harness;

static int failures = 0;

static bool expect(bool ok, const string &where, const char *what, long long got, long long want) {
    if (!ok && ++failures <= 20) printf("WRONG %s: %s got %lld want %lld\n", where.c_str(), what, got, want);
    return ok;
}

enum IdFamily { kUniform, kSkewed, kSame, kHoles, kBad, kIdFamilies };

static vector<int64_t> make_ids(Random &random, int n, int n_logical, int family) {
    vector<int64_t> ids(n);
    const vector<int> order = random_order(random, n_logical);
    vector<double> sums(n_logical);
    double sum = 0;
    for (int i = 0; i < n_logical; ++i) sums[i] = sum += std::pow(i + 1.0, -0.8);
    for (auto &id : ids) {
        switch (family) {
        case kSkewed: {
            const double at = (random() >> 11) * 0x1p-53 * sum;
            id = order[std::lower_bound(sums.begin(), sums.end(), at) - sums.begin()];
            break;
        }
        case kSame:
            id = order[0];
            break;
        case kHoles:
            id = random() % 3 ? -1 : (int64_t)(random() % n_logical);
            break;
        case kBad:
            id = random() % 5 ? (int64_t)(random() % n_logical) : (int64_t)(random() % 7) - 3 + (random() % 2 ? n_logical : 0);
            break;
        default:
            id = random() % n_logical;
        }
    }
    return ids;
}

struct Rewritten {
    vector<int64_t> ids;
    int64_t invalid = 0;
};

// take: by slot.
static Rewritten rewrite(const reference::Instance &in, const vector<int64_t> &ids, const vector<int64_t> &take) {
    const int n_logical = in.shape.n_logical;
    Rewritten out;
    vector<int64_t> seen(n_logical, 0);
    for (int64_t id : ids) {
        if (id < 0 || id >= n_logical) {
            out.invalid += id != -1;
            out.ids.push_back(-1);
            continue;
        }
        const int64_t k = seen[id]++;
        int64_t sum = 0;
        int to = in.place_slot[id][0];
        for (int slot : in.place_slot[id]) {
            sum += take[slot];
            if (k < sum) {
                to = slot;
                break;
            }
        }
        out.ids.push_back(to);
    }
    return out;
}

static vector<int64_t> counts_of(const vector<int64_t> &ids, int n_logical) {
    vector<int64_t> counts(n_logical, 0);
    for (int64_t id : ids) {
        if (id >= 0 && id < n_logical) ++counts[id];
    }
    return counts;
}

// The counts of all ranks as rows, with a digest behind each.
template <class Count>
static vector<int32_t> rows_of(const vector<Count> &counts, const lplbk_shape &s) {
    vector<int32_t> rows;
    for (int r = 0; r < s.ep_size; ++r) {
        rows.insert(rows.end(), counts.begin() + (size_t)r * s.n_logical, counts.begin() + (size_t)(r + 1) * s.n_logical);
        rows.push_back(12345);
    }
    return rows;
}

template <class Id>
static void check_ids(const string &where, const vector<Id> &got, const vector<int64_t> &want) {
    for (size_t i = 0; i < want.size(); ++i) {
        if (!expect(got[i] == want[i], where, ("id " + std::to_string(i)).c_str(), got[i], want[i])) return;
    }
}

template <class Id>
static void check_one(const string &name, const reference::Instance &in, Random &random, int n, int family, int64_t max_blocks) {
    const lplbk_shape &s = in.shape;
    Planner planner(in);
    const auto ids = make_ids(random, n, s.n_logical, family);
    const string where = name + " " + std::to_string(n) + " ids of " + std::to_string(sizeof(Id)) + " bytes, family " +
                         std::to_string(family) + ", blocks " + std::to_string(max_blocks);
    const int misaligned = random() % 2;
    Buffer<Id> from(n + 1), to(n + 1);
    const vector<Id> narrow(ids.begin(), ids.end());
    CHECK(lplbk_upload(0, from.data + misaligned, narrow.data(), sizeof(Id) * n, nullptr));
    const auto out_ids = [&](Id *at) { return planner.read(at, n); };
    const auto invalid = [&] { return planner.read(planner.p.counters, LPLBK_COUNTERS)[LPLBK_COUNTER_INVALID]; };
    Buffer<int32_t> counter(1);
    const bool wide = sizeof(Id) == 8;
    int64_t bad = 0;

    // run, twice: the second time in place.
    const auto counts = counts_of(ids, s.n_logical);
    const auto plan = reference::solve(in, counts, 1);
    const auto want = rewrite(in, ids, plan.quota);
    for (int pass = 0; pass < 2; ++pass) {
        Id *out = pass == 0 ? to.data : from.data + misaligned;
        CHECK(lplbk_run(&planner.p, from.data + misaligned, wide, n, nullptr, 0, out, counter.data, 0, max_blocks, nullptr));
        check_ids(where + " run", out_ids(out), want.ids);
        bad += want.invalid;
        expect(invalid() == bad, where, "invalid", invalid(), bad);
    }
    CHECK(lplbk_upload(0, from.data + misaligned, narrow.data(), sizeof(Id) * n, nullptr));
    expect(counter.get()[0] == 2 * s.n_groups, where, "counter", counter.get()[0], 2 * s.n_groups);
    if (planner.p.has_replicas) {
        const auto quota = planner.read(planner.p.quota, s.n_physical);
        const auto info = planner.read(planner.p.group_info, s.n_groups * LPLBK_INFO_WORDS);
        for (int p = 0; p < s.n_physical; ++p) expect(quota[p] == plan.quota[p], where, "quota", quota[p], plan.quota[p]);
        int64_t own = 0, moved = 0;
        for (int g = 0; g < s.n_groups; ++g) {
            const int32_t *i = &info[g * LPLBK_INFO_WORDS];
            expect(i[LPLBK_INFO_MAX_LOAD] == plan.groups[g].max_load, where, "max load", i[LPLBK_INFO_MAX_LOAD], plan.groups[g].max_load);
            expect(i[LPLBK_INFO_BOUND] == plan.groups[g].bound, where, "bound", i[LPLBK_INFO_BOUND], plan.groups[g].bound);
            expect(i[LPLBK_INFO_ROUNDS] == plan.groups[g].rounds, where, "rounds", i[LPLBK_INFO_ROUNDS], plan.groups[g].rounds);
            expect(i[LPLBK_INFO_MOVED] == plan.groups[g].moved, where, "moved", i[LPLBK_INFO_MOVED], plan.groups[g].moved);
            own += i[LPLBK_INFO_OWN_RANK] + i[LPLBK_INFO_OWN_NODE] + i[LPLBK_INFO_OTHER_NODES];
            moved += plan.groups[g].moved;
        }
        const int64_t all = std::accumulate(counts.begin(), counts.end(), (int64_t)0);
        expect(own == (s.rank < 0 ? 0 : all), where, "own tokens", own, all);
    }

    // count, with and without running sums.
    Buffer<int32_t> device_counts(s.n_logical);
    CHECK(lplbk_count(&planner.p, from.data + misaligned, wide, n, device_counts.data, nullptr, 0, nullptr));
    const auto got = device_counts.get();
    for (int e = 0; e < s.n_logical; ++e) expect(got[e] == counts[e], where, "count", got[e], counts[e]);
    const int chunks = 1 + random() % 140;
    Buffer<int32_t> sums((size_t)chunks * s.n_logical);
    CHECK(lplbk_count(&planner.p, from.data + misaligned, wide, n, device_counts.data, sums.data, chunks, nullptr));
    const auto got2 = device_counts.get();
    const auto got_sums = sums.get();
    const int64_t length = std::max<int64_t>((((n + chunks - 1) / chunks) + 1023) / 1024 * 1024, 1024);
    vector<int64_t> running(s.n_logical, 0);
    int64_t at = 0;
    for (int c = 0; c < chunks; ++c) {
        for (; at < std::min<int64_t>((c + 1) * length, n); ++at) {
            if (ids[at] >= 0 && ids[at] < s.n_logical) ++running[ids[at]];
        }
        for (int e = 0; e < s.n_logical; ++e) {
            if (!expect(got_sums[(size_t)c * s.n_logical + e] == running[e], where, "running sum", got_sums[(size_t)c * s.n_logical + e],
                        running[e]))
                break;
        }
    }
    for (int e = 0; e < s.n_logical; ++e) expect(got2[e] == counts[e], where, "count 2", got2[e], counts[e]);
    expect(invalid() == bad, where, "invalid after count", invalid(), bad);  // those that are rewritten count

    // solve and redirect, of the counts and of others (more and fewer tokens than planned for).
    if (planner.p.has_replicas) {
        for (int pass = 0; pass < 2; ++pass) {
            auto planned = counts;
            if (pass == 1) {
                for (auto &c : planned) c = c * (random() % 5) / 2;
            }
            const auto other = reference::solve(in, planned, 1);
            Buffer<int32_t> device(vector<int32_t>(planned.begin(), planned.end()));
            CHECK(lplbk_solve(&planner.p, device.data, 0, 1, nullptr, nullptr, nullptr, 0, nullptr));
            CHECK(lplbk_redirect(&planner.p, from.data + misaligned, wide, n, to.data, max_blocks, nullptr));
            check_ids(where + " redirect", out_ids(to.data), rewrite(in, ids, other.quota).ids);
            bad += want.invalid;
        }
    }
    // by ratio
    if (s.n_redundant) {
        vector<float> ratios(s.ep_size * s.n_redundant);
        for (auto &r : ratios)
            r = random() % 8 == 0 ? NAN : random() % 8 == 0 ? 2.0f : random() % 8 == 0 ? -1.0f : (random() % 1000) / 1000.0f;
        Buffer<float> device(ratios);
        CHECK(lplbk_redirect_by_ratio(&planner.p, from.data + misaligned, wide, n, device.data, sums.data, chunks, to.data, nullptr));
        vector<int64_t> seen(s.n_logical, 0), expected;
        const int n_own = s.n_logical / s.ep_size;
        vector<int> place_of(s.n_logical);
        for (int i = 0; i < s.n_logical; ++i) place_of[in.order[i]] = i;
        for (int64_t id : ids) {
            if (id < 0 || id >= s.n_logical) {
                expected.push_back(-1);
                continue;
            }
            const int rank = place_of[id] / n_own, offset = place_of[id] % n_own;
            const int64_t k = seen[id]++;
            if (offset >= s.bundle_experts * s.n_redundant) {
                expected.push_back(in.replicas[id][0]);
                continue;
            }
            const float r = ratios[rank * s.n_redundant + offset % s.n_redundant];
            const double share = r != r ? 1.0 : std::min(std::max((double)r, 0.0), 1.0);
            expected.push_back(in.replicas[id][k < (int64_t)std::floor(share * counts[id] + 0.5) ? 0 : 1]);
        }
        if (n > 0) check_ids(where + " by ratio", out_ids(to.data), expected);
    }

    // run with gathered counts
    if (planner.p.has_replicas && s.rank >= 0 && s.ep_size <= 64) {
        vector<int64_t> gathered((size_t)s.ep_size * s.n_logical);
        for (int r = 0; r < s.ep_size; ++r) {
            for (int e = 0; e < s.n_logical; ++e) {
                gathered[(size_t)r * s.n_logical + e] = r == s.rank ? counts[e] : random() % 3 ? counts[e] * (random() % 4) : random() % 50;
            }
        }
        const auto whole = reference::solve(in, gathered, s.ep_size);
        Buffer<int32_t> device(rows_of(gathered, s));
        CHECK(lplbk_run(&planner.p, from.data + misaligned, wide, n, device.data, 0, to.data, counter.data, 0, max_blocks, nullptr));
        check_ids(where + " run gathered", out_ids(to.data), rewrite(in, ids, whole.take).ids);
        const auto quota = planner.read(planner.p.quota, s.n_physical), take = planner.read(planner.p.take, s.n_physical);
        const auto info = planner.read(planner.p.group_info, s.n_groups * LPLBK_INFO_WORDS);
        for (int p = 0; p < s.n_physical; ++p) {
            expect(quota[p] == whole.quota[p], where, "gathered quota", quota[p], whole.quota[p]);
            expect(take[p] == whole.take[p], where, "gathered take", take[p], whole.take[p]);
        }
        int64_t own = 0, total = 0, want_total = 0;
        for (int g = 0; g < s.n_groups; ++g) {
            const int32_t *i = &info[g * LPLBK_INFO_WORDS];
            expect(i[LPLBK_INFO_MOVED] == whole.groups[g].moved, where, "gathered moved", i[LPLBK_INFO_MOVED], whole.groups[g].moved);
            total += i[LPLBK_INFO_TOTAL], want_total += whole.groups[g].total;
            own += i[LPLBK_INFO_OWN_RANK] + i[LPLBK_INFO_OWN_NODE] + i[LPLBK_INFO_OTHER_NODES];
        }
        expect(total == want_total, where, "gathered total", total, want_total);
        const int64_t mine = std::accumulate(counts.begin(), counts.end(), (int64_t)0);
        expect(own == mine, where, "gathered own", own, mine);
    }
}

static int most_ids = 1 << 30;  // in a check; the short suite of the sanitizers takes few

static void check(const string &name, const reference::Instance &in, Random &random, int n) {
    if (most_ids < 1 << 20 && in.shape.ep_size > 64) return;
    const int before = failures;
    static const int sizes[] = {0, 1, 31, 33, 512, 1000, 4097, 8 * 4096, 65536, 131072 + 77, 1 << 20};
    for (int i = 0; i < n; ++i) {
        const int size = std::min(sizes[i % 11], most_ids) + (i >= 11 ? (int)(random() % 100) : 0);
        const int64_t blocks = i % 3 == 0 ? 0 : 1 + random() % 132;
        if (i % 2) {
            check_one<int32_t>(name, in, random, size, (i / 3) % kIdFamilies, blocks);
        } else {
            check_one<int64_t>(name, in, random, size, (i / 3) % kIdFamilies, blocks);
        }
    }
    printf("%-44s colours %d masks %d: %s\n", name.c_str(), in.shape.colours, lplbk_layout_of(&in.shape).mask_words,
           failures == before ? "equal" : "DIFFERENT");
    fflush(stdout);
}

// What a planner has on the device, placement and plan.
static vector<vector<int32_t>> memory_of(const Planner &planner) {
    const lplbk_planner &p = planner.p;
    return {planner.read(p.tables, p.layout.words), planner.read(p.quota, p.shape.n_physical), planner.read(p.take, p.shape.n_physical),
            planner.read(p.group_info, p.shape.n_groups * LPLBK_INFO_WORDS)};
}

// Launches that fail in the middle of a call, and a placement that does: what comes after must not notice.
static void check_failures(const string &name, const reference::Instance &in, Random &random) {
    const int before = failures, n = 5000;
    Planner planner(in);
    planner.p.fused_ids = 0;
    const auto ids = make_ids(random, n, in.shape.n_logical, kSkewed);
    const auto plan = reference::solve(in, counts_of(ids, in.shape.n_logical), 1);
    Buffer<int64_t> from(ids), to(n);
    const auto check_run = [&](const string &where) {
        CHECK(lplbk_run(&planner.p, from.data, 1, n, nullptr, 0, to.data, nullptr, 0, 0, nullptr));
        check_ids(name + where, to.get(), rewrite(in, ids, plan.quota).ids);
        const auto quota = planner.read(planner.p.quota, in.shape.n_physical);
        for (size_t p = 0; p < quota.size(); ++p) expect(quota[p] == plan.quota[p], name + where, "quota", quota[p], plan.quota[p]);
    };
    // Sizes beyond shared memory: the solver's, and those of the rewriting.
    lplbk_planner no_solve = planner.p, no_rewrite = planner.p;
    no_solve.shape.max_arcs = 1 << 20;
    no_rewrite.shape.n_physical = 1 << 20;
    cudaStream_t stream;
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    for (const lplbk_planner *broken : {&no_solve, &no_rewrite}) {
        const string where = broken == &no_solve ? " after a solve that was refused" : " after a rewrite that was refused";
        const int error = lplbk_run(broken, from.data, 1, n, nullptr, 0, to.data, nullptr, 0, 0, nullptr);
        expect(error != 0, name + where, "error", error, (int)cudaErrorInvalidValue);
        check_run(where);
        cudaGraph_t graph = nullptr;
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        lplbk_run(broken, from.data, 1, n, nullptr, 0, to.data, nullptr, 0, 0, stream);
        if (cudaStreamEndCapture(stream, &graph) == cudaSuccess) {
            cudaGraphExec_t exec;
            CHECK(cudaGraphInstantiate(&exec, graph, 0));
            CHECK(cudaGraphLaunch(exec, stream));
            CHECK(cudaStreamSynchronize(stream));
            CHECK(cudaGraphExecDestroy(exec));
            CHECK(cudaGraphDestroy(graph));
        }
        cudaGetLastError();
        check_run(where + " in a graph");
    }
    const auto had = memory_of(planner);
    lplbk_planner nowhere = planner.p;
    nowhere.staged = nullptr;
    const vector<int32_t> zeros(planner.p.layout.words, 0);
    expect(lplbk_place(&nowhere, zeros.data(), nullptr) != 0, name, "placing without memory", 0, 1);
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    expect(lplbk_place(&planner.p, zeros.data(), stream) != 0, name, "placing in a capture", 0, 1);
    cudaGraph_t graph = nullptr;
    cudaStreamEndCapture(stream, &graph);
    if (graph != nullptr) CHECK(cudaGraphDestroy(graph));
    cudaGetLastError();
    CHECK(cudaStreamDestroy(stream));
    expect(memory_of(planner) == had, name, "memory after a placement that failed", 0, 1);
    planner.place(in);
    const auto placed = memory_of(planner);
    expect(placed[0] == had[0], name, "tables after a placement", 0, 1);
    for (int k : {1, 2, 3}) {
        for (int word : placed[k]) expect(word == 0, name, "plan after a placement", word, 0);
    }
    check_run(" after a placement");
    printf("%-44s after failures: %s\n", name.c_str(), failures == before ? "equal" : "DIFFERENT");
    fflush(stdout);
}

// Counts whose total passes 31 bits in some groups: the fused run does as the solve of its own, group by group.
static void check_overflow(const string &name, const reference::Instance &in, Random &random) {
    const int before = failures, n = 3000;
    const lplbk_shape &s = in.shape;
    Planner fused(in), several(in);
    several.p.fused_ids = 0;
    const auto ids = make_ids(random, n, s.n_logical, kUniform);
    const auto mine = counts_of(ids, s.n_logical);
    const auto group_of = [&](int expert) { return in.place_rank[expert][0] / s.group_size; };
    const int per_group = s.n_logical / s.n_groups;
    Buffer<int64_t> from(ids), to(n);
    for (int kind = 0; kind < 3; ++kind) {  // none; every second group; one expert beyond 2^31 in the last group
        vector<int32_t> gathered((size_t)s.ep_size * s.n_logical);
        vector<int64_t> whole(gathered.size());
        for (int r = 0; r < s.ep_size; ++r) {
            for (int e = 0; e < s.n_logical; ++e) {
                int64_t count = r == s.rank ? mine[e] : random() % 50;
                const bool heavy = kind == 1 && group_of(e) % 2 == 0 && r != s.rank;
                if (heavy) count = ((int64_t)1 << 31) / per_group / (s.ep_size - 1) + 50;
                if (kind == 2 && e == s.n_logical - 1 && r != s.rank) count = ((int64_t)1 << 31) / (s.ep_size - 1) + 1;
                gathered[(size_t)r * s.n_logical + e] = (int32_t)count;
                whole[(size_t)r * s.n_logical + e] = count;
            }
        }
        int64_t n_overflows = 0;
        vector<int64_t> totals(s.n_groups, 0);
        for (size_t i = 0; i < whole.size(); ++i) totals[group_of(i % s.n_logical)] += whole[i];
        for (int64_t total : totals) n_overflows += total > INT32_MAX;
        const auto plan = reference::solve(in, whole, s.ep_size);
        Buffer<int32_t> device(rows_of(gathered, s));
        vector<vector<vector<int32_t>>> memory;
        for (Planner *planner : {&fused, &several}) {
            const string where = name + (planner == &fused ? " overflow, one launch" : " overflow, several") + " kind " +
                                 std::to_string(kind);
            Buffer<int64_t> counter(1);
            const auto had = planner->read(planner->p.counters, LPLBK_COUNTERS)[LPLBK_COUNTER_OVERFLOW];
            CHECK(lplbk_run(&planner->p, from.data, 1, n, device.data, 0, to.data, counter.data, 1, 0, nullptr));
            const auto has = planner->read(planner->p.counters, LPLBK_COUNTERS)[LPLBK_COUNTER_OVERFLOW];
            expect(has - had == n_overflows, where, "overflows", has - had, n_overflows);
            expect(counter.get()[0] == s.n_groups - n_overflows, where, "counter", counter.get()[0], s.n_groups - n_overflows);
            const auto out = to.get();
            const auto expected = rewrite(in, ids, plan.take).ids;
            const auto take = planner->read(planner->p.take, s.n_physical);
            const auto info = planner->read(planner->p.group_info, s.n_groups * LPLBK_INFO_WORDS);
            for (int i = 0; i < n; ++i) {
                const bool stays = ids[i] >= 0 && totals[group_of(ids[i])] > INT32_MAX;
                const int64_t want = stays ? in.replicas[ids[i]][0] : expected[i];
                expect(out[i] == want, where, "id", out[i], want);
            }
            for (int e = 0; e < s.n_logical; ++e) {
                const bool stays = totals[group_of(e)] > INT32_MAX;
                for (size_t j = 0; j < in.place_slot[e].size(); ++j) {
                    const int slot = in.place_slot[e][j];
                    const int64_t want = !stays ? plan.take[slot] : j == 0 ? mine[e] : 0;
                    expect(take[slot] == want, where, "take", take[slot], want);
                }
            }
            for (int g = 0; g < s.n_groups; ++g) {
                const bool stays = totals[g] > INT32_MAX;
                const int32_t *words = &info[g * LPLBK_INFO_WORDS];
                const int64_t load = stays ? 0 : plan.groups[g].max_load, total = stays ? 0 : plan.groups[g].total;
                expect(words[LPLBK_INFO_MAX_LOAD] == load, where, "max load", words[LPLBK_INFO_MAX_LOAD], load);
                expect(words[LPLBK_INFO_TOTAL] == total, where, "total", words[LPLBK_INFO_TOTAL], total);
                expect(words[LPLBK_INFO_CERTIFIED] == !stays, where, "certified", words[LPLBK_INFO_CERTIFIED], !stays);
            }
            memory.push_back(memory_of(*planner));
        }
        for (int k : {1, 2}) expect(memory[0][k] == memory[1][k], name, "tokens in one launch and in several", 0, 1);
    }
    printf("%-44s overflow: %s\n", name.c_str(), failures == before ? "equal" : "DIFFERENT");
    fflush(stdout);
}

// One rank's planner gets another digest: every rank reports it.
static void check_disagreement(const string &name, const vector<std::unique_ptr<Planner>> &planners, const vector<lplbk_exchange_view> &views,
                               const vector<lplbk_exchange_host *> &hosts, const vector<cudaStream_t> &streams) {
    const int n_ranks = (int)planners.size(), odd = n_ranks / 2;
    if (n_ranks == 1) return;
    Buffer<int64_t> ids(vector<int64_t>(64, 0)), to(64 * n_ranks);
    const lplbk_planner &other = planners[odd]->p;
    CHECK(lplbk_set_digest(&other, 4711));
    for (int r = 0; r < n_ranks; ++r) {
        CHECK(lplbk_run_exchanging(&planners[r]->p, &views[r], ids.data, 1, 64, to.data + 64 * r, nullptr, 0, 0, streams[r]));
    }
    CHECK(cudaDeviceSynchronize());
    for (int r = 0; r < n_ranks; ++r) {
        const lplbk_report &report = hosts[r]->report;
        const string where = name + " disagreeing, rank " + std::to_string(r);
        expect(lplbk_report_code(&report) == LPLBK_EXCHANGE_DISAGREED, where, "code", report.code, LPLBK_EXCHANGE_DISAGREED);
        expect(report.rank == r, where, "rank", report.rank, r);
        expect(r == odd ? report.peer != odd : report.peer == odd, where, "peer", report.peer, odd);
    }
}

// Every rank of an EP group on this one GPU, each on a stream of its own: run with the exchange inside.
static void check_exchanging(const string &name, const std::function<reference::Instance(int)> &of_rank, int n_ranks, int64_t max_blocks,
                             Random &random) {
    const int before = failures;
    const int n_logical = of_rank(0).shape.n_logical, rounds = 6, width = n_logical + 1;
    const int64_t words = lplbk_exchange_buffer_words(n_ranks, 1, width);
    vector<void *> buffers(n_ranks);
    for (void *&buffer : buffers) CHECK(lplbk_exchange_alloc(0, words, 7, &buffer));
    vector<lplbk_exchange_view> views(n_ranks);
    vector<lplbk_exchange_host *> hosts(n_ranks);
    vector<reference::Instance> instances;
    vector<std::unique_ptr<Planner>> planners;
    vector<cudaStream_t> streams(n_ranks);
    for (int r = 0; r < n_ranks; ++r) {
        lplbk_exchange_view &view = views[r];
        memset(&view, 0, sizeof view);
        for (int peer = 0; peer < n_ranks; ++peer) view.peer[peer] = (uint64_t)(uintptr_t)buffers[peer];
        view.timeout_ns = 2000000000;
        view.rank = r, view.n_ranks = n_ranks, view.n_nodes = 1, view.n_counts = width;
        view.n_words = width, view.n_packets = (width + 1) / 2, view.policy = LPLBK_EXCHANGE_REPORT;
        CHECK(lplbk_exchange_open(0, 7, &view, &hosts[r]));
        instances.push_back(of_rank(r));
        planners.push_back(std::make_unique<Planner>(instances[r]));
        CHECK(cudaStreamCreateWithFlags(&streams[r], cudaStreamNonBlocking));
    }
    for (int round = 0; round < rounds; ++round) {
        vector<vector<int64_t>> ids(n_ranks);
        vector<int64_t> gathered;
        vector<Buffer<int64_t>> from, to;
        for (int r = 0; r < n_ranks; ++r) {
            ids[r] = make_ids(random, round == 1 ? 0 : 200 + random() % 3000, n_logical, round % kIdFamilies);
            const auto counts = counts_of(ids[r], n_logical);
            gathered.insert(gathered.end(), counts.begin(), counts.end());
            from.emplace_back(ids[r]);
            to.emplace_back(ids[r].size());
        }
        for (int r = 0; r < n_ranks; ++r) {
            CHECK(lplbk_run_exchanging(&planners[r]->p, &views[r], from[r].data, 1, ids[r].size(), to[r].data, nullptr, 0, max_blocks,
                                       streams[r]));
        }
        CHECK(cudaDeviceSynchronize());
        for (int r = 0; r < n_ranks; ++r) {
            const string where = name + " exchanging, rank " + std::to_string(r) + " round " + std::to_string(round);
            const auto plan = reference::solve(instances[r], gathered, n_ranks);
            check_ids(where, to[r].get(), rewrite(instances[r], ids[r], plan.take).ids);
            const auto take = planners[r]->read(planners[r]->p.take, instances[r].shape.n_physical);
            for (size_t p = 0; p < take.size(); ++p) expect(take[p] == plan.take[p], where, "take", take[p], plan.take[p]);
            expect(hosts[r]->report.code == 0, where, "exchange", hosts[r]->report.code, 0);
        }
    }
    check_disagreement(name, planners, views, hosts, streams);
    for (int r = 0; r < n_ranks; ++r) {
        CHECK(cudaStreamDestroy(streams[r]));
        CHECK(lplbk_exchange_close(0, &views[r], hosts[r]));
        lplbk_free(0, buffers[r]);
    }
    printf("%-44s exchanging, %d ranks: %s\n", name.c_str(), n_ranks, failures == before ? "equal" : "DIFFERENT");
    fflush(stdout);
}

// fused: ids that are planned in one launch at most, -1: as the library says.
static void timing(const string &name, const reference::Instance &in, int n_tokens, int family, int n, Random &random,
                   int64_t max_blocks = 0, int fused = -1) {
    Planner planner(in);
    if (fused >= 0) planner.p.fused_ids = fused;
    const int n_ids = 8 * n_tokens;
    const int sets = std::min(n, 32);
    vector<int64_t> all;
    for (int i = 0; i < sets; ++i) {
        const auto ids = make_ids(random, n_ids, in.shape.n_logical, family);
        all.insert(all.end(), ids.begin(), ids.end());
    }
    Buffer<int64_t> from(all), to(n_ids);
    Buffer<int64_t> counter(1);
    // The chain of runs in a graph takes every set in turn.
    const auto times = time_in_graphs(n / 8, 32, [&, k = 0](int, cudaStream_t stream) mutable {
        CHECK(lplbk_run(&planner.p, from.data + (size_t)(k++ % sets) * n_ids, 1, n_ids, nullptr, 0, to.data, counter.data, 1, max_blocks,
                        stream));
    });
    const Spread t = spread(times);
    printf("TIME run %-34s %6d tokens x 8, ids %d, blocks %3lld, %s: p50 %6.2f max %6.2f us\n", name.c_str(), n_tokens, family,
           (long long)max_blocks, n_ids <= planner.p.fused_ids ? "one launch" : "several", t.p50, t.max);
    fflush(stdout);
}

#ifdef LPLB_PROFILE
extern "C" void lplbk_profile_run(long long *marks);

static void profile(const string &name, const reference::Instance &in, int n_tokens, Random &random) {
    Planner planner(in);
    const int n_ids = 8 * n_tokens;
    double sum[32] = {};
    int seen[32] = {};
    Buffer<int64_t> to(n_ids);
    for (int i = 0; i < 16; ++i) {
        Buffer<int64_t> from(make_ids(random, n_ids, in.shape.n_logical, kSkewed));
        for (int k = 0; k < 8; ++k) {
            CHECK(lplbk_run(&planner.p, from.data, 1, n_ids, nullptr, 0, to.data, nullptr, 1, 0, nullptr));
            CHECK(cudaDeviceSynchronize());
        }
        long long marks[32];
        lplbk_profile_run(marks);
        for (int k = 1; k < 32; ++k) {
            if (marks[k] > marks[0]) sum[k] += marks[k] - marks[0], ++seen[k];
        }
    }
    printf("PROFILE run %-28s %d:", name.c_str(), n_tokens);
    for (int k = 1; k < 32; ++k) {
        if (seen[k]) printf(" %d:%.0f", k, sum[k] / seen[k]);
    }
    printf("\n");
}
#endif

int main(int argc, char **argv) {
    const int n = argc > 1 ? atoi(argv[1]) : 22, timed = argc > 2 ? atoi(argv[2]) : 64;
    if (argc > 3) most_ids = atoi(argv[3]);
    Random random(7);
    const auto identity = [](int n) {
        vector<int> order(n);
        std::iota(order.begin(), order.end(), 0);
        return order;
    };
    if (n > 0) {
        const auto topology = [&](const string &name, int ep, int group, int d, const vector<int> &r2o, int own, int m, int nodes, int rank,
                                  int count) {
            check(name, reference::topology(ep, group, d, r2o, own * ep, m, nodes, rank, random_order(random, own * ep)), random, count);
        };
        topology("cube 8x2, 8 a rank", 8, 8, 2, cube(), 8, 1, 1, 3, n);
        topology("cube 8x2, 32 a rank", 8, 8, 2, cube(), 32, 1, 2, -1, n);
        topology("cube 8x2, 32 a rank, m 4", 8, 8, 2, cube(), 32, 4, 2, 6, n);
        topology("ring 8x1, 8 a rank", 8, 8, 1, ring(8), 8, 3, 4, 1, n);
        topology("hypercube 16x2, 16 a rank", 16, 16, 2, hypercube(), 16, 1, 2, 9, n);
        topology("torus 8x4x2, 8 a rank", 32, 32, 2, torus(8, 4), 8, 2, 4, 17, n);
        topology("4 cubes, 32 ranks", 32, 8, 2, cube(), 8, 2, 4, 20, n);
        topology("16 pairs, 32 ranks", 32, 2, 1, ring(2), 5, 2, 4, 20, n / 2);
        topology("torus 8x8x2, 64 ranks", 64, 64, 2, torus(8, 8), 4, 1, 8, 11, n);
        topology("torus 8x8x2, 64 ranks, m 2", 64, 64, 2, torus(8, 8), 4, 2, 8, -1, n / 2);
        topology("torus 12x12x2, 144 ranks", 144, 144, 2, torus(12, 12), 4, 1, 18, -1, n / 2);
        for (int k = 0; k < 10; ++k) {
            const int g = 2 + random() % 31, d = k < 4 ? 4 : 1 + random() % 4, m = k < 4 ? 1 : 1 + random() % 3;
            topology("random columns " + std::to_string(g) + "x" + std::to_string(d) + " m " + std::to_string(m), g, g, d,
                     random_columns(random, g, d), m * d + random() % 5, m, 1, (int)(random() % g), n / 2);
        }
        const auto placement = [&](const string &name, int ep, int group, int nodes, int rank, int logical, const vector<int> &phy2log,
                                   int count) { check(name, reference::general(ep, group, nodes, rank, logical, phy2log), random, count); };
        const auto h = loads(random, 256, kZipf);
        const vector<double> weight(h.begin(), h.end());
        placement("EPLB 256/32/288", 32, 32, 4, 13, 256, eplb(weight, 288, 32), n);
        placement("EPLB 256/64/320", 64, 64, 8, 63, 256, eplb(weight, 320, 64), n);
        placement("random 12 on 6, 48 slots", 6, 6, 3, 2, 12, random_placement(random, 12, 48, 1), n);
        placement("random 4 groups of 8, 96 of 64", 32, 8, 4, 9, 64, random_placement(random, 64, 96, 4), n);
        placement("random 1024 on 32, 2048 slots", 32, 32, 4, 9, 1024, random_placement(random, 1024, 2048, 1), n);
        placement("random 1024 on 512, 4096 slots", 512, 512, 64, -1, 1024, random_placement(random, 1024, 4096, 1), n / 4 + 1);
        placement("no replicas", 8, 8, 1, 2, 64, random_order(random, 64), n);
        if (most_ids == 1 << 30) {  // the ranks must run at the same time, which a sanitizer may not allow
            const auto order = random_order(random, 64);
            const auto phy2log = eplb(weight, 272, 4);
            check_exchanging("cube 8x2", [&](int r) { return reference::topology(8, 8, 2, cube(), 64, 1, 2, r, order); }, 8, 4, random);
            check_exchanging("EPLB 256/4/272", [&](int r) { return reference::general(4, 4, 2, r, 256, phy2log); }, 4, 8, random);
        }
        placement("1 rank", 1, 1, 1, 0, 4, {0, 1, 2, 3, 0}, n / 2);
        topology("self copies", 4, 4, 1, {0, 1, 2, 3}, 4, 1, 1, 2, n / 2);
        topology("self copies and others, m 2", 4, 4, 2, {0, 1, 1, 0, 3, 2, 2, 3}, 4, 2, 1, -1, n / 2);
        placement("replicas beside their originals", 4, 4, 1, 2, 6, {0, 0, 1, 1, 2, 3, 4, 5}, n / 2);
        for (int rank : {-1, 3}) {
            if (most_ids < 1 << 30) break;  // a sanitizer reports the errors that are meant
            check_failures("cube 8x2", reference::topology(8, 8, 2, cube(), 64, 1, 1, rank, random_order(random, 64)), random);
            check_failures("EPLB 256/32/288", reference::general(32, 32, 4, rank, 256, eplb(weight, 288, 32)), random);
        }
        const auto cubes = [&](int m) { return reference::topology(32, 8, 2, cube(), 256, m, 4, 20, random_order(random, 256)); };
        check_overflow("4 cubes, 32 ranks", cubes(1), random);
        check_overflow("4 cubes, 32 ranks, m 2", cubes(2), random);
        check_overflow("16 pairs, 32 ranks", reference::topology(32, 2, 1, ring(2), 160, 2, 4, 20, random_order(random, 160)), random);
        check_overflow("EPLB 256/32/288", reference::general(32, 32, 4, 13, 256, eplb(weight, 288, 32)), random);
        check_overflow("random 4 groups of 8, 96 of 64", reference::general(32, 8, 4, 9, 64, random_placement(random, 64, 96, 4)), random);
        printf("%d wrong\n", failures);
    }
    if (timed > 0) {
        const auto big_cube = reference::topology(8, 8, 2, cube(), 256, 1, 1, -1, identity(256));
        const auto h = loads(random, 256, kZipf);
        const auto placed = reference::general(32, 32, 4, -1, 256, eplb(vector<double>(h.begin(), h.end()), 288, 32));
        const auto single = reference::general(8, 8, 1, -1, 256, identity(256));
#ifdef LPLB_PROFILE
        profile("cube", big_cube, 4096, random);
        profile("cube", big_cube, 16384, random);
        profile("EPLB 256/32/288", placed, 4096, random);
        return 0;
#endif
        for (int tokens : {128, 1024, 4096, 8192, 16384, 32768, 65536}) {
            for (int fused : {1 << 20, 0}) timing("cube 8x2, 256 experts", big_cube, tokens, kUniform, timed, random, 0, fused);
        }
        for (int tokens : {4096, 16384}) timing("cube 8x2, 256 experts", big_cube, tokens, kSkewed, timed, random);
        for (int64_t blocks : {1, 4, 8, 16}) timing("cube 8x2, 256 experts", big_cube, 4096, kUniform, timed, random, blocks);
        for (int64_t blocks : {8, 16}) timing("cube 8x2, 256 experts", big_cube, 16384, kUniform, timed, random, blocks);
        for (int tokens : {4096, 16384}) timing("EPLB 256/32/288", placed, tokens, kSkewed, timed, random);
        for (int tokens : {4096, 16384}) timing("no replicas", single, tokens, kUniform, timed, random);
    }
    return failures != 0;
}
