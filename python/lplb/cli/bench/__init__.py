"""
`python -m lplb bench`: how fast the library is on this machine, beside targets and other programs.

    cases.py     the instances, the same for CPU and GPU
    cpu.py       the suites on one core
    cuda.py      the suites on a GPU, in CUDA graphs and eager
    exchange.py  counts exchanged among GPUs; under torchrun
    layer/       a whole MoE layer with the ways to choose a replica in turn; under torchrun
    peers.py     other programs timed in the same run
    kit.py       timing, rows, tables
    plot.py      the picture
"""

from __future__ import annotations

import argparse
from typing import Any

from ..common import Parser, check_results, write_json
from ..terminal import UsageError, complain, say, shown
from . import layer

SUITES = ("solve", "run", "eplb", "mapping", "exchange", "layer")
TOGETHER = ("exchange", "layer")  # of several processes, each of which runs alone
CUDA_SUITES = ("solve", "run", "mapping")  # eplb is the host's work whatever the device


def add_arguments(parser: Parser) -> None:
    parser.add_argument("suites", nargs="*", metavar="SUITE",
                        help=f"{', '.join(SUITES)} (default: all but exchange and layer, which need torchrun)")
    parser.add_argument("--device", choices=["cpu", "cuda"],
                        help="where plans are made (default cpu; exchange and layer: a GPU if there is one)")
    parser.add_argument("--json", metavar="FILE", help="write machine, date and rows; -: to stdout, and all words to stderr")
    parser.add_argument("--plot", "--png", metavar="FILE.png", help="draw the times beside targets and other programs")
    layer.add_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Prints the tables; 0, whatever was met or missed."""
    unknown = [suite for suite in arguments.suites if suite not in SUITES]
    if unknown:
        raise UsageError(f"bench: there is no suite {shown(unknown[0])!r}; the suites are {', '.join(SUITES)}")
    check_results(arguments)
    for name in TOGETHER:
        if name in arguments.suites:
            if len(arguments.suites) > 1:
                raise UsageError(f"bench {name} runs alone, one process a GPU: torchrun --nproc-per-node=8 -m lplb bench {name}")
            return _together(name, arguments)
    needless = [name for name in layer.OPTIONS if getattr(arguments, name) is not None]
    if needless:
        raise UsageError(f"--{needless[0]}: is an option of bench layer")
    arguments.device = arguments.device or "cpu"
    suites = _suites(arguments.device)
    chosen = arguments.suites or list(suites)
    missing = [suite for suite in chosen if suite not in suites]
    if missing:
        raise UsageError(f"bench: suite {missing[0]} does not depend on the device; run it with --device cpu")
    return _run(arguments, {name: suites[name] for name in chosen})


def _suites(device: str) -> dict[str, Any]:
    if device == "cpu":
        from . import cpu
        return dict(cpu.SUITES)
    try:
        import torch
    except ImportError:
        raise UsageError("--device cuda: needs torch") from None
    except Exception as error:  # a damaged or mismatched installation
        raise UsageError(f"--device cuda: torch cannot be imported: {shown(error, 300)}") from None
    if not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here")
    from . import cuda
    return dict(cuda.SUITES)


def _together(name: str, arguments: argparse.Namespace) -> int:
    """Suites that print their own tables and write their own JSON."""
    try:
        if name == "layer":
            return layer.main(arguments)
        from . import exchange
        return int(exchange.main(arguments.json, arguments.plot))
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UsageError(f"bench {name}: needs torch") from None


def _run(arguments: argparse.Namespace, suites: dict[str, Any]) -> int:
    from . import kit
    info, date = kit.machine(arguments.device), kit.today()
    overhead = kit.refused_call_us()
    say(f"{kit.machine_line(info)}, {date}\n{info['library']}")
    if arguments.device == "cpu":
        say(f"a call through ctypes that does nothing: {overhead:.2f} us; taken off where C is timed\n")
    else:
        say(f"an empty kernel in the same graphs: {suites_baseline():.2f} us; it is in every figure\n")
    rows: list[kit.Row] = []
    for name, suite in suites.items():
        mine = list(suite(overhead))
        rows += mine
        say(f"{name}\n\n{kit.as_table(mine)}\n")
        for note in filter(None, (row.note for row in mine)):
            say(note)
        say(now=True)
    judged = [row for row in rows if row.met is not None]
    missed = [row for row in judged if not row.met]
    listed = "".join(f"; missed: {row.suite}, {row.case}" for row in missed)
    say(f"{len(judged) - len(missed)} of {len(judged)} targets met{listed}.")
    plans = [row for row in rows if row.certified_fraction is not None]
    unproven = sum(1 for row in plans if row.certified_fraction != 1)
    if unproven:
        complain(f"{unproven} rows hold plans that their witness does not prove")
    result = {"machine": info, "date": date, "device": arguments.device, "call_overhead_us": overhead,
              "rows": [row.as_json() | {"machine": kit.machine_line(info), "date": date} for row in rows]}
    if arguments.json is not None:
        write_json(arguments.json, result)
    if arguments.plot is not None:
        from . import plot
        plot.draw(rows, arguments.device, f"{kit.machine_line(info)}, {date}", arguments.plot)
    return 1 if unproven else 0


def suites_baseline() -> float:
    from . import cuda
    return cuda.empty_kernel_us()
