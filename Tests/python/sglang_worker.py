"""One process of test_sglang.py: SGLang's own routing, EPLB manager and movement of weights with lplb inside, on the CPU.

Arguments: rank, processes, store file, output file. LPLB_SGLANG is set. What cannot be on a CPU is a stand-in here: the model, what the
recorder has counted, and the answer to the question whether there is a GPU, where SGLang asks it in order to take the path of `lp`.
"""

from __future__ import annotations

import json
import logging
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist

import lplb

LAYERS, EXPERTS, SPARE, TOP_K, TOKENS = 3, 16, 8, 2, 40

torch.get_device_module = lambda *device: SimpleNamespace(empty_cache=lambda: None, synchronize=lambda: None, current_device=lambda: "cpu")

from sglang.srt import model_loader, runtime_context  # noqa: E402
from sglang.srt.arg_groups.parallel_hook import handle_eplb_and_dispatch  # noqa: E402
from sglang.srt.arg_groups.resolution_hooks import run_hook  # noqa: E402
from sglang.srt.environ import envs  # noqa: E402
from sglang.srt.eplb import eplb_manager, expert_location, lplb_solver  # noqa: E402
from sglang.srt.eplb.eplb_algorithms import EplbAlgorithm, rebalance_experts  # noqa: E402
from sglang.srt.eplb.expert_location_updater import ExpertLocationUpdater  # noqa: E402
from sglang.srt.layers.moe import topk  # noqa: E402
from sglang.srt.layers.moe.hash_topk import HashTopK  # noqa: E402
from sglang.srt.model_executor import forward_context  # noqa: E402
from sglang.srt.model_executor.model_runner_components import moe_ep_setup  # noqa: E402
from sglang.srt.plugins import load_plugins  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402

CONFIG = SimpleNamespace(hf_config=SimpleNamespace(architectures=["DeepseekV3ForCausalLM"]))
ANOTHER = SimpleNamespace(hf_config=SimpleNamespace(architectures=["Qwen3MoeForCausalLM"]))


class Architecture:
    @staticmethod
    def get_model_config_for_expert_location(config):
        return expert_location.ModelConfigForExpertLocation(num_layers=LAYERS, num_logical_experts=EXPERTS)


def start(ranks, rank, backend):
    """What SGLang's start leaves behind."""
    runtime_context.reset_context()
    args = ServerArgs(model_path="none", tp_size=ranks, ep_size=ranks, ep_num_redundant_experts=SPARE, ep_dispatch_algorithm="lp",
                      enable_eplb=True, moe_a2a_backend=backend, device="cpu", eplb_rebalance_num_iterations=2,
                      eplb_rebalance_layers_per_chunk=2, expert_distribution_recorder_buffer_size=2)
    runtime_context.publish(args, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=rank))
    group = SimpleNamespace(device_group=dist.group.WORLD, cpu_group=dist.group.WORLD, world_size=ranks, rank_in_group=rank)
    runtime_context.get_parallel().override_permanently(moe_ep_group=group)
    expert_location.set_global_expert_location_metadata(expert_location.ExpertLocationMetadata.init_trivial(CONFIG, rank))
    moe_ep_setup.init_lplb_solvers(model_config=CONFIG)


def placement():
    return expert_location.get_global_expert_location_metadata().physical_to_logical_map


