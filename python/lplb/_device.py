"""Which device a planner lives on, and what follows from it."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _native
from ._arrays import is_tensor, loaded_torch
from .errors import NoCuda, broken_rule


def device_ordinal(device: Any, given: Any) -> int:
    """-1 for the CPU, else the CUDA ordinal. given: the topology or placement, whose device counts where none is named."""
    torch = loaded_torch()
    if device is None:
        if is_tensor(given) and given.is_cuda:
            return int(given.get_device())
        if torch is None or isinstance(given, np.ndarray) or not torch.cuda.is_available():
            return _native.DEVICE_CPU
        return int(torch.cuda.current_device())
    if str(device) == "cpu":
        return _native.DEVICE_CPU
    if torch is None:
        if str(device).startswith("cuda"):
            raise NoCuda("device: planners on a GPU work on torch tensors; import torch first")
        raise broken_rule("device", "must be 'cpu' or a CUDA device", repr(device))
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        raise broken_rule("device", "must be 'cpu' or a CUDA device", repr(device)) from None
    if wanted.type == "cpu":
        return _native.DEVICE_CPU
    if wanted.type != "cuda":
        raise broken_rule("device", "must be 'cpu' or a CUDA device", repr(device))
    if wanted.index is not None:
        return int(wanted.index)
    return int(torch.cuda.current_device()) if torch.cuda.is_available() else 0  # the library says why there is none


def default_nodes(ep_size: int) -> int:
    """The library's rule where nobody says how the ranks lie on hosts."""
    return ep_size // 8 if ep_size % 8 == 0 else 1
