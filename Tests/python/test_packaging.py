"""What pip installs and what an sdist holds; building from it; importing with nothing but numpy."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest

from conftest import ROOT, Installed, Run

needs_swift = pytest.mark.skipif(shutil.which("swift") is None, reason="needs swift on PATH")


def header_version() -> str:
    header = (ROOT / "include/lplb.h").read_text()
    return ".".join(re.search(rf"LPLB_VERSION_{part} (\d+)", header)[1] for part in ("MAJOR", "MINOR", "PATCH"))  # type: ignore[index]


@pytest.fixture(scope="module")
def package() -> Distribution:
    try:
        return distribution("lplb")
    except ModuleNotFoundError:
        pytest.skip("lplb runs from the source tree, it is not installed")


def test_one_version(package: Distribution, installed: Installed) -> None:
    library = ctypes.CDLL(str(installed.library))
    major, minor, patch = map(int, package.version.split("."))
    assert package.version == header_version()
    assert library.lplb_version() == 10000 * major + 100 * minor + patch


def test_installed_files(installed: Installed) -> None:
    package = installed.include.parent
    assert installed.library == package / "lib/liblplb.so.0"
    assert installed.cmake == package / "lib/cmake/lplb"
    for path in ("include/lplb.h", "lib/liblplb.so.0", "lib/pkgconfig/lplb.pc", "lib/cmake/lplb/lplb-config.cmake",
                 "lib/cmake/lplb/lplb-config-version.cmake", "py.typed"):
        assert (package / path).is_file() and not (package / path).is_symlink(), path
    for path in ("lib/pkgconfig/lplb.pc", "lib/cmake/lplb/lplb-config.cmake", "lib/cmake/lplb/lplb-config-version.cmake"):
        assert not re.search(r"@[A-Z]+@", (package / path).read_text()), f"{path}: a placeholder is left"


def test_requirements(package: Distribution) -> None:
    hard = [requirement for requirement in package.requires or [] if "extra ==" not in requirement]
    assert [re.split(r"[^\w-]", requirement)[0] for requirement in hard] == ["numpy"]
    assert package.metadata["Requires-Python"] == ">=3.10"


def test_import_needs_only_numpy(tmp_path: Path) -> None:
    code = """
import sys
for name in ("torch", "matplotlib", "tqdm", "scipy"):
    sys.modules[name] = None  # to import it is an error now
import lplb
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_loading_leaves_signals_alone(installed: Installed) -> None:
    """The Swift runtime can install crash handlers; inside another program's process it must not."""
    code = f"""
import ctypes
def caught():
    return [line for line in open("/proc/self/status") if line.startswith("SigCgt")]
before = caught()
library = ctypes.CDLL({str(installed.library)!r})
assert library.lplb_version() > 0 and caught() == before, caught()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


CRASH = """
import ctypes, os, signal, sys
def caught():
    return [line for line in open("/proc/self/status") if line.startswith("SigCgt")]
before = caught()
library = ctypes.CDLL(sys.argv[1])
assert library.lplb_version() > 0 and caught() == before, caught()
os.kill(os.getpid(), signal.SIGSEGV)
"""


def test_swift_backtrace_runs_no_program(installed: Installed, tmp_path: Path) -> None:
    """SWIFT_BACKTRACE makes the Swift runtime catch signals when it is loaded, and run a program when the process crashes."""
    ran = tmp_path / "ran"
    program = tmp_path / "swift-backtrace"
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    for setting in (f"enable=yes,swift-backtrace={program}", f"enable=yes,interactive=no,swift-backtrace={program}", "enable=yes", "nonsense=1"):
        environment = {**os.environ, "SWIFT_BACKTRACE": setting, "SWIFT_ROOT": str(tmp_path), "PYTHONFAULTHANDLER": ""}
        done = subprocess.run([sys.executable, "-c", CRASH, str(installed.library)], capture_output=True, text=True, timeout=60, env=environment)
        assert done.returncode == -signal.SIGSEGV, (setting, done.returncode, done.stderr)
        assert not ran.exists() and "Backtrac" not in done.stderr, (setting, done.stderr)


def elf_dynamic(path: Path) -> tuple[list[tuple[int, int]], set[int]]:
    """The entries (tag, value) of a 64-bit little-endian ELF file's dynamic section, and the types of its program headers."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", path
    start, size, number = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQQQ", data, start + size * index) for index in range(number)]
    offset, length = next((header[2], header[5]) for header in headers if header[0] == 2)  # PT_DYNAMIC
    return [struct.unpack_from("<QQ", data, offset + at) for at in range(0, length, 16)], {header[0] for header in headers}


