# mypy: disable-error-code="empty-body"
"""The functions of lplb.h: finds and loads the library, checks its version, and turns statuses into exceptions.

Nothing is loaded at import; load() does it at the first use and says where it looked if that fails.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union, get_type_hints

from ..errors import BY_STATUS, InternalError, LibraryError, LplbError
from .structs import MESSAGE_SIZE, VERSION

if TYPE_CHECKING:
    from ctypes import _CArgObject
else:
    _CArgObject = object


# An address or None for NULL. Integers are by far the cheapest thing to hand to ctypes.
Address = Union[int, c_void_p, None]

# Parameters and results: what Python gives or gets, and as which C type it travels.
Pointer = Annotated[Address, c_void_p]
Reference = Annotated[_CArgObject, c_void_p]  # of ctypes.byref
Message = Annotated["ctypes.Array[ctypes.c_char]", c_char_p]
Text = Annotated[bytes, c_char_p]
Memory = Annotated[Union[bytes, "ctypes.Array[Any]"], c_void_p]
I32 = Annotated[int, c_int32]
I64 = Annotated[int, c_int64]


class Functions:
    """The functions of lplb.h without the prefix; see there. Arrays are passed as addresses."""

    def version(self) -> I32: ...
    def status_string(self, status: I32) -> Text: ...
    def build_info(self) -> Text: ...
    def planner_create(self, config: Reference, planner: Reference, message: Message, message_size: I64) -> I32: ...
    def planner_destroy(self, planner: Pointer) -> None: ...
    def planner_error(self, planner: Pointer) -> Text: ...
    def planner_place(self, planner: Pointer, history: Pointer, stream: Pointer) -> I32: ...
    def planner_set_placement(self, planner: Pointer, phy2log: Pointer, n_physical: I64, stream: Pointer) -> I32: ...
    def planner_max_replicas(self, planner: Pointer, max_replicas: Reference) -> I32: ...
    def planner_phy2log(self, planner: Pointer, phy2log: Pointer, n_physical: I64) -> I32: ...
    def planner_log2phy(self, planner: Pointer, log2phy: Pointer, n_logical: I64, max_replicas: I64) -> I32: ...
    def planner_logcnt(self, planner: Pointer, logcnt: Pointer, n_logical: I64) -> I32: ...
    def planner_count(self, planner: Pointer, ids: Pointer, ids_dtype: I32, n_ids: I64, counts: Pointer, cumulative: Pointer, n_chunks: I64,
                      stream: Pointer) -> I32: ...
    def planner_solve(self, planner: Pointer, counts: Pointer, counts_dtype: I32, n_sources: I64, ratios: Pointer, scaled: Pointer,
                      counter: Pointer, counter_dtype: I32, stream: Pointer) -> I32: ...
    def counts_width(self, n_logical: I64) -> I64: ...
    def agree(self, config: Reference, agreement: Reference, message: Message, message_size: I64) -> I32: ...
    def planner_count_row(self, planner: Pointer, ids: Pointer, ids_dtype: I32, n_ids: I64, row: Pointer, stream: Pointer) -> I32: ...
    def planner_make_row(self, planner: Pointer, counts: Pointer, counts_dtype: I32, row: Pointer, stream: Pointer) -> I32: ...
    def planner_solve_rows(self, planner: Pointer, rows: Pointer, ratios: Pointer, scaled: Pointer, counter: Pointer, counter_dtype: I32,
                           stream: Pointer) -> I32: ...
    def planner_redirect(self, planner: Pointer, ids: Pointer, ids_dtype: I32, n_ids: I64, out: Pointer, max_blocks: I64,
                         stream: Pointer) -> I32: ...
    def planner_redirect_by_ratio(self, planner: Pointer, ids: Pointer, ids_dtype: I32, n_ids: I64, ratios: Pointer, cumulative: Pointer,
                                  n_chunks: I64, out: Pointer, stream: Pointer) -> I32: ...
    def planner_run(self, planner: Pointer, ids: Pointer, ids_dtype: I32, n_ids: I64, gathered: Pointer, out: Pointer, counter: Pointer,
                    counter_dtype: I32, max_blocks: I64, stream: Pointer) -> I32: ...
    def planner_info(self, planner: Pointer, plan: Reference, groups: Reference, n_groups: I64, stream: Pointer) -> I32: ...
    def planner_split(self, planner: Pointer, tokens: Pointer, n_physical: I64, stream: Pointer) -> I32: ...
    def planner_assignment(self, planner: Pointer, tokens: Pointer, n_physical: I64, stream: Pointer) -> I32: ...
    def eplb_rebalance(self, weight: Pointer, n_layers: I64, n_logical: I64, n_physical: I64, n_groups: I64, n_nodes: I64, n_ranks: I64,
                       phy2log: Pointer, replica: Pointer, logcnt: Pointer, message: Message, message_size: I64) -> I32: ...
    def place(self, config: Reference, history: Pointer, phy2log: Pointer, reports: Pointer, message: Message, message_size: I64
              ) -> I32: ...
    def placement_homes(self, phy2log: Pointer, n_physical: I64, n_logical: I64, ep_size: I64, former: Pointer, homes: Pointer,
                        message: Message, message_size: I64) -> I32: ...
    def solve(self, loads: Pointer, n_logical: I64, phy2log: Pointer, n_physical: I64, ep_size: I64, tokens: Pointer, info: Reference,
              message: Message, message_size: I64) -> I32: ...
    def exchange_connect(self, config: Reference, exchange: Reference, message: Message, message_size: I64) -> I32: ...
    def exchange_all_gather(self, exchange: Pointer, counts: Pointer, gathered: Pointer, stream: Pointer) -> I32: ...
    def exchange_set_limits(self, exchange: Pointer, policy: I32, timeout_ms: I64) -> I32: ...
    def exchange_abort(self, exchange: Pointer) -> None: ...
    def exchange_get_report(self, exchange: Pointer, report: Reference) -> I32: ...
    def exchange_close(self, exchange: Pointer) -> None: ...
    def exchange_destroy(self, exchange: Pointer) -> None: ...
    def exchange_error(self, exchange: Pointer) -> Text: ...
    def planner_attach_exchange(self, planner: Pointer, exchange: Pointer) -> I32: ...


class Plugin:
    """The functions of liblplb_nvshmem.so, see cuda/nvshmem/rail.h."""

    def abi(self) -> I32: ...
    def started(self) -> I32: ...
    def pe(self) -> I32: ...
    def unique_id(self, unique: Memory, message: Message, message_size: I64) -> I32: ...
    def start(self, device: I32, unique: Memory, rank: I32, n_ranks: I32, message: Message, message_size: I64) -> I32: ...
    def rail_create(self, device: I32, pes: Memory, n_nodes: I64, node: I64, n_counts: I64, timeout_ms: I64, ops: Reference,
                    message: Message, message_size: I64) -> I32: ...
    def rail_connect(self, ops: Reference, message: Message, message_size: I64) -> I32: ...
    def rail_limits(self, ops: Reference, policy: I32, timeout_ms: I64) -> None: ...


class Library(Functions):
    """The loaded library, whose own functions stand in place of the declarations above."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            library = ctypes.CDLL(path)  # CDLL: other Python threads run while a call works or waits
        except OSError as error:
            raise LibraryError(f"lplb: cannot load the library {path}: {error}") from error
        try:
            number = library.lplb_version()
            major, minor, patch = number // 10000, number // 100 % 100, number % 100
            if (major, minor) != VERSION[:2]:
                wanted = f"{VERSION[0]}.{VERSION[1]}"
                raise LibraryError(f"lplb: this package needs library version {wanted}.x, but {path} is {major}.{minor}.{patch}")
            bind(self, Functions, library, "lplb_")
        except AttributeError as error:
            raise LibraryError(f"lplb: {path} is no complete lplb library: {error}") from error


