"""`python -m lplb place`, and `simulate` with the placements that it writes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lplb import InvalidArgument, placement_report
from lplb.cli.check import conserve, hosts
from lplb.cli.main import main
from lplb.eplb import rebalance_experts
from lplb.errors import InternalError

LAYERS, EXPERTS, RANKS = 3, 16, 4


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with two histories, and the placement of the first: 16 experts in 24 slots on 4 ranks."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    loads = rng.lognormal(6, 1, (LAYERS, EXPERTS))
    for name in ("one", "two"):
        np.save(f"{name}.npy", rng.poisson(loads * rng.lognormal(0, 0.4, loads.shape), (5, LAYERS, EXPERTS)).astype(np.int64))
    assert main(["place", "one.npy", "--ranks", "4", "--out", "first.npy"]) == 0
    return tmp_path


def run(words, capsys):
    capsys.readouterr()
    code = main(["place", "--ranks", "4", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def held(name, width=6):
    return np.load(name).reshape(LAYERS, RANKS, width)


def test_out_and_json(here, capsys):
    code, out, err = run(["one.npy", "two.npy", "--slots", 26, "--policy", "balanced", "--out", "out.npy", "--json", "out.json"], capsys)
    assert (code, err) == (0, "") and "2 snapshots" in out and "3 layers, 16 experts in 26 slots on 4 ranks" in out
    slots = held("out.npy", 7)
    assert slots.dtype == np.int32 and ((slots >= 0).sum(2) == [7, 7, 6, 6]).all()
    report = json.loads((here / "out.json").read_text())
    assert report["rows"][0]["placement"] == "balanced" and report["moves"] == []
    assert report["rows"][0]["even"] == pytest.approx(np.mean(report["even_balance"]))


@pytest.mark.parametrize("budget, most", [("3", 3), ("5%", 3), ("0", 0), ("0%", 0), ("100%", 72)])
def test_a_budget_is_kept(here, capsys, budget, most):
    code, out, _ = run(["two.npy", "--policy", "repair", "--previous", "first.npy", "--max-moves", budget, "--out", "next.npy", "--json",
                        "next.json"], capsys)
    report = json.loads((here / "next.json").read_text())
    assert code == 0 and [row["placement"] for row in report["rows"]] == ["previous", "repair"]
    before, now = held("first.npy"), held("next.npy")
    moves = [(layer, expert, rank) for layer in range(LAYERS) for rank in range(RANKS)
             for expert in set(now[layer, rank].tolist()) - set(before[layer, rank].tolist())]
    assert len(moves) == report["rows"][1]["moves"] <= most and report["rows"][0]["moves"] == 0
    assert sorted((layer, expert, target // 6) for layer, expert, _, target in report["moves"]) == sorted(moves)
    assert report["rows"][1]["exact"] >= report["rows"][0]["exact"] and (most == 0 or len(moves) > 0)


def test_training_and_locality_beside_eplb(here, capsys):
    """The tables say what the JSON file and the placement itself say."""
    code, out, _ = run(["one.npy", "--nodes", "2", "--even-homes", "--out", "out.npy", "--json", "out.json"], capsys)
    report = json.loads((here / "out.json").read_text())
    loads = np.load("one.npy").sum(0)
    again = placement_report(np.load("out.npy"), ep_size=RANKS, history=loads, nodes=2)
    for name in ("homes", "pulls", "pushes", "leaves_rank", "leaves_node", "inbound"):
        assert report[name] == getattr(again, name).tolist(), name
    row, eplb = report["rows"][0], report["eplb"]
    assert (row["homes_least"], row["homes_most"]) == (4, 4) and row["leaves_node"] == pytest.approx(again.leaves_node.mean())
    assert (row["pulls_max"], row["pulls_mean"]) == (again.pulls.sum(0).max(), again.pulls.sum(0).mean())
    assert (row["pushes_max"], row["pushes_layer"]) == (again.pushes.sum(0).max(), again.pushes.max())
    theirs = placement_report(rebalance_experts(loads, 24, 1, 1, RANKS)[0], ep_size=RANKS, history=loads, nodes=2)
    assert eplb["leaves_rank"] == theirs.leaves_rank.mean() and eplb["exact"] == theirs.exact_balance.mean()
    lines = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("|")]
    cells = {(line[0].strip(), len(line)): [cell.strip() for cell in line] for line in lines}
    assert cells["flow", 10][7:9] == [f"{row['leaves_rank']:.1%}", f"{row['leaves_node']:.1%}"]
    assert cells["eplb", 10][7:9] == [f"{eplb['leaves_rank']:.1%}", f"{eplb['leaves_node']:.1%}"]
    assert cells["flow", 8][1:5] == ["4", f"{row['pulls_mean']:.1f}", str(row["pulls_max"]), str(row["pulls_layer"])]
    assert code == 0 and "leaves rank" in out and "leaves node" not in run(["one.npy"], capsys)[1]


def test_the_previous_placement_may_be_overwritten(here, capsys):
    assert run(["two.npy", "--policy", "repair", "--previous", "first.npy", "--out", "first.npy"], capsys)[0] == 0


def test_dead_ranks(here, capsys):
    """Without a previous placement the others get the slots, with one they keep theirs; a rank named twice is dead once."""
    code, out, _ = run(["one.npy", "--dead", "1,1", "--out", "dead.npy"], capsys)
    assert code == 0 and "in 24 slots on 3 ranks" in out
    assert (held("dead.npy", 8)[:, 1] == -1).all() and (held("dead.npy", 8)[:, [0, 2, 3]] >= 0).all()
    code, out, _ = run(["two.npy", "--dead", "1", "--previous", "first.npy", "--policy", "repair", "--max-moves", "2", "--out", "dead.npy"],
                       capsys)
    slots = held("dead.npy")
    assert code == 0 and (slots[:, 1] == -1).all()
    assert all(set(layer.ravel()) - {-1} == set(range(EXPERTS)) for layer in slots)


@pytest.mark.parametrize("placement", ["flow", "balanced", "first.npy", "dead.npy"])
def test_simulate_plays_what_place_writes(here, capsys, placement):
    """Also a placement with empty slots and a dead rank."""
    assert run(["one.npy", "--dead", "2", "--slots", 23, "--out", "dead.npy"], capsys)[0] == 0
    code = main(["simulate", "two.npy", "--ranks", "4", "--placement", placement, "--json", "seen.json"])
    assert code == 0, capsys.readouterr().err
    assert "solver gap" in capsys.readouterr().out and json.loads((here / "seen.json").read_text())


@pytest.mark.parametrize("words, says", [
    (["--dead", "0,1,2,3"], "dead: must leave a rank alive, got all 4"),
    (["--dead", "4"], "dead: must be at most 3, got 4"),
    (["--dead", "1,,2"], "--dead: must be a list of ranks such as 3,7, got '1,,2'"),
    (["--slots", "15"], "slots: must be at least n_logical 16 in all, got 15"),
    (["--slots", "9999"], "slots: must be at most 8192, got 9999"),
    (["--nodes", "3"], "n_nodes: must divide n_ranks 4, got 3"),
    (["--groups", "17"], "n_groups: must lie in 1 .. 16, got 17"),
    (["--policy", "repair"], "previous: must be given with policy repair"),
    (["--policy", "deepseek", "--slots", "25"], "policy: deepseek needs equally many slots on every rank"),
    (["--policy", "deepseek", "--previous", "first.npy", "--max-moves", "3"], "max_moves: must not be given with policy deepseek"),
    (["--max-moves", "3"], "max_moves: needs previous"),
    (["--previous", "first.npy", "--max-moves", "nan"], "--max-moves: must be a number of moves or a share such as 5%, got 'nan'"),
    (["--previous", "first.npy", "--max-moves", "1.5"], "--max-moves: must be a number of moves or a share such as 5%, got '1.5'"),
    (["--even-homes", "--policy", "repair", "--previous", "uneven.npy", "--max-moves", "0"],
     "even_homes: must be 0 where no placement was found in which every rank can own 4 of the 16 experts, got rank 0 with 6 in layer 0"),
    (["--previous", "words.npy"], "words.npy: not a readable .npy file"),
    (["--previous", "none.npy"], "none.npy: no such file"),
    (["--previous", "first.npy", "--slots", "28"], "previous: must be [3 layers, 4 * 7 slots], got shape [3, 24]"),
    (["--previous", "floats.npy"], "previous: must hold integers, got float64"),
    (["--previous", "beyond.npy"], "previous[0][0]: must be a logical expert, 0 .. 15, or -1 for none, got 16"),
    (["--out", "out.txt"], "--out: the file must end in .npy, got out.txt"),
    (["--out", "none/out.npy"], "does not exist"),
    (["--out", "same.npy", "--json", "same.npy"], "--out same.npy: would overwrite the file of --json"),
    (["--json", "one.npy"], "--json one.npy: would overwrite history 0"),
    (["--json", "first.npy", "--previous", "first.npy"], "--json first.npy: would overwrite the previous placement"),
    (["other.npy"], "other.npy: has 2 layers of 16 experts, one.npy 3 of 16"),
    (["first.npy"], "first.npy: counts must have the shape"),
    (["--experts", "0"], "--experts"),
])
def test_words(here, capsys, words, says):
    np.save("floats.npy", np.load("first.npy") * 1.0)
    np.save("beyond.npy", np.full((LAYERS, 24), EXPERTS))
    np.save("uneven.npy", np.tile(np.r_[0:16, [12, 13] * 4], (LAYERS, 1)))
    np.save("other.npy", np.ones((5, 2, EXPERTS), dtype=np.int64))
    (here / "words.npy").write_text("words")
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    try:
        code, _, err = run(["one.npy", *words], capsys)
    except SystemExit as ended:
        code, err = ended.code, capsys.readouterr().err
    assert code == 2 and says in err and "Traceback" not in err and err.count("lplb: ") == 1, err
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before, "nothing is written"


def test_recomputed_results_know_empty_slots():
    slots = [0, -1, 1, 0, -1, -1]
    assert hosts(slots, 2, 3).tolist() == [[True, True, False], [False, True, False]]
    conserve([[3, 0, 2, 1, 0, 0]], [[4, 2]], slots)
    with pytest.raises(InternalError):
        conserve([[3, 1, 2, 0, 0, 0]], [[4, 2]], slots)
    with pytest.raises(InvalidArgument, match=r"phy2log\[1\]: must be a logical expert, 0 .. 1, or -1 for none, got -2"):
        hosts([0, -2, 1], 2, 3)
