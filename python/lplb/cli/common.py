"""What the commands share: arguments, aligned tables, JSON files, pictures, a progress bar."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import math
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from .files import check_writable, write_file
from .terminal import UsageError as UsageError, say, say_json, shown

T = TypeVar("T")

STDOUT = "-"  # as the file of --json
PICTURES = (".png", ".svg", ".pdf")


class Parser(argparse.ArgumentParser):
    """argparse without the usage block in front of an error: one sentence says what is wrong."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:  # argparse's own does not tell when the help cannot be written
        say(message.removesuffix("\n"))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose source is aligned too: the first column to the left, the others to the right."""
    body = [list(header), *(list(row) for row in rows)]
    width = [max(len(row[i]) for row in body) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [cell.ljust(width[i]) if i == 0 else cell.rjust(width[i]) for i, cell in enumerate(row)]
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(width)) + "|"
    return "\n".join([line(body[0]), rule, *(line(row) for row in body[1:])])


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, with a tqdm bar on stderr where tqdm is installed and stderr is a terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        try:
            tqdm: Any = importlib.import_module("tqdm")
        except ImportError:
            pass
        else:
            yield from tqdm.tqdm(items, total=total, desc=what, leave=False, file=sys.stderr)
            return
    yield from items


def plain(value: Any) -> Any:
    """The value as JSON can hold it: numpy scalars become Python numbers, NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: str, value: Any, tell: bool = True) -> None:
    """To the file, or to stdout for "-". tell: says so, where this is not the first of several times."""
    text = json.dumps(plain(value), indent=1) + "\n"
    if path == STDOUT:
        say_json(text)
    else:
        write_file(path, text.encode("ascii"))
        wrote(path, tell)


def wrote(path: str, tell: bool = True) -> None:
    if tell:
        say(f"wrote {path}")


def wrapped(text: str) -> str:
    """Paragraphs, one a line, in lines that fit the terminal and that people like to read."""
    width = max(40, min(110, shutil.get_terminal_size((110, 24)).columns))
    return "\n".join(textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) for line in text.split("\n"))


def check_results(arguments: argparse.Namespace, others: Mapping[str, str] | None = None) -> None:
    """UsageError, before the long work, unless --json and --plot can be written. others: {what: path}, files they must not overwrite."""
    if arguments.json != STDOUT:
        check_writable(arguments.json, "--json", others)
    if arguments.plot is not None:
        results = {} if arguments.json in (None, STDOUT) else {"the file of --json": arguments.json}
        check_writable(arguments.plot, "--plot", {**(others or {}), **results})
        if os.path.splitext(arguments.plot)[1].lower() not in PICTURES:
            raise UsageError(f"--plot: the file must end in .png, .svg or .pdf, got {arguments.plot}")
        use_pyplot()  # says now that matplotlib is missing


def use_pyplot() -> Any:
    """matplotlib.pyplot on a backend that needs no display."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as pyplot
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'lplb[cli]'") from None
    except Exception as error:  # its configuration: files and the environment
        raise UsageError(f"--plot: matplotlib cannot be used: {shown(error, 300)}") from None
    return pyplot


def write_picture(figure: Any, path: str, tell: bool = True) -> None:
    """The figure as a file of the kind that the path's ending names."""
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # characters that the font lacks
        figure.savefig(image, dpi=150, format=os.path.splitext(path)[1][1:].lower())
    write_file(path, image.getvalue())
    wrote(path, tell)


def whole(low: int, high: int) -> Callable[[str], int]:
    """argparse type: a whole number of low .. high."""
    def convert(text: str) -> int:
        try:
            value = int(text) if len(text) <= 20 else low - 1
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {low} and at most {high}, got {shown(text)!r}")
        return value
    return convert
