"""
The suites on one GPU. Times are taken in CUDA graphs and so hold launch and kernel, nothing of the host, unless a row says eager.

For the spread over instances each instance gets a graph that repeats it; beside that, `rotation_us` is the mean per call in one graph that
goes through all instances once, so that no call finds its own data in the caches.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import _c
from ...planner import Planner
from ..common import progress
from ..simulate.options import topology
from . import drift, sglang
from .cases import CASES, FAMILIES, Instances, draw, instances, proven, to_host
from .cpu import batches, percentiles
from .kit import Row, time_calls, time_one

torch: Any = importlib.import_module("torch")  # this module is imported where torch is there

REPEATS = 64     # calls in a graph that repeats one instance; the ends of a replay add 2 us to all of them together
ROUNDS = 5       # replays of a graph; the median counts
AHEAD = 200_000  # clock cycles that the GPU is kept busy while the host queues what is timed
BATCHES = 64
EAGER_CALLS = 400

SGLANG = "SGLang's LP kernel, measured on an H200 (see cases.py)"
LPLB = "LPLB's index kernels timed on an H200 (20.8 + 2.9 us), and the 100 us of its README for the solve"

Call = Callable[[], Any]


def capture(calls: Sequence[Call]) -> Any:
    """A CUDA graph of the calls, in order on one stream. (torch.cuda.graph would collect garbage each time.)"""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(_stream()):
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    return graph


_side: list[Any] = []


def _stream() -> Any:
    if not _side:
        _side.append(torch.cuda.Stream())
    return _side[0]


def replay_us(graph: Any, n_calls: int, rounds: int = ROUNDS) -> float:
    """Microseconds per call: events around a replay that is queued while the GPU is still busy, so that no launch gap is in it."""
    times = []
    with torch.cuda.stream(_stream()):
        for _ in range(rounds + 1):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(AHEAD)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / n_calls)
    return float(np.median(times[1:]))


def timed(calls: Sequence[Call]) -> tuple[NDArray[np.float64], float]:
    """Microseconds of every call, and the mean over one graph of all of them in turn."""
    with torch.cuda.stream(_stream()):
        for call in calls[:3]:  # whatever is set up at the first call is set up now
            call()
    together = replay_us(capture(calls), len(calls))
    alone = np.array([replay_us(capture([call] * REPEATS), REPEATS, 3) for call in calls])
    return alone, together


def empty_kernel_us() -> float:
    """A kernel that does nothing, in the same harness."""
    with torch.cuda.stream(_stream()):
        torch.cuda._sleep(0)
    return replay_us(capture([partial(torch.cuda._sleep, 0)] * 512), 512)


def _checked(planner: Planner, function: Callable[..., int], *arguments: Any) -> Call:
    """The C call on the stream that is current when it is made."""
    handle = planner._handle

    def call() -> None:
        handle.check(function(handle.pointer, *arguments, torch.cuda.current_stream().cuda_stream))
    return call


def solve(overhead_us: float, counts: drift.Counts | None = None, beside: sglang.Peer | None = None) -> Iterator[Row]:
    """
    lplb_planner_solve from counts on the device to plan, one row for each case and load family, and one for each placement under drift.
    beside: SGLang's kernel, timed in turn with each case's first instances.
    """
    todo = [(case, family) for case in CASES if case.n_logical <= _c.MAX_LOGICAL_CUDA for family in FAMILIES]
    for case, family in progress(todo, len(todo), "solve"):
        with instances(case, family, "cuda") as each:
            yield _solve(each, beside)
    counts = counts or drift.read(None)
    for case in progress(drift.cases(), len(drift.SHAPES) * len(drift.POLICIES), "solve under drift"):
        with drift.instances(case, counts, "cuda") as each:
            yield _solve(each, beside)


def _solve(todo: Instances, beside: sglang.Peer | None) -> Row:
    case = todo.case
    counts = torch.from_numpy(todo.loads.astype(np.int32)).cuda()
    calls = [_checked(todo.planners[which], todo.planners[which]._handle.library.planner_solve, counts[i].data_ptr(), _c.INT32, 1,
                      None, None, None, _c.INT64) for i, which in enumerate(todo.planner)]
    alone, together = timed(calls)
    n_proven = 0
    for call, which, loads in zip(calls, todo.planner, todo.loads):
        call()
        n_proven += proven(todo.planners[which], loads)
    target = case.cuda_target(todo.family)
    name = case.name if todo.family == drift.FAMILY else f"{case.name}, {todo.family}"
    row = Row("solve", name, len(calls), *percentiles(alone), target_p50_us=target[0], target_p99_us=target[1],
              certified_fraction=n_proven / len(calls),
              extra={"rotation_us": together, "loads": todo.family, "published": SGLANG if case.sglang else None,
                     "published_us": case.sglang})
    if beside is not None:
        _time_beside(row, beside, todo, calls)
    return row


def _time_beside(row: Row, beside: sglang.Peer, todo: Instances, calls: Sequence[Call]) -> None:
    """What SGLang's kernel takes for the first instances, its graphs and ours taking turns, and how far above the optimum its plans are."""
    ours: list[float] = []
    theirs: list[float] = []
    gaps: list[float] = []
    for i in range(min(sglang.INSTANCES, len(calls))):
        planner, loads = todo.planners[todo.planner[i]], todo.loads[i]
        problem = beside.problem(planner, loads)
        if isinstance(problem, str):
            row.note = f"{row.case}: not beside SGLang's kernel: {problem}"
            return
        with torch.cuda.stream(_stream()):
            problem.solve()
        graphs = capture([calls[i]] * REPEATS), capture([problem.solve] * sglang.REPEATS)
        turns = [(replay_us(graphs[0], REPEATS, 1), replay_us(graphs[1], sglang.REPEATS, 1)) for _ in range(ROUNDS)]
        for times, column in ((ours, 0), (theirs, 1)):
            times.append(float(np.median([turn[column] for turn in turns])))
        calls[i]()
        gaps.append(problem.busiest() / planner.info().groups[0].max_load - 1)
    row.peer, row.peer_us = "SGLang's LP kernel", float(np.median(theirs))
    row.extra |= {"in_turn_us": float(np.median(ours)), "peer_gap_mean": float(np.mean(gaps)), "peer_gap_max": float(np.max(gaps))}


