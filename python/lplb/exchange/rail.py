"""The rail: how counts travel between nodes, from each rank to those of the same local rank on the other nodes (lplb_rail_ops)."""

from __future__ import annotations

import ctypes
import logging
import os
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import _c
from ..errors import BY_STATUS, CudaError, LibraryError, PeerTimeout
from .base import Layout, Refused
from .gather import Waiting, abort_group

UNIQUE_ID_BYTES = 128
PLUGIN_ABI = 2
NVSHMEM = "libnvshmem_host.so.3"

#: Does what this rank does by itself, then returns what all ranks did; raises on all of them where one failed.
Together = Callable[[Callable[[], Any]], "list[Any]"]

log = logging.getLogger("lplb.exchange")


class Rail:
    """How counts travel between nodes. ops: what the library calls; it and all behind it must live as long as the exchange."""

    kind: str
    ops: _c.RailOps
    taken = False  #: an exchange of the library owns what is behind it, and frees it with itself

    def prepare(self, together: Together) -> None:
        """Everything that takes all ranks, before the rail is used."""

    def set_limits(self, policy: int, timeout_ms: int) -> None:
        """As the exchange's, where the rail waits on the GPU itself."""

    def abandon(self) -> None:
        """Makes free() do without the other ranks, which may be gone."""

    def free(self) -> None:
        """Frees what no exchange has taken; on all ranks together, unless it is abandoned."""


class TorchRail(Rail):
    """By torch.distributed in a group of the ranks along the rail; with NCCL it can be captured in CUDA graphs."""

    kind = "nccl"

    def __init__(self, rail_group: Any, device: int, on_abort: Callable[[], None]) -> None:
        self.group = weakref.ref(rail_group)  # it belongs to torch.distributed, see Exchange.group
        self.device, self._on_abort = device, on_abort
        self.words = ctypes.create_string_buffer(_c.MESSAGE_SIZE)
        self._tensors: dict[tuple[int, int], torch.Tensor] = {}
        self.ops = _c.RailOps(all_gather=_c.RAIL_GATHER(self._all_gather), abort=_c.RAIL_END(self._abort),
                              error=_c.RAIL_ERROR(lambda context: ctypes.addressof(self.words)))

    def _all_gather(self, context: int, counts: int, gathered: int, n_counts: int, stream: int | None) -> int:
        """lplb_rail_ops.all_gather: a status of the library."""
        try:
            group = self.group()
            if group is None:
                raise LibraryError("its process group is destroyed")
            out = self._tensor(gathered, dist.get_world_size(group) * n_counts)
            with torch.cuda.stream(self._stream(stream)):
                dist.all_gather_into_tensor(out, self._tensor(counts, n_counts), group=group)
            return 0
        except BaseException as error:  # nothing may pass through C
            failure = error if isinstance(error, LibraryError) else Waiting("NCCL", 0).failure(error)
            self.words.value = str(failure).encode()[: _c.MESSAGE_SIZE - 1]
            late = isinstance(failure, PeerTimeout)
            return next(status for status, kind in BY_STATUS.items() if kind is (type(failure) if late else CudaError))

    def _abort(self, context: int) -> None:
        """lplb_rail_ops.abort: NCCL's kernels stop waiting, and the communicator is of no more use."""
        try:
            self._on_abort()
            abort_group(self.group(), self.device)
        except BaseException as error:  # nothing may pass through C
            log.warning("lplb: the rail's process group cannot be aborted: %s", error)

    def free(self) -> None:
        self._tensors.clear()

    def _stream(self, handle: int | None) -> Any:
        """The stream as PyTorch knows it. NULL is the default stream, of which ExternalStream would make a new one."""
        current = torch.cuda.current_stream(self.device)
        if current.cuda_stream == (handle or 0):
            return current
        external: Any = torch.cuda.ExternalStream  # untyped in PyTorch
        return external(handle, device=self.device) if handle else torch.cuda.default_stream(self.device)

    def _tensor(self, address: int, n: int) -> torch.Tensor:
        """The library's memory as a tensor. Only a few addresses occur again and again: the exchange's own, and the caller's counts."""
        key = (address, n)
        tensor = self._tensors.get(key)
        if tensor is None:
            if len(self._tensors) >= 64:
                self._tensors.clear()
            interface = {"data": (address, False), "shape": (n,), "typestr": "<i4", "version": 2, "strides": None}
            holder = type("DeviceMemory", (), {"__cuda_array_interface__": interface})()
            tensor = self._tensors[key] = torch.as_tensor(holder, device=torch.device("cuda", self.device))
        return tensor


