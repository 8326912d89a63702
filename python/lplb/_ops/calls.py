"""The planner's calls, written once for numpy arrays and torch tensors. operators.py makes PyTorch operators of them.

A planner is passed as its number (Planner.number). On CUDA the calls work on the current stream and do not wait. With a process group
they exchange the counts of all ranks inside, so all ranks must make them in the same order. `plan` is for compilers, see operators.py.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

import numpy as np
import numpy.typing as npt

from .._c.handle import Handle, closed, find, handles
from .._c.structs import (
    INT32, INT64, LAYOUT_BY_ROW, LAYOUT_RANKS, LAYOUT_RECEIVED, LAYOUT_SENT, MAX_CHUNKS, MAX_IDS, MAX_LAYOUT_ROWS, LayoutStruct)
from ..errors import LplbError, broken_rule
from .host import A, Array, address_of, is_masked, is_tensor, loaded_torch, to_host

if TYPE_CHECKING:
    import torch

# Contiguous memory on the planner's device: address, type (LPLB_INT32 or LPLB_INT64 where the library asks for one), number of elements,
# and the array that owns it. A plain tuple, since run makes two of them and is counted in tenths of a microsecond.
Buffer = tuple[int, int, int, A]


def make_run(calls: Calls[A]) -> Callable[[A, Array | None, int, int], A]:
    """Calls.run. It is counted in tenths of a microsecond, so what it uses of the calls is looked up once."""
    buffer, count_in, empty_like, address_in, stream_of = calls.buffer, calls.counter, calls.empty_like, calls.address, calls.stream

    def run(idx: A, avail_counter: Array | None, planner: int, n_sms: int, plan: Array | None = None) -> A:
        handle = handles.get(planner)
        if handle is None:
            raise closed()
        native = handle.native  # held till the end, see there
        if native is None:
            raise handle.ended()
        address, dtype, n_ids, ids = buffer("idx", idx, handle)
        if avail_counter is None:
            counter, counter_dtype = None, INT64
        else:
            counter, counter_dtype = count_in(avail_counter, handle)
        if handle.debug:
            refuse_invalid(ids, n_ids, handle.n_logical)
            if handle.compare is not None:
                handle.compare(ids)
        out = empty_like(ids)
        stream = None if handle.device < 0 else stream_of(handle.device)
        everyone, exchange = None, handle.exchange
        if exchange is not None and handle.has_replicas and not exchange.native:  # native: the library does it inside
            row = new_row(handle)
            handle.check(handle.library.planner_count_row(native, address, dtype, n_ids, row.data_ptr(), stream))
            gathered = exchange.all_gather(row)
            everyone = gathered.data_ptr()
        status = handle.planner_run(
            native.value, address, dtype, n_ids, everyone, address_in(out), counter, counter_dtype, n_sms, stream)
        if status:
            raise handle.failure(status)
        return out

    return run


class Calls(ABC, Generic[A]):
    """For one kind of arrays. What differs between numpy arrays and torch tensors stands here and in operators.py alone."""

    int32: Any  #: types as this kind calls them
    int64: Any
    float32: Any
    address: Callable[[A], int]
    empty_like: Callable[[A], A]  #: contiguous
    stream: Callable[[int], int | None]  #: the current one of a GPU

    def __init__(self) -> None:
        self.run: Callable[[A, Array | None, int, int], A] = make_run(self)

    @abstractmethod
    def buffer(self, name: str, array: A, handle: Handle, types: dict[Any, int] | None = None) -> Buffer[A]:
        """The argument `name`, copied if it is not contiguous. types: those allowed, integers unless it says otherwise."""

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: Any, beside: A) -> A:
        """On the device of `beside`."""

    @abstractmethod
    def counter(self, value: Any, handle: Handle) -> tuple[int, int]:
        """Address and type of avail_counter."""

    def bad_counter(self, value: Any, handle: Handle) -> LplbError:
        self.buffer("avail_counter", value, handle)  # raises, if its type or its device is wrong
        return broken_rule("avail_counter", "must have one element", f"shape {list(value.shape)}")

    @staticmethod
    def wrong_type(name: str, types: dict[Any, int], dtype: object) -> LplbError:
        return broken_rule(name, f"must be {' or '.join(str(each).removeprefix('torch.') for each in types)}", str(dtype))

    @staticmethod
    def check_number(name: str, shape: Sequence[int], size: int) -> None:
        """Before a copy: too large for the library, and perhaps for the memory, if the elements share some."""
        if size > MAX_IDS:
            raise broken_rule(name, f"must have at most {MAX_IDS} elements", f"shape {list(shape)}")

    def count(self, idx: A, planner: int, n_chunks: int, n_logical: int) -> tuple[A, A]:
        handle = find(planner)
        handle.check_sizes("n_logical", n_logical, handle.n_logical)
        if not 1 <= n_chunks <= MAX_CHUNKS:  # before so many rows are allocated
            raise broken_rule("n_chunks", f"must lie in 1 ... {MAX_CHUNKS}", n_chunks)
        address, dtype, n_ids, ids = self.buffer("idx", idx, handle)
        if handle.debug:
            refuse_invalid(ids, n_ids, handle.n_logical)
        counts = self.empty((n_logical,), self.int32, ids)
        cumulative = self.empty((n_chunks, n_logical), self.int32, ids)
        handle.check(handle.library.planner_count(
            handle.opened(), address, dtype, n_ids, self.address(counts), self.address(cumulative), n_chunks, self._stream(handle)))
        return counts, cumulative

    def solve(self, workload: A, avail_counter: Array | None, plan: Array | None, planner: int, ratio_shape: list[int],
              scaled_shape: list[int]) -> tuple[A, A]:
        handle = find(planner)
        handle.check_shapes(ratio_shape, scaled_shape)
        address, dtype, _, counts = self.buffer("workload", workload, handle)
        counter, counter_dtype = (None, INT64) if avail_counter is None else self.counter(avail_counter, handle)
        sources, stream = handle.sources("workload", counts.shape), self._stream(handle)
        ratios = self.empty(ratio_shape, self.float32, counts)
        if not handle.n_ratios:  # nothing is decided: every share stays at its original, and the library knows no ratios
            ratios[...] = 1
        scaled = self.empty(scaled_shape, self.float32, counts)
        outputs = (self.address(ratios) if handle.n_ratios else None, self.address(scaled), counter, counter_dtype, stream)
        if handle.exchange is None:
            handle.check(handle.library.planner_solve(handle.opened(), address, dtype, sources, *outputs))
        else:
            own, row = counts.reshape(sources, -1)[handle.rank if sources > 1 else 0], new_row(handle)
            handle.check(handle.library.planner_make_row(handle.opened(), self.address(own), dtype, row.data_ptr(), stream))
            rows = handle.exchange.all_gather(row)
            handle.check(handle.library.planner_solve_rows(handle.opened(), rows.data_ptr(), *outputs))
        return ratios, scaled

    def redirect(self, idx: A, plan: Array | None, planner: int, n_sms: int) -> A:
        handle = find(planner)
        address, dtype, n_ids, ids = self.buffer("idx", idx, handle)
        if handle.debug:
            refuse_invalid(ids, n_ids, handle.n_logical)
        out = self.empty_like(ids)
        handle.check(handle.library.planner_redirect(
            handle.opened(), address, dtype, n_ids, self.address(out), n_sms, self._stream(handle)))
        return out

    def redirect_by_ratio(self, idx: A, o_weight: A, cumulative: A, planner: int) -> A:
        handle = find(planner)
        address, dtype, n_ids, ids = self.buffer("idx", idx, handle)
        ratios, _, n_ratios, _weights = self.buffer("o_weight", o_weight, handle, {self.float32: 0})
        rows, _, _, counts = self.buffer("local_workload_by_sm", cumulative, handle, {self.int32: 0})
        handle.check_sizes("o_weight", n_ratios, handle.n_ratios)
        if len(counts.shape) != 2 or counts.shape[1] != handle.n_logical:
            raise broken_rule("local_workload_by_sm", f"must be [n_sms, {handle.n_logical}]", f"shape {list(counts.shape)}")
        out = self.empty_like(ids)
        handle.check(handle.library.planner_redirect_by_ratio(
            handle.opened(), address, dtype, n_ids, ratios, rows, counts.shape[0], self.address(out), self._stream(handle)))
        return out

    def layout(self, physical: A, experts: A | None, row_of_slot: A | None, plan: Array | None, planner: int, n_ranks: int, n_rows: int,
               planned: bool) -> tuple[A, A]:
        """The order of the choices, and words, see layout_sections. planned: those of what is received, too."""
        handle, parts = find(planner), LAYOUT_SENT | LAYOUT_RECEIVED * planned
        handle.check_sizes("n_ranks", n_ranks, handle.ep_size)
        address, dtype, n_ids, ids = self.buffer("physical", physical, handle)
        layout = LayoutStruct(ids=address, n_ids=n_ids, ids_dtype=dtype, n_rows=n_rows, parts=parts)
        if experts is not None:
            layout.experts, other, n_experts, _experts = self.buffer("experts", experts, handle)
            handle.check_sizes("experts", n_experts, n_ids)
            if other != dtype:
                raise broken_rule("experts", f"must be of physical's type, {ids.dtype}", str(experts.dtype))
        if row_of_slot is not None:
            layout.row_of_slot, layout.row_dtype, n_slots, _rows = self.buffer("row_of_slot", row_of_slot, handle)
            handle.check_sizes("row_of_slot", n_slots, handle.n_physical)
        order, words = self.empty((n_ids,), self.int64, ids), self.words(n_ranks, n_rows, ids)
        layout.order = self.address(order)
        self._lay_out(handle, layout, words)
        return order, words

    def layout_received(self, words: A, received: A, planner: int, n_ranks: int, n_rows: int) -> A:
        """words of layout() with what is received, which was exchanged."""
        handle, begin = find(planner), layout_sections(n_ranks, n_rows)
        handle.check_sizes("n_ranks", n_ranks, handle.ep_size)
        _, _, n_received, theirs = self.buffer("received", received, handle, {self.int32: INT32})
        handle.check_sizes("received", n_received, n_ranks * n_rows)
        whole = self.words(n_ranks, n_rows, words)
        whole[...] = words
        whole[begin.received : begin.received + n_received] = theirs.reshape(-1)
        self._lay_out(handle, LayoutStruct(n_rows=n_rows, parts=LAYOUT_RECEIVED, exchanged=1), whole)
        return whole

    def layout_by_row(self, words: A, planner: int, n_ranks: int, n_rows: int, n_by_row: int) -> A:
        """Of words, see lplb_layout.by_row: int64 [n_by_row]."""
        handle, begin = find(planner), layout_sections(n_ranks, n_rows)
        handle.check_sizes("n_ranks", n_ranks, handle.ep_size)
        address, _, n_words, _words = self.buffer("words", words, handle, {self.int32: INT32})
        handle.check_sizes("words", n_words, begin.end)
        by_row = self.empty((n_by_row,), self.int64, words)
        layout = LayoutStruct(n_rows=n_rows, parts=LAYOUT_BY_ROW, received=address + 4 * begin.received, by_row=self.address(by_row),
                              n_by_row=n_by_row)
        handle.check(handle.library.planner_layout(handle.opened(), ctypes.byref(layout), self._stream(handle)))
        return by_row

    def words(self, n_ranks: int, n_rows: int, beside: A) -> A:
        if not 1 <= n_rows <= MAX_LAYOUT_ROWS // n_ranks:
            raise broken_rule("n_rows", f"must lie in 1 ... {MAX_LAYOUT_ROWS // n_ranks}", n_rows)
        return self.empty((layout_sections(n_ranks, n_rows).end,), self.int32, beside)

    def _lay_out(self, handle: Handle, layout: LayoutStruct, words: A) -> None:
        address, begin = self.address(words), layout_sections(handle.ep_size, layout.n_rows)
        layout.numbers, layout.sent = address, address + 4 * begin.sent
        layout.received, layout.ends = address + 4 * begin.received, address + 4 * begin.ends
        handle.check(handle.library.planner_layout(handle.opened(), ctypes.byref(layout), self._stream(handle)))

    def _stream(self, handle: Handle) -> int | None:
        return None if handle.device < 0 else self.stream(handle.device)


class LayoutSections(NamedTuple):
    """Where the parts of a layout's words begin, each at a multiple of 16 bytes: numbers [LAYOUT_RANKS + 2 * ranks + rows] first, then
    sent and received [ranks, rows] and ends [rows]."""

    sent: int
    received: int
    ends: int
    end: int


def layout_sections(n_ranks: int, n_rows: int) -> LayoutSections:
    sent, matrix = (LAYOUT_RANKS + 2 * n_ranks + n_rows + 3) // 4 * 4, (n_ranks * n_rows + 3) // 4 * 4
    return LayoutSections(sent, sent + matrix, sent + 2 * matrix, sent + 2 * matrix + (n_rows + 3) // 4 * 4)


def refuse_invalid(ids: A, n_ids: int, n_logical: int) -> None:
    """debug=True: waits for the device and raises for the first id out of range."""
    bad = (ids < -1) | (ids >= n_logical)
    number = int(bad.sum())
    if number:
        raise broken_rule("idx", f"ids must be -1 .. {n_logical - 1} ({number} of {n_ids} are not)", int(ids[bad][0]))


def new_row(handle: Handle) -> torch.Tensor:
    """What this rank brings to an exchange."""
    library = loaded_torch()
    row: torch.Tensor = library.empty(handle.width, dtype=library.int32, device="cpu" if handle.device < 0 else handle.device)
    return row


INTEGERS = {np.dtype(np.int32): INT32, np.dtype(np.int64): INT64}


class NumpyCalls(Calls["npt.NDArray[Any]"]):
    int32, int64, float32 = np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.float32)
    address = staticmethod(address_of)
    empty_like = staticmethod(partial(np.empty_like, order="C"))
    stream = staticmethod(lambda device: None)

    def buffer(self, name: str, array: npt.NDArray[Any], handle: Handle, types: dict[Any, int] | None = None
               ) -> Buffer[npt.NDArray[Any]]:
        if type(array) is not np.ndarray:
            if is_masked(array):
                raise broken_rule(name, "must be a plain array", type(array).__name__)
            if not isinstance(array, np.ndarray):
                array = to_host(name, array, most=MAX_IDS)
        dtype = (types or INTEGERS).get(array.dtype)
        if dtype is None:
            raise self.wrong_type(name, types or INTEGERS, array.dtype)
        if not array.flags.c_contiguous:
            self.check_number(name, array.shape, array.size)
            array = np.ascontiguousarray(array).reshape(array.shape)
        return address_of(array), dtype, array.size, array

    def empty(self, shape: Sequence[int], dtype: Any, beside: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.empty(shape, dtype=dtype)

    def counter(self, value: Array, handle: Handle) -> tuple[int, int]:
        """A tensor may count, too; its memory is shared, so the caller sees it grow."""
        if not isinstance(value, np.ndarray):
            if not (is_tensor(value) and value.device.type == "cpu"):
                raise broken_rule("avail_counter", "must be an array or a CPU tensor, as idx is an array", type(value).__name__)
            value = to_host("avail_counter", value)
        if not value.flags.writeable:
            raise broken_rule("avail_counter", "must be writable", "a read-only array")
        dtype = INTEGERS.get(value.dtype)
        if dtype is None or value.size != 1:
            raise self.bad_counter(value, handle)
        return address_of(value), dtype


numpy_calls = NumpyCalls()
