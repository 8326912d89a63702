"""What planners record on a GPU: history and metrics, the same bits as on the CPU and as in Python, also from CUDA graphs."""

from __future__ import annotations

import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import both_devices
import oracle

import lplb
from lplb import Planner, WrongOrder
from lplb.topology import CUBE_8P2E, torus_2d

pytestmark = pytest.mark.gpu

RECORDS = {"history": True, "metrics": True}


def general(ep_size, slots, most, device="cuda", rank=None, **more):
    phy2log, n_logical = oracle.random_placement(np.random.default_rng(ep_size), ep_size, slots, most)
    return Planner.from_placement(torch.from_numpy(phy2log), ep_size=ep_size, n_logical=n_logical, device=device, rank=rank, **RECORDS, **more)


def planners():
    """One for each solver, and for one group and several."""
    return {
        "cube": lambda device, rank: Planner(CUBE_8P2E, 272, 256, 8, device=device, rank=rank, **RECORDS),
        "4 cubes": lambda device, rank: Planner(CUBE_8P2E, 320, 256, 32, device=device, rank=rank, n_nodes=4, **RECORDS),
        "64 cubes": lambda device, rank: Planner(CUBE_8P2E, 2048, 1024, 512, device=device, rank=rank, **RECORDS),
        "torus 8x8": lambda device, rank: Planner(torus_2d(8, 8), 256 + 128, 256, 64, device=device, rank=rank, **RECORDS),
        "pairs": lambda device, rank: Planner.from_placement(
            Planner(CUBE_8P2E, 272, 256, 8, device="cpu").phy2log, ep_size=8, device=device, rank=rank, **RECORDS),
        "general 32": lambda device, rank: general(32, 9, 6, device, rank),
        "general 100": lambda device, rank: general(100, 4, 5, device, rank),
    }


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("name", planners())
def test_records_are_those_of_python_and_of_the_cpu(name, rank):
    pair = [planners()[name](device, rank) for device in ("cpu", "cuda")]
    for planner in pair:
        both_devices.check_records(np.random.default_rng(7), planner, (0, 1000, 20_000, 150_000))  # one launch, and several
    cpu, gpu = pair
    assert both_devices.raw_metrics(cpu) == both_devices.raw_metrics(gpu) and cpu.metrics() == gpu.metrics()
    assert torch.equal(cpu.history(), gpu.history().cpu())


def test_graphs_of_two_planners_with_resets_and_a_new_placement():
    """Replays add up; a reset between them, on the stream or in a graph of its own, starts anew; a placement changes nothing."""
    rng = np.random.default_rng(3)
    cpus, gpus = ([general(32, 9, 6, device), general(16, 18, 4, device)] for device in ("cpu", "cuda"))
    ids = [torch.from_numpy(rng.integers(0, each.n_logical_routed_experts, 5000)) for each in cpus]
    given, stream = [each.cuda() for each in ids], torch.cuda.Stream()
    graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for gpu, each in zip(gpus, given):
            gpu.run(each, None)  # loads the kernels
        graphs[0].capture_begin()
        for _ in range(3):
            for gpu, each in zip(gpus, given):
                gpu.run(each, None)
        graphs[0].capture_end()
        graphs[1].capture_begin()
        for gpu in gpus:
            gpu.reset_metrics()
        graphs[1].capture_end()
        assert [gpu.history(at=1, reset=True).sum().item() for gpu in gpus] == [5000, 5000]
        graphs[1].replay()
        for _ in range(5):
            graphs[0].replay()
        placements = [torch.roll(gpu.phy2log, gpu.n_local_routed_experts) for gpu in gpus]
        for gpu, placement in zip(gpus, placements):
            gpu.update_placement(placement)
        for _ in range(2):
            graphs[0].replay()
        stream.synchronize()
        for cpu, gpu, each, placement in zip(cpus, gpus, ids, placements):
            for plan in range(21):
                if plan == 15:
                    cpu.update_placement(placement.cpu())
                cpu.run(each, None)
            assert both_devices.raw_metrics(gpu) == both_devices.raw_metrics(cpu)
            assert torch.equal(gpu.history(at=21).cpu(), cpu.history(at=21))
            with pytest.raises(WrongOrder, match="at: must be the number of plans .*, got 20 where there are 21"):
                gpu.history(at=20)
        graphs[1].replay()
        graphs[0].replay()
        stream.synchronize()
        assert [gpu.metrics().plans for gpu in gpus] == [3, 3] and gpus[0].metrics().tokens == 15000
        assert torch.equal(lplb.history(gpus[:1], at=24, reset=True)[0].cpu(), 24 * torch.bincount(ids[0], minlength=cpus[0].n_logical_routed_experts))
        assert not gpus[0].history(at=0).any()


