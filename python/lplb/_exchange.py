"""The exchanges: objects that bring the counts of all ranks to all ranks. lplb.exchange makes them."""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _c as _native, _exchange_c
from ._gather import Waiting, abort_group, gather_by_torch, gather_rows
from .errors import PeerLost, PeerTimeout, WrongOrder, broken_rule

# The stream as a number, without building a torch.cuda.Stream each time. Absent in builds of torch without CUDA.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


@dataclass(frozen=True)
class Layout:
    """Where this rank stands: `ranks` of them, numbered node by node, `per_node` in each."""

    n_nodes: int
    node: int
    per_node: int
    local_rank: int

    @property
    def ranks(self) -> int:
        return self.n_nodes * self.per_node

    @property
    def rank(self) -> int:
        return self.node * self.per_node + self.local_rank


@dataclass(frozen=True)
class Report:
    """What ended an exchange in its call number `epoch`: this rank waited waited_s for the counts of `peer`, or `peer` planned with another
    planner, placement or settings."""

    reason: str  #: "timed out", "aborted", "lost" (the connection to a rank broke) or "disagreed"
    rank: int
    peer: int  #: -1: not known
    epoch: int
    waited_s: float

    def __str__(self) -> str:
        if self.reason == "disagreed":
            return f"rank {self.rank} found another digest in the counts of rank {self.peer} in call {self.epoch}"
        peer = f"the counts of rank {self.peer}" if self.peer >= 0 else "another rank's counts"
        what = f"rank {self.rank} waited {self.waited_s:.3f} s for {peer} in call {self.epoch}"
        return what + {"aborted": ", then was aborted", "lost": ": the connection is lost"}.get(self.reason, ": late, stuck or gone")


class Rail:
    """How counts travel between nodes. ops: what the library calls; it and all behind it must live as long as the exchange."""

    kind: str
    ops: _exchange_c.RailOps
    taken = False  #: an exchange of the library owns what is behind it, and frees it with itself

    def set_limits(self, policy: int, timeout_ms: int) -> None:
        """As the exchange's, where the rail waits on the GPU itself."""

    def abandon(self) -> None:
        """Makes free() do without the other ranks, which may be gone."""

    def free(self) -> None:
        """Frees what no exchange has taken; on all ranks together, unless it is abandoned."""


class Exchange(ABC):
    """Brings the counts of all ranks to all ranks. Its calls follow one another in one stream order, the same on all ranks."""

    kind: str  #: "symm" (PyTorch symmetric memory), "ipc" (CUDA IPC) or "nccl" (torch.distributed)
    native: bool  #: the library does it itself, inside Planner.run too

    def __init__(self, group: Any, layout: Layout, n_counts: int, reason: str) -> None:
        self._group = weakref.ref(group)
        self.layout, self.n_counts = layout, n_counts
        self.ranks, self.rank = layout.ranks, layout.rank
        self.reason = reason  #: why nothing faster is in use, "" where nothing is
        self.closed = False
        self.policy = "trap"  #: what a GPU does that finds a rank late, or disagreeing
        self.attached = False  #: lplb_planner_run does it inside
        self.owned = False  #: made by a planner: closed with the last planner that uses it; otherwise it is the caller's
        self._users: set[int] = set()  # numbers of the planners

    @property
    def group(self) -> Any:
        """The process group, which belongs to torch.distributed: None once it is destroyed or the exchange is closed."""
        return None if self.closed else self._group()

    def join(self, planner: int) -> None:
        """A planner starts to use the exchange."""
        self._users.add(planner)

    def leave(self, planner: int) -> None:
        """A planner has ended its use, from any thread."""
        self._users.discard(planner)
        if self.owned and not self._users:
            self.close()

    @abstractmethod
    def all_gather(self, counts: Tensor, out: Tensor | None = None) -> Tensor:
        """[ranks, n_counts], the counts [n_counts] of every rank in rank order, on the current stream. out: where to put them.

        int32, or int64 that fits 32 bits. A rank that does not come makes the others fail: see lplb.exchange.create.
        """

    def attach(self, planner: Any) -> None:
        """Makes a Planner of the same ranks use this exchange."""
        if self.closed:
            raise WrongOrder("exchange: must not be used after close()")
        if planner.ep_size != self.ranks or planner.rank != self.rank:
            raise broken_rule("exchange", f"must join the planner's ep_size = {planner.ep_size} ranks as rank {planner.rank}",
                              f"{self.ranks} ranks, rank {self.rank}")
        if planner._handle.width != self.n_counts:
            raise broken_rule("exchange", f"must carry n_logical + 1 = {planner._handle.width} counts", self.n_counts)
        self._attach(planner._handle)
        planner._handle.use(self)

    def _attach(self, handle: Any) -> None:
        """The library's part: a native exchange that this one replaces must not be used any more."""
        if handle.exchange is not None and handle.exchange.attached:
            handle.check(_exchange_c.load().planner_attach_exchange(handle.opened(), None))

    def report(self) -> Report | None:
        """What ended the exchange, None while nothing did. Waits for nothing, and works when the CUDA context is lost."""
        return None

    @abstractmethod
    def set_limits(self, timeout: float, policy: str) -> None:
        """For calls and captures from now on: as in lplb.exchange.create. (The policy is one of GPUs.)"""

    def abort(self) -> None:
        """Ends all waiting on this rank, from any thread, and lets later calls raise PeerTimeout. For a host that knows a peer is gone.

        Over NVLink within a millisecond; what was waited for reads as zeros. Where the CPU waits (gloo) within a tenth of a second, and
        the call raises. NCCL's communicator is aborted, so that no further collective of its group is possible.
        """

    def close(self) -> None:
        """Ends the use of it on this rank; waits for the device. CUDA graphs that hold its calls must not be replayed any more."""
        self.closed = True

    def describe(self) -> str:
        return self.kind

    def _output(self, counts: Tensor, out: Tensor | None) -> Tensor:
        """Checks both and returns the output."""
        if self.closed:
            raise WrongOrder("exchange: must not be used after close()")
        if counts.numel() != self.n_counts:
            raise broken_rule("counts", f"must have n_counts = {self.n_counts} elements", f"shape {list(counts.shape)}")
        if counts.dtype not in (torch.int32, torch.int64):
            raise broken_rule("counts", "must be int32 or int64", counts.dtype)
        if out is None:
            return torch.empty((self.ranks, self.n_counts), dtype=counts.dtype, device=counts.device)
        if out.numel() != self.ranks * self.n_counts or out.dtype != counts.dtype or not out.is_contiguous():
            raise broken_rule("out", f"must be contiguous, [{self.ranks}, {self.n_counts}] and {counts.dtype}",
                              f"shape {list(out.shape)}, {out.dtype}")
        return out

    def __repr__(self) -> str:
        nodes = f", {self.layout.n_nodes} nodes" if self.layout.n_nodes > 1 else ""
        why = f" (instead of something faster: {self.reason})" if self.reason else ""
        return f"<Exchange {self.describe()}: rank {self.rank} of {self.ranks}{nodes}, {self.n_counts} counts{why}>"


