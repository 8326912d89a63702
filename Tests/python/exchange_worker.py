"""One process of test_exchange.py: makes exchanges with its group and writes what it saw. Arguments: rank, processes, store file, folder.

The library's connect is stood in for by one that needs no GPU and fails where a scenario says so; it gathers by the caller's function as
the library does. Falling back, taking back and freeing are the real code. (How ranks agree inside the library: Tests/LPLBTests.)
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import sys

import torch
import torch.distributed as dist

from lplb import _c, errors, exchange
from lplb.exchange.rail import Rail

torch.set_num_threads(1)
FACTS = exchange._Maker.facts


class Scenario:
    """fail: {rank: words} of ranks that the library refuses; interrupted: a rank in whose gather an exception comes that is nobody's error,
    and in which of its gathers; hosts: the host of each rank; rail: (stage, rank) in which a rail fails."""

    def __init__(self, fail=None, hosts=None, interrupted=None, rail=None):
        self.fail, self.hosts, self.interrupted, self.rail = fail or {}, hosts, interrupted, rail
        self.asked, self.done, self.gathers = [], [], 0


now = Scenario()


class FakeLibrary:
    """lplb_exchange_* of exchanges that exist in name only."""

    def connect(self, config, pointer, message, size):
        config, pointer = config._obj, pointer._obj
        now.asked.append([config.n_nodes, bool(config.rail), config.timeout_ms, config.policy])
        words = now.fail.get(config.rank, "")
        everyone = ctypes.create_string_buffer(1024 * config.n_ranks)
        for step in range(2):
            now.gathers += 1
            if config.gather(None, words.encode().ljust(1024, b"\0"), everyone, 1024):
                pointer.value = 99 if step else None  # its memory may still be written
                return 11
            refused = [(rank, everyone.raw[1024 * rank :].split(b"\0")[0]) for rank in range(config.n_ranks)]
            refused = [f"rank {rank}: {reason.decode()}" for rank, reason in refused if reason]
            if refused:
                message.value = refused[0].encode()
                return 2
        pointer.value = 7
        return 0

    def all_gather(self, pointer, counts, gathered, stream):
        return 0

    def get_report(self, pointer, report):
        return 0

    def close(self, pointer):
        now.done.append(f"closed {pointer}")

    def abort(self, pointer):
        now.done.append(f"aborted {pointer}")

    def destroy(self, pointer):
        now.done.append(f"freed {pointer}")


class FakeRail(Rail):
    """Its second step is taken by all ranks together, and so is its end, as NVSHMEM's."""

    kind = "nvshmem"

    def __init__(self, layout, device, n_counts, timeout_ms):
        self.layout, self.stage, self.abandoned, self.ops, self.limits = layout, "nothing", False, _c.RailOps(), [timeout_ms]

    def fail(self, stage):
        if now.rail == (stage, self.layout.rank):
            raise RuntimeError(f"the rail cannot be {stage}")

    def prepare(self, together):
        together(lambda: self.fail("created"))
        self.stage = "created"
        together(lambda: self.fail("connected"))
        self.stage = "connected"

    def set_limits(self, policy, timeout_ms):
        self.limits += [policy, timeout_ms]

    def abandon(self):
        self.abandoned = True

    def free(self):
        now.done.append(f"rail {self.stage}" + ", alone" * self.abandoned)


class FakeMaker(exchange._Maker):
    def facts(self):
        facts = FACTS(self)
        host = facts.host if now.hosts is None else now.hosts[self.rank]
        return exchange._Facts(host, True, facts.wanted, False, facts.kept)



class Interrupted(exchange.Callback):
    """A gather in which an exception comes, as an interrupt from the keyboard would."""

    def _gather(self, context, mine, everyone, size):
        if now.interrupted == (dist.get_rank(), now.gathers):
            self.error = KeyboardInterrupt()
            return 1
        return super()._gather(context, mine, everyone, size)


