"""The MoE layer in bfloat16 on 2 GPUs over NCCL, against the layer without replicas. Not part of pytest.

    PYTHONPATH=python torchrun --standalone --nproc-per-node=2 Tests/python/moe_gpu.py [--steps 300] [--only part,part] [--device cpu]

Prints a line for each part and ends with 1 if one failed. Each part has 90 seconds, which all of them together should not need. On the
CPU (gloo) the sizes are small and the times are left out.
"""

from __future__ import annotations

import argparse
import datetime
import io
import os
import signal
import sys
import time
import traceback

import torch
import torch.distributed as dist

from lplb import Planner
from lplb._moe import products
from lplb._moe.products import _adds_to_float32, _fast, add_grouped
from lplb.copies import natural_placement
from lplb.moe import MoELayer

EXPERTS, K = 8, 3
NATURAL = list(range(EXPERTS))
COPIES = [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 0, 1]  # four own experts a rank, and two copies of the other's
TURNED = [0, 1, 6, 7, 2, 3, 4, 5, 2, 3, 0, 6]  # two homes of each rank move
IDLE = [0, 1, 2, 3, 4, 5, 6, 7, 8, 3]  # nine experts: the first rank owns five and holds no copy, the second has one
SIZES = {"small": (512, 256), "large": (2048, 1536)}  # hidden, intermediate: of large experts each gradient has a launch of its own


def batch(step, rank, hidden, experts=EXPERTS, tokens=384):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    scores = torch.rand(tokens, experts, generator=generator) - torch.arange(experts) / experts / 2  # the first experts are hot
    ids = scores.topk(K).indices
    ids = torch.where(torch.rand(tokens, K, generator=generator) < 0.05, -1, ids)
    states, target = (torch.randn(tokens, hidden, generator=generator).bfloat16().to(DEVICE) for _ in range(2))
    weights = torch.rand(tokens, K, generator=generator).bfloat16().to(DEVICE)
    return states.requires_grad_(), ids.to(DEVICE), weights.requires_grad_(), target


def make(placement, size, **options):
    planner = Planner.from_placement(placement, group=dist.group.WORLD, device=DEVICE)
    return MoELayer(planner, *SIZES[size], dtype=torch.bfloat16, **options)


def apart(one, other):
    """The largest distance, relative to the largest value."""
    return float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-30)) if one.numel() else 0.0


def by_expert(layer, tensors):
    """{expert: rows of tensors} of all ranks, on the CPU."""
    own = enumerate(layer.replicas.own.tolist())
    mine = {expert: [tensor[row].float().cpu() for tensor in tensors] for row, expert in own if expert >= 0}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {expert: rows for one in everyone for expert, rows in one.items()}


def largest(layer, tensors, other, others):
    one, two = by_expert(layer, tensors), by_expert(other, others)
    assert one.keys() == two.keys()
    return max(apart(x, y) for expert in one for x, y in zip(one[expert], two[expert]))


def gradients(layer):
    return [getattr(one, "main_grad", one.grad) for one in (layer.gate_up, layer.down)]


def pass_of(layer, step, rank):
    states, ids, weights, target = batch(step, rank, layer.hidden)
    output = layer(states, ids, weights)
    (output * target).sum().backward()
    return output.detach(), states.grad, weights.grad


def equal(rank):
    """Outputs, gradients of inputs and of weights after two micro-batches; bfloat16 and float32 gradients; by autograd (sharded)."""
    worst = {}
    for size in SIZES:
        for options in ({}, {"grad_dtype": torch.float32}, {"sharded": True}):
            plain, layer = make(NATURAL, size, grad_dtype=options.get("grad_dtype")), make(
                natural_placement(EXPERTS, 2, 1) if "sharded" in options else COPIES, size, **options)
            for step in range(2):
                ours, theirs = pass_of(layer, step, rank), pass_of(plain, step, rank)
                for name, one, other in zip(("output", "inputs", "router"), ours, theirs):
                    worst[name] = max(worst.get(name, 0.0), apart(one, other))
            layer.replicas.push_grads()
            plain.replicas.push_grads()
            key = "weights, float32" if "grad_dtype" in options else "weights"
            worst[key] = max(worst.get(key, 0.0), largest(layer, gradients(layer), plain, gradients(plain)))
    assert all(value <= 0.02 for value in worst.values()), worst
    return ", ".join(f"{name} {value:.1e}" for name, value in worst.items())


