"""The header, the exports and the installed package, as C and C++ callers see them; hostile calls at the C boundary."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ROOT, Installed, Run, run_command
from test_swift import SANITIZE, built_sanitized  # noqa: F401  (a fixture)

SOURCES = ROOT / "Tests/c"
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
WARNINGS = ["-Wall", "-Wextra", "-pedantic", "-Werror"]


def tool(*names: str) -> str:
    """The first of these programs that there is: of this Python's environment (wheels of cmake, ninja, pkgconf) or of the system."""
    for name in names:
        found = shutil.which(name, path=PATH)
        if found:
            return found
    pytest.skip(f"needs {' or '.join(names)}")


def declared_functions() -> list[str]:
    header = re.sub(r"/\*.*?\*/", "", (ROOT / "include/lplb.h").read_text(), flags=re.DOTALL)
    header = re.sub(r"^\s*#.*$", "", header.replace("\\\n", " "), flags=re.MULTILINE)
    return re.findall(r"\b(lplb_\w+)\s*\(", header)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_header_is_c99(compiler: str, run: Run, tmp_path: Path) -> None:
    run([tool(compiler), "-std=c99", *WARNINGS, f"-I{ROOT / 'include'}", "-c", SOURCES / "header.c", "-o", tmp_path / "header.o"])


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_header_is_cxx17(compiler: str, run: Run, tmp_path: Path) -> None:
    run([tool(compiler), "-std=c++17", *WARNINGS, f"-I{ROOT / 'include'}", "-c", SOURCES / "header.cpp", "-o", tmp_path / "header.o"])


TEN_LINES = r"One batch is planned so:\n \*\n((?: \*     .*\n){10}) \*\n"


def test_the_headers_first_lines_plan_a_batch(installed: Installed, run: Run, tmp_path: Path) -> None:
    """The ten lines that the header begins with are a program, and it finds what they say."""
    lines = re.search(TEN_LINES, (ROOT / "include/lplb.h").read_text())
    assert lines is not None, "the header must begin with ten lines of C that plan one batch"
    body = re.sub(r"^ \*", "", lines[1], flags=re.MULTILINE)
    (tmp_path / "ten.c").write_text(f"#include <lplb.h>\n#include <stdio.h>\nint main(void) {{\n{body}    for (int i = 0; i < 8; i++)"
                                    ' printf("%d", (int)(ids[i] / 3));\n    printf(" %d %d %d\\n", (int)plan.max_load, (int)plan.bound,'
                                    " plan.certified);\n    return 0;\n}\n")
    run([tool("cc", "gcc", "clang"), "-std=c99", *WARNINGS, f"-I{installed.include}", tmp_path / "ten.c", "-o", tmp_path / "ten",
         installed.library, f"-Wl,-rpath,{installed.library.parent}"])
    ranks, *plan = run([tmp_path / "ten"]).split()
    assert sorted(ranks) == list("00001111") and plan == ["4", "4", "1"]


def test_the_examples_that_the_header_names_exist() -> None:
    named = re.search(r"Whole programs: (.*?)\n \*\n", (ROOT / "include/lplb.h").read_text(), flags=re.DOTALL)
    assert named is not None
    names = re.findall(r"[\w/]+\.[ch]p*\b", named[1])
    assert len(names) == 4 and all((SOURCES / Path(name).name).is_file() for name in names), names


def test_export_list_is_the_header() -> None:
    listed = re.findall(r"^\s*(\w+);", (ROOT / "include/lplb.map").read_text(), flags=re.MULTILINE)
    assert listed == declared_functions(), "include/lplb.map must list the functions of include/lplb.h, in its order"


def test_exports_are_the_header(installed: Installed, run: Run) -> None:
    symbols = run([tool("nm", "llvm-nm"), "-D", "--defined-only", installed.library]).splitlines()
    assert sorted(line.split()[-1] for line in symbols) == sorted(f"{name}@@LPLB_0" for name in declared_functions())


