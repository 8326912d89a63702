"""A scenario of moe_worker.py: layers that are copied with copy.deepcopy, and saved and loaded as whole modules, train on like the first."""

from __future__ import annotations

import copy
import io

import torch
import torch.distributed as dist

import lplb
from lplb import Planner
from lplb.copies import Copies, natural_placement
from lplb.moe import MoELayer
from moe_reference import HIDDEN, WIDTH, batch, far, random_slots, step


def again(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Model(torch.nn.Module):
    """Two layers with homes that have moved, and a plain planner beside them."""

    def __init__(self, group):
        super().__init__()
        size = group.size()
        self.planner = Planner.from_placement(random_slots(5, size), n_logical=4 * size, group=group)
        self.layer = MoELayer(self.planner, HIDDEN, WIDTH, dtype=torch.float64, slack=3)
        self.planner.update_placement(random_slots(6, size))
        self.layer.replicas.update()
        slots = natural_placement(4 * size, size, 1)
        self.sharded = MoELayer(Planner.from_placement(slots, group=group), HIDDEN, WIDTH, dtype=torch.float64, sharded=True)

    def forward(self, *given):
        return self.layer(*given) + self.sharded(*given)


def copied_and_loaded(group):
    size, rank = group.size(), dist.get_rank(group)
    model = Model(group)
    mine = batch(3, rank, size)
    before = model(*mine[:3])
    wrong = []
    with lplb.loading_group(dist.new_group(list(range(size)))):
        named = again(model)
    for other in (copy.deepcopy(model), again(model), named):
        assert other.layer.replicas.planner is other.planner and other.planner is not model.planner
        assert other.layer._made[0] is other.layer.gate_up and other.sharded.copies.places is other.sharded.replicas
        wrong.append(0.0 if torch.equal(other(*mine[:3]), before) else 1.0)
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        step(other.layer, size, rank)  # with push_grads()
        other.sharded(*mine[:3]).square().sum().backward()
        optimizer.step()
        other.layer.replicas.pull()
        wrong.append(far(other(*mine[:3]), before))
    assert wrong[1] == wrong[3] == wrong[5] > 0, "three equal models have learned something else"
    assert torch.equal(model(*mine[:3]), before), "the first model has changed"
    assert isinstance(copy.deepcopy(model.sharded.copies), Copies)
    if size > 2:  # a planner of another number of ranks
        part = dist.new_group([0, 1])
        if rank < 2:
            with lplb.loading_group(part):
                try:
                    again(model.planner)
                except lplb.WrongOrder as error:
                    assert f"was made with a process group of {size} ranks, and the one here has 2: load it" in str(error), error
                else:
                    raise AssertionError("a group of another size was accepted")
    return {"different": wrong[0] + wrong[2] + wrong[4]}
