"""A MoE layer with replicas against a dense reference in float64, on 2 and 4 processes with gloo; see moe_worker.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
                                reason="needs a PyTorch with gloo")

BOUNDS = {"gradients": 1e-12, "update_inside": 1e-12, "main_gradients": 1e-4, "optimizer_steps": 1e-9, "same_bits": 0.0, "recomputation": 0.0,
          "checkpoints": 1e-12, "with_ddp": 1e-12, "refusals": 0.0}


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory):
    """What each of the processes measured."""
    processes, folder = request.param, tmp_path_factory.mktemp("moe")
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONPATH": os.pathsep.join([str(here), *filter(None, sys.path)])}
    started = [subprocess.Popen([sys.executable, str(here / "moe_worker.py"), str(rank), str(processes), str(folder / "store"), str(folder)],
                                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(processes)]
    try:
        words = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    files = [folder / f"{rank}.json" for rank in range(processes)]
    assert all(file.exists() for file in files), "\n".join(words)
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("scenario", BOUNDS)
def test_scenario(results, scenario, note):
    failures = [f"rank {rank}: {one['failure']}" for rank, seen in enumerate(results) for one in seen.values() if "failure" in one]
    for seen in results:
        assert scenario in seen and "measured" in seen[scenario], "\n".join(failures)
    largest = {key: max(seen[scenario]["measured"][key] for seen in results) for key in results[0][scenario]["measured"]}
    note(f"{scenario} on {len(results)} ranks: " + ", ".join(f"{key} {value:.1e}" for key, value in largest.items())
         + f" ({results[0][scenario]['seconds']:.1f} s)")
    assert all(value <= BOUNDS[scenario] for value in largest.values()), largest
