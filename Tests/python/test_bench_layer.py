"""`python -m lplb bench layer`: the arithmetic of its policies, what follows from figures, and small whole runs. Times are not judged."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from lplb import Planner, eplb
from lplb.cli.bench import plot
from lplb.cli.bench.layer import report, routing
from lplb.cli.bench.layer.policies import COPIED, PLAIN, Batch, Copies, columns, imbalance, packed_position, plain, scaled
from lplb.cli.bench.layer.routing import MODELS, arranged, drawn, micro_batch, sources
from lplb.cli.main import main

RANKS, EXPERTS, TOKENS, K = 4, 16, 50, 3


def batch(number=0, tokens=TOKENS):
    """Skewed ids, and a history that is not quite theirs."""
    rng = np.random.default_rng([9, number])
    loads = rng.lognormal(0, 1, EXPERTS)
    ids = np.stack([arranged(drawn(loads, tokens, K, rng), tokens, K, rng) for _ in range(RANKS)])
    return Batch(np.rint(1000 * loads * rng.lognormal(0, 0.3, EXPERTS)).astype(np.int64), ids, number)


@pytest.fixture
def copies():
    made = Copies(EXPERTS, RANKS, 2)
    yield made
    made.close()


def sent(routed, n_slots):
    """[slots] rows that all ranks send, from their physical ids."""
    return np.sum([np.bincount(one.physical.ravel(), minlength=n_slots) for one in routed], axis=0)


def test_forced_is_balanced_to_the_row():
    one = batch()
    routed = [plain("forced", one, rank) for rank in range(RANKS)]
    rows = sent(routed, EXPERTS).reshape(RANKS, -1)
    assert (rows == routed[0].sizes).all() and (rows.sum(1) == TOKENS * K).all() and rows.max() - rows.min() <= 1
    assert all(each.physical.shape == (TOKENS, K) for each in routed) and (routed[0].physical != routed[1].physical).any()


def test_fair_has_equal_ranks_and_packed_sizes():
    one = batch()
    routed, packed = [plain("fair", one, rank) for rank in range(RANKS)], plain("packed", one, 0).sizes
    rows = sent(routed, EXPERTS).reshape(RANKS, -1)
    assert (rows == routed[0].sizes).all() and (rows.sum(1) == TOKENS * K).all()
    assert (np.abs(rows - packed * (TOKENS * K) / packed.sum(1, keepdims=True)) < 1).all() and rows.max() > 2 * rows.min()
    from_each = np.stack([np.bincount(each.physical.ravel(), minlength=EXPERTS) for each in routed])
    assert (from_each.max(0) - from_each.min(0) <= 1).all(), "every source sends the same share"


def test_packed_is_eplb_without_replicas():
    one = batch()
    slots = np.asarray(eplb.rebalance_experts(one.history[None].astype(np.float32), EXPERTS, 1, 1, RANKS)[0])[0]
    for rank in range(RANKS):
        routed = plain("packed", one, rank)
        assert (slots[routed.physical] == one.ids[rank]).all() and (routed.ids == routed.physical).all()
    assert (routed.sizes.ravel() == one.counts().sum(0)[slots]).all()
    assert imbalance(routed.sizes) < imbalance(plain("none", one, 0).sizes)
    assert (plain("none", one, 2).physical == one.ids[2]).all()


def test_every_policy_sends_each_token_to_its_expert(copies):
    one = batch()
    found = [dict((policy, (routed, gap)) for policy, routed, gap in copies.routed(one, rank, COPIED)) for rank in range(RANKS)]
    log2phy, _ = copies.place(one.history)
    eplb_slots = np.asarray(eplb.rebalance_experts(one.history[None].astype(np.float32), copies.n_physical, 1, 1, RANKS)[0])[0]
    topology_slots = np.empty(copies.n_physical, dtype=np.int64)
    topology_slots[log2phy[log2phy >= 0]] = np.nonzero(log2phy >= 0)[0]
    for policy in ("even", "random", "fixed", "proportional"):
        expert = eplb_slots if policy == "even" else topology_slots
        routed = [rank[policy][0] for rank in found]
        for rank in range(RANKS):
            assert (expert[routed[rank].physical] == one.ids[rank]).all(), policy
            assert (routed[rank].ids == copies.in_order[routed[rank].physical]).all(), policy
        assert (sent(routed, copies.n_physical) == routed[0].sizes.ravel()).all(), policy
    for rank in range(RANKS):
        for expert in range(EXPERTS):
            assert len(set(found[rank]["fixed"][0].physical[one.ids[rank] == expert])) <= 1, "one replica for each source and expert"
    rows = found[0]["even"][0].sizes.ravel()
    for expert in range(EXPERTS):
        of_it = rows[eplb_slots == expert]
        assert of_it.max() - of_it.min() <= 1, "even shares"
    best = found[0]["lplb"][0].sizes.sum(1).max()
    assert all(best <= found[0][policy][0].sizes.sum(1).max() for policy in ("random", "fixed", "proportional"))
    empty = [rank["empty"][0] for rank in found]
    assert (sent(empty, copies.n_physical) == empty[0].sizes.ravel()).all()
    assert (np.sort(empty[0].sizes.ravel())[-EXPERTS:] == np.sort(plain("packed", one, 0).sizes.ravel())).all()
    assert (empty[0].sizes == 0).sum(1).min() >= copies.slots
    assert (empty[1].ids == copies.in_order[empty[1].physical]).all()


def test_proportional_shares_follow_the_plan(copies):
    one = batch(tokens=4000)
    for policy, routed, _ in copies.routed(one, 1, ("proportional", "lplb")):
        if policy == "proportional":
            rows = routed.sizes
    assert np.abs(rows - routed.sizes).max() <= RANKS, "each source rounds once"


def test_random_is_seeded(copies):
    one, other, again = (next(copies.routed(batch(number), 0, ("random",)))[1] for number in (1, 2, 1))
    assert (one.physical == again.physical).all() and (one.sizes == again.sizes).all()
    assert (one.sizes != other.sizes).any()


def test_names_stand_for_the_placement_by_history(copies):
    """The layer's planner, whose experts stay in order, plans what one placed by the history does."""
    for number in range(3):
        one = batch(number)
        log2phy, name = copies.place(one.history)
        assert sorted(name) == list(range(EXPERTS))
        in_order = Planner(columns(RANKS, 2), copies.n_physical, EXPERTS, RANKS, device="cpu")
        assert (np.asarray(in_order.mapping()[1])[name] == log2phy).all()
        renamed = np.zeros_like(one.counts())
        renamed[:, name] = one.counts()
        in_order.solve(renamed)
        (_, routed, gap), = copies.routed(one, 3, ("lplb",))
        assert routed.physical is None and (routed.ids == name[one.ids[3]]).all()
        assert in_order.info().groups[0].max_load == routed.sizes.sum(1).max()
        assert gap == pytest.approx(routed.sizes.sum(1).max() / (TOKENS * K) - 1)
        assert np.sum(routed.sizes) == RANKS * TOKENS * K
        in_order.close()


