"""Builds and packages lplb: cuda/*.cu --nvcc--> objects --swift build--> liblplb.so, beside the Python package that loads it.

Environment
  LPLB_CUDA        0: leave CUDA out. 1: fail without nvcc. Unset: use CUDA_HOME, or nvcc on PATH, or the nvcc wheels that pip fetches
                   because `setup_requires` below names them.
  LPLB_CUDA_ARCHS  e.g. "90" or "80,90": compute capabilities to compile for (default: every one of DEFAULT_ARCHS that nvcc knows)
  LPLB_NVCC_FLAGS  more flags for nvcc, e.g. "-lineinfo"
  NVSHMEM_HOME     builds the plugin liblplb_nvshmem.so with this NVSHMEM. Unset: with its wheel, where the build sees one. LPLB_NVSHMEM=0:
                   never.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py as _build_py
from setuptools.command.develop import develop as _develop

try:
    from setuptools.command.bdist_wheel import bdist_wheel as _bdist_wheel
except ImportError:
    try:  # setuptools < 70.1
        from wheel.bdist_wheel import bdist_wheel as _bdist_wheel
    except ImportError:  # an old pip, which installs without making a wheel
        _bdist_wheel = object

ROOT = Path(__file__).resolve().parent
SONAME = "liblplb.so.0"
DEFAULT_ARCHS = ["80", "90", "100", "120"]
CUDA_WHEELS = "cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==13.0.*"
SWIFT_TIMEOUT = NVCC_TIMEOUT = 1800  # seconds; a hung compiler must not hang an installation for ever


def read_version() -> str:
    """The version in lplb.h, the only place where it is written."""
    header = (ROOT / "include/lplb.h").read_text()
    return ".".join(re.search(rf"#define LPLB_VERSION_{part} (\d+)", header).group(1) for part in ("MAJOR", "MINOR", "PATCH"))


# ---- CUDA ------------------------------------------------------------------------------------------------------------------------


class Toolkit(NamedTuple):
    nvcc: Path
    include: list[Path]  # beyond those nvcc finds by itself
    cudart: Path  # libcudart_static.a


def cuda_sources() -> list[Path]:
    return sorted([*(ROOT / "cuda").glob("*.cu"), *(ROOT / "cuda/solve").glob("*.cu")])


def cuda_mode() -> str:
    mode = os.environ.get("LPLB_CUDA", "")
    if mode not in ("", "0", "1"):
        raise SystemExit(f"LPLB_CUDA: 0, 1 or unset, got {mode!r}")
    return mode


def installed_nvcc() -> Path | None:
    """nvcc of CUDA_HOME or PATH: what the user chose to install goes before any wheel."""
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc = Path(home) / "bin/nvcc"
        if not nvcc.is_file():
            raise SystemExit(f"CUDA_HOME is {home}, but there is no bin/nvcc in it (LPLB_CUDA=0 builds without CUDA)")
        return nvcc
    found = shutil.which("nvcc")
    return Path(found) if found else None


def wheel_nvcc() -> Path | None:
    """nvcc of the CUDA wheels, which pip puts into the build environment: bin, include, lib and nvvm of all of them in one folder."""
    homes = [home for entry in sys.path if (home := Path(entry) / "nvidia/cu13").is_dir()]
    if len(homes) > 1 and any(".eggs" in home.parts for home in homes):  # pip < 23.1 unpacks each for itself, without execute permission
        merged = ROOT / "build/cuda/toolkit"
        for home in homes:
            shutil.copytree(home, merged, dirs_exist_ok=True)
        for tool in [*(merged / "bin").iterdir(), *(merged / "nvvm/bin").iterdir()]:
            tool.chmod(0o755) if tool.is_file() else None
        homes = [merged]
    return next((nvcc for home in homes if (nvcc := home / "bin/nvcc").is_file()), None)


def find_toolkit() -> Toolkit | None:
    """None: build without CUDA."""
    mode = cuda_mode()
    if mode == "0" or not cuda_sources():
        return None
    nvcc = installed_nvcc() or wheel_nvcc()
    if nvcc is None:
        if mode == "1":
            raise SystemExit("LPLB_CUDA=1, but no nvcc: set CUDA_HOME, put nvcc on PATH, or let pip fetch it (no --no-build-isolation)")
        print("lplb: no nvcc found, building without CUDA", file=sys.stderr)
        return None
    homes = dict.fromkeys([nvcc.parent.parent, nvcc.resolve().parent.parent])
    for home in homes:
        for lib in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib/x86_64-linux-gnu"):
            cudart = home / lib / "libcudart_static.a"
            if cudart.is_file():
                include = [home / "include"] if (home / "include/cuda_runtime.h").is_file() else []
                return Toolkit(nvcc, include, cudart)
    raise SystemExit(f"{nvcc}: no libcudart_static.a beside it; install the static CUDA runtime or set LPLB_CUDA=0")


def choose_archs(nvcc: Path) -> list[str]:
    asked = os.environ.get("LPLB_CUDA_ARCHS", "").replace(",", " ").split()
    if asked:
        return asked
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True, timeout=60).stdout
    archs = [arch for arch in DEFAULT_ARCHS if f"compute_{arch}\n" in known]
    if not archs:
        raise SystemExit(f"{nvcc} knows none of the architectures {', '.join(DEFAULT_ARCHS)}; set LPLB_CUDA_ARCHS or LPLB_CUDA=0")
    return archs


def compile_cuda(toolkit: Toolkit) -> list[Path]:
    """Objects of cuda/*.cu, in build/cuda under the hash of all that they depend on, so that only what changed is compiled again."""
    archs = choose_archs(toolkit.nvcc)
    flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden,-fno-exceptions,-fno-rtti"]
    for arch in archs:
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    last = archs[-1].rstrip("af")  # sm_90a and the like have no PTX that later GPUs could use
    flags += ["-gencode", f"arch=compute_{last},code=compute_{last}", *shlex.split(os.environ.get("LPLB_NVCC_FLAGS", ""))]
    flags.append(f'-DLPLB_ARCHITECTURES="{" ".join(f"sm_{arch}" for arch in archs)} compute_{last}"')  # for lplb_build_info
    if "--compress-mode" in subprocess.run([toolkit.nvcc, "--help"], check=True, capture_output=True, text=True, timeout=60).stdout:
        flags.append("--compress-mode=size")  # halves the library
    release = subprocess.run([toolkit.nvcc, "--version"], check=True, capture_output=True, text=True, timeout=60).stdout

    common = hashlib.sha256(repr((flags, release)).encode())
    for header in sorted([*(ROOT / "cuda").glob("*.h"), *(ROOT / "cuda").glob("*.cuh"), *(ROOT / "cuda/solve").glob("*.cuh")]):
        common.update(header.read_bytes())
    cores = max(2, min(8, os.cpu_count() or 2))  # files at a time, and architectures at a time within a file
    cache = ROOT / "build/cuda"
    cache.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in [ROOT / "cuda", *toolkit.include]]

    def compile_one(source: Path) -> Path:
        digest = common.copy()
        digest.update(source.read_bytes())
        target = cache / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            print(f"lplb: nvcc {source.name} ({', '.join(archs)})", flush=True)
            part = target.with_suffix(f".{os.getpid()}.part.o")
            try:
                command = [toolkit.nvcc, *flags, *includes, f"--threads={cores}", "-c", source, "-o", part]
                subprocess.run(command, check=True, timeout=NVCC_TIMEOUT)
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
        return target

    with ThreadPoolExecutor(cores) as pool:
        return list(pool.map(compile_one, cuda_sources()))


def find_nvshmem() -> Path | None:
    """A folder with NVSHMEM's include/ and lib/, None: no plugin."""
    if os.environ.get("LPLB_NVSHMEM") == "0":
        return None
    home = os.environ.get("NVSHMEM_HOME")
    if home and not (Path(home) / "include/nvshmem.h").is_file():
        raise SystemExit(f"NVSHMEM_HOME is {home}, but there is no include/nvshmem.h in it")
    homes = [Path(home)] if home else [Path(entry) / "nvidia/nvshmem" for entry in sys.path]
    return next((home for home in homes if (home / "include/nvshmem.h").is_file()), None)


def compile_plugin(toolkit: Toolkit, nvshmem: Path) -> Path:
    """liblplb_nvshmem.so, in build/cuda under the hash of all that it depends on."""
    archs = choose_archs(toolkit.nvcc)
    flags = [word for arch in archs for word in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    flags += [f"-I{path}" for path in toolkit.include] + [f"-L{toolkit.cudart.parent}"]
    folder = ROOT / "cuda/nvshmem"
    digest = hashlib.sha256(repr(flags).encode())
    for source in [*sorted(folder.iterdir()), ROOT / "include/lplb.h", nvshmem / "include/non_abi/nvshmem_version.h"]:
        digest.update(source.read_bytes())
    target = ROOT / "build/cuda" / f"nvshmem-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        print(f"lplb: nvcc nvshmem/rail.cu ({', '.join(archs)})", flush=True)
        part = target.with_suffix(f".{os.getpid()}.part.so")
        try:
            command = ["bash", folder / "build.sh", part, nvshmem, *flags]
            subprocess.run(command, check=True, env={**os.environ, "NVCC": str(toolkit.nvcc)}, timeout=NVCC_TIMEOUT)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    return target


# ---- The library -----------------------------------------------------------------------------------------------------------------


def find_swift() -> str:
    """The path of Swift. Asked for first: compiling the kernels takes minutes."""
    needs = "lplb needs Swift 6.3 or later on PATH (https://www.swift.org/install/linux)"
    swift = shutil.which("swift")
    if swift is None:
        raise SystemExit(f"swift not found: {needs}")
    said = subprocess.run([swift, "--version"], capture_output=True, text=True, timeout=120)
    version = re.search(r"Swift version (\d+)\.(\d+)", said.stdout + said.stderr)
    if said.returncode != 0 or version is None:
        raise SystemExit(f"{swift} --version does not work: {needs}; it says: {' '.join((said.stdout + said.stderr).split())[:300]}")
    if (int(version[1]), int(version[2])) < (6, 3):
        raise SystemExit(f"{swift} is {version[0]}: {needs}")
    return swift


def swift_build(swift: str, objects: list[Path]) -> Path:
    """Builds liblplb.so with Swift's own libraries linked in and with nothing exported but lplb.map's list."""
    # relro and now: all addresses of functions are looked up when the library is loaded, and the table of them cannot be written then.
    linker = [f"--version-script={ROOT / 'include/lplb.map'}", f"-soname={SONAME}", "-z", "defs", "-z", "relro", "-z", "now", "-s"]
    command = [swift, "build", "-c", "release", "--product", "lplb", "--package-path", str(ROOT), "-Xswiftc", "-static-stdlib",
               "-Xswiftc", "-use-ld=lld"]  # lld comes with Swift; unlike gold it refuses a name in lplb.map that nothing defines
    for flag in linker:
        command += ["-Xlinker", flag]
    # SwiftPM does not notice a change of these headers by itself; another flag makes it compile again.
    headers = hashlib.sha256(b"".join(path.read_bytes() for path in [ROOT / "include/lplb.h", *sorted((ROOT / "cuda").glob("*.h"))]))
    command += ["-Xcc", f"-DLPLB_HEADERS_{headers.hexdigest()[:16]}"]
    env = {**os.environ, "LPLB_CUDA_OBJECTS": ":".join(map(str, objects))}
    subprocess.run(command, check=True, env=env, timeout=SWIFT_TIMEOUT)
    where = subprocess.run([*command, "--show-bin-path"], check=True, env=env, capture_output=True, text=True, timeout=300).stdout
    return Path(where.strip()) / "liblplb.so"


def build_native(package: Path) -> list[Path]:
    """Writes the library, its header and its pkg-config and CMake files into `package`, the lplb package's folder; returns them all."""
    swift = find_swift()
    toolkit = find_toolkit()
    objects = [*compile_cuda(toolkit), toolkit.cudart] if toolkit else []
    library = swift_build(swift, objects)

    written = []

    def place(relative: str, content: bytes, mode: int = 0o644) -> None:
        path = package / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")  # a process that has the old library mapped keeps it whole
        part.write_bytes(content)
        part.chmod(mode)
        part.replace(path)
        written.append(path)

    def fill(template: str) -> bytes:
        text = (ROOT / "include" / template).read_text()
        return text.replace("@VERSION@", read_version()).replace("@SONAME@", SONAME).encode()

    place(f"lib/{SONAME}", library.read_bytes(), 0o755)
    nvshmem = find_nvshmem() if toolkit else None
    if toolkit and nvshmem:
        place("lib/liblplb_nvshmem.so", compile_plugin(toolkit, nvshmem).read_bytes(), 0o755)
    place("include/lplb.h", (ROOT / "include/lplb.h").read_bytes())
    place("lib/pkgconfig/lplb.pc", fill("lplb.pc.in"))
    place("lib/cmake/lplb/lplb-config.cmake", fill("lplb-config.cmake.in"))
    place("lib/cmake/lplb/lplb-config-version.cmake", fill("lplb-config-version.cmake.in"))
    return written


# ---- What the libraries need of a system --------------------------------------------------------------------------------------------

# PEP 600's manylinux_2_34: the newest versions of symbols, as auditwheel lists them, and the libraries that every such system has. NVSHMEM's
# own library is looked for by the plugin alone, which is loaded only where NVSHMEM is.
NEWEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (7, 0, 0)}
SYSTEM = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2",
          "ld-linux-aarch64.so.1", "libnvshmem_host.so.3"}


def beyond_manylinux(library: Path) -> list[str]:
    """The libraries and versions of symbols that a 64-bit ELF file needs and manylinux_2_34 does not promise."""
    data = library.read_bytes()
    start, (size, number) = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQQQ", data, start + size * index) for index in range(number)]

    def at(address: int) -> int:
        return next(address - vaddr + offset for kind, _, offset, vaddr, _, length, *_ in headers
                    if kind == 1 and vaddr <= address < vaddr + length)

    offset, length = next((header[2], header[5]) for header in headers if header[0] == 2)
    entries = [struct.unpack_from("<QQ", data, place) for place in range(offset, offset + length, 16)]
    dynamic = dict(entries)
    strings = at(dynamic[5])

    def word(place: int) -> str:
        return data[strings + place:data.index(b"\0", strings + place)].decode()

    found = [name for name in (word(value) for tag, value in entries if tag == 1) if name not in SYSTEM]
    place = at(dynamic[0x6FFFFFFE]) if 0x6FFFFFFE in dynamic else 0
    for _ in range(dynamic.get(0x6FFFFFFF, 0)):  # of each library the versions that are needed
        _, count, _, first, after = struct.unpack_from("<HHIII", data, place)
        version = place + first
        for _ in range(count):
            name, following = struct.unpack_from("<II", data, version + 8)
            family, _, digits = word(name).partition("_")
            if digits[:1].isdigit() and tuple(map(int, digits.split("."))) > NEWEST.get(family, (999,)):
                found.append(word(name))
            version += following
        place += after
    return found


# ---- setuptools ------------------------------------------------------------------------------------------------------------------


class BuildPy(_build_py):
    """The Python files, and the library beside them. An editable installation gets the library into the source tree."""

    native: list[Path] = []

    def run(self) -> None:
        editable = getattr(self, "editable_mode", False)
        package = ROOT / "python/lplb" if editable else Path(self.build_lib) / "lplb"
        if not editable:
            shutil.rmtree(package, ignore_errors=True)  # build/ outlives a build; a module deleted since must not be packed again
        super().run()
        self.native = build_native(package)

    def get_source_files(self) -> list[str]:
        """What goes into the sdist: everything that the build and the tests read. (There is no MANIFEST.in.)"""
        unwanted = {"__pycache__", ".pytest_cache", ".mypy_cache", "lplb.egg-info"}
        generated = {ROOT / "python/lplb/lib", ROOT / "python/lplb/include"}
        found = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(".*.ini"))]
        for top in ("Package.swift", ".bench", ".ci", "Sources", "Tests", "cuda", "include", "python"):
            for path in [ROOT / top, *sorted((ROOT / top).rglob("*"))]:
                inside = path.relative_to(ROOT)
                if path.is_file() and unwanted.isdisjoint(inside.parts) and generated.isdisjoint(path.parents):
                    found.append(str(inside))
        return found

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *map(str, self.native)]


class BdistWheel(_bdist_wheel):
    """One wheel serves every Python 3: the library does not link to Python. Its tag is manylinux_2_34 where the libraries keep to that."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = self.plat_name or sysconfig.get_platform()
        tag = platform.replace("-", "_").replace(".", "_")
        native = [path for path in self.get_finalized_command("build_py").native if ".so" in path.name]
        if tag.startswith("linux_") and native:
            beyond = [f"{path.name} needs {what}" for path in native for what in beyond_manylinux(path)]
            print(f"lplb: {'; '.join(beyond)}: the wheel is for systems like this one" if beyond else "lplb: manylinux_2_34", flush=True)
            tag = tag if beyond else tag.replace("linux", "manylinux_2_34", 1)
        return "py3", "none", tag


class Develop(_develop):
    """`pip install -e` of pip < 23.1; later ones ask BuildPy for an editable build."""

    def install_for_development(self) -> None:
        build_native(ROOT / "python/lplb")
        super().install_for_development()


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True  # a wheel of this platform, installed among platform files


CLI = ["matplotlib>=3.5", "tqdm>=4.60"]
TEST = [*CLI, "torch>=2.4", "scipy>=1.8", "pytest>=7", "pytest-timeout>=2.3", "pytest-xdist>=3.5", "mypy>=1.10", "setuptools>=64"]
TEST += ["cmake>=3.20", "ninja", "pkgconf"]  # for the tests of the installed CMake and pkg-config files
TEST += ["auditwheel>=6", "twine>=5", "check-wheel-contents>=0.6"]  # what PyPI and others would say of the wheel

# Without Swift nothing is built: then pip need not fetch gigabytes of nvcc before it is told so.
needs_wheels = cuda_mode() != "0" and cuda_sources() and not installed_nvcc() and shutil.which("swift") is not None

setup(
    name="lplb",
    version=read_version(),
    description="Exact, certified load balancing for Mixture-of-Experts training and serving",
    keywords=["mixture of experts", "MoE", "expert parallelism", "load balancing", "EPLB", "LPLB", "CUDA"],
    classifiers=[  # the licence is the owner's to choose
        "Development Status :: 4 - Beta", "Environment :: GPU :: NVIDIA CUDA :: 13", "Intended Audience :: Developers",
        "Intended Audience :: Science/Research", "Operating System :: POSIX :: Linux", "Programming Language :: C",
        "Programming Language :: Python :: 3", *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence", "Topic :: System :: Distributed Computing", "Typing :: Typed"],
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    setup_requires=[CUDA_WHEELS] if needs_wheels else [],
    install_requires=["numpy>=1.22"],
    extras_require={"cli": CLI, "test": TEST, "torch": ["torch>=2.4"]},
    package_dir={"": "python"},
    packages=find_packages("python"),
    package_data={"lplb": ["py.typed"], "lplb.cli": ["data/*"]},
    entry_points={
        "console_scripts": ["lplb = lplb.cli.main:script"],
        # each of the others does nothing before its environment variable asks for it
        "vllm.general_plugins": ["lplb = lplb.integrations.vllm:register"],
        "sglang.srt.plugins": ["lplb = lplb.integrations.sglang:register"],
    },
    cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel, "develop": Develop},
    distclass=BinaryDistribution,
    zip_safe=False,
)
