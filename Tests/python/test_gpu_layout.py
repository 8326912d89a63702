"""Planner.layout() on a GPU: the CPU's bits, also in captured graphs, and the time it takes. For two GPUs and a real exchange see
layout_worker.py."""

from __future__ import annotations

import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import lplb
from lplb import Planner, _c
from test_layout import counts_of, random_case

pytestmark = pytest.mark.gpu


def same(cpu, gpu):
    """Two layouts are equal bit for bit: arrays, numbers, and what wait() says."""
    assert cpu.wait() == gpu.wait()
    numbers = _c.LAYOUT_RANKS + len(cpu.wait().sent) * 2 + len(cpu.wait().rows)
    assert torch.equal(cpu._words[:numbers], gpu._words[:numbers].cpu())
    for name in ("order", "sent_rows", "received_rows", "ends", "by_row"):
        assert torch.equal(getattr(cpu, name), getattr(gpu, name).cpu()), name


def run_gathered(planner, ids, rows):
    """run() for all ranks' rows, as where torch.distributed has brought them."""
    handle, out = planner._handle, torch.empty_like(ids)
    handle.check(handle.library.planner_run(handle.opened(), ids.data_ptr(), int(ids.dtype is torch.int64), ids.numel(), rows.data_ptr(),
                                            out.data_ptr(), None, 1, 0, planner._stream()))
    return out


def rows_of(planner, counts):
    handle, counts = planner._handle, counts.int().to(planner.device).contiguous()
    rows = torch.zeros(len(counts), handle.width, dtype=torch.int32, device=planner.device)
    for row, mine in zip(rows, counts):
        handle.check(handle.library.planner_make_row(handle.opened(), mine.data_ptr(), 0, row.data_ptr(), planner._stream()))
    return rows