class TorchExchange(Exchange):
    """By the collectives of torch.distributed: always works, on CPU and CUDA."""

    kind = "nccl"
    native = False

    def __init__(self, group: Any, layout: Layout, n_counts: int, reason: str, timeout: float = 30.0) -> None:
        super().__init__(group, layout, n_counts, reason)
        self.backend: str = dist.get_backend(group)
        self._waiting = Waiting("", timeout)
        self._calls = 0
        self._ended: tuple[type[PeerTimeout], str, Report] | None = None

    def all_gather(self, counts: Tensor, out: Tensor | None = None) -> Tensor:
        everyone = self._output(counts, out)
        group = self.group
        if group is None:
            raise WrongOrder("exchange: must not be used after its process group is destroyed")
        if self._ended is not None:
            raise self._ended[0](f"{self._ended[1]} (an earlier call; nothing is exchanged after it)")
        # int32 always travels, so that ranks whose counts have other types meet.
        row = counts.reshape(-1).to(torch.int32).contiguous()
        if counts.dtype is torch.int64 and not counts.is_cuda and not torch.equal(row, counts.reshape(-1)):
            raise broken_rule("counts", "must fit int32", int(counts.abs().max()))
        began = time.monotonic()
        self._calls += 1
        self._waiting.what = f"exchange: rank {self.rank} of {self.ranks} in call {self._calls}"
        try:
            rows = self._gather(group, row)
        except PeerTimeout as error:
            # Who came too late would take the next call's counts for this one's, so this was the last call.
            reason = "aborted" if self._waiting.aborted else "lost" if isinstance(error, PeerLost) else "timed out"
            self._ended = type(error), str(error), Report(reason, self.rank, -1, self._calls, time.monotonic() - began)
            raise
        return everyone.copy_(rows.view_as(everyone))

    def _gather(self, group: Any, row: Tensor) -> Tensor:
        """int32 [ranks, n_counts]. Between GPUs in one collective of this size, which can be captured."""
        if not row.is_cuda:
            return gather_rows(group, row, self._waiting)
        rows = torch.empty((self.ranks, self.n_counts), dtype=torch.int32, device=row.device)
        gather_by_torch(group, row, rows, self._waiting)
        return rows

    def set_limits(self, timeout: float, policy: str) -> None:
        policy_number(policy), timeout_ms(timeout)
        self._waiting.limit = timeout

    def report(self) -> Report | None:
        return None if self._ended is None else self._ended[2]

    def abort(self) -> None:
        self._waiting.aborted = True
        if self.backend != "gloo" and self.group is not None:
            abort_group(self.group, torch.cuda.current_device() if torch.cuda.is_available() else -1)

    def describe(self) -> str:
        return f"torch.distributed ({self.backend})"


