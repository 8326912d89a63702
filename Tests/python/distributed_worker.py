"""One process of test_distributed.py: plans with its group and writes what it saw. Arguments: rank, processes, store file, output folder."""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.distributed as dist

import lplb
from lplb import Planner, topology
from oracle import random_placement

torch.set_num_threads(1)


def topology_of(size):
    return {2: torch.tensor([[1], [0]]), 4: topology.SQUARE_4P2E, 8: topology.CUBE_8P2E}[size]


def batch(seed, rank, n_logical, family):
    """This rank's ids; ranks differ in number and in taste."""
    rng = np.random.default_rng([seed, rank])
    n = int(rng.integers(0, 400)) if rank != 1 else 0  # rank 1 has no tokens at all
    if family:
        ids = (rng.zipf(1.5, (n, 4)) + 3 * rank) % n_logical
    else:
        ids = rng.integers(-1, n_logical, (n, 4))
    return torch.from_numpy(ids)


def example(ep_group, out):
    """The calls of the reference's README as training code has them."""
    n_logical_experts, n_redundants_per_rank, ep_size = 64, 2, ep_group.size()
    avail_counter = torch.zeros(1, dtype=torch.int64)
    r2o = torch.tensor([[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]]).T.int()
    planner = Planner(r2o, n_logical_experts + n_redundants_per_rank * ep_size, n_logical_experts, group=ep_group)
    planner.init_from_deep_ep(None)
    planner.init_from_deep_ep(None)
    N_SMS = 100
    indices = batch(99, dist.get_rank(), 64, 1)
    redirected_indices = planner.run(indices, avail_counter, N_SMS)
    assert redirected_indices.shape == indices.shape and avail_counter.item() == 1
    counts, rows = planner.count_workload(indices, N_SMS)
    probs, scaled = planner.solve_probs(counts, avail_counter)
    by_ratio = planner.weighted_select_target(indices, probs, rows, N_SMS)
    out.update(example=redirected_indices, example_ids=indices, example_split=planner.split(), example_phy2log=planner.phy2log,
               example_bound=planner.info().groups[0].bound, example_scaled=scaled, example_counts=counts, example_by_ratio=by_ratio)


def plan(group, name, out):
    size, rank = group.size(), dist.get_rank(group)
    r2o = topology_of(size)
    fixed = Planner(r2o, 8 * size + r2o.shape[1] * size, 8 * size, group=group, n_nodes=max(1, size // 4))
    assert fixed.ep_size == size and fixed.rank == rank and fixed.ep_group is group
    phy2log, n_logical = random_placement(np.random.default_rng(size), size, 6, 4)
    general = Planner.from_placement(phy2log, group=group, n_nodes=max(1, size // 4))
    for kind, planner in (("fixed", fixed), ("general", general)):
        n_logical = planner.n_logical_routed_experts
        for case in range(3):
            ids = batch(10 * size + case, rank, n_logical, case % 2)
            physical = planner.run(ids, None)
            info = planner.info()
            key = f"{name}_{kind}_{case}"
            out.update({f"{key}_ids": ids, f"{key}_out": physical, f"{key}_split": planner.split(), f"{key}_mine": planner.assignment(),
                        f"{key}_bound": info.groups[0].bound, f"{key}_certified": info.certified,
                        f"{key}_local": [info.locality.to_own_rank, info.locality.to_own_node, info.locality.to_other_nodes],
                        f"{key}_phy2log": planner.phy2log})
            planner.solve(torch.bincount(ids[ids >= 0], minlength=n_logical))
            assert torch.equal(planner.redirect(ids), physical)
            as_array = planner.run(ids.numpy(), np.zeros(1, dtype=np.int32))
            assert isinstance(as_array, np.ndarray) and (as_array == physical.numpy()).all()
    if name == "2of0":  # the exchange is inside the operator, so it is in compiled graphs too
        compiled = torch.compile(lambda ids: fixed.run(ids, None) + 0, fullgraph=True, backend="aot_eager")
        ids = batch(5, rank, 8 * size, 0)
        assert torch.equal(compiled(ids), fixed.run(ids, None))
    # Without replicas nobody may be asked: only the first rank calls, and it must not hang.
    alone = Planner(r2o, 8 * size, 8 * size, group=group)
    if rank == 0:
        assert torch.equal(alone.run(torch.arange(8 * size), None), torch.arange(8 * size))
    try:
        Planner(r2o, 8 * size + r2o.shape[1] * size, 8 * size, size + 1, group)
    except lplb.InvalidArgument as error:
        assert f"ep_size: must be the size of group, {size}, got {size + 1}" in str(error)
    else:
        raise AssertionError("another ep_size than the group's was accepted")


def main():
    rank, processes, store, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    out = {}
    for size in (2, 4, 8):
        for first in range(0, processes, size):
            group = dist.new_group(list(range(first, first + size)))
            if first <= rank < first + size:
                plan(group, f"{size}of{first}", out)
        dist.barrier()
    example(dist.group.WORLD, out)
    np.savez(f"{folder}/{rank}.npz", **{key: np.asarray(value) for key, value in out.items()})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
