"""The experts' products: rows that lie together by expert, each with its own expert's weight."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import WrongOrder

if TYPE_CHECKING:
    from ..moe import Layout
    from ..replicas import Replicas

LARGE = 6 << 20  # elements of an expert's weight from which its gradient is worth a launch of its own, see add_grouped


class Linear(torch.autograd.Function):
    """rows @ weight.T with each row's own expert. The weights' gradients are added to the buffer of replicas, for own experts and copies
    alike; that of own experts is parameter.grad (or main_grad), which autograd itself is not told of."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, parameter: nn.Parameter, name: str, replicas: Replicas, layout: Layout) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.of = name, replicas, layout
        return grouped(rows, replicas.weights(name).transpose(1, 2), layout.counts, layout.ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (rows,), (name, replicas, layout) = ctx.saved_tensors, ctx.of
        if replicas.version != layout.version:
            raise WrongOrder("replicas: update() must not be called between a forward pass and its backward pass")
        if ctx.needs_input_grad[1]:
            sums, fresh = replicas.gradients_to_fill(name)
            add_grouped(sums, grad.contiguous(), rows, layout.counts, layout.ends, fresh)
        back = grouped(grad, replicas.weights(name), layout.counts, layout.ends) if ctx.needs_input_grad[0] else None
        return back, None, None, None, None


class PlainLinear(torch.autograd.Function):
    """The same with weights [buffer rows, b, a] whose gradient goes to autograd."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, counts: list[int], ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.of = counts, ends
        return grouped(rows, weights.transpose(1, 2), counts, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (rows, weights), (counts, ends) = ctx.saved_tensors, ctx.of
        sums: Tensor | None = None
        if ctx.needs_input_grad[1]:
            if _fast(rows, grad.shape[1]):
                sums = torch._grouped_mm(grad.contiguous().t(), rows.contiguous(), offs=ends)
            else:
                sums = torch.empty_like(weights)
                add_grouped(sums, grad.contiguous(), rows, counts, ends, len(sums))
        return grouped(grad, weights, counts, ends) if ctx.needs_input_grad[0] else None, sums, None, None


def _fast(rows: Tensor, width: int) -> bool:
    """Whether torch has a grouped product for this: bfloat16 on CUDA, rows of a multiple of 16 bytes, and one row at least."""
    return rows.is_cuda and rows.dtype is torch.bfloat16 and hasattr(torch, "_grouped_mm") and len(rows) > 0 and not (
        rows.shape[1] % 8 or width % 8)


def _spans(counts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(buffer row, its first row, the row after its last)."""
    first = 0
    for row, count in enumerate(counts):
        yield row, first, first + count
        first += count


def grouped(rows: Tensor, weights: Tensor, counts: Sequence[int], ends: Tensor) -> Tensor:
    """rows [n, a] by weights [buffer rows, a, b]."""
    if _fast(rows, weights.shape[2]):
        product: Tensor = torch._grouped_mm(rows.contiguous(), weights, offs=ends)
        return product
    out = rows.new_empty((len(rows), weights.shape[2]))
    for row, first, last in _spans(counts):
        if first < last:
            torch.mm(rows[first:last], weights[row], out=out[first:last])
    return out


def add_grouped(sums: Tensor, grad: Tensor, rows: Tensor, counts: Sequence[int], ends: Tensor, fresh: int) -> None:
    """sums [buffer rows, b, a] += grad [n, b] transposed by rows [n, a], for each buffer row. What the first `fresh` rows of sums hold is
    not worth keeping: it is overwritten, with zeros where nothing came. Behind them, rows that got nothing are neither read nor written.

    One product for each large expert, which adds in its last step to bfloat16 and float32 alike, without a second pass over memory. Small
    experts of bfloat16 are cheaper in one launch, whose result is added to the rows that got something.
    """
    if _fast(rows, grad.shape[1]) and sums[0].numel() < LARGE:
        product = torch._grouped_mm(grad.t(), rows.contiguous(), offs=ends)
        sums[:fresh].copy_(product[:fresh])  # zeros where nothing came
        for first, last in _runs(counts, fresh):
            sums[first:last] += product[first:last]
        return
    for row, first, last in _spans(counts):
        if first < last:
            _add_product(sums[row], grad[first:last].t(), rows[first:last], row < fresh)
        elif row < fresh:
            sums[row].zero_()


def _runs(counts: Sequence[int], first: int) -> Iterator[tuple[int, int]]:
    """Buffer rows from first on that got something, as ranges."""
    for row in range(first, len(counts) + 1):
        got = row < len(counts) and counts[row] > 0
        if got and (row == first or not counts[row - 1]):
            start = row
        if not got and row > first and counts[row - 1]:
            yield start, row


def _add_product(total: Tensor, one: Tensor, other: Tensor, fresh: bool) -> None:
    if total.dtype is one.dtype:
        torch.mm(one, other, out=total) if fresh else total.addmm_(one, other)
    elif total.dtype is torch.float32 and one.is_cuda and _adds_to_float32(one.device, one.dtype):
        torch.addmm(total, one, other, out_dtype=torch.float32, beta=0 if fresh else 1, out=total)
    else:
        product = one @ other
        total.copy_(product) if fresh else total.add_(product)


@functools.cache
def _adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch adds a product of dtype to a float32 matrix in one step (2.11 does on CUDA, the CPU does not)."""
    one, total = torch.ones(16, 16, device=device, dtype=dtype), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((total == 17).all())
