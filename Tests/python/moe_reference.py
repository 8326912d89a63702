"""What moe_worker.py trains and compares: placements, micro-batches, and the dense reference that one process could run."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from lplb import Planner, topology

HIDDEN, WIDTH, K = 12, 10, 3


def n_experts(size):
    return 4 * size


def by_topology(group):
    size = group.size()
    r2o = {2: torch.tensor([[1], [0]]), 4: topology.SQUARE_4P2E, 8: topology.CUBE_8P2E}[size]
    return Planner(r2o, n_experts(size) + r2o.shape[1] * size, n_experts(size), group=group)


def natural(group):
    """Without replicas."""
    return Planner.from_placement(np.arange(n_experts(group.size())), group=group)


def random_slots(seed, size, n_local=7):
    """Many replicas, some twice on a rank, in no order."""
    rng = np.random.default_rng([seed, size])
    experts, slots = n_experts(size), n_local * size
    return rng.permutation(np.concatenate([np.arange(experts), rng.choice(experts, slots - experts)])).astype(np.int32)


def ring_slots(size, shift):
    """Four own experts a rank, then copies of the next ranks' first three."""
    own = np.arange(n_experts(size)).reshape(size, 4)
    return np.concatenate([own, np.roll(own[:, :3], -shift, axis=0)], axis=1).reshape(-1)


def turned_slots(size):
    """The ring with its first two experts of each rank turned to the next rank, so that these homes must move."""
    own = np.arange(n_experts(size)).reshape(size, 4).copy()
    own[:, :2] = np.roll(own[:, :2], 1, axis=0)
    return np.concatenate([own[:, ::-1], np.roll(own[:, 1:], 1, axis=0)], axis=1).reshape(-1)


def empty_slots(seed, size, n_local=7, dead=None):
    """Random slots, about half of the copies' ones empty; on a rank that is dead all are, and the others are as many as the experts need."""
    rng = np.random.default_rng([seed, size, 1])
    experts = n_experts(size)
    live = [rank for rank in range(size) if rank != dead]
    width = max(n_local, -(-experts // len(live)) + 1)
    held = np.full(len(live) * width, -1)
    held[:experts] = np.arange(experts)
    held[experts:] = np.where(rng.random(held.size - experts) < 0.5, rng.integers(0, experts, held.size - experts), -1)
    slots = np.full((size, width), -1)
    slots[live] = rng.permutation(held).reshape(len(live), width)
    return slots.reshape(-1).astype(np.int32)


def uneven_slots(size):
    """Seven experts that stand on the first rank alone; the last rank holds one expert."""
    return np.minimum(np.arange(7 * size), n_experts(size) - 1)


def batch(seed, rank, size, tokens=30, only=None, dtype=torch.float64):
    """hidden states, ids, router weights, and what the output is multiplied with for a loss."""
    rng = np.random.default_rng([seed, rank])
    ids = np.array([rng.permutation(n_experts(size))[:K] for _ in range(tokens)], dtype=np.int64).reshape(tokens, K)
    if only is not None:
        ids = only[ids % len(only)]
    ids = np.where(rng.random((tokens, K)) < 0.1, -1, ids)  # no expert
    floats = [torch.from_numpy(rng.standard_normal(shape)).to(dtype) for shape in ((tokens, HIDDEN), (tokens, K), (tokens, HIDDEN))]
    return floats[0].requires_grad_(), torch.from_numpy(ids), floats[1].requires_grad_(), floats[2]


def batches(size, rank):
    """Micro-batches of a step: all experts; few experts, and a rank without tokens; skewed."""
    return [batch(1, rank, size), batch(2, rank, size, tokens=0 if rank == 1 else 17, only=np.array([0, 1, 2, 5])),
            batch(3, rank, size, tokens=max(1, 41 - 9 * rank), only=np.array([3, 3, 3, 4, 6, 7]))]


class Dense(nn.Module):
    """All experts in one process, with the first weights of a MoELayer."""

    def __init__(self, size, dtype=torch.float64, seed=0):
        super().__init__()
        generators = [torch.Generator().manual_seed(seed * 65537 + expert) for expert in range(n_experts(size))]
        self.gate_up, self.down = (
            nn.Parameter(torch.stack([(torch.randn(shape, generator=one) * shape[1] ** -0.5).to(dtype) for one in generators]))
            for shape in ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)))

    def forward(self, hidden_states, ids, weights):
        output = torch.zeros_like(hidden_states)
        for expert in range(len(self.gate_up)):
            token, choice = torch.nonzero(ids == expert, as_tuple=True)
            gate, up = (hidden_states[token] @ self.gate_up[expert].T).chunk(2, -1)
            output = output.index_add(0, token, (F.silu(gate) * up @ self.down[expert].T) * weights[token, choice, None])
        return output


def far(one, other):
    return float((one.detach() - other.detach()).abs().max()) if one.numel() else 0.0


def step(layer, size, rank, between=lambda index: None):
    """A step of three micro-batches by the layer and by the dense reference. Returns the largest distances."""
    dense, wrong = Dense(size), {"output": 0.0, "inputs": 0.0, "router": 0.0}
    for index in range(3):
        between(index)
        for peer in range(size):
            mine = batches(size, peer)[index]
            reference = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in mine]
            expected = dense(*reference[:3])
            (expected * reference[3]).sum().backward()
            if peer == rank:
                output = layer(*mine[:3])
                (output * mine[3]).sum().backward()
                for name, one, other in (("output", output, expected), ("inputs", mine[0].grad, reference[0].grad),
                                         ("router", mine[2].grad, reference[2].grad)):
                    wrong[name] = max(wrong[name], far(one, other))
    layer.replicas.push_grads()
    own = layer.replicas.own
    used = own >= 0
    for name in ("gate_up", "down"):
        grad = getattr(layer, name).grad
        wrong[name] = far(grad[used], getattr(dense, name).grad[own[used]])
        assert not grad[~used].any() and not layer.replicas.gradients(name)[len(own):].any()
    return wrong


def merge(*found):
    return {key: max(one[key] for one in found) for key in found[0]}


def raises(kind, words, call):
    try:
        call()
    except kind as error:
        assert words in str(error), f"{error} lacks {words!r}"
    else:
        raise AssertionError(f"nobody refused: {words}")
