"""`lplb simulate --compare`: every topology and placement that fits, with as many slots, on the same micro-batches; and which one to take."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

from ...topology import NAMES
from ..common import table, wrapped, write_json
from ..terminal import UsageError, say
from . import options, play
from .report import idle, percent, rows
from .trace import Trace, load, load_sample

SAME = 0.001  # of the layers' time: plans that wait for no longer than the best one and this are equally good


@dataclass(frozen=True)
class Tried:
    """One way to place copies. What the rows say of lplb's plans, and the waits with an even split and without copies, None where the
    experts cannot be dealt out evenly."""

    name: str
    option: str  # "--topology" or "--placement"
    row: dict[str, Any]
    even: float
    none: float | None

    def as_json(self) -> dict[str, Any]:
        return {**self.row, "policy": None, "option": self.option, "placement": self.name, "idle_even": self.even, "idle_none": self.none}


@dataclass(frozen=True)
class Compared:
    config: dict[str, Any]
    tried: list[Tried]
    left_out: list[str]
    best: Tried


def compare(arguments: argparse.Namespace, given: Trace | None = None) -> Compared:
    """UsageError for what cannot be compared."""
    for option in ("topology", "placement", "repair", "replace", "plot"):
        if getattr(arguments, option) is not None:
            raise UsageError(f"--{option}: not with --compare, which tries all topologies and placements as they are")
    limit = arguments.unpack_limit * options.MIB
    trace = given or (load_sample(arguments.experts) if arguments.trace is None else load(arguments.trace, arguments.experts, limit))
    ranks = arguments.ranks or options.DEFAULT_RANKS
    slots = arguments.slots or -(-trace.n_experts // ranks) * ranks + 2 * ranks
    tried, left_out, config = [], [], {}
    tori = [f"torus:{ranks // 8}x8"] if ranks % 8 == 0 and ranks >= 16 else []
    for option, name in [*(("placement", name) for name in options.PLACEMENTS), *(("topology", name) for name in (*NAMES, *tori))]:
        asked = argparse.Namespace(**{**vars(arguments), "ranks": ranks, "slots": slots, option: name})
        if option == "topology" and (reason := _misfit(name, trace.n_experts, ranks, slots)):
            left_out.append(f"{name} ({reason})")
            continue
        checked = replace(options.check(asked, trace), beside_eplb=False)
        played = play.play(checked)
        if not played.played:
            raise UsageError(f"{trace.name}: none of the micro-batches selects an expert")
        config = {**checked.config(), "placement": None}
        tried.append(_tried(name, f"--{option}", played))
    best = _best(tried)
    return Compared(config, tried, left_out, best)


def _misfit(name: str, n_experts: int, ranks: int, slots: int) -> str | None:
    """Why a topology does not fit these sizes."""
    size, columns = options.topology(name).shape
    extra = slots - n_experts
    if ranks % size:
        return f"for {size} ranks"
    if n_experts % ranks:
        return "needs experts that the ranks divide"
    if extra < columns * ranks or extra % (columns * ranks) or extra > n_experts:
        return f"needs {n_experts} + a multiple of {columns * ranks} slots"
    return None


def _tried(name: str, option: str, played: play.Played) -> Tried:
    waits = {series.policy: idle(series) for series in played.series}
    row = next(row for row in rows(played) if row["policy"] == play.LPLB)
    return Tried(name, option, row, waits[play.EVEN], waits.get(play.NO_REPLICAS))


def _best(tried: list[Tried]) -> Tried:
    """The least wait; of those that are as good, the one where fewest tokens leave their rank, then the first."""
    least = min(one.row["idle_share"] for one in tried)
    good = [one for one in tried if one.row["idle_share"] <= least + SAME]
    return min(good, key=lambda one: float(one.row["leaves_rank"]))


def as_text(compared: Compared) -> str:
    config, best = compared.config, compared.best
    header = ["placement", "wait: none", "even", "lplb", "max/mean: mean", "p99", "placement gap", "leaves rank"]
    lines = []
    for one in sorted(compared.tried, key=lambda one: float(one.row["idle_share"])):
        row = one.row
        cells = [f"{one.name}{' <-' if one is best else ''}", "-" if one.none is None else percent(one.none), percent(one.even),
                 percent(row["idle_share"]), f"{row['imbalance_mean']:.3f}", f"{row['imbalance_p99']:.3f}", percent(row["gap_placement_mean"])]
        lines.append([*cells, percent(row["leaves_rank"])])
    legend = ("wait: share of the expert layers' time that the average GPU waits for the busiest one, without copies, with an even split "
              "over copies, and with lplb. max/mean, p99: busiest rank over the mean with lplb, averaged over the micro-batches and at the "
              "99th percentile. placement gap: what only other copies could win. leaves rank: tokens whose replica is on another rank "
              "than they are, with lplb.")
    words = [f"{config['trace']}: {config['ranks']} ranks, {config['n_physical']} slots for {config['n_logical']} experts, history "
             f"{config['history']}, {len(config['layers'])} layers x {config['micro_batches']} micro-batches", "", table(header, lines), "",
             wrapped(legend)]
    if compared.left_out:
        words.append(wrapped(f"Left out: {', '.join(compared.left_out)}."))
    return "\n".join([*words, "", wrapped(_recommendation(compared))])


def _recommendation(compared: Compared) -> str:
    best, config = compared.best, compared.config
    if best.option == "--topology":
        code = f"Planner(\"{best.name}\", {config['n_physical']}, {config['n_logical']}, ...) and update_redundancy_mapping(history)"
    else:
        policy = options.PLACEMENTS[best.name]
        code = f"lplb.place(history, ep_size={config['ranks']}, slots={config['n_physical']}, policy=\"{policy}\") and Planner.from_placement"
    others = [one for one in compared.tried if one is not best and one.row["idle_share"] <= best.row["idle_share"] + SAME]
    equal = (f" As good within {SAME:.1%} of the time: {', '.join(one.name for one in others)}; with the recommended one fewest tokens leave "
             "their rank.") if others else ""
    return (f"Recommended: {best.option} {best.name}, with which the average GPU waits {percent(best.row['idle_share'])} of the time; in "
            f"Python {code}.{equal}")


def as_json(compared: Compared) -> dict[str, Any]:
    return {"config": compared.config, "rows": [one.as_json() for one in compared.tried], "left_out": compared.left_out,
            "recommended": compared.best.name}


def main(arguments: argparse.Namespace) -> int:
    from ..common import check_results
    check_results(arguments)
    compared = compare(arguments)
    say(as_text(compared))
    if arguments.json is not None:
        write_json(arguments.json, as_json(compared))
    return 0
