"""Memory of arrays as the library takes it. What differs between numpy arrays and torch tensors stands here and in tensors.py alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, Generic

import numpy as np
import numpy.typing as npt

from .._c.handle import Handle
from .._c.structs import INT32, INT64, MAX_IDS
from ..errors import LplbError, broken_rule
from .host import A, Array, address_of, is_masked, is_tensor, to_host

# Contiguous memory on the planner's device: address, type (LPLB_INT32 or LPLB_INT64 where the library asks for one), number of elements,
# and the array that owns it. A plain tuple, since run makes two of them and is counted in tenths of a microsecond.
Buffer = tuple[int, int, int, A]


class Arrays(ABC, Generic[A]):
    """One kind of arrays."""

    int32: Any  #: types as this kind calls them
    float32: Any

    @abstractmethod
    def buffer(self, name: str, array: A, handle: Handle, types: dict[Any, int] | None = None) -> Buffer[A]:
        """The argument `name`, copied if it is not contiguous. types: those allowed, integers unless it says otherwise."""

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: Any, beside: A) -> A:
        """On the device of `beside`."""

    @abstractmethod
    def empty_like(self, array: A, /) -> A:
        """Contiguous."""

    @abstractmethod
    def address(self, array: A, /) -> int: ...

    @abstractmethod
    def stream(self, device: int, /) -> int | None:
        """The current stream of a GPU."""

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


INTEGERS = {np.dtype(np.int32): INT32, np.dtype(np.int64): INT64}


class NumpyArrays(Arrays["npt.NDArray[Any]"]):
    int32, float32 = np.dtype(np.int32), np.dtype(np.float32)
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
