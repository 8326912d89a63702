"""The exchange of counts: falling back together, with several processes; what the C interface refuses, without a GPU."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from ctypes import c_char_p, c_int64, c_void_p
from pathlib import Path
from types import SimpleNamespace

import pytest

from lplb import _c, errors

torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs a PyTorch with gloo", allow_module_level=True)

from lplb import exchange  # noqa: E402
from lplb.exchange import rail as _rail  # noqa: E402
from lplb_structs import BLOB_BYTES, ExchangeConfig, function  # noqa: E402

PROCESSES = 4
HEADER = Path(__file__).resolve().parents[2] / "include" / "lplb.h"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the processes saw."""
    folder = tmp_path_factory.mktemp("exchange")
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONPATH": os.pathsep.join([str(here), *filter(None, sys.path)])}
    command = [sys.executable, str(here / "exchange_worker.py")]
    started = [subprocess.Popen([*command, str(rank), str(PROCESSES), str(folder / "store"), str(folder)], env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in range(PROCESSES)]
    try:
        words = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, words):
        assert process.returncode == 0, text
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


def same_everywhere(ranks, name, *keys):
    """The value, after checking that every rank has it."""
    values = [[seen[name][key] for key in keys] for seen in ranks]
    assert all(value == values[0] for value in values), values
    return values[0]


def test_without_gpus_torch_carries_the_counts(ranks):
    assert same_everywhere(ranks, "plain", "kind", "reason", "native", "right") == ["torch", "", False, True]
    assert all(not seen["plain"]["log"] for seen in ranks)  # there was nothing to choose
    too_few, floating, other_type, closed = same_everywhere(ranks, "plain", "refused")[0]
    assert "n_counts = 8" in too_few and "[7]" in too_few
    assert "int32 or int64" in floating and "torch.int64" in other_type and "close()" in closed


def test_what_cannot_be_is_refused_on_all_ranks(ranks):
    kind, words = same_everywhere(ranks, "ipc on the CPU", "error", "words")
    assert kind == "Unsupported"
    assert words == "exchange: 'ipc' is not possible here: NVLink joins GPUs, and ranks 0, 1, 2, 3 are on the CPU"
    kind, words = same_everywhere(ranks, "nodes that do not divide, by the library", "error", "words")
    assert kind == "InvalidArgument" and "n_nodes: must divide n_ranks, 4, got 3" in words
    assert len({seen["different counts"] for seen in ranks}) == 1
    assert "rank 0 asks for ('auto', 8" in ranks[0]["different counts"] and "rank 2 for ('auto', 9" in ranks[0]["different counts"]


@pytest.mark.parametrize("name, kind, reason", [
    ("all fine", "ipc", ""),
    ("the library refuses", "torch", "rank 2: no way to rank 1"),
    ("ipc asked for", "ipc", ""),
    ("symm asked for", "ipc", ""),
    ("torch asked for", "torch", ""),
    ("nccl asked for", "torch", ""),
    ("two hosts refused", "torch", "rail nccl: rank 1: no way"),
    ("uneven hosts", "torch", "rail nccl: rank 0: uneven"),
    ("three hosts", "torch", "rank 0: uneven"),
    ("nodes that do not divide", "torch", "rank 0: do not divide"),
])
def test_all_ranks_choose_the_same(ranks, name, kind, reason):
    assert same_everywhere(ranks, name, "kind", "reason") == [kind, reason]
    for rank, seen in enumerate(ranks):
        lines = seen[name]["log"]
        assert len(lines) == (1 if reason and rank == 0 else 0)  # one line, on one rank, and only to say why not something faster
        assert not lines or reason in lines[0]
    assert reason in ranks[0][name]["repr"]


def test_a_way_that_is_asked_for_does_not_fall_back(ranks):
    kind, words = same_everywhere(ranks, "ipc asked for and refused", "error", "words")
    assert kind == "Unsupported" and words == "exchange: 'ipc' is not possible here: rank 3: no way"
    assert same_everywhere(ranks, "torch asked for", "asked") == [[]]


def test_the_library_is_asked_for_what_the_user_wants(ranks):
    # n_nodes (0: one for each host), a rail, milliseconds, policy
    assert same_everywhere(ranks, "all fine", "asked", "done") == [[[0, False, 30000, 0]], []]
    assert same_everywhere(ranks, "ipc asked for", "asked") == [[[0, False, 5000, 1]]]
    assert same_everywhere(ranks, "two hosts", "asked") == [[[0, True, 30000, 0]]]
    assert same_everywhere(ranks, "three hosts", "asked") == [[[0, False, 30000, 0]]]
    assert same_everywhere(ranks, "emulated nodes", "asked") == [[[4, True, 30000, 0]]]
    # NVSHMEM's rail waits no longer than the trial in the trial, and then as long as the user wants.
    assert same_everywhere(ranks, "a rail that works", "limits", "taken", "done") == [[30000, 0, 100000], True, []]


