"""lplb in vLLM: where experts stand, and which replica each token goes to. Tried with vllm 0.33.0, which finds this plug-in by itself.

    LPLB_VLLM=placement,dispatch vllm serve MODEL --enable-expert-parallel --enable-eplb --data-parallel-size 8 \\
        --eplb-config '{"num_redundant_experts": 32}'

placement: EPLB's policy "default" becomes one of lplb.place: LPLB_VLLM_POLICY, or "flow" where lplb dispatches too, else "balanced" (both
without two copies on one rank). Experts that stay on a rank keep their slots. LPLB_VLLM_MAX_MOVES: at most so many experts come new to a
rank in one rebalance, over all layers.
dispatch: in each layer and batch every token's replica is chosen so that the busiest rank has as little as possible, from the counts of
all ranks, where vLLM takes the replica by the token's position. vLLM's own kernel goes on recording the loads. Where the engine routes the
same tokens on all ranks (tensor parallelism without data parallelism, and where tokens are gathered before they are routed) nothing is
exchanged, and all ranks make the same plan.

Rebalances, synchronous or not, set the new placement in the same planners, so captured graphs stay valid. With dual batch overlap each
micro-batch has planners and an exchange of its own. Elastic EP is refused. All ranks must ask for the same; with Ray that takes
VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY=LPLB_ as well. Without LPLB_VLLM, or with another vLLM that this module does not fit, nothing is
touched; in the second case the log says so.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any

from ..errors import Unsupported
from ._engine import WAIT, Settings, fits, planner_of, same_everywhere, settings

if TYPE_CHECKING:
    import torch

    from ..exchange import Exchange
    from ..planner import Planner

TRIED = "0.33.0"
VARIABLE = "LPLB_VLLM"
ROUTER, MAP = "vllm.model_executor.layers.fused_moe.router.base_router", "eplb_map_to_physical_and_record"
POLICY = {
    "vllm.distributed.eplb.policy:EPLB_POLICIES": (),
    "vllm.distributed.eplb.policy:AbstractEplbPolicy.rebalance_experts":
        ("weight", "num_replicas", "num_groups", "num_nodes", "num_ranks", "old_global_expert_indices"),
    "vllm.distributed.eplb.eplb_state:EplbState.add_model": ("self", "model", "model_config", "model_name"),
    "vllm.distributed.parallel_state:get_ep_group": (),
}
DISPATCH = {
    "vllm.distributed.eplb.eplb_state:_commit_eplb_maps": ("model_state", "new_physical_to_logical_map"),
    "vllm.distributed.eplb.eplb_state:_commit_eplb_maps_for_layer": ("model_state", "new_physical_to_logical_map", "layer"),
    "vllm.v1.worker.ubatching:dbo_current_ubatch_id": (),
}
CALLS = {  # seen when the first model is there, since these modules are slow to import
    f"{ROUTER}:{MAP}":
        ("topk_ids", "expert_load_view", "logical_to_physical_map", "logical_replica_count", "record_enabled", "num_unpadded_tokens"),
    "vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner.do_naive_dispatch_combine": (),
    "vllm.model_executor.layers.fused_moe.config:FusedMoEParallelConfig.use_all2all_kernels": (),
}


def register() -> None:
    """vLLM's entry point: called once in each of its processes."""
    chosen = settings(VARIABLE)
    if chosen is None or not fits("vllm", TRIED, VARIABLE, {**POLICY, **(DISPATCH if chosen.dispatch else {})}):
        return
    from vllm.distributed.eplb import eplb_state, policy  # type: ignore[import-not-found,unused-ignore]

    state = eplb_state.EplbState
    if hasattr(state.add_model, "by_lplb"):  # registered before
        return
    if chosen.placement:
        policy.EPLB_POLICIES["default"] = _policy(policy.AbstractEplbPolicy, chosen)
    state.add_model = _add_model(state.add_model, chosen)
    if chosen.dispatch:
        eplb_state._commit_eplb_maps = _commit(eplb_state._commit_eplb_maps)
        eplb_state._commit_eplb_maps_for_layer = _commit(eplb_state._commit_eplb_maps_for_layer)
    logging.getLogger("vllm.lplb").info("lplb does %s", " and ".join(part for part in ("placement", "dispatch") if getattr(chosen, part)))


