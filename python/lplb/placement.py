"""What follows from a placement alone: homes, and the rows in which ranks hold experts and copies for training."""

from __future__ import annotations

import ctypes
import hashlib
from typing import NamedTuple

import numpy as np

from . import _c
from ._ops.arguments import integer
from ._ops.host import A, Array, Int32s, address_of, as_given, host_integers
from .errors import broken_rule


def homes(phy2log: A, ep_size: int, *, former: Array | None = None) -> A:
    """The slot of each expert's home, which owns its weights, gradient and optimizer state: int32 [n_logical].

    phy2log: integers [n_physical], the expert of every slot; rank r owns n_physical / ep_size consecutive slots. Every rank owns
    n_logical / ep_size experts where the replicas allow it, else the largest number of a rank is as small as it can be. Where there is a
    choice, the replica that comes first in its rank's block is the home: the original, for a placement by a topology. former: the homes
    under another placement of these sizes; experts stay on these ranks as far as possible. A CPU tensor for a tensor, an array for an
    array.
    """
    slots: Int32s = host_integers("phy2log", phy2log, 1, np.int32, _c.MAX_PHYSICAL)
    if not slots.size:
        raise broken_rule("phy2log", "must have at least one slot", f"shape {list(slots.shape)}")
    result = np.empty(max(0, int(slots.max())) + 1, dtype=np.int32)
    before = None if former is None else host_integers("former", former, 1, np.int32, _c.MAX_LOGICAL)
    if before is not None and before.size != result.size:
        raise broken_rule("former", f"must have one slot for each of the {result.size} experts", before.size)
    _c.call(_c.load().placement_homes, address_of(slots), slots.size, result.size, integer("ep_size", ep_size, 1),
            None if before is None else address_of(before), address_of(result))
    return as_given(result, phy2log)


class Place(NamedTuple):
    rank: int
    row: int


class Move(NamedTuple):
    """A row of a tensor that goes from one rank to another. Every rank has the same list of them, in the same order."""

    source: Place
    target: Place


class Rows:
    """Which expert lies in which row of the buffers, on every rank: the rows of experts whose home is there, then the copies.

    The library plans them: see lplb_placement_rows and lplb_placement_moves in lplb.h.
    """

    def __init__(self, phy2log: Int32s, n_ranks: int, slack: int, before: Rows | None = None) -> None:
        self.n_ranks, self.n_rows, self.n_logical = n_ranks, phy2log.size // n_ranks + 2 * slack, int(phy2log.max(initial=0)) + 1
        self.table: Int32s = np.empty((n_ranks, 1 + self.n_rows), dtype=np.int32)
        self.homes: Int32s = np.empty(self.n_logical, dtype=np.int32)
        row_of_slot: Int32s = np.empty(phy2log.size, dtype=np.int32)
        _c.call(_c.load().placement_rows, address_of(phy2log), phy2log.size, self.n_logical, n_ranks, slack,
                None if before is None else address_of(before.table), address_of(self.table), address_of(self.homes),
                address_of(row_of_slot))
        self.own: list[int] = self.table[:, 0].tolist()
        self.experts: list[list[int]] = self.table[:, 1:].tolist()  #: [ranks][rows], -1 for a row that is not in use
        self.row_of_slot: list[int] = row_of_slot.tolist()
        self.home = {expert: Place(rank, row) for rank, own in enumerate(self.own) for row, expert in enumerate(self.experts[rank][:own])
                     if expert >= 0}
        self.has_copies = any(expert >= 0 for own, experts in zip(self.own, self.experts) for expert in experts[own:])

    def pulls(self, known: Rows | None = None) -> list[Move]:
        """From homes to copies. known: rows that hold the same copy there are left out."""
        return [move for moves in self._rounds("pull", known) for move in moves]

    def rounds(self) -> list[list[Move]]:
        """From copies to homes. In each round no rank is the source of two moves, and none the target of two, so that what arrives takes
        one row; what comes to one home comes from the lowest rank first."""
        return self._rounds("push", None)

    def home_moves(self, before: Rows) -> list[Move]:
        """Of experts whose home was on another rank."""
        return [move for moves in self._rounds("homes", before) for move in moves]

    def _rounds(self, kind: str, former: Rows | None) -> list[list[Move]]:
        found: Int32s = np.empty((self.n_ranks * self.n_rows, 5), dtype=np.int32)
        number = ctypes.c_int64()
        _c.call(_c.load().placement_moves, _c.MOVES[kind], address_of(self.table), None if former is None else address_of(former.table),
                self.n_logical, self.n_ranks, self.n_rows, address_of(found), ctypes.byref(number))
        rounds: list[list[Move]] = []
        for step, from_rank, from_row, to_rank, to_row in found[: number.value].tolist():
            rounds += [[] for _ in range(step + 1 - len(rounds))]
            rounds[step].append(Move(Place(from_rank, from_row), Place(to_rank, to_row)))
        return rounds

    def digest(self) -> str:
        return hashlib.blake2b(self.homes.tobytes() + self.table.tobytes(), digest_size=6).hexdigest()
