"""One model at several numbers of tokens a rank: layers, arms, and everything that is measured of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ....errors import InternalError
from ....planner import Planner
from ...terminal import UsageError
from . import measure
from .measure import Arm, Inputs, TimedLayer
from .plain import PlainMoE
from .policies import COPIED, PLAIN, Batch, Copies, Routed, columns, imbalance, plain
from .routing import DRIFTED, MODELS, Model, Source, micro_batch, sources
from .timing import Clock, Float64Array, Progress, percentile, ratio


@dataclass(frozen=True)
class Asked:
    """The command line, checked and made whole."""

    cases: tuple[str, ...]
    tokens: tuple[int, ...] | None
    batches: int
    rounds: int
    policies: tuple[str, ...]
    slots: tuple[int, ...]
    routing: str
    traces: str | None
    emulate: tuple[int, ...]
    compare: bool
    quick: bool
    limit: float
    step: int  # micro-batches of an optimizer step
    bandwidth: float
    json: str | None
    plot: str | None


def model_of(case: str) -> tuple[Model, bool]:
    """The model, and whether another task arrives."""
    return MODELS[case.removesuffix(DRIFTED)], case.endswith(DRIFTED)


def batches_of(layers: list[Source], n: int, ranks: int, tokens: int, top_k: int) -> Iterator[tuple[Source, Batch]]:
    """n micro-batches, over all layers; where these are fewer, over later parts of their traces."""
    for number in range(n):
        index, part = (number * len(layers) // n, 0) if len(layers) >= n else (number % len(layers), number // len(layers))
        source = layers[index]
        yield source, Batch(source.history, micro_batch(source, part, ranks, tokens, top_k), number)


class Case:
    """Layers of one model on all ranks. close() frees them."""

    def __init__(self, name: str, asked: Asked, clock: Clock, progress: Progress) -> None:
        self.name, self.asked, self.clock, self.progress = name, asked, clock, progress
        self.model, self.drift = model_of(name)
        self.dtype = torch.bfloat16 if clock.cuda else torch.float32
        model, ranks = self.model, clock.ranks
        most = max(asked.slots)
        if model.n_experts % ranks or model.n_experts // ranks < most or ranks < 2:
            raise UsageError(f"bench layer: {name} needs 2 or more ranks that divide its {model.n_experts} experts, with at least {most} "
                             f"experts each, got {ranks} ranks")
        self.sources = sources(model.n_experts, model.top_k, asked.routing, self.drift, asked.traces)
        self.copies = {n: Copies(model.n_experts, ranks, n) for n in asked.slots}
        self.planners: list[Planner] = []
        self.layers = {0: self._layer(self._planner(0))}

    def _planner(self, slots: int) -> Planner:
        model, group, device = self.model, dist.group.WORLD, self.clock.device
        if not slots:
            made = Planner.from_placement(np.arange(model.n_experts), group=group, device=device)
        else:
            copies = self.copies[slots]
            made = Planner(columns(self.clock.ranks, slots), copies.n_physical, model.n_experts, group=group, device=device)
            if (np.asarray(torch.as_tensor(made.phy2log).cpu()) != copies.in_order).any():
                raise InternalError("planners of one topology place experts differently: please report")
        self.planners.append(made)
        return made

    def _layer(self, planner: Planner) -> TimedLayer:
        return TimedLayer(planner, self.model.hidden, self.model.intermediate, dtype=self.dtype)

    def layer(self, slots: int) -> TimedLayer:
        if slots not in self.layers:
            self.layers[slots] = self._layer(self._planner(slots))
        return self.layers[slots]

    def close(self) -> None:
        self.layers.clear()
        for planner in self.planners:
            planner.close()
        for copies in self.copies.values():
            copies.close()

    def transfers(self) -> dict[str, Any]:
        """By slots and type of gradients."""
        model, found = self.model, {}
        shapes = {"gate_up": (2 * model.intermediate, model.hidden), "down": (model.hidden, model.intermediate)}
        for n in self.asked.slots:
            for grad_dtype in dict.fromkeys((self.dtype, torch.float32)):
                with self.progress.phase(f"{self.name}: pull and push of {n} copies a rank, {grad_dtype} gradients"):
                    found[f"S{n} {grad_dtype}".replace("torch.", "")] = measure.transfers(
                        self._planner(n), shapes, self.dtype, grad_dtype, self.clock, 5 if self.asked.quick else 12)
        return found

    # ---- one number of tokens ----

    def measured(self, tokens: int) -> dict[str, Any]:
        asked, clock, title = self.asked, self.clock, f"{self.name}, {tokens:,} tokens a rank"
        with self.progress.phase(f"{title}: routing"):
            arms, sizes, gaps, routing = self._arms(tokens, asked.batches, asked.policies)
        inputs = Inputs(tokens, self.model.hidden, self.model.top_k, clock.device, self.dtype)
        result: dict[str, Any] = {"case": self.name, "tokens": tokens, "micro_batches": asked.batches, "routing": routing}
        with self.progress.phase(f"{title}: {asked.batches} micro-batches with {len(arms)} policies in turn", asked.limit):
            times = measure.in_turn(arms, inputs, clock, asked.rounds, asked.limit)
        result["rounds"] = len(times)
        result["arms"] = summarised([arm.name for arm in arms], times, sizes, gaps)
        with self.progress.phase(f"{title}: one after another, whole steps, plans, memory", asked.limit):
            self._rest(result, arms, inputs)
        return result

    def _rest(self, result: dict[str, Any], arms: list[Arm], inputs: Inputs) -> None:
        clock, asked = self.clock, self.asked
        chosen = [arm for arm in arms if arm.name.split(" ")[0] in ("none", "packed", "lplb", "forced", "fair")]
        for arm, value in zip(chosen, measure.sustained(chosen, inputs, clock, 1 if asked.quick else 2)):
            result["arms"][arm.name]["sustained_ms"] = value
        trained = [arm for arm in arms if arm.name.split(" ")[0] in ("packed", "lplb")]
        if trained:
            stepped = measure.steps(trained, inputs, clock, asked.step, 2 if asked.quick else 4)
            result["step"] = {"micro_batches": asked.step, "ms": dict(zip([arm.name for arm in trained], stepped))}
        result["plan"] = {arm.name: measure.plan_times(arm, clock) for arm in arms if arm.name.startswith("lplb")}
        for arm in arms:
            result["arms"][arm.name]["peak_mb"] = measure.peak_mb(arm, inputs, clock)

    def pieces(self, tokens: int) -> dict[str, Any]:
        """Where the time goes, without replicas and with lplb; in a pass of its own after all that is timed."""
        chosen = tuple(policy for policy in ("packed", "lplb") if policy in self.asked.policies)
        with self.progress.phase(f"{self.name}, {tokens:,} tokens a rank: kernels"):
            arms, *_ = self._arms(tokens, 2, chosen)
            inputs = Inputs(tokens, self.model.hidden, self.model.top_k, self.clock.device, self.dtype)
            return {arm.name: measure.where_it_goes(arm, inputs, self.clock, len(arm.batches)) for arm in arms}

    def _arms(self, tokens: int, n_batches: int, chosen: tuple[str, ...]) -> tuple[
            list[Arm], dict[str, list[Any]], dict[str, list[float]], list[str]]:
        """The arms, their rows [ranks, slots] and placement gaps by micro-batch, and where the micro-batches are from."""
        rank = self.clock.rank
        plain_ones = [policy for policy in chosen if policy in PLAIN]
        arms = {policy: Arm(policy, self.layer(0), []) for policy in plain_ones}
        wanted = {n: tuple(policy for policy in chosen if policy in COPIED and (policy == "lplb" or n == max(self.asked.slots)))
                  for n in self.asked.slots}
        arms |= {f"{policy} S{n}": Arm(f"{policy} S{n}", self.layer(n), []) for n, some in wanted.items() for policy in some}
        sizes: dict[str, list[Any]] = {name: [] for name in arms}
        gaps: dict[str, list[float]] = {}
        routing = []

        def add(name: str, routed: Routed) -> None:
            ids, physical = (None if one is None else torch.from_numpy(np.ascontiguousarray(one)).to(self.clock.device)
                             for one in (routed.ids, routed.physical))
            assert ids is not None
            arms[name].batches.append((ids, physical))
            sizes[name].append(routed.sizes)
        for source, batch in batches_of(self.sources, n_batches, self.clock.ranks, tokens, self.model.top_k):
            routing.append(source.name)
            for policy in plain_ones:
                add(policy, plain(policy, batch, rank))
            for n, some in wanted.items():
                for policy, routed, gap in self.copies[n].routed(batch, rank, some):
                    add(f"{policy} S{n}", routed)
                    if policy == "lplb":
                        gaps.setdefault(f"lplb S{n}", []).append(gap)
        return list(arms.values()), sizes, gaps, routing

    def compared(self, tokens: int) -> dict[str, Any]:
        """The layer without replicas, which asks its planner, beside the same layer without lplb."""
        model, clock, asked = self.model, self.clock, self.asked
        with self.progress.phase(f"{self.name}, {tokens:,} tokens a rank: without replicas, beside plain torch", asked.limit):
            plain_layer = PlainMoE(model.n_experts, model.hidden, model.intermediate, self.dtype, clock.device)
            batches: list[tuple[torch.Tensor, torch.Tensor | None]] = [
                (torch.from_numpy(np.ascontiguousarray(batch.ids[clock.rank])).to(clock.device), None)
                for _, batch in batches_of(self.sources, asked.batches, clock.ranks, tokens, model.top_k)]
            arms = [Arm("plain", plain_layer, batches), Arm("none", self.layer(0), batches)]
            inputs = Inputs(tokens, model.hidden, model.top_k, clock.device, self.dtype)
            times = measure.in_turn(arms, inputs, clock, 2 * asked.rounds, asked.limit)
        plain_ms, ours = np.median(times, axis=0).T
        return {"case": self.name, "tokens": tokens, "plain_p50_ms": percentile(times[:, :, 0], 50),
                "none_p50_ms": percentile(times[:, :, 1], 50), "speed": ratio(plain_ms, ours)}


def summarised(names: list[str], times: Float64Array, sizes: dict[str, list[Any]], gaps: dict[str, list[float]]) -> dict[str, Any]:
    """By arm: p50, p99 over all rounds, and ratios to forced, fair and packed by micro-batch. times: [rounds, micro-batches, arms]."""
    typical = dict(zip(names, np.median(times, axis=0).T))
    found: dict[str, Any] = {}
    for index, name in enumerate(names):
        arm = found[name] = {"p50_ms": percentile(times[:, :, index], 50), "p99_ms": percentile(times[:, :, index], 99),
                             "mean_ms": float(typical[name].mean()), "by_micro_batch_ms": typical[name].tolist(),
                             "imbalance": float(np.mean([imbalance(one) for one in sizes[name]]))}
        for other, key in (("forced", "of_forced"), ("fair", "of_fair"), ("packed", "over_packed")):
            if other in typical and other != name:
                arm[key] = ratio(typical[other], typical[name])
        if name in gaps:
            gap = np.asarray(gaps[name])
            arm["placement_gap"], arm["without_gap"] = float(gap.mean()), int((gap <= 0).sum())
            if "fair" in typical and (gap <= 0).any():
                arm["of_fair_without_gap"] = ratio(typical["fair"][gap <= 0], typical[name][gap <= 0])
    return found
