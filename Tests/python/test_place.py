"""lplb.place: properties of every policy over random and degenerate sizes, its report against another count, budgets, and words."""

from __future__ import annotations

import time

import numpy as np
import pytest

import lplb
from lplb import LplbError, Planner, place

POLICIES = ("flow", "balanced")


def even_loads(loads, slots, ranks):
    """The load of each rank with an even split, counted slot by slot."""
    copies = np.bincount(slots[slots >= 0], minlength=len(loads))
    share = np.where(slots >= 0, loads[slots] / np.maximum(copies, 1)[slots], 0.0)
    return share.reshape(ranks, -1).sum(1)


def exact_max(loads, slots, ranks):
    scaled = np.round(loads / (loads.sum() or 1) * 2**36).astype(np.int64)
    solution = lplb.solve(scaled, slots, ep_size=ranks)
    assert solution.certified
    return solution.max_load, scaled.sum()


def check(placed, history, slots_of_rank, previous=None):
    """Everything that holds for each placement; the report is counted again."""
    loads = history.sum(0) if history.ndim == 3 else history
    ranks, width, live = len(slots_of_rank), max(slots_of_rank), np.count_nonzero(slots_of_rank)
    assert placed.phy2log.shape == (len(loads), ranks * width) and placed.phy2log.dtype == np.int32
    for layer, slots in enumerate(placed.phy2log):
        rows = slots.reshape(ranks, width)
        for row, number in zip(rows, slots_of_rank):
            assert (row[number:] == -1).all()
        assert set(slots[slots >= 0]) == set(range(loads.shape[1])), "every expert is placed"
        held = [row[row >= 0].tolist() for row in rows]
        assert placed.duplicates[layer] == sum(len(row) - len(set(row)) for row in held)
        rank_loads = even_loads(loads[layer], slots, ranks)
        most = rank_loads.max()
        assert placed.even_balance[layer] == pytest.approx(loads[layer].sum() / live / most if most else 1, rel=1e-9)
        top, total = exact_max(loads[layer], slots, ranks)
        assert placed.exact_balance[layer] == pytest.approx(total / live / top if top else 1, rel=1e-9)
        if previous is not None:
            before = [set(row.tolist()) for row in previous[layer].reshape(ranks, width)]
            moves = sum(len(set(row) - old) for row, old in zip(held, before))
            assert placed.n_moves[layer] == moves
            assert sum(move.layer == layer for move in placed.moves()) == moves
            for rank, (row, old) in enumerate(zip(rows, previous[layer].reshape(ranks, width))):
                stayed = set(row.tolist()) & set(old.tolist()) - {-1}
                for expert in stayed:
                    if (row == expert).sum() == (old == expert).sum() == 1:
                        assert np.array_equal(np.flatnonzero(row == expert), np.flatnonzero(old == expert)), f"kept its slot on rank {rank}"


