"""One process of test_torchtitan.py: trains torchtitan's DeepSeek-V3 debug model on the CPU, with lplb's copies of experts and without.

Arguments: rank, processes, store file, output file. Writes what each run of RUNS measured.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
import torchtitan.tools.utils

torchtitan.tools.utils.device_type, torchtitan.tools.utils.device_module = "cpu", torch.cpu  # before other modules take the GPU's

from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torchtitan.config.override import apply_overrides  # noqa: E402
from torchtitan.distributed import ParallelDims, utils  # noqa: E402
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel  # noqa: E402

STEPS, MICRO_BATCHES, LENGTH = 2, 2, 32
RUNS = {  # ranks that share the experts (the rest of FSDP's ranks shard each of them), copies a rank, when they are chosen anew
    "plain": {"ep": 4}, "copies": {"ep": 4, "slots": 2, "replace_every": 3, "again": SelectiveAC},
    "sharded": {"ep": 2, "slots": 1, "again": FullAC},
}


def configuration(ep, slots=0, replace_every=0, again=None):
    config = deepseek_v3_debugmodel()
    config.parallelism.expert_parallel_degree = ep
    config.parallelism.spmd_backend = "partial_dtensor"  # gloo has no all_to_all of a list, which spmd_types takes
    config.training.seq_len, config.training.local_batch_size = LENGTH, 1
    config.training.mixed_precision_param = "float32"
    config.activation_checkpoint = again and again.Config()
    model = config.model_spec.model
    model.layers = model.layers[:2]  # a dense one, and one of experts
    for layer in model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()  # flex attention does not train on a CPU
    model.update_from_config(config=config)
    if slots:
        options = {"slots": slots, "replace_every": replace_every}
        config.override.imports.append(("lplb.integrations.torchtitan.replicas", options))
        apply_overrides(config.override, config)
    return config


def train(config, rank, processes):
    utils.set_spmd_backend(config.parallelism.spmd_backend)
    dims = ParallelDims.from_config(config.parallelism, processes)
    dims.build_mesh()
    with torch.device("meta"):
        model = config.model_spec.model.build()
    model = config.model_spec.parallelize_fn(
        model, parallel_dims=dims, training=config.training, parallelism=config.parallelism, compile_config=config.compile,
        ac_config=config.activation_checkpoint, dump_folder="")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
    optimizers = config.optimizer.build(model_parts=[model])
    config.model_spec.post_optimizer_build_fn(optimizers, [model], dims)
    losses, routed = [], model.layers["1"].moe.routed_experts
    for step in range(STEPS):
        optimizers.zero_grad()
        sums = torch.zeros(())
        for part in range(MICRO_BATCHES):
            generator = torch.Generator().manual_seed(1000 * step + 100 * part + rank)
            tokens = (2048 * torch.rand(1, LENGTH + 1, generator=generator) ** 3).long()
            logits = model(tokens[:, :-1]).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()) / (MICRO_BATCHES * processes)
            loss.backward()
            sums += loss.detach()
        if step == 0:
            weights = {name: parameter.grad.full_tensor() for name, parameter in routed.inner_experts.named_parameters()}
        optimizers.step()
        dist.all_reduce(sums)
        losses.append(sums.item())
    return model, losses, weights


def measure(rank, processes, options):
    model, losses, gradients = train(configuration(**options), rank, processes)
    dispatcher = model.layers["1"].moe.routed_experts.token_dispatcher
    seen = {"losses": losses, "state": sorted(name.replace("_checkpoint_wrapped_module.", "") for name in model.state_dict())}
    if "slots" in options:
        copies = dispatcher.copies
        info = copies.planner.info().groups[0]
        seen |= {"copies": copies.planner.phy2log.tolist(), "moved": info.moved, "version": copies.places.version}
    return seen, gradients


def main():
    rank, processes, store, output = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    seen, reference = {}, {}
    for name, options in RUNS.items():
        seen[name], gradients = measure(rank, processes, options)
        reference = reference or gradients
        seen[name]["gradients"] = max(float((gradients[key] - one).abs().max() / one.abs().max()) for key, one in reference.items())
    if rank == 0:
        with open(output, "w") as file:
            json.dump(seen, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
