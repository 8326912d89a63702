"""Ordinary troubles: planners in modules that are copied, saved and loaded; forked processes; and the ten likeliest mistakes, each with the
message that the table of README.md shows."""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import lplb
from conftest import ROOT

torch = pytest.importorskip("torch")

from lplb.moe import MoELayer  # noqa: E402

HISTORY = np.random.default_rng(0).lognormal(0, 1, 64)
COUNTS = torch.from_numpy(np.random.default_rng(1).integers(0, 99, (8, 64)))


def saved_and_loaded(thing, **options):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False, **options)


AGAIN = [copy.copy, copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing)), saved_and_loaded]


# ---- copies and pickles ----


def by_topology():
    planner = lplb.Planner("cube", 80, 64, 8, rank=3, n_nodes=2, device="cpu", debug=True)
    planner.update_redundancy_mapping(HISTORY)
    return planner


def by_placement():
    slots = lplb.place(HISTORY[None], ep_size=8, slots=80).phy2log[0]
    planner = lplb.Planner.from_placement(np.roll(slots, 10), ep_size=8, n_logical=64, rank=3, n_nodes=4)
    planner.update_placement(slots)  # not the one it was made with
    return planner


def by_cost():
    planner = lplb.Planner.from_placement(lplb.place(HISTORY[None], ep_size=8, slots=80).phy2log[0], ep_size=8, n_logical=64, rank=3, unit=16)
    planner.set_capacity(speed=[1024] * 7 + [700], fixed=[0, 5] * 4)
    return planner


def recording():
    return lplb.Planner("cube", 80, 64, 8, rank=3, device="cpu", history=True, metrics=True)


@pytest.mark.parametrize("make", [by_topology, by_placement, by_cost, recording])
@pytest.mark.parametrize("again", AGAIN, ids=["copy", "deepcopy", "pickle", "torch.save"])
def test_a_planner_is_made_again(make, again):
    first = make()
    first.solve(np.asarray(COUNTS))
    other = again(first)
    assert (other.rank, other.n_nodes, other.debug, other.solver, other.tokens) == (
        first.rank, first.n_nodes, first.debug, first.solver, first.tokens)
    assert other.unit == first.unit and np.array_equal(other.speed, first.speed) and np.array_equal(other.fixed, first.fixed)
    if make is recording:
        assert first.history().sum() == COUNTS.sum() and other.history().sum() == 0 and other.metrics().plans == 0
    assert np.array_equal(other.phy2log, first.phy2log) and type(other.phy2log) is type(first.phy2log)
    with pytest.raises(lplb.WrongOrder, match="plan"):
        other.info()  # a plan is not kept
    other.solve(np.asarray(COUNTS))
    ids = np.random.default_rng(2).integers(-1, 64, (50, 4))
    assert (other.redirect(ids) == first.redirect(ids)).all() and other.info().groups == first.info().groups
    other.close()
    assert first.info().certified  # they share nothing


def test_a_closed_planner_is_not_copied():
    planner = by_topology()
    planner.close()
    for again in AGAIN:
        with pytest.raises(lplb.WrongOrder, match="close"):
            again(planner)


def layer_of_one_rank(**options):
    planner = lplb.Planner.from_placement(np.array([0, 1, 2, 3, 0, 1]), ep_size=1, device="cpu")
    return MoELayer(planner, 8, 4, **options)


@pytest.mark.parametrize("options", [{}, {"sharded": True}, {"grad_dtype": torch.float64}], ids=str)
@pytest.mark.parametrize("again", AGAIN[1:], ids=["deepcopy", "pickle", "torch.save"])
def test_a_layer_that_holds_a_planner(again, options):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), layer_of_one_rank(**options))
    given = torch.randn(10, 8), torch.randint(0, 4, (10, 2)), torch.rand(10, 2)
    before, other = model[1](*given), again(model)
    assert torch.equal(other[1](*given), before)
    other[1](*given).sum().backward()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1
    other[1].replicas.pull()
    assert not torch.equal(other[1](*given), before) and torch.equal(model[1](*given), before)


