"""
Placements of 256 experts under real drift: made for one workload by a policy, and timed on others, layer by layer. The counts are those of
--counts, or come from the trace in the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...placing import place
from ...planner import Planner
from ..files import DEFAULT_LIMIT, read_npy, read_npz
from ..simulate.trace import load_sample, total_counts
from ..terminal import UsageError
from .cases import Case, Instances

Int64Array = NDArray[np.int64]

N_LOGICAL = 256
TOKENS, TOP_K = 4096, 8
MOST = 64    # instances of a row
SIDES = 4    # layers of the sample that stand side by side for one layer of 256 experts
WINDOW = 1024  # tokens of the sample in one arriving batch

# Targets on a GPU in microseconds, p50 and p99: of run with either policy, and of solve with flow.
SHAPES = {(8, 264): (10, 14), (16, 288): (10, 14), (32, 288): (10, 14), (64, 320): (10, 14), (128, 384): (15, None)}
FLOW_SOLVE = {(32, 288): (6, 20), (64, 320): (10, 20)}
FAMILY = "drift"
POLICIES = {"deepseek": "EPLB", "flow": "flow"}


@dataclass(frozen=True)
class Counts:
    """history [layers, 256]: what placements are made for; arriving [layers, steps, 256]: what comes then."""

    history: Int64Array
    arriving: Int64Array


def read(path: str | None) -> Counts:
    """
    Of a .npz with the array counts, or a .npy: [workloads, layers, 256], the first workload being the history. None: the trace in the
    package, its first half the history, and windows of the second half what arrives; four of its layers of 64 experts stand for one.
    """
    if path is None:
        return _sample()
    if path.endswith(".npz"):
        found, inside = read_npz(path, {"counts": DEFAULT_LIMIT})
        if "counts" not in found:
            raise UsageError(f"--counts {path}: needs the array counts, holds {', '.join(inside[:5])}")
        counts = found["counts"]
    else:
        counts = read_npy(path)
    if counts.dtype.kind not in "iu" or counts.ndim != 3 or counts.shape[0] < 2 or counts.shape[1] < 1 or counts.shape[2] != N_LOGICAL:
        raise UsageError(f"--counts {path}: must be integers [2 or more workloads, layers, {N_LOGICAL} experts], "
                         f"got {counts.dtype} {list(counts.shape)}")
    if counts.min() < 0 or counts.max() > 2**40 or (counts.sum(axis=2) == 0).any():
        raise UsageError(f"--counts {path}: counts must be 0 .. 2**40, and every layer must have some")
    return Counts(counts[0].astype(np.int64), np.ascontiguousarray(np.moveaxis(counts[1:], 0, 1), dtype=np.int64))


def _sample() -> Counts:
    trace = load_sample()
    half = len(trace.data) // 2
    parts = [trace.data[:half], *(trace.data[start : start + WINDOW] for start in range(half, len(trace.data) - WINDOW + 1, WINDOW))]
    steps = np.stack([total_counts(replace(trace, data=part), len(part)) for part in parts])  # [parts, layers, experts]
    layers = steps.shape[1]
    beside = [[(layer + side) % layers for side in range(SIDES)] for layer in range(layers)]
    wide = steps[:, beside].reshape(len(parts), layers, SIDES * trace.n_experts)
    return Counts(wide[0], np.ascontiguousarray(np.moveaxis(wide[1:], 0, 1)))


def cases() -> list[Case]:
    return [Case(f"{name} {N_LOGICAL} experts, {ranks} ranks, {slots} slots, drift", None, ranks, N_LOGICAL, slots,
                 cuda=FLOW_SOLVE.get((ranks, slots)) if policy == "flow" else None, policy=policy)
            for policy, name in POLICIES.items() for ranks, slots in SHAPES]


@contextmanager
def instances(case: Case, counts: Counts, device: str) -> Iterator[Instances]:
    """One for each arriving batch of each layer, spread evenly where there are more than MOST; loads are those of TOKENS x TOP_K ids."""
    layers, steps = counts.arriving.shape[:2]
    chosen = np.unique(np.linspace(0, layers * steps - 1, min(MOST, layers * steps)).round().astype(np.int64))
    used = np.unique(chosen // steps)
    placed = place(counts.history[used].astype(np.float64), ep_size=case.ranks, slots=case.n_physical, policy=case.policy).phy2log
    planners: list[Planner] = []
    try:
        for row in placed:
            planners.append(Planner.from_placement(row, ep_size=case.ranks, n_logical=case.n_logical, device=device))
        loads = np.stack([_scaled(counts.arriving[index // steps, index % steps]) for index in chosen])
        yield Instances(case, FAMILY, planners, np.searchsorted(used, chosen // steps), loads)
    finally:
        for planner in planners:
            planner.close()


def _scaled(counts: Int64Array) -> Int64Array:
    """The same shares of TOKENS * TOP_K ids, by running sums, so that the sum is exact."""
    ends = np.cumsum(counts)
    scaled: Int64Array = np.diff(np.rint(ends * (TOKENS * TOP_K / ends[-1])).astype(np.int64), prepend=0)
    return scaled


def batches(loads: Int64Array) -> Int64Array:
    """[n, TOKENS, TOP_K] ids with these loads, in random order."""
    rng = np.random.default_rng(len(loads))
    experts = np.arange(loads.shape[1])
    return np.stack([rng.permutation(np.repeat(experts, row)).reshape(TOKENS, TOP_K) for row in loads]).astype(np.int64)
