"""lplb: exact, certified load balancing for Mixture-of-Experts (MoE) jobs.

    import lplb, torch
    placed = lplb.place(history, ep_size=8, slots=80)           # which expert goes where: history is tokens [layers, experts]
    planner = lplb.Planner.from_placement(placed.phy2log[0], ep_size=8)     # one layer; in a job give group= instead of ep_size
    physical = planner.run(logical, None)                       # each token's replica: the busiest rank has as little as possible
    planner.info().groups[0]                                    # the load reached, the proven bound and its witness

Placing (host, rarely)
    place             which expert goes where, for all layers at once: Placed, SlotMove
    topology          ready topologies, "cube" and others, for planners that may be placed again by a history of their own
    eplb              rebalance_experts of DeepSeek's EPLB, and vLLM's form of it
    homes             which replica of each expert owns its weights

Planning (every micro-batch, CPU or GPU, no host wait, CUDA graphs)
    Planner           run: count, exchange among ranks, solve, redirect; info: Info, GroupInfo, Locality; layout: Layout, Splits
    solve             the best split of one set of loads, and its proof: Solution. witness_bound checks a proof in plain numpy
    exchange          how the counts of the ranks travel, time limits, who was late
    loading_group     names the process group for planners that torch.load brings back

Training
    Replicas          weights and gradients of copies: pull, push_grads, update
    moe               MoELayer, a whole layer to copy from
    copies            the same for parameters that FSDP2 or DDP shard and reduce
    integrations      what plugs into frameworks and engines

Looking
    simulate          what exact dispatch is worth on recorded routing; also `python -m lplb simulate`

Errors are LplbErrors and say which argument breaks which rule: InvalidArgument, Unsupported, WrongOrder, Busy, Disagreement, PeerTimeout,
PeerLost, NoCuda, CudaError, OutOfMemory, LibraryError, InternalError. help(lplb.Planner), help(lplb.place) and so on say the rest.
Importing needs numpy alone. The library is loaded and torch is used when the first call needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# "as" says that the name is public. There is no __all__, with which help(lplb) would print every class in full.
from . import eplb as eplb, topology as topology
from ._c import VERSION
from .errors import (
    Busy as Busy, CudaError as CudaError, Disagreement as Disagreement, InternalError as InternalError, InvalidArgument as InvalidArgument,
    LibraryError as LibraryError, LplbError as LplbError, NoCuda as NoCuda, OutOfMemory as OutOfMemory, PeerLost as PeerLost,
    PeerTimeout as PeerTimeout, Unsupported as Unsupported, WrongOrder as WrongOrder)
from .info import GroupInfo as GroupInfo, Info as Info, Locality as Locality
from .judging import PlacementReport as PlacementReport, placement_report as placement_report
from .layout import Layout as Layout, Splits as Splits
from .placement import homes as homes
from .placing import Placed as Placed, SlotMove as SlotMove, place as place
from .planner import Planner as Planner
from .records import Metrics as Metrics, history as history
from .saving import loading_group as loading_group
from .simulating import Simulation as Simulation, simulate as simulate
from .solve import Solution as Solution, solve as solve, witness_bound as witness_bound

if TYPE_CHECKING:
    from .replicas import Replicas as Replicas

__version__ = ".".join(map(str, VERSION))


def __getattr__(name: str) -> Any:
    if name == "Replicas":  # which imports torch
        from .replicas import Replicas

        return Replicas
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
