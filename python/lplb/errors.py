"""Exceptions. Every one is an LplbError; where Python has a matching class of its own, the exception is that as well."""

from __future__ import annotations


class LplbError(RuntimeError):
    """A call of the library failed. The text names the argument, the rule and the value, or the cause."""


class LibraryError(LplbError, ImportError):
    """The shared library is missing, cannot be loaded, or has another version than this package."""


class InvalidArgument(LplbError, ValueError):
    """An argument breaks a rule."""


class Unsupported(LplbError, NotImplementedError):
    """Valid, but beyond a limit of this library or of the planner's device."""


class WrongOrder(LplbError):
    """A call that needs another one before it, e.g. info() before the first plan, or any call after close()."""


class Busy(LplbError):
    """Another thread is inside a call on this planner."""


class OutOfMemory(LplbError, MemoryError):
    """The host or the device has no memory left for the planner."""


class NoCuda(LplbError):
    """Built without CUDA, or this machine has no usable GPU or driver."""


class CudaError(LplbError):
    """The CUDA runtime failed; the text holds its name for the error."""


class PeerTimeout(LplbError, TimeoutError):
    """A peer did not answer in time."""


class PeerLost(PeerTimeout, ConnectionError):
    """The connection to a peer broke: its process has ended, or it gave up waiting itself. Also a PeerTimeout, since on a GPU a peer that
    has ended is known only by its silence: `except PeerTimeout` catches every peer that did not come."""


class Disagreement(LplbError):
    """Ranks differ in what must be equal on all of them: settings, placement, or the order of their calls. The same on all ranks."""


class InternalError(LplbError):
    """A defect of the library: please report it with its text."""


# LPLB_ERROR_* of lplb.h, from 1 on
BY_STATUS: dict[int, type[LplbError]] = dict(enumerate((
    InvalidArgument, Unsupported, WrongOrder, Busy, OutOfMemory, NoCuda, CudaError, PeerTimeout, InternalError, Disagreement, PeerLost), 1))

MOST_SHOWN = 200  # characters of a value


def shown(value: object) -> str:
    """A value in an error's words: a single line that is not long, whatever the value; strings in quotation marks. Never raises."""
    try:
        text = " ".join((repr(value) if isinstance(value, (str, bytes)) else str(value)).split())
    except Exception:  # of the value's own methods, or an integer of too many digits
        digits = f" of {value.bit_length()} bits" if isinstance(value, int) else ""
        return f"a value of type {type(value).__name__}{digits}"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}... ({type(value).__name__})"


def broken_rule(argument: str, rule: str, value: object) -> InvalidArgument:
    """The one wording of argument errors, the same as the library's: 'argument: rule, got value'. A string is what to say of the value."""
    return InvalidArgument(f"{argument}: {rule}, got {value if isinstance(value, str) else shown(value)}")
