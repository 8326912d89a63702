"""
Where each policy sends the tokens of a micro-batch. The layer is timed with these physical ids; weights' values do not matter for time, so
that one layer, whose experts stay in order, serves every placement with as many slots a rank.

    none          experts in order, no replicas
    packed        experts placed by EPLB from the history, no replicas: the honest competitor
    even          EPLB's own replicas, and its even split over them
    random, fixed, proportional     replicas of the topology: drawn for every token; one for each source; each source the same shares
    lplb          replicas of the topology, planned by the layer inside the time
    forced        each expert of each rank gets the same number of rows, no replicas
    fair          each rank gets the same number of rows, in experts as uneven as packed ones, no replicas
    empty         packed, in a layer whose slots for copies stay empty
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ....eplb import rebalance_experts
from ....planner import Planner
from ...check import conserve
from ...simulate import policies
from ...simulate.engine import placed
from ...simulate.policies import Replicas

Int64Array = NDArray[np.int64]

PLAIN = ("none", "packed", "forced", "fair")  # no slots for copies
COPIED = ("even", "random", "fixed", "proportional", "lplb", "empty")
POLICIES = (*PLAIN, *COPIED)


@dataclass(frozen=True)
class Routed:
    """What one rank hands to the layer, and what all ranks get. physical None: the layer plans."""

    ids: Int64Array  # [tokens, k] experts, as the layer's planner knows them: those that stand in the physical slots there
    physical: Int64Array | None
    sizes: Int64Array  # [ranks, slots a rank] rows


@dataclass(frozen=True)
class Batch:
    """One micro-batch: history [n_experts], ids [ranks, tokens, k]."""

    history: Int64Array
    ids: Int64Array
    number: int

    @property
    def ranks(self) -> int:
        return len(self.ids)

    def counts(self) -> Int64Array:
        """[ranks, n_experts]"""
        return np.stack([np.bincount(one.ravel(), minlength=len(self.history)) for one in self.ids])


def columns(ranks: int, slots: int) -> NDArray[np.int32]:
    """A topology redundant_to_original [ranks, slots]: the next ranks in a ring. For 4 ranks and 2 slots that is SQUARE_4P2E."""
    return np.stack([(np.arange(ranks) + 1 + slot % (ranks - 1)) % ranks for slot in range(slots)], axis=1).astype(np.int32)


def packed_position(history: Int64Array, ranks: int) -> Int64Array:
    """[n_experts] the slot of each expert, placed by EPLB without replicas."""
    return np.argsort(placed(history, len(history), ranks)).astype(np.int64)


def plain(policy: str, batch: Batch, rank: int) -> Routed:
    """A policy without replicas."""
    n_experts, ids = len(batch.history), batch.ids[rank]
    if policy in ("none", "packed"):
        position = np.arange(n_experts) if policy == "none" else packed_position(batch.history, batch.ranks)
        sizes = np.bincount(position, batch.counts().sum(0), n_experts).astype(np.int64)
        return Routed(position[ids], position[ids], sizes.reshape(batch.ranks, -1))
    sizes = forced_sizes(batch) if policy == "forced" else fair_sizes(batch)
    physical = dealt(sizes, rank, np.random.default_rng([batch.number, rank])).reshape(ids.shape)
    return Routed(physical, physical, sizes)


def forced_sizes(batch: Batch) -> Int64Array:
    """[ranks, experts a rank], all equal, or within one row where the tokens cannot be divided."""
    each, n_local = batch.ids[0].size, len(batch.history) // batch.ranks
    return np.tile(each // n_local + (np.arange(n_local) < each % n_local), (batch.ranks, 1)).astype(np.int64)


def fair_sizes(batch: Batch) -> Int64Array:
    """[ranks, experts a rank]: packed's, scaled so that each rank has the same number of rows."""
    each = batch.ids[0].size
    return np.stack([scaled(sizes, each) for sizes in plain("packed", batch, 0).sizes])


def scaled(sizes: Int64Array, total: int) -> Int64Array:
    """Whole numbers in proportion to sizes, with this sum: the largest remainders are rounded up."""
    exact = (sizes if sizes.any() else np.ones_like(sizes)).astype(np.float64)
    exact *= total / exact.sum()
    whole = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: total - int(whole.sum())]] += 1
    return whole


def dealt(sizes: Int64Array, rank: int, rng: np.random.Generator) -> Int64Array:
    """One source's part of these rows: every ranks-th of them, in random order."""
    return rng.permutation(np.repeat(np.arange(sizes.size), sizes.ravel())[rank :: len(sizes)])


def dispatched(ids: Int64Array, taken: Int64Array, log2phy: NDArray[np.int32]) -> Int64Array:
    """Physical ids of one source's ids, so many to each replica as taken [n_physical] says; in order, the first to the first replica."""
    slots = log2phy[log2phy >= 0]
    physical = np.empty(ids.size, dtype=np.int64)
    physical[ids.ravel().argsort(kind="stable")] = np.repeat(slots, taken[slots])
    return physical.reshape(ids.shape)


