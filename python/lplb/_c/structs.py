"""Constants, limits and structs of lplb.h. Tests compare each of them with the header."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_int32, c_int64, c_uint32, c_void_p
from typing import Any

VERSION = (0, 2, 0)  # LPLB_VERSION_*

ERROR_BUSY = 4
INT32, INT64 = 0, 1  # LPLB_INT32, LPLB_INT64
DEVICE_CPU = -1
WHOLE_BATCH = -1
SOLVERS = {"flow": 0, "ipm": 1}
POLICIES = {"trap": 0, "report": 1}  # LPLB_EXCHANGE_TRAP, LPLB_EXCHANGE_REPORT
PLACE_POLICIES = {"flow": 0, "balanced": 1, "deepseek": 2, "repair": 3}  # LPLB_PLACE_FLOW, and so on
PLACE_KEEP = -2
UNIT_EXPERTS = -1
SPEED_NORMAL, MAX_SPEED, MAX_FIXED = 1024, 65536, 16777216
MAX_TOTAL = 2**42  # of lplb_solve_config, where the ranks differ
MAX_RANKS = 1024  # LPLB_MAX_RANKS, and so on: limits of the header
MAX_EP_SIZE = 8192
MAX_LOGICAL = 4096
MAX_PHYSICAL = 8192
MAX_LOGICAL_CUDA = 1024
MAX_CHUNKS = 65536  # of lplb_planner_count
MAX_EPLB_PHYSICAL = 2**20  # of lplb_eplb_rebalance
MAX_LOAD = 2**40
MAX_IDS = 2**31 - 1  # n_ids of a call
MAX_BLOCKS = 2**31 - 1  # max_blocks of lplb_planner_run and lplb_planner_redirect
MAX_LAYOUT_ROWS = 8192
LAYOUT_SENT, LAYOUT_RECEIVED, LAYOUT_BY_ROW = 1, 2, 4  # LPLB_LAYOUT_*, parts of a layout
LAYOUT_BAD_IDS, LAYOUT_OTHER_EXPERTS, LAYOUT_OTHER_PLAN, LAYOUT_NO_PLAN, LAYOUT_BAD_RECEIVED, LAYOUT_BY_ROW_SHORT = 1, 2, 4, 8, 16, 32
LAYOUT_N_BAD_IDS, LAYOUT_N_OTHER_EXPERTS, LAYOUT_N_SENT, LAYOUT_N_RECEIVED, LAYOUT_RANKS = 2, 3, 4, 5, 8
MESSAGE_SIZE = 1024
RECORD_HISTORY, RECORD_METRICS = 1, 2  # LPLB_RECORD_*, of the config
ANY_PLAN = -1
METRICS_ONE = 1 << 22
MOVES = {"pull": 0, "push": 1, "homes": 2}  # LPLB_MOVES_*
WEIGHTS, GRADIENTS = 0, 1  # LPLB_REPLICAS_*
FLOATS = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}  # LPLB_FLOAT*
REASONS = {1: "timed out", 2: "aborted", 3: "lost", 4: "disagreed"}  # LPLB_EXCHANGE_TIMED_OUT, and so on


class Sized(ctypes.Structure):
    """A struct that begins with its size."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**{"struct_size": ctypes.sizeof(self), **fields})


class Config(Sized):
    """lplb_config"""

    _fields_ = [
        ("struct_size", c_int64), ("device", c_int32), ("solver", c_int32), ("ep_size", c_int64), ("rank", c_int64), ("n_nodes", c_int64),
        ("n_logical", c_int64), ("n_physical", c_int64), ("group_size", c_int64), ("n_redundant", c_int64), ("r2o", c_void_p),
        ("number", c_int64), ("policy", c_int32), ("unit", c_int32), ("record", c_int64)]


# int32_t (*lplb_gather)(void *context, const void *mine, void *all, int64_t bytes);
GATHER = ctypes.CFUNCTYPE(c_int32, c_void_p, c_void_p, c_void_p, c_int64)


class AgreeConfig(Sized):
    """lplb_agree_config"""

    _fields_ = [
        ("struct_size", c_int64), ("planner", POINTER(Config)), ("history", c_void_p), ("phy2log", c_void_p), ("settings", c_char_p),
        ("failure", c_char_p), ("n_ranks", c_int64), ("rank", c_int64), ("gather", GATHER), ("context", c_void_p)]


class AgreementStruct(Sized):
    """lplb_agreement"""

    _fields_ = [
        ("struct_size", c_int64), ("n_nodes", c_int64), ("n_hosts", c_int64), ("number", c_int64), ("row_dtype", c_int32),
        ("all_cuda", c_int32)]


class PlaceConfig(Sized):
    """lplb_place_config"""

    _fields_ = [
        ("struct_size", c_int64), ("policy", c_int32), ("even_homes", c_int32), ("n_snapshots", c_int64), ("n_layers", c_int64),
        ("n_logical", c_int64), ("n_ranks", c_int64), ("n_slots", c_int64), ("slots", c_void_p), ("n_nodes", c_int64),
        ("n_groups", c_int64), ("previous", c_void_p), ("max_moves", c_int64), ("tolerance", c_double)]


