"""Times the layer: micro-batches with the policies in turn, whole steps, transfers of copies, the plan alone, and where the time goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .... import homes
from ....moe import MoELayer
from ....planner import Planner
from ....replicas import Replicas
from ..kit import undisturbed
from .breakdown import pieces
from .timing import AHEAD, Clock, Float64Array, percentile


class TimedLayer(MoELayer):
    """With weights from the device's generator: drawing those of V3 on the host would take seconds an expert."""

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        for weight in (self.gate_up, self.down):
            weight.normal_(std=weight.shape[-1] ** -0.5)


@dataclass
class Arm:
    """A policy: a layer, and for each micro-batch (ids, physical ids or None)."""

    name: str
    layer: Any  # takes (states, ids, weights, physical)
    batches: list[tuple[Tensor, Tensor | None]]


class Inputs:
    """What all arms get: hidden states, router weights, and the gradient of the output."""

    def __init__(self, tokens: int, hidden: int, top_k: int, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(1)
        draw = partial(torch.randn, generator=generator, device=device, dtype=dtype)
        self.states = draw(tokens, hidden).requires_grad_()
        self.weights = draw(tokens, top_k).softmax(-1).detach().requires_grad_()
        self.gradient = draw(tokens, hidden) * 0.01

    def forward(self, arm: Arm, number: int) -> Tensor:
        ids, physical = arm.batches[number % len(arm.batches)]
        output: Tensor = arm.layer(self.states, ids, self.weights, physical)
        return output

    def backward(self, output: Tensor) -> None:
        torch.autograd.backward(output, self.gradient)
        self.states.grad = self.weights.grad = None

    def micro_batch(self, arm: Arm, number: int) -> None:
        self.backward(self.forward(arm, number))


def clear(arms: Sequence[Arm]) -> None:
    for layer in {id(arm.layer): arm.layer for arm in arms}.values():
        layer.replicas.zero_grad() if isinstance(layer, MoELayer) else layer.zero_grad(set_to_none=False)


def in_turn(arms: Sequence[Arm], inputs: Inputs, clock: Clock, rounds: int, limit: float) -> Float64Array:
    """
    [rounds, micro-batches, arms] milliseconds, the maximum over the ranks. Every micro-batch goes through all arms, starting with another
    one each time. Before, every arm has its first two, and the first arm all, which is not timed and lets memory be found.
    """
    n_batches = len(arms[0].batches)
    for number in range(n_batches):
        inputs.micro_batch(arms[0], number)
    for arm in arms[1:]:
        for number in range(min(2, n_batches)):
            inputs.micro_batch(arm, number)
    found: list[Float64Array] = []
    while len(found) < rounds:
        clear(arms)
        began, times = time.monotonic(), np.zeros((n_batches, len(arms)))
        with undisturbed():
            for number in range(n_batches):
                for turn in range(len(arms)):
                    which = (turn + number + len(found)) % len(arms)
                    times[number, which] = clock.milliseconds(partial(inputs.micro_batch, arms[which], number))
        found.append(times)
        if len(found) == 1:
            rounds = clock.rounds(limit, time.monotonic() - began, rounds)
    return clock.slowest(np.stack(found))


def sustained(arms: Sequence[Arm], inputs: Inputs, clock: Clock, rounds: int = 2) -> list[float]:
    """Milliseconds a micro-batch where all of them follow each other without a wait; the median of the rounds."""
    def all_of(arm: Arm) -> None:
        for number in range(len(arm.batches)):
            inputs.micro_batch(arm, number)
    times = []
    for _ in range(rounds):
        clear(arms)
        with undisturbed():
            times.append([clock.milliseconds(partial(all_of, arm)) / len(arm.batches) for arm in arms])
    return [float(one) for one in np.median(clock.slowest(times), axis=0)]


def steps(arms: Sequence[Arm], inputs: Inputs, clock: Clock, micro_batches: int, rounds: int) -> list[float]:
    """Milliseconds of optimizer steps: micro-batches, push_grads(), SGD on the rank's own experts, zero_grad(), pull(); the median."""
    optimizers = {id(arm.layer): torch.optim.SGD(arm.layer.parameters(), lr=1e-9) for arm in arms}

    def step(arm: Arm, first: int) -> None:
        for number in range(first, first + micro_batches):
            inputs.micro_batch(arm, number)
        arm.layer.replicas.push_grads()
        optimizers[id(arm.layer)].step()
        arm.layer.replicas.zero_grad()
        arm.layer.replicas.pull()

    clear(arms)
    for arm in arms:
        step(arm, 0)
    with undisturbed():
        times = [[clock.milliseconds(partial(step, arm, number * micro_batches)) for arm in arms] for number in range(rounds)]
    return [float(one) for one in np.median(clock.slowest(times), axis=0)]


def plan_times(arm: Arm, clock: Clock) -> dict[str, float]:
    """Microseconds of planner.run with the exchange: GPU, all micro-batches in a row; host, without waiting for the GPU."""
    ids = [one for one, _ in arm.batches]
    host: list[float] = []

    def plan_all() -> None:
        for one in ids:
            start = time.perf_counter()
            arm.layer.plan(one)
            host.append((time.perf_counter() - start) * 1e6)
    plan_all()
    gpu = [clock.milliseconds(plan_all, ahead=AHEAD * 10) * 1000 / len(ids) for _ in range(3)]
    return {"gpu_us": float(np.median(clock.slowest(gpu))), "host_us": float(clock.slowest([percentile(host[len(ids):], 50)])[0])}


def peak_mb(arm: Arm, inputs: Inputs, clock: Clock) -> float | None:
    """Megabytes that the micro-batches take beyond what lay there before; the maximum over ranks."""
    if not clock.cuda:
        return None
    most = 0
    for number in range(min(4, len(arm.batches))):
        clock.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        inputs.micro_batch(arm, number)
        most = max(most, torch.cuda.max_memory_allocated() - before)
    return float(clock.slowest([most / 1e6])[0])


def where_it_goes(arm: Arm, inputs: Inputs, clock: Clock, n: int) -> dict[str, float]:
    """Milliseconds of GPU time a micro-batch by kind of work, forward and backward apart, beside the time that the GPU had nothing to do.
    After everything that is timed: the profiler may go on to slow launches down."""
    inputs.micro_batch(arm, 0)
    outputs: list[Tensor] = []
    found: dict[str, list[float]] = {}
    for number in range(n):
        for way, work in (("forward", lambda: outputs.append(inputs.forward(arm, number))),
                          ("backward", lambda: inputs.backward(outputs.pop()))):
            for piece, value in pieces(work, clock).items():
                found.setdefault(f"{way} {piece}", []).append(value)
    return {piece: sum(values) / n for piece, values in sorted(found.items())}


# ---- copies ----


def transfers(planner: Planner, shapes: dict[str, tuple[int, int]], dtype: torch.dtype, grad_dtype: torch.dtype, clock: Clock,
              rounds: int) -> dict[str, Any]:
    """Milliseconds of pull() and push_grads() in line, and what of them is left when they run beside products of matrices; bytes."""
    replicas = Replicas(planner)
    with torch.no_grad():
        for name, shape in shapes.items():
            parameter = replicas.parameter(name, shape, dtype=dtype, grad_dtype=grad_dtype)
            parameter.normal_(std=0.02)
    replicas.pull()
    found: dict[str, Any] = {"grad_dtype": str(grad_dtype).removeprefix("torch.")}
    for call, work in (("pull", replicas.pull), ("push", replicas.push_grads)):
        def filled(work: Any = work) -> None:
            for name in shapes:
                replicas.gradients(name)
            work()
        filled()
        filled()
        exposed = [clock.milliseconds(filled) for _ in range(rounds)]
        found[f"{call}_ms"] = percentile(clock.slowest(exposed), 50)
        if clock.cuda:
            found[f"{call}_hidden_ms"] = _left_over(filled, clock, 2 * found[f"{call}_ms"], rounds)
    found |= _bytes(planner, shapes, dtype, grad_dtype)
    return found


def _left_over(work: Any, clock: Clock, cover_ms: float, rounds: int) -> float:
    """By how much work on a side stream prolongs products of matrices that take about cover_ms alone."""
    side = torch.cuda.Stream(clock.device)  # type: ignore[no-untyped-call]
    one, other = (torch.randn(4096, 4096, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(one)

    def compute(n: int) -> None:
        for _ in range(n):
            torch.mm(one, other, out=out)

    def both(n: int) -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        compute(n)
        torch.cuda.current_stream().wait_stream(side)
    compute(4)
    single = float(clock.slowest([clock.milliseconds(partial(compute, 8)) / 8])[0])
    n = max(4, int(cover_ms / single) + 1)
    times = [[clock.milliseconds(partial(compute, n)), clock.milliseconds(partial(both, n))] for _ in range(rounds + 1)]
    alone, beside = np.median(clock.slowest(times)[1:], axis=0)
    return float(beside - alone)


def _bytes(planner: Planner, shapes: dict[str, tuple[int, int]], dtype: torch.dtype, grad_dtype: torch.dtype) -> dict[str, int]:
    """The most that one rank sends or receives in a pull, and what a rank's slots take."""
    slots = np.asarray(planner.phy2log.cpu() if isinstance(planner.phy2log, Tensor) else planner.phy2log)
    n_local, home = planner.n_local_routed_experts, np.asarray(homes(slots, planner.ep_size))
    to, source = np.arange(slots.size) // n_local, home[slots] // n_local
    moved = to != source
    most = int(max(np.bincount(to[moved], minlength=1).max(), np.bincount(source[moved], minlength=1).max())) if moved.any() else 0
    numbers = sum(int(np.prod(shape)) for shape in shapes.values())
    copies = int(np.bincount(to[moved], minlength=1).max()) if moved.any() else 0
    return {"pull_bytes": most * numbers * dtype.itemsize, "push_bytes": most * numbers * grad_dtype.itemsize,
            "slots_bytes": copies * numbers * (dtype.itemsize + grad_dtype.itemsize)}
