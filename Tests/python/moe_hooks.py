"""Scenarios of moe_worker.py: the layer where others shard, reduce or compile."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lplb
from lplb import Planner
from lplb.copies import Copies, natural_placement
from lplb.moe import MoELayer
from moe_models import Block
from moe_reference import HIDDEN, WIDTH, Dense, batch, by_topology, far, n_experts, natural, raises, ring_slots


def reference(world, size, rate=0.1, steps=2):
    """Two steps of SGD by the dense block, with all ranks' tokens, of two micro-batches each; its gradients at the first."""
    dense = Block(Dense(size), size)
    optimizer = torch.optim.SGD(dense.parameters(), rate)
    for step in range(steps):
        optimizer.zero_grad()
        for index in range(2):
            for peer in range(world):
                mine = batch(10 * step + index, peer, size)
                (dense(mine[0].detach()) * mine[3]).sum().backward()
        optimizer.step()
    return dense


def train(model, world, size, rank, after_backward=lambda: None, after_step=lambda: None, rate=0.1, steps=2, alone=nullcontext):
    """alone: a context in which the first of two backward passes reduces nothing."""
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for step in range(steps):
        optimizer.zero_grad()
        for index in range(2):
            mine = batch(10 * step + index, rank, size)
            with alone() if index == 0 else nullcontext():
                (model(mine[0].detach()) * mine[3]).sum().backward()
        after_backward()
        optimizer.step()
        after_step()


def distances(block, dense, own):
    def whole(one):
        return one.full_tensor() if hasattr(one, "full_tensor") else one

    return {"gate_up": far(whole(block.experts.gate_up), dense.experts.gate_up[own]),
            "down": far(whole(block.experts.down), dense.experts.down[own]),
            "router": far(whole(block.router.weight), dense.router.weight), "norm": far(whole(block.norm.weight), dense.norm.weight)}


def groups_of_two(rank, world):
    """This rank's expert-parallel group, and the group of ranks that hold the same experts."""
    pairs = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    same = [dist.new_group(list(range(first, world, 2))) for first in range(2)]
    return pairs[rank // 2], same[rank % 2]


class Sum(DistributedDataParallel):
    """DDP that adds up where it would take the mean."""

    def __init__(self, module, group):
        super().__init__(module, process_group=group)
        self.register_comm_hook(group, lambda group, bucket: dist.all_reduce(bucket.buffer(), group=group, async_op=True).get_future().then(
            lambda done: done.value()[0]))


def ddp_over_experts(group):
    """DDP over the dense parameters of all ranks, and another one over the experts of the ranks that hold the same: no order to keep."""
    world, rank = group.size(), dist.get_rank(group)
    ep, replicated = groups_of_two(rank, world)
    planner = by_topology(ep)
    layer = MoELayer(planner, HIDDEN, WIDTH, dtype=torch.float64, sharded=True)
    block = Block(layer, 2)
    names = [f"experts.module.{name}" for name, _ in layer.named_parameters()]
    block.experts = Sum(layer, replicated)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(block, names)
    model = Sum(block, group)
    experts = block.experts

    @contextmanager
    def alone():
        with model.no_sync(), experts.no_sync():
            yield

    train(model, world, 2, rank, alone=alone)
    block.experts = layer
    return distances(block, reference(world, 2), layer.replicas.own)


def fsdp_around_experts(group):
    """fully_shard over the dense parameters without the experts, whose gradients are reduced by hand between push_grads() and step."""
    world, rank = group.size(), dist.get_rank(group)
    ep, replicated = groups_of_two(rank, world)
    layer = MoELayer(by_topology(ep), HIDDEN, WIDTH, dtype=torch.float64)
    block = Block(layer, 2)
    fully_shard(block, mesh=init_device_mesh("cpu", (world,)), ignored_params=set(layer.parameters()))
    block.set_gradient_divide_factor(1.0)
    block.set_force_sum_reduction_for_comms(True)

    def after_backward():
        layer.replicas.push_grads()
        for parameter in layer.parameters():
            dist.all_reduce(parameter.grad, group=replicated)

    train(block, world, 2, rank, after_backward, layer.replicas.pull)
    return distances(block, reference(world, 2), layer.replicas.own)


def fsdp_over_experts(group):
    """fully_shard over the experts, too, on a second dimension of the mesh: each expert's rows lie on the ranks that share it, are gathered
    for forward and backward, and their gradients are reduced behind those of the copies. Copies are chosen anew between the steps."""
    world, rank = group.size(), dist.get_rank(group)
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("shared", "ep"))
    planner = Planner.from_placement(natural_placement(n_experts(2), 2, 1), group=mesh["ep"].get_group())
    layer = MoELayer(planner, HIDDEN, WIDTH, dtype=torch.float64, sharded=True)
    block = Block(layer, 2)
    own = layer.replicas.own.clone()
    fully_shard(layer, mesh=mesh["shared"])
    fully_shard(block, mesh=init_device_mesh("cpu", (world,)))
    for module in (layer, block):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    assert layer.gate_up.to_local().numel() * world // 2 == layer.gate_up.numel()

    def other_copies():
        planner.update_placement(natural_placement(n_experts(2), 2, 1, torch.arange(n_experts(2)) % 3))
        layer.copies.update()

    train(block, world, 2, rank, after_step=other_copies)
    assert layer.replicas.version == 2 and torch.equal(own, layer.replicas.own)
    found = distances(block, reference(world, 2), own)
    state = {name: one.clone() for name, one in block.state_dict().items()}
    block.load_state_dict(state)
    assert distances(block, reference(world, 2), own) == found
    raises(lplb.InvalidArgument, f"state_dict: must hold the experts {own.tolist()} in this order where they are sharded", lambda:
           block.load_state_dict({**state, "experts._extra_state": own.flip(0)}))
    return found


