"""lplb: exact, certified load balancing for Mixture-of-Experts training.

    from lplb import Planner, topology
    planner = Planner(topology.CUBE_8P2E, n_routed_experts=80, n_logical_routed_experts=64, ep_size=8)
    physical = planner.run(logical, counter)    # each token's replica, such that the busiest rank has as little as possible
    planner.info().groups[0]                    # the load reached, the proven bound and its witness

Importing needs numpy alone. The library is loaded and torch is used when the first call needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import eplb, topology
from ._c import VERSION
from .errors import (
    Busy, CudaError, Disagreement, InternalError, InvalidArgument, LibraryError, LplbError, NoCuda, OutOfMemory, PeerLost, PeerTimeout,
    Unsupported, WrongOrder)
from .info import GroupInfo, Info, Locality
from .layout import Layout, Splits
from .placement import homes
from .placing import Placed, SlotMove, place
from .planner import Planner
from .records import Metrics, history
from .solve import Solution, solve, witness_bound

if TYPE_CHECKING:
    from .replicas import Replicas

__version__ = ".".join(map(str, VERSION))

__all__ = [
    "Planner", "Info", "GroupInfo", "Locality", "Layout", "Splits", "Replicas", "homes", "place", "history", "Metrics", "Placed", "SlotMove", "solve", "Solution",
    "witness_bound", "eplb", "topology", "LplbError", "LibraryError", "InvalidArgument", "Unsupported", "WrongOrder", "Busy", "OutOfMemory",
    "NoCuda", "CudaError",
    "PeerTimeout", "PeerLost", "Disagreement", "InternalError", "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "Replicas":  # which imports torch
        from .replicas import Replicas

        return Replicas
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
