"""The picture of a simulation: loads of one typical micro-batch before and after, and all micro-batches of every policy."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..common import use_pyplot, write_picture
from ..terminal import harmless
from .play import EPLB_EVEN, EPLB_EXACT, EVEN, GREEDY, LPLB, NO_REPLICAS, TOKENS, Played, Series
from .report import imbalance

COLOURS = {"no replicas": "#9aa0a6", "even split": "#e8a33d", "random replica": "#c9784a", "fixed replica": "#a8628c",
           GREEDY: "#7a8f3a", TOKENS: "#3f8f8a", "proportional": "#5f7fbf", "lplb": "#14866d", EPLB_EVEN: "#b0563f", EPLB_EXACT: "#3f7d95"}
INK = "#30343a"
MOST_LABELS = 24  # of ranks below the bars: more would touch each other


def draw(played: Played, path: str, tell: bool = True) -> None:
    """Writes the figure to path. Raises UsageError without matplotlib or where path cannot be written."""
    plt = use_pyplot()
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#b8bcc2", "axes.labelcolor": INK,
             "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlesize": 11, "axes.titleweight": "bold",
             "axes.titlelocation": "left"}
    with plt.rc_context(style):
        options = played.options
        rows, size = ([["typical", "all"]], (12.5, 4.9)) if not options.every else ([["typical", "all"], ["course", "course"]], (12.5, 7.6))
        figure, axes = plt.subplot_mosaic(rows, figsize=size, width_ratios=[1.15, 1], height_ratios=[1.6, 1][: len(rows)],
                                          layout="constrained")
        _typical(axes["typical"], played)
        _distribution(axes["all"], played)
        if options.every:
            _course(axes["course"], played)
        layout = options.layout
        title = (f"{options.trace.name}   |   {layout.ranks} ranks, {layout.name}, {layout.n_physical} slots for {layout.n_logical} "
                 "experts")
        figure.suptitle(harmless(title), x=0.008, ha="left", fontsize=10, color="#6b7178", parse_math=False)
        try:
            write_picture(figure, path, tell)
        finally:
            plt.close(figure)


def _before(played: Played) -> Series:
    series = played.of(NO_REPLICAS) or played.of(EVEN)
    assert series is not None
    return series


def _typical(axes: Any, played: Played) -> None:
    before, after = _before(played), played.of(LPLB)
    assert after is not None
    ratio = imbalance(before)
    index = int(np.argsort(ratio, kind="stable")[ratio.size // 2])
    layer, batch = played.played[index]
    order = np.argsort(-before.loads[index], kind="stable")
    ranks = np.arange(order.size)
    width = 0.42 if order.size <= 64 else 0.5
    for series, shift in ((before, -width / 2), (after, width / 2)):
        loads = series.loads[index][order]
        axes.bar(ranks + shift, loads, width, color=COLOURS[series.policy], label=f"{series.policy} (busiest {loads.max():,})", zorder=2)
        axes.axhline(loads.max(), color=COLOURS[series.policy], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    mean = before.mean[index]
    axes.axhline(mean, color=INK, linewidth=1, zorder=3, label=f"mean {mean:,.0f}")
    every = -(-order.size // MOST_LABELS)
    axes.set_xticks(ranks[::every], [str(rank) for rank in order[::every]])
    axes.set_xlabel(f"rank, busiest first {before.policy.replace('no replicas', 'without replicas')}")
    axes.set_ylabel(f"{played.options.cost.words} in this micro-batch")
    axes.set_ylim(0, max(before.loads[index].max(), after.loads[index].max()) * 1.28)
    handles, labels = axes.get_legend_handles_labels()
    bars_first = sorted(range(len(labels)), key=lambda i: labels[i].startswith("mean"))
    axes.legend([handles[i] for i in bars_first], [labels[i] for i in bars_first], frameon=False, loc="upper right")
    axes.set_title(f"A typical micro-batch (layer {layer}, micro-batch {batch})")


def _distribution(axes: Any, played: Played) -> None:
    rng = np.random.default_rng(0)
    shown = list(reversed(played.series))
    top = max(float(imbalance(series).max()) for series in shown)
    for y, series in enumerate(shown):
        ratio, colour = imbalance(series), COLOURS[series.policy]
        points = ratio if ratio.size <= 600 else rng.choice(ratio, 600, replace=False)
        axes.scatter(points, y + rng.uniform(-0.24, 0.24, points.size), s=9, color=colour, alpha=0.28, linewidths=0, zorder=2)
        low, mid, high = np.percentile(ratio, [25, 50, 75])
        axes.plot([low, high], [y, y], color=colour, linewidth=5, solid_capstyle="round", zorder=3)
        axes.plot([mid], [y], marker="o", markersize=7, color="white", markeredgecolor=colour, markeredgewidth=2, zorder=4)
        axes.text(1.02, y, f"{ratio.mean():.3f}", transform=axes.get_yaxis_transform(), va="center", color=colour, fontweight="bold")
    axes.text(1.02, len(shown) - 0.42, "mean", transform=axes.get_yaxis_transform(), va="center", color="#6b7178", fontsize=9)
    axes.axvline(1, color=INK, linewidth=1, zorder=1)
    axes.set_yticks(range(len(shown)), [series.policy for series in shown])
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(1 - (top - 1) * 0.03, top + (top - 1) * 0.03)
    axes.set_ylim(-0.6, len(shown) - 0.3)
    axes.grid(axis="x", color="#e6e8eb", zorder=0)
    axes.set_axisbelow(True)
    axes.set_xlabel("busiest rank / mean rank; 1 is perfect (bar: middle half, ring: median)")
    layers = len({layer for layer, _ in played.played})
    axes.set_title(f"All {len(played.played)} micro-batches of {layers} layer{'s' * (layers > 1)}")


def _course(axes: Any, played: Played) -> None:
    """Micro-batch by micro-batch: balance, and the moves of the changes before it."""
    batches = np.array([batch for _, batch in played.played])
    numbers = np.unique(batches)
    moves = {int(batch): 0 for batch in numbers}
    for change in played.changes:
        moves[change.batch] = moves.get(change.batch, 0) + change.moves
    bars = axes.twinx()
    bars.bar(list(moves), list(moves.values()), 0.55, color="#d5d9de", zorder=1)
    bars.set_ylabel("moves of all layers (bars)", color="#6b7178")
    bars.set_ylim(0, 2.2 * max(1, *moves.values()))
    bars.yaxis.get_major_locator().set_params(integer=True)
    axes.set_zorder(bars.get_zorder() + 1)
    axes.patch.set_visible(False)
    top = 1.0
    for policy in (NO_REPLICAS, EPLB_EXACT, EVEN, LPLB):
        series = played.of(policy)
        if series is not None:
            ratio = imbalance(series)
            means = [ratio[batches == batch].mean() for batch in numbers]
            axes.plot(numbers, means, color=COLOURS[policy], linewidth=2, label=policy)
            top = max(top, *means)
    axes.set_ylim(1, 1 + 1.35 * max(top - 1, 1e-3))  # room for the legend
    axes.set_xlabel("micro-batch")
    axes.set_ylabel("busiest rank / mean rank")
    axes.legend(frameon=False, loc="upper right", ncols=4)
    what = "repaired" if played.options.repair else "placed anew"
    axes.set_title(f"Mean over the layers, {what} after every {played.options.every} micro-batches: {played.moves} moves")
