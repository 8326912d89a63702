"""lplb in torchtitan: its MoE layers get copies of experts, and each micro-batch is planned over them. Tried with torchtitan 0.3.0.

    # in the function that makes the Trainer.Config, for models whose experts are torchtitan's GroupedExperts (DeepSeek-V3, Qwen3, ...)
    config.parallelism.expert_parallel_degree = 4
    config.override.imports.append(("lplb.integrations.torchtitan.replicas", {"slots": 2, "replace_every": 100}))

Every rank then holds its own experts and `slots` copies, of the next ranks' hottest experts. Parameters, optimizer state and checkpoints
stay torchtitan's: a copy is a differentiable function of the own experts' weights (lplb.copies), which is pulled in each forward pass
behind FSDP's all-gather, and whose gradient reaches its home before FSDP reduces. What that costs: the pull of `slots` experts in each
forward pass (once more where activations are recomputed), the push of their gradients in each backward pass, and their memory while they
are used.

Not supported, and refused in words: DeepEP and other dispatchers than torchtitan's "standard", experts of other classes, and torch.compile
(compile.components=["loss"] is possible). Without expert parallelism (expert_parallel_degree=1) nothing changes.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..copies import Copies, natural_placement
from ..errors import Unsupported
from ..planner import Planner

TRIED = "0.3.0"
_NOT_COMPILED = 'copies of experts cannot be compiled, and torchtitan compiles whole blocks: take "model" out of compile.components'

try:
    from torchtitan.config.override import override  # type: ignore[import-not-found,unused-ignore]
    from torchtitan.models.common.moe import GroupedExperts, RoutedExperts  # type: ignore[import-not-found,unused-ignore]
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher  # type: ignore[import-not-found,unused-ignore]
except ImportError as error:
    try:
        _version = f"torchtitan {importlib.metadata.version('torchtitan')} is installed"
    except importlib.metadata.PackageNotFoundError:
        _version = "torchtitan is not installed"
    raise ImportError(f"lplb.integrations.torchtitan works with torchtitan {TRIED}, but {_version}: {error}") from error


class Dispatcher(AllToAllTokenDispatcher):  # type: ignore[misc]
    """Sends tokens to physical experts: own experts' rows first, then the copies'."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(AllToAllTokenDispatcher.Config):  # type: ignore[misc]
        slots: int
        replace_every: int

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.slots, self.replace_every, self.batches = config.slots, config.replace_every, 0
        self.copies: Copies | None = None  # None without expert parallelism
        self.own_rows = 0  # rows of the last dispatch that go to own experts

    def wire_meshes(self, *, ep_mesh: Any) -> None:
        super().wire_meshes(ep_mesh=ep_mesh)
        if ep_mesh is None:
            return
        device = torch.device("cuda", torch.cuda.current_device()) if ep_mesh.device_type == "cuda" else torch.device("cpu")
        placement = natural_placement(self.num_experts, ep_mesh.size(), self.slots)
        self.copies = Copies(Planner.from_placement(placement, group=ep_mesh.get_group(), device=device, history=self.slots > 0 and self.replace_every > 0))

    def dispatch(self, x_TD: Tensor, topk_scores_TK: Tensor, topk_expert_ids_TK: Tensor, num_local_tokens_per_expert_E: Tensor) -> Any:
        if self.copies is None:
            return super().dispatch(x_TD, topk_scores_TK, topk_expert_ids_TK, num_local_tokens_per_expert_E)
        rows, counts = self._plan(self.copies, topk_expert_ids_TK.detach(), num_local_tokens_per_expert_E)
        return super().dispatch(x_TD, topk_scores_TK, rows, counts)

    @torch.compiler.disable(reason=_NOT_COMPILED)  # type: ignore[untyped-decorator, no-untyped-call]
    def _plan(self, copies: Copies, ids: Tensor, per_expert: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [tokens, k], numbered over all ranks, for ids; and the tokens of each."""
        places, planner = copies.places, copies.planner
        physical = planner.run(ids, None).long()
        rows = physical // planner.n_local_routed_experts * places.n_rows + places.row_of_slot[physical]
        counts = per_expert.new_zeros(places.n_ranks * places.n_rows)  # bincount would wait for the GPU
        counts.scatter_add_(0, rows.flatten(), torch.ones_like(rows.flatten(), dtype=counts.dtype))
        return rows, counts

    def _sync_token_count_exchange(self, sent: Tensor, received: Tensor, ep_size: int) -> Any:
        counts, *splits = super()._sync_token_count_exchange(sent, received, ep_size)
        if self.copies is not None:  # here the host has waited for the counts already
            self.own_rows = int(counts.view(ep_size, -1)[:, : self.copies.n_own].sum())
        return counts, *splits

    @torch.no_grad()
    def follow(self) -> None:
        """Chooses the copies anew from what the tokens of all ranks chose. Before a forward pass, on all ranks."""
        if self.copies is None or not self.slots:
            return
        planner = self.copies.planner
        # torchtitan's SelectiveAC keeps results of copies to the host by their order, which is another when activations are recomputed, where
        # none of this happens.
        with _disable_current_modes():
            history = torch.as_tensor(planner.history(reset=True))
            planner.update_placement(natural_placement(self.num_experts, planner.ep_size, self.slots, history))
            self.copies.update()


class Experts(GroupedExperts):  # type: ignore[misc]
    """torchtitan's experts on the own rows and, with the copies' weights, on the rows behind."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):  # type: ignore[misc]
        pass

    dispatcher: Dispatcher

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        copies = self.dispatcher.copies
        if copies is None:
            return super().forward(x_RD, num_tokens_per_expert_E)  # type: ignore[no-any-return]
        names = ("w1_EFD", "w2_EDF", "w3_EFD")
        weights = [getattr(self, name) for name in names]
        own, behind = copies(*(weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights))
        rows, first = self.dispatcher.own_rows, copies.n_own
        parts = ((own, x_RD[:rows], num_tokens_per_expert_E[:first]), (behind, x_RD[rows:], num_tokens_per_expert_E[first:]))
        return torch.cat([GroupedExperts.forward(SimpleNamespace(**dict(zip(names, part)), _grouped_mm=self._grouped_mm), states, counts)
                          for part, states, counts in parts])


class Routed(RoutedExperts):  # type: ignore[misc]
    """torchtitan's routed experts, whose parts know each other."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):  # type: ignore[misc]
        pass

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.inner_experts.dispatcher = self.token_dispatcher

    def forward(self, x_BLD: Tensor, topk_scores_BLK: Tensor, topk_expert_ids_BLK: Tensor, num_local_tokens_per_expert_E: Tensor) -> Tensor:
        dispatcher, recomputed = self.token_dispatcher, torch._C._current_graph_task_id() >= 0
        if self.training and not recomputed:
            if dispatcher.replace_every and dispatcher.batches and dispatcher.batches % dispatcher.replace_every == 0:
                dispatcher.follow()
            dispatcher.batches += 1
        return super().forward(x_BLD, topk_scores_BLK, topk_expert_ids_BLK, num_local_tokens_per_expert_E)  # type: ignore[no-any-return]


def _remade(config: Any, kind: type[Any], **more: int) -> Any:
    """config as one of kind.Config, with what is its own."""
    made = kind.Config(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)}, **more)
    return made


@override(target=RoutedExperts.Config, exact=True, description="copies of experts, planned by lplb")  # type: ignore[untyped-decorator]
def replicas(config: Any, slots: int = 1, replace_every: int = 0) -> Any:
    """slots: copies a rank. replace_every: forward passes after which the copies are chosen anew by what was routed since, 0 for never."""
    experts, dispatcher = config.inner_experts, config.token_dispatcher
    if type(experts) is not GroupedExperts.Config or type(dispatcher) is not AllToAllTokenDispatcher.Config:
        raise Unsupported("torchtitan: copies need inner_experts of GroupedExperts and a token_dispatcher of AllToAllTokenDispatcher "
                          f"(comm_backend=\"standard\"), got {type(experts).__qualname__} and {type(dispatcher).__qualname__}")
    made = _remade(config, Routed)
    made.inner_experts = _remade(experts, Experts)
    made.token_dispatcher = _remade(dispatcher, Dispatcher, slots=slots, replace_every=replace_every)
    return made
