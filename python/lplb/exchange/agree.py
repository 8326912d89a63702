"""What the ranks of a group must agree on, and the gather by which they find out: lplb_agree over torch.distributed."""

from __future__ import annotations

import ctypes
import hashlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _c as _native
from ..errors import Disagreement, LplbError
from .gather import SETTINGS, TOKENS, Callback, Waiting, gather_bytes, on_device

TOKENS_LIMIT = 30.0  # seconds to wait for a peer's ids, as an exchange waits for its counts


@dataclass(frozen=True)
class Agreement:
    """What all ranks of a group have in common."""

    n_nodes: int
    number: int


# The number of the planner that was made last with a group. Numbers are part of digests, so that equal planners are told apart.
_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def settle(group: Any, config: _native.Config, settings: str, phy2log: int | None) -> None:
    """Agrees on what a new planner is made from, and enters into config what the ranks find out together: n_nodes and number."""
    config.number = _numbers.get(group, 0) + 1
    agreement = agree(group, config, settings=settings, phy2log=phy2log, device=config.device)
    config.number = _numbers[group] = agreement.number
    config.n_nodes = agreement.n_nodes


def agree(group: Any, config: _native.Config | None, *, settings: str = "", failure: str | None = None, history: int | None = None,
          phy2log: int | None = None, device: int = _native.DEVICE_CPU) -> Agreement:
    """Compares the ranks' settings: on all of them the same agreement, or an error with the same words. history and phy2log: addresses of
    host arrays as in lplb.h. failure: why this rank cannot go on. Collective."""
    # A rank may be late for long, loading a model say: the limit of the process group counts.
    waiting = Waiting(f"planner: rank {dist.get_rank(group)} of {dist.get_world_size(group)}", 0)
    gather = Callback(group, SETTINGS, waiting, device)
    request = _native.AgreeConfig(
        struct_size=ctypes.sizeof(_native.AgreeConfig), planner=None if config is None else ctypes.pointer(config), history=history,
        phy2log=phy2log, settings=settings.encode(), failure=None if failure is None else failure.encode("utf-8", "replace"),
        n_ranks=dist.get_world_size(group), rank=dist.get_rank(group), gather=gather.function, context=None)
    found = _native.AgreementStruct(struct_size=ctypes.sizeof(_native.AgreementStruct))
    message = ctypes.create_string_buffer(_native.MESSAGE_SIZE)
    status = _native.load().agree(ctypes.byref(request), ctypes.byref(found), message, len(message))
    gather.check()
    if status:
        raise _native.failure(status, _native.text(message.value))
    return Agreement(found.n_nodes, found.number)


@contextmanager
def telling(group: Any, device: int = _native.DEVICE_CPU) -> Iterator[None]:
    """A failure inside is told to all ranks of the group (None: there are no others), which wait in agree() meanwhile."""
    try:
        yield
    except LplbError as error:
        if group is not None:
            try:
                agree(group, None, failure=str(error), device=device)
            except LplbError:
                pass  # the same words, or a peer that is gone as well
        raise


def same_tokens(group: Any, device: int) -> Callable[[Tensor], None]:
    """A check that all ranks have the same ids, for planners whose ranks hold the same tokens. Waits for the GPU, and collective."""
    ranks = weakref.ref(group)  # it belongs to torch.distributed
    waiting = Waiting(f"idx: rank {dist.get_rank(group)} of {dist.get_world_size(group)}", TOKENS_LIMIT)

    def check(ids: Tensor) -> None:
        host = ids.detach().cpu().contiguous().to(torch.int64)
        mine = hashlib.blake2b(repr(list(host.shape)).encode() + host.numpy().tobytes(), digest_size=16).digest()
        with on_device(device):
            digests = gather_bytes(ranks(), TOKENS, mine, waiting)
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            raise Disagreement("idx: must be equal on all ranks, since the planner was made with tokens='same', got other ids on ranks "
                               f"{', '.join(map(str, odd))} than on rank 0")

    return check
