"""lplb.eplb against an oracle that packs item by item."""

from __future__ import annotations

import numpy as np
import pytest

import lplb
from lplb.eplb import EplbPolicy, keep_slots, rebalance_experts
from oracle import eplb_row

WEIGHT = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
PHY2LOG = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]

# n_logical, num_replicas, num_groups, num_nodes, num_gpus
SHAPES = [(12, 16, 4, 2, 8), (64, 64, 8, 2, 16), (64, 80, 8, 4, 16), (64, 96, 1, 1, 8), (60, 72, 3, 2, 8), (256, 288, 8, 4, 32), (8, 8, 2, 2, 8),
          (8, 32, 1, 1, 4), (16, 16, 16, 1, 1), (5, 8, 5, 2, 4), (10, 15, 7, 3, 5)]


def check(weight, result, replicas, groups, nodes, gpus):
    phy2log, log2phy, logcnt = (np.asarray(part) for part in result)
    for layer, row in enumerate(np.asarray(weight)):
        slots, which, counts = eplb_row(row, replicas, groups, nodes, gpus)
        assert phy2log[layer].tolist() == slots
        assert logcnt[layer].tolist() == counts
        expected = np.full((len(row), int(logcnt.max())), -1)
        for slot, (expert, copy) in enumerate(zip(slots, which)):
            expected[expert, copy] = slot
        assert log2phy[layer].tolist() == expected.tolist()


def test_known_example():
    torch = pytest.importorskip("torch")
    weight = torch.tensor(WEIGHT)
    phy2log, log2phy, logcnt = rebalance_experts(weight, 16, 4, 2, 8)
    assert phy2log.tolist() == PHY2LOG
    for tensor in (phy2log, log2phy, logcnt):
        assert tensor.dtype == torch.int64 and tensor.device.type == "cpu"
    check(weight, (phy2log, log2phy, logcnt), 16, 4, 2, 8)
    assert rebalance_experts(weight.bfloat16(), 16, 4, 2, 8)[0].shape == (2, 16)


def test_arrays_in_arrays_out():
    parts = rebalance_experts(np.array(WEIGHT), 16, 4, 2, 8)
    assert all(isinstance(part, np.ndarray) and part.dtype == np.int64 for part in parts)
    assert parts[0].tolist() == PHY2LOG
    assert parts[1].shape == (2, 12, int(parts[2].max()))
    assert rebalance_experts(WEIGHT, 16, 4, 2, 8)[0].tolist() == PHY2LOG


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_oracle(shape):
    n_logical, replicas, groups, nodes, gpus = shape
    rng = np.random.default_rng(sum(shape))
    layers = [rng.integers(0, 1000, n_logical) for _ in range(6)]
    layers += [np.zeros(n_logical), np.ones(n_logical), np.eye(n_logical)[0] * 1e4, np.arange(n_logical) // 3,
               rng.integers(0, 3, n_logical), np.round(rng.lognormal(3, 2, n_logical))]
    weight = np.array(layers, dtype=np.float64)
    check(weight, rebalance_experts(weight, replicas, groups, nodes, gpus), replicas, groups, nodes, gpus)


def test_no_layers():
    phy2log, log2phy, logcnt = rebalance_experts(np.empty((0, 8)), 16, 1, 1, 4)
    assert phy2log.shape == (0, 16) and logcnt.shape == (0, 8) and log2phy.shape[:2] == (0, 8)


