"""`swift build` and `swift test` on their own, target by target; and again under the address sanitizer."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable

import pytest

from conftest import ROOT, Run

pytestmark = [pytest.mark.timeout(1200), pytest.mark.skipif(shutil.which("swift") is None, reason="needs swift on PATH")]

TARGETS = re.findall(r'\.testTarget\(name: "(\w+)"', (ROOT / "Package.swift").read_text())
SANITIZE = ["--sanitize=address", "--scratch-path", str(ROOT / "build/asan")]


@pytest.fixture(scope="session")
def built(run: Run) -> None:
    run(["swift", "build", "--build-tests", "--package-path", ROOT], timeout=900, LPLB_CUDA_OBJECTS="")


@pytest.fixture(scope="session")
def built_sanitized(run: Run) -> None:
    run(["swift", "build", "--build-tests", "--package-path", ROOT, *SANITIZE], timeout=900, LPLB_CUDA_OBJECTS="")


def run_target(run: Run, target: str, *options: str) -> str:
    """The test runner's own summary of one target. Running nothing is a failure."""
    command = ["swift", "test", "--skip-build", "--disable-xctest", "--package-path", ROOT, "--filter", rf"^{target}\.", *options]
    output = run(command, timeout=600, LPLB_CUDA_OBJECTS="", ASAN_OPTIONS="detect_leaks=0")
    summary = re.search(r"Test run with (\d+) tests? .*passed.*", output)
    assert summary and int(summary[1]) > 0, output[-4000:]
    return summary[0]


@pytest.mark.parametrize("target", TARGETS)
def test_target(run: Run, built: None, target: str, note: Callable[[str], None]) -> None:
    note(f"{target}: {run_target(run, target)}")


@pytest.mark.sanitize
@pytest.mark.parametrize("target", TARGETS)
def test_target_under_address_sanitizer(run: Run, built_sanitized: None, target: str, note: Callable[[str], None]) -> None:
    note(f"{target}, address sanitizer: {run_target(run, target, *SANITIZE)}")
