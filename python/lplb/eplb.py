"""Expert placement from a history of loads: which expert each slot of each rank holds (EPLB).

A pure function of its arguments, on the host: equal weights give equal placements on every rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from . import _c
from ._ops.arguments import integer, one_of
from ._ops.host import A, Array, Int64s, address_of, as_given, enough_memory, host_integers, host_numbers
from .errors import Unsupported, broken_rule
from .placing import place

MOST_SLOTS = 2**31 - 1  # of all layers of a placement that is taken as the old one


def rebalance_experts(weight: A, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int, *, policy: str = "deepseek"
                      ) -> tuple[A, A, A]:
    """DeepSeek's EPLB for several layers: replicate the heaviest experts, pack the replicas evenly on the GPUs.

    weight: tokens per logical expert [layers, n_logical], finite, >= 0. num_replicas: physical experts in all, a multiple of
    num_gpus. num_groups: groups of experts that are selected together; num_nodes: hosts. Hierarchical (groups to nodes, replicas
    inside their node) where num_groups % num_nodes == 0, global otherwise. Ties go to the lowest index. policy: another one of lplb.place.

    Returns (phy2log [layers, num_replicas], log2phy [layers, n_logical, most replicas], -1 padded, logcnt [layers, n_logical]), all
    int64: CPU tensors for a tensor, arrays for an array.
    """
    phy2log, log2phy, logcnt = _rebalance(weight, num_replicas, num_groups, num_nodes, num_gpus, "num_gpus", policy)
    return as_given(phy2log, weight), as_given(log2phy, weight), as_given(logcnt, weight)


def _rebalance(weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int, ranks_name: str,
               policy: str = "deepseek", old: Array | None = None, max_moves: int | None = None) -> tuple[Int64s, Int64s, Int64s]:
    with enough_memory("weight"):
        weights: npt.NDArray[np.float32] = host_numbers("weight", weight, np.float32, 2)
    layers, n_logical = weights.shape
    if n_logical == 0:
        raise broken_rule("weight", "must have at least one expert", f"shape {list(weights.shape)}")
    replicas, groups = integer("num_replicas", num_replicas, 1), integer("num_groups", num_groups, 1)
    nodes, ranks = integer("num_nodes", num_nodes, 1), integer(ranks_name, num_ranks, 1)
    if replicas < n_logical:
        raise broken_rule("num_replicas", f"must be at least the {n_logical} logical experts", replicas)
    if replicas % ranks:
        raise broken_rule("num_replicas", f"must be a multiple of {ranks_name} = {ranks}", replicas)
    if groups % nodes == 0:  # hierarchical; the global form knows neither groups nor nodes
        if ranks % nodes:
            raise broken_rule(ranks_name, f"must be a multiple of num_nodes = {nodes}", ranks)
        if n_logical % groups:
            raise broken_rule("num_groups", f"must divide the {n_logical} logical experts", groups)
    if replicas > _c.MAX_EPLB_PHYSICAL:
        raise Unsupported(f"num_replicas: must be at most {_c.MAX_EPLB_PHYSICAL}, got {replicas}")
    with enough_memory("num_replicas"):
        if one_of("policy", policy, tuple(_c.PLACE_POLICIES)) == "deepseek" and max_moves is None:
            return _placed(weights, replicas, groups, nodes, ranks)
        placed = place(weights, ep_size=ranks, slots=replicas, policy=policy, nodes=nodes, groups=groups, previous=old, max_moves=max_moves)
        return described(placed.phy2log.astype(np.int64), n_logical)


def described(phy2log: Int64s, n_logical: int) -> tuple[Int64s, Int64s, Int64s]:
    """phy2log with its log2phy and logcnt."""
    layers, slots = phy2log.shape
    order = np.argsort(phy2log, axis=1, kind="stable")
    sorted_experts = np.take_along_axis(phy2log, order, axis=1)
    logcnt = np.stack([np.bincount(row, minlength=n_logical) for row in phy2log]) if layers else np.zeros((0, n_logical), dtype=np.int64)
    first = np.cumsum(logcnt, axis=1) - logcnt
    log2phy = np.full((layers, n_logical, int(logcnt.max()) if logcnt.size else 1), -1, dtype=np.int64)
    log2phy[np.arange(layers)[:, None], sorted_experts, np.arange(slots) - np.take_along_axis(first, sorted_experts, axis=1)] = order
    return phy2log, log2phy, logcnt.astype(np.int64)


def _placed(weights: npt.NDArray[np.float32], replicas: int, groups: int, nodes: int, ranks: int) -> tuple[Int64s, Int64s, Int64s]:
    layers, n_logical = weights.shape
    phy2log = np.empty((layers, replicas), dtype=np.int64)
    replica = np.empty((layers, replicas), dtype=np.int64)
    logcnt = np.empty((layers, n_logical), dtype=np.int64)
    _c.call(_c.load().eplb_rebalance, address_of(weights), layers, n_logical, replicas, groups, nodes, ranks, address_of(phy2log),
            address_of(replica), address_of(logcnt))
    log2phy = np.full((layers, n_logical, int(logcnt.max()) if logcnt.size else 1), -1, dtype=np.int64)
    log2phy[np.arange(layers)[:, None], phy2log, replica] = np.arange(replicas)
    return phy2log, log2phy, logcnt


class EplbPolicy:
    """EPLB in the form of vLLM's policies."""

    @classmethod
    def rebalance_experts(cls, weight: A, num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int,
                          old_global_expert_indices: Array | None = None, *, policy: str = "deepseek", max_moves: int | None = None) -> A:
        """phy2log int64 [layers, num_replicas]; arguments as for the function of this name.

        old_global_expert_indices: the placement in force, [layers, num_replicas]. Experts that stay on a rank then keep their slots, so
        that no weights move inside a rank. Which rank holds what does not depend on it, unless policy is "repair" or max_moves is given,
        for which it must have the shape of the result. policy, max_moves: of lplb.place.
        """
        follows = policy == "repair" or max_moves is not None
        phy2log = _rebalance(weight, num_replicas, num_groups, num_nodes, num_ranks, "num_ranks", policy,
                             old_global_expert_indices if follows else None, max_moves)[0]
        if old_global_expert_indices is not None:
            old = host_integers("old_global_expert_indices", old_global_expert_indices, 2, np.int64, MOST_SLOTS)
            if old.shape == phy2log.shape:  # another number of slots: every slot is new
                phy2log = keep_slots(phy2log, old, num_ranks)
        return as_given(phy2log, weight)