def test_scaled_sums_up():
    assert scaled(np.array([1, 1, 1]), 10).tolist() == [4, 3, 3] and scaled(np.array([0, 0]), 5).tolist() == [3, 2]
    assert scaled(np.array([7, 0, 3]), 100).tolist() == [70, 0, 30]


def test_drawn_tokens_select_an_expert_once():
    rng = np.random.default_rng(1)
    counts = drawn(np.array([100.0, 1, 1, 1, 0, 0]), 20, 3, rng)
    ids = arranged(counts, 20, 3, rng)
    assert counts.sum() == 60 and counts[0] == 20 and (np.bincount(ids.ravel(), minlength=6) == counts).all()
    assert all(len(set(row)) == 3 for row in ids.tolist())


@pytest.mark.parametrize("name", MODELS)
def test_the_packages_own_trace_is_enough(name):
    model = MODELS[name]
    layers = sources(model.n_experts, model.top_k, "real", False, None)
    assert len(layers) == 7 and all(len(one.history) == model.n_experts and one.history.any() for one in layers)
    first, again, later = (micro_batch(layers[0], part, 2, 64, model.top_k) for part in (0, 0, 1))
    assert first.shape == (2, 64, model.top_k) and (first == again).all() and (first != later).any()
    assert first.min() >= 0 and first.max() < model.n_experts
    assert (layers[0].ids is not None) == (name == "v2-lite")
    for kind in routing.ROUTINGS[1:]:
        made = sources(model.n_experts, model.top_k, kind, True, None)
        assert (sources(model.n_experts, model.top_k, kind, True, None)[3].history == made[3].history).all()


