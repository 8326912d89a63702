// From a split to the tokens of one source: which of its own tokens go to which place of an expert. Own rank first, then own node, then
// the rest; the rule of Sources/LPLBSolver/TokenAssigner.swift.
#pragma once

#include "../common.cuh"

namespace lplb {

__device__ __forceinline__ int overlap(int a, int a_end, int b, int b_end) { return max(min(a_end, b_end) - max(a, b), 0); }

// By one thread for one expert with n places. quota(j): tokens of place j; rank(j): its rank in EP; count(s): tokens of source s.
// own: the source; per_node: ranks of a node. emit(j, tokens) once for every place, in order.
// O(places * (places + ranks of a node) + ranks).
template <class Quota, class RankOf, class Count, class Emit>
__device__ __forceinline__ void assign_tokens(int n, Quota quota, RankOf rank, Count count, int own, int per_node, Emit emit) {
    const int own_node = own / per_node;
    // Supply and quota of a node, less what stays on its own rank.
    const auto node_supply = [&](int node) {
        int supply = 0;
#pragma unroll 1
        for (int s = node * per_node; s < (node + 1) * per_node; ++s) supply += count(s);
#pragma unroll 1
        for (int j = 0; j < n; ++j) {
            if (rank(j) / per_node == node) supply -= min(count(rank(j)), quota(j));
        }
        return supply;
    };
    const auto rest_of = [&](int j) { return quota(j) - min(count(rank(j)), quota(j)); };

    // This source within its node: its supply is [start, start + mine).
    int start = 0, mine = count(own), node_quota = 0;
#pragma unroll 1
    for (int s = own_node * per_node; s < own; ++s) start += count(s);
#pragma unroll 1
    for (int j = 0; j < n; ++j) {
        const int r = rank(j);
        if (r / per_node != own_node) continue;
        const int kept = min(count(r), quota(j));
        node_quota += quota(j) - kept;
        if (r < own) start -= kept;
        if (r == own) mine -= kept;
    }
    // Beyond the node: [far_start, far_start + far) among all that the nodes have left.
    const int far = max(start + mine - max(start, node_quota), 0);
    int far_start = 0;
    if (far > 0) {
#pragma unroll 1
        for (int node = 0; node < own_node; ++node) {
            int need = 0;
#pragma unroll 1
            for (int j = 0; j < n; ++j) {
                if (rank(j) / per_node == node) need += rest_of(j);
            }
            far_start += max(node_supply(node) - need, 0);
        }
        far_start += max(start - node_quota, 0);
    }
    int far_quota = 0;  // what the places before j want from other nodes
    int near_quota = 0;
#pragma unroll 1
    for (int j = 0; j < n; ++j) {
        const int r = rank(j);
        const int node = r / per_node;
        const int rest = rest_of(j);
        int tokens = r == own ? min(count(own), quota(j)) : 0;
        int node_start = 0;
        if (node == own_node) {
            node_start = near_quota;
            tokens += overlap(start, start + mine, node_start, node_start + rest);
            near_quota += rest;
        }
        if (far > 0) {
            if (node != own_node) {
#pragma unroll 1
                for (int i = 0; i < j; ++i) {
                    if (rank(i) / per_node == node) node_start += rest_of(i);
                }
            }
            const int wanted = max(node_start + rest - max(node_start, node_supply(node)), 0);
            tokens += overlap(far_start, far_start + far, far_quota, far_quota + wanted);
            far_quota += wanted;
        }
        emit(j, tokens);
    }
}

}  // namespace lplb
