"""Between the caller's arrays (numpy arrays or torch tensors) and the plain host arrays of the C header. Never imports torch."""

from __future__ import annotations

import operator
import sys
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import numpy.typing as npt

from .errors import broken_rule

if TYPE_CHECKING:
    import torch

Array = Union["npt.NDArray[Any]", "torch.Tensor"]
Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


def loaded_torch() -> Any:
    """torch if the process has imported it, else None: whoever holds a tensor has imported it."""
    return sys.modules.get("torch")


def is_tensor(value: object) -> bool:
    torch = loaded_torch()
    return torch is not None and isinstance(value, torch.Tensor)


def integer(name: str, value: Any, minimum: int, maximum: int = 2**63 - 1) -> int:
    """value as int, minimum .. maximum."""
    try:
        number = operator.index(value)
    except TypeError:
        raise broken_rule(name, "must be an integer", f"{value!r}") from None
    if number < minimum:
        raise broken_rule(name, f"must be at least {minimum}", number)
    if number > maximum:
        raise broken_rule(name, f"must be at most {maximum}", number)
    return number


def to_host(name: str, value: Any) -> npt.NDArray[Any]:
    """value (tensor on any device, array, nested list) as a numpy array; waits for the device of a tensor."""
    if is_tensor(value):
        tensor = value.detach().cpu()
        if tensor.is_floating_point():
            tensor = tensor.double()  # numpy has no bfloat16
        array: npt.NDArray[Any] = tensor.numpy()
        return array
    try:
        return np.asarray(value)
    except ValueError as error:
        raise broken_rule(name, f"must be a tensor or an array ({error})", type(value).__name__) from None


def host_integers(name: str, value: Any, dimensions: int, dtype: type[np.int32] | type[np.int64]) -> npt.NDArray[Any]:
    """value as a contiguous integer array of that type and number of dimensions."""
    array = to_host(name, value)
    if array.ndim != dimensions:
        raise broken_rule(name, f"must have {dimensions} dimension{'s' * (dimensions > 1)}", f"shape {list(array.shape)}")
    if array.dtype.kind not in "iu":
        if array.size:
            raise broken_rule(name, "must hold integers", array.dtype)
        array = array.astype(dtype)
    limits = np.iinfo(dtype)
    if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
        worst = int(array.min()) if int(array.min()) < limits.min else int(array.max())
        raise broken_rule(name, f"values must fit {np.dtype(dtype).name}", worst)
    return np.ascontiguousarray(array, dtype=dtype)


def host_numbers(name: str, value: Any, dtype: type[np.float32] | type[np.float64]) -> npt.NDArray[Any]:
    """value as a contiguous floating point array; its shape is kept."""
    array = to_host(name, value)
    if array.dtype.kind not in "iufb":
        raise broken_rule(name, "must hold numbers", array.dtype)
    shape = array.shape
    return np.ascontiguousarray(array, dtype=dtype).reshape(shape)


def address(array: npt.NDArray[Any]) -> int:
    """Where the array's data begins. Several times cheaper than array.ctypes.data."""
    pointer: int = array.__array_interface__["data"][0]
    return pointer


def as_tensor(value: Any) -> Any:
    """An array as a CPU tensor that shares its memory if it is contiguous; anything else as it is."""
    return loaded_torch().from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
