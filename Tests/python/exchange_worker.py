"""One process of test_exchange.py: makes exchanges with its group and writes what it saw. Arguments: rank, processes, store file, folder.

The NVLink ways are stood in for by ways that need no GPU and fail where a scenario says so; agreeing and falling back are the real code.
"""

from __future__ import annotations

import gc
import json
import logging
import sys

import torch
import torch.distributed as dist

from lplb import exchange, errors
from lplb._exchange import Exchange, Rail, gather_by_torch
from lplb._exchange_ways import Way

torch.set_num_threads(1)
FACTS = exchange._Maker.facts


class Scenario:
    """fail: (kind, stage, rank) that fail; interrupted: likewise, by an exception that is nobody's error; hosts: the host of each rank."""

    def __init__(self, fail=(), hosts=None, interrupted=()):
        self.fail, self.hosts, self.interrupted = set(fail), hosts, set(interrupted)
        self.freed, self.closed, self.abandoned = [], [], []


now = Scenario()


class FakeWay(Way):
    def __init__(self, order):
        self.order, self.pointer, self.keep = order, None, []

    def fails(self, stage):
        if (self.kind, stage, self.order.layout.rank) in now.fail:
            raise RuntimeError(f"{self.kind} cannot {stage}")
        if (self.kind, stage, self.order.layout.rank) in now.interrupted:
            raise KeyboardInterrupt

    def steps(self):
        self.fails("prepare")
        self.pointer = 1 + self.order.layout.rank
        shown = yield self.pointer
        first = self.order.layout.node * self.order.layout.per_node
        assert shown == [1 + first + i for i in range(self.order.layout.per_node)]
        self.fails("connect")

    def give_up(self):
        pass

    def abort(self):
        now.abandoned.append(self.kind)

    def free(self):
        now.freed.append(self.kind)


class FakeSymm(FakeWay):
    kind = "symm"


class FakeIpc(FakeWay):
    kind = "ipc"


class FakeExchange(Exchange):
    native = True

    def __init__(self, kind, pointer, device, group, layout, n_counts, reason, rail, keep):
        super().__init__(group, layout, n_counts, reason)
        self.kind, self.rail, self.on_close, self.limits = kind, rail, None, []

    def all_gather(self, counts, out=None):
        everyone = self._output(counts, out)
        gather_by_torch(self.group, counts.contiguous(), everyone)
        if (self.kind, "count", self.rank) in now.fail:
            everyone[-1, 0] += 1
        return everyone

    def set_limits(self, timeout, policy):
        self.limits.append((timeout, policy))

    def close(self):
        if not self.closed:
            self.closed = True
            now.closed.append(self.kind)
            if self.on_close is not None:
                self.on_close(self)

    def free(self):
        now.freed.append(self.kind)


class FakeRail(Rail):
    """Its second step is taken by all ranks together, and so is its end, as NVSHMEM's."""

    kind = "nvshmem"

    def __init__(self, layout, device, n_counts, timeout):
        self.layout, self.stage, self.abandoned = layout, "nothing", False

    def steps(self):
        if ("rail", "create", self.layout.rank) in now.fail:
            raise RuntimeError("the rail cannot be created")
        self.stage = "created"
        yield None
        self.stage = "connected"
        if ("rail", "connect", self.layout.rank) in now.fail:
            raise RuntimeError("the rail cannot be connected")

    def abandon(self):
        self.abandoned = True

    def free(self):
        now.freed.append(f"rail {self.stage}" + ", alone" * self.abandoned)


