"""One process of test_moe.py: trains with replicas and measures its distance from a dense reference that one process could run.

Arguments: rank, processes, store file, output folder, and names of scenarios, of this file or hooks:name and models:name; none: all of
this file. Writes for each scenario what it measured, or the words of its failure.
"""

from __future__ import annotations

import copy
import io
import json
import pkgutil
import sys
import time
import traceback

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import lplb
from lplb import Planner
from lplb.moe import MoELayer, save_plans
from moe_models import language_model, with_ddp
from moe_saved import copied_and_loaded
from moe_reference import (
    HIDDEN, WIDTH, Dense, batch, by_topology, empty_slots, far, merge, n_experts, natural, raises, random_slots, ring_slots, step,
    turned_slots, uneven_slots)

torch.set_num_threads(1)


# ---- scenarios: each returns what it measured, with the bound in its name's table in test_moe.py ----


def gradients(group):
    """Accumulation over three micro-batches, empty experts, a rank without tokens, ids of -1; by a topology, by placements, and without."""
    size, rank = group.size(), dist.get_rank(group)
    planners = [by_topology(group), natural(group)]
    for seed in range(3 if size < 8 else 1):
        planners.append(Planner.from_placement(random_slots(seed, size), n_logical=n_experts(size), group=group))
    found = []
    for planner in planners:
        layer = MoELayer(planner, HIDDEN, WIDTH, dtype=torch.float64)
        found.append(step(layer, size, rank))
    assert lplb.homes(planners[0].phy2log, size).tolist() == planners[0].mapping()[1][:, 0].tolist(), "homes of a topology: the originals"
    assert {name for name, _ in layer.named_parameters()} == {"gate_up", "down"}
    assert len(layer.gate_up) == len(layer.replicas.own) < layer.replicas.n_rows
    twice = 2 * layer.down.grad
    layer.down.grad = twice.clone()  # as a user might who scales gradients
    layer.replicas.push_grads()
    assert torch.equal(layer.down.grad, twice) and torch.equal(layer.replicas.gradients("down")[: len(twice)], twice)
    return merge(*found)


def update_inside(group):
    """Other placements between the micro-batches of a step: gradients of evicted copies, and of homes that move, are not lost."""
    size, rank = group.size(), dist.get_rank(group)
    found = []
    steps = [[ring_slots(size, 1), turned_slots(size), ring_slots(size, size - 1)], [random_slots(seed, size) for seed in (5, 6, 7)],
             [ring_slots(size, 1), uneven_slots(size), turned_slots(size)]]
    for slots in steps if size < 8 else steps[:1]:
        planner = Planner.from_placement(slots[0], n_logical=n_experts(size), group=group)
        layer = MoELayer(planner, HIDDEN, WIDTH, dtype=torch.float64, slack=3)
        homes = []

        def between(index):
            if index:
                planner.update_placement(slots[index])
                layer.replicas.update()
            homes.append(layer.replicas.own.tolist())

        found.append(step(layer, size, rank, between))
        moved = [None] * size
        dist.all_gather_object(moved, homes[0] != homes[1], group=group)
        assert any(moved), "no home moved"
    return merge(*found)


def with_empty_slots(group):
    """Slots without an expert, a rank that holds none and gets some again, and parameters in other hands."""
    size, rank = group.size(), dist.get_rank(group)
    width = n_experts(size)
    slots = [random_slots(8, size, width + 1), empty_slots(9, size, width + 1), empty_slots(10, size, width + 1, dead=1),
             random_slots(11, size, width + 1)]
    found = []
    for order in ((0, 1, 3), (1, 2, 1), (2, 3, 2)):
        planner = Planner.from_placement(slots[order[0]], n_logical=n_experts(size), group=group)
        layer = MoELayer(planner, HIDDEN, WIDTH, dtype=torch.float64, slack=n_experts(size))

        def between(index):
            if index:
                planner.update_placement(slots[order[index]])
                layer.replicas.update()

        found.append(step(layer, size, rank, between))
    for one in slots[1:3]:
        planner = Planner.from_placement(one, n_logical=n_experts(size), group=group)
        found.append(step(MoELayer(planner, HIDDEN, WIDTH, dtype=torch.float64), size, rank))
        sharded, dense = MoELayer(planner, HIDDEN, WIDTH, dtype=torch.float64, sharded=True), Dense(size)
        for peer in range(size):
            mine = batch(7, peer, size)
            (dense(*mine[:3]) * mine[3]).sum().backward()
            if peer == rank:
                (sharded(*mine[:3]) * mine[3]).sum().backward()
        own = sharded.replicas.own
        found.append({name: far(getattr(sharded, name).grad[own >= 0], getattr(dense, name).grad[own[own >= 0]])
                      for name in ("gate_up", "down")})
    return merge(*[{key: one.get(key, 0.0) for key in found[0]} for one in found])


