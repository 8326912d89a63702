"""Planner.layout() against what torch's sort and an exchange of all counts give, with every rank of a group in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lplb
from lplb import Planner

torch = pytest.importorskip("torch")


def reference(physical, row_of_slot, n_rows, n_local):
    """Of all ranks' physical ids: order, sent [ranks, rows], received, by_row and ends of each rank, by torch alone."""
    ranks, sides = len(physical), []
    for ids in physical:
        flat = ids.reshape(-1).long()
        place = flat // n_local * n_rows + row_of_slot[flat.clamp(min=0)]
        place = torch.where(flat < 0, ranks * n_rows, place)
        sides.append((place.argsort(stable=True), torch.bincount(place, minlength=ranks * n_rows + 1)[:-1].view(ranks, n_rows)))
    found = []
    for rank, (order, to) in enumerate(sides):
        come = torch.stack([sent[rank] for _, sent in sides])
        row = torch.arange(n_rows).repeat(ranks).repeat_interleave(come.flatten())
        found.append((order, to, come, row.argsort(stable=True), come.sum(0).cumsum(0).int()))
    return found


def check(layout, expected):
    order, to, come, by_row, ends = expected
    splits = layout.wait()
    assert splits == (to.sum(1).tolist(), come.sum(1).tolist(), come.sum(0).tolist())
    for name, one, other in (("order", layout.order, order), ("sent", layout.sent_rows, to), ("received", layout.received_rows, come),
                             ("by_row", layout.by_row, by_row), ("ends", layout.ends, ends)):
        assert torch.equal(torch.as_tensor(one).long(), other.long()), name


def counts_of(ids, n_logical):
    valid = ids[(ids >= 0) & (ids < n_logical)]
    return torch.bincount(valid.long(), minlength=n_logical)


def random_case(seed):
    """A generator, what makes the planner of a rank (of a topology or a placement), experts, and every rank's ids."""
    random = np.random.default_rng(seed)
    groups, group_size = int(random.choice([1, 1, 2])), int(random.choice([1, 2, 3, 4, 8]))
    ranks = groups * group_size
    nodes = int(random.choice([one for one in range(1, ranks + 1) if ranks % one == 0]))
    per_rank, spare = int(random.integers(1, 6)), int(random.integers(0, 4))
    if random.random() < 0.3:
        columns, of_each = int(random.integers(1, 3)), int(random.integers(1, 3))
        r2o = np.stack([random.permutation(group_size) for _ in range(columns)], axis=1)
        per_rank = columns * of_each + int(random.integers(0, 3))
        n_logical, n_physical = ranks * per_rank, ranks * (per_rank + columns * of_each)

        def make(rank, device="cpu"):
            planner = Planner(torch.tensor(r2o), n_physical, n_logical, ranks, device=device, n_nodes=nodes, rank=rank)
            planner.update_redundancy_mapping(torch.arange(n_logical) % 7)
            return planner
    else:
        experts, slots = group_size * per_rank, group_size * (per_rank + spare)
        n_logical = groups * experts
        phy2log = np.concatenate([
            group * experts + random.permutation(np.concatenate([np.arange(experts), random.integers(0, experts, slots - experts)]))
            for group in range(groups)])

        def make(rank, device="cpu"):
            return Planner.from_placement(torch.tensor(phy2log), ep_size=ranks, n_logical=n_logical, group_size=group_size, device=device,
                                          n_nodes=nodes, rank=rank)

    dtype, k = random.choice([torch.int32, torch.int64]), int(random.integers(1, 5))
    hot, ids = 1 + int(random.integers(0, n_logical)), []
    for rank in range(ranks):
        tokens = int(random.choice([0, 1, 7, 60, 900]))
        low = int(random.choice([-1, 0]))
        chosen = random.integers(low, hot if random.random() < 0.7 else n_logical, (tokens, k))
        if random.random() < 0.1:
            chosen[:] = -1
        ids.append(torch.tensor(chosen, dtype=dtype).reshape(tokens, k))
    return random, make, n_logical, ids


