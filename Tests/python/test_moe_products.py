"""The weights' gradients of the experts: equal to the dense sums, and rows that got nothing are not touched."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")


def reference(sums, grad, rows, counts, fresh):
    expected, first = sums.double().clone(), 0
    expected[:fresh] = 0
    for row, count in enumerate(counts):
        expected[row] += grad[first : first + count].double().t() @ rows[first : first + count].double()
        first += count
    return expected


def check(dtype, grad_dtype, bound, counts, fresh):
    from lplb._moe.products import add_grouped

    torch.manual_seed(sum(counts) + fresh)
    n, ends = sum(counts), torch.tensor(counts).cumsum(0).int()
    grad, rows = torch.randn(n, 16).to(dtype), torch.randn(n, 24).to(dtype)
    sums = torch.randn(len(counts), 16, 24).to(grad_dtype)
    sums[:fresh] = torch.nan  # what is overwritten must not be read
    for row, count in enumerate(counts):
        if row >= fresh and not count:
            sums[row] = -0.0  # adding a zero would make it 0.0
    expected = reference(sums.nan_to_num(), grad, rows, counts, fresh)
    add_grouped(sums, grad, rows, counts, ends, fresh)
    assert (sums.double() - expected).abs().max() <= bound * expected.abs().max().clamp(min=1)
    for row, count in enumerate(counts):
        if not count:
            assert not sums[row].any() and bool(sums[row].signbit().all()) == (row >= fresh), f"row {row} of {counts}, {fresh} fresh"


CASES = [([3, 0, 5, 0, 0, 2], 0), ([3, 0, 5, 0, 0, 2], 4), ([0, 0, 4, 1], 2), ([0, 7, 0, 0], 3), ([1, 2, 3, 4], 3), ([6, 0], 2),
         ([0, 5], 1)]


@pytest.mark.parametrize(("counts", "fresh"), [*CASES, ([0, 0, 0], 2), ([0, 0, 0], 0)])
@pytest.mark.parametrize(("dtype", "grad_dtype", "bound"), [("float64", "float64", 1e-13), ("float32", "float64", 1e-5),
                                                            ("bfloat16", "bfloat16", 0.01), ("bfloat16", "float32", 0.01)])
def test_one_product_for_each_expert(dtype, grad_dtype, bound, counts, fresh):
    check(getattr(torch, dtype), getattr(torch, grad_dtype), bound, counts, fresh)


@pytest.mark.parametrize(("counts", "fresh"), CASES)
@pytest.mark.parametrize("grad_dtype", ["bfloat16", "float32"])
def test_one_launch_for_small_experts(monkeypatch, grad_dtype, counts, fresh):
    """What CUDA takes for small experts of bfloat16, on the CPU."""
    from lplb._moe import products

    try:
        torch._grouped_mm(torch.ones(8, 8).bfloat16(), torch.ones(1, 8, 8).bfloat16(), offs=torch.tensor([8], dtype=torch.int32))
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        pytest.skip(f"this PyTorch has no grouped product on the CPU: {error}")
    monkeypatch.setattr(products, "_fast", lambda rows, width: len(rows) > 0)
    check(torch.bfloat16, getattr(torch, grad_dtype), 0.01, counts, fresh)


def test_a_gradient_that_was_set_to_none_is_overwritten():
    """zero_grad(set_to_none=True) leaves old sums in the buffer: the first backward pass must not add to them, nor leave them to an expert
    that got no token; the second must add."""
    from lplb import Planner
    from lplb.moe import MoELayer

    layer = MoELayer(Planner.from_placement([0, 1, 2, 0], ep_size=1, device="cpu"), 6, 5, dtype=torch.float64)
    states, ids, weights = torch.randn(9, 6, dtype=torch.float64), torch.randint(0, 2, (9, 2)), torch.rand(9, 2).double()
    seen = []
    for _ in range(2):
        layer.zero_grad(set_to_none=True)
        layer(states, ids.clamp(max=1) + 1, weights).sum().backward()
        layer.zero_grad(set_to_none=True)
        for _ in range(2):
            layer(states, ids, weights).sum().backward()
        layer.replicas.push_grads()
        seen.append((layer.gate_up.grad.clone(), layer.down.grad.clone()))
    layer.zero_grad(set_to_none=False)
    layer(states, ids, weights).sum().backward()
    for one, other, last in zip(*seen, (layer.gate_up.grad, layer.down.grad)):
        assert torch.equal(one, other) and (one - 2 * last).abs().max() < 1e-12 and not one[2].any() and one[1].any()
