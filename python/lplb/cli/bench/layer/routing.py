"""
Which experts the tokens of the micro-batches select, and the history that the placement was made from.

Every micro-batch is another layer of the model (or another part of the trace, where it has too few), with a history of its own. Routing is
made on every rank for all ranks, from the same seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...files import DEFAULT_LIMIT, read_npz
from ...simulate.trace import Trace, load, load_sample
from ...terminal import UsageError
from ..cases import DRIFT, FAMILIES, draw

Int64Array = NDArray[np.int64]
Float64Array = NDArray[np.float64]

ROUTINGS = ("real", *(family.split()[0] for family in FAMILIES))
HISTORY = 0.25  # of a task's tokens
V3_COUNTS, V2_TASKS = "deepseek_v3_counts.npz", ("deepseek_v2_lite_summary.npz", "deepseek_v2_lite_law.npz")  # the latter arrives
V3_WORKLOADS = ("prefill_in512", "prefill_in2048", "decode_in500out1500")  # history, what arrives, what arrives when the task changes
GENERATED_LAYERS = 16


@dataclass(frozen=True)
class Model:
    """Sizes of one MoE layer, with the tokens a rank that it is measured at. whole: emulated ranks share so many experts."""

    name: str
    hidden: int
    intermediate: int
    top_k: int
    n_experts: int
    whole: int
    tokens: tuple[int, ...]
    quick: tuple[int, ...]


MODELS = {model.name: model for model in (
    Model("v3-32", 7168, 2048, 8, 32, 256, (512, 1024, 2048, 4096, 8192), (1024, 2048)),
    Model("qwen3-32", 4096, 1536, 8, 32, 128, (4096, 8192), (4096,)),
    Model("v2-lite", 2048, 1408, 6, 64, 64, (2048, 8192), (4096,)),
    Model("tiny", 64, 32, 4, 16, 64, (64, 128), (64,)),
)}
DRIFTED = "-drift"  # ends the name of a case whose history is of another task


@dataclass(frozen=True)
class Source:
    """One layer. history [n_experts], and what arrives: ids [tokens, k] in order, or loads [n_experts] to draw from."""

    name: str
    history: Int64Array
    loads: Float64Array
    ids: Int64Array | None = None


def sources(n_experts: int, top_k: int, routing: str, drift: bool, folder: str | None) -> list[Source]:
    """The layers. real: DeepSeek-V3's counts in folder for models that select 8 experts, else V2-Lite's tokens, there or in the package."""
    if routing != "real":
        return _generated(n_experts, routing, drift)
    if folder is not None and top_k == 8 and (Path(folder) / V3_COUNTS).exists():
        return _v3(n_experts, drift, folder)
    return _v2_lite(n_experts, top_k, drift, folder)


def _generated(n_experts: int, routing: str, drift: bool) -> list[Source]:
    family = FAMILIES[ROUTINGS.index(routing) - 1]
    rng = np.random.default_rng([n_experts, drift])
    seen = draw(family, (GENERATED_LAYERS, n_experts), rng)
    arrive = seen * rng.lognormal(0, 2 * DRIFT if drift else DRIFT, seen.shape)
    return [Source(f"{family} loads {index}", np.rint(1000 * past).astype(np.int64), loads)
            for index, (past, loads) in enumerate(zip(seen, arrive))]


def _v3(n_experts: int, drift: bool, folder: str) -> list[Source]:
    """Layer by layer; a model of fewer experts takes each layer's next block of so many neighbours, which are not chosen by load."""
    arrays, _ = read_npz(str(Path(folder) / V3_COUNTS), {"workloads": DEFAULT_LIMIT, "counts": DEFAULT_LIMIT})
    names, counts = [str(name) for name in arrays["workloads"]], arrays["counts"]
    past, loads = (counts[names.index(V3_WORKLOADS[i])] for i in (0, 2 if drift else 1))
    return _blocks(f"DeepSeek-V3 counts, {V3_WORKLOADS[0]} then {V3_WORKLOADS[2 if drift else 1]}", past, loads, n_experts)


def _blocks(name: str, past: Int64Array, loads: NDArray[Any], n_experts: int) -> list[Source]:
    whole = past.shape[1]
    if n_experts > whole:
        raise UsageError(f"bench layer: {name} has {whole} experts, {n_experts} are needed; choose another --routing")
    found = []
    for layer in range(len(past)):
        first = layer % (whole // n_experts) * n_experts
        part = slice(first, first + n_experts)
        where = f"{name}, layer {layer}" + (f", experts {first} to {first + n_experts - 1}" if n_experts < whole else "")
        found.append(Source(where, past[layer, part].astype(np.int64), loads[layer, part].astype(np.float64)))
    return found


def _v2_lite(n_experts: int, top_k: int, drift: bool, folder: str | None) -> list[Source]:
    if folder is None:
        if drift:
            raise UsageError(f"bench layer: a case that ends in {DRIFTED} needs a second task: --traces DIR with {' and '.join(V2_TASKS)}")
        other, trace = None, load_sample()
    else:
        other, trace = (load(str(Path(folder) / task), 64) for task in V2_TASKS)
    if drift and other is not None:
        past, future, name = other.data, trace.data, f"V2-Lite ids, {other.name} then {trace.name}"
    else:
        cut = int(HISTORY * len(trace.data))
        past, future, name = trace.data[:cut], trace.data[cut:], f"V2-Lite ids, {trace.name}"
    history, loads = (_counts(part, trace) for part in (past, future))
    if n_experts == trace.n_experts and top_k == trace.data.shape[2]:
        return [Source(f"{name}, layer {layer}", history[layer], loads[layer].astype(np.float64), future[:, layer].astype(np.int64))
                for layer in range(trace.n_layers)]
    return _blocks(f"{name}, their counts", history, loads, n_experts)


def _counts(ids: NDArray[Any], trace: Trace) -> Int64Array:
    return np.stack([np.bincount(ids[:, layer].ravel().astype(np.int64), minlength=trace.n_experts) for layer in range(trace.n_layers)])


def micro_batch(source: Source, number: int, ranks: int, tokens: int, top_k: int) -> Int64Array:
    """[ranks, tokens, top_k] ids: the next tokens of the trace, from its start again at its end; or drawn from the loads."""
    if source.ids is not None:
        first = number * ranks * tokens
        return source.ids[(first + np.arange(ranks * tokens)) % len(source.ids)].reshape(ranks, tokens, top_k)
    rng = np.random.default_rng([number, ranks, tokens, len(source.loads)])
    return np.stack([arranged(drawn(source.loads, tokens, top_k, rng), tokens, top_k, rng) for _ in range(ranks)])


def drawn(loads: Float64Array, tokens: int, top_k: int, rng: np.random.Generator) -> Int64Array:
    """[n_experts] counts of tokens * top_k selections, none above tokens, since a token selects an expert once."""
    counts, left = np.zeros(len(loads), dtype=np.int64), tokens * top_k
    while left:
        share = np.where(counts < tokens, loads, 0)
        share = share if share.any() else (counts < tokens).astype(np.float64)
        counts = np.minimum(counts + rng.multinomial(left, share / share.sum()), tokens)
        left = tokens * top_k - int(counts.sum())
    return counts


def arranged(counts: Int64Array, tokens: int, top_k: int, rng: np.random.Generator) -> Int64Array:
    """[tokens, top_k] ids with these counts; a token's are different ones."""
    return np.repeat(np.arange(len(counts)), counts).reshape(top_k, tokens).T[rng.permutation(tokens)]
