"""`python -m lplb simulate`: traces, policies, figures. Small traces are made here; the shipped one is played once."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lplb.cli import check
from lplb.cli.main import main
from lplb.errors import InternalError
from lplb.cli.simulate import engine, options, play, policies, report, trace

SCHEMA = {"policy", "imbalance_mean", "imbalance_p50", "imbalance_p99", "imbalance_max", "gap_solver_max", "gap_placement_mean",
          "certified_fraction", "plan_us_p50"}
POLICIES = ["no replicas", "even split", "random replica", "fixed replica", "proportional", "lplb"]


def routed(rng, n_tokens, layers, k, n_experts):
    """ids with drifting, skewed experts; a few -1."""
    drift = np.linspace(0, 1, n_tokens)[:, None, None]
    ids = (rng.zipf(1.4, (n_tokens, layers, k)) + drift * 7 * rng.random((n_tokens, layers, k))).astype(np.int64) % n_experts
    ids[rng.random(ids.shape) < 0.02] = -1
    return ids


@pytest.fixture
def ids_file(tmp_path):
    path = tmp_path / "trace.npz"
    np.savez(path, topk_ids=routed(np.random.default_rng(5), 1500, 3, 4, 32).astype(np.int16), n_experts=32)
    return path


def simulate(capsys, *words):
    code = main(["simulate", *map(str, words)])
    return code, capsys.readouterr()


# ---- traces ----

def test_micro_batches_are_consecutive_runs_of_the_trace(ids_file):
    recorded = np.load(ids_file)["topk_ids"]
    cut = trace.cut(trace.load(str(ids_file)), 4, 100, 0.2, 0)
    assert (cut.n_history, cut.n_batches) == (300, 3)  # 1,200 tokens after the history
    for layer in range(3):
        for batch in range(3):
            counts = cut.counts(layer, batch)
            for rank in range(4):
                first = 300 + batch * 400 + rank * 100
                mine = recorded[first:first + 100, layer].ravel()
                assert cut.ids(layer, batch)[rank].tolist() == mine.tolist()
                assert counts[rank].tolist() == [(mine == expert).sum() for expert in range(32)]
        assert cut.history[layer].tolist() == [(recorded[:300, layer] == expert).sum() for expert in range(32)]


def test_steps_are_micro_batches_with_equal_shares_for_the_ranks(tmp_path):
    counts = np.random.default_rng(1).integers(0, 90, (10, 2, 16))
    np.save(tmp_path / "counts.npy", counts)
    cut = trace.cut(trace.load(str(tmp_path / "counts.npy")), 8, 1, 0.3, 0)
    assert (cut.n_history, cut.n_batches, cut.ids(0, 0)) == (3, 7, None)
    assert (cut.history == counts[:3].sum(axis=0)).all()
    for batch in range(7):
        shares = cut.counts(1, batch)
        assert (shares.sum(axis=0) == counts[3 + batch, 1]).all()
        assert (np.ptp(shares, axis=0) <= 1).all()


def test_a_snapshot_is_drawn_from_and_repeats_with_its_seed(tmp_path):
    snapshot = np.random.default_rng(2).integers(1, 1000, (2, 16))
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"logical_count": snapshot.tolist()}))
    loaded = trace.load(str(path))
    first, again, other = (trace.cut(loaded, 4, 500, 0.25, seed) for seed in (0, 0, 1))
    assert (first.drawn == again.drawn).all() and (first.drawn != other.drawn).any()
    assert (first.drawn.sum(axis=2) == 4 * 500 * trace.DRAWN_TOP_K).all()
    share = first.drawn.sum(axis=0) / first.drawn.sum(axis=(0, 2))[:, None]
    assert np.abs(share - snapshot / snapshot.sum(axis=1, keepdims=True)).max() < 0.01


def test_history_of_another_trace(ids_file, tmp_path, capsys):
    other = routed(np.random.default_rng(6), 200, 3, 4, 32)
    np.savez(tmp_path / "other.npz", topk_ids=other, n_experts=32)
    cut = trace.cut(trace.load(str(ids_file)), 4, 100, [trace.load(str(tmp_path / "other.npz"))], 0)
    assert (cut.n_history, cut.n_batches) == (0, 3)
    assert cut.history[1].tolist() == [(other[:, 1] == expert).sum() for expert in range(32)]
    code, said = simulate(capsys, ids_file, "--history", tmp_path / "other.npz", "--json", tmp_path / "out.json")
    assert code == 0 and "all of other.npz" in said.out
    assert json.loads((tmp_path / "out.json").read_text())["config"]["history"] == "other.npz"
    np.savez(tmp_path / "other.npz", topk_ids=other[:, :2], n_experts=32)
    code, said = simulate(capsys, ids_file, "--history", tmp_path / "other.npz")
    assert code == 2 and "has 2 layers of 32 experts" in said.err


def test_named_counts_are_steps_in_file_order(tmp_path):
    path = tmp_path / "named.json"
    path.write_text(json.dumps({"b": {"counts": [[1, 2], [3, 4.0]]}, "a": {"counts": [[5, 6], [7, 8]]}}))
    loaded = trace.load(str(path))
    assert loaded.kind == "steps" and loaded.data.tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]


def test_the_shipped_sample_is_small_and_names_its_source():
    from importlib import resources

    assert resources.files("lplb.cli").joinpath("data", trace.SAMPLE).stat().st_size < 1_000_000
    sample = trace.load_sample()
    assert sample.n_experts == 64 and "github.com/deepseek-ai/ESFT" in sample.source


# ---- policies ----

def random_replicas(rng):
    ranks, nodes = int(rng.choice([4, 8, 12])), int(rng.choice([1, 2]))
    n_logical = ranks * int(rng.integers(1, 5))
    per_rank = n_logical // ranks + int(rng.integers(0, 4))
    spare = rng.integers(0, n_logical, ranks * per_rank - n_logical)
    phy2log = rng.permutation(np.concatenate([np.arange(n_logical), spare]))
    copies = np.bincount(phy2log)
    log2phy = np.full((n_logical, copies.max()), -1, dtype=np.int32)
    for expert in range(n_logical):
        log2phy[expert, :copies[expert]] = np.flatnonzero(phy2log == expert)
    return policies.Replicas(log2phy, ranks * per_rank, ranks, nodes), phy2log, rng.integers(0, 60, (ranks, n_logical))


@pytest.mark.parametrize("seed", range(40))
def test_policies_send_every_token_to_a_replica_of_its_expert(seed):
    rng = np.random.default_rng(seed)
    replicas, phy2log, counts = random_replicas(rng)
    split = policies.random(counts, replicas, rng).sum(axis=0)
    choice = policies.fixed_choice(replicas)
    even = policies.even(counts, replicas)
    for taken in (even, policies.random(counts, replicas, rng), policies.fixed(counts, replicas, choice),
                  policies.proportional(counts, replicas, split)):
        check.conserve(taken, counts, phy2log)
        on_rank, on_node = policies.locality(taken, replicas.nodes)
        assert 0 <= on_rank <= on_node <= counts.sum()
        if replicas.nodes == 1:
            assert on_node == counts.sum()
    for slots in replicas.log2phy:  # even: as even as whole tokens can be
        assert np.ptp(even.sum(axis=0)[slots[slots >= 0]]) <= 1
    per_rank, per_node = replicas.n_physical // replicas.ranks, replicas.ranks // replicas.nodes
    for source in range(replicas.ranks):
        for expert, slots in enumerate(replicas.log2phy):
            at = slots[slots >= 0] // per_rank
            chosen = at[choice[source, expert]]
            near = at[at // per_node == source // per_node]
            assert chosen in (at[at == source] if (at == source).any() else near if near.size else at)


def test_proportional_rounds_down_per_source():
    replicas = policies.Replicas(np.array([[0, 1]], dtype=np.int32), 2, 2, 1)
    counts = np.array([[3], [3]])
    assert policies.proportional(counts, replicas, np.array([3, 3])).tolist() == [[1, 2], [1, 2]]
    three = policies.Replicas(np.array([[0, 1, 2]], dtype=np.int32), 3, 3, 1)
    assert policies.proportional(np.array([[4], [3], [2]]), three, np.array([3, 3, 3])).tolist() == [[1, 1, 2], [1, 1, 1], [0, 1, 1]]


def test_locality_counts_ranks_and_nodes():
    taken = np.array([[5, 1, 2, 0], [0, 7, 0, 1], [3, 0, 0, 0], [0, 0, 4, 6]])  # 4 ranks with a slot each, 2 nodes
    assert policies.locality(taken, 2) == (5 + 7 + 0 + 6, 5 + 1 + 7 + 4 + 6)


# ---- the whole ----

@pytest.mark.parametrize("words", [
    ["--topology", "cube"], ["--topology", "ring", "--nodes", "2"], ["--topology", "square", "--ranks", "8"],
    ["--topology", "torus:4x2", "--slots", "64"], ["--placement", "eplb", "--slots", "48"], ["--placement", "eplb", "--ranks", "5"],
    ["--topology", "hypercube", "--tokens-per-rank", "32"], ["--history", "0"],
])
def test_figures_follow_from_the_plays(ids_file, tmp_path, capsys, words):
    out = tmp_path / "out.json"
    code, said = simulate(capsys, ids_file, "--tokens-per-rank", "64", *words, "--json", out)
    assert code == 0, said.err
    result = json.loads(out.read_text())
    rows = {row["policy"]: row for row in result["rows"]}
    uneven = result["config"]["n_logical"] % result["config"]["ranks"] != 0
    assert list(rows) == [name for name in POLICIES if not (uneven and name == "no replicas")]
    for row in rows.values():
        assert SCHEMA <= set(row)
        assert 1 <= row["imbalance_p50"] <= row["imbalance_p99"] <= row["imbalance_max"]
        assert row["imbalance_mean"] <= row["imbalance_max"]
        assert row["gap_solver_max"] >= 0 and 0 <= row["own_rank_share"] <= row["own_node_share"] <= 1
    exact = rows["lplb"]
    assert exact["gap_solver_max"] == 0 and exact["certified_fraction"] == 1 and exact["plan_us_p50"] > 0
    for name in POLICIES[1:-1]:
        for figure in ("imbalance_mean", "imbalance_p50", "imbalance_p99", "imbalance_max"):
            assert exact[figure] <= rows[name][figure]
    assert np.isclose(exact["imbalance_mean"], 1 + exact["gap_placement_mean"])
    assert "proven optimal" in said.out and said.err == ""


def test_every_play_is_at_the_optimum_of_all_rank_sets(ids_file, capsys):
    asked = options.check(parsed(ids_file, "--tokens-per-rank", "40"))
    played = play.play(asked)
    exact, alone = played.of("lplb"), played.of("no replicas")
    assert len(played.played) == 3 * asked.cut.n_batches == len(exact.loads)
    maker = engine.Engine(asked.layout)
    for (layer, batch), loads, without in zip(played.played, exact.loads, alone.loads):
        counts = asked.cut.counts(layer, batch).sum(axis=0)
        phy2log = maker.place(layer, asked.cut.history[layer])
        assert loads.max() == check.exhaustive_optimum(counts, check.hosts(phy2log, 32, 8))
        originals = phy2log.reshape(8, -1)[:, :4]  # 4 experts a rank, their copies behind them
        assert without.tolist() == counts[originals].sum(axis=1).tolist()
    maker.close()


def test_counts_without_tokens_are_played_too(tmp_path, capsys):
    rng = np.random.default_rng(7)
    np.save(tmp_path / "steps.npy", rng.zipf(1.5, (8, 2, 32)).clip(0, 500))
    (tmp_path / "snapshot.json").write_text(json.dumps({"logical_count": rng.integers(1, 900, (2, 32)).tolist()}))
    for name, plays, says in (("steps.npy", 12, "equal share"), ("snapshot.json", 64, "drawn from it at random")):
        for words in ([], ["--placement", "eplb", "--nodes", "2"]):
            code, said = simulate(capsys, tmp_path / name, *words, "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png")
            result = json.loads((tmp_path / "out.json").read_text())
            assert code == 0 and says in said.out and result["config"]["plays"] == plays
            exact = result["rows"][-1]
            assert exact["gap_solver_max"] == 0 and exact["certified_fraction"] == 1 and exact["own_rank_share"] is None


def parsed(*words):
    from lplb.cli.main import parser

    return parser().parse_args(["simulate", *map(str, words)])


def test_a_worse_plan_shows_in_the_figures(ids_file, capsys, tmp_path, monkeypatch):
    """Gap and certified fraction are computed from loads and witness; a plan's own claims are not believed."""
    honest = engine.Engine.plan

    def uneven(self, counts, ids, phy2log):
        plans = honest(self, counts, ids, phy2log)
        replicas = self.replicas()
        return engine.RankPlans(policies.fixed(counts, replicas, np.zeros_like(counts)), plans.split, plans.groups, plans.microseconds)

    monkeypatch.setattr(engine.Engine, "plan", uneven)
    out = tmp_path / "out.json"
    code, said = simulate(capsys, ids_file, "--json", out)
    row = json.loads(out.read_text())["rows"][-1]
    assert row["policy"] == "lplb" and row["gap_solver_max"] > 0.02 and row["certified_fraction"] < 1
    assert "NOT all" in said.out


