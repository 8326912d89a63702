"""
SGLang's LP kernel (the wheels sglang and nvidia-mathdx), for `bench --peers`. It is compiled for each number of replicas and ranks, which
takes 20 to 40 s.

It solves in 32-bit floats what `lplb` splits exactly: the share of all tokens x >= 0 of each replica of a replicated expert, a slack s >= 0
of each rank, and the level M: minimise M with sum of x over an expert's replicas = its share, and sum of x on a rank + s - M = minus the
share of its other experts. A last column, with a large cost, makes x = s = M = 1 a point to start from.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...planner import Planner
from ..terminal import shown

MODULE = "sglang.kernels.ops.lplb"
INSTANCES = 3  # of each row
REPEATS = 8    # calls in a graph
PENALTY = 1000.0

Int64Array = NDArray[np.int64]
Float64Array = NDArray[np.float64]


@dataclass
class Problem:
    """One instance on the GPU."""

    kernel: Any
    matrix: Any
    bounds: Any
    cost: Any
    result: Any
    tokens: int
    base: Float64Array    # [ranks] shares of experts with one replica
    ranks_of: Int64Array  # [replicas of replicated experts]

    def solve(self) -> None:
        self.kernel.solve_ipm(self.matrix, self.bounds, self.cost, result=self.result)

    def busiest(self) -> float:
        """Tokens of the busiest rank, by its shares."""
        shares = np.asarray(self.result.cpu(), dtype=np.float64)[: len(self.ranks_of)]
        loads = self.base.copy()
        np.add.at(loads, self.ranks_of, shares)
        return float(loads.max() * self.tokens)


class Peer:
    """SGLang's modules. Raises ModuleNotFoundError and whatever else their import raises."""

    def __init__(self) -> None:
        self.kernel = importlib.import_module(f"{MODULE}.cuda_solver")
        self.fits = importlib.import_module(f"{MODULE}.shmem_budget").assert_fits
        self.ready: dict[tuple[int, int], str] = {}  # what is wrong with a size, "" if nothing

    def problem(self, planner: Planner, loads: Int64Array) -> Problem | str:
        """The instance, or why the kernel cannot take it."""
        torch: Any = importlib.import_module("torch")
        if planner.n_group != 1:
            return "it knows no groups"
        matrix, bounds, base, ranks_of = matrices(np.asarray(planner.phy2log), loads, planner.ep_size)
        size = matrix.shape
        if size not in self.ready:
            self.ready[size] = self._refusal(*size)
        if self.ready[size]:
            return self.ready[size]
        cost = np.zeros(size[1])
        cost[-2:] = 1, PENALTY
        a, b, c, result = (torch.from_numpy(each.astype(np.float32)).cuda() for each in (matrix, bounds, cost, np.zeros(size[1])))
        return Problem(self.kernel, a, b, c, result, int(loads.sum()), base, ranks_of)

    def _refusal(self, n_rows: int, n_columns: int) -> str:
        try:
            self.fits(n_rows, n_columns)
            self.kernel.warmup(n_rows, n_columns)
        except Exception as error:  # of a program that is not ours
            return shown(error, 200) or type(error).__name__
        return ""


def load() -> Peer | str:
    """SGLang's kernel, or why there is none, in one sentence."""
    try:
        return Peer()
    except ModuleNotFoundError as error:
        return f"--peers: SGLang's LP kernel is not timed, since there is no module {error.name}: pip install sglang nvidia-mathdx"
    except Exception as error:  # a damaged or mismatched installation
        return f"--peers: SGLang's LP kernel is not timed, since it cannot be imported: {shown(error, 200)}"


def matrices(phy2log: Int64Array, loads: Int64Array, n_ranks: int) -> tuple[Float64Array, Float64Array, Float64Array, Int64Array]:
    """(A [experts + ranks, replicas + ranks + 2], b, base, ranks_of) in shares of all tokens."""
    share = loads / max(loads.sum(), 1)
    rank = np.arange(phy2log.size) // (phy2log.size // n_ranks)
    copies = np.bincount(phy2log[phy2log >= 0], minlength=loads.size)
    single = np.flatnonzero((phy2log >= 0) & (copies[phy2log] == 1))
    several = np.flatnonzero((phy2log >= 0) & (copies[phy2log] > 1))
    base = np.zeros(n_ranks)
    np.add.at(base, rank[single], share[phy2log[single]])
    experts = np.flatnonzero(copies > 1)
    n, m = experts.size, several.size
    matrix = np.zeros((n + n_ranks, m + n_ranks + 2))
    matrix[np.searchsorted(experts, phy2log[several]), np.arange(m)] = 1
    matrix[n + rank[several], np.arange(m)] = 1
    matrix[n + np.arange(n_ranks), m + np.arange(n_ranks)] = 1
    matrix[n:, -2] = -1
    bounds = np.concatenate([share[experts], -base])
    matrix[:, -1] = bounds - matrix.sum(axis=1)
    return matrix, bounds, base, rank[several]
