"""
Reading files that anybody may have made, and writing results.

Nothing in a file is believed. The size that a header states is held against a limit before memory is taken, memory is taken only for bytes
that were really there, and a file that holds more or less than it states is refused. Every refusal is a UsageError of one sentence.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .terminal import UsageError, shown

DEFAULT_LIMIT = 1 << 30  # bytes that one file may unpack to
JSON_FACTOR = 16         # Python's objects take up to about this many times the bytes of their JSON text
PIECE = 1 << 20          # bytes read at a time; also the largest directory of an archive
MAX_HEADER = 10_000      # bytes of a .npy header, numpy's own limit
MAX_DIMENSIONS = 32

# What zipfile, zlib, json and numpy raise when a file is not what it should be (RuntimeError: encrypted, nested too deep, not implemented)
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, OverflowError, LookupError, TypeError)
OTHER_PACKING = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ"}

HEADER_ITEM = re.compile(
    r"""\s*(['"])(?:descr\1\s*:\s*(['"])(?P<descr>[^'"]*)\2|fortran_order\1\s*:\s*(?P<order>True|False)"""
    r"""|shape\1\s*:\s*\((?P<shape>\s*(?:\d{1,19}L?\s*,\s*)*(?:\d{1,19}L?\s*)?)\))\s*(?:,|(?=\}))""", re.ASCII)
PLAIN = re.compile(r"[<>|=]?(?:\?|[biufcSU][1-9]\d{0,8})", re.ASCII)


class _Careful(FileIO):
    """A file that is never read in large pieces, whatever an archive says of its own size."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = PIECE
        elif size > PIECE:
            raise ValueError(f"its directory of {size:,} bytes is too large")
        return super().read(size) or b""