def test_packed_position_is_a_permutation():
    assert sorted(packed_position(batch().history, RANKS)) == list(range(EXPERTS))


# ---- what follows from figures ----


def share(value):
    return {"ratio": value, "low": value, "high": value}


def figures(tokens, packed, lplb, **more):
    arms = {"packed": {"mean_ms": packed}, "lplb S2": {"mean_ms": lplb, "of_fair": share(0.9), **more}}
    return {"case": "v3-32", "tokens": tokens, "arms": arms}


def test_break_even_is_where_the_gain_pays_the_transfers():
    transfers = {"v3-32": {"S2 bfloat16": {"pull_ms": 0.6, "push_ms": 0.6}}}
    result = {"ranks": 2, "transfers": transfers, "cases": [figures(1000, 5, 5.2), figures(2000, 10, 9.75), figures(4000, 20, 19.2)]}
    (sentence,) = report.break_even(result, 4)  # gains less a quarter of 1.2: -0.5, -0.05, 0.5
    assert "from about 2,182 tokens a rank on" in sentence and "1,000: -4.0% a micro-batch, never pays" in sentence
    assert "2,000: +2.5% a micro-batch, pays from 5 micro-batches a step on" in sentence and "4,000: +4.0%" in sentence
    result["cases"] = [figures(1000, 5, 4)]
    assert "from the smallest measured size on, 1,000" in report.break_even(result, 4)[0]
    result["cases"] = [figures(1000, 5, 4), figures(2000, 5, 6)]
    assert "does not beat packed homes at 1,000 or 2,000" in report.break_even(result, 4)[0]


def test_crossing_is_on_a_straight_line():
    assert report.crossing([(1, -1.0), (3, 1.0)]) == 2 and report.crossing([(1, 1.0), (3, 2.0)]) == 1
    assert report.crossing([(1, 1.0), (2, -1.0), (4, 1.0)]) == 3 and report.crossing([(1, 1.0), (2, -1.0)]) is None


def test_goals_are_judged_where_the_gap_is_zero():
    cases = [figures(2048, 5, 5, of_fair_without_gap=share(0.996)), figures(1024, 5, 5, of_fair_without_gap=share(0.96)),
             figures(4096, 5, 5), figures(512, 5, 5, of_fair_without_gap=share(0.5))]
    transfers = {"v3-32": {"S2 bfloat16": {"pull_ms": 0.5, "push_ms": 0.7}, "S2 float32": {"pull_ms": 9, "push_ms": 0.8}}}
    compared = [{"case": "v3-32", "tokens": 512, "speed": share(0.996)}]
    result = {"device": "cuda", "cases": cases, "transfers": transfers, "compared": compared}
    found = report.goals(result)
    assert [one["met"] for one in found] == [True, False, None, True, False, True, True]
    assert "6 goals met" in report.goals_text(found) and report.goals_text(found).startswith("met ")
    assert report.goals({**result, "device": "cpu"}) == []


