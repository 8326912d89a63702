"""The rail: how counts travel between nodes, from each rank to those of the same local rank on the other nodes (lplb_rail_ops)."""

from __future__ import annotations

import ctypes
import logging
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import _c as _native
from ..errors import BY_STATUS, CudaError, LibraryError, PeerTimeout, broken_rule
from . import library
from .base import Layout, Refused
from .gather import Waiting, abort_group
from .state import GroupState

RAILS = ("auto", "nccl", "nvshmem")
UNIQUE_ID_BYTES = 128
PLUGIN_ABI = 2
NVSHMEM = "libnvshmem_host.so.3"

#: Does what this rank does by itself, then returns what all ranks did; raises on all of them where one failed.
Together = Callable[[Callable[[], Any]], "list[Any]"]

log = logging.getLogger("lplb.exchange")


class Rail:
    """How counts travel between nodes. ops: what the library calls; it and all behind it must live as long as the exchange."""

    kind: str
    ops: library.RailOps
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
        self._group = weakref.ref(rail_group)  # it belongs to torch.distributed, see Exchange.group
        self.device, self._on_abort = device, on_abort
        self.words = ctypes.create_string_buffer(_native.MESSAGE_SIZE)
        self._tensors: dict[tuple[int, int], torch.Tensor] = {}
        self.ops = library.RailOps(
            struct_size=ctypes.sizeof(library.RailOps), context=None, all_gather=library.RAIL_GATHER(self._all_gather),
            error=library.RAIL_ERROR(self._error), destroy=library.RAIL_DESTROY(), abort=library.RAIL_ABORT(self._abort))

    @property
    def group(self) -> Any:
        """The ranks along the rail; None once the process group is destroyed."""
        return self._group()

    def _all_gather(self, context: int, counts: int, gathered: int, n_counts: int, stream: int | None) -> int:
        """lplb_rail_ops.all_gather: a status of the library."""
        try:
            group = self.group
            if group is None:
                raise LibraryError("its process group is destroyed")
            out = self._tensor(gathered, dist.get_world_size(group) * n_counts)
            with torch.cuda.stream(self._stream(stream)):
                dist.all_gather_into_tensor(out, self._tensor(counts, n_counts), group=group)
            return 0
        except BaseException as error:  # nothing may pass through C
            failure = error if isinstance(error, LibraryError) else Waiting("NCCL", 0).failure(error)
            self.words.value = str(failure).encode()[: _native.MESSAGE_SIZE - 1]
            late = isinstance(failure, PeerTimeout)
            return next(status for status, kind in BY_STATUS.items() if kind is (type(failure) if late else CudaError))

    def _abort(self, context: int) -> None:
        """lplb_rail_ops.abort: NCCL's kernels stop waiting, and the communicator is of no more use."""
        try:
            self._on_abort()
            abort_group(self.group, self.device)
        except BaseException as error:  # nothing may pass through C
            log.warning("lplb: the rail's process group cannot be aborted: %s", error)

    def free(self) -> None:
        self._tensors.clear()

    def _error(self, context: int) -> int:
        return ctypes.addressof(self.words)

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
        self.ops = library.RailOps()

    def prepare(self, together: Together) -> None:
        """Starts NVSHMEM for all ranks unless somebody has."""
        message = ctypes.create_string_buffer(_native.MESSAGE_SIZE)
        at = self.layout

        def call(name: str, *arguments: Any) -> None:
            status = getattr(load_plugin(), name)(*arguments, message, len(message))
            if status:
                raise _native.failure(status, _native.text(message.value))

        def unique_id() -> bytes:
            unique = ctypes.create_string_buffer(UNIQUE_ID_BYTES)
            if at.rank == 0:
                call("lplb_nvshmem_unique_id", unique)
            return unique.raw

        def create(pes: list[int]) -> None:
            mine = pes[at.local_rank :: at.per_node]  # this rail's, node by node
            call("lplb_nvshmem_rail_create", self.device, (ctypes.c_int32 * len(mine))(*mine), at.n_nodes, at.node, self.n_counts,
                 self.timeout_ms, ctypes.byref(self.ops))

        started = together(lambda: bool(load_plugin().lplb_nvshmem_started()))
        if any(started) != all(started):
            raise Refused("rail: NVSHMEM is running on some ranks only")
        if not any(started):
            root = together(unique_id)[0]
            together(lambda: call("lplb_nvshmem_start", self.device, root, at.rank, at.ranks))
        pes = together(lambda: int(load_plugin().lplb_nvshmem_pe()))
        # Whatever can fail on one rank alone comes first, since the symmetric memory is allocated, and freed, by all of them together.
        together(lambda: create(pes))
        together(lambda: call("lplb_nvshmem_rail_connect", ctypes.byref(self.ops)))

    def set_limits(self, policy: int, timeout_ms: int) -> None:
        load_plugin().lplb_nvshmem_rail_limits(ctypes.byref(self.ops), policy, timeout_ms)

    def abandon(self) -> None:
        if self.ops.context and not self.taken:
            self.ops.abort(self.ops.context)

    def free(self) -> None:
        """Of a rail that no exchange has taken."""
        if self.ops.context:
            self.ops.destroy(self.ops.context)
            self.ops = library.RailOps()