def logits(seed, layer, tokens=TOKENS):
    generator = torch.Generator().manual_seed(1000 * seed + layer)
    return torch.randn(tokens, EXPERTS, generator=generator) + torch.linspace(0, 3, EXPERTS).roll(5 * layer + seed // 100)


def routed(layer, scores, real=None):
    """What SGLang's router hands to the experts: physical ids [tokens, k], -1 behind the batch's tokens."""
    bound = None if real is None else torch.tensor(real)
    with forward_context.forward_context(forward_context.ForwardContext(None, lambda: bound)):
        n_tokens, info = topk.resolve_routing_inputs(layer_id=layer, is_draft=False)
        config = topk.TopKConfig(top_k=TOP_K, torch_native=True, layer_id=layer)
        return topk.select_experts(torch.zeros(len(scores), 4), scores, config, layer_id=layer, num_token_non_padded=n_tokens,
                                   expert_location_dispatch_info=info).topk_ids


def chosen(scores, real=None):
    ids = torch.topk(scores.softmax(-1), TOP_K)[1]
    if real is not None:
        ids[real:] = -1
    return ids


def gather(tensor):
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, tensor)
    return torch.cat(parts)


def exact(slots, ids, ranks):
    """The certified optimum of the busiest rank's load for the ids of all ranks, by a planner of its own."""
    with lplb.Planner.from_placement(slots.int(), n_logical=EXPERTS, ep_size=ranks, device="cpu") as planner:
        planner.run(ids, None)
        group = planner.info().groups[0]
        assert group.certified
        return group.max_load