def old_ids(group):
    """Ids of an older placement, on one rank alone or while others have no tokens: every rank raises, and none waits for the others."""
    size, rank = group.size(), dist.get_rank(group)
    planner = Planner.from_placement(random_slots(1, size), n_logical=n_experts(size), group=group)
    layer = MoELayer(planner, HIDDEN, WIDTH, dtype=torch.float64, slack=n_experts(size))
    for tokens in (0, 20):
        mine = batch(1, rank, size, tokens=tokens if rank else 20)
        planner.update_placement(random_slots(1, size))
        layer.replicas.update()
        old = layer.plan(mine[1])
        planner.update_placement(random_slots(2, size))
        layer.replicas.update()
        new = layer.plan(mine[1])
        words = "received: must return numbers of rows" if rank else "physical: must be slots that hold the given experts"
        raises(lplb.InvalidArgument, words, lambda: layer(*mine[:3], physical=new if rank else old))
        assert layer(*mine[:3], physical=new).shape == mine[0].shape
    return {"raised": 0.0}


def main_gradients(group):
    """Gradients in another type than the weights, which move with the homes."""
    size, rank = group.size(), dist.get_rank(group)
    planner = Planner.from_placement(ring_slots(size, 1), group=group)
    layer = MoELayer(planner, HIDDEN, WIDTH, dtype=torch.float32, grad_dtype=torch.float64)
    dense = Dense(size, torch.float32)
    for index in range(2):
        for peer in range(size):
            mine = batch(index, peer, size, dtype=torch.float32)
            (dense(*mine[:3]) * mine[3]).sum().backward()
            if peer == rank:
                (layer(*mine[:3]) * mine[3]).sum().backward()
        if index == 0:
            layer.replicas.push_grads()
            planner.update_placement(turned_slots(size))
            layer.replicas.update()
    layer.replicas.push_grads()
    assert layer.gate_up.grad is None and layer.gate_up.main_grad.dtype is torch.float64
    own = layer.replicas.own
    found = {name: far(getattr(layer, name).main_grad.float(), getattr(dense, name).grad[own]) for name in ("gate_up", "down")}
    layer.replicas.zero_grad()
    assert not layer.gate_up.main_grad.any() and layer.gate_up.grad is None
    return found


def bfloat16(group):
    """bfloat16 weights and rows with float32 main gradients, relative to the largest gradient of the float64 reference."""
    size, rank = group.size(), dist.get_rank(group)
    ring = Planner.from_placement(ring_slots(size, 1), group=group)
    layer = MoELayer(ring, HIDDEN, WIDTH, dtype=torch.bfloat16, grad_dtype=torch.float32)
    dense = Dense(size, torch.bfloat16).double()
    for peer in range(size):
        mine = batch(5, peer, size, dtype=torch.bfloat16)
        (dense(*(one.double() if one.is_floating_point() else one for one in mine[:3])) * mine[3].double()).sum().backward()
        if peer == rank:
            output = layer(*mine[:3])
            assert output.dtype is torch.bfloat16
            (output * mine[3]).sum().backward()
    layer.replicas.push_grads()
    expected = {name: getattr(dense, name).grad[layer.replicas.own] for name in ("gate_up", "down")}
    return {name: far(getattr(layer, name).main_grad.double(), grad) / float(grad.abs().max()) for name, grad in expected.items()}