@pytest.mark.parametrize("arguments, words", [
    (([[1.0] * 8], 7, 1, 1, 1), "num_replicas: .*8.*got 7"),
    (([[1.0] * 8], 10, 1, 1, 4), "num_replicas: .*num_gpus = 4, got 10"),
    (([[1.0] * 8], 12, 3, 3, 4), "num_gpus: .*num_nodes = 3, got 4"),
    (([[1.0] * 8], 8, 3, 1, 4), "num_groups: .*8.*got 3"),
    (([[1.0] * 8], 8, 0, 1, 4), "num_groups: .*got 0"),
    (([[1.0] * 8], 8, 1, "one", 4), "num_nodes: .*got 'one'"),
    (([[1.0] * 8], 8, 1, 1, 0), "num_gpus: .*got 0"),
    (([1.0] * 8, 8, 1, 1, 4), r"weight: .*got shape \[8\]"),
    ((np.empty((2, 0)), 8, 1, 1, 4), "weight: .*expert"),
    (([["a"] * 8], 8, 1, 1, 4), "weight: .*numbers"),
    (([[1.0] * 7 + [-1.0]], 8, 1, 1, 4), "weight.*-1"),
    (([[1.0] * 7 + [float("nan")]], 8, 1, 1, 4), "weight.*nan"),
    (([[1.0] * 7 + [float("inf")]], 8, 1, 1, 4), "weight.*inf"),
])
def test_refuses_in_words(arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        rebalance_experts(*arguments)
    assert isinstance(caught.value, lplb.InvalidArgument)


def test_policy_form():
    torch = pytest.importorskip("torch")
    weight = torch.tensor(WEIGHT)
    phy2log = EplbPolicy.rebalance_experts(weight, 16, 4, 2, 8)
    assert phy2log.tolist() == PHY2LOG and phy2log.dtype == torch.int64
    with_old = EplbPolicy.rebalance_experts(weight, 16, 4, 2, 8, old_global_expert_indices=phy2log)
    assert with_old.tolist() == PHY2LOG
    # Another number of slots: nothing can stay.
    assert EplbPolicy.rebalance_experts(weight, 16, 4, 2, 8, phy2log[:, :8]).tolist() == PHY2LOG


def test_experts_that_stay_keep_their_slots():
    rng = np.random.default_rng(7)
    for _ in range(200):
        ranks, per_rank, layers = int(rng.integers(1, 9)), int(rng.integers(1, 9)), int(rng.integers(1, 4))
        n_logical = int(rng.integers(1, ranks * per_rank + 1))
        old, new = (rng.integers(0, n_logical, (layers, ranks * per_rank)) for _ in range(2))
        kept = keep_slots(new, old, ranks)
        for layer in range(layers):
            for rank in range(ranks):
                where = slice(rank * per_rank, (rank + 1) * per_rank)
                before, wanted, got = old[layer, where].tolist(), new[layer, where].tolist(), kept[layer, where].tolist()
                assert sorted(got) == sorted(wanted)
                for expert in set(wanted):
                    stays = min(before.count(expert), wanted.count(expert))
                    assert sum(a == b == expert for a, b in zip(before, got)) == stays
                # Newcomers keep their order, so equal inputs give equal placements.
                moved = [expert for position, expert in enumerate(got) if before[position] != expert]
                rest = list(wanted)
                for position, expert in enumerate(got):
                    if before[position] == expert:
                        rest.remove(expert)
                assert moved == rest


def test_policy_keeps_slots_of_a_real_change():
    rng = np.random.default_rng(3)
    old = EplbPolicy.rebalance_experts(rng.integers(1, 100, (4, 64)), 96, 8, 2, 8)
    weight = rng.integers(1, 100, (4, 64))
    fresh = EplbPolicy.rebalance_experts(weight, 96, 8, 2, 8)
    kept = EplbPolicy.rebalance_experts(weight, 96, 8, 2, 8, old)
    assert (np.sort(kept.reshape(4, 8, 12)) == np.sort(fresh.reshape(4, 8, 12))).all()
    assert (kept == old).sum() >= (fresh == old).sum()


@pytest.mark.parametrize("policy", ["balanced", "flow"])
def test_other_policies_in_the_same_form(policy):
    weight = np.random.default_rng(8).lognormal(0, 1, (3, 64))
    phy2log, log2phy, logcnt = lplb.eplb.rebalance_experts(weight, 80, 1, 1, 8, policy=policy)
    assert np.array_equal(phy2log, lplb.place(weight, ep_size=8, slots=80, policy=policy).phy2log)
    for layer in range(3):
        assert np.array_equal(logcnt[layer], np.bincount(phy2log[layer], minlength=64))
        for expert in range(64):
            slots = log2phy[layer, expert]
            assert slots[slots >= 0].tolist() == np.flatnonzero(phy2log[layer] == expert).tolist()
            assert (slots[logcnt[layer, expert]:] == -1).all()
    moved = lplb.eplb.EplbPolicy.rebalance_experts(weight[::-1].copy(), 80, 1, 1, 8, phy2log, policy=policy, max_moves=4)
    new = (moved.reshape(-1, 10)[:, :, None] != phy2log.reshape(-1, 10)[:, None, :]).all(2).sum()
    assert 0 < new <= 4
    with pytest.raises(lplb.LplbError, match="max_moves: must not be given with policy deepseek, which places anew, got 4"):
        lplb.eplb.EplbPolicy.rebalance_experts(weight, 80, 1, 1, 8, phy2log, policy="deepseek", max_moves=4)


def test_empty_slots_stay_on_their_rank():
    """-1, as lplb.place() writes it."""
    assert keep_slots(np.array([[0, -1, 1, -1]]), np.array([[-1, -1, -1, 1]]), 2).tolist() == [[-1, 0, -1, 1]]
    rng = np.random.default_rng(0)
    for _ in range(50):
        new, old = rng.integers(-1, 6, (2, 3, 12))
        kept = keep_slots(new, old, 3)
        assert np.array_equal(np.sort(kept.reshape(3, 3, 4)), np.sort(new.reshape(3, 3, 4)))
