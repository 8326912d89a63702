"""
The exchange of counts among GPUs, and the whole plan with it; one process a GPU:

    torchrun --nproc-per-node=8 -m lplb bench exchange [--json FILE]

With more processes than GPUs each GPU serves several ranks. That says what more ranks cost, not what a machine with as many GPUs would do;
it needs CUDA's Multi-Process Service, since processes that take turns on a GPU wait for each other's turns. No target is judged then.

Every time is the maximum over the ranks. In a graph: GPU time per call of many in one CUDA graph. Eager, back to back: many calls queued
one after the other. Eager, one by one: from event to event around one call, all ranks starting together.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import exchange, topology
from ...errors import Unsupported
from ...planner import Planner
from ..common import UsageError, write_json
from ..terminal import say
from . import kit
from .cpu import batches, percentiles
from .kit import Row

N_COUNTS = 256
CALLS = 64         # in a graph, or back to back
ROUNDS = 40
AHEAD = 400_000    # clock cycles that the GPU is kept busy while the host queues what is timed
TOPOLOGIES = {2: ("ring of 2", ((1, 0),)), 4: ("square", None), 8: ("cube", None)}

Call = Callable[[], Any]


class Clock:
    """Times calls on all ranks together."""

    def __init__(self, torch: Any, device: Any, shared: bool) -> None:
        """shared: GPUs serve several ranks each, and the group is gloo's."""
        self.torch, self.device, self.dist, self.shared = torch, device, torch.distributed, shared
        self.stream = torch.cuda.Stream(device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flag = torch.zeros(1, dtype=torch.int32, device=device)
        self.line = exchange.create(self.dist.group.WORLD, device, 1, "ipc") if shared else None

    def slowest(self, times: Sequence[float]) -> NDArray[np.float64]:
        """The maximum over the ranks, time by time."""
        mine = self.torch.tensor(times, dtype=self.torch.float64, device="cpu" if self.shared else self.device)
        self.dist.all_reduce(mine, op=self.dist.ReduceOp.MAX)
        return np.asarray(mine.cpu().numpy(), dtype=np.float64)

    def line_up(self) -> None:
        """What follows on the stream starts at the same time on all GPUs."""
        if self.line is not None:
            self.line.all_gather(self.flag)
        else:
            self.dist.all_reduce(self.flag)

    def together(self, work: Call, rounds: int, n: int) -> NDArray[np.float64]:
        """Microseconds per call of `work`, which makes n of them; the ranks' GPUs start at the same time, with all of it queued."""
        times = []
        with self.torch.cuda.stream(self.stream):
            for _ in range(rounds + 2):
                self.torch.cuda.synchronize()
                self.torch.cuda._sleep(AHEAD)
                self.line_up()
                self.start.record()
                work()
                self.end.record()
                self.end.synchronize()
                times.append(self.start.elapsed_time(self.end) * 1000 / n)
        return self.slowest(times[2:])

    def in_graph(self, calls: Sequence[Call], rounds: int = ROUNDS) -> NDArray[np.float64]:
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.stream(self.stream):
            for call in calls[:2]:
                call()
            self.torch.cuda.synchronize()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for call in calls:
                    call()
            finally:
                graph.capture_end()
        times = self.together(graph.replay, rounds, len(calls))
        self.torch.cuda.synchronize()
        del graph  # before the group ends: NCCL's calls in it belong to the group
        return times

    def back_to_back(self, calls: Sequence[Call]) -> NDArray[np.float64]:
        def work() -> None:
            for call in calls:
                call()
        return self.together(work, ROUNDS // 2, len(calls))

    def one_by_one(self, calls: Sequence[Call]) -> NDArray[np.float64]:
        """The host is not ahead here: launching is in the time."""
        times = []
        with self.torch.cuda.stream(self.stream):
            for call in calls[:2]:
                call()
            for call in calls:
                self.line_up()
                self.torch.cuda.synchronize()
                self.start.record()
                call()
                self.end.record()
                self.end.synchronize()
                times.append(self.start.elapsed_time(self.end) * 1000)
        return self.slowest(times)


def main(json: str | None, plot: str | None) -> int:
    """Prints the table on rank 0 and writes the JSON. 0 unless a plan was not proven."""
    if plot is not None:
        raise UsageError("bench exchange: draws no plot")
    if "RANK" not in os.environ:
        raise UsageError("bench exchange: needs one process a GPU: torchrun --nproc-per-node=8 -m lplb bench exchange")
    torch: Any = importlib.import_module("torch")
    dist = torch.distributed
    if not torch.cuda.is_available():
        raise UsageError("bench exchange: torch sees no GPU here")
    gpus = torch.cuda.device_count()
    shared = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > gpus
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % gpus)
    torch.cuda.set_device(device)
    dist.init_process_group("gloo" if shared else "nccl", **({} if shared else {"device_id": device}))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    try:
        rows = []
        for row in _rows(torch, Clock(torch, device, shared), ranks, rank):
            rows.append(row)
            if rank == 0:
                say(f"  {row.case}: {row.p50_us:.2f} us", now=True)
        info, date = kit.machine("cuda"), kit.today()
        if rank == 0:
            on = f"{ranks} ranks on {gpus}" if shared else f"{ranks}"
            machine = f"{on} x {kit.machine_line(info)}"
            say(f"\n{machine}, {date}\n{info['library']}\n\n{kit.as_table(rows)}\n", now=True)
            if json is not None:
                write_json(json, {"machine": info, "ranks": ranks, "gpus": gpus if shared else ranks, "date": date, "device": "cuda",
                                  "rows": [row.as_json() | {"machine": machine, "date": date} for row in rows]})
        torch.cuda.synchronize()
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return 1 if any(row.certified_fraction not in (None, 1) for row in rows) else 0


def _rows(torch: Any, clock: Clock, ranks: int, rank: int) -> Iterator[Row]:
    yield from _exchange_alone(torch, clock, ranks)
    if ranks in TOPOLOGIES:
        yield from _whole_plan(torch, clock, ranks, rank)


def _exchange_alone(torch: Any, clock: Clock, ranks: int) -> Iterator[Row]:
    dist, device = torch.distributed, clock.device
    counts = torch.randint(0, 4096, (CALLS, N_COUNTS), dtype=torch.int32, device=device)
    gathered = torch.empty((CALLS, ranks, N_COUNTS), dtype=torch.int32, device=device)
    ways: dict[str, list[Call]] = {}
    made = []
    try:
        one = exchange.create(dist.group.WORLD, device, N_COUNTS, "ipc")
        made.append(one)
        ways[one.describe()] = [partial(one.all_gather, *pair) for pair in zip(counts, gathered)]
    except Unsupported as error:
        if dist.get_rank() == 0:
            say(str(error))
    peer = "" if clock.shared else "NCCL all_gather"  # it and symmetric memory want a GPU for each rank
    if not clock.shared:
        ways[peer] = [partial(dist.all_gather_into_tensor, into, own) for own, into in zip(counts, gathered)]
        one_shot = _one_shot(torch, device)
        if one_shot is not None:
            ways["symmetric memory one-shot all_reduce"] = [one_shot] * CALLS
    in_graph = {name: clock.in_graph(calls) for name, calls in ways.items()}
    native = [one.describe() for one in made]
    for name, times in in_graph.items():
        ours = name in native
        yield Row("exchange", f"{name}, 256 counts, {ranks} ranks, in a graph", len(times), *percentiles(times),
                  target_p50_us=6.0 if ours and peer else None, peer=peer if ours else "",
                  peer_us=float(np.median(in_graph[peer])) if ours and peer else None, extra={"ranks": ranks})
    for how, measure in (("eager, back to back", clock.back_to_back), ("eager, one by one", clock.one_by_one)):
        medians = {name: measure(calls) for name, calls in ways.items()}
        for name, times in medians.items():
            ours = name in native
            yield Row("exchange", f"{name}, 256 counts, {ranks} ranks, {how}", len(times), *percentiles(times), peer=peer if ours else "",
                      peer_us=float(np.median(medians[peer])) if ours and peer else None, extra={"ranks": ranks})
    for one in made:
        one.close()


def _one_shot(torch: Any, device: Any) -> Call | None:
    """PyTorch's own fast path for small messages: an all-reduce of 1 KB that reads the peers' memory."""
    try:
        symmetric = importlib.import_module("torch.distributed._symmetric_memory")
        name = torch.distributed.group.WORLD.group_name
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # it has no use for it
        tensor = symmetric.empty(N_COUNTS, dtype=torch.float32, device=device).fill_(1)
        symmetric.rendezvous(tensor, name)
        torch.ops.symm_mem.one_shot_all_reduce(tensor, "sum", name)
    except (ImportError, RuntimeError, AttributeError):
        return None
    return lambda: torch.ops.symm_mem.one_shot_all_reduce(tensor, "sum", name)


def _topology(torch: Any, ranks: int) -> tuple[str, Any]:
    name, columns = TOPOLOGIES[ranks]
    if columns is not None:
        return name, torch.tensor(columns, dtype=torch.int32).T.contiguous()
    return name, {4: topology.SQUARE_4P2E, 8: topology.CUBE_8P2E}[ranks]


def _whole_plan(torch: Any, clock: Clock, ranks: int, rank: int) -> Iterator[Row]:
    dist, device = torch.distributed, clock.device
    name, r2o = _topology(torch, ranks)
    n_physical = 256 + ranks * r2o.shape[1]
    for n_tokens in (4096, 16384):
        host = np.roll(batches(n_tokens, 8, 256, CALLS // 2), 3 * rank, axis=0)  # the ranks have different tokens at a time
        ids = torch.from_numpy(host).to(device)
        counter = torch.zeros(1, dtype=torch.int64, device=device)
        with Planner(r2o, n_physical, 256, group=dist.group.WORLD, device=device) as planner, \
                Planner(r2o, n_physical, 256, ep_size=ranks, rank=rank, device=device) as alone:
            calls: list[Call] = [partial(planner.run, each, counter) for each in ids]
            fraction = _proven(torch, clock, planner, ids)
            without = clock.in_graph([partial(alone.run, each, counter) for each in ids])
            case = f"run, {n_tokens:,} x 8 ids a rank, 256 experts, {name}"
            judged = n_tokens == 4096 and not clock.shared
            kind = planner.exchange.describe() if planner.exchange is not None else "none"
            yield Row("exchange", f"{case}, in a graph", ROUNDS, *percentiles(clock.in_graph(calls)),
                      target_p50_us=15 if judged else None, certified_fraction=fraction, peer="run on own counts alone",
                      peer_us=float(np.median(without)), extra={"ranks": ranks, "exchange": kind})
            yield Row("exchange", f"{case}, eager, one by one", len(calls), *percentiles(clock.one_by_one(calls)),
                      target_p50_us=30 if judged else None, extra={"ranks": ranks, "exchange": kind})
            yield Row("exchange", f"{case}, eager, back to back", ROUNDS // 2, *percentiles(clock.back_to_back(calls)),
                      extra={"ranks": ranks, "exchange": kind})


def _proven(torch: Any, clock: Clock, planner: Planner, ids: Any) -> float:
    """The share of batches whose loads over all ranks equal a certified plan."""
    dist, fine = torch.distributed, 0
    for each in ids:
        sent = torch.bincount(planner.run(each, None).flatten(), minlength=planner.n_routed_experts)
        sent = sent.cpu() if clock.shared else sent
        dist.all_reduce(sent)
        fine += bool(planner.info().certified and (sent.cpu() == torch.as_tensor(planner.split()).cpu()).all())
    return fine / len(ids)