def bind(target: object, declarations: type, library: ctypes.CDLL, prefix: str) -> None:
    """Gives target the library's functions in place of their declarations."""
    for name, declared in vars(declarations).items():
        if callable(declared):
            kinds = get_type_hints(declared, include_extras=True).values()
            *parameters, result = (getattr(kind, "__metadata__", (None,))[0] for kind in kinds)
            function = getattr(library, prefix + name)
            function.restype, function.argtypes = result, parameters
            setattr(target, name, function)


@cache
def load() -> Library:
    """The library, loaded at the first call. LibraryError says where it looked. (Threads that come at once may bind it twice: no harm.)"""
    return Library(find())


def find() -> str:
    """The path of the library: LPLB_LIBRARY if that is set, else the one inside this package."""
    inside = Path(__file__).resolve().parents[1] / "lib" / "liblplb.so.0"
    override = os.environ.get("LPLB_LIBRARY")
    looked_at = Path(override) if override else inside
    if looked_at.is_file():
        return str(looked_at)
    if override:
        raise LibraryError(f"lplb: LPLB_LIBRARY is set to {override}, and there is no such file")
    raise LibraryError(
        f"lplb: the library was not found. Looked at {inside}; LPLB_LIBRARY, which may name another file, is not set. "
        "Install the package with 'pip install .', or build with 'swift build -c release --product lplb' and set LPLB_LIBRARY.")


def call(function: Callable[..., int], *arguments: object) -> None:
    """Calls a function whose last two parameters take a message. Raises its words unless it returns LPLB_OK."""
    message = ctypes.create_string_buffer(MESSAGE_SIZE)
    status = function(*arguments, message, MESSAGE_SIZE)
    if status:
        raise failure(status, text(message.value))


def failure(status: int, message: str) -> LplbError:
    """The exception for a status and the library's words."""
    return BY_STATUS.get(status, InternalError)(message or text(load().status_string(status)))


def text(message: bytes) -> str:
    return message.decode("utf-8", "replace")
