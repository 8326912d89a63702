"""For vllm_worker.py: lplb's policies of placement against vLLM's own."""

from __future__ import annotations

import torch
from vllm.distributed.eplb.policy import AbstractEplbPolicy, DefaultEplbPolicy

from lplb.integrations import vllm as adapter
from lplb.integrations._engine import Settings


def placements():
    """The policy against vLLM's own: the same placements where the policy is the same, and what the others are for."""
    generator, found = torch.Generator().manual_seed(0), []
    for layers, experts, slots, groups, nodes, ranks in (
            (2, 12, 16, 4, 2, 8), (3, 64, 80, 8, 2, 8), (2, 60, 64, 3, 2, 4), (58, 256, 288, 8, 4, 32)):
        load = torch.rand(layers, experts, generator=generator) ** 2 + 0.01  # no two alike
        arguments = (load, slots, groups, nodes, ranks)
        first = DefaultEplbPolicy.rebalance_experts(*arguments)
        drifted = (load.roll(1, 0) + load, *arguments[1:], first)
        theirs = DefaultEplbPolicy.rebalance_experts(*drifted)
        case = {"experts": experts, "slots": slots, "ranks": ranks, "vllm": even_load(drifted[0], theirs, ranks), "even": {}}
        for policy in ("deepseek", "balanced", "flow"):
            ours = adapter._policy(AbstractEplbPolicy, Settings(True, False, policy, None))
            assert issubclass(ours, AbstractEplbPolicy)
            placed = ours.rebalance_experts(*drifted)
            assert placed.dtype == theirs.dtype and placed.shape == theirs.shape and placed.device.type == "cpu"
            case["even"][policy] = even_load(drifted[0], placed, ranks)
            if policy == "deepseek":
                assert abs(case["even"][policy] - case["vllm"]) < 1e-4
                if experts < 100:  # of many, numpy's sort takes copies of an expert, which weigh the same, in no order of its own
                    assert ours.rebalance_experts(*arguments).equal(first) and placed.equal(theirs)
                continue
            blocks = placed.view(-1, slots // ranks).sort(1)[0]
            assert (blocks[:, 1:] != blocks[:, :-1]).all(), "no expert twice on a rank"
            budget = adapter._policy(AbstractEplbPolicy, Settings(True, False, policy, 5)).rebalance_experts(*drifted)
            before, after = (set_of_ranks(map_, ranks) for map_ in (first, budget))
            assert len(after - before) <= 5, "so many experts come new to a rank"
        found.append(case)
    return found


def even_load(loads, slots, ranks):
    """Mean over the layers of the heaviest rank's load by the mean, with an even split over replicas."""
    counts = torch.zeros_like(loads).scatter_add_(1, slots, torch.ones_like(slots, dtype=loads.dtype))
    per_rank = (loads / counts).gather(1, slots).view(len(loads), ranks, -1).sum(2)
    return float((per_rank.max(1).values / per_rank.mean(1)).mean())


def set_of_ranks(slots, ranks):
    width = slots.shape[1] // ranks
    return {(layer, index // width, expert) for layer, row in enumerate(slots.tolist()) for index, expert in enumerate(row)}
