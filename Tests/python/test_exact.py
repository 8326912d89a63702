"""Every plan is the optimum and proves it: 12,000 random instances against HiGHS, brute force (to 8 ranks) and the definition."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

import lplb
from lplb import Planner, topology
from oracle import (FAMILIES, brute_force_optimum, check_split, linear_optima, optimum, proven, random_loads, random_placement)

# r2o, ep_size, redundant slots a rank; 8,000 instances
TOPOLOGIES = {
    "square": (topology.SQUARE_4P2E, 4, 2),
    "cube": (topology.CUBE_8P2E, 8, 2),
    "cube, 3 experts a class": (topology.CUBE_8P2E, 8, 6),
    "cube, 4 groups": (topology.CUBE_8P2E, 32, 2),
    "ring": (topology.RING_8P, 8, 1),
    "hypercube": (topology.HYPERCUBE_16P2E, 16, 2),
    "torus 2x4": (topology.torus_2d(2, 4), 8, 2),
    "torus 8x4": (topology.torus_2d(8, 4), 32, 2),
    "torus 8x8": (topology.torus_2d(8, 8), 64, 2),
    "self copies": (np.array([[0, 1], [1, 2], [2, 0], [3, 3]]), 4, 2),
}
LOADS_A_TOPOLOGY = 800

# ranks, slots a rank, most replicas of an expert; 4,000 instances
GENERAL = [(1, 4, 1), (2, 3, 2), (4, 4, 8), (5, 3, 4), (8, 4, 2), (8, 6, 8), (12, 4, 5), (16, 6, 8), (32, 9, 8), (64, 5, 8)]
PLACEMENTS, LOADS_A_PLACEMENT = 20, 20


def groups_of(loads, phy2log, ep_size, group_size):
    """The groups as instances of their own: (loads, phy2log, ranks)."""
    for slots in np.asarray(phy2log).reshape(ep_size // group_size, -1):
        experts, local = np.unique(slots, return_inverse=True)
        yield np.asarray(loads)[experts], local, group_size


def check_optima(instances, groups):
    """Instances against HiGHS, all in one program; small ones against brute force too."""
    for (loads, phy2log, ep_size), linear, group in zip(instances, linear_optima(instances), groups):
        assert group.bound == optimum(linear)
        if ep_size <= 8:
            assert group.bound == brute_force_optimum(loads, phy2log, ep_size)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_topologies(name):
    r2o, ep_size, spare = TOPOLOGIES[name]
    r2o = np.asarray(r2o)
    group_size = len(r2o)
    n_logical = 8 * ep_size
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    with Planner(r2o, n_logical + spare * ep_size, n_logical, ep_size) as planner:
        instances, infos = [], []
        for index in range(LOADS_A_TOPOLOGY):
            if index % 60 == 0:
                planner.update_redundancy_mapping(rng.lognormal(0, 1, n_logical))
            loads = random_loads(rng, n_logical, FAMILIES[index % len(FAMILIES)])
            counter = np.zeros(1, dtype=np.int32)
            ratios, _ = planner.solve_probs(loads if index % 2 else loads.astype(np.int32), counter)
            info = planner.info()
            assert counter[0] == len(info.groups) == ep_size // group_size
            assert ((ratios >= 0) & (ratios <= 1)).all()
            check_split(loads, planner.phy2log, ep_size, group_size, planner.split(), info.groups)
            parts = list(groups_of(loads, planner.phy2log, ep_size, group_size))
            instances.append(parts[index % len(parts)])
            infos.append(info.groups[index % len(parts)])
            if len(instances) == 50:
                check_optima(instances, infos)
                instances, infos = [], []
        assert not instances


@pytest.mark.parametrize("ranks, slots, most", GENERAL)
def test_general_placements(ranks, slots, most):
    rng = np.random.default_rng(ranks * 1000 + slots * 10 + most)
    for _ in range(PLACEMENTS):
        phy2log, n_logical = random_placement(rng, ranks, slots, most)
        instances, infos = [], []
        with Planner.from_placement(phy2log, ep_size=ranks) as planner:
            for index in range(LOADS_A_PLACEMENT):
                loads = random_loads(rng, n_logical, FAMILIES[index % len(FAMILIES)])
                planner.solve(loads)
                info = planner.info()
                check_split(loads, phy2log, ranks, ranks, planner.split(), info.groups)
                once = lplb.solve(loads, phy2log, ranks)
                check_split(loads, phy2log, ranks, ranks, once.tokens, [once])
                assert (once.tokens == planner.split()).all()
                assert lplb.witness_bound(loads, phy2log, ranks, once.witness) == once.bound
                instances.append((loads, phy2log, ranks))
                infos.append(info.groups[0])
        check_optima(instances, infos)


def test_general_placement_equals_the_topology_that_made_it():
    """The experts of one slot class share a proportion, which costs nothing: the optimum is that of the free split."""
    rng = np.random.default_rng(4)
    for spare in (2, 4, 6):
        fixed = Planner(np.asarray(topology.CUBE_8P2E), 64 + 8 * spare, 64, 8)
        free = Planner.from_placement(fixed.phy2log, ep_size=8)
        for family in FAMILIES * 5:
            loads = random_loads(rng, 64, family)
            fixed.solve(loads)
            free.solve(loads)
            assert fixed.info().groups[0].bound == free.info().groups[0].bound


@pytest.mark.parametrize("largest", [2**31 - 1, 2**31, 2**40])
def test_large_loads(largest):
    rng = np.random.default_rng(9)
    for ranks, slots in ((8, 4), (16, 8), (64, 6)):
        phy2log, n_logical = random_placement(rng, ranks, slots, 6)
        for _ in range(20):
            loads = rng.integers(0, largest, n_logical, endpoint=True)
            loads[rng.integers(n_logical)] = largest
            once = lplb.solve(loads, phy2log, ranks)
            check_split(loads, phy2log, ranks, ranks, once.tokens, [once])


@pytest.mark.parametrize("ranks, n_logical, slots", [(256, 1024, 6), (1024, 4096, 8)])
def test_largest_sizes(ranks, n_logical, slots):
    rng = np.random.default_rng(ranks)
    extra = rng.integers(0, n_logical, ranks * slots - n_logical)
    phy2log = rng.permutation(np.concatenate([np.arange(n_logical), extra])).astype(np.int32)
    for family in ("normal", "zipf", "log-normal", "zero", "one-hot"):
        loads = random_loads(rng, n_logical, family)
        once = lplb.solve(loads, phy2log, ranks)
        check_split(loads, phy2log, ranks, ranks, once.tokens, [once])


def test_oracles_agree():
    """The oracles are three programs; a mistake in one would show here."""
    rng = np.random.default_rng(1)
    instances = []
    for _ in range(100):
        ranks = int(rng.integers(1, 8))
        phy2log, n_logical = random_placement(rng, ranks, int(rng.integers(1, 5)), 4)
        instances.append((random_loads(rng, n_logical, FAMILIES[rng.integers(len(FAMILIES))]), phy2log, ranks))
    for (loads, phy2log, ranks), linear in zip(instances, linear_optima(instances)):
        best = brute_force_optimum(loads, phy2log, ranks)
        assert best == optimum(linear)
        assert best >= proven(loads, phy2log, ranks, list(range(ranks)))
