"""The rail: how counts travel between nodes, from each rank to those of the same local rank on the other nodes (lplb_rail_ops)."""

from __future__ import annotations

import ctypes
import logging
import os
import weakref
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import _c as _native, _exchange_c
from ._exchange import Layout, Rail
from ._gather import Waiting, abort_group
from .errors import BY_STATUS, CudaError, LibraryError, PeerTimeout, broken_rule

RAILS = ("auto", "nccl", "nvshmem")
UNIQUE_ID_BYTES = 128
PLUGIN_ABI = 2
NVSHMEM = "libnvshmem_host.so.3"

Steps = Generator[Any, "list[Any]", None]

log = logging.getLogger("lplb.exchange")


class TorchRail(Rail):
    """By torch.distributed in a group of the ranks along the rail; with NCCL it can be captured in CUDA graphs."""

    kind = "nccl"

    def __init__(self, rail_group: Any, device: int, on_abort: Callable[[], None]) -> None:
        self._group = weakref.ref(rail_group)  # it belongs to torch.distributed, see Exchange.group
        self.device, self._on_abort = device, on_abort
        self.words = ctypes.create_string_buffer(_native.MESSAGE_SIZE)
        self._tensors: dict[tuple[int, int], torch.Tensor] = {}
        self.ops = _exchange_c.RailOps(
            struct_size=ctypes.sizeof(_exchange_c.RailOps), context=None, all_gather=_exchange_c.RAIL_GATHER(self._all_gather),
            error=_exchange_c.RAIL_ERROR(self._error), destroy=_exchange_c.RAIL_DESTROY(), abort=_exchange_c.RAIL_ABORT(self._abort))

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

    def __init__(self, layout: Layout, device: int, n_counts: int, timeout: float) -> None:
        self.layout, self.device, self.n_counts, self.timeout = layout, device, n_counts, timeout
        self.ops = _exchange_c.RailOps()

    def steps(self) -> Steps:
        """As in _exchange_ways, but shown to all ranks of the group. Starts NVSHMEM for all of them unless somebody has."""
        plugin = load_plugin()
        message = ctypes.create_string_buffer(_native.MESSAGE_SIZE)

        def check(status: int) -> None:
            if status:
                raise _native.failure(status, _native.text(message.value))

        started = (yield bool(plugin.lplb_nvshmem_started()))
        if any(started) != all(started):
            raise LibraryError("rail: NVSHMEM is running on some ranks only")
        if not any(started):
            unique = ctypes.create_string_buffer(UNIQUE_ID_BYTES)
            if self.layout.rank == 0:
                check(plugin.lplb_nvshmem_unique_id(unique, message, len(message)))
            root = (yield unique.raw)[0]
            check(plugin.lplb_nvshmem_start(self.device, root, self.layout.rank, self.layout.ranks, message, len(message)))
        pes = yield int(plugin.lplb_nvshmem_pe())
        mine = pes[self.layout.local_rank :: self.layout.per_node]  # this rail's, node by node
        array = (ctypes.c_int32 * len(mine))(*mine)
        # Whatever can fail on one rank alone comes first, since the symmetric memory is allocated, and freed, by all of them together.
        check(plugin.lplb_nvshmem_rail_create(
            self.device, array, self.layout.n_nodes, self.layout.node, self.n_counts, round(self.timeout * 1000),
            ctypes.byref(self.ops), message, len(message)))
        yield None
        check(plugin.lplb_nvshmem_rail_connect(ctypes.byref(self.ops), message, len(message)))

    def set_limits(self, policy: int, timeout_ms: int) -> None:
        load_plugin().lplb_nvshmem_rail_limits(ctypes.byref(self.ops), policy, timeout_ms)

    def abandon(self) -> None:
        if self.ops.context and not self.taken:
            self.ops.abort(self.ops.context)

    def free(self) -> None:
        """Of a rail that no exchange has taken."""
        if self.ops.context:
            self.ops.destroy(self.ops.context)
            self.ops = _exchange_c.RailOps()


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


def check_rail(rail: str) -> str:
    if rail not in RAILS:
        raise broken_rule("rail", f"must be one of {', '.join(RAILS)}", repr(rail))
    return rail