class NativeExchange(Exchange):
    """By the library: counts pushed over NVLink."""

    native = True

    def __init__(self, kind: str, pointer: int, device: int, group: Any, layout: Layout, n_counts: int, reason: str, rail: Rail | None,
                 keep: tuple[Any, ...]) -> None:
        super().__init__(group, layout, n_counts, reason)
        self.kind, self.device, self.rail = kind, device, rail
        self.functions = _exchange_c.load()
        self.pointer: int | None = pointer
        self._freeing = threading.Lock()  # abort and report may come from any thread, also while another one frees
        self._keep = keep  # memory and functions that the library uses
        self._call = self.functions.all_gather
        self.on_close: Callable[[NativeExchange], None] | None = None

    def all_gather(self, counts: Tensor, out: Tensor | None = None) -> Tensor:
        everyone = self._output(counts, out)
        if counts.get_device() != self.device or everyone.get_device() != self.device:
            raise broken_rule("counts", f"must be on the exchange's device cuda:{self.device}", counts.device)
        if counts.dtype is torch.int64:
            everyone.copy_(self.all_gather(counts.int()).view_as(everyone))
            return everyone
        flat = counts if counts.is_contiguous() else counts.contiguous()
        self.check(self._call(self.pointer, flat.data_ptr(), everyone.data_ptr(), _raw_stream(self.device)))  # type: ignore[misc]
        return everyone

    def _attach(self, handle: Any) -> None:
        handle.check(self.functions.planner_attach_exchange(handle.opened(), self.pointer))
        self.attached = True

    def check(self, status: int) -> None:
        if status:
            busy = status == _native.ERROR_BUSY or self.pointer is None
            raise _native.failure(status, "" if busy else _native.text(self.functions.error(self.pointer)))

    def set_limits(self, timeout: float, policy: str) -> None:
        """For calls and captures from now on: as in lplb.exchange.create."""
        self.check(self.functions.set_limits(self.pointer, policy_number(policy), timeout_ms(timeout)))
        self.policy = policy
        if self.rail is not None:
            self.rail.set_limits(policy_number(policy), timeout_ms(timeout))

    def report(self) -> Report | None:
        raw = _exchange_c.ReportStruct(struct_size=ctypes.sizeof(_exchange_c.ReportStruct))
        with self._freeing:
            if self.pointer is None or self.functions.get_report(self.pointer, ctypes.byref(raw)):
                return None
        if raw.code == _exchange_c.FINE:
            return None
        # The library numbers the ranks of one node.
        reason = _exchange_c.REASONS.get(raw.code, "timed out")
        mine = self.layout.node * self.layout.per_node + raw.rank
        peer = raw.peer_node * self.layout.per_node + raw.peer if raw.peer >= 0 and raw.peer_node >= 0 else -1
        return Report(reason, mine, peer, raw.epoch, raw.waited_ns * 1e-9)

    def abort(self) -> None:
        with self._freeing:
            if self.pointer is not None:
                self.functions.abort(self.pointer)

    def close(self) -> None:
        """Unmaps the peers' memory. The own one is freed once every rank has closed: at the next create() on the group."""
        if self.closed:
            return
        self.closed = True
        self.functions.close(self.pointer)
        if self.on_close is not None:
            self.on_close(self)

    def free(self) -> None:
        """The last step; no rank may use the exchange any more."""
        self.closed = True
        with self._freeing:
            pointer, self.pointer = self.pointer, None
        if pointer is not None:
            self.functions.destroy(pointer)
        self._keep, self.rail = (), None

    def describe(self) -> str:
        name = {"symm": "NVLink (PyTorch symmetric memory)", "ipc": "NVLink (CUDA IPC)"}.get(self.kind, self.kind)
        return f"{name}, rail {self.rail.kind}" if self.rail is not None else name


def policy_number(policy: str) -> int:
    if policy not in _native.POLICIES:
        raise broken_rule("policy", f"must be one of {', '.join(_native.POLICIES)}", repr(policy))
    return _native.POLICIES[policy]


def timeout_ms(timeout: float) -> int:
    """Seconds as the library wants them; 0: no limit."""
    if not 0 <= timeout <= 2_000_000:
        raise broken_rule("timeout", "must lie in 0 ... 2,000,000 seconds", timeout)
    return 0 if timeout == 0 else max(1, round(timeout * 1000))
