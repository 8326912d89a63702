"""
The self-check of `python -m lplb`: a few hundred small instances, every result recomputed here from loads and placement. It takes about a
second and needs nothing but numpy.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..eplb import rebalance_experts
from ..info import GroupInfo
from ..planner import Planner
from ..solve import solve, witness_bound
from . import check
from .simulate.options import topology

Int64Array = NDArray[np.int64]

# DeepSeek's own example: 2 layers, 12 experts, 16 slots, 4 expert groups, 2 nodes, 8 GPUs
EPLB_WEIGHT = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
EPLB_RESULT = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]


def loads_of(kind: str, n: int, rng: np.random.Generator) -> Int64Array:
    """[n] tokens per expert of one load family."""
    if kind == "normal":
        values = rng.normal(1, 0.3, n).clip(0) * 100
    elif kind == "zipf":
        values = rng.permutation(np.arange(1, n + 1) ** -0.8) * 1000
    elif kind == "log-normal":
        values = rng.lognormal(0, 1, n) * 60
    elif kind == "sparse":
        values = rng.integers(0, 200, n) * (rng.random(n) < 0.2)
    elif kind == "one-hot":
        values = np.where(np.arange(n) == rng.integers(n), 1001, 0)
    elif kind == "equal":
        values = np.full(n, 37)
    else:
        values = np.zeros(n)
    return np.asarray(values, dtype=np.int64)


FAMILIES = ("normal", "zipf", "log-normal", "sparse", "one-hot", "equal", "zero")


class Failed(Exception):
    """A result of the library is not what was promised. The text says which."""


def require(fact: bool, words: str) -> None:
    if not fact:
        raise Failed(words)


def verify(tokens: Int64Array, loads: Int64Array, phy2log: NDArray[np.int32], groups: Sequence[GroupInfo], ep_size: int, what: str) -> None:
    """tokens [n_physical] conserve the loads, and every group's busiest rank equals the bound that its witness proves."""
    check.conserve(tokens, loads, phy2log)
    by_rank = check.rank_loads(tokens, ep_size).reshape(len(groups), -1)
    for i, group in enumerate(groups):
        busiest = int(by_rank[i].max())
        bound = witness_bound(loads, phy2log, ep_size, group.witness)
        require(group.certified and busiest == group.max_load, f"{what}: the plan says {group.max_load} tokens, its slots hold {busiest}")
        require(busiest == bound == group.bound,
                f"{what}: busiest rank {busiest}, bound of the witness {bound}, stated bound {group.bound}")
        if ep_size <= 8:
            best = check.exhaustive_optimum(loads, check.hosts(phy2log, loads.size, ep_size))
            require(busiest == best, f"{what}: busiest rank {busiest}, best over all rank sets {best}")


def check_topologies() -> str:
    rng = np.random.default_rng(1)
    done = 0
    for name, per_rank in itertools.product(("square", "ring", "cube", "hypercube", "torus:4x4"), (2, 8)):
        r2o = topology(name)
        ranks, columns = r2o.shape
        n_logical = ranks * per_rank
        with Planner(r2o, n_logical + columns * ranks, n_logical, ranks, device="cpu") as planner:
            for family in FAMILIES * 2:
                loads = loads_of(family, n_logical, rng)
                phy2log = np.asarray(planner.update_redundancy_mapping(loads_of("zipf", n_logical, rng))[0])
                planner.solve(loads)
                verify(np.asarray(planner.split()), loads, phy2log, planner.info().groups, ranks,
                       f"{name}, {n_logical} experts, {family} loads")
                done += 1
    return f"{done} plans at the optimum that their witness proves"


