"""The picture of a bench: every case's p50 and p99 on a logarithmic axis, beside its target and what other programs need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._cli import UsageError, use_pyplot
from .kit import Row, number

OURS, OTHER, TARGET, INK = "#14866d", "#c9784a", "#30343a", "#30343a"

# Measured on an H200 (driver 580, CUDA 13.0, torch 2.11), in CUDA graphs: SGLang's kernel with LPLB's loop, its step bug mended.
PEERS_CUDA = {"cube 8x2": 113.7, "ring 8x1": 62.3, "hypercube 16x2": 335.9, "torus 8x4x2": 1543.0}
PEERS_CUDA_NAME = "SGLang's LP kernel, measured on an H200"


def _peer(row: Row, device: str) -> tuple[str, float] | None:
    if device == "cuda" and row.suite == "solve":
        return next(((PEERS_CUDA_NAME, us) for name, us in PEERS_CUDA.items() if row.case.startswith(name)), None)
    return (row.peer, row.peer_us) if row.peer_us is not None else None


def draw(rows: Sequence[Row], device: str, machine: str, path: str) -> None:
    """Writes the figure to path. Raises UsageError without matplotlib or where path cannot be written."""
    plt = use_pyplot()
    style = {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
             "axes.edgecolor": "#b8bcc2", "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.labelcolor": INK}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(11.5, 1.6 + 0.29 * len(rows)), layout="constrained")
        _fill(axes, rows, device)
        where = "GPU" if device == "cuda" else "CPU"
        figure.suptitle(f"lplb bench on the {where}, time per call  |  {machine}", x=0.008, ha="left", fontsize=10, color="#6b7178")
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}") from None
        finally:
            plt.close(figure)


def _fill(axes: Any, rows: Sequence[Row], device: str) -> None:
    names: dict[str, str] = {}
    for y, row in enumerate(rows):
        axes.plot([row.p50_us, row.p99_us], [y, y], color=OURS, linewidth=5, alpha=0.35, solid_capstyle="round", zorder=2)
        axes.plot([row.p50_us], [y], "o", color=OURS, markersize=6.5, zorder=4, label="lplb: p50, bar to p99" if y == 0 else None)
        text = number(row.p50_us)
        axes.annotate(text, (row.p50_us, y), xytext=(-7, 0), textcoords="offset points", ha="right", va="center", fontsize=8, color=OURS)
        if row.target_p50_us is not None:
            label = None if "target" in names else "target (p50)"
            names["target"] = ""
            axes.plot([row.target_p50_us], [y], marker="|", color=TARGET, markersize=13, markeredgewidth=1.8, zorder=3, label=label,
                      linestyle="none")
        peer = _peer(row, device)
        if peer is not None:
            kind = "peer" + ("" if device == "cpu" else peer[0])
            label = None if kind in names else (peer[0] if device == "cuda" else "another program in the same run")
            names[kind] = ""
            axes.plot([peer[1]], [y], "D", color=OTHER, markersize=5, zorder=3, label=label)
            beside = max(peer[1], row.p99_us) if peer[1] < 2 * row.p99_us else peer[1]
            axes.annotate(number(peer[1]), (beside, y), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8, color=OTHER)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [f"{row.suite}: {row.case}" for row in rows])
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
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, frameon=False, borderaxespad=0.2)
