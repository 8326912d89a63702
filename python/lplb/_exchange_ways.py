"""The ways to make a native exchange: who allocates the buffers and how the peers map them.

A way is a generator of steps. Each step is local (but for PyTorch's own rendezvous) and may fail on one rank alone; what it yields is
shown to all ranks of the node, and the next step comes only if no rank has failed.
"""

from __future__ import annotations

import ctypes
import os
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from . import _c as _native, _exchange_c
from ._exchange import Layout, Rail, policy_number, timeout_ms


@dataclass
class Order:
    """What is to be made, the same on all ranks but for the rank itself."""

    local_group: Any  #: the ranks of this node; the group itself on one node
    device: int
    layout: Layout
    n_counts: int
    rail: Rail | None
    timeout: float
    policy: str
    first_epoch: int

    def config(self) -> _exchange_c.ExchangeConfig:
        return _exchange_c.ExchangeConfig(
            struct_size=ctypes.sizeof(_exchange_c.ExchangeConfig), device=self.device, policy=policy_number(self.policy),
            n_ranks=self.layout.per_node, rank=self.layout.local_rank, n_counts=self.n_counts, n_nodes=self.layout.n_nodes,
            node=self.layout.node, timeout_ms=timeout_ms(self.timeout), first_epoch=self.first_epoch,
            rail=None if self.rail is None else ctypes.pointer(self.rail.ops))


Steps = Generator[Any, "list[Any]", None]


class Way(ABC):
    kind: str

    def __init__(self, order: Order) -> None:
        self.order = order
        self.functions = _exchange_c.load()
        self.pointer: int | None = None
        self.keep: list[Any] = []

    def made(self, pointer: int | None) -> None:
        """An exchange of the library exists; from now on it owns what is behind the rail."""
        self.pointer = pointer
        if self.order.rail is not None:
            self.order.rail.taken = True

    @abstractmethod
    def steps(self) -> Steps:
        """Sets pointer and keep; yields what the other ranks must know, is sent what all ranks of the node have yielded."""

    def give_up(self) -> None:
        """Stops using the peers' memory, so that they may free it."""
        if self.pointer is not None:
            self.functions.close(self.pointer)

    def abort(self) -> None:
        """Lets free() do without the other ranks."""
        if self.pointer is not None:
            self.functions.abort(self.pointer)

    def free(self) -> None:
        """After give_up() on every rank."""
        pointer, self.pointer = self.pointer, None
        if pointer is not None:
            self.functions.destroy(pointer)
        self.keep = []

    def _check(self, status: int, message: Any) -> None:
        if status:
            raise _native.failure(status, _native.text(message.value))


class Ipc(Way):
    """The library's own memory, mapped by CUDA IPC."""

    kind = "ipc"

    def steps(self) -> Steps:
        blob = ctypes.create_string_buffer(_exchange_c.BLOB_BYTES)
        message = ctypes.create_string_buffer(_native.MESSAGE_SIZE)
        pointer = ctypes.c_void_p()
        config = self.order.config()
        self._check(self.functions.begin(ctypes.byref(config), ctypes.byref(pointer), blob, message, len(message)), message)
        self.made(pointer.value)
        blobs = yield blob.raw
        status = self.functions.finish(self.pointer, b"".join(blobs))
        if status:
            raise _native.failure(status, _native.text(self.functions.error(self.pointer)))


class SymmetricMemory(Way):
    """PyTorch's symmetric memory: it allocates and maps, the library uses the pointers."""

    kind = "symm"

    def steps(self) -> Steps:
        import torch.distributed._symmetric_memory as symmetric

        message = ctypes.create_string_buffer(_native.MESSAGE_SIZE)
        size = ctypes.c_int64()
        config = self.order.config()
        self._check(self.functions.buffer_bytes(ctypes.byref(config), ctypes.byref(size), message, len(message)), message)
        tensor = symmetric.empty(size.value // 8, dtype=torch.int64, device=torch.device("cuda", self.order.device))
        yield None
        with no_multicast():
            handle = symmetric.rendezvous(tensor, self.order.local_group)
        self.keep += [tensor, handle]
        # The pointers are those of each rank's allocation, in which its tensor may stand anywhere.
        offsets = yield tensor.data_ptr() - handle.buffer_ptrs[handle.rank]
        buffers = (ctypes.c_void_p * len(offsets))(*(start + at for start, at in zip(handle.buffer_ptrs, offsets)))
        pointer = ctypes.c_void_p()
        self._check(self.functions.create(ctypes.byref(config), buffers, ctypes.byref(pointer), message, len(message)), message)
        self.made(pointer.value)


WAYS: dict[str, type[Way]] = {"symm": SymmetricMemory, "ipc": Ipc}


@contextmanager
def no_multicast() -> Iterator[None]:
    """PyTorch would set up NVLink multicast beside the peers' pointers; the exchange has no use for it."""
    name = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