def few_experts(group):
    """Fewer experts than ranks: one rank owns none, and all its rows are copies."""
    size, rank = group.size(), dist.get_rank(group)
    experts = size - 1
    layer = MoELayer(Planner.from_placement(np.arange(2 * size) % experts, group=group), HIDDEN, WIDTH, dtype=torch.float64)
    optimizer, dense = torch.optim.AdamW(layer.parameters(), lr=1e-2), Dense(size)
    reference = torch.optim.AdamW(dense.parameters(), lr=1e-2, weight_decay=1e-2)
    for number in range(2):
        optimizer.zero_grad()
        reference.zero_grad()
        for peer in range(size):
            mine = batch(number, peer, size, only=np.arange(experts))
            (dense(*mine[:3]) * mine[3]).sum().backward()
            if peer == rank:
                (layer(*mine[:3]) * mine[3]).sum().backward()
        layer.replicas.push_grads()
        optimizer.step()
        reference.step()
        layer.replicas.pull()
    owns = [None] * size
    dist.all_gather_object(owns, len(layer.gate_up), group=group)
    assert sorted(owns) == [0] + [1] * experts, owns
    return {name: far(getattr(layer, name), getattr(dense, name)[layer.replicas.own]) for name in ("gate_up", "down")}


def experts_of(layer, group):
    """{expert: (gate_up, down)} of all ranks."""
    mine = {expert: (layer.gate_up[row].detach().clone(), layer.down[row].detach().clone())
            for row, expert in enumerate(layer.replicas.own.tolist()) if expert >= 0}
    everyone = [None] * group.size()
    dist.all_gather_object(everyone, mine, group=group)
    return {expert: tensors for rank in everyone for expert, tensors in rank.items()}


def train(group, planner, steps, placements=(), slack=0):
    """Optimizer steps of two micro-batches, with AdamW and registered master weights; other placements before some of the steps."""
    size, rank = group.size(), dist.get_rank(group)
    layer = MoELayer(planner, HIDDEN, WIDTH, dtype=torch.float64, slack=slack)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    master = layer.gate_up.detach().clone()
    layer.replicas.register("master", master)
    losses = []
    for number in range(steps):
        if number < len(placements):
            planner.update_placement(placements[number])
            layer.replicas.update(optimizers=[optimizer])
        optimizer.zero_grad(set_to_none=number % 2 == 0)
        for index in range(2):
            mine = batch(10 * number + index, rank, size, tokens=0 if rank == number % size and index else 25)
            loss = (layer(*mine[:3]) - mine[3]).square().sum()
            loss.backward()
            losses.append(loss.item())
        layer.replicas.push_grads()
        optimizer.step()
        with torch.no_grad():
            master.copy_(layer.gate_up)
        if number % 3 != 2:
            layer.replicas.pull()
        else:  # update() alone must notice that all copies are old
            layer.replicas.update(optimizers=[optimizer])
    assert torch.equal(master, layer.gate_up)
    return layer, losses


def train_dense(size, steps):
    """The same steps in one process."""
    dense = Dense(size)
    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-2)
    for number in range(steps):
        optimizer.zero_grad()
        for index in range(2):
            for rank in range(size):
                mine = batch(10 * number + index, rank, size, tokens=0 if rank == number % size and index else 25)
                (dense(*mine[:3]) - mine[3]).square().sum().backward()
        optimizer.step()
    return dense


def optimizer_steps(group):
    """Six steps with replicas, whose homes and optimizer state move between the steps, without replicas, and by the dense reference."""
    size = group.size()
    plain, plain_losses = train(group, natural(group), 6)
    dense = train_dense(size, 6)
    ring = Planner.from_placement(ring_slots(size, 1), group=group)
    moving = [ring_slots(size, 1), turned_slots(size), ring_slots(size, size - 1), turned_slots(size), random_slots(3, size)]
    found = {}
    for name, planner, placements in (("topology", by_topology(group), ()), ("moving", ring, moving)):
        layer, losses = train(group, planner, 6, placements, slack=3 if placements else 0)
        one, other = experts_of(plain, group), experts_of(layer, group)
        assert one.keys() == other.keys()
        found[name] = max(far(x, y) for expert in one for x, y in zip(one[expert], other[expert]))
        found[f"{name}_dense"] = max(far(gate_up, dense.gate_up[expert]) + far(down, dense.down[expert])
                                     for expert, (gate_up, down) in other.items())
        found[f"{name}_losses"] = max(abs(x - y) / (abs(x) + 1) for x, y in zip(plain_losses, losses))
    return found


