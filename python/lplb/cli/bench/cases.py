"""The instances that the solver is timed on: sizes, placements, loads and targets, the same on the CPU and on the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...placing import place
from ...planner import Planner
from ...solve import witness_bound
from .. import check
from ..simulate.options import topology

Int64Array = NDArray[np.int64]

INSTANCES = 512
TOKENS_PER_EXPERT = 1024
FAMILIES = ("normal", "zipf 0.8", "log-normal")
PLACEMENTS = 4  # different placements by a policy among the instances of one case
DRIFT = 0.25    # sigma of the log-normal factor between the loads that the policy saw and those of an instance


@dataclass(frozen=True)
class Case:
    """
    layout: a topology's name, or None: a placement by policy. Targets in microseconds: on the CPU p50; on CUDA p50 and p99, cuda_zipf being those of all
    but normal loads where these differ. sglang: p50 on CUDA of SGLang's kernel, which runs LPLB's loop with its step bug mended, measured
    on an H200 (driver 580, CUDA 13.0, torch 2.11) in CUDA graphs; its plans are 0.4-2% above the optimum on average, up to 7%.
    """

    name: str
    layout: str | None
    ranks: int
    n_logical: int
    n_physical: int
    cpu: float | None = None
    cuda: tuple[float, float] | None = None
    cuda_zipf: tuple[float, float] | None = None
    sglang: float | None = None
    policy: str = "deepseek"

    def cuda_target(self, family: str) -> tuple[float, float] | tuple[None, None]:
        return (self.cuda_zipf if family != "normal" and self.cuda_zipf else self.cuda) or (None, None)


CASES = (
    Case("cube 8x2, 8 experts a rank", "cube", 8, 64, 80, 3, (2.5, 4), (3, 5), 113.7),
    Case("cube 8x2, 32 experts a rank", "cube", 8, 256, 272, 3, (2.5, 4), (3, 5), 113.7),
    Case("ring 8x1", "ring", 8, 256, 264, None, (3, 5), sglang=62.3),
    Case("hypercube 16x2", "hypercube", 16, 256, 288, 6, (5, 9), sglang=335.9),
    Case("torus 8x4x2", "torus:8x4", 32, 256, 320, 12, (8, 16), sglang=1543.0),
    Case("EPLB 256 experts, 32 ranks, 288 slots", None, 32, 256, 288, 20, (12, 25)),
    Case("EPLB 256 experts, 32 ranks, 320 slots", None, 32, 256, 320, None, (12, 25)),
    Case("EPLB 256 experts, 64 ranks, 320 slots", None, 64, 256, 320, None, (20, 40)),
    Case("flow 256 experts, 32 ranks, 288 slots", None, 32, 256, 288, None, (6, 20), policy="flow"),
    Case("flow 256 experts, 64 ranks, 320 slots", None, 64, 256, 320, None, (10, 20), policy="flow"),
    Case("EPLB 4096 experts, 512 ranks, 4608 slots", None, 512, 4096, 4608),
)


def draw(family: str, shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float64]:
    """Loads per expert [instances, n_logical], mean 1."""
    if family == "normal":
        values = rng.normal(1, 0.3, shape).clip(0)
    elif family == "zipf 0.8":
        values = rng.permuted(np.broadcast_to(np.arange(1, shape[1] + 1) ** -0.8, shape), axis=1)
    else:
        values = rng.lognormal(0, 1, shape)
    return np.asarray(values / values.mean(axis=1, keepdims=True), dtype=np.float64)


@dataclass
class Instances:
    """planners, and for every instance its planner's index and its loads [instances, n_logical] in tokens."""

    case: Case
    family: str
    planners: list[Planner]
    planner: Int64Array
    loads: Int64Array


@contextmanager
def instances(case: Case, family: str, device: str, n: int = INSTANCES) -> Iterator[Instances]:
    """
    Topologies keep the experts in order and get independent loads. Placements by a policy are made for one draw of loads, and each instance is
    that draw times a log-normal factor: the experts with many replicas are the hot ones, yet not exactly as hot as they were.
    """
    rng = np.random.default_rng([case.n_logical, case.n_physical, case.ranks, FAMILIES.index(family)])
    planners: list[Planner] = []
    try:
        if case.layout is not None:
            planners.append(Planner(topology(case.layout), case.n_physical, case.n_logical, case.ranks, device=device))
            which = np.zeros(n, dtype=np.int64)
            relative = draw(family, (n, case.n_logical), rng)
        else:
            seen = draw(family, (PLACEMENTS, case.n_logical), rng)
            for row in place(seen, ep_size=case.ranks, slots=case.n_physical, policy=case.policy).phy2log:
                planners.append(Planner.from_placement(row, ep_size=case.ranks, n_logical=case.n_logical, device=device))
            which = np.arange(n) % PLACEMENTS
            relative = seen[which] * rng.lognormal(0, DRIFT, (n, case.n_logical))
        loads = np.rint(relative * TOKENS_PER_EXPERT).astype(np.int64)
        yield Instances(case, family, planners, which, np.ascontiguousarray(loads))  # rows are handed over as addresses
    finally:
        for planner in planners:
            planner.close()


def proven(planner: Planner, loads: Int64Array) -> bool:
    """
    Whether the planner's latest plan is for these loads, lies at the bound, and the bound follows from its witness: all recomputed from
    the tokens per slot, the loads and the placement.
    """
    tokens, phy2log = to_host(planner.split()), to_host(planner.phy2log)
    check.conserve(tokens, loads, phy2log)
    busiest = check.rank_loads(tokens, planner.ep_size).reshape(planner.n_group, -1).max(axis=1)
    groups = planner.info().groups
    return all(int(busiest[i]) == group.max_load == witness_bound(loads, phy2log, planner.ep_size, group.witness)
               for i, group in enumerate(groups))


def to_host(array: object) -> Int64Array:
    """A tensor, wherever it is, or an array, as an array."""
    cpu = getattr(array, "cpu", None)
    return np.asarray(cpu() if cpu is not None else array, dtype=np.int64)
