"""Copies and pickles of planners. A planner owns native memory, so what is kept is what it was made from and its placement; copying or
loading it makes another one.

    model = copy.deepcopy(model)                    # a module that holds planners; with a group on all ranks, as for making them
    torch.save(model, path)
    model = torch.load(path, weights_only=False)    # planners with a group join the world, or the group that `with loading_group(g):` names
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, Union

import numpy as np
import numpy.typing as npt

from . import _c
from ._ops.arguments import check_group, shape_by_placement
from ._ops.host import Array, Int32s, host_integers, is_tensor, loaded_torch
from .errors import WrongOrder, shown

if TYPE_CHECKING:
    from .planner import Planner

P = TypeVar("P", bound="Planner")

# What differs from process to process, and so is found anew: the rest of Planner's arguments is kept.
NOT_KEPT = ("self", "group", "device", "exchange", "redundant_to_original")

_named: ContextVar[Any] = ContextVar("lplb_loading_group", default=None)


@contextmanager
def loading_group(group: Any) -> Iterator[None]:
    """Inside `with loading_group(group):`, planners that torch.load or pickle.load brings back, and that had a process group, join this
    one; otherwise they join the world. Collective, as making planners is: every rank of the group loads them, in the same order."""
    check_group(group)
    token = _named.set(group)
    try:
        yield
    finally:
        _named.reset(token)


def kept_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments that a planner was made with, those that serve for another one."""
    exchange = given["exchange"]
    return {**{name: value for name, value in given.items() if name not in NOT_KEPT},
            "exchange": exchange if isinstance(exchange, str) else "auto"}


Capacity = Union["tuple[Int32s | None, Int32s | None]", None]


def parts(planner: P) -> tuple[type[P], dict[str, Any], Array, npt.NDArray[np.float64] | None, int | None, Capacity]:
    """What make_again needs, all of which can be pickled. The placement is a tensor on the planner's device, so that the map_location of
    torch.load says where the planner will be."""
    planner._handle.opened()
    arguments = dict(planner._kept_arguments)
    grouped = planner._ranks.size if planner.ep_group is not None else None
    if grouped is not None:
        arguments.update(rank=None, ep_size=None)
    capacity = None if planner.speed is None and planner.fixed is None else (planner.speed, planner.fixed)
    shape = arguments["_shape"]
    if shape is None:
        return type(planner), arguments, planner.r2o, planner._placed_by, grouped, capacity
    arguments["_shape"] = shape.args[1:]
    return type(planner), arguments, planner.phy2log, None, grouped, capacity


def copied(planner: P) -> P:
    """Another planner with the same settings, group and placement."""
    kind, arguments, placement, history, grouped, capacity = parts(planner)
    exchange = planner.exchange
    if exchange is not None and not exchange.owned:  # the caller's, who shares it among planners
        arguments["exchange"] = exchange
    return make_again(kind, arguments, placement, history, grouped, capacity, planner.ep_group)


def make_again(kind: type[P], arguments: dict[str, Any], placement: Array, history: npt.NDArray[np.float64] | None,
               grouped: int | None, capacity: Capacity = None, group: Any = None) -> P:
    """placement: r2o of a topology, or phy2log. grouped: the ranks of the group that the planner had. capacity: what was set, speed and
    fixed. group: None looks for one."""
    from .planner import Planner

    if grouped is not None and group is None:
        group = _found_group(grouped)
    if arguments["_shape"] is not None:
        slots: Int32s = host_integers("phy2log", placement, 1, np.int32, _c.MAX_PHYSICAL)
        arguments = {**arguments, "_shape": partial(shape_by_placement, slots, *arguments["_shape"])}
    planner = kind.__new__(kind)
    Planner.__init__(planner, placement, group=group, device=placement.device if is_tensor(placement) else "cpu", **arguments)
    if history is not None:
        planner.update_redundancy_mapping(history)
    if capacity is not None:
        planner.set_capacity(*capacity)
    return planner


def _found_group(ranks: int) -> Any:
    """The group for a planner that had one of so many ranks."""
    torch, group = loaded_torch(), _named.get()
    if group is None and torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        group = torch.distributed.group.WORLD
    size = None if group is None else group.size()
    if size != ranks:
        here = "there is no process group here" if size is None else f"the one here has {size}"
        raise WrongOrder(f"planner: was made with a process group of {shown(ranks)} ranks, and {here}: load it where such a group is "
                         "initialized, or inside `with lplb.loading_group(group):`. (A state_dict() holds no planner and loads anywhere)")
    return group
