"""The ctypes layer: it says what the header says, and a library that cannot be used is refused in words."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lplb
from lplb import _c, errors

STEPS = ("lplb_exchange_buffer_bytes", "lplb_exchange_create", "lplb_exchange_begin", "lplb_exchange_finish")
HEADER = Path(__file__).resolve().parents[2] / "include" / "lplb.h"


@pytest.fixture(scope="module")
def header():
    if not HEADER.is_file():
        pytest.skip(f"needs the source tree ({HEADER})")
    return re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)


def ctypes_kind(declaration):
    """The class of ctypes types that a C parameter or result may have."""
    if "*" in declaration:
        return "pointer"
    base = declaration.replace("const", "").split()[0]
    return {"void": "none", "lplb_status": "int32", "lplb_dtype": "int32", "int32_t": "int32", "int64_t": "int64"}[base]


def declared_kind(kind):
    if kind is None:
        return "none"
    if kind in (ctypes.c_void_p, ctypes.c_char_p) or issubclass(kind, ctypes._Pointer):
        return "pointer"
    return {ctypes.c_int32: "int32", ctypes.c_int64: "int64"}[kind]


def test_signatures_equal_the_header(header):
    library = _c.load()
    prototypes = re.findall(r"^((?:const char \*|lplb_status |int32_t |int64_t |void )\s*)(lplb_\w+)\(([^;]*)\);", header, flags=re.M)
    assert len(prototypes) >= 21
    for result, name, parameters in prototypes:
        if not hasattr(library, name.removeprefix("lplb_")):
            assert name in STEPS  # of an exchange of one's own, which Python does not take
            continue
        function = getattr(library, name.removeprefix("lplb_"))
        assert declared_kind(function.restype) == ctypes_kind(result), name
        wanted = [] if parameters.strip() == "void" else [ctypes_kind(p) for p in parameters.split(",")]
        assert [declared_kind(kind) for kind in function.argtypes] == wanted, name


def test_structs_equal_the_header(header):
    c_types = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "const int32_t *": ctypes.c_void_p,
               "const void *": ctypes.c_void_p, "const int64_t *": ctypes.c_void_p, "const double *": ctypes.c_void_p,
               "double *": ctypes.c_void_p, "double": ctypes.c_double, "int32_t *": ctypes.c_void_p, "int64_t *": ctypes.c_void_p, "lplb_dtype": ctypes.c_int32}
    for name, struct in (("lplb_config", _c.Config), ("lplb_group_info", _c.GroupInfoStruct), ("lplb_plan_info", _c.PlanInfoStruct),
                         ("lplb_layout", _c.LayoutStruct), ("lplb_place_config", _c.PlaceConfig),
                         ("lplb_placement_report", _c.PlacementReportStruct), ("lplb_metrics", _c.MetricsStruct)):
        body = re.search(rf"typedef struct {name} \{{(.*?)\}}", header, flags=re.S).group(1)
        fields = re.findall(r"^\s*((?:const )?(?:int32_t|int64_t|double|void) \*|int64_t|int32_t|uint32_t|double|lplb_dtype)\s*(\w+)(\[[^\]]*\])?;", body, flags=re.M)
        assert [field for _, field, _ in fields] == [field[0] for field in struct._fields_], name
        for (c_type, field, array), (_, kind) in zip(fields, struct._fields_):
            if array:
                assert kind._length_ * 32 == constant(header, "LPLB_MAX_RANKS")
            else:
                assert kind is c_types[c_type], f"{name}.{field}"


def constant(header, name):
    return int(re.search(rf"\b{name}\s*=?\s*\(?(-?\d+)", header).group(1))


def test_constants_equal_the_header(header):
    assert _c.VERSION == tuple(constant(header, f"LPLB_VERSION_{part}") for part in ("MAJOR", "MINOR", "PATCH"))
    assert lplb.__version__ == ".".join(map(str, _c.VERSION))
    statuses = dict(re.findall(r"LPLB_ERROR_(\w+) = (\d+)", header))
    assert sorted(errors.BY_STATUS) == sorted(int(number) for number in statuses.values())
    assert _c.ERROR_BUSY == int(statuses["BUSY"])
    for name in ("INT32", "INT64", "DEVICE_CPU", "WHOLE_BATCH", "RECORD_HISTORY", "RECORD_METRICS", "ANY_PLAN"):
        assert getattr(_c, name) == constant(header, f"LPLB_{name}"), name
    assert f"#define LPLB_METRICS_ONE (INT64_C(1) << {_c.METRICS_ONE.bit_length() - 1})\n" in header
    assert _c.SOLVERS == {"flow": constant(header, "LPLB_SOLVER_FLOW"), "ipm": constant(header, "LPLB_SOLVER_IPM")}
    for name in ["MAX_RANKS", "MAX_LAYOUT_ROWS", *(name for name in vars(_c) if name.startswith("LAYOUT_"))]:
        assert getattr(_c, name) == constant(header, f"LPLB_{name}"), name


def test_loaded_library_is_this_version():
    number = _c.load().version()
    assert (number // 10000, number // 100 % 100) == _c.VERSION[:2]
    assert _c.load().build_info()
    assert _c.load().status_string(1) == b"invalid argument"


def test_exceptions_are_the_matching_python_ones():
    for status, kind in errors.BY_STATUS.items():
        error = _c.failure(status, "words")
        assert type(error) is kind and isinstance(error, lplb.LplbError) and str(error) == "words"
        assert str(_c.failure(status, "")) == _c.load().status_string(status).decode()
    assert isinstance(_c.failure(77, "odd"), lplb.InternalError)
    assert issubclass(lplb.InvalidArgument, ValueError) and issubclass(lplb.LibraryError, ImportError)
    assert issubclass(lplb.OutOfMemory, MemoryError) and issubclass(lplb.PeerTimeout, TimeoutError)
    assert issubclass(lplb.Unsupported, NotImplementedError)


def python(code, **environment):
    """Runs code in a fresh interpreter, where nothing is loaded yet."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment})


