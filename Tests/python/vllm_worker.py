"""One process of test_vllm.py: vLLM's own EPLB, routers and load recording with lplb inside, on the CPU.

Arguments: rank, processes, store file, output file. LPLB_VLLM is set. What cannot be on a CPU is a stand-in here: the model around the
routers, CUDA's events, and the GPU under vLLM's Triton kernel, which Triton's interpreter runs.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
import threading
import time
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402

import lplb  # noqa: E402
from lplb.integrations import vllm as adapter  # noqa: E402
from lplb.integrations._engine import Settings  # noqa: E402

LAYERS, EXPERTS, SPARE, TOP_K, TOKENS = 2, 16, 8, 2, 40
ROUTER = "vllm.model_executor.layers.fused_moe.router.base_router"


class AsOnGpu(importlib.abc.MetaPathFinder):
    """Lets vLLM define its mapping kernel, which it does on GPUs alone."""

    def find_spec(self, name, path, target=None):
        if name != ROUTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            import vllm.distributed.eplb.eplb_state  # noqa: F401
            from vllm.platforms import current_platform

            kind = type(current_platform)
            before, kind.is_cuda_alike = kind.is_cuda_alike, lambda self: True
            execute(module)
            kind.is_cuda_alike = before

        spec.loader.exec_module = exec_module
        return spec


atomic = InterpreterBuilder.create_atomic_rmw


def atomic_with_mask(self, operation, pointer, value, mask, *rest):
    mask.data = mask.data.astype(bool)  # the interpreter refuses a mask of int1
    return atomic(self, operation, pointer, value, mask, *rest)


class Event:
    """torch.Event where there is no accelerator."""

    def __init__(self, **options):
        pass

    def record(self, *stream):
        pass

    wait = synchronize = record

    def elapsed_time(self, other):
        return 0.0


sys.meta_path.insert(0, AsOnGpu())
InterpreterBuilder.create_atomic_rmw = atomic_with_mask
torch.Event = Event
torch.accelerator.current_stream = Event
torch.accelerator.set_stream = lambda stream: None

from vllm.utils import torch_utils  # noqa: E402

torch_utils.PIN_MEMORY = False  # needs a driver

from vllm.config.parallel import EPLBConfig  # noqa: E402
from vllm.distributed import parallel_state  # noqa: E402
from vllm.distributed.eplb import async_worker, eplb_state  # noqa: E402
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig  # noqa: E402
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter  # noqa: E402
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner  # noqa: E402
from vllm.model_executor.models.interfaces import MixtureOfExperts  # noqa: E402
from vllm.plugins import load_general_plugins  # noqa: E402
from vllm.v1.worker import ubatching  # noqa: E402
from vllm_placements import placements  # noqa: E402


class Runner:
    """An MoE layer: vLLM's router, the questions its runner is asked, and weights that tell which expert they are of."""

    eplb_state, set_eplb_state = MoERunner.eplb_state, MoERunner.set_eplb_state
    do_naive_dispatch_combine = MoERunner.do_naive_dispatch_combine

    def __init__(self, index, ranks, rank, dp, gathered):
        self.router = CustomRoutingRouter(TOP_K, EXPERTS + SPARE, self.route, eplb_state.EplbLayerState())
        parallel = FusedMoEParallelConfig(tp_size=1, pcp_size=1, dp_size=ranks if dp else 1, ep_size=ranks, tp_rank=0, pcp_rank=0,
                                          dp_rank=rank if dp else 0, ep_rank=rank, sp_size=1, use_ep=True,
                                          all2all_backend="allgather_reducescatter", enable_eplb=True)
        self.moe_config = SimpleNamespace(moe_parallel_config=parallel, dp_size=parallel.dp_size, is_sequence_parallel=False)
        self._quant_method = SimpleNamespace(supports_internal_mk=not gathered)
        slots = torch.arange(EXPERTS + SPARE) % EXPERTS
        self.weights = 100.0 * index + slots.view(ranks, -1)[rank, :, None].repeat(1, 3)

    @staticmethod
    def route(hidden_states, gating_output, topk, renormalize):
        return torch.topk(gating_output, topk)

    def get_expert_weights(self):
        return [self.weights]


