"""One process of test_agreement.py: ranks that differ, case by case. Arguments: rank, processes, store file, output folder.

Each case notes what this rank saw: "fine", or the type and the words of the error. All ranks must be alive for the next case.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

import lplb
from lplb import Planner, topology

torch.set_num_threads(1)
SQUARE = topology.SQUARE_4P2E
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def square(n_logical=64, **more):
    return Planner(SQUARE, n_logical + 8, n_logical, group=dist.group.WORLD, **more)


def ids(rank, n_logical=64, dtype=torch.int64):
    return torch.from_numpy(np.random.default_rng(rank).integers(0, n_logical, (50, 4))).to(dtype)


def history(seed, n_logical=64):
    return torch.from_numpy(np.random.default_rng(seed).uniform(0, 100, n_logical))


@case
def sizes(rank):
    square(128 if rank == 2 else 64)


@case
def topologies(rank):
    other = torch.tensor([[1, 3], [2, 0], [3, 1], [0, 2]])
    Planner(other if rank == 1 else SQUARE, 72, 64, group=dist.group.WORLD)


@case
def kinds_of_planner(rank):
    slots = torch.arange(64)
    Planner.from_placement(slots, group=dist.group.WORLD) if rank == 3 else Planner(SQUARE, 64, 64, group=dist.group.WORLD)


@case
def placements(rank):
    Planner.from_placement(torch.arange(64).roll(rank // 3), group=dist.group.WORLD)


@case
def nodes(rank):
    square(n_nodes=2 if rank < 2 else 1)


@case
def exchanges(rank):
    square(exchange="nccl" if rank == 0 else "auto")


@case
def one_rank_is_refused(rank):
    Planner(SQUARE, 71 if rank == 1 else 72, 64, group=dist.group.WORLD)


@case
def one_rank_has_a_bad_placement(rank):
    Planner.from_placement(torch.tensor([0, 1, 2, 3]) if rank else torch.tensor([0, 1, 2, 2]), n_logical=4, group=dist.group.WORLD)


@case
def one_rank_has_no_gpu(rank):
    square(device="cuda:0" if rank == 3 else "cpu")


@case
def types_of_ids(rank):
    """int32 on one rank: that is no difference."""
    planner = square()
    planner.run(ids(rank, dtype=torch.int32 if rank == 1 else torch.int64), None)
    counts = torch.bincount(ids(rank).view(-1), minlength=64)
    planner.solve(counts.int() if rank == 2 else counts)
    assert planner.info().groups[0].total == 4 * 200


@case
def histories(rank):
    planner = square()
    planner.update_redundancy_mapping(history(1 if rank == 3 else 0))
    try:
        planner.run(ids(rank), None)
    except lplb.Disagreement:
        planner.update_redundancy_mapping(history(0))
        planner.run(ids(rank), None)  # mended
        assert planner.info().certified
        raise


@case
def histories_and_solve_probs(rank):
    planner = square()
    planner.update_redundancy_mapping(history(1 if rank == 0 else 0))
    planner.solve_probs(torch.bincount(ids(rank).view(-1), minlength=64), None)


@case
def layers_in_another_order(rank):
    first, second = square(), square()
    first.run(ids(rank), None), second.run(ids(rank), None)
    (second if rank == 1 else first).run(ids(rank), None)


@case
def layers_of_other_sizes_in_another_order(rank):
    small, large = square(64), square(256)
    (large if rank == 2 else small).run(ids(rank), None)


@case
def one_rank_makes_a_planner(rank):
    planner = square()
    square() if rank == 1 else planner.run(ids(rank), None)


@case
def counts_of_all_on_one_rank(rank):
    """The row of the rank travels, so nobody is left waiting."""
    planner = square()
    counts = torch.stack([torch.bincount(ids(r).view(-1), minlength=64) for r in range(4)])
    planner.solve(counts if rank == 0 else counts[rank])
    assert planner.info().groups[0].total == 800
    planner.solve(counts)
    assert planner.info().groups[0].total == 800


@case
def a_count_that_cannot_be(rank):
    planner = square()
    counts = torch.bincount(ids(rank).view(-1), minlength=64)
    counts[5] = 2**31 if rank == 2 else 1
    planner.solve_probs(counts, None)


@case
def same_tokens(rank):
    planner = square(tokens="same", debug=True)
    planner.update_redundancy_mapping(history(7))
    physical = planner.run(ids(0), None)
    everyone = [torch.empty_like(physical) for _ in range(4)]
    dist.all_gather(everyone, physical)
    assert all(torch.equal(other, physical) for other in everyone)
    assert planner.info().groups[0].total == 200
    loads = torch.bincount(physical.view(-1) // 18, minlength=4)
    assert loads.max() == planner.info().groups[0].bound
    own = square()  # what the mode is there for: with tokens of their own the ranks choose for themselves
    own.run(ids(0), None)
    assert own.info().groups[0].total == 800


@case
def same_tokens_that_differ(rank):
    square(tokens="same", debug=True).run(ids(rank == 1), None)


@case
def same_tokens_in_arrays_that_differ(rank):
    square(tokens="same", debug=True).run(ids(rank == 1).numpy(), None)


@case
def same_tokens_and_other_histories(rank):
    square(tokens="same").update_redundancy_mapping(history(rank // 3))


@case
def tokens_modes(rank):
    square(tokens="same" if rank == 0 else "own")


def main():
    rank, processes, store, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes, timeout=timedelta(seconds=60))
    seen = {}
    for name, function in CASES.items():
        try:
            function(rank)
            seen[name] = "fine"
        except lplb.LplbError as error:
            seen[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(seen, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
