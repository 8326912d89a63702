"""From plan to ids: every token reaches a replica of its expert, the loads equal the plan, -1 stays, ratios are within a token."""

from __future__ import annotations

import numpy as np
import pytest

from lplb import Planner, topology
from oracle import FAMILIES, random_loads, random_placement, rank_loads

torch = pytest.importorskip("torch")

SETUPS = {
    "cube": (topology.CUBE_8P2E, 8, 2), "cube, 3 a class": (topology.CUBE_8P2E, 8, 6), "cube, 2 groups": (topology.CUBE_8P2E, 16, 2),
    "ring": (topology.RING_8P, 8, 1), "hypercube": (topology.HYPERCUBE_16P2E, 16, 2), "square": (topology.SQUARE_4P2E, 4, 4),
    "torus": (topology.torus_2d(4, 4), 16, 2), "one self copy": (torch.tensor([[0], [2], [3], [1]]), 4, 1),
}


def ids_with(rng, loads, padding):
    """Ids with exactly these counts, shuffled, with -1 among them."""
    ids = np.concatenate([np.repeat(np.arange(len(loads)), loads), np.full(padding, -1)])
    return torch.from_numpy(rng.permutation(ids))


def check_ids(planner, ids, out):
    assert out.shape == ids.shape and out.dtype == ids.dtype and out.device == ids.device
    chosen = ids >= 0
    assert (out[~chosen] == -1).all()
    assert (planner.phy2log[out[chosen].long()] == ids[chosen]).all()
    realised = torch.bincount(out[chosen].long(), minlength=planner.n_routed_experts)
    assert torch.equal(realised, torch.as_tensor(planner.split()))
    reached = rank_loads(realised, planner.ep_size).reshape(planner.n_group, -1).max(axis=1)
    assert reached.tolist() == [group.bound for group in planner.info().groups]


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_run_on_topologies(name, dtype):
    r2o, ep_size, spare = SETUPS[name]
    planner = Planner(r2o, 8 * ep_size + spare * ep_size, 8 * ep_size, ep_size, device="cpu")
    rng = np.random.default_rng(len(name))
    for family in FAMILIES:
        planner.update_redundancy_mapping(torch.from_numpy(rng.lognormal(0, 1, 8 * ep_size)))
        loads = np.minimum(random_loads(rng, 8 * ep_size, family), 3000)
        ids = ids_with(rng, loads, int(rng.integers(0, 50))).to(dtype)
        check_ids(planner, ids, planner.run(ids, None))
        if len(ids) % 2 == 0:
            check_ids(planner, ids.reshape(2, -1), planner.run(ids.reshape(2, -1), None, 7))
        # The same in three steps.
        counts, _ = planner.count_workload(ids, 1)
        planner.solve(counts)
        check_ids(planner, ids, planner.redirect(ids))


@pytest.mark.parametrize("ranks, slots, most", [(1, 3, 1), (2, 4, 8), (8, 6, 4), (16, 5, 8), (64, 6, 8)])
def test_run_on_general_placements(ranks, slots, most):
    rng = np.random.default_rng(ranks)
    for _ in range(8):
        phy2log, n_logical = random_placement(rng, ranks, slots, most)
        planner = Planner.from_placement(torch.from_numpy(phy2log), ep_size=ranks, device="cpu")
        for family in FAMILIES:
            loads = np.minimum(random_loads(rng, n_logical, family), 1500)
            ids = ids_with(rng, loads, int(rng.integers(0, 50)))
            if planner.n_routed_experts > n_logical:
                check_ids(planner, ids, planner.run(ids, None))


@pytest.mark.parametrize("name", SETUPS)
def test_ratios_are_within_a_token_of_the_plan(name):
    r2o, ep_size, spare = SETUPS[name]
    n_logical = 8 * ep_size
    planner = Planner(r2o, n_logical + spare * ep_size, n_logical, ep_size, device="cpu")
    rng = np.random.default_rng(len(name))
    for family in FAMILIES:
        loads = np.minimum(random_loads(rng, n_logical, family), 3000)
        ids = ids_with(rng, loads, 17)
        for n_sms in (1, 13):
            counts, rows = planner.count_workload(ids, n_sms)
            assert counts.tolist() == loads.tolist()
            probs, _ = planner.solve_probs(counts, None)
            out = planner.weighted_select_target(ids, probs, rows, n_sms)
            chosen = ids >= 0
            assert (out[~chosen] == -1).all() and (planner.phy2log[out[chosen]] == ids[chosen]).all()
            realised = torch.bincount(out[chosen], minlength=planner.n_routed_experts)
            assert (realised - torch.as_tensor(planner.split())).abs().max() <= 1


def test_any_ratio_is_followed():
    """round(ratio * count) tokens of each expert go to the original; ratios outside [0, 1] are clamped, NaN keeps all."""
    planner = Planner(topology.CUBE_8P2E, 80, 64, 8, device="cpu")
    rng = np.random.default_rng(2)
    ids = torch.from_numpy(rng.integers(-1, 64, (3000, 4)))
    counts, rows = planner.count_workload(ids, 5)
    probs = torch.from_numpy(rng.uniform(-0.5, 1.5, (1, 8, 2))).float()
    probs[0, 3, 1] = float("nan")
    out = planner.weighted_select_target(ids, probs, rows, 5)
    realised = torch.bincount(out[out >= 0], minlength=80)
    for rank in range(8):
        for column in range(2):
            expert, share = rank * 8 + column, float(probs[0, rank, column])
            share = 1.0 if share != share else min(max(share, 0.0), 1.0)
            original = int(realised[rank * 10 + column])
            copy = int(realised[int(planner.o2r[rank, column]) * 10 + 8 + column])
            assert original + copy == counts[expert] and abs(original - share * int(counts[expert])) <= 0.5 + 1e-3


def test_tokens_beyond_the_plan_go_to_the_original():
    planner = Planner(topology.CUBE_8P2E, 80, 64, 8, device="cpu")
    loads = torch.full((64,), 10)
    loads[0] = 200
    planner.solve(loads)
    plan = torch.as_tensor(planner.split())
    ids = torch.zeros(1000, dtype=torch.int64)
    realised = torch.bincount(planner.redirect(ids), minlength=80)
    copy = int(planner.o2r[0, 0]) * 10 + 8
    assert realised[copy] == plan[copy] > 0 and realised[0] == 1000 - plan[copy]


def test_sizes_that_are_no_multiple_of_anything():
    planner = Planner(topology.RING_8P, 72, 64, 8, device="cpu")
    for n in (1, 2, 3, 31, 33, 1023, 1025, 4097, 30011):
        ids = torch.randint(-1, 64, (n,))
        check_ids(planner, ids, planner.run(ids, None))
