"""The command line: the environment report, the self-check, and the paths that builds ask for."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from lplb.cli import check, selfcheck
from lplb.cli.main import main


def command(*words, **environment):
    return subprocess.run([sys.executable, "-m", "lplb", *words], env={**os.environ, **environment}, capture_output=True, text=True,
                          timeout=240)


def test_report_finds_everything_in_order():
    done = command()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Everything is in order" in done.stdout and done.stderr == ""
    for name, _ in selfcheck.CHECKS:
        assert f"ok    {name}" in done.stdout


def test_report_as_json():
    done = command("--json")
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result["ok"] is True
    states = {finding["name"]: finding["state"] for finding in result["findings"]}
    assert {"python", "library", "build", "numpy"} <= set(states) and set(states.values()) <= {"ok", "note"}


def test_a_missing_library_is_off(tmp_path):
    done = command(LPLB_LIBRARY=str(tmp_path / "gone.so"))
    assert done.returncode == 1 and done.stderr == ""
    assert "OFF   library" in done.stdout and "gone.so" in done.stdout and "1 of" in done.stdout
    result = json.loads(command("--json", LPLB_LIBRARY=str(tmp_path / "gone.so")).stdout)
    assert result["ok"] is False


def test_a_library_that_is_none_is_off(tmp_path):
    (tmp_path / "text.so").write_text("no library")
    done = command(LPLB_LIBRARY=str(tmp_path / "text.so"))
    assert done.returncode == 1 and "OFF   library" in done.stdout and "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("option", ["--include-dir", "--library", "--cmake-dir"])
def test_paths_are_printed_or_refused_in_words(option):
    done = command(option)
    if done.returncode == 0:  # an installed package
        assert os.path.exists(done.stdout.strip()) and done.stdout.count("\n") == 1
    else:
        assert done.returncode == 1 and done.stderr.startswith("lplb: ") and "Traceback" not in done.stderr


def test_unknown_words_get_a_sentence(capsys):
    assert main(["dance"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "dance" in said.err


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "simulate" in said and "bench" in said


# ---- the self-check finds what it is there to find ----

def test_a_split_that_is_not_optimal_fails_the_check(monkeypatch):
    honest = selfcheck.solve

    def lazy(loads, phy2log, ep_size):
        solution = honest(loads, phy2log, ep_size)
        tokens = np.zeros_like(solution.tokens)
        first = [int(np.flatnonzero(phy2log == expert)[0]) for expert in range(len(loads))]
        tokens[first] = loads  # everything at the original
        return dataclasses.replace(solution, tokens=tokens, max_load=int(check.rank_loads(tokens, ep_size).max()))

    monkeypatch.setattr(selfcheck, "solve", lazy)
    with pytest.raises(selfcheck.Failed, match="bound of the witness"):
        selfcheck.check_general()


def test_a_witness_that_proves_nothing_fails_the_check(monkeypatch):
    honest = selfcheck.solve
    monkeypatch.setattr(selfcheck, "solve", lambda *given: dataclasses.replace(honest(*given), witness=[0]))
    with pytest.raises(selfcheck.Failed):
        selfcheck.check_general()


def test_tokens_at_the_wrong_expert_fail_the_check(monkeypatch):
    honest = selfcheck.Planner.redirect
    monkeypatch.setattr(selfcheck.Planner, "redirect", lambda self, ids: honest(self, ids)[::-1].copy())
    with pytest.raises(selfcheck.Failed):
        selfcheck.check_tokens()


@pytest.mark.parametrize("seed", range(5))
def test_exhaustive_optimum_equals_the_definition(seed):
    rng = np.random.default_rng(seed)
    ranks, n_logical = 5, 9
    phy2log = np.concatenate([np.arange(n_logical), rng.integers(0, n_logical, 6)])
    held = check.hosts(phy2log, n_logical, ranks)
    loads = rng.integers(0, 100, n_logical)
    best = 0
    for mask in range(1, 1 << ranks):
        inside = np.array([mask >> rank & 1 for rank in range(ranks)], dtype=bool)
        captive = sum(int(loads[e]) for e in range(n_logical) if not (held[e] & ~inside).any())
        best = max(best, -(-captive // int(inside.sum())))
    assert check.exhaustive_optimum(loads, held) == best
