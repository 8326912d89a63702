"""Every block of README.md runs as it is written, in its order and in one folder, after the first command, which installs the package.
Python with a process group runs on four processes. A block whose first line names a file is that file, for the blocks behind it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import lplb
from conftest import ROOT, Installed, Run

README = (ROOT / "README.md").read_text()


class Block(NamedTuple):
    kind: str
    text: str

    @property
    def file(self) -> str | None:
        named = re.match(r"(?:/\*|//|#) ([\w.]+\.\w+)", self.text)
        return named[1] if named else None


BLOCKS = [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)]
INSTALL, *REST = BLOCKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader works: with the traces that other projects publish, in their forms, and few tokens."""
    folder = tmp_path_factory.mktemp("reader")
    routing = np.load(ROOT / "python/lplb/cli/data/deepseek_v2_lite_summary_sample.npz")["topk_ids"]
    scores = folder / "ESFT/results/expert_scores/law"
    scores.mkdir(parents=True)
    for layer in range(2):
        ids = routing[:3000, layer].reshape(3, -1)
        lines = ["\t".join(map(str, row.tolist())) + "\t\t" + "\t".join(["0.1"] * row.size) for row in ids]
        (scores / f"expert_weights_{layer + 1}.txt").write_text("\n".join(lines) + "\n")
    return folder


def environment(folder: Path) -> dict[str, str]:
    """As after the first command: python and lplb on PATH, with the tools of this Python's environment."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    if not (programs / "lplb").exists():
        (programs / "lplb").write_text(f"#!/bin/sh\nexec '{sys.executable}' -c "
                                       "'import sys; sys.argv[0] = \"lplb\"; from lplb.cli.main import script; script()' \"$@\"\n")
        (programs / "python").write_text(f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n")
        (programs / "git").write_text("#!/bin/sh\nexit 0\n")  # what it would fetch is there
        for program in programs.iterdir():
            program.chmod(0o755)
    package = str(Path(lplb.__file__).parents[1])
    return {**os.environ, "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]), "OMP_NUM_THREADS": "1"}


def test_the_first_command_installs() -> None:
    assert INSTALL.kind == "sh" and "pip install '.[cli]'" in INSTALL.text


def test_blocks_are_of_kinds_that_run() -> None:
    assert {block.kind for block in REST} <= {"python", "sh", "c", "cmake"}, "show what does not run inline, not in a block"
    assert all(block.file for block in REST if block.kind in ("c", "cmake"))


@pytest.mark.parametrize("index", range(len(REST)), ids=[f"{index}-{block.kind}" for index, block in enumerate(REST)])
def test_block(index: int, folder: Path, run: Run, request: pytest.FixtureRequest) -> None:
    block = REST[index]
    for before in REST[: index + 1]:  # also where this block runs alone
        if before.file:
            (folder / before.file).write_text(before.text)
    if block.kind == "python":
        pytest.importorskip("torch")
        program = folder / "block.py"
        program.write_text(block.text)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"] if "init_process_group" in block.text else []
        run([sys.executable, *launcher, program], cwd=folder, timeout=120, **environment(folder))
    elif block.kind == "sh":
        if "cmake" in block.text:
            request.getfixturevalue("installed")
            pytest.importorskip("cmake")
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], cwd=folder, env=environment(folder), stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        for promised in re.findall(r"# -> (.*)$", block.text, flags=re.MULTILINE):
            assert promised in done.stdout, f"the README promises {promised!r}: {done.stdout}"


def test_files_and_headings_that_are_linked_exist() -> None:
    headings = {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)}
    for link in re.findall(r"\]\(([^)\s]+)\)", README):
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif not link.startswith("http"):
            assert (ROOT / link).exists(), link