class Model(MixtureOfExperts):
    num_moe_layers, num_expert_groups, num_shared_experts = LAYERS, 1, 0
    num_logical_experts = num_routed_experts = EXPERTS
    num_redundant_experts, num_physical_experts = SPARE, EXPERTS + SPARE

    def __init__(self, ranks, rank, **kind):
        self.num_local_physical_experts = self.num_physical_experts // ranks
        self.moe_layers = [Runner(index, ranks, rank, **kind) for index in range(LAYERS)]


def engine(ranks, rank, use_async=False, micro_batches=0, elastic=False, **kind):
    """(vLLM's state, its model's state, the model)"""
    config = EPLBConfig(window_size=4, step_interval=4, num_redundant_experts=SPARE, use_async=use_async, communicator="torch_gloo")
    parallel = SimpleNamespace(eplb_config=config, enable_elastic_ep=elastic, num_ubatches=micro_batches, data_parallel_size=ranks,
                               elastic_ep_max_dp_size=ranks)
    state, model = eplb_state.EplbState(parallel, torch.device("cpu")), Model(ranks, rank, **kind)
    state.add_model(model, SimpleNamespace(model="model", compute_hash=lambda: "model"))
    state.expert_rearrangement_step = 0
    return state, state.model_states["model"], model


def logits(seed, layer, tokens=TOKENS):
    generator = torch.Generator().manual_seed(1000 * seed + layer)
    taste = torch.linspace(0, 3, EXPERTS).roll(5 * layer + seed // 100)
    return torch.randn(tokens, EXPERTS, generator=generator) + taste


def routed(model, layer, scores):
    """What the layer's router hands to the experts: physical ids."""
    return model.moe_layers[layer].router.select_experts(torch.zeros(len(scores), 4), scores)[1]


def everyone(tensor):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


def gather(tensor):
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, tensor)
    return parts


def exact(slots, ids, ranks):
    """The certified optimum of the busiest rank's load for the ids of all ranks, by a planner of its own."""
    with lplb.Planner.from_placement(slots.int(), n_logical=EXPERTS, ep_size=ranks, device="cpu") as planner:
        planner.run(ids.long(), None)
        group = planner.info().groups[0]
        assert group.certified
        return group.max_load