def keep_slots(phy2log: Int64s, old: Int64s, num_ranks: int) -> Int64s:
    """phy2log [layers, slots] reordered inside each rank, so that an expert which the rank already held stays in its slot.

    An expert that stands there several times keeps as many slots as both placements have of it. The others fill the free slots in
    their order. O(slots per rank ** 2) vector operations over all ranks and layers at once.
    """
    phy2log = host_integers("phy2log", phy2log, 2, np.int64, MOST_SLOTS)
    old = host_integers("old", old, 2, np.int64, MOST_SLOTS)
    ranks = integer("num_ranks", num_ranks, 1)
    if old.shape != phy2log.shape:
        raise broken_rule("old", f"must have the shape of phy2log, {list(phy2log.shape)}", f"shape {list(old.shape)}")
    if phy2log.shape[1] == 0 or phy2log.shape[1] % ranks:
        raise broken_rule("num_ranks", f"must divide the {phy2log.shape[1]} slots of phy2log, of which there is one at least", ranks)
    rows = phy2log.reshape(-1, phy2log.shape[1] // ranks)
    before = old.reshape(rows.shape)
    row = np.arange(len(rows))
    waiting = np.ones(rows.shape, dtype=bool)  # experts of the new placement without a slot yet
    result = np.full(rows.shape, -1, dtype=np.int64)
    free = np.ones(rows.shape, dtype=bool)  # slots of the result that nothing has been put into
    for slot in range(rows.shape[1]):
        stays = (rows == before[:, slot, None]) & waiting
        found = stays.any(axis=1)
        first = stays.argmax(axis=1)
        result[found, slot] = before[found, slot]
        waiting[row[found], first[found]] = free[found, slot] = False
    # Row by row both masks have equally many elements, so row-major order pairs each newcomer with its free slot.
    result[free] = rows[waiting]
    return result.reshape(phy2log.shape)
