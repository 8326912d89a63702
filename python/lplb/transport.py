"""How rows of replicas go from rank to rank: by torch.distributed, or by the library over NVLink."""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _c
from ._ops.host import address_of
from .errors import InternalError, LplbError, Unsupported, WrongOrder, broken_rule
from .exchange import Exchange, Report, create
from .exchange.gather import REPLICAS, Callback, Waiting, gather_objects
from .exchange.native import state_of
from .placement import Move, Place, Rows

TRANSPORTS = ("auto", "nvlink", "torch")

log = logging.getLogger("lplb.replicas")


class TorchTransport:
    """By torch.distributed, whatever its backend. Also what moves the homes of every transport."""

    kind = "torch"
    exchange: Exchange | None = None

    def __init__(self, group: Any, rank: int, device: torch.device) -> None:
        self.group, self.rank, self.device = group, rank, device

    def zeros(self, shape: Sequence[int], dtype: torch.dtype | None, kind: int) -> Tensor:
        """A buffer [rows, ...] of _c.WEIGHTS or _c.GRADIENTS. Collective."""
        return torch.zeros(tuple(shape), dtype=dtype, device=self.device)

    def place(self, rows: Rows) -> None:
        """Follows other rows."""
        self.rows = rows

    def pull(self, weights: Iterable[Tensor], known: Rows | None) -> None:
        """From homes to copies. known: the rows before these, whose copies are left out where they have stayed."""
        moves = self.rows.pulls(known)
        for tensor in weights:
            self.send(moves, tensor, tensor)

    def push(self, grads: Iterable[Tensor]) -> None:
        """From copies to homes, whose sums are in the order of the ranks; those of the copies are zero then."""
        rounds = self.rows.rounds()
        for tensor in grads:
            for moves in rounds:
                for move, arrived in self.arrivals(moves, tensor):
                    tensor[move.target.row] += arrived
            tensor[self.rows.own[self.rank]:].zero_()

    def close(self) -> None:
        """The end; see Replicas.close."""

    def arrivals(self, moves: list[Move], source: Tensor) -> list[tuple[Move, Tensor]]:
        """What comes to this rank in these moves, in memory of its own."""
        mine = [move for move in moves if move.target.rank == self.rank]
        arrived = source.new_empty((len(mine), *source.shape[1:]))
        number = {move: index for index, move in enumerate(mine)}
        self.send([Move(move.source, Place(move.target.rank, number.get(move, 0))) for move in moves], source, arrived)
        return list(zip(mine, arrived))

    def send(self, moves: list[Move], source: Tensor, target: Tensor) -> None:
        """Rows of source to rows of target. All sends and receives at once, so no rank waits for another's; between two ranks they match in
        the order of the moves."""
        operations = []
        for (from_rank, from_row), (to_rank, to_row) in moves:
            if from_rank == self.rank:
                operations.append(dist.P2POp(dist.isend, source[from_row], None, self.group, group_peer=to_rank))
            elif to_rank == self.rank:
                operations.append(dist.P2POp(dist.irecv, target[to_row], None, self.group, group_peer=from_rank))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()


class _Native:
    """One lplb_replicas with the exchange that it waits by. Its memory is freed once every rank has closed it, which the ranks tell each
    other as they do for exchanges, and no tensor uses it any more."""

    def __init__(self, pointer: int, exchange: Exchange) -> None:
        self.pointer, self.exchange, self.library = pointer, exchange, _c.load()
        self.state = state_of(exchange.group)
        self.number = self.state.made = self.state.made + 1
        self.ended = False

    def check(self, status: int) -> None:
        if status:
            raise _c.failure(status, "" if status == _c.ERROR_BUSY else _c.text(self.library.replicas_error(self.pointer)))

    def close(self) -> None:
        self.library.replicas_close(self.pointer)
        self.state.closed[self.number] = self
        self.exchange.close()

    def report(self) -> Report | None:
        return self.exchange.report()

    def abort(self) -> None:
        self.exchange.abort()

    def free(self) -> None:
        self.ended = True

    def __del__(self) -> None:
        if self.ended:
            self.library.replicas_destroy(self.pointer)


class _Memory:
    """Memory of the library's as torch takes it, which then holds this object."""

    def __init__(self, owner: _Native, address: int, size: int) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 2}


