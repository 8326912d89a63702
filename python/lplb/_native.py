"""The C header lplb.h for ctypes: find the library, check its version, declare every function, turn statuses into exceptions.

Nothing is loaded at import; load() does it at the first use and says where it looked if that fails.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_uint32, c_void_p
from pathlib import Path
from typing import Any, Protocol, Union

from .errors import BY_STATUS, InternalError, LibraryError, LplbError

VERSION = (0, 2, 0)  # LPLB_VERSION_* of the header; a test compares the two

OK = 0
ERROR_BUSY = 4
INT32, INT64 = 0, 1  # LPLB_INT32, LPLB_INT64
DEVICE_CPU = -1
WHOLE_BATCH = -1
SOLVERS = {"flow": 0, "ipm": 1}
POLICIES = {"trap": 0, "report": 1}  # LPLB_EXCHANGE_TRAP, LPLB_EXCHANGE_REPORT
MAX_RANKS = 1024  # LPLB_MAX_RANKS, and so on: limits of the header
MAX_EP_SIZE = 8192
MAX_LOGICAL = 4096
MAX_PHYSICAL = 8192
MAX_CHUNKS = 65536  # of lplb_planner_count
MAX_EPLB_PHYSICAL = 2**20  # of lplb_eplb_rebalance
MAX_LOAD = 2**40
MAX_IDS = 2**31 - 1  # n_ids of a call
MAX_BLOCKS = 2**31 - 1  # max_blocks of lplb_planner_run and lplb_planner_redirect
MESSAGE_SIZE = 1024

# An address (int), or None for NULL; or what has one as _as_parameter_. Integers are by far the cheapest thing to hand to ctypes.
Address = Union[int, "HasAddress", None]


class HasAddress(Protocol):
    @property
    def _as_parameter_(self) -> int: ...



class Config(ctypes.Structure):
    """lplb_config"""

    _fields_ = [
        ("struct_size", c_int64),
        ("device", c_int32),
        ("solver", c_int32),
        ("ep_size", c_int64),
        ("rank", c_int64),
        ("n_nodes", c_int64),
        ("n_logical", c_int64),
        ("n_physical", c_int64),
        ("group_size", c_int64),
        ("n_redundant", c_int64),
        ("r2o", c_void_p),
        ("number", c_int64),
        ("policy", c_int32),
        ("unused", c_int32),
    ]


# int32_t (*lplb_gather)(void *context, const void *mine, void *all, int64_t bytes);
GATHER = ctypes.CFUNCTYPE(c_int32, c_void_p, c_void_p, c_void_p, c_int64)


class AgreeConfig(ctypes.Structure):
    """lplb_agree_config"""

    _fields_ = [
        ("struct_size", c_int64),
        ("planner", POINTER(Config)),
        ("history", c_void_p),
        ("phy2log", c_void_p),
        ("settings", c_char_p),
        ("failure", c_char_p),
        ("n_ranks", c_int64),
        ("rank", c_int64),
        ("gather", GATHER),
        ("context", c_void_p),
    ]


class AgreementStruct(ctypes.Structure):
    """lplb_agreement"""

    _fields_ = [
        ("struct_size", c_int64),
        ("n_nodes", c_int64),
        ("n_hosts", c_int64),
        ("number", c_int64),
        ("row_dtype", c_int32),
        ("all_cuda", c_int32),
    ]


class GroupInfoStruct(ctypes.Structure):
    """lplb_group_info"""

    _fields_ = [
        ("max_load", c_int64),
        ("bound", c_int64),
        ("total", c_int64),
        ("moved", c_int64),
        ("rounds", c_int64),
        ("certified", c_int32),
        ("witness_size", c_int32),
        ("witness", c_uint32 * (MAX_RANKS // 32)),
    ]


class PlanInfoStruct(ctypes.Structure):
    """lplb_plan_info"""

    _fields_ = [
        ("struct_size", c_int64),
        ("n_groups", c_int64),
        ("invalid_ids", c_int64),
        ("own_rank", c_int64),
        ("own_node", c_int64),
        ("other_nodes", c_int64),
        ("overflow", c_int64),
    ]


class Library:
    """The loaded library. One attribute per function of lplb.h, without the prefix; arrays are passed as addresses."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._cdll = ctypes.CDLL(path)  # CDLL: other Python threads run while a call works or waits
        except OSError as error:
            raise LibraryError(f"lplb: cannot load the library {path}: {error}") from error
        i32, i64, address = c_int32, c_int64, c_void_p
        try:
            # int32_t lplb_version(void);
            self.version: Callable[[], int] = self._bind("lplb_version", i32)
            self._check_version()

            # const char *lplb_status_string(lplb_status status);
            self.status_string: Callable[[int], bytes] = self._bind("lplb_status_string", c_char_p, i32)

            # const char *lplb_build_info(void);
            self.build_info: Callable[[], bytes] = self._bind("lplb_build_info", c_char_p)

            # lplb_status lplb_planner_create(const lplb_config *config, lplb_planner **planner, char *message, int64_t message_size);
            self.planner_create: Callable[[Any, Any, Any, int], int] = self._bind(
                "lplb_planner_create", i32, POINTER(Config), POINTER(c_void_p), c_char_p, i64)

            # void lplb_planner_destroy(lplb_planner *planner);
            self.planner_destroy: Callable[[Address], None] = self._bind("lplb_planner_destroy", None, address)

            # const char *lplb_planner_error(const lplb_planner *planner);
            self.planner_error: Callable[[Address], bytes] = self._bind("lplb_planner_error", c_char_p, address)

            # lplb_status lplb_planner_place(lplb_planner *planner, const double *history, void *stream);
            self.planner_place: Callable[[Address, Address, Address], int] = self._bind(
                "lplb_planner_place", i32, address, address, address)

            # lplb_status lplb_planner_set_placement(lplb_planner *planner, const int32_t *phy2log, int64_t n_physical, void *stream);
            self.planner_set_placement: Callable[[Address, Address, int, Address], int] = self._bind(
                "lplb_planner_set_placement", i32, address, address, i64, address)

            # lplb_status lplb_planner_max_replicas(lplb_planner *planner, int64_t *max_replicas);
            self.planner_max_replicas: Callable[[Address, Any], int] = self._bind(
                "lplb_planner_max_replicas", i32, address, address)

            # lplb_status lplb_planner_phy2log(lplb_planner *planner, int32_t *phy2log, int64_t n_physical);
            self.planner_phy2log: Callable[[Address, Address, int], int] = self._bind(
                "lplb_planner_phy2log", i32, address, address, i64)

            # lplb_status lplb_planner_log2phy(lplb_planner *planner, int32_t *log2phy, int64_t n_logical, int64_t max_replicas);
            self.planner_log2phy: Callable[[Address, Address, int, int], int] = self._bind(
                "lplb_planner_log2phy", i32, address, address, i64, i64)

            # lplb_status lplb_planner_logcnt(lplb_planner *planner, int32_t *logcnt, int64_t n_logical);
            self.planner_logcnt: Callable[[Address, Address, int], int] = self._bind(
                "lplb_planner_logcnt", i32, address, address, i64)

            # lplb_status lplb_planner_count(lplb_planner *planner, const void *ids, lplb_dtype ids_dtype, int64_t n_ids,
            #                                int32_t *counts, int32_t *cumulative, int64_t n_chunks, void *stream);
            self.planner_count: Callable[[Address, Address, int, int, Address, Address, int, Address], int] = self._bind(
                "lplb_planner_count", i32, address, address, i32, i64, address, address, i64, address)

            # lplb_status lplb_planner_solve(lplb_planner *planner, const void *counts, lplb_dtype counts_dtype, int64_t n_sources,
            #                                float *ratios, float *scaled, void *counter, lplb_dtype counter_dtype, void *stream);
            self.planner_solve: Callable[[Address, Address, int, int, Address, Address, Address, int, Address], int] = self._bind(
                "lplb_planner_solve", i32, address, address, i32, i64, address, address, address, i32, address)

            # int64_t lplb_counts_width(int64_t n_logical);
            self.counts_width: Callable[[int], int] = self._bind("lplb_counts_width", i64, i64)

            # lplb_status lplb_agree(const lplb_agree_config *config, lplb_agreement *agreement, char *message, int64_t message_size);
            self.agree: Callable[[Any, Any, Any, int], int] = self._bind(
                "lplb_agree", i32, POINTER(AgreeConfig), POINTER(AgreementStruct), c_char_p, i64)

            # lplb_status lplb_planner_count_row(lplb_planner *planner, const void *ids, lplb_dtype ids_dtype, int64_t n_ids,
            #                                    int32_t *row, void *stream);
            self.planner_count_row: Callable[[Address, Address, int, int, Address, Address], int] = self._bind(
                "lplb_planner_count_row", i32, address, address, i32, i64, address, address)

            # lplb_status lplb_planner_make_row(lplb_planner *planner, const void *counts, lplb_dtype counts_dtype, int32_t *row,
            #                                   void *stream);
            self.planner_make_row: Callable[[Address, Address, int, Address, Address], int] = self._bind(
                "lplb_planner_make_row", i32, address, address, i32, address, address)

            # lplb_status lplb_planner_solve_rows(lplb_planner *planner, const int32_t *rows, float *ratios, float *scaled,
            #                                     void *counter, lplb_dtype counter_dtype, void *stream);
            self.planner_solve_rows: Callable[[Address, Address, Address, Address, Address, int, Address], int] = self._bind(
                "lplb_planner_solve_rows", i32, address, address, address, address, address, i32, address)

            # lplb_status lplb_planner_redirect(lplb_planner *planner, const void *ids, lplb_dtype ids_dtype, int64_t n_ids, void *out,
            #                                   int64_t max_blocks, void *stream);
            self.planner_redirect: Callable[[Address, Address, int, int, Address, int, Address], int] = self._bind(
                "lplb_planner_redirect", i32, address, address, i32, i64, address, i64, address)

            # lplb_status lplb_planner_redirect_by_ratio(lplb_planner *planner, const void *ids, lplb_dtype ids_dtype, int64_t n_ids,
            #                                            const float *ratios, const int32_t *cumulative, int64_t n_chunks, void *out,
            #                                            void *stream);
            self.planner_redirect_by_ratio: Callable[
                [Address, Address, int, int, Address, Address, int, Address, Address], int] = self._bind(
                "lplb_planner_redirect_by_ratio", i32, address, address, i32, i64, address, address, i64, address,
                address)

            # lplb_status lplb_planner_run(lplb_planner *planner, const void *ids, lplb_dtype ids_dtype, int64_t n_ids,
            #                              const int32_t *gathered, void *out, void *counter, lplb_dtype counter_dtype,
            #                              int64_t max_blocks, void *stream);
            self.planner_run: Callable[
                [Address, Address, int, int, Address, Address, Address, int, int, Address], int] = self._bind(
                "lplb_planner_run", i32, address, address, i32, i64, address, address, address, i32, i64, address)

            # lplb_status lplb_planner_info(lplb_planner *planner, lplb_plan_info *plan, lplb_group_info *groups, int64_t n_groups,
            #                               void *stream);
            self.planner_info: Callable[[Address, Any, Any, int, Address], int] = self._bind(
                "lplb_planner_info", i32, address, POINTER(PlanInfoStruct), POINTER(GroupInfoStruct), i64, address)

            # lplb_status lplb_planner_split(lplb_planner *planner, int64_t *tokens, int64_t n_physical, void *stream);
            self.planner_split: Callable[[Address, Address, int, Address], int] = self._bind(
                "lplb_planner_split", i32, address, address, i64, address)

            # lplb_status lplb_planner_assignment(lplb_planner *planner, int64_t *tokens, int64_t n_physical, void *stream);
            self.planner_assignment: Callable[[Address, Address, int, Address], int] = self._bind(
                "lplb_planner_assignment", i32, address, address, i64, address)

            # lplb_status lplb_eplb_rebalance(const float *weight, int64_t n_layers, int64_t n_logical, int64_t n_physical,
            #                                 int64_t n_groups, int64_t n_nodes, int64_t n_ranks, int64_t *phy2log, int64_t *replica,
            #                                 int64_t *logcnt, char *message, int64_t message_size);
            self.eplb_rebalance: Callable[
                [Address, int, int, int, int, int, int, Address, Address, Address, Any, int], int] = self._bind(
                "lplb_eplb_rebalance", i32, address, i64, i64, i64, i64, i64, i64, address, address,
                address, c_char_p, i64)

            # lplb_status lplb_solve(const int64_t *loads, int64_t n_logical, const int32_t *phy2log, int64_t n_physical,
            #                        int64_t ep_size, int64_t *tokens, lplb_group_info *info, char *message, int64_t message_size);
            self.solve: Callable[[Address, int, Address, int, int, Address, Any, Any, int], int] = self._bind(
                "lplb_solve", i32, address, i64, address, i64, i64, address, POINTER(GroupInfoStruct),
                c_char_p, i64)
        except AttributeError as error:
            raise LibraryError(f"lplb: {path} is no complete lplb library: {error}") from error

    def _bind(self, name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(self._cdll, name)
        function.restype = result
        function.argtypes = arguments
        return function

    def _check_version(self) -> None:
        number = self.version()
        major, minor, patch = number // 10000, number // 100 % 100, number % 100
        if (major, minor) != VERSION[:2]:
            wanted = f"{VERSION[0]}.{VERSION[1]}"
            raise LibraryError(
                f"lplb: this package needs library version {wanted}.x, but {self.path} is {major}.{minor}.{patch}")


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
    inside = Path(__file__).resolve().parent / "lib" / "liblplb.so.0"
    override = os.environ.get("LPLB_LIBRARY")
    looked_at = Path(override) if override else inside
    if looked_at.is_file():
        return str(looked_at)
    if override:
        raise LibraryError(f"lplb: LPLB_LIBRARY is set to {override}, and there is no such file")
    raise LibraryError(
        f"lplb: the library was not found. Looked at {inside}; LPLB_LIBRARY, which may name another file, is not set. "
        "Install the package with 'pip install .', or build with 'swift build -c release --product lplb' and set LPLB_LIBRARY.")


def failure(status: int, message: str) -> LplbError:
    """The exception for a status and the library's words."""
    kind = BY_STATUS.get(status, InternalError)
    if not message:
        message = load().status_string(status).decode("utf-8", "replace")
    return kind(message)


def text(message: bytes) -> str:
    return message.decode("utf-8", "replace")