@pytest.mark.parametrize("seed", range(60))
def test_every_rank_knows_what_it_receives(seed):
    random, make, n_logical, ids = random_case(seed)
    planners = [make(rank) for rank in range(len(ids))]
    n_local, n_physical = planners[0].n_local_routed_experts, planners[0].n_routed_experts
    counts = torch.stack([counts_of(one, n_logical) for one in ids])
    physical = []
    for planner, mine in zip(planners, ids):
        planner.solve(counts)
        physical.append(planner.redirect(mine))
    slots = torch.arange(n_physical) % n_local
    more = n_local + int(random.integers(0, 4))
    other = torch.tensor(np.concatenate([random.permutation(more)[:n_local] for _ in ids]), dtype=random.choice([torch.int32, torch.int64]))
    merged = torch.tensor(random.integers(0, n_local, n_physical))
    for rows, table in ((n_local, None), (more, other), (n_local, merged)):
        expected = reference(physical, (slots if table is None else table).long(), rows, n_local)
        for rank, planner in enumerate(planners):
            options = {} if table is None else {"row_of_slot": table, "n_rows": rows}
            layout = planner.layout(physical[rank], experts=ids[rank], **options)
            check(layout, expected[rank])
            theirs = expected[rank][2].int()
            check(planner.layout(physical[rank], received=lambda sent: theirs, **options), expected[rank])
            arrays = {name: value.numpy() if hasattr(value, "numpy") else value for name, value in options.items()}
            planner_of_arrays = planner.layout(physical[rank].numpy(), experts=ids[rank].numpy(), **arrays)
            assert isinstance(planner_of_arrays.order, np.ndarray)
            check(planner_of_arrays, expected[rank])
            total = sum(layout.wait().received)
            padded = planner.layout(physical[rank], max_received=total + 5, **options).by_row
            assert torch.equal(padded[:total], layout.by_row) and padded[total:].tolist() == list(range(total, total + 5))


def test_many_keys():
    """64 ranks of 20 slots, and one expert that most tokens go to."""
    random = np.random.default_rng(1)
    ranks, n_logical = 64, 64 * 16
    slots = random.permutation(np.concatenate([np.arange(n_logical), random.integers(0, 64, 64 * 4)]))
    ids = [torch.tensor(np.where(random.random((500, 8)) < 0.3, random.integers(0, 8), random.integers(-1, n_logical, (500, 8))))
           for _ in range(ranks)]
    counts = torch.stack([counts_of(one, n_logical) for one in ids])
    planners = [Planner.from_placement(torch.tensor(slots), ep_size=ranks, device="cpu", n_nodes=8, rank=rank) for rank in range(ranks)]
    physical = []
    for planner, mine in zip(planners, ids):
        planner.solve(counts)
        physical.append(planner.redirect(mine))
    expected = reference(physical, torch.arange(64 * 20) % 20, 20, 20)
    for rank, planner in enumerate(planners):
        check(planner.layout(physical[rank], experts=ids[rank]), expected[rank])


