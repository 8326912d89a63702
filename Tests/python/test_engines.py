"""lplb inside vLLM and SGLang: with the engines' own code where they are installed (see vllm_worker.py, sglang_worker.py), and what is said
where they are not, are other versions, or are asked for something else."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lplb import InvalidArgument
from lplb.integrations._engine import settings

HERE = Path(__file__).parent
SETUP = HERE.parents[1] / "setup.py"


def needs(engine, version):
    return pytest.mark.skipif(importlib.util.find_spec(engine) is None, reason=f"{engine} is not installed (tried with {version})")


def environment(tmp_path, **variables):
    """With the plug-ins that setup.py names, whatever is installed."""
    found = re.findall(r'"([\w.]+)": \["(lplb = lplb\.integrations\.[\w:.]+)"\]', SETUP.read_text())
    assert [group for group, _ in found] == ["vllm.general_plugins", "sglang.srt.plugins"]
    info = tmp_path / "lplb_plugins-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lplb-plugins\nVersion: 1\n")
    (info / "entry_points.txt").write_text("".join(f"[{group}]\n{entry}\n" for group, entry in found))
    own = {name: value for name, value in os.environ.items() if not name.startswith(("LPLB_VLLM", "LPLB_SGLANG"))}
    return {**own, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH":
            os.pathsep.join([str(tmp_path), str(HERE), *filter(None, sys.path)]), **variables}


def workers(name, tmp_path, **variables):
    """What rank 0 of four processes with gloo has seen."""
    files = [tmp_path / "store", tmp_path / "seen.json"]
    commands = [[sys.executable, HERE / name, str(rank), "4", *files] for rank in range(4)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    variables_of_all = environment(tmp_path, **variables)
    started = [subprocess.Popen(command, env=variables_of_all, **pipes) for command in commands]
    try:
        words = [process.communicate(timeout=280)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * 4, "\n".join(words)
    return json.loads(files[1].read_text())


@pytest.mark.engines
@needs("vllm", "0.33.0")
def test_vllm(tmp_path, note):
    """Dispatch as good as the certified optimum in each layer and batch, before, between and after rebalances of both kinds, with dual
    batch overlap, with a rank that has no tokens, and where all ranks hold the same tokens; loads recorded by vLLM's kernel; placements."""
    seen = workers("vllm_worker.py", tmp_path, LPLB_VLLM="placement,dispatch")
    note(f"vLLM: loads of the busiest rank in 2 layers {seen['synchronous']['before']}, after a rebalance {seen['synchronous']['after']}")
    assert seen["synchronous"]["changed"] and seen["asynchronous"], "a rebalance moved experts"
    assert seen["overlapped"] == ["TorchExchange", "own"] and seen["replicated"] == seen["gathered"] == "same"
    assert "does not support elastic EP, which changes the number of slots" in seen["elastic"]
    assert "must ask for the same on all ranks, but rank 0 has" in seen["differing"] and "and rank 1 has" in seen["differing"]
    assert "does not know how layers of SimpleNamespace send their tokens" in seen["unknown"]
    for case in seen["placements"]:
        note(f"vLLM, placement of {case['experts']} experts in {case['slots']} slots of {case['ranks']} ranks: even load of the heaviest "
             f"rank, vLLM {case['vllm']:.4f}, lplb " + ", ".join(f"{policy} {load:.4f}" for policy, load in case["even"].items()))


@pytest.mark.engines
@needs("sglang", "0.5.23")
def test_sglang(tmp_path, note):
    """`lp` as good as the certified optimum, before, between and after rebalances of some layers at a time, from both places that map ids,
    with padding, with a rank that has no tokens, and without an all-to-all backend."""
    seen = workers("sglang_worker.py", tmp_path, LPLB_SGLANG="placement,dispatch")
    note(f"SGLang: loads of the busiest rank in 3 layers {seen['before'][::2]}, after a rebalance {seen['after'][::2]}")
    assert seen["changed"] and seen["none"][0] and seen["none"][1] == "same"
    assert "Qwen3MoeForCausalLM does not support --ep-dispatch-algorithm lp" in seen["another model"]
    said = seen["arguments"]
    assert said["none"] is None and said["static"].startswith("ValueError: --ep-dispatch-algorithm static")
    assert said["elastic"].startswith("Unsupported: LPLB_SGLANG: lplb does not support --elastic-ep-backend, which changes the ranks")
    assert said["pdmux"].startswith("Unsupported: LPLB_SGLANG: lplb does not support --enable-pdmux")


