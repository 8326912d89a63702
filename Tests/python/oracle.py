"""What the tests compare lplb with: independent, slow and simple. Nothing here calls the library."""

from __future__ import annotations

import numpy as np
import pytest

FAMILIES = ("normal", "zipf", "log-normal", "sparse", "equal", "zero", "one-hot", "two-hot", "tiny")


def random_loads(rng, n, family):
    """int64 [n] tokens per expert."""
    mean = int(rng.integers(1, 4000))
    if family == "normal":
        loads = np.maximum(rng.normal(1, 0.3, n), 0) * mean
    elif family == "zipf":
        loads = rng.permutation(1 / np.arange(1, n + 1) ** rng.uniform(0.5, 1.5)) * mean * n / 4
    elif family == "log-normal":
        loads = rng.lognormal(0, rng.uniform(0.5, 2), n) * mean
    elif family == "sparse":
        loads = rng.integers(0, 2 * mean, n) * (rng.random(n) < 0.15)
    elif family == "equal":
        loads = np.full(n, mean)
    elif family == "zero":
        loads = np.zeros(n)
    elif family == "one-hot":
        loads = np.zeros(n)
        loads[rng.integers(n)] = mean * n
    elif family == "two-hot":
        loads = rng.integers(0, 3, n)
        loads[rng.choice(n, min(2, n), replace=False)] += mean
    else:
        loads = rng.integers(0, 3, n)
    return loads.astype(np.int64)


def random_placement(rng, ep_size, slots_per_rank, most_replicas):
    """int32 [ep_size * slots_per_rank]: random, every expert at least once, at most most_replicas times, shared ranks included."""
    n_physical = ep_size * slots_per_rank
    replicas = []
    while sum(replicas) < n_physical:
        replicas.append(min(int(rng.integers(1, most_replicas + 1)), n_physical - sum(replicas)))
    phy2log = np.repeat(np.arange(len(replicas)), replicas)
    return rng.permutation(phy2log).astype(np.int32), len(replicas)


def placed_by_topology(r2o, n_physical, ep_size, order):
    """phy2log as the reference's rule says it, slot by slot. order: the experts of the original slots, rank by rank."""
    group_size, columns = r2o.shape
    n_local, n_own = n_physical // ep_size, len(order) // ep_size
    phy2log = np.empty((ep_size, n_local), dtype=np.int64)
    own = np.asarray(order).reshape(ep_size, n_own)
    phy2log[:, :n_own] = own
    for rank in range(ep_size):
        first = rank // group_size * group_size
        for copy in range(n_local - n_own):
            phy2log[rank, n_own + copy] = own[first + r2o[rank - first, copy % columns], copy]
    return phy2log.reshape(-1)


def linear_optima(instances):
    """The fractional optimum of each (loads, phy2log, ep_size), all in one block-diagonal linear program by HiGHS."""
    sparse, linprog = pytest.importorskip("scipy.sparse"), pytest.importorskip("scipy.optimize").linprog  # the other oracles need none

    equal, below, right, cost = [], [], [], []
    for loads, phy2log, ep_size in instances:
        slots, n_logical = len(phy2log), len(loads)
        columns = np.arange(slots)
        equal.append(sparse.csr_matrix((np.ones(slots), (phy2log, columns)), (n_logical, slots + 1)))
        rank = columns // (slots // ep_size)
        rows, cols = np.append(rank, np.arange(ep_size)), np.append(columns, np.full(ep_size, slots))
        below.append(sparse.csr_matrix((np.append(np.ones(slots), -np.ones(ep_size)), (rows, cols)), (ep_size, slots + 1)))
        right.append(loads)
        cost.append(np.append(np.zeros(slots), 1.0))
    upper = sparse.block_diag(below, format="csr")
    result = linprog(np.concatenate(cost), A_ub=upper, b_ub=np.zeros(upper.shape[0]), A_eq=sparse.block_diag(equal, format="csr"),
                     b_eq=np.concatenate(right), method="highs")
    assert result.status == 0, result.message
    ends = np.cumsum([len(c) for c in cost])
    return result.x[ends - 1]


def optimum(linear):
    """The integral optimum for a fractional one: fractions with denominators up to 1,024 are far above HiGHS's tolerance."""
    return int(np.ceil(linear - 1e-4))


