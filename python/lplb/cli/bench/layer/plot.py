"""The picture of `bench layer`: share of fair by tokens a rank, and the step by emulated ranks."""

from __future__ import annotations

from typing import Any

from ...common import use_pyplot, write_picture
from ...terminal import UsageError, harmless
from .report import step_ms

COLOURS = {"none": "#b8bcc2", "packed": "#c9784a", "even": "#d9a441", "lplb S1": "#7cc4b0", "lplb S2": "#14866d", "lplb": "#14866d",
           "forced": "#30343a", "fair": "#6b7178", "random": "#a08bc2", "fixed": "#7a9ec7", "proportional": "#c27a9e", "empty": "#dddddd"}


def draw(result: dict[str, Any], path: str) -> None:
    """Writes the figure. UsageError without matplotlib or where path cannot be written."""
    plt = use_pyplot()
    names = list(dict.fromkeys(case["case"] for case in result["cases"]))
    emulated = list(dict.fromkeys((case["case"], case["tokens"]) for case in result["emulated"]))
    n = len(names) + len(emulated)
    if not n:
        return
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, n, figsize=(max(4.4 * n, 7), 4.8), layout="constrained", squeeze=False)
        for axis, name in zip(axes[0], names):
            _shares(axis, [case for case in result["cases"] if case["case"] == name], name)
        for axis, (name, tokens) in zip(axes[0][len(names):], emulated):
            _emulated(axis, [case for case in result["emulated"] if (case["case"], case["tokens"]) == (name, tokens)],
                      f"{name}, {tokens:,} tokens a rank, emulated")
        figure.suptitle(harmless(f"lplb bench layer  |  {result['machine_line']}, {result['date']}"), x=0.008, ha="left", color="#6b7178",
                        parse_math=False)
        try:
            write_picture(figure, path)
        finally:
            plt.close(figure)


def redraw(result: Any, source: str, path: str) -> None:
    """The picture of what `bench layer --json` wrote. UsageError for any other content of the file source."""
    try:
        draw(result, path)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UsageError(f"{source}: is not what bench layer --json writes ({type(error).__name__} {error})") from None


def style(name: str) -> dict[str, Any]:
    """lplb stands out; placements by EPLB, and the others with one copy, are dashed."""
    plain = name.removesuffix(", EPLB's")
    ours = name.startswith("lplb")
    dashed = plain != name or (not ours and name.endswith("S1"))
    return {"marker": "o", "markersize": 4, "label": name, "linewidth": 2.2 if ours else 1.2, "linestyle": "--" if dashed else "-",
            "color": COLOURS.get(plain) or COLOURS.get(name.split(" ")[0], "#888888")}


def _shares(axis: Any, cases: list[dict[str, Any]], title: str) -> None:
    """Share of fair, or of forced where fair was not measured."""
    key, other = ("of_fair", "fair") if any("fair" in case["arms"] for case in cases) else ("of_forced", "forced")
    names = dict.fromkeys(name for case in cases for name in case["arms"])
    for index, name in enumerate(names):
        beside = 2 ** (0.015 * (index - len(names) / 2))  # so that the intervals do not lie on each other
        points = [(case["tokens"], case["arms"][name][key]) for case in sorted(cases, key=lambda case: case["tokens"])
                  if key in case["arms"].get(name, {})]
        if points:
            x, shares = [tokens * beside for tokens, _ in points], [share for _, share in points]
            middle = [100 * share["ratio"] for share in shares]
            around = [[value - 100 * share["low"] for value, share in zip(middle, shares)],
                      [100 * share["high"] - value for value, share in zip(middle, shares)]]
            axis.errorbar(x, middle, [[max(0.0, one) for one in side] for side in around], capsize=2, **style(name))
    axis.set_xscale("log", base=2)
    tokens = sorted({case["tokens"] for case in cases})
    axis.set_xticks(tokens, [f"{one:,}" for one in tokens])
    axis.axhline(100, color="#6b7178", linewidth=0.8)
    axis.set(xlabel="tokens a rank", ylabel=f"speed, % of {other}", title=title)
    axis.legend(frameon=False, fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4)


def _emulated(axis: Any, cases: list[dict[str, Any]], title: str) -> None:
    cases = sorted(cases, key=lambda case: case["ranks"])
    for name in cases[0]["arms"]:  # of more ranks a few may be missing: fewer experts a rank than copies
        points = [(case["ranks"], step_ms(case["arms"][name])) for case in cases if name in case["arms"]]
        axis.plot([ranks for ranks, _ in points], [ms for _, ms in points], **style(name))
    axis.set_xscale("log", base=2)
    axis.set_xticks([case["ranks"] for case in cases], [str(case["ranks"]) for case in cases])
    axis.set_ylim(bottom=0)
    axis.set(xlabel="ranks", ylabel="forward and backward, ms", title=title)
    axis.legend(frameon=False, fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4)
