"""What the three commands share: one-sentence errors, aligned tables, JSON files, a progress bar."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


class UsageError(Exception):
    """What the user gave cannot be used. The text is one sentence for stderr; the command ends with exit code 2."""


class Parser(argparse.ArgumentParser):
    """argparse without the usage block in front of an error: one sentence says what is wrong."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


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
    if sys.stderr.isatty():
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


def write_json(path: str, value: Any) -> None:
    try:
        Path(path).write_text(json.dumps(plain(value), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None


def check_writable(path: str | None, option: str) -> None:
    """Says before the long work, not after it, that a result could not be written."""
    if path is not None and not Path(path).resolve().parent.is_dir():
        raise UsageError(f"{option} {path}: the directory {Path(path).resolve().parent} does not exist")


def use_pyplot() -> Any:
    """matplotlib.pyplot on a backend that needs no display."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'lplb[cli]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot
    return pyplot


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value
