"""The ranks that plan together, and what they do together. Without a process group every step here does nothing."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from .. import _c
from ..errors import broken_rule
from .arguments import check_group, integer, one_of
from .host import loaded_torch

if TYPE_CHECKING:
    import torch

    from ..exchange import Exchange
    from ..planner import Planner


class Ranks:
    def __init__(self, ep_size: int | None, group: Any, rank: int | None, tokens: str) -> None:
        self.tokens = one_of("tokens", tokens, ("own", "same"))
        self._group: Callable[[], torch.distributed.ProcessGroup | None] | None = None
        size = None if ep_size is None else integer("ep_size", ep_size, 1)
        own = None if rank is None else integer("rank", rank, 0)
        if group is not None:
            check_group(group)
            import torch.distributed as dist

            # Weak: it belongs to torch.distributed, and gloo's processes end badly if it outlives destroy_process_group.
            self._group = weakref.ref(group)
            if size is not None and size != group.size():
                raise broken_rule("ep_size", f"must be the size of group, {group.size()}", ep_size)
            size, place = group.size(), dist.get_rank(group)
            if place < 0:
                raise broken_rule("group", "must contain this process", group)
            if own is not None and own != place:
                raise broken_rule("rank", f"must be this process's rank in group, {place}", rank)
            own = place
        if size is None:
            raise broken_rule("ep_size", "must be given where group is not", None)
        if own is not None and own >= size:
            raise broken_rule("rank", f"must be below ep_size = {size}", own)
        self.size: int = size
        self.own = own

    @property
    def group(self) -> torch.distributed.ProcessGroup | None:
        return None if self._group is None else self._group()

    def forget(self) -> None:
        self._group = None

    def telling(self, device: int | None = None) -> AbstractContextManager[None]:
        """A failure inside is told to all ranks, which wait for this one. device: the planner's, once it is known."""
        if self.group is None:
            return nullcontext()
        if device is None:
            torch = loaded_torch()
            device = int(torch.cuda.current_device()) if torch.cuda.is_available() else _c.DEVICE_CPU
        telling: AbstractContextManager[None] = _agree().telling(self.group, device)
        return telling

    def settle(self, config: _c.Config, exchange: str | Exchange, phy2log: int | None) -> None:
        """Compares what all ranks make their planners from, and enters into config what they find out together."""
        if self.group is not None:
            kind = exchange if isinstance(exchange, str) else "a shared exchange"
            _agree().settle(self.group, config, f"exchange={kind}, tokens={self.tokens}", phy2log)

    def agree(self, config: _c.Config, **arrays: int | None) -> None:
        if self.group is not None:
            _agree().agree(self.group, config, device=config.device, **arrays)

    def compare_placement(self, config: _c.Config, **arrays: int | None) -> None:
        """Where nothing travels that could be compared later, a new placement is compared at once."""
        if self.tokens == "same":
            self.agree(config, **arrays)

    def connect(self, planner: Planner, exchange: str | Exchange, debug: bool) -> None:
        """Sets up how counts travel. Collective where the counts can go over NVLink."""
        handle, group = planner._handle, self.group
        if not isinstance(exchange, str):
            exchange.attach(planner)
        elif group is None:
            if exchange not in ("auto", "torch"):
                raise broken_rule("group", f"must be given for exchange = {exchange!r}", None)
        elif self.tokens == "same":
            handle.compare = _agree().same_tokens(group, handle.device) if debug else None
        else:
            if exchange == "torch" or (exchange == "auto" and handle.device < 0) or not handle.has_replicas:
                from ..exchange.base import Layout
                from ..exchange.by_torch import TorchExchange

                assert self.own is not None
                TorchExchange(group, Layout(1, 0, self.size, self.own), handle.width, "").attach(planner)
            else:
                importlib.import_module("lplb.exchange").connect(planner, exchange)
            assert handle.exchange is not None
            handle.exchange.owned = True


def _agree() -> Any:
    """lplb.exchange.agree, which imports torch."""
    return importlib.import_module("lplb.exchange.agree")
