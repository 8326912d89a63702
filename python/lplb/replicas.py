"""Replicas that train: the weights and gradients of copies, moved over NVLink or by torch.distributed.

    replicas = Replicas(planner)                                      # who owns what: replicas.own, the experts of this rank
    gate_up = replicas.parameter("gate_up", (2 * width, hidden))      # an nn.Parameter [own experts, 2 * width, hidden] for the optimizer
    ... forward and backward on replicas.weights("gate_up") and replicas.gradients("gate_up"), whose rows behind are the copies ...
    replicas.push_grads()                                             # before the optimizer and any reduction of experts' gradients
    optimizer.step()
    replicas.pull()                                                   # before the next forward pass
    planner.update_placement(other)
    replicas.update(optimizers=[optimizer])                           # homes and their state move, copies are filled
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from . import _c
from ._ops.arguments import integer, one_of
from ._ops.host import Int32s, host_integers
from .errors import Disagreement, InvalidArgument, LplbError, WrongOrder, broken_rule
from .exchange.gather import REPLICAS, Waiting, gather_bytes, on_device
from .placement import Rows
from .planner import Planner
from .transport import TRANSPORTS, connect


@dataclass
class _Held:
    parameter: torch.nn.Parameter
    weights: Tensor  # [rows, ...], of which the parameter is the first ones
    grads: Tensor  # [rows, ...]
    own_grad: Tensor  # the first rows of grads: parameter.grad, or parameter.main_grad in another dtype
    pulled: int  # the version of the parameter that the copies equal

    @property
    def main(self) -> bool:
        return self.grads.dtype != self.weights.dtype

    def adopt(self) -> None:
        """Makes the first rows of grads the parameter's gradient again, after zero_grad() or who else has set another one."""
        grad = self.parameter.grad
        if self.main or grad is self.own_grad:
            return
        if grad is None:
            self.own_grad.zero_()
        else:
            self.own_grad.copy_(grad)
        self.parameter.grad = self.own_grad


