"""What a newcomer meets on the command line: its name and version, JSON on stdout, what was written where, comparisons, converters, traces
that torch wrote, pictures that can be read; and `lplb.simulate` for notebooks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import lplb
from lplb.cli.main import main
from lplb.cli.simulate import trace
from lplb.cli.terminal import UsageError

IDS = np.random.default_rng(0).integers(0, 16, (900, 2, 3)).astype(np.int16) ** 2 // 16  # skewed
SMALL = ("--ranks", "4", "--topology", "square", "--tokens-per-rank", "32")


@pytest.fixture
def ids_file(tmp_path):
    np.savez(tmp_path / "ids.npz", topk_ids=IDS, n_experts=16)
    return str(tmp_path / "ids.npz")


def said(capsys, *words, code=0):
    assert main([*map(str, words)]) == code
    return capsys.readouterr()


# ---- name, version, JSON, files ----


def test_version_and_name(capsys, monkeypatch):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"lplb {lplb.__version__}\n"
    for argv0, name in (("/usr/bin/lplb", "lplb"), ("/x/lplb/__main__.py", "python -m lplb")):
        monkeypatch.setattr(sys, "argv", [argv0])
        assert f"(see {name} --help)" in said(capsys, "--nonsense", code=2).err


def test_json_on_stdout(ids_file, capsys):
    """Alone, for programs; the words go to stderr."""
    for words, key in ((("simulate", ids_file, *SMALL), "rows"), (("simulate", ids_file, "--ranks", "4", "--compare"), "recommended"),
                       (("place", ids_file, "--ranks", "4"), "moves")):
        done = said(capsys, *words, "--json", "-")
        assert key in json.loads(done.out) and "|" in done.err
        assert "|" in said(capsys, *words).out  # the next command speaks on stdout again
    refused = said(capsys, "simulate", "gone.npz", "--json", "-", code=2)
    assert refused.out == "" and refused.err.count("\n") == 1


def test_json_on_a_stdout_that_is_full(ids_file):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-m", "lplb", "simulate", ids_file, *SMALL, "--json", "-"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr.endswith(b"lplb: cannot write to stdout: No space left on device\n")


def test_what_was_written_is_said(ids_file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = said(capsys, "simulate", ids_file, *SMALL, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.svg").out
    assert out.endswith(f"wrote {tmp_path}/a.json\nwrote {tmp_path}/a.svg\n")
    out = said(capsys, "place", ids_file, "--ranks", "4", "--json", tmp_path / "b.json", "--out", tmp_path / "b.npy").out
    assert out.endswith(f"wrote {tmp_path}/b.npy\nwrote {tmp_path}/b.json\n")


def test_words_are_wrapped_and_every_column_is_explained(ids_file, capsys, monkeypatch):
    for columns in ("60", "100"):
        monkeypatch.setenv("COLUMNS", columns)
        for words in (("simulate", ids_file, *SMALL, "--nodes", "2"), ("simulate", ids_file, "--ranks", "4", "--compare")):
            out = said(capsys, *words).out
            table = [line for line in out.splitlines() if line.startswith("|")]
            prose = [line for line in out[out.rindex("|\n") + 2:].splitlines()]
            assert all(len(line) <= int(columns) for line in prose)
            for name in table[0].split("|")[2:-1]:
                if not re.fullmatch(r"p50|p99|max|even|lplb", name.strip()):  # which say it themselves, or are told of with the first
                    assert name.strip().split(" (")[0].split(":")[0] in " ".join(prose), name


# ---- comparisons ----


def test_compare_recommends_the_best_of_its_rows(ids_file, tmp_path, capsys):
    out = said(capsys, "simulate", ids_file, "--ranks", "4", "--tokens-per-rank", "32", "--compare", "--json", tmp_path / "a.json").out
    result = json.loads((tmp_path / "a.json").read_text())
    waits = {row["placement"]: row["idle_share"] for row in result["rows"]}
    assert list(waits) == ["flow", "balanced", "eplb", "square"] and len(result["left_out"]) == 3
    assert waits[result["recommended"]] <= min(waits.values()) + 0.001
    assert f"{result['recommended']} <-" in out and f"{result['recommended']}, with which the average GPU waits" in " ".join(out.split())
    for row in result["rows"]:  # each is what simulate alone finds
        alone = ["simulate", ids_file, "--ranks", "4", "--tokens-per-rank", "32", row["option"], row["placement"], "--slots", "24", "--json"]
        said(capsys, *alone, tmp_path / "b.json")
        exact = json.loads((tmp_path / "b.json").read_text())["rows"][-1]
        assert exact["idle_share"] == row["idle_share"] and exact["imbalance_p99"] == row["imbalance_p99"]


@pytest.mark.parametrize("words", [["--topology", "cube"], ["--placement", "flow"], ["--repair", "3"], ["--plot", "a.png"]])
def test_compare_refuses_what_it_tries_itself(ids_file, capsys, words):
    assert f"{words[0]}: " in said(capsys, "simulate", ids_file, "--compare", *words, code=2).err


# ---- notebooks ----


def test_simulate_in_python(ids_file, tmp_path, capsys):
    found = lplb.simulate(ids_file, ranks=4, topology="square", tokens_per_rank=32)
    said(capsys, "simulate", ids_file, *SMALL, "--json", tmp_path / "a.json")
    told = json.loads((tmp_path / "a.json").read_text())
    assert [row["imbalance_mean"] for row in found.rows] == [row["imbalance_mean"] for row in told["rows"]] and found.config["ranks"] == 4
    assert "| lplb" in str(found) and found._repr_markdown_() == str(found)
    given = lplb.simulate(topk_ids=IDS, n_experts=16, ranks=4, topology="square", tokens_per_rank=32)
    assert given.rows[-1]["imbalance_mean"] == found.rows[-1]["imbalance_mean"]
    counts = np.stack([np.stack([np.bincount(layer.ravel(), minlength=16) for layer in part.swapaxes(0, 1)]) for part in np.split(IDS, 9)])
    assert lplb.simulate(counts=counts, ranks=4, placement="flow").config["micro_batches"] == 7
    assert lplb.simulate(topk_ids=IDS, ranks=4, compare=True).recommended in ("flow", "balanced", "eplb", "square")
    pytest.importorskip("matplotlib")
    found.plot(str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").stat().st_size > 10_000 and capsys.readouterr().out == ""


@pytest.mark.parametrize("options, words", [
    ({"tokens_per_rank": 0}, "tokens_per_rank: must be a whole number of at least 1"), ({"colour": "red"}, "unrecognized arguments: colour=red"),
    ({"ranks": 12, "topology": "cube"}, "ranks: must be a multiple of the 8 ranks"), ({"json": "a"}, "json: must be an option"),
    ({"topk_ids": IDS + 0.5}, "topk_ids must be integers"), ({"counts": IDS - 99}, "at least 0"), ({"layers": [1, 2]}, "layers: must be an"),
    ({"topk_ids": IDS, "counts": IDS}, "trace: must be given alone"), ({"trace": "gone.npz"}, "gone.npz"),
])
def test_simulate_in_python_refuses_in_words(options, words):
    with pytest.raises(lplb.InvalidArgument) as caught:
        lplb.simulate(**options)
    assert words in str(caught.value) and "--" not in str(caught.value)


# ---- traces that torch wrote ----

COUNTS = np.random.default_rng(1).integers(0, 99, (5, 2, 8))


def saved(tmp_path, content):
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pt"
    torch.save(content, path)
    return str(path)


def test_torch_files(tmp_path):
    torch = pytest.importorskip("torch")
    counts, ids = torch.from_numpy(COUNTS), torch.from_numpy(IDS)
    for content, kind, data in (
        (counts, "steps", COUNTS), (counts[0], "snapshot", COUNTS[0]), (counts.float(), "steps", COUNTS), ({"topk_ids": ids}, "ids", IDS),
        ({"topk_ids": ids, "n_experts": 32}, "ids", IDS),
        ({"rank": 0, "logical_count": counts.int(), "average_utilization_rate_over_window": None}, "steps", COUNTS),  # SGLang's recorder
        ({"logical_count": counts.sum(0)}, "snapshot", COUNTS.sum(0)), ({"logical_count": list(counts)}, "steps", COUNTS),
    ):
        loaded = trace.load(saved(tmp_path, content))
        assert loaded.kind == kind and (loaded.data == data).all(), kind
    assert loaded.n_experts == 8 and trace.load(saved(tmp_path, {"topk_ids": ids, "n_experts": 32})).n_experts == 32


def test_loads_of_vllms_slots(tmp_path):
    """Loads of physical experts become loads of the logical ones, by the map beside them; slots that hold nothing count for nobody."""
    torch = pytest.importorskip("torch")
    expert_of = np.array([[0, 1, 2, 0], [2, -1, 1, 0]])
    window = np.arange(24).reshape(3, 2, 4)
    logical = [[[0 + 3, 1, 2], [7, 6, 4]], [[8 + 11, 9, 10], [15, 14, 12]], [[16 + 19, 17, 18], [23, 22, 20]]]
    for name, loads, wanted in (("expert_load_window", window, logical), ("expert_load_pass", window[1], logical[1])):
        content = {name: torch.from_numpy(loads).int(), "physical_to_logical_map": torch.from_numpy(expert_of)}
        assert trace.load(saved(tmp_path, content)).data.tolist() == wanted


def test_torch_files_that_are_no_traces(tmp_path):
    torch = pytest.importorskip("torch")
    huge = torch.zeros(1, dtype=torch.int64).expand(2**20, 64, 64)
    for content, words in (
        ({"a": 1}, "needs a tensor of counts"), ({}, "it holds nothing"), ([1, 2], "must be a tensor"), ("words", "must be a tensor"),
        (torch.ones(3), "shape"), (torch.ones(0, 2, 2), "none of them 0"), (torch.ones(2, 2, 2) * 0.5, "whole numbers"),
        (torch.ones(2, 2, dtype=torch.complex64), "must be a tensor of numbers"), ({"topk_ids": torch.ones(2, 2, 2)}, "must be integers"),
        (huge, "unpacks to 32,768 MiB"), (torch.ones(2, 2, 2).to_sparse(), "must be a tensor of numbers"),
        ({"expert_load_window": torch.ones(1, 2, 4), "physical_to_logical_map": torch.zeros(2, 3).long()}, "the same layers and slots"),
        ({"expert_load_window": torch.ones(1, 2, 4), "physical_to_logical_map": torch.full((2, 4), 2**40)}, "experts of 0 .. 3"),
        ({"expert_load_pass": torch.ones(2, 4) / 2, "physical_to_logical_map": torch.zeros(2, 4).long()}, "whole numbers"),
        (os.system, "not a readable .pt"), (UsageError("x"), "not a readable .pt"),
    ):
        with pytest.raises(UsageError) as caught:
            trace.load(saved(tmp_path, content), limit=1 << 28)
        assert words in str(caught.value) and len(str(caught.value)) < 600, content
    with pytest.raises(UsageError, match="raise the limit"):
        trace.load(saved(tmp_path, torch.ones(100, 10, 100)), limit=1000)
    for damage in (b"", b"PK\3\4", bytes(1000)):
        (tmp_path / "a.pt").write_bytes(damage)
        with pytest.raises(UsageError, match="not a readable .pt"):
            trace.load(str(tmp_path / "a.pt"))
    os.unlink(tmp_path / "a.pt")
    for name in ("a.pt", "b.pt"):
        os.mkfifo(tmp_path / name) if name == "b.pt" else None
        with pytest.raises(UsageError, match="no such file|no ordinary file"):
            trace.load(str(tmp_path / name))


# ---- converters ----


def esft_folder(folder, ids, sequences=3):
    """The files that ESFT publishes: a line for each sequence, its tokens' experts and the router's weights."""
    folder.mkdir()
    for layer in range(ids.shape[1]):
        lines = []
        for part in np.array_split(ids[:, layer], sequences):
            words = [str(one) for one in part.ravel()]
            lines.append("\t".join(words) + "\t\t" + "\t".join("0.1" for _ in words) + "\n")
        (folder / f"expert_weights_{layer + 1}.txt").write_text("".join(lines))
    (folder / "summary.json").write_text("{}")


def test_convert_esfts_routing(tmp_path, capsys):
    ids = np.stack([np.random.default_rng(token).permutation(16)[:18 % 16 + 4] for token in range(80)])[:, :6].reshape(80, 1, 6)
    ids = np.concatenate([ids, 15 - ids, ids[:, :, ::-1]], axis=1)  # three layers
    esft_folder(tmp_path / "law", ids)
    out = said(capsys, "convert", tmp_path / "law", tmp_path / "law.npz").out
    assert out == f"law: 80 tokens, 3 layers, top-6 of 16 experts\nwrote {tmp_path}/law.npz\n"
    loaded = trace.load(str(tmp_path / "law.npz"))
    assert (loaded.data == ids).all() and loaded.n_experts == 16 and loaded.data.dtype == np.uint8
    for damage, words in (("", "holds no sequence"), ("1\t2\t3\n", "line 1: must hold 6 experts"), ("a\n", "line 1"), ("\t" * 10, "line 1"),
                          ("9999999\t" * 6, "line 1"), ("1\t2\t3\t4\t5\t6\t\t0.5\n", "layer 2 has 1 tokens, layer 1 has 80")):
        (tmp_path / "law/expert_weights_2.txt").write_text(damage)
        assert words in said(capsys, "convert", tmp_path / "law", tmp_path / "x.npz", code=2).err
    os.unlink(tmp_path / "law/expert_weights_2.txt")
    assert "needs ESFT's files" in said(capsys, "convert", tmp_path / "law", tmp_path / "x.npz", code=2).err
    assert not (tmp_path / "x.npz").exists()


def test_convert_what_engines_record(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    source = saved(tmp_path, {"rank": 0, "logical_count": torch.from_numpy(COUNTS)})
    assert "must end in .npy" in said(capsys, "convert", source, tmp_path / "a.npz", code=2).err
    assert "would overwrite the source" in said(capsys, "convert", source, source, code=2).err
    said(capsys, "convert", source, tmp_path / "a.npy")
    assert (np.load(tmp_path / "a.npy") == COUNTS).all()


# ---- pictures ----


def overlapping(texts):
    """Pairs of texts of a drawn figure that are printed over each other."""
    boxes = [(text.get_text(), text.get_window_extent().padded(-1)) for text in texts if text.get_visible() and text.get_text().strip()]
    return [(one, other) for i, (one, box) in enumerate(boxes) for other, another in boxes[:i] if box.overlaps(another)]


@pytest.mark.parametrize("ranks", [24, 32, 64])
def test_labels_of_ranks_do_not_touch(ranks, monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    ids = np.random.default_rng(0).integers(0, 64, (ranks * 8 * 2, 1, 2))
    lplb.simulate(topk_ids=ids, ranks=ranks, placement="balanced", tokens_per_rank=8, n_experts=64).plot(str(tmp_path / "a.png"))
    drawn[0].canvas.draw()
    labels = drawn[0].axes[0].get_xticklabels()
    assert len(labels) >= 12 and not overlapping(labels)
    monkeypatch.undo()
    pyplot.close(drawn[0])


def test_figures_in_the_bench_picture_do_not_touch(monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from lplb.cli.bench import plot
    from lplb.cli.bench.kit import Row
    rows = [{"p50_us": 8.8, "p99_us": 19.4, "peer_us": 5.41, "target_p50_us": 15}, {"p50_us": 11.9, "p99_us": 12, "peer_us": 9.2},
            {"p50_us": 9.1, "p99_us": 9.2, "target_p50_us": 8.2}, {"p50_us": 2.2, "p99_us": 2.3, "peer_us": 5.2, "target_p50_us": 6},
            {"p50_us": 15.6, "p99_us": 45, "peer_us": 29.7}, {"p50_us": 5, "p99_us": 5, "peer_us": 5.2, "target_p50_us": 5.1}]
    rows = [Row.from_json({"suite": "run", "case": f"case {i}", **row}) for i, row in enumerate(rows)]
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    plot.draw(rows, "cpu", "a machine", str(tmp_path / "a.png"))
    drawn[0].canvas.draw()
    axes = drawn[0].axes[0]
    figures = [text for text in axes.texts]
    assert len(figures) == 11 and not overlapping(figures)
    for text, y in ((text, text.xy[1]) for text in figures):
        box, row = text.get_window_extent(), rows[y]
        for mark in filter(None, (row.p50_us, row.target_p50_us, row.peer_us)):
            x = axes.transData.transform((mark, y))[0]
            assert not box.x0 < x < box.x1, (text.get_text(), mark)
    monkeypatch.undo()
    pyplot.close(drawn[0])
