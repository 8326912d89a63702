"""What planners record: the history, metrics and NVTX ranges. test_gpu_metrics.py compares the GPU with the CPU."""

from __future__ import annotations

import copy
import sys
import threading
from ast import literal_eval

import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch")

import both_devices

import lplb
from lplb import InvalidArgument, Planner, Unsupported, WrongOrder
from lplb.topology import CUBE_8P2E

RECORDS = {"history": True, "metrics": True}


def cube(**options):
    return Planner(CUBE_8P2E, 80, 64, 8, device="cpu", **{**RECORDS, **options})


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("name", ["cube", "4 cubes", "general"])
def test_sums_are_those_of_the_plans(name, rank):
    phy2log, n_logical = oracle.random_placement(np.random.default_rng(1), 16, 9, 4)
    planner = {
        "cube": lambda: cube(rank=rank),
        "4 cubes": lambda: Planner(CUBE_8P2E, 128, 64, 32, n_nodes=4, device="cpu", rank=rank, **RECORDS),
        "general": lambda: Planner.from_placement(phy2log, ep_size=16, n_logical=n_logical, n_nodes=2, rank=rank, device="cpu", **RECORDS),
    }[name]()
    rng = np.random.default_rng(2)
    if not isinstance(planner.phy2log, torch.Tensor):
        planner = Planner.from_placement(torch.from_numpy(phy2log), ep_size=16, n_logical=n_logical, n_nodes=2, rank=rank, **RECORDS)
    both_devices.check_records(rng, planner, (0, 1, 700, 5000))


def test_beyond_64_bits_in_between():
    """Loads at the limits: the ratio is still exact where load times ranks times its unit needs more than 64 bits."""
    phy2log = torch.arange(1024 * 2) // 2 % 1024
    planner = Planner.from_placement(phy2log, ep_size=1024, device="cpu", **RECORDS)
    kept = both_devices.Expected(planner)
    loads = torch.full((1024,), 2**40)
    for counts in (loads, loads - torch.arange(1024), torch.cat([loads[:1], torch.zeros(1023, dtype=torch.int64)])):
        planner.solve(counts)
        kept.add(counts)
        kept.check()
    assert planner.metrics().max_imbalance == 1024 / len(set((phy2log == 0).nonzero().view(-1).div(2, rounding_mode="floor").tolist()))


def test_a_failed_call_adds_nothing_and_a_placement_leaves_all():
    planner, ids = cube(rank=1), torch.arange(64).repeat(5)
    planner.run(ids, None)
    before = both_devices.raw_metrics(planner)
    with pytest.raises(InvalidArgument, match=r"counts\[3\]: must not be negative"):
        planner.solve(torch.where(torch.arange(64) == 3, -1, 1))
    rows = both_devices.rows_of(planner, torch.ones(8, 64))
    rows[5, -1] += 1
    with pytest.raises(lplb.Disagreement):
        both_devices.run_rows(planner, ids, rows)
    assert both_devices.raw_metrics(planner) == before and planner.history(at=1).tolist() == [5] * 64
    planner.update_redundancy_mapping(np.arange(64))
    assert both_devices.raw_metrics(planner) == before and planner.history(at=1).tolist() == [5] * 64
    planner.run(ids, None)
    assert planner.metrics().plans == 2 and planner.history(at=2).tolist() == [10] * 64
    with pytest.raises(WrongOrder, match="^at: must be the number of plans in the history, .* got 1 where there are 2$"):
        planner.history(at=1)
    planner.reset_metrics()
    assert not any(both_devices.raw_metrics(planner).values()) and planner.metrics().mean_imbalance == 0
    assert planner.history(at=2, reset=True).tolist() == [10] * 64 and planner.history(at=0).tolist() == [0] * 64
    planner.run(ids, None)
    assert planner.metrics().plans == 1 and planner.history(at=1).tolist() == [5] * 64


def test_histories_of_all_layers_place_them():
    """The loop of a training run: plan, read all histories, repair, go on."""
    rng = np.random.default_rng(0)
    loads = rng.lognormal(0, 1.5, (3, 64))
    placed = lplb.place(torch.ones(3, 64), ep_size=8, slots=80)
    planners = [Planner.from_placement(layer, ep_size=8, n_logical=64, device="cpu", **RECORDS) for layer in placed.phy2log]
    for _ in range(4):
        for planner, weight in zip(planners, loads):
            planner.run(torch.from_numpy(rng.choice(64, 4096, p=weight / weight.sum())), None)
    before = [planner.metrics().mean_imbalance for planner in planners]
    history = lplb.history(planners, at=4, reset=True)
    assert history.dtype == torch.int64 and history.shape == (3, 64) and (history.sum(1) == 4 * 4096).all()
    again = lplb.place(history, ep_size=8, slots=80, previous=placed.phy2log, policy="repair", max_moves=24)
    for planner, layer, weight in zip(planners, again.phy2log, loads):
        planner.update_placement(layer)
        planner.reset_metrics()
        planner.run(torch.from_numpy(rng.choice(64, 4096, p=weight / weight.sum())), None)
    assert [planner.metrics().mean_imbalance for planner in planners] < before and lplb.history(planners, at=1).sum() == 3 * 4096


