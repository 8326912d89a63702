"""
How the counts of all ranks get to all ranks.

create() chooses, together with all ranks of a group:
    "symm"  NVLink, by PyTorch symmetric memory      about one NVLink round trip
    "ipc"   NVLink, by CUDA IPC                      the same
    "nccl"  torch.distributed, whatever its backend  always works, on the CPU too
    "auto"  the first of these that works on every rank
With several nodes the counts go along the rail first (to the same local rank on the other nodes), then over NVLink.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ._ops.arguments import integer
from ._exchange import Exchange, Layout, NativeExchange, Report, TorchExchange, policy_number, timeout_ms
from ._exchange_c import MAX_NODES, MAX_RANKS
from ._exchange_state import Attempt, log, state_of
from ._exchange_ways import WAYS, Order, Way
from ._gather import Waiting, gather_by_torch, gather_objects
from ._rail import NvshmemRail, TorchRail, check_rail, has_plugin, nvshmem_is_running
from .errors import InvalidArgument, Unsupported, broken_rule

__all__ = ["KINDS", "Exchange", "Report", "connect", "create", "release"]

KINDS = ("auto", "symm", "ipc", "nccl")
WARM_UP_CALLS = 5
WARM_UP_TIMEOUT = 30.0  # seconds; the first call of a slow rank may have to load its kernels


class Refused(Exception):
    """Why a way cannot be gone; the same on all ranks."""


def create(group: Any, device: Any, n_counts: int, kind: str = "auto", *, n_nodes: int | None = None, rail: str = "auto",
           timeout: float = 30.0, policy: str = "trap", first_epoch: int = 1) -> Exchange:
    """An exchange of n_counts integers from every rank of a torch.distributed group. Collective; equal arguments on all ranks. For planners
    n_counts is their n_logical + 1: a digest of placement and settings travels behind the counts.

    device: this rank's GPU, or "cpu". kind: see above; "auto" falls back, with one line in the log of rank 0 that says why, the others
    raise Unsupported on all ranks where they fail on one. n_nodes: None: ranks that share a host form a node. rail: "nccl", "nvshmem"
    (needs the plugin), "auto": NVSHMEM if it is already running, else NCCL. (On several nodes a group of the ranks along the rail is made,
    for which PyTorch may need every rank of the job: then all groups must make their exchanges at the same time.)
    timeout: seconds to wait for a peer, here and in every call; on the GPU's clock where the counts go over NVLink; 0: no limit. Where the
    host waits (gloo) the call raises then: PeerTimeout, or at once PeerLost where a connection breaks. Over NVLink a peer that has ended
    is late like any other. An NCCL collective or rail knows no limit of ours: PyTorch's watchdog ends the process after the limit of the
    process group (10 minutes by default), or abort() ends the waiting.
    policy: what a GPU does then: "trap" ends the process's CUDA context, so that nothing goes on with wrong counts; "report" lets it go
    on, with zeros, and makes later calls raise PeerTimeout. The same for a rank that plans with another placement: then later calls raise
    Disagreement. first_epoch: the number of the first call.

    Before it is handed out it is used a few times and compared with torch.distributed.
    """
    ordinal = _ordinal(device)
    n_counts = integer("n_counts", n_counts, 1)
    if kind not in KINDS:
        raise broken_rule("kind", f"must be one of {', '.join(KINDS)}", repr(kind))
    check_rail(rail), policy_number(policy), timeout_ms(timeout)
    with _on(ordinal):
        return _Maker(group, ordinal, n_counts, kind, n_nodes, rail, timeout, policy, first_epoch).make()


def _ordinal(device: Any) -> int:
    """-1: the CPU."""
    where = torch.device("cuda", device) if isinstance(device, int) and device >= 0 else torch.device("cpu" if device == -1 else device)
    if where.type == "cpu":
        return -1
    if where.type != "cuda":
        raise broken_rule("device", "must be 'cpu' or a CUDA device", repr(device))
    return torch.cuda.current_device() if where.index is None else where.index


def _on(ordinal: int) -> Any:
    """Object collectives of NCCL work on the current device."""
    return torch.cuda.device(ordinal) if ordinal >= 0 else nullcontext()


@dataclass(frozen=True)
class Facts:
    """What the ranks must know of each other before they begin."""

    host: str
    device: str
    wanted: tuple[Any, ...]  #: must be equal everywhere
    plugin: bool
    kept: tuple[dict[int, bool], bool]  #: GroupState.facts


@dataclass(frozen=True)
class Step:
    """One rank's part of a step: an error, or a value, and whether it was the last step."""

    error: str
    done: bool
    value: Any