def test_beyond_31_bits_and_uncertified():
    gpu = Planner(CUBE_8P2E, 320, 256, 32, device="cuda", **RECORDS)
    kept = both_devices.Expected(gpu)
    for loads in (torch.full((256,), 1 << 24, dtype=torch.int64), torch.cat([torch.full((64,), 1 << 36), torch.arange(192)])):
        gpu.solve(loads.cuda())
        kept.add(loads)
        kept.check()
    assert gpu.metrics().overflow == 0 + 1
    method = Planner(CUBE_8P2E, 272, 256, 8, device="cuda", solver="ipm", **RECORDS)
    kept = both_devices.Expected(method)
    for seed in range(20):
        loads = torch.from_numpy(np.random.default_rng(seed).integers(0, 1000, 256))
        method.solve(loads.cuda())
        kept.add(loads)
    kept.check()


def test_metrics_are_read_whole_while_kernels_write_them():
    gpu = Planner(CUBE_8P2E, 272, 256, 8, device="cuda", rank=2, **RECORDS)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 4096)).cuda()
    gpu.run(ids, None)
    torch.cuda.synchronize()
    one, stream, graph = both_devices.raw_metrics(gpu), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    gpu.reset_metrics()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        for _ in range(200):
            gpu.run(ids, None)
        graph.capture_end()
        for _ in range(500):
            graph.replay()
    seen, reads, wrong = set(), [0], []

    def watch():
        while not stream.query():
            now = both_devices.raw_metrics(gpu)
            plans = now["plans"]
            whole = {name: value if name.endswith("max") else plans * value for name, value in one.items()}
            if plans and now != whole or seen and plans < max(seen):
                wrong.append(now)
            seen.add(plans)
            reads[0] += 1

    others = [threading.Thread(target=watch) for _ in range(1)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert not wrong, f"of {one}: {wrong[:3]}"
    assert len(seen) > 100, f"{len(seen)} different snapshots in {reads[0]} reads"
    stream.synchronize()
    assert gpu.metrics().plans == 200 * 500 and gpu.history(at=200 * 500 + 1)[0] == (200 * 500 + 1) * (ids == 0).sum()


def test_histories_of_ranks_that_differ_are_the_cpus():
    """A planner that keeps a history and whose ranks differ, in a graph from before the ranks differed."""
    slots = torch.from_numpy(np.concatenate([np.arange(64), np.arange(16)]).astype(np.int64))
    gpu, cpu = (Planner.from_placement(slots.to(device), ep_size=8, history=True, device=device) for device in ("cuda", "cpu"))
    ids = torch.from_numpy(np.random.default_rng(3).zipf(1.5, 6000) % 64)
    for planner in (gpu, cpu):
        planner.set_capacity()
    graph, there = torch.cuda.CUDAGraph(), ids.cuda()
    gpu.run(there, None)
    with torch.cuda.graph(graph):
        out = gpu.run(there, None)
    cpu.run(ids, None)
    for speed in ([1024] * 7 + [300], [800] + [1024] * 7):
        for planner in (gpu, cpu):
            planner.set_capacity(speed=speed)
        graph.replay()
        assert torch.equal(out.cpu(), cpu.run(ids, None))
        assert torch.equal(gpu.run(there, None).cpu(), cpu.run(ids, None))
        graph.replay()
        cpu.run(ids, None)
    assert torch.equal(gpu.history().cpu(), cpu.history())