def _open(path: str) -> _Careful:
    """An ordinary file: a directory, a pipe without a writer or an endless device must not be waited for."""
    file = _Careful(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        kind = "pipe" if stat.S_ISFIFO(mode) else "device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "socket"
        raise UsageError(f"{path}: is a {kind}; an ordinary file is needed")
    return file


@contextmanager
def _reading(path: str, kind: str) -> Iterator[_Careful]:
    """The opened file; what is wrong with it in one sentence. kind: e.g. '.npy'."""
    try:
        with _open(path) as file:
            yield file
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise UsageError(f"{path}: is too large for the memory of this machine") from None
    except RecursionError:
        raise UsageError(f"{path}: not a readable {kind} file: it is nested too deep") from None
    except DAMAGE as error:
        raise UsageError(f"{path}: not a readable {kind} file: {shown(error, 200) or type(error).__name__}") from None


def read_npy(path: str, limit: int = DEFAULT_LIMIT) -> NDArray[Any]:
    """The array of plain numbers or texts in a .npy file."""
    with _reading(path, ".npy") as file:
        return _array(file, f"{path}: the array", limit)


def read_npz(path: str, wanted: Mapping[str, int]) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """Those of the wanted arrays {name: most bytes it may unpack to} that are in an .npz file, and the names of all that are in it."""
    with _reading(path, ".npz") as file, zipfile.ZipFile(file) as archive:
        inside = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        found = {}
        for name, limit in wanted.items():
            if name not in inside:
                continue
            info = inside[name]
            if info.flag_bits & 0x41:
                raise UsageError(f"{path}: {name} is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile unpacks these without any limit
                packing = OTHER_PACKING.get(info.compress_type, f"method {info.compress_type}")
                raise UsageError(f"{path}: {name} is packed by {packing}; only what numpy.savez or numpy.savez_compressed packs is read")
            with archive.open(info) as stream:
                found[name] = _array(stream, f"{path}: {name}", limit)
        return found, list(inside)


def read_json(path: str, limit: int = DEFAULT_LIMIT) -> Any:
    """The content of a JSON file of at most limit / JSON_FACTOR bytes. Integers that do not fit 64 bits come as floats."""
    with _reading(path, ".json") as file:
        text = _bytes(file, limit // JSON_FACTOR + 1, None)
        if len(text) > limit // JSON_FACTOR:
            raise UsageError(f"{path}: is longer than {mib(limit // JSON_FACTOR)}; raise the limit with --unpack-limit")
        return json.loads(bytes(text), parse_int=lambda digits: int(digits) if len(digits) < 19 else float(digits))


def mib(n: int) -> str:
    return f"{n / 2**20:,.0f} MiB" if n >= 2**20 else f"{n:,} bytes"


def _bytes(stream: IO[bytes] | FileIO, n: int, what: str | None) -> bytearray:
    """n bytes of the stream, or what there is if `what` is None; memory grows with the bytes that come."""
    got = bytearray()
    while len(got) < n:
        piece = stream.read(min(PIECE, n - len(got)))
        if not piece:
            if what is not None:
                raise EOFError(f"{what} ends after {len(got):,} of {n:,} bytes")
            break
        got += piece
    return got


def _array(stream: IO[bytes] | FileIO, name: str, limit: int) -> NDArray[Any]:
    """The one array of a stream in numpy's format. name: for the sentence that says that it is too large."""
    dtype, by_columns, shape = _header(stream)
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size > limit:
        more = "raise the limit with --unpack-limit" if limit >= PIECE else "no such value needs more"
        raise UsageError(f"{name} unpacks to {mib(size)}, and the limit is {mib(limit)}: {more}")
    data = _bytes(stream, size, "its array")
    if stream.read(1):  # the end must be reached in any case: an archive's checksum is compared there
        raise ValueError("its array is followed by more bytes than its header states")
    if count == 0:
        return np.empty(shape, dtype)
    flat = np.frombuffer(data, dtype)
    return flat.reshape(shape[::-1]).T if by_columns else flat.reshape(shape)


def _header(stream: IO[bytes] | FileIO) -> tuple[np.dtype[Any], bool, tuple[int, ...]]:
    """(dtype, whether in Fortran order, shape). Parsed here: numpy evaluates the header as Python, which hostile headers bring down."""
    magic = bytes(_bytes(stream, 8, "its header"))
    if magic[:6] != b"\x93NUMPY" or magic[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise ValueError("it does not begin as one")
    size = 2 if magic[6] == 1 else 4
    length = int.from_bytes(_bytes(stream, size, "its header"), "little")
    if length > MAX_HEADER:
        raise ValueError(f"its header of {length:,} bytes is too long")
    text = bytes(_bytes(stream, length, "its header")).decode("utf-8" if magic[6] == 3 else "latin-1").strip()
    items: dict[str, str] = {}
    position = 1
    while text.startswith("{") and (match := HEADER_ITEM.match(text, position)):
        items.update((key, value) for key, value in match.groupdict().items() if value is not None)
        position = match.end()
    if text[position:].strip() != "}" or len(items) != 3:
        raise ValueError(f"its header is not that of an array of plain numbers: {shown(text)}")
    shape = tuple(int(side) for side in re.findall(r"\d+", items["shape"], re.ASCII))
    if not PLAIN.fullmatch(items["descr"]):
        raise ValueError(f"it holds {shown(items['descr'])}, not plain numbers")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"it has {len(shape)} dimensions")
    return np.dtype(items["descr"]), items["order"] == "True", shape


# ---- writing ----


def check_writable(path: str | None, option: str, others: Mapping[str, str] | None = None) -> None:
    """Says before the long work, not after it, that a result could not be written. others: {what: path}, files it must not overwrite."""
    if path is None:
        return
    if not path:
        raise UsageError(f"{option}: needs the name of a file, got ''")
    try:
        mode = _mode(path)
        parent = os.path.dirname(os.path.realpath(path))
        if mode is None and not os.path.isdir(parent):
            raise UsageError(f"{option} {path}: the directory {parent} does not exist")
        if mode is not None and stat.S_ISDIR(mode):
            raise UsageError(f"{option} {path}: is a directory")
        if not os.access(parent if mode is None else path, os.W_OK):
            raise UsageError(f"{option} {path}: may not be written")
        for what, other in (others or {}).items():
            if (mode is None or stat.S_ISREG(mode)) and os.path.realpath(other) == os.path.realpath(path):
                raise UsageError(f"{option} {path}: would overwrite {what}")
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror or error}") from None
    except ValueError as error:  # a zero byte in the name
        raise UsageError(f"{option} {path}: {error}") from None


def _mode(path: str) -> int | None:
    """What kind of thing stands at path, links followed; None: nothing."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None


def write_file(path: str, data: bytes) -> None:
    """Writes all of data or nothing: a file that was there stays as it was until the new one is complete."""
    try:
        mode = _mode(path)
        if mode is None or stat.S_ISREG(mode):
            _replace(os.path.realpath(path), data, mode)
        else:  # a device or a pipe
            with open(path, "wb", opener=_at_once) as stream:
                stream.write(data)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


def _at_once(path: str, flags: int) -> int:
    """Opens a pipe without waiting for a reader, who may never come: that is an error."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    os.set_blocking(descriptor, True)
    return descriptor


def _replace(path: str, data: bytes, mode: int | None) -> None:
    part = os.path.join(os.path.dirname(path), f".lplb-{secrets.token_hex(6)}.part")
    with open(part, "xb") as stream:
        try:
            stream.write(data)
            stream.flush()
            if mode is not None:
                os.chmod(part, stat.S_IMODE(mode))
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise
