"""
The exchange on real GPUs, against torch.distributed. Starts its own processes, one a GPU (or several on each, with gloo):

    python exchange_gpu.py correct [--processes N] [--calls N] [--nodes N] [--json FILE] [--limit SECONDS] [--under COMMAND]
    python exchange_gpu.py faults  [--processes N] [--limit SECONDS]

correct: eager calls with random delays, graphs, both mixed, epochs near 2^32, beside NCCL and matrix products, two exchanges on two
streams, planners on real routing, planners that share an exchange and end in any order, several nodes (emulated), making and closing many.
faults: a rank that sleeps past the limit, one that is killed, an abort; the same where the rank is missed by a rail (two emulated nodes).
One line a check; exit status 0 if all are fine. Every wait has a limit, so that nothing hangs.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from lplb import Planner, _c, errors, exchange, topology
from lplb.exchange.gather import Waiting, gather_by_torch
from lplb_structs import BLOB_BYTES, ExchangeConfig, function

N_COUNTS = 256
FAULTS = ("late", "abort", "killed")
RAIL_FAULTS = ("nvshmem-late", "nvshmem-killed", "nvshmem-abort", "nccl-abort")  # "-late" of NCCL is its watchdog's, after minutes
DATA = Path(__file__).resolve().parents[2] / "python/lplb/cli/data/deepseek_v2_lite_summary_sample.npz"


class Checks:
    """Rank 0 prints a line for every check that all ranks have gone through; the first failure ends the process."""

    def __init__(self, rank: int) -> None:
        self.rank, self.rows, self.began = rank, [], time.perf_counter()

    def __call__(self, name: str, fine: bool, detail: str = "") -> None:
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (bool(fine), detail))
        bad = [f"rank {rank}: {words}" for rank, (good, words) in enumerate(ranks) if not good]
        took = time.perf_counter() - self.began
        if self.rank == 0:
            print(f"{'ok' if not bad else 'FAILED':6} {name:58} {detail if not bad else '; '.join(bad)} [{took:.1f} s]", flush=True)
            self.rows.append({"check": name, "fine": not bad, "detail": detail, "seconds": round(took, 1)})
        self.began = time.perf_counter()
        if bad:
            raise AssertionError(f"{name}: {bad}")


@dataclass(frozen=True)
class Place:
    """This process among the others."""

    rank: int
    ranks: int
    gpus: int

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.gpu_of(self.rank))

    @property
    def own_gpu(self) -> bool:
        return self.gpus >= self.ranks

    def gpu_of(self, rank: int) -> int:
        # Where ranks share GPUs, ranks that are `gpus` apart get different ones: NCCL joins only GPUs that differ, a rail too.
        return (rank + rank // self.gpus) % self.gpus

    def on_different_gpus(self, ranks: Sequence[int]) -> bool:
        return len({self.gpu_of(rank) for rank in ranks}) == len(ranks)


def start(args: argparse.Namespace) -> Place:
    """Joins the group: NCCL with a GPU each, else gloo."""
    place = Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), torch.cuda.device_count())
    torch.cuda.set_device(place.device)
    with_nccl = place.own_gpu and args.mode == "correct"
    dist.init_process_group("nccl" if with_nccl else "gloo", init_method=f"file://{args.store}", rank=place.rank, world_size=place.ranks,
                            **({"device_id": place.device} if with_nccl else {}))
    return place


def nccl_group(place: Place) -> Any:
    """This rank's group for all-reduces: all ranks, or as many neighbours as have different GPUs; None where that is nobody."""
    if place.own_gpu:
        return dist.group.WORLD
    if place.gpus == 1 or place.ranks % place.gpus:
        return None
    groups = [dist.new_group(list(range(first, first + place.gpus)), backend="nccl") for first in range(0, place.ranks, place.gpus)]
    return groups[place.rank // place.gpus]


class Feed:
    """Random counts, what torch.distributed gathers of them, and the comparison with what an exchange brings."""

    def __init__(self, made: Any, device: torch.device, n: int, seed: int, delays: bool = True) -> None:
        self.made, self.n = made, n
        generator = torch.Generator(device=device).manual_seed(1000 * seed + made.rank)
        self.counts = torch.randint(-(2**31), 2**31, (n, N_COUNTS), generator=generator, device=device).int()
        self.wanted = torch.empty((made.ranks, n, N_COUNTS), dtype=torch.int32, device=device)
        self.got = torch.full((n, made.ranks, N_COUNTS), -7, dtype=torch.int32, device=device)
        gather_by_torch(made.group, self.counts.view(-1), self.wanted.view(made.ranks, -1), Waiting("counts", 0))
        chance = torch.rand(n, generator=torch.Generator().manual_seed(77 * seed + made.rank)).tolist()
        # Most calls follow at once; some ranks stop for a while before some calls, up to about 50 us on the GPU.
        self.sleeps = [int((c - 0.9) * 10 * 100_000) if delays and c > 0.9 else 0 for c in chance]

    def call(self, i: int) -> None:
        if self.sleeps[i]:
            torch.cuda._sleep(self.sleeps[i])
        self.made.all_gather(self.counts[i], self.got[i])

    def wrong(self) -> int:
        return int((self.got.transpose(0, 1) != self.wanted).sum())


def eager(made: Any, device: torch.device, calls: int, seed: int) -> int:
    wrong = 0
    block = min(calls, 1000)
    for first in range(0, calls, block):
        feed = Feed(made, device, block, seed + first)
        for i in range(block):
            feed.call(i)
        wrong += feed.wrong()
    return wrong


def mixed(made: Any, device: torch.device, rounds: int, seed: int) -> int:
    """Graphs of 16 calls, replayed with new counts each time, and 0 to 3 eager calls in between."""
    static = Feed(made, device, 16, seed)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        for i in range(16):
            static.call(i)
    torch.cuda.synchronize()
    wrong = 0
    for i in range(rounds):
        fresh = Feed(made, device, 16 + i % 4, seed + 1 + i)
        static.counts.copy_(fresh.counts[:16])
        static.got.fill_(-7)
        graph.replay()
        for j in range(16, fresh.n):
            fresh.call(j)
        fresh.got[:16].copy_(static.got)
        wrong += fresh.wrong()
    torch.cuda.synchronize()
    del graph
    return wrong


def busy(made: Any, device: torch.device, calls: int, seed: int, group: Any) -> int:
    """Beside matrix products on one stream and all-reduces of the NCCL group, if there is one, on another."""
    square = torch.randn((4096, 4096), dtype=torch.bfloat16, device=device)
    product = torch.empty_like(square)
    reduced = torch.ones(1 << 20, device=device)
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    wrong = 0
    for first in range(0, calls, 100):
        feed = Feed(made, device, 100, seed + first)
        for i in range(100):
            if i % 4 == 0:
                with torch.cuda.stream(streams[0]):
                    torch.mm(square, square, out=product)
            if group is not None and i % 2 == 0:
                with torch.cuda.stream(streams[1]):
                    dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=group, async_op=True)
            feed.call(i)
        torch.cuda.synchronize()
        wrong += feed.wrong()
    return wrong


