"""Ready topologies, as the redundant_to_original argument of Planner: [group_size, num_redundants], where slot d of rank r
replicates slot d of rank [r, d].

CUBE_8P2E        8 ranks, 2 redundant slots each: the GPUs of one node
RING_8P          8 ranks, 1 redundant slot each
HYPERCUBE_16P2E  16 ranks, 2 redundant slots each: two nodes of 8
SQUARE_4P2E      4 ranks, 2 redundant slots each
torus_2d(m, n)   m * n ranks, 2 redundant slots each: several nodes, one neighbour inside the node and one on the next

torch tensors (int64, CPU) where torch can be imported, numpy arrays otherwise. Each access makes a new one.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from ._c import MAX_RANKS
from ._ops.arguments import integer
from ._ops.host import Array
from .errors import Unsupported

CUBE_8P2E: Array
RING_8P: Array
HYPERCUBE_16P2E: Array
SQUARE_4P2E: Array

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
