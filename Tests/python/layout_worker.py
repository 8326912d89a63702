"""One rank of a dispatch laid out by planners, moved by all_to_all_single: every row arrives where its expert stands, and the ranks'
numbers agree. With gloo on the CPU (test_layout.py gives rank, processes and a store), or with NCCL on GPUs:

    torchrun --nproc-per-node=2 Tests/python/layout_worker.py           # half a minute; prints the time of a layout
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from lplb import Planner


def batch(number, rank, n_logical, device, dtype):
    random = np.random.default_rng(1000 * number + rank)
    tokens = int(random.choice([0, 1, 100, 800]))
    ids = random.integers(-1, 1 + number % n_logical if number % 3 == 0 else n_logical, (tokens, 1 + number % 4))
    return torch.tensor(ids, device=device, dtype=dtype)


def all_to_all(rows, received, sent, group):
    out = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


def dispatch(planner, ids, physical, layout, group):
    """Sends expert, slot and number of each choice; checks what comes."""
    rank, n_local = dist.get_rank(group), planner.n_local_routed_experts
    splits = layout.wait()
    sent = [None] * group.size()
    dist.all_gather_object(sent, splits.sent, group=group)
    assert [theirs[rank] for theirs in sent] == splits.received, (sent, splits)
    choices = layout.order[: sum(splits.sent)]
    rows = torch.stack([ids.reshape(-1)[choices].long(), physical.reshape(-1)[choices].long(), torch.full_like(choices, rank), choices], 1)
    arrived = all_to_all(rows, splits.received, splits.sent, group)
    by_row = arrived[layout.by_row]
    begin = 0
    for row, end in enumerate(layout.ends.tolist()):
        part = by_row[begin:end]
        assert (part[:, 1] == rank * n_local + row).all() and (part[:, 0] == int(planner.phy2log[rank * n_local + row])).all()
        key = part[:, 2] * 2**32 + part[:, 3]
        assert (key[1:] > key[:-1]).all(), "by rank and then in the order of the choices"
        begin = end
    back = torch.empty_like(by_row)
    back[layout.by_row] = by_row
    assert torch.equal(all_to_all(back, splits.sent, splits.received, group), rows)


def check(group, device):
    ranks, rank, batches = group.size(), dist.get_rank(group), 0
    random = np.random.default_rng(5)
    spread = random.permutation(np.concatenate([np.arange(4 * ranks), random.integers(0, 4 * ranks, 2 * ranks)]))
    ring = np.stack([np.roll(np.arange(ranks), 1)], axis=1)
    makers = [lambda: Planner.from_placement(torch.tensor(spread), group=group, device=device),
              lambda: Planner.from_placement(torch.tensor(spread), group=group, device=device, exchange="torch"),
              lambda: Planner(torch.tensor(ring), 5 * ranks, 4 * ranks, group=group, device=device),
              lambda: Planner.from_placement(torch.arange(4 * ranks), group=group, device=device)]
    for number, make in enumerate(makers):
        planner = make()
        for index in range(10):
            ids = batch(10 * number + index, rank, 4 * ranks, device, torch.int32 if index % 2 else torch.int64)
            physical = planner.run(ids, None)

            def exchanged(rows):
                return all_to_all(rows, [1] * ranks, [1] * ranks, group)

            known = number < 3
            layout = planner.layout(physical, experts=ids, received=None if known else exchanged)
            asked = planner.layout(physical, received=exchanged)
            for name in ("order", "sent_rows", "received_rows", "ends", "by_row"):
                assert torch.equal(getattr(layout, name), getattr(asked, name)), name
            dispatch(planner, ids, physical, layout, group)
            batches += 1
    try:
        same = Planner.from_placement(torch.tensor(spread), group=group, device=device, tokens="same")
        same.layout(same.run(batch(0, 0, 4 * ranks, device, torch.int64), None))
    except ValueError as error:
        assert "received: must be given where the planner plans for no rank of its own" in str(error), error
    else:
        raise AssertionError("tokens='same' has no rank that sends")
    return batches


def host_time(group, device, tokens):
    """Microseconds from the plan to its splits on the host, median of 50."""
    ranks = group.size()
    random = np.random.default_rng(3)
    slots = np.concatenate([np.arange(32 * ranks), random.integers(0, 32 * ranks, 2 * ranks)])
    planner = Planner.from_placement(torch.tensor(random.permutation(slots)), group=group, device=device)
    ids = torch.tensor(random.integers(0, 32 * ranks, (tokens, 8)), device=device)
    seen = []
    for _ in range(60):
        physical = planner.run(ids, None)
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        layout = planner.layout(physical, experts=ids)
        layout.wait()
        layout.by_row
        seen.append(1e6 * (time.perf_counter() - began))
    return round(float(np.median(seen[10:])), 1)


def main():
    if "LOCAL_RANK" in os.environ:
        rank, device = int(os.environ["LOCAL_RANK"]), torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=timedelta(seconds=60))
    else:
        rank, processes, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
        device = torch.device("cpu")
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes, timeout=timedelta(seconds=60))
    group = dist.group.WORLD
    seen = {"batches": check(group, device)}
    if device.type == "cuda":
        seen["layout_and_wait_us"] = {tokens: host_time(group, device, tokens) for tokens in (2048, 4096, 16384)}
    if rank == 0 or device.type == "cpu":
        print(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
