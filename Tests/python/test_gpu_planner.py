"""The planner on a GPU: the same bits as on the CPU, in every way it can be called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch")

import both_devices
from lplb import Planner
from lplb.errors import Disagreement, LplbError
from lplb.topology import CUBE_8P2E, HYPERCUBE_16P2E, RING_8P, SQUARE_4P2E, torus_2d

pytestmark = pytest.mark.gpu

SELF_COPIES = torch.tensor([[0, 1], [1, 0], [3, 2], [2, 3]])


def topologies():
    """name -> (r2o, ep_size, n_logical, combined, n_nodes)"""
    return {
        "ring": (RING_8P, 8, 64, 1, 1), "cube": (CUBE_8P2E, 8, 256, 1, 1), "cube, 3 a class": (CUBE_8P2E, 8, 128, 3, 2),
        "4 cubes": (CUBE_8P2E, 32, 256, 1, 4), "hypercube": (HYPERCUBE_16P2E, 16, 128, 1, 2), "square": (SQUARE_4P2E, 4, 40, 5, 1),
        "2 rings": (RING_8P, 16, 48, 3, 2), "torus 8x4": (torus_2d(8, 4), 32, 256, 1, 4), "torus 8x8": (torus_2d(8, 8), 64, 256, 2, 8),
        "torus 16x16": (torus_2d(16, 16), 256, 512, 1, 32), "self copies": (SELF_COPIES, 4, 16, 2, 1),
    }


def pair(r2o, ep_size, n_logical, combined, n_nodes, rank=None, **more):
    n_physical = n_logical + ep_size * combined * r2o.shape[1]
    return [Planner(r2o, n_physical, n_logical, ep_size, n_nodes=n_nodes, rank=rank, device=device, **more) for device in ("cpu", "cuda")]


def general_pair(rng, ep_size, slots, most, n_nodes=1, rank=None):
    phy2log, n_logical = oracle.random_placement(rng, ep_size, slots, most)
    sizes = {"ep_size": ep_size, "n_logical": n_logical, "n_nodes": n_nodes, "rank": rank}
    return [Planner.from_placement(torch.from_numpy(phy2log), device=device, **sizes) for device in ("cpu", "cuda")]


def random_ids(rng, n_logical, count, dtype=torch.int64):
    """Skewed, with some -1."""
    weight = oracle.random_loads(rng, n_logical, rng.choice(oracle.FAMILIES)).astype(float) + 1e-9
    ids = rng.choice(n_logical, size=count, p=weight / weight.sum())
    ids[rng.random(count) < 0.03] = -1
    return torch.from_numpy(ids).to(dtype)


def assert_same_plan(cpu, gpu):
    assert torch.equal(cpu.split(), gpu.split().cpu())
    assert torch.equal(cpu.assignment(), gpu.assignment().cpu())
    ours, theirs = cpu.info(), gpu.info()
    assert ours == theirs
    assert all(group.certified for group in theirs.groups)


def check_run(rng, cpu, gpu, count, dtype=torch.int64, counter_dtype=torch.int64):
    ids = random_ids(rng, cpu.n_logical_routed_experts, count, dtype)
    counters = torch.zeros(1, dtype=counter_dtype), torch.zeros(1, dtype=counter_dtype, device="cuda")
    expected = cpu.run(ids, counters[0])
    actual = gpu.run(ids.cuda(), counters[1])
    assert actual.dtype == dtype and torch.equal(expected, actual.cpu())
    assert counters[0].item() == counters[1].item() == cpu.n_group
    if cpu.n_routed_experts > cpu.n_logical_routed_experts:
        assert_same_plan(cpu, gpu)


@pytest.mark.parametrize("name", topologies())
def test_run_on_topologies_is_the_cpu_s(name):
    rng = np.random.default_rng(list(topologies()).index(name))
    cpu, gpu = pair(*topologies()[name])
    if name == "self copies":
        counts = (0, 1, 31, 1000)
    else:
        counts = [0, 1, 2, 31, 33, 255, 1023, 1025, 4096, 4099, 32768, 32771, 131072, 262147] + [int(c) for c in rng.integers(1, 20000, 30)]
    for i, count in enumerate(counts):
        if i % 10 == 9:
            history = torch.from_numpy(oracle.random_loads(rng, cpu.n_logical_routed_experts, "log-normal"))
            assert all(torch.equal(a, b.cpu()) for a, b in zip(
                cpu.update_redundancy_mapping(history), gpu.update_redundancy_mapping(history.cuda()), strict=True))
        check_run(rng, cpu, gpu, count, torch.int32 if i % 3 == 0 else torch.int64, torch.int32 if i % 2 else torch.int64)


GENERAL = [
    (8, 10, 3), (8, 6, 20), (1, 5, 2), (3, 7, 4), (32, 9, 4), (32, 10, 12), (64, 5, 8), (64, 16, 3), (100, 4, 5), (128, 8, 30), (512, 8, 8)]


@pytest.mark.parametrize("ep_size, slots, most", GENERAL)
def test_run_on_general_placements_is_the_cpu_s(ep_size, slots, most):
    rng = np.random.default_rng(ep_size * 1000 + slots)
    for _ in range(6):
        cpu, gpu = general_pair(rng, ep_size, slots, most)
        if cpu.n_logical_routed_experts > 1024:
            continue
        for count in (0, 7, 1000, 5000, 40000):
            if count or cpu.n_logical_routed_experts < cpu.n_routed_experts:
                check_run(rng, cpu, gpu, count)


def test_the_largest_sizes():
    rng = np.random.default_rng(5)
    phy2log = rng.permutation(np.concatenate([np.arange(1024), rng.choice(1024, 3072, p=rng.dirichlet(np.full(1024, 0.2)))]))
    for ep_size in (512, 64, 8):
        cpu, gpu = (Planner.from_placement(torch.from_numpy(phy2log), ep_size=ep_size, n_logical=1024, device=d) for d in ("cpu", "cuda"))
        for family in oracle.FAMILIES:
            loads = torch.from_numpy(oracle.random_loads(rng, 1024, family))
            cpu.solve(loads)
            gpu.solve(loads.cuda())
            assert_same_plan(cpu, gpu)
        check_run(rng, cpu, gpu, 100_000)
    with pytest.raises(LplbError, match="n_logical.*1024"):
        Planner.from_placement(torch.arange(2048), ep_size=8, device="cuda")


@pytest.mark.parametrize("name", topologies())
def test_thousands_of_solves(name):
    """Loads of all kinds; ratios and scaled loads too."""
    rng = np.random.default_rng(len(name))
    cpu, gpu = pair(*topologies()[name])
    for i in range(300):
        loads = torch.from_numpy(oracle.random_loads(rng, cpu.n_logical_routed_experts, oracle.FAMILIES[i % len(oracle.FAMILIES)]))
        loads = loads if i % 2 else loads.int()
        expected = cpu.solve_probs(loads, None)
        actual = gpu.solve_probs(loads.cuda(), None)
        for ours, theirs in zip(expected, actual, strict=True):
            assert torch.equal(ours.view(torch.int32), theirs.cpu().view(torch.int32))
        assert_same_plan(cpu, gpu)


@pytest.mark.parametrize("case", ["cube", "4 cubes", "torus 8x4", "2 rings", "general", "general 100"])
def test_many_sources(case):
    """Counts of all ranks: the tokens of one of them."""
    rng = np.random.default_rng(11)
    for rank in (0, 3, 7):
        if case.startswith("general"):
            cpu, gpu = general_pair(rng, *((100, 4, 9, 10) if "100" in case else (16, 10, 7, 4)), rank=rank)
        else:
            cpu, gpu = pair(*topologies()[case], rank=rank)
        for _ in range(20):
            ids = [random_ids(rng, cpu.n_logical_routed_experts, int(rng.integers(0, 2000))) for _ in range(cpu.ep_size)]
            counts = torch.stack([torch.bincount(i[i >= 0], minlength=cpu.n_logical_routed_experts) for i in ids]).int()
            cpu.solve(counts)
            gpu.solve(counts.cuda())
            assert_same_plan(cpu, gpu)
            assert torch.equal(cpu.redirect(ids[rank]), gpu.redirect(ids[rank].cuda()).cpu())


def test_by_ratios():
    rng = np.random.default_rng(3)
    for name in ("cube", "cube, 3 a class", "4 cubes", "self copies"):
        cpu, gpu = pair(*topologies()[name])
        for count in (0, 1, 100, 5000, 65536):
            for blocks in (1, 7, 132):
                ids = random_ids(rng, cpu.n_logical_routed_experts, count)
                counts, cumulative = cpu.count_workload(ids, blocks)
                counts_gpu, cumulative_gpu = gpu.count_workload(ids.cuda(), blocks)
                assert torch.equal(counts, counts_gpu.cpu()) and torch.equal(cumulative, cumulative_gpu.cpu())
                ratios = torch.rand(cpu.n_group, cpu.group_size, cpu.num_redundants) * 1.4 - 0.2
                ratios.view(-1)[:2] = torch.tensor([float("nan"), 1.0])
                expected = cpu.weighted_select_target(ids, ratios, cumulative, blocks)
                assert torch.equal(expected, gpu.weighted_select_target(ids.cuda(), ratios.cuda(), cumulative_gpu, blocks).cpu())


def test_invalid_ids_are_counted_and_come_back_as_none():
    cpu, gpu = pair(*topologies()["cube"])
    ids = torch.tensor([0, 255, 256, -1, -2, 2**62, -2**62, 1 << 32, 17] * 500)
    assert torch.equal(cpu.run(ids, None), gpu.run(ids.cuda(), None).cpu())
    assert gpu.info().invalid_ids == cpu.info().invalid_ids == 5 * 500
    strict = pair(*topologies()["cube"], debug=True)[1]
    with pytest.raises(LplbError, match="ids"):
        strict.run(ids.cuda(), None)
    strict.run(torch.zeros(5, dtype=torch.int64, device="cuda"), None)


def small_and_large():
    """Pairs of planners that run the same kernels, the first with more shared memory: name -> two ways to make one."""
    def placed(ep_size, slots):
        phy2log = torch.arange(ep_size * slots) % (2 * ep_size)
        return lambda device: Planner.from_placement(phy2log, ep_size=ep_size, n_logical=2 * ep_size, device=device)

    def cubes(n_logical, **more):
        return lambda device: Planner(CUBE_8P2E, n_logical + 16, n_logical, 8, device=device, **(more if device == "cuda" else {}))

    return {
        "issue": (cubes(256), cubes(64)), "one word": (placed(16, 200), placed(16, 4)), "two words": (placed(48, 40), placed(48, 4)),
        "scan": (placed(80, 20), placed(80, 4)), "ipm": (cubes(256, solver="ipm"), cubes(64, solver="ipm")),
    }


@pytest.mark.parametrize("name", small_and_large())
def test_a_smaller_planner_takes_nothing_from_a_larger_one(name):
    """What an attribute of a kernel is set to holds for all planners."""
    rng = np.random.default_rng(9)
    large, small = small_and_large()[name]
    cpu, gpu = large("cpu"), large("cuda")
    later = small("cuda")
    for planner in (gpu, later, gpu):
        n_logical = planner.n_logical_routed_experts
        loads = torch.from_numpy(oracle.random_loads(rng, n_logical, "zipf"))
        planner.solve(loads.cuda())
        planner.redirect(torch.arange(n_logical, device="cuda"))
        ids = random_ids(rng, n_logical, 200_000 * 8)
        out = planner.run(ids.cuda(), None)
        assert torch.equal(planner.phy2log.cpu()[out[ids.cuda() >= 0].cpu()].long(), ids[ids >= 0])
        if planner is gpu and name != "ipm":
            assert torch.equal(cpu.run(ids, None), out.cpu())
            cpu.solve(loads)
            gpu.solve(loads.cuda())
            assert_same_plan(cpu, gpu)


def test_invalid_ids_count_once_however_they_are_planned():
    both_devices.check_invalid_ids_count_once("cuda")


def test_replicas_on_one_rank_are_planned_like_any():
    both_devices.check_replicas_on_one_rank("cuda")


def test_shapes_offsets_and_block_limits():
    rng = np.random.default_rng(8)
    cpu, gpu = pair(*topologies()["cube"])
    base = random_ids(rng, 256, 40_000)
    for ids in (base.view(100, 50, 8), base[1:], base[3:4098], base[:0], base.view(5000, 8).T, base[:1].view(())):
        expected = cpu.run(ids, None)
        for n_sms in (None, 1, 3, 100, 132, 5000):
            actual = gpu.run(ids.cuda(), None, n_sms)
            assert actual.shape == ids.shape and torch.equal(expected, actual.cpu())
    narrow = base.int()
    for start in (1, 2, 3):
        assert torch.equal(cpu.run(narrow[start:], None), gpu.run(narrow.cuda()[start:], None).cpu())


def test_without_replicas_the_ids_are_rewritten():
    rng = np.random.default_rng(1)
    history = torch.from_numpy(oracle.random_loads(rng, 64, "zipf"))
    planners = [Planner(torch.empty(8, 0, dtype=torch.int32), 64, 64, 8, device=device) for device in ("cpu", "cuda")]
    for planner in planners:
        planner.update_redundancy_mapping(history)
    for count in (0, 5, 4096, 100_001):
        ids = random_ids(rng, 64, count)
        assert torch.equal(planners[0].run(ids, None), planners[1].run(ids.cuda(), None).cpu())


def captured(planner, ids, counter):
    planner.run(ids, counter)  # once outside: loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        out = planner.run(ids, counter)
    return graph, out


@pytest.mark.parametrize("name, count", [("cube", 32768), ("cube", 300_000), ("4 cubes", 5000), ("torus 8x8", 32768)])
def test_graphs_replay_with_new_ids_and_new_placements(name, count):
    rng = np.random.default_rng(21)
    cpu, gpu = pair(*topologies()[name])
    ids = random_ids(rng, cpu.n_logical_routed_experts, count)
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    given = ids.cuda()
    graph, out = captured(gpu, given, counter)
    counter.zero_()
    for i in range(20):
        if i == 10:  # the tables change under the graph
            history = torch.from_numpy(oracle.random_loads(rng, cpu.n_logical_routed_experts, "log-normal"))
            cpu.update_redundancy_mapping(history)
            gpu.update_redundancy_mapping(history)
        ids = random_ids(rng, cpu.n_logical_routed_experts, count)
        given.copy_(ids)
        graph.replay()
        assert torch.equal(cpu.run(ids, None), out.cpu())
        assert_same_plan(cpu, gpu)
    assert counter.item() == 20 * gpu.n_group


def test_general_placement_changes_under_a_graph():
    rng = np.random.default_rng(22)
    phy2log = [torch.from_numpy(rng.permutation(np.concatenate([np.arange(64), rng.integers(0, 64, 32)]))) for _ in range(6)]
    cpu, gpu = (Planner.from_placement(phy2log[0], ep_size=16, n_logical=64, device=device) for device in ("cpu", "cuda"))
    given = random_ids(rng, 64, 8192).cuda()
    graph, out = captured(gpu, given, None)
    for placement in phy2log:
        cpu.update_placement(placement)
        gpu.update_placement(placement)
        ids = random_ids(rng, 64, 8192)
        given.copy_(ids)
        graph.replay()
        assert torch.equal(cpu.run(ids, None), out.cpu())


def test_ten_thousand_runs_give_one_result():
    rng = np.random.default_rng(30)
    gpu = pair(*topologies()["cube"])[1]
    ids = random_ids(rng, 256, 32768).cuda()
    first = gpu.run(ids, None)
    different = torch.zeros(1, dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        for _ in range(100):
            different += (gpu.run(ids, None) != first).sum()
    for _ in range(100):
        graph.replay()
    assert different.item() == 0


def test_four_streams_at_once():
    rng = np.random.default_rng(40)
    pairs = [pair(*topologies()[name]) for name in ("cube", "4 cubes", "hypercube", "torus 8x4")]
    batches = [[random_ids(rng, cpu.n_logical_routed_experts, 20_000) for _ in range(25)] for cpu, _ in pairs]
    on_gpu = [[ids.cuda() for ids in batch] for batch in batches]
    streams = [torch.cuda.Stream() for _ in pairs]
    torch.cuda.synchronize()
    results = [[] for _ in pairs]
    for step in range(25):
        for i, (_, gpu) in enumerate(pairs):
            with torch.cuda.stream(streams[i]):
                results[i].append(gpu.run(on_gpu[i][step], None))
    torch.cuda.synchronize()
    for (cpu, _), batch, outs in zip(pairs, batches, results, strict=True):
        for ids, out in zip(batch, outs, strict=True):
            assert torch.equal(cpu.run(ids, None), out.cpu())


def test_work_follows_the_current_stream():
    """The input is written on the stream just before; a call on another stream would read the old one."""
    rng = np.random.default_rng(41)
    cpu, gpu = pair(*topologies()["cube"])
    ids = random_ids(rng, 256, 32768)
    fresh, given = ids.cuda(), torch.zeros(32768, dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        given.copy_(fresh)
        out = gpu.run(given, None)
        copy = out.clone()
    stream.synchronize()
    assert torch.equal(cpu.run(ids, None), copy.cpu())


def test_compiled():
    rng = np.random.default_rng(50)
    cpu, gpu = pair(*topologies()["cube"])
    counter = torch.zeros(1, dtype=torch.int32, device="cuda")
    step = torch.compile(lambda ids: gpu.run(ids + 0, counter) + 0, fullgraph=True)
    for _ in range(3):
        ids = random_ids(rng, 256, 4096)
        assert torch.equal(cpu.run(ids, None), step(ids.cuda()).cpu())
    assert counter.item() == 3


def test_errors_name_the_argument():
    gpu = pair(*topologies()["cube"])[1]
    with pytest.raises(LplbError, match="(?i)device|cuda"):
        gpu.run(torch.zeros(4, dtype=torch.int64), None)
    with pytest.raises(LplbError, match="(?i)device|cuda"):
        gpu.run(np.zeros(4, dtype=np.int64), None)
    with pytest.raises(LplbError, match="avail_counter"):
        gpu.run(torch.zeros(4, dtype=torch.int64, device="cuda"), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(LplbError):
        Planner(CUBE_8P2E, 272, 256, 8, device=f"cuda:{torch.cuda.device_count()}")


def test_every_device_of_the_machine():
    rng = np.random.default_rng(60)
    cpu, _ = pair(*topologies()["cube"])
    ids = random_ids(rng, 256, 10_000)
    expected = cpu.run(ids, None)
    for device in range(torch.cuda.device_count()):
        gpu = Planner(CUBE_8P2E, 272, 256, 8, device=f"cuda:{device}")
        assert torch.equal(expected, gpu.run(ids.to(f"cuda:{device}"), None).cpu())


def test_totals_beyond_31_bits_stay_at_the_originals():
    _, gpu = pair(*topologies()["cube"])
    loads = torch.full((256,), 1 << 24, dtype=torch.int64, device="cuda")
    gpu.solve(loads)
    assert gpu.info().overflow == 1
    ids = torch.arange(256, device="cuda")
    slots = gpu.redirect(ids)
    assert torch.equal(gpu.phy2log[slots].long(), ids) and (slots % 34 < 32).all()


@pytest.mark.parametrize("case", ["4 cubes", "2 rings", "general"])
@pytest.mark.parametrize("count", [3000, 200_000])
def test_a_group_beyond_31_bits_leaves_the_others_alone(case, count):
    """In one launch and in several, as solve says group by group."""
    rng = np.random.default_rng(80)
    make = (lambda: general_pair(np.random.default_rng(80), 16, 10, 7, 4, rank=3)) if case == "general" else (
        lambda: pair(*topologies()[case], rank=3))
    (cpu, gpu), (_, apart) = make(), make()
    n_logical, slots_of_group = cpu.n_logical_routed_experts, cpu.group_size * cpu.n_local_routed_experts
    group_of = torch.zeros(n_logical, dtype=torch.int64)
    group_of[cpu.phy2log.long()] = torch.arange(cpu.n_routed_experts) // slots_of_group
    ids = random_ids(rng, n_logical, count)
    for heavy in ([], [0], [cpu.n_group - 1]):
        counts = torch.from_numpy(rng.integers(0, 50, (cpu.ep_size, n_logical)))
        for group in heavy:  # the total of the group, or one expert of it by itself
            experts = (group_of == group).nonzero().view(-1)[: 1 if group else None]
            counts[:, experts] = 2**31 // (len(experts) * (cpu.ep_size - 1)) + 1
        counts[3] = torch.bincount(ids[ids >= 0], minlength=n_logical)
        before, counters = gpu.info().overflow if heavy else 0, torch.zeros(2, 1, dtype=torch.int64, device="cuda")
        out = both_devices.run_gathered(gpu, ids.cuda(), counts, counters[0])
        apart.solve(counts.cuda(), counters[1])
        assert torch.equal(out, apart.redirect(ids.cuda()))
        assert counters.tolist() == [[cpu.n_group - len(heavy)]] * 2
        assert torch.equal(gpu.split(), apart.split()) and torch.equal(gpu.assignment(), apart.assignment())
        ours, theirs = gpu.info(), apart.info()
        assert ours.groups == theirs.groups and ours.locality == theirs.locality and ours.overflow == theirs.overflow
        assert ours.overflow - before == len(heavy)
        cpu.solve(counts)
        split, assignment = cpu.split().view(cpu.n_group, -1), cpu.assignment().view(cpu.n_group, -1)
        for group, info in enumerate(cpu.info().groups):
            slots = slice(group * slots_of_group, (group + 1) * slots_of_group)
            if group in heavy:
                assert ours.groups[group].total == 0
                originals = cpu.mapping()[1][:, 0][group_of == group].long()
                assert torch.equal(gpu.assignment().cpu()[originals], counts[3][group_of == group])
                assert gpu.assignment()[slots].sum() == counts[3][group_of == group].sum()
            else:
                assert ours.groups[group] == info
                assert torch.equal(gpu.split()[slots].cpu(), split[group])
                assert torch.equal(gpu.assignment()[slots].cpu(), assignment[group])


def test_the_reference_s_example():
    for given in (CUBE_8P2E.int(), CUBE_8P2E.int().cuda()):
        planner = Planner(given, 256 + 2 * 8, 256, ep_size=8)
        avail_counter = torch.zeros(1, dtype=torch.int64, device="cuda")
        indices = torch.randint(0, 256, (4096, 8), device="cuda")
        mapped = planner.run(indices, avail_counter, 100)
        assert mapped.shape == indices.shape and mapped.device == indices.device
        assert torch.equal(planner.phy2log.long()[mapped], indices)
        assert planner.info().groups[0].certified and avail_counter.item() == 1


@pytest.mark.parametrize("name", ["ring", "cube", "hypercube", "torus 8x4", "4 cubes", "general"])
def test_the_interior_point_solver_is_near_the_optimum_and_keeps_totals(name):
    rng = np.random.default_rng(70)
    if name == "general":
        phy2log, n_logical = oracle.random_placement(rng, 16, 8, 4)
        cpu = Planner.from_placement(torch.from_numpy(phy2log), ep_size=16, n_logical=n_logical, device="cpu")
        gpu = Planner.from_placement(torch.from_numpy(phy2log), ep_size=16, n_logical=n_logical, device="cuda", solver="ipm")
    else:
        cpu, _ = pair(*topologies()[name])
        r2o, ep_size, n_logical, combined, n_nodes = topologies()[name]
        n_physical = n_logical + ep_size * combined * r2o.shape[1]
        gpu = Planner(r2o, n_physical, n_logical, ep_size, n_nodes=n_nodes, device="cuda", solver="ipm")
    gaps = []
    for i in range(120):
        loads = torch.from_numpy(oracle.random_loads(rng, n_logical, oracle.FAMILIES[i % len(oracle.FAMILIES)]))
        cpu.solve(loads)
        gpu.solve(loads.cuda())
        split = gpu.split().cpu()
        assert (split >= 0).all()
        logical = torch.zeros(n_logical, dtype=torch.int64).index_add_(0, gpu.phy2log.cpu().long(), split)
        assert torch.equal(logical, loads.long())
        for ours, theirs in zip(cpu.info().groups, gpu.info().groups, strict=True):
            assert theirs.bound <= ours.bound <= theirs.max_load
            gaps.append(theirs.max_load / max(ours.max_load, 1) - 1)
        if name != "general":
            ratios, _ = gpu.solve_probs(loads.cuda(), None)
            assert (ratios >= 0).all() and (ratios <= 1).all()
    assert np.mean(gaps) < 0.01, f"mean gap {np.mean(gaps):.2%}, worst {np.max(gaps):.2%}"


@pytest.mark.parametrize("case", ["cube", "general"])
@pytest.mark.parametrize("count", [3000, 200_000])
def test_rows_of_a_rank_that_disagrees_are_reported(case, count):
    """In one launch and in several, and by solve: the next call says so, until there is a new placement."""
    rng = np.random.default_rng(81)
    if case == "cube":
        planner, place = both_devices.Reporting(CUBE_8P2E, 80, 64, 8, device="cuda", rank=3), lambda: planner.update_redundancy_mapping()
    else:
        phy2log, n_logical = oracle.random_placement(rng, 8, 6, 4)
        planner = both_devices.Reporting.from_placement(phy2log, ep_size=8, n_logical=n_logical, device="cuda", rank=3)
        place = lambda: planner.update_placement(phy2log)  # noqa: E731
    ids = random_ids(rng, planner.n_logical_routed_experts, count)
    counts = torch.randint(0, 50, (8, planner.n_logical_routed_experts))
    counts[3] = torch.bincount(ids[ids >= 0], minlength=planner.n_logical_routed_experts)
    ids, rows = ids.cuda(), both_devices.rows_of(planner, counts)
    fine = both_devices.run_rows(planner, ids, rows)
    other = rows.clone()
    other[5, -1] ^= 4
    handle, words = planner._handle, "got another digest from rank 5 than from rank 3, which noticed it"

    def solve_rows(given):
        handle.check(handle.library.planner_solve_rows(handle.opened(), given.data_ptr(), None, None, None, 0, planner._stream()))

    for call in (lambda given: both_devices.run_rows(planner, ids, given), solve_rows):
        call(other)
        torch.cuda.synchronize()
        with pytest.raises(Disagreement, match=words):
            both_devices.run_rows(planner, ids, rows)
        with pytest.raises(Disagreement, match=words):
            planner.solve(counts.cuda())
        place()
        assert torch.equal(both_devices.run_rows(planner, ids, rows), fine)


def test_a_disagreement_traps(tmp_path):
    """As planners do by default: the context is lost, and the words are still there."""
    script = """
import torch, both_devices, lplb
from lplb import Planner, topology
planner = Planner(topology.CUBE_8P2E, 80, 64, 8, device="cuda", rank=3)
ids = torch.zeros(100, dtype=torch.int64, device="cuda")
rows = both_devices.rows_of(planner, torch.full((8, 64), 3))
rows[6, -1] += 1
both_devices.run_rows(planner, ids, rows)
try:
    torch.cuda.synchronize()
except RuntimeError:
    print("trapped")
try:
    handle = planner._handle
    handle.check(handle.library.planner_solve_rows(handle.opened(), rows.data_ptr(), None, None, None, 0, None))
except lplb.Disagreement as error:
    print(error)
import os, sys
sys.stdout.flush()
os._exit(0)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert "trapped" in done.stdout and "another digest from rank 6 than from rank 3" in done.stdout, done.stdout + done.stderr