def test_kernels_are_told_apart():
    pytest.importorskip("torch")
    from lplb.cli.bench.layer.breakdown import by_kind
    found = by_kind([("ncclDevKernel_SendRecv(args)", 0, 1000), ("sm90_xmma_gemm_bf16", 500, 3000), ("void at::native::silu", 4000, 4500)])
    assert found == {"all-to-all": 1.0, "products": 2.5, "elementwise": 0.5, "GPU idle": 1.0}


def test_ratios_are_paired_by_micro_batch():
    pytest.importorskip("torch")
    from lplb.cli.bench.layer.cases import summarised
    rng = np.random.default_rng(0)
    load = rng.uniform(1, 3, 16)  # micro-batches differ much, policies little
    times = np.stack([np.stack([load, 1.25 * load], axis=1)] * 2)
    found = summarised(["fair", "lplb S1"], times, {"fair": [np.ones((2, 1))] * 16, "lplb S1": [np.array([[3], [1]])] * 16},
                       {"lplb S1": [0.0] * 10 + [0.1] * 6})
    assert found["lplb S1"]["of_fair"] == pytest.approx({"ratio": 0.8, "low": 0.8, "high": 0.8})
    assert found["lplb S1"]["imbalance"] == 1.5 and found["lplb S1"]["without_gap"] == 10
    assert found["fair"]["p50_ms"] == pytest.approx(np.median(load))


