"""A whole expert-parallel MoE layer with replicas: plan, dispatch, experts, combine, forward and backward. Meant to be read and copied.

    layer = MoELayer(planner, hidden=2048, intermediate=1408, dtype=torch.bfloat16)
    output = layer(hidden_states, expert_ids, router_weights)      # [tokens, hidden], [tokens, k], [tokens, k]

Each rank gives its own tokens. A step is: forward and backward of one or several micro-batches, layer.replicas.push_grads(), the optimizer,
layer.replicas.pull(). Every rank of the group calls forward and backward, also one without tokens.

With DistributedDataParallel or FSDP2 there are two ways.
 - They leave the experts alone: DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names of the experts'
   parameters), or fully_shard(module, ignored_params=set(layer.parameters())). Where several ranks hold the same experts (more ranks than
   those of the planner's group), their gradients are reduced by hand, behind push_grads() and before the optimizer.
 - MoELayer(..., sharded=True): the parameters are plain ones whose gradients autograd hands out, so fully_shard(layer, mesh=...) or a
   DistributedDataParallel over the ranks that hold the same experts may shard and reduce them. push_grads() and pull() have nothing to do
   then. The copies' weights are pulled in each forward pass, behind FSDP's unshard, and their gradients go home in each backward pass,
   before FSDP reduces: that many times the cost of one of each a step. Main gradients in another type, and homes that move, need the
   first way.
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

from ._moe import deep_ep
from ._moe.products import Linear, PlainLinear
from .copies import Copies
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


def save_plans() -> Any:
    """context_fn of torch.utils.checkpoint.checkpoint(..., use_reentrant=False): the physical ids of the forward pass and their layout are
    kept and used again when activations are recomputed, instead of being planned and exchanged a second time."""
    kept = [torch.ops.lplb.run.default, torch.ops.lplb.layout.default, torch.ops.lplb.layout_received.default]
    return create_selective_checkpoint_contexts(kept)  # type: ignore[no-untyped-call]


class MoELayer(nn.Module):
    """SwiGLU experts [hidden -> intermediate -> hidden] over the ranks of planner's group. Making one is collective.

    planner: with replicas or without; Planner.run is called in forward. grad_dtype: torch.float32 for main gradients (parameter.main_grad).
    slack: see Replicas. seed: each expert's first weights depend on it and on the expert alone, not on where the expert stands.
    sharded: the parameters are for FSDP2, DDP or other hooks, see above. dispatch: "torch" (all_to_all_single), or a deep_ep.Buffer of the
    planner's group, for bfloat16.
    """

    def __init__(self, planner: Planner, hidden: int, intermediate: int, *, dtype: torch.dtype | None = None,
                 grad_dtype: torch.dtype | None = None, slack: int = 0, seed: int = 0, sharded: bool = False, dispatch: Any = "torch"
                 ) -> None:
        super().__init__()
        if dispatch != "torch":
            deep_ep.check_buffer(dispatch, planner.ep_group)
        if sharded and (slack or grad_dtype not in (None, dtype)):
            raise broken_rule("sharded", "must be False where homes move (slack) or gradients have another type (grad_dtype)", sharded)
        self.buffer = None if dispatch == "torch" else dispatch
        self.copies = Copies(planner) if sharded else None
        self.replicas = self.copies.places if self.copies else Replicas(planner, slack=slack)
        shapes = {"gate_up": (2 * intermediate, hidden), "down": (hidden, intermediate)}
        for name, shape in shapes.items():
            self.register_parameter(name, self.replicas.parameter(name, shape, dtype=dtype, grad_dtype=grad_dtype) if not sharded else
                                    nn.Parameter(torch.zeros(len(self.replicas.own), *shape, dtype=dtype, device=planner.device)))
        self.hidden, self._made = hidden, (self.gate_up, self.down)
        self.reset_parameters(seed)
        self.replicas.pull()

    gate_up: nn.Parameter
    down: nn.Parameter

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

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, expert_ids: Tensor, router_weights: Tensor, physical: Tensor | None = None) -> Tensor:
        """[tokens, hidden], [tokens, k] integers, -1 for no expert, [tokens, k] -> [tokens, hidden]. physical: of plan(), if made."""
        if hidden_states.dim() != 2 or hidden_states.shape[1] != self.hidden:
            raise broken_rule("hidden_states", f"must be [tokens, {self.hidden}]", f"shape {list(hidden_states.shape)}")
        same = ("router_weights", router_weights), ("physical", expert_ids if physical is None else physical)
        for name, given in (("expert_ids", expert_ids), *same):
            if given.dim() != 2 or given.shape != expert_ids.shape or len(given) != len(hidden_states):
                raise broken_rule(name, f"must be [{len(hidden_states)} tokens, k], as expert_ids", f"shape {list(given.shape)}")
        if self.copies is None and (self.gate_up is not self._made[0] or self.down is not self._made[1]):
            raise WrongOrder("MoELayer: the parameters were replaced, as FSDP2's fully_shard does: make the layer with sharded=True, or "
                             "leave them out with fully_shard(..., ignored_params=set(layer.parameters()))")
        self.replicas.check_placement()
        planned = physical is None
        physical = self.plan(expert_ids) if physical is None else physical
        if self.buffer is not None:
            return deep_ep.through(self.buffer, self._experts, hidden_states, physical, router_weights, self.replicas)
        layout = Layout.make(physical, self.replicas, expert_ids, planned)
        rows = self._experts(_Dispatch.apply(hidden_states, layout), layout)
        choices = _Combine.apply(rows, expert_ids.numel(), layout).view(*expert_ids.shape, self.hidden)
        output: Tensor = (choices * router_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)
        return output

    def _experts(self, rows: Tensor, layout: Layout | deep_ep.Arrived) -> Tensor:
        """Rows by buffer row, as layout counts them."""
        if self.copies is None:
            gate, up = Linear.apply(rows, self.gate_up, "gate_up", self.replicas, layout).chunk(2, dim=-1)
            down: Tensor = Linear.apply(F.silu(gate) * up, self.down, "down", self.replicas, layout)
            return down
        own, copies = self.copies(*(one.to_local() if hasattr(one, "to_local") else one for one in (self.gate_up, self.down)))
        n = self.copies.n_own
        first, parts = sum(layout.counts[:n]), []
        for (gate_up, weight), part, counts, ends in ((own, rows[:first], layout.counts[:n], layout.ends[:n]),
                                                      (copies, rows[first:], layout.counts[n:], layout.ends[n:] - first)):
            gate, up = PlainLinear.apply(part, gate_up, counts, ends).chunk(2, dim=-1)
            parts.append(PlainLinear.apply(F.silu(gate) * up, weight, counts, ends))
        return torch.cat(parts)

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and torch.save of the whole layer, which are collective: see Replicas."""
        if self.buffer is not None:
            raise TypeError("MoELayer: cannot be copied or pickled with a deep_ep.Buffer, which cannot; make another layer and load the "
                            "state_dict() of this one")
        return vars(self)

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
                if hasattr(state_dict.get(key), "to_local"):  # a DTensor
                    if saved.tolist() != own:
                        raise broken_rule("state_dict", f"must hold the experts {own} in this order where they are sharded", saved.tolist())
                elif key in state_dict:
                    rows = state_dict[key][[row_of.get(expert, 0) for expert in own]]
                    rows[[row for row, expert in enumerate(own) if expert < 0]] = 0
                    state_dict[key] = rows
        super()._load_from_state_dict(state_dict, prefix, *arguments)
