"""What `simulate` was asked for: the command line checked and made whole. Every refusal is one sentence that says what would be right."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...topology import _COLUMNS, NAMES
from ..common import Parser, check_results, whole
from ..files import DEFAULT_LIMIT, read_npy
from ..terminal import UsageError, shown
from . import cost
from .trace import TRACES, Cut, Trace, cut, load, load_sample

DEFAULT_RANKS = 8
DEFAULT_TOKENS_PER_RANK = 128
DEFAULT_HISTORY = 0.25
MAX_RANKS = 1024  # every rank's plan is made and kept in this one process
MAX_SLOTS = 8192  # LPLB_MAX_PHYSICAL
MIB = 1 << 20
PLACEMENTS = {"flow": "flow", "balanced": "balanced", "eplb": "deepseek"}  # and the policy of lplb.place


@dataclass(frozen=True)
class Layout:
    """The cluster and the kind of placement. r2o: [group_size, n_redundant], or None for a placement by a policy or from a file, whose
    slots are then given: [layers, n_physical]."""

    name: str
    ranks: int
    nodes: int
    n_logical: int
    n_physical: int
    r2o: NDArray[np.int32] | None
    slots: NDArray[np.int32] | None = None

    @property
    def group_size(self) -> int:
        return self.ranks if self.r2o is None else int(self.r2o.shape[0])


@dataclass(frozen=True)
class Options:
    trace: Trace
    layout: Layout
    cut: Cut
    layers: list[int]
    history: float | list[Trace]
    repair: int | None  # micro-batches between two repairs
    replace: int | None  # micro-batches between two placements by the policy
    max_moves: int | None  # of each repair or new placement of a layer
    seed: int
    cost: cost.Cost
    json: str | None
    plot: str | None
    beside_eplb: bool = True  # play EPLB's placement, too

    @property
    def every(self) -> int | None:
        """Micro-batches of a layer between two changes of its placement."""
        return self.repair or self.replace

    @property
    def eplb(self) -> Layout | None:
        """EPLB's placement in as many slots, to be played beside one by another policy or from a file that fills all of them."""
        layout = self.layout
        has_empty_slots = layout.slots is not None and bool((layout.slots < 0).any())
        if not self.beside_eplb or layout.r2o is not None or layout.name == "eplb" or has_empty_slots:
            return None
        return replace(layout, name="eplb", slots=None)

    def config(self) -> dict[str, Any]:
        """The "config" of the JSON file."""
        return {
            "trace": self.trace.name, "source": self.trace.source, "ranks": self.layout.ranks, "nodes": self.layout.nodes,
            "placement": self.layout.name, "group_size": self.layout.group_size,
            "n_logical": self.layout.n_logical, "n_physical": self.layout.n_physical,
            "tokens_per_rank": self.cut.tokens_per_rank, "history_length": self.cut.n_history,
            "history": self.history if isinstance(self.history, float) else ",".join(trace.name for trace in self.history),
            "unit": self.cost.unit, "speed": None if self.cost.speed is None else self.cost.speed.tolist(),
            "repair": self.repair, "replace": self.replace, "max_moves": self.max_moves,
            "micro_batches": self.cut.n_batches, "layers": self.layers, "seed": self.seed,
        }


def add_arguments(parser: Parser) -> None:
    positive = whole(1, 10**12)
    parser.add_argument("trace", nargs="?", metavar="TRACE",
                        help=".npz with topk_ids [tokens, layers, k], .npy counts [steps, layers, experts], .json with logical_count "
                             "[layers][experts], or .pt with either (SGLang's and vLLM's records); none: the sample in the package")
    parser.add_argument("--ranks", type=positive, help="GPUs of the expert-parallel group (default: those of the topology, else 8)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--topology", metavar="NAME", help="cube (default), ring, hypercube, square, torus:MxN, or FILE.npy with r2o")
    kind.add_argument("--placement", metavar="NAME", help=f"{', '.join(PLACEMENTS)} (see place), or FILE.npy [layers, slots], "
                                                             "instead of a topology")
    parser.add_argument("--slots", type=positive, help="physical experts in all (default: one column of r2o each, EPLB: two more a rank)")
    parser.add_argument("--nodes", type=positive, help="hosts (default: 8 ranks a host where that divides, else 1)")
    parser.add_argument("--tokens-per-rank", type=positive, default=DEFAULT_TOKENS_PER_RANK, metavar="N",
                        help=f"tokens of a micro-batch on each rank (default {DEFAULT_TOKENS_PER_RANK})")
    parser.add_argument("--history", default=str(DEFAULT_HISTORY), metavar="FRACTION",
                        help=f"first part of the trace, known when the experts are placed (default {DEFAULT_HISTORY}), or other traces, "
                             "A.npz or A.npz,B.npz, each one a snapshot: placed for one workload, another arrives")
    change = parser.add_mutually_exclusive_group()
    change.add_argument("--repair", type=positive, metavar="N",
                        help="with --placement: after every N micro-batches of a layer, change the placement a little, by their loads")
    change.add_argument("--replace", type=positive, metavar="N",
                        help="with --placement NAME: after every N micro-batches of a layer, place it anew by this policy and their loads")
    parser.add_argument("--max-moves", type=positive, metavar="M",
                        help="experts that may come new to a rank in a change of a layer (default: 1%% of the slots in a repair, any number "
                             "in a new placement)")
    parser.add_argument("--compare", action="store_true",
                        help="play topologies and placements with as many slots, and recommend one of them")
    cost.add_arguments(parser)
    parser.add_argument("--layers", metavar="LIST", help="e.g. 0,3,5-7 (default: all)")
    parser.add_argument("--experts", type=positive, metavar="N",
                        help="logical experts (default: n_experts of the file, else the largest id + 1)")
    parser.add_argument("--seed", type=whole(0, 2**63 - 1), default=0,
                        help="of the random policy and of micro-batches drawn from a snapshot (default 0)")
    parser.add_argument("--unpack-limit", type=whole(1, 2**20), default=DEFAULT_LIMIT // MIB, metavar="MIB",
                        help="refuse a file that unpacks to more than so many MiB, before it takes the memory "
                             f"(default {DEFAULT_LIMIT // MIB}; a .json may have a sixteenth of it)")
    parser.add_argument("--json", metavar="FILE", help="write configuration and rows; -: to stdout, and all words to stderr")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the loads before and after")