def test_parameters_keep_their_place_in_an_optimizer_that_is_copied_along():
    layer = layer_of_one_rank()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    other, its = copy.deepcopy((layer, optimizer))
    assert its.param_groups[0]["params"][0] is other.gate_up is other.replicas._held["gate_up"].parameter


def test_a_placement_that_the_replicas_have_not_followed_is_not_copied():
    layer = layer_of_one_rank()
    layer.replicas.planner.update_placement(np.array([0, 1, 2, 3, 2, 3]))
    with pytest.raises(lplb.WrongOrder, match=r"update\(\) must be called"):
        copy.deepcopy(layer)


def test_loading_without_the_group(monkeypatch):
    """The process group that a planner had is looked for where it is loaded."""
    kind, arguments, placement, history, _, capacity = by_topology().__reduce_ex__(2)[1]
    with pytest.raises(lplb.WrongOrder) as caught:
        lplb.saving.make_again(kind, arguments, placement, history, 8, capacity)
    assert str(caught.value).startswith("planner: was made with a process group of 8 ranks, and there is no process group here: load it ")
    with pytest.raises(lplb.InvalidArgument, match="group: must be a torch.distributed process group"), lplb.loading_group("mine"):
        raise AssertionError


# ---- fork ----


def in_a_fork(work):
    """What work() says in a forked process: the words of the LplbError, or its result."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                words = str(work())
            except lplb.LplbError as error:
                words = f"{type(error).__name__}: {error}"
            os.write(theirs, words.encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as stream:
        words = stream.read().decode()
    os.waitpid(child, 0)
    return words


def test_a_planner_on_the_cpu_works_in_a_fork():
    planner = by_topology()
    assert in_a_fork(lambda: planner.run(np.arange(64), None).tolist()) == str(planner.run(np.arange(64), None).tolist())


def test_a_planner_of_a_gpu_refuses_in_a_fork():
    """Played on the CPU: what decides is the device that the planner has, and in the parent nothing changes."""
    planner = by_topology()
    planner._handle.device = 0
    try:
        for call in (planner.info, planner.mapping, planner.split, lambda: planner._handle.check(1)):
            words = in_a_fork(call)
            assert words.startswith("WrongOrder: planner: belongs to the process that this one was forked from, and CUDA does not"), words
        assert in_a_fork(planner.close) == "None"
    finally:
        planner._handle.device = -1
    assert planner.mapping()[0].shape == (80,)


@pytest.mark.gpu
def test_cuda_in_a_fork():
    planner = lplb.Planner("cube", 80, 64, 8, device="cuda")
    ids = torch.arange(64, device="cuda")
    before = planner.run(ids, None)
    torch.cuda.synchronize()
    assert in_a_fork(lambda: planner.run(ids, None)).startswith("WrongOrder: planner: belongs to the process")
    assert in_a_fork(planner.close) == "None"
    for device in ("cuda", None):
        assert in_a_fork(lambda: lplb.Planner("cube", 80, 64, 8, device=device)).startswith("NoCuda: device: cannot be a GPU in a process")
    assert in_a_fork(lambda: lplb.Planner("cube", 80, 64, 8, device="cpu").run(np.arange(64), None).tolist()) == str(before.tolist())
    assert torch.equal(planner.run(ids, None), before)
    other = copy.deepcopy(planner)
    assert torch.equal(other.run(ids, None), before) and other.device == planner.device
    loaded = saved_and_loaded(planner, map_location="cpu")
    assert loaded.device == torch.device("cpu") and torch.equal(loaded.run(ids.cpu(), None), before.cpu())


OLD_DRIVER = """
int cuDriverGetVersion(int *version) { *version = 12080; return 0; }
int cuInit(unsigned flags) { return flags != 0; }
"""


def test_a_driver_of_cuda_12_is_named(tmp_path):
    """The library with a stand-in for the driver of CUDA 12.8, in a process of its own."""
    from lplb import _c

    compiler = shutil.which("gcc") or shutil.which("cc")
    if b"without CUDA" in _c.load().build_info() or compiler is None:
        pytest.skip("needs a library with CUDA and a C compiler")
    (tmp_path / "driver.c").write_text(OLD_DRIVER)
    subprocess.run([compiler, "-shared", "-fPIC", tmp_path / "driver.c", "-o", tmp_path / "libcuda.so.1"], check=True, timeout=60)
    code = ("import ctypes, lplb; from lplb import _c; config = _c.Config(device=0, ep_size=2, n_logical=4, n_physical=6)\n"
            "try: _c.call(_c.load().planner_create, ctypes.byref(config), ctypes.byref(ctypes.c_void_p()))\n"
            "except lplb.NoCuda as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)})
    assert re.search(r"cudaErrorInsufficientDriver: no driver here, or one that is older than CUDA 1\d\.\d of this build", done.stdout), done


# ---- the ten likeliest mistakes ----

PLAN = torch.zeros(4, 2, dtype=torch.int64)


def two_ranks(rank, store, words):
    """One of two ranks that place by histories of their own, and that forget to pull."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    planner = lplb.Planner(np.array([[1], [0]]), 8, 6, group=dist.group.WORLD, device="cpu")
    layer, said = MoELayer(planner, 8, 4), []
    with torch.no_grad():
        layer.down += 1  # what an optimizer does
    for work in (lambda: layer(torch.zeros(4, 8), PLAN, torch.ones(4, 2)),
                 lambda: (planner.update_redundancy_mapping(np.roll(np.arange(6.0), 2 * rank)), planner.run(PLAN, None))):
        try:
            work()
        except lplb.LplbError as error:
            said.append(str(error))
    words.put(said)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture
