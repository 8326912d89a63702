"""The planner's calls as PyTorch operators (torch.ops.lplb.*), so that torch.compile and fake tensors go through them.

A planner is passed as its number (Planner.number). Importing this module imports torch; Planner does it when tensors are in use.
The operators take CPU or CUDA tensors, whichever the planner lives on; on CUDA they work on the current stream and do not wait.
With a process group they exchange the counts of all ranks inside, so all ranks must call them in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _c
from ._c.handle import Handle, closed, find, handles
from .errors import InvalidArgument, LplbError, broken_rule

_DTYPES = {torch.int32: _c.INT32, torch.int64: _c.INT64}
_CONTIGUOUS = torch.contiguous_format

is_compiling = torch.compiler.is_compiling

# The stream as a number, without building a torch.cuda.Stream each time. Absent in builds of torch without CUDA.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _stream(handle: Handle) -> int | None:
    return None if handle.device < 0 or _raw_stream is None else _raw_stream(handle.device)


def _device_name(ordinal: int) -> str:
    return "cpu" if ordinal < 0 else f"cuda:{ordinal}"


def _bad_tensor(name: str, tensor: Tensor, handle: Handle) -> InvalidArgument:
    """The error for a tensor that is not on the planner's device or not of an integer type that the library takes."""
    if tensor.get_device() != handle.device or tensor.device.type not in ("cpu", "cuda"):
        return broken_rule(name, f"must be on the planner's device {_device_name(handle.device)}", tensor.device)
    return broken_rule(name, "must be int32 or int64", tensor.dtype)


def explain(error: Exception, **arguments: object) -> None:
    """PyTorch refuses some arguments before the library sees them: raises what names the first one that is no plain tensor, if that is why.
    """
    if isinstance(error, LplbError):
        return
    for name, value in arguments.items():
        if value is None and name == "avail_counter":
            continue
        if not isinstance(value, Tensor):
            raise broken_rule(name, f"must be a torch tensor, as {next(iter(arguments))} is one", type(value).__name__) from None
        if value.layout is not torch.strided or value.is_quantized or value.is_nested:
            raise broken_rule(name, "must be a dense, plain tensor", f"{value.layout}, {value.dtype}") from None
        if type(value) is not Tensor:
            raise broken_rule(name, "must be a plain tensor, or all of them of one kind", type(value).__name__) from None


def _contiguous(name: str, tensor: Tensor) -> Tensor:
    if tensor.numel() > _c.MAX_IDS:  # too large for the library, and perhaps for the memory, if the elements share some
        raise broken_rule(name, f"must have at most {_c.MAX_IDS} elements", f"shape {list(tensor.shape)}")
    return tensor.contiguous()


def _checked(name: str, tensor: Tensor, handle: Handle) -> tuple[Tensor, int]:
    """The tensor, contiguous, and its type for the library."""
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None or tensor.get_device() != handle.device:
        raise _bad_tensor(name, tensor, handle)
    return (tensor if tensor.is_contiguous() else _contiguous(name, tensor)), dtype


def _counter(counter: Tensor | None, handle: Handle) -> tuple[int | None, int]:
    """Address and type of the counter."""
    if counter is None:
        return None, _c.INT64
    dtype = _DTYPES.get(counter.dtype)
    if dtype is None or counter.get_device() != handle.device:
        raise _bad_tensor("avail_counter", counter, handle)
    if counter.numel() != 1:
        raise broken_rule("avail_counter", "must have one element", f"shape {list(counter.shape)}")
    return counter.data_ptr(), dtype


def _refuse_invalid(ids: Tensor, n_logical: int) -> None:
    """debug=True: waits for the device and raises for the first id out of range."""
    bad = (ids < -1) | (ids >= n_logical)
    number = int(bad.sum())
    if number:
        first = int(ids[bad][0])
        raise broken_rule("idx", f"ids must be -1 .. {n_logical - 1} ({number} of {ids.numel()} are not)", first)


