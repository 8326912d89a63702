"""The planner's calls as PyTorch operators (torch.ops.lplb.*), so that torch.compile and fake tensors go through them.

Importing this module imports torch; Planner does it when tensors are in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._c.handle import Handle
from .._c.structs import INT32, INT64
from ..errors import LplbError, broken_rule
from .calls import Buffer, Calls, layout_sections
from .ranges import ranged

INTEGERS = {torch.int32: INT32, torch.int64: INT64}


class TensorCalls(Calls[Tensor]):
    int32, int64, float32 = torch.int32, torch.int64, torch.float32

    # The stream as a number, without building a torch.cuda.Stream each time. Absent in builds of torch without CUDA.
    stream = staticmethod(getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: None))
    address = staticmethod(Tensor.data_ptr)
    empty_like = staticmethod(partial(torch.empty_like, memory_format=torch.contiguous_format))

    def buffer(self, name: str, array: Tensor, handle: Handle, types: dict[Any, int] | None = None) -> Buffer[Tensor]:
        dtype = (types or INTEGERS).get(array.dtype)
        if dtype is None or array.get_device() != handle.device:
            if array.get_device() != handle.device or array.device.type not in ("cpu", "cuda"):
                device = "cpu" if handle.device < 0 else f"cuda:{handle.device}"
                raise broken_rule(name, f"must be on the planner's device {device}", array.device)
            raise self.wrong_type(name, types or INTEGERS, array.dtype)
        if not array.is_contiguous():
            self.check_number(name, array.shape, array.numel())
            array = array.contiguous()
        return array.data_ptr(), dtype, array.numel(), array

    def empty(self, shape: Sequence[int], dtype: Any, beside: Tensor) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=beside.device)

    def counter(self, value: Tensor, handle: Handle) -> tuple[int, int]:
        dtype = INTEGERS.get(value.dtype)
        if dtype is None or value.get_device() != handle.device or value.numel() != 1:
            raise self.bad_counter(value, handle)
        return value.data_ptr(), dtype


is_compiling = torch.compiler.is_compiling
stream = TensorCalls.stream


def explain(error: Exception, **arguments: object) -> None:
    """PyTorch refuses some arguments before the library sees them: raises what names the first one that is no plain tensor, if that is why.
    """
    if isinstance(error, LplbError) or not any(isinstance(value, Tensor) for value in arguments.values()):
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


def _on_one_device(first: str, *tensors: Tensor | None) -> None:
    """Meta tensors go with meta tensors: PyTorch asks for shapes alone as soon as one argument is one."""
    for tensor in tensors:
        if tensor is not None and tensors[0] is not None and tensor.device != tensors[0].device:
            raise broken_rule(first, f"must be on one device with the other tensors ({tensor.device})", tensors[0].device)


def _run_fake(idx: Tensor, avail_counter: Tensor | None, planner: int, n_sms: int, plan: Tensor | None = None) -> Tensor:
    _on_one_device("idx", idx, avail_counter)
    return torch.empty_like(idx, memory_format=torch.contiguous_format)


def _redirect_fake(idx: Tensor, plan: Tensor | None, planner: int, n_sms: int) -> Tensor:
    return torch.empty_like(idx, memory_format=torch.contiguous_format)


def _redirect_by_ratio_fake(idx: Tensor, o_weight: Tensor, cumulative: Tensor, planner: int) -> Tensor:
    _on_one_device("idx", idx, o_weight, cumulative)
    return torch.empty_like(idx, memory_format=torch.contiguous_format)


def _count_fake(idx: Tensor, planner: int, n_chunks: int, n_logical: int) -> tuple[Tensor, Tensor]:
    return idx.new_empty((n_logical,), dtype=torch.int32), idx.new_empty((n_chunks, n_logical), dtype=torch.int32)


def _solve_fake(workload: Tensor, avail_counter: Tensor | None, plan: Tensor | None, planner: int, ratio_shape: list[int],
                scaled_shape: list[int]) -> tuple[Tensor, Tensor]:
    _on_one_device("workload", workload, avail_counter)
    return workload.new_empty(ratio_shape, dtype=torch.float32), workload.new_empty(scaled_shape, dtype=torch.float32)


def _layout_fake(physical: Tensor, experts: Tensor | None, row_of_slot: Tensor | None, plan: Tensor | None, planner: int, n_ranks: int,
                 n_rows: int, planned: bool) -> tuple[Tensor, Tensor]:
    _on_one_device("physical", physical, experts, row_of_slot)
    words = physical.new_empty((layout_sections(n_ranks, n_rows).end,), dtype=torch.int32)
    return physical.new_empty((physical.numel(),), dtype=torch.int64), words


def _layout_received_fake(words: Tensor, received: Tensor, planner: int, n_ranks: int, n_rows: int) -> Tensor:
    return torch.empty_like(words)


def _layout_by_row_fake(words: Tensor, planner: int, n_ranks: int, n_rows: int, n_by_row: int) -> Tensor:
    return words.new_empty((n_by_row,), dtype=torch.int64)


# define/impl costs a quarter of what torch.library.custom_op does per call. The planner's number is a SymInt, so that one compiled
# graph serves the planners of all layers. `plan` stands for the plan inside the planner, which run and solve write and redirect reads:
# nothing is stored in it, and eager calls give none, but without it a compiler would see no reason to keep them, in this order. For run it
# comes last, where a call that leaves it out costs nothing.
_calls = TensorCalls()
_define: Any = torch.library.Library  # untyped in PyTorch
_library = _define("lplb", "DEF")
for _schema, _kernel, _fake in (
    ("run(Tensor idx, Tensor(a!)? avail_counter, SymInt planner, int n_sms, Tensor(b!)? plan=None) -> Tensor", _calls.run, _run_fake),
    ("count(Tensor idx, SymInt planner, int n_chunks, int n_logical) -> (Tensor, Tensor)", _calls.count, _count_fake),
    ("solve(Tensor workload, Tensor(a!)? avail_counter, Tensor(b!)? plan, SymInt planner, int[] ratio_shape, int[] scaled_shape)"
     " -> (Tensor, Tensor)", _calls.solve, _solve_fake),
    ("redirect(Tensor idx, Tensor? plan, SymInt planner, int n_sms) -> Tensor", _calls.redirect, _redirect_fake),
    ("redirect_by_ratio(Tensor idx, Tensor o_weight, Tensor cumulative, SymInt planner) -> Tensor", _calls.redirect_by_ratio,
     _redirect_by_ratio_fake),
    ("layout(Tensor physical, Tensor? experts, Tensor? row_of_slot, Tensor? plan, SymInt planner, int n_ranks, int n_rows, bool planned)"
     " -> (Tensor, Tensor)", _calls.layout, _layout_fake),
    ("layout_received(Tensor words, Tensor received, SymInt planner, int n_ranks, int n_rows) -> Tensor", _calls.layout_received,
     _layout_received_fake),
    ("layout_by_row(Tensor words, SymInt planner, int n_ranks, int n_rows, SymInt n_by_row) -> Tensor", _calls.layout_by_row,
     _layout_by_row_fake),
):
    _name = _schema[: _schema.index("(")]
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, ranged(_name, _kernel), _key)
    torch.library.register_fake(f"lplb::{_name}", _fake, lib=_library)

run = torch.ops.lplb.run.default
count = torch.ops.lplb.count.default
solve = torch.ops.lplb.solve.default
redirect = torch.ops.lplb.redirect.default
redirect_by_ratio = torch.ops.lplb.redirect_by_ratio.default
layout = torch.ops.lplb.layout.default
layout_received = torch.ops.lplb.layout_received.default
layout_by_row = torch.ops.lplb.layout_by_row.default
