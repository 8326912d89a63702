"""How exchanges begin and end among processes: shared ones, process groups that are destroyed, and peers that exit, die, raise or are late."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs a PyTorch with gloo", allow_module_level=True)

LIMIT = 2.0  # as in peers_worker.py
FATES = ("exits", "killed", "raises", "late")


def processes(folder, scenario, n, may_fail=()):
    """What each of the processes saw; all end with exit status 0 but those that may fail."""
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONPATH": os.pathsep.join([str(here), *filter(None, sys.path)])}
    started = [subprocess.Popen([sys.executable, str(here / "peers_worker.py"), scenario, str(rank), str(n), str(folder)], env=environment,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in range(n)]
    try:
        words = [process.communicate(timeout=180)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for rank, (process, text) in enumerate(zip(started, words)):
        assert process.returncode == 0 or rank in may_fail, f"rank {rank} ended with {process.returncode}:\n{text}"
    return [json.loads(path.read_text()) if (path := Path(folder, f"{rank}.json")).is_file() else None for rank in range(n)]


# ---- lives and ends ----


def test_a_shared_exchange_lives_as_long_as_a_planner_uses_it(tmp_path):
    for seen in processes(tmp_path, "life", 2):
        for order in ("012", "210", "120"):
            assert seen[order] == [False, False, True]  # after the first, the second and the last planner
        assert seen["the caller's"] is False
        assert "must not be used after close()" in seen["closed by the caller"]
        assert seen["a closed one"] == "exchange: must not be used after close()"


@pytest.mark.parametrize("order", ["close, destroy", "destroy, close", "destroy"])
def test_nothing_keeps_a_destroyed_process_group(tmp_path, order):
    # gloo ends a process with a signal (exit status -6) where its groups outlive destroy_process_group until the interpreter is gone.
    for seen in processes(tmp_path, f"ends:{order}", 2):
        assert not any(seen["alive"]) and len(seen["alive"]) == 6, seen
        assert seen["without a group"] == "exchange: must not be used after its process group is destroyed"


def test_a_group_of_the_same_name_is_another_one(tmp_path):
    for seen in processes(tmp_path, "names", 2):
        assert seen["fresh 0"] == seen["fresh 1"] and seen["fresh 1"][1:] == [0, True]  # the same name, and nothing known of it
        assert seen["used 0"] == seen["used 1"] == [True, 2.0]
        assert seen["gone 0"] and seen["gone 1"]


# ---- peers that do not come ----


def lost(scenario, tmp_path_factory):
    seen = processes(tmp_path_factory.mktemp(scenario), scenario, 2 * len(FATES), may_fail=[1, 3, 5])
    return dict(zip(FATES, seen[::2])), seen[-1]


@pytest.fixture(scope="module")
def in_run(tmp_path_factory):
    return lost("run", tmp_path_factory)


@pytest.fixture(scope="module")
def in_create(tmp_path_factory):
    return lost("create", tmp_path_factory)


def check(seen, fate, subject):
    if fate == "late":
        assert seen["kind"] == "PeerTimeout" and LIMIT <= seen["took"] < 2 * LIMIT, seen
        assert f"did not come within {LIMIT:g} s" in seen["words"]
    else:
        assert seen["kind"] == "PeerLost" and seen["took"] < LIMIT, seen
        assert "the connection to another rank is lost" in seen["words"]
    assert seen["words"].startswith(f"{subject}: rank 0 of 2") and "torch.distributed says: " in seen["words"], seen
    assert ".cc:" not in seen["words"]  # the name of a source file of gloo's says nothing to a caller


@pytest.mark.parametrize("fate", FATES)
def test_a_peer_that_does_not_come_to_run(in_run, fate):
    seen = in_run[0][fate]
    check(seen, fate, "exchange")
    assert "in call 2" in seen["words"]
    assert seen["report"][:4] == ["timed out" if fate == "late" else "lost", 0, -1, 2]
    # What comes too late would be taken for the next call's, so there is none: at once, in the same words.
    again = seen["again"]
    assert again["kind"] == seen["kind"] and seen["words"] in again["words"] and again["took"] < 0.5


@pytest.mark.parametrize("fate", FATES)
def test_a_peer_that_does_not_come_to_create(in_create, fate):
    check(in_create[0][fate], fate, "lplb.exchange.create")


def test_who_comes_too_late_is_told(in_run, in_create):
    for _, late in (in_run, in_create):
        assert late["kind"] == "PeerLost" and late["took"] < 5 * LIMIT, late


def test_abort_ends_the_waiting_of_the_cpu(tmp_path):
    seen = processes(tmp_path, "abort", 2, may_fail=[1])[0]
    assert seen["kind"] == "PeerTimeout" and "the host aborted it" in seen["words"] and seen["took"] < 1.5, seen
    assert seen["again"]["kind"] == "PeerTimeout" and seen["again"]["took"] < 0.5
    assert "then was aborted" in seen["report"]
