"""The MoE layer among DDP, FSDP2, torch.compile and DeepEP, on 8 ranks, in bfloat16, and when a rank is killed; see moe_hooks.py."""

from __future__ import annotations

import json
import signal
import time

import pytest

torch = pytest.importorskip("torch")
from test_moe import judge, measured, pytestmark, start  # noqa: E402, F401

BOUNDS = {"ddp_over_experts": 1e-12, "fsdp_around_experts": 1e-12, "fsdp_over_experts": 1e-12, "compiled": 1e-12, "deep_ep": 0.02,
          "refused": 0.0}
EIGHT = {"gradients": 1e-12, "update_inside": 1e-12}


@pytest.fixture(scope="module")
def on_four(tmp_path_factory):
    return measured(4, tmp_path_factory.mktemp("hooks"), [f"hooks:{name}" for name in BOUNDS])


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory):
    return measured(8, tmp_path_factory.mktemp("eight"), EIGHT)


@pytest.mark.parametrize("scenario", BOUNDS)
def test_hooks(on_four, scenario, note):
    judge(on_four, scenario, BOUNDS[scenario], note)


@pytest.mark.parametrize("scenario", EIGHT)
def test_eight_ranks(on_eight, scenario, note):
    judge(on_eight, scenario, EIGHT[scenario], note)


def test_bfloat16_within_the_spread_of_summation_orders(tmp_path, note):
    """300 steps of the language model: the run with replicas is as far from one without as those are from each other that differ in nothing
    but the order of their sums."""
    results = measured(2, tmp_path, ["models:language_model_bfloat16"])
    judge(results, "language_model_bfloat16", 1.5, note)  # the nearest of three is not always nearer than these are to each other


def test_a_killed_rank_ends_the_others(tmp_path, note):
    """In the middle of training: within seconds, and with words."""
    processes = start(4, tmp_path, ["hooks:endless"])
    try:
        limit = time.monotonic() + 60
        while not (tmp_path / "store.going").exists():
            assert time.monotonic() < limit and all(process.poll() is None for process in processes), "training did not begin"
            time.sleep(0.1)
        processes[2].send_signal(signal.SIGKILL)
        began = time.monotonic()
        for process in processes:
            process.communicate(timeout=60)
        seconds = time.monotonic() - began
    finally:
        for process in processes:
            process.kill()
    words = [json.loads((tmp_path / f"{rank}.json").read_text())["endless"]["failure"] for rank in (0, 1, 3)]
    note(f"a killed rank: the others ended in {seconds:.1f} s, saying {sorted({one.strip().splitlines()[-1][:120] for one in words})}")
    assert all("Error: " in one for one in words), words
