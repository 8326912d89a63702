"""The operators of ops.py for numpy arrays on CPU planners: same names, same arguments, no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from . import _c
from ._arrays import address, is_masked, is_tensor, to_host
from ._c.handle import Handle, find
from .errors import broken_rule

IntArray = npt.NDArray[Any]

_DTYPES = {np.dtype(np.int32): _c.INT32, np.dtype(np.int64): _c.INT64}


def _checked(name: str, array: IntArray, handle: Handle) -> tuple[IntArray, int]:
    dtype = _DTYPES.get(array.dtype)
    if dtype is None:
        raise broken_rule(name, "must be int32 or int64", array.dtype)
    if type(array) is not np.ndarray and is_masked(array):
        raise broken_rule(name, "must be a plain array", type(array).__name__)
    return (array if array.flags.c_contiguous else _contiguous(name, array)), dtype


def _contiguous(name: str, array: IntArray) -> IntArray:
    if array.size > _c.MAX_IDS:  # too large for the library, and perhaps for the memory, if the elements share some
        raise broken_rule(name, f"must have at most {_c.MAX_IDS} elements", f"shape {list(array.shape)}")
    return np.ascontiguousarray(array).reshape(array.shape)


def check(name: str, array: IntArray, others: dict[str, Any], handle: Handle) -> None:
    """What the operators here refuse, for arrays that go to others as tensors."""
    _checked(name, array, handle)
    if "avail_counter" in others:
        _counter(others["avail_counter"], handle)


def _ids(idx: IntArray, handle: Handle) -> tuple[IntArray, int]:
    ids, dtype = _checked("idx", idx, handle)
    if handle.debug:
        bad = (ids < -1) | (ids >= handle.n_logical)
        number = int(bad.sum())
        if number:
            rule = f"ids must be -1 .. {handle.n_logical - 1} ({number} of {ids.size} are not)"
            raise broken_rule("idx", rule, int(ids[bad][0]))
    return ids, dtype


def _counter(counter: Any, handle: Handle) -> tuple[int | None, int]:
    """counter: an array or a CPU tensor of one integer, or None."""
    if counter is None:
        return None, _c.INT64
    if not isinstance(counter, np.ndarray):
        if not (is_tensor(counter) and counter.device.type == "cpu"):
            raise broken_rule("avail_counter", "must be an array or a CPU tensor, as idx is an array", type(counter).__name__)
        counter = to_host("avail_counter", counter)  # shares the memory if it is of integers, so the caller sees it grow
    dtype = _DTYPES.get(counter.dtype)
    if dtype is None:
        raise broken_rule("avail_counter", "must be int32 or int64", counter.dtype)
    if counter.size != 1:
        raise broken_rule("avail_counter", "must have one element", f"shape {list(counter.shape)}")
    if not counter.flags.writeable:
        raise broken_rule("avail_counter", "must be writable", "a read-only array")
    return address(counter), dtype


def run(idx: IntArray, avail_counter: Any, planner: int, n_sms: int) -> IntArray:
    handle = find(planner)
    ids, dtype = _ids(idx, handle)
    counter, counter_dtype = _counter(avail_counter, handle)
    out = np.empty_like(ids, order="C")
    native = handle.opened()  # held till the end, see there; its address is quicker to hand over
    status = handle.planner_run(native.address, address(ids), dtype, ids.size, None, address(out), counter, counter_dtype, n_sms, None)
    if status:
        raise handle.failure(status)
    return out


def count(idx: IntArray, planner: int, n_chunks: int, n_logical: int) -> tuple[IntArray, IntArray]:
    handle = find(planner)
    handle.check_sizes("n_logical", n_logical, handle.n_logical)
    handle.check_chunks(n_chunks)
    ids, dtype = _ids(idx, handle)
    counts = np.empty(n_logical, dtype=np.int32)
    cumulative = np.empty((n_chunks, n_logical), dtype=np.int32)
    handle.check(handle.library.planner_count(
        handle.opened(), address(ids), dtype, ids.size, address(counts), address(cumulative), n_chunks, None))
    return counts, cumulative


def solve(workload: IntArray, avail_counter: Any, plan: None, planner: int, ratio_shape: list[int],
          scaled_shape: list[int]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    handle = find(planner)
    handle.check_shapes(ratio_shape, scaled_shape)
    counts, dtype = _checked("workload", workload, handle)
    counter, counter_dtype = _counter(avail_counter, handle)
    sources = handle.sources("workload", counts.shape)
    ratios = np.ones(ratio_shape, dtype=np.float32)
    scaled = np.empty(scaled_shape, dtype=np.float32)
    handle.check(handle.library.planner_solve(
        handle.opened(), address(counts), dtype, sources, address(ratios) if handle.n_ratios else None, address(scaled), counter,
        counter_dtype, None))
    return ratios, scaled


def redirect(idx: IntArray, plan: None, planner: int, n_sms: int) -> IntArray:
    handle = find(planner)
    ids, dtype = _ids(idx, handle)
    out = np.empty_like(ids, order="C")
    handle.check(handle.library.planner_redirect(handle.opened(), address(ids), dtype, ids.size, address(out), n_sms, None))
    return out


def redirect_by_ratio(idx: IntArray, o_weight: npt.NDArray[Any], cumulative: IntArray, planner: int) -> IntArray:
    handle = find(planner)
    ids, dtype = _checked("idx", idx, handle)
    arrays = []
    for name, value, wanted in (("o_weight", o_weight, np.float32), ("local_workload_by_sm", cumulative, np.int32)):
        array = to_host(name, value, most=_c.MAX_IDS)
        if array.dtype != wanted:
            raise broken_rule(name, f"must be {np.dtype(wanted).name}", array.dtype)
        arrays.append(np.ascontiguousarray(array))
    ratios, rows = arrays
    handle.check_sizes("o_weight", ratios.size, handle.n_ratios)
    if rows.ndim != 2 or rows.shape[1] != handle.n_logical:
        raise broken_rule("local_workload_by_sm", f"must be [n_sms, {handle.n_logical}]", f"shape {list(rows.shape)}")
    out = np.empty_like(ids, order="C")
    handle.check(handle.library.planner_redirect_by_ratio(
        handle.opened(), address(ids), dtype, ids.size, address(ratios), address(rows), rows.shape[0], address(out), None))
    return out
