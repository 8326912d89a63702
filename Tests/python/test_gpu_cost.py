"""Costs beyond tokens on the GPU: bit for bit what the CPU plans, whatever solves the groups, and about as fast as a plain plan."""

from __future__ import annotations

import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from both_devices import rows_of, run_rows
from lplb import Planner
from lplb.topology import CUBE_8P2E, HYPERCUBE_16P2E, RING_8P, torus_2d

pytestmark = pytest.mark.gpu

SEED = int(os.environ.get("LPLB_FUZZ_SEED", "0"))
UNITS = [1, 2, 64, 128, 1000, 2**31 - 1, "experts"]


def general(ranks, slots, seed, experts=None):
    """phy2log of a general placement, some slots empty."""
    rng = np.random.default_rng(seed)
    experts = experts or ranks * slots * 3 // 4
    phy2log = np.concatenate([np.arange(experts), rng.integers(-1, experts, ranks * slots - experts)])
    return rng.permutation(phy2log).astype(np.int32)


def makers():
    """(name, make(device, **options)) of planners of every kind of solver: lanes of 2, 4 and 8 colours, masks of one and two words, scans."""
    topologies = [("ring", RING_8P, 1, 1), ("cube", CUBE_8P2E, 1, 1), ("cubes combined", CUBE_8P2E, 4, 2),
                  ("hypercube", HYPERCUBE_16P2E, 1, 1), ("torus 32", torus_2d(4, 8), 1, 2), ("torus 64", torus_2d(8, 8), 1, 1),
                  ("torus 90", torus_2d(9, 10), 1, 1), ("torus 12", torus_2d(3, 4), 9, 1)]
    for name, r2o, groups, combined in topologies:
        ep_size, columns = len(r2o) * groups, r2o.shape[1]
        n_logical = ep_size * (columns * combined + 1)
        if n_logical > 1000:
            continue

        def by_topology(r2o=r2o, n_logical=n_logical, n_physical=n_logical + ep_size * columns * combined, ep_size=ep_size, **options):
            return Planner(r2o, n_physical, n_logical, ep_size, **options)
        yield name, by_topology, ep_size
    for ranks, slots in [(1, 9), (2, 3), (8, 5), (20, 6), (32, 9), (48, 4), (64, 5), (65, 4), (128, 3), (300, 2)]:
        def by_placement(ranks=ranks, slots=slots, **options):
            return Planner.from_placement(general(ranks, slots, ranks), ep_size=ranks, **options)
        yield f"placement of {ranks} ranks", by_placement, ranks
    pairs = np.stack([np.arange(24), (np.arange(24) + 5) % 24], axis=1).reshape(-1).astype(np.int32)
    yield "pairs", lambda **options: Planner.from_placement(pairs, ep_size=24, **options), 24


MAKERS = list(makers())