def check_general() -> str:
    rng = np.random.default_rng(2)
    done = 0
    for ranks in (2, 5, 8, 32):
        for family in FAMILIES * 3:
            n_logical = int(rng.integers(1, 6 * ranks))
            per_rank = -(-n_logical // ranks) + int(rng.integers(0, 3))
            spare = rng.integers(0, n_logical, ranks * per_rank - n_logical)
            phy2log = rng.permutation(np.concatenate([np.arange(n_logical), spare])).astype(np.int32)
            loads = loads_of(family, n_logical, rng)
            solution = solve(loads, phy2log, ranks)
            verify(np.asarray(solution.tokens), loads, phy2log, [solution], ranks,
                   f"general placement of {n_logical} experts on {ranks} ranks, {family} loads")
            done += 1
    return f"{done} plans at the optimum that their witness proves"


def routed(rng: np.random.Generator, shape: tuple[int, ...], n_logical: int) -> Int64Array:
    """Logical ids of tokens with Zipf loads; one in twenty is -1."""
    shares = loads_of("zipf", n_logical, rng).astype(np.float64)
    ids = rng.choice(n_logical, shape, p=shares / shares.sum())
    ids[rng.random(shape) < 0.05] = -1
    return np.asarray(ids, dtype=np.int64)


def check_tokens() -> str:
    """Eight ranks plan for themselves from gathered counts; what they send adds up to the plan."""
    rng = np.random.default_rng(3)
    ranks, n_logical, n_physical, seen = 8, 32, 48, 0
    with contextlib.ExitStack() as stack:
        planners = [stack.enter_context(Planner(topology("cube"), n_physical, n_logical, ranks, rank=rank, n_nodes=2, device="cpu"))
                    for rank in range(ranks)]
        phy2log = np.asarray(planners[0].phy2log)
        for _ in range(10):
            ids = routed(rng, (ranks, 96, 4), n_logical)
            counts = np.stack([np.bincount(mine[mine >= 0], minlength=n_logical) for mine in ids]).astype(np.int64)
            taken = np.zeros((ranks, n_physical), dtype=np.int64)
            for rank, planner in enumerate(planners):
                planner.solve(counts)
                physical = np.asarray(planner.redirect(ids[rank]))
                kept = ids[rank] >= 0
                require(bool(((physical >= 0) == kept).all()), "redirect: -1 must stay -1, and nothing else become -1")
                require(bool((phy2log[physical[kept]] == ids[rank][kept]).all()), "redirect: a token went to a slot of another expert")
                taken[rank] = np.bincount(physical[kept], minlength=n_physical)
            require(bool((taken.sum(axis=0) == np.asarray(planners[0].split())).all()), "the loads of all ranks do not add up to the plan")
            verify(taken.sum(axis=0), counts.sum(axis=0), phy2log, planners[0].info().groups, ranks, "tokens of 8 ranks")
            seen += int(counts.sum())
    with Planner(topology("cube"), n_physical, n_logical, ranks, device="cpu") as planner:
        ids = routed(rng, (1000, 4), n_logical)
        physical = np.asarray(planner.run(ids, None))
        tokens = np.bincount(physical[physical >= 0], minlength=n_physical)
        verify(tokens, np.bincount(ids[ids >= 0], minlength=n_logical), phy2log, planner.info().groups, ranks, "run")
        wrong = np.asarray(planner.run(np.array([0, -1, n_logical, -2, 2**40], dtype=np.int64), None))
        require(bool((wrong[1:] == -1).all() and phy2log[wrong[0]] == 0), "run: ids out of range must come back as -1")
        require(planner.info().invalid_ids == 3, "run: ids out of range must be counted")
    return f"{seen:,} tokens of 8 ranks: every one at a replica of its expert, loads equal to the plan"


def check_eplb() -> str:
    result = np.asarray(rebalance_experts(np.array(EPLB_WEIGHT, dtype=np.float32), 16, 4, 2, 8)[0])
    require(result.tolist() == EPLB_RESULT, "rebalance_experts: DeepSeek's example gives another placement")
    return "DeepSeek's example gives DeepSeek's placement"


def check_cuda() -> str:
    """The GPU computes what the CPU computes, bit for bit. Needs torch and a GPU."""
    torch: Any = importlib.import_module("torch")
    rng = np.random.default_rng(4)
    n_logical, n_physical, ranks = 64, 80, 8
    with (Planner(topology("cube"), n_physical, n_logical, ranks, device="cpu") as host,
          Planner(topology("cube"), n_physical, n_logical, ranks, device="cuda") as device):
        for _ in range(10):
            ids = routed(rng, (512, 6), n_logical)
            wanted = np.asarray(host.run(ids, None))
            got = torch.Tensor.cpu(device.run(torch.from_numpy(ids).cuda(), None)).numpy()
            require(bool((got == wanted).all()), "run: the GPU sends tokens elsewhere than the CPU")
            require(device.info().groups == host.info().groups or device.info().certified, "info: the GPU's plan is not certified")
    return f"10 plans on {torch.cuda.get_device_name()}, bit for bit those of the CPU"


CHECKS: tuple[tuple[str, Callable[[], str]], ...] = (
    ("exactness, topologies", check_topologies), ("exactness, general placements", check_general), ("tokens", check_tokens),
    ("EPLB", check_eplb))