def test_rails_are_taken_back(ranks):
    # Whoever is refused frees everything, and on all ranks alike: symmetric memory is freed by all of them together, or all wait for ever.
    assert same_everywhere(ranks, "the rail is not created", "error", "done") == ["Unsupported", ["rail nothing"]]
    assert same_everywhere(ranks, "the rail is not connected", "error", "done") == ["Unsupported", ["rail created"]]
    assert same_everywhere(ranks, "the library refuses beside a rail", "error", "done") == ["Unsupported", ["rail connected"]]


def test_an_exception_on_one_rank_leaves_nothing_behind(ranks):
    for rank, seen in enumerate(ranks):
        for step in (1, 2):
            ended = seen[f"interrupted in gather {step}"]
            assert ended["ended"] == ("KeyboardInterrupt" if rank == 2 else "PeerTimeout")
            # Others may still write to this rank's memory, so it is freed with the group; a rail then without the others.
            kept = ["aborted 99", "freed 99"] if step == 2 else []
            assert ended["before"] == [] and ended["done"] == [*kept, "rail connected, alone"]


def test_who_asks_again_while_the_others_are_connecting_is_told(ranks):
    words = "Disagreement: group: all ranks must make the same calls in the same order, but rank "
    for rank, seen in enumerate(ranks):
        assert seen["interrupted, and asked again"] == (
            ["KeyboardInterrupt: ", words + "0 maps and tries an exchange where this one sets up an exchange"] if rank == 2
            else [words + "2 sets up an exchange where this one maps and tries an exchange"])


def test_a_rank_that_releases_while_the_others_create_is_told(ranks):
    words = "Disagreement: group: all ranks must make the same calls in the same order, but rank "
    for rank, seen in enumerate(ranks):
        assert seen["another call"] == words + ("0 sets up an exchange where this one releases exchanges" if rank == 1
                                                else "1 releases exchanges where this one sets up an exchange")
        assert seen["after another call"] == [0, 1, 2, 3]


def test_asking_for_nvshmem_changes_nothing():
    environment = dict(os.environ)
    assert not _rail.nvshmem_is_running()
    if _rail.has_plugin():
        try:
            _rail.load_plugin()
        except errors.LibraryError:
            pass  # NVSHMEM itself is not installed
    assert dict(os.environ) == environment
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_char_p
    for name in (b"NVSHMEM_DISABLE_NVLS", b"NVSHMEM_SYMMETRIC_SIZE"):
        assert libc.getenv(name) == (environment[name.decode()].encode() if name.decode() in environment else None)


def test_a_plugin_of_another_version_is_refused(tmp_path, monkeypatch):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    for number, text in enumerate(("int lplb_nvshmem_abi(void) { return 1; }", "int unrelated;")):
        source, path = tmp_path / f"{number}.c", tmp_path / f"{number}.so"
        source.write_text(text)
        subprocess.run([compiler, "-shared", "-fPIC", "-o", path, source], check=True)
        monkeypatch.setenv("LPLB_NVSHMEM_PLUGIN", str(path))
        _rail.load_plugin.cache_clear()
        with pytest.raises(errors.LibraryError, match="belongs to another version of lplb"):
            _rail.load_plugin()


def test_hosts_become_nodes(ranks):
    assert same_everywhere(ranks, "two hosts", "layout", "kind", "rail") == [[2, 2], "ipc", "nccl"]
    assert same_everywhere(ranks, "emulated nodes", "layout", "rail") == [[4, 1], "nccl"]
    assert same_everywhere(ranks, "all fine", "layout", "rail") == [[1, 4], None]


def test_memory_is_freed_when_all_ranks_have_closed(ranks):
    for seen in ranks:
        assert seen["while one is open"] == 1  # the first of two
        assert seen["when all are closed"] == 2
        assert seen["at last"] == [3, 3]


def test_deep_ep_buffers_are_known_by_what_they_have():
    exchange.check_deep_ep(SimpleNamespace(group_size=8, runtime=object()), 8)
    exchange.check_deep_ep(SimpleNamespace(num_ranks=8, num_rdma_ranks=1), 8)
    with pytest.raises(errors.InvalidArgument, match="ep_size = 8 ranks, got 4"):
        exchange.check_deep_ep(SimpleNamespace(num_ranks=4), 8)
    with pytest.raises(errors.InvalidArgument, match="Buffer or ElasticBuffer, got SimpleNamespace"):
        exchange.check_deep_ep(SimpleNamespace(), 8)


