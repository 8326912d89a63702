"""
Results recomputed in plain numpy from nothing but loads and placement; no code is shared with the solver. Beside `lplb.witness_bound`,
which evaluates the proof that a plan gives, `exhaustive_optimum` looks at every set of ranks and so needs no witness at all.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _c
from .._ops.arguments import integer
from .._ops.host import Int64s, host_integers, to_host
from ..errors import InternalError, broken_rule

Int64Array = NDArray[np.int64]


def hosts(phy2log: ArrayLike, n_logical: int, ep_size: int) -> NDArray[np.bool_]:
    """[n_logical, ep_size]: True where the rank holds a replica of the expert. phy2log: [n_physical], in rank order, -1 for empty slots."""
    experts, ranks = integer("n_logical", n_logical, 1, _c.MAX_LOGICAL), integer("ep_size", ep_size, 1)
    slots = _slots(phy2log, experts)
    if slots.size == 0 or slots.size % ranks:
        raise broken_rule("phy2log", f"must have a multiple of ep_size = {ranks} slots, one at least", slots.size)
    rank = np.arange(slots.size) // (slots.size // ranks)
    held = np.zeros((experts, ranks), dtype=np.bool_)
    held[slots[slots >= 0], rank[slots >= 0]] = True
    return held


def exhaustive_optimum(loads: ArrayLike, held: NDArray[np.bool_]) -> int:
    """
    The optimum of one group: the largest bound over all non-empty rank sets. held: [n_logical, group_size], at most 16 ranks; experts
    that no rank of the group holds are left out. Cost: 2^group_size * group_size.
    """
    held = to_host("held", held, 2, 16 * _c.MAX_LOGICAL)
    size = held.shape[1]
    if held.dtype != np.bool_ or not 1 <= size <= 16:
        raise broken_rule("held", "must be [n_logical, ranks] of bools, at most 16 ranks, which can be searched exhaustively",
                          f"shape {list(held.shape)}, {held.dtype}")
    tokens_of: Int64s = host_integers("loads", loads, 1, np.int64, _c.MAX_LOGICAL)
    if tokens_of.size != len(held):
        raise broken_rule("loads", f"must have {len(held)} elements, the rows of held", tokens_of.size)
    captive = np.zeros(1 << size, dtype=np.int64)
    here = held.any(axis=1)
    np.add.at(captive, held[here] @ (1 << np.arange(size)), tokens_of[here])
    members = np.zeros(1 << size, dtype=np.int64)
    index = np.arange(1 << size)
    for rank in range(size):  # sums over subsets, one rank at a time
        has = (index >> rank & 1).astype(np.bool_)
        captive[has] += captive[index[has] ^ (1 << rank)]
        members += has
    return int((-(-captive[1:] // members[1:])).max())


def rank_loads(tokens_per_slot: ArrayLike, ep_size: int) -> Int64Array:
    """[ep_size] tokens per rank from tokens per physical expert [n_physical]."""
    tokens: Int64s = host_integers("tokens_per_slot", tokens_per_slot, 1, np.int64, _c.MAX_EPLB_PHYSICAL)
    ranks = integer("ep_size", ep_size, 1)
    if tokens.size == 0 or tokens.size % ranks:
        raise broken_rule("tokens_per_slot", f"must have a multiple of ep_size = {ranks} elements, one at least", tokens.size)
    loads: Int64Array = tokens.reshape(ranks, -1).sum(axis=1)
    return loads


def conserve(taken: ArrayLike, counts: ArrayLike, phy2log: ArrayLike) -> None:
    """
    InternalError unless every token of every source reaches a slot of its own expert: taken [n_sources, n_physical], summed over the slots
    of each expert, is counts [n_sources, n_logical], nothing is negative, and empty slots (-1 in phy2log) get nothing.
    """
    sent, wanted = _rows("taken", taken), _rows("counts", counts)
    slots = _slots(phy2log, wanted.shape[1])
    if sent.shape != (len(wanted), slots.size):
        raise broken_rule("taken", f"must be [n_sources, n_physical] = [{len(wanted)}, {slots.size}]", f"shape {list(sent.shape)}")
    sums = np.zeros_like(wanted.T)
    np.add.at(sums, slots[slots >= 0], sent.T[slots >= 0])
    if (sent < 0).any() or sent[:, slots < 0].any() or (sums.T != wanted).any():
        raise InternalError("a plan lost or invented tokens: please report the loads and the placement")


def _slots(phy2log: ArrayLike, n_logical: int) -> Int64Array:
    slots: Int64s = host_integers("phy2log", phy2log, 1, np.int64, _c.MAX_EPLB_PHYSICAL)
    for slot in np.flatnonzero((slots < -1) | (slots >= n_logical))[:1]:
        raise broken_rule(f"phy2log[{slot}]", f"must be a logical expert, 0 .. {n_logical - 1}, or -1 for none", slots[slot])
    return slots


def _rows(name: str, value: ArrayLike) -> Int64Array:
    """[n_sources, n], or one source's [n]."""
    array = to_host(name, value, most=_c.MAX_EP_SIZE * _c.MAX_PHYSICAL)
    rows: Int64s = host_integers(name, array, 1 if array.ndim == 1 else 2, np.int64)
    return np.atleast_2d(rows)
