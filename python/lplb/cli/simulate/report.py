"""The table, the sentence and the JSON of a simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common import table, wrapped
from ..terminal import harmless, shown
from .play import EPLB_EVEN, EPLB_EXACT, EVEN, GREEDY, LPLB, NO_REPLICAS, OTHER_PLACEMENTS, PROPORTIONAL, TOKENS, Played, Series

Float64Array = NDArray[np.float64]


def imbalance(series: Series) -> Float64Array:
    """max/mean load of the ranks, one figure a play."""
    loads = np.stack(series.loads)
    return np.asarray(loads.max(axis=1) / np.array(series.mean), dtype=np.float64)


def idle(series: Series) -> float:
    """Share of the expert layers' time that the average rank waits for the busiest one, time being proportional to tokens."""
    loads = np.stack(series.loads)
    return float(1 - sum(series.mean) / loads.max(axis=1).sum())


def rows(played: Played) -> list[dict[str, Any]]:
    """The "rows" of the JSON file. Figures that a policy does not have are None."""
    result = []
    for series in played.series:
        ratio = imbalance(series)
        tokens = series.tokens
        placement = _placement_gap(series)
        result.append({
            "policy": series.policy,
            "imbalance_mean": float(ratio.mean()),
            "imbalance_p50": float(np.percentile(ratio, 50)),
            "imbalance_p99": float(np.percentile(ratio, 99)),
            "imbalance_max": float(ratio.max()),
            "gap_solver_max": float(np.max(series.gap)),
            "gap_solver_mean": float(np.mean(series.gap)),
            "gap_placement_mean": float(placement.mean()),
            "certified_fraction": float(np.mean(series.at_optimum)),
            "plan_us_p50": float(np.percentile(played.microseconds, 50)) if series.policy == LPLB else None,
            "idle_share": idle(series),
            "own_rank_share": series.on_rank / tokens if played.options.cut.has_sources else None,
            "own_node_share": series.on_node / tokens if played.options.cut.has_sources else None,
            "leaves_rank": 1 - series.on_rank / tokens,
            "leaves_node": 1 - series.on_node / tokens,
            "inbound_max": series.inbound,
            "moves": None if series.policy in OTHER_PLACEMENTS else played.moves,
            "plays": len(series.loads),
        })
    return result


def _placement_gap(series: Series) -> Float64Array:
    return np.asarray(np.array(series.bound) / np.array(series.mean) - 1, dtype=np.float64)


def as_json(played: Played) -> dict[str, Any]:
    changes = len(played.changes)
    counted = {"plays": len(played.played), "skipped_empty": played.skipped, "repairs": changes if played.options.repair else 0,
               "replacements": changes if played.options.replace else 0, "moves": played.moves}
    return {"config": played.options.config() | counted, "rows": rows(played),
            "changes": [[change.layer, change.batch, change.moves] for change in played.changes]}


def as_text(played: Played) -> str:
    return "\n".join([*_heading(played), "", as_table(played), "", *map(wrapped, _footnotes(played)), "", wrapped(sentence(played))])


def as_table(played: Played) -> str:
    """The Markdown table, one line a policy."""
    options = played.options
    leaves = ["leaves rank", "leaves node"][: 2 if options.layout.nodes > 1 else 1]
    header = ["policy", "max/mean: mean", "p50", "p99", "max", "solver gap (max)", "placement gap", "at optimum", *leaves]
    header += ["moves"] if options.every else []
    header.append("plan us")
    lines = []
    for row in rows(played):
        alone = row["policy"] == NO_REPLICAS
        cells = [row["policy"], *(f"{row['imbalance_' + what]:.3f}" for what in ("mean", "p50", "p99", "max"))]
        cells += ["-" if alone else percent(row["gap_solver_max"]), percent(row["gap_placement_mean"])]
        cells += ["-" if alone else percent(row["certified_fraction"], 0)]
        cells += [percent(row[name.replace(" ", "_")]) for name in leaves]
        if options.every:
            cells.append("-" if row["moves"] is None else str(row["moves"]))
        lines.append([*cells, "-" if row["plan_us_p50"] is None else f"{row['plan_us_p50']:.1f}"])
    return table(header, lines)


def percent(share: float, digits: int = 1) -> str:
    """A share for people; it says 0% or 100% only of exactly 0 or 1."""
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    text = f"{share:.{digits}%}"
    if float(text[:-1]) == 0:
        return f"<{10.0 ** -digits:.{digits}f}%"
    return f">{100 - 10.0 ** -digits:.{digits}f}%" if float(text[:-1]) == 100 else text