def two_ranks():
    return Planner.from_placement(torch.tensor([0, 1, 2, 0, 3, 1]), ep_size=2, device="cpu", rank=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_operators(dtype):
    """What PyTorch expects of operators; numbers that belong to no part of the words are not compared, since nobody writes them."""
    planner, ids = two_ranks(), torch.tensor([[0, 1], [2, 3], [0, -1]], dtype=dtype)
    physical, table = planner.run(ids, None), torch.tensor([0, 1, 2, 2, 1, 0], dtype=dtype)
    sizes = planner.number, 2, 3
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for arguments in ((physical, None, None, None, *sizes, True), (physical.T, ids.T, table, planner._plan, *sizes, False)):
        torch.library.opcheck(torch.ops.lplb.layout.default, arguments, test_utils=checks)
    _, words = torch.ops.lplb.layout(physical, None, None, None, *sizes, True)
    received = torch.ones(2, 3, dtype=torch.int32)
    torch.library.opcheck(torch.ops.lplb.layout_received.default, (words, received, *sizes), test_utils=checks)
    torch.library.opcheck(torch.ops.lplb.layout_by_row.default, (words, *sizes, 9), test_utils=checks)


def test_one_source_is_the_rank_alone():
    """Without a group and without others' counts, run() plans for the tokens of its rank: from others comes nothing."""
    planner, ids = two_ranks(), torch.tensor([[0, 1], [2, 3], [0, -1]])
    physical = planner.run(ids, None)
    layout = planner.layout(physical, experts=ids)
    assert layout.received_rows[1].tolist() == [0, 0, 0]
    assert layout.received_rows[0].tolist() == [int((physical == slot).sum()) for slot in range(3)]


def test_what_does_not_belong_together_is_refused():
    planner, ids = two_ranks(), torch.tensor([[0, 1], [2, 3], [0, -1]])
    zeros = torch.zeros(2, 3, dtype=torch.int32)

    def refused(kind, words, *arguments, of=planner, **options):
        with pytest.raises(kind) as raised:
            of.layout(*arguments, **options)
        assert words in str(raised.value), raised.value

    refused(lplb.WrongOrder, "lplb_planner_layout: there is no plan for this placement yet", ids)
    planner.layout(ids, received=lambda sent: zeros)  # which needs none
    first = planner.run(ids, None)
    second = planner.run(ids[1:], None)
    refused(lplb.WrongOrder, "layout: physical must be the ids of the planner's latest plan", first)
    kept = planner.layout(second)
    planner.run(ids, None)
    check(kept, reference([second, torch.empty(0)], torch.arange(6) % 3, 3, 3)[0])
    refused(lplb.InvalidArgument, "physical: must be -1 .. 5, slots of the planner's placement, got 2 ids that are not",
            torch.tensor([6, 0, -2]))
    refused(lplb.InvalidArgument, "physical: must be slots that hold the given experts under the planner's placement, got 1 ids of other",
            first, experts=torch.tensor([[0, 1], [2, 3], [0, 0]]))
    refused(lplb.InvalidArgument, "experts: must have 6 elements, got 5", first, experts=ids.reshape(-1)[1:])
    refused(lplb.InvalidArgument, "experts: must be of physical's type, torch.int64, got torch.int32", first, experts=ids.int())
    refused(lplb.InvalidArgument, "received: must return [2, 3], got shape [3, 2]", first, received=lambda sent: zeros.T)
    refused(lplb.InvalidArgument, "received: must be int32, got torch.int64", first, received=lambda sent: zeros.long())
    refused(lplb.InvalidArgument, "received: must return numbers of rows, at least 0", first, received=lambda sent: zeros - 1)
    refused(lplb.InvalidArgument, "received: must return numbers of rows, at least 0", first, received=lambda sent: zeros + 2**30)
    refused(lplb.InvalidArgument, "max_received: must be at least the number of rows that are received, got 1, and ", first, max_received=1)
    refused(lplb.InvalidArgument, "n_rows: must be at most 4096, got 4097", first, n_rows=4097)
    refused(lplb.InvalidArgument, "layout.n_rows: must be at least the 3 slots of a rank where row_of_slot is NULL, got 2", first, n_rows=2)
    refused(lplb.InvalidArgument, "row_of_slot: must have 6 elements, got 5", first, row_of_slot=torch.zeros(5).int())
    refused(lplb.InvalidArgument, "physical: must be -1 .. 5, slots of the planner's placement, whose row_of_slot is 0 .. 2, got 1",
            first, row_of_slot=torch.tensor([0, 3, 1, 0, 1, -1]))
    planner.update_placement(torch.tensor([3, 1, 2, 0, 3, 1]))
    refused(lplb.WrongOrder, "there is no plan for this placement yet", first)
    refused(lplb.InvalidArgument, "physical: must be slots that hold the given experts", first, experts=ids, received=lambda sent: zeros)

    plain = Planner.from_placement(torch.arange(4), ep_size=2, device="cpu", rank=0)
    refused(lplb.WrongOrder, "there is no plan, since no expert has a replica", plain.run(ids, None), of=plain)
    whole = Planner.from_placement(torch.tensor([0, 1, 2, 0, 3, 1]), ep_size=2, device="cpu")
    refused(lplb.InvalidArgument, "received: must be given where the planner plans for no rank of its own", whole.run(ids, None), of=whole)
    planner.close()
    refused(lplb.WrongOrder, "planner: must not be used after close()", first)


def test_layer_checks_given_ids():
    """MoELayer.forward(physical=...) of ids that are no slots, or that were planned under another placement."""
    from lplb.moe import MoELayer

    planner = Planner.from_placement(torch.tensor([0, 1, 2, 3, 3]), ep_size=1, device="cpu")
    layer = MoELayer(planner, 8, 6, dtype=torch.float64)
    states, ids, weights = torch.randn(9, 8).double(), torch.randint(-1, 4, (9, 2)), torch.rand(9, 2).double()
    ids[0] = torch.tensor([0, 1])
    physical = layer.plan(ids)
    assert torch.equal(layer(states, ids, weights, physical=physical), layer(states, ids, weights))
    assert torch.equal(layer(states, ids, weights, physical=physical.int()), layer(states, ids, weights))
    beyond = physical.clone()
    beyond[0, 0] = 5
    with pytest.raises(lplb.InvalidArgument, match="physical: must be -1 .. 4, slots of the planner's placement"):
        layer(states, ids, weights, physical=beyond)
    planner.update_placement(torch.tensor([1, 0, 2, 3, 3]))
    layer.replicas.update()
    with pytest.raises(lplb.InvalidArgument, match="physical: must be slots that hold the given experts under the planner's placement"):
        layer(states, ids, weights, physical=physical)


def test_saved_layouts_of_batches_in_flight():
    """Recomputation with save_plans, when another batch has been planned meanwhile."""
    from torch.utils.checkpoint import checkpoint

    from lplb.moe import MoELayer, save_plans

    layer = MoELayer(Planner.from_placement(torch.tensor([0, 1, 2, 3, 3]), ep_size=1, device="cpu"), 8, 6, dtype=torch.float64)
    batches = [(torch.randn(9, 8).double().requires_grad_(), torch.randint(-1, 4, (9, 2)), torch.rand(9, 2).double()) for _ in range(3)]
    seen = []
    for saves in (False, True):
        outputs = [checkpoint(layer, *one, use_reentrant=False, context_fn=save_plans) if saves else layer(*one) for one in batches]
        for output in outputs:
            output.square().sum().backward()
        seen.append([one[0].grad.clone() for one in batches] + [layer.gate_up.grad.clone(), layer.down.grad.clone()])
        layer.replicas.zero_grad()
        for one in batches:
            one[0].grad = None
    assert all(torch.equal(one, other) for one, other in zip(*seen))


def test_what_received_gets_and_returns():
    """-1 everywhere where the ids are wrong, so that all ranks raise; what is no array is refused in words."""
    planner = Planner.from_placement(np.array([0, 1, 2, -1]), n_logical=3, ep_size=2, device="cpu")
    seen = []
    physical = planner.run(np.array([[0, 2], [1, -1]]), None)
    assert planner.layout(physical, received=lambda rows: (seen.append(rows), rows)[1]).wait().sent == [2, 1]
    with pytest.raises(lplb.InvalidArgument, match="physical: must be -1 .. 3, slots of the planner's placement, got 1 ids that are not"):
        planner.layout(np.array([[0, 9]]), received=lambda rows: (seen.append(rows), rows)[1])
    assert seen[0].tolist() == [[1, 1], [1, 0]] and seen[1].tolist() == [[-1, -1], [-1, -1]] and seen[1].dtype == np.int32
    with pytest.raises(lplb.InvalidArgument, match=r"received: must return \[2, 2\], got NoneType"):
        planner.layout(physical, received=lambda rows: None)


def test_ranks_agree(tmp_path):
    """On three processes with gloo: what rank a says that it sends to b is what b says that it receives from a, and it arrives."""
    here, ranks = Path(__file__).parent, 3
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONPATH": os.pathsep.join([str(here), *filter(None, sys.path)])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen([sys.executable, here / "layout_worker.py", str(rank), str(ranks), tmp_path / "store"], env=environment,
                                **pipes) for rank in range(ranks)]
    try:
        words = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, said in zip(started, words):
        assert process.returncode == 0, said
    assert {json.loads(said.splitlines()[-1])["batches"] for said in words} == {40}