def test_libraries_are_hardened(installed: Installed) -> None:
    """Full RELRO: PT_GNU_RELRO, with DF_BIND_NOW or DF_1_NOW. No stack that can be executed, no text that is relocated."""
    libraries = [installed.library, *installed.library.parent.glob("liblplb_*.so")]
    for library in libraries:
        entries, headers = elf_dynamic(library)
        flags = {tag: value for tag, value in entries}
        assert 0x6474E552 in headers, f"{library.name}: no RELRO"
        assert flags.get(24) is not None or flags.get(30, 0) & 8 or flags.get(0x6FFFFFFB, 0) & 1, f"{library.name}: no BIND_NOW"
        assert 22 not in flags and not flags.get(30, 0) & 4, f"{library.name}: relocates its text"
    for name in (b"execve", b"execvpe", b"posix_spawn", b"waitpid"):
        assert b"\0" + name + b"\0" not in installed.library.read_bytes(), f"{name.decode()}: the library can run programs"


# ---- The sdist, and what is built from it ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, made as pip's front ends make it, in a copy of the tree (a build leaves files beside its sources)."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to compare with")
    pytest.importorskip("setuptools")
    copy = tmp_path_factory.mktemp("tree")
    for name in tracked_files():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "LPLB_CUDA": "0"})
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.tar.gz"))


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout
    return listed.split()


