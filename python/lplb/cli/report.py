"""`python -m lplb`: what is installed here, whether it fits together, and whether it computes what it promises."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from .. import _c
from ..errors import LibraryError, LplbError
from .terminal import harmless, say, shown

State = Literal["ok", "off", "note"]
PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Finding:
    """state: ok; off (something must be mended, the command ends with 1); note (fine, but worth knowing)."""

    name: str
    state: State
    text: str


def include_dir() -> str:
    """The directory of lplb.h. LibraryError where the package was not installed with it."""
    return _existing(PACKAGE / "include", "lplb.h", "the header")


def library() -> str:
    try:
        return _c.find()
    except OSError as error:  # a path that may not be looked at, or is too long
        raise LibraryError(f"lplb: the library cannot be looked for: {error}") from None


def cmake_dir() -> str:
    """For CMAKE_PREFIX_PATH or lplb_DIR."""
    return _existing(PACKAGE / "lib" / "cmake" / "lplb", "lplb-config.cmake", "the CMake configuration")


def _existing(directory: Path, file: str, what: str) -> str:
    if not any((directory / name).is_file() for name in (file, "lplbConfig.cmake")):
        raise LibraryError(f"lplb: {what} was not found at {directory / file}. Install the package with 'pip install .'")
    return str(directory)


def findings() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _package()
    try:
        library()
        loaded = _c.load()
    except (LplbError, OSError) as error:
        yield Finding("library", "off", str(error).removeprefix("lplb: "))
        return
    yield Finding("library", "ok", loaded.path)
    yield Finding("build", "ok", _c.text(loaded.build_info()))
    yield _header(loaded.version())
    yield from _python_packages()
    yield from _cuda()
    from . import selfcheck
    for name, run in selfcheck.CHECKS:
        start = perf_counter()
        try:
            words = run()
        except Exception as error:  # a check that cannot be carried out has failed
            yield Finding(name, "off", _reason(error))
        else:
            yield Finding(name, "ok", f"{words} ({perf_counter() - start:.2f} s)")


def _reason(error: Exception) -> str:
    from . import selfcheck
    words = " ".join(str(error).split()).removeprefix("lplb: ")
    return shown(words if isinstance(error, (selfcheck.Failed, LplbError)) else f"{type(error).__name__}: {words}", 500)


def _package() -> Iterator[Finding]:
    try:
        version = metadata.version("lplb")
    except metadata.PackageNotFoundError:
        yield Finding("package", "note", f"used from {PACKAGE}, not installed")
        return
    except Exception as error:  # a damaged installation
        yield Finding("package", "off", f"its metadata cannot be read: {_reason(error)}")
        return
    expected = ".".join(map(str, _c.VERSION))
    state: State = "ok" if version is not None and version.startswith(expected) else "off"
    yield Finding("package", state, f"lplb {version} at {PACKAGE}" + ("" if state == "ok" else f", but its code is {expected}"))


def _header(library_version: int) -> Finding:
    try:
        header = Path(include_dir(), "lplb.h").read_text(encoding="utf-8", errors="replace")
    except (LplbError, OSError):
        return Finding("header", "note", "lplb.h is not beside the package: C programs cannot be built against it")
    match = re.search(r"#define LPLB_VERSION ([0-9]{1,9})\b", header)
    stated = int(match[1]) if match else -1
    if stated != library_version:
        return Finding("header", "off", f"lplb.h is of version {stated}, the library of version {library_version}")
    return Finding("header", "ok", f"{include_dir()}/lplb.h, the library's version")


def _python_packages() -> Iterator[Finding]:
    import numpy
    yield Finding("numpy", "ok", numpy.__version__)
    for name, without in (("torch", "numpy arrays only"), ("matplotlib", "no --plot"), ("tqdm", "no progress bar"),
                          ("scipy", "bench has no LP solver to compare with")):
        try:
            yield Finding(name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, "note", f"not installed: {without}")
        except Exception as error:
            yield Finding(name, "note", f"its metadata cannot be read: {_reason(error)}")


def _cuda() -> Iterator[Finding]:
    built = "without CUDA" not in _c.text(_c.load().build_info())
    try:
        import torch
    except ImportError:
        if built:
            yield Finding("CUDA", "note", "the library has CUDA kernels; without torch they can be used from C only")
        return
    except Exception as error:  # a damaged or mismatched installation
        yield Finding("torch", "off", f"cannot be imported: {_reason(error)}")
        return
    try:
        yield from _gpus(torch, built)
    except Exception as error:
        yield Finding("CUDA", "off", _reason(error))


def _gpus(torch: Any, built: bool) -> Iterator[Finding]:
    if not torch.cuda.is_available():
        words = "the library has CUDA kernels, but torch sees no GPU here" if built else "none in the library, and torch sees no GPU here"
        yield Finding("CUDA", "note", f"{words}: plans are made on the CPU")
        return
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    if not built:
        yield Finding("CUDA", "note", f"torch sees {names}, but the library was built without CUDA")
        return
    yield Finding("CUDA", "ok", f"torch CUDA {torch.version.cuda}: {names}")
    from . import selfcheck
    try:
        yield Finding("CUDA plans", "ok", selfcheck.check_cuda())
    except Exception as error:
        yield Finding("CUDA plans", "off", _reason(error))


def main(as_json: bool = False) -> int:
    found: list[Finding] = []
    for finding in findings():
        found.append(finding)
        if not as_json:
            mark = {"ok": "ok  ", "off": "OFF ", "note": "note"}[finding.state]
            say(f"{mark}  {finding.name:<33}{harmless(finding.text)}", now=True)
    off = [finding for finding in found if finding.state == "off"]
    if as_json:
        say(json.dumps({"ok": not off, "findings": [asdict(finding) for finding in found]}, indent=1))
    elif off:
        say(f"\n{len(off)} of {len(found)} things are off: {', '.join(finding.name for finding in off)}.")
    else:
        say("\nEverything is in order. Next: python -m lplb simulate")
    return 1 if off else 0
