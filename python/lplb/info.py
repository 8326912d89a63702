"""What a plan achieved, and the proof that no plan does better."""

from __future__ import annotations

from dataclasses import dataclass, field

from . import _c


@dataclass(frozen=True)
class GroupInfo:
    """One group of ranks under the latest plan. Loads are tokens, levels are what the cost is counted in: units, see Planner.

    Where a unit is a token and the ranks are alike, the levels are the loads: level == max_load, level_bound == bound and level_mean == mean.
    """

    max_load: int  #: the most tokens of a rank
    bound: int  #: no split over these replicas has a smaller maximum. With units or capacities no more than the mean, rounded up
    total: int  #: tokens of all ranks of the group
    mean: float  #: total / ranks
    moved: int  #: tokens that do not go to the original of their expert
    rounds: int  #: rounds of the solver's loop: a diagnosis of speed, no part of the result
    certified: bool  #: level == level_bound, proven by the witness
    witness: list[int] = field(repr=False)
    """Ranks S (numbered in the EP group): level_bound is the least level at which they hold the units that cannot leave S, see
    witness_bound: ceil(tokens that cannot leave S / len(S)) where the cost is tokens."""
    level: float  #: of the rank that takes longest: units, and with capacities the time of a normal rank for so many
    level_bound: float  #: no split into units over these replicas has a lower level
    level_mean: float  #: what it would be if every expert had a replica on every rank

    @property
    def gap_solver(self) -> float:
        """level / level_bound - 1: what the solver left on the table. 0 when certified."""
        return self.level / self.level_bound - 1 if self.level_bound else 0.0

    @property
    def gap_placement(self) -> float:
        """level_bound / level_mean - 1: what only another placement of the replicas could win."""
        return self.level_bound / self.level_mean - 1 if self.level_mean else 0.0


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


def group_info(struct: _c.GroupInfoStruct, group_size: int, first_rank: int = 0, level: _c.LevelStruct | None = None) -> GroupInfo:
    """The dataclass of an lplb_group_info whose rank 0 is first_rank of the EP group. level: where the cost is not tokens."""
    mean = struct.total / group_size
    levels = (struct.max_load, struct.bound, mean) if level is None else (level.reached / 1024, level.bound / 1024, level.mean / 1024)
    witness = [first_rank + rank for rank in range(group_size) if struct.witness[rank >> 5] >> (rank & 31) & 1]
    return GroupInfo(struct.max_load, struct.bound, struct.total, mean, struct.moved, struct.rounds, bool(struct.certified), witness,
                     *levels)
