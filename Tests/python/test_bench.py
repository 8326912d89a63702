"""`python -m lplb bench`: instances, rows and files. Times are not judged here; the machines that run tests are busy."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from lplb import eplb, solve
from lplb.cli.main import main
from lplb.cli.bench import cases, compare, cpu, drift, kit, peers, plot, sglang
from lplb.planner import Planner
from lplb.cli.terminal import UsageError
from lplb.cli.selfcheck import EPLB_RESULT, EPLB_WEIGHT
from lplb.cli.simulate.options import topology


@pytest.fixture
def few(monkeypatch):
    """Small suites: eight instances, the smallest topology and EPLB cases, few micro-batches."""
    honest = cases.instances
    chosen = tuple(cases.CASES[i] for i in (0, 2, 3, 4, 5, 5, 5, 5))
    monkeypatch.setattr(cpu, "CASES", chosen)
    monkeypatch.setattr(cpu, "instances", lambda case, family, device: honest(case, family, device, 8))
    monkeypatch.setattr(drift, "SHAPES", {(8, 264): (10, 14)})
    monkeypatch.setattr(drift, "MOST", 4)
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
    drifted = [row for row in result["rows"] if "drift" in row["case"]]
    assert len(drifted) == 4 and all(row["certified_fraction"] == 1 and row["instances"] == 4 for row in drifted)
    faster = tmp_path / "faster.json"
    faster.write_text(json.dumps(result | {"rows": [row | {"p50_us": row["p50_us"] / 10**9} for row in result["rows"]]}))
    assert main(["bench", "run", "--compare", str(faster), "--fail-slower"]) == 1
    assert "6 rows are in both runs; 6 became slower by more than 3%" in capsys.readouterr().out
    assert main(["bench", "run", "--compare", str(faster), "--json", str(faster)]) == 2
    (tmp_path / "bad.json").write_text("{}")
    assert plot.main([str(tmp_path / "bad.json"), str(tmp_path / "again.png")]) == 2


def test_what_cannot_be_timed_gets_one_sentence(capsys):
    for words, says in ((["dancing"], "no suite 'dancing'"), (["--json", "nowhere/x.json"], "does not exist"),
                        (["--plot", "x.txt"], ".png"), (["exchange", "solve"], "torchrun"), (["--device", "tpu"], "invalid choice"),
                        (["solve", "--peers"], "--device cuda"), (["--fail-slower"], "--compare"),
                        (["--compare", "nowhere.json"], "no such"),
                        (["eplb", "--counts", "x.npy"], "solve and run"), (["run", "--counts", "nowhere.npz"], "no such file"),
                        (["exchange", "--peers"], "no option of bench exchange")):
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


def test_counts_of_files_are_checked_and_scaled(tmp_path):
    rng = np.random.default_rng(9)
    counts = rng.integers(1, 10**6, (3, 2, 256))
    path = str(tmp_path / "counts.npz")
    np.savez(path, counts=counts)
    read = drift.read(path)
    assert (read.history == counts[0]).all() and (read.arriving[1, 0] == counts[1, 1]).all()
    with drift.instances(drift.cases()[0], read, "cpu") as todo:
        assert len(todo.loads) == 4 and (todo.loads.sum(axis=1) == drift.TOKENS * drift.TOP_K).all() and list(todo.planner) == [0, 0, 1, 1]
        ids = drift.batches(todo.loads)
        assert all((np.bincount(each.ravel(), minlength=256) == row).all() for each, row in zip(ids, todo.loads))
        assert np.abs(todo.loads[0] - counts[1, 0] * (drift.TOKENS * drift.TOP_K / counts[1, 0].sum())).max() <= 1
    for wrong in (counts[:1], counts[..., :255], counts * 0, counts - 10**6, counts.astype(float)):
        np.savez(path, counts=wrong)
        with pytest.raises(UsageError, match="--counts"):
            drift.read(path)
    sample = drift.read(None)
    assert sample.history.shape == (7, 256) and sample.arriving.shape == (7, 4, 256) and (sample.arriving.sum(axis=2) == 4 * 1024 * 6).all()


def test_what_became_slower():
    rows = [kit.Row("solve", name, 1, p50, p50) for name, p50 in (("a", 10.2), ("b", 10.4), ("c", 30), ("new", 1))]
    earlier = compare.Earlier({("solve", "a"): 10.0, ("solve", "b"): 10.0, ("solve", "c"): 10.0, ("run", "a"): 1.0}, "one machine")
    assert [(row.case, was) for row, was in compare.slower(earlier, rows)] == [("c", 10.0), ("b", 10.0)]
    text, slower = compare.report(earlier, rows, "another")
    assert slower == 2 and "3 rows are in both runs; 2 became slower" in text and "1 rows are in this run alone, 1 in the earlier" in text
    assert "another machine: one machine" in text and "3.000" in text


def test_sglangs_problem_has_our_optimum():
    linprog = pytest.importorskip("scipy.optimize").linprog
    rng = np.random.default_rng(6)
    loads = rng.integers(0, 1000, 64)
    for slots in (72, 80):
        with Planner.from_placement(drift.place(loads[None].astype(float), ep_size=8, slots=slots).phy2log[0], ep_size=8, n_logical=64,
                                    device="cpu") as planner:
            matrix, bounds, base, ranks_of = sglang.matrices(np.asarray(planner.phy2log), loads, 8)
            bound = solve(loads, np.asarray(planner.phy2log), 8).bound
        assert np.allclose(matrix @ np.ones(matrix.shape[1]), bounds)  # x = 1 is a point to start from
        cost = np.zeros(matrix.shape[1])
        cost[-2:] = 1, sglang.PENALTY
        found = linprog(cost, A_eq=matrix, b_eq=bounds, method="highs")
        assert bound - 1 < found.x[-2] * loads.sum() <= bound + 1e-6 and found.x[-1] < 1e-9
        shares = base.copy()
        np.add.at(shares, ranks_of, found.x[: len(ranks_of)])
        assert shares.max() == pytest.approx(found.x[-2], abs=1e-9)


def test_a_missing_peer_gets_one_sentence(monkeypatch):
    said = sglang.load()
    if isinstance(said, str):
        assert "no module sglang" in said and "pip install sglang nvidia-mathdx" in said
    monkeypatch.setattr(sglang.importlib, "import_module", lambda name: 1 / 0)
    assert "cannot be imported: division by zero" in sglang.load()


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
