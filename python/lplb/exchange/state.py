"""What a rank keeps for a process group between calls of lplb.exchange.create. It belongs to the group as an object, never to its name, which
the next group may have as well, and ends with it.

An exchange's memory is freed once every rank has closed it, since others may write to it until then. close() asks nobody, so the ranks
tell each other at the next create() or release()."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from . import library

if TYPE_CHECKING:
    from .native import NativeExchange
    from .rail import Rail

Facts = tuple["dict[int, bool]", bool]


class GroupState:
    """Of one process group on this rank."""

    def __init__(self) -> None:
        self.made = 0  #: exchanges, which all ranks number alike
        self.closed: dict[int, NativeExchange] = {}  #: that other ranks may still be using
        self.left: list[tuple[int | None, Rail | None]] = []  #: what this rank had made when an exception of its own ended create()
        self.rails_aborted = False  #: the communicators of the rails' groups cannot be used any more
        self._rail_groups: dict[int, weakref.ref[Any]] = {}

    def rail_group(self, n_nodes: int) -> Any:
        """The rail's group of an earlier exchange, None where it does not exist any more."""
        known = self._rail_groups.get(n_nodes)
        return None if known is None else known()

    def keep_rail_group(self, n_nodes: int, group: Any) -> None:
        self._rail_groups[n_nodes] = weakref.ref(group)

    def drop_rail_groups(self) -> None:
        self.rails_aborted = False
        self._rail_groups.clear()

    def facts(self) -> Facts:
        """What the other ranks must know: which exchanges are closed here, and whether in peace; whether the rails were aborted."""
        return {number: _in_peace(exchange) for number, exchange in self.closed.items()}, self.rails_aborted

    def settle(self, everyone: list[Facts]) -> None:
        """Frees what no rank uses any more, by the facts of all ranks."""
        aborted = any(aborted for _, aborted in everyone)
        for number in sorted(set.intersection(*(set(closed) for closed, _ in everyone))):
            exchange = self.closed.pop(number)
            if not all(closed[number] for closed, _ in everyone):
                exchange.abort()  # so that freeing waits for no rank
                aborted = True
            exchange.free()
        self._free_left()  # every rank has come out of that create(), or it would not be here
        if aborted:
            self.drop_rail_groups()

    def end(self) -> None:
        """The group is gone, and with it all that its exchanges could still be used for."""
        for exchange in self.closed.values():
            exchange.abort()
            exchange.free()
        self.closed = {}
        self._free_left()

    def _free_left(self) -> None:
        left, self.left = self.left, []
        for pointer, rail in left:
            if pointer is not None:
                library.load().abort(pointer)
                library.load().destroy(pointer)
            if rail is not None and not rail.taken:
                rail.abandon()
                rail.free()


def _in_peace(exchange: NativeExchange) -> bool:
    """Nobody waits for anybody: also after ranks disagreed, since all of them found out in the same call, which they all ended."""
    report = exchange.report()
    return report is None or report.reason == "disagreed"


_states: weakref.WeakKeyDictionary[Any, GroupState] = weakref.WeakKeyDictionary()


def state_of(group: Any) -> GroupState:
    state = _states.get(group)
    if state is None:
        state = _states[group] = GroupState()
        weakref.finalize(group, state.end).atexit = False
    return state