def test_library_needs_only_the_c_and_cxx_runtimes(installed: Installed, run: Run) -> None:
    dynamic = run([tool("readelf", "llvm-readelf"), "-dW", installed.library])
    assert re.findall(r"\(SONAME\).*\[(.+)\]", dynamic) == ["liblplb.so.0"]
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    unavoidable = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1"}
    assert needed <= unavoidable | {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "libpthread.so.0", "libdl.so.2", "librt.so.1"}
    assert "TEXTREL" not in dynamic


def test_installed_header_is_ours(installed: Installed) -> None:
    assert (installed.include / "lplb.h").read_bytes() == (ROOT / "include/lplb.h").read_bytes()


def build_with_cmake(run: Run, cmake_dir: Path, build: Path) -> None:
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=PATH)}"] if shutil.which("ninja", path=PATH) else []
    cmake = tool("cmake")
    run([cmake, "-S", SOURCES, "-B", build, *generator, f"-Dlplb_DIR={cmake_dir}", "-DCMAKE_C_FLAGS=-Wall -Wextra -Werror",
         "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"])
    run([cmake, "--build", build])
    output = run([Path(cmake).with_name("ctest"), "--test-dir", build, "--output-on-failure", "--timeout", "60"])
    assert "100% tests passed" in output and "out of 2" in output


def test_find_package(installed: Installed, run: Run, tmp_path: Path) -> None:
    build_with_cmake(run, installed.cmake, tmp_path / "build")


def test_find_package_refuses_other_versions(installed: Installed, run: Run, tmp_path: Path) -> None:
    script = tmp_path / "CMakeLists.txt"
    for version, fits in (("0.2", True), ("0.2.0", True), ("0", True), ("0.1", False), ("0.3", False), ("1.0", False), ("99", False)):
        script.write_text("cmake_minimum_required(VERSION 3.20)\nproject(versions LANGUAGES C)\n"
                          f"find_package(lplb {version} CONFIG QUIET)\nmessage(STATUS \"found=${{lplb_FOUND}}\")\n")
        output = run([tool("cmake"), "-S", tmp_path, "-B", tmp_path / version, f"-Dlplb_DIR={installed.cmake}"])
        assert f"found={int(fits)}" in output, version


def build_with_pkg_config(run: Run, directory: Path, build: Path) -> None:
    pkg_config = tool("pkg-config", "pkgconf")
    flags = run([pkg_config, "--cflags", "--libs", "lplb"], PKG_CONFIG_PATH=str(directory)).split()
    for compiler, standard, source in (("cc", "-std=c99", "example.c"), ("c++", "-std=c++17", "consumer.cpp")):
        program = build / source.split(".")[0]
        run([tool(compiler, "gcc" if compiler == "cc" else "g++", "clang"), standard, *WARNINGS, SOURCES / source, "-o", program, *flags])
        run([program], timeout=60)


def test_pkg_config(installed: Installed, run: Run, tmp_path: Path) -> None:
    build_with_pkg_config(run, installed.library.parent / "pkgconfig", tmp_path)


def test_pkg_config_gives_the_version_of_the_header(installed: Installed, run: Run) -> None:
    from importlib.metadata import version

    printed = run([tool("pkg-config", "pkgconf"), "--modversion", "lplb"], PKG_CONFIG_PATH=str(installed.library.parent / "pkgconfig"))
    assert printed.strip() == version("lplb")


def test_the_package_can_be_moved(installed: Installed, run: Run, tmp_path: Path) -> None:
    for part in ("include", "lib"):
        source = installed.include if part == "include" else installed.library.parent
        shutil.copytree(source, tmp_path / "moved" / part)
    build_with_cmake(run, tmp_path / "moved/lib/cmake/lplb", tmp_path / "build")
    build_with_pkg_config(run, tmp_path / "moved/lib/pkgconfig", tmp_path)
    assert str(tmp_path / "moved/lib") in run([tool("ldd"), tmp_path / "build/example"])


