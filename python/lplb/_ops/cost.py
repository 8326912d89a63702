"""What a rank's work costs: units and capacities, as the caller gives them, checked and as the library takes them."""

from __future__ import annotations

from typing import Any, Union

import numpy as np

from .. import _c
from ..errors import broken_rule, shown
from .arguments import integer
from .host import Array, Int32s, host_integers

Unit = Union[int, str]


def unit_number(unit: Any) -> int:
    """lplb_config.unit of a number of tokens or "experts"."""
    if isinstance(unit, str):
        if unit != "experts":
            raise broken_rule("unit", "must be a number of tokens or 'experts'", shown(unit))
        return _c.UNIT_EXPERTS
    return integer("unit", unit, 1, 2**31 - 1)


def capacities(speed: Array | None, fixed: Array | None, ranks: int) -> tuple[Int32s | None, Int32s | None]:
    """The arrays of lplb_planner_set_capacity."""
    return (_each("speed", speed, ranks, 1, _c.MAX_SPEED), _each("fixed", fixed, ranks, 0, _c.MAX_FIXED))


def alike(speed: Int32s | None, fixed: Int32s | None) -> bool:
    """The ranks do not differ."""
    return (speed is None or bool((speed == _c.SPEED_NORMAL).all())) and (fixed is None or not fixed.any())


def _each(name: str, values: Array | None, ranks: int, least: int, most: int) -> Int32s | None:
    if values is None:
        return None
    array: Int32s = host_integers(name, values, 1, np.int32, _c.MAX_EP_SIZE)
    if array.size != ranks:
        raise broken_rule(name, f"must have a number for each of the {ranks} ranks", f"{array.size} of them")
    for rank in np.flatnonzero((array < least) | (array > most))[:1]:
        raise broken_rule(f"{name}[{rank}]", f"must lie in {least} ... {most}", array[rank])
    return array
