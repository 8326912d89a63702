"""The PyTorch operators: schemas, fake tensors, torch.compile without graph breaks."""

from __future__ import annotations

import shutil
import types

import pytest

torch = pytest.importorskip("torch")

import torch._dynamo.testing  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.library import opcheck  # noqa: E402

import lplb  # noqa: E402
from lplb import Planner, topology  # noqa: E402
from lplb._ops.calls import numpy_calls  # noqa: E402


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
    opcheck(torch.ops.lplb.run.default, (idx, None, number, 0, planner._plan))
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_run_without_a_counter_compiles(idx, backend):
    torch._dynamo.reset()
    planner = cube()
    compiled = torch.compile(lambda ids: planner.run(ids, None), fullgraph=True, backend=backend)
    assert torch.equal(compiled(idx), planner.run(idx, None))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_compilers_keep_run_before_redirect(backend):
    """run writes the plan, too: even one whose ids nobody reads stays, and stays before the redirect that follows it."""
    torch._dynamo.reset()
    planner = cube()
    one, other = torch.zeros(100, dtype=torch.int64), torch.zeros(40, dtype=torch.int64)

    @torch.compile(fullgraph=True, backend=backend)
    def plans(first, second, ids):
        planner.run(first, None)
        a = planner.redirect(ids)
        planner.run(second, None)
        b = planner.redirect(ids)
        planner.run(first, None)
        return a, b

    a, b = plans(one, other, one)
    assert (a == 0).sum() == 50 and (b == 0).sum() == 80
    assert (planner.redirect(one) == 0).sum() == 50  # the last run is there as well


def test_eager_calls_name_no_plan(idx, monkeypatch):
    """The argument that compilers need costs an eager call nothing."""
    planner, seen = cube(), []
    monkeypatch.setattr(planner, "_ops", types.SimpleNamespace(**{**vars(planner._ops), "run": lambda *given: seen.append(given)}))
    planner.run(idx, None)
    assert seen == [(idx, None, planner.number, 0)]


SIZES = [  # arguments of torch.ops.lplb on a planner of 64 experts, 8 ranks and 16 ratios
    (lambda ops, p, ids, counts: ops.count(ids, p, 2, 3), "n_logical: .*64 elements, got 3"),
    (lambda ops, p, ids, counts: ops.count(ids, p, 2, 65), "n_logical: .*64 elements, got 65"),
    (lambda ops, p, ids, counts: ops.count(ids, p, 2, -1), "n_logical: .*64 elements, got -1"),
    (lambda ops, p, ids, counts: ops.count(ids, p, 2, 2**62), "n_logical: .*64 elements, got 4611686018427387904"),
    (lambda ops, p, ids, counts: ops.count(ids, p, 0, 64), r"n_chunks: must lie in 1 \.\.\. 65536, got 0"),
    (lambda ops, p, ids, counts: ops.count(ids, p, -3, 64), "n_chunks: .*got -3"),
    (lambda ops, p, ids, counts: ops.count(ids, p, 2**40, 64), "n_chunks: .*got 1099511627776"),
    (lambda ops, p, ids, counts: ops.solve(counts, None, None, p, [1, 8, 1], [64]), "ratio_shape: .*16 elements, got 8"),
    (lambda ops, p, ids, counts: ops.solve(counts, None, None, p, [0], [64]), "ratio_shape: .*16 elements, got 0"),
    (lambda ops, p, ids, counts: ops.solve(counts, None, None, p, [-4, -4], [64]), r"ratio_shape: .*at least 0, got \[-4, -4\]"),
    (lambda ops, p, ids, counts: ops.solve(counts, None, None, p, [2**40], [64]), "ratio_shape: .*16 elements, got 1099511627776"),
    (lambda ops, p, ids, counts: ops.solve(counts, None, None, p, [1, 8, 2], [63]), "scaled_shape: .*64 elements, got 63"),
    (lambda ops, p, ids, counts: ops.solve(counts, None, None, p, [1, 8, 2], [2**40]), "scaled_shape: .*64 elements, got 1099511627776"),
    (lambda ops, p, ids, counts: ops.solve(counts, None, None, p, [1, 8, 2], [-64]), r"scaled_shape: .*at least 0, got \[-64\]"),
    (lambda ops, p, ids, counts: ops.solve(counts[:63], None, None, p, [1, 8, 2], [64]), r"workload: .*got shape \[63\]"),
    (lambda ops, p, ids, counts: ops.run(ids, None, p, -1), "max_blocks: .*got -1"),
    (lambda ops, p, ids, counts: ops.redirect(ids, None, p, 2**40), "max_blocks: .*got 1099511627776"),
    (lambda ops, p, ids, counts: ops.run(ids, None, p + 2**20, 0), "planner: .*close"),
    (lambda ops, p, ids, counts: ops.count(ids, 0, 1, 64), "planner: .*close"),
]


@pytest.mark.parametrize("index", range(len(SIZES)))
@pytest.mark.parametrize("module", ["torch", "numpy"])
def test_operators_trust_no_size(idx, index, module):
    """Before anything is allocated: an operator that believes a wrong size writes past its buffers."""
    call, words = SIZES[index]
    planner = cube()
    counts = torch.ones(64, dtype=torch.int32)
    planner.solve(counts)
    before = planner.info()
    with pytest.raises(lplb.LplbError, match=words):
        if module == "torch":
            call(planner._ops, planner.number, idx, counts)
        else:
            call(numpy_calls, planner.number, idx.numpy(), counts.numpy())
    assert planner.info() == before


def test_a_planner_without_ratios_bounds_their_shape(idx):
    planner, counts = cube(0), torch.ones(64, dtype=torch.int32)
    assert planner.solve_probs(counts, None)[0].tolist() == [[[1, 1]] * 8]
    with pytest.raises(lplb.InvalidArgument, match="ratio_shape: .*at most 65536 elements, got 1099511627776"):
        planner._ops.solve(counts, None, None, planner.number, [2**40], [64])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_fakes_have_the_shapes_of_results(idx, dtype):
    """Shape, strides and type of every operator's fake are those of what it returns, for ids that are not contiguous too."""
    planner, ids = cube(), idx.to(dtype).T
    number, counts = planner.number, planner.count_workload(ids, 1)[0]
    rows, probs = planner.count_workload(ids, 3)[1], planner.solve_probs(counts, None)[0]
    cases = [
        (planner._ops.run, (ids, None, number, 0)), (planner._ops.redirect, (ids, None, number, 0)), (planner._ops.count, (ids, number, 5, 64)),
        (planner._ops.solve, (counts, None, None, number, [1, 8, 2], [1, 8, 8])), (planner._ops.redirect_by_ratio, (ids, probs, rows, number))]
    for operator, arguments in cases:
        with FakeTensorMode() as mode:
            fakes = operator(*(mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in arguments))
        results = operator(*arguments)
        for fake, result in zip(*((value if isinstance(value, tuple) else (value,)) for value in (fakes, results)), strict=True):
            assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (result.shape, result.stride(), result.dtype, result.device)


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
