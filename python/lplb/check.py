"""
Results recomputed in plain numpy from nothing but loads and placement; no code is shared with the solver. Beside `lplb.witness_bound`,
which evaluates the proof that a plan gives, `exhaustive_optimum` looks at every set of ranks and so needs no witness at all.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import InternalError

Int64Array = NDArray[np.int64]


def hosts(phy2log: ArrayLike, n_logical: int, ep_size: int) -> NDArray[np.bool_]:
    """[n_logical, ep_size]: True where the rank holds a replica of the expert. phy2log: [n_physical], in rank order."""
    slots = np.asarray(phy2log, dtype=np.int64)
    rank = np.arange(slots.size) // (slots.size // ep_size)
    held = np.zeros((n_logical, ep_size), dtype=np.bool_)
    held[slots, rank] = True
    return held


def exhaustive_optimum(loads: ArrayLike, held: NDArray[np.bool_]) -> int:
    """
    The optimum of one group: the largest bound over all non-empty rank sets. held: [n_logical, group_size], at most 16 ranks; experts
    that no rank of the group holds are left out. Cost: 2^group_size * group_size.
    """
    size = held.shape[1]
    if size > 16:
        raise ValueError(f"held: at most 16 ranks can be searched exhaustively, got {size}")
    captive = np.zeros(1 << size, dtype=np.int64)
    here = held.any(axis=1)
    np.add.at(captive, held[here] @ (1 << np.arange(size)), np.asarray(loads, dtype=np.int64)[here])
    members = np.zeros(1 << size, dtype=np.int64)
    index = np.arange(1 << size)
    for rank in range(size):  # sums over subsets, one rank at a time
        has = (index >> rank & 1).astype(np.bool_)
        captive[has] += captive[index[has] ^ (1 << rank)]
        members += has
    return int((-(-captive[1:] // members[1:])).max())


def rank_loads(tokens_per_slot: ArrayLike, ep_size: int) -> Int64Array:
    """[ep_size] tokens per rank from tokens per physical expert [n_physical]."""
    loads: Int64Array = np.asarray(tokens_per_slot, dtype=np.int64).reshape(ep_size, -1).sum(axis=1)
    return loads


def conserve(taken: ArrayLike, counts: ArrayLike, phy2log: ArrayLike) -> None:
    """
    InternalError unless every token of every source reaches a slot of its own expert: taken [n_sources, n_physical], summed over the slots
    of each expert, is counts [n_sources, n_logical], and nothing is negative.
    """
    sent = np.atleast_2d(np.asarray(taken, dtype=np.int64))
    wanted = np.atleast_2d(np.asarray(counts, dtype=np.int64))
    sums = np.zeros_like(wanted.T)
    np.add.at(sums, np.asarray(phy2log, dtype=np.int64), sent.T)
    if (sent < 0).any() or (sums.T != wanted).any():
        raise InternalError("a plan lost or invented tokens: please report the loads and the placement")