def same_bits(group):
    """Two runs give the same bits, evictions included."""
    size, rank = group.size(), dist.get_rank(group)
    seen = []
    for _ in range(2):
        planner = Planner.from_placement(random_slots(5, size), n_logical=n_experts(size), group=group)
        layer = MoELayer(planner, HIDDEN, WIDTH, dtype=torch.float64, slack=3)

        def between(index):
            if index == 1:
                planner.update_placement(random_slots(6, size))
                layer.replicas.update()

        step(layer, size, rank, between)
        seen.append([layer.gate_up.grad.clone(), layer.down.grad.clone()])
    return {"different": 0.0 if all(torch.equal(one, other) for one, other in zip(*seen)) else 1.0}


def recomputation(group):
    """Activation checkpointing: with save_plans the plan is used again, and no counts travel in the backward pass."""
    size, rank = group.size(), dist.get_rank(group)
    planner = Planner.from_placement(ring_slots(size, 1), group=group)
    seen, calls = {}, []
    exchange = planner.exchange
    gather = exchange.all_gather
    exchange.all_gather = lambda row: (calls.append(1), gather(row))[1]
    for name, options in (("plain", None), ("again", {}), ("saved", {"context_fn": save_plans})):
        layer = MoELayer(planner, HIDDEN, WIDTH, dtype=torch.float64)
        calls.clear()
        for index in range(2):
            mine = batch(index, rank, size)
            output = layer(*mine[:3]) if options is None else checkpoint(layer, *mine[:3], use_reentrant=False, **options)
            (output * mine[3]).sum().backward()
        layer.replicas.push_grads()
        seen[name] = layer.gate_up.grad.clone(), mine[0].grad, len(calls)
    assert [seen[name][2] for name in ("plain", "again", "saved")] == [2, 4, 2], seen
    return {"different": max(far(one, other) for name in ("again", "saved") for one, other in zip(seen["plain"][:2], seen[name][:2]))}


def checkpoints(group):
    """Saved with replicas, loaded without, and back; a checkpoint has no room for copies."""
    size, rank = group.size(), dist.get_rank(group)
    ring = Planner.from_placement(ring_slots(size, 1), group=group)
    layer, _ = train(group, ring, 3, [ring_slots(size, 1), turned_slots(size)])
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    weights = layer.gate_up.numel() * 8 + layer.down.numel() * 8
    assert len(file.getvalue()) < weights + 4000 < 1.7 * weights, "the copies were saved, too"
    saved = [None] * size
    dist.all_gather_object(saved, file.getvalue(), group=group)
    parts = [torch.load(io.BytesIO(one)) for one in saved]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    wrong = []
    mine = batch(77, rank, size)
    for planner in (natural(group), by_topology(group)):
        other = MoELayer(planner, HIDDEN, WIDTH, dtype=torch.float64, seed=1)
        other.load_state_dict(whole)
        other.replicas.pull()
        wrong.append(far(layer(*mine[:3]), other(*mine[:3])))
    back = [None] * size
    dist.all_gather_object(back, other.state_dict(), group=group)
    fresh = MoELayer(ring, HIDDEN, WIDTH, dtype=torch.float64, seed=2)
    fresh.load_state_dict({name: torch.cat([part[name] for part in back]) for name in back[0]})
    fresh.replicas.pull()
    wrong.append(far(layer(*mine[:3]), fresh(*mine[:3])))
    try:
        other.load_state_dict(parts[(rank + 1) % size])
    except lplb.InvalidArgument as error:
        assert str(error).startswith(f"state_dict: must hold the experts of rank {rank}, got none of the experts ["), error
    else:
        raise AssertionError("a checkpoint of other experts was accepted")
    return {"different": max(wrong)}


