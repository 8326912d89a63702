"""
How the counts of all ranks get to all ranks.

create() makes one together with all ranks of a group:
    "ipc"    NVLink: the library maps the peers' buffers by CUDA IPC and tries it     about one NVLink round trip
    "torch"  torch.distributed, whatever its backend                                  always works, on the CPU too
    "auto"   "ipc" where it works on every rank, else "torch"
Names of earlier versions are accepted: "nccl" is "torch"; "symm", PyTorch's symmetric memory, is "ipc", as fast over the same NVLink.
With several nodes the counts go along the rail first (to the same local rank on the other nodes), then over NVLink.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import _c
from .._ops.arguments import EXCHANGES as KINDS, FORMER_EXCHANGES, integer, one_of
from ..errors import Disagreement, LplbError, Unsupported, broken_rule
from .base import Exchange, Layout, Refused, Report, limits
from .by_torch import TorchExchange
from .gather import CONNECT, RELEASE, SETUP, Callback, Waiting, gather_objects, on_device
from .native import Facts, NativeExchange, state_of
from .rail import NvshmemRail, Rail, TorchRail, has_plugin, nvshmem_is_running

__all__ = ["KINDS", "Exchange", "Report", "connect", "create", "release"]

TRIAL_MS = 30_000  # the longest that the library's trial waits
TRIAL_GRACE = 10.0  # seconds: a rank whose trial has failed waits for those whose trial times out

log = logging.getLogger("lplb.exchange")


def create(group: Any, device: Any, n_counts: int, kind: str = "auto", *, n_nodes: int | None = None, rail: str = "auto",
           timeout: float = 30.0, policy: str = "trap", first_epoch: int = 1) -> Exchange:
    """An exchange of n_counts integers from every rank of a torch.distributed group. Collective; equal arguments on all ranks. For planners
    n_counts is their n_logical + 1: a digest of placement and settings travels behind the counts.

    device: this rank's GPU, or "cpu". kind: see above; "auto" falls back, with one line in the log of rank 0 that says why, "ipc" raises
    Unsupported on all ranks where it fails on one. n_nodes: None: ranks that share a host form a node. rail: "nccl", "nvshmem"
    (needs the plugin), "auto": NVSHMEM if it is already running, else NCCL. (On several nodes a group of the ranks along the rail is made,
    for which PyTorch may need every rank of the job: then all groups must make their exchanges at the same time.)
    timeout: seconds to wait for a peer, here and in every call; on the GPU's clock where the counts go over NVLink; 0: no limit. Where the
    host waits (gloo) the call raises then: PeerTimeout, or at once PeerLost where a connection breaks. Over NVLink a peer that has ended
    is late like any other. An NCCL collective or rail knows no limit of ours: PyTorch's watchdog ends the process after the limit of the
    process group (10 minutes by default), or abort() ends the waiting.
    policy: what a GPU does then: "trap" ends the process's CUDA context, so that nothing goes on with wrong counts; "report" lets it go
    on, with zeros, and makes later calls raise PeerTimeout. The same for a rank that plans with another placement: then later calls raise
    Disagreement. first_epoch: the number of the first call.

    Over NVLink it is used a few times and compared with torch.distributed before it is handed out.
    """
    ordinal = _ordinal(device)
    n_counts = integer("n_counts", n_counts, 1)
    kind = one_of("kind", FORMER_EXCHANGES.get(kind, kind), KINDS)
    if n_nodes is not None:
        n_nodes = integer("n_nodes", n_nodes, 1)
    first_epoch = integer("first_epoch", first_epoch, 0, 2**32 - 1)
    one_of("rail", rail, ("auto", "nccl", "nvshmem")), limits(timeout, policy)
    with on_device(ordinal):
        return _Maker(group, ordinal, n_counts, kind, n_nodes, rail, timeout, policy, first_epoch).make()


def _ordinal(device: Any) -> int:
    """-1: the CPU."""
    where = torch.device("cuda", device) if isinstance(device, int) and device >= 0 else torch.device("cpu" if device == -1 else device)
    if where.type == "cpu":
        return -1
    if where.type != "cuda":
        raise broken_rule("device", "must be 'cpu' or a CUDA device", repr(device))
    return torch.cuda.current_device() if where.index is None else where.index


def release(group: Any, device: Any, timeout: float = 30.0) -> None:
    """Frees what exchanges of the group that every rank has closed still hold; the next create() does it too. Collective."""
    limits(timeout)
    with on_device(_ordinal(device)):
        state = state_of(group)
        state.settle(gather_objects(group, RELEASE, state.facts(), _waiting("release", group, timeout)))


def _waiting(call: str, group: Any, timeout: float) -> Waiting:
    return Waiting(f"lplb.exchange.{call}: rank {dist.get_rank(group)} of {dist.get_world_size(group)}", timeout)


@dataclass(frozen=True)
class _Facts:
    """What the ranks must know of each other before they begin."""

    host: str
    on_cuda: bool
    wanted: tuple[Any, ...]  #: must be equal everywhere
    has_nvshmem: bool  #: it is running here, and the plugin is there
    kept: Facts  #: GroupState.facts


class _Maker:
    """One call of create()."""

    def __init__(self, group: Any, ordinal: int, n_counts: int, kind: str, n_nodes: int | None, rail: str, timeout: float, policy: str,
                 first_epoch: int) -> None:
        self.group, self.ordinal, self.n_counts, self.kind, self.rail = group, ordinal, n_counts, kind, rail
        self.timeout, self.policy, self.first_epoch, self.n_nodes = timeout, policy, first_epoch, n_nodes
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        if self.rank < 0:
            raise broken_rule("group", "must contain this process", group)
        self.flat = Layout(1, 0, self.ranks, self.rank)
        self.state = state_of(group)
        self.waiting = _waiting("create", group, timeout)

    def make(self) -> Exchange:
        facts: list[_Facts] = self.everyone(self.facts())
        self.state.settle([fact.kept for fact in facts])
        for other, theirs in enumerate(facts):
            if theirs.wanted != facts[0].wanted:
                raise Disagreement(f"exchange: all ranks must ask for the same, but rank 0 asks for {facts[0].wanted} and rank {other} "
                                   f"for {theirs.wanted} (kind, n_counts, n_nodes, rail, first_epoch, policy)")
        reasons: list[str] = []
        for rail, layout in self.ways(facts):
            try:
                return self.chosen(self.attempt(rail, layout, "; ".join(reasons)))
            except Refused as refused:
                reasons.append(f"rail {rail}: {refused}" if rail else str(refused))
        if self.kind == "ipc":
            raise Unsupported(f"exchange: 'ipc' is not possible here: {'; '.join(reasons)}")
        reason = "; ".join(reasons) if facts[0].on_cuda else ""  # on the CPU there was never a choice
        return self.chosen(TorchExchange(self.group, self.flat, self.n_counts, reason, self.timeout))

    def facts(self) -> _Facts:
        wanted = (self.kind, self.n_counts, self.n_nodes, self.rail, self.first_epoch, self.policy)
        return _Facts(_host(), self.ordinal >= 0, wanted, has_plugin() and nvshmem_is_running(), self.state.facts())

    def everyone(self, value: Any) -> list[Any]:
        """What every rank brings, in rank order. Also a barrier."""
        return gather_objects(self.group, SETUP, value, self.waiting)

    def together(self, act: Callable[[], Any]) -> list[Any]:
        """What the function gives on every rank. Refused, on all of them, where it has failed on one."""
        mine: tuple[str, Any]
        try:
            mine = "", act()
        except Exception as error:
            mine = str(error) or type(error).__name__, None
        answers = self.everyone(mine)
        failed = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
        if failed:
            raise Refused(failed[0] + (f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""))
        return [value for _, value in answers]

    def chosen(self, exchange: Exchange) -> Exchange:
        exchange.policy = self.policy
        if self.rank == 0:
            if exchange.reason:
                log.warning("lplb: counts are exchanged by %s; nothing faster: %s", exchange.describe(), exchange.reason)
            else:
                log.info("lplb: counts are exchanged by %s", exchange.describe())
        return exchange

    # ---- over NVLink ----

    def ways(self, facts: list[_Facts]) -> list[tuple[str, Layout]]:
        """The rails to try, "" for none, and where this rank stands with each. The library judges whether the ranks lie like that."""
        if self.kind == "torch":
            return []
        n_nodes = self.n_nodes or len({fact.host for fact in facts})
        if n_nodes == 1 or self.ranks % n_nodes or not all(fact.on_cuda for fact in facts):
            return [("", self.flat)]
        per_node = self.ranks // n_nodes
        layout = Layout(n_nodes, self.rank // per_node, per_node, self.rank % per_node)
        automatic = ["nvshmem", "nccl"] if all(fact.has_nvshmem for fact in facts) else ["nccl"]
        return [(rail, layout) for rail in (automatic if self.rail == "auto" else [self.rail])]

    def attempt(self, rail_kind: str, layout: Layout, reason: str) -> NativeExchange:
        """Refused on all ranks together, and then nothing is left of it."""
        rail: Rail | None = None
        pointer = ctypes.c_void_p()
        policy, timeout_ms = limits(self.timeout, self.policy)
        try:
            if rail_kind == "nvshmem":
                rail = NvshmemRail(layout, self.ordinal, self.n_counts, min(timeout_ms or TRIAL_MS, TRIAL_MS))
            elif rail_kind:
                along = self.state.rail_group(self.group, layout, self.ordinal)
                rail = TorchRail(along, self.ordinal, partial(setattr, self.state, "rails_aborted", True))
            if rail is not None:
                rail.prepare(self.together)
            waiting = Waiting(self.waiting.what, self.timeout + TRIAL_GRACE if self.timeout else 0)
            gather = Callback(self.group, CONNECT, waiting, self.ordinal)
            config = _c.ConnectConfig(
                device=self.ordinal, policy=policy, n_ranks=self.ranks, rank=self.rank, n_counts=self.n_counts, n_nodes=self.n_nodes or 0,
                timeout_ms=timeout_ms, first_epoch=self.first_epoch, rail=None if rail is None else ctypes.pointer(rail.ops),
                gather=gather.function)
            failure = gather.call(_c.load().exchange_connect, ctypes.byref(config), ctypes.byref(pointer))
            if failure is not None:
                raise Refused(failure)
        except Refused as refused:
            if rail is not None:
                rail.free()
            why = refused.args[0]
            raise why if isinstance(why, LplbError) and not isinstance(why, Unsupported) else refused
        except BaseException:
            # This rank alone: the others find out at their next gather, and may write to our memory until then.
            self.state.left.append((pointer.value, rail))
            raise
        if rail is not None:
            rail.taken = True
            rail.set_limits(policy, timeout_ms)
        assert pointer.value is not None
        return NativeExchange(pointer.value, self.ordinal, self.group, layout, self.n_counts, reason, rail)


def _host() -> str:
    """Equal on the ranks that share a kernel, whatever container they are in."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        import socket

        return socket.gethostname()


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
