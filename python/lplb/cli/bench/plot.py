"""
The picture of a bench: every case's p50 and p99 on a logarithmic axis, beside its target and what other programs need. That of bench layer
is in layer/plot.py.

    python -m lplb.cli.bench.plot BENCH.json FILE.png     draws what was measured on a machine without matplotlib
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from ..common import PICTURES, use_pyplot, write_picture
from ..files import check_writable, read_json
from ..terminal import UsageError, end, guarded, harmless, shown
from .kit import Row, number

MAX_ROWS = 500  # of one picture
OURS, OTHER, TARGET, INK = "#14866d", "#c9784a", "#30343a", "#30343a"


def _peer(row: Row) -> tuple[str, float] | None:
    """What stands beside the row, and its time."""
    published = row.extra.get("published_us")
    if published is not None:
        return ("SGLang's LP kernel on an H200" if row.suite == "solve" else "LPLB's kernels on an H200, published"), float(published)
    if row.peer_us is None or row.peer_us < row.p50_us / 2:  # a floor such as copying the ids is in the table only
        return None
    return "another program in the same run", row.peer_us


def draw(rows: Sequence[Row], device: str, machine: str, path: str) -> None:
    """Writes the figure to path. Raises UsageError without matplotlib or where path cannot be written."""
    plt = use_pyplot()
    style = {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
             "axes.edgecolor": "#b8bcc2", "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.labelcolor": INK}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(11.5, 1.6 + 0.29 * len(rows)), layout="constrained")
        _fill(axes, rows)
        where = "GPU" if device == "cuda" else "CPU"
        title = harmless(f"lplb bench on the {where}, time per call  |  {machine}")
        figure.suptitle(title, x=0.008, ha="left", fontsize=10, color="#6b7178", parse_math=False)
        try:
            write_picture(figure, path)
        finally:
            plt.close(figure)


def _figures(axes: Any, y: int, row: Row, peer: float | None) -> None:
    """Writes the times left and right of a row's marks, where they are printed over none of them: the smaller one left."""
    times = [(row.p50_us, OURS), *([] if peer is None else [(peer, OTHER)])]
    target = [] if row.target_p50_us is None else [row.target_p50_us]
    for index, (time, colour) in enumerate(sorted(times)):
        if index == 0:
            at, shift, side = min(mark for mark in (time, *target) if mark > time / 1.8), -7, "right"
        else:
            at, shift, side = time, 7, "left"
            for mark in sorted((row.p99_us, *target)):
                if at < mark and (mark < 1.8 * at or row.p50_us <= at <= row.p99_us):
                    at = mark
        axes.annotate(number(time), (at, y), xytext=(shift, 0), textcoords="offset points", ha=side, va="center", fontsize=8, color=colour)


def _fill(axes: Any, rows: Sequence[Row]) -> None:
    names: dict[str, str] = {}
    for y, row in enumerate(rows):
        axes.plot([row.p50_us, row.p99_us], [y, y], color=OURS, linewidth=5, alpha=0.35, solid_capstyle="round", zorder=2)
        axes.plot([row.p50_us], [y], "o", color=OURS, markersize=6.5, zorder=4, label="lplb: p50, bar to p99" if y == 0 else None)
        if row.target_p50_us is not None:
            label = None if "target" in names else "target (p50)"
            names["target"] = ""
            axes.plot([row.target_p50_us], [y], marker="|", color=TARGET, markersize=13, markeredgewidth=1.8, zorder=3, label=label,
                      linestyle="none")
        peer = _peer(row)
        if peer is not None:
            label = None if peer[0] in names else peer[0]
            marker = names.setdefault(peer[0], "Ds^"[min(len(names.keys() - {"target"}), 2)])
            axes.plot([peer[1]], [y], marker, color=OTHER, markersize=5, zorder=3, label=label)
        _figures(axes, y, row, None if peer is None else peer[1])
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [harmless(f"{row.suite}: {row.case}") for row in rows], parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.4, -0.8)
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.6, high * 1.6)
    axes.grid(axis="x", color="#e6e8eb", zorder=0)
    axes.set_axisbelow(True)
    from matplotlib.ticker import FuncFormatter, NullFormatter
    axes.xaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us / 1000:g} ms" if us >= 1000 else f"{us:g} us"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    previous = ""
    for y, row in enumerate(rows):
        if previous and row.suite != previous:
            axes.axhline(y - 0.5, color="#b8bcc2", linewidth=0.8)
        previous = row.suite
    legend = axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=5, frameon=False, borderaxespad=0.3, fontsize=9, handletextpad=0.2)
    legend.set_in_layout(False)  # it may reach over the names, which must not narrow the axes
    axes.set_title(" ")          # its room


def _rows_of(path: str, result: Any) -> list[Row]:
    """The rows of a file that `bench --json` wrote. UsageError for any other."""
    given = result.get("rows") if isinstance(result, dict) else None
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_ROWS or not all(isinstance(row, dict) for row in given):
        raise UsageError(f"{path}: needs 1 .. {MAX_ROWS} rows, as bench --json writes them")
    for i, row in enumerate(given):
        times = {name: row.get(name) for name in ("p50_us", "p99_us", "target_p50_us", "target_p99_us", "peer_us", "published_us")}
        for name, time in times.items():
            if time is None and name not in ("p50_us", "p99_us"):
                continue
            if isinstance(time, bool) or not isinstance(time, (int, float)) or not 0 < time < math.inf:
                raise UsageError(f"{path}: rows[{i}].{name} must be a number above 0, got {shown(time)}")
    return [Row.from_json({**row, **{name: str(row.get(name) or "") for name in ("suite", "case", "machine")}}) for row in given]


def _main(words: Sequence[str]) -> int:
    if len(words) != 2:
        raise UsageError("two arguments are needed, BENCH.json and FILE.png")
    source, path = words
    check_writable(path, "the picture", {"the rows": source})
    if os.path.splitext(path)[1].lower() not in PICTURES:
        raise UsageError(f"{path}: a picture ends in .png, .svg or .pdf")
    result = read_json(source)
    if isinstance(result, dict) and "emulated" in result:
        from .layer import plot as layer
        layer.redraw(result, source, path)
        return 0
    rows = _rows_of(source, result)
    machine = shown(rows[0].extra.get("machine", ""), 200)
    draw(rows, str(result.get("device")), f"{machine}, {shown(result.get('date', ''))}", path)
    return 0


def main(words: Sequence[str]) -> int:
    return guarded(lambda: _main(words))


if __name__ == "__main__":
    end(main(sys.argv[1:]))
