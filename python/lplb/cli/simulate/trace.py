"""
Reading recorded routing, and cutting it into a history and micro-batches.

    .npz   topk_ids [tokens, layers, k], integers, -1 = no expert; order is kept, so real drift is in it. Optional: n_experts, source
    .npy   counts [steps, layers, experts]: each step is one micro-batch
    .json  {"logical_count": [layers][experts]}: one snapshot without order, micro-batches are drawn from it at random;
           or {name: {"counts": [layers][experts]}, ...}: each entry is one step, in file order
    .pt    what torch.save wrote, see torch_file.py: the same as tensors, and what SGLang and vLLM record
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..files import DEFAULT_LIMIT, read_json, read_npy, read_npz
from ..terminal import UsageError, harmless, shown

Int64Array = NDArray[np.int64]
Kind = Literal["ids", "steps", "snapshot"]

TRACES = (".npz", ".npy", ".json", ".pt")
SAMPLE = "deepseek_v2_lite_summary_sample.npz"
DRAWS = 32          # micro-batches drawn from a snapshot
DRAWN_TOP_K = 8     # selections per token in them; a snapshot does not tell
MAX_EXPERTS = 4096  # LPLB_MAX_LOGICAL
MAX_LAYERS = 1024   # history and placements are kept layer by layer
MAX_TOKENS = 2**31  # of one micro-batch in one layer, all ranks together; stays below it
SMALL = 1 << 16     # bytes of n_experts and of source
BLOCK = 1 << 20     # numbers looked at together: what is computed from them can take several times their memory


@dataclass(frozen=True)
class Trace:
    """data: ids [tokens, layers, k], steps [steps, layers, experts] or a snapshot [layers, experts]."""

    name: str
    kind: Kind
    data: NDArray[Any]
    n_experts: int
    source: str = ""

    @property
    def n_layers(self) -> int:
        return int(self.data.shape[0 if self.kind == "snapshot" else 1])

    def describe(self) -> str:
        shape, name = self.data.shape, harmless(self.name)
        if self.kind == "ids":
            return f"{name}: {shape[0]} tokens, {shape[1]} layers, top-{shape[2]} of {self.n_experts} experts"
        if self.kind == "steps":
            return f"{name}: counts of {shape[0]} steps, {shape[1]} layers, {self.n_experts} experts"
        return f"{name}: one snapshot of counts, {shape[0]} layers, {self.n_experts} experts"


def load_sample(n_experts: int | None = None) -> Trace:
    """The trace that ships with the package."""
    with resources.as_file(resources.files("lplb.cli").joinpath("data").joinpath(SAMPLE)) as path:
        return load(str(path), n_experts)


def load(path: str, n_experts: int | None = None, limit: int = DEFAULT_LIMIT) -> Trace:
    """
    n_experts: what the file does not say; None: the largest id + 1 (or the width of the counts). limit: the bytes that the file may unpack
    to. Raises UsageError.
    """
    readers = {".npz": _read_npz, ".npy": _read_npy, ".json": _read_json, ".pt": _read_pt}
    reader = readers.get(Path(path).suffix.lower())
    if reader is None:
        raise UsageError(f"{path}: a trace is a .npz with topk_ids, a .npy with counts, a .json with logical_count, or a .pt with one of these")
    trace = reader(path, n_experts, limit)
    if trace.n_experts > MAX_EXPERTS:
        raise UsageError(f"{path}: at most {MAX_EXPERTS} experts are supported, got {trace.n_experts}")
    if trace.n_layers > MAX_LAYERS:
        raise UsageError(f"{path}: at most {MAX_LAYERS} layers are supported, got {trace.n_layers}")
    return trace


def _read_npz(path: str, n_experts: int | None, limit: int) -> Trace:
    arrays, names = read_npz(path, {"n_experts": SMALL, "source": SMALL, "topk_ids": limit})
    if "topk_ids" not in arrays:
        raise UsageError(f"{path}: needs an array topk_ids [tokens, layers, k], has {shown(', '.join(names), 200) or 'none'}")
    stated = _stated_experts(path, arrays["n_experts"]) if "n_experts" in arrays else None
    source = _stated_source(path, arrays["source"]) if "source" in arrays else ""
    return of_ids(path, arrays["topk_ids"], n_experts or stated, source)


def of_ids(path: str, ids: NDArray[Any], n_experts: int | None, source: str = "") -> Trace:
    """A trace of topk_ids [tokens, layers, k]."""
    if ids.ndim != 3 or ids.dtype.kind not in "iu" or 0 in ids.shape:
        raise UsageError(f"{path}: topk_ids must be integers of shape [tokens, layers, k], none of them 0, got {ids.dtype} {ids.shape}")
    low, high = int(ids.min()), int(ids.max())
    n = n_experts or high + 1
    if low < -1 or high >= n:
        raise UsageError(f"{path}: topk_ids must lie in -1 .. {n - 1}, got {low if low < -1 else high}")
    if high < 0:
        raise UsageError(f"{path}: topk_ids selects no expert at all")
    return Trace(Path(path).name, "ids", ids, n, source)


def _stated_experts(path: str, array: NDArray[Any]) -> int:
    if array.size == 1 and array.dtype.kind in "iuf":
        value = array.item()
        if 1 <= value <= MAX_EXPERTS and value == int(value):
            return int(value)
    got = shown(array.item()) if array.size == 1 and array.dtype.kind in "biufc" else f"{array.dtype} of shape {array.shape}"
    raise UsageError(f"{path}: n_experts must be one whole number of 1 .. {MAX_EXPERTS}, got {got}")


def _stated_source(path: str, array: NDArray[Any]) -> str:
    if array.size != 1 or array.dtype.kind not in "US":
        raise UsageError(f"{path}: source must be one text, got {array.dtype} of shape {array.shape}")
    if array.dtype.kind == "S":
        return bytes(array.item()).decode("utf-8", "replace")
    points = array.astype(array.dtype.newbyteorder("<")).tobytes()  # numpy's own way to a str fails for numbers that Unicode does not have
    return points.decode("utf-32-le", "replace").rstrip("\0")


def _read_npy(path: str, n_experts: int | None, limit: int) -> Trace:
    return of_counts(path, read_npy(path, limit), n_experts)


def of_counts(path: str, counts: NDArray[Any], n_experts: int | None) -> Trace:
    """A trace of counts [steps, layers, experts]."""
    if counts.ndim != 3 or 0 in counts.shape:
        raise UsageError(f"{path}: counts must have the shape [steps, layers, experts], none of them 0, got {counts.shape}")
    return _counted(path, "steps", counts, n_experts)


def _read_pt(path: str, n_experts: int | None, limit: int) -> Trace:
    from . import torch_file
    content = torch_file.read(path, limit)
    if "topk_ids" in content:
        stated = _stated_experts(path, content["n_experts"]) if "n_experts" in content else None
        return of_ids(path, content["topk_ids"], n_experts or stated)
    counts = content["counts"]
    if counts.ndim == 2 and 0 not in counts.shape:
        return _counted(path, "snapshot", counts, n_experts)
    return of_counts(path, counts, n_experts)


def _read_json(path: str, n_experts: int | None, limit: int) -> Trace:
    content = read_json(path, limit)
    if isinstance(content, dict) and "logical_count" in content:
        return _counted(path, "snapshot", _rectangle(path, "logical_count", content["logical_count"]), n_experts)
    if isinstance(content, dict) and content and all(isinstance(item, dict) and "counts" in item for item in content.values()):
        steps = [_rectangle(path, f"{shown(name)}.counts", item["counts"]) for name, item in content.items()]
        if len({step.shape for step in steps}) > 1:
            raise UsageError(f"{path}: all counts must have one shape [layers][experts]")
        return _counted(path, "steps", np.stack(steps), n_experts)
    raise UsageError(f"{path}: needs logical_count [layers][experts], or counts [layers][experts] per entry")


def _rectangle(path: str, what: str, rows: Any) -> NDArray[np.float64]:
    try:
        array = np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.ndim != 2 or 0 in array.shape:
        raise UsageError(f"{path}: {what} must be numbers [layers][experts] with rows of one length")
    return array


def _counted(path: str, kind: Kind, counts: NDArray[Any], n_experts: int | None) -> Trace:
    if counts.dtype.kind not in "iuf":
        raise UsageError(f"{path}: counts must be whole numbers of at least 0, got {counts.dtype}")
    some = False
    rows = max(1, BLOCK // counts[0].size)
    for first in range(0, len(counts), rows):
        some |= _check_counts(path, counts[first : first + rows])
    if not some:
        raise UsageError(f"{path}: all counts are 0")
    if n_experts is not None and n_experts != counts.shape[-1]:
        raise UsageError(f"{path}: the counts are of {counts.shape[-1]} experts, --experts says {n_experts}")
    return Trace(Path(path).name, kind, counts if counts.dtype.kind == "i" else counts.astype(np.int64), int(counts.shape[-1]))


def _check_counts(path: str, counts: NDArray[Any]) -> bool:
    """Whether any of the counts [..., experts] is above 0. UsageError unless all of them are whole numbers in range."""
    if counts.dtype.kind == "f" and (np.isnan(counts).any() or (counts != np.floor(counts)).any()) or (counts < 0).any():
        raise UsageError(f"{path}: counts must be whole numbers of at least 0")
    if float(counts.max()) >= MAX_TOKENS or float(counts.sum(axis=-1, dtype=np.float64).max()) >= MAX_TOKENS:
        raise UsageError(f"{path}: the counts of one layer and step must stay below 2^31 tokens")
    return bool(counts.any())


@dataclass(frozen=True)
class Cut:
    """A history and the micro-batches after it, for `ranks` source ranks. Layers are indices of the trace."""

    trace: Trace
    ranks: int
    tokens_per_rank: int
    n_history: int      # tokens or steps that went into the history
    n_batches: int
    history: Int64Array  # [layers, experts]
    drawn: Int64Array | None = None  # snapshot only: [n_batches, layers, experts]
    snapshots: Int64Array | None = None  # [snapshots, layers, experts], which add up to history, where there are several

    @property
    def has_sources(self) -> bool:
        """Whether the trace tells which rank a token is on (counts do not: there every rank gets an equal share)."""
        return self.trace.kind == "ids"

    def ids(self, layer: int, batch: int) -> Int64Array | None:
        """[ranks, tokens_per_rank * k], or None where only counts are known."""
        if self.trace.kind != "ids":
            return None
        size = self.ranks * self.tokens_per_rank
        first = self.n_history + batch * size
        return self.trace.data[first : first + size, layer].astype(np.int64).reshape(self.ranks, -1)

    def counts(self, layer: int, batch: int) -> Int64Array:
        """[ranks, experts] tokens of every source rank."""
        ids = self.ids(layer, batch)
        n = self.trace.n_experts
        if ids is not None:
            keyed = (ids + 1 + np.arange(self.ranks)[:, None] * (n + 1)).ravel()
            return np.bincount(keyed, minlength=self.ranks * (n + 1)).reshape(self.ranks, n + 1)[:, 1:].astype(np.int64)
        total = (self.drawn[batch, layer] if self.drawn is not None else self.trace.data[self.n_history + batch, layer]).astype(np.int64)
        # Each rank gets total // ranks; the remainders go to the ranks in turn, starting elsewhere for every expert.
        turn = (np.arange(self.ranks)[:, None] - np.arange(n)[None, :]) % self.ranks
        return np.asarray(total // self.ranks + (turn < total % self.ranks), dtype=np.int64)


def cut(trace: Trace, ranks: int, tokens_per_rank: int, history: float | list[Trace], seed: int) -> Cut:
    """
    history: what is known when the experts are placed, the fraction of the trace from its start, or other traces of the same layers and
    experts. Raises UsageError.
    """
    if isinstance(history, list):
        for one in history:
            if (one.n_layers, one.n_experts) != (trace.n_layers, trace.n_experts):
                raise UsageError(f"--history: {one.name} has {one.n_layers} layers of {one.n_experts} experts, {trace.name} "
                                 f"{trace.n_layers} of {trace.n_experts}")
        snapshots = np.stack([total_counts(one, len(one.data)) for one in history])
        return replace(cut(trace, ranks, tokens_per_rank, 0.0, seed), history=snapshots.sum(axis=0),
                       snapshots=snapshots if len(history) > 1 else None)
    size = ranks * tokens_per_rank
    if trace.kind == "snapshot":
        if size * DRAWN_TOP_K >= MAX_TOKENS:
            raise UsageError(f"--tokens-per-rank: {ranks} ranks with {tokens_per_rank} tokens that select {DRAWN_TOP_K} experts each must "
                             "stay below 2^31 selections")
        rng = np.random.default_rng(seed)
        share = trace.data / np.maximum(trace.data.sum(axis=1, keepdims=True), 1)
        if not trace.data.any(axis=1).all():
            raise UsageError(f"{trace.name}: the counts of layer {int(np.argmin(trace.data.any(axis=1)))} are all 0")
        drawn = rng.multinomial(size * DRAWN_TOP_K, share, size=(DRAWS, trace.n_layers)).astype(np.int64)
        return Cut(trace, ranks, tokens_per_rank, 0, DRAWS, trace.data, drawn)
    length = int(trace.data.shape[0])
    n_history = int(length * history)
    unit, per_batch = ("tokens", size) if trace.kind == "ids" else ("steps", 1)
    n_batches = (length - n_history) // per_batch
    if n_batches == 0:
        each = f" ({ranks} ranks with {tokens_per_rank} tokens each)" if unit == "tokens" else ""
        raise UsageError(f"{trace.name}: {length - n_history} {unit} are left after a history of {n_history}, fewer than one micro-batch "
                         f"of {per_batch}{each}")
    return Cut(trace, ranks, tokens_per_rank, n_history, n_batches, total_counts(trace, n_history))


def total_counts(trace: Trace, n: int) -> Int64Array:
    """[layers, experts] over the first n tokens or steps; all of a snapshot."""
    past = trace.data[:n]
    if trace.kind == "ids":
        total = np.zeros((trace.n_layers, trace.n_experts), dtype=np.int64)
        tokens = max(1, BLOCK // past.shape[2])
        for layer, first in product(range(trace.n_layers), range(0, len(past), tokens)):
            ids = past[first : first + tokens, layer].astype(np.int64).ravel()
            total[layer] += np.bincount(ids + 1, minlength=trace.n_experts + 1)[1:]
        return total
    counts: Int64Array = trace.data.astype(np.int64) if trace.kind == "snapshot" else past.sum(axis=0, dtype=np.int64)
    return counts