_plugin: Any = None


def plugin_path() -> Path:
    """LPLB_NVSHMEM_PLUGIN, else beside the library."""
    override = os.environ.get("LPLB_NVSHMEM_PLUGIN")
    return Path(override) if override else Path(_native.find()).with_name("liblplb_nvshmem.so")


def has_plugin() -> bool:
    return plugin_path().is_file()


def load_plugin() -> Any:
    """The plugin with its functions declared. LibraryError where it is missing or cannot be loaded."""
    global _plugin
    if _plugin is None:
        path = plugin_path()
        _load_host_library()
        try:
            plugin = ctypes.CDLL(str(path))
        except OSError as error:
            raise LibraryError(f"rail: cannot load the NVSHMEM plugin {path}: {error}") from error
        abi = getattr(plugin, "lplb_nvshmem_abi", None)
        if abi is None or abi() != PLUGIN_ABI:
            raise LibraryError(f"rail: {path} belongs to another version of lplb")
        i32, i64, address, text = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p
        for name, arguments in {
            "lplb_nvshmem_started": [],
            "lplb_nvshmem_pe": [],
            "lplb_nvshmem_unique_id": [address, text, i64],
            "lplb_nvshmem_start": [i32, address, i32, i32, text, i64],
            "lplb_nvshmem_rail_create": [i32, address, i64, i64, i64, i64, address, text, i64],
            "lplb_nvshmem_rail_connect": [address, text, i64],
            "lplb_nvshmem_rail_limits": [address, i32, i64],
        }.items():
            function = getattr(plugin, name)
            function.restype, function.argtypes = i32, arguments
        plugin.lplb_nvshmem_rail_limits.restype = None
        _plugin = plugin
    return _plugin


def nvshmem_is_running() -> bool:
    """Whether somebody has started NVSHMEM in this process. Asking loads nothing unless NVSHMEM is loaded already, and changes nothing."""
    try:
        ctypes.CDLL(NVSHMEM, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False
    try:
        return bool(load_plugin().lplb_nvshmem_started())
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


def rail_group(group: Any, layout: Layout, device: int, state: GroupState) -> Any:
    """The ranks along this rail as a group; that of an earlier exchange where it still exists."""
    known = state.rail_group(layout.n_nodes)
    if known is None:
        along = dist.get_process_group_ranks(group)[layout.local_rank :: layout.per_node]
        # NCCL whatever the group's own backend: that one may be gloo, or several ("cpu:gloo,cuda:nccl", which PyTorch calls "undefined").
        backend = "nccl" if device >= 0 and dist.is_nccl_available() else dist.get_backend(group)
        known = dist.new_group(along, backend=backend, use_local_synchronization=True)
        state.keep_rail_group(layout.n_nodes, known)
    return known


def check_rail(rail: str) -> str:
    if rail not in RAILS:
        raise broken_rule("rail", f"must be one of {', '.join(RAILS)}", repr(rail))
    return rail
