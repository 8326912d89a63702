"""`python -m lplb place`: which expert goes where, from recorded loads; what is gained and what has to move."""

from __future__ import annotations

import argparse
import io
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _c
from ..placing import Placed, place
from .common import Parser, check_results, table, whole, wrapped, write_json, wrote
from .files import DEFAULT_LIMIT, check_writable, read_npy, write_file
from .simulate.trace import load, load_sample, total_counts
from .terminal import UsageError, say, shown

MIB = 1 << 20


def add_arguments(parser: Parser) -> None:
    positive = whole(1, 10**12)
    parser.add_argument("history", nargs="*", metavar="HISTORY",
                        help="traces as for simulate, each one a snapshot; none: the sample in the package")
    parser.add_argument("--ranks", type=positive, default=8, help="GPUs of the expert-parallel group (default 8)")
    parser.add_argument("--slots", type=positive, help="physical experts in all (default: two more a rank than there are experts)")
    parser.add_argument("--policy", choices=sorted(_c.PLACE_POLICIES), default="flow",
                        help="flow (default): for exact dispatch; balanced: for an even split; deepseek: EPLB; repair: few changes")
    parser.add_argument("--previous", metavar="FILE.npy", help="the placement in force, [layers, slots], as --out writes it")
    parser.add_argument("--max-moves", metavar="N|P%", help="the most experts that may come new to a rank, or a share of all slots")
    parser.add_argument("--dead", metavar="LIST", help="ranks that hold nothing, e.g. 3,7")
    parser.add_argument("--nodes", type=positive, default=1, help="hosts (default 1)")
    parser.add_argument("--groups", type=positive, default=1, help="groups of experts that stay on one host (default 1)")
    parser.add_argument("--even-homes", action="store_true", help="for training: every rank shall own equally many experts")
    parser.add_argument("--experts", type=positive, metavar="N", help="logical experts, where the file does not say")
    parser.add_argument("--out", metavar="FILE.npy", help="write the placement, int32 [layers, slots]")
    parser.add_argument("--json", metavar="FILE", help="write the report and the moves; -: to stdout")
    parser.set_defaults(plot=None)


def main(arguments: argparse.Namespace) -> int:
    files = {f"history {index}": path for index, path in enumerate(arguments.history) if os.path.isfile(path)}
    if arguments.previous:
        files["the previous placement"] = arguments.previous
    check_results(arguments, files)
    results = {} if arguments.json in (None, "-") else {"the file of --json": arguments.json}
    check_writable(arguments.out, "--out", {**{what: path for what, path in files.items() if what != "the previous placement"}, **results})
    if arguments.out and not arguments.out.endswith(".npy"):
        raise UsageError(f"--out: the file must end in .npy, got {shown(arguments.out)}")
    history = _history(arguments)
    layers, experts = history.shape[1:]
    dead = _dead(arguments.dead)
    slots = arguments.slots or experts + 2 * arguments.ranks
    previous = None if arguments.previous is None else read_npy(arguments.previous)
    moves = _moves(arguments.max_moves, layers * slots)
    given = dict(ep_size=arguments.ranks, slots=_per_rank(slots, arguments.ranks, previous, dead), nodes=arguments.nodes,
                 groups=arguments.groups, dead=dead)
    placed = place(history, policy=arguments.policy, previous=previous, max_moves=moves, even_homes=arguments.even_homes, **given)
    rows = [_row(arguments.policy, placed)]
    if previous is not None:
        kept = place(history, policy="repair", previous=previous, max_moves=0, **given)
        rows.insert(0, _row("previous", kept))
    eplb = None if arguments.policy == "deepseek" or dead or slots % arguments.ranks else _row(
        "eplb", place(history, policy="deepseek", previous=previous, **given))
    say(f"{layers} layers, {experts} experts in {slots} slots on {arguments.ranks - len(dead)} ranks; "
        f"{len(history)} snapshot{'s' * (len(history) > 1)}\n")
    _say_tables(rows if eplb is None else [*rows, eplb], arguments.nodes)
    _write(arguments, placed, rows, eplb)
    return 0


