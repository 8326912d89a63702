// Plain C++ reference of everything the kernels compute, written from the rules and not from the kernels: tables, flow, token assignment.
// Slow and simple; the harness compares the kernels with it bit for bit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "../../cuda/backend.cuh"

namespace reference {

using std::vector;

struct Instance {
    lplbk_shape shape{};
    vector<int> r2o;                // [group_size][n_redundant]
    vector<int> order;              // topology: expert by original slot
    vector<vector<int>> replicas;   // slots by expert, original first
    // places
    vector<vector<int>> place_slot, place_rank;  // by expert
    // bundles, numbered over all groups
    struct Bundle {
        int group, colour, first_slot;
        vector<int> experts, ranks;  // ranks in EP, original first
    };
    vector<Bundle> bundles;
    vector<int> expert_bundle;                 // -1: single place
    vector<vector<std::pair<int, int>>> arcs;  // by EP rank: (bundle, place), in arc order
    vector<int> n_colours;                     // by group; 0: does not sweep
    int n_local() const { return shape.n_physical / shape.ep_size; }
};

inline void finish(Instance &in) {
    lplbk_shape &s = in.shape;
    const int n_local = in.n_local();
    in.place_slot.assign(s.n_logical, {});
    in.place_rank.assign(s.n_logical, {});
    for (int e = 0; e < s.n_logical; ++e) {
        for (int slot : in.replicas[e]) {
            const int rank = slot / n_local;
            if (std::count(in.place_rank[e].begin(), in.place_rank[e].end(), rank)) continue;
            in.place_slot[e].push_back(slot);
            in.place_rank[e].push_back(rank);
        }
    }
    // Bundles by the slot of their first expert.
    const int n_own = s.n_redundant ? s.n_logical / s.ep_size : 0;
    vector<Instance::Bundle> bundles;
    if (s.n_redundant) {
        for (int r = 0; r < s.ep_size; ++r) {
            for (int d = 0; d < s.n_redundant; ++d) {
                Instance::Bundle b{r / s.group_size, 0, r * n_local + d, {}, {}};
                for (int j = 0; j < s.bundle_experts; ++j) b.experts.push_back(in.order[r * n_own + j * s.n_redundant + d]);
                b.ranks = in.place_rank[b.experts[0]];
                if (b.ranks.size() > 1) bundles.push_back(b);
            }
        }
    } else {
        for (int e = 0; e < s.n_logical; ++e) {
            if (in.place_rank[e].size() < 2) continue;
            bundles.push_back({in.place_rank[e][0] / s.group_size, 0, in.place_slot[e][0], {e}, in.place_rank[e]});
        }
        std::stable_sort(bundles.begin(), bundles.end(), [](auto &a, auto &b) { return a.first_slot < b.first_slot; });
    }
    in.n_colours.assign(s.n_groups, 0);
    for (int g = 0; g < s.n_groups; ++g) {
        bool pairs = true;
        int colours = 0;
        vector<vector<char>> used;  // by colour and rank
        for (auto &b : bundles) {
            if (b.group != g) continue;
            pairs &= b.ranks.size() == 2;
            b.colour = 0;
            for (;; ++b.colour) {
                if (b.colour == (int)used.size()) used.push_back(vector<char>(s.ep_size, 0));
                bool free = true;
                for (int r : b.ranks) free &= !used[b.colour][r];
                if (free) break;
            }
            for (int r : b.ranks) used[b.colour][r] = 1;
            colours = std::max(colours, b.colour + 1);
        }
        const bool sweeps = pairs && colours <= 8;
        in.n_colours[g] = sweeps ? colours : 0;
        if (!sweeps) {
            for (auto &b : bundles) {
                if (b.group == g) b.colour = 0;
            }
        }
    }
    std::stable_sort(bundles.begin(), bundles.end(), [](auto &a, auto &b) {
        return a.group != b.group ? a.group < b.group : a.colour != b.colour ? a.colour < b.colour : a.first_slot < b.first_slot;
    });
    in.bundles = bundles;
    in.expert_bundle.assign(s.n_logical, -1);
    in.arcs.assign(s.ep_size, {});
    for (int u = 0; u < (int)bundles.size(); ++u) {
        for (int e : bundles[u].experts) in.expert_bundle[e] = u;
        for (int j = 0; j < (int)bundles[u].ranks.size(); ++j) in.arcs[bundles[u].ranks[j]].push_back({u, j});
    }
}

inline Instance topology(int ep_size, int group_size, int n_redundant, const vector<int> &r2o, int n_logical, int bundle_experts, int n_nodes,
                         int rank, const vector<int> &order) {
    Instance in;
    in.shape = {ep_size,
                group_size,
                ep_size / group_size,
                n_nodes,
                n_logical,
                n_logical + ep_size * bundle_experts * n_redundant,
                n_redundant,
                bundle_experts,
                rank,
                0,
                group_size * n_redundant,
                2 * group_size * n_redundant};
    in.r2o = r2o;
    in.order = order;
    in.replicas.assign(n_logical, {});
    const int n_own = n_logical / ep_size, n_local = in.n_local();
    for (int r = 0; r < ep_size; ++r) {
        for (int i = 0; i < n_own; ++i) in.replicas[order[r * n_own + i]].push_back(r * n_local + i);
    }
    for (int q = 0; q < ep_size; ++q) {
        for (int i = 0; i < bundle_experts * n_redundant; ++i) {
            const int original = q / group_size * group_size + r2o[q % group_size * n_redundant + i % n_redundant];
            in.replicas[order[original * n_own + i]].push_back(q * n_local + n_own + i);
        }
    }
    finish(in);
    int colours = 0;
    bool sweeps = group_size <= 32;
    for (int g = 0; g < in.shape.n_groups; ++g) {
        colours = std::max(colours, in.n_colours[g]);
        sweeps &= in.n_colours[g] > 0 || in.bundles.empty();
    }
    in.shape.colours = !sweeps ? 0 : colours <= 2 ? 2 : colours <= 4 ? 4 : 8;
    return in;
}

inline Instance general(int ep_size, int group_size, int n_nodes, int rank, int n_logical, const vector<int> &phy2log) {
    Instance in;
    const int n_physical = phy2log.size();
    const int in_group = n_physical / ep_size * group_size;
    const int max_bundles = std::min({n_logical, n_physical - n_logical, in_group / 2});
    const int max_arcs = std::min(in_group, 2 * (n_physical - n_logical));
    in.shape = {ep_size, group_size, ep_size / group_size, n_nodes, n_logical, n_physical, 0, 1, rank, 0, max_bundles, max_arcs};
    in.replicas.assign(n_logical, {});
    for (int slot = 0; slot < n_physical; ++slot) in.replicas[phy2log[slot]].push_back(slot);
    finish(in);
    return in;
}

// The device tables of tables.h.
inline vector<int32_t> tables(const Instance &in) {
    const lplbk_shape &s = in.shape;
    const lplbk_layout at = lplbk_layout_of(&s);
    vector<int32_t> t(at.words, 0);
    vector<int> first_bundle(s.n_groups + 1, 0);
    for (auto &b : in.bundles) ++first_bundle[b.group + 1];
    for (int g = 0; g < s.n_groups; ++g) first_bundle[g + 1] += first_bundle[g];
    const auto bundle_number = [&](int u) { return in.bundles[u].group * s.max_bundles + u - first_bundle[in.bundles[u].group]; };

    for (int slot = 0; slot < s.n_physical; ++slot) t[at.slot_expert + slot] = -1;
    for (int e = 0; e < s.n_logical; ++e) {
        for (int slot : in.place_slot[e]) t[at.slot_expert + slot] = e;
    }

    // Slot classes of a topology, by expert; -1: none.
    vector<int> slot_class(s.n_logical, -1);
    const int n_own = s.n_redundant ? s.n_logical / s.ep_size : 0;
    for (int c = 0; c < s.ep_size * s.n_redundant; ++c) {
        t[at.class_bundle + c] = -1;
        for (int j = 0; j < s.bundle_experts && s.n_physical > s.n_logical; ++j) {
            const int e = in.order[c / s.n_redundant * n_own + j * s.n_redundant + c % s.n_redundant];
            slot_class[e] = c;
            if (in.expert_bundle[e] >= 0) t[at.class_bundle + c] = bundle_number(in.expert_bundle[e]);
        }
    }
    const auto put = [&](int32_t *words, int e) {
        const int u = in.expert_bundle[e];
        lplbk_expert(words, e, u >= 0 ? bundle_number(u) : -1 - in.place_rank[e][0], in.place_slot[e][0],
                     slot_class[e] >= 0 ? in.replicas[e][1] : LPLBK_NO_SLOT, slot_class[e]);
    };
    int n_replicated = 0, n_experts = 0;
    for (int e = 0; e < s.n_logical; ++e) t[at.code + e] = in.place_slot[e][0];
    for (auto &bundle : in.bundles) {
        for (int e : bundle.experts) {
            t[at.code + e] = -1 - n_replicated;
            put(&t[at.replicated + 4 * n_replicated++], e);
        }
    }
    t[at.n_bundled] = n_replicated;
    for (int e = 0; e < s.n_logical; ++e) {  // copies beside their original
        if (slot_class[e] < 0 || in.expert_bundle[e] >= 0) continue;
        t[at.code + e] = -1 - n_replicated;
        put(&t[at.replicated + 4 * n_replicated++], e);
    }
    t[at.n_replicated] = n_replicated;
    vector<int> by_slot(s.n_logical);
    std::iota(by_slot.begin(), by_slot.end(), 0);
    std::sort(by_slot.begin(), by_slot.end(), [&](int a, int b) { return in.place_slot[a][0] < in.place_slot[b][0]; });
    for (int g = 0; g < s.n_groups; ++g) {
        int32_t *image = &t[at.image + (int64_t)g * at.image_words];
        image[LPLBK_IMAGE_FIRST_EXPERT] = n_experts;
        for (int u = first_bundle[g]; u < first_bundle[g + 1]; ++u) {
            for (int e : in.bundles[u].experts) put(&t[at.expert + 4 * n_experts++], e);
        }
        for (int e : by_slot) {
            if (in.expert_bundle[e] < 0 && in.place_rank[e][0] / s.group_size == g) put(&t[at.expert + 4 * n_experts++], e);
        }
        image[LPLBK_IMAGE_EXPERTS] = n_experts - image[LPLBK_IMAGE_FIRST_EXPERT];
    }
    for (int g = 0; g < s.n_groups; ++g) {
        int32_t *image = &t[at.image + (int64_t)g * at.image_words];
        const int n_bundles = first_bundle[g + 1] - first_bundle[g];
        image[LPLBK_IMAGE_BUNDLES] = n_bundles;
        image[LPLBK_IMAGE_COLOURS] = in.n_colours[g];
        const int n_lanes = s.group_size > 32 ? 0 : s.colours == 2 || s.colours == 4 ? 4 : 8;
        for (int i = 0; i < n_lanes * 32; ++i) image[at.lanes + i] = lplbk_no_lane(i % 32);
        image[LPLBK_IMAGE_PAIRS] = s.group_size <= 32 && in.n_colours[g] > 0;
        int arc = 0;
        vector<int> start;
        for (int b = 0; b < n_bundles; ++b) {
            const auto &bundle = in.bundles[first_bundle[g] + b];
            if (in.n_colours[g] > 0) {
                for (int c = bundle.colour + 1; c <= in.n_colours[g]; ++c) image[LPLBK_IMAGE_COLOUR + c] = b + 1;
                if (s.group_size <= 32) {
                    const int u = bundle.ranks[0] % s.group_size, v = bundle.ranks[1] % s.group_size;
                    image[at.lanes + bundle.colour * 32 + u] = lplbk_lane(v, b, 0);
                    image[at.lanes + bundle.colour * 32 + v] = lplbk_lane(u, b, 1);
                }
            }
            start.push_back(arc);
            if (s.colours > 0) {
                arc += bundle.ranks.size();
                continue;
            }
            image[at.bundle_start + b] = arc;
            for (int j = 0; j < (int)bundle.ranks.size(); ++j) {
                const int rank = bundle.ranks[j] % s.group_size;
                image[at.arc_slot + arc] = (int32_t)((unsigned)in.place_slot[bundle.experts[0]][j] | (j > 0 ? 0x80000000u : 0u));
                image[at.arc_rank + arc++] = rank;
                if (at.mask_words) image[at.mask + b * at.mask_words + rank / 32] |= 1u << rank % 32;
            }
        }
        image[LPLBK_IMAGE_ARCS] = arc;
        if (s.colours > 0) continue;
        image[at.bundle_start + n_bundles] = arc;
        int entry = 0;
        for (int r = 0; r < s.group_size; ++r) {
            image[at.rank_start + r] = entry;
            for (auto [u, j] : in.arcs[g * s.group_size + r]) {
                const auto &bundle = in.bundles[u];
                const int b = u - first_bundle[g];
                const unsigned flip = bundle.ranks.size() == 2 && bundle.ranks[0] > bundle.ranks[1];
                image[at.rank_arc + entry++] = (int32_t)((unsigned)(start[b] + j) | (unsigned)b << 13 | flip << 31);
            }
        }
        image[at.rank_start + s.group_size] = entry;
    }
    return t;
}

struct Plan {
    vector<int64_t> quota, take;  // by slot
    vector<vector<int64_t>> x;    // by bundle
    struct Group {
        int64_t max_load, bound, total, moved, rounds, certified;
        vector<int> witness;
    };
    vector<Group> groups;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Plan::Group flow(const Instance &in, int g, const vector<int64_t> &loads, vector<vector<int64_t>> &x) {
    const lplbk_shape &s = in.shape;
    const int G = s.group_size, first = g * G;
    vector<int64_t> base(G, 0), load(G, 0), C(in.bundles.size(), 0);
    int64_t total = 0;
    for (int e = 0; e < s.n_logical; ++e) {
        if (in.place_rank[e][0] / G != g) continue;
        total += loads[e];
        if (in.expert_bundle[e] < 0) {
            base[in.place_rank[e][0] - first] += loads[e];
        } else {
            C[in.expert_bundle[e]] += loads[e];
        }
    }
    load = base;
    vector<int> mine;
    bool pairs = true;
    for (int u = 0; u < (int)in.bundles.size(); ++u) {
        if (in.bundles[u].group != g) continue;
        mine.push_back(u);
        const int64_t n = in.bundles[u].ranks.size();
        pairs &= n == 2;
        x[u].assign(n, 0);
        for (int j = 0; j < n; ++j) {
            x[u][j] = C[u] / n + (j < C[u] % n);
            load[in.bundles[u].ranks[j] - first] += x[u][j];
        }
    }
    int64_t T = ceil_div(total, G);
    vector<int> witness(G, 1);
    const int64_t highest = *std::max_element(base.begin(), base.end());
    if (highest > T) {
        T = highest;
        witness.assign(G, 0);
        witness[std::find(base.begin(), base.end(), highest) - base.begin()] = 1;
    }
    const auto balanced = [&] { return *std::max_element(load.begin(), load.end()) <= T; };
    int64_t rounds = 0, certified = 1;
    bool done = balanced();
    if (!done && in.n_colours[g] > 0) {
        for (int sweep = 0; sweep < 2 && !done; ++sweep) {
            for (int u : mine) {  // in colour order; bundles of one colour share no rank
                int64_t &a = load[in.bundles[u].ranks[0] - first], &b = load[in.bundles[u].ranks[1] - first];
                int64_t d = (a - b) / 2;
                d = std::min(std::max(d, -x[u][1]), x[u][0]);
                x[u][0] -= d, x[u][1] += d, a -= d, b += d;
            }
            done = balanced();
        }
    }
    while (!done) {
        if (balanced()) break;
        if (rounds == lplbk_max_rounds(G)) {
            certified = 0;
            break;
        }
        ++rounds;
        vector<int> level(G, -1);
        int levels = 0;
        for (int r = 0; r < G; ++r) level[r] = load[r] < T ? 0 : -1;
        const auto unreached = [&] {
            for (int r = 0; r < G; ++r) {
                if (load[r] > T && level[r] < 0) return true;
            }
            return false;
        };
        bool cut = false;
        while (unreached()) {
            vector<int> joined;
            for (int r = 0; r < G; ++r) {
                if (level[r] >= 0) continue;
                bool joins = false;
                for (auto [u, j] : in.arcs[first + r]) {
                    if (x[u][j] <= 0) continue;
                    for (int q : in.bundles[u].ranks) joins |= q != first + r && level[q - first] == levels;
                }
                if (joins) joined.push_back(r);
            }
            if (joined.empty()) {
                cut = true;
                break;
            }
            ++levels;
            for (int r : joined) level[r] = levels;
        }
        bool some = false;
        for (int r = 0; r < G; ++r) some |= load[r] > T && level[r] >= 0;
        if (cut && (!some || rounds <= 32)) {
            int64_t held = 0, n = 0;
            for (int r = 0; r < G; ++r) {
                witness[r] = level[r] < 0;
                if (level[r] < 0) held += load[r], ++n;
            }
            if (ceil_div(held, n) <= T) abort();
            T = ceil_div(held, n);
            continue;
        }
        for (int step = levels; step >= 1; --step) {
            const vector<int64_t> before = load;
            for (int r = 0; r < G; ++r) {
                if (level[r] != step || before[r] <= T) continue;
                int64_t excess = before[r] - T;
                for (auto [u, j] : in.arcs[first + r]) {
                    for (int k = 0; k < (int)in.bundles[u].ranks.size(); ++k) {
                        const int q = in.bundles[u].ranks[k] - first;
                        if (q == r || level[q] != step - 1) continue;
                        int64_t amount = std::min(excess, x[u][j]);
                        if (step == 1) amount = std::min(amount, std::max<int64_t>(0, T - before[q]));
                        if (amount <= 0) continue;
                        x[u][j] -= amount, x[u][k] += amount;
                        load[r] -= amount, load[q] += amount;
                        excess -= amount;
                    }
                }
            }
        }
        if (rounds <= 32) continue;
        // What givers have above T goes to takers: ranks that were below T and have not been givers.
        vector<int> gives(G), takes(G);
        for (int r = 0; r < G; ++r) gives[r] = level[r] == 1 && load[r] > T, takes[r] = level[r] == 0;
        do {
            const vector<int64_t> before = load;
            for (int r = 0; r < G; ++r) {
                if (!gives[r]) continue;
                int64_t excess = before[r] - T;
                for (int turn = 0; turn < 2; ++turn) {
                    for (auto [u, j] : in.arcs[first + r]) {
                        for (int k = 0; k < (int)in.bundles[u].ranks.size(); ++k) {
                            const int q = in.bundles[u].ranks[k] - first;
                            if (q == r || !takes[q]) continue;
                            const int64_t amount = std::min({excess, x[u][j], turn == 0 ? std::max<int64_t>(0, T - before[q]) : excess});
                            x[u][j] -= amount, x[u][k] += amount;
                            load[r] -= amount, load[q] += amount;
                            excess -= amount;
                        }
                    }
                }
            }
            for (int r = 0; r < G; ++r) {
                gives[r] = takes[r] && load[r] > T;
                takes[r] = takes[r] && load[r] <= T;
            }
        } while (std::count(gives.begin(), gives.end(), 1) > 0);
    }
    return {*std::max_element(load.begin(), load.end()), T, total, 0, rounds, certified, witness};
}

inline int64_t overlap(int64_t a, int64_t an, int64_t b, int64_t bn) {
    return std::max<int64_t>(std::min(a + an, b + bn) - std::max(a, b), 0);
}

// take[source][place] of one expert, tokens handed out one step at a time.
inline vector<vector<int64_t>> assign(vector<int64_t> supply, vector<int64_t> quota, const vector<int> &rank, int per_node) {
    const int S = supply.size(), P = quota.size();
    vector<vector<int64_t>> take(S, vector<int64_t>(P, 0));
    for (int s = 0; s < S; ++s) {
        for (int j = 0; j < P; ++j) {
            if (rank[j] != s) continue;
            const int64_t own = std::min(supply[s], quota[j]);
            take[s][j] += own, supply[s] -= own, quota[j] -= own;
        }
    }
    const auto match = [&](int from, int to, bool all) {
        int j = 0;
        for (int s = from; s < to; ++s) {
            while (supply[s] > 0 && j < P) {
                if ((!all && (rank[j] < from || rank[j] >= to)) || quota[j] == 0) {
                    ++j;
                    continue;
                }
                const int64_t amount = std::min(supply[s], quota[j]);
                take[s][j] += amount, supply[s] -= amount, quota[j] -= amount;
            }
        }
    };
    for (int node = 0; node < S / per_node; ++node) match(node * per_node, (node + 1) * per_node, false);
    match(0, S, true);
    return take;
}

// counts: [n_sources][n_logical]
inline Plan solve(const Instance &in, const vector<int64_t> &counts, int n_sources) {
    const lplbk_shape &s = in.shape;
    vector<int64_t> loads(s.n_logical, 0);
    for (int i = 0; i < n_sources; ++i) {
        for (int e = 0; e < s.n_logical; ++e) loads[e] += counts[(int64_t)i * s.n_logical + e];
    }
    Plan plan;
    plan.quota.assign(s.n_physical, 0);
    plan.take.assign(s.n_physical, 0);
    plan.x.resize(in.bundles.size());
    for (int g = 0; g < s.n_groups; ++g) plan.groups.push_back(flow(in, g, loads, plan.x));
    vector<int64_t> cumulative(in.bundles.size(), 0);
    vector<vector<int64_t>> quota(s.n_logical);
    for (int e = 0; e < s.n_logical; ++e) {
        if (in.expert_bundle[e] < 0) quota[e] = {loads[e]};
    }
    for (int u = 0; u < (int)in.bundles.size(); ++u) {
        const auto &b = in.bundles[u];
        if (b.experts.size() == 1) {
            quota[b.experts[0]] = plan.x[u];
            continue;
        }
        const int64_t C = plan.x[u][0] + plan.x[u][1];
        int64_t before = 0;
        for (int e : b.experts) {
            const int64_t after = before + loads[e];
            const int64_t second = C ? plan.x[u][1] * after / C - plan.x[u][1] * before / C : 0;
            quota[e] = {loads[e] - second, second};
            before = after;
        }
    }
    for (int e = 0; e < s.n_logical; ++e) {
        vector<int64_t> take = quota[e];
        if (n_sources > 1 && s.rank >= 0) {
            vector<int64_t> supply;
            for (int i = 0; i < n_sources; ++i) supply.push_back(counts[(int64_t)i * s.n_logical + e]);
            take = assign(supply, quota[e], in.place_rank[e], s.ep_size / s.n_nodes)[s.rank];
        }
        for (int j = 0; j < (int)quota[e].size(); ++j) {
            plan.quota[in.place_slot[e][j]] = quota[e][j];
            plan.take[in.place_slot[e][j]] = take[j];
            if (j > 0) plan.groups[in.place_rank[e][0] / s.group_size].moved += quota[e][j];
        }
    }
    return plan;
}

}  // namespace reference