def optimizers(rank, steps=12):
    """AdamW, fused: on bfloat16 parameters, and on float32 masters with float32 main gradients; homes and their state move twice."""
    found = []
    for main in (False, True):
        layers = []
        for placements in ([NATURAL], [COPIES, TURNED, COPIES]):
            layer = make(placements[0], "small", grad_dtype=torch.float32 if main else None)
            own = [layer.gate_up, layer.down]
            masters = [one.detach().float().requires_grad_() for one in own] if main else own
            optimizer = torch.optim.AdamW(masters, lr=1e-2, fused=True)
            for step in range(steps):
                if step and step % 4 == 0 and len(placements) > 1:
                    if main:
                        for index, one in enumerate(masters):
                            for name, tensor in {"master": one.data, **optimizer.state[one]}.items():
                                if tensor.shape == one.shape:
                                    layer.replicas.register(f"{name} {index}", tensor)
                    layer.replicas.planner.update_placement(placements[step // 4 % len(placements)])
                    layer.replicas.update(optimizers=[] if main else [optimizer])
                pass_of(layer, step, rank)
                layer.replicas.push_grads()
                for one, master in zip(own, masters):
                    if main:
                        master.grad = one.main_grad
                optimizer.step()
                if main:
                    with torch.no_grad():
                        for one, master in zip(own, masters):
                            one.copy_(master)
                    layer.replicas.zero_grad()
                else:
                    optimizer.zero_grad()
                layer.replicas.pull()
            layers.append((layer, masters))
        (plain, one), (layer, other) = layers
        found.append(largest(layer, other, plain, one))
    assert max(found) < 0.1, found  # Adam takes the sign of gradients that are nearly zero
    return f"weights apart after {steps} steps: bfloat16 {found[0]:.1e}, float32 masters {found[1]:.1e}"


def idle(rank):
    """A placement where one rank has no copy, nor any of its experts a copy elsewhere but one."""
    planner = Planner.from_placement(IDLE, group=dist.group.WORLD, device=DEVICE)
    layer = MoELayer(planner, *SIZES["small"], dtype=torch.bfloat16)
    for step in range(3):
        states, ids, weights, target = batch(step, rank, layer.hidden, experts=9, tokens=0 if rank == step % 2 else 100)
        (layer(states, ids, weights) * target).sum().backward()
        layer.replicas.push_grads()
        with torch.no_grad():
            layer.gate_up.mul_(1.01)
        layer.replicas.pull()
    copies = layer.replicas.weights("gate_up")
    rows = by_expert(layer, [layer.gate_up])
    assert rank == 0 or torch.equal(copies[-1].float().cpu(), rows[3][0])
    return f"own experts {[len(layer.replicas.own)]}"


def checkpoint(rank):
    """Saved with copies, loaded without, and back: the same outputs, bit by bit where the products are the same."""
    layer = make(COPIES, "small", seed=3)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    saved = [None] * 2
    dist.all_gather_object(saved, file.getvalue())
    parts = [torch.load(io.BytesIO(one), map_location=DEVICE) for one in saved]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    found = []
    for placement in (NATURAL, TURNED):
        other = make(placement, "small")
        other.load_state_dict(dict(whole))
        other.replicas.pull()
        found.append(apart(*(pass_of(one, 5, rank)[0] for one in (other, layer))))
    assert max(found) < 0.02, found
    return f"outputs apart {max(found):.1e}"


def endurance(rank, steps):
    """Many steps with new placements: finite losses, and no memory that grows."""
    layer = make(COPIES, "small", grad_dtype=None)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-4, fused=True)
    batches, memory, began = [batch(index, rank, layer.hidden) for index in range(8)], [], time.monotonic()
    for step in range(steps):
        if step and step % 20 == 0:
            layer.replicas.planner.update_placement(TURNED if step // 20 % 2 else COPIES)
            layer.replicas.update(optimizers=[optimizer])
        states, ids, weights, target = batches[step % 8]
        loss = (layer(states, ids, weights) - target).float().square().mean()
        loss.backward()
        layer.replicas.push_grads()
        optimizer.step()
        optimizer.zero_grad()
        layer.replicas.pull()
        states.grad = weights.grad = None
        if step in (min(100, steps // 2), steps - 1):
            del loss
            memory.append(torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0)
    assert memory[0] == memory[1] and torch.isfinite(layer.gate_up.float()).all(), memory
    return f"{steps} steps, {1000 * (time.monotonic() - began) / steps:.2f} ms each, {memory[0] / 2**20:.1f} MiB at both ends"


def milliseconds(call, repeats=20):
    for _ in range(3):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(repeats):
        call()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / repeats


def empty_slots(rank):
    """DeepSeek-V3's gate-up: 8 experts with 512 tokens each, with and without two empty slots; and one launch with an addition."""
    if DEVICE.type != "cuda":
        return "needs a GPU"
    hidden, wide, n = 7168, 4096, 512
    rows, grad = torch.randn(8 * n, hidden, device=DEVICE).bfloat16(), torch.randn(8 * n, wide, device=DEVICE).bfloat16()
    words = [f"adds to float32 in one step: {_adds_to_float32(DEVICE, torch.bfloat16)}"]
    assert _fast(rows, wide)
    for dtype in (torch.bfloat16, torch.float32):
        sums = torch.zeros(10, wide, hidden, device=DEVICE, dtype=dtype)
        counts, ends = [n] * 8 + [0, 0], (torch.arange(1, 11, device=DEVICE) * n).clamp(max=8 * n).int()
        without = milliseconds(lambda: add_grouped(sums[:8], grad, rows, counts[:8], ends[:8], 0))
        empty = milliseconds(lambda: add_grouped(sums, grad, rows, counts, ends, 0))
        fresh = milliseconds(lambda: add_grouped(sums, grad, rows, counts, ends, 8))
        old = milliseconds(lambda: sums.add_(torch._grouped_mm(grad.t(), rows, offs=ends)))
        words.append(f"{str(dtype)[6:]}: 8 experts {without:.3f} ms, two empty slots {empty - without:+.3f}, into nothing {fresh:.3f}, "
                     f"as before {old:.3f}")
        sums.zero_()
        add_grouped(sums, grad, rows, counts, ends, 0)
        assert apart(sums[:8], torch._grouped_mm(grad.t(), rows, offs=ends[:8])) < 0.01 and not sums[8:].any()
        assert empty - without < 0.02, words
        del sums
    for name, wide, hidden in (("Qwen3-235B", 3072, 4096), ("V2-Lite", 2816, 2048)):  # is products.LARGE where the two ways cross?
        sums = torch.zeros(8, wide, hidden, device=DEVICE, dtype=torch.bfloat16)
        rows, grad = torch.randn(8 * n, hidden, device=DEVICE).bfloat16(), torch.randn(8 * n, wide, device=DEVICE).bfloat16()
        ways, border = [], products.LARGE
        for products.LARGE in (0, 1 << 40):
            ways.append(milliseconds(lambda: add_grouped(sums, grad, rows, counts[:8], ends[:8], 0)))
        products.LARGE = border
        words.append(f"{name}: a product each {ways[0]:.3f}, one launch and an addition {ways[1]:.3f}")
    return "; ".join(words)


def main():
    global DEVICE
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", default="")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    DEVICE = torch.device(options.device, *([int(os.environ["LOCAL_RANK"])] if options.device == "cuda" else []))
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    else:
        SIZES.update(small=(64, 32), large=(128, 64))
    dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo", timeout=datetime.timedelta(seconds=60))
    rank = dist.get_rank()
    if dist.get_world_size() != 2:
        sys.exit(f"needs 2 processes, got {dist.get_world_size()}")
    parts = {part.__name__: part for part in (equal, optimizers, idle, checkpoint, empty_slots)}
    parts["endurance"] = lambda rank: endurance(rank, options.steps)
    for name in options.only.split(",") if options.only else parts:
        began = time.monotonic()
        signal.alarm(90)  # which ends the process
        try:
            words = parts[name](rank)
        except Exception:  # the other rank may wait for this one: it is ended by its alarm or by torchrun
            print(f"rank {rank}: {name} FAILED\n{traceback.format_exc()}", flush=True)
            os._exit(1)
        signal.alarm(0)
        if rank == 0:
            print(f"{name} ({time.monotonic() - began:.1f} s): {words}", flush=True)
    dist.barrier()
    if rank == 0:
        print("moe_gpu: all parts passed", flush=True)
    dist.destroy_process_group()



if __name__ == "__main__":
    main()
