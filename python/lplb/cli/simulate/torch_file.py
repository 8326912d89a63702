"""Reading what torch.save wrote, with weights_only, so that nothing in the file is run.

    a tensor                 counts [steps, layers, experts], or of one snapshot [layers, experts]
    {"topk_ids": ...}        ids [tokens, layers, k]; optional: n_experts
    {"logical_count": ...}   counts of either form; SGLang's recorder writes one for each of its buffered steps
    {"expert_load_window": [steps, layers, slots] or "expert_load_pass": [layers, slots], "physical_to_logical_map": [layers, slots]}
                             fields of vLLM's EplbModelState: the loads of slots are added up by expert
"""

from __future__ import annotations

import math
import os
import stat
import zipfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import mib
from ..terminal import UsageError, shown

BY_SLOT = ("expert_load_window", "expert_load_pass")


def read(path: str, limit: int) -> dict[str, NDArray[Any]]:
    """{"topk_ids": array} with n_experts where the file has it, or {"counts": array}. limit: bytes that the file may unpack to."""
    content = _load(path, limit)
    if not isinstance(content, dict):
        content = {"logical_count": content}
    arrays = {name: _array(path, name, content[name], limit)
              for name in ("topk_ids", "n_experts", "logical_count", "physical_to_logical_map", *BY_SLOT) if name in content}
    if "topk_ids" in arrays:
        return {name: arrays[name] for name in ("topk_ids", "n_experts") if name in arrays}
    if "logical_count" in arrays:
        return {"counts": arrays["logical_count"]}
    for name in BY_SLOT:
        if name in arrays and "physical_to_logical_map" in arrays:
            return {"counts": _by_expert(path, name, arrays[name], arrays["physical_to_logical_map"], limit)}
    held = ", ".join(map(str, content)) or "nothing"
    raise UsageError(f"{path}: needs a tensor of counts, or topk_ids, logical_count, or expert_load_window with physical_to_logical_map; "
                     f"it holds {shown(held, 200)}")


def _load(path: str, limit: int) -> Any:
    try:
        import torch
    except ImportError:
        raise UsageError(f"{path}: reading a .pt needs torch") from None
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UsageError(f"{path}: is no ordinary file")
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
        if packed:  # torch.save packs nothing, and what a packed entry holds is known only when it is unpacked
            raise UsageError(f"{path}: is not what torch.save writes")
        if size > limit:
            raise UsageError(f"{path}: holds {mib(size)}, and the limit is {mib(limit)}: raise the limit with --unpack-limit")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file") from None
    except Exception as error:  # of torch, its unpickler, zipfile and the system
        raise UsageError(f"{path}: not a readable .pt of tensors and plain values: {shown(' '.join(str(error).split()), 200)}") from None


def _array(path: str, name: str, value: Any, limit: int) -> NDArray[Any]:
    import torch

    if isinstance(value, (int, float)):
        return np.array(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(one, torch.Tensor) and one.shape == value[0].shape for one in value):
        value = torch.stack(list(value))
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_quantized or value.is_complex():
        raise UsageError(f"{path}: {name} must be a tensor of numbers, got {type(value).__name__}")
    size = math.prod(value.shape) * value.element_size()
    if size > limit:  # a view may be larger than what the file holds
        raise UsageError(f"{path}: {name} unpacks to {mib(size)}, and the limit is {mib(limit)}: raise the limit with --unpack-limit")
    plain = value.detach().double() if value.is_floating_point() else value.detach()
    array: NDArray[Any] = plain.numpy()
    return array


def _by_expert(path: str, name: str, loads: NDArray[Any], expert_of: NDArray[Any], limit: int) -> NDArray[np.int64]:
    """Counts [..., layers, experts] from loads [..., layers, slots]."""
    if expert_of.ndim != 2 or loads.ndim not in (2, 3) or loads.shape[-2:] != expert_of.shape or expert_of.dtype.kind not in "iu":
        raise UsageError(f"{path}: {name} and physical_to_logical_map must have the same layers and slots, got {list(loads.shape)} and "
                         f"{list(expert_of.shape)}")
    n_experts = int(expert_of.max(initial=-1)) + 1
    if not 1 <= n_experts <= expert_of.shape[1] or expert_of.min() < -1:
        raise UsageError(f"{path}: physical_to_logical_map must hold experts of 0 .. {expert_of.shape[1] - 1}, or -1 for none")
    if loads.dtype.kind not in "iuf" or (loads.dtype.kind == "f" and not (loads == np.floor(loads)).all()) or (loads < 0).any():
        raise UsageError(f"{path}: {name} must hold whole numbers of at least 0")
    steps = loads.reshape(-1, *expert_of.shape)
    counts = np.zeros((len(steps), len(expert_of), n_experts + 1), dtype=np.int64)  # the last one: of slots that hold nothing
    for step, layer in np.ndindex(counts.shape[:2]):
        np.add.at(counts[step, layer], expert_of[layer], steps[step, layer].astype(np.int64))
    return counts[..., :-1].reshape(*loads.shape[:-1], n_experts)
