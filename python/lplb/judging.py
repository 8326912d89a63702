"""What a placement is worth, whoever made it: balance, what training has to send under it, and how many tokens leave their rank.

    report = lplb.placement_report(phy2log, ep_size=32, history=history, nodes=4)
    report.pulls.sum(0), report.pushes.sum(0)        # copies that each rank gets and gives when all layers are refreshed together
    report.leaves_node.mean()                        # the share of the tokens that cross to another host

Placed.report is the same for what place() made.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import numpy.typing as npt

from . import _c
from ._ops.arguments import integer
from ._ops.host import A, Array, address_of, as_given, enough_memory, host_integers, host_numbers
from .errors import broken_rule

Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PlacementReport(Generic[A]):
    """Figures of a placement, layer by layer. Arrays are tensors where the placement was a tensor.

    An expert's home owns its weights, its gradient and its optimizer state; the other ranks that hold it have copies. In a pull each copy
    gets the weights, in a push each home gets the gradients; multiply by an expert's bytes for traffic.
    """

    even_balance: A  #: float64 [layers], mean / max load of the ranks that hold experts, with an even split over replicas
    exact_balance: A  #: the same with the exact split
    duplicates: A  #: int64 [layers], slots that hold an expert which their rank also holds in another slot
    homes: A  #: int32 [layers, experts], the slot of each expert's home, as lplb.homes
    pulls: A  #: int64 [layers, ranks], copies of other ranks' experts: weights that arrive in a pull, gradients that leave in a push
    pushes: A  #: int64 [layers, ranks], copies elsewhere of the rank's experts: gradients that arrive in a push, weights that leave in a pull
    leaves_rank: A  #: float64 [layers], share of the tokens that leave their rank with the exact split, all ranks bringing the same tokens
    leaves_node: A  #: float64 [layers], share of the tokens that leave their host
    inbound: A  #: float64 [layers, ranks], tokens that reach the rank from others, over the mean load


def placement_report(phy2log: A, *, ep_size: int, history: Array, nodes: int = 1) -> PlacementReport[A]:
    """Judges a placement on a history.

    phy2log: integers [layers, slots], each rank with equally many, -1 for an empty one. history: tokens per expert, [layers, experts] or
    [snapshots, layers, experts], as for place(). nodes: hosts.
    """
    slots = host_integers("phy2log", phy2log, 2, np.int32)
    loads = loads_of("history", history)
    layers, ranks = len(slots), integer("ep_size", ep_size, 1, _c.MAX_RANKS)
    if loads.shape[1] != layers:
        raise broken_rule("history", f"must have the {layers} layers of phy2log", f"shape {list(loads.shape)}")
    if slots.shape[1] % ranks or not slots.shape[1]:
        raise broken_rule("phy2log", f"must have a number of slots that is a multiple of ep_size {ranks}", f"shape {list(slots.shape)}")
    results: dict[str, npt.NDArray[Any]] = {name: np.empty(layers, dtype) for name, dtype in (
        ("even_balance", np.float64), ("exact_balance", np.float64), ("duplicates", np.int64), ("leaves_rank", np.float64),
        ("leaves_node", np.float64))}
    results.update({name: np.empty((layers, ranks), dtype) for name, dtype in (
        ("pulls", np.int64), ("pushes", np.int64), ("inbound", np.float64))})
    results["homes"] = np.empty((layers, loads.shape[2]), dtype=np.int32)
    config = _c.PlacementReportStruct(
        n_snapshots=loads.shape[0], n_layers=layers, n_logical=loads.shape[2], n_ranks=ranks, n_slots=slots.shape[1] // ranks,
        n_nodes=integer("nodes", nodes, 1), phy2log=address_of(slots), history=address_of(loads),
        **{name: address_of(array) for name, array in results.items()})
    _c.call(_c.load().placement_judge, ctypes.byref(config))
    return PlacementReport(**{name: as_given(array, phy2log) for name, array in results.items()})


def loads_of(name: str, history: Any) -> Float64s:
    """[snapshots, layers, experts]"""
    with enough_memory(name):
        loads: Float64s = host_numbers(name, history, np.float64)
    if loads.ndim not in (2, 3):
        raise broken_rule(name, "must be [layers, experts] or [snapshots, layers, experts]", f"shape {list(loads.shape)}")
    if loads.ndim == 2:
        loads = loads[None]
    if not len(loads):
        raise broken_rule(name, "must have at least one snapshot", f"shape {list(loads.shape)}")
    return loads