class FakeMaker(exchange._Maker):
    def facts(self):
        facts = FACTS(self)
        host = facts.host if now.hosts is None else now.hosts[self.rank]
        return exchange.Facts(host, "a GPU", facts.wanted, False, facts.kept)


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
        "symm fails in its first step": (Scenario([("symm", "prepare", 2)]), {}),
        "symm fails in its second step": (Scenario([("symm", "connect", 0), ("symm", "connect", 3)]), {}),
        "symm brings wrong counts": (Scenario([("symm", "count", 1)]), {}),
        "both fail": (Scenario([("symm", "prepare", 1), ("ipc", "connect", 2)]), {}),
        "ipc asked for": (Scenario(), {"kind": "ipc"}),
        "ipc asked for and fails": (Scenario([("ipc", "prepare", 3)]), {"kind": "ipc"}),
        "nccl asked for": (Scenario(), {"kind": "nccl"}),
        "two hosts": (Scenario(hosts="aabb"), {}),
        "mixed hosts": (Scenario(hosts="abab"), {}),
        "uneven hosts": (Scenario(hosts="aaab"), {}),
        "emulated nodes": (Scenario(), {"n_nodes": 4}),
        "nodes that do not divide": (Scenario(), {"n_nodes": 3}),
    }
    for name, (scenario, arguments) in scenarios.items():
        now = scenario
        seen, made = attempt(group, **arguments)
        out[name] = {**seen, "freed": list(now.freed), "closed": list(now.closed), "limits": getattr(made, "limits", None),
                     "rail": getattr(getattr(made, "rail", None), "kind", None)}
    # The memory of a closed exchange is freed when all ranks have closed theirs, not before.
    now = Scenario()
    first = exchange.create(group, "cpu", 8)
    second = exchange.create(group, "cpu", 8)
    first.close()
    if dist.get_rank(group) != 1:
        second.close()
    exchange.release(group, "cpu")
    out["freed while one is open"] = list(now.freed)
    second.close()
    second.close()
    exchange.create(group, "cpu", 8).close()
    out["freed when all are closed"] = list(now.freed)
    exchange.release(group, "cpu")
    out["freed at last"] = list(now.freed)


def taken_back(group, out):
    """Ways and rails that are refused, or left by an exception on one rank, free all that was made, on every rank."""
    global now
    rails, exchange.NvshmemRail = exchange.NvshmemRail, FakeRail
    for name, fail in {
        "the rail is not created": [("rail", "create", 1)],
        "the rail is not connected": [("rail", "connect", 2)],
        "the way fails beside a rail": [("symm", "connect", 3)],
        "the trial fails beside a rail": [("symm", "count", 0)],
    }.items():
        now = Scenario(fail)
        seen, _ = attempt(group, kind="symm", rail="nvshmem", n_nodes=2)
        out[name] = {**seen, "freed": list(now.freed), "closed": list(now.closed)}
    # The others learn of it by this rank's silence, which ends the group: so it is another one.
    for stage in ("prepare", "connect"):
        own = dist.new_group(list(range(dist.get_world_size(group))))
        now = Scenario(interrupted=[("symm", stage, 2)])
        ended = ""
        try:
            exchange.create(own, "cpu", 8, kind="symm", rail="nvshmem", n_nodes=2, timeout=1.0)
        except (KeyboardInterrupt, errors.PeerTimeout) as error:
            ended = "KeyboardInterrupt" if isinstance(error, KeyboardInterrupt) else "PeerTimeout"
            error.__traceback__ = None
        before = list(now.freed)
        dist.destroy_process_group(own)
        del own
        gc.collect()
        out[f"interrupted in {stage}"] = {"ended": ended, "before": before, "freed": list(now.freed), "abandoned": list(now.abandoned)}
    exchange.NvshmemRail = rails


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
    out["symm on the CPU"] = attempt(group, kind="symm")[0]
    try:
        exchange.create(group, "cpu", 8 + rank // 2)
    except errors.InvalidArgument as error:
        out["different counts"] = str(error)


def main():
    rank, processes, store, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    out = {}
    plain(dist.group.WORLD, rank, out)
    exchange._Maker, exchange.NativeExchange = FakeMaker, FakeExchange
    exchange.WAYS.clear()
    exchange.WAYS.update(symm=FakeSymm, ipc=FakeIpc)
    with_fakes(dist.group.WORLD, out)
    taken_back(dist.group.WORLD, out)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(out, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