def two_streams(make: Callable[..., Any], device: torch.device, rounds: int) -> int:
    """Two exchanges, each in its own stream order; the host queues them in another order on every rank."""
    pair = [make(first_epoch=9), make(first_epoch=2**32 - 5)]
    streams = [torch.cuda.Stream(device) for _ in pair]
    wrong = 0
    for i in range(rounds):
        feeds = [Feed(made, device, 40, 10_000 * (i + 1) + which) for which, made in enumerate(pair)]
        torch.cuda.synchronize()
        chance = torch.rand(80, generator=torch.Generator().manual_seed(i * 64 + pair[0].rank)).tolist()
        at = [0, 0]
        for c in chance:
            which = int(c < 0.5)
            which = which if at[which] < 40 else 1 - which
            with torch.cuda.stream(streams[which]):
                feeds[which].call(at[which])
            at[which] += 1
        torch.cuda.synchronize()
        wrong += sum(feed.wrong() for feed in feeds)
    for made in pair:
        made.close()
    return wrong


def planners(place: Place, batches: int, kind: str, **more: Any) -> tuple[bool, str]:
    """Real routing cut over the ranks: what all ranks send together equals the certified plan; eager and from a graph."""
    rank, ranks, device = place.rank, place.ranks, place.device
    with np.load(DATA) as trace:
        routed, n_experts = trace["topk_ids"], int(trace["n_experts"])
    r2o = {2: torch.tensor([[1], [0]]), 4: topology.SQUARE_4P2E, 8: topology.CUBE_8P2E}.get(ranks)
    if r2o is None or n_experts % ranks:
        return True, f"no topology for {ranks} ranks"
    n_physical = n_experts + ranks * r2o.shape[1]
    of_rank = np.arange(n_experts).reshape(ranks, -1)
    general = torch.from_numpy(np.concatenate([np.append(of_rank[r], of_rank[r - 1, 0]) for r in range(ranks)]))
    # Two planners in one stream order share an exchange; each could have its own.
    shared = exchange.create(dist.group.WORLD, device, n_experts + 1, kind, **more)
    both = [Planner(r2o, n_physical, n_experts, group=dist.group.WORLD, device=device, exchange=shared),
            Planner.from_placement(general, n_logical=n_experts, group=dist.group.WORLD, device=device, exchange=shared)]
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    fine, per_rank, best = True, 512, 0
    for i in range(batches):
        first = (i * ranks * per_rank) % (len(routed) - ranks * per_rank + 1)
        mine = routed[first + rank * per_rank : first + (rank + 1) * per_rank, i % routed.shape[1]].astype(np.int64)
        ids = torch.from_numpy(mine).to(device)
        for planner in both:
            out = planner.run(ids, counter)
            sent = torch.bincount(out.flatten(), minlength=planner.n_routed_experts)
            all_sent = torch.empty((ranks, len(sent)), dtype=sent.dtype, device=device)
            gather_by_torch(dist.group.WORLD, sent, all_sent, Waiting("counts", 0))
            info = planner.info()
            split = planner.split().to(device)
            per_gpu = split.view(ranks, -1).sum(1)
            fine &= torch.equal(all_sent.sum(0), split) and info.certified
            fine &= int(per_gpu.max()) == max(group.bound for group in info.groups)
            fine &= bool((planner.phy2log.to(device).long()[out] == ids).all())
            best += 1
            if i == 0:
                graph = torch.cuda.CUDAGraph()
                side = torch.cuda.Stream(device)
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                    replayed = planner.run(ids, counter)
                for _ in range(5):
                    replayed.fill_(-3)
                    graph.replay()
                    fine &= torch.equal(replayed, out)
                torch.cuda.synchronize()
                del graph
    for planner in both:
        planner.close()
    shared.close()
    return fine, f"{best} plans of {ranks} x {per_rank} x {routed.shape[2]} ids"