def words_of_two_ranks(tmp_path):
    context = multiprocessing.get_context("spawn")
    words = context.Queue()
    ranks = [context.Process(target=two_ranks, args=(rank, tmp_path / "store", words)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    said = [words.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join(60)
    assert said[0] == said[1] and len(said[0]) == 2, said
    return said[0]


def unfollowed_placement():
    layer = layer_of_one_rank()
    layer.replicas.planner.update_placement(np.array([0, 1, 2, 3, 2, 3]))
    layer(torch.zeros(4, 8), PLAN, torch.ones(4, 2))


def moved_module():
    layer = layer_of_one_rank().double()
    layer(torch.zeros(4, 8, dtype=torch.double), PLAN, torch.ones(4, 2))


def forked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    lplb.Planner("cube", 80, 64, 8)


MISTAKES = [
    lambda: lplb.Planner("cube", 80, 64),
    lambda: lplb.Planner("cube", 72, 64, 8),
    lambda: lplb.Planner.from_placement(np.array([0, 1, 3, 3]), ep_size=2),
    lambda: by_topology().run(torch.zeros(4, 2), None),
    lambda: by_topology().update_placement(np.zeros(80, dtype=int)),
    unfollowed_placement,
    moved_module,
    forked,
]


def shown_in_readme():
    """The messages of the README's table."""
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## Ordinary troubles"):]
    return re.findall(r"^\| [^|`]*(?:`[^`|]*`[^|`]*)*\| `([^`]*)` \|", table.split("\n## ")[0] + "\n", re.MULTILINE)


def matches(message, shown):
    return re.fullmatch(".*".join(map(re.escape, shown.split("..."))), message) is not None


def test_the_ten_likeliest_mistakes(words_of_two_ranks, monkeypatch, note):
    messages = shown_in_readme()
    said = []
    for mistake in MISTAKES:
        with pytest.raises(lplb.LplbError) as caught, monkeypatch.context() as patched:
            mistake(patched) if mistake is forked else mistake()
        said.append(str(caught.value))
    said += words_of_two_ranks
    for words in said:
        note(words)
    unseen = [words for words in said if not any(matches(words, shown) for shown in messages)]
    assert not unseen and len(messages) == len(said) == 10, (unseen, messages)
