"""The functions of lplb.h: finds and loads the library, checks its version, and turns statuses into exceptions.

Nothing is loaded at import; load() does it at the first use and says where it looked if that fails.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, Union, get_args, get_type_hints

from ..errors import BY_STATUS, InternalError, LibraryError, LplbError
from .structs import MESSAGE_SIZE, VERSION

if TYPE_CHECKING:
    from ctypes import _CArgObject
else:
    _CArgObject = object


class HasAddress(Protocol):
    @property
    def _as_parameter_(self) -> int: ...


# An address (int), or None for NULL; or what has one as _as_parameter_. Integers are by far the cheapest thing to hand to ctypes.
Address = Union[int, HasAddress, None]

# Parameters and results: what Python gives or gets, and as which C type it travels.
Pointer = Annotated[Address, c_void_p]
Reference = Annotated[_CArgObject, c_void_p]  # of ctypes.byref
Message = Annotated["ctypes.Array[ctypes.c_char]", c_char_p]
Text = Annotated[bytes, c_char_p]
I32 = Annotated[int, c_int32]
I64 = Annotated[int, c_int64]


class Library:
    """The loaded library. One attribute per function of lplb.h, without the prefix; arrays are passed as addresses."""

    # int32_t lplb_version(void);
    version: Callable[[], I32]
    # const char *lplb_status_string(lplb_status status);
    status_string: Callable[[I32], Text]
    # const char *lplb_build_info(void);
    build_info: Callable[[], Text]
    # lplb_status lplb_planner_create(const lplb_config *config, lplb_planner **planner, char *message, int64_t message_size);
    planner_create: Callable[[Reference, Reference, Message, I64], I32]
    # void lplb_planner_destroy(lplb_planner *planner);
    planner_destroy: Callable[[Pointer], None]
    # const char *lplb_planner_error(const lplb_planner *planner);
    planner_error: Callable[[Pointer], Text]
    # lplb_status lplb_planner_place(lplb_planner *planner, const double *history, void *stream);
    planner_place: Callable[[Pointer, Pointer, Pointer], I32]
    # lplb_status lplb_planner_set_placement(lplb_planner *planner, const int32_t *phy2log, int64_t n_physical, void *stream);
    planner_set_placement: Callable[[Pointer, Pointer, I64, Pointer], I32]
    # lplb_status lplb_planner_max_replicas(lplb_planner *planner, int64_t *max_replicas);
    planner_max_replicas: Callable[[Pointer, Reference], I32]
    # lplb_status lplb_planner_phy2log(lplb_planner *planner, int32_t *phy2log, int64_t n_physical);
    planner_phy2log: Callable[[Pointer, Pointer, I64], I32]
    # lplb_status lplb_planner_log2phy(lplb_planner *planner, int32_t *log2phy, int64_t n_logical, int64_t max_replicas);
    planner_log2phy: Callable[[Pointer, Pointer, I64, I64], I32]
    # lplb_status lplb_planner_logcnt(lplb_planner *planner, int32_t *logcnt, int64_t n_logical);
    planner_logcnt: Callable[[Pointer, Pointer, I64], I32]
    # lplb_status lplb_planner_count(lplb_planner *planner, const void *ids, lplb_dtype ids_dtype, int64_t n_ids, int32_t *counts,
    #     int32_t *cumulative, int64_t n_chunks, void *stream);
    planner_count: Callable[[Pointer, Pointer, I32, I64, Pointer, Pointer, I64, Pointer], I32]
    # lplb_status lplb_planner_solve(lplb_planner *planner, const void *counts, lplb_dtype counts_dtype, int64_t n_sources, float *ratios,
    #     float *scaled, void *counter, lplb_dtype counter_dtype, void *stream);
    planner_solve: Callable[[Pointer, Pointer, I32, I64, Pointer, Pointer, Pointer, I32, Pointer], I32]
    # int64_t lplb_counts_width(int64_t n_logical);
    counts_width: Callable[[I64], I64]
    # lplb_status lplb_agree(const lplb_agree_config *config, lplb_agreement *agreement, char *message, int64_t message_size);
    agree: Callable[[Reference, Reference, Message, I64], I32]
    # lplb_status lplb_planner_count_row(lplb_planner *planner, const void *ids, lplb_dtype ids_dtype, int64_t n_ids, int32_t *row,
    #     void *stream);
    planner_count_row: Callable[[Pointer, Pointer, I32, I64, Pointer, Pointer], I32]
    # lplb_status lplb_planner_make_row(lplb_planner *planner, const void *counts, lplb_dtype counts_dtype, int32_t *row, void *stream);
    planner_make_row: Callable[[Pointer, Pointer, I32, Pointer, Pointer], I32]
    # lplb_status lplb_planner_solve_rows(lplb_planner *planner, const int32_t *rows, float *ratios, float *scaled, void *counter,
    #     lplb_dtype counter_dtype, void *stream);
    planner_solve_rows: Callable[[Pointer, Pointer, Pointer, Pointer, Pointer, I32, Pointer], I32]
    # lplb_status lplb_planner_redirect(lplb_planner *planner, const void *ids, lplb_dtype ids_dtype, int64_t n_ids, void *out, int64_t
    #     max_blocks, void *stream);
    planner_redirect: Callable[[Pointer, Pointer, I32, I64, Pointer, I64, Pointer], I32]
    # lplb_status lplb_planner_redirect_by_ratio(lplb_planner *planner, const void *ids, lplb_dtype ids_dtype, int64_t n_ids, const
    #     float *ratios, const int32_t *cumulative, int64_t n_chunks, void *out, void *stream);
    planner_redirect_by_ratio: Callable[[Pointer, Pointer, I32, I64, Pointer, Pointer, I64, Pointer, Pointer], I32]
    # lplb_status lplb_planner_run(lplb_planner *planner, const void *ids, lplb_dtype ids_dtype, int64_t n_ids, const int32_t *gathered,
    #     void *out, void *counter, lplb_dtype counter_dtype, int64_t max_blocks, void *stream);
    planner_run: Callable[[Pointer, Pointer, I32, I64, Pointer, Pointer, Pointer, I32, I64, Pointer], I32]
    # lplb_status lplb_planner_info(lplb_planner *planner, lplb_plan_info *plan, lplb_group_info *groups, int64_t n_groups, void *stream);
    planner_info: Callable[[Pointer, Reference, Reference, I64, Pointer], I32]
    # lplb_status lplb_planner_split(lplb_planner *planner, int64_t *tokens, int64_t n_physical, void *stream);
    planner_split: Callable[[Pointer, Pointer, I64, Pointer], I32]
    # lplb_status lplb_planner_assignment(lplb_planner *planner, int64_t *tokens, int64_t n_physical, void *stream);
    planner_assignment: Callable[[Pointer, Pointer, I64, Pointer], I32]
    # lplb_status lplb_eplb_rebalance(const float *weight, int64_t n_layers, int64_t n_logical, int64_t n_physical, int64_t n_groups,
    #     int64_t n_nodes, int64_t n_ranks, int64_t *phy2log, int64_t *replica, int64_t *logcnt, char *message, int64_t message_size);
    eplb_rebalance: Callable[[Pointer, I64, I64, I64, I64, I64, I64, Pointer, Pointer, Pointer, Message, I64], I32]
    # lplb_status lplb_solve(const int64_t *loads, int64_t n_logical, const int32_t *phy2log, int64_t n_physical, int64_t ep_size,
    #     int64_t *tokens, lplb_group_info *info, char *message, int64_t message_size);
    solve: Callable[[Pointer, I64, Pointer, I64, I64, Pointer, Reference, Message, I64], I32]

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._cdll = ctypes.CDLL(path)  # CDLL: other Python threads run while a call works or waits
        except OSError as error:
            raise LibraryError(f"lplb: cannot load the library {path}: {error}") from error
        try:
            for name, declared in get_type_hints(Library, include_extras=True).items():
                parameters, result = get_args(declared)
                kinds = (getattr(kind, "__metadata__", (None,))[0] for kind in (result, *parameters))  # None: void
                setattr(self, name, self._bind(f"lplb_{name}", *kinds))
                if name == "version":
                    self._check_version()
        except AttributeError as error:
            raise LibraryError(f"lplb: {path} is no complete lplb library: {error}") from error

    def _bind(self, name: str, result: Any, *parameters: Any) -> Any:
        function = getattr(self._cdll, name)
        function.restype, function.argtypes = result, parameters
        return function

    def _check_version(self) -> None:
        number = self.version()
        major, minor, patch = number // 10000, number // 100 % 100, number % 100
        if (major, minor) != VERSION[:2]:
            wanted = f"{VERSION[0]}.{VERSION[1]}"
            raise LibraryError(f"lplb: this package needs library version {wanted}.x, but {self.path} is {major}.{minor}.{patch}")


_lock = threading.Lock()
_loaded: Library | None = None


def load() -> Library:
    """The library, loaded at the first call. LibraryError says where it looked."""
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = Library(find())
    return _loaded


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


def call(function: Callable[..., int], *arguments: Address | _CArgObject) -> None:
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
