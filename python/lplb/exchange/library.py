"""Section 7 of lplb.h for ctypes: the structs and functions that Python uses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_uint32, c_void_p

from .. import _c as _native

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
        ("struct_size", c_int64), ("context", c_void_p), ("all_gather", RAIL_GATHER), ("error", RAIL_ERROR), ("destroy", RAIL_DESTROY),
        ("abort", RAIL_ABORT), ("report", RAIL_REPORT), ("failed", c_void_p)]


class ConnectConfig(ctypes.Structure):
    """lplb_connect_config"""

    _fields_ = [
        ("struct_size", c_int64), ("device", c_int32), ("policy", c_int32), ("n_ranks", c_int64), ("rank", c_int64), ("n_counts", c_int64),
        ("n_nodes", c_int64), ("timeout_ms", c_int64), ("first_epoch", c_int64), ("rail", POINTER(RailOps)), ("failure", c_char_p),
        ("gather", _native.GATHER), ("context", c_void_p)]


class ReportStruct(ctypes.Structure):
    """lplb_exchange_report"""

    _fields_ = [
        ("struct_size", c_int64), ("code", c_int32), ("rank", c_int32), ("peer", c_int32), ("epoch", c_uint32), ("waited_ns", c_int64),
        ("peer_node", c_int32), ("reserved", c_int32)]


class Functions:
    """lplb_exchange_* without the prefix, and planner_attach_exchange."""

    connect: Callable[..., int]
    all_gather: Callable[..., int]
    set_limits: Callable[..., int]
    abort: Callable[[int], None]
    get_report: Callable[..., int]
    close: Callable[[int | None], None]
    destroy: Callable[[int], None]
    error: Callable[[int | None], bytes]
    planner_attach_exchange: Callable[..., int]

    def __init__(self, library: _native.Library) -> None:
        i32, i64, address, text = c_int32, c_int64, c_void_p, c_char_p
        for name, result, parameters in (
            # lplb_status lplb_exchange_connect(const lplb_connect_config *config, lplb_exchange **exchange, char *message,
            #                                   int64_t message_size);
            ("exchange_connect", i32, (POINTER(ConnectConfig), POINTER(c_void_p), text, i64)),
            # lplb_status lplb_exchange_all_gather(lplb_exchange *exchange, const int32_t *counts, int32_t *gathered, void *stream);
            ("exchange_all_gather", i32, (address, address, address, address)),
            # lplb_status lplb_exchange_set_limits(lplb_exchange *exchange, int32_t policy, int64_t timeout_ms);
            ("exchange_set_limits", i32, (address, i32, i64)),
            # void lplb_exchange_abort(lplb_exchange *exchange);
            ("exchange_abort", None, (address,)),
            # lplb_status lplb_exchange_get_report(const lplb_exchange *exchange, lplb_exchange_report *report);
            ("exchange_get_report", i32, (address, POINTER(ReportStruct))),
            # void lplb_exchange_close(lplb_exchange *exchange);
            ("exchange_close", None, (address,)),
            # void lplb_exchange_destroy(lplb_exchange *exchange);
            ("exchange_destroy", None, (address,)),
            # const char *lplb_exchange_error(const lplb_exchange *exchange);
            ("exchange_error", text, (address,)),
            # lplb_status lplb_planner_attach_exchange(lplb_planner *planner, lplb_exchange *exchange);
            ("planner_attach_exchange", i32, (address, address)),
        ):
            setattr(self, name.removeprefix("exchange_"), library._bind(f"lplb_{name}", result, *parameters))


_functions: Functions | None = None


def load() -> Functions:
    global _functions
    if _functions is None:
        _functions = Functions(_native.load())
    return _functions