def release(group: Any, device: Any, timeout: float = 30.0) -> None:
    """Frees what exchanges of the group that every rank has closed still hold; the next create() does it too. Collective."""
    timeout_ms(timeout)
    with _on(_ordinal(device)):
        state = state_of(group)
        state.settle(gather_objects(group, state.facts(), _waiting("release", group, timeout)))


def _waiting(call: str, group: Any, timeout: float) -> Waiting:
    return Waiting(f"lplb.exchange.{call}: rank {dist.get_rank(group)} of {dist.get_world_size(group)}", timeout)


class _Maker:
    """One call of create()."""

    def __init__(self, group: Any, ordinal: int, n_counts: int, kind: str, n_nodes: int | None, rail: str, timeout: float, policy: str,
                 first_epoch: int) -> None:
        self.group, self.ordinal, self.n_counts, self.kind, self.rail = group, ordinal, n_counts, kind, rail
        self.timeout, self.policy, self.first_epoch, self.n_nodes = timeout, policy, first_epoch, n_nodes
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        if self.rank < 0:
            raise broken_rule("group", "must contain this process", group)
        self.state = state_of(group)
        self.waiting = _waiting("create", group, timeout)

    def make(self) -> Exchange:
        facts = self.everyone(self.facts())
        self.state.settle([fact.kept for fact in facts])
        for other, theirs in enumerate(facts):
            if theirs.wanted != facts[0].wanted:
                raise InvalidArgument(f"exchange: all ranks must ask for the same, but rank 0 asks for {facts[0].wanted} and rank {other} "
                                      f"for {theirs.wanted} (kind, n_counts, n_nodes, rail, first_epoch)")
        flat = Layout(1, 0, self.ranks, self.rank)
        if self.kind == "nccl":
            return self.chosen(TorchExchange(self.group, flat, self.n_counts, "", self.timeout))
        if any(fact.device == "cpu" for fact in facts):
            reason = "NVLink joins GPUs, and these ranks are on the CPU"
            reasons = [reason]
        else:
            made, reasons = self.try_ways(facts)
            if made is not None:
                return self.chosen(made)
        if self.kind != "auto":
            raise Unsupported(f"exchange: {self.kind!r} is not possible here: {'; '.join(reasons)}")
        quiet = facts[0].device == "cpu"  # on the CPU there was never a choice
        return self.chosen(TorchExchange(self.group, flat, self.n_counts, "" if quiet else "; ".join(reasons), self.timeout))

    # ---- agreeing ----

    def facts(self) -> Facts:
        device = "cpu" if self.ordinal < 0 else str(torch.cuda.get_device_properties(self.ordinal).uuid)
        wanted = (self.kind, self.n_counts, self.n_nodes, self.rail, self.first_epoch)
        return Facts(_host(), device, wanted, has_plugin(), self.state.facts())

    def everyone(self, value: Any) -> list[Any]:
        """What every rank brings, in rank order. Also a barrier."""
        return gather_objects(self.group, value, self.waiting)

    def together(self, steps: Generator[Any, list[Any], None], layout: Layout | None = None) -> None:
        """Goes through the steps with all ranks. Refused, on all of them, as soon as one has failed. layout: show to one's own node."""
        shown: list[Any] | None = None
        with closing(steps):
            while True:
                step = _next(steps, shown)
                answers: list[Step] = self.everyone(step)
                failed = [f"rank {rank}: {answer.error}" for rank, answer in enumerate(answers) if answer.error]
                if failed:
                    raise Refused(failed[0] + (f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""))
                if all(answer.done for answer in answers):
                    return
                values = [answer.value for answer in answers]
                shown = values if layout is None else values[layout.node * layout.per_node :][: layout.per_node]

    def chosen(self, exchange: Exchange) -> Exchange:
        exchange.policy = self.policy
        if self.rank == 0:
            if exchange.reason:
                log.warning("lplb: counts are exchanged by %s; nothing faster: %s", exchange.describe(), exchange.reason)
            else:
                log.info("lplb: counts are exchanged by %s", exchange.describe())
        return exchange

    # ---- the ways ----

    def try_ways(self, facts: list[Facts]) -> tuple[NativeExchange | None, list[str]]:
        """The first way that works everywhere, and why the ones before it do not."""
        try:
            layout = layout_of([fact.host for fact in facts], self.rank, self.n_nodes)
        except Refused as refused:
            return None, [str(refused)]
        kinds = [kind for kind in WAYS if self.kind in (kind, "auto")]
        rails = [""] if layout.n_nodes == 1 else self.rails(facts)
        reasons: list[str] = []
        for kind in kinds:
            for rail in rails:
                name = f"{kind} with rail {rail}" if rail else kind
                try:
                    return self.try_way(WAYS[kind], rail, layout, "; ".join(reasons)), reasons
                except Refused as refused:
                    reasons.append(f"{name}: {refused}")
        return None, reasons

    def rails(self, facts: list[Facts]) -> list[str]:
        if self.rail != "auto":
            return [self.rail]
        running = all(self.everyone(all(fact.plugin for fact in facts) and nvshmem_is_running()))
        return ["nvshmem", "nccl"] if running else ["nccl"]

    def try_way(self, kind: type[Way], rail_kind: str, layout: Layout, reason: str) -> NativeExchange:
        """Refused on all ranks together; whatever the end is, what was made on the way is freed."""
        attempt = Attempt()
        try:
            exchange = self.attempt(attempt, kind, rail_kind, layout, reason)
        except Refused:
            try:
                attempt.leave()
                self.everyone(None)
            except BaseException:
                self.state.left.append(attempt)
                raise
            attempt.free()
            raise
        except BaseException:
            # This rank alone: the others find out at their next gather, and may write to our memory until then.
            self.state.left.append(attempt)
            attempt.leave()
            raise
        self.state.made += 1
        exchange.on_close = partial(self.state.closed.__setitem__, self.state.made)
        return exchange

    def attempt(self, made: Attempt, kind: type[Way], rail_kind: str, layout: Layout, reason: str) -> NativeExchange:
        local, along = self.subgroups(layout)
        if rail_kind == "nvshmem":
            nvshmem = made.rail = NvshmemRail(layout, self.ordinal, self.n_counts, self.timeout)
            self.together(nvshmem.steps())
        elif rail_kind:
            made.rail = TorchRail(along, self.ordinal, partial(setattr, self.state, "rails_aborted", True))
        rail = made.rail
        order = Order(local, self.ordinal, layout, self.n_counts, rail, self.timeout, self.policy, self.first_epoch)
        way = made.way = kind(order)
        self.together(way.steps(), layout)
        assert way.pointer is not None
        exchange = made.exchange = NativeExchange(way.kind, way.pointer, self.ordinal, self.group, layout, self.n_counts, reason, rail,
                                                  tuple(way.keep))
        self.together(self.warm_up(exchange))
        return exchange

    def warm_up(self, exchange: NativeExchange) -> Generator[Any, list[Any], None]:
        """Uses the exchange and compares with torch.distributed."""
        limit = min(self.timeout or WARM_UP_TIMEOUT, WARM_UP_TIMEOUT)
        exchange.set_limits(limit, "report")
        where = torch.device("cuda", self.ordinal) if self.ordinal >= 0 else torch.device("cpu")
        counts = torch.randint(-(2**31), 2**31, (WARM_UP_CALLS, self.n_counts), device=where).int()
        wanted = torch.empty((self.ranks, WARM_UP_CALLS, self.n_counts), dtype=torch.int32, device=where)
        gather_by_torch(self.group, counts.view(-1), wanted.view(self.ranks, -1), self.waiting)
        wanted = wanted.cpu()
        yield None
        got = torch.stack([exchange.all_gather(row) for row in counts], dim=1)
        # A rail may know no limit (NCCL's does not), and a rank that has failed above would let the others wait for ever.
        watchdog = threading.Timer(limit + 5, exchange.abort)
        watchdog.daemon = True
        watchdog.start()
        try:
            got = got.cpu()
        finally:
            watchdog.cancel()
        ended = exchange.report()
        if ended is not None:
            raise Refused(str(ended))
        if not torch.equal(got, wanted):
            wrong = int((got != wanted).sum())
            raise Refused(f"{wrong} of {wanted.numel()} counts were wrong in the trial")
        exchange.set_limits(self.timeout, self.policy)

    def subgroups(self, layout: Layout) -> tuple[Any, Any]:
        """The ranks of this node, and those along this rail, as groups."""
        if layout.n_nodes == 1:
            return self.group, None
        known = self.state.subgroups(layout.n_nodes)
        if known is None:
            ranks = dist.get_process_group_ranks(self.group)
            node = ranks[layout.node * layout.per_node :][: layout.per_node]
            along = ranks[layout.local_rank :: layout.per_node]
            # Of the node's group only the store is used, by PyTorch's rendezvous. The rail's is NCCL whatever the group's own backend: that
            # one may be gloo, or several ("cpu:gloo,cuda:nccl", of which PyTorch says that it is "undefined").
            backend = "nccl" if self.ordinal >= 0 and dist.is_nccl_available() else dist.get_backend(self.group)
            known = (dist.new_group(node, backend="gloo", use_local_synchronization=True),
                     dist.new_group(along, backend=backend, use_local_synchronization=True))
            self.state.keep_subgroups(layout.n_nodes, *known)
        return known