def disagreeing(place: Place, kind: str, **more: Any) -> tuple[bool, str]:
    """The last rank has another placement, or calls its planners in another order: every rank says so at its next call, and lives on."""
    rank, ranks, device = place.rank, place.ranks, place.device
    r2o = {2: torch.tensor([[1], [0]]), 4: topology.SQUARE_4P2E, 8: topology.CUBE_8P2E}.get(ranks)
    if r2o is None:
        return True, f"no topology for {ranks} ranks"
    n_experts, odd = 16 * ranks, ranks - 1
    sizes = (r2o, n_experts + ranks * r2o.shape[1], n_experts)
    history = torch.arange(n_experts, dtype=torch.float64)
    seen = []
    for case in ("one launch", "several launches", "solve", "graph", "other order"):
        shared = exchange.create(dist.group.WORLD, device, n_experts + 1, kind, policy="report", timeout=20, **more)
        first, second = (Planner(*sizes, group=dist.group.WORLD, device=device, exchange=shared) for _ in range(2))
        ids = torch.randint(0, n_experts, (200_000 if case == "several launches" else 512, 2), device=device)
        counts = torch.bincount(ids.flatten(), minlength=n_experts)
        # Where ranks share a GPU, memory that one of them asks for has to wait for the kernels of the others, which wait for that rank.
        torch.cuda.synchronize()
        dist.barrier()
        for planner in (first, second):
            planner.run(ids, None)
        graph = torch.cuda.CUDAGraph()
        if case == "graph":
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                first.run(ids, None)
        torch.cuda.synchronize()
        if case == "other order":
            (second if rank == odd else first).run(ids, None)
        else:
            first.update_redundancy_mapping(history if rank != odd else -history + n_experts)
            graph.replay() if case == "graph" else first.solve(counts) if case == "solve" else first.run(ids, None)
        torch.cuda.synchronize()
        try:
            first.run(ids, None)
            seen.append(f"{case}: nothing was said")
        except errors.Disagreement as error:
            wanted = f"from rank {odd} than from rank {rank}" if rank != odd else f"than from rank {rank}, which noticed it"
            seen += [] if wanted in str(error) else [f"{case}: {error}"]
        torch.cuda.synchronize()
        del graph
        first.close(), second.close(), shared.close()
        dist.barrier()
    return not seen, "; ".join(seen) or "by all ranks"