def refusals(group):
    """What would go wrong silently or hang is refused in words, on all ranks."""
    size, rank = group.size(), dist.get_rank(group)
    planner = Planner.from_placement(ring_slots(size, 1), group=group)
    layer = MoELayer(planner, HIDDEN, WIDTH, dtype=torch.float64)
    replicas, mine = layer.replicas, batch(1, rank, size)
    with torch.no_grad():
        layer.down.mul_(1.5)
    raises(lplb.WrongOrder, "pull() must be called after own experts' weights have changed, and down has changed", lambda: layer(*mine[:3]))
    replicas.pull()
    output = layer(*mine[:3]).sum()
    planner.update_placement(turned_slots(size))
    raises(lplb.WrongOrder, "update() must be called after the planner's placement has changed", lambda: layer(*mine[:3]))
    replicas.update()
    raises(lplb.WrongOrder, "update() must not be called between a forward pass and its backward pass", output.backward)
    replicas.zero_grad()

    before = copy.deepcopy(replicas.own)
    planner.update_placement(uneven_slots(size))
    raises(lplb.InvalidArgument, "placement: must leave rank 0 with at most 4 own experts and 3 copies, since its parameters were made for "
           "them (slack=0), got 7 own experts and 0 copies", replicas.update)
    assert torch.equal(before, replicas.own)
    raises(lplb.WrongOrder, "update() must be called after the planner's placement has changed", lambda: layer(*mine[:3]))
    planner.update_placement(turned_slots(size))
    replicas.update()
    assert torch.equal(before, replicas.own)
    layer(*mine[:3])

    raises(lplb.Disagreement, "all ranks must make the same call, but rank 1 calls push_grads() in version 2",
           replicas.push_grads if rank == 1 else replicas.pull)
    raises(lplb.Disagreement, "all ranks must make the same call", lambda: replicas.update(optimizers=[]) if rank else replicas.pull())
    raises(lplb.InvalidArgument, "name: must be one of gate_up, down, got up", lambda: replicas.weights("up"))
    raises(lplb.InvalidArgument, "name: must not be that of another parameter, got down",
           lambda: replicas.parameter("down" if rank == 1 else "other", (3,)))
    raises(lplb.InvalidArgument, "tensor: must be contiguous on cpu, with a row for each of the 4 own rows, got shape [3, 2]",
           lambda: replicas.register("moments", torch.zeros(3, 2)))
    raises(lplb.InvalidArgument, "hidden_states: must be [tokens, 12], got shape [30, 11]", lambda: layer(mine[0][:, 1:], *mine[1:3]))
    raises(lplb.InvalidArgument, "router_weights: must be [30 tokens, k], as expert_ids, got shape [30, 2]",
           lambda: layer(*mine[:2], mine[2][:, 1:]))
    raises(lplb.InvalidArgument, "physical: must be [30 tokens, k], as expert_ids, got shape [29, 3]",
           lambda: layer(*mine[:3], mine[1][1:]))
    if rank == 0:
        layer.down.data = layer.down.data.clone()
    raises(lplb.InvalidArgument, "parameter: must keep its memory", replicas.pull)
    same = Planner.from_placement(ring_slots(size, 1), group=group, tokens="same")
    raises(lplb.InvalidArgument, "planner: must have a group whose ranks have tokens of their own, or ep_size=1, got Planner(",
           lambda: lplb.Replicas(same))
    raises(lplb.InvalidArgument, "slack: must be at least 0, got -1", lambda: lplb.Replicas(planner, slack=-1 if rank == 1 else 0))
    fresh = lplb.Replicas(planner)
    planner.close()
    raises(lplb.WrongOrder, "replicas: the planner is closed, or its process group is destroyed", fresh.pull)
    return {}


SCENARIOS = [gradients, with_empty_slots, old_ids, update_inside, main_gradients, bfloat16, few_experts, optimizer_steps, same_bits,
             recomputation, checkpoints, with_ddp, language_model, copied_and_loaded, refusals]


def main():
    rank, processes, store, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    scenarios = [pkgutil.resolve_name(f"moe_{name}" if ":" in name else f"{__name__}:{name}") for name in sys.argv[5:]] or SCENARIOS
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    seen = {}
    for scenario in scenarios:
        began = time.monotonic()
        try:
            measured = scenario(dist.group.WORLD)
        except Exception:  # the other ranks may wait for this one now: say what happened and end
            seen[scenario.__name__] = {"failure": traceback.format_exc()}
            break
        seen[scenario.__name__] = {"measured": measured, "seconds": time.monotonic() - began}
        dist.barrier()
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(seen, file)
    if all("measured" in one for one in seen.values()):
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