FIRST_USE = "import lplb\ntry:\n    lplb.solve([1], [0], 1)\nexcept ImportError as error:\n    assert isinstance(error, lplb.LplbError)\n    print(error)"


def test_import_needs_no_library_and_no_torch(tmp_path):
    done = python("import sys, lplb\nassert 'torch' not in sys.modules\nassert lplb.Planner and lplb.topology", LPLB_LIBRARY=str(tmp_path / "none.so"))
    assert done.returncode == 0, done.stderr


def test_missing_library_says_where_it_looked(tmp_path):
    path = str(tmp_path / "none.so")
    done = python(FIRST_USE, LPLB_LIBRARY=path)
    assert path in done.stdout and "LPLB_LIBRARY" in done.stdout, done.stderr


def test_missing_packaged_library_says_where_it_looked(tmp_path):
    package = tmp_path / "lplb"
    shutil.copytree(Path(lplb.__file__).parent, package, ignore=shutil.ignore_patterns("lib", "__pycache__", "data"))
    done = python("import os\nos.environ.pop('LPLB_LIBRARY', None)\n" + FIRST_USE, PYTHONPATH=str(tmp_path))
    assert str(package / "lib" / "liblplb.so.0") in done.stdout and "LPLB_LIBRARY" in done.stdout, done.stderr


def test_broken_library_is_refused(tmp_path):
    path = tmp_path / "broken.so"
    path.write_text("this is no library")
    done = python(FIRST_USE, LPLB_LIBRARY=str(path))
    assert "cannot load" in done.stdout and str(path) in done.stdout, done.stderr


@pytest.mark.parametrize("version, words", [(10000, "1.0.0"), (100, "0.1.0"), (200, "lplb_status_string"), (None, "lplb_version")])
def test_other_library_is_refused(tmp_path, version, words):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, path = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text("int unrelated;" if version is None else f"int lplb_version(void) {{ return {version}; }}")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    done = python(FIRST_USE, LPLB_LIBRARY=str(path))
    assert words in done.stdout and str(path) in done.stdout, done.stdout + done.stderr


def test_a_limit_of_one_solver_is_named_with_its_value():
    """Before a GPU is looked for, so that the words are the same on every machine."""
    config = _c.Config(struct_size=ctypes.sizeof(_c.Config), device=0, solver=_c.SOLVERS["ipm"], ep_size=256, rank=_c.WHOLE_BATCH,
                            n_nodes=1, n_logical=512, n_physical=768, group_size=256)
    planner, message = ctypes.c_void_p(), ctypes.create_string_buffer(_c.MESSAGE_SIZE)
    status = _c.load().planner_create(ctypes.byref(config), ctypes.byref(planner), message, len(message))
    assert errors.BY_STATUS[status] is errors.Unsupported and planner.value is None
    assert message.value == b"group_size: must be at most 128 for LPLB_SOLVER_IPM, got 256"


def test_limits_equal_the_header(header):
    for name in ("RANKS", "EP_SIZE", "LOGICAL", "PHYSICAL", "LOGICAL_CUDA"):
        assert getattr(_c, f"MAX_{name}") == int(re.search(rf"#define LPLB_MAX_{name} (\d+)", header).group(1)), name
    assert int(re.search(r"#define LPLB_MAX_LOAD \(INT64_C\(1\) << (\d+)\)", header).group(1)) == _c.MAX_LOAD.bit_length() - 1
    powers = {2**20: "2^20", 2**31 - 1: "2^31 - 1"}  # limits that the header gives in words
    comments = HEADER.read_text()
    for words in (f"n_chunks lies in 1 .. {_c.MAX_CHUNKS} ", f"n_physical <= {powers[_c.MAX_EPLB_PHYSICAL]};", f"n_ids (at most {powers[_c.MAX_IDS]})"):
        assert words in comments, words