def check(arguments: argparse.Namespace, given: Trace | None = None) -> Options:
    """Raises UsageError for whatever cannot be simulated. given: the trace, where it is in no file."""
    read = {"the trace": arguments.trace, "the history": arguments.history, "the topology": arguments.topology,
            "the placement": arguments.placement, "the speeds": arguments.speed}
    check_results(arguments, {what: path for what, path in read.items() if path is not None and os.path.isfile(path)})
    limit = arguments.unpack_limit * MIB
    if given is not None:
        trace = given
    else:
        trace = load_sample(arguments.experts) if arguments.trace is None else load(arguments.trace, arguments.experts, limit)
    layout = _layout(arguments, trace.n_experts, trace.n_layers)
    history = _history(arguments.history, trace.n_experts, limit)
    _check_changes(arguments)
    return Options(
        trace=trace, layout=layout, layers=_layers(arguments.layers, trace.n_layers), history=history, seed=arguments.seed,
        repair=arguments.repair, replace=arguments.replace, max_moves=arguments.max_moves,
        cost=cost.check(arguments.unit, arguments.speed, layout.ranks, limit),
        cut=cut(trace, layout.ranks, arguments.tokens_per_rank, history, arguments.seed), json=arguments.json, plot=arguments.plot)


def _check_changes(arguments: argparse.Namespace) -> None:
    if arguments.repair is not None and arguments.placement is None:
        raise UsageError("--repair: needs --placement, since a topology says where copies stand")
    if arguments.replace is not None and arguments.placement not in PLACEMENTS:
        raise UsageError(f"--replace: needs --placement {', '.join(PLACEMENTS)}, which is the policy that places anew")
    if arguments.max_moves is not None and arguments.repair is None and arguments.replace is None:
        raise UsageError("--max-moves: needs --repair or --replace")
    if arguments.max_moves is not None and arguments.replace is not None and arguments.placement == "eplb":
        raise UsageError("--max-moves: cannot be kept by --placement eplb, which places anew; flow and balanced can")


def _history(text: str, n_experts: int, limit: int) -> float | list[Trace]:
    if text.lower().endswith(TRACES):
        return [load(path, n_experts, limit) for path in ([text] if os.path.isfile(text) else text.split(","))]
    try:
        fraction = float(text)
    except ValueError:
        fraction = -1
    if not 0 <= fraction < 1:
        raise UsageError(f"--history: must be a fraction of at least 0 and below 1, or another trace, got {shown(text)}")
    return fraction