def _next(steps: Generator[Any, list[Any], None], shown: list[Any] | None) -> Step:
    try:
        value = next(steps) if shown is None else steps.send(shown)
    except StopIteration:
        return Step("", True, None)
    except Exception as error:
        return Step(str(error) or type(error).__name__, False, None)
    return Step("", False, value)


def _host() -> str:
    """Equal on the ranks that share a kernel, whatever container they are in."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        import socket

        return socket.gethostname()


def layout_of(hosts: list[str], rank: int, n_nodes: int | None) -> Layout:
    """Ranks that share a host are a node, or `n_nodes` equal runs of ranks are. Refused where that is not possible."""
    ranks = len(hosts)
    if n_nodes is None:
        starts = [i for i in range(ranks) if i == 0 or hosts[i] != hosts[i - 1]]
        if len(starts) != len(set(hosts)):
            raise Refused("the ranks of a host are not consecutive in the group")
        n_nodes = len(starts)
        per_node = ranks // n_nodes
        if ranks % n_nodes or any(start % per_node for start in starts):
            raise Refused("the hosts have different numbers of ranks")
    else:
        n_nodes = integer("n_nodes", n_nodes, 1)
        if ranks % n_nodes:
            raise broken_rule("n_nodes", f"must divide the {ranks} ranks of the group", n_nodes)
        per_node = ranks // n_nodes
    if per_node > MAX_RANKS or n_nodes > MAX_NODES:
        raise Refused(f"{n_nodes} nodes of {per_node} ranks are more than {MAX_NODES} of {MAX_RANKS}")
    return Layout(n_nodes, rank // per_node, per_node, rank % per_node)


# ---- planners ----------------------------------------------------------------------------------------------------------------------


def connect(planner: Any, kind: str = "auto") -> Exchange:
    """Makes an exchange for a Planner with a group, and attaches it. Collective."""
    exchange = create(planner.ep_group, planner._handle.device, planner._handle.width, kind)
    exchange.attach(planner)
    return exchange


def join_deep_ep(planner: Any, buffer: Any) -> None:
    """For a Planner whose ranks also have a deep_ep.Buffer or ElasticBuffer: on several nodes counts then travel by the NVSHMEM that it has
    started, if it has and the plugin is there. Its memory is not used. Collective on several nodes."""
    check_deep_ep(buffer, planner.ep_size)
    before = planner.exchange
    if isinstance(before, NativeExchange) and before.rail is not None and before.rail.kind != "nvshmem" and before.owned:
        made = create(planner.ep_group, before.device, before.n_counts, before.kind, n_nodes=before.layout.n_nodes)
        made.owned = True
        made.attach(planner)  # which leaves the one before, and that ends with its last planner


def check_deep_ep(buffer: Any, ep_size: int) -> None:
    """Refuses what is no DeepEP buffer of ep_size ranks, by what the buffer has, since there are two generations of them: Buffer has
    group_size, ElasticBuffer has num_ranks. Its hosts are not asked for: create() looks at the ranks' own."""
    size = getattr(buffer, "num_ranks", None) or getattr(buffer, "group_size", None)
    if size is None:
        raise broken_rule("buffer", "must be a deep_ep.Buffer or ElasticBuffer", type(buffer).__name__)
    if size != ep_size:
        raise broken_rule("buffer", f"must join the planner's ep_size = {ep_size} ranks", size)