class NvlinkTransport(TorchTransport):
    """By the library: kernels that copy and add rows of peers, which CUDA IPC has mapped."""

    kind = "nvlink"

    def __init__(self, group: Any, rank: int, device: torch.device, rows: Rows, blocks: int = 0) -> None:
        """Unsupported, on all ranks, where a rank cannot be reached. Collective."""
        super().__init__(group, rank, device)
        self.exchange = create(group, device, 1, "ipc", n_nodes=1)
        pointer, failure = ctypes.c_void_p(), ""
        config = _c.ReplicasConfig(exchange=self.exchange.pointer, n_logical=rows.n_logical, n_rows=rows.n_rows, blocks=blocks)
        try:
            _c.call(_c.load().replicas_create, ctypes.byref(config), ctypes.byref(pointer))
        except LplbError as error:
            failure = f"rank {rank}: {error}"
        failures = [words for words in gather_objects(group, REPLICAS, failure, self._waiting()) if words]
        if failures or pointer.value is None:
            self.exchange.close()
            _c.load().replicas_destroy(pointer.value)
            raise Unsupported(failures[0])
        self._native = _Native(pointer.value, self.exchange)
        self._end = weakref.finalize(self, self._native.close)
        self._end.atexit = False

    def zeros(self, shape: Sequence[int], dtype: torch.dtype | None, kind: int) -> Tensor:
        dtype = dtype or torch.get_default_dtype()
        name = str(dtype).removeprefix("torch.")
        if kind == _c.GRADIENTS and name not in _c.FLOATS:
            raise Unsupported(f"grad_dtype: must be one of {', '.join(_c.FLOATS)} over NVLink, got {name}")
        size = torch.Size(shape).numel() * dtype.itemsize
        if not size:
            return super().zeros(shape, dtype, kind)
        address, native = ctypes.c_void_p(), self._open()

        def add(message: Any, room: int) -> int:
            status = native.library.replicas_add(native.pointer, ctypes.byref(tensor), ctypes.byref(address))
            message.value = native.library.replicas_error(native.pointer)[: room - 1] if status else b""
            return status

        assert self.device.index is not None
        gather = Callback(self.group, REPLICAS, self._waiting(), self.device.index)
        tensor = _c.ReplicasTensor(kind=kind, dtype=_c.FLOATS.get(name, 0), row_bytes=size // shape[0], gather=gather.function)
        if failure := gather.call(add):
            raise failure
        assert address.value is not None
        given = torch.as_tensor(_Memory(native, address.value, size), device=self.device)
        if given.data_ptr() != address.value:
            raise InternalError("replicas: torch has copied the memory that it was to use")
        return given.view(dtype).view(tuple(shape))

    def place(self, rows: Rows) -> None:
        super().place(rows)
        native = self._open()
        native.check(native.library.replicas_place(native.pointer, address_of(rows.table), self._stream()))

    def pull(self, weights: Iterable[Tensor], known: Rows | None) -> None:
        native = self._open()
        native.check(native.library.replicas_pull(native.pointer, known is not None, self._stream()))

    def push(self, grads: Iterable[Tensor]) -> None:
        native = self._open()
        native.check(native.library.replicas_push(native.pointer, self._stream()))

    def close(self) -> None:
        self._end()

    def _open(self) -> _Native:
        if not self._end.alive:
            raise WrongOrder("replicas: must not be used after close()")
        return self._native

    def _waiting(self) -> Waiting:
        return Waiting(f"replicas: rank {self.rank}", 0)

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream


def connect(kind: str, group: Any, rank: int, n_ranks: int, device: torch.device, rows: Rows) -> TorchTransport:
    """The transport of that kind, the same on all ranks. Collective."""
    reason = ""
    if kind == "torch" or (kind == "auto" and (device.type != "cuda" or n_ranks == 1)):
        return TorchTransport(group, rank, device)
    if device.type != "cuda" or group is None:
        raise broken_rule("transport", "must be auto or torch, since NVLink joins GPUs of several ranks", kind)
    try:
        return NvlinkTransport(group, rank, device, rows)
    except Unsupported as error:
        if kind == "nvlink":
            raise
        reason = str(error)
    if rank == 0:
        log.warning("lplb: replicas move by torch.distributed; nothing faster: %s", reason)
    return TorchTransport(group, rank, device)
