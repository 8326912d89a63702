"""Threads: planners of different threads do not disturb each other; two calls on one planner are refused, never mixed up."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import lplb
from lplb import Planner, topology

torch = pytest.importorskip("torch")

THREADS = 8


def test_a_planner_for_each_thread():
    batches = [torch.randint(-1, 256, (512, 8)) for _ in range(THREADS)]
    wanted = [Planner(topology.CUBE_8P2E, 320, 256, 32, device="cpu").run(ids, None) for ids in batches]
    start = threading.Barrier(THREADS)

    def work(number):
        planner = Planner(topology.CUBE_8P2E, 320, 256, 32, device="cpu")
        counter = torch.zeros(1, dtype=torch.int64)
        start.wait()
        for _ in range(100):
            if not torch.equal(planner.run(batches[number], counter), wanted[number]) or not planner.info().certified:
                return False
        planner.close()
        return counter.item() == 400

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(work, range(THREADS)))


def test_placement_alone_in_many_threads():
    weight = torch.randint(0, 1000, (8, 256))
    wanted = lplb.eplb.rebalance_experts(weight, 288, 8, 4, 32)

    def work(_):
        return all(torch.equal(a, b) for a, b in zip(lplb.eplb.rebalance_experts(weight, 288, 8, 4, 32), wanted))

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(work, range(50)))


def test_one_planner_in_many_threads_is_refused_or_right():
    """The two batches have different plans, so a call that ran into another one would show in its result."""
    planner = Planner(topology.CUBE_8P2E, 320, 256, 32, device="cpu")
    batches = [torch.randint(-1, 256, (4096, 8)), torch.randint(0, 40, (4096, 8))]
    wanted = [planner.run(ids, None) for ids in batches]
    start = threading.Barrier(4)

    def work(number):
        start.wait()
        done = refused = 0
        ids, right = batches[number % 2], wanted[number % 2]
        while done < 60 and refused < 100_000:
            try:
                out = planner.run(ids, None)
            except lplb.Busy:
                refused += 1
                continue
            assert torch.equal(out, right)
            done += 1
        return done, refused

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(4)))
    assert sum(done for done, _ in results) > 0
    assert torch.equal(planner.run(batches[0], None), wanted[0])  # and it works on


def test_busy_is_an_lplb_error():
    assert issubclass(lplb.Busy, lplb.LplbError)
