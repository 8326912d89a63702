"""What lplb.h has for exchanges in steps of one's own, which Python does not use: begin, finish, create."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_int32, c_int64

from lplb import _c

BLOB_BYTES = 128


class ExchangeConfig(ctypes.Structure):
    """lplb_exchange_config"""

    _fields_ = [
        ("struct_size", c_int64), ("device", c_int32), ("policy", c_int32), ("n_ranks", c_int64), ("rank", c_int64), ("n_counts", c_int64),
        ("n_nodes", c_int64), ("node", c_int64), ("timeout_ms", c_int64), ("first_epoch", c_int64), ("rail", POINTER(_c.RailOps))]


def function(name, *parameters):
    """A function of lplb.h that returns a status."""
    found = getattr(ctypes.CDLL(_c.load().path), f"lplb_{name}")
    found.restype, found.argtypes = c_int32, parameters
    return found
