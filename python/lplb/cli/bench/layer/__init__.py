"""
What plans give to a whole MoE layer; one process a GPU, or with gloo on the CPU:

    torchrun --nproc-per-node=2 -m lplb bench layer [--json FILE] [--plot FILE.png] [--quick] [--compare] [--traces DIR]
    python -m lplb bench layer --emulate 8,16,32,64

    routing.py    which experts the tokens select, and the history before
    policies.py   where each policy sends them
    measure.py    micro-batches with the policies in turn, steps, transfers, plans; breakdown.py: kernels; plain.py: without lplb
    cases.py      one model at several numbers of tokens; emulated.py: many ranks on one device
    report.py     tables, goals, sentences; plot.py the picture; timing.py the clock
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...common import STDOUT, whole, write_json
from ...terminal import UsageError, say
from .. import kit
from .routing import DRIFTED, MODELS, ROUTINGS

if TYPE_CHECKING:
    from .cases import Asked
    from .timing import Clock, Progress

DEFAULT_CASES = ("v3-32", "qwen3-32", "v2-lite")
MOST_TOKENS, MOST_BATCHES, MOST_RANKS = 65536, 256, 512
EMULATED_TOKENS = {True: (2048,), False: (1024, 4096)}  # quick?
OPTIONS = ("case", "tokens", "batches", "rounds", "policies", "slots", "routing", "traces", "emulate", "compare", "quick", "limit", "step",
           "bandwidth")


def add_arguments(parser: Any) -> None:
    group = parser.add_argument_group("bench layer", "under torchrun, or with --emulate")
    known = ", ".join([*MODELS, *(f"{name}{DRIFTED}" for name in DEFAULT_CASES)])
    group.add_argument("--case", metavar="NAMES", help=f"of {known}; default {','.join(DEFAULT_CASES)}, on the CPU tiny; in one that ends "
                                                       f"in {DRIFTED} the history is another task's")
    group.add_argument("--tokens", metavar="NUMBERS", help="tokens a rank (default by case)")
    group.add_argument("--batches", type=whole(1, MOST_BATCHES), help="micro-batches (default 16; emulated 2)")
    group.add_argument("--rounds", type=whole(1, 100), help="times that each micro-batch is measured, where --limit allows (default 3)")
    group.add_argument("--policies", metavar="NAMES", help="default all: none, packed, forced, fair, even, random, fixed, proportional, "
                                                           "lplb, empty")
    group.add_argument("--slots", metavar="NUMBERS", help="copies a rank; lplb is measured with each, others with the most (default 1,2)")
    group.add_argument("--routing", choices=ROUTINGS, help="real: traces (default); else loads are drawn")
    group.add_argument("--traces", metavar="DIR", help="deepseek_v3_counts.npz and deepseek_v2_lite_*.npz, instead of the package's sample")
    group.add_argument("--emulate", metavar="RANKS", help="e.g. 8,16,32,64: ranks one after another on one device")
    group.add_argument("--compare", action="store_true", default=None, help="also the layer without replicas beside plain torch")
    group.add_argument("--quick", action="store_true", default=None, help="fewer sizes and rounds")
    group.add_argument("--limit", type=whole(1, 600), help="seconds for the micro-batches of one case (default 30)")
    group.add_argument("--step", type=whole(1, 64), help="micro-batches of an optimizer step (default 4)")
    group.add_argument("--bandwidth", type=whole(1, 10000), help="GB/s a rank, for the modelled dispatch of --emulate (default 350)")


def main(arguments: argparse.Namespace) -> int:
    """Prints tables on rank 0 and writes the JSON after every case. 0, whatever was met or missed."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available() if arguments.device is None else arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here")
    asked = _asked(arguments, cuda)
    alone = "RANK" not in os.environ
    if not asked.emulate and alone:
        raise UsageError("bench layer: needs one process a rank: torchrun --nproc-per-node=2 -m lplb bench layer; or --emulate 8,16,32,64")
    if asked.emulate and not alone and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("bench layer: --emulate takes one process, without torchrun")
    from .timing import Clock, Progress
    local = 0 if alone else int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local >= torch.cuda.device_count():
        raise UsageError(f"bench layer: needs a GPU for each rank, and there are {torch.cuda.device_count()}")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    if asked.emulate:
        return _play(asked, Clock(device, False), _emulate)
    from datetime import timedelta
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=120), device_id=device if cuda else None)
    try:
        code = _play(asked, Clock(device, True), _cases)
        dist.barrier()
        return code
    finally:
        dist.destroy_process_group()


def _play(asked: Asked, clock: Clock, measure: Callable[[Asked, Clock, Progress, dict[str, Any], Callable[[], None]], None]) -> int:
    from . import plot, report
    from .timing import Progress
    progress = Progress(clock.rank, asked.limit)
    info = kit.machine("cuda" if clock.cuda else "cpu")
    line = f"{clock.ranks} x {kit.machine_line(info)}"
    result: dict[str, Any] = {
        "machine": info, "machine_line": line, "date": kit.today(), "device": "cuda" if clock.cuda else "cpu", "ranks": clock.ranks,
        "settings": {name: getattr(asked, name) for name in asked.__dataclass_fields__}, "cases": [], "transfers": {}, "compared": [],
        "emulated": []}
    progress.say(f"{line}, {result['date']}\n{info['library']}")

    def save(last: bool = False) -> None:
        result["goals"], result["break_even"] = report.goals(result), report.break_even(result, asked.step)
        if clock.rank == 0 and asked.json is not None and (last or asked.json != STDOUT):
            write_json(asked.json, result, tell=last)
    measure(asked, clock, progress, result, save)
    save(last=True)
    if clock.rank == 0:
        _say_all(result)
        if asked.plot is not None:
            plot.draw(result, asked.plot)
    return 0