# ---- whole runs ----


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def bench(*words, ranks=1, together=True, cuda=False):
    """stdout and stderr of rank 0."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if not cuda:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    port = str(free_port())
    command = [sys.executable, "-m", "lplb", "bench", "layer", *map(str, words)]
    started = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started.append(subprocess.Popen(command, env={**environment, **(own if together else {})}, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True))
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * ranks, "\n".join(said)
    assert all(not words for words in said[1:]), "only rank 0 speaks"
    return said[0]


def gloo():
    torch = pytest.importorskip("torch")
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs a PyTorch with gloo")


@pytest.mark.timeout(180)
def test_two_ranks_on_the_cpu(tmp_path):
    gloo()
    out, picture = tmp_path / "layer.json", tmp_path / "layer.png"
    said = bench("--quick", "--batches", 2, "--tokens", "32", "--compare", "--json", out, "--png", picture, ranks=2)
    result = json.loads(out.read_text())
    (case,) = result["cases"]
    arms = {*PLAIN, "lplb S1", *(f"{policy} S2" for policy in COPIED)}
    assert {"machine", "date", "settings", "transfers", "compared"} <= set(result) and result["ranks"] == 2
    assert case["case"] == "tiny" and case["tokens"] == 32 and set(case["arms"]) == arms
    for name, arm in case["arms"].items():
        assert 0 < arm["p50_ms"] <= arm["p99_ms"] and len(arm["by_micro_batch_ms"]) == 2 and arm["imbalance"] >= 1, name
    assert case["arms"]["forced"]["imbalance"] == 1 and case["arms"]["lplb S2"]["imbalance"] <= case["arms"]["fixed S2"]["imbalance"]
    assert set(case["step"]["ms"]) == {"packed", "lplb S1", "lplb S2"} == set(case["pieces_ms"]) and all(case["step"]["ms"].values())
    assert set(case["plan"]) == {"lplb S1", "lplb S2"} and result["compared"][0]["none_p50_ms"] > 0
    copied = result["transfers"]["tiny"]["S2 float32"]
    assert copied["pull_bytes"] == 2 * 3 * 64 * 32 * 4 == copied["push_bytes"] and copied["slots_bytes"] == 2 * copied["pull_bytes"]
    assert len(result["break_even"]) == 2 and all(sentence in said for sentence in result["break_even"])
    assert picture.read_bytes().startswith(b"\x89PNG") and "| lplb S2" in said
    assert plot.main([str(out), str(tmp_path / "again.png")]) == 0 and (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")
    out.write_text('{"emulated": [], "cases": [{}]}')
    assert plot.main([str(out), str(tmp_path / "again.png")]) == 2


@pytest.mark.timeout(120)
def test_emulated_ranks(tmp_path):
    pytest.importorskip("torch")
    out, picture = tmp_path / "emulated.json", tmp_path / "emulated.png"
    said = bench("--emulate", "4,8", "--device", "cpu", "--tokens", "16", "--batches", 1, "--slots", "1", "--json", out, "--plot",
                 picture, together=False)
    four, eight = json.loads(out.read_text())["emulated"]
    assert (four["ranks"], eight["ranks"]) == (4, 8) and set(four["arms"]) == {
        "none", "packed", "fair", "forced", "even S1", "lplb S1", "lplb S1, EPLB's"}
    for case in (four, eight):
        for name, arm in case["arms"].items():
            assert arm["compute_ms"] > 0 and arm["dispatch_ms"] > 0 and (arm["plan_us"] > 0) == name.startswith("lplb")
        assert case["arms"]["fair"]["imbalance"] == case["arms"]["forced"]["imbalance"] == 1 < case["arms"]["none"]["imbalance"]
        assert case["arms"]["lplb S1, EPLB's"]["imbalance"] <= case["arms"]["even S1"]["imbalance"]
    assert picture.read_bytes().startswith(b"\x89PNG") and "modelled" in said
    gain = 100 * (report.step_ms(four["arms"]["packed"]) / report.step_ms(four["arms"]["lplb S1"]) - 1)
    assert f"speed of lplb S1 beside packed homes {gain:+.1f}% on 4 ranks" in said


@pytest.mark.gpu
@pytest.mark.timeout(180)
def test_two_gpus(tmp_path):
    import torch
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    out = tmp_path / "layer.json"
    bench("--case", "tiny", "--quick", "--batches", 4, "--tokens", "512", "--compare", "--json", out, ranks=2, cuda=True)
    result = json.loads(out.read_text())
    (case,) = result["cases"]
    assert result["device"] == "cuda" and result["goals"] and all(arm["p50_ms"] > 0 for arm in case["arms"].values())
    assert {"S2 bfloat16", "S2 float32"} <= set(result["transfers"]["tiny"])
    for pieces in case["pieces_ms"].values():
        assert {"forward products", "backward products", "forward all-to-all", "backward all-to-all"} <= set(pieces), pieces


@pytest.mark.gpu
@pytest.mark.timeout(120)
def test_emulated_ranks_on_a_gpu(tmp_path):
    out = tmp_path / "emulated.json"
    bench("--case", "tiny", "--emulate", "4,8", "--tokens", "256", "--batches", 1, "--json", out, together=False, cuda=True)
    four, eight = json.loads(out.read_text())["emulated"]
    assert all(arm["compute_ms"] > 0 for case in (four, eight) for arm in case["arms"].values())


def test_what_cannot_be_measured_gets_one_sentence(capsys, monkeypatch):
    pytest.importorskip("torch")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    cases = [(["layer"], "torchrun"), (["layer", "solve"], "runs alone"), (["layer", "--emulate", "1"], "at least 2"),
             (["layer", "--emulate", "7"], "must divide the 64 experts"), (["layer", "--case", "v4"], "must be of v3-32"),
             (["layer", "--emulate", "4", "--policies", "best"], "must be of none"),
             (["solve", "--compare"], "is an option of bench layer"), (["layer", "--compare", "x.json"], "takes no file"),
             (["layer", "--emulate", "4", "--case", "tiny-drift"], "needs a second task"),
             (["layer", "--emulate", "4", "--case", "v3-32"], "has 64 experts, 256 are needed")]
    for words, says in cases:
        assert main(["bench", *words, "--device", "cpu"]) == 2, words
        said = capsys.readouterr()
        assert says in said.err and said.err.count("\n") == 1, said.err
