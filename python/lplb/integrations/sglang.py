"""lplb in SGLang: where experts stand, and which replica each token goes to. Tried with sglang 0.5.23, which finds this plug-in by itself.

    LPLB_SGLANG=placement,dispatch sglang serve --model-path MODEL --tp 8 --ep 8 --enable-eplb \\
        --ep-num-redundant-experts 32 --ep-dispatch-algorithm lp

placement: `--eplb-algorithm auto` (the default), deepseek and deepseek_hierarchical become a policy of lplb.place: LPLB_SGLANG_POLICY, or
"flow" where lplb dispatches too, else "balanced" (both without two copies on one rank). Experts that stay on a rank keep their slots.
LPLB_SGLANG_MAX_MOVES: at most so many experts come new to a rank in one rebalance, over all layers.
dispatch: `--ep-dispatch-algorithm lp` is planned by lplb instead: exactly and for each token, without compiling kernels at the start, and
with `--moe-a2a-backend none` too, where all ranks hold the same tokens and make the same plan without exchanging anything. Rows behind the
batch's tokens are not counted. Ranks without tokens take part, in the models for which SGLang allows `lp`; without an all-to-all backend
any model is possible.

Rebalances set the new placement in the same planners, so captured graphs stay valid. Elastic EP and --enable-pdmux are refused. All ranks
must ask for the same. Without LPLB_SGLANG, or with another SGLang that this module does not fit, nothing is touched; in the second case the
log says so.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..errors import Unsupported
from ._engine import WAIT, Settings, fits, planner_of, same_everywhere, settings

if TYPE_CHECKING:
    import torch

    from ..exchange import Exchange

TRIED = "0.5.23"
VARIABLE = "LPLB_SGLANG"
ALGORITHMS = "sglang.srt.eplb.eplb_algorithms"
LOCATION = "sglang.srt.eplb.expert_location"
PROBABILITY = "sglang.srt.eplb.expert_location_dispatch._topk_ids_logical_to_physical_probability"
MANAGER = "sglang.srt.eplb.eplb_manager.EPLBManager.__init__"
SETUP = "sglang.srt.model_executor.model_runner_components.moe_ep_setup.init_lplb_solvers"
CHECK = "handle_eplb_and_dispatch"  # a step of SGLang's reading of its arguments
PLACEMENT = {
    f"{ALGORITHMS}:rebalance_experts":
        ("tokens_per_expert", "num_physical_experts", "num_local_physical_experts", "num_groups", "num_nodes", "algorithm"),
    f"{LOCATION}:get_global_expert_location_metadata": (),
    "sglang.srt.eplb.eplb_manager:EPLBManager": (),
    "sglang.srt.runtime_context:get_parallel": (),
}
DISPATCH = {
    PROBABILITY.replace("._topk", ":_topk"): ("topk_ids", "info", "log2phy_prob"),
    SETUP.replace(".init", ":init"): ("model_config",),
    "sglang.srt.arg_groups.resolution_hooks:register_resolution_hook": ("name",),
    "sglang.srt.arg_groups.overrides:resolving_view": (),
    f"{LOCATION}:get_global_expert_location_metadata": (),
    "sglang.srt.eplb.lplb_solver:assert_lplb_supported_model": ("architecture",),
    "sglang.srt.eplb.lplb_solver:get_global_lplb_solver": ("layer_id",),
    "sglang.srt.eplb.lplb_solver:set_global_lplb_solver": ("layer_id", "solver"),
    "sglang.srt.layers.moe.topk:_mask_topk_ids_padded_region": (),
    "sglang.srt.model_executor.forward_context:ForwardContext.moe_num_token_non_padded": (),
    "sglang.srt.runtime_context:get_exec": (),
    "sglang.srt.runtime_context:get_parallel": (),
}


def register() -> None:
    """SGLang's entry point: called once in each of its processes."""
    chosen = settings(VARIABLE)
    wanted = {**(PLACEMENT if chosen and chosen.placement else {}), **(DISPATCH if chosen and chosen.dispatch else {})}
    if chosen is None or not fits("sglang", TRIED, VARIABLE, wanted):
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # type: ignore[import-not-found,unused-ignore]

    if chosen.placement:
        HookRegistry.register(f"{ALGORITHMS}.rebalance_experts", _placement(chosen), HookType.AROUND)
        HookRegistry.register(MANAGER, _compare(chosen), HookType.AFTER)
    if chosen.dispatch:
        HookRegistry.register(SETUP, make_solvers, HookType.REPLACE)
        HookRegistry.register(PROBABILITY, _planned, HookType.REPLACE)
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook  # type: ignore[import-not-found,unused-ignore]

        register_resolution_hook(CHECK)(_checked)


