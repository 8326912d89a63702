"""The ranks that plan together, and what they do together. Without a process group every step here does nothing."""

from __future__ import annotations

import ctypes
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from .. import _c
from ..errors import LplbError, broken_rule
from .arguments import check_group, integer, one_of
from .host import Int32s, loaded_torch

if TYPE_CHECKING:
    import torch

    from ..exchange import Exchange
    from ..planner import Planner

# The number of the planner that was made last with a group. Numbers are part of digests, so that equal planners are told apart.
_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


class Ranks:
    def __init__(self, ep_size: int | None, group: Any, rank: int | None, tokens: str) -> None:
        self.tokens = one_of("tokens", tokens, ("own", "same"))
        self._group: Callable[[], torch.distributed.ProcessGroup | None] = lambda: None
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
        return self._group()

    def forget(self) -> None:
        self._group = lambda: None

    @contextmanager
    def telling(self, device: int | None = None) -> Iterator[None]:
        """A failure inside is told to all ranks, which wait for this one in agree() meanwhile. device: the planner's, once it is known."""
        try:
            yield
        except LplbError as error:
            if self.group is not None:
                if device is None:
                    torch = loaded_torch()
                    device = torch.cuda.current_device() if torch.cuda.is_available() else _c.DEVICE_CPU
                with suppress(LplbError):  # the same words, or a peer that is gone as well
                    self.agree(None, device, failure=str(error))
            raise

    def agree(self, config: _c.Config | None, device: int, *, settings: str = "", failure: str | None = None, history: int | None = None,
              phy2log: int | None = None) -> _c.AgreementStruct | None:
        """lplb_agree: compares what all ranks make their planners from. history and phy2log: addresses of host arrays. failure: why this
        rank cannot go on. The same result or error on all ranks."""
        group = self.group
        if group is None:
            return None
        from ..exchange.gather import SETTINGS, Callback, Waiting

        # A rank may be late for long, loading a model say: the limit of the process group counts.
        waiting = Waiting(f"planner: rank {self.own} of {self.size}", 0)
        found = _c.AgreementStruct()
        gather = Callback(group, SETTINGS, waiting, device)
        request = _c.AgreeConfig(
            planner=None if config is None else ctypes.pointer(config), history=history, phy2log=phy2log, settings=settings.encode(),
            failure=None if failure is None else failure.encode("utf-8", "replace"), n_ranks=self.size, rank=self.own,
            gather=gather.function)
        refused = gather.call(_c.load().agree, ctypes.byref(request), ctypes.byref(found))
        if refused is not None:
            raise refused
        return found

    def settle(self, config: _c.Config, exchange: str | Exchange, phy2log: int | None) -> None:
        """Agrees on what a new planner is made from, and enters into config what the ranks find out together."""
        group = self.group
        if group is not None:
            config.number = _numbers.get(group, 0) + 1
            kind = exchange if isinstance(exchange, str) else "a shared exchange"
            found = self.agree(config, config.device, settings=f"exchange={kind}, tokens={self.tokens}", phy2log=phy2log)
            assert found is not None
            config.number, config.n_nodes = found.number, found.n_nodes
            _numbers[group] = found.number

    def compare_placement(self, config: _c.Config, history: int | None = None, phy2log: int | None = None) -> None:
        """Where nothing travels that could be compared later, a new placement is compared at once."""
        if self.tokens == "same":
            self.agree(config, config.device, history=history, phy2log=phy2log)

    def compare_capacity(self, config: _c.Config, speed: Int32s | None, fixed: Int32s | None) -> None:
        """The same for capacities."""
        if self.tokens == "same":
            words = " ".join(f"{name} {'none' if each is None else zlib.crc32(each.tobytes())}"
                             for name, each in (("speed", speed), ("fixed", fixed)))
            self.agree(config, config.device, settings=f"capacity: {words}")

    def connect(self, planner: Planner, exchange: str | Exchange, debug: bool) -> None:
        """Sets up how counts travel. Collective where the counts can go over NVLink."""
        handle, group = planner._handle, self.group
        if not isinstance(exchange, str):
            exchange.attach(planner)
        elif group is None:
            if exchange not in ("auto", "torch"):
                raise broken_rule("group", f"must be given for exchange = {exchange!r}", None)
        elif self.tokens == "same":
            if debug:
                from ..exchange.gather import same_tokens

                handle.compare = same_tokens(group, handle.device)
        else:
            from ..exchange import connect
            from ..exchange.base import Layout
            from ..exchange.by_torch import TorchExchange

            if exchange == "torch" or (exchange == "auto" and handle.device < 0) or not handle.has_replicas:
                assert self.own is not None
                made: Exchange = TorchExchange(group, Layout(1, 0, self.size, self.own), handle.width, "")
                made.attach(planner)
            else:
                made = connect(planner, exchange)
            made.owned = True