def _layout(arguments: argparse.Namespace, n_logical: int, n_layers: int) -> Layout:
    given = None
    if arguments.placement is not None:
        name, r2o = arguments.placement, None
        ranks = arguments.ranks or DEFAULT_RANKS
        if name not in PLACEMENTS:
            given = _slots_of_file(name, n_logical, n_layers, ranks, arguments.unpack_limit * MIB)
    else:
        name = "cube" if arguments.topology is None else arguments.topology
        r2o = topology(name, arguments.unpack_limit * MIB)
        ranks = arguments.ranks or int(r2o.shape[0])
        if ranks % r2o.shape[0]:
            raise UsageError(f"--ranks: must be a multiple of the {r2o.shape[0]} ranks of topology {name}, got {ranks}")
    if ranks > MAX_RANKS:
        raise UsageError(f"--ranks: at most {MAX_RANKS}, got {ranks}")
    nodes = arguments.nodes or (ranks // 8 if ranks % 8 == 0 else 1)
    if ranks % nodes:
        raise UsageError(f"--nodes: must divide the {ranks} ranks, got {nodes}")
    if r2o is not None:
        slots = _topology_slots(arguments.slots, n_logical, ranks, int(r2o.shape[1]), name)
    elif given is not None:
        slots = given.shape[1]
        if arguments.slots not in (None, slots):
            raise UsageError(f"--slots: {name} has {slots} slots, got {arguments.slots}")
    else:
        slots = arguments.slots or -(-n_logical // ranks) * ranks + 2 * ranks
        if slots % ranks or slots < n_logical:
            raise UsageError(f"--slots: must be a multiple of the {ranks} ranks and hold the {n_logical} experts, got {slots}")
    if slots > MAX_SLOTS:
        raise UsageError(f"--slots: at most {MAX_SLOTS}, got {slots}")
    return Layout(name, ranks, nodes, n_logical, slots, r2o, given)


def _slots_of_file(path: str, n_logical: int, n_layers: int, ranks: int, limit: int) -> NDArray[np.int32]:
    if not path.endswith(".npy"):
        raise UsageError(f"--placement: must be {', '.join(PLACEMENTS)} or a .npy file, got {shown(path)}")
    slots = read_npy(path, limit)
    if slots.ndim != 2 or slots.dtype.kind not in "iu" or len(slots) != n_layers or slots.shape[1] % ranks or not slots.size:
        raise UsageError(f"--placement {path}: must hold integers [{n_layers} layers, slots], the slots a multiple of the {ranks} ranks, "
                         f"got {slots.dtype} {slots.shape}")
    if slots.min() < -1 or slots.max() >= n_logical:
        raise UsageError(f"--placement {path}: must hold experts of 0 .. {n_logical - 1}, or -1 for none")
    return slots.astype(np.int32)


def _topology_slots(asked: int | None, n_logical: int, ranks: int, columns: int, name: str) -> int:
    if n_logical % ranks:
        raise UsageError(f"--ranks: topology {name} needs a number of ranks that divides the {n_logical} experts, got {ranks}; "
                         "--placement eplb does not")
    slots = asked or n_logical + columns * ranks
    extra, remainder = divmod(slots - n_logical, ranks)
    if remainder or extra < columns or extra % columns:
        raise UsageError(f"--slots: topology {name} needs {n_logical} + m*{columns * ranks} slots, m at least 1, got {slots}")
    if extra > n_logical // ranks:
        raise UsageError(f"--slots: {extra} copies a rank are more than its {n_logical // ranks} experts")
    return slots


def topology(name: str, limit: int = DEFAULT_LIMIT) -> NDArray[np.int32]:
    """r2o [group_size, n_redundant] of a name, torus:MxN or FILE.npy. Raises UsageError."""
    if name in NAMES:
        return np.array(_COLUMNS[NAMES[name]], dtype=np.int32).T.copy()  # the public constants would import torch
    torus = re.fullmatch(r"torus:([0-9]+)x([0-9]+)", name)
    if torus:
        m, n = (int(side) if len(side) < 10 else MAX_RANKS + 1 for side in torus.groups())
        if m < 2 or n < 2 or m * n > MAX_RANKS:
            raise UsageError(f"--topology: a torus needs sides of at least 2 and at most {MAX_RANKS} ranks in all, got {shown(name[6:])}")
        i, j = np.divmod(np.arange(m * n), n)
        return np.stack([(i + 1) % m * n + j, i * n + (j + 1) % n], axis=1).astype(np.int32)
    if not name.endswith(".npy"):
        raise UsageError(f"--topology: must be {', '.join(NAMES)}, torus:MxN or a .npy file, got {shown(name)}")
    r2o = read_npy(name, limit)
    if r2o.ndim != 2 or 0 in r2o.shape or r2o.dtype.kind not in "iu":
        raise UsageError(f"--topology {name}: must hold integers of shape [group_size, n_redundant]")
    if len(r2o) > MAX_RANKS:
        raise UsageError(f"--topology {name}: at most {MAX_RANKS} ranks, got {len(r2o)}")
    if not (np.sort(r2o, axis=0) == np.arange(r2o.shape[0])[:, None]).all():
        raise UsageError(f"--topology {name}: every column must be a permutation of 0 .. {r2o.shape[0] - 1}")
    return r2o.astype(np.int32)


def _layers(text: str | None, n_layers: int) -> list[int]:
    if text is None:
        return list(range(n_layers))
    chosen: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:-([0-9]+))?\s*", part)
        if not match:
            raise UsageError(f"--layers: must be a list such as 0,3,5-7, got {shown(text)!r}")
        first, last = (int(number) if len(number) < 10 else n_layers for number in (match[1], match[2] or match[1]))
        if first > last or last >= n_layers:
            raise UsageError(f"--layers: the trace has the layers 0 .. {n_layers - 1}, got {shown(part.strip())}")
        chosen.extend(range(first, last + 1))
    return sorted(set(chosen))
