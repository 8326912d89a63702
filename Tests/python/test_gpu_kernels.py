"""The kernels against a plain C++ reference, by the harnesses in Tests/cuda, and under compute-sanitizer. Needs nvcc and the sources."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import run_command

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


def tool(name):
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None or not (ROOT / "cuda").is_dir():
        pytest.skip(f"needs {name} and the source tree")
    return found


def build(folder, *flags):
    """The harnesses, compiled for this GPU."""
    nvcc = tool("nvcc")
    kernels = [*sorted((ROOT / "cuda").glob("*.cu")), *sorted((ROOT / "cuda/solve").glob("*.cu"))]
    sources = [*kernels, *(ROOT / f"Tests/cuda/{name}_harness.cu" for name in ("layout", "run", "solve"))]
    command = [nvcc, "-arch=native", "-O3", "-std=c++17", "-lineinfo", *flags, f"-I{ROOT / 'cuda'}", "-c"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda source: run_command([*command, source, "-o", folder / f"{source.stem}.o"], timeout=600), sources))
    objects = [folder / f"{source.stem}.o" for source in kernels]
    for name in ("layout_harness", "run_harness", "solve_harness"):
        run_command([nvcc, "-arch=native", folder / f"{name}.o", *objects, "-o", folder / name], timeout=100)
    return folder


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return build(tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def plain_harness(tmp_path_factory):
    return build(tmp_path_factory.mktemp("plain"), "-DLPLB_PLAIN_BARRIERS")


def test_against_the_reference(run, harness):
    assert "0 wrong" in run([harness / "run_harness", "11", "0"], timeout=280)
    assert "0 wrong" in run([harness / "solve_harness", "60", "0"], timeout=280)
    assert " 0 wrong" in run([harness / "layout_harness", "100"], timeout=280)


@pytest.mark.parametrize("name", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_under_the_sanitizer(run, harness, name):
    check = [tool("compute-sanitizer"), "--tool", name, "--error-exitcode", "9"]
    if name == "memcheck":  # the harness asks how large a cluster can be by trying
        check += ["--report-api-errors", "no"]
    for command in (["run_harness", "2", "0", "700"], ["solve_harness", "2", "0"], ["layout_harness", "12"]):
        out = run([*check, harness / command[0], *command[1:]], timeout=400)
        assert "0 wrong" in out and ("0 errors" in out or "0 hazards" in out)


def test_plain_barriers_under_racecheck(run, plain_harness):
    out = run([tool("compute-sanitizer"), "--tool", "racecheck", "--error-exitcode", "9", plain_harness / "run_harness", "2", "0", "700"],
              timeout=400)
    assert "0 wrong" in out and "0 hazards" in out
