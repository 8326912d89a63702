"""Ready topologies: which ranks hold copies of whose experts. The first argument of Planner, by name or as an array.

    name            constant          ranks, copies a rank   for
    "cube"          CUBE_8P2E         8, 2                   the GPUs of one host
    "ring"          RING_8P           8, 1                   the same with half the memory for copies
    "hypercube"     HYPERCUBE_16P2E   16, 2                  two hosts of 8
    "square"        SQUARE_4P2E       4, 2                   4 GPUs
    "torus:MxN"     torus_2d(m, n)    m * n, 2               several hosts: one neighbour inside the host and one on the next

An array is [ranks of a group, copies a rank]: slot d of rank r replicates slot d of rank array[r, d]. torch tensors (int64, CPU) where
torch can be imported, numpy arrays otherwise. Each access makes a new one.
"""

from __future__ import annotations

import re
from typing import Any, cast

import numpy as np

from ._c import MAX_RANKS
from ._ops.arguments import integer
from ._ops.host import Array
from .errors import Unsupported, broken_rule, shown

CUBE_8P2E: Array
"""[8, 2], "cube": two rings of 4. Each rank holds a copy from the rank before it in its ring, and one from a rank of the other ring. For 8 GPUs."""

RING_8P: Array
"""[8, 1], "ring": each rank holds a copy from the next one. For 8 GPUs."""

HYPERCUBE_16P2E: Array
"""[16, 2], "hypercube": four rings of 4. Each rank holds a copy from the rank before it in its ring, and one from the ring before. For 2 x 8
GPUs."""

SQUARE_4P2E: Array
"""[4, 2], "square": each rank holds a copy from the next one and one from the opposite one. For 4 GPUs."""

NAMES = {"cube": "CUBE_8P2E", "ring": "RING_8P", "hypercube": "HYPERCUBE_16P2E", "square": "SQUARE_4P2E"}

# One list per slot class: the rank whose original stands at slot d of rank 0, 1, ...
_COLUMNS: dict[str, list[list[int]]] = {
    "CUBE_8P2E": [[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]],
    "RING_8P": [[1, 2, 3, 4, 5, 6, 7, 0]],
    "HYPERCUBE_16P2E": [[3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14], [12, 13, 14, 15, *range(12)]],
    "SQUARE_4P2E": [[1, 2, 3, 0], [2, 3, 0, 1]],
}

__all__ = ["CUBE_8P2E", "RING_8P", "HYPERCUBE_16P2E", "SQUARE_4P2E", "torus_2d"]


def torus_2d(m: int, n: int) -> Array:
    """Rank i * n + j replicates its neighbours ((i+1) mod m, j) and (i, (j+1) mod n). [m * n, 2]."""
    m, n = integer("m", m, 1, MAX_RANKS), integer("n", n, 1, MAX_RANKS)
    if m * n > MAX_RANKS:
        raise Unsupported(f"n: must make at most {MAX_RANKS} ranks of m * n, got {m} * {n}")
    i, j = np.divmod(np.arange(m * n, dtype=np.int64), n)
    return _array(np.stack([(i + 1) % m * n + j, i * n + (j + 1) % n], axis=1))


def named(name: str) -> Array:
    """The topology of a name of the table above, or of a constant's name."""
    sides = re.fullmatch(r"torus:([0-9]{1,9})x([0-9]{1,9})", name)
    if sides:
        return torus_2d(int(sides[1]), int(sides[2]))
    constant = NAMES.get(name, name)
    if constant not in _COLUMNS:
        raise broken_rule("redundant_to_original", f"must be an array, {', '.join(NAMES)} or torus:MxN (see lplb.topology)", shown(name))
    return cast(Array, __getattr__(constant))


def _array(values: Any) -> Array:
    try:
        import torch
    except ImportError:
        return cast(Array, values)
    return torch.from_numpy(values)


def __getattr__(name: str) -> Any:
    if name in _COLUMNS:
        return _array(np.ascontiguousarray(np.array(_COLUMNS[name], dtype=np.int64).T))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_COLUMNS])
