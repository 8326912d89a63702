"""Plans of all ranks of an EP group, each made by a planner of its own from the gathered counts, as the processes of a training job do."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

from ...info import GroupInfo
from ...placing import place
from ...planner import Planner
from .. import check
from ..terminal import UsageError
from .cost import Cost
from .options import PLACEMENTS, Layout
from .policies import Replicas

Int64Array = NDArray[np.int64]

MAX_SHARES = 1 << 27  # source ranks * experts * replicas: the policies hold several arrays of so many int64


@dataclass(frozen=True)
class RankPlans:
    """taken: [ranks, n_physical], from the redirected ids themselves where the trace has ids. microseconds: one rank's solve."""

    taken: Int64Array
    split: Int64Array
    groups: list[GroupInfo]
    microseconds: float


class Engine:
    """One placement at a time; `place` replaces it for the next layer."""

    def __init__(self, layout: Layout, cost: Cost = Cost()) -> None:
        self.layout, self.cost = layout, cost
        self._planners: list[Planner] = []

    def close(self) -> None:
        for planner in self._planners:
            planner.close()
        self._planners = []

    def place(self, layer: int, history: Int64Array, snapshots: Int64Array | None = None) -> NDArray[np.int32]:
        """The placement for a history [n_logical] of a layer, by the topology, by a policy or from the file: phy2log [n_physical]. All zero:
        no history. snapshots [snapshots, n_logical]: what adds up to it."""
        layout = self.layout
        if layout.r2o is not None:
            if not self._planners:
                self._planners = [Planner(layout.r2o, layout.n_physical, layout.n_logical, layout.ranks, rank=rank, n_nodes=layout.nodes,
                                          device="cpu", unit=self.cost.unit) for rank in range(layout.ranks)]
                self._set_speed()
            for planner in self._planners:
                planner.update_redundancy_mapping(history if history.any() else None)
        else:
            if layout.slots is not None:
                slots = layout.slots[layer]
            else:
                slots = placed(history, layout.n_physical, layout.ranks, layout.name, snapshots, layout.nodes)
            if not self._planners:
                self._planners = [Planner.from_placement(slots, ep_size=layout.ranks, n_logical=layout.n_logical, rank=rank,
                                                         n_nodes=layout.nodes, device="cpu", unit=self.cost.unit)
                                  for rank in range(layout.ranks)]
                self._set_speed()
            for planner in self._planners:
                planner.update_placement(slots)
        return np.asarray(self._planners[0].phy2log, dtype=np.int32)

    def _set_speed(self) -> None:
        for planner in self._planners if self.cost.speed is not None else []:
            planner.set_capacity(speed=self.cost.speed)

    def change(self, policy: str, loads: Int64Array, max_moves: int | None) -> tuple[NDArray[np.int32], int]:
        """Changes the placement in force by a policy of lplb.place, for loads [n_logical]: phy2log and the moves."""
        changed = place(loads[None].astype(np.float64), ep_size=self.layout.ranks, slots=self.layout.n_physical, policy=policy,
                        previous=np.asarray(self._planners[0].phy2log)[None], max_moves=max_moves, nodes=self.layout.nodes)
        for planner in self._planners:
            planner.update_placement(changed.phy2log[0])
        return changed.phy2log[0], int(changed.n_moves.sum())

    def replicas(self) -> Replicas:
        log2phy = np.asarray(self._planners[0].mapping()[1], dtype=np.int32)
        if self.layout.ranks * log2phy.size > MAX_SHARES:
            raise UsageError(f"--ranks: {self.layout.ranks} ranks, {len(log2phy)} experts and up to {log2phy.shape[1]} replicas of an "
                             f"expert are too many to simulate: their product must be at most {MAX_SHARES}")
        return Replicas(log2phy, self.layout.n_physical, self.layout.ranks, self.layout.nodes)

    def plan(self, counts: Int64Array, ids: Int64Array | None, phy2log: NDArray[np.int32]) -> RankPlans:
        """
        counts: [ranks, n_logical]; ids: [ranks, n] logical ids with these counts, or None. InternalError if a token does not reach a slot
        of its expert.
        """
        taken = np.empty((len(counts), self.layout.n_physical), dtype=np.int64)
        elapsed = np.empty(len(counts))
        for rank, planner in enumerate(self._planners):
            start = perf_counter_ns()
            planner.solve(counts)
            elapsed[rank] = (perf_counter_ns() - start) / 1000
            if ids is None:
                taken[rank] = np.asarray(planner.assignment())
                continue
            physical = np.asarray(planner.redirect(ids[rank]))
            chosen = physical[physical >= 0]
            astray = ((physical < 0) != (ids[rank] < 0)).any() or (phy2log[chosen] != ids[rank][physical >= 0]).any()
            taken[rank] = -1 if astray else np.bincount(chosen, minlength=taken.shape[1])  # -1: conserve refuses it
        check.conserve(taken, counts, phy2log)
        first = self._planners[0]
        return RankPlans(taken, np.asarray(first.split(), dtype=np.int64), first.info().groups, float(np.median(elapsed)))


def placed(history: Int64Array, n_physical: int, ranks: int, name: str = "eplb", snapshots: Int64Array | None = None,
           nodes: int = 1) -> NDArray[np.int32]:
    """A policy's placement of one layer: phy2log [n_physical]. Without history all experts count the same."""
    known = history[None] if snapshots is None else snapshots
    weight = (known if history.any() else np.ones_like(known))[:, None].astype(np.float64)
    slots: NDArray[np.int32] = place(weight, ep_size=ranks, slots=n_physical, policy=PLACEMENTS[name], nodes=nodes).phy2log[0]
    return slots


def without_replicas(history: Int64Array, layout: Layout, replicas: Replicas) -> Replicas | None:
    """
    The baseline: EPLB's reordering of the experts by the same history, one replica each. With a topology that is where the originals
    stand; with any other placement it is EPLB without redundant experts, or None where the experts cannot be dealt out evenly.
    """
    if layout.r2o is not None:
        slots = np.argsort(replicas.rank[:, 0], kind="stable").astype(np.int32)
    elif layout.n_logical % layout.ranks == 0:
        slots = placed(history, layout.n_logical, layout.ranks)
    else:
        return None
    return Replicas(np.argsort(slots).astype(np.int32)[:, None], layout.n_logical, layout.ranks, layout.nodes)