def test_lost_tokens_are_noticed():
    with pytest.raises(InternalError):
        check.conserve(np.array([[3, 0, 2]]), np.array([[3, 3]]), np.array([0, 1, 1]))
    with pytest.raises(InternalError):
        check.conserve(np.array([[4, -1, 2]]), np.array([[4, 1]]), np.array([0, 1, 1]))
    check.conserve(np.array([[3, 1, 2]]), np.array([[3, 3]]), np.array([0, 1, 1]))


def test_sample_runs_as_it_is_and_draws(tmp_path, capsys):
    picture, out = tmp_path / "out.png", tmp_path / "out.json"
    code, said = simulate(capsys, "--plot", picture, "--json", out)
    assert code == 0, said.err
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    rows = {row["policy"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["lplb"]["imbalance_mean"] < rows["even split"]["imbalance_mean"] < rows["no replicas"]["imbalance_mean"]
    assert rows["lplb"]["own_rank_share"] > rows["proportional"]["own_rank_share"]
    table = [line for line in said.out.splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1 and len(table) == 2 + len(POLICIES)


def test_layers_and_empty_micro_batches(tmp_path, capsys):
    ids = np.zeros((64, 5, 2), dtype=np.int64)
    ids[:, :, 1] = 9
    ids[32:48] = -1
    np.savez(tmp_path / "t.npz", topk_ids=ids, n_experts=16)
    code, said = simulate(capsys, tmp_path / "t.npz", "--tokens-per-rank", "2", "--history", "0.25", "--layers", "0,2-3", "--json",
                          tmp_path / "o.json")
    config = json.loads((tmp_path / "o.json").read_text())["config"]
    assert code == 0 and config["layers"] == [0, 2, 3] and config["plays"] == 6 and config["skipped_empty"] == 3
    assert "3 empty micro-batches" in said.out


def test_percent_never_rounds_to_certainty():
    assert [report.percent(x) for x in (0, 1, 0.9999, 0.0001, 0.123)] == ["0%", "100%", ">99.9%", "<0.1%", "12.3%"]
    assert [report.percent(x, 0) for x in (0.999, 0.5)] == [">99%", "50%"]


# ---- refusals ----

def damaged(tmp_path):
    """Files that cannot be used, by name."""
    files = {name: tmp_path / name for name in ("text.npz", "empty.npz", "keys.npz", "flat.npz", "float.npz", "low.npz", "text.npy",
                                                "flat.npy", "minus.npy", "zero.npy", "text.json", "keys.json", "ragged.json", "half.json",
                                                "r2o.npy", "pickle.npy", "huge.npy")}
    for name in ("text.npz", "text.npy", "text.json"):
        files[name].write_text("not what it says")
    files["empty.npz"].write_bytes(b"")
    np.savez(files["keys.npz"], ids=np.zeros(3))
    np.savez(files["flat.npz"], topk_ids=np.zeros((3, 4), dtype=int))
    np.savez(files["float.npz"], topk_ids=np.zeros((3, 4, 2)))
    np.savez(files["low.npz"], topk_ids=np.full((3, 4, 2), -2))
    np.save(files["flat.npy"], np.zeros((3, 4), dtype=int))
    np.save(files["minus.npy"], np.full((3, 4, 8), -1))
    np.save(files["zero.npy"], np.zeros((3, 4, 8), dtype=int))
    np.save(files["huge.npy"], np.full((3, 1, 8), 2.0**40))
    np.save(files["pickle.npy"], np.array([{}], dtype=object), allow_pickle=True)
    files["keys.json"].write_text("{}")
    files["ragged.json"].write_text('{"logical_count": [[1, 2], [3]]}')
    files["half.json"].write_text('{"logical_count": [[1, 2.5]]}')
    np.save(files["r2o.npy"], np.array([[0], [0]]))
    return files


@pytest.mark.parametrize("words, says", [
    (["missing.npz"], "no such file"),
    (["trace.txt"], "a trace is a .npz"),
    (["text.npz"], "not a readable .npz"),
    (["empty.npz"], "not a readable .npz"),
    (["keys.npz"], "needs an array topk_ids"),
    (["flat.npz"], "[tokens, layers, k]"),
    (["float.npz"], "must be integers"),
    (["low.npz"], "-1 .. "),
    (["text.npy"], "not a readable .npy"),
    (["pickle.npy"], "not a readable .npy"),
    (["flat.npy"], "[steps, layers, experts]"),
    (["minus.npy"], "at least 0"),
    (["zero.npy"], "all counts are 0"),
    (["huge.npy"], "2^31"),
    (["text.json"], "not a readable .json"),
    (["keys.json"], "logical_count"),
    (["ragged.json"], "rows of one length"),
    (["half.json"], "whole numbers"),
    (["--topology", "sphere"], "torus:MxN"),
    (["--topology", "torus:1x8"], "sides of at least 2"),
    (["--topology", "r2o.npy"], "permutation"),
    (["--topology", "missing.npy"], "no such file"),
    (["--topology", "cube", "--placement", "eplb"], "not allowed with"),
    (["--ranks", "12"], "multiple of the 8 ranks"),
    (["--ranks", "0"], "at least 1"),
    (["--ranks", "many"], "at least 1"),
    (["--topology", "torus:3x3"], "divides the 64 experts"),
    (["--slots", "70"], "64 + m*16"),
    (["--slots", "208"], "more than its 8 experts"),
    (["--placement", "eplb", "--slots", "70"], "multiple of the 8 ranks"),
    (["--placement", "eplb", "--slots", "56"], "hold the 64 experts"),
    (["--placement", "eplb", "--ranks", "2048"], "at most 1024"),
    (["--nodes", "3"], "must divide the 8 ranks"),
    (["--tokens-per-rank", "100000"], "fewer than one micro-batch"),
    (["--history", "1"], "below 1"),
    (["--history", "nan"], "below 1"),
    (["--history", "all"], "below 1"),
    (["--history", "gone.npz"], "no such file"),
    (["--layers", "0,7"], "layers 0 .. 6"),
    (["--layers", "3-"], "such as 0,3,5-7"),
    (["--experts", "32"], "must lie in"),
    (["--experts", "5000"], "at most 4096"),
    (["--json", "nowhere/out.json"], "does not exist"),
    (["--plot", "out.txt"], ".png"),
    (["--seed", "-1"], "at least 0"),
    (["--colour"], "unrecognized"),
])
def test_what_cannot_be_used_gets_one_sentence(tmp_path, capsys, monkeypatch, words, says):
    damaged(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, said = simulate(capsys, *words)
    assert code == 2 and said.out == ""
    assert says in said.err and said.err.count("\n") == 1 and said.err.startswith("lplb: ")


def drifting(tmp_path):
    """Three steps for a history, and ten in which other experts are hot."""
    rng = np.random.default_rng(11)
    before, after = rng.lognormal(0, 1, (2, 2, 32))
    np.save(tmp_path / "before.npy", rng.poisson(before * 400, (3, 2, 32)))
    np.save(tmp_path / "other.npy", rng.poisson(after * 400, (3, 2, 32)))
    np.save(tmp_path / "after.npy", rng.poisson(after * 400, (10, 2, 32)))
    return tmp_path / "after.npy", ["--ranks", "4", "--slots", "40", "--history", tmp_path / "before.npy"]


def mean_imbalance(tmp_path, policy="lplb"):
    result = json.loads((tmp_path / "out.json").read_text())
    return next(row["imbalance_mean"] for row in result["rows"] if row["policy"] == policy), result["config"]


def test_repairs_follow_the_drift(tmp_path, capsys):
    trace, words = drifting(tmp_path)
    found = {}
    for name, more in (("never", []), ("often", ["--repair", "1", "--max-moves", "3"]), ("once", ["--repair", "9", "--max-moves", "3"])):
        code, said = simulate(capsys, trace, *words, "--placement", "flow", *more, "--json", tmp_path / "out.json")
        assert code == 0
        found[name], config = mean_imbalance(tmp_path)
        assert (config["repairs"], config["moves"] > 0) == {"never": (0, False), "often": (18, True), "once": (2, True)}[name]
        assert config["moves"] <= 3 * config["repairs"]
        assert ("repaired after every" in said.out) == bool(more)
    assert found["often"] < found["once"] <= found["never"]


@pytest.mark.parametrize("placement, most", [("flow", None), ("flow", 2), ("balanced", 2), ("balanced", None), ("eplb", None)])
def test_new_placements_follow_the_drift(tmp_path, capsys, placement, most):
    """Their moves are in the table, the JSON file and the picture."""
    trace, words = drifting(tmp_path)
    words = [trace, *words, "--placement", placement, "--json", tmp_path / "out.json"]
    assert simulate(capsys, *words)[0] == 0
    policy = "lplb" if placement == "flow" else "even split"
    never, _ = mean_imbalance(tmp_path, policy)
    budget = [] if most is None else ["--max-moves", most]
    code, said = simulate(capsys, *words, "--replace", "4", *budget, "--plot", tmp_path / "out.png")
    result = json.loads((tmp_path / "out.json").read_text())
    config, rows = result["config"], {row["policy"]: row for row in result["rows"]}
    assert code == 0 and (config["replace"], config["replacements"], config["repairs"]) == (4, 4, 0)
    assert [change[:2] for change in result["changes"]] == [[layer, batch] for layer in (0, 1) for batch in (4, 8)]
    assert config["moves"] == sum(change[2] for change in result["changes"]) == rows["lplb"]["moves"] > 0
    assert most is None or all(change[2] <= most for change in result["changes"])
    assert f"placed anew after every 4 micro-batches of a layer: {config['moves']} moves in 4 placements" in said.out
    assert mean_imbalance(tmp_path, policy)[0] < never
    assert (tmp_path / "out.png").stat().st_size > 20_000
    table = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")] for line in said.out.splitlines() if line.startswith("|")}
    column = table["policy"].index("moves")
    assert table["lplb"][column] == table["even split"][column] == str(config["moves"]) and table["no replicas"][column] == "-"
    assert ("eplb, exact split" in table) == (placement != "eplb") and table.get("eplb, exact split", "-" * 99)[column] == "-"


def test_eplb_beside_another_placement(tmp_path, capsys):
    """As if it were played by itself, and the share of tokens that leave ranks and hosts."""
    trace, words = drifting(tmp_path)
    rows = {}
    for placement in ("flow", "eplb"):
        assert simulate(capsys, trace, *words, "--nodes", "2", "--placement", placement, "--json", tmp_path / "out.json")[0] == 0
        rows[placement] = {row["policy"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    for theirs, alone in (("eplb, even split", "even split"), ("eplb, exact split", "lplb")):
        for name in set(rows["eplb"][alone]) - {"policy", "plan_us_p50", "moves"}:
            assert rows["flow"][theirs][name] == rows["eplb"][alone][name], name
    assert "eplb, even split" not in rows["eplb"]
    for row in rows["flow"].values():
        assert 0 < row["leaves_node"] < row["leaves_rank"] < 1 and row["inbound_max"] <= row["imbalance_max"]


def test_tokens_that_leave_are_those_that_do_not_stay(ids_file, tmp_path, capsys):
    code, said = simulate(capsys, ids_file, "--nodes", "2", "--tokens-per-rank", "50", "--json", tmp_path / "out.json")
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")] for line in said.out.splitlines() if line.startswith("|")}
    for row in json.loads((tmp_path / "out.json").read_text())["rows"]:
        assert row["leaves_rank"] == pytest.approx(1 - row["own_rank_share"]) and row["leaves_node"] == pytest.approx(1 - row["own_node_share"])
        assert lines[row["policy"]][lines["policy"].index("leaves node")] == report.percent(row["leaves_node"])


def test_inbound_counts_what_comes_from_others():
    assert policies.inbound(np.array([[5, 1, 2, 0], [0, 7, 0, 1], [3, 0, 0, 0], [0, 0, 4, 6]])).tolist() == [3, 1, 6, 1]


def test_snapshots_of_several_workloads(tmp_path, capsys):
    trace, words = drifting(tmp_path)
    simulate(capsys, trace, *words, "--placement", "flow", "--json", tmp_path / "out.json")
    alone, _ = mean_imbalance(tmp_path)
    both = [*words[:-1], f"{words[-1]},{tmp_path / 'other.npy'}"]
    code, said = simulate(capsys, trace, *both, "--placement", "flow", "--json", tmp_path / "out.json")
    assert code == 0 and "all of before.npy and of other.npy" in said.out
    assert mean_imbalance(tmp_path)[0] < alone


def test_placements_from_files(tmp_path, capsys):
    trace, words = drifting(tmp_path)
    slots = np.tile(np.r_[np.arange(32), np.full(8, -1)], (2, 1)).astype(np.int32)
    np.save(tmp_path / "slots.npy", slots[:, np.r_[0:8, 32:34, 8:16, 34:36, 16:24, 36:38, 24:32, 38:40]])
    code, said = simulate(capsys, trace, *words, "--placement", tmp_path / "slots.npy", "--json", tmp_path / "out.json")
    assert code == 0 and mean_imbalance(tmp_path)[0] == pytest.approx(mean_imbalance(tmp_path, "even split")[0])
    for more, why in ((["--topology", "square", "--repair", "2"], "needs --placement"), (["--placement", "flow", "--max-moves", "2"], "needs --repair"),
                      (["--placement", tmp_path / "slots.npy", "--replace", "2"], "--replace: needs --placement flow, balanced, eplb"),
                      (["--topology", "square", "--replace", "2"], "--replace: needs --placement"),
                      (["--placement", "eplb", "--replace", "2", "--max-moves", "3"], "--max-moves: cannot be kept by --placement eplb"),
                      (["--placement", "best"], "--placement: must be flow, balanced, eplb or a .npy file")):
        code, said = simulate(capsys, trace, *words[:-2], *more)
        assert code == 2 and why in said.err


# ---- other costs than tokens ----

def test_units_active_experts_and_speeds(ids_file, tmp_path, capsys):
    """The plans are optimal in what is counted, recomputed from the witnesses; splits by tokens and the greedy choice are never better."""
    slow = tmp_path / "slow.txt"
    slow.write_text("1024, 922\n1024 1024")
    quick = ("--topology", "square", "--tokens-per-rank", 32)
    for words, others in ((("--unit", 16), ["lplb by tokens"]), (("--unit", "experts"), ["greedy, fewest experts", "lplb by tokens"]),
                          (("--speed", slow), ["lplb by tokens"]), (("--unit", 8, "--speed", slow), ["lplb by tokens"])):
        code, out = simulate(capsys, ids_file, *quick, *words, "--json", tmp_path / "a.json")
        assert code == 0 and "cost of a rank:" in out.out
        rows = {row["policy"]: row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
        assert [name for name in rows if name not in POLICIES] == others
        assert rows["lplb"]["certified_fraction"] == 1 and rows["lplb"]["gap_solver_max"] == 0
        for name in [*others, "even split", "random replica", "proportional"]:
            assert rows[name]["imbalance_mean"] >= rows["lplb"]["imbalance_mean"] and rows[name]["gap_solver_max"] >= 0, name
    _, config = simulate(capsys, ids_file, *quick), json.loads((tmp_path / "a.json").read_text())["config"]
    assert (config["unit"], config["speed"]) == (8, [1024, 922, 1024, 1024])


def test_the_greedy_choice_takes_the_rank_with_the_fewest_active_experts():
    log2phy = np.array([[0, -1], [1, 4], [5, 3], [2, -1]], dtype=np.int32)  # 3 ranks of 2 slots
    taken = policies.fewest_experts(np.array([[5, 1, 1, 0], [0, 2, 0, 0], [1, 0, 0, 0]]), policies.Replicas(log2phy, 6, 3, 1))
    # expert 0 on rank 0; expert 1 then on rank 2 rather than 0; expert 2 on rank 1, which has none
    assert taken.tolist() == [[5, 0, 0, 1, 1, 0], [0, 0, 0, 0, 2, 0], [1, 0, 0, 0, 0, 0]]


def test_costs_that_cannot_be_are_refused(ids_file, tmp_path, capsys):
    wrong = {"many.txt": "1 2 3 4 5", "zero.json": "[0, 1, 1, 1]", "word.txt": "1 2 3 four", "float.json": "[1.5, 1, 1, 1]"}
    for name, content in wrong.items():
        (tmp_path / name).write_text(content)
    asked = [("--unit", "0"), ("--unit", "tokens"), ("--unit", str(2**31)), ("--speed", tmp_path / "none.txt"),
             *(("--speed", tmp_path / name) for name in wrong)]
    for words in asked:
        code, out = simulate(capsys, ids_file, "--topology", "square", *words)
        assert code == 2 and words[0] in out.err and out.err.count("\n") == 1, words
