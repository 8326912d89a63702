"""A whole expert-parallel MoE layer with replicas: plan, dispatch, experts, combine, forward and backward. Meant to be read and copied.

    layer = MoELayer(planner, hidden=2048, intermediate=1408, dtype=torch.bfloat16)
    output = layer(hidden_states, expert_ids, router_weights)      # [tokens, hidden], [tokens, k], [tokens, k]

Each rank gives its own tokens. A step is: forward and backward of one or several micro-batches, layer.replicas.push_grads(), the optimizer,
layer.replicas.pull(). Every rank of the group calls forward and backward, also one without tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from .errors import WrongOrder, broken_rule
from .planner import Planner
from .replicas import Replicas


@dataclass(frozen=True)
class Layout:
    """Where the rows of a batch go. A choice is one of the tokens * k pairs of a token and an expert."""

    group: dist.ProcessGroup | None
    version: int  # of the replicas
    n_choices: int  # k
    order: Tensor  # the choices that have an expert, by rank and then row of that expert's buffers
    sent: list[int]  # rows to each rank
    received: list[int]  # rows from each rank
    by_row: Tensor  # order that brings the received rows, which come by rank, together by buffer row
    ends: Tensor  # int32: rows of the buffers 0 .. i have received so many
    counts: list[int]  # rows received for each buffer row

    @classmethod
    def make(cls, physical: Tensor, replicas: Replicas, expert_ids: Tensor, planned: bool) -> Layout:
        """From physical ids [tokens, k], -1 where there is no expert. planned: they are those of the planner's latest plan, from which the
        planner knows what the other ranks send. Otherwise, and without replicas, where nothing is planned, the ranks ask each other."""
        planner, ranks = replicas.planner, [1] * replicas.n_ranks
        knows = planned and planner.n_routed_experts > planner.n_logical_routed_experts
        layout = planner.layout(
            physical, experts=expert_ids.detach().to(physical.dtype), row_of_slot=replicas.row_of_slot, n_rows=replicas.n_rows,
            received=None if knows else lambda rows: _exchange(rows, ranks, ranks, planner.ep_group))
        sent, received, counts = layout.wait()  # the only place where a GPU is waited for
        return cls(planner.ep_group, replicas.version, physical.shape[-1], layout.order[: sum(sent)], sent, received, layout.by_row,
                   layout.ends, counts)


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return rows
    out = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


def _send(choices: Tensor, layout: Layout) -> Tensor:
    """Rows [choices, hidden] from here, to those that the experts here get, by buffer row."""
    return _exchange(choices[layout.order], layout.sent, layout.received, layout.group)[layout.by_row]


def _send_back(rows: Tensor, n_choices: int, layout: Layout) -> Tensor:
    """The way back; zeros for choices without an expert."""
    by_rank = torch.empty_like(rows)
    by_rank[layout.by_row] = rows
    back = _exchange(by_rank, layout.received, layout.sent, layout.group)
    choices = back.new_zeros((n_choices, *back.shape[1:]))
    choices[layout.order] = back  # each place once: the same bits in every run
    return choices


class _Dispatch(torch.autograd.Function):
    """[tokens, hidden] to the rows of the experts here."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, layout: Layout) -> Tensor:
        ctx.layout, ctx.shape = layout, tokens.shape
        return _exchange(tokens[layout.order // layout.n_choices], layout.sent, layout.received, layout.group)[layout.by_row]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        tokens, hidden = ctx.shape
        choices = _send_back(grad, tokens * ctx.layout.n_choices, ctx.layout)
        return choices.view(tokens, ctx.layout.n_choices, hidden).sum(1), None


class _Combine(torch.autograd.Function):
    """Rows of the experts here to [tokens * k, hidden]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, n_choices: int, layout: Layout) -> Tensor:
        ctx.layout = layout
        return _send_back(rows, n_choices, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _send(grad, ctx.layout), None, None


class _Linear(torch.autograd.Function):
    """rows @ weight.T with each row's own expert. The weights' gradients are added to the buffer of replicas, for own experts and copies
    alike; that of own experts is parameter.grad (or main_grad), which autograd itself is not told of."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, parameter: nn.Parameter, name: str, replicas: Replicas, layout: Layout) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.of = name, replicas, layout
        return _grouped(rows, replicas.weights(name).transpose(1, 2), layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (rows,), (name, replicas, layout) = ctx.saved_tensors, ctx.of
        if replicas.version != layout.version:
            raise WrongOrder("replicas: update() must not be called between a forward pass and its backward pass")
        if ctx.needs_input_grad[1]:
            _add_grouped(replicas.gradients(name), grad.contiguous(), rows, layout)
        return _grouped(grad, replicas.weights(name), layout) if ctx.needs_input_grad[0] else None, None, None, None, None


def _fast(rows: Tensor, width: int) -> bool:
    """Whether torch has a grouped product for this: bfloat16 on CUDA, rows of a multiple of 16 bytes, and one row at least."""
    return rows.is_cuda and rows.dtype is torch.bfloat16 and hasattr(torch, "_grouped_mm") and len(rows) > 0 and not (
        rows.shape[1] % 8 or width % 8)


def _grouped(rows: Tensor, weights: Tensor, layout: Layout) -> Tensor:
    """rows [n, a] by weights [buffer rows, a, b]."""
    if _fast(rows, weights.shape[2]):
        product: Tensor = torch._grouped_mm(rows.contiguous(), weights, offs=layout.ends)
        return product
    out = rows.new_empty((len(rows), weights.shape[2]))
    first = 0
    for row, count in enumerate(layout.counts):
        if count:
            torch.mm(rows[first : first + count], weights[row], out=out[first : first + count])
            first += count
    return out


def _add_grouped(sums: Tensor, grad: Tensor, rows: Tensor, layout: Layout) -> None:
    """sums [buffer rows, b, a] += grad [n, b] transposed by rows [n, a], for each buffer row."""
    if _fast(rows, grad.shape[1]):
        sums += torch._grouped_mm(grad.t(), rows.contiguous(), offs=layout.ends)
        return
    first = 0
    for row, count in enumerate(layout.counts):
        if count:
            sums[row] += grad[first : first + count].t() @ rows[first : first + count]
            first += count


def save_plans() -> Any:
    """context_fn of torch.utils.checkpoint.checkpoint(..., use_reentrant=False): the physical ids of the forward pass and their layout are
    kept and used again when activations are recomputed, instead of being planned and exchanged a second time."""
    kept = [torch.ops.lplb.run.default, torch.ops.lplb.layout.default, torch.ops.lplb.layout_received.default]
    return create_selective_checkpoint_contexts(kept)  # type: ignore[no-untyped-call]


class MoELayer(nn.Module):
    """SwiGLU experts [hidden -> intermediate -> hidden] over the ranks of planner's group. Making one is collective.

    planner: with replicas or without; Planner.run is called in forward. grad_dtype: torch.float32 for main gradients (parameter.main_grad).
    slack: see Replicas. seed: each expert's first weights depend on it and on the expert alone, not on where the expert stands.
    """

    def __init__(self, planner: Planner, hidden: int, intermediate: int, *, dtype: torch.dtype | None = None,
                 grad_dtype: torch.dtype | None = None, slack: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.replicas = Replicas(planner, slack=slack)
        self.gate_up = self.replicas.parameter("gate_up", (2 * intermediate, hidden), dtype=dtype, grad_dtype=grad_dtype)
        self.down = self.replicas.parameter("down", (hidden, intermediate), dtype=dtype, grad_dtype=grad_dtype)
        self.reset_parameters(seed)
        self.replicas.pull()

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        for row, expert in enumerate(self.replicas.own.tolist()):
            if expert >= 0:
                generator = torch.Generator().manual_seed(seed * 65537 + expert)
                for weight in (self.gate_up[row], self.down[row]):
                    weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)

    def plan(self, expert_ids: Tensor) -> Tensor:
        """Physical ids, for forward(physical=...) under the same placement."""
        return self.replicas.planner.run(expert_ids.detach(), None)

    def forward(self, hidden_states: Tensor, expert_ids: Tensor, router_weights: Tensor, physical: Tensor | None = None) -> Tensor:
        """[tokens, hidden], [tokens, k] integers, -1 for no expert, [tokens, k] -> [tokens, hidden]. physical: of plan(), if made."""
        if hidden_states.dim() != 2 or hidden_states.shape[1] != self.gate_up.shape[2]:
            raise broken_rule("hidden_states", f"must be [tokens, {self.gate_up.shape[2]}]", f"shape {list(hidden_states.shape)}")
        same = ("router_weights", router_weights), ("physical", expert_ids if physical is None else physical)
        for name, given in (("expert_ids", expert_ids), *same):
            if given.dim() != 2 or given.shape != expert_ids.shape or len(given) != len(hidden_states):
                raise broken_rule(name, f"must be [{len(hidden_states)} tokens, k], as expert_ids", f"shape {list(given.shape)}")
        self.replicas.check_placement()
        layout = Layout.make(self.plan(expert_ids) if physical is None else physical, self.replicas, expert_ids, physical is None)
        rows = _Dispatch.apply(hidden_states, layout)
        gate, up = _Linear.apply(rows, self.gate_up, "gate_up", self.replicas, layout).chunk(2, dim=-1)
        rows = _Linear.apply(F.silu(gate) * up, self.down, "down", self.replicas, layout)
        choices = _Combine.apply(rows, expert_ids.numel(), layout).view(*expert_ids.shape, hidden_states.shape[1])
        output: Tensor = (choices * router_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)
        return output

    # A checkpoint holds the own experts' weights and their numbers, and no copies. Those of several ranks, joined along the first dimension
    # of each tensor, can be loaded by any number of ranks, wherever the experts stand. Call replicas.pull() after loading.

    def get_extra_state(self) -> Tensor:
        return self.replicas.own.cpu().clone()

    def set_extra_state(self, state: Tensor) -> None:
        pass  # it has served _load_from_state_dict

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        saved, own = state_dict.get(f"{prefix}_extra_state"), self.replicas.own.tolist()
        if saved is not None:
            row_of = {expert: row for row, expert in enumerate(saved.tolist())}
            missing = [expert for expert in own if expert >= 0 and expert not in row_of]
            if missing:
                raise broken_rule("state_dict", f"must hold the experts of rank {self.replicas.rank}", f"none of the experts {missing}")
            for key in (f"{prefix}gate_up", f"{prefix}down"):
                if key in state_dict:
                    rows = state_dict[key][[row_of.get(expert, 0) for expert in own]]
                    rows[[row for row, expert in enumerate(own) if expert < 0]] = 0
                    state_dict[key] = rows
        super()._load_from_state_dict(state_dict, prefix, *arguments)
