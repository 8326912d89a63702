"""The layout of a dispatch: where the rows of a batch go, as Planner.layout() hands it out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

from . import _c
from ._ops.arguments import integer
from ._ops.calls import Calls, layout_sections
from ._ops.host import A, loaded_torch, shape_of
from .errors import LplbError, WrongOrder, broken_rule

if TYPE_CHECKING:
    from .planner import Planner


class Splits(NamedTuple):
    """Numbers of rows, on the host."""

    sent: list[int]  #: to each rank
    received: list[int]  #: from each rank
    rows: list[int]  #: for each buffer row


class Layout(Generic[A]):
    """Where the rows of a dispatch go. A choice is one of the tokens * k pairs of a token and an expert, a row a choice's token on its way.

        layout = planner.layout(physical)
        splits = layout.wait()                                          # the one place where a GPU is waited for
        choices = layout.order[: sum(splits.sent)]
        all_to_all_single(arrived, tokens[choices // k], splits.received, splits.sent)
        rows = arrived[layout.by_row]                                   # for torch._grouped_mm(rows, weights, offs=layout.ends)

    Arrays are on the planner's device and of the kind of physical. A later plan changes none of them, so that a layout can be kept as long
    as its ids, for instance for the backward pass.
    """

    order: A  #: int64 [choices] the choices by rank and then buffer row, stable; those without an expert last
    sent_rows: A  #: int32 [ep_size, n_rows] rows for each buffer row of each rank
    received_rows: A  #: int32 [ep_size, n_rows] rows from each rank for each buffer row of this one
    ends: A  #: int32 [n_rows] rows received for the buffer rows 0 .. i

    def __init__(self, planner: Planner, calls: Calls[A], physical: A, experts: A | None, received: Callable[[A], A] | None,
                 row_of_slot: A | None, n_rows: int, max_received: int | None) -> None:
        self._calls: Calls[A] = calls
        n_ranks, self._max_received = planner.ep_size, max_received
        self._of = planner.number, n_ranks, n_rows
        self._rule = f"must be -1 .. {planner.n_routed_experts - 1}, slots of the planner's placement"
        if row_of_slot is not None:
            self._rule += f", whose row_of_slot is 0 .. {n_rows - 1}"
        self.order, words = calls.layout(physical, experts, row_of_slot, planner._token(), *self._of, received is None)
        begin = layout_sections(n_ranks, n_rows)
        if received is not None:
            mine: Any = words[begin.sent : begin.sent + n_ranks * n_rows].reshape(n_ranks, n_rows)
            # -1 to everybody where the ids are wrong, so that no rank goes on to wait for the rows of one that raises.
            theirs = received(mine - (mine + 1) * (words[:1] != 0))
            if shape_of(theirs) != [n_ranks, n_rows]:
                got = f"shape {shape_of(theirs)}" if hasattr(theirs, "shape") else type(theirs).__name__
                raise broken_rule("received", f"must return [{n_ranks}, {n_rows}]", got)
            words = calls.layout_received(words, theirs, *self._of)
        self._words: A = words
        self._splits: Splits | None = None
        self._event: Any = None  # behind the copy to pinned memory
        self._captured = False
        self.sent_rows = words[begin.sent : begin.sent + n_ranks * n_rows].reshape(n_ranks, n_rows)
        self.received_rows = words[begin.received : begin.received + n_ranks * n_rows].reshape(n_ranks, n_rows)
        self.ends = words[begin.ends : begin.ends + n_rows]
        self._numbers: A = words[: _c.LAYOUT_RANKS + 2 * n_ranks + n_rows]
        self._by_row: A | None = None if max_received is None else calls.layout_by_row(words, *self._of, max_received)
        if planner._handle.device >= 0:
            self._send_to_host()
        else:
            self.wait()

    def _send_to_host(self) -> None:
        """Queues the copy of the numbers to pinned memory. Not in a captured graph, whose replays would need an event each."""
        torch = loaded_torch()
        self._captured = torch.cuda.is_current_stream_capturing()
        if not self._captured:
            numbers: Any = self._numbers
            self._pinned = torch.empty(numbers.shape, dtype=torch.int32, pin_memory=True).copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(numbers.device))

    def wait(self) -> Splits:
        """Numbers of rows on the host; waits for the GPU, once. Of a layout that a CUDA graph captured, those of the latest replay on the
        current stream, at each call. Raises where something is wrong with the ids or what was received."""
        if self._splits is None:
            if self._event is not None:
                self._event.synchronize()
            numbers = (self._numbers if self._event is None else self._pinned).tolist()
            self._check(numbers)
            _, n_ranks, _ = self._of
            sent, received = _c.LAYOUT_RANKS, _c.LAYOUT_RANKS + n_ranks
            splits = Splits(numbers[sent:received], numbers[received : received + n_ranks], numbers[received + n_ranks :])
            self._splits = None if self._captured else splits
            return splits
        return self._splits

    @property
    def by_row(self) -> A:
        """int64 [rows received, or max_received]: brings the rows as they come, by rank and then buffer row, together by buffer row and
        then rank. Without max_received, made at the first use, after wait()."""
        by_row = self._by_row
        if by_row is None:
            if self._captured:
                raise broken_rule("max_received", "must be given for by_row in a captured CUDA graph", None)
            by_row = self._by_row = self._calls.layout_by_row(self._words, *self._of, sum(self.wait().received))
        return by_row

    def _check(self, numbers: list[int]) -> None:
        found: LplbError | None = None
        problems = numbers[0] | numbers[1]
        if problems & _c.LAYOUT_BAD_IDS:
            found = broken_rule("physical", self._rule, f"{numbers[_c.LAYOUT_N_BAD_IDS]} ids that are not")
        elif problems & _c.LAYOUT_OTHER_EXPERTS:
            found = broken_rule("physical", "must be slots that hold the given experts under the planner's placement",
                                f"{numbers[_c.LAYOUT_N_OTHER_EXPERTS]} ids of other experts")
        elif problems & _c.LAYOUT_NO_PLAN:
            found = WrongOrder("layout: there is no plan for this placement yet; run() or solve() and redirect() must come first")
        elif problems & _c.LAYOUT_OTHER_PLAN:
            found = WrongOrder("layout: physical must be the ids of the planner's latest plan, from which follows what other ranks send; "
                               "for ids of an earlier one keep their layout, or give received=")
        elif problems & _c.LAYOUT_BAD_RECEIVED:
            found = broken_rule("received", "must return numbers of rows, at least 0 each and below 2^31 together (-1 comes from a rank "
                                "whose ids are wrong: its words say how)", "others")
        elif problems & _c.LAYOUT_BY_ROW_SHORT or (self._max_received is not None and numbers[_c.LAYOUT_N_RECEIVED] > self._max_received):
            found = broken_rule("max_received", "must be at least the number of rows that are received", f"{self._max_received}, and "
                                f"{numbers[_c.LAYOUT_N_RECEIVED]} rows")
        if found:
            raise found


def lay_out(planner: Planner, physical: A, experts: A | None, received: Callable[[A], A] | None, row_of_slot: A | None,
            n_rows: int | None, max_received: int | None) -> Layout[A]:
    """Planner.layout."""
    rows = planner.n_local_routed_experts if n_rows is None else integer("n_rows", n_rows, 1, _c.MAX_LAYOUT_ROWS // planner.ep_size)
    most = None if max_received is None else integer("max_received", max_received, 0, _c.MAX_IDS)
    if received is None and planner._config.rank == _c.WHOLE_BATCH and planner.ep_size > 1:
        raise broken_rule("received", "must be given where the planner plans for no rank of its own and does not know who sends what",
                          repr(planner))
    calls = planner._calls("physical", physical)
    arrays = {name: array for name, array in (("physical", physical), ("experts", experts), ("row_of_slot", row_of_slot))
              if array is not None}
    return planner._explained(tuple(arrays), lambda *_: Layout(planner, calls, physical, experts, received, row_of_slot, rows, most),
                              *arrays.values())
