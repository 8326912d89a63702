"""`python -m lplb bench`: instances, rows and files. Times are not judged here; the machines that run tests are busy."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from lplb import eplb, solve
from lplb.cli.main import main
from lplb.cli.bench import cases, cpu, kit, peers, plot
from lplb.planner import Planner
from lplb.cli.selfcheck import EPLB_RESULT, EPLB_WEIGHT
from lplb.cli.simulate.options import topology


@pytest.fixture
def few(monkeypatch):
    """Small suites: eight instances, the smallest topology and EPLB cases, few micro-batches."""
    honest = cases.instances
    chosen = tuple(cases.CASES[i] for i in (0, 2, 3, 4, 5, 5, 5, 5))
    monkeypatch.setattr(cpu, "CASES", chosen)
    monkeypatch.setattr(cpu, "instances", lambda case, family, device: honest(case, family, device, 8))
    monkeypatch.setattr(cpu, "BATCHES", 3)
    monkeypatch.setattr(cpu, "ROUNDS", 2)


def test_all_suites_write_rows_with_machine_and_date(few, tmp_path, capsys):
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    assert main(["bench", "--json", str(out), "--plot", str(picture)]) == 0
    said = capsys.readouterr()
    result = json.loads(out.read_text())
    assert {"machine", "date", "device", "rows", "call_overhead_us"} <= set(result)
    assert {row["suite"] for row in result["rows"]} == {"solve", "run", "eplb", "mapping"}
    for row in result["rows"]:
        assert 0 <= row["p50_us"] <= row["p99_us"] and row["machine"] and row["date"] == result["date"]
        assert row["met"] is (None if row["target_p50_us"] is None else row["p50_us"] <= row["target_p50_us"])
        if row["suite"] == "solve":
            assert row["certified_fraction"] == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "targets met" in said.out and "| case" in said.out
    assert [kit.Row.from_json(row).as_json() | {"machine": row["machine"], "date": row["date"]} for row in result["rows"]] == result["rows"]
    assert plot.main([str(out), str(tmp_path / "again.png")]) == 0 and (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "bad.json").write_text("{}")
    assert plot.main([str(tmp_path / "bad.json"), str(tmp_path / "again.png")]) == 2


def test_what_cannot_be_timed_gets_one_sentence(capsys):
    for words, says in ((["dancing"], "no suite 'dancing'"), (["--json", "nowhere/x.json"], "does not exist"),
                        (["--plot", "x.txt"], ".png"), (["exchange", "solve"], "torchrun"), (["--device", "tpu"], "invalid choice")):
        assert main(["bench", *words]) == 2
        said = capsys.readouterr()
        assert says in said.err and said.err.count("\n") == 1 and said.out == ""


def test_no_gpu_gets_one_sentence(capsys):
    if importlib.util.find_spec("torch"):
        import torch
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    assert main(["bench", "--device", "cuda"]) == 2
    assert "--device cuda" in capsys.readouterr().err


@pytest.mark.parametrize("case", [cases.CASES[0], cases.CASES[5]], ids=lambda case: case.name)
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_instances_differ_and_repeat(case, family):
    with cases.instances(case, family, "cpu", 64) as first, cases.instances(case, family, "cpu", 64) as again:
        assert (first.loads == again.loads).all() and (first.loads >= 0).all()
        assert len({row.tobytes() for row in first.loads}) == 64
        total = first.loads.sum(axis=1) / (cases.TOKENS_PER_EXPERT * case.n_logical)
        assert (total > 0.8).all() and (total < 1.3).all()


def test_proven_believes_nothing():
    with Planner(topology("cube"), 80, 64, 8, device="cpu") as planner:
        loads = np.random.default_rng(0).integers(0, 1000, 64)
        planner.solve(loads)
        assert cases.proven(planner, loads)

        class Liar:
            ep_size, n_group, phy2log = planner.ep_size, planner.n_group, planner.phy2log
            info = planner.info

            def split(self):
                tokens = np.zeros(80, dtype=np.int64)
                tokens[planner.mapping()[1][:, 0]] = loads
                return tokens

        assert not cases.proven(Liar(), loads)


def test_plain_eplb_is_deepseeks():
    assert peers.eplb(EPLB_WEIGHT, 16, 4, 2, 8) == EPLB_RESULT
    rng = np.random.default_rng(3)
    for groups, nodes, ranks, n, slots in ((8, 4, 16, 64, 80), (1, 1, 8, 40, 56), (3, 2, 4, 24, 32), (4, 4, 4, 16, 16)):
        weight = rng.integers(0, 1000, (3, n)).astype(np.float32)
        ours = np.asarray(eplb.rebalance_experts(weight, slots, groups, nodes, ranks)[0])
        plain = np.array(peers.eplb(weight.tolist(), slots, groups, nodes, ranks))
        assert cpu.balance_of(weight, ours, ranks) == pytest.approx(cpu.balance_of(weight, plain, ranks), rel=1e-6)


def test_the_lp_solver_beside_it_solves_the_same_problem():
    optimize = pytest.importorskip("scipy.optimize")
    found = []

    class Spy:
        def __call__(self, *problem, **options):
            found.append(optimize.linprog(*problem, **options))

    rng = np.random.default_rng(4)
    loads = rng.integers(0, 1000, 64)
    with Planner(topology("cube"), 80, 64, 8, device="cpu") as planner:
        bound = solve(loads, np.asarray(planner.phy2log), 8).bound
        real, optimize_linprog = peers._linprog, Spy()
        try:
            peers._linprog = lambda _, *problem: real(optimize_linprog, *problem)
            assert peers.highs_us(planner, [loads]) > 0
        finally:
            peers._linprog = real
    assert np.ceil(found[0].fun - 1e-6) == bound


def test_balance_of_a_known_placement():
    weight = np.array([[6, 2, 2, 2]], dtype=np.float32)
    # expert 0 twice: loads 3+2, 3+2, 2+0? slots: rank 0 {0,1}, rank 1 {0,2}, rank 2 {3,3}
    assert cpu.balance_of(weight, np.array([[0, 1, 0, 2, 3, 3]]), 3) == pytest.approx(4 / 5)


def test_rows_say_what_was_met():
    def row(p50, p99, target, target_p99=None):
        return kit.Row("solve", "case", 1, p50, p99, target_p50_us=target, target_p99_us=target_p99)

    assert [row(1, 2, None).met, row(1, 2, 1).met, row(2, 2, 1).met, row(1, 2, 1, 1.5).met, row(1, 2, 1, 2).met] == [
        None, True, False, False, True]
    assert "MISSED" in kit.as_table([row(2, 2, 1)]) and [kit.number(x) for x in (0.5, 12.34, 12345.6, None)] == [
        "0.50", "12.3", "12,346", ""]


def test_times_are_per_call_and_take_turns():
    order = []
    times = kit.time_calls(order.append, [(i,) for i in range(3)], 2)
    assert times.shape == (3,) and (times > 0).all()
    assert order == [0, 1, 2] + [0, 1, 2] * 2  # a warm-up, then every round goes through all