def _heading(played: Played) -> list[str]:
    options = played.options
    layout, cut = options.layout, options.cut
    extra = (layout.n_physical - layout.n_logical) / layout.ranks
    unit = {"ids": "tokens", "steps": "steps", "snapshot": ""}[options.trace.kind]
    batch = f"{len(options.layers)} layers x {cut.n_batches} micro-batches"
    if options.trace.kind != "steps":
        batch += f" of {layout.ranks} x {cut.tokens_per_rank} tokens"
    lines = [options.trace.describe()]
    if options.trace.source:
        lines.append(f"source: {shown(options.trace.source, 500)}")
    groups = "" if layout.group_size == layout.ranks else f", {layout.ranks // layout.group_size} groups of {layout.group_size} ranks"
    lines.append(f"{layout.ranks} ranks on {layout.nodes} node{'s' * (layout.nodes > 1)}, {harmless(layout.name)} placement{groups}, "
                 f"{layout.n_physical} slots ({extra:.3g} redundant a rank)")
    if not isinstance(options.history, float):
        history = f"all of {' and of '.join(harmless(trace.name) for trace in options.history)}"
    elif not unit:
        history = "the whole snapshot"
    else:
        history = f"the first {cut.n_history} {unit}" if cut.n_history else "none"
    lines.append(f"history: {history}; played: {batch}")
    if not options.cost.is_tokens:
        lines.append(f"cost of a rank: {options.cost.words}; loads, optimum and mean are in it")
    if options.every:
        what, times = ("repaired", "repairs") if options.repair else ("placed anew", "placements")
        lines.append(f"{what} after every {options.every} micro-batches of a layer: {played.moves} moves in {len(played.changes)} {times}")
    return lines


def _footnotes(played: Played) -> list[str]:
    trace, layout = played.options.trace, played.options.layout
    lines = ["max/mean: load of the busiest rank over the mean of the ranks, averaged over the micro-batches, its percentiles and its maximum. "
             "solver gap: busiest rank over the proven optimum of its placement, minus 1 (largest); placement gap: that optimum over the mean "
             "load, minus 1 (mean). at optimum: micro-batches whose busiest rank equals the proven optimum. "
             "plan us: time of one rank's plan, microseconds (median).",
             f"'{NO_REPLICAS}' has the same EPLB reordering by the same history, without copies." if played.of(NO_REPLICAS) else
             f"'{NO_REPLICAS}' is left out: {layout.n_logical} experts cannot be dealt out evenly to {layout.ranks} ranks.",
             f"'{PROPORTIONAL}' is lplb's split dispatched as LPLB does: every source rank sends the same share to each replica, rounded."]
    node = "; leaves node: on another host" if layout.nodes > 1 else ""
    lines.append(f"leaves rank: tokens whose replica is on another rank than they are{node}. lplb serves a rank's own tokens first, then "
                 "those of its host.")
    if played.of(TOKENS):
        lines.append(f"'{TOKENS}' has as few tokens on the busiest rank as can be, and is measured by the same cost as the others.")
    if played.of(GREEDY):
        lines.append(f"'{GREEDY}': each active expert, those with the fewest replicas first, goes to the rank that holds it and has the "
                     "fewest so far, a greedy of METRO's kind (arXiv 2512.09277).")
    if played.of(EPLB_EXACT):
        lines.append(f"'{EPLB_EVEN}' and '{EPLB_EXACT}': EPLB's placement by the same history in as many slots, which stays as it is.")
    if played.options.every:
        lines.append("moves: experts that the changes of the placement brought new to a rank.")
    if trace.kind == "steps":
        lines.append("The counts name no source ranks: every rank was given an equal share of each expert's tokens.")
    if trace.kind == "snapshot":
        lines.append("The snapshot has no order: its micro-batches were drawn from it at random, so real drift is not in them.")
    if played.skipped:
        lines.append(f"{played.skipped} empty micro-batches were left out.")
    return lines


def sentence(played: Played) -> str:
    """What it means for the step."""
    def busiest(policy: str) -> float:
        series = played.of(policy)
        return float(np.stack(series.loads).max(axis=1).sum()) if series else float("nan")

    waits = []
    for policy, words in ((NO_REPLICAS, "without replicas"), (EVEN, "with an even split"), (LPLB, "with lplb")):
        series = played.of(policy)
        if series:
            waits.append(f"{percent(idle(series))} {words}")
    exact = played.of(LPLB)
    assert exact is not None
    proven = sum(exact.at_optimum)
    versus = [f"{busiest(other) / busiest(LPLB):.2f} times as fast as {words}"
              for other, words in ((NO_REPLICAS, "without replicas"), (EVEN, "with the even split"), (TOKENS, "with the split by tokens"),
                                    (GREEDY, "with the greedy choice")) if played.of(other)]
    left = "all that is left is the placement's" if proven == len(exact.at_optimum) else "NOT all of what is left is the placement's"
    return (f"Of the time of the expert layers the average GPU waits for the busiest one {', '.join(waits)}: they run "
            f"{' and '.join(versus)} (time taken as proportional to {played.options.cost.words}, communication not counted).\n"
            f"{proven} of {len(exact.at_optimum)} plans are proven optimal; {left}.")
