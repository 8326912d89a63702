"""Other ways to the same results, timed in the same run: an LP solver, EPLB in plain Python, and bare passes over the ids."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...planner import Planner
from .. import check
from .kit import time_one

Int64Array = NDArray[np.int64]


def highs_us(planner: Planner, loads: Sequence[Int64Array]) -> float | None:
    """Median microseconds of scipy's HiGHS for the fractional problem, matrices made beforehand; None without scipy."""
    try:
        linprog = importlib.import_module("scipy.optimize").linprog
        csr_matrix = importlib.import_module("scipy.sparse").csr_matrix
    except ImportError:
        return None
    held = check.hosts(np.asarray(planner.phy2log), planner.n_logical_routed_experts, planner.ep_size)
    expert, rank = np.nonzero(held)
    n = expert.size
    one = np.ones(n)
    shares = csr_matrix((one, (expert, np.arange(n))), shape=(held.shape[0], n + 1))
    load = csr_matrix((np.append(one, -np.ones(planner.ep_size)), (np.append(rank, np.arange(planner.ep_size)),
                                                                     np.append(np.arange(n), np.full(planner.ep_size, n)))))
    cost = np.zeros(n + 1)
    cost[n] = 1
    times = [time_one(_linprog(linprog, cost, load, np.zeros(planner.ep_size), shares, each.astype(np.float64)), 1)[0] for each in loads]
    return float(np.median(times))


def _linprog(linprog: Callable[..., Any], *problem: Any) -> Callable[[], Any]:
    return lambda: linprog(*problem, method="highs")


def numpy_passes(ids: NDArray[np.int64], n_logical: int) -> Callable[[], Any]:
    """Counting the ids and one look-up for each: the least that any numpy program would do."""
    lookup = np.arange(n_logical)
    return lambda: (np.bincount(ids.ravel(), minlength=n_logical), lookup[ids])


def eplb(weight: Sequence[Sequence[float]], n_physical: int, n_groups: int, n_nodes: int, n_ranks: int) -> list[list[int]]:
    """EPLB in plain Python, ties to the lowest index: phy2log of every layer."""
    if n_groups % n_nodes:
        n_groups = n_nodes = 1
    return [_eplb_layer(row, n_physical, n_groups, n_nodes, n_ranks) for row in weight]


def _eplb_layer(weight: Sequence[float], n_physical: int, n_groups: int, n_nodes: int, n_ranks: int) -> list[int]:
    group_size = len(weight) // n_groups
    group_load = [sum(weight[g * group_size : (g + 1) * group_size]) for g in range(n_groups)]
    slots: list[int] = []
    for groups in _pack(group_load, n_nodes):
        experts = [g * group_size + i for g in groups for i in range(group_size)]
        copies = [1] * len(experts)
        held = list(range(len(experts)))
        for _ in range(n_physical // n_nodes - len(experts)):
            heaviest = max(range(len(experts)), key=lambda i: weight[experts[i]] / copies[i])
            copies[heaviest] += 1
            held.append(heaviest)
        share = [weight[experts[i]] / copies[i] for i in held]
        for pack in _pack(share, n_ranks // n_nodes):
            slots.extend(experts[held[item]] for item in pack)
    return slots


def _pack(load: Sequence[float], n_packs: int) -> list[list[int]]:
    """Items to packs of one size: heaviest first, each to the lightest pack with room."""
    room = len(load) // n_packs
    if room == 1:
        return [[item] for item in range(len(load))]
    packs: list[list[int]] = [[] for _ in range(n_packs)]
    total = [0.0] * n_packs
    for item in sorted(range(len(load)), key=lambda i: -load[i]):
        lightest = min((pack for pack in range(n_packs) if len(packs[pack]) < room), key=total.__getitem__)
        packs[lightest].append(item)
        total[lightest] += load[item]
    return packs
