"""Replicas over NVLink on real GPUs, against the torch transport on CPUs bit for bit, and how fast they are. Prints a table, and JSON.

    torchrun --nproc-per-node 2 Tests/python/replicas_gpu.py [--json FILE] [--only NAME ...]
More processes than GPUs share them (no NCCL then, so homes stay and nothing is timed); each step has a time limit.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import lplb
from lplb import _c
from lplb.exchange.gather import REPLICAS, Callback, Waiting
from lplb.placement import Rows
from lplb.transport import NvlinkTransport, TorchTransport
from replicas_pair import Pair, Place, any_homes, fixed_homes

LIMIT = 90  # seconds of a step
DTYPES = [(torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float16, None), (torch.float32, None), (torch.float64, None)]
V3 = {"gate_up": (4096, 7168), "down": (7168, 2048)}


def bits(place: Place) -> dict[str, Any]:
    """pull, push and update in every type, over placements that follow one another."""
    for dtype, grad_dtype in DTYPES:
        pair = Pair(place, dtype, grad_dtype, slack=0 if place.shares else 3)
        for round in range(5):
            pair.fill_weights()
            for one in pair.both:
                one.pull()
            pair.check(f"pull {round}")
            for _ in range(2):  # the second push adds to what the first one has brought
                pair.fill_gradients()
                for one in pair.both:
                    one.push_grads()
                pair.check(f"push {round}")
            pair.fill_gradients()  # an update brings them home first
            pair.place_anew(fixed_homes(place, round + 1) if place.shares else any_homes(place, round, pair.cpu._rows, pair.slack))
            pair.check(f"update {round}")
        pair.close()
    lplb.exchange.release(place.group, place.device)
    return {}


def graphs(place: Place) -> dict[str, Any]:
    """A pull and a push that were captured before a new placement do what it says."""
    pair = Pair(place, torch.bfloat16, torch.float32, slack=0)
    pair.fill_weights()
    for one in pair.both:
        one.pull()
    side = torch.cuda.Stream()
    held = {}
    for name, act in (("pull", pair.gpu.pull), ("push", pair.gpu.push_grads)):
        held[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(held[name], stream=side):
            act()
    for round in range(4):
        pair.place_anew(fixed_homes(place, round + 20))
        pair.fill_weights()
        held["pull"].replay()
        pair.cpu.pull()
        pair.check(f"pull by graph {round}")
        pair.fill_gradients()
        held["push"].replay()
        pair.cpu.push_grads()
        pair.check(f"push by graph {round}")
        if round == 2:  # eager calls between replays
            pair.gpu.pull()
    pair.close()
    lplb.exchange.release(place.group, place.device)
    return {}


def late(place: Place) -> dict[str, Any]:
    """A rank that comes a second late is waited for, on the device."""
    pair = Pair(place, torch.float32, None, slack=0)
    pair.fill_weights()
    torch.cuda.synchronize()
    dist.barrier(group=place.group)
    begin = time.monotonic()
    if place.rank == place.size - 1:
        time.sleep(1)
    pair.gpu.pull()
    queued = time.monotonic() - begin
    torch.cuda.synchronize()
    waited = time.monotonic() - begin
    assert waited > 0.8 and (queued < 0.5 or place.rank == place.size - 1), (queued, waited)
    pair.cpu.pull()
    pair.check("late")
    pair.close()
    return {"waited_s": round(waited, 2)}


def memory(place: Place) -> dict[str, Any]:
    """1,000 pulls and pushes take no memory; what is closed by all is given back."""
    lplb.exchange.release(place.group, place.device)
    torch.cuda.synchronize()
    dist.barrier(group=place.group)
    start = torch.cuda.mem_get_info()[0]
    transport, _, tensors = v3(place, 0)
    transport.pull(tensors[:2], None)
    torch.cuda.synchronize()
    dist.barrier(group=place.group)
    before = torch.cuda.mem_get_info()[0]
    for _ in range(1000 if not place.shares else 50):
        transport.pull(tensors[:2], None)
        transport.push(tensors[2:])
    torch.cuda.synchronize()
    dist.barrier(group=place.group)
    grown = before - torch.cuda.mem_get_info()[0]
    transport.close()
    del tensors, transport
    lplb.exchange.release(place.group, place.device)
    dist.barrier(group=place.group)
    left = start - torch.cuda.mem_get_info()[0]
    assert grown < 4 << 20 and left < 64 << 20, (grown, left)
    return {"grown_mib": grown >> 20, "left_mib": left >> 20}


def adopting(place: Place) -> dict[str, Any]:
    """Memory of torch's caching allocator is mapped, at its offset; that of expandable segments is refused, in words, on all ranks."""
    rows = Rows(fixed_homes(place, 3), place.size, 0)
    transport = NvlinkTransport(place.group, place.rank, place.device, rows)

    def add(tensor: torch.Tensor) -> Exception | None:
        def call(message: Any, room: int) -> int:
            status = native.library.replicas_add(native.pointer, ctypes.byref(asked), ctypes.byref(address))
            message.value = native.library.replicas_error(native.pointer)[: room - 1] if status else b""
            return int(status)

        native, address = transport._native, ctypes.c_void_p()
        gather = Callback(place.group, REPLICAS, Waiting("adopting", 0), place.device.index)
        asked = _c.ReplicasTensor(kind=_c.WEIGHTS, row_bytes=tensor.nbytes // len(tensor), memory=tensor.data_ptr(), gather=gather.function)
        return gather.call(call)

    keeper = torch.zeros(1000 + 500 * place.rank, device=place.device)  # other offsets on other ranks
    tensor = torch.zeros(rows.n_rows, 40, device=place.device)
    refused = add(tensor)
    assert refused is None, refused
    transport.place(rows)
    for row, expert in enumerate(rows.experts[place.rank][: rows.own[place.rank]]):
        tensor[row] = expert
    transport.pull([tensor], None)
    torch.cuda.synchronize()
    assert tensor[:, 7].int().tolist() == rows.experts[place.rank], tensor[:, 7]
    settings = getattr(torch.cuda.memory, "_set_allocator_settings", None)
    if settings is None:
        return {"refusal": "not tried with this PyTorch"}
    settings("expandable_segments:True")
    virtual = torch.zeros(rows.n_rows, 16 << 20, dtype=torch.uint8, device=place.device)
    refused = add(virtual)
    settings("expandable_segments:False")
    assert isinstance(refused, lplb.Unsupported) and "expandable_segments" in str(refused), repr(refused)
    transport.pull([tensor], None)  # still works
    torch.cuda.synchronize()
    transport.close()
    dist.barrier(group=place.group)
    del keeper
    return {"refusal": str(refused)[:160]}


def v3(place: Place, blocks: int, *, grad_dtype: torch.dtype = torch.bfloat16, kind: type[TorchTransport] = NvlinkTransport
       ) -> tuple[TorchTransport, Rows, list[torch.Tensor]]:
    """Experts of DeepSeek-V3's size: two own ones on each rank, and copies of the next rank's."""
    slots = [expert % (2 * place.size) for rank in range(place.size) for expert in range(2 * rank, 2 * rank + 4)]
    rows = Rows(np.array(slots, dtype=np.int32), place.size, 0)
    more = {"rows": rows, "blocks": blocks} if kind is NvlinkTransport else {}
    transport: TorchTransport = kind(place.group, place.rank, place.device, **more)
    shapes = [(rows.n_rows, *shape) for shape in V3.values()]
    tensors = [transport.zeros(shape, torch.bfloat16, _c.WEIGHTS) for shape in shapes]
    tensors += [transport.zeros(shape, grad_dtype, _c.GRADIENTS) for shape in shapes]
    transport.place(rows)
    return transport, rows, tensors


def timed(place: Place, act: Any, calls: int = 20) -> float:
    """Milliseconds of a call, of many in a row; the largest of all ranks."""
    for _ in range(3):
        act()
    torch.cuda.synchronize()
    dist.barrier(group=place.group)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        act()
    end.record()
    torch.cuda.synchronize()
    return place.largest(begin.elapsed_time(end) / calls)


def speed(place: Place) -> dict[str, Any]:
    """pull and push of two copies a rank, V3's size, beside the torch transport and a plain copy between two GPUs, both at once."""
    if place.shares:
        return {"skipped": "several processes on one GPU"}
    megabytes = 2 * sum(2 * int(np.prod(shape)) for shape in V3.values()) / 1e6
    found: dict[str, Any] = {}

    def note(name: str, ms: float, factor: int = 1) -> None:
        found[name] = {"ms": round(ms, 4), "GB/s": round(factor * megabytes / ms, 1)}

    if place.size == 2:
        here = torch.empty(int(megabytes * 1e6), dtype=torch.uint8, device=place.device)
        there = torch.empty_like(here, device=torch.device("cuda", 1 - place.device.index))
        note("plain peer copy", timed(place, lambda: here.copy_(there, non_blocking=True)))
        del here, there
    for blocks in (32, 16, 24, 48, 64):
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            transport, _, tensors = v3(place, blocks, grad_dtype=dtype)
            if name == "bf16":
                note(f"pull, {blocks} blocks", timed(place, lambda: transport.pull(tensors[:2], None)))
            note(f"push {name}, {blocks} blocks", timed(place, lambda: transport.push(tensors[2:])), 1 if name == "bf16" else 2)
            transport.close()
            del transport, tensors
            lplb.exchange.release(place.group, place.device)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        transport, _, tensors = v3(place, 0, grad_dtype=dtype, kind=TorchTransport)
        if name == "bf16":
            note("pull by torch", timed(place, lambda: transport.pull(tensors[:2], None)))
        note(f"push {name} by torch", timed(place, lambda: transport.push(tensors[2:])), 1 if name == "bf16" else 2)
        del transport, tensors
    return found


def killed(place: Place) -> dict[str, Any]:
    """The last one: a process ends, and the others find out in time, by a report or by a trap. Processes that share a GPU through MPS
    are tried with the report alone: there a trap of one process ends the others of that GPU too, and may leave them waiting."""
    pairs = [Pair(place, torch.float32, None, slack=0) for _ in range(2)]
    for pair, policy in zip(pairs, ("report", "trap")):
        pair.fill_weights()
        pair.gpu.pull()
        pair.gpu.transport.exchange.set_limits(2.0, policy)
    torch.cuda.synchronize()
    dist.barrier(group=place.group)
    if place.rank == place.size - 1:
        sys.stdout.flush()
        os._exit(0)
    words, begin = [], time.monotonic()
    pairs[0].gpu.pull()
    torch.cuda.synchronize()
    seconds = time.monotonic() - begin
    try:
        pairs[0].gpu.pull()
    except lplb.PeerTimeout as error:
        words.append(str(error))
    if place.shares:
        assert len(words) == 1 and seconds < 6, (words, seconds)
        return {"seconds": round(seconds, 2), "words": words}
    pairs[1].gpu.push_grads()
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        words.append(f"trap: {str(error).splitlines()[0]}")
    try:
        pairs[1].gpu.pull()
    except lplb.LplbError as error:
        words.append(f"{type(error).__name__}: {error}")
    assert len(words) == 3 and seconds < 6 and words[2].startswith("PeerTimeout"), (words, seconds)
    return {"seconds": round(seconds, 2), "words": words}


STEPS = [bits, graphs, late, adopting, memory, speed, killed]


def run(place: Place, step: Any) -> tuple[str, dict[str, Any]]:
    """One step on all ranks; "" where it went well on this one."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    begin = time.monotonic()
    try:
        found, failure = step(place), ""
    except Exception as error:
        found, failure = {}, f"rank {place.rank}: {type(error).__name__}: {error}"
    found["seconds_of_step"] = round(time.monotonic() - begin, 1)
    faulthandler.cancel_dump_traceback_later()
    return failure, found


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--json")
    arguments.add_argument("--only", nargs="*", choices=[step.__name__ for step in STEPS])
    asked = arguments.parse_args()
    place, results, failed = Place(), {}, False
    for step in STEPS:
        if asked.only and step.__name__ not in asked.only:
            continue
        failure, found = run(place, step)
        failures = [failure] if failure else []
        if step is not killed:  # after which nobody meets any more
            failures = [words for words in place.everyone(failure) if words]
        failed |= bool(failures)
        results[step.__name__] = {"failures": failures, **found}
        if place.rank == 0:
            print(f"{'FAILED' if failures else 'ok':7}{step.__name__:9}{json.dumps(results[step.__name__])}", flush=True)
        if failures:
            break  # ranks may stand at different places
    if place.rank == 0:
        for name, one in results.get("speed", {}).items():
            if isinstance(one, dict):
                print(f"    {name:26}{one['ms']:9.3f} ms {one['GB/s']:8.1f} GB/s")
        if asked.json:
            with open(asked.json, "w", encoding="utf-8") as file:
                json.dump({"ranks": place.size, "device": torch.cuda.get_device_name(), "results": results}, file, indent=1)
    sys.stdout.flush()
    os._exit(1 if failed else 0)  # a context that has trapped cannot be left in peace


if __name__ == "__main__":
    main()