# ---- Processes that connect an exchange ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def connect(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests/c/connect.cpp, which starts processes of its own."""
    program = tmp_path_factory.mktemp("connect") / "connect"
    run_command([tool("c++", "g++", "clang++"), "-std=c++17", *WARNINGS, f"-I{installed.include}", SOURCES / "connect.cpp", "-o", program,
                 installed.library, f"-Wl,-rpath,{installed.library.parent}", "-ldl"])
    return program


@pytest.mark.parametrize("ranks", [2, 5])
def test_processes_learn_together_why_they_cannot_connect(connect: Path, run: Run, ranks: int) -> None:
    lines = run([connect, str(ranks)], timeout=60).splitlines()
    assert len(lines) == 3 * ranks and sum("on the CPU" in line for line in lines) == ranks


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_connect_on_gpus(connect: Path, run: Run, ranks: int) -> None:
    assert f"plain, rank {ranks - 1}: 0 " in run([connect, "gpu", str(ranks)], timeout=200)


# ---- Replicas ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(1200)
def test_replicas_in_host_memory(run: Run, tmp_path: Path, note: Callable[[str], None]) -> None:
    """Everything of replicas but the kernels: the library with functions in their place that work in host memory."""
    kernels, program = ROOT / "build/host_kernels.o", tmp_path / "replicas"
    compiler = tool("c++", "g++", "clang++")
    flags = [compiler, "-std=c++20", "-O1", "-g", *WARNINGS, f"-I{ROOT / 'include'}", f"-I{ROOT / 'cuda'}"]
    run([*flags, "-fPIC", "-c", SOURCES / "host_kernels.cpp", "-o", kernels])
    build = [tool("swift"), "build", "--product", "lplb", "--package-path", ROOT, "--scratch-path", ROOT / "build/host"]
    run(build, timeout=900, LPLB_CUDA_OBJECTS=str(kernels))
    products = Path(run([*build, "--show-bin-path"], LPLB_CUDA_OBJECTS=str(kernels)).strip().split("\n")[-1])
    run([*flags, SOURCES / "replicas.cpp", "-o", program, products / "liblplb.so", f"-Wl,-rpath,{products}", "-pthread"])
    note(run([program], timeout=120).strip())


# ---- Hostile calls -----------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", [1, 2])
def test_hostile_calls(seed: int, installed: Installed, run: Run, tmp_path: Path, note: Callable[[str], None]) -> None:
    program = tmp_path / "fuzz"
    run([tool("cc", "gcc", "clang"), "-std=c99", "-O1", "-g", *WARNINGS, f"-I{installed.include}", SOURCES / "fuzz.c", "-o", program,
         installed.library, f"-Wl,-rpath,{installed.library.parent}", "-pthread"])
    note(run([program, "200000", str(seed)], timeout=100).strip())


@pytest.mark.sanitize
@pytest.mark.timeout(1200)
def test_hostile_calls_under_address_sanitizer(built_sanitized: None, run: Run, tmp_path: Path, note: Callable[[str], None]) -> None:
    """Library and program both instrumented, by the compilers of one toolchain; leaked planners count too."""
    swift = tool("swift")
    shown = run([swift, "build", "--show-bin-path", "--package-path", ROOT, *SANITIZE], LPLB_CUDA_OBJECTS="")
    products = Path(shown.strip().split("\n")[-1])
    program = tmp_path / "fuzz"
    run([Path(swift).resolve().with_name("clang"), "-std=c99", "-O1", "-g", "-fsanitize=address", "-fuse-ld=lld", *WARNINGS,
         f"-I{ROOT / 'include'}", SOURCES / "fuzz.c", "-o", program, products / "liblplb.so", f"-Wl,-rpath,{products}", "-pthread"])
    note("address sanitizer: " + run([program, "40000", "3"], timeout=300).strip())
