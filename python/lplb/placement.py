"""What follows from a placement alone."""

from __future__ import annotations

import numpy as np

from . import _c
from ._ops.arguments import integer
from ._ops.host import A, Array, Int32s, address_of, as_given, host_integers
from .errors import broken_rule


def homes(phy2log: A, ep_size: int, *, former: Array | None = None) -> A:
    """The slot of each expert's home, which owns its weights, gradient and optimizer state: int32 [n_logical].

    phy2log: integers [n_physical], the expert of every slot; rank r owns n_physical / ep_size consecutive slots. Every rank owns
    n_logical / ep_size experts where the replicas allow it, else the largest number of a rank is as small as it can be. Where there is a
    choice, the replica that comes first in its rank's block is the home: the original, for a placement by a topology. former: the homes
    under another placement of these sizes; experts stay on these ranks as far as possible. A CPU tensor for a tensor, an array for an array.
    """
    slots: Int32s = host_integers("phy2log", phy2log, 1, np.int32, _c.MAX_PHYSICAL)
    if not slots.size:
        raise broken_rule("phy2log", "must have at least one slot", f"shape {list(slots.shape)}")
    result = np.empty(max(0, int(slots.max())) + 1, dtype=np.int32)
    before = None if former is None else host_integers("former", former, 1, np.int32, _c.MAX_LOGICAL)
    if before is not None and before.size != result.size:
        raise broken_rule("former", f"must have one slot for each of the {result.size} experts", before.size)
    _c.call(_c.load().placement_homes, address_of(slots), slots.size, result.size, integer("ep_size", ep_size, 1),
            None if before is None else address_of(before), address_of(result))
    return as_given(result, phy2log)
