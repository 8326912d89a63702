"""
`python -m lplb bench`: how fast the library is on this machine, beside targets and other programs.

    cases.py     the instances, the same for CPU and GPU
    drift.py     those of placements under real drift
    cpu.py       the suites on one core
    cuda.py      the suites on a GPU, in CUDA graphs and eager
    exchange.py  counts exchanged among GPUs; under torchrun
    layer/       a whole MoE layer with the ways to choose a replica in turn; under torchrun
    peers.py     other programs timed in the same run
    sglang.py    SGLang's LP kernel, for --peers
    compare.py   what became slower
    kit.py       timing, rows, tables
    plot.py      the picture
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from ..common import Parser, check_results, write_json
from ..files import read_json
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
    parser.add_argument("--counts", metavar="FILE",
                        help="solve, run: counts [workloads, layers, 256] for the rows under drift, .npz or .npy (default: the sample's)")
    parser.add_argument("--compare", metavar="OLD.json", nargs="?", const="",
                        help="say what became slower by more than 3%% since that run's --json; bench layer, without a file: also the layer "
                        "without replicas beside plain torch")
    parser.add_argument("--fail-slower", action="store_true", help="with --compare: exit status 1 if something became slower")
    parser.add_argument("--peers", action="store_true",
                        help="solve on cuda: time SGLang's LP kernel too (pip install sglang nvidia-mathdx; compiles minutes)")
    layer.add_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Prints the tables; 0, whatever targets were met or missed."""
    unknown = [suite for suite in arguments.suites if suite not in SUITES]
    if unknown:
        raise UsageError(f"bench: there is no suite {shown(unknown[0])!r}; the suites are {', '.join(SUITES)}")
    check_results(arguments, {"the rows of --compare": arguments.compare} if arguments.compare else {})
    for name in TOGETHER:
        if name in arguments.suites:
            if len(arguments.suites) > 1:
                raise UsageError(f"bench {name} runs alone, one process a GPU: torchrun --nproc-per-node=8 -m lplb bench {name}")
            _refuse_plain_options(name, arguments)
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
    return _run(arguments, _with_options(arguments, {name: suites[name] for name in chosen}))


def _refuse_plain_options(name: str, arguments: argparse.Namespace) -> None:
    for option in ("counts", "fail_slower", "peers"):
        if getattr(arguments, option):
            raise UsageError(f"--{option.replace('_', '-')}: is no option of bench {name}")
    if arguments.compare and name == "layer":
        raise UsageError(f"--compare: takes no file in bench layer, got {shown(arguments.compare)}")
    if arguments.compare is not None and name == "exchange":
        raise UsageError("--compare: is no option of bench exchange")


def _with_options(arguments: argparse.Namespace, suites: dict[str, Any]) -> dict[str, Any]:
    """The suites with what the options ask of them. What cannot be is said before the long work."""
    if arguments.compare == "":
        raise UsageError("--compare: needs the file that an earlier run wrote by --json (without one it is an option of bench layer)")
    if arguments.fail_slower and arguments.compare is None:
        raise UsageError("--fail-slower: needs --compare OLD.json")
    if arguments.peers and (arguments.device != "cuda" or "solve" not in suites):
        raise UsageError("--peers: is an option of suite solve with --device cuda")
    suites = dict(suites)
    if arguments.counts is not None:
        if not {"solve", "run"} & suites.keys():
            raise UsageError("--counts: is an option of the suites solve and run")
        from . import drift
        counts = drift.read(arguments.counts)
        suites |= {name: partial(suites[name], counts=counts) for name in ("solve", "run") if name in suites}
    if arguments.peers:
        from . import sglang
        beside = sglang.load()
        if isinstance(beside, str):
            complain(beside)
        else:
            suites["solve"] = partial(suites["solve"], beside=beside)
    return suites


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
    earlier = None
    if arguments.compare is not None:
        from . import compare
        earlier = compare.Earlier.read(arguments.compare, read_json(arguments.compare))
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
    slower = 0
    if earlier is not None:
        text, slower = compare.report(earlier, rows, kit.machine_line(info))
        say(f"\n{text}")
    return 1 if unproven or slower and arguments.fail_slower else 0


def suites_baseline() -> float:
    from . import cuda
    return cuda.empty_kernel_us()
