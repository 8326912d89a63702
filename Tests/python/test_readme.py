"""The Python examples of README.md run as they are."""

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
    run([sys.executable, "-c", example], cwd=tmp_path, timeout=120)
