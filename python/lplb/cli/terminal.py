"""What every command keeps to towards its user: harmless text, and one sentence with an exit code for whatever goes wrong."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

from ..errors import LplbError

MAX_SHOWN = 60     # characters of a value in a sentence
MAX_LINE = 1_000   # characters of a sentence
INTERRUPTED, NO_READER = 130, 141  # 128 + SIGINT, 128 + SIGPIPE: what shells say of a program that these signals end


class UsageError(Exception):
    """What the user gave cannot be used. The text is one sentence for stderr; the command ends with exit code 2."""


class OutputError(Exception):
    """stdout cannot be written to."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write to stdout: {error.strerror or error}")
        self.nobody_reads = isinstance(error, BrokenPipeError)


def harmless(text: str) -> str:
    """text in one line that no terminal obeys: control characters, invisible ones and lone surrogates are written as escapes."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def shown(value: object, most: int = MAX_SHOWN) -> str:
    """A value as it stands in a sentence: harmless, and cut in the middle where it is long."""
    text = str(value)
    cut = text if len(text) <= most else f"{text[: most // 2]}...{text[-(most // 4):]} ({len(text):,} characters)"
    return harmless(cut)


_aside = False


def speak_aside(aside: bool) -> None:
    """aside: what say() prints goes to stderr from now on, since stdout is for the JSON of `--json -`."""
    global _aside
    _aside = aside


def say(text: str = "", now: bool = False) -> None:
    """Prints lines to stdout, each of them harmless. now: not when more has gathered, but at once."""
    if _aside:
        if sys.stderr is not None:
            try:
                print("\n".join(harmless(line) for line in text.split("\n")), file=sys.stderr, flush=now)
            except (OSError, ValueError):
                _give_up(sys.stderr)
        return
    try:
        print("\n".join(harmless(line) for line in text.split("\n")), flush=now)
    except OSError as error:
        raise OutputError(error) from None


def say_json(text: str) -> None:
    """Prints the result that `--json -` asks for."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise OutputError(error) from None


def say_path(path: str) -> None:
    """Prints a path for programs to read: the very bytes of its name, whatever the terminal can show."""
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(os.fsencode(path) + b"\n")
    except OSError as error:
        raise OutputError(error) from None


def complain(words: str) -> None:
    """One line on stderr. What cannot be said, since stderr is closed or full, is left unsaid."""
    if sys.stderr is None:
        return  # print would take stdout instead
    line = shown(words, MAX_LINE)
    try:
        print(line if line.startswith("lplb: ") else f"lplb: {line}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _give_up(sys.stderr)


def guarded(work: Callable[[], int]) -> int:
    """
    The exit code of work(), which is a whole command. What it raises ends in a sentence: 2 where the arguments cannot be used, 1 where
    something else is wrong, 130 after Ctrl-C, 141 without a word where nobody reads stdout any more (`| head`).
    """
    if sys.stdout is None:
        complain("stdout is closed")
        return 1
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return work()
        finally:
            _flush()
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except UsageError as error:
        complain(str(error))
        return 2
    except LplbError as error:
        complain(_joined(error))
        return 2 if isinstance(error, (ValueError, NotImplementedError)) else 1
    except (OutputError, BrokenPipeError) as error:
        _give_up(sys.stdout)
        if isinstance(error, BrokenPipeError) or error.nobody_reads:
            return NO_READER
        complain(str(error))
        return 1
    except MemoryError:
        complain("out of memory")
        return 1
    except OSError as error:
        complain(f"{error.filename}: {error.strerror}" if error.filename is not None else f"{type(error).__name__}: {_joined(error)}")
        return 1
    except Exception as error:
        if os.environ.get("LPLB_TRACEBACK"):
            raise
        complain(f"unexpected {type(error).__name__}: {_joined(error)} (LPLB_TRACEBACK=1 in the environment shows where it arose)")
        return 1


def end(code: int) -> NoReturn:
    """Ends the process with this exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left that a second Ctrl-C could spare
    if code == INTERRUPTED:  # everything is said and put away; what modules do at their ends could take long, or change the code
        os._exit(code)
    sys.exit(code)


def _joined(error: Exception) -> str:
    """The words of other programs may have several lines."""
    return " ".join(str(error).split())


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError as error:
        raise OutputError(error) from None


def _give_up(stream: TextIO) -> None:
    """Closes a stream that cannot be written to, so that Python does not try once more, and fail in words of its own, when it ends."""
    try:
        stream.close()
    except (OSError, ValueError):
        pass
