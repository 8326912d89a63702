"""MoELayer's dispatch by a real deep_ep.Buffer against its dispatch by all_to_all_single, on 2 GPUs with NVLink. Not part of pytest.

    PYTHONPATH=python torchrun --standalone --nproc-per-node=2 Tests/python/deep_ep_gpu.py [--wheel FOLDER] [--empty]

FOLDER: where deep_ep and deep_ep_cpp lie, of DeepEP with its first interface (checked: v1.2.1), built for the very version of torch
that runs: built for another, it may load and then misread every tensor, and says "Assertion error topk_idx.dim() == 2". A build without
NVSHMEM is enough. --empty: also a batch in which one rank has no tokens.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from lplb import Planner
from lplb.moe import MoELayer

HIDDEN, WIDTH, EXPERTS, K, TOKENS = 2048, 1536, 16, 6, 1024
PLACEMENT = [*range(8), 8, 9, *range(8, 16), 0, 1]


def say(words):
    if dist.get_rank() == 0:
        print(words, flush=True)


def loaded(folder):
    """deep_ep, with the NVSHMEM that PyTorch brings along, for builds that link to it."""
    if folder:
        sys.path.insert(0, folder)
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations if spec else ():
        for library in sorted(Path(place).glob("nvshmem/lib/libnvshmem_host.so.3")):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import deep_ep

    return deep_ep


def run(layer, step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    tokens = 0 if step == 2 and rank == 1 else TOKENS
    scores = torch.rand(tokens, EXPERTS, generator=generator) - torch.arange(EXPERTS) / EXPERTS / 2
    ids = torch.where(torch.rand(tokens, K, generator=generator) < 0.03, -1, scores.topk(K).indices).cuda()
    states, target = (torch.randn(tokens, HIDDEN, generator=generator).bfloat16().cuda() for _ in range(2))
    weights = torch.rand(tokens, K, generator=generator).cuda().requires_grad_()
    states.requires_grad_()
    output = layer(states, ids, weights)
    (output * target).sum().backward()
    return output.detach(), states.grad, weights.grad


def apart(one, other):
    return float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-30)) if one.numel() else 0.0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--wheel", default="")
    parser.add_argument("--empty", action="store_true")
    options = parser.parse_args()
    signal.alarm(110)
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", timeout=datetime.timedelta(seconds=60))
    rank, group = dist.get_rank(), dist.group.WORLD
    deep_ep = loaded(options.wheel)
    say(f"deep_ep loaded from {deep_ep.__file__} with torch {torch.__version__}")
    size = max(config.get_nvl_buffer_size_hint(HIDDEN * 2, group.size()) for config in (
        deep_ep.Buffer.get_dispatch_config(group.size()), deep_ep.Buffer.get_combine_config(group.size())))
    buffer = deep_ep.Buffer(group, size, 0, explicitly_destroy=True)  # its destructor would wait for the other rank
    say(f"buffer of {size / 2**20:.0f} MiB")

    layers = []
    for dispatch in ("torch", buffer):
        planner = Planner.from_placement(PLACEMENT, group=group)
        if dispatch != "torch":
            planner.init_from_deep_ep(buffer)
            assert planner.deep_ep_initialized
        layers.append(MoELayer(planner, HIDDEN, WIDTH, dtype=torch.bfloat16, grad_dtype=torch.float32, dispatch=dispatch))
    worst = {}
    for step in range(3 if options.empty else 2):
        for name, one, other in zip(("output", "inputs", "router"), *(run(layer, step, rank) for layer in layers)):
            worst[name] = max(worst.get(name, 0.0), apart(other, one))
    for layer in layers:
        layer.replicas.push_grads()
    for name in ("gate_up", "down"):
        worst[name] = apart(getattr(layers[1], name).main_grad, getattr(layers[0], name).main_grad)
    print(f"rank {rank}: largest distances, relative: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()), flush=True)
    times = []
    for layer in layers:
        for step in range(3):
            run(layer, step % 2, rank)
        torch.cuda.synchronize()
        began = time.monotonic()
        for step in range(20):
            run(layer, step % 2, rank)
        torch.cuda.synchronize()
        times.append(50 * (time.monotonic() - began))
        layer.replicas.zero_grad()
    say(f"forward and backward with making the batch: {times[0]:.2f} ms by all_to_all_single, {times[1]:.2f} ms by DeepEP")
    assert all(value <= 0.02 for value in worst.values()), worst
    buffer.destroy()
    dist.barrier()
    say("deep_ep_gpu: passed")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
