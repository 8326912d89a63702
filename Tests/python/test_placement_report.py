"""What place() says beside balance: homes, pulls and pushes, tokens that leave ranks and hosts; and how ranks are named. Counted again."""

from __future__ import annotations

import numpy as np
import pytest

import lplb
from lplb import LplbError, Planner, place, placement_report
from lplb.placement import Rows
from test_place import check, exact_after, random_case


def recount(report, placed, ranks):
    """Homes by lplb.homes, pulls and pushes by the moves that Rows plans."""
    width = placed.phy2log.shape[1] // ranks
    for layer, slots in enumerate(placed.phy2log):
        homes = lplb.homes(slots, ranks)
        assert np.array_equal(report.homes[layer], homes) and np.array_equal(slots[homes], np.arange(len(homes)))
        moves = Rows(slots, ranks, width).pulls()  # slack for ranks that own all they hold
        assert report.pulls[layer].tolist() == np.bincount([move.target.rank for move in moves], minlength=ranks).tolist()
        assert report.pushes[layer].tolist() == np.bincount([move.source.rank for move in moves], minlength=ranks).tolist()


@pytest.mark.parametrize("policy", ["flow", "balanced"])
@pytest.mark.parametrize("seed", range(15))
def test_copies_are_counted_again(policy, seed):
    history, slots = random_case(3000 + seed)
    placed = place(history, ep_size=len(slots), slots=slots, policy=policy)
    report = placed.report
    recount(report, placed, len(slots))
    assert np.array_equal(report.duplicates, placed.duplicates)
    assert report.even_balance == pytest.approx(placed.even_balance, rel=1e-9)
    assert report.exact_balance == pytest.approx(placed.exact_balance, rel=1e-9)
    assert ((0 <= report.leaves_node) & (report.leaves_node <= report.leaves_rank) & (report.leaves_rank <= 1)).all()
    assert (report.inbound <= 1 / placed.exact_balance[:, None] + 1e-6).all(), "no more arrives than the busiest rank's load"


def sent(slots, loads, ranks, nodes, live):
    """[source, target] tokens, by a planner of every rank, each live rank bringing the same."""
    counts = np.zeros((ranks, len(loads)), dtype=np.int64)
    counts[live] = loads // len(live)
    found = []
    for rank in range(ranks):
        with Planner.from_placement(slots, ep_size=ranks, n_logical=len(loads), rank=rank, n_nodes=nodes, device="cpu") as planner:
            planner.solve(counts)
            found.append(np.asarray(planner.assignment()).reshape(ranks, -1).sum(1))
    return np.stack(found)


@pytest.mark.parametrize("policy, nodes, slots", [
    ("flow", 1, [10] * 8), ("flow", 4, [10] * 8), ("balanced", 2, [10] * 8), ("deepseek", 2, [10] * 8),
    ("flow", 2, [0, 20, 20, 0, 19, 21, 0, 0]), ("balanced", 4, [32, 0, 34, 0, 0, 0, 0, 0])])
