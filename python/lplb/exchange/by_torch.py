"""The exchange by torch.distributed."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import PeerLost, PeerTimeout, WrongOrder, broken_rule
from .base import Exchange, Layout, Report, limits
from .gather import Waiting, abort_group, gather_by_torch, gather_rows


class TorchExchange(Exchange):
    """By the collectives of torch.distributed: always works, on CPU and CUDA."""

    kind = "torch"
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
            if row.is_cuda:  # in one collective of this size, which can be captured
                rows = torch.empty((self.ranks, self.n_counts), dtype=torch.int32, device=row.device)
                gather_by_torch(group, row, rows, self._waiting)
            else:
                rows = gather_rows(group, row, self._waiting)
        except PeerTimeout as error:
            # Who came too late would take the next call's counts for this one's, so this was the last call.
            reason = "aborted" if self._waiting.aborted else "lost" if isinstance(error, PeerLost) else "timed out"
            self._ended = type(error), str(error), Report(reason, self.rank, -1, self._calls, time.monotonic() - began)
            raise
        return everyone.copy_(rows.view_as(everyone))

    def set_limits(self, timeout: float, policy: str) -> None:
        limits(timeout, policy)
        self._waiting.limit = timeout

    def report(self) -> Report | None:
        return None if self._ended is None else self._ended[2]

    def abort(self) -> None:
        self._waiting.aborted = True
        if self.backend != "gloo" and self.group is not None:
            abort_group(self.group, torch.cuda.current_device() if torch.cuda.is_available() else -1)

    def describe(self) -> str:
        return f"torch.distributed ({self.backend})"