def test_sdist_is_complete(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    assert set(tracked_files()) - held <= {".gitignore"}
    made = {name for name in held if name.startswith("python/lplb.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert held - made <= set(tracked_files())


@needs_swift
@pytest.mark.timeout(1200)
def test_sdist_builds(sdist: Path, run: Run, tmp_path: Path) -> None:
    """From the sdist alone, without CUDA: an editable installation, then a wheel."""
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(tmp_path, filter="data")
        else:
            archive.extractall(tmp_path)
    tree = tmp_path / f"lplb-{header_version()}"
    run([sys.executable, "-m", "venv", tmp_path / "venv"])
    python = tmp_path / "venv/bin/python"
    run([python, "-m", "pip", "install", "--no-deps", "-e", tree], timeout=900, LPLB_CUDA="0")
    origin = run([python, "-c", "import importlib.util; print(importlib.util.find_spec('lplb').origin)"], cwd=tmp_path).strip()
    assert Path(origin) == tree / "python/lplb/__init__.py"
    library = ctypes.CDLL(str(tree / "python/lplb/lib/liblplb.so.0"))
    library.lplb_build_info.restype = ctypes.c_char_p
    assert b"without CUDA" in library.lplb_build_info()

    run([python, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path / "wheel", tree], timeout=900, LPLB_CUDA="0")
    (wheel,) = (tmp_path / "wheel").iterdir()
    assert re.fullmatch(rf"lplb-{re.escape(header_version())}-py3-none-(many)?linux_\w+\.whl", wheel.name)
    check_wheel(wheel)
    check_by_others(wheel, sdist, run)


def check_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert not any(stat.S_ISLNK(info.external_attr >> 16) for info in archive.infolist())
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/WHEEL"))).decode()
    assert "Root-Is-Purelib: false" in metadata
    ours = {name for name in tracked_files() if name.startswith("python/lplb/")}
    packaged = {f"python/{name}" for name in names if ".dist-info/" not in name}
    made = {"python/lplb/" + name for name in ("include/lplb.h", "lib/liblplb.so.0", "lib/pkgconfig/lplb.pc",
                                               "lib/cmake/lplb/lplb-config.cmake", "lib/cmake/lplb/lplb-config-version.cmake")}
    assert packaged == ours | made, packaged ^ (ours | made)
    with zipfile.ZipFile(wheel) as archive:
        scripts = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
        info = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    assert "lplb = lplb.cli.main:script" in scripts
    for field in ("Summary: ", "Keywords: ", "Classifier: Programming Language :: Python :: 3.13", "Requires-Python: >=3.10",
                  "Description-Content-Type: text/markdown"):
        assert f"\n{field}" in info, field
    assert "License" not in re.findall(r"^([\w-]+):", info.split("\n\n")[0], flags=re.MULTILINE)  # which the owner has not chosen
    assert wheel.stat().st_size < 12 << 20


def check_by_others(wheel: Path, sdist: Path, run: Run) -> None:
    """PyPI's rules, by those who know them. auditwheel finds the oldest systems that the libraries' symbols allow: those of the tag."""
    for tool in ("auditwheel", "twine", "check_wheel_contents"):
        pytest.importorskip(tool)
    said = run([sys.executable, "-m", "auditwheel", "show", wheel])
    (tag,) = re.findall(r"(manylinux_2_\d+_\w+|linux_\w+)\.whl", wheel.name)
    assert f'platform tag: "{tag}"' in " ".join(said.split()), said
    assert "PASSED" in run([sys.executable, "-m", "twine", "check", "--strict", wheel, sdist])
    assert "OK" in run([sys.executable, "-m", "check_wheel_contents", wheel])


# ---- Before anything is compiled -------------------------------------------------------------------------------------------------


def build_without_swift(tmp_path: Path, swift: str | None) -> str:
    """What a build says where Swift is missing, or is another program. nvcc is one that must not be run."""
    path = tmp_path / "bin"
    path.mkdir()
    for name, text in (("nvcc", f"touch {tmp_path / 'ran'}; exit 1"), ("swift", swift)):
        if text is not None:
            (path / name).write_text(f"#!/bin/sh\n{text}\n")
            (path / name).chmod(0o755)
    code = "import setuptools; setuptools.setup = lambda **named: None; import setup, pathlib; setup.build_native(pathlib.Path('x'))"
    environment = {**os.environ, "PATH": f"{path}:/bin", "CUDA_HOME": "", "LPLB_CUDA": ""}
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and not (tmp_path / "ran").exists(), done.stderr
    return done.stderr.strip()


@pytest.mark.parametrize("swift, words", [
    (None, "swift not found: lplb needs Swift 6.3 or later on PATH"), ("echo 'Swift version 5.10.1 (swift-5.10.1-RELEASE)'",
                                                                      "is Swift version 5.10: lplb needs Swift 6.3 or later"),
    ("echo 'OpenStack Swift'", "--version does not work: lplb needs Swift 6.3"), ("exit 3", "--version does not work"),
])
def test_swift_is_asked_for_before_kernels_are_compiled(tmp_path: Path, swift: str | None, words: str) -> None:
    if swift is None and shutil.which("swift", path="/bin"):
        pytest.skip("Swift stands in /bin")
    pytest.importorskip("setuptools")
    assert words in build_without_swift(tmp_path, swift)


SYMBOLS = """
#include <math.h>
#include <unistd.h>
{extra}
double f(double x) {{ return {call}; }}
"""


@pytest.mark.parametrize("call, extra, libraries, beyond", [
    ("exp(x)", "", ["-lm"], False), ("x", "", ["-lm"], False),
    ("f2(x)", '__asm__(".symver f2,arc4random@GLIBC_2.36"); double f2(double);', [], True),
    ("f2(x)", "double f2(double);", ["-Wl,--no-as-needed", "-L.", "-lelse"], True),
])
def test_the_tag_follows_the_symbols(tmp_path: Path, call: str, extra: str, libraries: list[str], beyond: bool) -> None:
    """A library that needs a newer glibc, or a library that not every system has, gets no manylinux tag."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "else.c").write_text("double f2(double x) { return x; }")
    (tmp_path / "a.c").write_text(SYMBOLS.format(call=call, extra=extra))
    for source, options in (("else.c", ["-o", "libelse.so", "-Wl,-soname,libelse.so.1"]), ("a.c", ["-o", "a.so", *libraries])):
        done = subprocess.run([compiler, "-shared", "-fPIC", source, *options], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        if done.returncode:
            pytest.skip(f"this linker does not take it: {done.stderr[-200:]}")
    code = ("import setuptools; setuptools.setup = lambda **named: None; import setup, pathlib, sys; "
            "print(setup.beyond_manylinux(pathlib.Path(sys.argv[1])))")
    done = subprocess.run([sys.executable, "-B", "-c", code, str(tmp_path / "a.so")], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.strip() != "[]") == beyond, done.stdout