class Replicas:
    """Weights and gradients of a rank's own experts and of its copies of others' experts, for one MoE layer.

    Each tensor of expert parameters lies in a buffer [rows, ...]: first the rank's own experts, an nn.Parameter on that memory, then the
    copies, which are in no parameters(), optimizer or state_dict(). Gradients likewise. Physical experts find their row by row_of_slot.
    Parameters that FSDP2 or DTensor shall shard cannot lie there: lplb.copies is for them.

    planner: made with group=, or with ep_size=1. transport: how pull() and push_grads() go, with the same bits: "nvlink", by kernels of the
    library on the current stream, in memory that the GPUs of one host map (no host waits; CUDA graphs may hold them, also across update());
    "torch", by torch.distributed; "auto", by NVLink where all ranks can. Over NVLink transport.exchange has the time limit and policy for
    ranks that do not come (set_limits, report, abort; see lplb.exchange). slack: by how many a rank's number of own experts may change in a
    later placement; as many rows are kept free among the own ones and among the copies, and are zero.

    Making one, parameter(), pull(), push_grads() and update() are collective: every rank of the group calls them in the same order. That
    ranks agree is checked in each call on the CPU or with debug=True of the planner; on a GPU otherwise in all but pull() and push_grads().
    """

    own: Tensor  #: int64 [own rows], the expert of each row of the parameters, -1 where none is; changed in place by update()
    row_of_slot: Tensor  #: int64 [n_physical], the row of every physical expert in the buffers of its rank; also changed in place
    homes: Int32s  #: int32 [n_logical], the slot of each expert's home
    version: int  #: grows with each update()

    def __init__(self, planner: Planner, *, transport: str = "auto", slack: int = 0) -> None:
        self.planner, self.rank, self.n_ranks, self.version = planner, planner.rank or 0, planner.ep_size, 0
        self._device = torch.device(planner.device)
        self._held: dict[str, _Held] = {}
        self._registered: dict[str, Tensor] = {}
        self._outstanding = False  # copies may have gradients that their homes have not
        self._digest, refused = "none", None
        try:
            if planner.tokens != "own" or (planner.ep_group is None and planner.ep_size > 1):
                raise broken_rule("planner", "must have a group whose ranks have tokens of their own, or ep_size=1", repr(planner))
            self._asked = one_of("transport", transport, TRANSPORTS)
            self.slack = integer("slack", slack, 0, _c.MAX_PHYSICAL)
            self._rows = Rows(_phy2log(planner), self.n_ranks, self.slack)
        except LplbError as error:
            refused = error
        call = f"Replicas(transport={transport!r}) on {self._device.type}"
        self._meet(call if refused else f"{call} of {self._rows.digest()}", refused)
        self.transport = connect(transport, planner.ep_group, self.rank, self.n_ranks, self._device, self._rows)
        self.own = torch.empty(self._rows.own[self.rank], dtype=torch.int64, device=self._device)
        self.row_of_slot = torch.empty(planner.n_routed_experts, dtype=torch.int64, device=self._device)
        self._follow(self._rows)
        if self._device.type == "cuda" and self.n_ranks > 1:  # a communicator that starts with sends would need all ranks in the first ones
            dist.all_reduce(torch.zeros(1, device=self._device), group=planner.ep_group)

    @property
    def n_rows(self) -> int:
        """Rows of the buffers: own experts and copies."""
        return len(self._rows.experts[self.rank])

    # ---- what trains ----

    def parameter(self, name: str, shape: Sequence[int], *, dtype: torch.dtype | None = None, grad_dtype: torch.dtype | None = None
                  ) -> torch.nn.Parameter:
        """An nn.Parameter [own rows, *shape] of zeros on the planner's device, to be filled with the weights of the experts in own and
        then pulled. Collective.

        grad_dtype: None or dtype: gradients accumulate in parameter.grad; another one (float32 main gradients): in parameter.main_grad,
        which zero_grad() of this object clears.
        """
        refused = broken_rule("name", "must not be that of another parameter", name) if name in self._held else None
        return self._hold(name, shape, dtype, grad_dtype, None, refused)

    def _hold(self, name: str, shape: Sequence[int], dtype: torch.dtype | None, grad_dtype: torch.dtype | None,
              known: torch.nn.Parameter | None, refused: LplbError | None = None) -> torch.nn.Parameter:
        """known: a parameter that keeps its identity and its rows, and moves into the buffers."""
        self._meet(f"parameter({name!r}, {list(shape)}, dtype={dtype}, grad_dtype={grad_dtype})", refused)
        rows, own = self.n_rows, len(self.own)
        weights = self.transport.zeros((rows, *shape), dtype, _c.WEIGHTS)
        grads = self.transport.zeros((rows, *shape), grad_dtype or weights.dtype, _c.GRADIENTS)
        # Through DLPack the parameter has a storage of its own size on the same memory: torch.save would write the copies, too, for a view.
        whole = torch.utils.dlpack.from_dlpack(weights[:own])
        parameter = torch.nn.Parameter(whole) if known is None else known
        if known is not None:
            whole.copy_(known.data)
            known.data = whole
        held = self._held[name] = _Held(parameter, weights, grads, grads[:own], -1)
        if held.main:
            setattr(parameter, "main_grad", held.own_grad)
        return parameter

    def check_placement(self) -> None:
        """WrongOrder where the planner has a placement that update() has not followed: its plans then name other experts than the rows
        hold. Before each plan; costs a comparison on the host, since every placement of a planner is an object of its own."""
        if self.planner.phy2log is not self._placement:
            raise WrongOrder("replicas: update() must be called after the planner's placement has changed, and before it plans")

    def weights(self, name: str) -> Tensor:
        """The buffer [n_rows, ...] for a forward or backward pass; not for autograd. WrongOrder where copies are older than their homes."""
        held = self._find(name)
        if refused := self._spoilt():
            raise refused
        if self._rows.has_copies and held.parameter._version != held.pulled:
            raise WrongOrder(f"replicas: pull() must be called after own experts' weights have changed, and {name} has changed")
        return held.weights

    def gradients(self, name: str) -> Tensor:
        """The buffer [n_rows, ...] that a backward pass adds gradients to."""
        held = self._find(name)
        held.adopt()
        self._outstanding = True
        return held.grads

    def gradients_to_fill(self, name: str) -> tuple[Tensor, int]:
        """gradients(name), and how many of its first rows hold nothing of worth, since the parameter had no gradient: the caller must
        write those, also the ones that nothing came for."""
        held = self._find(name)
        fresh = 0 if held.main or held.parameter.grad is not None else len(self.own)
        if fresh:
            held.parameter.grad = held.own_grad
        return self.gradients(name), fresh

    def zero_grad(self) -> None:
        """All gradients to zero, also those of copies and main gradients."""
        for held in self._held.values():
            held.grads.zero_()
            if not held.main:
                held.parameter.grad = held.own_grad
        self._outstanding = False

    def register(self, name: str, tensor: Tensor) -> None:
        """A further tensor [own rows, ...], such as master weights, whose rows move with the homes in update()."""
        if refused := self._unmovable("tensor", tensor):
            raise refused
        self._registered[name] = tensor

    @torch.no_grad()
    def pull(self) -> None:
        """Weights from homes to copies: after the own experts' weights were set, loaded or stepped. Collective."""
        if self._checks():
            self._meet("pull()", self._spoilt())
        self._pull(None)

    @torch.no_grad()
    def push_grads(self) -> None:
        """Gradients of copies to their homes, added in the order of the ranks, so that every run gives the same bits; those of the copies
        are zero then. After the last backward pass of a step, before the optimizer and any reduction of experts' gradients. Collective."""
        if self._checks():
            self._meet("push_grads()", self._spoilt())
        self._push()

    @torch.no_grad()
    def update(self, planner: Planner | None = None, *, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
        """Follows a new placement of the planner (or of another one of the same sizes and ranks), between two micro-batches or two steps,
        when no backward pass is outstanding. Gradients of copies go home first, so none is lost. Experts whose home moves take along their
        weights, gradients, registered tensors and state in optimizers (tensors of the parameter's shape). Then copies that are new are
        pulled, or all where weights have changed since the last pull. Where a rank refuses, all do, and nothing has changed. Collective.
        """
        refused, rows, planner = self._spoilt(), self._rows, planner or self.planner
        try:
            sizes = (planner.ep_size, planner.rank or 0, planner.n_routed_experts, planner.n_logical_routed_experts, planner.tokens)
            if sizes != (self.n_ranks, self.rank, len(self.row_of_slot), len(self.homes), "own"):
                raise broken_rule("planner", f"must have the ranks and sizes of {self.planner!r}", repr(planner))
            rows = Rows(_phy2log(planner), self.n_ranks, self.slack, self._rows)
        except LplbError as error:
            refused = refused or error
        state = {**self._registered, **self._state_of(optimizers)}
        refused = refused or next((why for name in sorted(state) if (why := self._unmovable(name, state[name]))), None)
        grads = self._outstanding or any(held.main or held.parameter.grad is not None for held in self._held.values())
        stale = any(held.parameter._version != held.pulled for held in self._held.values())
        any_grads, any_stale = self._meet(f"update() to {rows.digest()} with {sorted(state)}", refused, grads, stale)

        if any_grads:
            self._push()
        tensors = [held.weights[: len(self.own)] for held in self._held.values()] + [state[name] for name in sorted(state)]
        self._move_homes(rows, tensors + [held.own_grad for held in self._held.values() if any_grads])
        before, self.planner = self._rows, planner
        self._follow(rows)
        self._pull(None if any_stale else before)
        self.version += 1

    def close(self) -> None:
        """Ends the use of the peers' memory on this rank; waits for the device. Not collective; also done when the object dies. The tensors
        can be used on: over NVLink their memory is freed with the last of them, once all ranks have closed and next make an exchange or
        other replicas on the group, or call lplb.exchange.release. CUDA graphs that hold pull() or push_grads() must not be replayed then.
        """
        self.transport.close()

    # ---- copies and pickles ----

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Another object with a planner of its own; the parameters, which are copied or pickled with it or with the module that holds them,
        move into its buffers, and pull() is called. Gradients are left out, as torch does. Collective."""
        self.check_placement()
        held = {name: (one.parameter, one.grads.dtype if one.main else None) for name, one in self._held.items()}
        state = {"held": held, "registered": self._registered, "rows": self._rows, "version": self.version}
        return type(self)._again, (type(self), self.planner, self._asked, self.slack), state

    @staticmethod
    def _again(kind: type[Replicas], planner: Planner, transport: str, slack: int) -> Replicas:
        replicas = kind.__new__(kind)
        Replicas.__init__(replicas, planner, transport=transport, slack=slack)
        return replicas

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows: Rows = state["rows"]
        self.own = torch.empty(rows.own[self.rank], dtype=torch.int64, device=self._device)
        self._follow(rows)
        self.version, self._registered = state["version"], state["registered"]
        for name, (parameter, grad_dtype) in state["held"].items():
            self._hold(name, parameter.shape[1:], parameter.dtype, grad_dtype, parameter)
        self.pull()

    # ---- how ----

    def _follow(self, rows: Rows) -> None:
        self._rows, self.homes, self._digest, self._placement = rows, rows.homes, rows.digest(), self.planner.phy2log
        self.own.copy_(torch.tensor(rows.experts[self.rank][: rows.own[self.rank]], dtype=torch.int64))
        self.row_of_slot.copy_(torch.tensor(rows.row_of_slot, dtype=torch.int64))
        self.transport.place(rows)

    def _pull(self, known: Rows | None) -> None:
        self.transport.pull([held.weights for held in self._held.values()], known)
        for held in self._held.values():
            held.pulled = held.parameter._version

    def _push(self) -> None:
        for held in self._held.values():
            held.adopt()
        self.transport.push([held.grads for held in self._held.values()])
        self._outstanding = False

    def _move_homes(self, rows: Rows, tensors: list[Tensor]) -> None:
        """From the homes in force to those of rows: rows of own experts leave and arrive; those that stay free are zero."""
        moves = rows.home_moves(self._rows)
        free = [row for row, expert in enumerate(rows.experts[self.rank][: len(self.own)]) if expert < 0]
        for tensor in tensors:
            arrivals = self.transport.arrivals(moves, tensor)
            tensor[free] = 0
            for move, arrived in arrivals:
                tensor[move.target.row] = arrived

    def _state_of(self, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
        """The optimizers' tensors of the parameters' shape, such as moments. A parameter's shape has a row for each own expert."""
        return {f"{key} of {name} in optimizer {index}": value
                for index, optimizer in enumerate(optimizers) for name, held in self._held.items()
                for key, value in optimizer.state.get(held.parameter, {}).items()
                if isinstance(value, Tensor) and value.shape == held.parameter.shape}

    def _unmovable(self, name: str, tensor: Tensor) -> LplbError | None:
        if tensor.dim() and len(tensor) == len(self.own) and tensor.is_contiguous() and tensor.device == self.own.device:
            return None
        return broken_rule(name, f"must be contiguous on {self.own.device}, with a row for each of the {len(self.own)} own rows",
                           f"shape {list(tensor.shape)} on {tensor.device}")

    def _find(self, name: str) -> _Held:
        if name not in self._held:
            raise broken_rule("name", f"must be one of {', '.join(self._held) or 'no parameters yet'}", name)
        return self._held[name]

    def _spoilt(self) -> LplbError | None:
        """Why the buffers cannot be used."""
        for name, held in self._held.items():
            if len(self.own) and held.parameter.data_ptr() != held.weights.data_ptr():
                return broken_rule("parameter", "must keep its memory, which module.to() and assigning .data replace", name)
        return None

    def _checks(self) -> bool:
        return self._device.type == "cpu" or self.planner.debug

    def _meet(self, call: str, refused: LplbError | None = None, *flags: bool) -> list[bool]:
        """Finds out that all ranks make the same call, or why one cannot. Returns for each flag whether it is set on any rank."""
        group = self.planner.ep_group
        if group is None:
            if refused or self.n_ranks > 1:
                raise refused or WrongOrder("replicas: the planner is closed, or its process group is destroyed")
            return list(flags)
        tensors = [f"{name} {list(held.weights.shape)} {held.weights.dtype} {held.grads.dtype}" for name, held in self._held.items()]
        state = f"{call} in version {self.version} of placement {self._digest} with {', '.join(tensors) or 'no parameters'}"
        with on_device(_c.DEVICE_CPU if self._device.index is None else self._device.index):
            everyone = [json.loads(theirs) for theirs in gather_bytes(
                group, REPLICAS, json.dumps([state, str(refused or ""), flags]).encode(), Waiting(f"replicas: rank {self.rank}", 0))]
        for rank, (theirs, words, _) in enumerate(everyone):
            if words:
                raise InvalidArgument(words)
            if theirs != everyone[0][0]:
                raise Disagreement(
                    f"replicas: all ranks must make the same call, but rank {rank} calls {theirs}, and rank 0 {everyone[0][0]}")
        return [any(values) for values in zip(*(flags for _, _, flags in everyone))]


def _phy2log(planner: Planner) -> Int32s:
    return host_integers("phy2log", planner.phy2log, 1, np.int32, _c.MAX_PHYSICAL)