def _say_all(result: dict[str, Any]) -> None:
    from . import report
    parts: tuple[tuple[Any, Callable[[Any], str]], ...] = (
        (result["cases"], report.pieces_table), (result["cases"], report.summary_table), (result["transfers"], report.transfers_table),
        (result["compared"], report.compare_table), (result["emulated"], report.emulated_table), (result["goals"], report.goals_text),
        (result["break_even"], "\n".join), (report.emulated_sentences(result["emulated"]), "\n".join))
    for content, written in parts:
        if content:
            say(f"\n{written(content)}", now=True)


def _cases(asked: Asked, clock: Clock, progress: Progress, result: dict[str, Any], save: Callable[[], None]) -> None:
    from . import report
    from .cases import Case
    for name in asked.cases:
        model = MODELS[name.removesuffix(DRIFTED)]
        with progress.phase(f"{name}: layers", 60):
            case = Case(name, asked, clock, progress)
        try:
            result["transfers"][name] = case.transfers()
            save()
            for tokens in asked.tokens or (model.quick if asked.quick else model.tokens):
                result["cases"].append(case.measured(tokens))
                progress.say(f"\n{report.case_table(result['cases'][-1])}\n")
                save()
                if asked.compare:
                    result["compared"].append(case.compared(tokens))
                    save()
        finally:
            case.close()
            del case  # and its layers
        _forget(clock)
    for name in asked.cases:  # with the profiler, which may go on to slow launches down
        with progress.phase(f"{name}: layers again", 60):
            case = Case(name, asked, clock, progress)
        try:
            for one in result["cases"]:
                if one["case"] == name:
                    one["pieces_ms"] = case.pieces(one["tokens"])
                    save()
        finally:
            case.close()
            del case
        _forget(clock)


def _emulate(asked: Asked, clock: Clock, progress: Progress, result: dict[str, Any], save: Callable[[], None]) -> None:
    from .cases import model_of
    from .emulated import emulate
    from .routing import sources
    for name in asked.cases:
        model, drift = model_of(name)
        layers = sources(model.whole, model.top_k, asked.routing, drift, asked.traces)
        for tokens in asked.tokens or EMULATED_TOKENS[asked.quick]:
            for ranks in asked.emulate:
                if model.whole % ranks or model.whole // ranks < 1:
                    raise UsageError(f"--emulate: must divide the {model.whole} experts of {name}, got {ranks}")
                with progress.phase(f"{name}: {ranks} ranks of {tokens:,} tokens, one after another", asked.limit):
                    found = emulate(model, layers, ranks, tokens, asked.slots, asked.batches, clock, asked.limit, asked.bandwidth)
                result["emulated"].append({"case": name, "n_experts": model.whole, "routing": layers[0].name} | found)
                save()
                _forget(clock)


def _forget(clock: Clock) -> None:
    """Gives memory of layers that are gone back, so that the next ones find it whole."""
    import gc

    import torch
    gc.collect()
    if clock.cuda:
        torch.cuda.empty_cache()


def _asked(arguments: argparse.Namespace, cuda: bool) -> Asked:
    from .cases import Asked
    from .policies import POLICIES
    quick = bool(arguments.quick)
    emulate = _numbers("--emulate", arguments.emulate, 2, MOST_RANKS) or ()
    counts = os.path.exists(os.path.join(arguments.traces, "deepseek_v3_counts.npz")) if arguments.traces else False
    default = ("tiny",) if not cuda else DEFAULT_CASES if not emulate else ("v3-32",) if counts else ("v2-lite",)
    known = [*MODELS, *(f"{name}{DRIFTED}" for name in MODELS)]
    return Asked(
        cases=_names("--case", arguments.case, known) or default, tokens=_numbers("--tokens", arguments.tokens, 1, MOST_TOKENS),
        batches=arguments.batches or (2 if emulate else 4 if quick and not cuda else 16), rounds=arguments.rounds or (1 if quick else 3),
        policies=_names("--policies", arguments.policies, list(POLICIES)) or POLICIES,
        slots=_numbers("--slots", arguments.slots, 1, 8) or (1, 2), routing=arguments.routing or "real", traces=arguments.traces,
        emulate=emulate, compare=bool(arguments.compare), quick=quick, limit=float(arguments.limit or 30), step=arguments.step or 4,
        bandwidth=float(arguments.bandwidth or 350), json=arguments.json, plot=arguments.plot)


def _names(option: str, given: str | None, known: list[str]) -> tuple[str, ...] | None:
    if given is None:
        return None
    names = tuple(dict.fromkeys(name.strip() for name in given.split(",")))
    for name in names:
        if name not in known:
            raise UsageError(f"{option}: must be of {', '.join(known)}, got {name!r}")
    return names


def _numbers(option: str, given: str | None, least: int, most: int) -> tuple[int, ...] | None:
    if given is None:
        return None
    try:
        return tuple(dict.fromkeys(whole(least, most)(one.strip()) for one in given.split(",")))
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{option}: each {error}") from None
