"""What all exchanges have in common: objects that bring the counts of all ranks to all ranks. lplb.exchange makes them."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _c
from .._ops.arguments import one_of
from ..errors import WrongOrder, broken_rule


class Refused(Exception):
    """Why an exchange cannot be made; the same on all ranks."""


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


class Exchange(ABC):
    """Brings the counts of all ranks to all ranks. Its calls follow one another in one stream order, the same on all ranks."""

    kind: str  #: "ipc" (NVLink, mapped by CUDA IPC) or "torch" (torch.distributed)
    native: bool  #: the library does it itself, inside Planner.run too
    pointer: int | None = None  #: the library's exchange, where it does

    def __init__(self, group: Any, layout: Layout, n_counts: int, reason: str) -> None:
        self._group = weakref.ref(group)
        self.layout, self.n_counts = layout, n_counts
        self.ranks, self.rank = layout.ranks, layout.rank
        self.reason = reason  #: why nothing faster is in use, "" where nothing is
        self.closed = False
        self.policy = "trap"  #: what a GPU does that finds a rank late, or disagreeing
        self.owned = False  #: made by a planner: closed with the last planner that uses it; otherwise it is the caller's
        self._users: set[int] = set()  # numbers of the planners

    @property
    def group(self) -> Any:
        """The process group, which belongs to torch.distributed: None once it is destroyed or the exchange is closed."""
        return None if self.closed else self._group()

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
        handle, before = planner._handle, planner._handle.exchange
        if self.native or (before is not None and before.native):  # one that this one replaces must not be used any more
            handle.check(_c.load().planner_attach_exchange(handle.opened(), self.pointer))
        handle.exchange = self
        self._users.add(handle.number)
        if before is not None and before is not self:
            before.leave(handle.number)

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


def limits(timeout: float, policy: str = "trap") -> tuple[int, int]:
    """Both as the library wants them: the policy's number, and milliseconds, 0: no limit."""
    if not 0 <= timeout <= 2_000_000:
        raise broken_rule("timeout", "must lie in 0 ... 2,000,000 seconds", timeout)
    milliseconds = 0 if timeout == 0 else max(1, round(timeout * 1000))
    return _c.POLICIES[one_of("policy", policy, tuple(_c.POLICIES))], milliseconds
