"""The exchange that the library makes: counts pushed over NVLink. And what a rank keeps of them until every rank has closed them."""

from __future__ import annotations

import ctypes
import threading
import weakref
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _c
from ..errors import broken_rule
from .base import Exchange, Layout, Report, limits
from .rail import Rail

# The stream as a number, without building a torch.cuda.Stream each time. Absent in builds of torch without CUDA.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)

Facts = tuple["dict[int, bool]", bool]


class Closed(Protocol):
    """What a rank has closed and others may still be using."""

    def report(self) -> Report | None: ...
    def abort(self) -> None: ...
    def free(self) -> None: ...


class NativeExchange(Exchange):
    """By the library: counts pushed over NVLink."""

    kind = "ipc"
    native = True

    def __init__(self, pointer: int, device: int, group: Any, layout: Layout, n_counts: int, reason: str, rail: Rail | None) -> None:
        super().__init__(group, layout, n_counts, reason)
        self.device, self.rail, self.pointer = device, rail, pointer
        self._library = _c.load()
        self._freeing = threading.Lock()  # abort and report may come from any thread, also while another one frees
        self._state = state_of(group)
        self._number = self._state.made = self._state.made + 1

    def all_gather(self, counts: Tensor, out: Tensor | None = None) -> Tensor:
        everyone = self._output(counts, out)
        if counts.get_device() != self.device or everyone.get_device() != self.device:
            raise broken_rule("counts", f"must be on the exchange's device cuda:{self.device}", counts.device)
        if counts.dtype is torch.int64:
            everyone.copy_(self.all_gather(counts.int()).view_as(everyone))
            return everyone
        flat = counts if counts.is_contiguous() else counts.contiguous()
        stream = _raw_stream(self.device)  # type: ignore[misc]
        self.check(self._library.exchange_all_gather(self.pointer, flat.data_ptr(), everyone.data_ptr(), stream))
        return everyone

    def check(self, status: int) -> None:
        if status:
            busy = status == _c.ERROR_BUSY or self.pointer is None
            raise _c.failure(status, "" if busy else _c.text(self._library.exchange_error(self.pointer)))

    def set_limits(self, timeout: float, policy: str) -> None:
        new = limits(timeout, policy)
        self.check(self._library.exchange_set_limits(self.pointer, *new))
        self.policy = policy
        if self.rail is not None:
            self.rail.set_limits(*new)

    def report(self) -> Report | None:
        raw = _c.ReportStruct()
        with self._freeing:
            if self.pointer is None or self._library.exchange_get_report(self.pointer, ctypes.byref(raw)) or raw.code == 0:
                return None
        # The library numbers the ranks of one node.
        mine = self.layout.node * self.layout.per_node + raw.rank
        peer = raw.peer_node * self.layout.per_node + raw.peer if raw.peer >= 0 and raw.peer_node >= 0 else -1
        return Report(_c.REASONS.get(raw.code, "timed out"), mine, peer, raw.epoch, raw.waited_ns * 1e-9)

    def abort(self) -> None:
        with self._freeing:
            if self.pointer is not None:
                self._library.exchange_abort(self.pointer)

    def close(self) -> None:
        """Unmaps the peers' memory. The own one is freed once every rank has closed: at the next create() on the group."""
        if not self.closed:
            self.closed = True
            self._library.exchange_close(self.pointer)
            self._state.closed[self._number] = self

    def free(self) -> None:
        """The last step; no rank may use the exchange any more."""
        self.closed = True
        with self._freeing:
            pointer, self.pointer = self.pointer, None
        if pointer is not None:
            self._library.exchange_destroy(pointer)
        self.rail = None

    def describe(self) -> str:
        return "NVLink (CUDA IPC)" + (f", rail {self.rail.kind}" if self.rail is not None else "")


class GroupState:
    """What this rank keeps for a process group between calls of create(). It belongs to the group as an object, never to its name, which
    the next group may have as well, and ends with it.

    An exchange's memory is freed once every rank has closed it, since others may write to it until then. close() asks nobody, so the ranks
    tell each other at the next create() or release()."""

    def __init__(self) -> None:
        self.made = 0  #: exchanges, which all ranks number alike
        self.closed: dict[int, Closed] = {}  #: that other ranks may still be using
        self.left: list[tuple[int | None, Rail | None]] = []  #: what this rank had made when an exception of its own ended create()
        self.rails_aborted = False  #: the communicators of the rails' groups cannot be used any more
        self.rail_groups: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  #: by number of nodes

    def rail_group(self, group: Any, layout: Layout, device: int) -> Any:
        """The ranks along this rank's rail as a group; that of an earlier exchange where it still exists."""
        known = self.rail_groups.get(layout.n_nodes)
        if known is None:
            along = dist.get_process_group_ranks(group)[layout.local_rank :: layout.per_node]
            # NCCL whatever the group's own backend: that may be gloo, or several ("cpu:gloo,cuda:nccl", which PyTorch calls "undefined").
            backend = "nccl" if device >= 0 and dist.is_nccl_available() else dist.get_backend(group)
            known = self.rail_groups[layout.n_nodes] = dist.new_group(along, backend=backend, use_local_synchronization=True)
        return known

    def facts(self) -> Facts:
        """What the other ranks must know: which exchanges are closed here, and whether nobody waits for anybody in them; whether the rails
        were aborted. Nobody waits after ranks disagreed either: all of them found out in the same call, which they all ended."""
        reports = {number: exchange.report() for number, exchange in self.closed.items()}
        return {number: report is None or report.reason == "disagreed" for number, report in reports.items()}, self.rails_aborted

    def settle(self, everyone: list[Facts]) -> None:
        """Frees what no rank uses any more, by the facts of all ranks."""
        aborted = any(aborted for _, aborted in everyone)
        for number in sorted(set.intersection(*(set(closed) for closed, _ in everyone))):
            in_peace = all(closed[number] for closed, _ in everyone)
            self._free(number, in_peace)
            aborted |= not in_peace
        self._free_left()  # every rank has come out of that create(), or it would not be here
        if aborted:
            self.rails_aborted = False
            self.rail_groups.clear()

    def end(self) -> None:
        """The group is gone, and with it all that its exchanges could still be used for."""
        for number in list(self.closed):
            self._free(number, in_peace=False)
        self._free_left()

    def _free(self, number: int, in_peace: bool) -> None:
        exchange = self.closed.pop(number)
        if not in_peace:
            exchange.abort()  # so that freeing waits for no rank
        exchange.free()

    def _free_left(self) -> None:
        left, self.left = self.left, []
        for pointer, rail in left:
            if pointer is not None:
                _c.load().exchange_abort(pointer)
                _c.load().exchange_destroy(pointer)
            if rail is not None and not rail.taken:
                rail.abandon()
                rail.free()


_states: weakref.WeakKeyDictionary[Any, GroupState] = weakref.WeakKeyDictionary()


def state_of(group: Any) -> GroupState:
    state = _states.get(group)
    if state is None:
        state = _states[group] = GroupState()
        weakref.finalize(group, state.end).atexit = False
    return state
