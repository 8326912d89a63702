"""The native planner behind a Planner, and the registry through which the torch operators find it by number."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..errors import LplbError, WrongOrder, broken_rule
from .library import Library, call, failure, text
from .structs import ERROR_BUSY, MAX_PHYSICAL, Config

if TYPE_CHECKING:
    from ..exchange import Exchange
    from .._ops.host import Array

# Operators take numbers, not objects. Never 0 or 1, which torch.compile would specialise on.
_numbers = itertools.count(2)
handles: dict[int, Handle] = {}


class Native(ctypes.c_void_p):
    """One lplb_planner, and what a call hands to the library in its place.

    Whoever is inside a call holds a reference, so a planner that another thread closes meanwhile ends when the last of these calls
    returns, and costs them no lock and no counting but Python's own.
    """

    library: Library
    at_end: Callable[[], None] | None = None

    def __del__(self) -> None:
        self.library.planner_destroy(self.value)
        if self.at_end is not None:
            self.at_end()


class Handle:
    """Owns one lplb_planner. Holds what a call needs, read once: `run` is counted in microseconds."""

    __slots__ = ("library", "native", "pointer", "number", "device", "n_logical", "n_physical", "ep_size", "rank", "exchange",
                 "debug", "compare", "width", "has_replicas", "n_ratios", "planner_run", "forked")

    def __init__(self, library: Library, config: Config) -> None:
        self.library, native = library, Native()
        native.library = library
        call(library.planner_create, ctypes.byref(config), ctypes.byref(native))
        self.native: Native | None = native  #: None after close()
        self.pointer: int | None = native.value  #: its address, which keeps nothing alive
        self.planner_run = library.planner_run
        self.device: int = config.device  # as torch's Tensor.get_device(): -1 on the CPU, else the CUDA ordinal
        self.n_logical: int = config.n_logical
        self.n_physical: int = config.n_physical
        self.ep_size: int = config.ep_size
        self.rank: int = config.rank
        self.exchange: Exchange | None = None  # None: the counts given are everybody's
        self.debug = self.forked = False
        self.compare: Callable[[Array], None] | None = None  # of the ids with those of the other ranks
        self.width: int = library.counts_width(config.n_logical)
        self.has_replicas = self.n_physical > self.n_logical
        self.n_ratios: int = config.ep_size * config.n_redundant  # 0: no slot classes, and so no ratios
        self.number = next(_numbers)
        handles[self.number] = self

    def close(self) -> None:
        """Ends the native planner, as soon as no other thread is inside a call; once is enough, more is harmless."""
        handles.pop(self.number, None)
        native, self.native, self.pointer = self.native, None, None
        if native is not None and self.exchange is not None:
            native.at_end = partial(self.exchange.leave, self.number)

    def leave_to_parent(self) -> None:
        """In a forked process: the native planner on a GPU is the parent's, and not even its end may be asked for here."""
        native, self.native, self.pointer, self.forked = self.native, None, None, True
        if native is not None:
            native.value, native.at_end = None, None

    def check(self, status: int) -> None:
        """Raises unless status is LPLB_OK."""
        if status:
            raise self.failure(status)

    def failure(self, status: int) -> LplbError:
        native = self.native
        if native is None:
            return self.ended()
        # The words on the planner belong to the thread that is inside it, so a refused one must not read them.
        return failure(status, "" if status == ERROR_BUSY else text(self.library.planner_error(native)))

    def check_sizes(self, name: str, size: int, wanted: int) -> None:
        """The header's calls take no size for these arrays, so it is checked before an address is handed over."""
        if size != wanted:
            raise broken_rule(name, f"must have {wanted} elements", size)

    def check_shapes(self, ratio_shape: list[int], scaled_shape: list[int]) -> None:
        """The shapes of solve's outputs, before they are allocated. Without ratios the library writes none, and any number will do that a
        topology can have."""
        for name, shape in (("ratio_shape", ratio_shape), ("scaled_shape", scaled_shape)):
            if any(size < 0 for size in shape):
                raise broken_rule(name, "must hold sizes of at least 0", list(shape))
        self.check_sizes("scaled_shape", math.prod(scaled_shape), self.n_logical)
        n_ratios, most = math.prod(ratio_shape), self.ep_size * MAX_PHYSICAL
        if self.n_ratios:
            self.check_sizes("ratio_shape", n_ratios, self.n_ratios)
        elif n_ratios > most:
            raise broken_rule("ratio_shape", f"must have at most {most} elements", n_ratios)

    def sources(self, name: str, shape: Sequence[int]) -> int:
        """How many ranks' counts an array of this shape holds: one's (or everybody's sum), or each rank's."""
        size = math.prod(shape)
        if size == self.n_logical:
            return 1
        if tuple(shape) == (self.ep_size, self.n_logical):
            return self.ep_size
        rule = f"must have n_logical = {self.n_logical} elements or be [{self.ep_size}, {self.n_logical}]"
        raise broken_rule(name, rule, f"shape {list(shape)}")

    def opened(self) -> Native:
        """What to give the library, held while the call lasts."""
        native = self.native
        if native is None:
            raise self.ended()
        return native

    def ended(self) -> WrongOrder:
        """Why there is no native planner any more."""
        return WrongOrder(f"planner: {FORKED}") if self.forked else closed()


FORKED = ("belongs to the process that this one was forked from, and CUDA does not work in a forked process: start processes with "
          "multiprocessing's 'spawn' or 'forkserver', or plan with device='cpu' here")


def _after_fork() -> None:
    for handle in handles.values():
        if handle.device >= 0:
            handle.leave_to_parent()


os.register_at_fork(after_in_child=_after_fork)


def find(number: int) -> Handle:
    handle = handles.get(number)
    if handle is None:
        raise closed()
    return handle


def closed() -> WrongOrder:
    return WrongOrder("planner: must not be used after close()")