def random_case(seed):
    rng = np.random.default_rng(seed)
    ranks = int(rng.choice([1, 2, 3, 5, 8, 16, 33, 64]))
    experts = int(rng.choice([1, 2, 7, 16, 40, 64]))
    slots = rng.integers(0, 2 * experts // ranks + 3, size=ranks)
    while slots.sum() < experts or not slots.any():
        slots[rng.integers(ranks)] += 1 + experts // ranks
    snapshots, layers = int(rng.choice([1, 1, 3])), int(rng.choice([1, 3]))
    kind = rng.choice(["log-normal", "equal", "zero", "one", "huge", "tiny"])
    history = {"log-normal": lambda s: rng.lognormal(0, rng.uniform(0.1, 2), s), "equal": np.ones, "zero": np.zeros,
               "one": lambda s: (np.arange(s[-1]) == s[-1] // 2) * np.ones(s), "huge": lambda s: rng.random(s) * 1e300 / 1e4,
               "tiny": lambda s: rng.random(s) * 1e-300}[kind]((snapshots, layers, experts))
    return history, slots.tolist()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(40))
def test_random_cases(policy, seed):
    history, slots = random_case(seed)
    placed = place(history, ep_size=len(slots), slots=slots, policy=policy)
    check(placed, history, slots)
    again = place(history, ep_size=len(slots), slots=slots, policy=policy)
    assert np.array_equal(placed.phy2log, again.phy2log)
    live = sum(number > 0 for number in slots)
    if policy == "balanced" and sum(slots) <= history.shape[-1] * live and max(slots) <= history.shape[-1] and len(set(slots)) == 1:
        assert not placed.duplicates.any(), "no duplicate where none is needed"


@pytest.mark.parametrize("policy", ["flow", "balanced", "repair"])
@pytest.mark.parametrize("seed", range(25))
def test_a_budget_of_moves_is_kept(policy, seed):
    history, slots = random_case(1000 + seed)
    rng = np.random.default_rng(seed)
    first = place(history, ep_size=len(slots), slots=slots, policy="balanced").phy2log
    arriving = history * rng.lognormal(0, 0.4, history.shape)
    before = place(arriving, ep_size=len(slots), slots=slots, policy="repair", previous=first, max_moves=0)
    assert np.array_equal(before.phy2log, first) and not before.n_moves.any() and before.moves() == []
    key = "even_balance" if policy == "balanced" else "exact_balance"
    balance = getattr(before, key).mean()
    for budget in (1, 5, 50):
        placed = place(arriving, ep_size=len(slots), slots=slots, policy=policy, previous=first, max_moves=budget)
        check(placed, arriving, slots, first)
        assert placed.n_moves.sum() <= budget
        assert getattr(placed, key).mean() >= balance - 1e-9, "more moves are never worse"
        balance = getattr(placed, key).mean()


def drifted(seed=0, layers=4, experts=128):
    rng = np.random.default_rng(seed)
    history = rng.lognormal(0, 0.8, (layers, experts)) * 1e4
    groups = np.repeat(rng.normal(0, 0.15, (layers, experts // 32)), 32, axis=1)
    return history, history * np.exp(groups + rng.normal(0, 0.25, history.shape))


def exact_after(placed, arriving, ranks):
    found = []
    for loads, slots in zip(arriving, placed.phy2log):
        most, total = exact_max(loads, slots, ranks)
        found.append(total / ranks / most)
    return np.mean(found)


def test_flow_is_made_for_exact_dispatch():
    history, arriving = drifted()
    flow, balanced, deepseek = (
        place(history, ep_size=16, slots=160, policy=policy) for policy in ("flow", "balanced", "deepseek"))
    assert exact_after(flow, arriving, 16) > exact_after(balanced, arriving, 16) + 0.01
    assert exact_after(flow, arriving, 16) > exact_after(deepseek, arriving, 16) + 0.01
    assert (balanced.even_balance > 0.999).all() and not balanced.duplicates.any()


def test_flow_keeps_what_the_history_itself_allows():
    """Without drift it is hardly worse than the balanced placement, and with too few replicas for hubs it is that placement or better."""
    history, _ = drifted(2, experts=64)
    for ranks, slots in ((16, 80), (16, 72)):
        flow, balanced = (place(history, ep_size=ranks, slots=slots, policy=policy) for policy in ("flow", "balanced"))
        assert (flow.exact_balance > 0.99 * balanced.exact_balance - 1e-9).all()


def test_copies_and_places_are_chosen_together_where_there_are_few():
    """Greedy copies (five of each heavy expert) make the heaviest rank 232 here, whatever the places are."""
    loads = np.array([[600, 560, 120, 120, 20, 10, 10, 10.]])
    placed = place(loads, ep_size=8, slots=16, policy="balanced")
    check(placed, loads, [2] * 8)
    assert loads.sum() / 8 / placed.even_balance[0] == pytest.approx(560 / 3 + 10)


def test_repair_recovers_what_drift_took():
    history, arriving = drifted(1)
    placed = place(history, ep_size=32, slots=160)
    repaired = place(arriving, ep_size=32, slots=160, policy="repair", previous=placed.phy2log, max_moves=24)
    assert repaired.n_moves.sum() <= 24
    lost = 1 - exact_after(placed, arriving, 32)
    assert 1 - exact_after(repaired, arriving, 32) < lost / 2


def test_deepseek_is_the_function_of_that_name():
    history = np.random.default_rng(3).lognormal(0, 1, (5, 64)).astype(np.float32)
    for nodes, groups in ((1, 1), (2, 8)):
        placed = place(history, ep_size=8, slots=80, policy="deepseek", nodes=nodes, groups=groups)
        assert np.array_equal(placed.phy2log, lplb.eplb.rebalance_experts(history, 80, groups, nodes, 8)[0])


def test_groups_stay_on_their_node():
    history = np.random.default_rng(4).lognormal(0, 1, (6, 64))
    placed = place(history, ep_size=8, slots=80, policy="balanced", nodes=4, groups=8)
    check(placed, history, [10] * 8)
    for slots in placed.phy2log:
        for group in range(8):
            nodes = np.flatnonzero(slots // 8 == group) // 20
            assert len(set(nodes)) == 1
    best = lplb.eplb.rebalance_experts(history, 80, 8, 4, 8)[0]
    for loads, slots, balance in zip(history, best, placed.even_balance):
        theirs = even_loads(loads, slots, 8)
        assert balance >= theirs.mean() / theirs.max() - 1e-3


def test_dead_ranks():
    history = np.random.default_rng(5).lognormal(0, 1, (3, 64))
    whole = place(history, ep_size=8, slots=80)
    for policy in POLICIES:
        placed = place(history, ep_size=8, slots=80, policy=policy, dead=[2, 5])
        check(placed, history, [14, 14, 0, 13, 13, 0, 13, 13])
    # The same slots, and what the dead ranks held must come back on others, whatever the budget is.
    placed = place(history, ep_size=8, slots=[10] * 8, policy="repair", dead=[2], previous=whole.phy2log, max_moves=1)
    check(placed, history, [10, 10, 0, 10, 10, 10, 10, 10], whole.phy2log)
    assert all(move.target // 10 != 2 for move in placed.moves())
    with pytest.raises(LplbError, match="slots: must be at least n_logical 64 in all, got 20"):
        place(history, ep_size=8, slots=[10] * 8, dead=[0, 1, 2, 3, 4, 5])


def test_a_planner_runs_on_empty_slots_and_dead_ranks():
    rng = np.random.default_rng(6)
    history = rng.lognormal(0, 1, (1, 32))
    placed = place(history, ep_size=4, slots=[12, 0, 15, 13], policy="balanced")
    planner = Planner.from_placement(placed.phy2log[0], n_logical=32, ep_size=4)
    ids = rng.choice(32, size=(999, 4), p=history[0] / history[0].sum())
    physical = planner.run(ids, None)
    assert np.array_equal(placed.phy2log[0][physical], ids)
    group = planner.info().groups[0]
    assert group.certified
    tokens = np.bincount(ids.ravel(), minlength=32)
    assert lplb.witness_bound(tokens, placed.phy2log[0], 4, group.witness) == group.max_load
    loads = np.bincount(np.asarray(physical).ravel() // 15, minlength=4)
    assert loads.max() == group.max_load and loads[1] == 0
    assert lplb.witness_bound(np.bincount(ids.ravel(), minlength=32), placed.phy2log[0], 4, group.witness) == group.bound
    planner.update_placement(place(history, ep_size=4, slots=[15, 13, 12, 0]).phy2log[0])
    assert (np.asarray(planner.run(ids, None)) // 15 < 3).all()
    phy2log, log2phy, logcnt = planner.mapping()[:3]
    assert np.asarray(logcnt).sum() == (np.asarray(phy2log) >= 0).sum() == 40


def test_snapshots_and_tensors():
    torch = pytest.importorskip("torch")
    history = np.random.default_rng(7).lognormal(0, 1, (3, 2, 48))
    placed = place(torch.from_numpy(history), ep_size=6, slots=60, policy="balanced")
    assert isinstance(placed.phy2log, torch.Tensor) and placed.phy2log.dtype == torch.int32
    assert np.array_equal(placed.phy2log.numpy(), place(history.sum(0), ep_size=6, slots=60, policy="balanced").phy2log)
    assert isinstance(placed.n_moves, torch.Tensor) and placed.moves() == []


def test_sources_of_moves():
    """From the same node where one is there, and in turn."""
    before = np.array([[0, 1, 2, 3, 0, 4, 5, 6]], dtype=np.int32)
    history = np.ones((1, 7))
    placed = place(history, ep_size=4, slots=[2] * 4, policy="repair", previous=before, max_moves=0, nodes=2)
    moved = lplb.Placed(np.array([[0, 1, 2, 0, 0, 4, 5, 3]], dtype=np.int32), placed.even_balance, placed.exact_balance, placed.duplicates,
                        placed.n_moves, 4, 2, before)
    assert moved.moves() == [(0, 0, 0, 3), (0, 3, 3, 7)]


def test_forced_moves_count_against_the_budget():
    """What a dead rank held must move; the rest of the budget is what is left of it."""
    rng = np.random.default_rng(8)
    history = rng.lognormal(0, 1, (4, 32))
    before = np.tile(np.arange(48, dtype=np.int32) % 32, (4, 1))  # ranks 0 and 4, 1 and 5 hold the same; only ranks 2 and 3 can lose some
    forced = place(history, ep_size=6, slots=[8] * 6, policy="repair", previous=before, dead=[2], max_moves=0).n_moves.sum()
    assert forced == 4 * 8
    for policy in ("repair", "balanced", "flow"):
        for budget in (forced, forced + 3):
            placed = place(history, ep_size=6, slots=[8] * 6, policy=policy, previous=before, dead=[2], max_moves=int(budget))
            check(placed, history, [8, 8, 0, 8, 8, 8], before)
            assert placed.n_moves.sum() <= budget


@pytest.mark.parametrize("dead", [[], [5]])
def test_groups_stay_on_their_node_within_a_budget(dead):
    rng = np.random.default_rng(9)
    history = rng.lognormal(0, 1, (6, 64))
    first = place(history, ep_size=8, slots=[10] * 8, policy="balanced", nodes=4, groups=8).phy2log
    arriving = history * rng.lognormal(0, 0.5, history.shape)
    given = dict(ep_size=8, slots=[10] * 8, previous=first, nodes=4, groups=8, dead=dead)
    if dead:
        given["slots"] = [10] * 4 + [16] * 2 + [10] * 2
        given["previous"] = np.full((6, 8, 16), -1, dtype=np.int32)
        given["previous"][:, :, :10] = first.reshape(6, 8, 10)
        given["previous"] = given["previous"].reshape(6, -1)
    kept = place(arriving, policy="balanced", max_moves=0, **given)
    placed = place(arriving, policy="balanced", max_moves=120, **given)
    assert placed.n_moves.sum() <= 120
    if not dead:  # a host with one rank left has nowhere to go
        assert placed.even_balance.mean() > kept.even_balance.mean()
    width = len(placed.phy2log[0]) // 8
    for slots in placed.phy2log:
        for group in range(8):
            assert len(set(np.flatnonzero(slots // 8 == group) // (2 * width))) == 1


@pytest.mark.timeout(60)
@pytest.mark.parametrize("policy, ranks, experts, slots", [
    ("flow", 1024, 8, 2048), ("balanced", 512, 8, 8192), ("balanced", 1024, 2, 8192), ("repair", 512, 2048, 4096),
    ("flow", 1024, 4096, 5120)])
def test_large_sizes_take_seconds(policy, ranks, experts, slots):
    rng = np.random.default_rng(10)
    history = rng.lognormal(0, 1, (1, experts))
    before = place(history, ep_size=ranks, slots=slots, policy="balanced").phy2log if policy == "repair" else None
    began = time.monotonic()
    placed = place(history[:, ::-1].copy(), ep_size=ranks, slots=slots, policy=policy, previous=before)
    assert time.monotonic() - began < 6
    assert set(placed.phy2log[0].tolist()) - {-1} == set(range(experts))


@pytest.mark.parametrize("change, words", [
    ({"history": [[1.0, float("nan")]]}, r"history\[0\]\[0\]\[1\]: must be finite and not negative, got nan"),
    ({"history": [[1.0, -1.0]]}, r"history\[0\]\[0\]\[1\]: must be finite and not negative, got -1"),
    ({"history": [1.0, 2.0]}, "history: must be .layers, experts. or .snapshots, layers, experts., got shape"),
    ({"policy": "best"}, "policy: must be one of flow, balanced, deepseek, repair, got 'best'"),
    ({"slots": 1}, "slots: must be at least n_logical 2 in all, got 1"),
    ({"slots": [2, 2, 2]}, "slots: must be a number in all, or one for each of the 2 ranks, got 3 numbers"),
    ({"slots": [-1, 4]}, "slots: must be at least 0 for every rank"),
    ({"dead": [0, 1]}, "dead: must leave a rank alive"),
    ({"dead": [2]}, "dead: must be at most 1"),
    ({"policy": "repair"}, "previous: must be given with policy repair"),
    ({"max_moves": 1}, "max_moves: needs previous"),
    ({"max_moves": -1}, "max_moves: must be at least 0"),
    ({"previous": [[0, 1, 0, 2]]}, r"previous\[0\]\[3\]: must be a logical expert, 0 .. 1, or -1 for none, got 2"),
    ({"previous": [[0, 1]]}, r"previous: must be \[1 layers, 2 \* 2 slots\], got shape \[1, 2\]"),
    ({"policy": "deepseek", "previous": [[0, 1, 0, 1]], "max_moves": 1}, "max_moves: must not be given with policy deepseek"),
    ({"policy": "deepseek", "slots": [3, 1]}, "policy: deepseek needs equally many slots on every rank"),
    ({"nodes": 3}, "n_nodes: must lie in 1 .. 2, got 3"),
    ({"tolerance": 2}, "tolerance: must lie in 0 .. 1"),
    ({"tolerance": "x"}, "tolerance: must be a number, got 'x'"),
    ({"tolerance": None}, "tolerance: must be a number, got None"),
    ({"dead": 1}, "dead: must be a list of ranks, got 1"),
    ({"dead": None}, "dead: must be a list of ranks, got None"),
    ({"slots": [2**62, 2**62]}, "slots: must be at most 8192 for each rank, got 4611686018427387904"),
    ({"history": np.ones((0, 1, 2))}, r"history: must have at least one snapshot, got shape \[0, 1, 2\]"),
    ({"ep_size": 0}, "ep_size: must be at least 1"),
])
def test_words(change, words):
    with pytest.raises(LplbError, match=words):
        place(**{"history": [[3.0, 1.0]], "ep_size": 2, "slots": 4, **change})