def _policy(base: Any, chosen: Settings) -> Any:
    from ..eplb import EplbPolicy

    class Policy(base):  # type: ignore[misc]
        @classmethod
        def rebalance_experts(cls, weight: torch.Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int,
                              old_global_expert_indices: torch.Tensor | None = None) -> torch.Tensor:
            known = old_global_expert_indices is not None  # a budget counts from the placement in force
            policy = chosen.policy if known or chosen.policy != "repair" else "flow"
            return EplbPolicy.rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_ranks, old_global_expert_indices,
                                                policy=policy, max_moves=chosen.max_moves if known else None)

    return Policy


def _add_model(original: Any, chosen: Settings) -> Any:
    @functools.wraps(original)
    def add_model(self: Any, model: Any, *arguments: Any, **named: Any) -> None:
        if self.parallel_config.enable_elastic_ep:
            raise Unsupported(f"{VARIABLE}: lplb does not support elastic EP, which changes the number of slots. Leave out "
                              f"--enable-elastic-ep or unset {VARIABLE}")
        from vllm.distributed.parallel_state import get_ep_group  # type: ignore[import-not-found,unused-ignore]

        same_everywhere(VARIABLE, chosen, get_ep_group().cpu_group)
        original(self, model, *arguments, **named)
        if chosen.dispatch and fits("vllm", TRIED, VARIABLE, CALLS, again=True):
            _take_calls()
            state = next(state for state in self.model_states.values() if state.model is model)
            state.lplb = Layers(state)

    add_model.by_lplb = True  # type: ignore[attr-defined]
    return add_model


def _take_calls() -> None:
    """Where vLLM maps logical ids, lplb does it in layers that it knows: in the routers, and where modules have the function by name
    (DeepGEMM's MegaMoE)."""
    original = getattr(importlib.import_module(ROUTER), MAP)
    if hasattr(original, "by_lplb"):
        return
    ours = _mapping(original)
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and getattr(module, "__dict__", {}).get(MAP) is original:
            setattr(module, MAP, ours)


def _mapping(original: Any) -> Any:
    @functools.wraps(original)
    def map_and_record(topk_ids: torch.Tensor, expert_load_view: torch.Tensor, logical_to_physical_map: torch.Tensor,
                       logical_replica_count: torch.Tensor, record_enabled: torch.Tensor,
                       num_unpadded_tokens: torch.Tensor | None = None) -> torch.Tensor:
        layer: Layer | None = getattr(logical_to_physical_map, "lplb_layer", None)
        if layer is None:
            return original(topk_ids, expert_load_view, logical_to_physical_map,  # type: ignore[no-any-return]
                            logical_replica_count, record_enabled, num_unpadded_tokens)
        physical = layer.plan(topk_ids, num_unpadded_tokens)
        one_to_one, ones = layer.layers.identity
        return original(physical, expert_load_view, one_to_one, ones, record_enabled, num_unpadded_tokens)  # type: ignore[no-any-return]

    map_and_record.by_lplb = True  # type: ignore[attr-defined]
    return map_and_record


def _commit(original: Any) -> Any:
    @functools.wraps(original)
    def commit(model_state: Any, new_physical_to_logical_map: torch.Tensor, layer: int | None = None) -> None:
        if layer is None:
            original(model_state, new_physical_to_logical_map)
        else:
            original(model_state, new_physical_to_logical_map, layer)
        if hasattr(model_state, "lplb"):
            slots = new_physical_to_logical_map.cpu()
            model_state.lplb.follow(slots if layer is None else slots[None], 0 if layer is None else layer)

    return commit