def compiled(group):
    """torch.compile of a model that contains the layer; it breaks the graph there."""
    size, rank = group.size(), dist.get_rank(group)
    found = {}
    for sharded in (False, True):
        planner = natural(group) if sharded else by_topology(group)
        block = Block(MoELayer(planner, HIDDEN, WIDTH, dtype=torch.float64, sharded=sharded), size)
        layer = block.experts
        train(torch.compile(block, backend="aot_eager"), size, size, rank, lambda: reduced(block, layer, group), layer.replicas.pull)
        found |= {f"{key}_{sharded}": value for key, value in distances(block, reference(size, size), layer.replicas.own).items()}
    return found


def reduced(block, layer, group):
    layer.replicas.push_grads()
    for parameter in (*block.router.parameters(), *block.norm.parameters()):
        dist.all_reduce(parameter.grad, group=group)


class FakeBuffer:
    """deep_ep.Buffer as its documentation describes it, by torch.distributed: each token goes to a rank once."""

    def __init__(self, group):
        self.group, self.group_size, self.rank = group, group.size(), dist.get_rank(group)

    def get_dispatch_layout(self, topk_idx, num_experts):
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
        ranks = torch.where(topk_idx < 0, self.group_size, topk_idx // (num_experts // self.group_size))
        to_rank = torch.zeros(len(topk_idx), self.group_size + 1, dtype=torch.bool).scatter_(1, ranks, True)[:, :-1]
        return to_rank.sum(0), None, per_expert, to_rank, None

    def exchange(self, rows, sent, received):
        out = rows.new_empty((sum(received), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=self.group)
        return out

    def dispatch(self, x, handle=None, topk_idx=None, topk_weights=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None,
                 is_token_in_rank=None, num_tokens_per_expert=None):
        if handle is not None:
            order, sent, received, _ = handle
            return self.exchange(x[order], sent, received), None, None, None, None, None
        order, sent = is_token_in_rank.t().nonzero()[:, 1], num_tokens_per_rank.tolist()
        arriving = torch.empty_like(num_tokens_per_rank)
        dist.all_to_all_single(arriving, num_tokens_per_rank, group=self.group)
        received, local = arriving.tolist(), len(num_tokens_per_expert) // self.group_size
        ids, weights = (self.exchange(one[order], sent, received) for one in (topk_idx, topk_weights))
        elsewhere = (ids < 0) | (ids // local != self.rank)
        ids, weights = torch.where(elsewhere, -1, ids % local), torch.where(elsewhere, 0, weights)
        counts = torch.bincount(ids[ids >= 0], minlength=local).tolist()
        return self.exchange(x[order], sent, received), ids, weights, counts, (order, sent, received, len(x)), None

    def combine(self, x, handle, topk_weights=None):
        order, sent, received, tokens = handle
        sums = [None if one is None else torch.zeros(tokens, one.shape[1]).index_add_(0, order, self.exchange(one, received, sent).float())
                for one in (x, topk_weights)]
        return sums[0].to(x.dtype), sums[1], None


def deep_ep(group):
    """Dispatch by a Buffer against dispatch by all_to_all_single, in bfloat16: relative to the largest value of each."""
    size, rank = group.size(), dist.get_rank(group)
    seen = []
    for dispatch in ("torch", FakeBuffer(group)):
        planner = Planner.from_placement(ring_slots(size, 1), group=group)
        layer = MoELayer(planner, HIDDEN, WIDTH, dtype=torch.bfloat16, grad_dtype=torch.float32, dispatch=dispatch)
        states, ids, weights, scale = batch(3, rank, size, tokens=0 if rank == 1 else 33, dtype=torch.bfloat16)
        output = layer(states, ids, weights)
        (output * scale).sum().backward()
        layer.replicas.push_grads()
        seen.append((output.detach(), states.grad, weights.grad, layer.gate_up.main_grad, layer.down.main_grad))
    return {name: far(one.float(), other.float()) / max(float(one.abs().max()) if one.numel() else 0.0, 1e-3)
            for name, one, other in zip(("output", "inputs", "router", "gate_up", "down"), *seen)}


def refused(group):
    """What cannot be right says what to do."""
    size, rank = group.size(), dist.get_rank(group)
    mine = batch(1, rank, size)
    layer = MoELayer(by_topology(group), HIDDEN, WIDTH, dtype=torch.float64)
    fully_shard(layer, mesh=init_device_mesh("cpu", (size,)))
    raises(lplb.WrongOrder, "MoELayer: the parameters were replaced, as FSDP2's fully_shard does: make the layer with sharded=True, "
           "or leave them out with fully_shard(..., ignored_params=set(layer.parameters()))", lambda: layer(*mine[:3]))
    raises(lplb.InvalidArgument, "sharded: must be False where homes move (slack) or gradients have another type (grad_dtype), got True",
           lambda: MoELayer(by_topology(group), HIDDEN, WIDTH, dtype=torch.bfloat16, grad_dtype=torch.float32, sharded=True))
    raises(lplb.InvalidArgument, 'dispatch: must be "torch", or a deep_ep.Buffer of the planner\'s group, got str without get_dispatch',
           lambda: MoELayer(by_topology(group), HIDDEN, WIDTH, dispatch="deep_ep"))
    planner = Planner.from_placement(natural_placement(n_experts(size), size, 2), group=group)
    copies = Copies(planner)
    own = torch.ones(copies.n_own, 3, dtype=torch.float64, requires_grad=True)
    raises(lplb.InvalidArgument, "own: must have a row for each of the 4 own experts, got shape [3, 3]", lambda: copies(own[1:]))
    (through,), (behind,) = copies(own)
    planner.update_placement(natural_placement(n_experts(size), size, 2, torch.arange(n_experts(size))))
    raises(lplb.WrongOrder, "update() must be called after the planner's placement has changed", lambda: copies(own))
    copies.update()
    raises(lplb.WrongOrder, "copies: update() must not be called between a forward pass and its backward pass",
           (through.sum() + behind.sum()).backward)
    slots = torch.as_tensor(planner.phy2log).view(size, -1).roll(1, 0).flatten()
    planner.update_placement(slots)
    raises(lplb.InvalidArgument, "placement: must leave every expert's home where it is, as natural_placement() does", copies.update)
    raises(lplb.InvalidArgument, "slots: must be at most 3, got 4", lambda: natural_placement(n_experts(4), 4, 4))
    return {}


def endless(group):
    """Trains until a rank is killed from outside."""
    size, rank = group.size(), dist.get_rank(group)
    layer = MoELayer(by_topology(group), HIDDEN, WIDTH, dtype=torch.float64)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-4)
    for step in range(10**9):
        mine = batch(step, rank, size)
        (layer(*mine[:3]) * mine[3]).sum().backward()
        layer.replicas.push_grads()
        optimizer.step()
        optimizer.zero_grad()
        layer.replicas.pull()
        if step == 3 and rank == 0:
            Path(f"{sys.argv[3]}.going").touch()