@pytest.mark.parametrize("arguments, words", [
    ({"kind": "pigeon"}, "kind: must be one of auto, ipc, torch, got 'pigeon'"),
    ({"rail": "train"}, "rail: must be one of auto, nccl, nvshmem, got 'train'"),
    ({"policy": "shrug"}, "policy: must be one of trap, report, got 'shrug'"),
    ({"timeout": -1.0}, "timeout: must lie in 0 ... 2,000,000 seconds, got -1.0"),
    ({"n_counts": 0}, "n_counts: must be at least 1, got 0"),
    ({"first_epoch": -1}, "first_epoch: must be at least 0, got -1"),
    ({"first_epoch": 2**64 + 1}, f"first_epoch: must be at most {2**32 - 1}, got {2**64 + 1}"),  # ctypes would make it 1
    ({"first_epoch": 1.0}, "first_epoch: must be an integer, got 1.0"),
    ({"device": "xpu"}, "device: must be 'cpu' or a CUDA device, got 'xpu'"),
])
def test_arguments_are_refused_before_anybody_is_asked(arguments, words):
    with pytest.raises(errors.InvalidArgument, match=re.escape(words)):
        exchange.create(None, arguments.pop("device", "cpu"), arguments.pop("n_counts", 8), **arguments)


# ---- the C interface ---------------------------------------------------------------------------------------------------------------


def buffer_bytes():
    return function("exchange_buffer_bytes", c_void_p, c_void_p, c_char_p, c_int64)


def begin():
    return function("exchange_begin", c_void_p, c_void_p, c_void_p, c_char_p, c_int64)


def create():
    return function("exchange_create", c_void_p, c_void_p, c_void_p, c_char_p, c_int64)


def config(**changes):
    fields = {"device": 0, "policy": 0, "n_ranks": 8, "rank": 3, "n_counts": 256, "n_nodes": 1, "node": 0, "timeout_ms": 30000,
              "first_epoch": 1, "struct_size": ctypes.sizeof(ExchangeConfig)}
    return ExchangeConfig(**{**fields, **changes})


def call(function, *arguments):
    message = ctypes.create_string_buffer(_c.MESSAGE_SIZE)
    status = function(*arguments, message, len(message))
    return status, message.value.decode()


def test_buffer_bytes():
    size = ctypes.c_int64()
    for n_ranks, n_counts, expected in ((8, 256, 2 * 8 * 128 * 16), (72, 1, 2 * 72 * 16), (1, 255, 2 * 128 * 16)):
        sizes = config(n_ranks=n_ranks, rank=0, n_counts=n_counts)
        assert call(buffer_bytes(), ctypes.byref(sizes), ctypes.byref(size)) == (0, "")
        assert size.value == expected


@pytest.mark.parametrize("changes, words", [
    ({"struct_size": 9}, "struct_size: must be sizeof(lplb_exchange_config)"),
    ({"n_ranks": 0}, "n_ranks: must lie in 1 ... 72, got 0"), ({"n_ranks": 73}, "n_ranks: must lie in 1 ... 72, got 73"),
    ({"rank": 8}, "rank: must lie in 0 ... 7, got 8"), ({"rank": -1}, "rank: must lie in 0 ... 7, got -1"),
    ({"n_counts": 0}, "n_counts: must lie in 1 ... 4097, got 0"), ({"n_counts": 4098}, "got 4098"),
    ({"n_nodes": 0}, "n_nodes: must lie in 1 ... 1024, got 0"), ({"node": 1}, "node: must lie in 0 ... 0, got 1"),
    ({"n_nodes": 2}, "rail: must not be NULL when n_nodes is above 1"), ({"device": -1}, "device: must lie in 0 ..."),
    ({"first_epoch": 2**32}, "first_epoch: must lie in 0 ... 4294967295, got 4294967296"), ({"first_epoch": -1}, "got -1"),
])
def test_configs_are_refused_in_words(changes, words):
    size = ctypes.c_int64(7)
    status, message = call(buffer_bytes(), ctypes.byref(config(**changes)), ctypes.byref(size))
    assert status == 1 and words in message and size.value == 7


