"""Plays every micro-batch of every layer through every policy and keeps what the report needs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...info import GroupInfo
from ...solve import witness_bound
from .. import check
from ..common import progress
from . import policies
from .engine import Engine, without_replicas
from .options import Options

Int64Array = NDArray[np.int64]

NO_REPLICAS, EVEN, RANDOM, FIXED = "no replicas", "even split", "random replica", "fixed replica"
PROPORTIONAL, LPLB = "proportional", "lplb"


@dataclass
class Series:
    """One policy over all plays. loads: [ranks] each; gap: busiest rank over the proven optimum of its group, minus 1."""

    policy: str
    loads: list[Int64Array] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)
    at_optimum: list[bool] = field(default_factory=list)
    on_rank: int = 0
    on_node: int = 0

    def add(self, taken: Int64Array, bounds: Int64Array, nodes: int) -> None:
        """bounds: [n_groups], the optimum of each group for this policy's placement."""
        loads = check.rank_loads(taken.sum(axis=0), taken.shape[0])
        busiest = loads.reshape(bounds.size, -1).max(axis=1)
        self.loads.append(loads)
        self.gap.append(float((busiest / np.maximum(bounds, 1)).max() - 1) if bounds.any() else 0.0)
        self.at_optimum.append(bool((busiest == bounds).all()))
        rank, node = policies.locality(taken, nodes)
        self.on_rank += rank
        self.on_node += node


@dataclass
class Played:
    """Everything that was measured. played: (layer, micro-batch) of each entry of the series; bound: the largest over the groups."""

    options: Options
    series: list[Series]
    played: list[tuple[int, int]]
    bound: list[int]
    microseconds: list[float]
    skipped: int
    repairs: int = 0
    moves: int = 0  # experts that repairs brought new to a rank

    def of(self, policy: str) -> Series | None:
        return next((series for series in self.series if series.policy == policy), None)


def proven_bounds(groups: list[GroupInfo], loads: Int64Array, phy2log: NDArray[np.int32], ranks: int) -> Int64Array:
    """[n_groups] lower bounds, recomputed from each group's witness, the loads [n_logical] and the placement."""
    return np.array([witness_bound(loads, phy2log, ranks, group.witness) for group in groups], dtype=np.int64)


def play(options: Options) -> Played:
    layout, cut = options.layout, options.cut
    rng = np.random.default_rng(options.seed + 1)
    names = [NO_REPLICAS, EVEN, RANDOM, FIXED, PROPORTIONAL, LPLB]
    series = {name: Series(name) for name in names}
    result = Played(options, [], [], [], [], 0)
    plays = ((layer, batch) for layer in options.layers for batch in range(cut.n_batches))
    engine = Engine(layout)
    try:
        current = -1
        for layer, batch in progress(plays, len(options.layers) * cut.n_batches, "simulate"):
            if layer != current:
                current = layer
                history = cut.history[layer]
                phy2log = engine.place(layer, history, None if cut.snapshots is None else cut.snapshots[:, layer])
                recent, played = np.zeros_like(history), 0
                replicas = engine.replicas()
                baseline = without_replicas(history, layout, replicas)
                choice = policies.fixed_choice(replicas)
            if options.repair and played == options.repair and recent.any():
                phy2log, moves = engine.repair(recent, options.max_moves)
                replicas = engine.replicas()
                choice = policies.fixed_choice(replicas)
                recent, played, result.repairs, result.moves = np.zeros_like(history), 0, result.repairs + 1, result.moves + moves
            counts = cut.counts(layer, batch)
            recent, played = recent + counts.sum(axis=0), played + 1
            if not counts.any():
                result.skipped += 1
                continue
            plans = engine.plan(counts, cut.ids(layer, batch), phy2log)
            bounds = proven_bounds(plans.groups, counts.sum(axis=0), phy2log, layout.ranks)
            taken = {
                EVEN: policies.even(counts, replicas), RANDOM: policies.random(counts, replicas, rng),
                FIXED: policies.fixed(counts, replicas, choice), PROPORTIONAL: policies.proportional(counts, replicas, plans.split),
                LPLB: plans.taken,
            }
            for name, tokens in taken.items():
                series[name].add(tokens, bounds, layout.nodes)
            if baseline is not None:
                alone = policies.even(counts, baseline)
                by_rank = check.rank_loads(alone.sum(axis=0), layout.ranks)
                series[NO_REPLICAS].add(alone, by_rank.reshape(bounds.size, -1).max(axis=1), layout.nodes)
            result.played.append((layer, batch))
            result.bound.append(int(bounds.max()))
            result.microseconds.append(plans.microseconds)
    finally:
        engine.close()
    result.series = [series[name] for name in names if series[name].loads]
    return result
