"""What follows from a placement alone: homes, and the rows in which ranks hold experts and copies for training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
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
    """Which expert lies in which row of the buffers, on every rank: own[r] rows of experts whose home is rank r, then the copies."""

    def __init__(self, phy2log: Int32s, n_ranks: int, slack: int, before: Rows | None = None) -> None:
        self.homes: Int32s = homes(phy2log, n_ranks, former=None if before is None else before.homes)
        n_local = phy2log.size // n_ranks
        ranks = self.homes // n_local
        if before is None:
            self.own = [int(number) + slack for number in np.bincount(ranks, minlength=n_ranks)]
            experts = [[-1] * (n_local + 2 * slack)] * n_ranks
        else:
            self.own, experts = before.own, before.experts
        self.experts: list[list[int]] = []  #: [ranks][rows], -1 for a row that is not in use
        for rank, (own, old) in enumerate(zip(self.own, experts)):
            held = list(dict.fromkeys(phy2log[rank * n_local:(rank + 1) * n_local].tolist()))
            mine = [expert for expert in held if ranks[expert] == rank]
            copies = [expert for expert in held if ranks[expert] != rank]
            if len(mine) > own or len(copies) > len(old) - own:
                rule = f"must leave rank {rank} with at most {own} own experts and {len(old) - own} copies, since its parameters were made"
                raise broken_rule("placement", f"{rule} for them (slack={slack})", f"{len(mine)} own experts and {len(copies)} copies")
            self.experts.append(_settled(old[:own], mine) + _settled(old[own:], copies))
        self.home = {expert: Place(rank, row) for rank, row, expert in self._each(copies=False)}
        self.copies = {Place(rank, row): expert for rank, row, expert in self._each(copies=True)}  # by rank, then row
        self.row_of_slot = [self.experts[slot // n_local].index(expert) for slot, expert in enumerate(phy2log.tolist())]

    def _each(self, copies: bool) -> Iterable[tuple[int, int, int]]:
        for rank, (own, experts) in enumerate(zip(self.own, self.experts)):
            for row, expert in enumerate(experts):
                if expert >= 0 and (row >= own) == copies:
                    yield rank, row, expert

    def pulls(self, known: Rows | None = None) -> list[Move]:
        """From homes to copies. known: rows that hold the same copy there are left out."""
        return [Move(self.home[expert], place) for place, expert in self.copies.items()
                if known is None or known.copies.get(place) != expert]

    def digest(self) -> str:
        return hashlib.blake2b(repr((self.homes.tolist(), self.own, self.experts)).encode(), digest_size=6).hexdigest()

    def rounds(self) -> list[list[Move]]:
        """From copies to homes; in each round a home row gets one, so that what arrives is never more than the own experts."""
        rounds: list[list[Move]] = []
        seen = dict.fromkeys(self.home, 0)
        for place, expert in self.copies.items():
            if seen[expert] == len(rounds):
                rounds.append([])
            rounds[seen[expert]].append(Move(place, self.home[expert]))
            seen[expert] += 1
        return rounds


def _settled(old: list[int], experts: list[int]) -> list[int]:
    """Experts that have a row keep it; the others take the free rows in their order."""
    new = iter([expert for expert in experts if expert not in old])
    return [expert if expert in experts else next(new, -1) for expert in old]
