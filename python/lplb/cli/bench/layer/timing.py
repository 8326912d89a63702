"""Milliseconds of work that all ranks do together, phases with a limit, and how sure a ratio is."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ...terminal import complain, say

Float64Array = NDArray[np.float64]
Work = Callable[[], object]

AHEAD = 200_000     # clock cycles (0.1 ms) that a GPU is kept busy first, so that the host is ahead as it is behind an attention block
RESAMPLES = 2000
HANGS = 90.0        # seconds beyond a phase's limit after which the process ends


class Clock:
    """Times work on this rank's device, from a moment that all ranks share."""

    def __init__(self, device: torch.device, together: bool) -> None:
        """together: this is one rank of a process group, rather than a process of its own."""
        self.device, self.cuda, self.together = device, device.type == "cuda", together
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self._flag = torch.zeros(1, device=device)
        if self.cuda:
            event: Any = torch.cuda.Event
            self._start, self._end = event(enable_timing=True), event(enable_timing=True)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def line_up(self) -> None:
        """What follows starts at the same time on all ranks."""
        if self.together:
            dist.all_reduce(self._flag)

    def milliseconds(self, work: Work, ahead: int = AHEAD) -> float:
        """This rank's time of work(), launching by the host included where the GPU has to wait for it."""
        self.wait()
        if not self.cuda:
            self.line_up()
            start = time.perf_counter()
            work()
            return (time.perf_counter() - start) * 1000
        if ahead:
            torch.cuda._sleep(ahead)  # type: ignore[no-untyped-call]
        self.line_up()
        self._start.record()
        work()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end))

    def slowest(self, times: Any) -> Float64Array:
        """The maximum over the ranks, number by number."""
        mine = torch.tensor(np.asarray(times, dtype=np.float64), device=self.device)
        if self.together:
            dist.all_reduce(mine, op=dist.ReduceOp.MAX)
        return np.asarray(mine.cpu().numpy(), dtype=np.float64)

    def rounds(self, limit: float, spent: float, most: int) -> int:
        """How many rounds more fit into limit seconds, if one takes spent; the same on all ranks, and one at least."""
        return int(min(max(limit / float(self.slowest([max(spent, 1e-6)])[0]), 1), most))


class Progress:
    """Says on rank 0 what is being done, and ends a process that hangs in it."""

    def __init__(self, rank: int, limit: float) -> None:
        self.rank, self.limit, self._began = rank, limit, time.monotonic()

    def say(self, words: str) -> None:
        if self.rank == 0:
            say(words, now=True)

    @contextmanager
    def phase(self, name: str, limit: float | None = None) -> Iterator[None]:
        seconds = (limit or self.limit) + HANGS
        self.say(f"[{time.monotonic() - self._began:5.1f} s] {name}")
        timer = threading.Timer(seconds, self._hangs, (name, seconds))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _hangs(self, name: str, seconds: float) -> None:
        complain(f"bench layer: rank {self.rank} has not finished {name!r} after {seconds:.0f} s and ends")
        os._exit(1)


def ratio(over: Float64Array, under: Float64Array, seed: int = 0) -> dict[str, float]:
    """
    How fast the second is in relation to the first: sum(over) / sum(under), times by micro-batch, with the 95% interval of a bootstrap
    that draws micro-batches, each with both of its times.
    """
    drawn = np.random.default_rng(seed).integers(0, len(over), (RESAMPLES, len(over)))
    samples = over[drawn].sum(1) / under[drawn].sum(1)
    low, high = np.percentile(samples, [2.5, 97.5])
    return {"ratio": float(over.sum() / under.sum()), "low": float(low), "high": float(high)}


def percentile(times: Float64Array | Sequence[float], which: float) -> float:
    return float(np.percentile(np.asarray(times, dtype=np.float64), which))
