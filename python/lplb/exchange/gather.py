"""Collectives of torch.distributed that wait no longer than they may, and whose failures are errors of this package.

Where the host waits for the peers (gloo, and every collective on CPU tensors) the limit holds. Where a stream of the GPU waits (NCCL) the
host cannot end it: there the time limit is that of the process group, after which PyTorch's watchdog ends the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import pickle
import re
import struct
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions

from .. import _c
from .._ops.host import Array, to_host
from ..errors import Disagreement, LplbError, PeerLost, PeerTimeout

GRACE = 1.0  # seconds for the backend to notice by itself, in words that say more than ours
TOKENS_LIMIT = 30.0  # seconds to wait for a peer's ids, as an exchange waits for its counts
SLICE = timedelta(seconds=0.05)  # how long a wait that may be aborted lasts at most

_TIMED_OUT = re.compile(r"tim(e|ed|ing)[ -]?out", re.I)
_LOST = re.compile(
    r"closed by peer|connection (was )?(closed|reset|refused|lost|aborted)|broken pipe|socket (is |was )?closed|remote process"
    r"|ncclRemoteError|communicator was aborted|not connected|no route to host|network is unreachable", re.I)


class Waiting:
    """What a gather waits for, in words, and for how long. One object may serve many calls."""

    def __init__(self, what: str, limit: float) -> None:
        self.what = what  #: the subject of the words of a failure, e.g. "exchange: rank 1 of 8 in call 3"
        self.limit = limit  #: seconds, 0: as long as the group itself waits
        self.aborted = False  #: set by any thread: ends the waiting

    def failure(self, error: BaseException) -> LplbError:
        """The error of this package for one of torch.distributed's, with its words."""
        # The name of a source file of gloo's and the advice behind the first sentence say nothing to a caller.
        words = re.sub(r"^\[[^\]]*\.(cc|cpp|h):\d+\] *", "", str(error).strip().split("\n")[0]).split(". This is typically")[0][:400]
        if _TIMED_OUT.search(words):
            return self.too_late(words)
        if _LOST.search(words):
            return PeerLost(f"{self.what}: the connection to another rank is lost, which has ended or given up itself; "
                            f"torch.distributed says: {words}")
        return LplbError(f"{self.what}: torch.distributed failed: {words or type(error).__name__}")

    def too_late(self, words: str) -> PeerTimeout:
        limit = f"{self.limit:g} s" if self.limit else "the limit of the process group"
        return PeerTimeout(
            f"{self.what}: another rank did not come within {limit}; it is late, stuck or gone; torch.distributed says: {words}")


def gather_by_torch(group: Any, counts: Tensor, everyone: Tensor, waiting: Waiting) -> None:
    """everyone [ranks, n] = the counts [n] of every rank, by torch.distributed, whatever the backend.

    PeerTimeout where a rank does not come, PeerLost where a connection broke; the process group is of no more use then. With NCCL these
    are found by PyTorch's watchdog alone.
    """
    if counts.is_cuda and dist.get_backend(group) == "gloo":
        on_host = torch.empty_like(everyone, device="cpu")
        gather_by_torch(group, counts.cpu(), on_host, waiting)
        everyone.copy_(on_host)
        return
    try:
        if counts.is_cuda:
            dist.all_gather_into_tensor(everyone, counts, group=group)
        else:
            _gather_on_host(group, counts, everyone, waiting)
    except LplbError:
        raise
    except RuntimeError as error:
        raise waiting.failure(error) from error


def _gather_on_host(group: Any, counts: Tensor, everyone: Tensor, waiting: Waiting) -> None:
    options = AllgatherOptions()
    options.asyncOp = True
    if waiting.limit:
        options.timeout = timedelta(seconds=waiting.limit)
    work = group.allgather([list(everyone.unbind(0))], [counts], options)  # gloo takes no single tensor of this shape
    end = time.monotonic() + waiting.limit + GRACE if waiting.limit else float("inf")
    while True:
        try:
            work.wait(SLICE)
            return
        except RuntimeError as error:
            if work.is_completed():  # done, or failed for good; otherwise only the slice is over
                work.wait()
                return
            if waiting.aborted:
                raise PeerTimeout(f"{waiting.what}: the host aborted it while it waited for another rank") from None
            if time.monotonic() >= end:  # a backend that knows no limit of a call
                raise waiting.too_late(str(error).split("\n")[0]) from error


# Every message between hosts has this one size, whatever is in it: ranks that are in different calls then see each other's kind, where
# sizes that differ would end the process (gloo) or mix up the bytes (NCCL). A row of LPLB_MAX_LOGICAL + 1 counts fits in.
MESSAGE_BYTES = 4 * (4096 + 4)
_HEADER = struct.Struct("<II")  # kind, length of all that this rank brings
_ROOM = MESSAGE_BYTES - _HEADER.size

SETTINGS, SETUP, ROW, TOKENS, CONNECT, REPLICAS, RELEASE = 1, 2, 3, 4, 5, 6, 7
_MEANING = {SETTINGS: "makes or places a planner", SETUP: "sets up an exchange", ROW: "exchanges counts", TOKENS: "compares its tokens",
            CONNECT: "maps and tries an exchange", REPLICAS: "calls replicas", RELEASE: "releases exchanges"}


