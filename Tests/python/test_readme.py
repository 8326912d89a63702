"""The Python examples of README.md run as they are, those with a process group on four processes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from conftest import ROOT, Run

EXAMPLES = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(example: str, run: Run, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    program = tmp_path / "train.py"
    program.write_text(example)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"] if "init_process_group" in example else []
    run([sys.executable, *launcher, program], cwd=tmp_path, timeout=120, OMP_NUM_THREADS="1")