def test_locality_is_what_planners_do(policy, nodes, slots):
    rng = np.random.default_rng(nodes)
    live = np.flatnonzero(slots)
    # The report scales loads to 2^36 tokens in all and deals them out to the live ranks: these are so already.
    loads = (rng.dirichlet(np.full(64, 0.5)) * (2**36 // len(live))).astype(np.int64) * len(live)
    loads[0] += 2**36 - loads.sum()
    placed = place(loads[None], ep_size=8, slots=slots, policy=policy, nodes=nodes)
    report = placed.report
    to = sent(placed.phy2log[0], loads, 8, nodes, live)
    near = to.reshape(nodes, 8 // nodes, nodes, 8 // nodes).sum((1, 3))
    assert to.sum() == 2**36
    assert report.leaves_rank[0] == 1 - np.trace(to) / 2**36 and report.leaves_node[0] == 1 - np.trace(near) / 2**36
    assert np.array_equal(report.inbound[0], (to.sum(0) - np.diag(to)) / (2**36 / len(live)))


def test_by_hand():
    """Expert 0 on both ranks, 2 of its 4 tokens on each, where they stay; half of the other experts' tokens have to go."""
    for nodes in (1, 2):
        report = placement_report(np.array([[0, 1, 0, 2]]), ep_size=2, history=[[4.0, 2.0, 2.0]], nodes=nodes)
        assert (report.leaves_rank, report.leaves_node) == (0.25, 0.25 * (nodes - 1))
        assert report.inbound.tolist() == [[0.25, 0.25]] and (report.exact_balance, report.duplicates) == (1, 0)
        assert report.homes.tolist() == [[0, 1, 3]]
        assert report.pulls.tolist() == [[0, 1]] and report.pushes.tolist() == [[1, 0]]
    twice = placement_report(np.array([[0, 0, 0, 1]]), ep_size=2, history=[[[3.0, 1.0]], [[1.0, 3.0]]])  # a duplicate is no copy to send
    assert twice.duplicates == 1 and twice.pulls.sum() == twice.pushes.sum() == 1 and twice.exact_balance == 1


def test_hubs_go_round():
    """In a layer one rank gives to many; over all layers each about as many."""
    history = np.random.default_rng(0).lognormal(0, 1, (16, 128))
    placed = place(history, ep_size=32, slots=160)
    pulls, pushes = placed.report.pulls, placed.report.pushes
    assert np.median(pushes.max(1)) >= 4 and pulls.sum() == pushes.sum() == 16 * 32
    assert pushes.sum(0).max() <= 1.25 * 16 and pulls.sum(0).max() <= 1.1 * 16
    assert np.array_equal(placed.phy2log, place(history, ep_size=32, slots=160).phy2log)


@pytest.mark.parametrize("slots, nodes, groups", [([20] * 8, 1, 1), ([20] * 8, 4, 8), ([24, 20, 24, 20, 20, 24, 0, 20], 1, 1)])
def test_ranks_change_places_and_nothing_else(slots, nodes, groups):
    """Each layer has the parts that it has alone, on ranks of the same size, within the host where groups stay on hosts."""
    history = np.random.default_rng(1).lognormal(0, 1, (6, 64))
    given = dict(ep_size=8, slots=slots, policy="balanced", nodes=nodes, groups=groups, even_homes=True)
    placed, width, moved = place(history, **given), max(slots), 0
    check(placed, history, slots)
    for layer in range(6):
        where = positions(place(history[layer:layer + 1], **given).phy2log[0], placed.phy2log[layer], width)
        assert sorted(where) == list(range(8)) and [slots[rank] for rank in where] == slots
        assert nodes == 1 or all(rank // 2 == part // 2 for part, rank in enumerate(where))
        moved += where != list(range(8))
    assert moved


def positions(alone, now, width):
    return [np.flatnonzero((now.reshape(-1, width) == part).all(1))[0] for part in alone.reshape(-1, width)]


@pytest.mark.parametrize("policy", ["flow", "balanced"])
@pytest.mark.parametrize("slots", [[10] * 8, [13, 8, 12, 0, 13, 8, 12, 14]])
def test_copies_stand_on_different_hosts(policy, slots):
    """The same parts on ranks of the same size, so that fewer tokens cross; DeepSeek's program stays as it is."""
    history = np.random.default_rng(2).lognormal(0, 1, (1, 64))
    placed = {nodes: place(history, ep_size=8, slots=slots, policy=policy, nodes=nodes) for nodes in (1, 2, 4)}
    for nodes in (2, 4):
        where = positions(placed[1].phy2log[0], placed[nodes].phy2log[0], max(slots))
        assert sorted(where) == list(range(8)) and [slots[rank] for rank in where] == slots
        before = placement_report(placed[1].phy2log, ep_size=8, history=history, nodes=nodes)
        assert placed[nodes].report.leaves_node <= before.leaves_node
        assert placed[nodes].report.leaves_node < before.leaves_node or max(slots) > 10  # where sizes differ there may be no better way
        assert placed[nodes].report.exact_balance == pytest.approx(before.exact_balance)


@pytest.mark.parametrize("policy", ["flow", "balanced"])
def test_a_new_placement_keeps_what_it_can(policy):
    history = np.random.default_rng(2).lognormal(0, 1, (3, 64))
    placed = place(history, ep_size=8, slots=80, policy=policy)
    renamed = placed.phy2log.reshape(3, 8, 10)[:, [3, 0, 1, 2, 7, 6, 5, 4], ::-1].reshape(3, 80)
    again = place(history, ep_size=8, slots=80, policy=policy, previous=renamed)
    check(again, history, [10] * 8, renamed)
    if policy == "balanced":  # flow begins with other hubs in each layer
        assert np.array_equal(again.phy2log, renamed)
    arriving = history * np.random.default_rng(3).lognormal(0, 0.3, history.shape)
    new = place(arriving, ep_size=8, slots=80, policy=policy, previous=placed.phy2log)
    check(new, arriving, [10] * 8, placed.phy2log)
    assert new.n_moves.sum() < 0.8 * 240  # without a choice of ranks 85% of the slots


# ---- homes for training ----

def owned(placed, ranks):
    width = placed.phy2log.shape[1] // ranks
    return np.stack([np.bincount(homes // width, minlength=ranks) for homes in placed.report.homes])


@pytest.mark.parametrize("policy", ["flow", "balanced"])
@pytest.mark.parametrize("ranks, slots, experts", [(8, 72, 64), (16, 144, 128), (6, 72, 64), (32, 160, 128)])
def test_every_rank_can_own_equally_many(policy, ranks, slots, experts):
    history = np.random.default_rng(4).lognormal(0, 1, (3, experts))
    placed = place(history, ep_size=ranks, slots=slots, policy=policy, even_homes=True)
    check(placed, history, [slots // ranks] * ranks)
    numbers = owned(placed, ranks)
    assert numbers.min() == experts // ranks and numbers.max() == -(-experts // ranks)
    free = place(history, ep_size=ranks, slots=slots, policy=policy)
    score = exact_after if policy == "flow" else lambda placed, *_: placed.even_balance.mean()
    assert score(placed, history, ranks) > score(free, history, ranks) - 0.02, "a few swaps of like loads"


def test_even_homes_are_needed():
    """Without being asked for, neither policy has them here."""
    history = np.random.default_rng(4).lognormal(0, 1, (3, 128))
    numbers = owned(place(history, ep_size=32, slots=160, policy="balanced"), 32)
    assert numbers.min() < 4 < numbers.max()


@pytest.mark.parametrize("policy", ["flow", "balanced"])
def test_even_homes_or_words(policy):
    even = 0
    for seed in range(20):
        history, slots = random_case(5000 + seed)
        live, experts = np.flatnonzero(slots), history.shape[-1]
        try:
            placed = place(history, ep_size=len(slots), slots=slots, policy=policy, even_homes=True)
        except LplbError as error:
            assert "even_homes: must be 0 where no placement was found in which every rank can own " in str(error)
            continue
        check(placed, history, slots)
        recount(placed.report, placed, len(slots))
        numbers = owned(placed, len(slots))[:, live]
        assert numbers.min() >= experts // live.size and numbers.max() <= -(-experts // live.size)
        even += 1
    assert even >= 5


@pytest.mark.parametrize("change, words", [
    ({"slots": [1, 7]}, r"can own 2 of the 4 experts, got rank 0 with 1 in layer 0$"),
    ({"policy": "deepseek", "history": np.random.default_rng(4).lognormal(0, 1, (1, 128)), "ep_size": 32, "slots": 160},
     r"can own 4 of the 128 experts, got rank \d+ with \d in layer 0, where policy or max_moves leave no choice"),
    ({"policy": "repair", "previous": [[0, 1, 2, 3, 0, 0, 0, 0]], "max_moves": 0}, "where policy or max_moves leave no choice"),
])
def test_uneven_homes_are_refused_in_words(change, words):
    with pytest.raises(LplbError, match="even_homes: must be 0 where no placement was found.*" + words):
        place(**{"history": [[3.0, 1.0, 1.0, 1.0]], "ep_size": 2, "slots": 8, "even_homes": True, **change})


@pytest.mark.parametrize("change, words", [
    ({"phy2log": [[0, 1, 2, 2]]}, r"phy2log\[0\]\[2\]: must be a logical expert, 0 .. 1, or -1 for none, got 2"),
    ({"phy2log": [[0, 1], [0, 0]], "history": np.ones((2, 2))}, r"phy2log\[1\]: must hold every logical expert at least once, got no slot for expert 1"),
    ({"phy2log": [[0, 1, 0]]}, "phy2log: must have a number of slots that is a multiple of ep_size 2"),
    ({"phy2log": [0, 1]}, "phy2log: must have 2 dimensions"),
    ({"history": np.ones((3, 2))}, "history: must have the 1 layers of phy2log"),
    ({"history": [[1.0, float("inf")]]}, r"history\[0\]\[0\]\[1\]: must be finite and not negative, got inf"),
    ({"nodes": 3}, "n_nodes: must lie in 1 .. 2, got 3"),
])
def test_words(change, words):
    with pytest.raises(LplbError, match=words):
        placement_report(**{"phy2log": [[0, 1]], "ep_size": 2, "history": [[1.0, 2.0]], **change})


def test_reports_of_tensors_are_tensors():
    torch = pytest.importorskip("torch")
    placed = place(torch.rand(2, 16, generator=torch.Generator().manual_seed(0)), ep_size=4, slots=20)
    assert all(isinstance(array, torch.Tensor) for array in vars(placed.report).values()) and placed.report.pulls.shape == (2, 4)
