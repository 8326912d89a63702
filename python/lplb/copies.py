"""Copies of experts whose parameters are in other hands: FSDP2, DTensor, or whatever shards, gathers and frees them.

    copies = Copies(planner)
    (up, down), (up_copies, down_copies) = copies(up, down)     # in forward, where the own experts' weights are whole

The copies are a differentiable function of the own experts' weights. Forward pulls them from their homes, each time; backward sends their
gradients home and adds them to the own ones, so that a hook which reduces gradients after the backward pass finds all of them. There is
no step to remember: no pull() and no push_grads(). The price is a pull in every forward pass and a push in every backward pass, where
Replicas does one of each a step; its own buffers and its optimizer state would not follow parameters that are sharded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _c
from ._ops.arguments import integer
from ._ops.host import Int32s, host_integers
from .errors import WrongOrder, broken_rule
from .placement import Move, Place, Rows
from .planner import Planner
from .replicas import Replicas
from .transport import TorchTransport


def natural_placement(n_logical: int, ep_size: int, slots: int, loads: Tensor | None = None) -> Int32s:
    """A placement whose homes never move: rank r owns n_logical / ep_size consecutive experts, and behind them holds copies of the
    hottest expert of rank r + 1, the second hottest of rank r + 2, and so on, by loads [n_logical], or of the first ones without loads."""
    n_logical, ep_size = integer("n_logical", n_logical, 1, _c.MAX_LOGICAL), integer("ep_size", ep_size, 1, _c.MAX_RANKS)
    if n_logical % ep_size:
        raise broken_rule("n_logical", f"must be a multiple of ep_size, {ep_size}", n_logical)
    most = min(ep_size - 1, n_logical // ep_size)
    slots = integer("slots", slots, 0, most)
    own = np.arange(n_logical, dtype=np.int32).reshape(ep_size, -1)
    by_load = np.zeros(own.shape) if loads is None else loads.detach().double().cpu().numpy().reshape(own.shape)
    hottest = np.take_along_axis(own, np.argsort(-by_load, axis=1, kind="stable"), axis=1)
    copies = [np.roll(hottest[:, step], -step - 1)[:, None] for step in range(slots)]
    return np.concatenate([own, *copies], axis=1).reshape(-1)


class Copies:
    """Where the experts and the copies of a planner's placement stand, and what brings the copies' weights there.

    planner: as for Replicas. Homes stay where they are: natural_placement() gives such placements.
    Making one and calling one are collective: every rank of the group does so, and takes part in the backward pass, in the same order.
    """

    def __init__(self, planner: Planner) -> None:
        self.places = Replicas(planner, transport="torch")  # its buffers are not used: it says which expert stands in which row
        self.planner, self.n_own = planner, len(self.places.own)
        self._transport = TorchTransport(planner.ep_group, self.places.rank, torch.device(planner.device))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_transport"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._transport = TorchTransport(self.planner.ep_group, self.places.rank, torch.device(self.planner.device))

    @property
    def n_copies(self) -> int:
        return self.places.n_rows - self.n_own

    def update(self) -> None:
        """Follows a new placement of the planner, between two forward passes with no backward pass outstanding. Collective."""
        slots = host_integers("phy2log", self.planner.phy2log, 1, np.int32, _c.MAX_PHYSICAL)
        before = self.places._rows
        if _own_experts(Rows(slots, self.places.n_ranks, 0, before)) != _own_experts(before):
            raise broken_rule("placement", "must leave every expert's home where it is, as natural_placement() does, since the parameters "
                              "are in other hands and do not move (those of Replicas do)", "one that moves homes")
        self.places.update()

    def __call__(self, *own: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Own experts' weights [own rows, ...] and their copies [rows behind, ...]. Use both of what it returns, each tensor once: the
        own ones go through, so that their gradients and those of the copies meet."""
        self.places.check_placement()
        for tensor in own:
            if not tensor.dim() or len(tensor) != self.n_own:
                raise broken_rule("own", f"must have a row for each of the {self.n_own} own experts", f"shape {list(tensor.shape)}")
        both = _Pulled.apply(self, *own)
        return both[: len(own)], both[len(own):]

    def _pull(self, own: Tensor) -> Tensor:
        copies, first = own.new_zeros((self.n_copies, *own.shape[1:])), self.places._rows.own
        moves = [Move(source, Place(rank, row - first[rank])) for source, (rank, row) in self.places._rows.pulls()]
        self._transport.send(moves, own.contiguous(), copies)
        return copies

    def _push(self, copies: Tensor, own: Tensor) -> None:
        """Adds the copies' gradients to those of their homes, in the order of the ranks."""
        first = self.places._rows.own
        for moves in self.places._rows.rounds():
            among_copies = [Move(Place(rank, row - first[rank]), target) for (rank, row), target in moves]
            for move, arrived in self._transport.arrivals(among_copies, copies):
                own[move.target.row] += arrived


def _own_experts(rows: Rows) -> list[list[int]]:
    return [experts[:own] for own, experts in zip(rows.own, rows.experts)]


class _Pulled(torch.autograd.Function):
    """Own weights to own weights and copies."""

    @staticmethod
    def forward(ctx: Any, copies: Copies, *own: Tensor) -> tuple[Tensor, ...]:
        ctx.copies, ctx.version, ctx.shapes = copies, copies.places.version, [tensor.shape for tensor in own]
        with torch.no_grad():
            return tuple(tensor.view_as(tensor) for tensor in own) + tuple(copies._pull(tensor) for tensor in own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        copies, n = ctx.copies, len(ctx.shapes)
        if copies.places.version != ctx.version:
            raise WrongOrder("copies: update() must not be called between a forward pass and its backward pass")
        own = [grad.clone() if 0 in grad.stride() else grad for grad in grads[:n]]  # an expanded gradient cannot be added to
        for sums, behind in zip(own, grads[n:]):
            copies._push(behind.contiguous(), sums)
        return None, *own