def lives(place: Place, kind: str, **more: Any) -> tuple[bool, str]:
    """Planners share an exchange; it ends with the last of them, in whatever order they are closed or become garbage."""
    ranks, group = place.ranks, dist.group.WORLD
    slots = torch.from_numpy(np.concatenate([[2 * r, 2 * r + 1, (2 * r + 2) % (2 * ranks)] for r in range(ranks)]))
    ids = (torch.arange(512, device=place.device) * (place.rank + 1)) % (2 * ranks)

    def planner(**how: Any) -> Planner:
        return Planner.from_placement(slots, n_logical=2 * ranks, group=group, device=place.device, **how)

    def used(some: Planner) -> torch.Tensor:
        out = some.run(ids, None)
        assert some.info().groups[0].total == 512 * ranks
        return out

    problems = []
    for order in ("012", "210", "120"):
        mine = exchange.create(group, place.device, 2 * ranks + 1, kind, **more) if more else None
        first = planner(exchange=mine or kind)
        trio: list[Any] = [first, planner(exchange=first.exchange), planner(exchange=first.exchange)]
        shared, first = first.exchange, None
        if mine is not None:
            mine.owned = True  # as if the first planner had made it
        wanted = [used(some) for some in trio]
        for count, which in enumerate(int(letter) for letter in order):
            if count != 1:
                trio[which].close()
            trio[which] = None  # garbage
            gc.collect()
            if shared.closed != (count == 2):
                problems.append(f"{order}: closed is {shared.closed} after {count + 1} planners")
            for some, out in zip(trio, wanted):
                if some is not None and not torch.equal(used(some), out):
                    problems.append(f"{order}: another plan after {count + 1} planners")
        dist.barrier()
    # The library itself: an exchange is destroyed while a planner holds it.
    mine = exchange.create(group, place.device, 2 * ranks + 1, kind, **more)
    some = planner(exchange=mine)
    used(some)
    mine.close()
    exchange.release(group, place.device)
    for _ in range(2):
        try:
            some.run(ids, None)
            problems.append("a planner ran with an exchange that was destroyed")
        except errors.WrongOrder as error:
            if "it is closed" not in str(error):
                problems.append(str(error))
    some.close()
    exchange.release(group, place.device)
    return not problems, "; ".join(problems) or "3 orders"


def beside_a_spinning_kernel(place: Place) -> tuple[bool, str]:
    """Making the library's part of an exchange waits for nothing on the default stream."""
    begin = function("exchange_begin", *[ctypes.c_void_p] * 4, ctypes.c_int64)
    message = ctypes.create_string_buffer(1024)
    config = ExchangeConfig(struct_size=ctypes.sizeof(ExchangeConfig), device=place.device.index, policy=1, n_ranks=1, rank=0,
                            n_counts=N_COUNTS, n_nodes=1, node=0, timeout_ms=1000, first_epoch=1)
    blob = ctypes.create_string_buffer(BLOB_BYTES)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.default_stream(place.device)):
        torch.cuda._sleep(4_000_000_000)  # 2 s and more
    pointer, began = ctypes.c_void_p(), time.perf_counter()
    status = begin(ctypes.byref(config), ctypes.byref(pointer), blob, message, len(message))
    took = time.perf_counter() - began
    torch.cuda.synchronize()
    slept = time.perf_counter() - began
    _c.load().exchange_destroy(pointer.value)
    return status == 0 and took < 0.5 * slept, f"{took * 1000:.1f} ms while the default stream was busy for {slept * 1000:.0f} ms"


