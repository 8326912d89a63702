"""The exchange that the library makes: counts pushed over NVLink."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _c as _native
from ..errors import broken_rule
from . import library
from .base import Exchange, Layout, Report, policy_number, timeout_ms
from .rail import Rail

# The stream as a number, without building a torch.cuda.Stream each time. Absent in builds of torch without CUDA.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class NativeExchange(Exchange):
    """By the library: counts pushed over NVLink."""

    kind = "ipc"
    native = True

    def __init__(self, pointer: int, device: int, group: Any, layout: Layout, n_counts: int, reason: str, rail: Rail | None) -> None:
        super().__init__(group, layout, n_counts, reason)
        self.device, self.rail = device, rail  # whose functions the library calls
        self.functions = library.load()
        self.pointer: int | None = pointer
        self._freeing = threading.Lock()  # abort and report may come from any thread, also while another one frees
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
        raw = library.ReportStruct(struct_size=ctypes.sizeof(library.ReportStruct))
        with self._freeing:
            if self.pointer is None or self.functions.get_report(self.pointer, ctypes.byref(raw)):
                return None
        if raw.code == library.FINE:
            return None
        # The library numbers the ranks of one node.
        reason = library.REASONS.get(raw.code, "timed out")
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
        self.rail = None

    def describe(self) -> str:
        return "NVLink (CUDA IPC)" + (f", rail {self.rail.kind}" if self.rail is not None else "")
