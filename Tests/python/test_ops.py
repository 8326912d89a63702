"""The PyTorch operators: schemas, fake tensors, torch.compile without graph breaks."""

from __future__ import annotations

import shutil

import pytest

torch = pytest.importorskip("torch")

import torch._dynamo.testing  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.library import opcheck  # noqa: E402

from lplb import Planner, topology  # noqa: E402


def cube(spare=2):
    return Planner(topology.CUBE_8P2E, 64 + 8 * spare, 64, 8, device="cpu")


@pytest.fixture
def idx():
    return torch.randint(-1, 64, (32, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_opcheck(idx, dtype):
    planner, idx = cube(), idx.to(dtype)
    number = planner.number
    opcheck(torch.ops.lplb.run.default, (idx, torch.zeros(1, dtype=dtype), number, 0))
    opcheck(torch.ops.lplb.run.default, (idx, None, number, 100))
    opcheck(torch.ops.lplb.run.default, (idx.T, torch.zeros((), dtype=dtype), number, 0))
    opcheck(torch.ops.lplb.count.default, (idx, number, 3, 64))
    counts, rows = planner.count_workload(idx, 3)
    opcheck(torch.ops.lplb.solve.default, (counts.to(dtype), torch.zeros(1, dtype=dtype), planner._plan, number, [1, 8, 2], [1, 8, 8]))
    probs, _ = planner.solve_probs(counts, None)
    opcheck(torch.ops.lplb.redirect.default, (idx, planner._plan, number, 0))
    opcheck(torch.ops.lplb.redirect_by_ratio.default, (idx, probs, rows, number))


BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")),
                                                                                   reason="inductor on the CPU needs a C++ compiler"))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager(idx, backend):
    """Several layers, each with its planner, several batch shapes; the counter grows inside the graph."""
    torch._dynamo.reset()
    planners, counter = [cube(spare) for spare in (2, 4, 6, 8)], torch.zeros(1, dtype=torch.int64)
    frames = torch._dynamo.testing.CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, backend=frames)
    def layer(planner, ids, counter):
        physical = planner.run(ids + 0, counter, 100)
        return physical * 1, counter + 1

    for ids in (idx, idx[:20], idx[3:10]):
        for planner in planners:
            before = counter.item()
            physical, after = layer(planner, ids, counter)
            assert torch.equal(physical, planner.run(ids, None))
            assert counter.item() == before + 1 and after.item() == before + 2
    assert frames.frame_count <= 4  # neither a compilation per planner nor one per shape


def test_compiled_steps(idx):
    torch._dynamo.reset()
    planner, counter = cube(), torch.zeros(1, dtype=torch.int32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def steps(ids, counter):
        counts, rows = planner.count_workload(ids, 4)
        probs, scaled = planner.solve_probs(counts, counter)
        planner.solve(counts)
        return planner.weighted_select_target(ids, probs, rows, 4), planner.redirect(ids), scaled

    by_ratio, by_plan, scaled = steps(idx, counter)
    assert counter.item() == 1
    counts, rows = planner.count_workload(idx, 4)
    probs, expected = planner.solve_probs(counts, None)
    assert torch.equal(by_ratio, planner.weighted_select_target(idx, probs, rows, 4))
    assert torch.equal(by_plan, planner.redirect(idx)) and torch.equal(scaled, expected)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_compilers_keep_solve_before_redirect(backend):
    """solve returns nothing, yet redirect depends on it: what it writes is inside the planner."""
    torch._dynamo.reset()
    planner = cube()
    one, other = torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.int64)
    one[0], other[0] = 100, 40

    @torch.compile(fullgraph=True, backend=backend)
    def plans(first, second, ids):
        planner.solve(first)
        a = planner.redirect(ids)
        planner.solve(second)
        b = planner.redirect(ids)
        return a, b

    ids = torch.zeros(100, dtype=torch.int64)
    a, b = plans(one, other, ids)
    assert (a == 0).sum() == 50 and (b == 0).sum() == 80


def test_planner_in_a_module(idx):
    torch._dynamo.reset()

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.planner = cube()
            self.register_buffer("counter", torch.zeros(1, dtype=torch.int64))

        def forward(self, scores):
            return self.planner.run(scores.topk(4).indices, self.counter)

    layer = Layer()
    scores = torch.randn(100, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores), layer(scores))
    assert layer.counter.item() == 2


def test_fake_tensors(idx):
    planner = cube()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(idx) if hasattr(mode, "from_tensor") else torch.empty_like(idx)
        out = planner.run(fake, torch.zeros(1, dtype=torch.int64))
        assert out.shape == idx.shape and out.dtype == idx.dtype
        counts, rows = planner.count_workload(fake, 5)
        assert counts.shape == (64,) and rows.shape == (5, 64)
        probs, scaled = planner.solve_probs(counts, None)
        assert probs.shape == (1, 8, 2) and scaled.shape == (1, 8, 8)


def test_exceptions_keep_their_type_inside_a_graph():
    torch._dynamo.reset()
    planner = cube()
    compiled = torch.compile(lambda ids: planner.run(ids, None), fullgraph=True, backend="aot_eager")
    ids = torch.zeros(4, dtype=torch.int64)
    assert compiled(ids).tolist() == planner.run(ids, None).tolist()
    planner.close()
    with pytest.raises(RuntimeError, match="close"):
        compiled(ids)


def test_inference_and_no_grad(idx):
    planner = cube()
    wanted = planner.run(idx, None)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(planner.run(idx, torch.zeros(1, dtype=torch.int64)), wanted)
