"""Scenarios of moe_worker.py with a model around the experts, under DDP."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lplb.moe import MoELayer
from moe_reference import HIDDEN, K, WIDTH, Dense, batch, by_topology, far, n_experts, natural


class Block(nn.Module):
    """A router and the experts, as in a transformer block."""

    def __init__(self, experts, size):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.router = nn.LayerNorm(HIDDEN).double(), nn.Linear(HIDDEN, n_experts(size), bias=False).double()
        self.experts = experts

    def forward(self, hidden_states):
        states = self.norm(hidden_states)
        weights, ids = self.router(states).softmax(-1).topk(K)
        return hidden_states + self.experts(states, ids, weights)


def with_ddp(group):
    """DDP around a block reduces norm and router; experts are reduced, after push_grads(), over the ranks that hold the same ones: where
    there are four ranks, two expert-parallel groups of two."""
    world, rank = group.size(), dist.get_rank(group)
    pairs = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    same = [dist.new_group(list(range(first, world, 2))) for first in range(2)]
    ep, replicated = pairs[rank // 2], same[rank % 2]
    planner = by_topology(ep)
    block = Block(MoELayer(planner, HIDDEN, WIDTH, dtype=torch.float64), 2)
    names = [f"experts.{name}" for name, _ in block.experts.named_parameters()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(block, names)
    model = DistributedDataParallel(block, process_group=group)
    dense = Block(Dense(2), 2)
    for index in range(2):
        for peer in range(world):
            mine = batch(index, peer, 2)
            (dense(mine[0].detach()) * mine[3]).sum().backward()
            if peer == rank:
                with model.no_sync() if index == 0 else torch.enable_grad():
                    (model(mine[0].detach()) * mine[3]).sum().backward()
    experts = block.experts
    experts.replicas.push_grads()
    for parameter in experts.parameters():
        dist.all_reduce(parameter.grad, group=replicated)
    own = experts.replicas.own
    found = {name: far(getattr(experts, name).grad, getattr(dense.experts, name).grad[own]) for name in ("gate_up", "down")}
    found["router"] = far(block.router.weight.grad * world, dense.router.weight.grad)  # DDP takes means
    found["norm"] = far(block.norm.weight.grad * world, dense.norm.weight.grad)
    return found


class LanguageModel(nn.Module):
    """Embedding, the block, and a head over the vocabulary; predicts the next character."""

    def __init__(self, experts, size):
        super().__init__()
        self.block = Block(experts, size)  # which sets the seed
        self.embedding, self.head = nn.Embedding(64, HIDDEN).double(), nn.Linear(HIDDEN, 64).double()
        self.history = torch.zeros(n_experts(size))
        self.block.router.register_forward_hook(lambda _, __, scores: self.count(scores))

    def count(self, scores):
        self.history += torch.bincount(scores.topk(K).indices.flatten(), minlength=len(self.history))

    def forward(self, tokens):
        return self.head(self.block(self.embedding(tokens)))


def train_language_model(group, planner, steps, every, dtype=torch.float64, order=None):
    """Losses of the steps, over this file's own text. The experts are placed anew by the counts of all ranks, every so many steps. order: a
    seed of the order in which tokens are added up."""
    size, rank = group.size(), dist.get_rank(group)
    text = torch.tensor(list(open(__file__, "rb").read())) % 64
    layer = MoELayer(planner, HIDDEN, WIDTH, dtype=dtype)
    language_model = LanguageModel(layer, size).to(dtype)
    generator = None if order is None else torch.Generator().manual_seed(order)
    names = [f"block.experts.{name}" for name, _ in layer.named_parameters()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(language_model, names)
    model = DistributedDataParallel(language_model, process_group=group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for number in range(steps):
        if every and number and number % every == 0:
            dist.all_reduce(language_model.history, group=group)
            planner.update_redundancy_mapping(language_model.history)
            layer.replicas.update(optimizers=[optimizer])
            language_model.history.zero_()
        first = (number * size + rank) * 32 % (len(text) - 33)
        tokens = torch.arange(first, first + 32)
        if generator is not None:
            tokens = tokens[torch.randperm(32, generator=generator)]
        loss = F.cross_entropy(model(text[tokens]).float() if dtype is torch.bfloat16 else model(text[tokens]), text[tokens + 1])
        optimizer.zero_grad()
        loss.backward()
        layer.replicas.push_grads()
        for parameter in layer.parameters():
            parameter.grad /= size  # the mean over ranks, as DDP takes it
        optimizer.step()
        layer.replicas.pull()
        losses.append(loss.item())
    return losses


def language_model(group):
    """300 steps of a small language model, placed anew every 40, and without replicas."""
    plain = train_language_model(group, natural(group), 300, 0)
    losses = train_language_model(group, by_topology(group), 300, 40)
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:20]), "nothing was learnt"
    return {"losses": max(abs(one - other) for one, other in zip(plain, losses))}


def language_model_bfloat16(group):
    """300 steps in bfloat16: without replicas in three orders of summation, and with replicas that are placed anew every 40 steps. Losses
    are means of 20 steps; how far the run with replicas is from the nearest of the others, as a share of how far those are from each other."""
    def smooth(losses):
        return np.convolve(losses, np.ones(20) / 20, "valid")

    plain = [smooth(train_language_model(group, natural(group), 300, 0, torch.bfloat16, seed)) for seed in (1, 2, 3)]
    losses = smooth(train_language_model(group, by_topology(group), 300, 40, torch.bfloat16))
    assert losses[-1] < 0.8 * losses[0], "nothing was learnt"
    spread = max(np.abs(one - other).max() for one in plain for other in plain)
    return {"share": float(min(np.abs(losses - one).max() for one in plain) / spread), "spread_of_the_loss": float(spread / losses[0])}
