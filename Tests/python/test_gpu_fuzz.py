"""Random calls on CUDA planners of all kinds, several alive at once, eager and in graphs: every result is the CPU's, bit for bit.

LPLB_FUZZ_SECONDS: how long (60). LPLB_FUZZ_SEED: which sequence of calls (0); a failure names it, the step and the planner.
"""

from __future__ import annotations

import contextlib
import os
import time

import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch")

from both_devices import run_gathered
from lplb import LplbError, Planner, Unsupported, WrongOrder
from lplb.topology import CUBE_8P2E, HYPERCUBE_16P2E, RING_8P, SQUARE_4P2E, torus_2d

pytestmark = pytest.mark.gpu

SECONDS = float(os.environ.get("LPLB_FUZZ_SECONDS", "60"))
SEED = int(os.environ.get("LPLB_FUZZ_SEED", "0"))
TOPOLOGIES = [CUBE_8P2E, HYPERCUBE_16P2E, RING_8P, SQUARE_4P2E, torus_2d(4, 8), torus_2d(8, 8), torus_2d(9, 10),
              torch.tensor([[0, 1], [1, 0], [3, 2], [2, 3]]), torch.arange(5)[:, None]]
SIZES = [0, 1, 31, 32, 33, 500, 1023, 4096, 5000, 32768, 131072, 131073, 200_003]
POOL = 6  # planners alive at once


def divisor(rng, number):
    return int(rng.choice([d for d in range(1, number + 1) if number % d == 0]))


