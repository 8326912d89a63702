"""The exchanges: objects that bring the counts of all ranks to all ranks. lplb.exchange makes them."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _exchange_c, _native
from .errors import WrongOrder, broken_rule

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

    reason: str  #: "timed out", "aborted" or "disagreed"
    rank: int
    peer: int
    epoch: int
    waited_s: float

    def __str__(self) -> str:
        if self.reason == "disagreed":
            return f"rank {self.rank} found another digest in the counts of rank {self.peer} in call {self.epoch}"
        what = f"rank {self.rank} waited {self.waited_s:.3f} s for the counts of rank {self.peer} in call {self.epoch}"
        return f"{what}, then was aborted" if self.reason == "aborted" else f"{what}: late, stuck or gone"


class Rail:
    """How counts travel between nodes. ops: what the library calls; it and all behind it must live as long as the exchange."""

    kind: str
    ops: _exchange_c.RailOps

    def set_limits(self, policy: int, timeout_ms: int) -> None:
        """As the exchange's, where the rail waits on the GPU itself."""


class Exchange(ABC):
    """Brings the counts of all ranks to all ranks. Its calls follow one another in one stream order, the same on all ranks."""

    kind: str  #: "symm" (PyTorch symmetric memory), "ipc" (CUDA IPC) or "nccl" (torch.distributed)
    native: bool  #: the library does it itself, inside Planner.run too

    def __init__(self, group: Any, layout: Layout, n_counts: int, reason: str) -> None:
        self.group, self.layout, self.n_counts = group, layout, n_counts
        self.ranks, self.rank = layout.ranks, layout.rank
        self.reason = reason  #: why nothing faster is in use, "" where nothing is
        self.closed = False
        self.policy = "trap"  #: what a GPU does that finds a rank late, or disagreeing
        self.attached = False  #: lplb_planner_run does it inside

    @abstractmethod
    def all_gather(self, counts: Tensor, out: Tensor | None = None) -> Tensor:
        """[ranks, n_counts], the counts [n_counts] of every rank in rank order, on the current stream. out: where to put them.

        int32, or int64 that fits 32 bits. A rank that does not come makes the others fail: see lplb.exchange.create.
        """

    def attach(self, planner: Any) -> None:
        """Makes a Planner of the same ranks use this exchange."""
        if planner.ep_size != self.ranks or planner.rank != self.rank:
            raise broken_rule("exchange", f"must join the planner's ep_size = {planner.ep_size} ranks as rank {planner.rank}",
                              f"{self.ranks} ranks, rank {self.rank}")
        if planner._handle.width != self.n_counts:
            raise broken_rule("exchange", f"must carry n_logical + 1 = {planner._handle.width} counts", self.n_counts)
        planner._handle.exchange = self

    def report(self) -> Report | None:
        """What ended the exchange, None while nothing did. Waits for nothing, and works when the CUDA context is lost."""
        return None

    def abort(self) -> None:
        """Ends all waiting on this rank, from any thread; what was waited for reads as zeros. For a host that knows a peer is gone."""

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


def gather_by_torch(group: Any, counts: Tensor, everyone: Tensor) -> None:
    """everyone [ranks, n] = the counts [n] of every rank, by torch.distributed, whatever the backend."""
    if counts.is_cuda and dist.get_backend(group) == "gloo":
        on_host = everyone.cpu()
        gather_by_torch(group, counts.cpu(), on_host)
        everyone.copy_(on_host)
        return
    try:
        dist.all_gather_into_tensor(everyone, counts, group=group)
    except (RuntimeError, NotImplementedError):
        if dist.get_backend(group) != "gloo":
            raise
        dist.all_gather(list(everyone.unbind(0)), counts, group=group)  # gloo of older PyTorch has no other


class TorchExchange(Exchange):
    """By the collectives of torch.distributed: always works, on CPU and CUDA."""

    kind = "nccl"
    native = False

    def all_gather(self, counts: Tensor, out: Tensor | None = None) -> Tensor:
        everyone = self._output(counts, out)
        # int32 always travels, so that ranks whose counts have other types meet.
        row = counts.reshape(-1).to(torch.int32).contiguous()
        if counts.is_cuda:
            rows = torch.empty((self.ranks, self.n_counts), dtype=torch.int32, device=counts.device)
            gather_by_torch(self.group, row, rows)
        else:
            if counts.dtype is torch.int64 and not torch.equal(row, counts.reshape(-1)):
                raise broken_rule("counts", "must fit int32", int(counts.abs().max()))
            from ._agree import gather_rows

            rows = gather_rows(self.group, row)
        return everyone.copy_(rows.view_as(everyone))

    def describe(self) -> str:
        return f"torch.distributed ({dist.get_backend(self.group)})"


class NativeExchange(Exchange):
    """By the library: counts pushed over NVLink."""

    native = True

    def __init__(self, kind: str, pointer: int, device: int, group: Any, layout: Layout, n_counts: int, reason: str, rail: Rail | None,
                 keep: tuple[Any, ...]) -> None:
        super().__init__(group, layout, n_counts, reason)
        self.kind, self.device, self.rail = kind, device, rail
        self.functions = _exchange_c.load()
        self.pointer: int | None = pointer
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

    def attach(self, planner: Any) -> None:
        super().attach(planner)
        handle = planner._handle
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
        if self.pointer is None:
            return None
        raw = _exchange_c.ReportStruct(struct_size=ctypes.sizeof(_exchange_c.ReportStruct))
        if self.functions.get_report(self.pointer, ctypes.byref(raw)) or raw.code == _exchange_c.FINE:
            return None
        first = self.layout.node * self.layout.per_node  # the library numbers the ranks of one node
        reason = {_exchange_c.ABORTED: "aborted", _exchange_c.DISAGREED: "disagreed"}.get(raw.code, "timed out")
        peer = raw.peer if raw.code == _exchange_c.DISAGREED else first + raw.peer
        return Report(reason, first + raw.rank, peer, raw.epoch, raw.waited_ns * 1e-9)

    def abort(self) -> None:
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
