"""What replicas_gpu.py compares: the same replicas on GPUs over NVLink and on CPUs by torch.distributed, on every process."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import lplb
from lplb import Planner, Replicas
from lplb.placement import Rows

OWN, SLOTS = 3, 2  # of a rank
SHAPES = {"wide": (64, 48), "odd": (5, 3)}  # rows in multiples of 16 bytes, and not


class Place:
    """Where this process stands."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.gpus = torch.cuda.device_count()
        self.device = torch.device("cuda", self.rank % self.gpus)
        torch.cuda.set_device(self.device)
        self.shares = self.size > self.gpus
        dist.init_process_group("gloo" if self.shares else "cpu:gloo,cuda:nccl")
        self.group: Any = dist.group.WORLD

    def everyone(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def largest(self, value: float) -> float:
        found = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return float(found)


def fixed_homes(place: Place, seed: int) -> np.ndarray:
    """Each rank's own experts, then copies of others' at random."""
    random, slots = np.random.default_rng(seed), []
    for rank in range(place.size):
        own = list(range(rank * OWN, (rank + 1) * OWN))
        others = [expert for expert in range(place.size * OWN) if expert not in own]
        slots += own + random.choice(others, SLOTS, replace=False).tolist()
    return np.array(slots, dtype=np.int32)


def any_homes(place: Place, seed: int, before: Rows, slack: int) -> np.ndarray:
    """Slots in any order, as far as the rows allow it."""
    for attempt in range(1000):
        random = np.random.default_rng([seed, attempt])
        slots = random.permutation(np.concatenate([np.arange(place.size * OWN), random.integers(0, place.size * OWN, place.size * SLOTS)]))
        try:
            Rows(slots.astype(np.int32), place.size, slack, before)
            return slots.astype(np.int32)
        except lplb.InvalidArgument:
            continue
    raise AssertionError("no placement fits")


class Pair:
    """The same replicas on the GPU over NVLink and on the CPU by torch.distributed."""

    def __init__(self, place: Place, dtype: torch.dtype, grad_dtype: torch.dtype | None, slack: int) -> None:
        self.place, self.slack, self.step = place, slack, 0
        slots = fixed_homes(place, 0)
        devices = (place.device, "cpu")
        self.planners = [Planner.from_placement(slots, group=place.group, device=device, exchange="torch") for device in devices]
        self.both = [Replicas(planner, transport=kind, slack=slack) for planner, kind in zip(self.planners, ("nvlink", "torch"))]
        self.parameters = {name: [one.parameter(name, shape, dtype=dtype, grad_dtype=grad_dtype) for one in self.both]
                           for name, shape in SHAPES.items()}
        self.gpu, self.cpu = self.both

    @torch.no_grad()
    def fill_weights(self) -> None:
        self.step += 1
        for number, (name, shape) in enumerate(SHAPES.items()):
            for row, expert in enumerate(self.cpu.own.tolist()):
                if expert >= 0:
                    random = torch.Generator().manual_seed(1000 * self.step + 10 * expert + number)
                    values = torch.randn(shape, generator=random, dtype=torch.float64)
                    for parameter in self.parameters[name]:
                        parameter[row] = values.to(parameter)

    def fill_gradients(self) -> None:
        """In all rows that are in use, of all magnitudes."""
        self.step += 1
        used = torch.tensor(self.cpu._rows.experts[self.place.rank]) >= 0
        for number, name in enumerate(SHAPES):
            random = torch.Generator().manual_seed(1000 * self.step + 10 * self.place.rank + number)
            buffers = [one.gradients(name) for one in self.both]
            values = torch.randn(buffers[1].shape, generator=random, dtype=torch.float64)
            values *= torch.exp2(torch.randint(-9, 9, values.shape, generator=random))
            values[~used] = 0  # and not -0, which the transports may turn into 0 or leave
            for buffer in buffers:
                buffer.copy_(values.to(buffer.dtype))

    def place_anew(self, slots: np.ndarray) -> None:
        for planner, one in zip(self.planners, self.both):
            planner.update_placement(slots)
            one.update()

    def check(self, what: str) -> None:
        torch.cuda.synchronize()
        for name in SHAPES:
            for kind in ("weights", "grads"):
                on_gpu, on_cpu = (getattr(one._held[name], kind) for one in self.both)
                bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[on_cpu.element_size()]
                differ = (on_gpu.cpu().view(bits) != on_cpu.view(bits)).flatten(1).any(1).nonzero().flatten().tolist()
                assert not differ, f"{what}: {kind} of {name} ({on_cpu.dtype}) differ in rows {differ} of rank {self.place.rank}"

    def close(self) -> None:
        for one in self.both:
            one.close()