def busiest(physical, ranks):
    physical = physical[physical >= 0]
    return int(torch.bincount(physical // ((EXPERTS + SPARE) // ranks), minlength=ranks).max())


def check(ranks, layer, physical, wanted, everyone=True):
    slots, sent = placement()[layer], wanted >= 0
    assert (physical[~sent] == -1).all()
    assert slots[physical[sent].long()].equal(wanted[sent].long()), "a replica of the expert that was chosen"
    physical, wanted = (gather(physical), gather(wanted)) if everyone else (physical, wanted)
    load = busiest(physical, ranks)
    assert load == exact(slots, wanted, ranks), "as even as can be"
    return load


def check_all(ranks, rank, seed):
    loads = []
    for layer in range(LAYERS):
        scores = logits(seed + rank, layer)
        loads.append(check(ranks, layer, routed(layer, scores), chosen(scores)))
        loads.append(check(ranks, layer, routed(layer, scores, TOKENS - 3), chosen(scores, TOKENS - 3)))
    return loads


def check_idle_and_hashed(ranks, rank):
    """Rank 0 has no tokens, and says so as SGLang's models do; the others take the second place that maps ids."""
    with envs.SGLANG_OPT_USE_FUSED_HASH_TOPK.override(False):
        module = HashTopK(TOP_K, EXPERTS, vocab_size=50, layer_id=1)
        with torch.no_grad():
            module.tid2eid.copy_(torch.topk(logits(5, 1, 50), TOP_K)[1])
        tokens = (torch.arange(TOKENS) * (rank + 3)) % 50 if rank else torch.zeros(0, dtype=torch.long)
        if rank:
            ids = module(torch.zeros(TOKENS, 4), torch.zeros(TOKENS, EXPERTS), tokens).topk_ids
        else:
            ids = module.empty_topk_output(torch.device("cpu")).topk_ids
    check(ranks, 1, ids, module.tid2eid[tokens])


def rebalance(ranks, rank):
    """SGLang's manager moves the weights of some layers at a time, and the planners follow."""
    slots = placement().clone()
    width = slots.shape[1] // ranks
    weights = {layer: [100.0 * layer + slots[layer].view(ranks, width)[rank, :, None].float().repeat(1, 3)] for layer in range(LAYERS)}
    counts = torch.stack([torch.bincount(chosen(logits(100, layer, 400)).flatten(), minlength=EXPERTS) for layer in range(LAYERS)])
    recorder = SimpleNamespace(recording=True, dump_record=lambda output_mode: {
        "logical_count": counts[None].repeat(2, 1, 1), "average_utilization_rate_over_window": None})
    eplb_manager.get_global_expert_distribution_recorder = lambda: recorder
    updater, model = ExpertLocationUpdater(), SimpleNamespace(routed_experts_weights_of_layer=weights)
    manager = eplb_manager.EPLBManager(
        model_config=CONFIG, get_model=lambda: model, get_expert_location_updater=lambda: updater,
        get_expert_backup_client=lambda: None, get_weight_updater=lambda: SimpleNamespace(update_weights_from_disk=None))
    solvers = [lplb_solver.get_global_lplb_solver(layer) for layer in range(LAYERS)]
    planners = [solver.planner for solver in solvers]
    for batch in range(5):
        manager.on_forward_pass_end()
        if batch == 3:
            assert not placement()[0].equal(slots[0]) and placement()[2].equal(slots[2]), "layers one after the other"
            check_all(ranks, rank, 150)
    assert [lplb_solver.get_global_lplb_solver(layer).planner for layer in range(LAYERS)] == planners, "the same planners"
    for layer in range(LAYERS):
        own = placement()[layer].view(ranks, width)
        assert weights[layer][0][:, 0].equal(100.0 * layer + own[rank].float()), "weights of the experts that the map names"
        assert all(len(set(block)) == width for block in own.tolist()), "no expert twice on a rank"
    return int((placement() != slots).sum())


def same_tokens(ranks, rank):
    """Without an all-to-all backend, where SGLang's own `lp` is refused."""
    for seed in (0, 100):
        for layer in range(LAYERS):
            scores = logits(seed, layer)
            scores[TOKENS - 4:] = logits(7 + rank, layer)[TOKENS - 4:]  # what an earlier batch has left there
            physical = routed(layer, scores, TOKENS - 4)
            for other in gather(physical).view(ranks, TOKENS, TOP_K):
                assert other.equal(physical)
            check(ranks, layer, physical, chosen(scores, TOKENS - 4), everyone=False)
        if not seed:
            changed = rebalance_of_same(ranks)
    return [changed, lplb_solver.get_global_lplb_solver(0).planner.tokens]


def rebalance_of_same(ranks):
    old = placement().clone()
    counts = torch.stack([torch.bincount(chosen(logits(100, layer, 400)).flatten(), minlength=EXPERTS) for layer in range(LAYERS)])
    expert_location.get_global_expert_location_metadata().update(
        expert_location.ExpertLocationMetadata.init_by_eplb(CONFIG, counts), list(range(LAYERS)))
    moe_ep_setup.init_lplb_solvers(model_config=ANOTHER)  # a model whose ranks without tokens do not take part
    return int((placement() != old).sum())


def said(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def arguments(**options):
    """What SGLang's check of its arguments says."""
    options = {"moe_a2a_backend": "none", "ep_dispatch_algorithm": "lp", **options}
    return said(run_hook, handle_eplb_and_dispatch, ServerArgs(model_path="none", device="cpu", ep_size=4, tp_size=4, **options))


def main():
    rank, ranks, store, output = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    load_plugins()
    topk._is_cuda = True
    model_loader.get_model_architecture = lambda config: (Architecture, "")
    start(ranks, rank, "deepep")
    seen = {"before": check_all(ranks, rank, 0)}
    check_idle_and_hashed(ranks, rank)
    seen |= {"changed": rebalance(ranks, rank), "after": check_all(ranks, rank, 200),
             "another model": said(moe_ep_setup.init_lplb_solvers, model_config=ANOTHER)}
    start(ranks, rank, "none")
    seen["none"] = same_tokens(ranks, rank)
    counts, sizes = torch.rand(2, LAYERS, EXPERTS), (EXPERTS + SPARE, (EXPERTS + SPARE) // ranks, 1, 1)
    seen["hierarchical"] = len(rebalance_experts(counts, *sizes, EplbAlgorithm.deepseek_hierarchical))
    seen["arguments"] = {"none": arguments(), "static": arguments(ep_dispatch_algorithm="static"),
                         "elastic": arguments(elastic_ep_backend="nixl"), "pdmux": arguments(enable_pdmux=True)}
    if rank == 0:
        with open(output, "w") as file:
            json.dump(seen, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
