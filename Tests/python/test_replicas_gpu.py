"""Replicas over NVLink, by replicas_gpu.py on two processes: a GPU each, or both on a single one, and on four that share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
STEPS = ("bits", "graphs", "late", "adopting", "memory", "speed", "killed")


@pytest.mark.parametrize("processes", [2, 4])
def test_replicas(processes, run, note):
    script = Path(__file__).with_name("replicas_gpu.py")
    out = run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), script], timeout=500)
    assert [line.split()[1] for line in out.splitlines() if line.startswith("ok ")] == list(STEPS), out
    for line in out.splitlines():
        if "GB/s" in line and not line.startswith("ok"):
            note(line.strip())
