"""Which expert goes where, for all layers at once: placements made for exact dispatch, for an even split, or by few changes.

    placed = lplb.place(history, ep_size=32, slots=288)          # history: tokens per expert, [layers, experts]
    planner = lplb.Planner.from_placement(placed.phy2log[0], n_logical=256, group=group)
    ...
    placed = lplb.place(recent, ep_size=32, slots=288, policy="repair", previous=placed.phy2log, max_moves=160)
    planner.update_placement(placed.phy2log[0])

A pure function of its arguments, on the host: equal arguments give equal placements on every rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, NamedTuple, Union

import numpy as np

from . import _c
from ._ops.arguments import integer, one_of
from ._ops.host import A, Array, Int32s, Int64s, address_of, as_given, host_integers, to_host
from .errors import Unsupported, broken_rule, shown
from .judging import Float64s, PlacementReport, loads_of, placement_report

REPORT = np.dtype([("even_balance", np.float64), ("exact_balance", np.float64), ("duplicates", np.int64), ("moves", np.int64)])


class SlotMove(NamedTuple):
    """A slot whose weights come from another rank."""

    layer: int
    expert: int
    source: int  #: slot under the previous placement
    target: int  #: slot under the new one


@dataclass(frozen=True)
class Placed(Generic[A]):
    """What place() found. Arrays are tensors where the history was a tensor."""

    phy2log: A  #: int32 [layers, ep_size * most slots of a rank], the expert of each slot, -1 for none
    even_balance: A  #: float64 [layers], mean / max load of the live ranks on the history, with an even split over replicas
    exact_balance: A  #: the same with the exact split
    duplicates: A  #: int64 [layers], slots that hold an expert which their rank also holds in another slot
    n_moves: A  #: int64 [layers], experts on ranks that did not hold them in the previous placement
    ep_size: int
    nodes: int
    previous: Int32s | None
    history: Float64s | None = None  #: [snapshots, layers, experts], what it was made from

    @cached_property
    def report(self) -> PlacementReport[A]:
        """Balance, homes, the copies that each rank pulls and pushes in training, and the tokens that leave ranks and hosts."""
        if self.history is None:
            raise broken_rule("history", "must be given to report on a placement", None)
        return placement_report(self.phy2log, ep_size=self.ep_size, history=self.history, nodes=self.nodes)

    def moves(self) -> list[SlotMove]:
        """The slots whose expert was not on their rank before, and where to copy it from: the previous holder on the same node, else on
        any; of several the one that has sent least so far, then the lowest slot. A slot of a rank that is dead now may be named where no
        other one holds the expert. Empty without a previous placement."""
        if self.previous is None:
            return []
        new: Int32s = np.asarray(self.phy2log)
        return [move for layer, (now, before) in enumerate(zip(new, self.previous)) for move in self._moves(layer, now, before)]

    def _moves(self, layer: int, now: Int32s, before: Int32s) -> list[SlotMove]:
        width, per_node = now.size // self.ep_size, self.ep_size // self.nodes
        alive = now.reshape(self.ep_size, width).max(1) >= 0
        sent, found = np.zeros(self.ep_size, dtype=np.int64), []
        for target in np.flatnonzero(now >= 0).tolist():
            rank, expert = target // width, int(now[target])
            block = slice(rank * width, (rank + 1) * width)
            if expert in before[block] or expert in now[rank * width:target]:
                continue
            holders = np.flatnonzero(before == expert).tolist()
            if holders:
                source = min(holders, key=lambda slot: (not alive[slot // width], slot // width // per_node != rank // per_node,
                                                        sent[slot // width], slot))
                sent[source // width] += 1
                found.append(SlotMove(layer, expert, source, target))
        return found


def place(history: A, *, ep_size: int, slots: Union[int, Sequence[int], Array], policy: str = "flow", previous: Array | None = None,
          max_moves: int | None = None, nodes: int = 1, groups: int = 1, dead: Sequence[int] = (), tolerance: float = 0.0005,
          even_homes: bool = False) -> Placed[A]:
    """Places the experts of every layer.

    history: tokens per expert, [layers, experts] or [snapshots, layers, experts], finite, >= 0. Several snapshots, such as one of each
    phase or hour, tell "flow" what varies together.
    slots: physical experts in all, remainders going to the lowest live ranks; or for each rank. dead: ranks that hold nothing.
    policy:
      "flow"      for exact dispatch (Planner.run) under loads that drift: the best of several candidates, scored by the solver. With an
                  even split over replicas it can be worse than the others.
      "balanced"  for an even split over replicas: the lightest heaviest rank, within tolerance of the mean; no duplicates.
      "deepseek"  DeepSeek's EPLB, as lplb.eplb.rebalance_experts.
      "repair"    few changes to previous, made where the solver's witness shows that it is tight; 1% of the slots without max_moves.
    previous: the placement in force, integers [layers, ep_size * most slots of a rank], -1 for none. Experts that stay on a rank stay in
    their slot. max_moves: how many experts may come new to a rank, over all layers; it is spent where it helps most. Experts that only
    dead ranks held get a slot in any case, and count. Not with "deepseek", which places anew.
    nodes, groups: hosts, and groups of experts that are selected together. Where nodes divides groups, "balanced" and "deepseek" keep a
    group's experts on one host. moves() prefers sources on the same host.
    even_homes: for training, where the home of an expert keeps its optimizer state: every rank shall be able to own equally many experts, or
    as many +-1 where they do not divide. "flow" and "balanced" swap a few slots for that; it is refused where it cannot be.

    What ranks with equally many slots are called is free ("deepseek" excepted). Without previous, copies of an expert stand on different
    hosts, and with "flow" or even_homes no rank has more copies to send or to get than others over all layers (see Placed.report). With
    previous and without max_moves, as many experts stay where they are as can be found.
    """
    loads = loads_of("history", history)
    snapshots, layers, experts = loads.shape
    ranks = integer("ep_size", ep_size, 1, _c.MAX_RANKS)
    of_rank = _slots_of_ranks(slots, ranks, dead)
    width = int(of_rank.max())
    before = None if previous is None else host_integers("previous", previous, 2, np.int32)
    if before is not None and before.shape != (layers, ranks * width):
        raise broken_rule("previous", f"must be [{layers} layers, {ranks} * {width} slots]", f"shape {list(before.shape)}")
    if max_moves is not None and policy == "deepseek":
        raise broken_rule("max_moves", "must not be given with policy deepseek, which places anew", max_moves)
    if max_moves is not None:
        max_moves = integer("max_moves", max_moves, 0) or _c.PLACE_KEEP
    if not isinstance(tolerance, (int, float, np.number)):
        raise broken_rule("tolerance", "must be a number", shown(tolerance))
    tolerance = float(tolerance)
    if not 0 <= tolerance <= 1:
        raise broken_rule("tolerance", "must lie in 0 .. 1", tolerance)
    phy2log, reports = np.empty((layers, ranks * width), dtype=np.int32), np.empty(layers, dtype=REPORT)
    config = _c.PlaceConfig(
        policy=_c.PLACE_POLICIES[one_of("policy", policy, tuple(_c.PLACE_POLICIES))], n_snapshots=snapshots, n_layers=layers, n_logical=experts,
        n_ranks=ranks, n_slots=width, slots=address_of(of_rank), n_nodes=integer("nodes", nodes, 1), n_groups=integer("groups", groups, 1),
        previous=None if before is None else address_of(before), max_moves=max_moves or 0, tolerance=tolerance or -1.0,
        even_homes=1 if even_homes else 0)
    _c.call(_c.load().place, ctypes.byref(config), address_of(loads), address_of(phy2log), address_of(reports))
    def column(name: str) -> A:
        return as_given(np.ascontiguousarray(reports[name]), history)

    return Placed(as_given(phy2log, history), column("even_balance"), column("exact_balance"), column("duplicates"), column("moves"),
                  ep_size=ranks, nodes=nodes, previous=before, history=loads)


def _slots_of_ranks(slots: Any, ranks: int, dead: Sequence[int]) -> Int64s:
    try:
        named = list(dead)
    except Exception:  # of the value's own methods
        raise broken_rule("dead", "must be a list of ranks", shown(dead)) from None
    gone = sorted({integer("dead", rank, 0, ranks - 1) for rank in named})
    live = [rank for rank in range(ranks) if rank not in gone]
    if not live:
        raise broken_rule("dead", "must leave a rank alive", f"all {ranks}")
    given = to_host("slots", slots)
    if given.ndim == 0:
        total = integer("slots", slots, 1)
        if total > _c.MAX_PHYSICAL:
            raise Unsupported(f"slots: must be at most {_c.MAX_PHYSICAL}, got {total}")
        of_rank = np.zeros(ranks, dtype=np.int64)
        of_rank[live] = total // len(live)
        of_rank[live[: total % len(live)]] += 1
        return of_rank
    of_rank = host_integers("slots", slots, 1, np.int64, _c.MAX_RANKS).copy()
    if of_rank.size != ranks:
        raise broken_rule("slots", f"must be a number in all, or one for each of the {ranks} ranks", f"{of_rank.size} numbers")
    if (of_rank < 0).any() or not of_rank.any():
        raise broken_rule("slots", "must be at least 0 for every rank, and not 0 for all", of_rank.tolist())
    if int(of_rank.max()) > _c.MAX_PHYSICAL:
        raise Unsupported(f"slots: must be at most {_c.MAX_PHYSICAL} for each rank, got {int(of_rank.max())}")
    of_rank[gone] = 0
    if not of_rank.any():
        raise broken_rule("dead", "must leave a rank with slots", gone)
    return of_rank
