"""
Many ranks on one device: each rank's expert work one after another, the maximum taken. Dispatch over a network is modelled from the busiest
rank's rows and a bandwidth, and said apart. Experts' weights are one rank's, used for all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....planner import Planner
from ...simulate import policies as shares
from .measure import Arm, Inputs, TimedLayer
from .policies import Copies, eplb_replicas, exact, experts_of, imbalance, packed_position, scaled
from .routing import Int64Array, Model, Source, drawn
from .timing import AHEAD, Clock

REPEATS = 3      # of a rank's work, the median counts
WORTH = 0.9      # ranks with fewer rows than this share of the most are not timed: they cannot be the slowest


def rank_counts(source: Source, number: int, ranks: int, tokens: int, top_k: int) -> Int64Array:
    """[ranks, n_experts] what each rank's tokens select."""
    rng = np.random.default_rng([number, ranks, tokens, len(source.loads)])
    return np.stack([drawn(source.loads, tokens, top_k, rng) for _ in range(ranks)])


def sizes_of(source: Source, counts: Int64Array, slots: tuple[int, ...]) -> Iterator[tuple[str, Int64Array, float | None]]:
    """(arm, rows [ranks, slots a rank], placement gap) of every policy. lplb has the replicas of a topology, and EPLB's."""
    ranks, n_experts = counts.shape
    loads, each = counts.sum(0), int(counts[0].sum())
    packed = np.empty(n_experts, dtype=np.int64)
    packed[packed_position(source.history, ranks)] = loads
    yield "none", loads.reshape(ranks, -1), None
    yield "packed", packed.reshape(ranks, -1), None
    yield "fair", np.stack([scaled(row, each) for row in packed.reshape(ranks, -1)]), None
    yield "forced", np.tile(scaled(np.ones(n_experts // ranks, dtype=np.int64), each), (ranks, 1)), None
    for n in slots:
        replicas = eplb_replicas(source.history, n_experts + n * ranks, ranks)
        yield f"even S{n}", shares.even(counts, replicas).sum(0).reshape(ranks, -1), None
        with Planner.from_placement(experts_of(replicas), ep_size=ranks, n_logical=n_experts, device="cpu") as planner:
            yield f"lplb S{n}, EPLB's", *exact(planner, counts)
        copies = Copies(n_experts, ranks, n)
        copies.place(source.history)
        yield f"lplb S{n}", *copies.planned(counts)
        copies.close()


class Rank:
    """One rank's layer, its own experts and slots, on its received rows: a token for each, which has one expert."""

    def __init__(self, n_rows: int, model: Model, clock: Clock, dtype: torch.dtype) -> None:
        self.clock = clock
        planner = Planner.from_placement(np.arange(n_rows), ep_size=1, device=clock.device)
        self.layer = TimedLayer(planner, model.hidden, model.intermediate, dtype=dtype)
        self.seen: dict[bytes, float] = {}

    def milliseconds(self, sizes: Int64Array, inputs: Inputs) -> float:
        """Forward and backward of the experts; equal sizes are not timed again."""
        key = sizes.tobytes()
        if key not in self.seen:
            arm = Arm("", self.layer, [(ids := self._ids(sizes), ids)])
            own = _first_of(inputs, len(ids))
            work = partial(own.micro_batch, arm, 0)
            if not self.seen:
                work()
            self.seen[key] = float(np.median([self.clock.milliseconds(work, AHEAD) for _ in range(REPEATS)]))
        return self.seen[key]

    def _ids(self, sizes: Int64Array) -> Tensor:
        ids = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))[:, None]
        return torch.from_numpy(ids).to(self.clock.device)


def _first_of(inputs: Inputs, n: int) -> Inputs:
    own = Inputs.__new__(Inputs)
    own.states, own.weights = (one[:n].detach().requires_grad_() for one in (inputs.states, inputs.weights))
    own.gradient = inputs.gradient[:n]
    return own


def emulate(model: Model, layers: list[Source], ranks: int, tokens: int, slots: tuple[int, ...], batches: int, clock: Clock,
            limit: float, bandwidth: float) -> dict[str, Any]:
    """One case: arm -> step time (maximum over ranks, mean of the micro-batches), and what else there is to say. bandwidth: GB/s a rank."""
    dtype = torch.bfloat16 if clock.cuda else torch.float32
    slots = tuple(n for n in slots if n <= model.whole // ranks)
    found: dict[str, dict[str, list[float]]] = {}
    workers: dict[int, Rank] = {}
    began, done = time.monotonic(), 0
    for number in range(batches):
        if number and time.monotonic() - began > limit * number / (number + 1):
            break  # the next one would not end in time
        source = layers[number * max(len(layers) // batches, 1) % len(layers)]
        counts = rank_counts(source, number, ranks, tokens, model.top_k)
        arms = list(sizes_of(source, counts, slots))
        inputs = Inputs(max(int(sizes.sum(1).max()) for _, sizes, _ in arms), model.hidden, 1, clock.device, dtype)
        for name, sizes, gap in arms:
            width = sizes.shape[1]
            if width not in workers:
                workers[width] = Rank(width, model, clock, dtype)
            arm, rows = found.setdefault(name, {}), sizes.sum(1)
            slow = [workers[width].milliseconds(sizes[rank], inputs) for rank in np.argsort(-rows) if rows[rank] >= WORTH * rows.max()]
            sent = rows.max() * (1 - 1 / ranks) * model.hidden * dtype.itemsize
            arm.setdefault("compute_ms", []).append(max(slow))
            arm.setdefault("dispatch_ms", []).append(4 * sent / bandwidth / 1e6)  # there and back, forward and backward
            arm.setdefault("imbalance", []).append(imbalance(sizes))
            if gap is not None:
                arm.setdefault("gap", []).append(gap)
        done += 1
    plans = {f"S{n}": _plan_us(model, layers[0], ranks, tokens, n, clock) for n in slots}
    for name, arm in found.items():
        arm["plan_us"] = [plans[name[5:7]] if name.startswith("lplb") else 0.0]
    return {"ranks": ranks, "tokens": tokens, "micro_batches": done, "bandwidth_gb_s": bandwidth,
            "arms": {name: {what: float(np.mean(values)) for what, values in arm.items()} for name, arm in found.items()}}


def _plan_us(model: Model, source: Source, ranks: int, tokens: int, slots: int, clock: Clock) -> float:
    """One rank's plan, without the exchange of counts, which there is nobody to have with."""
    replicas = eplb_replicas(source.history, model.whole + slots * ranks, ranks)
    rng = np.random.default_rng(0)
    share = source.loads / source.loads.sum()
    ids = torch.from_numpy(rng.choice(model.whole, (tokens, model.top_k), p=share)).to(clock.device)
    with Planner.from_placement(experts_of(replicas), ep_size=ranks, n_logical=model.whole, device=clock.device) as planner:
        def plan() -> None:
            for _ in range(16):
                planner.run(ids, None)
        plan()
        return clock.milliseconds(plan, AHEAD * 10) * 1000 / 16