@pytest.mark.parametrize("words, said", [
    ({"X": "placing"}, "X: must be placement, dispatch, or both with a comma between, got 'placing'"),
    ({"X": "dispatch,,,all"}, "X: must be placement"), ({"X": "1"}, "X: must be placement"),
    ({"X": "placement", "X_POLICY": "best"}, "X_POLICY: must be one of"),
    ({"X": "placement", "X_MAX_MOVES": "-1"}, "X_MAX_MOVES: must be a number of experts, at least 0, got '-1'"),
    ({"X": "placement", "X_MAX_MOVES": "5", "X_POLICY": "deepseek"}, "X_MAX_MOVES: must not be given with policy deepseek"),
])
def test_settings_refused(monkeypatch, words, said):
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidArgument, match=said):
        settings("X")


def test_settings(monkeypatch):
    assert settings("X") is None
    monkeypatch.setenv("X", "")
    assert settings("X") is None
    monkeypatch.setenv("X", " placement ")
    assert (settings("X").policy, settings("X").dispatch, settings("X").max_moves) == ("balanced", False, None)
    monkeypatch.setenv("X", "dispatch,placement")
    monkeypatch.setenv("X_MAX_MOVES", "0")
    assert (settings("X").policy, settings("X").placement, settings("X").max_moves) == ("flow", True, 0)


ASKED = """
import importlib, logging, sys
logging.basicConfig(format="%(name)s %(levelname)s %(message)s", stream=sys.stdout)
before = set(sys.modules)
for engine in ("vllm", "sglang"):
    importlib.import_module("lplb.integrations." + engine).register()
print(sorted({name.split(".")[0] for name in set(sys.modules) - before} & {"torch", "vllm", "sglang", "triton"}))
"""


def asked(tmp_path, **variables):
    """What a process says that calls both entry points, and which of the heavy modules it has imported."""
    done = subprocess.run([sys.executable, "-c", ASKED], env=environment(tmp_path, **variables), capture_output=True, text=True,
                          timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def stand_in(tmp_path, engine, version, **modules):
    for name, text in {"__init__": "", **modules}.items():
        path = tmp_path.joinpath(engine, *name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    info = tmp_path / f"{engine}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {engine}\nVersion: {version}\n")


def test_off(tmp_path):
    """Nothing is imported and nothing is said, whatever the engine."""
    stand_in(tmp_path, "vllm", "0.1.0", __init__="raise SystemExit('imported')")
    stand_in(tmp_path, "sglang", "0.1.0", __init__="raise SystemExit('imported')")
    assert asked(tmp_path) == ["[]"]


def test_another_version(tmp_path):
    """One without the modules, and one whose function takes something else: the log says so, and the engine goes on."""
    stand_in(tmp_path, "vllm", "0.1.0")
    stand_in(tmp_path, "sglang", "0.9.0", **{
        "srt.__init__": "", "srt.eplb.__init__": "",
        "srt.eplb.eplb_algorithms": "def rebalance_experts(tokens_per_expert, layout):\n    pass\n"})
    vllm, sglang, imported = asked(tmp_path, LPLB_VLLM="dispatch", LPLB_SGLANG="placement")
    assert vllm == ("vllm.lplb ERROR LPLB_VLLM has no effect: lplb works with vllm 0.33.0, and this is vllm 0.1.0, where it does not fit: "
                    "vllm.distributed.eplb.policy:EPLB_POLICIES: No module named 'vllm.distributed'")
    assert sglang == ("sglang.lplb ERROR LPLB_SGLANG has no effect: lplb works with sglang 0.5.23, and this is sglang 0.9.0, where it does "
                      "not fit: sglang.srt.eplb.eplb_algorithms:rebalance_experts takes tokens_per_expert, layout and not "
                      "tokens_per_expert, num_physical_experts, num_local_physical_experts, num_groups, num_nodes, algorithm")
    assert imported == "['sglang', 'vllm']"