def _row(name: str, placed: Placed[Any]) -> dict[str, Any]:
    report = placed.report
    width = placed.phy2log.shape[1] // placed.ep_size
    owned = np.stack([np.bincount(homes // width, minlength=placed.ep_size) for homes in report.homes])
    live = placed.phy2log.reshape(len(owned), placed.ep_size, width).max(2) >= 0
    pulls, pushes, alive = report.pulls.sum(0), report.pushes.sum(0), live.any(0)
    return {"placement": name, "exact": placed.exact_balance.mean(), "exact_worst": placed.exact_balance.min(),
            "even": placed.even_balance.mean(), "even_worst": placed.even_balance.min(), "duplicates": int(placed.duplicates.sum()),
            "moves": int(placed.n_moves.sum()), "leaves_rank": report.leaves_rank.mean(), "leaves_node": report.leaves_node.mean(),
            "inbound_max": report.inbound.max(), "homes_least": int(owned[live].min()), "homes_most": int(owned[live].max()),
            "pulls_mean": pulls[alive].mean(), "pulls_max": int(pulls.max()), "pulls_layer": int(report.pulls.max()),
            "pushes_mean": pushes[alive].mean(), "pushes_max": int(pushes.max()), "pushes_layer": int(report.pushes.max())}


def _say_tables(rows: list[dict[str, Any]], nodes: int) -> None:
    leaves = ["leaves rank", "leaves node"][: 2 if nodes > 1 else 1]
    say(table(["placement", "exact split", "worst layer", "even split", "worst layer", "duplicates", "moves", *leaves, "most inbound"],
              [[row["placement"], *(f"{row[key]:.4f}" for key in ("exact", "exact_worst", "even", "even_worst")), str(row["duplicates"]),
                str(row["moves"]), *(f"{row[key.replace(' ', '_')]:.1%}" for key in leaves), f"{row['inbound_max']:.3f}"] for row in rows]))
    node = "; leaves node: on another host" if nodes > 1 else ""
    say("\n" + wrapped(
        "exact split, even split: mean load of the live ranks over that of the busiest one on this history, averaged over the layers.\n"
        f"leaves rank: tokens whose replica is on another rank than they are{node}; with the exact split, which serves a rank's own tokens "
        "first, then those of its host, and ranks that all bring the same tokens. most inbound: tokens that reach a rank from others, over "
        "the mean load, of the worst rank and layer.") + "\n")
    say(table(["training", "homes a rank", "pulls: mean", "max", "of one layer", "pushes: mean", "max", "of one layer"],
              [[row["placement"], f"{row['homes_least']}" if row["homes_least"] == row["homes_most"] else
                f"{row['homes_least']} to {row['homes_most']}", *(cell for key in ("pulls", "pushes") for cell in (
                    f"{row[key + '_mean']:.1f}", str(row[key + "_max"]), str(row[key + "_layer"])))] for row in rows]))
    say("\n" + wrapped(
        "homes: experts that a rank owns in training. pulls: copies of others' experts on it, whose weights arrive in a pull and whose "
        "gradients leave in a push; pushes: copies of its experts elsewhere, the other way round. Mean and maximum are those of a rank over "
        "all layers together, and the largest of one layer; times the bytes of an expert."))


def _write(arguments: argparse.Namespace, placed: Placed[Any], rows: list[dict[str, Any]], eplb: dict[str, Any] | None) -> None:
    if arguments.out is not None:
        content = io.BytesIO()
        np.save(content, placed.phy2log)
        write_file(arguments.out, content.getvalue())
        wrote(arguments.out)
    if arguments.json is not None:
        report = placed.report
        by_layer = {name: getattr(report, name).tolist() for name in ("exact_balance", "even_balance", "leaves_rank", "leaves_node", "homes",
                                                                      "pulls", "pushes", "inbound")}
        write_json(arguments.json, {"rows": rows, "eplb": eplb, **by_layer, "moves": [list(move) for move in placed.moves()]})


def _history(arguments: argparse.Namespace) -> NDArray[np.float64]:
    """[snapshots, layers, experts]"""
    traces = [load(path, arguments.experts, DEFAULT_LIMIT) for path in arguments.history] or [load_sample(arguments.experts)]
    first = traces[0]
    for trace in traces[1:]:
        if (trace.n_layers, trace.n_experts) != (first.n_layers, first.n_experts):
            raise UsageError(f"{trace.name}: has {trace.n_layers} layers of {trace.n_experts} experts, {first.name} {first.n_layers} of "
                             f"{first.n_experts}")
    return np.stack([total_counts(trace, len(trace.data)) for trace in traces]).astype(np.float64)


def _per_rank(slots: int, ranks: int, previous: NDArray[np.int32] | None, dead: list[int]) -> int | list[int]:
    """The slots as place() takes them. Beside a previous placement each rank keeps its number: a dead one's are not given to others."""
    if previous is None or not dead:
        return slots
    return [slots // ranks + (rank < slots % ranks) for rank in range(ranks)]


def _dead(text: str | None) -> list[int]:
    if text is None:
        return []
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 6 for part in parts):
        raise UsageError(f"--dead: must be a list of ranks such as 3,7, got {shown(text)!r}")
    return sorted({int(part) for part in parts})


def _moves(text: str | None, slots: int) -> int | None:
    if text is None:
        return None
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = -1
    if not 0 <= number < 1e9 or not text.endswith("%") and number != int(number):
        raise UsageError(f"--max-moves: must be a number of moves or a share such as 5%, got {shown(text)!r}")
    return int(number * slots / 100) if text.endswith("%") else int(number)