def gather_bytes(group: Any, kind: int, mine: bytes, waiting: Waiting) -> list[bytes]:
    """What every rank brings, in rank order. Disagreement where another rank is in another kind of call. Also a barrier."""
    try:
        group._get_backend(torch.device("cpu"))
        device = torch.device("cpu")  # where the host's limit holds
    except RuntimeError:
        device = torch.device("cuda", torch.cuda.current_device())
    parts = [bytearray() for _ in range(dist.get_world_size(group))]
    lengths = [len(mine)] * len(parts)
    first = 0
    while first == 0 or first < max(lengths):
        piece = mine[first : first + _ROOM]
        message = bytearray(MESSAGE_BYTES)
        message[: _HEADER.size + len(piece)] = _HEADER.pack(kind, len(mine)) + piece
        everyone = torch.empty((len(parts), MESSAGE_BYTES), dtype=torch.uint8, device=device)
        gather_by_torch(group, torch.frombuffer(message, dtype=torch.uint8).to(device), everyone, waiting)
        if device.type == "cuda":
            _await(device, waiting)
        for rank, row in enumerate(everyone.cpu().numpy()):
            theirs, lengths[rank] = _HEADER.unpack_from(row)
            if theirs != kind:
                raise Disagreement(f"group: all ranks must make the same calls in the same order, but rank {rank} "
                                   f"{_MEANING.get(theirs, 'does something else')} where this one {_MEANING[kind]}")
            parts[rank] += row[_HEADER.size :].tobytes()
        first += _ROOM
    return [bytes(part[:length]) for part, length in zip(parts, lengths)]


class Callback:
    """lplb_gather of lplb.h: what the library calls to bring the bytes of every rank to every rank."""

    def __init__(self, group: Any, kind: int, waiting: Waiting, device: int) -> None:
        self._of = (group, kind, waiting, device)
        self.error: BaseException | None = None
        self.function = _c.GATHER(self._gather)

    def _gather(self, context: int | None, mine: int, everyone: int, size: int) -> int:
        group, kind, waiting, device = self._of
        try:
            with on_device(device):
                rows = gather_bytes(group, kind, ctypes.string_at(mine, size), waiting)
            ctypes.memmove(everyone, b"".join(row.ljust(size, b"\0")[:size] for row in rows), size * len(rows))
            return 0
        except BaseException as error:  # nothing may pass through C
            self.error = error
            return 1

    def call(self, function: Callable[..., int], *arguments: object) -> LplbError | None:
        """Once: calls the library, which gathers by this. Returns the failure that all ranks have. Raises what went wrong here, on this
        rank alone perhaps, which says more than the library's PEER_LOST."""
        failure = None
        try:
            _c.call(function, *arguments)
        except LplbError as refused:
            failure = refused.with_traceback(None)
        error, self.error = self.error, None
        del self.function  # which holds this object, and so the group
        if isinstance(error, LplbError) or not isinstance(error, (Exception, type(None))):
            raise error
        if error is not None:
            raise PeerLost(f"group: the bytes of all ranks could not be gathered: {error}") from error
        return failure


def on_device(device: int) -> Any:
    """Collectives of NCCL work on the current device."""
    return torch.cuda.device(device) if device >= 0 and torch.cuda.is_available() else nullcontext()


def gather_objects(group: Any, kind: int, value: object, waiting: Waiting) -> list[Any]:
    """The value of every rank, in rank order: all_gather_object with a limit. Also a barrier."""
    return [pickle.loads(theirs) for theirs in gather_bytes(group, kind, pickle.dumps(value), waiting)]


def gather_rows(group: Any, row: Tensor, waiting: Waiting) -> Tensor:
    """int32 [ranks, width], the rows of all ranks, on the host."""
    rows = gather_bytes(group, ROW, row.numpy().tobytes(), waiting)
    odd = [rank for rank, other in enumerate(rows) if len(other) != 4 * row.numel()]
    if odd:
        raise Disagreement(f"group: all ranks must exchange the counts of the same planner, but rank {odd[0]} brings "
                           f"{len(rows[odd[0]]) // 4} where this one brings {row.numel()}")
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.int32).view(len(rows), -1)


def _await(device: torch.device, waiting: Waiting) -> None:
    """Waits for the GPU's part of a gather, not longer than the limit."""
    event: Any = getattr(torch.cuda, "Event")()  # untyped in PyTorch
    event.record(torch.cuda.current_stream(device))
    end = time.monotonic() + waiting.limit if waiting.limit else float("inf")
    while not event.query():
        if time.monotonic() >= end:
            raise waiting.too_late("nothing yet; its watchdog ends the process after the process group's own limit")
        time.sleep(0.0002)


def abort_group(group: Any, device: int) -> None:
    """Ends what waits in a group of ranks, where its backend can: NCCL aborts the communicator, and the group is of no more use."""
    if group is None:
        return
    backend = group._get_backend(torch.device("cuda", device) if device >= 0 else torch.device("cpu"))
    abort = getattr(backend, "abort", None) or getattr(group, "abort", None)
    if abort is not None:
        abort()


def same_tokens(group: Any, device: int) -> Callable[[Array], None]:
    """A check that all ranks have the same ids, for planners whose ranks hold the same tokens. Waits for the GPU, and collective."""
    ranks = weakref.ref(group)  # it belongs to torch.distributed
    waiting = Waiting(f"idx: rank {dist.get_rank(group)} of {dist.get_world_size(group)}", TOKENS_LIMIT)

    def check(ids: Array) -> None:
        host = to_host("idx", ids).astype(np.int64)
        mine = hashlib.blake2b(repr(list(host.shape)).encode() + host.tobytes(), digest_size=16).digest()
        with on_device(device):
            digests = gather_bytes(ranks(), TOKENS, mine, waiting)
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            raise Disagreement("idx: must be equal on all ranks, since the planner was made with tokens='same', got other ids on ranks "
                               f"{', '.join(map(str, odd))} than on rank 0")

    return check