def loads_of(kind, rng, n):
    if kind == 0:
        return rng.integers(0, 3000, n)
    if kind == 1:
        return (20_000 / rng.integers(1, n + 1, n)).astype(np.int64)
    if kind == 2:
        return rng.integers(0, 3, n)
    if kind == 3:
        return np.zeros(n, dtype=np.int64)
    hot = np.zeros(n, dtype=np.int64)
    hot[rng.integers(n)] = 2**31 - 1 if kind == 5 else 12_345
    return hot if kind < 6 else rng.integers((2**31 - 1) // n // 2, (2**31 - 1) // n, n)


def capacities_of(kind, rng, ranks):
    speed = [None, np.full(ranks, 922), rng.choice([1024, 922], ranks), rng.integers(1, 65537, ranks), rng.choice([1, 65536], ranks),
             rng.integers(900, 1100, ranks), None][kind]
    fixed = [None, None, rng.choice([0, 300], ranks), rng.integers(0, 50, ranks), rng.choice([0, 2**24], ranks), None,
             rng.integers(0, 2000, ranks)][kind]
    return {"speed": speed, "fixed": fixed}


def compare(gpu, cpu, words):
    assert torch.equal(gpu.split().cpu(), torch.as_tensor(cpu.split())), words
    assert torch.equal(gpu.assignment().cpu(), torch.as_tensor(cpu.assignment())), words
    ours, theirs = gpu.info(), cpu.info()
    assert ours.groups == theirs.groups and ours.locality == theirs.locality and ours.certified, words


@pytest.mark.parametrize("name, make, ranks", MAKERS, ids=[name for name, _, _ in MAKERS])
def test_solves_are_the_cpus(name, make, ranks):
    rng = np.random.default_rng([SEED, ranks, len(name)])
    for index, unit in enumerate(UNITS):
        rank = int(rng.integers(ranks)) if index % 2 else None
        gpu, cpu = (make(device=device, unit=unit, rank=rank) for device in ("cuda", "cpu"))
        n = cpu.n_logical_routed_experts
        for turn in range(14):
            words = f"{name}, unit {unit}, turn {turn}, seed {SEED}"
            given = capacities_of(int(rng.integers(7)), rng, ranks)
            for planner in (gpu, cpu):
                planner.set_capacity(**given)
            loads = loads_of(turn % 7, rng, n)
            if rank is None:
                workload = torch.from_numpy(loads)
            else:
                parts = rng.multinomial(1000, rng.dirichlet(np.ones(ranks)), n).T.astype(np.int64)
                workload = torch.from_numpy(parts * (loads // 1000))
            gpu.solve(workload.cuda())
            cpu.solve(workload)
            compare(gpu, cpu, words)


@pytest.mark.parametrize("name, make, ranks", MAKERS, ids=[name for name, _, _ in MAKERS])
def test_runs_are_the_cpus(name, make, ranks):
    """Of ids alone and with everybody's counts, in one launch and in several; graphs follow capacities that are set between replays."""
    rng = np.random.default_rng([SEED + 1, ranks, len(name)])
    for index, unit in enumerate((1, 4, 128, "experts")):
        for rank in (None, int(rng.integers(ranks))):
            gpu, cpu = (make(device=device, unit=unit, rank=rank) for device in ("cuda", "cpu"))
            n = cpu.n_logical_routed_experts
            weights = rng.dirichlet(np.full(n, 0.5))
            ids = torch.from_numpy(rng.choice(n, [700, 9000, 40_000, 150_000][(index + (rank is not None)) % 4], p=weights))
            counts = torch.from_numpy(rng.multinomial(1000, weights, ranks))
            if rank is not None:
                counts[rank] = torch.bincount(ids, minlength=n)
            static = ids.cuda()
            graph = torch.cuda.CUDAGraph()

            def plan(planner, ids):
                return planner.run(ids, None) if rank is None else run_rows(planner, ids, rows_of(planner, counts))

            for planner in (gpu, cpu):
                planner.set_capacity()
            plan(gpu, static)
            given_rows = rows_of(gpu, counts)
            with torch.cuda.graph(graph):
                out = gpu.run(static, None) if rank is None else run_rows(gpu, static, given_rows)
            for turn in range(5):
                given = capacities_of([0, 2, 0, 3, 5][turn], rng, ranks)
                for planner in (gpu, cpu):
                    planner.set_capacity(**given)
                words = f"{name}, unit {unit}, rank {rank}, turn {turn}, seed {SEED}"
                if turn % 2:
                    given_rows.copy_(rows_of(gpu, counts))
                    graph.replay()
                    physical = out
                else:
                    physical = plan(gpu, static)
                assert torch.equal(physical.cpu(), plan(cpu, ids)), words
                compare(gpu, cpu, words)


def timed(call, repeats=200):
    """Microseconds of a call in a graph of many."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    best = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best.append(1000 * start.elapsed_time(end) / repeats)
    return float(np.median(best))


def test_other_costs_take_little_longer(note):
    """Prints what a solve and a run take plainly, in units and with ranks that differ. The bounds are wide: other work may be on the GPU."""
    rng = np.random.default_rng(7)
    eplb = np.concatenate([np.arange(256), rng.integers(0, 256, 32)]).astype(np.int32)
    wide = np.concatenate([np.arange(256), rng.integers(0, 256, 64)]).astype(np.int32)
    cases = [("ring", lambda **o: Planner(RING_8P, 8 * 33, 256, 8, **o), 8), ("cube", lambda **o: Planner(CUBE_8P2E, 8 * 34, 256, 8, **o), 8),
             ("hypercube", lambda **o: Planner(HYPERCUBE_16P2E, 16 * 18, 256, 16, **o), 16),
             ("torus 32", lambda **o: Planner(torus_2d(4, 8), 32 * 10, 256, 32, **o), 32),
             ("eplb 32", lambda **o: Planner.from_placement(rng.permutation(eplb), ep_size=32, **o), 32),
             ("eplb 64", lambda **o: Planner.from_placement(rng.permutation(wide), ep_size=64, **o), 64)]
    for name, make, ranks in cases:
        loads = torch.from_numpy(np.maximum(0, rng.normal(1000, 300, 256)).astype(np.int64)).cuda()
        ids = torch.from_numpy(rng.choice(256, (4096, 8))).cuda()
        speed = np.where(np.arange(ranks) == 1, 922, 1024)
        took = {}
        state = rng.bit_generator.state
        for kind, options, given in (("plain", {}, {}), ("unit", {"unit": 128}, {}), ("experts", {"unit": "experts"}, {}),
                                     ("speed", {}, {"speed": speed}), ("both", {"unit": 128}, {"speed": speed})):
            rng.bit_generator.state = state
            planner = make(device="cuda", **options)
            if given:
                planner.set_capacity(**given)
            library, handle = planner._handle.library, planner._handle
            solve = lambda: handle.check(library.planner_solve(  # noqa: E731
                handle.native.value, loads.data_ptr(), 1, 1, None, None, None, 0, torch.cuda.current_stream().cuda_stream))
            took[kind] = timed(solve), timed(lambda: planner.run(ids, None)), planner.info().groups[0].rounds
        note(f"{name}: " + ", ".join(f"{kind} solve {solve:.2f} us run {run:.2f} us ({rounds} rounds)"
                                     for kind, (solve, run, rounds) in took.items()))
        for kind, (solve, run, rounds) in took.items():
            assert solve < 3 * took["plain"][0] + 10 and run < 3 * took["plain"][1] + 10, (name, kind)