def correct(args: argparse.Namespace) -> list[dict[str, Any]]:
    faulthandler.dump_traceback_later(0.9 * args.limit)  # where it hangs, if it does
    place = start(args)
    device, own_gpu = place.device, place.own_gpu
    check = Checks(place.rank)
    group = dist.group.WORLD
    beside = nccl_group(place)
    kind = "ipc"

    def make(**more: Any) -> Any:
        return exchange.create(group, device, N_COUNTS, kind, policy="report", timeout=20, **more)

    made = make()
    check(f"{kind}: made", made.kind == kind and made.native, repr(made))
    wrong = eager(made, device, args.calls, 1)
    check(f"{kind}: {args.calls} eager calls with random delays", wrong == 0, f"{wrong} wrong")
    rounds = max(4, min(args.calls // 400, 250))
    wrong = mixed(made, device, rounds, 5)
    check(f"{kind}: {rounds} graphs of 16 calls, mixed with eager ones", wrong == 0, f"{wrong} wrong")
    near = make(first_epoch=2**32 - 20)
    wrong = eager(near, device, 60, 7) + mixed(near, device, 4, 8)
    check(f"{kind}: across epoch 2^32", wrong == 0, f"{wrong} wrong")
    near.close()
    if not args.under:  # a checker has trouble with other libraries' kernels
        wrong = busy(made, device, min(args.calls, 2000), 11, beside)
        fine = wrong == 0 and made.report() is None
        check(f"{kind}: beside {'NCCL and ' * (beside is not None)}matrix products", fine, f"{wrong} wrong")
    made.close()
    rounds = 25 if own_gpu else 3
    wrong = two_streams(make, device, rounds)
    check(f"{kind}: two exchanges on two streams", wrong == 0, f"{wrong} wrong")
    if not args.no_planners:
        check(f"{kind}: realised loads equal the certified plan", *planners(place, 16, kind))
        check(f"{kind}: a rank that disagrees is noticed", *disagreeing(place, kind))
        check(f"{kind}: planners that share an exchange end in any order", *lives(place, kind))
    auto = exchange.create(group, device, N_COUNTS)
    check("auto", auto.kind == "ipc", repr(auto))
    auto.close()
    if own_gpu and not args.under:
        check("making one does not wait for the default stream", *beside_a_spinning_kernel(place))
    nodes(args, check, place)
    # 50 exchanges made and closed: the memory is what it was after the first few.
    exchange.release(group, device)
    torch.cuda.synchronize()
    free = []
    for i in range(52):
        made = exchange.create(group, device, N_COUNTS, "ipc", policy="report")
        made.close()
        exchange.release(group, device)
        if i >= 1:
            torch.cuda.empty_cache()
            free.append(torch.cuda.mem_get_info(device)[0])
        dist.barrier()
    lost = free[0] - free[-1]
    if own_gpu and not args.under:  # another process on the GPU may allocate in between, and so may a checker
        check("ipc: made and closed 50 times, no memory lost", lost <= 0, f"{lost} bytes less free memory")
    torch.cuda.synchronize()
    dist.barrier()
    return check.rows


def nodes(args: argparse.Namespace, check: Checks, place: Place) -> None:
    """Several nodes, emulated: each run of ranks / nodes of them is one."""
    ranks, device, group = place.ranks, place.device, dist.group.WORLD
    per_node = ranks // args.nodes
    if ranks % args.nodes or not all(place.on_different_gpus(range(first, ranks, per_node)) for first in range(per_node)):
        if place.rank == 0:
            print(f"skipped {args.nodes} nodes: {ranks} ranks on {place.gpus} GPUs have no rails between different GPUs", flush=True)
        return
    # NVSHMEM wants a GPU for each process.
    rails = ["nccl"] + (["nvshmem"] if place.own_gpu and exchange.has_plugin() else [])
    for rail in rails:
        more = {"n_nodes": args.nodes, "rail": rail}
        made = exchange.create(group, device, N_COUNTS, "ipc", policy="report", timeout=20, **more)
        wrong = eager(made, device, min(args.calls, 2000), 31) + mixed(made, device, 10, 32)
        fine = wrong == 0 and made.layout.n_nodes == args.nodes
        check(f"{args.nodes} nodes of {per_node}, rail {rail}, eager and graphs", fine, f"{wrong} wrong; {made!r}")
        made.close()
        exchange.release(group, device)
        if not args.no_planners:
            name = f"{args.nodes} nodes of {per_node}, rail {rail}: realised loads equal the certified plan"
            check(name, *planners(place, 4, "ipc", **more))
            check(f"{args.nodes} nodes of {per_node}, rail {rail}: a rank that disagrees is noticed", *disagreeing(place, "ipc", **more))
            exchange.release(group, device)
            name = f"{args.nodes} nodes of {per_node}, rail {rail}: planners that share an exchange end in any order"
            check(name, *lives(place, "ipc", **more))
            exchange.release(group, device)


# ---- faults ------------------------------------------------------------------------------------------------------------------------


def missed(place: Place, nodes: int) -> tuple[int, int]:
    """Whom this rank finds missing where the last rank is, and on which of the emulated nodes that one is. A rank whose rail is broken sends
    nothing on, so that the others of its node, who could not know, miss that one."""
    per_node = place.ranks // nodes
    node, local = divmod(place.rank, per_node)
    last_node, last_local = divmod(place.ranks - 1, per_node)
    if node == last_node or local == last_local:
        return place.ranks - 1, last_node
    return node * per_node + last_local, node


def faults(args: argparse.Namespace) -> NoReturn:
    """args.fault: late (policy report), abort (no limit), or killed (policy trap), by NVLink or after "nccl-" or "nvshmem-" by that rail.
    The last rank is the one that fails."""
    place = start(args)
    rank, ranks, device = place.rank, place.ranks, place.device
    rail, _, fault = args.fault.rpartition("-")
    limit, trap = 2.0, fault == "killed"
    more = {"n_nodes": args.nodes, "rail": rail} if rail else {}
    made = exchange.create(dist.group.WORLD, device, N_COUNTS, "ipc", policy="trap" if trap else "report",
                           timeout=0 if fault == "abort" else limit, **more)
    counts = torch.arange(N_COUNTS, dtype=torch.int32, device=device) + 1
    for _ in range(3):
        made.all_gather(counts)
    after = torch.empty((ranks, N_COUNTS), dtype=torch.int32, device=device)
    torch.cuda.synchronize()
    dist.barrier()
    if rank == ranks - 1:
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3 * limit)
        os._exit(0)
    if fault == "abort":
        threading.Timer(0.5, made.abort).start()
    faulthandler.dump_traceback_later(5 * limit)  # where it hangs, if it does
    began = time.perf_counter()
    words, problems, got = "", [], None
    try:
        got = made.all_gather(counts)
        torch.cuda.synchronize()
    except RuntimeError as error:
        words = type(error).__name__ + ": " + str(error).splitlines()[0]
    took = time.perf_counter() - began
    report = made.report()
    peer, _ = missed(place, args.nodes if rail else 1)
    if report is None or report.rank != rank or report.reason != ("aborted" if fault == "abort" else "timed out"):
        problems.append("the report")
    elif report.peer != (peer if fault != "abort" or not rail else report.peer):  # who was missing when all ranks abort is chance
        problems.append(f"the report should name rank {peer}")
    elif fault != "abort" and not limit <= report.waited_s < 1.5 * limit:
        problems.append("the time waited")
    if took >= 3 * limit:
        problems.append("too long")
    if trap and not words:
        problems.append("the context should be lost, and say so")
    if not trap:
        own = got is not None and (torch.equal(got[rank].cpu(), counts.cpu()) or (rail == "nccl" and not got[rank].any()))
        if words or not own or got[ranks - 1].any():
            problems.append("the counts: its own (an aborted NCCL may not have copied them), and zeros for those that are missing")
    try:  # by the library's own words, after a trap too
        made.all_gather(counts, after)
        problems.append("a call after the end")
    except errors.PeerTimeout as error:
        words = str(error)
    verdict = "FAILED" if problems else "ok"
    print(f"{verdict:6} {args.fault}: rank {rank} after {took:.2f} s: {report}; {words} {'; '.join(problems)}", flush=True)
    sys.stdout.flush()
    os._exit(1 if problems else 0)  # no clean-up: a peer is gone


def why_not(fault: str, place: Place, nodes: int) -> str:
    """Why a fault cannot be tried here, "" where it can."""
    if fault.endswith("killed") and not place.on_different_gpus(range(place.ranks - 1)):
        return "of two processes that trap on one GPU at a time the driver ends only one"
    if "-" in fault and (not place.own_gpu or place.ranks % nodes):
        return "rails want a GPU for each rank, and nodes of equal size"
    if fault.startswith("nvshmem") and not exchange.has_plugin():
        return "the NVSHMEM plugin is not here"
    return ""


# ---- processes ---------------------------------------------------------------------------------------------------------------------


def launch(args: argparse.Namespace, more: list[str], may_die: int = -1) -> list[str]:
    """One process a rank. What went wrong: ranks that failed, or that were still running at the limit. may_die: a rank that is to die."""
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        command = [*args.under.split(), sys.executable, os.path.abspath(__file__), args.mode, "--store", f"{folder}/store", *more]
        common = {**os.environ, "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1",
                  "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(args.processes)}
        running = {rank: subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                   for rank in range(args.processes)}
        started = list(running.values())
        end = time.monotonic() + args.limit
        try:
            while running and time.monotonic() < end:
                for rank, process in list(running.items()):
                    if process.poll() is not None:
                        del running[rank]
                        if process.returncode and rank != may_die:
                            problems.append(f"rank {rank} ended with {process.returncode}")
                            if args.mode == "correct":  # the others wait for it; a moment for what they have to say
                                end = min(end, time.monotonic() + 5)
                time.sleep(0.05)
            if running:
                problems.append(f"ranks {sorted(running)} were still running")
        finally:
            for process in started:
                process.kill()
            for process in started:
                process.wait()
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("mode", choices=["correct", "faults"])
    parser.add_argument("--processes", type=int, default=max(2, torch.cuda.device_count()))
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--no-planners", action="store_true", help="the exchange alone")
    parser.add_argument("--limit", type=float, default=120)
    parser.add_argument("--json")
    parser.add_argument("--under", default="", help="runs every rank under a command, e.g. compute-sanitizer with its options")
    parser.add_argument("--fault", choices=FAULTS + RAIL_FAULTS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.store:  # a rank
        if args.mode == "faults":
            faults(args)
        rows = correct(args)
        if args.json and os.environ["RANK"] == "0":
            Path(args.json).write_text(json.dumps(rows, indent=1))
        if args.under:
            sys.stdout.flush()
            os._exit(0)  # under a checker NCCL's end may hang
        dist.destroy_process_group()
        return 0
    passed_on = ["--calls", str(args.calls), "--nodes", str(args.nodes)] + (["--json", args.json] if args.json else [])
    passed_on += ["--no-planners"] * args.no_planners + ["--under", args.under] * bool(args.under)
    if args.mode == "correct":
        problems = launch(args, passed_on)
        print("\n".join(problems), end="\n" * bool(problems))
        return 1 if problems else 0
    failed = False
    place = Place(0, args.processes, torch.cuda.device_count())
    for fault in [args.fault] if args.fault else FAULTS + RAIL_FAULTS:
        reason = why_not(fault, place, args.nodes)
        if reason:
            print(f"skipped {fault}: {reason}", flush=True)
            continue
        problems = launch(args, ["--fault", fault, "--nodes", str(args.nodes)], may_die=args.processes - 1)
        print(f"{'FAILED' if problems else 'ok':6} {fault}: {'; '.join(problems) or 'every other rank ended by itself'}", flush=True)
        failed = failed or bool(problems)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
