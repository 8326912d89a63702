"""Threads: planners of different threads do not disturb each other; two calls on one planner are refused, never mixed up."""

from __future__ import annotations

import sys
import threading
import time
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


@pytest.fixture
def eager_switching():
    """Python threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_close_beside_calls(eager_switching):
    """A call that another thread's close() overtakes says so or succeeds; nothing is freed under it."""
    ids, counts = torch.randint(-1, 64, (2048, 8)), torch.ones(64, dtype=torch.int32)
    array = ids.numpy()
    for round_number in range(60):
        planner = Planner(topology.CUBE_8P2E, 80, 64, 8, device="cpu")
        planner.run(ids, None)
        calls = [lambda: planner.run(ids, None), lambda: planner.run(array, None), planner.info, planner.mapping, planner.split,
                 lambda: planner.solve(counts), lambda: planner.redirect(ids), lambda: planner.count_workload(ids, 3)]

        def work(number):
            while True:
                try:
                    calls[number % len(calls)]()
                except lplb.Busy:
                    pass
                except lplb.WrongOrder as error:
                    return str(error)

        with ThreadPoolExecutor(3) as pool:
            words = [pool.submit(work, 3 * round_number + number) for number in range(3)]
            time.sleep(0.002 * (round_number % 5))
            planner.close()
            assert {word.result(20) for word in words} == {"planner: must not be used after close()"}


def test_a_planner_closed_inside_a_call_lives_until_its_end():
    """Here between the two calls of the library that one run makes. The exchange ends after the planner that uses it."""
    planner = Planner(topology.CUBE_8P2E, 80, 64, 8, device="cpu", rank=0)
    ids, events, library = torch.randint(-1, 64, (100, 8)), [], planner._handle.library
    whole = Planner(topology.CUBE_8P2E, 80, 64, 8, device="cpu")
    wanted = whole.run(ids, None)

    class Closing:
        native = False

        def all_gather(self, counts):
            thread = threading.Thread(target=planner.close)
            thread.start()
            thread.join()
            events.append("closed by another thread")
            everyone = torch.zeros((8, len(counts)), dtype=torch.int32)
            everyone[0], everyone[:, 64:] = counts, counts[64:]  # what stands behind the counts must be equal
            return everyone

        def leave(self, number):
            events.append("exchange let go of")

    class Watched:
        """The library, with the end of planners noted down."""

        def __getattr__(self, name):
            return getattr(library, name)

        def planner_destroy(self, pointer):
            events.append("planner ended")
            library.planner_destroy(pointer)

    planner._handle.exchange = Closing()
    planner._handle.native.library = Watched()
    out = planner.run(ids, None)
    assert events == ["closed by another thread", "planner ended", "exchange let go of"]
    loads = [torch.bincount(each[each >= 0] // 10, minlength=8) for each in (out, wanted)]
    assert torch.equal(*loads)
    with pytest.raises(lplb.WrongOrder, match="close"):
        planner.run(ids, None)


def test_busy_is_an_lplb_error():
    assert issubclass(lplb.Busy, lplb.LplbError)
