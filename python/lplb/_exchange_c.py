"""Section 7 of lplb.h for ctypes: the exchange's structs and functions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_uint32, c_void_p
from typing import Any

from . import _c as _native
from ._c import Address

BLOB_BYTES = 128
MAX_RANKS = 72
MAX_NODES = 1024
FINE, TIMED_OUT, ABORTED, LOST, DISAGREED = 0, 1, 2, 3, 4
REASONS = {TIMED_OUT: "timed out", ABORTED: "aborted", LOST: "lost", DISAGREED: "disagreed"}

# int32_t (*all_gather)(void *context, const int32_t *counts, int32_t *gathered, int64_t n_counts, void *stream);
RAIL_GATHER = ctypes.CFUNCTYPE(c_int32, c_void_p, c_void_p, c_void_p, c_int64, c_void_p)
# const char *(*error)(void *context);
RAIL_ERROR = ctypes.CFUNCTYPE(c_void_p, c_void_p)
# void (*destroy)(void *context);
RAIL_DESTROY = ctypes.CFUNCTYPE(None, c_void_p)
# void (*abort)(void *context);
RAIL_ABORT = ctypes.CFUNCTYPE(None, c_void_p)
# void (*report)(void *context, lplb_exchange_report *report);
RAIL_REPORT = ctypes.CFUNCTYPE(None, c_void_p, c_void_p)


class RailOps(ctypes.Structure):
    """lplb_rail_ops"""

    _fields_ = [
        ("struct_size", c_int64),
        ("context", c_void_p),
        ("all_gather", RAIL_GATHER),
        ("error", RAIL_ERROR),
        ("destroy", RAIL_DESTROY),
        ("abort", RAIL_ABORT),
        ("report", RAIL_REPORT),
        ("failed", c_void_p),
    ]


class ExchangeConfig(ctypes.Structure):
    """lplb_exchange_config"""

    _fields_ = [
        ("struct_size", c_int64),
        ("device", c_int32),
        ("policy", c_int32),
        ("n_ranks", c_int64),
        ("rank", c_int64),
        ("n_counts", c_int64),
        ("n_nodes", c_int64),
        ("node", c_int64),
        ("timeout_ms", c_int64),
        ("first_epoch", c_int64),
        ("rail", POINTER(RailOps)),
    ]


class ReportStruct(ctypes.Structure):
    """lplb_exchange_report"""

    _fields_ = [
        ("struct_size", c_int64),
        ("code", c_int32),
        ("rank", c_int32),
        ("peer", c_int32),
        ("epoch", c_uint32),
        ("waited_ns", c_int64),
        ("peer_node", c_int32),
        ("reserved", c_int32),
    ]


class Functions:
    """lplb_exchange_* without the prefix, and planner_attach_exchange."""

    def __init__(self, library: _native.Library) -> None:
        self.library = library
        bind = library._bind
        i32, i64, address, config = c_int32, c_int64, c_void_p, POINTER(ExchangeConfig)

        # lplb_status lplb_exchange_buffer_bytes(const lplb_exchange_config *config, int64_t *bytes, char *message,
        #                                        int64_t message_size);
        self.buffer_bytes: Callable[[Any, Any, Any, int], int] = bind(
            "lplb_exchange_buffer_bytes", i32, config, POINTER(i64), c_char_p, i64)

        # lplb_status lplb_exchange_create(const lplb_exchange_config *config, void *const *buffers, lplb_exchange **exchange,
        #                                  char *message, int64_t message_size);
        self.create: Callable[[Any, Any, Any, Any, int], int] = bind(
            "lplb_exchange_create", i32, config, POINTER(c_void_p), POINTER(c_void_p), c_char_p, i64)

        # lplb_status lplb_exchange_begin(const lplb_exchange_config *config, lplb_exchange **exchange, void *blob, char *message,
        #                                 int64_t message_size);
        self.begin: Callable[[Any, Any, Any, Any, int], int] = bind(
            "lplb_exchange_begin", i32, config, POINTER(c_void_p), address, c_char_p, i64)

        # lplb_status lplb_exchange_finish(lplb_exchange *exchange, const void *blobs);
        self.finish: Callable[[Address, Any], int] = bind("lplb_exchange_finish", i32, address, address)

        # lplb_status lplb_exchange_all_gather(lplb_exchange *exchange, const int32_t *counts, int32_t *gathered, void *stream);
        self.all_gather: Callable[[Address, Address, Address, Address], int] = bind(
            "lplb_exchange_all_gather", i32, address, address, address, address)

        # lplb_status lplb_exchange_set_limits(lplb_exchange *exchange, int32_t policy, int64_t timeout_ms);
        self.set_limits: Callable[[Address, int, int], int] = bind("lplb_exchange_set_limits", i32, address, i32, i64)

        # void lplb_exchange_abort(lplb_exchange *exchange);
        self.abort: Callable[[Address], None] = bind("lplb_exchange_abort", None, address)

        # lplb_status lplb_exchange_get_report(const lplb_exchange *exchange, lplb_exchange_report *report);
        self.get_report: Callable[[Address, Any], int] = bind("lplb_exchange_get_report", i32, address, POINTER(ReportStruct))

        # void lplb_exchange_close(lplb_exchange *exchange);
        self.close: Callable[[Address], None] = bind("lplb_exchange_close", None, address)

        # void lplb_exchange_destroy(lplb_exchange *exchange);
        self.destroy: Callable[[Address], None] = bind("lplb_exchange_destroy", None, address)

        # const char *lplb_exchange_error(const lplb_exchange *exchange);
        self.error: Callable[[Address], bytes] = bind("lplb_exchange_error", c_char_p, address)

        # lplb_status lplb_planner_attach_exchange(lplb_planner *planner, lplb_exchange *exchange);
        self.planner_attach_exchange: Callable[[Address, Address], int] = bind(
            "lplb_planner_attach_exchange", i32, address, address)


_functions: Functions | None = None


def load() -> Functions:
    global _functions
    if _functions is None:
        _functions = Functions(_native.load())
    return _functions
