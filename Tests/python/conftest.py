"""Shared by all tests: where things lie, how commands are run, and which tests need a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTE = "note"
LONGEST = ("test_swift", "test_moe", "test_c_consumers")  # modules of a minute or more, which start first so that workers end together

Run = Callable[..., str]


def run_command(command: Sequence[str | Path], *, cwd: Path | None = None, timeout: float = 120, **environment: str) -> str:
    """Runs a command; returns stdout and stderr together; a failure shows them."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env={**os.environ, **environment}, timeout=timeout, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
    if done.returncode != 0:
        pytest.fail(f"{' '.join(words)}\nended with {done.returncode}:\n{done.stdout[-8000:]}", pytrace=False)
    return done.stdout


@pytest.fixture(scope="session")
def run() -> Run:
    return run_command


@pytest.fixture(scope="session")
def root() -> Path:
    """The source tree."""
    return ROOT


class Installed(NamedTuple):
    """The installed package, as `python -m lplb` says."""

    include: Path
    library: Path
    cmake: Path


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    options = ("--include-dir", "--library", "--cmake-dir")
    return Installed(*(Path(run_command([sys.executable, "-m", "lplb", option], cwd=elsewhere).strip()) for option in options))


def why_no_gpu() -> str | None:
    """None where GPU tests can run, otherwise the reason why not."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not torch.cuda.is_available():
        return "torch finds no GPU"
    from lplb import _c

    if b"without CUDA" in _c.load().build_info():
        return "the library was built without CUDA"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    needing = [item for item in items if item.get_closest_marker("gpu")]
    reason = why_no_gpu() if needing else None
    if reason is None:
        return
    if os.environ.get("LPLB_REQUIRE_GPU") == "1":
        raise pytest.UsageError(f"LPLB_REQUIRE_GPU=1, but {reason}")
    for item in needing:
        item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a line to the report at the end of the run, e.g. the summary of a test runner that ran inside a test."""
    return lambda line: request.node.user_properties.append((NOTE, line))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    done = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    lines = [line for report in done for name, line in report.user_properties if name == NOTE]
    if lines:
        terminalreporter.section("notes")
        for line in lines:
            terminalreporter.write_line(line)