class Copies:
    """
    The policies with replicas, on so many slots a rank. The layer's own planner keeps the experts in order; a micro-batch's placement by
    history has the same topology, so its ids are renamed to stand where the history puts them: nothing moves between micro-batches.
    """

    def __init__(self, n_experts: int, ranks: int, slots: int) -> None:
        self.ranks, self.slots, self.n_physical = ranks, slots, n_experts + ranks * slots
        self.topology = columns(ranks, slots)
        self._planner = Planner(self.topology, self.n_physical, n_experts, ranks, device="cpu")
        self.in_order = np.asarray(self._planner.phy2log).copy()  # of the layer's planner
        self.originals = np.asarray(self._planner.mapping()[1])[:, 0].astype(np.int64)

    def close(self) -> None:
        self._planner.close()

    def place(self, history: Int64Array) -> tuple[NDArray[np.int32], Int64Array]:
        """log2phy, and the name of each expert in the layer's planner."""
        log2phy = np.asarray(self._planner.update_redundancy_mapping(history if history.any() else None)[1])
        return log2phy, self.in_order[log2phy[:, 0]].astype(np.int64)

    def planned(self, counts: Int64Array) -> tuple[Int64Array, float]:
        """Rows [ranks, slots a rank] of the exact split under the placement, and how far it lies above the mean."""
        return exact(self._planner, counts)

    def routed(self, batch: Batch, rank: int, chosen: tuple[str, ...]) -> Iterator[tuple[str, Routed, float]]:
        """(policy, what it does, placement gap) for the chosen ones of COPIED."""
        counts, ids = batch.counts(), batch.ids[rank]
        log2phy, name = self.place(batch.history)
        sizes, gap = self.planned(counts)
        replicas = Replicas(log2phy, self.n_physical, self.ranks, 1)
        for policy in chosen:
            if policy == "lplb":
                yield policy, Routed(name[ids], None, sizes), gap
            elif policy == "empty":
                position = packed_position(batch.history, self.ranks)
                physical = self.originals[position]
                rows = np.bincount(physical, counts.sum(0), self.n_physical).astype(np.int64)
                yield policy, Routed(position[ids], physical[ids], rows.reshape(self.ranks, -1)), gap
            elif policy == "even":
                theirs = eplb_replicas(batch.history, self.n_physical, self.ranks)
                yield policy, self._by_counts(policies.even(counts, theirs), theirs, batch, rank), gap
            else:
                yield policy, self._by_counts(self._taken(policy, counts, replicas, sizes.ravel(), batch), replicas, batch, rank), gap

    def _taken(self, policy: str, counts: Int64Array, replicas: Replicas, split: Int64Array, batch: Batch) -> Int64Array:
        if policy == "random":
            return policies.random(counts, replicas, np.random.default_rng([7, batch.number]))
        if policy == "fixed":
            return policies.fixed(counts, replicas, policies.fixed_choice(replicas))
        return policies.proportional(counts, replicas, split)

    def _by_counts(self, taken: Int64Array, replicas: Replicas, batch: Batch, rank: int) -> Routed:
        conserve(taken, batch.counts(), experts_of(replicas))
        physical = dispatched(batch.ids[rank], taken[rank], replicas.log2phy)
        return Routed(self.in_order[physical].astype(np.int64), physical, taken.sum(0).reshape(self.ranks, -1))


def eplb_replicas(history: Int64Array, n_physical: int, ranks: int) -> Replicas:
    weight = (history if history.any() else np.ones_like(history))[None].astype(np.float32)
    log2phy = np.asarray(rebalance_experts(weight, n_physical, 1, 1, ranks)[1])[0]
    return Replicas(log2phy.astype(np.int32), n_physical, ranks, 1)


def experts_of(replicas: Replicas) -> Int64Array:
    """[n_physical] the expert of every slot."""
    phy2log, exists = np.empty(replicas.n_physical, dtype=np.int64), replicas.log2phy >= 0
    phy2log[replicas.log2phy[exists]] = np.nonzero(exists)[0]
    return phy2log


def exact(planner: Planner, counts: Int64Array) -> tuple[Int64Array, float]:
    """Rows [ranks, slots a rank] of the planner's split of these counts, and how far its maximum lies above the mean, rounded up."""
    planner.solve(counts)
    gap = max(group.max_load / max(-(-group.total // planner.group_size), 1) for group in planner.info().groups) - 1
    return np.asarray(planner.split(), dtype=np.int64).reshape(planner.ep_size, -1), gap


def imbalance(sizes: Int64Array) -> float:
    """max / mean of the ranks' rows."""
    loads = sizes.sum(1)
    return float(loads.max() / max(loads.mean(), 1e-9))
