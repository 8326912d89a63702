"""`lplb.simulate`: the command of that name for notebooks and programs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ._ops.host import Array, to_host
from .errors import InvalidArgument, broken_rule


@dataclass(frozen=True)
class Simulation:
    """What `simulate` found. In a notebook it shows as its table; print() shows it as the command does."""

    config: dict[str, Any]
    rows: list[dict[str, Any]]  #: one for each policy, or for each placement that was compared; as in the JSON of the command
    text: str = field(repr=False)
    recommended: str | None = None  #: with compare=True: the name of the placement to take
    _played: Any = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.text

    def _repr_markdown_(self) -> str:
        return self.text

    def plot(self, path: str) -> None:
        """Draws the loads before and after into a .png, .svg or .pdf. Needs matplotlib."""
        from .cli.simulate import plot

        if self._played is None:
            raise broken_rule("plot", "must be asked of a single simulation", "one with compare=True")
        _in_python(plot.draw, self._played, path, tell=False)


def simulate(trace: str | None = None, *, topk_ids: Array | None = None, counts: Array | None = None, n_experts: int | None = None,
             compare: bool = False, **options: Any) -> Simulation:
    """Plays recorded routing through several ways to choose a replica, and says what exact dispatch is worth.

    trace: a file as for `lplb simulate`; or topk_ids: integers [tokens, layers, k], -1 for no expert; or counts: [steps, layers, experts];
    none: the sample in the package. n_experts: None takes the largest id + 1. compare: all topologies and placements with as many slots,
    and a recommendation.
    options: those of the command, with underscores: ranks=16, topology="hypercube", placement="flow", slots=96, tokens_per_rank=64,
    history=0.25, layers="0,3,5-7", seed=0 and so on; see `lplb simulate --help`. Errors are InvalidArgument.
    """
    from .cli.main import parser
    from .cli.simulate import compare as comparing, options as checking, play, report
    from .cli.simulate.trace import of_counts, of_ids

    if sum(given is not None for given in (trace, topk_ids, counts)) > 1:
        raise broken_rule("trace", "must be given alone, without topk_ids and counts, of which one suffices", "several")
    words = ["simulate", *([] if trace is None else [str(trace)])]
    for name, value in {"experts": n_experts, "compare": compare, **options}.items():
        if name in ("json", "plot") or not isinstance(value, (str, int, float, np.number, type(None))):
            raise broken_rule(name, "must be an option of `lplb simulate` with a plain value", type(value).__name__)
        option = "--" + name.replace("_", "-")
        words += [] if value is None or value is False else [option] if value is True else [f"{option}={value}"]

    def ask() -> Simulation:
        arguments, given = parser().parse_args(words), None
        if topk_ids is not None:
            given = of_ids("topk_ids", to_host("topk_ids", topk_ids), n_experts)
        elif counts is not None:
            given = of_counts("counts", to_host("counts", counts), n_experts)
        if compare:
            compared = comparing.compare(arguments, given)
            result = comparing.as_json(compared)
            return Simulation(result["config"], result["rows"], comparing.as_text(compared), compared.best.name)
        played = play.play(checking.check(arguments, given))
        if not played.played:
            raise InvalidArgument("trace: none of the micro-batches selects an expert")
        result = report.as_json(played)
        return Simulation(result["config"], result["rows"], report.as_text(played), _played=played)

    simulation: Simulation = _in_python(ask)
    return simulation


def _in_python(work: Any, *arguments: Any, **options: Any) -> Any:
    """work(), whose refusals are those of the command, in the words of Python: options become arguments."""
    from .cli.terminal import UsageError

    try:
        return work(*arguments, **options)
    except UsageError as error:
        words = re.sub(r" \(see .* --help\)$", "", str(error)).removeprefix("argument ")
        words = re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda option: option[1].replace("-", "_"), words)
        raise InvalidArgument(words) from None