def brute_force_optimum(loads, phy2log, ep_size):
    """max over all sets of ranks of ceil(tokens that cannot leave the set / ranks in it)."""
    rank = np.arange(len(phy2log)) // (len(phy2log) // ep_size)
    masks = np.zeros(len(loads), dtype=np.int64)
    np.bitwise_or.at(masks, phy2log, 1 << rank)
    sets = np.arange(1, 1 << ep_size)
    stuck = ((masks[None, :] & ~sets[:, None]) == 0) @ np.asarray(loads, dtype=np.int64)
    sizes = sum((sets >> r) & 1 for r in range(ep_size))
    return int((-(-stuck // sizes)).max())


def rank_loads(tokens, ep_size):
    return np.asarray(tokens).reshape(ep_size, -1).sum(axis=1)


def check_split(loads, phy2log, ep_size, group_size, tokens, groups):
    """A split is feasible, reaches what the info says, and the witness proves that this is the least possible."""
    loads, phy2log, tokens = np.asarray(loads), np.asarray(phy2log), np.asarray(tokens)
    assert (tokens >= 0).all()
    kept = np.zeros(len(loads), dtype=np.int64)
    np.add.at(kept, phy2log, tokens)
    assert (kept == loads).all()
    reached = rank_loads(tokens, ep_size).reshape(-1, group_size)
    assert len(groups) == len(reached)
    for index, (group, ranks) in enumerate(zip(groups, reached)):
        assert group.max_load == ranks.max()
        assert group.total == ranks.sum()
        assert group.mean == ranks.sum() / group_size
        assert group.certified and group.max_load == group.bound
        assert group.gap_solver == 0
        assert set(group.witness) <= set(range(index * group_size, (index + 1) * group_size))
        assert proven(loads, phy2log, ep_size, group.witness) == group.bound


def proven(loads, phy2log, ep_size, witness):
    """The bound of a witness, by the definition: tokens of experts all of whose replicas stand inside, over the ranks, rounded up."""
    rank = np.arange(len(phy2log)) // (len(phy2log) // ep_size)
    outside = set(phy2log[~np.isin(rank, witness)].tolist())
    stuck = sum(int(load) for expert, load in enumerate(loads) if expert not in outside)
    return -(-stuck // len(witness))


def pack(weights, packs):
    """EPLB's greedy packing of one row: (pack of each item, position in it)."""
    room = len(weights) // packs
    index, position = [0] * len(weights), [0] * len(weights)
    if room == 1:
        return list(range(len(weights))), position
    total, filled = [np.float32(0)] * packs, [0] * packs
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        chosen = min((p for p in range(packs) if filled[p] < room), key=lambda p: (total[p], p))
        index[item], position[item] = chosen, filled[chosen]
        total[chosen] = np.float32(total[chosen] + weights[item])
        filled[chosen] += 1
    return index, position


def eplb_row(weight, replicas, groups, nodes, ranks):
    """EPLB of one layer, item by item: (phy2log, which replica each slot is, replicas per expert)."""
    if groups % nodes:
        groups = nodes = 1
    n_logical = len(weight)
    size = n_logical // groups
    weight = [np.float32(w) for w in weight]
    group_node, group_place = pack([np.float32(sum(weight[g * size:(g + 1) * size])) for g in range(groups)], nodes)
    phy2log, which, counts = [-1] * replicas, [-1] * replicas, [0] * n_logical
    for node in range(nodes):
        mine = sorted((g for g in range(groups) if group_node[g] == node), key=lambda g: group_place[g])
        experts = [e for g in mine for e in range(g * size, (g + 1) * size)]
        count = [1] * len(experts)
        slots = [(e, 0) for e in range(len(experts))]
        while len(slots) < replicas // nodes:
            e = max(range(len(experts)), key=lambda i: (weight[experts[i]] / np.float32(count[i]), -i))
            slots.append((e, count[e]))
            count[e] += 1
        rank, place = pack([weight[experts[e]] / np.float32(count[e]) for e, _ in slots], ranks // nodes)
        for (e, copy), r, p in zip(slots, rank, place):
            slot = (node * (ranks // nodes) + r) * (replicas // ranks) + p
            phy2log[slot], which[slot] = experts[e], copy
        for e, expert in enumerate(experts):
            counts[expert] = count[e]
    return phy2log, which, counts