def run(overhead_us: float, counts: drift.Counts | None = None) -> Iterator[Row]:
    """Count, solve and redirect: in one call, one by one, in a graph and eager; in one call under drift."""
    small: Row | None = None
    for n_tokens in (4096, 16384):
        with Planner(topology("cube"), 272, 256, 8, device="cuda") as planner:
            for row in _run(planner, n_tokens):
                if row.extra.get("whole"):
                    if small is None:
                        small = row
                    else:
                        ratio = row.p50_us / small.p50_us
                        row.target_p50_us = 1.6 * small.p50_us
                        row.note = f"four times the tokens cost {ratio:.2f} times as much (target 1.6)"
                yield row
    counts = counts or drift.read(None)
    for case in progress(drift.cases(), len(drift.SHAPES) * len(drift.POLICIES), "run under drift"):
        with drift.instances(case, counts, "cuda") as todo:
            yield from _run_drifted(todo)


def _run_drifted(todo: Instances) -> Iterator[Row]:
    host = drift.batches(todo.loads)
    ids = torch.from_numpy(host).cuda()
    out = torch.empty_like(ids[0])
    planners = [todo.planners[which] for which in todo.planner]
    name, size = f"{drift.TOKENS:,} x {drift.TOP_K} ids, {todo.case.name}", ids[0].numel()
    calls = [_checked(planner, planner._handle.library.planner_run, each.data_ptr(), _c.INT64, size, None, out.data_ptr(), None, _c.INT64,
                      0) for planner, each in zip(planners, ids)]
    alone, together = timed(calls)
    n_proven = 0
    for planner, call, loads in zip(planners, calls, todo.loads):
        call()
        realised = torch.bincount(out.flatten(), minlength=planner.n_routed_experts)
        n_proven += bool((to_host(realised) == to_host(planner.split())).all()) and proven(planner, loads)
    target = drift.SHAPES[todo.case.ranks, todo.case.n_physical]
    yield Row("run", name, len(calls), *percentiles(alone), target_p50_us=target[0], target_p99_us=target[1],
              certified_fraction=n_proven / len(calls), extra={"rotation_us": together})
    redirects = [_checked(planner, planner._handle.library.planner_redirect, each.data_ptr(), _c.INT64, size, out.data_ptr(), 0)
                 for planner, each in zip(planners, ids)][:8]
    for planner, call in zip(planners[:8], calls):
        call()
    alone, together = timed(redirects)
    yield Row("run", f"{name}, redirect alone", len(redirects), *percentiles(alone), extra={"rotation_us": together})


