"""What planners keep beside their plans: the history that the next placement is made from, and metrics for whoever watches.

    planners = [lplb.Planner.from_placement(layer, n_logical=256, group=group, history=True, metrics=True) for layer in placed.phy2log]
    ...
    history = lplb.history(planners, reset=True)     # [layers, experts]; equal on all ranks that call it at the same place
    placed = lplb.place(history, ep_size=32, slots=288, policy="repair", previous=placed.phy2log, max_moves=160)
    ...
    planners[0].metrics().mean_imbalance             # from any thread at any time; waits for nothing
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from . import _c
from ._ops.arguments import integer, truth
from ._ops.host import Array, Int64s, address_of
from .errors import broken_rule, shown

if TYPE_CHECKING:
    from .planner import Planner


@dataclass(frozen=True)
class Metrics:
    """What a planner's plans have achieved since it was made or its metrics were reset. Sums are exact: equal on the CPU and on a GPU."""

    plans: int
    groups: int  #: groups of ranks that were solved and had tokens, over all plans: those that the ratios are of
    mean_imbalance: float  #: of max_load / mean, see GroupInfo; 1 is perfect; 0 before there is a plan. So is the next
    max_imbalance: float
    mean_gap: float  #: of GroupInfo.gap_placement, what only another placement of the replicas could win
    max_gap: float
    tokens: int  #: of all ranks
    moved: int  #: of them, not to the original of their expert
    to_own_rank: int  #: where the tokens of this planner's rank went, as in Locality
    to_own_node: int
    to_other_nodes: int
    uncertified: int  #: groups without a proof that no split is better: with solver="ipm" only
    overflow: int  #: CUDA: groups not solved since their total did not fit 31 bits; in none of the sums above but those by rank and node
    invalid_ids: int  #: ids out of range; also those of calls that make no plan, such as redirect

    def as_dict(self, prefix: str = "lplb_") -> dict[str, int | float]:
        """The fields by name, as exporters of metrics want them."""
        return {prefix + field.name: getattr(self, field.name) for field in fields(self)}


def read_metrics(planner: Planner) -> Metrics:
    found = _c.MetricsStruct()
    planner._handle.check(planner._handle.library.planner_get_metrics(planner._handle.opened(), ctypes.byref(found)))
    groups, one = max(found.groups, 1), _c.METRICS_ONE
    return Metrics(
        found.plans, found.groups, found.imbalance_sum / groups / one, found.imbalance_max / one, found.gap_sum / groups / one,
        found.gap_max / one, found.tokens, found.moved, found.own_rank, found.own_node, found.other_nodes, found.uncertified,
        found.overflow, found.invalid_ids)


def read_history(planner: Planner, at: int | None, reset: bool) -> Int64s:
    handle = planner._handle
    wanted = _c.ANY_PLAN if at is None else integer("at", at, 0)
    tokens: Int64s = np.empty(handle.n_logical, dtype=np.int64)
    plans = ctypes.c_int64()
    handle.check(handle.library.planner_history(
        handle.opened(), wanted, address_of(tokens), tokens.size, ctypes.byref(plans), planner._stream()))
    if truth("reset", reset):
        handle.check(handle.library.planner_reset(handle.opened(), _c.RECORD_HISTORY, planner._stream()))
    return tokens


def history(planners: Sequence[Planner], at: int | None = None, *, reset: bool = False) -> Array:
    """The histories of several planners, such as those of all layers: int64 [planners, n_logical], for lplb.place. See Planner.history,
    also for at, which holds for each of them. A tensor on the first planner's device where that hands out tensors."""
    try:
        several = list(planners)
        sizes = {planner.n_logical_routed_experts for planner in several}
    except Exception:  # of the value's own methods
        raise broken_rule("planners", "must be a sequence of planners", shown(planners)) from None
    if not several:
        raise broken_rule("planners", "must have at least one planner", "none")
    if len(sizes) > 1:
        raise broken_rule("planners", "must have equally many logical experts", sorted(sizes))
    return several[0]._output(np.stack([read_history(planner, at, reset) for planner in several]))
