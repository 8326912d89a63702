"""The native planner behind a Planner, and the registry through which the torch operators find it by number."""

from __future__ import annotations

import ctypes
import itertools
import math
from typing import TYPE_CHECKING, Any

from . import _native
from .errors import LplbError, WrongOrder, broken_rule

if TYPE_CHECKING:
    from ._exchange import Exchange

# Operators take numbers, not objects. Never 0 or 1, which torch.compile would specialise on.
_numbers = itertools.count(2)
handles: dict[int, Handle] = {}


class Handle:
    """Owns one lplb_planner. Holds what a call needs, read once: `run` is counted in microseconds."""

    __slots__ = ("library", "pointer", "number", "device", "n_logical", "n_physical", "ep_size", "rank", "exchange",
                 "debug", "has_replicas", "n_ratios", "planner_run")

    def __init__(self, library: _native.Library, config: _native.Config) -> None:
        pointer = ctypes.c_void_p()
        message = ctypes.create_string_buffer(_native.MESSAGE_SIZE)
        status = library.planner_create(ctypes.byref(config), ctypes.byref(pointer), message, len(message))
        if status:
            raise _native.failure(status, _native.text(message.value))
        self.library = library
        self.pointer: int | None = pointer.value
        self.planner_run = library.planner_run
        self.device: int = config.device  # as torch's Tensor.get_device(): -1 on the CPU, else the CUDA ordinal
        self.n_logical: int = config.n_logical
        self.n_physical: int = config.n_physical
        self.ep_size: int = config.ep_size
        self.rank: int = config.rank
        self.exchange: Exchange | None = None  # None: the counts given are everybody's
        self.debug = False
        self.has_replicas = self.n_physical > self.n_logical
        self.n_ratios: int = config.ep_size * config.n_redundant  # 0: no slot classes, and so no ratios
        self.number = next(_numbers)
        handles[self.number] = self

    def close(self) -> None:
        """Ends the native planner; once is enough, more is harmless."""
        handles.pop(self.number, None)
        pointer, self.pointer = self.pointer, None
        if pointer is not None:
            self.library.planner_destroy(pointer)
        self.use(None)

    def use(self, exchange: Exchange | None) -> None:
        """Takes another exchange, or none, and lets go of the one before: that ends with its last planner, if a planner made it."""
        before, self.exchange = self.exchange, exchange
        if exchange is not None:
            exchange.join(self.number)
        if before is not None and before is not exchange:
            before.leave(self.number)

    def check(self, status: int) -> None:
        """Raises unless status is LPLB_OK."""
        if status:
            raise self.failure(status)

    def failure(self, status: int) -> LplbError:
        # The words on the planner belong to the thread that is inside it, so a refused one must not read them.
        busy = status == _native.ERROR_BUSY or self.pointer is None
        return _native.failure(status, "" if busy else _native.text(self.library.planner_error(self.pointer)))

    def check_sizes(self, name: str, size: int, wanted: int) -> None:
        """The header's calls take no size for these arrays, so it is checked before an address is handed over."""
        if size != wanted:
            raise broken_rule(name, f"must have {wanted} elements", size)

    def sources(self, name: str, shape: Any) -> int:
        """How many ranks' counts an array of this shape holds: one's (or everybody's sum), or each rank's."""
        size = math.prod(shape)
        if size == self.n_logical:
            return 1
        if tuple(shape) == (self.ep_size, self.n_logical):
            return self.ep_size
        rule = f"must have n_logical = {self.n_logical} elements or be [{self.ep_size}, {self.n_logical}]"
        raise broken_rule(name, rule, f"shape {list(shape)}")

    def opened(self) -> int:
        if self.pointer is None:
            raise closed()
        return self.pointer


def find(number: int) -> Handle:
    handle = handles.get(number)
    if handle is None:
        raise closed()
    return handle


def closed() -> WrongOrder:
    return WrongOrder("planner: must not be used after close()")
