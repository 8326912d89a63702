"""Hostile and damaged files: whatever the bytes, a reader gives a trace that can be played, or one sentence, without taking memory for
what is not there."""

from __future__ import annotations

import io
import json
import os
import struct
import time
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest

from lplb.cli import files
from lplb.cli.terminal import UsageError
from lplb.cli.bench import plot as bench_plot
from lplb.cli.simulate import options, trace

MIB = 1 << 20


def refusal(path, **given):
    """The sentence that refuses the trace."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor may a library print words of its own
        with pytest.raises(UsageError) as caught:
            trace.load(str(path), **given)
    words = str(caught.value)
    assert words.startswith(f"{path}: ") and len(words) < len(str(path)) + 400
    return words.removeprefix(f"{path}: ")


def npy(header, data=b"", version=1):
    """A .npy file with this header, written as it is."""
    text = header.encode("latin-1") if isinstance(header, str) else header
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + data


def header(descr="'<i8'", shape="(2, 1, 4)", order="False"):
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


def array_bytes(array, **how):
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asanyarray(array), **how)
    return out.getvalue()


def archive(path, arrays, packing=zipfile.ZIP_DEFLATED):
    """arrays: {name: an array, or the bytes of a .npy file}."""
    with zipfile.ZipFile(path, "w", packing) as out:
        for name, array in arrays.items():
            out.writestr(f"{name}.npy", array if isinstance(array, bytes) else array_bytes(array))
    return path


IDS = np.arange(24).reshape(4, 2, 3) % 8


# ---- good files of every kind ----

@pytest.mark.parametrize("dtype", ["<i8", ">i4", "<u2", "|i1", "|u1", ">u8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_as_numpy_reads_them(tmp_path, dtype, order):
    array = np.asarray(np.random.default_rng(1).integers(0, 100, (5, 3, 7)), dtype=dtype, order=order)
    for version in ((1, 0), (2, 0), (3, 0)):
        (tmp_path / "a.npy").write_bytes(array_bytes(array, version=version))
        ours = files.read_npy(str(tmp_path / "a.npy"))
        assert ours.dtype == array.dtype and (ours == array).all()
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", one=array, two=np.array(7), three=np.zeros(9))
        found, names = files.read_npz(str(tmp_path / "a.npz"), {"two": 100, "one": MIB, "none": 5})
        assert names == ["one", "two", "three"] and list(found) == ["two", "one"]
        assert (found["one"] == array).all() and found["two"].shape == () and found["two"] == 7


def test_headers_of_other_writers_are_read(tmp_path):
    data = np.arange(8, dtype="<i8").tobytes()
    for text in (header() + " " * 30 + "\n", '{"shape": (2,1,4), "fortran_order": False, "descr": "<i8"}', header(shape="(2L, 1L, 4L)"),
                 "{'fortran_order':False,'shape':( 2 , 1 , 4 ),'descr':'<i8',}"):
        (tmp_path / "a.npy").write_bytes(npy(text, data))
        assert trace.load(str(tmp_path / "a.npy")).data.tolist() == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


def test_names_and_sources_of_every_kind(tmp_path):
    for source, wanted in ((np.array("text"), "text"), (np.array(["one"]), "one"), (np.array("süß".encode()), "süß"),
                           (np.array(b"\xff"), "\ufffd"), (npy(header("'<U1'", "()"), b"\xff\xff\xff\xff"), "\ufffd"),
                           (np.array("a\ud800z"), "a\ufffdz"), (np.array("über", dtype=">U9"), "über")):
        loaded = trace.load(str(archive(tmp_path / "a.npz", {"topk_ids": IDS, "n_experts": np.array([8.0]), "source": source})))
        assert (loaded.source, loaded.n_experts) == (wanted, 8)


# ---- what an archive may hold ----

@pytest.mark.parametrize("value, shown", [
    (np.inf, "inf"), (np.nan, "nan"), (-np.inf, "-inf"), (np.array([8, 9]), "shape (2,)"), (np.array([]), "shape (0,)"), (3 + 4j, "(3+4j)"),
    (-3, "-3"), (0, "0"), (2.5, "2.5"), (10**18, "1000000000000000000"), (1e300, "1e+300"), (4097, "4097"), ("many", "<U4"),
    (np.float64(1e308) * np.ones((1, 1)), "1e+308"), (np.longdouble("1e4000"), "1e+4000"), (True, "True"), (np.zeros(20_000), "unpacks to"),
])
def test_n_experts_that_is_no_number_of_experts(tmp_path, value, shown):
    words = refusal(archive(tmp_path / "a.npz", {"topk_ids": IDS, "n_experts": value}))
    assert "n_experts" in words and shown in words


@pytest.mark.parametrize("value", [np.array(["a", "b"]), 3, np.array("x" * 20_000), 1j])
def test_sources_that_are_no_text(tmp_path, value):
    assert "source" in refusal(archive(tmp_path / "a.npz", {"topk_ids": IDS, "n_experts": 8, "source": value}))


@pytest.mark.parametrize("array, says", [
    (np.full((4, 2, 3), np.nan), "must be integers"), (IDS + 0j, "must be integers"), (IDS > 3, "must be integers"),
    (IDS.astype("U"), "must be integers"), (np.full((4, 2, 3), 2**64 - 1, dtype=np.uint64), "at most 4096 experts"),
    (np.full((1, 1, 1), 4096), "at most 4096 experts"), (IDS - 20, "-1 .. "), (IDS * 0 - 1, "no expert at all"), (IDS[0], "[tokens"),
    (IDS[:0], "none of them 0"), (np.zeros((2, 1025, 1), dtype=int), "at most 1024 layers"), (np.array(3), "[tokens"),
    (npy(header("'|O'")), "not plain numbers"), (b"", "ends after 0"), (b"no array at all", "does not begin"),
])
def test_ids_that_are_none(tmp_path, array, says):
    assert says in refusal(archive(tmp_path / "a.npz", {"topk_ids": array}))


def test_ids_beyond_the_stated_experts(tmp_path):
    assert "-1 .. 6, got 7" in refusal(archive(tmp_path / "a.npz", {"topk_ids": IDS, "n_experts": 7}))
    assert "-1 .. 6, got 7" in refusal(archive(tmp_path / "a.npz", {"topk_ids": IDS}), n_experts=7)


def test_packings_that_could_unpack_without_limit_are_refused_by_name(tmp_path):
    for packing, name in ((zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "LZMA")):
        assert f"packed by {name}" in refusal(archive(tmp_path / "a.npz", {"topk_ids": IDS}, packing))
    whole = bytearray(archive(tmp_path / "a.npz", {"topk_ids": IDS}).read_bytes())
    whole[whole.index(b"PK\1\2") + 10] = 77
    (tmp_path / "a.npz").write_bytes(whole)
    assert "method 77" in refusal(tmp_path / "a.npz")


def test_encrypted_archives(tmp_path):
    whole = bytearray(archive(tmp_path / "a.npz", {"topk_ids": IDS}).read_bytes())
    for sign, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        whole[whole.index(sign) + offset] |= 1
    (tmp_path / "a.npz").write_bytes(whole)
    assert "topk_ids is encrypted" in refusal(tmp_path / "a.npz")


def test_damaged_packing_and_checksums(tmp_path):
    good = archive(tmp_path / "a.npz", {"topk_ids": IDS.repeat(50, axis=0)}).read_bytes()
    begin = good.index(b"topk_ids.npy") + 12
    for at in range(begin, begin + 40):
        (tmp_path / "a.npz").write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1:])
        assert "not a readable .npz" in refusal(tmp_path / "a.npz") or "topk_ids" in refusal(tmp_path / "a.npz")
    stored = archive(tmp_path / "b.npz", {"topk_ids": IDS}, zipfile.ZIP_STORED).read_bytes()
    at = stored.index(b"PK\1\2") - 5  # in the ids themselves
    (tmp_path / "b.npz").write_bytes(stored[:at] + b"\1" + stored[at + 1:])
    assert "CRC" in refusal(tmp_path / "b.npz")


def test_files_that_are_of_another_kind(tmp_path):
    for name in ("a.npz", "a.npy", "a.json"):
        for content in (b"", b"\0", b"PK\3\4", b"PK\5\6" + bytes(18), b"\x93NUMPY", array_bytes(IDS), b"\x80\4\x95", b"\xff\xfe{}", b"{",
                        archive(tmp_path / "whole.npz", {"x": IDS}).read_bytes()):
            if name == "a.npy" and content == array_bytes(IDS):
                continue
            (tmp_path / name).write_bytes(content)
            refusal(tmp_path / name)


# ---- headers ----

@pytest.mark.parametrize("text, says", [
    (header(shape="(-1, 1, 4)"), "not that of an array"), (header(shape="(1e3, 1, 4)"), "not that of an array"),
    (header(shape=f"({'9' * 5000}, 1, 4)"), "not that of an array"), (header(shape="(2, True, 4)"), "not that of an array"),
    (header(shape="[2, 1, 4]"), "not that of an array"), (header(shape=f"({'2,' * 40})"), "40 dimensions"),
    (header(descr="[('a', '<i8')]"), "not that of an array"), (header(descr="'|O'"), "not plain numbers"),
    (header(descr="'<i3'"), ""), (header(descr="'<i999999999'"), ""), (header(descr="'<U999999999'", shape="()"), ""),
    (header(descr="'<U300000000'", shape="()"), "unpacks to"),
    (header(descr="'<M8[ns]'"), "not plain numbers"), (header(descr="'V8'"), "not plain numbers"), (header(descr="'<U0'"), "not plain"),
    (header(order="1"), "not that of an array"), (header()[:-1], "not that of an array"), (header() + header(), "not that of an array"),
    ("{'descr': '<i8', 'shape': (2, 1, 4)}", "not that of an array"), ("", "not that of an array"), ("{" * 9000, "not that of an array"),
    ("(" * 9000, "not that of an array"), ("-" * 9000 + "1", "not that of an array"), ("[" * 9000 + "]" * 9000, "too long"),
    (header().replace("descr", "d\x1b[31mscr"), "not that of an array"), ("{'a': " * 1400 + "}" * 1400, "not that of an array"),
])
def test_headers_that_are_none(tmp_path, text, says):
    (tmp_path / "a.npy").write_bytes(npy(text, bytes(64), version=2))
    words = refusal(tmp_path / "a.npy")
    assert says in words and words.isprintable()
    with pytest.raises(UsageError):
        options.topology(str(tmp_path / "a.npy"))


@pytest.mark.parametrize("shape", ["(1000000000000000000, 1, 4)", "(4294967296, 4294967296, 4294967296)", "(4000000000, 1, 4)",
                                   "(30000000, 1, 5)",
                                   "(9223372036854775807, 1, 1)", "(18446744073709551616, 1, 1)"])
def test_headers_with_huge_shapes_take_no_memory(tmp_path, shape):
    tracemalloc.start()
    try:
        for name, whole in (("a.npy", npy(header(shape=shape), bytes(64))),
                            ("a.npz", archive(tmp_path / "b.npz", {"topk_ids": npy(header(shape=shape), bytes(64))}).read_bytes())):
            (tmp_path / name).write_bytes(whole)
            words = refusal(tmp_path / name)
            assert "--unpack-limit" in words or "not that of an array" in words
        below = f"({900 * MIB // 32}, 1, 4)"  # within the limit, but not there
        (tmp_path / "a.npy").write_bytes(npy(header(shape=below), bytes(64)))
        assert "ends after 64 of 943,718,400 bytes" in refusal(tmp_path / "a.npy")
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()


def test_arrays_that_are_shorter_or_longer_than_stated(tmp_path):
    for data, says in ((bytes(63), "ends after 63 of 64"), (bytes(65), "followed by more"), (bytes(0), "ends after 0")):
        (tmp_path / "a.npy").write_bytes(npy(header(), data))
        assert says in refusal(tmp_path / "a.npy")
        assert says in refusal(archive(tmp_path / "a.npz", {"topk_ids": npy(header(), data)}))


# ---- bombs ----

def test_the_limit_on_what_an_archive_unpacks_to_and_the_option(tmp_path):
    path = archive(tmp_path / "a.npz", {"topk_ids": np.zeros((2 * MIB, 1, 4), dtype=np.int8), "n_experts": 64})
    assert path.stat().st_size < 100_000
    assert "unpacks to 8 MiB, and the limit is 7 MiB" in refusal(path, limit=7 * MIB)
    assert trace.load(str(path), limit=8 * MIB).data.shape == (2 * MIB, 1, 4)


@pytest.mark.parametrize("stated", [64, 8 * MIB + 128, 2**32 - 2])
def test_a_bomb_behind_a_small_header_takes_no_memory(tmp_path, stated):
    """64 MiB of zeros behind a header that states 8 MiB, in an archive that states another size."""
    bomb = npy(header(shape=f"({MIB // 4}, 1, 4)"), bytes(64 * MIB))
    whole = bytearray(archive(tmp_path / "a.npz", {"topk_ids": bomb}).read_bytes())
    del bomb
    at = whole.index(b"PK\1\2") + 24
    whole[at:at + 4] = struct.pack("<I", stated)
    (tmp_path / "a.npz").write_bytes(whole)
    tracemalloc.start()
    try:
        assert "not a readable .npz" in refusal(tmp_path / "a.npz", limit=8 * MIB)
        assert tracemalloc.get_traced_memory()[1] < 24 * MIB
    finally:
        tracemalloc.stop()


def test_an_archive_with_a_huge_directory(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as out:
        for i in range(12_000):
            out.writestr(f"{i:060}", b"")
    assert "its directory of" in refusal(tmp_path / "a.npz")


def test_long_json_is_refused_before_it_is_parsed(tmp_path):
    (tmp_path / "a.json").write_text(" " * MIB + json.dumps({"logical_count": [[1, 2]]}))
    assert "longer than 1 MiB" in refusal(tmp_path / "a.json", limit=16 * MIB)
    assert trace.load(str(tmp_path / "a.json"), limit=32 * MIB).n_experts == 2


# ---- JSON ----

@pytest.mark.parametrize("text, says", [
    ("[" * 100_000 + "]" * 100_000, "nested too deep"), ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deep"),
    ('{"logical_count": ' + "[" * 900 + "1" + "]" * 900 + "}", "numbers [layers][experts]"),
    ('{"logical_count": [[1, %s]]}' % ("9" * 400), "2^31"), ('{"logical_count": [[1, %s]]}' % ("9" * 50_000), "2^31"),
    ('{"logical_count": [[1, -%s]]}' % ("9" * 400), "whole numbers"), ('{"logical_count": [[1, 1e999]]}', "2^31"),
    ('{"logical_count": [[1, NaN]]}', "whole numbers"), ('{"logical_count": [[1, -Infinity]]}', "whole numbers"),
    ('{"logical_count": [[1, null]]}', "whole numbers"), ('{"logical_count": [[1, 9999999999999999999]]}', "2^31"),
    ('{"logical_count": [[1, {}]]}', "numbers [layers]"), ('{"logical_count": "12"}', "numbers [layers]"),
    ('{"logical_count": [[]]}', "numbers"),
    ('{"logical_count": null}', "numbers"), ("[]", "needs logical_count"), ("null", "needs logical_count"), ("7", "needs logical_count"),
    ('{"a": {"counts": [[1]]}, "b": {"counts": [[1, 2]]}}', "one shape"), ('{"a": {"counts": 3}}', "a.counts"), ('"\ud800"', "needs"),
    ('{"\\u001b[31m": {"counts": 3}}', "\\x1b[31m.counts"), ("{}{}", "not a readable .json"), ("\0" * 1000, "not a readable .json"),
    ('{"logical_count": [%s]}' % ",".join(["[1]"] * 1025), "at most 1024 layers"),
    ('{"logical_count": [[%s]]}' % ",".join(["1"] * 4097), "at most 4096 experts"),
])
def test_json_that_is_no_trace(tmp_path, text, says):
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert says in refusal(tmp_path / "a.json")


@pytest.mark.parametrize("counts, says", [
    (np.full((2, 1, 4), np.nan), "whole numbers"), (np.full((2, 1, 4), np.inf), "2^31"),
    (np.full((2, 1, 4), np.longdouble("1e4000")), "2^31"), (np.full((2, 1, 4), 1j), "complex"),
    (np.full((2, 1, 4), 0.5, dtype=np.float16), "whole"),
    (np.full((2, 1, 4), 2**63, dtype=np.uint64), "2^31"), (np.full((2, 1, 4), 2**29), "2^31"),
    (np.zeros((2, 1025, 4), dtype=int) + 1, "1024"),
    (np.ones((2, 1, 4), dtype=bool), "bool"), (np.ones((1, 1, 4097)), "4096"), (np.zeros((0, 1, 4)), "none of them 0"),
    (np.array(1), "shape"),
])
def test_counts_that_are_none(tmp_path, counts, says):
    np.save(tmp_path / "a.npy", counts)
    assert says in refusal(tmp_path / "a.npy")


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", ">u4", "u8", "f2", "f8"])
def test_counts_of_any_dtype_can_be_played(tmp_path, dtype):
    counts = np.random.default_rng(2).integers(0, 100, (9, 2, 8)).astype(dtype)
    np.save(tmp_path / "a.npy", counts)
    cut = trace.cut(trace.load(str(tmp_path / "a.npy")), 1000, 1, 0.3, 0)  # more ranks than an int8 can count
    assert (cut.history == counts[:2].astype(int).sum(axis=0)).all()
    assert (cut.counts(1, 3).sum(axis=0) == counts[5, 1]).all() and (cut.counts(1, 3) >= 0).all()


def test_traces_are_looked_at_in_blocks(tmp_path, monkeypatch):
    """Which lets a large trace of small numbers be read without several times its memory; the result is the same."""
    rng = np.random.default_rng(5)
    ids, counts = rng.integers(-1, 16, (50, 3, 4)).astype(np.int8), rng.integers(0, 100, (50, 3, 16)).astype(np.int8)
    archive(tmp_path / "a.npz", {"topk_ids": ids})
    np.save(tmp_path / "a.npy", counts)
    monkeypatch.setattr(trace, "BLOCK", 100)
    total = trace.total_counts(trace.load(str(tmp_path / "a.npz")), 41)
    assert total.tolist() == [[int((ids[:41, layer] == expert).sum()) for expert in range(16)] for layer in range(3)]
    assert trace.load(str(tmp_path / "a.npy")).data.tolist() == counts.tolist()
    counts[49, 2, 15] = -1
    np.save(tmp_path / "a.npy", counts)
    assert "at least 0" in refusal(tmp_path / "a.npy")


# ---- what is no ordinary file ----

def test_what_is_no_ordinary_file_is_not_waited_for(tmp_path):
    for name in ("a.npz", "a.npy", "a.json"):
        os.mkfifo(tmp_path / name)
        assert "is a pipe" in refusal(tmp_path / name)
        (tmp_path / f"zero-{name}").symlink_to("/dev/zero")
        assert "is a device" in refusal(tmp_path / f"zero-{name}")
        (tmp_path / f"folder-{name}").mkdir()
        assert "directory" in refusal(tmp_path / f"folder-{name}")
        (tmp_path / f"loop-{name}").symlink_to(tmp_path / f"loop-{name}")
        assert "cannot be read" in refusal(tmp_path / f"loop-{name}")
        assert "cannot be read" in refusal(tmp_path / ("x" * 300 + name))
        assert "no such file" in refusal(tmp_path / f"none-{name}")
        refusal(f"zero\0byte-{name}")


def test_files_that_may_not_be_read(tmp_path):
    (tmp_path / "a.npy").write_bytes(array_bytes(IDS))
    (tmp_path / "a.npy").chmod(0)
    root = os.geteuid() == 0
    if root:  # who may read everything
        os.seteuid(65534)
    try:
        assert "Permission denied" in refusal(tmp_path / "a.npy")
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("r2o, says", [
    (np.array([[0.5]]), "must hold integers"), (np.zeros((0, 2), dtype=int), "must hold integers"),
    (np.arange(2000)[:, None], "at most 1024"),
    (np.array([[2**64 - 1]], dtype=np.uint64), "permutation"), (np.array([["a"]]), "must hold integers"),
    (np.array([None]), "not plain numbers"),
])
def test_topologies_that_are_none(tmp_path, r2o, says):
    np.save(tmp_path / "a.npy", r2o, allow_pickle=True)
    with pytest.raises(UsageError, match=says):
        options.topology(str(tmp_path / "a.npy"))


@pytest.mark.parametrize("text", [
    "{}", "[]", '{"rows": []}', '{"rows": [[]]}', '{"rows": [{}]}', '{"rows": [{"p50_us": 1}]}', '{"rows": [{"p50_us": 1, "p99_us": "2"}]}',
    '{"rows": [{"p50_us": 1, "p99_us": NaN}]}', '{"rows": [{"p50_us": 1, "p99_us": 0}]}', '{"rows": [{"p50_us": 1, "p99_us": true}]}',
    '{"rows": [{"p50_us": 1, "p99_us": 1, "published_us": []}]}', '{"rows": [{"p50_us": 1, "p99_us": 1, "peer_us": "x"}]}',
    '{"rows": %s}' % json.dumps([{"p50_us": 1, "p99_us": 1}] * 501),
    "[" * 100_000, '{"rows": [{"p50_us": 1, "p99_us": 1%s}]}' % ("0" * 5000),
])
def test_bench_files_that_are_none(tmp_path, capsys, text):
    (tmp_path / "a.json").write_text(text)
    assert bench_plot.main([str(tmp_path / "a.json"), str(tmp_path / "a.png")]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith("lplb: ") and not (tmp_path / "a.png").exists()


# ---- fuzz ----

def good_traces():
    """{name: bytes} of a few hundred bytes each, so that most mutations hit something."""
    rng = np.random.default_rng(3)
    ids = rng.integers(-1, 16, (10, 2, 3)).astype(np.int16)
    counts = rng.integers(0, 50, (4, 2, 8))
    files = {}
    for name, save in (("stored.npz", np.savez), ("packed.npz", np.savez_compressed)):
        out = io.BytesIO()
        save(out, topk_ids=ids, n_experts=16, source="a source")
        files[name] = out.getvalue()
    files["counts.npy"] = array_bytes(counts)
    files["floats.npy"] = array_bytes(np.asfortranarray(counts.astype(np.float32)), version=(2, 0))
    files["snapshot.json"] = json.dumps({"logical_count": counts[0].tolist()}).encode()
    files["steps.json"] = json.dumps({f"step {i}": {"counts": step.tolist()} for i, step in enumerate(counts)}).encode()
    return files, ids


NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
WORDS = (b"-", b"9" * 30, b"'", b"(", b")", b"[", b"{", b"}", b",", b"e9", b"NaN", b"<f8", b"|O", b"\0", b"\x1b[2J", b"PK\1\2", b"PK\5\6",
         b"PK\6\6", b"True", b"null", b'"', b"\xff\xfe")


def mutated(whole, rng):
    """whole with one to four changes: bits, bytes, numbers in the binary headers, words, lost, doubled and swapped stretches, the end."""
    data = bytearray(whole)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(0, max(1, len(data))))
        size = int(rng.integers(1, 40))
        kind = int(rng.integers(0, 8))
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1 and data:
            data[at % len(data)] = int(rng.integers(0, 256))
        elif kind == 2:
            width = int(rng.choice([1, 2, 4, 8]))
            data[at:at + width] = (NUMBERS[int(rng.integers(0, len(NUMBERS)))] % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == 3:
            word = WORDS[int(rng.integers(0, len(WORDS)))]
            data[at:at + (len(word) if rng.random() < 0.5 else 0)] = word
        elif kind == 4:
            del data[at:at + size]
        elif kind == 5:
            data[at:at] = data[at:at + size]
        elif kind == 6:
            other = int(rng.integers(0, max(1, len(data))))
            data[at:at + size], data[other:other + size] = data[other:other + size], data[at:at + size]
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def usable(loaded):
    """What every reader promises of a trace, and that it can be cut."""
    assert loaded.data.ndim == (2 if loaded.kind == "snapshot" else 3) and loaded.data.size and 1 <= loaded.n_experts <= trace.MAX_EXPERTS
    assert loaded.data.dtype.kind in "iu" and int(loaded.data.max()) < (loaded.n_experts if loaded.kind == "ids" else 2**31)
    assert int(loaded.data.min()) >= (-1 if loaded.kind == "ids" else 0)
    loaded.describe().encode("ascii")
    cut = trace.cut(loaded, 2, 1, 0.25, 0)
    counts = cut.counts(0, 0)
    assert counts.shape == (2, loaded.n_experts) and (counts >= 0).all() and cut.history.shape == (loaded.n_layers, loaded.n_experts)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.filterwarnings("error")
def test_mutated_traces_are_read_or_refused_in_a_sentence(tmp_path, seed):
    files, ids = good_traces()
    rng = np.random.default_rng(seed)
    read = refused = 0
    end = time.monotonic() + 2.5  # a limit, not a target: 1,000 rounds take less on a machine at rest
    while time.monotonic() < end and read + refused < 6000:
        for name, whole in files.items():
            data = mutated(whole, rng)
            path = tmp_path / name
            path.write_bytes(data)
            try:
                loaded = trace.load(str(path), limit=16 * MIB)
                usable(loaded)
            except UsageError as error:
                assert str(error) and len(str(error)) < 600
                refused += 1
            except BaseException:
                (tmp_path / f"found-{name}").write_bytes(data)
                raise
            else:
                read += 1
                if loaded.kind == "ids":  # the archive's checksum covers them
                    assert (loaded.data == ids).all()
            try:
                options.topology(str(path))
            except UsageError:
                pass
    assert read > 20 and refused > 200, "the mutations must neither all be harmless nor all be fatal"


def test_truncated_traces_are_refused(tmp_path):
    files, _ = good_traces()
    for name, whole in files.items():
        for length in range(0, len(whole) - 1, 3):
            (tmp_path / name).write_bytes(whole[:length])
            refusal(tmp_path / name)


@pytest.mark.filterwarnings("error")
def test_damaged_headers_behind_a_right_checksum(tmp_path):
    """What zipfile finds nothing wrong with: the header of the array is parsed with care of our own."""
    rng = np.random.default_rng(9)
    whole = array_bytes(IDS)
    read = 0
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            data[int(rng.integers(0, 128))] = int(rng.integers(32, 127))
        path = archive(tmp_path / "a.npz", {"topk_ids": bytes(data), "n_experts": array_bytes(np.array(8))})
        try:
            loaded = trace.load(str(path), limit=MIB)
        except UsageError as error:
            assert str(error)
        else:
            usable(loaded)
            read += 1
    assert 0 < read < 250
