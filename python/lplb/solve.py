"""One-off solve: the best split of loads over a placement, and the check of its proof in plain numpy."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic

import numpy as np
import numpy.typing as npt

from . import _c
from ._ops.arguments import integer
from ._ops.cost import Unit, alike, capacities, unit_number
from ._ops.host import A, Array, Int32s, Int64s, address_of, as_given, host_integers
from .errors import broken_rule, shown
from .info import GroupInfo, group_info


@dataclass(frozen=True)
class Solution(GroupInfo, Generic[A]):
    """The result of solve: GroupInfo, and the tokens of every slot."""

    tokens: A  #: int64 [n_physical]


def solve(loads: A, phy2log: Array, ep_size: int, *, unit: Unit = 1, speed: Array | None = None, fixed: Array | None = None
          ) -> Solution[A]:
    """Splits the tokens of every expert over its replicas so that the busiest rank has as few as possible.

    loads: integers [n_logical], 0 .. 2**40 tokens per logical expert. phy2log: integers [n_physical], the logical expert of every
    slot; rank r owns n_physical / ep_size consecutive slots. All ranks balance among themselves. Host only; tokens are a CPU
    tensor where loads are a tensor. For the same placement again and again make a Planner.
    unit, speed, fixed: other costs than tokens, as in Planner and Planner.set_capacity; the busiest rank is then the one that takes longest.
    """
    tokens_of: Int64s = host_integers("loads", loads, 1, np.int64, _c.MAX_LOGICAL)
    slots: Int32s = host_integers("phy2log", phy2log, 1, np.int32, _c.MAX_PHYSICAL)
    ranks = integer("ep_size", ep_size, 1)
    if tokens_of.size == 0:
        raise broken_rule("loads", "must have one expert at least", f"shape {list(tokens_of.shape)}")
    size = unit_number(unit)
    speeds, costs = capacities(speed, fixed, ranks) if speed is not None or fixed is not None else (None, None)
    tokens = np.empty(slots.size, dtype=np.int64)
    info, level = _c.GroupInfoStruct(), _c.LevelStruct()
    config = _c.SolveConfig(
        loads=address_of(tokens_of), phy2log=address_of(slots), n_logical=tokens_of.size, n_physical=slots.size, ep_size=ranks, unit=size,
        speed=None if speeds is None else address_of(speeds), fixed=None if costs is None else address_of(costs),
        tokens=address_of(tokens), info=ctypes.pointer(info), level=ctypes.pointer(level))
    _c.call(_c.load().solve_with, ctypes.byref(config))
    told = group_info(info, ranks, level=None if size == 1 and alike(speeds, costs) else level)
    return Solution(**vars(told), tokens=as_given(tokens, loads))


def witness_bound(loads: Array, phy2log: Array, ep_size: int, witness: Iterable[int], *, unit: Unit = 1, speed: Array | None = None,
                  fixed: Array | None = None) -> float:
    """The lower bound that a set of ranks proves: the tokens of the experts whose replicas all stand on these ranks must stay there,
    so one of the ranks has at least ceil(tokens / ranks). Recomputes GroupInfo.bound from the loads alone, without the library.

    With unit, speed or fixed it recomputes GroupInfo.level_bound: the least level at which these ranks can hold the units."""
    tokens_of: Int64s = host_integers("loads", loads, 1, np.int64, _c.MAX_LOGICAL)
    slots: Int64s = host_integers("phy2log", phy2log, 1, np.int64, _c.MAX_PHYSICAL)
    ranks = integer("ep_size", ep_size, 1)
    _check_instance(tokens_of, slots, ranks)
    inside = np.zeros(ranks, dtype=bool)
    inside[_ranks(witness, ranks)] = True
    leaves = np.zeros(tokens_of.size, dtype=bool)
    outside = slots[~np.repeat(inside, slots.size // ranks)]
    leaves[outside[outside >= 0]] = True
    size = unit_number(unit)
    units = int(np.count_nonzero(tokens_of[~leaves])) if size == _c.UNIT_EXPERTS else int((-(-tokens_of[~leaves] // size)).sum())
    speeds, costs = capacities(speed, fixed, ranks)
    if alike(speeds, costs):
        return -(-units // int(inside.sum()))
    return _least_level(units, inside, speeds, costs)


def _least_level(units: int, inside: npt.NDArray[np.bool_], speed: Int32s | None, fixed: Int32s | None) -> float:
    """The least multiple of 1/1024, not below the largest fixed, at which these ranks hold the units."""
    speeds = [_c.SPEED_NORMAL] * inside.size if speed is None else [int(value) for value in speed]
    starts = [0] * inside.size if fixed is None else [1024 * int(value) for value in fixed]
    members = [rank for rank in range(inside.size) if inside[rank]]
    low, high = max(starts) - 1, max(starts) + (units << 20)
    while high - low > 1:  # at `high` they hold them, each alone even
        level = (low + high) // 2
        if sum((level - starts[rank]) * speeds[rank] >> 20 for rank in members) >= units:
            high = level
        else:
            low = level
    return high / 1024


def _check_instance(loads: Int64s, slots: Int64s, ranks: int) -> None:
    """As the library does for solve."""
    if slots.size == 0 or slots.size % ranks:
        raise broken_rule("phy2log", f"must have a multiple of ep_size = {ranks} slots, one at least", slots.size)
    if loads.size == 0:
        raise broken_rule("loads", "must have one expert at least", f"shape {list(loads.shape)}")
    for index in np.flatnonzero((loads < 0) | (loads > _c.MAX_LOAD))[:1]:
        raise broken_rule(f"loads[{index}]", f"must lie in 0 ... {_c.MAX_LOAD}", loads[index])
    for index in np.flatnonzero((slots < -1) | (slots >= loads.size))[:1]:
        raise broken_rule(f"phy2log[{index}]", f"must be a logical expert, 0 .. {loads.size - 1}, or -1 for none", slots[index])
    for expert in np.flatnonzero(np.bincount(slots[slots >= 0], minlength=loads.size) == 0)[:1]:
        raise broken_rule("phy2log", "must hold every logical expert", f"no slot for {expert}")


def _ranks(witness: Iterable[int], ranks: int) -> list[int]:
    members: list[int] = []
    try:
        for member in witness:  # of which there may be no end
            rank = integer("witness", member, 0)
            if not 0 <= rank < ranks or rank in members:
                members = []
                break
            members.append(rank)
    except Exception:  # of the values' own methods
        members = []
    if not members:
        raise broken_rule("witness", f"must hold ranks 0 .. {ranks - 1}, each once, one at least", shown(witness))
    return members
