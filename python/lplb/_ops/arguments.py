"""Checks of arguments that are no arrays."""

from __future__ import annotations

import operator
import os
import sys
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from .. import _c
from ..errors import NoCuda, broken_rule, shown
from .host import is_tensor, loaded_torch

if TYPE_CHECKING:
    import torch

    from ..exchange import Exchange

Device = Union[str, int, "torch.device", None]
EXCHANGES = ("auto", "ipc", "torch")
FORMER_EXCHANGES = {"nccl": "torch", "symm": "ipc"}  # names that are still accepted


def integer(name: str, value: Any, minimum: int, maximum: int = 2**63 - 1) -> int:
    """value as int, minimum .. maximum. No bool, which is never meant as a number."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except Exception:  # of the value's own methods
        raise broken_rule(name, "must be an integer", shown(value)) from None
    if number < minimum:
        raise broken_rule(name, f"must be at least {minimum}", number)
    if number > maximum:
        raise broken_rule(name, f"must be at most {maximum}", number)
    return number


def truth(name: str, value: Any) -> bool:
    """value as bool: True or False, or 1 or 0."""
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise broken_rule(name, "must be True or False", shown(value))


def device_ordinal(device: Device, given: Any) -> int:
    """-1 for the CPU, else the CUDA ordinal. given: the topology or placement, whose device counts where none is named."""
    torch = loaded_torch()
    if device is None:
        if is_tensor(given) and given.is_cuda:
            return int(given.get_device())
        if torch is None or isinstance(given, np.ndarray) or not torch.cuda.is_available():
            return _c.DEVICE_CPU
        return int(torch.cuda.current_device())
    if isinstance(device, str) and device == "cpu":
        return _c.DEVICE_CPU
    if torch is None:
        if (isinstance(device, str) and device.startswith("cuda")) or (isinstance(device, int) and not isinstance(device, bool)):
            raise NoCuda(f"device: a planner on a GPU works on torch tensors, and torch is not imported (import torch first), "
                         f"got {shown(device)}")
        raise broken_rule("device", "must be 'cpu' or a CUDA device", shown(device))
    try:
        if isinstance(device, bool):
            raise TypeError
        wanted = torch.device(device)
    except Exception:
        raise broken_rule("device", "must be 'cpu' or a CUDA device", shown(device)) from None
    if wanted.type == "cpu":
        return _c.DEVICE_CPU
    if wanted.type != "cuda":
        raise broken_rule("device", "must be 'cpu' or a CUDA device", shown(device))
    _check_gpu(torch, device)
    if wanted.index is not None and wanted.index >= torch.cuda.device_count():
        raise broken_rule("device", f"must be one of the {torch.cuda.device_count()} GPUs, numbered from 0", shown(device))
    return int(torch.cuda.current_device()) if wanted.index is None else int(wanted.index)


def _check_gpu(torch: Any, device: Any) -> None:
    """Says what is missing, where a GPU is asked for that torch cannot give tensors on."""
    if not torch.backends.cuda.is_built():
        missing = f"torch {torch.__version__} was built without CUDA"
    elif not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        missing = "torch finds no usable GPU or driver" + (f" (CUDA_VISIBLE_DEVICES is {shown(hidden)})" if hidden is not None else "")
    elif b"without CUDA" in _c.load().build_info():
        missing = "this lplb was built without CUDA"
    else:
        return
    raise NoCuda(f"device: cannot be a GPU here, since {missing}; device='cpu' plans on the host, got {shown(device)}")


def one_of(name: str, value: str, names: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in names:
        raise broken_rule(name, f"must be one of {', '.join(names)}", shown(value))
    return value


def check_group(group: Any) -> None:
    """Refuses what is no torch.distributed process group."""
    torch = loaded_torch()
    if torch is None or not torch.distributed.is_available():
        raise broken_rule("group", "must be a torch.distributed process group, which needs torch imported and built with it", shown(group))
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise broken_rule("group", "must be a torch.distributed process group that contains this process", shown(group))


def check_exchange(exchange: str | Exchange) -> str | Exchange:
    """The name of a way, or an exchange."""
    names = ", ".join(EXCHANGES)
    if isinstance(exchange, str):
        exchange = FORMER_EXCHANGES.get(exchange, exchange)
        if exchange not in EXCHANGES:
            raise broken_rule("exchange", f"must be one of {names}", shown(exchange))
        return exchange
    if not isinstance(exchange, getattr(sys.modules.get("lplb.exchange"), "Exchange", ())):  # whose maker has loaded the module
        raise broken_rule("exchange", f"must be one of {names} or an exchange of lplb.exchange", shown(exchange))
    return exchange


def default_nodes(ep_size: int) -> int:
    """The library's rule where nobody says how the ranks lie on hosts."""
    return ep_size // 8 if ep_size % 8 == 0 else 1
