"""Torch tensors as the library takes them, see buffer.py. Imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._c.handle import Handle
from .._c.structs import INT32, INT64
from ..errors import broken_rule
from .buffer import Arrays, Buffer


INTEGERS = {torch.int32: INT32, torch.int64: INT64}


class TensorArrays(Arrays[Tensor]):
    int32, float32 = torch.int32, torch.float32

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