def busiest(physical, ranks):
    width = (EXPERTS + SPARE) // ranks
    return int(torch.bincount(physical.flatten().long() // width, minlength=ranks).max())


def check_own(model, state, ranks, rank, seed):
    """Every rank has tokens of its own: loads, replicas and what was recorded, in each layer."""
    found = []
    for layer in range(LAYERS):
        slots, scores = state.physical_to_logical_map[layer].clone(), logits(seed + rank, layer)
        state.expert_load_pass.zero_()
        state.num_unpadded_tokens_tensors[0].fill_(TOKENS - 3)
        wanted = torch.topk(scores, TOP_K)[1]
        physical = routed(model, layer, scores)
        assert slots[physical].equal(wanted), "a replica of the expert that was chosen"
        recorded = torch.bincount(physical[: TOKENS - 3].flatten(), minlength=EXPERTS + SPARE)
        assert state.expert_load_pass[layer].equal(recorded.int()), "vLLM's record of the tokens that are no padding"
        here, all_ids = busiest(everyone(physical), ranks), everyone(wanted)
        assert here == exact(slots, all_ids.flatten(0, 1), ranks), "as even as can be"
        found.append(here)
    return found


def check_weights(model, state, rank):
    for layer, runner in enumerate(model.moe_layers):
        slots = state.physical_to_logical_map[layer].view(-1, model.num_local_physical_experts)[rank]
        assert runner.weights[:, 0].equal(100.0 * layer + slots.float()), "weights of the experts that the map names"


def steps(state, model, ranks, rank, seed, number):
    """Batches between two rebalances."""
    for step in range(number):
        for tensor in state.model_states["model"].num_unpadded_tokens_tensors:
            tensor.fill_(TOKENS)
        for layer in range(LAYERS):
            routed(model, layer, logits(seed + ranks * step + rank, layer))
        state.step()


def synchronous(ranks, rank):
    state, of_model, model = engine(ranks, rank, dp=True, gathered=False)
    seen = {"before": check_own(model, of_model, ranks, rank, 0)}
    planners = [layer.planners[0] for layer in of_model.lplb.layers]
    initial = of_model.physical_to_logical_map.clone()
    steps(state, model, ranks, rank, 100, 4)
    seen["changed"] = int((of_model.physical_to_logical_map != initial).sum())
    check_weights(model, of_model, rank)
    seen["after"] = check_own(model, of_model, ranks, rank, 200)
    blocks = of_model.physical_to_logical_map.view(-1, model.num_local_physical_experts).sort(1)[0]
    assert (blocks[:, 1:] != blocks[:, :-1]).all(), "no expert twice on a rank"
    assert [layer.planners[0] for layer in of_model.lplb.layers] == planners, "the same planners"
    scores = logits(rank, 0, TOKENS if rank else 0)  # rank 0 has no tokens
    physical, wanted = gather(routed(model, 0, scores)), gather(torch.topk(scores, TOP_K)[1])
    assert busiest(torch.cat(physical), ranks) == exact(of_model.physical_to_logical_map[0], torch.cat(wanted), ranks)
    return seen


def asynchronous(ranks, rank):
    """vLLM's worker thread moves the weights of one layer at a time, and layers get their new placements one by one."""
    state, of_model, model = engine(ranks, rank, use_async=True, dp=True, gathered=False)
    worker = threading.Thread(target=async_worker.transfer_run_periodically, args=(state, Event()), daemon=True)
    worker.start()
    steps(state, model, ranks, rank, 100, 4)
    old, changed = of_model.physical_to_logical_map.clone(), 0
    for batch in range(2000):
        before = of_model.physical_to_logical_map.clone()
        state.expert_rearrangement_step = 0
        state.step()
        layers = [layer for layer in range(LAYERS) if not of_model.physical_to_logical_map[layer].equal(before[layer])]
        assert len(layers) <= 1
        if layers:
            changed += 1
            check_own(model, of_model, ranks, rank, 300 + changed)
            check_weights(model, of_model, rank)
        if not of_model.rebalanced:
            break
        time.sleep(0.005)
    assert not of_model.rebalanced and changed == LAYERS
    return int((of_model.physical_to_logical_map != old).sum())


def overlapped(ranks, rank):
    """Two micro-batches in two threads, of which one runs at a time."""
    state, of_model, model = engine(ranks, rank, micro_batches=2, dp=True, gathered=False)
    for tensor in of_model.num_unpadded_tokens_tensors:
        tensor.fill_(TOKENS)
    turns, physical, errors = [threading.Semaphore(1), threading.Semaphore(0)], [[], []], []

    def micro_batch(number):
        ubatching._THREAD_ID_TO_CONTEXT[threading.get_ident()] = number
        try:
            for layer in range(LAYERS):
                turns[number].acquire()
                physical[number].append(routed(model, layer, logits(500 + 10 * number + rank, layer)))
                turns[1 - number].release()
        except BaseException as error:
            errors.append(error)
            turns[1 - number].release()

    threads = [threading.Thread(target=micro_batch, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ubatching._THREAD_ID_TO_CONTEXT.clear()
    assert not errors, errors
    layers = of_model.lplb
    assert len({id(exchange) for exchange in layers.exchanges}) == 2 and all(len(layer.planners) == 2 for layer in layers.layers)
    for layer in range(LAYERS):
        for number in range(2):
            ids = everyone(torch.topk(logits(500 + 10 * number + rank, layer), TOP_K)[1]).flatten(0, 1)
            assert busiest(everyone(physical[number][layer]), ranks) == exact(of_model.physical_to_logical_map[layer], ids, ranks)
    return [type(layers.exchanges[0]).__name__, layers.layers[0].planners[0].tokens]


def replicated(ranks, rank, gathered):
    """All ranks hold the same tokens: all must choose the same replica for each."""
    state, of_model, model = engine(ranks, rank, dp=gathered, gathered=gathered)
    real = TOKENS if gathered else TOKENS - 5
    of_model.num_unpadded_tokens_tensors[0].fill_(real)
    for seed in (0, 100):
        for layer in range(LAYERS):
            slots, scores = of_model.physical_to_logical_map[layer].clone(), logits(seed, layer)
            if not gathered:
                scores[real:] = logits(7 + rank, layer)[real:]  # what an earlier batch has left there
            wanted, physical = torch.topk(scores, TOP_K)[1], routed(model, layer, scores)
            assert slots[physical].equal(wanted), "also behind the batch's tokens"
            for other in everyone(physical[:real]):
                assert other.equal(physical[:real])
            assert busiest(physical[:real], ranks) == exact(slots, wanted[:real], ranks)
        if seed == 0:
            steps_of_same(state, model, real)
    return of_model.lplb.layers[0].planners[0].tokens


def steps_of_same(state, model, real):
    for step in range(4):
        for layer in range(LAYERS):
            routed(model, layer, logits(100 + step, layer))
        state.step()


def mega_moe(ranks, rank):
    """The second place that maps ids: DeepGEMM's MegaMoE, up to where its kernel would begin."""
    from vllm.model_executor.layers.fused_moe import deep_gemm_mega_moe
    from vllm.utils import deep_gemm

    _, of_model, model = engine(ranks, rank, dp=True, gathered=False)
    of_model.num_unpadded_tokens_tensors[0].fill_(TOKENS)
    seen = {}

    def stop(*arguments, **named):
        seen["ids"] = arguments[2]
        raise InterruptedError

    deep_gemm._import_deep_gemm, deep_gemm_mega_moe.prepare_megamoe_inputs = lambda: None, stop
    buffer = SimpleNamespace(x=torch.zeros(TOKENS, 1), x_sf=None, topk_idx=torch.zeros(TOKENS), topk_weights=torch.zeros(TOKENS))
    layer = SimpleNamespace(
        has_fused_shared_experts=False, max_num_tokens=TOKENS, _synchronize_first_launch=lambda: None, capture_fn=None, shared_spec=None,
        eplb_state=model.moe_layers[0].router.eplb_state, get_symm_buffer=lambda: buffer, _kernel_kwargs={},
        weight_format=SimpleNamespace(uses_nvfp4_api=False, hidden_quant=None))
    ids = torch.topk(logits(rank, 0), TOP_K)[1].int()
    try:
        deep_gemm_mega_moe.DeepGemmMegaMoEExperts.forward(layer, torch.zeros(TOKENS, 4), torch.ones(TOKENS, TOP_K), ids)
    except InterruptedError:
        pass
    slots = of_model.physical_to_logical_map[0]
    assert slots[seen["ids"].long()].equal(ids.long()) and seen["ids"].dtype == torch.int32
    assert busiest(everyone(seen["ids"]), ranks) == exact(slots, everyone(ids).flatten(0, 1), ranks)
    assert adapter._sends(object.__new__(deep_gemm_mega_moe.DeepGemmMegaMoEExperts))
    try:
        adapter._sends(SimpleNamespace(router=None))
    except lplb.Unsupported as error:
        return str(error)


def differing(ranks, rank):
    """Rank 1 has been started with another budget."""
    wrapped = adapter._add_model(lambda *arguments: None, Settings(True, True, "flow", 5 if rank == 1 else None))
    try:
        wrapped(SimpleNamespace(parallel_config=SimpleNamespace(enable_elastic_ep=False)), None)
    except lplb.Disagreement as error:
        return str(error)


def refused(ranks, rank):
    try:
        engine(ranks, rank, elastic=True, dp=True, gathered=False)
    except lplb.Unsupported as error:
        return str(error)


def main():
    rank, ranks, store, output = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    group = SimpleNamespace(device_group=dist.group.WORLD, cpu_group=dist.group.WORLD, world_size=ranks, rank_in_group=rank,
                            device_communicator=None)
    beside = dist.new_group(backend="gloo")  # what vLLM's worker thread talks over
    parallel_state._EP, parallel_state._EPLB = group, SimpleNamespace(**{**vars(group), "device_group": beside, "cpu_group": beside})
    parallel_state._NODE_COUNT = 1
    load_general_plugins()
    seen = {"synchronous": synchronous(ranks, rank), "asynchronous": asynchronous(ranks, rank), "overlapped": overlapped(ranks, rank),
            "replicated": replicated(ranks, rank, gathered=False), "gathered": replicated(ranks, rank, gathered=True),
            "elastic": refused(ranks, rank), "unknown": mega_moe(ranks, rank), "differing": differing(ranks, rank),
            "placements": placements() if not rank else None}
    if rank == 0:
        with open(output, "w") as file:
            json.dump(seen, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
