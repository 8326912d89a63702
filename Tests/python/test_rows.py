"""The library's rows and moves against a plain definition of them, over random placements that follow one another."""

from __future__ import annotations

import numpy as np
import pytest

import lplb
from lplb import InvalidArgument, _c
from lplb.placement import Rows


def settled(old, experts):
    """Experts that have a row keep it; the others take the free rows in their order."""
    new = iter([expert for expert in experts if expert not in old])
    return [expert if expert in experts else next(new, -1) for expert in old]


class PlainRows:
    def __init__(self, phy2log, n_ranks, slack, before):
        self.homes = lplb.homes(phy2log, n_ranks, former=None if before is None else before.homes)
        n_local = phy2log.size // n_ranks
        ranks = self.homes // n_local
        if before is None:
            self.own = [int(number) + slack for number in np.bincount(ranks, minlength=n_ranks)]
            former = [[-1] * (n_local + 2 * slack)] * n_ranks
        else:
            self.own, former = before.own, before.experts
        self.experts, self.fits = [], True
        for rank, (own, old) in enumerate(zip(self.own, former)):
            held = list(dict.fromkeys(phy2log[rank * n_local:(rank + 1) * n_local].tolist()))
            mine = [expert for expert in held if ranks[expert] == rank]
            copies = [expert for expert in held if ranks[expert] != rank]
            self.fits &= len(mine) <= own and len(copies) <= len(old) - own
            self.experts.append(settled(old[:own], mine) + settled(old[own:], copies))
        self.row_of_slot = [self.experts[slot // n_local].index(expert) for slot, expert in enumerate(phy2log.tolist()) if self.fits]
        places = [(rank, row, expert) for rank, rows in enumerate(self.experts) for row, expert in enumerate(rows) if expert >= 0]
        self.home = {expert: (rank, row) for rank, row, expert in places if row < self.own[rank]}
        self.copies = {(rank, row): expert for rank, row, expert in places if row >= self.own[rank]}


def expect(rounds, pairs):
    """These moves, in rounds in which no rank sends twice or receives twice."""
    assert sorted(move for moves in rounds for move in moves) == sorted(pairs)
    for moves in rounds:
        sources, targets = zip(*((move.source.rank, move.target.rank) for move in moves))
        assert len(set(sources)) == len(sources) and len(set(targets)) == len(targets)


@pytest.mark.parametrize("seed", range(60))
def test_rows_and_moves(seed):
    random, before, plain = np.random.default_rng(seed), None, None
    n_ranks, n_local, slack = (int(random.integers(1, most)) for most in (9, 7, 4))
    slack -= 1
    experts = int(random.integers(1, n_ranks * n_local + 1))
    for _ in range(4):
        extra = random.integers(0, experts, n_ranks * n_local - experts)
        phy2log = random.permutation(np.concatenate([np.arange(experts), extra])).astype(np.int32)
        wanted = PlainRows(phy2log, n_ranks, slack, plain)
        if not wanted.fits:
            with pytest.raises(InvalidArgument, match=r"placement: must leave rank \d+ with at most \d+ own experts and \d+ copies"):
                Rows(phy2log, n_ranks, slack, before)
            continue
        rows = Rows(phy2log, n_ranks, slack, before)
        assert (rows.own, rows.experts, rows.row_of_slot) == (wanted.own, wanted.experts, wanted.row_of_slot)
        assert rows.homes.tolist() == wanted.homes.tolist() and rows.has_copies == bool(wanted.copies)
        assert rows.home == wanted.home
        pulls = [(wanted.home[expert], place) for place, expert in wanted.copies.items()]
        expect(rows._rounds("pull", None), pulls)
        assert sorted(rows.pulls()) == sorted(pulls)
        expect(rows.rounds(), [(place, home) for home, place in pulls])
        for expert in wanted.home:  # the order in which the gradients of one expert are added
            order = [move.source for moves in rows.rounds() for move in moves if move.target == wanted.home[expert]]
            assert order == sorted(order)
        if before is not None:
            assert sorted(rows.pulls(before)) == sorted((wanted.home[expert], place) for place, expert in wanted.copies.items()
                                                        if plain.copies.get(place) != expert)
            expect(rows._rounds("homes", before), [(plain.home[expert], place) for expert, place in wanted.home.items()
                                                   if plain.home[expert][0] != place[0]])
        before, plain = rows, wanted


def test_numbers_equal_the_header():
    from test_native import HEADER, constant

    text = HEADER.read_text()
    for names, prefix in ((_c.MOVES, "MOVES_"), (_c.FLOATS, "")):
        assert {name: constant(text, f"LPLB_{prefix}{name.upper()}") for name in names} == names
    assert (_c.WEIGHTS, _c.GRADIENTS) == (constant(text, "LPLB_REPLICAS_WEIGHTS"), constant(text, "LPLB_REPLICAS_GRADIENTS"))
