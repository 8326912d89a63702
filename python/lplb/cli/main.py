"""
The command line.

    lplb              environment report and self-check; also `python -m lplb`
    lplb simulate     what exact dispatch is worth on recorded routing
    lplb place        which expert goes where, from recorded loads
    lplb convert      routing that others have published, or recorded in an engine, as a trace
    lplb bench        how fast it is here

Exit codes: 0 fine, 1 something is off (said on stdout or stderr), 2 the arguments cannot be used (one sentence on stderr), 130 ended by
Ctrl-C, 141 nobody reads the output any more. LPLB_TRACEBACK=1 shows where an error arose that no sentence was written for.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from .terminal import UsageError, end, guarded, say, say_path, speak_aside

if TYPE_CHECKING:
    from .common import Parser


def parser() -> Parser:
    from .. import __version__
    from .common import Parser
    program = "lplb" if os.path.basename(sys.argv[0]) == "lplb" else "python -m lplb"
    top = Parser(prog=program, description="lplb: exact load balancing for Mixture-of-Experts training. "
                                                    "Without a command: an environment report and a self-check.")
    top.add_argument("--json", action="store_true", dest="as_json", help="print the report as JSON")
    top.add_argument("--version", action="version", version=f"lplb {__version__}")
    paths = top.add_mutually_exclusive_group()
    paths.add_argument("--include-dir", action="store_true", help="print the directory of lplb.h and end")
    paths.add_argument("--library", action="store_true", help="print the path of the shared library and end")
    paths.add_argument("--cmake-dir", action="store_true", help="print the directory of the CMake configuration and end")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    from .simulate import options
    options.add_arguments(commands.add_parser("simulate", help="what exact dispatch is worth on recorded routing",
                                              description="Plays recorded routing through several ways to choose a replica."))
    from . import place
    place.add_arguments(commands.add_parser("place", help="which expert goes where, from recorded loads",
                                            description="Places the experts of every layer by one of several policies."))
    from . import convert
    convert.add_arguments(commands.add_parser("convert", help="published or recorded routing as a trace",
                                              description="Writes routing that others have published or recorded as a trace."))
    from . import bench
    bench.add_arguments(commands.add_parser("bench", help="how fast it is here", description="Times the library on this machine."))
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return guarded(lambda: dispatch(arguments))
    finally:
        speak_aside(False)


def script() -> NoReturn:
    """The console script `lplb`."""
    end(main())


def dispatch(words: Sequence[str] | None) -> int:
    from .common import STDOUT
    arguments = parser().parse_args(words)
    speak_aside(getattr(arguments, "json", None) == STDOUT)
    if arguments.command == "simulate":
        return simulate(arguments)
    if arguments.command == "convert":
        from . import convert
        return convert.main(arguments)
    if arguments.command == "place":
        from . import place
        return place.main(arguments)
    if arguments.command == "bench":
        from . import bench
        return bench.main(arguments)
    from . import report
    for name, path in (("include_dir", report.include_dir), ("library", report.library), ("cmake_dir", report.cmake_dir)):
        if getattr(arguments, name):
            say_path(path())
            return 0
    return report.main(as_json=arguments.as_json)


def simulate(arguments: argparse.Namespace) -> int:
    from .common import write_json
    from .simulate import options, play, report as tables
    if arguments.compare:
        from .simulate import compare
        return compare.main(arguments)
    asked = options.check(arguments)
    played = play.play(asked)
    if not played.played:
        raise UsageError(f"{asked.trace.name}: none of the micro-batches selects an expert")
    say(tables.as_text(played))
    if asked.json is not None:
        write_json(asked.json, tables.as_json(played))
    if asked.plot is not None:
        from .simulate import plot
        plot.draw(played, asked.plot)
    return 0
