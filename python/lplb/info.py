"""What a plan achieved, and the proof that no plan does better."""

from __future__ import annotations

from dataclasses import dataclass, field

from . import _c


@dataclass(frozen=True)
class GroupInfo:
    """One group of ranks under the latest plan. Loads are tokens."""

    max_load: int  #: tokens of the busiest rank
    bound: int  #: no split over these replicas has a smaller maximum
    total: int  #: tokens of all ranks of the group
    mean: float  #: total / ranks
    moved: int  #: tokens that do not go to the original of their expert
    rounds: int  #: rounds of the solver's loop: a diagnosis of speed, no part of the result
    certified: bool  #: max_load == bound, proven by the witness
    witness: list[int] = field(repr=False)
    """Ranks S (numbered in the EP group): ceil(tokens that cannot leave S / len(S)) == bound."""

    @property
    def gap_solver(self) -> float:
        """max_load / bound - 1: what the solver left on the table. 0 when certified."""
        return self.max_load / self.bound - 1 if self.bound else 0.0

    @property
    def gap_placement(self) -> float:
        """bound / mean - 1: what only another placement of the replicas could win."""
        return self.bound / self.mean - 1 if self.mean else 0.0


@dataclass(frozen=True)
class Locality:
    """Where the tokens of the planner's rank go; all zero for a planner without a rank."""

    to_own_rank: int
    to_own_node: int  #: to another rank of the same node
    to_other_nodes: int


@dataclass(frozen=True)
class Info:
    """The latest plan of a planner."""

    groups: list[GroupInfo]
    invalid_ids: int  #: ids out of range that were rewritten, as -1, since the planner was created
    locality: Locality
    overflow: int  #: CUDA: groups not solved so far since their total did not fit 31 bits; their tokens stayed at the originals

    @property
    def certified(self) -> bool:
        """Every group is at its proven optimum."""
        return all(group.certified for group in self.groups)


def group_info(struct: _c.GroupInfoStruct, group_size: int, first_rank: int = 0) -> GroupInfo:
    """The dataclass of an lplb_group_info whose rank 0 is first_rank of the EP group."""
    witness = [first_rank + rank for rank in range(group_size) if struct.witness[rank >> 5] >> (rank & 31) & 1]
    return GroupInfo(struct.max_load, struct.bound, struct.total, struct.total / group_size, struct.moved, struct.rounds,
                     bool(struct.certified), witness)
