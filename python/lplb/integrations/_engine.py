"""What the adapters to serving engines share: what the user asked for, and whether the engine is one that they fit."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import _c
from .._ops.arguments import one_of
from ..errors import Disagreement, broken_rule

if TYPE_CHECKING:
    import torch

    from ..exchange import Exchange
    from ..planner import Planner

PARTS = ("placement", "dispatch")
WAIT = 600.0  # seconds for the other ranks' counts: in its first batches a rank may compile kernels for minutes


@dataclass(frozen=True)
class Settings:
    placement: bool
    dispatch: bool
    policy: str  #: of lplb.place
    max_moves: int | None  #: of one rebalance, over all layers


def settings(variable: str) -> Settings | None:
    """What the environment asks for; None where it asks for nothing. LPLB_VLLM=placement,dispatch, say, with LPLB_VLLM_POLICY and
    LPLB_VLLM_MAX_MOVES beside it."""
    named = [word.strip() for word in os.environ.get(variable, "").split(",") if word.strip()]
    for word in named:
        if word not in PARTS:
            raise broken_rule(variable, "must be placement, dispatch, or both with a comma between", repr(os.environ[variable]))
    if not named:
        return None
    # Engines that split evenly over replicas want another placement than the exact split does.
    policy = one_of(f"{variable}_POLICY", os.environ.get(f"{variable}_POLICY") or ("flow" if "dispatch" in named else "balanced"),
                    tuple(_c.PLACE_POLICIES))
    moves = os.environ.get(f"{variable}_MAX_MOVES") or None
    if moves is not None and not (moves.isascii() and moves.isdigit()):
        raise broken_rule(f"{variable}_MAX_MOVES", "must be a number of experts, at least 0", repr(moves))
    if moves is not None and policy == "deepseek":
        raise broken_rule(f"{variable}_MAX_MOVES", "must not be given with policy deepseek, which places anew", repr(moves))
    return Settings("placement" in named, "dispatch" in named, policy, None if moves is None else int(moves))


def fits(engine: str, tried: str, variable: str, wanted: dict[str, tuple[str, ...]], again: bool = False) -> bool:
    """Whether the engine has all that the adapter takes hold of. wanted: "module:name" and the parameters of what stands there (() for
    what is no function). Says in the engine's log what is missing; the engine then runs as it would without lplb."""
    log = logging.getLogger(f"{engine}.lplb")
    try:
        version = importlib.metadata.version(engine)
    except importlib.metadata.PackageNotFoundError:
        version = "of an unknown version"
    for place, parameters in wanted.items():
        module, _, name = place.partition(":")
        try:
            found: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
            missing = None if not parameters or tuple(inspect.signature(found).parameters) == parameters else (
                f"{place} takes {', '.join(inspect.signature(found).parameters)} and not {', '.join(parameters)}")
        except (ImportError, AttributeError) as error:
            missing = f"{place}: {error}"
        if missing is not None:
            log.error("%s has no effect: lplb works with %s %s, and this is %s %s, where it does not fit: %s", variable, engine, tried,
                      engine, version, missing)
            return False
    if version != tried and not again:
        log.warning("lplb was tried with %s %s, and this is %s %s, where what it takes hold of looks the same", engine, tried, engine,
                    version)
    return True


def same_everywhere(variable: str, chosen: Settings, group: Any) -> None:
    """Ranks that place by different settings would hold other experts than the others think. group: of the CPU. Collective."""
    import torch.distributed as dist

    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (os.environ.get(variable), chosen), group=group)
    for rank, (words, theirs) in enumerate(everyone):
        if theirs != everyone[0][1]:
            raise Disagreement(f"{variable}: must ask for the same on all ranks, but rank 0 has {everyone[0][0]!r}, {everyone[0][1]}, and "
                               f"rank {rank} has {words!r}, {theirs}")


def planner_of(slots: torch.Tensor, n_logical: int, group: Any, device: torch.device, exchange: Exchange | None) -> Planner:
    """A planner of one layer. slots: on the CPU. exchange: None where all ranks hold the same tokens."""
    from ..planner import Planner

    if exchange is None:
        return Planner.from_placement(slots, n_logical=n_logical, group=group, device=device, tokens="same")
    return Planner.from_placement(slots, n_logical=n_logical, group=group, device=device, exchange=exchange)
