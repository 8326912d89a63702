"""What a rank keeps for a process group between calls of lplb.exchange.create. It belongs to the group as an object, never to its name, which
the next group may have as well, and ends with it."""

from __future__ import annotations

import logging
import weakref
from typing import Any

from ._exchange import NativeExchange, Rail
from ._exchange_ways import Way

log = logging.getLogger("lplb.exchange")


class Attempt:
    """What one try to make an exchange has made so far. Taken back in two steps, since peers may still write to memory of this rank:
    leave(), and once all ranks have left, free()."""

    def __init__(self) -> None:
        self.rail: Rail | None = None
        self.way: Way | None = None
        self.exchange: NativeExchange | None = None  # which owns what the way has made

    def leave(self) -> None:
        if self.exchange is not None:
            self.exchange.close()
        elif self.way is not None:
            self.way.give_up()

    def free(self, together: bool = True) -> None:
        """together: every rank does the same now; otherwise what takes all ranks to free is left to the end of the process."""
        made = self.exchange or self.way
        if not together:
            if made is not None:
                made.abort()
            if self.rail is not None:
                self.rail.abandon()
        if made is not None:
            made.free()
        if self.rail is not None and not self.rail.taken:
            self.rail.free()


class GroupState:
    """Of one process group on this rank."""

    def __init__(self) -> None:
        self.made = 0  #: exchanges, which all ranks number alike
        self.closed: dict[int, NativeExchange] = {}  #: that other ranks may still be using
        self.left: list[Attempt] = []  #: attempts that this rank has left by an exception of its own
        self.rails_aborted = False  #: the communicators of the subgroups cannot be used any more
        self._subgroups: dict[int, tuple[weakref.ref[Any], weakref.ref[Any]]] = {}

    def subgroups(self, n_nodes: int) -> tuple[Any, Any] | None:
        """The node's and the rail's group of an earlier exchange, None where they do not exist any more."""
        node, along = (known() for known in self._subgroups.get(n_nodes, (_nothing, _nothing)))
        return None if node is None or along is None else (node, along)

    def keep_subgroups(self, n_nodes: int, node: Any, along: Any) -> None:
        self._subgroups[n_nodes] = (weakref.ref(node), weakref.ref(along))

    def drop_subgroups(self) -> None:
        self.rails_aborted = False
        self._subgroups.clear()

    def facts(self) -> tuple[dict[int, bool], bool]:
        """What the other ranks must know: which exchanges are closed here, and whether in peace; whether the rails were aborted."""
        return {number: _in_peace(exchange) for number, exchange in self.closed.items()}, self.rails_aborted

    def settle(self, everyone: list[tuple[dict[int, bool], bool]]) -> None:
        """Frees what no rank uses any more, by the facts of all ranks."""
        aborted = any(aborted for _, aborted in everyone)
        for number in sorted(set.intersection(*(set(closed) for closed, _ in everyone))):
            exchange = self.closed.pop(number)
            if not all(closed[number] for closed, _ in everyone):
                exchange.abort()  # so that freeing waits for no rank
                aborted = True
            exchange.free()
        left, self.left = self.left, []
        for attempt in left:  # every rank has come out of that create(), or it would not be here
            attempt.free(together=False)
        if aborted:
            self.drop_subgroups()

    def end(self) -> None:
        """The group is gone, and with it all that its exchanges could still be used for."""
        for exchange in self.closed.values():
            exchange.abort()
            exchange.free()
        for attempt in self.left:
            attempt.free(together=False)
        self.closed, self.left = {}, []


def _in_peace(exchange: NativeExchange) -> bool:
    """Nobody waits for anybody: also after ranks disagreed, since all of them found out in the same call, which they all ended."""
    report = exchange.report()
    return report is None or report.reason == "disagreed"


def _nothing() -> None:
    return None


_states: weakref.WeakKeyDictionary[Any, GroupState] = weakref.WeakKeyDictionary()


def state_of(group: Any) -> GroupState:
    state = _states.get(group)
    if state is None:
        state = _states[group] = GroupState()
        weakref.finalize(group, state.end).atexit = False
    return state
