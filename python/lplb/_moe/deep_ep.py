"""Dispatch and combine by a deep_ep.Buffer (DeepEP's first interface: get_dispatch_layout, dispatch with a handle, combine).

A token goes to each rank once, whatever the number of its experts there; that rank weighs and adds up what its experts make of it, and
the sums of the ranks are added up where the token came from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import InvalidArgument, broken_rule

if TYPE_CHECKING:
    from ..replicas import Replicas


class Arrived(NamedTuple):
    """What the experts' products need of a Layout."""

    version: int
    counts: list[int]
    ends: Tensor


def check_buffer(buffer: Any, group: Any) -> None:
    missing = [name for name in ("get_dispatch_layout", "dispatch", "combine", "group_size") if not hasattr(buffer, name)]
    if missing or group is None or buffer.group_size != group.size():
        got = f"{type(buffer).__name__} without {', '.join(missing)}" if missing else f"one of {buffer.group_size} ranks"
        raise broken_rule("dispatch", 'must be "torch", or a deep_ep.Buffer of the planner\'s group', got)


class _Dispatch(torch.autograd.Function):
    """Tokens and their weights to the ranks of their experts: [received, hidden], [received, k] -1 for experts elsewhere, [received, k]."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weights: Tensor, physical: Tensor, n_physical: int, buffer: Any, kept: list[Any]
                ) -> tuple[Tensor, Tensor, Tensor]:
        per_rank, per_node, per_expert, to_rank, _ = buffer.get_dispatch_layout(physical, n_physical)
        rows, ids, row_weights, counts, handle, _ = buffer.dispatch(
            tokens, topk_idx=physical, topk_weights=weights, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=to_rank, num_tokens_per_expert=per_expert)
        kept += [handle, counts]
        ctx.buffer, ctx.handle = buffer, handle
        ctx.mark_non_differentiable(ids)
        return rows, ids, row_weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows: Tensor, _: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        tokens, token_weights, _ = ctx.buffer.combine(rows.contiguous(), ctx.handle, topk_weights=weights.float().contiguous())
        return tokens, token_weights, None, None, None, None


class _Combine(torch.autograd.Function):
    """[received, hidden] back to the tokens, added up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, buffer: Any, handle: Any) -> Tensor:
        ctx.buffer, ctx.handle = buffer, handle
        tokens: Tensor = buffer.combine(rows.contiguous(), handle)[0]
        return tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.buffer.dispatch(grad.contiguous(), handle=ctx.handle)[0], None, None


def through(buffer: Any, experts: Any, tokens: Tensor, physical: Tensor, weights: Tensor, replicas: Replicas) -> Tensor:
    """[tokens, hidden] by physical experts [tokens, k] and weights [tokens, k]; experts(rows by buffer row, Arrived) computes."""
    if tokens.dtype is not torch.bfloat16:
        raise InvalidArgument(f"hidden_states: must be bfloat16 where DeepEP moves them, got {tokens.dtype}")
    kept: list[Any] = []
    received, ids, row_weights = _Dispatch.apply(
        tokens.contiguous(), weights.float().contiguous(), physical.long().contiguous(), replicas.planner.n_routed_experts, buffer, kept)
    handle, per_expert = kept
    first = replicas.rank * replicas.planner.n_local_routed_experts
    local = slice(first, first + len(per_expert))
    row_of = replicas.row_of_slot[local]  # several slots may share a row
    choice = torch.where(ids < 0, replicas.n_rows, row_of[ids.clamp(min=0)]).flatten()
    per_row = choice.new_zeros(replicas.n_rows + 1).scatter_add_(0, choice, torch.ones_like(choice))[:-1]  # bincount would wait for the GPU
    order = choice.argsort(stable=True)[: sum(per_expert)]
    counts = [0] * replicas.n_rows
    for row, count in zip(replicas._rows.row_of_slot[local], per_expert):
        counts[row] += count
    arrived = Arrived(replicas.version, counts, per_row.cumsum(0).int())
    # By index_select and a write to each place once, forward and backward: the same bits in every run.
    rows = experts(_Spread.apply(received, order, ids.shape[1]), arrived)
    rows = rows * row_weights.flatten()[order].unsqueeze(1).to(rows.dtype)
    output: Tensor = _Combine.apply(_Gathered.apply(rows, order, len(received), ids.shape[1]), buffer, handle)
    return output


class _Spread(torch.autograd.Function):
    """Received tokens to the choices in order; a token may have several here."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, k: int) -> Tensor:
        ctx.of = order, len(tokens), k
        return tokens[order // k]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, tokens, k = ctx.of
        return _sums(grad, order, tokens, k), None, None


class _Gathered(torch.autograd.Function):
    """The way back: choices to the sums of their tokens."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, tokens: int, k: int) -> Tensor:
        ctx.of = order, k
        return _sums(rows, order, tokens, k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        order, k = ctx.of
        return grad[order // k], None, None, None


def _sums(rows: Tensor, order: Tensor, tokens: int, k: int) -> Tensor:
    choices = rows.new_zeros((tokens * k, *rows.shape[1:]))
    choices[order] = rows
    return choices.view(tokens, k, *rows.shape[1:]).sum(1)
