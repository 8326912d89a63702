"""Processes that exchange their counts with torch.distributed: groups of 2, 4 and 8, and the sum over ranks equals the plan exactly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from oracle import optimum, linear_optima, rank_loads

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
                                reason="needs a PyTorch with gloo")

PROCESSES = 8


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of the processes saw."""
    folder = tmp_path_factory.mktemp("distributed")
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONPATH": os.pathsep.join([str(here), *filter(None, sys.path)])}
    started = [subprocess.Popen([sys.executable, str(here / "distributed_worker.py"), str(rank), str(PROCESSES), str(folder / "store"), str(folder)],
                                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(PROCESSES)]
    try:
        words = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, words):
        assert process.returncode == 0, text
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("kind", ["fixed", "general"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_sum_over_ranks_is_the_plan(results, size, kind, case):
    for first in range(0, PROCESSES, size):
        ranks = results[first:first + size]
        key = f"{size}of{first}_{kind}_{case}"
        split, phy2log = ranks[0][f"{key}_split"], ranks[0][f"{key}_phy2log"]
        realised = np.zeros_like(split)
        loads = np.zeros(phy2log.max() + 1, dtype=np.int64)
        for seen in ranks:
            ids, out = seen[f"{key}_ids"], seen[f"{key}_out"]
            assert (seen[f"{key}_split"] == split).all() and seen[f"{key}_certified"]
            assert (out[ids < 0] == -1).all() and (phy2log[out[ids >= 0]] == ids[ids >= 0]).all()
            mine = np.bincount(out[out >= 0], minlength=len(split))
            assert (mine == seen[f"{key}_mine"]).all()
            assert seen[f"{key}_local"].sum() == mine.sum()
            realised += mine
            loads += np.bincount(ids[ids >= 0], minlength=len(loads))
        assert (realised == split).all()
        assert rank_loads(realised, size).max() == ranks[0][f"{key}_bound"] == optimum(linear_optima([(loads, phy2log, size)])[0])


def test_tokens_stay_near_where_they_can(results):
    """Own rank first, then own node: a token leaves only if the quota here is used up."""
    size, key = 8, "8of0_general_0"
    split = results[0][f"{key}_split"]
    phy2log = results[0][f"{key}_phy2log"]
    slots = len(split) // size
    for rank, seen in enumerate(results):
        ids = seen[f"{key}_ids"]
        counts = np.bincount(ids[ids >= 0], minlength=phy2log.max() + 1)
        mine = seen[f"{key}_mine"]
        for expert in np.unique(phy2log[rank * slots:(rank + 1) * slots]):
            here = [slot for slot in range(rank * slots, (rank + 1) * slots) if phy2log[slot] == expert]
            assert mine[here].sum() == min(counts[expert], split[here].sum())


def test_example(results):
    phy2log, split = results[0]["example_phy2log"], results[0]["example_split"]
    realised, by_ratio = np.zeros_like(split), np.zeros_like(split)
    counts = sum(seen["example_counts"].astype(np.int64) for seen in results)
    for seen in results:
        for key, total in (("example", realised), ("example_by_ratio", by_ratio)):
            out, ids = seen[key], seen["example_ids"]
            assert (phy2log[out[ids >= 0]] == ids[ids >= 0]).all()
            total += np.bincount(out[out >= 0], minlength=len(split))
        assert np.allclose(seen["example_scaled"].reshape(-1), counts / counts.max())
    assert (realised == split).all()
    assert rank_loads(realised, 8).max() == results[0]["example_bound"]
    assert np.abs(by_ratio - split).max() <= PROCESSES  # each rank rounds for itself, which is what exact plans avoid