def random_topology(rng):
    """(r2o, groups, experts of a rank, combined) within the limits of CUDA planners."""
    r2o = TOPOLOGIES[rng.integers(len(TOPOLOGIES))]
    if rng.random() < 0.4:
        ranks = int(rng.integers(1, 33)) if rng.random() < 0.8 else int(rng.integers(33, 140))
        r2o = torch.from_numpy(np.stack([rng.permutation(ranks) for _ in range(rng.integers(1, 5))], axis=1))
    ranks, columns = r2o.shape
    groups = int(rng.choice([1, 1, 2, 4, 9]))
    while groups * ranks * columns > 900:
        groups = 1
    most = 1024 // (groups * ranks)
    combined = int(rng.integers(1, min(3, most // columns) + 1))
    return r2o, groups, int(rng.integers(combined * columns, min(most, 40 * columns) + 1)), combined


def random_slots(rng, ep_size, group_size, slots, n_logical=None):
    """phy2log of a general placement whose groups keep their experts; n_logical: as many experts as another one has."""
    per_group = group_size * slots
    groups = ep_size // group_size
    experts = int(rng.integers(1, per_group + 1)) if n_logical is None else n_logical // groups
    parts = []
    for group in range(groups):
        more = rng.integers(0, int(rng.integers(1, experts + 1)), per_group - experts)
        parts.append(rng.permutation(np.concatenate([np.arange(experts), more])) + group * experts)
    return np.concatenate(parts).astype(np.int32), experts * groups


class Pair:
    """A planner on the GPU and its twin on the CPU, and the graphs captured of it."""

    def __init__(self, rng, device):
        self.rng, self.device = rng, device
        self.interior = rng.random() < 0.08
        self.topology = rng.random() < 0.5
        (self.make_topology if self.topology else self.make_general)()
        self.n_logical, self.has_replicas = self.cpu.n_logical_routed_experts, self.cpu.n_routed_experts > self.cpu.n_logical_routed_experts
        self.planned = self.ever = False
        self.graphs = []
        on_gpu = torch.device(device).type == "cuda"
        self.stream = torch.cuda.Stream(device) if on_gpu and rng.random() < 0.7 else None

    def both(self, make, ep_size, words):
        rank = int(self.rng.integers(ep_size)) if self.rng.random() < 0.5 else None
        nodes = divisor(self.rng, ep_size)
        solver = "ipm" if self.interior else "flow"
        self.words = f"{words}, rank {rank}, {nodes} nodes, {solver}"
        self.gpu = make(device=self.device, rank=rank, n_nodes=nodes, **({"solver": solver} if self.interior else {}))
        self.cpu = make(device="cpu", rank=rank, n_nodes=nodes)

    def make_topology(self):
        r2o, groups, own, combined = random_topology(self.rng)
        while self.interior and r2o.shape[0] > 32:
            r2o, groups, own, combined = random_topology(self.rng)
        ep_size = groups * r2o.shape[0]
        copies = 0 if self.rng.random() < 0.1 else ep_size * r2o.shape[1] * combined
        self.both(lambda **more: Planner(r2o, ep_size * own + copies, ep_size * own, ep_size, **more), ep_size,
                  f"r2o {r2o.T.tolist()}, {groups} groups, {own} experts a rank, {copies} copies")

    def make_general(self):
        group_size = int(self.rng.choice([1, 2, 5, 8, 16, 32] if self.interior else [1, 2, 3, 8, 8, 16, 24, 32, 40, 64, 65, 128, 256]))
        groups = int(self.rng.choice([1, 1, 1, 2, 3])) if group_size <= 64 else 1
        ep_size = groups * group_size
        slots = int(self.rng.integers(1, max(2, min(40, 1024 // ep_size) + 1)))
        phy2log, n_logical = random_slots(self.rng, ep_size, group_size, slots)
        self.slots = slots
        sizes = {"ep_size": ep_size, "n_logical": n_logical, "group_size": group_size}
        self.both(lambda **more: Planner.from_placement(torch.from_numpy(phy2log), **sizes, **more), ep_size,
                  f"{groups} groups of {group_size} ranks, {slots} slots a rank, {n_logical} experts")

    # ---- what a call gets, and what it returns ----

    def inputs(self, count, id_type, count_type):
        """Ids, and counts of every rank, of which this rank's are those of the ids."""
        rng = self.rng
        weight = oracle.random_loads(rng, self.n_logical, rng.choice(oracle.FAMILIES)).astype(float) + 1e-9
        ids = torch.from_numpy(rng.choice(self.n_logical, size=count, p=weight / weight.sum()))
        if rng.random() < 0.3:
            odd = torch.from_numpy(rng.random(count) < 0.05)
            ids[odd] = torch.from_numpy(rng.choice([-1, -1, -2, self.n_logical, 2**31 - 1, -2**31], size=int(odd.sum())))
        good = ids[(ids >= 0) & (ids < self.n_logical)]
        counts = torch.stack([torch.from_numpy(oracle.random_loads(rng, self.n_logical, rng.choice(oracle.FAMILIES)))
                              for _ in range(self.cpu.ep_size)]) // self.cpu.ep_size
        counts[self.cpu.rank or 0] = torch.bincount(good, minlength=self.n_logical)
        return ids.to(id_type), counts.to(count_type)

    def random_call(self):
        """name, call(planner, ids, counts, counter) -> tensors."""
        blocks = None if self.rng.random() < 0.5 else int(self.rng.integers(1, 200))
        chunks = int(self.rng.integers(1, 140))
        alone = self.rng.random() < 0.5

        def steps(planner, ids, counts, counter):
            found, rows = planner.count_workload(ids, chunks)
            planner.solve(found, counter)
            return found, rows, planner.redirect(ids, blocks)

        def ratios(planner, ids, counts, counter):
            found, rows = planner.count_workload(ids, chunks)
            probs, scaled = planner.solve_probs(found, counter)
            return found, rows, probs, scaled, planner.weighted_select_target(ids, probs, rows, chunks)

        def solve(planner, ids, counts, counter):
            planner.solve(counts[planner.rank or 0] if alone else counts, counter)
            return ()

        calls = {"run": lambda planner, ids, counts, counter: (planner.run(ids, counter, blocks),), "steps": steps, "solve": solve,
                 "count": lambda planner, ids, counts, counter: planner.count_workload(ids, chunks)}
        if self.topology:
            calls["ratios"] = ratios
            calls["probs"] = lambda planner, ids, counts, counter: planner.solve_probs(counts[planner.rank or 0], counter)
        if self.planned:
            calls["redirect"] = lambda planner, ids, counts, counter: (planner.redirect(ids, blocks),)
        if self.cpu.rank is not None:
            calls["gathered"] = lambda planner, ids, counts, counter: (run_gathered(planner, ids, counts, counter),)
        name = str(self.rng.choice(list(calls)))
        return name, calls[name]

    def compare(self, name, ids, expected, actual):
        if self.interior:  # another method: near the optimum, so only what holds for any split
            for ours, theirs in zip(expected, actual, strict=True):
                assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            if name in ("run", "steps", "redirect", "ratios", "gathered"):
                good = (ids >= 0) & (ids < self.n_logical)
                slots = actual[-1].cpu()
                assert (slots[~good] == -1).all() and (self.cpu.phy2log[slots[good].long()] == ids[good]).all()
            return
        for index, (ours, theirs) in enumerate(zip(expected, actual, strict=True)):
            theirs = theirs.cpu()
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            same = ours.view(torch.int32) == theirs.view(torch.int32) if ours.is_floating_point() else ours == theirs
            assert same.all(), f"{name}: result {index} differs in {int((~same).sum())} of {same.numel()} places"

    def done(self, name):
        """What a call leaves behind."""
        if name in ("steps", "solve", "ratios", "probs") or (name in ("run", "gathered") and self.has_replicas):
            self.planned = self.ever = True

    def compare_plan(self):
        if not self.planned:
            with pytest.raises(WrongOrder):
                self.cpu.info()
            with pytest.raises(WrongOrder) if not self.ever else contextlib.nullcontext():
                assert not any(group.total for group in self.gpu.info().groups) and not self.gpu.split().any()
            return
        ours, theirs = self.cpu.info(), self.gpu.info()
        if self.interior:
            assert all(b.bound <= a.bound <= b.max_load and a.total == b.total for a, b in zip(ours.groups, theirs.groups, strict=True))
            return
        assert ours == theirs and theirs.certified
        assert torch.equal(self.cpu.split(), self.gpu.split().cpu())
        assert torch.equal(self.cpu.assignment(), self.gpu.assignment().cpu())

    # ---- actions ----

    def call(self, name, call, ids, counts, counter_type):
        """On both; returns what the GPU's call was given."""
        counters = [torch.zeros(1, dtype=counter_type, device=device) for device in ("cpu", self.device)]
        given = ids.to(self.device), counts.to(self.device)
        expected = call(self.cpu, ids, counts, counters[0])
        self.compare(name, ids, expected, call(self.gpu, *given, counters[1]))
        assert counters[0].item() == counters[1].item()
        self.done(name)
        return (*given, counters[1])

    def random_inputs(self):
        types = [torch.int32, torch.int64]
        size = int(self.rng.choice(SIZES)) if self.rng.random() < 0.6 else int(self.rng.integers(0, 3000))
        return self.inputs(size, types[self.rng.integers(2)], types[self.rng.integers(2)])

    def use(self):
        name, call = self.random_call()
        self.call(name, call, *self.random_inputs(), torch.int32 if self.rng.random() < 0.5 else torch.int64)
        if self.rng.random() < 0.5:
            self.compare_plan()
        return name

    def place(self):
        if self.topology:
            history = None if self.rng.random() < 0.2 else torch.from_numpy(oracle.random_loads(self.rng, self.n_logical, "log-normal"))
            mappings = [planner.update_redundancy_mapping(history) for planner in (self.cpu, self.gpu)]
        else:
            slots, _ = random_slots(self.rng, self.cpu.ep_size, self.cpu.group_size, self.slots, self.n_logical)
            mappings = [planner.update_placement(torch.from_numpy(slots)) for planner in (self.cpu, self.gpu)]
        assert all(torch.equal(ours, theirs.cpu()) for ours, theirs in zip(*mappings, strict=True))
        self.planned = False
        self.compare_plan()

    def capture(self):
        name, call = self.random_call()
        ids, counts = self.random_inputs()
        given = self.call(name, call, ids, counts, torch.int64)  # once outside: loads the kernels
        if len(self.graphs) < 4:
            self.graphs.append((name, call, given, *self.record(lambda: call(self.gpu, *given))))
        return name

    def record(self, work):
        """A way to repeat the work, and where its results will be."""
        graph = torch.cuda.CUDAGraph()
        # PyTorch's own stream for capture belongs to the device where somebody first captured.
        with torch.cuda.graph(graph, stream=self.stream or torch.cuda.Stream(self.device)):
            out = work()
        return graph.replay, out

    def replay(self):
        if not self.graphs:
            return "nothing"
        name, call, given, again, out = self.graphs[self.rng.integers(len(self.graphs))]
        if name == "redirect" and not self.planned:
            return "nothing"
        for _ in range(int(self.rng.integers(1, 4))):
            ids, counts = self.inputs(given[0].numel(), given[0].dtype, given[1].dtype)
            counter = torch.zeros(1, dtype=torch.int64)
            given[0].copy_(ids)
            given[1].copy_(counts)
            given[2].zero_()
            again()
            self.compare(name, ids, call(self.cpu, ids, counts, counter), out)
            assert given[2].item() == counter.item()
            self.done(name)
        self.compare_plan()
        return name

    def refused(self):
        """Calls that fail, and change nothing."""
        n, two = self.n_logical, torch.zeros(2, dtype=torch.int32)
        calls = [lambda p, d: p.run(torch.zeros(5, device=d), None),
                 lambda p, d: p.run(torch.zeros(5, dtype=torch.int64, device=d), two.to(d)),
                 lambda p, d: p.run(torch.zeros(5, dtype=torch.int64, device=d), None, 0),
                 lambda p, d: p.solve(torch.zeros(n + 1, dtype=torch.int64, device=d)),
                 lambda p, d: p.solve(torch.zeros(n, dtype=torch.int64, device=d), two.to(d)),
                 lambda p, d: p.update_redundancy_mapping(torch.full((n,), -1.0)) if self.topology
                 else p.update_placement(torch.full((p.n_routed_experts,), n)),
                 lambda p, d: p.count_workload(two, 0) if self.ever or self.planned else p.info()]
        call = calls[self.rng.integers(len(calls))]
        for planner, device in ((self.cpu, "cpu"), (self.gpu, self.device)):
            with pytest.raises(LplbError):
                call(planner, device)
        with pytest.raises(LplbError):
            self.gpu.run(torch.zeros(5, dtype=torch.int16, device=self.device), None)
        self.compare_plan()

    def close(self):
        self.graphs.clear()
        self.gpu.close()
        self.cpu.close()
        with pytest.raises(WrongOrder):
            self.gpu.run(torch.zeros(5, dtype=torch.int64, device=self.device), None)


ACTIONS = {"use": 45, "replay": 22, "capture": 8, "place": 10, "refused": 7, "close": 3}


def step(rng, pool, devices):
    """One action on one of the planners. Returns what happened, for the words of a failure."""
    if not pool or (len(pool) < POOL and rng.random() < 0.15):
        with contextlib.suppress(Unsupported):  # the interior point method takes fewer sizes
            pool.append(Pair(rng, devices[rng.integers(len(devices))]))
        return
    pair = pool[rng.integers(len(pool))]
    weights = np.array(list(ACTIONS.values()), dtype=float)
    action = str(rng.choice(list(ACTIONS), p=weights / weights.sum()))
    try:
        with torch.cuda.device(pair.device) if pair.device != "cpu" else contextlib.nullcontext(), torch.cuda.stream(pair.stream):
            getattr(pair, action)()
    except BaseException as error:
        error.add_note(f"{action} on {pair.device}: {pair.words}")
        raise
    if action == "close":
        pool.remove(pair)


@pytest.mark.timeout(SECONDS + 120)
def test_random_calls(note):
    rng, pool, steps = np.random.default_rng(SEED), [], 0
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    end = time.monotonic() + SECONDS
    try:
        while steps < 200 or time.monotonic() < end:
            steps += 1
            step(rng, pool, devices)
    except BaseException as error:
        error.add_note(f"LPLB_FUZZ_SEED={SEED}, step {steps}, {len(pool)} planners alive")
        raise
    note(f"CUDA planners against the CPU's: {steps} random steps, seed {SEED}")
