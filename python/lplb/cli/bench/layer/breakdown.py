"""Kernels of one piece of work, by kind, as torch.profiler sees them. A pass of its own: the profiler slows the host down."""

from __future__ import annotations

import time
from typing import Any

from torch.profiler import ProfilerActivity, profile

from .timing import Clock, Work

KINDS = (  # the first whose word is in the kernel's name
    ("all-to-all", ("nccl", "sendrecv")),
    ("lplb: plan, layout", ("lplb",)),
    ("layout by torch", ("sort", "scan", "bincount", "histogram", "searchsorted", "memcpy dtoh", "memcpy htod", "arange", "repeat")),
    ("products", ("gemm", "cutlass", "grouped", "sm90_", "wgmma", "nvjet", "xmma")),
    ("sums into gradients", ("functor_add",)),
    ("permutations", ("index", "gather", "scatter")),
    ("sums over choices", ("reduce",)),
    ("zeros and copies", ("memset", "fill", "memcpy", "copy")),
)
OTHER = "elementwise"


def kind_of(kernel: str) -> str:
    lower = kernel.lower()
    return next((kind for kind, words in KINDS if any(word in lower for word in words)), OTHER)


def pieces(work: Work, clock: Clock) -> dict[str, float]:
    """Milliseconds by kind of kernel, and "GPU idle": what is left of the time from the first kernel to the end of the last. On a CPU
    the whole time, in one piece."""
    if not clock.cuda:
        clock.line_up()
        began = time.perf_counter()
        work()
        return {"all": (time.perf_counter() - began) * 1000}
    clock.wait()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        clock.line_up()  # here, since ranks take their time to start the profiler
        clock.wait()
        work()
        clock.wait()
    return by_kind([(event.name, float(event.time_range.start), float(event.time_range.end))
                    for event in seen.events() or () if _is_kernel(event)])


def _is_kernel(event: Any) -> bool:
    """On the device, no range that something else has annotated there, such as nccl:all_to_all, and not the line-up of the ranks."""
    return (event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
            and not event.name.startswith(("nccl:", "ProfilerStep", "Optimizer.")) and "AllReduce" not in event.name)


def by_kind(kernels: list[tuple[str, float, float]]) -> dict[str, float]:
    """kernels: (name, start, end) in microseconds. Milliseconds by kind, and the gaps in which none ran."""
    found: dict[str, float] = {}
    busy, reached = 0.0, None
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        kind = kind_of(name)
        found[kind] = found.get(kind, 0.0) + (end - start) / 1000
        reached = start if reached is None else reached
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    if kernels and reached is not None:
        found["GPU idle"] = (reached - min(start for _, start, _ in kernels) - busy) / 1000
    return found
