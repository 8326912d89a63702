"""The exchange on GPUs: as many processes as there are (two on a single one), and the protocol alone with virtual ranks."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "cuda"

pytestmark = pytest.mark.gpu


def script(run, mode, *options):
    # .ci/gpu-exchange runs the same for longer, and the bench.
    out = run([sys.executable, HERE / "exchange_gpu.py", mode, "--limit", "120", *options], timeout=280)
    assert "FAILED" not in out
    return out


def test_equal_to_torch_distributed(run, note):
    out = script(run, "correct", "--calls", "300")
    assert "realised loads equal the certified plan" in out
    note(f"exchange: {out.count('ok ')} checks on GPUs")


def test_a_lost_rank_ends_the_others_in_words(run):
    out = script(run, "faults")
    for fault in ("late", "abort", "killed", "nvshmem-late", "nvshmem-killed", "nvshmem-abort", "nccl-abort"):
        # A rail's faults want two GPUs, and NVSHMEM's its plugin.
        assert f"{fault}: every other rank ended by itself" in out or ("-" in fault and f"skipped {fault}:" in out)


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """The program with virtual ranks, compiled for this GPU."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None or not CUDA.is_dir():
        pytest.skip("needs nvcc and the source tree")
    from conftest import run_command

    program = tmp_path_factory.mktemp("virtual") / "exchange_virtual"
    run_command([nvcc, "-arch=native", "-O3", "-std=c++17", f"-I{CUDA}", HERE.parent / "cuda/exchange_virtual.cu", CUDA / "exchange.cu",
                 "-o", program], timeout=240)
    return program


def test_virtual_ranks(run, harness):
    assert "all fine" in run([harness], timeout=120)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_virtual_ranks_under_the_sanitizer(run, harness, tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer")
    out = run([sanitizer, "--tool", tool, "--error-exitcode", "9", harness, "blocks"], timeout=240)
    assert "all fine" in out and ("0 errors" in out or "0 hazards" in out)
