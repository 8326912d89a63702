"""The same layer in plain torch, without lplb: sort, all-to-all, grouped products, autograd.

The layer without replicas is compared with it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class PlainMoE(nn.Module):
    """Experts in order over the ranks of the default group: rank r holds n_experts / ranks consecutive ones."""

    def __init__(self, n_experts: int, hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.n_local = n_experts // self.ranks
        self.gate_up = nn.Parameter(torch.empty(self.n_local, 2 * intermediate, hidden, dtype=dtype, device=device))
        self.down = nn.Parameter(torch.empty(self.n_local, hidden, intermediate, dtype=dtype, device=device))
        for weight in (self.gate_up, self.down):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
            weight.grad = torch.zeros_like(weight)

    def forward(self, states: Tensor, ids: Tensor, weights: Tensor, physical: Tensor | None = None) -> Tensor:
        flat, top_k = ids.reshape(-1), ids.shape[1]
        order = flat.argsort(stable=True)
        to = torch.bincount(flat, minlength=self.ranks * self.n_local).view(self.ranks, self.n_local)
        come = torch.empty_like(to)
        if self.ranks > 1:
            dist.all_to_all_single(come, to)
        else:
            come = to
        sent, received = ([sum(row) for row in side] for side in torch.stack([to, come]).tolist())
        expert = torch.arange(self.n_local, device=ids.device).repeat(self.ranks).repeat_interleave(
            come.flatten(), output_size=sum(received))
        by_expert, ends = expert.argsort(stable=True), come.sum(0).cumsum(0).int()
        rows = _Permuted.apply(_AllToAll.apply(_Chosen.apply(states, order, top_k), received, sent), by_expert)
        gate, up = self._products(rows, self.gate_up, ends).chunk(2, dim=-1)
        rows = self._products(F.silu(gate) * up, self.down, ends)
        back = _AllToAll.apply(_Permuted.apply(rows, _inverse(by_expert)), sent, received)
        choices = _Permuted.apply(back, _inverse(order)).view(*ids.shape, states.shape[1])
        return (choices * weights.unsqueeze(-1)).sum(1).to(states.dtype)  # type: ignore[no-any-return]

    def _products(self, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        if rows.is_cuda and rows.dtype is torch.bfloat16:
            product: Tensor = torch._grouped_mm(rows, weight.transpose(1, 2), offs=ends)
            return product
        sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        return torch.cat([part @ weight[expert].T for expert, part in enumerate(torch.split(rows, sizes))])


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


class _Chosen(torch.autograd.Function):
    """tokens [n, hidden] to a row for each choice, in this order."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, top_k: int) -> Tensor:
        ctx.of = order, top_k
        return tokens[order // top_k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, top_k = ctx.of
        choices = torch.empty_like(grad)
        choices[order] = grad
        return choices.view(-1, top_k, grad.shape[1]).sum(1), None, None


class _Permuted(torch.autograd.Function):
    """rows[order], where order holds every row once."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.order = order
        return rows[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows = torch.empty_like(grad)
        rows[ctx.order] = grad
        return rows, None


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks; so many come and go."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, come: list[int], go: list[int]) -> Tensor:
        ctx.of = come, go
        return _exchanged(rows, come, go)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        come, go = ctx.of
        return _exchanged(grad, go, come), None, None


def _exchanged(rows: Tensor, come: list[int], go: list[int]) -> Tensor:
    if not dist.is_initialized():
        return rows
    out = rows.new_empty((sum(come), rows.shape[1]))
    dist.all_to_all_single(out, rows.contiguous(), come, go)
    return out
