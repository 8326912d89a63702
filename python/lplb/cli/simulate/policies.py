"""
The ways to choose a replica for a token. Every policy turns the tokens of all source ranks, counts [ranks, n_logical], into
taken [ranks, n_physical]: how many of them each source sends to each physical expert. So loads, and tokens that stay on their rank or
node, follow for all policies in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class Replicas:
    """log2phy: [n_logical, width] slots, -1 padded, original first."""

    log2phy: NDArray[np.int32]
    n_physical: int
    ranks: int
    nodes: int

    @property
    def n(self) -> Int64Array:
        """[n_logical] replicas of each expert."""
        return np.asarray((self.log2phy >= 0).sum(axis=1), dtype=np.int64)

    @property
    def rank(self) -> Int64Array:
        """[n_logical, width] rank of each replica, -1 padded."""
        return np.where(self.log2phy >= 0, self.log2phy // (self.n_physical // self.ranks), -1).astype(np.int64)

    def scatter(self, shares: Int64Array) -> Int64Array:
        """[ranks, n_physical] from shares [ranks, n_logical, width] of the replicas."""
        taken = np.zeros((shares.shape[0], self.n_physical), dtype=np.int64)
        exists = self.log2phy >= 0
        taken[:, self.log2phy[exists]] = shares[:, exists]
        return taken


def even(counts: Int64Array, replicas: Replicas) -> Int64Array:
    """What EPLB assumes: the occurrences of an expert, in source order, are dealt out to its replicas in turn."""
    n = replicas.n[None, :, None]
    after = counts.cumsum(axis=0)[:, :, None]
    before = after - counts[:, :, None]
    turn = np.arange(replicas.log2phy.shape[1])[None, None, :]
    dealt = (after - turn + n - 1) // n - (before - turn + n - 1) // n
    return replicas.scatter(np.where(turn < n, dealt, 0))


def random(counts: Int64Array, replicas: Replicas, rng: np.random.Generator) -> Int64Array:
    """A replica drawn at random for every token."""
    shares = np.zeros((*counts.shape, replicas.log2phy.shape[1]), dtype=np.int64)
    for n in np.unique(replicas.n):
        experts = np.flatnonzero(replicas.n == n)
        shares[:, experts, :n] = rng.multinomial(counts[:, experts], np.full(n, 1 / n))
    return replicas.scatter(shares)


def fixed_choice(replicas: Replicas) -> Int64Array:
    """
    [ranks, n_logical]: the one replica that a source rank always uses: on its own rank if there is one, else on its own node, else any;
    where several qualify, sources that have to choose take them in turn.
    """
    per_node = replicas.ranks // replicas.nodes
    source = np.arange(replicas.ranks)[:, None, None]
    rank, exists = replicas.rank[None], replicas.log2phy[None] >= 0
    own = exists & (rank == source)
    near = exists & (rank // per_node == source // per_node)
    candidates = np.where(own.any(axis=2, keepdims=True), own, np.where(near.any(axis=2, keepdims=True), near, exists))
    n_candidates = candidates.sum(axis=2)
    # The how-manieth this source is among those of its kind: all on its node (near), or all (neither).
    chooses = ~own.any(axis=2)
    at_node = near.any(axis=2)
    turn = np.zeros_like(n_candidates)
    for node in range(replicas.nodes):
        mine = slice(node * per_node, (node + 1) * per_node)
        turn[mine] = np.where(at_node[mine], np.cumsum(chooses[mine], axis=0) - 1, 0)
    far = chooses & ~at_node
    turn = np.where(far, np.cumsum(far, axis=0) - 1, turn)
    pick = np.where(chooses, turn % np.maximum(n_candidates, 1), 0)
    position = np.cumsum(candidates, axis=2) - 1
    hit = candidates & (position == pick[:, :, None])
    return np.asarray(hit.argmax(axis=2), dtype=np.int64)


def fixed(counts: Int64Array, replicas: Replicas, choice: Int64Array) -> Int64Array:
    """choice: of `fixed_choice`."""
    shares = np.zeros((*counts.shape, replicas.log2phy.shape[1]), dtype=np.int64)
    np.put_along_axis(shares, choice[:, :, None], counts[:, :, None], axis=2)
    return replicas.scatter(shares)


def proportional(counts: Int64Array, replicas: Replicas, split: Int64Array) -> Int64Array:
    """
    How LPLB turns a split into tokens: every source sends the same share of its tokens to each replica. What the first j replicas get
    together is rounded down; with one copy that is floor(share * tokens) for the original and the rest for the copy.
    split: [n_physical] tokens of the exact plan, so that only the dispatch differs from lplb's.
    """
    quota = np.where(replicas.log2phy >= 0, split[replicas.log2phy], 0).cumsum(axis=1)[None]
    total = np.maximum(counts.sum(axis=0), 1)[None, :, None]
    return replicas.scatter(np.diff(counts[:, :, None] * quota // total, axis=2, prepend=0))


def fewest_experts(counts: Int64Array, replicas: Replicas) -> Int64Array:
    """
    Greedy balancing of active experts, of METRO's kind (arXiv 2512.09277): one after the other, each expert that has tokens goes whole to the rank
    with the fewest active experts so far among those that hold it; the experts with the fewest replicas first, the lowest rank of equals.
    """
    active = np.zeros(replicas.ranks, dtype=np.int64)
    shares = np.zeros((*counts.shape, replicas.log2phy.shape[1]), dtype=np.int64)
    n, rank = replicas.n, replicas.rank
    for expert in sorted(np.flatnonzero(counts.sum(axis=0)), key=lambda expert: int(n[expert])):
        choice = min(range(n[expert]), key=lambda j: (int(active[rank[expert, j]]), int(rank[expert, j])))
        active[rank[expert, choice]] += 1
        shares[:, expert, choice] = counts[:, expert]
    return replicas.scatter(shares)


def locality(taken: Int64Array, nodes: int) -> tuple[int, int]:
    """Tokens that stay on their own rank, and tokens that stay on their own node (those of the own rank included)."""
    ranks = taken.shape[0]
    to_rank = taken.reshape(ranks, ranks, -1).sum(axis=2)
    to_node = to_rank.reshape(nodes, ranks // nodes, nodes, ranks // nodes).sum(axis=(1, 3))
    return int(np.trace(to_rank)), int(np.trace(to_node))


def inbound(taken: Int64Array) -> Int64Array:
    """[ranks] tokens that reach each rank from others."""
    to_rank = taken.reshape(taken.shape[0], taken.shape[0], -1).sum(axis=2)
    return np.asarray(to_rank.sum(axis=0) - np.diag(to_rank), dtype=np.int64)
