"""torchtitan's debug model trains with lplb's copies of experts as it does without; see torchtitan_worker.py."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
HERE = Path(__file__).parent


needs_torchtitan = pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None,
                                      reason="torchtitan is not installed (pip install torchtitan==0.3.0)")


@pytest.mark.engines
@needs_torchtitan
def test_debug_model(tmp_path, note):
    """On 4 processes with gloo: gradients of the experts' weights, losses and names of the state, with FSDP over the experts, recomputation
    of activations, several micro-batches and a new choice of copies."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])}
    files = [tmp_path / "store", tmp_path / "seen.json"]
    commands = [[sys.executable, HERE / "torchtitan_worker.py", str(rank), "4", *files] for rank in range(4)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(command, env=environment, **pipes) for command in commands]
    try:
        words = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert (tmp_path / "seen.json").exists(), "\n".join(words)
    seen = json.loads((tmp_path / "seen.json").read_text())
    plain = seen.pop("plain")
    for name, run in seen.items():
        note(f"torchtitan, {name}: losses {run['losses']}, experts' gradients within {run['gradients']:.1e} of the largest one")
        assert run["losses"] == pytest.approx(plain["losses"], rel=1e-5) and run["gradients"] < 0.01  # its experts compute in bfloat16
        assert run["state"] == plain["state"] and run["moved"] > 0, "names of the state, and tokens that go to copies"
    assert seen["copies"]["version"] == 1 and seen["copies"]["copies"] != [0, 1, 2, 5, 2, 3, 4, 7, 4, 5, 6, 1, 6, 7, 0, 3], "chosen anew"


@pytest.mark.engines
@needs_torchtitan
def test_refused():
    from torchtitan.models.deepseek_v3 import model_registry

    from lplb import Unsupported
    from lplb.integrations.torchtitan import Dispatcher, replicas

    config = model_registry("debugmodel", moe_comm_backend="deepep").model.layers[1].moe.routed_experts
    with pytest.raises(Unsupported, match='AllToAllTokenDispatcher .comm_backend="standard".*, got .* and DeepEPTokenDispatcher'):
        replicas(config, slots=1)
    with pytest.raises(Exception, match='copies of experts cannot be compiled, .* take "model" out of compile.components'):
        torch.compile(lambda: Dispatcher._plan(None, None, None, None), backend="eager", fullgraph=True)()


def imported(path):
    """The words that end a process which imports the adapter, with path on sys.path."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path)!r}); import lplb.integrations.torchtitan"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=path)
    return done.returncode, done.stderr.strip().splitlines()[-1]


@pytest.mark.skipif(importlib.util.find_spec("torchtitan") is not None, reason="torchtitan is installed")
def test_without_torchtitan(tmp_path):
    assert imported(tmp_path) == (1, "ImportError: lplb.integrations.torchtitan works with torchtitan 0.3.0, but torchtitan is not "
                                     "installed: No module named 'torchtitan'")


def test_another_version(tmp_path):
    """Modules that are not where 0.3.0 has them."""
    (tmp_path / "torchtitan").mkdir()
    (tmp_path / "torchtitan/__init__.py").touch()
    (tmp_path / "torchtitan-0.1.0.dist-info").mkdir()
    (tmp_path / "torchtitan-0.1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torchtitan\nVersion: 0.1.0\n")
    assert imported(tmp_path) == (1, "ImportError: lplb.integrations.torchtitan works with torchtitan 0.3.0, but torchtitan 0.1.0 is "
                                     "installed: No module named 'torchtitan.config'")
