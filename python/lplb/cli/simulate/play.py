"""Plays every micro-batch of every layer through every policy and keeps what the report needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...info import GroupInfo
from ...solve import witness_bound
from .. import check
from ..common import progress
from . import policies
from .cost import Cost
from .engine import Engine, RankPlans, without_replicas
from .options import PLACEMENTS, Layout, Options
from .trace import Cut

Int64Array = NDArray[np.int64]

NO_REPLICAS, EVEN, RANDOM, FIXED = "no replicas", "even split", "random replica", "fixed replica"
PROPORTIONAL, LPLB = "proportional", "lplb"
TOKENS, GREEDY = "lplb by tokens", "greedy, fewest experts"  # where the cost is another one
EPLB_EVEN, EPLB_EXACT = "eplb, even split", "eplb, exact split"  # on EPLB's placement, beside one by another policy
OTHER_PLACEMENTS = (NO_REPLICAS, EPLB_EVEN, EPLB_EXACT)


@dataclass
class Series:
    """One policy over all plays. loads: [ranks] each, levels where the cost is not tokens, see Cost.by_rank; bound: the proven optimum of its placement, the largest over the groups; gap: busiest
    rank over the optimum of its group, minus 1."""

    policy: str
    loads: list[NDArray[Any]] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)  # of what there is to do, however it is split
    bound: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)
    at_optimum: list[bool] = field(default_factory=list)
    on_rank: int = 0
    on_node: int = 0
    inbound: float = 0.0  # tokens that reach a rank from others over the mean load: the largest

    tokens: int = 0

    def add(self, taken: Int64Array, counts: Int64Array, bounds: NDArray[Any], nodes: int, cost: Cost = Cost()) -> None:
        """counts: [ranks, n_logical]; bounds: [n_groups], the optimum of each group for this policy's placement."""
        tokens = check.rank_loads(taken.sum(axis=0), taken.shape[0])
        loads = cost.by_rank(taken.sum(axis=0), taken.shape[0])
        busiest = loads.reshape(bounds.size, -1).max(axis=1)
        self.loads.append(loads)
        self.mean.append(cost.mean(counts.sum(axis=0), taken.shape[0]))
        self.bound.append(bounds.max().item())
        self.tokens += int(tokens.sum())
        self.gap.append(float((busiest / np.where(bounds > 0, bounds, 1)).max() - 1) if bounds.any() else 0.0)
        self.at_optimum.append(bool((busiest == bounds).all()))
        rank, node = policies.locality(taken, nodes)
        self.on_rank += rank
        self.on_node += node
        self.inbound = max(self.inbound, policies.inbound(taken).max() / max(tokens.mean(), 1))


@dataclass(frozen=True)
class Change:
    """A new placement of a layer before a micro-batch. moves: experts that it brings new to a rank."""

    layer: int
    batch: int
    moves: int


@dataclass
class Played:
    """Everything that was measured. played: (layer, micro-batch) of each entry of the series."""

    options: Options
    series: list[Series]
    played: list[tuple[int, int]]
    microseconds: list[float]
    skipped: int
    changes: list[Change] = field(default_factory=list)

    @property
    def moves(self) -> int:
        return sum(change.moves for change in self.changes)

    def of(self, policy: str) -> Series | None:
        return next((series for series in self.series if series.policy == policy), None)


def proven_bounds(groups: list[GroupInfo], loads: Int64Array, phy2log: NDArray[np.int32], ranks: int, cost: Cost = Cost()) -> NDArray[Any]:
    """[n_groups] lower bounds, recomputed from each group's witness, the loads [n_logical] and the placement."""
    return np.array([witness_bound(loads, phy2log, ranks, group.witness, unit=cost.unit, speed=cost.speed) for group in groups])


