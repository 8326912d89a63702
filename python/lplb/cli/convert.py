"""`lplb convert`: routing that others have published, or recorded in an engine, as a trace for simulate and place.

A folder: what ESFT publishes (github.com/deepseek-ai/ESFT, results/expert_scores/TASK), expert_weights_1.txt and so on, one file a layer. Each
line is a sequence: the experts of its tokens, separated by tabs, then two tabs and the router's weights.
A file: any trace that simulate reads, such as a .pt that SGLang or vLLM recorded. Ids are written as they are, counts too.
"""

from __future__ import annotations

import argparse
import io
import os
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .common import Parser, whole, wrote
from .files import DEFAULT_LIMIT, check_writable, write_file
from .simulate.trace import MAX_EXPERTS, MAX_LAYERS, Trace, load, of_ids
from .terminal import UsageError, say

MIB = 1 << 20


def add_arguments(parser: Parser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a folder with ESFT's expert_weights_1.txt, expert_weights_2.txt ..., or a trace")
    parser.add_argument("out", metavar="OUT", help=".npz for ids (ESFT's), .npy for counts")
    parser.add_argument("--top-k", type=whole(1, 64), default=6, metavar="K", help="experts of a token in ESFT's files (default 6)")
    parser.add_argument("--experts", type=whole(1, MAX_EXPERTS), metavar="N", help="logical experts (default: the largest id + 1)")
    parser.add_argument("--layers", metavar="N", type=whole(1, MAX_LAYERS), help="ESFT: only the first N layers")


def main(arguments: argparse.Namespace) -> int:
    source, out = arguments.source, arguments.out
    check_writable(out, "OUT", {"the source": source})
    if os.path.isdir(source):
        trace = of_ids(source, esft(source, arguments.top_k, arguments.layers), arguments.experts)
    else:
        trace = load(source, arguments.experts)
    ending = ".npz" if trace.kind == "ids" else ".npy"
    if not out.endswith(ending):
        raise UsageError(f"{out}: this source has {'ids' if ending == '.npz' else 'counts'}, whose file must end in {ending}")
    write_file(out, _packed(trace))
    say(trace.describe())
    wrote(out)
    return 0


def _packed(trace: Trace) -> bytes:
    content = io.BytesIO()
    if trace.kind == "ids":
        smallest: Any = np.uint8 if trace.n_experts <= 256 and trace.data.min() >= 0 else np.int16
        np.savez_compressed(content, topk_ids=trace.data.astype(smallest), n_experts=trace.n_experts)
    else:
        np.save(content, trace.data if trace.kind == "steps" else trace.data[None])
    return content.getvalue()


def esft(folder: str, k: int, n_layers: int | None = None) -> NDArray[np.int16]:
    """ids [tokens, layers, k] of a folder of ESFT's."""
    numbers = sorted(int(match[1]) for name in os.listdir(folder) if (match := re.fullmatch(r"expert_weights_([1-9][0-9]{0,3})\.txt", name)))
    if not numbers or numbers != list(range(1, len(numbers) + 1)):
        raise UsageError(f"{folder}: needs ESFT's files expert_weights_1.txt, expert_weights_2.txt and so on, one a layer")
    layers = [_layer(os.path.join(folder, f"expert_weights_{number}.txt"), k) for number in numbers[:n_layers]]
    for number, layer in enumerate(layers, 1):
        if layer.shape != layers[0].shape:
            raise UsageError(f"{folder}: layer {number} has {len(layer)} tokens, layer 1 has {len(layers[0])}")
    return np.stack(layers, axis=1)


def _layer(path: str, k: int) -> NDArray[np.int16]:
    """ids [tokens, k]. The file is read line by line; what is kept of it is a fraction of its size."""
    sequences: list[NDArray[np.int16]] = []
    size = 0
    with open(path, encoding="ascii", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            words = line.split("\t\t")[0].split("\t")
            size += len(line)
            if size > DEFAULT_LIMIT:
                raise UsageError(f"{path}: is longer than {DEFAULT_LIMIT // MIB} MiB")
            try:
                ids = np.array([int(word) for word in words if len(word) < 6], dtype=np.int16)
            except (ValueError, OverflowError):
                ids = np.zeros(0, dtype=np.int16)
            if ids.size != len(words) or not ids.size or ids.size % k or ids.min() < 0 or ids.max() >= MAX_EXPERTS:
                raise UsageError(f"{path}, line {number}: must hold {k} experts for each token, separated by tabs (see --top-k)")
            sequences.append(ids.reshape(-1, k))
    if not sequences:
        raise UsageError(f"{path}: holds no sequence")
    return np.concatenate(sequences)
