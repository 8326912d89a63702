"""A MoE layer with replicas against a dense reference in float64, on 2 and 4 processes with gloo; see moe_worker.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
                                reason="needs a PyTorch with gloo")

BOUNDS = {"gradients": 1e-12, "with_empty_slots": 1e-12, "old_ids": 0.0, "update_inside": 1e-12, "main_gradients": 1e-4,
          "bfloat16": 0.03, "few_experts": 1e-9, "optimizer_steps": 1e-9, "same_bits": 0.0, "recomputation": 0.0, "checkpoints": 1e-12,
          "with_ddp": 1e-12, "language_model": 1e-9, "copied_and_loaded": 0.0, "refusals": 0.0}


def start(processes, folder, scenarios):
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONPATH": os.pathsep.join([str(here), *filter(None, sys.path)])}
    commands = [[sys.executable, here / "moe_worker.py", str(rank), str(processes), folder / "store", folder, *scenarios]
                for rank in range(processes)]
    return [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands]


def measured(processes, folder, scenarios=()):
    """What each of the processes measured."""
    started = start(processes, folder, scenarios)
    try:
        words = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    files = [folder / f"{rank}.json" for rank in range(processes)]
    assert all(file.exists() for file in files), "\n".join(words)
    return [json.loads(file.read_text()) for file in files]


def judge(results, scenario, bound, note):
    failures = [f"rank {rank}: {one['failure']}" for rank, seen in enumerate(results) for one in seen.values() if "failure" in one]
    for seen in results:
        assert scenario in seen and "measured" in seen[scenario], "\n".join(failures)
    largest = {key: max(seen[scenario]["measured"][key] for seen in results) for key in results[0][scenario]["measured"]}
    note(f"{scenario} on {len(results)} ranks: " + ", ".join(f"{key} {value:.1e}" for key, value in largest.items())
         + f" ({results[0][scenario]['seconds']:.1f} s)")
    assert all(value <= bound for value in largest.values()), largest


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory):
    return measured(request.param, tmp_path_factory.mktemp("moe"))


@pytest.mark.parametrize("scenario", BOUNDS)
def test_scenario(results, scenario, note):
    judge(results, scenario, BOUNDS[scenario], note)


def test_one_process():
    """Without a group all experts stand on the one rank, whose further slots share their rows."""
    from lplb import Planner, Replicas
    from lplb.moe import MoELayer

    planner = Planner.from_placement([2, 0, 1, 2, 0, 1], ep_size=1, device="cpu")
    layer = MoELayer(planner, 6, 5, dtype=torch.float64)
    assert layer.replicas.own.tolist() == [2, 0, 1] and layer.replicas.row_of_slot.tolist() == [0, 1, 2, 0, 1, 2]
    states, ids, weights = torch.randn(40, 6, dtype=torch.float64), torch.randint(-1, 3, (40, 2)), torch.rand(40, 2).double()
    output = layer(states, ids, weights)
    gate_up, down = (one.detach().clone().requires_grad_() for one in (layer.gate_up, layer.down))
    expected = torch.zeros_like(states)
    for row, expert in enumerate([2, 0, 1]):
        share = (weights * (ids == expert)).sum(1, keepdim=True)
        gate, up = (states @ gate_up[row].T).chunk(2, -1)
        expected = expected + share * (torch.nn.functional.silu(gate) * up @ down[row].T)
    assert (output - expected).abs().max() < 1e-12
    output.square().sum().backward()
    layer.replicas.push_grads()
    expected.square().sum().backward()
    assert (layer.gate_up.grad - gate_up.grad).abs().max() < 1e-11 and (layer.down.grad - down.grad).abs().max() < 1e-11
    with pytest.raises(ValueError, match="planner: must have a group"):
        Replicas(Planner.from_placement([0, 1], ep_size=2, device="cpu"))
    assert layer.replicas.transport.kind == Replicas(planner, transport="torch").transport.kind == "torch"
    with pytest.raises(ValueError, match="transport: must be auto or torch, since NVLink joins GPUs of several ranks, got nvlink"):
        Replicas(planner, transport="nvlink")
    with pytest.raises(ValueError, match="transport: must be one of auto, nvlink, torch, got 'tcp'"):
        Replicas(planner, transport="tcp")


def test_grouped_products_are_the_loop(monkeypatch):
    """torch._grouped_mm, which CUDA takes for bfloat16, on the CPU: the same values as the loop, with experts that get nothing."""
    from lplb import Planner, moe
    from lplb._moe import products

    try:
        torch._grouped_mm(torch.ones(8, 8).bfloat16(), torch.ones(1, 8, 8).bfloat16(), offs=torch.tensor([8], dtype=torch.int32))
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        pytest.skip(f"this PyTorch has no grouped product on the CPU: {error}")
    planner = Planner.from_placement([2, 0, 1, 2, 0, 1, 3, 3], ep_size=1, device="cpu")
    seen = []
    for fast in (False, True):
        monkeypatch.setattr(products, "_fast", lambda rows, width: fast and len(rows) > 0)
        torch.manual_seed(0)
        layer = moe.MoELayer(planner, 16, 24, dtype=torch.bfloat16, grad_dtype=torch.float32)
        states, weights = torch.randn(40, 16).bfloat16().requires_grad_(), torch.rand(40, 2).bfloat16().requires_grad_()
        output = layer(states, torch.randint(-1, 3, (40, 2)), weights)
        output.float().square().sum().backward()
        layer.replicas.push_grads()
        seen.append((output, states.grad, weights.grad, layer.gate_up.main_grad, layer.down.main_grad))
        assert not layer.down.main_grad[layer.replicas.own.tolist().index(3)].any()
    for one, other in zip(*seen):
        assert (one - other).abs().max() <= 0.02 * one.abs().max()