class Lines(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def attempt(group, **arguments):
    """What create() gave, in words."""
    lines = Lines()
    exchange.log.addHandler(lines)
    try:
        made = exchange.create(group, "cpu", 8, **arguments)
    except errors.LplbError as error:
        return {"error": type(error).__name__, "words": str(error), "log": lines.lines}, None
    finally:
        exchange.log.removeHandler(lines)
    layout = [made.layout.n_nodes, made.layout.per_node]
    seen = {"kind": made.kind, "reason": made.reason, "log": lines.lines, "layout": layout, "repr": repr(made), "native": made.native}
    return seen, made


def with_fakes(group, out):
    global now
    scenarios = {
        "all fine": (Scenario(), {}),
        "the library refuses": (Scenario({2: "no way to rank 1", 3: "no way to rank 1"}), {}),
        "ipc asked for": (Scenario(), {"kind": "ipc", "timeout": 5.0, "policy": "report"}),
        "symm asked for": (Scenario(), {"kind": "symm"}),
        "ipc asked for and refused": (Scenario({3: "no way"}), {"kind": "ipc"}),
        "torch asked for": (Scenario(), {"kind": "torch"}),
        "nccl asked for": (Scenario(), {"kind": "nccl"}),
        "two hosts": (Scenario(hosts="aabb"), {}),
        "two hosts refused": (Scenario({1: "no way"}, hosts="aabb"), {}),
        "uneven hosts": (Scenario({rank: "uneven" for rank in range(4)}, hosts="aaab"), {"n_nodes": None}),
        "three hosts": (Scenario({rank: "uneven" for rank in range(4)}, hosts="aabc"), {}),
        "emulated nodes": (Scenario(), {"n_nodes": 4}),
        "nodes that do not divide": (Scenario({rank: "do not divide" for rank in range(4)}), {"n_nodes": 3}),
    }
    for name, (scenario, arguments) in scenarios.items():
        now = scenario
        seen, made = attempt(group, **arguments)
        out[name] = {**seen, "asked": list(now.asked), "done": list(now.done), "rail": getattr(getattr(made, "rail", None), "kind", None)}
    # The memory of a closed exchange is freed when all ranks have closed theirs, not before.
    now = Scenario()
    first = exchange.create(group, "cpu", 8)
    second = exchange.create(group, "cpu", 8)
    first.close()
    if dist.get_rank(group) != 1:
        second.close()
    exchange.release(group, "cpu")
    out["while one is open"] = now.done.count("freed 7")
    second.close()
    second.close()
    exchange.create(group, "cpu", 8).close()
    out["when all are closed"] = now.done.count("freed 7")
    exchange.release(group, "cpu")
    out["at last"] = [now.done.count("freed 7"), now.done.count("closed 7")]


def taken_back(group, out):
    """Rails that are refused, or left by an exception on one rank, free all that was made, on every rank."""
    global now
    rails, exchange.NvshmemRail = exchange.NvshmemRail, FakeRail
    for name, scenario in {
        "the rail is not created": Scenario(rail=("created", 1)),
        "the rail is not connected": Scenario(rail=("connected", 2)),
        "the library refuses beside a rail": Scenario({3: "no way"}),
    }.items():
        now = scenario
        seen, _ = attempt(group, kind="ipc", rail="nvshmem", n_nodes=2)
        out[name] = {**seen, "done": list(now.done)}
    now = Scenario()
    _, made = attempt(group, kind="ipc", rail="nvshmem", n_nodes=2, timeout=100.0)
    out["a rail that works"] = {"limits": made.rail.limits, "taken": made.rail.taken, "done": list(now.done)}
    # The others learn of it by this rank's silence, which ends the group: so it is another one.
    callback, exchange.Callback = exchange.Callback, Interrupted
    for step in (1, 2):
        own = dist.new_group(list(range(dist.get_world_size(group))))
        now = Scenario(interrupted=(2, step))
        ended = ""
        try:
            exchange.create(own, "cpu", 8, kind="ipc", rail="nvshmem", n_nodes=2, timeout=1.0)
        except (KeyboardInterrupt, errors.PeerTimeout) as error:
            ended = "KeyboardInterrupt" if isinstance(error, KeyboardInterrupt) else "PeerTimeout"
            error.__traceback__ = None
        before = list(now.done)
        dist.destroy_process_group(own)
        del own
        gc.collect()
        out[f"interrupted in gather {step}"] = {"ended": ended, "before": before, "done": list(now.done)}
    # One that asks again at once meets the others inside the library, whose bytes are no Python objects.
    own = dist.new_group(list(range(dist.get_world_size(group))))
    now = Scenario(interrupted=(2, 2))
    words = out["interrupted, and asked again"] = []
    for _ in range(2 if dist.get_rank() == 2 else 1):
        try:
            exchange.create(own, "cpu", 8, kind="ipc", timeout=5.0)
        except (KeyboardInterrupt, errors.LplbError) as error:
            words.append(f"{type(error).__name__}: {error}")
    exchange.NvshmemRail, exchange.Callback = rails, callback


def plain(group, rank, out):
    """On the CPU as it is."""
    seen, made = attempt(group)
    generator = torch.Generator().manual_seed(rank)
    right = True
    for dtype in (torch.int32, torch.int64):
        counts = torch.randint(0, 2**31 - 1, (8,), generator=generator).to(dtype)
        expected = [torch.empty_like(counts) for _ in range(made.ranks)]
        dist.all_gather(expected, counts, group=group)
        given = torch.empty((made.ranks, 8), dtype=dtype)
        result = made.all_gather(counts)
        right &= torch.equal(result, torch.stack(expected)) and result.dtype == dtype
        right &= made.all_gather(counts, given) is given and torch.equal(given, result)
    refused = []
    for counts, into in ((torch.zeros(7, dtype=torch.int32), None), (torch.zeros(8), None),
                         (torch.zeros(8, dtype=torch.int32), torch.zeros((made.ranks, 8), dtype=torch.int64))):
        try:
            made.all_gather(counts, into)
        except errors.InvalidArgument as error:
            refused.append(str(error))
    made.close()
    try:
        made.all_gather(torch.zeros(8, dtype=torch.int32))
    except errors.WrongOrder as error:
        refused.append(str(error))
    out["plain"] = {**seen, "right": right, "refused": refused}
    out["ipc on the CPU"] = attempt(group, kind="ipc")[0]
    out["nodes that do not divide, by the library"] = attempt(group, kind="ipc", n_nodes=3)[0]
    try:
        exchange.create(group, "cpu", 8 + rank // 2)
    except errors.Disagreement as error:
        out["different counts"] = str(error)
    try:
        exchange.release(group, "cpu") if rank == 1 else exchange.create(group, "cpu", 8)
    except errors.LplbError as error:
        out["another call"] = f"{type(error).__name__}: {error}"
    made = exchange.create(group, "cpu", 8)  # all ranks have left both calls: the group is as good as before
    out["after another call"] = made.all_gather(torch.full((8,), rank, dtype=torch.int32))[:, 0].tolist()
    made.close()
    exchange.release(group, "cpu")


def main():
    rank, processes, store, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    out = {}
    plain(dist.group.WORLD, rank, out)
    exchange._Maker = FakeMaker
    for name in ("connect", "all_gather", "get_report", "close", "abort", "destroy"):
        setattr(_c.load(), f"exchange_{name}", getattr(FakeLibrary(), name))
    with_fakes(dist.group.WORLD, out)
    taken_back(dist.group.WORLD, out)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(out, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