class Stage:
    """A placement of the layer that is played, its planners, and the loads since it was made."""

    def __init__(self, layout: Layout, cost: Cost) -> None:
        self.engine, self.cost = Engine(layout, cost), cost
        self.by_tokens = None if cost.is_tokens else Engine(layout)  # under the same placements

    def close(self) -> None:
        for engine in (self.engine, self.by_tokens):
            if engine is not None:
                engine.close()

    def place(self, layer: int, cut: Cut) -> None:
        snapshots = None if cut.snapshots is None else cut.snapshots[:, layer]
        slots = self.engine.place(layer, cut.history[layer], snapshots)
        if self.by_tokens is not None:
            self.by_tokens.place(layer, cut.history[layer], snapshots)
        self._take(slots, len(cut.history[layer]))

    def _take(self, phy2log: NDArray[np.int32], n_logical: int) -> None:
        self.phy2log, self.replicas = phy2log, self.engine.replicas()
        self.choice = policies.fixed_choice(self.replicas)
        self.recent, self.played = np.zeros(n_logical, dtype=np.int64), 0

    def change(self, policy: str, max_moves: int | None) -> int:
        """Changes the placement, by the loads since it was made: the moves."""
        phy2log, moves = self.engine.change(policy, self.recent, max_moves)
        if self.by_tokens is not None:
            self.by_tokens.change(policy, self.recent, max_moves)
        self._take(phy2log, len(self.recent))
        return moves

    def plan(self, counts: Int64Array, ids: Int64Array | None) -> tuple[RankPlans, NDArray[Any]]:
        """The plans of all ranks, and the bounds of the groups."""
        plans = self.engine.plan(counts, ids, self.phy2log)
        return plans, proven_bounds(plans.groups, counts.sum(axis=0), self.phy2log, self.engine.layout.ranks, self.cost)


def play(options: Options) -> Played:
    layout, cut, cost = options.layout, options.cut, options.cost
    rng = np.random.default_rng(options.seed + 1)
    names = [NO_REPLICAS, EVEN, RANDOM, FIXED, PROPORTIONAL, EPLB_EVEN, EPLB_EXACT, GREEDY, TOKENS, LPLB]
    series = {name: Series(name) for name in names}
    result = Played(options, [], [], [], 0)
    plays = ((layer, batch) for layer in options.layers for batch in range(cut.n_batches))
    policy = "repair" if options.repair else PLACEMENTS.get(layout.name, "")
    stage, eplb = Stage(layout, cost), None if options.eplb is None else Stage(options.eplb, cost)
    try:
        current = -1
        for layer, batch in progress(plays, len(options.layers) * cut.n_batches, "simulate"):
            if layer != current:
                current = layer
                for each in (stage, eplb):
                    if each is not None:
                        each.place(layer, cut)
                baseline = without_replicas(cut.history[layer], layout, stage.replicas)
            if options.every and stage.played >= options.every and stage.recent.any():
                result.changes.append(Change(layer, batch, stage.change(policy, options.max_moves)))
            counts, ids = cut.counts(layer, batch), cut.ids(layer, batch)
            stage.recent, stage.played = stage.recent + counts.sum(axis=0), stage.played + 1
            if not counts.any():
                result.skipped += 1
                continue
            plans, bounds = stage.plan(counts, ids)
            taken = {
                EVEN: policies.even(counts, stage.replicas), RANDOM: policies.random(counts, stage.replicas, rng),
                FIXED: policies.fixed(counts, stage.replicas, stage.choice),
                PROPORTIONAL: policies.proportional(counts, stage.replicas, plans.split), LPLB: plans.taken}
            if stage.by_tokens is not None:
                taken[TOKENS] = stage.by_tokens.plan(counts, ids, stage.phy2log).taken
            if cost.unit == "experts":
                taken[GREEDY] = policies.fewest_experts(counts, stage.replicas)
            for name, tokens in taken.items():
                series[name].add(tokens, counts, bounds, layout.nodes, cost)
            if eplb is not None:
                theirs, bound = eplb.plan(counts, ids)
                series[EPLB_EVEN].add(policies.even(counts, eplb.replicas), counts, bound, layout.nodes, cost)
                series[EPLB_EXACT].add(theirs.taken, counts, bound, layout.nodes, cost)
            if baseline is not None:
                alone = policies.even(counts, baseline)
                by_rank = cost.by_rank(alone.sum(axis=0), layout.ranks)
                series[NO_REPLICAS].add(alone, counts, by_rank.reshape(bounds.size, -1).max(axis=1), layout.nodes, cost)
            result.played.append((layer, batch))
            result.microseconds.append(plans.microseconds)
    finally:
        for each in (stage, eplb):
            if each is not None:
                each.close()
    result.series = [series[name] for name in names if series[name].loads]
    return result