def test_a_rail_is_refused_in_words():
    rail = _c.RailOps(struct_size=ctypes.sizeof(_c.RailOps))
    size = ctypes.c_int64()
    with_rail = config(n_nodes=2, rail=ctypes.pointer(rail))
    assert "rail.all_gather: must not be NULL" in call(buffer_bytes(), ctypes.byref(with_rail), ctypes.byref(size))[1]
    for other in (1, 41, 60):
        rail.struct_size = other
        assert "rail.struct_size" in call(buffer_bytes(), ctypes.byref(with_rail), ctypes.byref(size))[1]
    # An older caller's struct may end after any field.
    rail.struct_size = 16
    assert "rail.all_gather: must not be NULL" in call(buffer_bytes(), ctypes.byref(with_rail), ctypes.byref(size))[1]
    rail.all_gather = _c.RAIL_GATHER(lambda *_: 0)
    for known in (24, 32, 40, 48, 56, 64):
        rail.struct_size = known
        assert call(buffer_bytes(), ctypes.byref(with_rail), ctypes.byref(size)) == (0, "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    made = ctypes.c_void_p()
    blob = ctypes.create_string_buffer(BLOB_BYTES)
    status, message = call(begin(), ctypes.byref(config()), ctypes.byref(made), blob)
    assert status == 6 and "device 0" in message and made.value is None
    buffers = (ctypes.c_void_p * 8)(*[4096] * 8)
    status, message = call(create(), ctypes.byref(config()), buffers, ctypes.byref(made))
    assert status == 6 and made.value is None


def test_null_is_refused_and_harmless():
    library = _c.load()
    assert function("exchange_finish", c_void_p, c_void_p)(None, None) == 1
    assert library.exchange_all_gather(None, None, None, None) == library.exchange_set_limits(None, 0, 0) == 1
    assert library.exchange_get_report(None, None) == library.planner_attach_exchange(None, None) == 1
    library.exchange_abort(None), library.exchange_close(None), library.exchange_destroy(None)
    assert b"must not be NULL" in library.exchange_error(None)
    assert call(begin(), None, None, None)[0] == call(library.exchange_connect, None, None)[0] == 1


def test_structs_equal_the_header():
    if not HEADER.is_file():
        pytest.skip(f"needs the source tree ({HEADER})")
    header = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    for name, struct in (("lplb_exchange_config", ExchangeConfig), ("lplb_connect_config", _c.ConnectConfig),
                         ("lplb_exchange_report", _c.ReportStruct),
                         ("lplb_rail_ops", _c.RailOps)):
        body = re.search(rf"typedef struct {name} \{{(.*?)\}}", header, flags=re.S).group(1)
        fields = [(kind.strip(), field) for kind, pointed, field in re.findall(r"^\s*([\w ]+ \*?)(\(\*)?(\w+)\)?[^;]*;", body, flags=re.M)]
        assert [field for _, field in fields] == [field[0] for field in struct._fields_], name
        for (kind, field), (_, c_type) in zip(fields, struct._fields_):
            scalar = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "uint32_t": ctypes.c_uint32}.get(kind)
            assert scalar is c_type or ctypes.sizeof(c_type) == ctypes.sizeof(ctypes.c_void_p), f"{name}.{field}"
    for name, value in (("LPLB_EXCHANGE_BLOB_BYTES", BLOB_BYTES), ("LPLB_EXCHANGE_TRAP", _c.POLICIES["trap"]),
                        ("LPLB_EXCHANGE_REPORT", _c.POLICIES["report"]), ("LPLB_EXCHANGE_FINE", 0),
                        *((f"LPLB_EXCHANGE_{reason.upper().replace(' ', '_')}", code) for code, reason in _c.REASONS.items())):
        assert int(re.search(rf"\b{name}\s*=?\s*(\d+)", header).group(1)) == value, name


@pytest.mark.parametrize("reason, aborted", [(None, False), ("disagreed", False), ("timed out", True), ("aborted", True), ("lost", True)])
def test_only_what_may_still_wait_is_aborted_before_it_is_freed(reason, aborted):
    """Ranks that disagreed have all found out in the same call: nobody waits, and the rail's communicator serves the next exchange."""
    from lplb.exchange.base import Report
    from lplb.exchange.native import GroupState

    class Closed:
        done = ""

        def report(self):
            return None if reason is None else Report(reason, 0, 1, 5, 0.0)

        def abort(self):
            self.done += "aborted "

        def free(self):
            self.done += "freed"

    state, exchange = GroupState(), Closed()
    state.closed[1] = exchange
    facts = state.facts()
    state.settle([facts, ({1: True}, False)])
    assert exchange.done == ("aborted freed" if aborted else "freed") and not state.closed