class NvshmemRail(Rail):
    """By the plugin liblplb_nvshmem.so: put-with-signal, from the GPU."""

    kind = "nvshmem"

    def __init__(self, layout: Layout, device: int, n_counts: int, timeout_ms: int) -> None:
        self.layout, self.device, self.n_counts, self.timeout_ms = layout, device, n_counts, timeout_ms
        self.ops = _c.RailOps()

    def prepare(self, together: Together) -> None:
        """Starts NVSHMEM for all ranks unless somebody has."""
        at, ops = self.layout, ctypes.byref(self.ops)

        def unique_id() -> bytes:
            unique = ctypes.create_string_buffer(UNIQUE_ID_BYTES)
            if at.rank == 0:
                _c.call(load_plugin().unique_id, unique)
            return unique.raw

        started = together(lambda: bool(load_plugin().started()))
        if any(started) != all(started):
            raise Refused("rail: NVSHMEM is running on some ranks only")
        if not any(started):
            root = together(unique_id)[0]
            together(lambda: _c.call(load_plugin().start, self.device, root, at.rank, at.ranks))
        pes = together(lambda: load_plugin().pe())[at.local_rank :: at.per_node]  # this rail's, node by node
        # Whatever can fail on one rank alone comes first, since the symmetric memory is allocated, and freed, by all of them together.
        together(lambda: _c.call(load_plugin().rail_create, self.device, (ctypes.c_int32 * len(pes))(*pes), at.n_nodes, at.node,
                                 self.n_counts, self.timeout_ms, ops))
        together(lambda: _c.call(load_plugin().rail_connect, ops))

    def set_limits(self, policy: int, timeout_ms: int) -> None:
        load_plugin().rail_limits(ctypes.byref(self.ops), policy, timeout_ms)

    def abandon(self) -> None:
        if self.ops.context and not self.taken:
            self.ops.abort(self.ops.context)

    def free(self) -> None:
        if self.ops.context:
            self.ops.destroy(self.ops.context)
            self.ops = _c.RailOps()


def plugin_path() -> Path:
    """LPLB_NVSHMEM_PLUGIN, else beside the library."""
    override = os.environ.get("LPLB_NVSHMEM_PLUGIN")
    return Path(override) if override else Path(_c.find()).with_name("liblplb_nvshmem.so")


def has_plugin() -> bool:
    return plugin_path().is_file()


@cache
def load_plugin() -> _c.Plugin:
    """LibraryError where it is missing or cannot be loaded."""
    path, plugin = plugin_path(), _c.Plugin()
    _load_host_library()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"rail: cannot load the NVSHMEM plugin {path}: {error}") from error
    abi = getattr(library, "lplb_nvshmem_abi", None)
    if abi is None or abi() != PLUGIN_ABI:
        raise LibraryError(f"rail: {path} belongs to another version of lplb")
    _c.bind(plugin, _c.Plugin, library, "lplb_nvshmem_")
    return plugin


def nvshmem_is_running() -> bool:
    """Whether somebody has started NVSHMEM in this process. Asking loads nothing unless NVSHMEM is loaded already, and changes nothing."""
    try:
        ctypes.CDLL(NVSHMEM, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False
    try:
        return bool(load_plugin().started())
    except LibraryError as error:
        log.debug("lplb: no NVSHMEM: %s", error)
        return False


def _load_host_library() -> None:
    """PyPI's NVSHMEM stands where the dynamic linker does not look; one that is loaded already (DeepEP's, PyTorch's) is used."""
    import importlib.util

    found = importlib.util.find_spec("nvidia.nvshmem") if importlib.util.find_spec("nvidia") else None
    for folder in found.submodule_search_locations or [] if found else []:
        library = Path(folder) / "lib" / NVSHMEM
        if library.is_file():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return