class Layers:
    """The planned layers of one model."""

    def __init__(self, state: Any) -> None:
        import torch

        from vllm.distributed.parallel_state import get_ep_group
        from vllm.v1.worker.ubatching import dbo_current_ubatch_id  # type: ignore[import-not-found,unused-ignore]

        self.group, self.micro_batch = get_ep_group().device_group, dbo_current_ubatch_id
        self.slots: torch.Tensor = state.physical_to_logical_map.to("cpu", copy=True)
        device = self.device = state.physical_to_logical_map.device
        self.n_logical, n_slots = state.model.num_logical_experts, self.slots.shape[1]
        self.identity = torch.arange(n_slots, device=device)[:, None], torch.ones(n_slots, dtype=torch.int64, device=device)
        self.n_micro_batches = len(state.num_unpadded_tokens_tensors)
        self.layers = [Layer(self, index, runner) for index, runner in enumerate(state.model.moe_layers)]
        self.exchanges: list[Exchange] = []
        if any(layer.sends for layer in self.layers):  # made here, where all processes of the job are, and not by the first batch
            from ..exchange import create

            self.exchanges = [create(self.group, device, self.n_logical + 1, timeout=WAIT) for _ in range(self.n_micro_batches)]

    def follow(self, slots: torch.Tensor, first: int) -> None:
        """A new placement of some layers, from first on: on all ranks between the same two batches."""
        for layer, row in zip(self.layers[first:], slots):
            if not row.equal(self.slots[layer.index]):
                self.slots[layer.index] = row
                layer.follow(row)


def _sends(runner: Any) -> bool:
    """Whether ranks send tokens to each other in this layer; else all have the same ones, and must choose the same replica for each."""
    if hasattr(runner, "moe_config"):
        return bool(runner.moe_config.moe_parallel_config.use_all2all_kernels)
    if any(base.__name__.endswith("MegaMoEExperts") for base in type(runner).__mro__):  # their kernel sends
        return True
    raise Unsupported(f"{VARIABLE}: lplb does not know how layers of {type(runner).__qualname__} send their tokens. Take dispatch out of "
                      f"{VARIABLE}")


class Layer:
    def __init__(self, layers: Layers, index: int, runner: Any) -> None:
        self.layers, self.index, self.runner = layers, index, runner
        self.planners: list[Planner] = []  # one for each micro-batch, made by the first batch
        self.first: torch.Tensor
        self.sends = _sends(runner)
        runner.eplb_state.logical_to_physical_map.lplb_layer = self

    def make(self) -> None:
        """Collective. By the first batch, since it is not known before whether all tokens are gathered before they are routed."""
        import torch

        layers = self.layers
        same = not self.sends or getattr(self.runner, "do_naive_dispatch_combine", False)  # which CALLS has found in MoERunner
        exchanges: list[Exchange | None] = [None] * layers.n_micro_batches if same else [*layers.exchanges]
        self.planners = [planner_of(layers.slots[self.index], layers.n_logical, layers.group, layers.device, exchange)
                         for exchange in exchanges]
        # Each expert's first replica, for rows that are not planned.
        self.first = torch.as_tensor(self.planners[0].mapping()[1][:, 0]).clone()

    def follow(self, slots: torch.Tensor) -> None:
        import torch

        for planner in self.planners:
            self.first.copy_(torch.as_tensor(planner.update_placement(slots)[1][:, 0]))

    def plan(self, ids: torch.Tensor, n_tokens: torch.Tensor | None) -> torch.Tensor:
        """Physical ids of ids' type."""
        import torch

        if ids.dtype not in (torch.int32, torch.int64):
            return self.plan(ids.to(torch.int32), n_tokens).to(ids.dtype)
        if not self.planners:
            self.make()
        planner = self.planners[self.layers.micro_batch()]
        if self.sends or n_tokens is None:
            all_planned: torch.Tensor = planner.run(ids.contiguous(), None)
            return all_planned
        # Rows behind the batch's tokens hold whatever an earlier batch has left there, on each rank something else perhaps, and a plan that
        # counts them would not be the same everywhere.
        behind: torch.Tensor = torch.arange(len(ids), device=ids.device)[:, None] >= n_tokens
        planned: torch.Tensor = planner.run(ids.masked_fill(behind, -1), None)
        return torch.where(behind, self.first[ids], planned)
