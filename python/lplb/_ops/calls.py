"""The planner's calls, written once for numpy arrays and torch tensors. operators.py makes PyTorch operators of them.

A planner is passed as its number (Planner.number). On CUDA the calls work on the current stream and do not wait. With a process group
they exchange the counts of all ranks inside, so all ranks must make them in the same order. `plan` is for compilers, see operators.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic

from .._c.handle import Handle, closed, find, handles
from .._c.structs import INT64
from ..errors import broken_rule
from .buffer import Arrays, NumpyArrays
from .host import A, Array, as_tensor, loaded_torch

if TYPE_CHECKING:
    import torch


def make_run(arrays: Arrays[A]) -> Callable[[A, Array | None, int, int], A]:
    """Calls.run. It is counted in tenths of a microsecond, so what it uses of arrays is looked up once."""
    buffer, count_in, empty_like, address_of, stream_of = arrays.buffer, arrays.counter, arrays.empty_like, arrays.address, arrays.stream

    def run(idx: A, avail_counter: Array | None, planner: int, n_sms: int, plan: Array | None = None) -> A:
        handle = handles.get(planner)
        if handle is None:
            raise closed()
        native = handle.native  # held till the end, see there
        if native is None:
            raise closed()
        address, dtype, n_ids, ids = buffer("idx", idx, handle)
        if avail_counter is None:
            counter, counter_dtype = None, INT64
        else:
            counter, counter_dtype = count_in(avail_counter, handle)
        if handle.debug:
            refuse_invalid(ids, n_ids, handle.n_logical)
            if handle.compare is not None:
                handle.compare(as_tensor(ids))
        out = empty_like(ids)
        stream = None if handle.device < 0 else stream_of(handle.device)
        everyone, exchange = None, handle.exchange
        if exchange is not None and handle.has_replicas and not exchange.attached:  # attached: the library does it inside
            row = new_row(handle)
            handle.check(handle.library.planner_count_row(native, address, dtype, n_ids, row.data_ptr(), stream))
            gathered = exchange.all_gather(row)
            everyone = gathered.data_ptr()
        status = handle.planner_run(
            native.address, address, dtype, n_ids, everyone, address_of(out), counter, counter_dtype, n_sms, stream)
        if status:
            raise handle.failure(status)
        return out

    return run


class Calls(Generic[A]):
    def __init__(self, arrays: Arrays[A]) -> None:
        self.arrays: Arrays[A] = arrays
        self.run: Callable[[A, Array | None, int, int], A] = make_run(arrays)

    def count(self, idx: A, planner: int, n_chunks: int, n_logical: int) -> tuple[A, A]:
        handle, arrays = find(planner), self.arrays
        handle.check_sizes("n_logical", n_logical, handle.n_logical)
        handle.check_chunks(n_chunks)
        address, dtype, n_ids, ids = arrays.buffer("idx", idx, handle)
        if handle.debug:
            refuse_invalid(ids, n_ids, handle.n_logical)
        counts = arrays.empty((n_logical,), arrays.int32, ids)
        cumulative = arrays.empty((n_chunks, n_logical), arrays.int32, ids)
        handle.check(handle.library.planner_count(
            handle.opened(), address, dtype, n_ids, arrays.address(counts), arrays.address(cumulative), n_chunks, self._stream(handle)))
        return counts, cumulative

    def solve(self, workload: A, avail_counter: Array | None, plan: Array | None, planner: int, ratio_shape: list[int],
              scaled_shape: list[int]) -> tuple[A, A]:
        handle, arrays = find(planner), self.arrays
        handle.check_shapes(ratio_shape, scaled_shape)
        address, dtype, _, counts = arrays.buffer("workload", workload, handle)
        counter, counter_dtype = (None, INT64) if avail_counter is None else arrays.counter(avail_counter, handle)
        sources, stream = handle.sources("workload", counts.shape), self._stream(handle)
        ratios = arrays.empty(ratio_shape, arrays.float32, counts)
        if not handle.n_ratios:  # nothing is decided: every share stays at its original, and the library knows no ratios
            ratios[...] = 1
        scaled = arrays.empty(scaled_shape, arrays.float32, counts)
        outputs = (arrays.address(ratios) if handle.n_ratios else None, arrays.address(scaled), counter, counter_dtype, stream)
        if handle.exchange is None:
            handle.check(handle.library.planner_solve(handle.opened(), address, dtype, sources, *outputs))
        else:
            own, row = counts.reshape(sources, -1)[handle.rank if sources > 1 else 0], new_row(handle)
            handle.check(handle.library.planner_make_row(handle.opened(), arrays.address(own), dtype, row.data_ptr(), stream))
            rows = handle.exchange.all_gather(row)
            handle.check(handle.library.planner_solve_rows(handle.opened(), rows.data_ptr(), *outputs))
        return ratios, scaled

    def redirect(self, idx: A, plan: Array | None, planner: int, n_sms: int) -> A:
        handle, arrays = find(planner), self.arrays
        address, dtype, n_ids, ids = arrays.buffer("idx", idx, handle)
        if handle.debug:
            refuse_invalid(ids, n_ids, handle.n_logical)
        out = arrays.empty_like(ids)
        handle.check(handle.library.planner_redirect(
            handle.opened(), address, dtype, n_ids, arrays.address(out), n_sms, self._stream(handle)))
        return out

    def redirect_by_ratio(self, idx: A, o_weight: A, cumulative: A, planner: int) -> A:
        handle, arrays = find(planner), self.arrays
        address, dtype, n_ids, ids = arrays.buffer("idx", idx, handle)
        ratios, _, n_ratios, _weights = arrays.buffer("o_weight", o_weight, handle, {arrays.float32: 0})
        rows, _, _, counts = arrays.buffer("local_workload_by_sm", cumulative, handle, {arrays.int32: 0})
        handle.check_sizes("o_weight", n_ratios, handle.n_ratios)
        if len(counts.shape) != 2 or counts.shape[1] != handle.n_logical:
            raise broken_rule("local_workload_by_sm", f"must be [n_sms, {handle.n_logical}]", f"shape {list(counts.shape)}")
        out = arrays.empty_like(ids)
        handle.check(handle.library.planner_redirect_by_ratio(
            handle.opened(), address, dtype, n_ids, ratios, rows, counts.shape[0], arrays.address(out), self._stream(handle)))
        return out

    def _stream(self, handle: Handle) -> int | None:
        return None if handle.device < 0 else self.arrays.stream(handle.device)


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


numpy_calls = Calls(NumpyArrays())