@pytest.mark.parametrize("seed", range(40))
def test_bits_are_the_cpu_s(seed):
    random, make, n_logical, ids = random_case(seed)
    counts = torch.stack([counts_of(one, n_logical) for one in ids])
    for rank in dict.fromkeys([0, len(ids) - 1, len(ids) // 2]):
        cpu, gpu, mine = make(rank), make(rank, "cuda"), ids[rank]
        n_local = cpu.n_local_routed_experts
        more = n_local + int(random.integers(0, 4))
        table = torch.tensor(np.concatenate([random.permutation(more)[:n_local] for _ in ids]),
                             dtype=random.choice([torch.int32, torch.int64]))
        for way in ("solve", "run") if cpu.n_routed_experts > n_logical else ("solve",):
            if way == "solve":
                for planner in (cpu, gpu):
                    planner.solve(counts.to(planner.device))
                physical, theirs = cpu.redirect(mine), gpu.redirect(mine.cuda())
            else:
                physical = run_gathered(cpu, mine, rows_of(cpu, counts))
                theirs = run_gathered(gpu, mine.cuda(), rows_of(gpu, counts))
            assert torch.equal(physical, theirs.cpu())
            same(cpu.layout(physical, experts=mine), gpu.layout(theirs, experts=mine.cuda()))
            same(cpu.layout(physical, row_of_slot=table, n_rows=more), gpu.layout(theirs, row_of_slot=table.cuda(), n_rows=more))
            received = cpu.layout(physical).received_rows
            same(cpu.layout(physical, received=lambda sent: received), gpu.layout(theirs, received=lambda sent: received.cuda()))
            total = int(received.sum()) + 3
            same(cpu.layout(physical, max_received=total), gpu.layout(theirs, max_received=total))


def large(device, ranks=64, rank=5):
    random, experts = np.random.default_rng(1), min(4 * ranks, 1024)
    slots = random.permutation(np.concatenate([np.arange(experts), random.integers(0, experts, ranks)]))
    return Planner.from_placement(torch.tensor(slots), ep_size=ranks, device=device, n_nodes=ranks // 8, rank=rank)


@pytest.mark.parametrize("tokens,ranks,n_rows", [(16384, 64, 16), (200000, 64, 5), (3, 64, 128), (4096, 8, 1024), (16384, 512, 16)])
def test_large(tokens, ranks, n_rows):
    """More keys than threads and than a block's usual shared memory; more choices than a block sorts at once."""
    cpu, gpu = large("cpu", ranks), large("cuda", ranks)
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, cpu.n_logical_routed_experts, (tokens, 8), dtype=torch.int32, generator=generator)
    ids[: tokens // 3] = 7
    counts = torch.stack([torch.randint(0, 90, (cpu.n_logical_routed_experts,), generator=generator) for _ in range(ranks)])
    counts[5] = counts_of(ids, cpu.n_logical_routed_experts)
    cpu.solve(counts)
    gpu.solve(counts.cuda())
    physical, theirs = cpu.redirect(ids), gpu.redirect(ids.cuda())
    table = torch.cat([torch.randperm(n_rows, generator=generator)[: cpu.n_local_routed_experts] for _ in range(ranks)])
    same(cpu.layout(physical, experts=ids, row_of_slot=table, n_rows=n_rows),
         gpu.layout(theirs, experts=ids.cuda(), row_of_slot=table.cuda(), n_rows=n_rows))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_captured_graphs(dtype):
    """Plan and layout in one graph, replayed for other ids."""
    ranks, tokens = 8, 1000
    cpu, gpu = large("cpu", ranks), large("cuda", ranks)
    n_logical = cpu.n_logical_routed_experts
    ids = torch.zeros(tokens, 4, dtype=dtype, device="cuda")
    counts = torch.zeros(ranks, n_logical, dtype=torch.int64, device="cuda")
    counts[5, 0] = ids.numel()

    def plan():
        gpu.solve(counts)
        return gpu.layout(gpu.redirect(ids), experts=ids, max_received=6000)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        plan().wait()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            layout = plan()
    torch.cuda.synchronize()
    generator = torch.Generator().manual_seed(3)
    for most in (n_logical, 3, 1, 0):
        mine = torch.randint(-1, max(most, 0), (tokens, 4), generator=generator) if most else torch.full((tokens, 4), -1)
        everyone = torch.randint(0, 20, (ranks, n_logical), generator=generator)
        everyone[5] = counts_of(mine, n_logical)
        ids.copy_(mine)
        counts.copy_(everyone)
        graph.replay()
        cpu.solve(everyone)
        same(cpu.layout(cpu.redirect(mine.to(dtype)), experts=mine.to(dtype), max_received=6000), layout)
    ids[0, 0] = 1  # which were not counted
    counts[5] = 0
    graph.replay()
    with pytest.raises(lplb.WrongOrder, match="physical must be the ids of the planner's latest plan"):
        layout.wait()


def test_errors_come_with_the_numbers():
    gpu = Planner.from_placement(torch.tensor([0, 1, 2, 0, 3, 1]), ep_size=2, device="cuda", rank=0)
    ids = torch.tensor([[0, 1], [2, 3], [0, -1]], device="cuda")
    zeros = torch.zeros(2, 3, dtype=torch.int32, device="cuda")
    with pytest.raises(lplb.WrongOrder, match="there is no plan for this placement yet"):
        gpu.layout(ids)
    first = gpu.run(ids, None)
    kept = gpu.layout(first)
    gpu.run(ids[1:], None)
    for kind, words, physical, options in (
            (lplb.WrongOrder, "layout: physical must be the ids of the planner's latest plan", first, {}),
            (ValueError, "physical: must be -1 .. 5, slots of the planner's placement, got 3 ids that are not", ids - 2, {}),
            (ValueError, "got 1 ids of other experts", first, {"experts": torch.where(ids < 0, 0, ids)}),
            (ValueError, "received: must return numbers of rows", first, {"received": lambda sent: zeros - 1}),
            (ValueError, "received: must return numbers of rows", first, {"received": lambda sent: zeros + 2**30})):
        layout = gpu.layout(physical, **options)  # does not wait
        with pytest.raises(kind) as raised:
            layout.wait()
        assert words in str(raised.value), raised.value
    short = gpu.layout(gpu.run(ids, None), max_received=1)
    with pytest.raises(ValueError, match="max_received: must be at least the number of rows that are received, got 1, and"):
        short.wait()
    assert sum(kept.wait().sent) == 5
    gpu.update_placement(torch.tensor([3, 1, 2, 0, 3, 1]))
    with pytest.raises(lplb.WrongOrder, match="there is no plan for this placement yet"):
        gpu.layout(torch.full_like(ids, -1)).wait()


def microseconds(call, repeats=30):
    """Of one call in a graph of 20."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(20):
                call()
        graph.replay()
        stream.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        end.synchronize()
    return 1000 * begin.elapsed_time(end) / (20 * repeats)


@pytest.mark.parametrize("tokens", [2048, 4096, 16384])
def test_time(tokens, note):
    gpu = large("cuda")
    ids = torch.randint(0, gpu.n_logical_routed_experts, (tokens, 8), device="cuda")
    counts = torch.full((64, gpu.n_logical_routed_experts), tokens * 8 // gpu.n_logical_routed_experts, device="cuda")
    counts[5] = counts_of(ids, gpu.n_logical_routed_experts)
    gpu.solve(counts)
    physical = gpu.redirect(ids)
    table = torch.arange(gpu.n_routed_experts, device="cuda") % 5
    in_graph = {name: microseconds(lambda: gpu.layout(physical, experts=ids, row_of_slot=table, **options))
                for name, options in (("without by_row", {}), ("with by_row", {"max_received": 12 * tokens}))}
    waited = []
    for _ in range(60):
        torch.cuda.synchronize()
        began = time.perf_counter()
        layout = gpu.layout(physical, experts=ids, row_of_slot=table)
        layout.wait()
        layout.by_row
        waited.append(1e6 * (time.perf_counter() - began))
    note(f"layout of {tokens} x 8 over 64 ranks: " + ", ".join(f"{value:.1f} us {name}" for name, value in in_graph.items())
         + f" on the GPU; {np.median(waited[10:]):.0f} us of the host until wait() has returned and by_row is queued")
    assert np.median(waited[10:]) < 1000