def test_refused_in_words():
    plain = Planner(CUBE_8P2E, 80, 64, 8, device="cpu")
    with pytest.raises(WrongOrder, match="lplb_planner_history: needs a planner created with LPLB_RECORD_HISTORY"):
        plain.history()
    with pytest.raises(WrongOrder, match="metrics: needs a planner made with metrics=True"):
        plain.metrics()
    plain.reset_metrics()
    with pytest.raises(InvalidArgument, match="record: must be without LPLB_RECORD_HISTORY .* where n_physical is n_logical"):
        Planner.from_placement(torch.arange(8), ep_size=4, device="cpu", history=True)
    with pytest.raises(InvalidArgument, match="history: must be True or False"):
        cube(history=2)
    with pytest.raises(InvalidArgument, match="at: must be at least 0"):
        cube().history(at=-1)
    other = Planner(CUBE_8P2E, 144, 128, 8, device="cpu", **RECORDS)
    with pytest.raises(InvalidArgument, match=r"planners: must have equally many logical experts, got \[64, 128\]"):
        lplb.history([cube(), other])
    with pytest.raises(InvalidArgument, match="planners: must have at least one planner"):
        lplb.history([])
    with pytest.raises(InvalidArgument, match="planners: must be a sequence of planners"):
        lplb.history(plain)
    with pytest.raises(InvalidArgument, match="planners: must be a sequence of planners"):
        lplb.history([plain, 3])


def test_costs_other_than_tokens():
    """A history is of tokens whatever is balanced; metrics know tokens only, and say so."""
    planner, ids = cube(metrics=False, unit=16), torch.arange(64).repeat(3)
    planner.set_capacity(speed=[1024] * 7 + [512])
    planner.run(ids, None)
    assert copy.deepcopy(planner).history(at=0).sum() == 0 and planner.history(at=1).tolist() == [3] * 64
    with pytest.raises(Unsupported, match="unit: must be 0 or 1 with LPLB_RECORD_METRICS"):
        cube(unit="experts")
    with pytest.raises(Unsupported, match="lplb_planner_set_capacity: needs a planner without LPLB_RECORD_METRICS"):
        cube().set_capacity(speed=[1024] * 7 + [512])


def test_metrics_by_name():
    planner = cube()
    planner.solve(torch.tensor([64] + [0] * 63))
    found = planner.metrics()
    assert found.as_dict()["lplb_plans"] == 1 and found.as_dict("moe_")["moe_max_imbalance"] == found.max_imbalance == 4
    assert found.mean_gap == found.max_gap == found.mean_imbalance - 1 and found.tokens == 64 and found.moved == 32


def test_metrics_are_read_whole_while_another_thread_plans():
    planner, ids, wrong, done = cube(), torch.randint(0, 64, (64,)), [], threading.Event()
    planner.run(ids, None)
    one = both_devices.raw_metrics(planner)

    def watch():
        latest = 0
        while not done.is_set():
            now = both_devices.raw_metrics(planner)
            plans = now["plans"]
            if plans < latest or now != {name: value if name.endswith("max") else plans * value for name, value in one.items()}:
                wrong.append(now)
            latest = plans

    watchers = [threading.Thread(target=watch) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    for _ in range(3000):
        planner.run(ids, None)
    done.set()
    for watcher in watchers:
        watcher.join()
    assert not wrong and planner.metrics().plans == 3001


RANGES = """
import importlib, torch
import lplb._ops.ranges as ranges
print(ranges.ASKED)
calls = []
torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop = calls.append, lambda: calls.append(None)
importlib.reload(ranges)
from lplb import Planner, topology
planner = Planner(topology.CUBE_8P2E, 80, 64, 8, device="cpu")
planner.run(torch.arange(64), None)
planner.solve(torch.ones(64, dtype=torch.int64))
try:
    planner.run(torch.arange(64.0), None)
except Exception:
    pass
print(planner.number, calls)
"""


def test_nvtx_ranges_where_they_are_asked_for(run):
    from lplb._ops.ranges import ranged

    assert ranged("run", print) is print, "nothing is added where nobody asks"
    *words, marked, last = run([sys.executable, "-c", RANGES], LPLB_NVTX="1").splitlines()
    assert marked == "True" or "UserWarning: LPLB_NVTX=1: this build of torch marks no ranges" in words[0]
    number, calls = last.split(maxsplit=1)
    opened = [f"lplb.{name} {number}" for name in ("run", "solve", "run")]
    assert literal_eval(calls) == ["lplb", None, *(each for name in opened for each in (name, None))]