class PlacementReportStruct(Sized):
    """lplb_placement_report"""

    _fields_ = [
        ("struct_size", c_int64), ("n_snapshots", c_int64), ("n_layers", c_int64), ("n_logical", c_int64), ("n_ranks", c_int64),
        ("n_slots", c_int64), ("n_nodes", c_int64), ("phy2log", c_void_p), ("history", c_void_p), ("even_balance", c_void_p),
        ("exact_balance", c_void_p), ("duplicates", c_void_p), ("homes", c_void_p), ("pulls", c_void_p), ("pushes", c_void_p),
        ("leaves_rank", c_void_p), ("leaves_node", c_void_p), ("inbound", c_void_p)]


class GroupInfoStruct(ctypes.Structure):
    """lplb_group_info"""

    _fields_ = [
        ("max_load", c_int64), ("bound", c_int64), ("total", c_int64), ("moved", c_int64), ("rounds", c_int64), ("certified", c_int32),
        ("witness_size", c_int32), ("witness", c_uint32 * (MAX_RANKS // 32))]


class LevelStruct(ctypes.Structure):
    """lplb_level"""

    _fields_ = [("reached", c_int64), ("bound", c_int64), ("mean", c_int64)]


class SolveConfig(Sized):
    """lplb_solve_config"""

    _fields_ = [
        ("struct_size", c_int64), ("loads", c_void_p), ("phy2log", c_void_p), ("n_logical", c_int64), ("n_physical", c_int64),
        ("ep_size", c_int64), ("unit", c_int32), ("unused", c_int32), ("speed", c_void_p), ("fixed", c_void_p), ("tokens", c_void_p),
        ("info", POINTER(GroupInfoStruct)), ("level", POINTER(LevelStruct))]


class PlanInfoStruct(Sized):
    """lplb_plan_info"""

    _fields_ = [
        ("struct_size", c_int64), ("n_groups", c_int64), ("invalid_ids", c_int64), ("own_rank", c_int64), ("own_node", c_int64),
        ("other_nodes", c_int64), ("overflow", c_int64)]


class MetricsStruct(Sized):
    """lplb_metrics"""

    _fields_ = [
        ("struct_size", c_int64), ("plans", c_int64), ("groups", c_int64), ("imbalance_sum", c_int64), ("imbalance_max", c_int64),
        ("gap_sum", c_int64), ("gap_max", c_int64), ("tokens", c_int64), ("moved", c_int64), ("own_rank", c_int64), ("own_node", c_int64),
        ("other_nodes", c_int64), ("uncertified", c_int64), ("overflow", c_int64), ("invalid_ids", c_int64)]


class LayoutStruct(Sized):
    """lplb_layout"""

    _fields_ = [
        ("struct_size", c_int64), ("ids", c_void_p), ("experts", c_void_p), ("row_of_slot", c_void_p), ("n_ids", c_int64),
        ("n_rows", c_int64), ("ids_dtype", c_int32), ("row_dtype", c_int32), ("parts", c_int32), ("exchanged", c_int32),
        ("order", c_void_p), ("sent", c_void_p), ("received", c_void_p), ("ends", c_void_p), ("numbers", c_void_p), ("by_row", c_void_p),
        ("n_by_row", c_int64)]


# int32_t (*all_gather)(void *context, const int32_t *counts, int32_t *gathered, int64_t n_counts, void *stream);
RAIL_GATHER = ctypes.CFUNCTYPE(c_int32, c_void_p, c_void_p, c_void_p, c_int64, c_void_p)
RAIL_ERROR = ctypes.CFUNCTYPE(c_void_p, c_void_p)  # const char *(*error)(void *context);
RAIL_END = ctypes.CFUNCTYPE(None, c_void_p)  # void (*destroy)(void *context); and abort


class RailOps(Sized):
    """lplb_rail_ops"""

    _fields_ = [
        ("struct_size", c_int64), ("context", c_void_p), ("all_gather", RAIL_GATHER), ("error", RAIL_ERROR), ("destroy", RAIL_END),
        ("abort", RAIL_END), ("report", c_void_p), ("failed", c_void_p)]


class ConnectConfig(Sized):
    """lplb_connect_config"""

    _fields_ = [
        ("struct_size", c_int64), ("device", c_int32), ("policy", c_int32), ("n_ranks", c_int64), ("rank", c_int64), ("n_counts", c_int64),
        ("n_nodes", c_int64), ("timeout_ms", c_int64), ("first_epoch", c_int64), ("rail", POINTER(RailOps)), ("failure", c_char_p),
        ("gather", GATHER), ("context", c_void_p)]


class ReportStruct(Sized):
    """lplb_exchange_report"""

    _fields_ = [
        ("struct_size", c_int64), ("code", c_int32), ("rank", c_int32), ("peer", c_int32), ("epoch", c_uint32), ("waited_ns", c_int64),
        ("peer_node", c_int32), ("reserved", c_int32)]


class ReplicasConfig(Sized):
    """lplb_replicas_config"""

    _fields_ = [("struct_size", c_int64), ("exchange", c_void_p), ("n_logical", c_int64), ("n_rows", c_int64), ("blocks", c_int64)]


class ReplicasTensor(Sized):
    """lplb_replicas_tensor"""

    _fields_ = [
        ("struct_size", c_int64), ("kind", c_int32), ("dtype", c_int32), ("row_bytes", c_int64), ("memory", c_void_p),
        ("failure", c_char_p), ("gather", GATHER), ("context", c_void_p)]