def _run(idx: Tensor, avail_counter: Tensor | None, planner: int, n_sms: int, plan: Tensor | None = None) -> Tensor:
    handle = handles.get(planner)
    if handle is None:
        raise closed()
    native = handle.native  # held till the end, see there
    if native is None:
        raise closed()
    ids, dtype = _checked("idx", idx, handle)
    counter, counter_dtype = _counter(avail_counter, handle)
    if handle.debug:
        _refuse_invalid(ids, handle.n_logical)
        if handle.compare is not None:
            handle.compare(ids)
    out = torch.empty_like(ids, memory_format=_CONTIGUOUS)
    stream = None if handle.device < 0 else _raw_stream(handle.device)  # type: ignore[misc]
    address, n_ids, everyone = ids.data_ptr(), ids.numel(), None
    exchange = handle.exchange
    if exchange is not None and handle.has_replicas and not exchange.attached:  # attached: the library does it inside
        row = torch.empty(handle.width, dtype=torch.int32, device=ids.device)
        handle.check(handle.library.planner_count_row(native, address, dtype, n_ids, row.data_ptr(), stream))
        gathered = exchange.all_gather(row)
        everyone = gathered.data_ptr()
    status = handle.planner_run(native.address, address, dtype, n_ids, everyone, out.data_ptr(), counter, counter_dtype, n_sms, stream)
    if status:
        raise handle.failure(status)
    return out


def _count(idx: Tensor, planner: int, n_chunks: int, n_logical: int) -> tuple[Tensor, Tensor]:
    handle = find(planner)
    handle.check_sizes("n_logical", n_logical, handle.n_logical)
    handle.check_chunks(n_chunks)
    ids, dtype = _checked("idx", idx, handle)
    if handle.debug:
        _refuse_invalid(ids, handle.n_logical)
    counts = torch.empty(n_logical, dtype=torch.int32, device=ids.device)
    cumulative = torch.empty((n_chunks, n_logical), dtype=torch.int32, device=ids.device)
    handle.check(handle.library.planner_count(
        handle.opened(), ids.data_ptr(), dtype, ids.numel(), counts.data_ptr(), cumulative.data_ptr(), n_chunks, _stream(handle)))
    return counts, cumulative


def _solve(workload: Tensor, avail_counter: Tensor | None, plan: Tensor | None, planner: int, ratio_shape: list[int],
           scaled_shape: list[int]) -> tuple[Tensor, Tensor]:
    handle = find(planner)
    handle.check_shapes(ratio_shape, scaled_shape)
    counts, dtype = _checked("workload", workload, handle)
    counter, counter_dtype = _counter(avail_counter, handle)
    sources = handle.sources("workload", counts.shape)
    # Without replicas nothing is decided: every share stays at its original, and the library knows no ratios.
    ratios = (torch.empty if handle.n_ratios else torch.ones)(ratio_shape, dtype=torch.float32, device=counts.device)
    scaled = torch.empty(scaled_shape, dtype=torch.float32, device=counts.device)
    outputs = (ratios.data_ptr() if handle.n_ratios else None, scaled.data_ptr(), counter, counter_dtype, _stream(handle))
    if handle.exchange is None:
        handle.check(handle.library.planner_solve(handle.opened(), counts.data_ptr(), dtype, sources, *outputs))
    else:
        own = counts.view(sources, -1)[handle.rank if sources > 1 else 0]
        row = torch.empty(handle.width, dtype=torch.int32, device=counts.device)
        handle.check(handle.library.planner_make_row(handle.opened(), own.data_ptr(), dtype, row.data_ptr(), _stream(handle)))
        rows = handle.exchange.all_gather(row)
        handle.check(handle.library.planner_solve_rows(handle.opened(), rows.data_ptr(), *outputs))
    return ratios, scaled


def _redirect(idx: Tensor, plan: Tensor | None, planner: int, n_sms: int) -> Tensor:
    handle = find(planner)
    ids, dtype = _checked("idx", idx, handle)
    if handle.debug:
        _refuse_invalid(ids, handle.n_logical)
    out = torch.empty_like(ids, memory_format=_CONTIGUOUS)
    handle.check(handle.library.planner_redirect(
        handle.opened(), ids.data_ptr(), dtype, ids.numel(), out.data_ptr(), n_sms, _stream(handle)))
    return out