def _run(planner: Planner, n_tokens: int) -> Iterator[Row]:
    host = batches(n_tokens, 8, 256, BATCHES)
    ids = torch.from_numpy(host).cuda()
    out = torch.empty_like(ids[0])
    counted = torch.zeros(256, dtype=torch.int32, device="cuda")
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    counts = torch.stack([torch.bincount(each.flatten(), minlength=256) for each in ids]).int()
    library, name = planner._handle.library, f"{n_tokens:,} x 8 ids"
    size = ids[0].numel()
    calls = [_checked(planner, library.planner_run, each.data_ptr(), _c.INT64, size, None, out.data_ptr(), counter.data_ptr(),
                      _c.INT64, 0) for each in ids]
    alone, together = timed(calls)
    n_proven = 0
    for call, each in zip(calls, host):
        call()
        realised = torch.bincount(out.flatten(), minlength=272)
        as_planned = bool((to_host(realised) == to_host(planner.split())).all())
        n_proven += as_planned and proven(planner, np.bincount(each.ravel(), minlength=256))
    copies = [partial(out.copy_, each) for each in ids]
    _, copy_us = timed(copies)
    target = (10.0, None) if n_tokens == 4096 else (None, None)
    yield Row("run", f"{name}, 256 experts, cube, in a graph", BATCHES, *percentiles(alone), target_p50_us=target[0],
              certified_fraction=n_proven / BATCHES, peer="copying the ids", peer_us=copy_us,
              extra={"rotation_us": together, "whole": True, "published": LPLB if n_tokens == 4096 else None,
                     "published_us": 123.7 if n_tokens == 4096 else None})
    single = {
        "count": [_checked(planner, library.planner_count, each.data_ptr(), _c.INT64, size, counted.data_ptr(), None, 1)
                  for each in ids],
        "solve": [_checked(planner, library.planner_solve, each.data_ptr(), _c.INT32, 1, None, None, None, _c.INT64)
                  for each in counts],
        "redirect": [_checked(planner, library.planner_redirect, each.data_ptr(), _c.INT64, size, out.data_ptr(), 0) for each in ids],
    }
    for step, its_calls in single.items():
        alone, together = timed(its_calls)
        yield Row("run", f"{name}, {step} alone, in a graph", BATCHES, *percentiles(alone), extra={"rotation_us": together})
    yield from _eager(planner, ids, counter, name, n_tokens == 4096)


def _eager(planner: Planner, ids: Any, counter: Any, name: str, judged: bool) -> Iterator[Row]:
    """Planner.run as a training loop calls it."""
    def isolated(each: Any) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        planner.run(each, counter)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end) * 1000)

    def host(each: Any) -> float:
        start = perf_counter_ns()
        planner.run(each, counter)
        return (perf_counter_ns() - start) / 1000

    def in_turn(measure: Callable[[Any], float]) -> NDArray[np.float64]:
        times = []
        for i in range(EAGER_CALLS + 20):
            if i % 100 == 0:
                torch.cuda.synchronize()  # so that the queue never fills up and makes the host wait
            times.append(measure(ids[i % len(ids)]))
        torch.cuda.synchronize()
        return np.array(times[20:])

    yield Row("run", f"{name}, Planner.run, eager, idle GPU, event to event", EAGER_CALLS, *percentiles(in_turn(isolated)),
              target_p50_us=25 if judged else None)
    yield Row("run", f"{name}, Planner.run, eager, host time of the call", EAGER_CALLS, *percentiles(in_turn(host)),
              target_p50_us=12 if judged else None)

    def back_to_back() -> None:
        for i in range(EAGER_CALLS):
            planner.run(ids[i % len(ids)], counter)
        torch.cuda.synchronize()

    yield Row("run", f"{name}, Planner.run, eager, back to back", EAGER_CALLS, *percentiles(time_one(back_to_back, 5) / EAGER_CALLS))


def mapping(overhead_us: float) -> Iterator[Row]:
    """A new placement on a planner on the GPU, its tables replaced on the device."""
    rng = np.random.default_rng(61)
    history = np.rint(draw("log-normal", (61, 256), rng) * 1e4)
    planners = [Planner(topology("cube"), 272, 256, 8, device="cuda") for _ in range(61)]
    try:
        times = time_calls(planners[0].update_redundancy_mapping, [(row,) for row in history], ROUNDS)
        yield Row("mapping", "one layer, update_redundancy_mapping from Python", len(history), *percentiles(times), target_p50_us=1000)

        def all_layers() -> None:
            for planner, row in zip(planners, history):
                planner.update_redundancy_mapping(row)

        times = time_one(all_layers, 11)
        yield Row("mapping", "61 layers, update_redundancy_mapping from Python", times.size, *percentiles(times), target_p50_us=20_000)
    finally:
        for planner in planners:
            planner.close()


SUITES = {"solve": solve, "run": run, "mapping": mapping}
