"""The suites on one core of the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ... import _c
from ...eplb import rebalance_experts
from ...planner import Planner
from ..common import progress
from ..simulate.options import topology
from . import drift, peers
from .cases import CASES, FAMILIES, Instances, draw, instances, proven
from .kit import REFUSED, Row, time_calls, time_one

ROUNDS = 7
BATCHES = 64  # different micro-batches that `run` is timed on
PEER = "scipy HiGHS LP"
N_REFUSED = 128


def solve(overhead_us: float, counts: drift.Counts | None = None) -> Iterator[Row]:
    """lplb_planner_solve from counts to plan, one row for each case and load family, and one for each placement under drift."""
    todo = [(case, family) for case in CASES for family in FAMILIES]
    rows: dict[tuple[str, str], Row] = {}
    for case, family in progress(todo, len(todo), "solve"):
        with instances(case, family, "cpu") as drawn:
            row = rows[case.name, family] = _solve(drawn)
        yield row
    for family in FAMILIES:
        small, large = rows[CASES[5].name, family], rows[CASES[-1].name, family]
        ratio = large.p50_us / small.p50_us
        large.extra["growth"] = ratio
        large.note = f"16 times the experts and ranks cost {ratio:.1f} times the solve ({family}; target 40: " \
                     f"{'met' if ratio <= 40 else 'MISSED'})"
    counts = counts or drift.read(None)
    for case in drift.cases():
        with drift.instances(case, counts, "cpu") as drawn:
            yield _solve(drawn, beside=False)


def _solve(todo: Instances, beside: bool = True) -> Row:
    """beside: another program is timed too."""
    case = todo.case
    solve_c = todo.planners[0]._handle.library.planner_solve
    pointers = [planner._handle.pointer for planner in todo.planners]
    calls = [(pointers[which], loads.ctypes.data, _c.INT64, 1, None, None, None, _c.INT64, None)
             for which, loads in zip(todo.planner, todo.loads)]
    # Calls that are refused at once run in the same rounds: what is taken off was measured under the same load of the machine.
    together = time_calls(solve_c, calls + [REFUSED] * N_REFUSED, ROUNDS if case.ranks < 512 else 3)
    raw, overhead_us = together[: len(calls)], float(np.median(together[len(calls) :]))
    n_proven = 0
    for call, which, loads in zip(calls, todo.planner, todo.loads):
        todo.planners[which]._handle.check(solve_c(*call))
        n_proven += proven(todo.planners[which], loads)
    mine = np.flatnonzero(todo.planner == 0)[: 3 if case.ranks < 512 else 1]
    peer_us = peers.highs_us(todo.planners[0], [todo.loads[i] for i in mine]) if beside else None
    net = np.maximum(raw - overhead_us, 0)
    name = case.name if todo.family == drift.FAMILY else f"{case.name}, {todo.family}"
    return Row("solve", name, len(calls), *percentiles(net), target_p50_us=case.cpu,
               certified_fraction=n_proven / len(calls), peer="" if peer_us is None else PEER, peer_us=peer_us,
               extra={"raw_p50_us": float(np.median(raw)), "call_us": overhead_us, "loads": todo.family})


def percentiles(times: NDArray[np.float64]) -> tuple[float, float]:
    return float(np.percentile(times, 50)), float(np.percentile(times, 99))


def batches(n_tokens: int, top_k: int, n_logical: int, n: int) -> NDArray[np.int64]:
    """[n, n_tokens, top_k] ids with normal loads per expert, every batch its own."""
    rng = np.random.default_rng([n_tokens, top_k, n_logical])
    shares = draw("normal", (n, n_logical), rng)
    return np.stack([rng.choice(n_logical, (n_tokens, top_k), p=row / row.sum()) for row in shares]).astype(np.int64)


def run(overhead_us: float, counts: drift.Counts | None = None) -> Iterator[Row]:
    """Count, solve and redirect in one call; through C alone, and from Python as a training job calls it; under drift through C."""
    n_logical = 256
    with Planner(topology("cube"), n_logical + 16, n_logical, 8, device="cpu") as planner:
        handle = planner._handle
        for n_tokens, target in ((4096, 150.0), (16384, None)):
            ids = batches(n_tokens, 8, n_logical, BATCHES)
            out = np.empty_like(ids[0])
            calls = [(handle.pointer, each.ctypes.data, _c.INT64, each.size, None, out.ctypes.data, None, _c.INT64, 0, None)
                     for each in ids]
            net = np.maximum(time_calls(handle.library.planner_run, calls, ROUNDS) - overhead_us, 0)
            n_proven = 0
            for call, each in zip(calls, ids):
                handle.check(handle.library.planner_run(*call))
                n_proven += proven(planner, np.bincount(each.ravel(), minlength=n_logical)) and bool(
                    (np.bincount(out.ravel(), minlength=planner.n_routed_experts) == np.asarray(planner.split())).all())
            peer_us = float(np.median([time_one(peers.numpy_passes(each, n_logical), 3).min() for each in ids]))
            yield Row("run", f"{n_tokens:,} x 8 ids, 256 experts, cube", BATCHES, *percentiles(net), target_p50_us=target,
                      certified_fraction=n_proven / BATCHES, peer="numpy: bincount and one look-up", peer_us=peer_us)
            counter = np.zeros(1, dtype=np.int64)
            eager = time_calls(planner.run, [(each, counter) for each in ids], ROUNDS)
            yield Row("run", f"{n_tokens:,} x 8 ids, Planner.run from Python", BATCHES, *percentiles(eager))
    counts = counts or drift.read(None)
    for case in drift.cases():
        with drift.instances(case, counts, "cpu") as todo:
            yield _run_drifted(todo, overhead_us)


def _run_drifted(todo: Instances, overhead_us: float) -> Row:
    batches = drift.batches(todo.loads)
    out = np.empty_like(batches[0])
    planners = [todo.planners[which] for which in todo.planner]
    run_c = planners[0]._handle.library.planner_run
    calls = [(planner._handle.pointer, each.ctypes.data, _c.INT64, each.size, None, out.ctypes.data, None, _c.INT64, 0, None)
             for planner, each in zip(planners, batches)]
    net = np.maximum(time_calls(run_c, calls, ROUNDS) - overhead_us, 0)
    n_proven = 0
    for planner, call, loads in zip(planners, calls, todo.loads):
        planner._handle.check(run_c(*call))
        n_proven += proven(planner, loads) and bool(
            (np.bincount(out.ravel(), minlength=planner.n_routed_experts) == np.asarray(planner.split())).all())
    return Row("run", f"{drift.TOKENS:,} x {drift.TOP_K} ids, {todo.case.name}", len(calls), *percentiles(net),
               certified_fraction=n_proven / len(calls))


def eplb(overhead_us: float) -> Iterator[Row]:
    """Placement of 58 layers at once."""
    rng = np.random.default_rng(58)
    weight = np.rint(draw("log-normal", (58, 256), rng) * 1e4).astype(np.float32)
    for name, groups, nodes in (("hierarchical (8 groups, 4 nodes)", 8, 4), ("global", 1, 1)):
        times = time_one(lambda: rebalance_experts(weight, 288, groups, nodes, 32), 21)
        slots = np.asarray(rebalance_experts(weight, 288, groups, nodes, 32)[0])
        plain: list[list[list[int]]] = []
        peer_us = float(time_one(lambda: plain.append(peers.eplb(weight.tolist(), 288, groups, nodes, 32)), 1)[0])
        same = float((slots == np.array(plain[0])).mean())
        balance = balance_of(weight, slots, 32)
        yield Row("eplb", f"58 x 256 -> 288 on 32 GPUs, {name}", times.size, *percentiles(times), target_p50_us=1000,
                  peer="plain Python", peer_us=peer_us, extra={"balance": balance, "equal_slots": same},
                  note=f"{name}: mean/max load per GPU {balance:.4f}, slots equal to plain Python's {same:.1%}")


def balance_of(weight: NDArray[np.float32], phy2log: NDArray[np.int64], ranks: int) -> float:
    """Mean over layers of mean/max load per rank under an even split."""
    layers, n_logical = weight.shape
    copies = np.stack([np.bincount(row, minlength=n_logical) for row in phy2log])
    share = np.take_along_axis(weight / copies, phy2log, axis=1).reshape(layers, ranks, -1).sum(axis=2)
    return float((share.mean(axis=1) / share.max(axis=1)).mean())


def mapping(overhead_us: float) -> Iterator[Row]:
    """Placement by a topology from a new history, in one layer and in all layers of a model."""
    rng = np.random.default_rng(61)
    history = np.rint(draw("log-normal", (61, 256), rng) * 1e4)
    planners = [Planner(topology("cube"), 272, 256, 8, device="cpu") for _ in range(61)]
    try:
        place = planners[0]._handle.library.planner_place
        calls = [(planners[0]._handle.pointer, row.ctypes.data, None) for row in history]
        net = np.maximum(time_calls(place, calls, ROUNDS) - overhead_us, 0)
        plain_us = float(np.median(time_one(lambda: peers.eplb(history[:1].tolist(), 256, 1, 1, 8), 7)))
        yield Row("mapping", "one layer, 256 experts, cube", len(calls), *percentiles(net), target_p50_us=100,
                  peer="plain Python, packing alone", peer_us=plain_us)
        one_by_one = time_calls(planners[0].update_redundancy_mapping, [(row,) for row in history], ROUNDS)
        yield Row("mapping", "one layer, update_redundancy_mapping from Python", len(history), *percentiles(one_by_one),
                  target_p50_us=100)

        def all_layers() -> None:
            for planner, row in zip(planners, history):
                planner.update_redundancy_mapping(row)

        times = time_one(all_layers, 21)
        yield Row("mapping", "61 layers, update_redundancy_mapping from Python", times.size, *percentiles(times), target_p50_us=20_000)
    finally:
        for planner in planners:
            planner.close()


SUITES = {"solve": solve, "run": run, "eplb": eplb, "mapping": mapping}
