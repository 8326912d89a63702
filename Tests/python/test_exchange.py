"""The exchange of counts: agreeing on a way and falling back together, with several processes; what the C interface refuses, without a GPU."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lplb import _c, errors

torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs a PyTorch with gloo", allow_module_level=True)

from lplb import _exchange_c, _rail, exchange  # noqa: E402

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
    assert same_everywhere(ranks, "plain", "kind", "reason", "native", "right") == ["nccl", "", False, True]
    assert all(not seen["plain"]["log"] for seen in ranks)  # there was nothing to choose
    too_few, floating, other_type, closed = same_everywhere(ranks, "plain", "refused")[0]
    assert "n_counts = 8" in too_few and "[7]" in too_few
    assert "int32 or int64" in floating and "torch.int64" in other_type and "close()" in closed


def test_what_cannot_be_is_refused_on_all_ranks(ranks):
    kind, words = same_everywhere(ranks, "symm on the CPU", "error", "words")
    assert kind == "Unsupported" and "'symm' is not possible here" in words and "CPU" in words
    assert len({seen["different counts"] for seen in ranks}) == 1
    assert "rank 0 asks for ('auto', 8" in ranks[0]["different counts"] and "rank 2 for ('auto', 9" in ranks[0]["different counts"]


@pytest.mark.parametrize("name, kind, reason", [
    ("all fine", "symm", ""),
    ("symm fails in its first step", "ipc", "symm: rank 2: symm cannot prepare"),
    ("symm fails in its second step", "ipc", "symm: rank 0: symm cannot connect (and 1 more)"),
    ("symm brings wrong counts", "ipc", "symm: rank 1: 5 of 160 counts were wrong in the trial"),
    ("both fail", "nccl", "symm: rank 1: symm cannot prepare; ipc: rank 2: ipc cannot connect"),
    ("ipc asked for", "ipc", ""),
    ("nccl asked for", "nccl", ""),
    ("mixed hosts", "nccl", "the ranks of a host are not consecutive in the group"),
    ("uneven hosts", "nccl", "the hosts have different numbers of ranks"),
])
def test_all_ranks_choose_the_same(ranks, name, kind, reason):
    assert same_everywhere(ranks, name, "kind", "reason") == [kind, reason]
    for rank, seen in enumerate(ranks):
        lines = seen[name]["log"]
        assert len(lines) == (1 if reason and rank == 0 else 0)  # one line, on one rank, and only to say why not something faster
        assert not lines or reason in lines[0]
    assert reason in ranks[0][name]["repr"]


def test_a_way_that_is_asked_for_does_not_fall_back(ranks):
    kind, words = same_everywhere(ranks, "ipc asked for and fails", "error", "words")
    assert kind == "Unsupported" and words == "exchange: 'ipc' is not possible here: ipc: rank 3: ipc cannot prepare"
    assert same_everywhere(ranks, "nodes that do not divide", "error")[0] == "InvalidArgument"


def test_failed_ways_are_taken_back(ranks):
    # After its first step nobody may use it, so it is freed; one that failed in the trial is closed before.
    for name in ("symm fails in its first step", "symm fails in its second step"):
        assert all(seen[name]["freed"] == ["symm"] for seen in ranks)
    assert same_everywhere(ranks, "symm brings wrong counts", "closed", "freed") == [["symm"], ["symm"]]
    assert same_everywhere(ranks, "all fine", "closed", "freed") == [[], []]
    # The trial must not trap, and waits no longer than the user would; then the user's limits hold.
    assert same_everywhere(ranks, "all fine", "limits")[0] == [[30.0, "report"], [30.0, "trap"]]


def test_rails_are_taken_back_too(ranks):
    # Whoever is refused frees everything, and on all ranks alike: symmetric memory is freed by all of them together, or all wait for ever.
    for name, freed in (("the rail is not connected", ["rail connected"]), ("the way fails beside a rail", ["symm", "rail connected"]),
                        ("the trial fails beside a rail", ["symm", "rail connected"])):
        assert same_everywhere(ranks, name, "error", "freed") == ["Unsupported", freed]
    for rank, seen in enumerate(ranks):  # what is local is freed where it was made
        assert seen["the rail is not created"]["freed"] == [f"rail {'nothing' if rank == 1 else 'created'}"]


def test_an_exception_on_one_rank_leaves_nothing_behind(ranks):
    for rank, seen in enumerate(ranks):
        for stage in ("prepare", "connect"):
            ended = seen[f"interrupted in {stage}"]
            assert ended["ended"] == ("KeyboardInterrupt" if rank == 2 else "PeerTimeout")
            # Others may still write to this rank's memory, so it is freed with the group; a rail then without the others.
            assert ended["before"] == [] and ended["freed"] == ["symm", "rail connected, alone"] and ended["abandoned"] == ["symm"]


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
        monkeypatch.setattr(_rail, "_plugin", None)
        with pytest.raises(errors.LibraryError, match="belongs to another version of lplb"):
            _rail.load_plugin()


def test_hosts_become_nodes(ranks):
    assert same_everywhere(ranks, "two hosts", "layout", "kind", "rail") == [[2, 2], "symm", "nccl"]
    assert same_everywhere(ranks, "emulated nodes", "layout", "rail") == [[4, 1], "nccl"]
    assert same_everywhere(ranks, "all fine", "layout", "rail") == [[1, 4], None]


def test_memory_is_freed_when_all_ranks_have_closed(ranks):
    for seen in ranks:
        assert seen["freed while one is open"] == ["symm"]  # the first of two
        assert seen["freed when all are closed"] == ["symm", "symm"]
        assert seen["freed at last"] == ["symm", "symm", "symm"]


@pytest.mark.parametrize("hosts, nodes, expected", [
    ("aaaa", None, (1, 4)), ("aabb", None, (2, 2)), ("abcd", None, (4, 1)), ("a" * 72, None, (1, 72)), ("a" * 144, 2, (2, 72)),
    ("a" * 73, None, "more than"), ("aab", None, "different numbers"), ("abba", None, "not consecutive"), ("aabbb" "c", None, "different"),
])
def test_layout(hosts, nodes, expected):
    for rank in (0, len(hosts) // 2, len(hosts) - 1):
        if isinstance(expected, str):
            with pytest.raises(exchange.Refused, match=expected):
                exchange.layout_of(list(hosts), rank, nodes)
        else:
            layout = exchange.layout_of(list(hosts), rank, nodes)
            assert (layout.n_nodes, layout.per_node) == expected and layout.rank == rank and layout.ranks == len(hosts)
            assert hosts[layout.node * layout.per_node] == hosts[rank] or nodes is not None


def test_deep_ep_buffers_are_known_by_what_they_have():
    exchange.check_deep_ep(SimpleNamespace(group_size=8, runtime=object()), 8)
    exchange.check_deep_ep(SimpleNamespace(num_ranks=8, num_rdma_ranks=1), 8)
    with pytest.raises(errors.InvalidArgument, match="ep_size = 8 ranks, got 4"):
        exchange.check_deep_ep(SimpleNamespace(num_ranks=4), 8)
    with pytest.raises(errors.InvalidArgument, match="Buffer or ElasticBuffer, got SimpleNamespace"):
        exchange.check_deep_ep(SimpleNamespace(), 8)


@pytest.mark.parametrize("arguments, words", [
    ({"kind": "pigeon"}, "kind: must be one of auto, symm, ipc, nccl, got 'pigeon'"),
    ({"rail": "train"}, "rail: must be one of auto, nccl, nvshmem, got 'train'"),
    ({"policy": "shrug"}, "policy: must be one of trap, report, got 'shrug'"),
    ({"timeout": -1.0}, "timeout: must lie in 0 ... 2,000,000 seconds, got -1.0"),
    ({"n_counts": 0}, "n_counts: must be at least 1, got 0"),
    ({"device": "xpu"}, "device: must be 'cpu' or a CUDA device, got 'xpu'"),
])
def test_arguments_are_refused_before_anybody_is_asked(arguments, words):
    with pytest.raises(errors.InvalidArgument, match=re.escape(words)):
        exchange.create(None, arguments.pop("device", "cpu"), arguments.pop("n_counts", 8), **arguments)


# ---- the C interface ---------------------------------------------------------------------------------------------------------------


def config(**changes):
    fields = {"device": 0, "policy": 0, "n_ranks": 8, "rank": 3, "n_counts": 256, "n_nodes": 1, "node": 0, "timeout_ms": 30000,
              "first_epoch": 1, "struct_size": ctypes.sizeof(_exchange_c.ExchangeConfig)}
    return _exchange_c.ExchangeConfig(**{**fields, **changes})


def call(function, *arguments):
    message = ctypes.create_string_buffer(_c.MESSAGE_SIZE)
    status = function(*arguments, message, len(message))
    return status, message.value.decode()


def test_buffer_bytes():
    size = ctypes.c_int64()
    for n_ranks, n_counts, expected in ((8, 256, 2 * 8 * 128 * 16), (72, 1, 2 * 72 * 16), (1, 255, 2 * 128 * 16)):
        sizes = config(n_ranks=n_ranks, rank=0, n_counts=n_counts)
        assert call(_exchange_c.load().buffer_bytes, ctypes.byref(sizes), ctypes.byref(size)) == (0, "")
        assert size.value == expected


@pytest.mark.parametrize("changes, words", [
    ({"struct_size": 8}, "struct_size: must be sizeof(lplb_exchange_config)"),
    ({"n_ranks": 0}, "n_ranks: must lie in 1 ... 72, got 0"), ({"n_ranks": 73}, "n_ranks: must lie in 1 ... 72, got 73"),
    ({"rank": 8}, "rank: must lie in 0 ... 7, got 8"), ({"rank": -1}, "rank: must lie in 0 ... 7, got -1"),
    ({"n_counts": 0}, "n_counts: must lie in 1 ... 4097, got 0"), ({"n_counts": 4098}, "got 4098"),
    ({"n_nodes": 0}, "n_nodes: must lie in 1 ... 1024, got 0"), ({"node": 1}, "node: must lie in 0 ... 0, got 1"),
    ({"n_nodes": 2}, "rail: must not be NULL when n_nodes is above 1"), ({"device": -1}, "device: must lie in 0 ..."),
    ({"first_epoch": 2**32}, "first_epoch: must lie in 0 ... 4294967295, got 4294967296"), ({"first_epoch": -1}, "got -1"),
])
def test_configs_are_refused_in_words(changes, words):
    size = ctypes.c_int64(7)
    status, message = call(_exchange_c.load().buffer_bytes, ctypes.byref(config(**changes)), ctypes.byref(size))
    assert status == 1 and words in message and size.value == 7


def test_a_rail_is_refused_in_words():
    rail = _exchange_c.RailOps(struct_size=ctypes.sizeof(_exchange_c.RailOps))
    size = ctypes.c_int64()
    with_rail = config(n_nodes=2, rail=ctypes.pointer(rail))
    assert "rail.all_gather: must not be NULL" in call(_exchange_c.load().buffer_bytes, ctypes.byref(with_rail), ctypes.byref(size))[1]
    for other in (1, 32, 41):
        rail.struct_size = other
        assert "rail.struct_size" in call(_exchange_c.load().buffer_bytes, ctypes.byref(with_rail), ctypes.byref(size))[1]
    # An older caller's struct ends after destroy.
    rail.struct_size = 40
    assert "rail.all_gather: must not be NULL" in call(_exchange_c.load().buffer_bytes, ctypes.byref(with_rail), ctypes.byref(size))[1]
    rail.all_gather = _exchange_c.RAIL_GATHER(lambda *_: 0)
    for known in (40, 48, 56, 64):
        rail.struct_size = known
        assert call(_exchange_c.load().buffer_bytes, ctypes.byref(with_rail), ctypes.byref(size)) == (0, "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    made = ctypes.c_void_p()
    blob = ctypes.create_string_buffer(_exchange_c.BLOB_BYTES)
    status, message = call(_exchange_c.load().begin, ctypes.byref(config()), ctypes.byref(made), blob)
    assert status == 6 and "device 0" in message and made.value is None
    buffers = (ctypes.c_void_p * 8)(*[4096] * 8)
    status, message = call(_exchange_c.load().create, ctypes.byref(config()), buffers, ctypes.byref(made))
    assert status == 6 and made.value is None


def test_null_is_refused_and_harmless():
    functions = _exchange_c.load()
    assert functions.finish(None, None) == functions.all_gather(None, None, None, None) == functions.set_limits(None, 0, 0) == 1
    assert functions.get_report(None, None) == functions.planner_attach_exchange(None, None) == 1
    functions.abort(None), functions.close(None), functions.destroy(None)
    assert b"must not be NULL" in functions.error(None)
    assert call(functions.begin, None, None, None)[0] == 1


def test_structs_equal_the_header():
    if not HEADER.is_file():
        pytest.skip(f"needs the source tree ({HEADER})")
    header = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    for name, struct in (("lplb_exchange_config", _exchange_c.ExchangeConfig), ("lplb_exchange_report", _exchange_c.ReportStruct),
                         ("lplb_rail_ops", _exchange_c.RailOps)):
        body = re.search(rf"typedef struct {name} \{{(.*?)\}}", header, flags=re.S).group(1)
        fields = [(kind.strip(), field) for kind, pointed, field in re.findall(r"^\s*([\w ]+ \*?)(\(\*)?(\w+)\)?[^;]*;", body, flags=re.M)]
        assert [field for _, field in fields] == [field[0] for field in struct._fields_], name
        for (kind, field), (_, c_type) in zip(fields, struct._fields_):
            scalar = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "uint32_t": ctypes.c_uint32}.get(kind)
            assert scalar is c_type or ctypes.sizeof(c_type) == ctypes.sizeof(ctypes.c_void_p), f"{name}.{field}"
    for name, value in (("LPLB_EXCHANGE_BLOB_BYTES", _exchange_c.BLOB_BYTES), ("LPLB_EXCHANGE_MAX_RANKS", _exchange_c.MAX_RANKS),
                        ("LPLB_EXCHANGE_MAX_NODES", _exchange_c.MAX_NODES), ("LPLB_EXCHANGE_TRAP", _c.POLICIES["trap"]),
                        ("LPLB_EXCHANGE_REPORT", _c.POLICIES["report"]), ("LPLB_EXCHANGE_TIMED_OUT", _exchange_c.TIMED_OUT),
                        ("LPLB_EXCHANGE_ABORTED", _exchange_c.ABORTED), ("LPLB_EXCHANGE_LOST", _exchange_c.LOST),
                        ("LPLB_EXCHANGE_DISAGREED", _exchange_c.DISAGREED)):
        assert int(re.search(rf"\b{name}\s*=?\s*(\d+)", header).group(1)) == value, name


@pytest.mark.parametrize("reason, aborted", [(None, False), ("disagreed", False), ("timed out", True), ("aborted", True), ("lost", True)])
def test_only_what_may_still_wait_is_aborted_before_it_is_freed(reason, aborted):
    """Ranks that disagreed have all found out in the same call: nobody waits, and the rail's communicator serves the next exchange."""
    from lplb._exchange import Report
    from lplb._exchange_state import GroupState

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