def _redirect_by_ratio(idx: Tensor, o_weight: Tensor, cumulative: Tensor, planner: int) -> Tensor:
    handle = find(planner)
    ids, dtype = _checked("idx", idx, handle)
    for name, tensor, wanted in (("o_weight", o_weight, torch.float32), ("local_workload_by_sm", cumulative, torch.int32)):
        if tensor.get_device() != handle.device:
            raise _bad_tensor(name, tensor, handle)
        if tensor.dtype is not wanted:
            raise broken_rule(name, f"must be {wanted}", tensor.dtype)
    handle.check_sizes("o_weight", o_weight.numel(), handle.n_ratios)
    if cumulative.dim() != 2 or cumulative.shape[1] != handle.n_logical:
        raise broken_rule("local_workload_by_sm", f"must be [n_sms, {handle.n_logical}]", f"shape {list(cumulative.shape)}")
    ratios, cumulative = o_weight.contiguous(), cumulative.contiguous()
    out = torch.empty_like(ids, memory_format=_CONTIGUOUS)
    handle.check(handle.library.planner_redirect_by_ratio(
        handle.opened(), ids.data_ptr(), dtype, ids.numel(), ratios.data_ptr(), cumulative.data_ptr(), cumulative.shape[0],
        out.data_ptr(), _stream(handle)))
    return out


def _on_one_device(first: str, *tensors: Tensor | None) -> None:
    """Meta tensors go with meta tensors: PyTorch asks for shapes alone as soon as one argument is one."""
    for tensor in tensors:
        if tensor is not None and tensors[0] is not None and tensor.device != tensors[0].device:
            raise broken_rule(first, f"must be on one device with the other tensors ({tensor.device})", tensors[0].device)


def _run_fake(idx: Tensor, avail_counter: Tensor | None, planner: int, n_sms: int, plan: Tensor | None = None) -> Tensor:
    _on_one_device("idx", idx, avail_counter)
    return torch.empty_like(idx, memory_format=_CONTIGUOUS)


def _redirect_fake(idx: Tensor, plan: Tensor | None, planner: int, n_sms: int) -> Tensor:
    return torch.empty_like(idx, memory_format=_CONTIGUOUS)


def _redirect_by_ratio_fake(idx: Tensor, o_weight: Tensor, cumulative: Tensor, planner: int) -> Tensor:
    _on_one_device("idx", idx, o_weight, cumulative)
    return torch.empty_like(idx, memory_format=_CONTIGUOUS)


def _count_fake(idx: Tensor, planner: int, n_chunks: int, n_logical: int) -> tuple[Tensor, Tensor]:
    return idx.new_empty((n_logical,), dtype=torch.int32), idx.new_empty((n_chunks, n_logical), dtype=torch.int32)


def _solve_fake(workload: Tensor, avail_counter: Tensor | None, plan: Tensor | None, planner: int, ratio_shape: list[int],
                scaled_shape: list[int]) -> tuple[Tensor, Tensor]:
    _on_one_device("workload", workload, avail_counter)
    return workload.new_empty(ratio_shape, dtype=torch.float32), workload.new_empty(scaled_shape, dtype=torch.float32)


# define/impl costs a quarter of what torch.library.custom_op does per call. The planner's number is a SymInt, so that one compiled
# graph serves the planners of all layers. `plan` stands for the plan inside the planner, which run and solve write and redirect reads:
# nothing is stored in it, and eager calls give none, but without it a compiler would see no reason to keep them, in this order. For run it
# comes last, where a call that leaves it out costs nothing.
_define: Any = torch.library.Library  # untyped in PyTorch
_library = _define("lplb", "DEF")
for _schema, _kernel, _fake in (
    ("run(Tensor idx, Tensor(a!)? avail_counter, SymInt planner, int n_sms, Tensor(b!)? plan=None) -> Tensor", _run, _run_fake),
    ("count(Tensor idx, SymInt planner, int n_chunks, int n_logical) -> (Tensor, Tensor)", _count, _count_fake),
    ("solve(Tensor workload, Tensor(a!)? avail_counter, Tensor(b!)? plan, SymInt planner, int[] ratio_shape, int[] scaled_shape)"
     " -> (Tensor, Tensor)", _solve, _solve_fake),
    ("redirect(Tensor idx, Tensor? plan, SymInt planner, int n_sms) -> Tensor", _redirect, _redirect_fake),
    ("redirect_by_ratio(Tensor idx, Tensor o_weight, Tensor cumulative, SymInt planner) -> Tensor", _redirect_by_ratio, _redirect_by_ratio_fake),
):
    _name = _schema[: _schema.index("(")]
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _key)
    torch.library.register_fake(f"lplb::{_name}", _fake, lib=_library)

run = torch.ops.lplb.run.default
count = torch.ops.lplb.count.default
solve = torch.ops.lplb.solve.default
redirect = torch.ops.lplb.redirect.default
redirect_by_ratio = torch.ops.lplb.redirect_by_ratio.default