def _placement(chosen: Settings) -> Any:
    def rebalance_experts(original: Any, tokens_per_expert: torch.Tensor, num_physical_experts: int, num_local_physical_experts: int,
                          num_groups: int | None, num_nodes: int, algorithm: Any) -> Any:
        """(phy2log, log2phy, logcnt) from tokens_per_expert [snapshots, layers, experts]."""
        if algorithm.name not in ("deepseek", "deepseek_hierarchical"):  # which somebody has chosen
            return original(tokens_per_expert, num_physical_experts, num_local_physical_experts, num_groups, num_nodes, algorithm)
        import torch

        from sglang.srt.eplb.expert_location import get_global_expert_location_metadata  # type: ignore[import-not-found,unused-ignore]

        from ..eplb import EplbPolicy, described

        weight = tokens_per_expert.sum(dim=0).float().cpu()
        metadata = get_global_expert_location_metadata()
        old = None if metadata is None else metadata.physical_to_logical_map_cpu
        if old is not None and old.shape != (weight.shape[0], num_physical_experts):
            old = None
        policy = "flow" if old is None and chosen.policy == "repair" else chosen.policy
        groups, nodes = (num_groups, num_nodes) if algorithm.name.endswith("hierarchical") else (1, 1)
        phy2log = EplbPolicy.rebalance_experts(
            weight, num_physical_experts, groups or 1, nodes, num_physical_experts // num_local_physical_experts, old, policy=policy,
            max_moves=None if old is None else chosen.max_moves)
        return tuple(map(torch.from_numpy, described(phy2log.numpy(), weight.shape[1])))

    return rebalance_experts


def _compare(chosen: Settings) -> Any:
    def compare(result: None, *arguments: Any, **named: Any) -> None:
        """After each rank's EPLB manager is made."""
        from sglang.srt.runtime_context import get_parallel  # type: ignore[import-not-found,unused-ignore]

        same_everywhere(VARIABLE, chosen, get_parallel().moe_ep_group.cpu_group)

    return compare


def _checked(server_args: Any, previous: Any) -> None:
    """SGLang's check of its arguments, which allows `lp` only where an all-to-all backend sends each token to one rank."""
    from sglang.srt.arg_groups.overrides import resolving_view  # type: ignore[import-not-found,unused-ignore]

    asked = resolving_view(server_args)
    if asked.ep_dispatch_algorithm == "lp":
        for option, used, why in (("--elastic-ep-backend", asked.elastic_ep_backend not in (None, "none"), "which changes the ranks"),
                                  ("--enable-pdmux", asked.enable_pdmux, "which plans on two streams at once")):
            if used:
                raise Unsupported(f"{VARIABLE}: lplb does not support {option}, {why}. Leave it out, or take dispatch out of {VARIABLE}")
    else:
        logging.getLogger("sglang.lplb").warning("%s: lplb does not dispatch without --ep-dispatch-algorithm lp", VARIABLE)
    try:
        previous(server_args)
    except ValueError as error:
        if "--ep-dispatch-algorithm lp" not in str(error):
            raise


def make_solvers(*, model_config: Any) -> None:
    """A Solver for each layer, or the new placement for those that there are. Collective."""
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
    from sglang.srt.eplb.lplb_solver import (  # type: ignore[import-not-found,unused-ignore]
        assert_lplb_supported_model, get_global_lplb_solver, set_global_lplb_solver)
    from sglang.srt.runtime_context import get_exec, get_parallel

    moe, group = get_exec().moe, get_parallel().moe_ep_group.device_group
    same = moe.moe_a2a_backend == "none"
    for architecture in getattr(model_config.hf_config, "architectures", None) or []:
        if not same:  # ranks without tokens must take part
            assert_lplb_supported_model(architecture)
        break
    metadata = get_global_expert_location_metadata()
    if metadata is None:
        return
    slots, device = metadata.physical_to_logical_map_cpu, metadata.physical_to_logical_map.device
    exchange: Exchange | None = None
    for layer in range(metadata.num_layers):
        solver = get_global_lplb_solver(layer)
        if isinstance(solver, Solver):
            solver.follow(slots[layer])
            continue
        if not same and exchange is None:
            from ..exchange import create

            exchange = create(group, device, metadata.num_logical_experts + 1, timeout=WAIT)
        set_global_lplb_solver(layer, Solver(slots[layer], metadata.num_logical_experts, group, device, exchange))


class Solver:
    """Stands where SGLang has one LPLBSolver for each layer. Where that one solves for probabilities, this one returns physical ids."""

    def __init__(self, slots: torch.Tensor, n_logical: int, group: Any, device: torch.device, exchange: Exchange | None) -> None:
        from sglang.srt.layers.moe.topk import _mask_topk_ids_padded_region  # type: ignore[import-not-found,unused-ignore]
        from sglang.srt.model_executor.forward_context import (  # type: ignore[import-not-found,unused-ignore]
            get_forward_context, has_forward_context)

        self.slots, self.exchange = slots.clone(), exchange
        self.planner = planner_of(slots, n_logical, group, device, exchange)
        self._mask, self._context, self._has_context = _mask_topk_ids_padded_region, get_forward_context, has_forward_context

    def follow(self, slots: torch.Tensor) -> None:
        if not slots.equal(self.slots):
            self.slots = slots.clone()
            self.planner.update_placement(slots)

    def solve(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """Physical ids for topk_ids [tokens, k]; on all ranks, with no tokens too."""
        ids = topk_ids.contiguous()
        bound = self._context().moe_num_token_non_padded if self._has_context() else None
        n_tokens = None if bound is None else bound()
        if n_tokens is not None:
            ids = ids.clone()
            self._mask(ids, n_tokens)
        return self.planner.run(ids, None)


def _planned(topk_ids: torch.Tensor, info: Any, log2phy_prob: torch.Tensor) -> torch.Tensor:
    """In place of drawing replicas by probabilities: log2phy_prob is what solve() returned for the same ids."""
    return log2phy_prob
