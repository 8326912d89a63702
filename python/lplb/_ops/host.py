"""Between the caller's arrays (numpy arrays or torch tensors) and the plain host arrays of the C header. Never imports torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, Union

import numpy as np
import numpy.typing as npt

from ..errors import LplbError, OutOfMemory, Unsupported, broken_rule, shown

if TYPE_CHECKING:
    import torch

Array = Union["npt.NDArray[Any]", "torch.Tensor"]
A = TypeVar("A", "npt.NDArray[Any]", "torch.Tensor")  # the kind of arrays that goes in and comes out
Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


def loaded_torch() -> Any:
    """torch if the process has imported it, else None: whoever holds a tensor has imported it."""
    return sys.modules.get("torch")


def is_tensor(value: object) -> bool:
    torch = loaded_torch()
    return torch is not None and isinstance(value, torch.Tensor)


def to_host(name: str, value: Any, dimensions: int | None = None, most: int | None = None) -> npt.NDArray[Any]:
    """value (tensor on any device, array, nested list) as a numpy array; waits for the device of a tensor. dimensions and most, which
    bounds the elements, are checked before anything is copied."""
    try:
        if is_tensor(value):
            check_plain(name, value)
            check_shape(name, value, dimensions, most)
            tensor = value.detach().cpu().resolve_conj().resolve_neg()
            host: npt.NDArray[Any] = (tensor.double() if tensor.is_floating_point() else tensor).numpy()  # numpy has no bfloat16
            return host
        array = np.asarray(value)
    except (LplbError, MemoryError):
        raise
    except Exception as error:  # of the value's own methods, or numpy's for nested lists of different lengths
        if is_tensor(value) and value.is_cuda:
            raise  # the device's
        words = " ".join(shown(str(error)).split())
        raise broken_rule(name, f"must be a tensor or an array ({words})", type(value).__name__) from None
    if array.dtype == object and array.ndim == 0:
        raise broken_rule(name, "must be a tensor or an array", type(value).__name__)
    if is_masked(value):
        raise broken_rule(name, "must be a tensor or a plain array", type(value).__name__)
    check_shape(name, array, dimensions, most)
    return array


def is_masked(value: Any) -> bool:
    """Of numpy.ma, whose elements may be absent."""
    return type(value) is not np.ndarray and isinstance(value, np.ndarray) and isinstance(value, np.ma.MaskedArray)


def check_plain(name: str, tensor: Any) -> None:
    """Refuses tensors whose elements cannot be read one after the other."""
    torch = loaded_torch()
    if tensor.layout is not torch.strided:
        raise broken_rule(name, "must be a dense tensor", str(tensor.layout))
    if tensor.is_quantized or tensor.is_nested:
        raise broken_rule(name, "must be a plain tensor", "a nested one" if tensor.is_nested else str(tensor.dtype))
    if tensor.device.type == "meta" or (tensor.numel() and type(tensor) is torch.Tensor and not tensor.data_ptr()):
        raise broken_rule(name, "must be a tensor with data", f"one without, on device {tensor.device}")


def check_shape(name: str, array: Any, dimensions: int | None, most: int | None) -> None:
    shape = list(array.shape)
    if dimensions is not None and len(shape) != dimensions:
        raise broken_rule(name, f"must have {dimensions} dimension{'s' * (dimensions > 1)}", f"shape {shape}")
    if most is not None and math.prod(shape) > most:
        raise Unsupported(f"{name}: must have at most {most} elements, got shape {shape}")


def shape_of(array: Any) -> list[int]:
    """[] for what has none."""
    try:
        return list(array.shape)
    except Exception:  # a nested tensor's
        return []


def host_integers(name: str, value: Any, dimensions: int, dtype: type[np.int32] | type[np.int64], most: int | None = None
                  ) -> npt.NDArray[Any]:
    """value as a contiguous integer array of that type and number of dimensions, with at most so many elements."""
    array = to_host(name, value, dimensions, most)
    if array.dtype.kind not in "iu":
        if array.size:
            raise broken_rule(name, "must hold integers", array.dtype)
        array = array.astype(dtype)
    if array.size and not np.can_cast(array.dtype, dtype):
        limits, least, largest = np.iinfo(dtype), int(array.min()), int(array.max())
        if least < limits.min or largest > limits.max:
            raise broken_rule(name, f"values must fit {np.dtype(dtype).name}", least if least < limits.min else largest)
    return np.ascontiguousarray(array, dtype=dtype)


def host_numbers(name: str, value: Any, dtype: type[np.float32] | type[np.float64], dimensions: int | None = None,
                 most: int | None = None) -> npt.NDArray[Any]:
    """value as a contiguous floating point array; its shape is kept. What is too large for the type becomes infinite."""
    array = to_host(name, value, dimensions, most)
    if array.dtype.kind not in "iufb":
        raise broken_rule(name, "must hold numbers", array.dtype)
    shape = array.shape
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(array, dtype=dtype).reshape(shape)


@contextmanager
def enough_memory(name: str) -> Iterator[None]:
    """Python's MemoryError as the library's."""
    try:
        yield
    except OutOfMemory:
        raise
    except MemoryError as error:
        raise OutOfMemory(f"{name}: there is not enough memory for what it asks for ({error})") from None


def address_of(array: npt.NDArray[Any]) -> int:
    """Where the array's data begins. Several times cheaper than array.ctypes.data."""
    pointer: int = array.__array_interface__["data"][0]
    return pointer


def as_given(array: npt.NDArray[Any], given: A) -> A:
    """A result in the kind of what was given: a CPU tensor for a tensor."""
    result: Any = loaded_torch().from_numpy(array) if is_tensor(given) else array
    return result  # type: ignore[no-any-return]
