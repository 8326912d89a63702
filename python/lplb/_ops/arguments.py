"""Checks of arguments: numbers, devices, groups, exchanges, and the sizes of a planner with its topology or its first placement."""

from __future__ import annotations

import operator
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from .. import _c
from ..errors import NoCuda, broken_rule, shown
from .host import Array, Int32s, host_integers, is_tensor, loaded_torch

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
        _check_not_forked(torch, device)
        return int(torch.cuda.current_device())
    if isinstance(device, str) and device == "cpu":
        return _c.DEVICE_CPU
    wanted: Any = None
    if torch is not None and not isinstance(device, bool):
        with suppress(Exception):
            wanted = torch.device(device)
    elif (isinstance(device, str) and device.startswith("cuda")) or (isinstance(device, int) and not isinstance(device, bool)):
        raise NoCuda(f"device: a planner on a GPU works on torch tensors, and torch is not imported (import torch first), "
                     f"got {shown(device)}")
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise broken_rule("device", "must be 'cpu' or a CUDA device", shown(device))
    if wanted.type == "cpu":
        return _c.DEVICE_CPU
    _check_gpu(torch, device)
    _check_not_forked(torch, device)
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


def _check_not_forked(torch: Any, device: Any) -> None:
    if torch.cuda._is_in_bad_fork():
        raise NoCuda("device: cannot be a GPU in a process that was forked after CUDA was used: start processes with multiprocessing's "
                     f"'spawn' or 'forkserver', or give device='cpu', got {shown(device)}")


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


@dataclass(frozen=True)
class Shape:
    n_logical: int
    n_physical: int
    group_size: int
    r2o: Int32s  #: [group_size, classes of redundant slots]; none for a placement
    phy2log: Int32s | None  #: None for a topology

    def slot_classes(self) -> Int32s | None:
        """r2o as the library takes it: without columns where no slot is redundant, None for a placement."""
        if self.phy2log is not None:
            return None
        return self.r2o if self.n_physical > self.n_logical else np.empty((self.group_size, 0), dtype=np.int32)


def shape_by_topology(redundant_to_original: Array, n_routed_experts: int, n_logical_routed_experts: int, ep_size: int) -> Shape:
    r2o: Int32s = host_integers("redundant_to_original", redundant_to_original, 2, np.int32, _c.MAX_PHYSICAL)
    group_size, num_redundants = r2o.shape
    if group_size == 0:
        raise broken_rule("redundant_to_original", "must have at least one row", f"shape {list(r2o.shape)}")
    if (np.sort(r2o, axis=0) != np.arange(group_size)[:, None]).any():
        raise broken_rule("redundant_to_original", f"each column must be a permutation of 0 .. {group_size - 1}", r2o.T.tolist())
    n_logical = integer("n_logical_routed_experts", n_logical_routed_experts, 1)
    n_physical = integer("n_routed_experts", n_routed_experts, 1)
    if ep_size % group_size:
        raise broken_rule("ep_size", f"must be a multiple of the topology's {group_size} ranks", ep_size)
    if n_logical % ep_size:
        raise broken_rule("n_logical_routed_experts", f"must be a multiple of ep_size = {ep_size}", n_logical)
    if n_physical < n_logical or (n_physical - n_logical) % (ep_size * max(1, num_redundants)):
        rule = f"must be n_logical_routed_experts = {n_logical} plus a multiple of ep_size * num_redundants = "
        raise broken_rule("n_routed_experts", f"{rule}{ep_size} * {num_redundants}", n_physical)
    if n_physical > n_logical and not num_redundants:
        raise broken_rule("redundant_to_original", "must have a column for each class of redundant slots", f"shape {list(r2o.shape)}")
    return Shape(n_logical, n_physical, group_size, r2o, None)


def shape_by_placement(phy2log: Array, n_logical: int | None, group_size: int | None, ep_size: int) -> Shape:
    slots: Int32s = host_integers("phy2log", phy2log, 1, np.int32, _c.MAX_PHYSICAL)
    if not slots.size:
        raise broken_rule("phy2log", "must have at least one slot", f"shape {list(slots.shape)}")
    experts = integer("n_logical", int(slots.max()) + 1 if n_logical is None else n_logical, 1)
    size = ep_size if group_size is None else integer("group_size", group_size, 1)
    return Shape(experts, slots.size, size, np.empty((size, 0), dtype=np.int32), slots)
