"""The public Python code is fully typed: `mypy --strict` finds nothing."""

from __future__ import annotations

import sys

import pytest

from conftest import ROOT, Run


@pytest.mark.timeout(600)
def test_mypy_strict(run: Run) -> None:
    pytest.importorskip("mypy")
    pytest.importorskip("torch")  # its types are part of the check
    output = run([sys.executable, "-m", "mypy", "--strict", "python/lplb"], cwd=ROOT, timeout=600)
    assert "Success" in output


@pytest.mark.timeout(600)
def test_tensors_in_are_tensors_out(run: Run) -> None:
    """A user's program, with what each call must return; an ignored error that does not come is an error, too."""
    pytest.importorskip("mypy")
    pytest.importorskip("torch")
    program = ROOT / "Tests/python/typed_user.py"
    output = run([sys.executable, "-m", "mypy", "--strict", program], cwd=ROOT, timeout=600, MYPYPATH=str(ROOT / "python"))
    assert "Success" in output
