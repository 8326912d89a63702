"""The sizes of a planner, and its topology or its first placement: the arguments of Planner and of Planner.from_placement, checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .._c import MAX_PHYSICAL
from ..errors import broken_rule
from .arguments import integer
from .host import Array, Int32s, host_integers


@dataclass(frozen=True)
class Shape:
    n_logical: int
    n_physical: int
    group_size: int
    r2o: Int32s  #: [group_size, classes of redundant slots]; none for a placement
    phy2log: Int32s | None  #: None for a topology

    def slot_classes(self) -> Int32s | None:
        """r2o as the library takes it: without columns where no slot is redundant, None for a placement."""
        if self.phy2log is not None:
            return None
        return self.r2o if self.n_physical > self.n_logical else np.empty((self.group_size, 0), dtype=np.int32)


def shape_by_topology(redundant_to_original: Array, n_routed_experts: int, n_logical_routed_experts: int, ep_size: int) -> Shape:
    r2o: Int32s = host_integers("redundant_to_original", redundant_to_original, 2, np.int32, MAX_PHYSICAL)
    group_size, num_redundants = r2o.shape
    if group_size == 0:
        raise broken_rule("redundant_to_original", "must have at least one row", f"shape {list(r2o.shape)}")
    if (np.sort(r2o, axis=0) != np.arange(group_size)[:, None]).any():
        raise broken_rule("redundant_to_original", f"each column must be a permutation of 0 .. {group_size - 1}", r2o.T.tolist())
    n_logical = integer("n_logical_routed_experts", n_logical_routed_experts, 1)
    n_physical = integer("n_routed_experts", n_routed_experts, 1)
    if ep_size % group_size:
        raise broken_rule("ep_size", f"must be a multiple of the topology's {group_size} ranks", ep_size)
    if n_logical % ep_size:
        raise broken_rule("n_logical_routed_experts", f"must be a multiple of ep_size = {ep_size}", n_logical)
    if n_physical < n_logical or (n_physical - n_logical) % (ep_size * max(1, num_redundants)):
        rule = f"must be n_logical_routed_experts = {n_logical} plus a multiple of ep_size * num_redundants = "
        raise broken_rule("n_routed_experts", f"{rule}{ep_size} * {num_redundants}", n_physical)
    if n_physical > n_logical and not num_redundants:
        raise broken_rule("redundant_to_original", "must have a column for each class of redundant slots", f"shape {list(r2o.shape)}")
    return Shape(n_logical, n_physical, group_size, r2o, None)


def shape_by_placement(phy2log: Array, n_logical: int | None, group_size: int | None, ep_size: int) -> Shape:
    slots: Int32s = host_integers("phy2log", phy2log, 1, np.int32, MAX_PHYSICAL)
    if not slots.size:
        raise broken_rule("phy2log", "must have at least one slot", f"shape {list(slots.shape)}")
    experts = integer("n_logical", int(slots.max()) + 1 if n_logical is None else n_logical, 1)
    size = ep_size if group_size is None else integer("group_size", group_size, 1)
    if ep_size % size:
        raise broken_rule("group_size", f"must divide ep_size = {ep_size}", size)
    if slots.size % ep_size:
        raise broken_rule("phy2log", f"must have a multiple of ep_size = {ep_size} slots", slots.size)
    return Shape(experts, slots.size, size, np.empty((size, 0), dtype=np.int32), slots)
