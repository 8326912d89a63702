"""Whatever a caller hands in is used or refused: with an LplbError that names the argument, the rule and the value in one short line.

Every argument of every public function gets every hostile value, the others being right; then several get one at once, at random. A
refused call leaves the planner as it was. Without torch the values and the planners are numpy's alone.
"""

from __future__ import annotations

import random
import re
import warnings

import numpy as np
import pytest

import lplb
from lplb import Planner, eplb, topology
from lplb.cli import check

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]

CUBE = np.asarray(topology.CUBE_8P2E)
COUNTS = np.arange(64, dtype=np.int32)


class Raising:
    """Whose every method fails."""

    def fail(self, *_, **__):
        raise ZeroDivisionError

    __index__ = __int__ = __array__ = __len__ = __repr__ = __str__ = __iter__ = __eq__ = __bool__ = fail  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


def numpy_values():
    zeros = np.zeros(64, dtype=np.int64)
    values = {
        "np.float64": np.float64(2.5), "np.int64": np.int64(-1), "0-d": np.array(3), "empty": np.array([]), "0x0": np.empty((0, 0)),
        "objects": np.array([1, None], dtype=object), "object zeros": np.array([0] * 64, dtype=object), "strings": np.array(["a"] * 64),
        "complex": zeros.astype(complex), "dates": np.zeros(64, "M8[s]"), "records": np.zeros(64, [("a", "i8")]), "big-endian": np.zeros(64, ">i8"),
        "bools": np.zeros(64, bool), "halves": np.zeros(64, np.float16), "uint64": np.full(64, 2**64 - 1, np.uint64), "int8": np.zeros(64, np.int8),
        "long doubles": np.full(64, 10, np.longdouble) ** 300, "masked": np.ma.masked_all(64, dtype=np.int64), "matrix": zeros.reshape(8, 8).view(np.matrix),
        "read-only": np.broadcast_to(np.int64(0), (64,)), "strided": np.zeros(128, np.int64)[::2], "reversed": zeros[::-1],
        "Fortran": np.zeros((8, 8), np.int64, order="F"), "3-d": np.zeros((2, 2, 2), np.int64), "nans": np.full(64, np.nan),
        "infinities": np.full(64, np.inf), "least": np.full(64, -2**63), "largest": np.full(64, 2**63 - 1), "2^40+1": np.full(64, 2**40 + 1),
        "unaligned": np.frombuffer(b"\0" * 513, np.int64, offset=1), "2^36 zeros": np.broadcast_to(np.int64(0), (2**36,)),
        "2^44 zeros": np.broadcast_to(np.int64(0), (2**22, 2**22))}
    return values


def torch_values():
    zeros = torch.zeros(64, dtype=torch.int64)
    freed = torch.zeros(64, dtype=torch.int64)
    freed.untyped_storage().resize_(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layouts and types that PyTorch calls a beta
        return {
            "0-d tensor": torch.tensor(3), "empty tensor": zeros[:0], "3-d tensor": zeros[:8].view(2, 2, 2), "grad": torch.zeros(64, requires_grad=True),
            "sparse": zeros.to_sparse(), "csr": zeros.view(8, 8).to_sparse_csr(), "mkldnn": torch.zeros(64).to_mkldnn(), "meta": zeros.to("meta"),
            "quantized": torch.quantize_per_tensor(torch.zeros(64), 1.0, 0, torch.quint8), "conjugate": torch.zeros(64, dtype=torch.complex64).conj(),
            "negative view": torch._neg_view(torch.zeros(64)), "bool tensor": zeros.bool(), "bfloat16": zeros.bfloat16(), "short": zeros.short(),
            "nested": torch.nested.nested_tensor([zeros[:2], zeros[:3]]), "jagged": torch.nested.nested_tensor([zeros[:2], zeros[:3]], layout=torch.jagged),
            "least tensor": torch.full((64,), -2**63), "largest tensor": torch.full((64,), 2**63 - 1), "expanded": zeros[:1].expand(64),
            "2^36 expanded": zeros[:1].expand(2**36), "transposed": zeros.view(8, 8).T, "freed": freed, "device": torch.device("meta")}


VALUES = {
    "None": None, "True": True, "False": False, "text": "x", "no text": "", "long text": "x\n" * 10**6, "bytes": b"\xff", "2.5": 2.5, "nan": float("nan"),
    "inf": float("inf"), "-1": -1, "0": 0, "3": 3, "2^31": 2**31, "2^40": 2**40, "2^63": 2**63, "2^64": 2**64, "-2^63-1": -2**63 - 1,
    "many digits": 10**5000, "1j": 1j, "[]": [], "[1]": [1], "ragged": [[0, 1], [2]], "['flow']": ["flow"], "{}": {}, "{1}": {1}, "object": object(),
    "int": int, "...": ..., "Raising": Raising(), "function": abs, **numpy_values(), **(torch_values() if torch is not None else {})}

# What the library calls some arguments.
ALIASES = {"idx": "ids|n_ids", "workload": "counts|history", "n_sms": "max_blocks", "redundant_to_original": "r2o", "n_routed_experts": "n_physical",
           "n_logical_routed_experts": "n_logical", "local_workload_by_sm": "cumulative", "n": "m", "phy2log": "n_physical",
           "loads": "n_logical"}


def attempt(function, arguments, hostile):
    """True: accepted. False: refused as it should be, by the name of an argument (two may contradict each other). Else the test fails."""
    names = "|".join([*arguments, *(ALIASES[name] for name in arguments if name in ALIASES)])
    try:
        function(**{**arguments, **{name: VALUES[value] for name, value in hostile.items()}})
    except lplb.LplbError as error:
        if isinstance(error, lplb.InternalError) and function is check.conserve:
            return True  # that is its verdict
        words = str(error)
        assert len(words) < 700 and "\n" not in words, f"{hostile}: {words[:1000]}"
        assert re.match(rf"({names})(\[\d+\])*: ", words), f"{hostile}: the argument is not named: {words}"
        assert isinstance(error, lplb.OutOfMemory) or ", got " in words, f"{hostile}: the value is not named: {words}"
        return False
    except Exception as error:
        pytest.fail(f"{hostile}: {type(error).__name__} is no LplbError: {error}", pytrace=False)
    return True


def torch_or_numpy(kind):
    if kind == "numpy":
        return lambda array: array
    return lambda array: torch.from_numpy(np.array(array))


KINDS = ["numpy", pytest.param("torch", marks=pytest.mark.skipif(torch is None, reason="needs torch"))]

CREATION = {
    "Planner": (Planner, {
        "redundant_to_original": CUBE, "n_routed_experts": 80, "n_logical_routed_experts": 64, "ep_size": 8, "group": None, "device": "cpu",
        "n_nodes": 1, "rank": 0, "solver": "flow", "exchange": "auto", "tokens": "own", "debug": False}),
    "from_placement": (Planner.from_placement, {
        "phy2log": np.arange(64), "ep_size": 8, "n_logical": 64, "group": None, "group_size": 8, "device": "cpu", "n_nodes": 1, "rank": 0,
        "solver": "flow", "exchange": "auto", "tokens": "own", "debug": False}),
    "torus_2d": (topology.torus_2d, {"m": 2, "n": 3}),
    "hosts": (check.hosts, {"phy2log": np.arange(64), "n_logical": 64, "ep_size": 8}),
    "exhaustive_optimum": (check.exhaustive_optimum, {"loads": np.arange(4), "held": np.ones((4, 2), dtype=bool)}),
    "rank_loads": (check.rank_loads, {"tokens_per_slot": np.arange(64), "ep_size": 8}),
    "conserve": (check.conserve, {"taken": np.arange(64), "counts": np.arange(64), "phy2log": np.arange(64)}),
}


def host_functions(kind):
    of = torch_or_numpy(kind)
    weight = of(np.ones((2, 64)))
    return {
        "solve": (lplb.solve, {"loads": of(np.arange(64)), "phy2log": of(np.arange(64)), "ep_size": 8}),
        "witness_bound": (lplb.witness_bound, {"loads": of(np.arange(64)), "phy2log": of(np.arange(64)), "ep_size": 8, "witness": [0]}),
        "rebalance_experts": (eplb.rebalance_experts, {"weight": weight, "num_replicas": 80, "num_groups": 8, "num_nodes": 2, "num_gpus": 8}),
        "EplbPolicy": (eplb.EplbPolicy.rebalance_experts, {
            "weight": weight, "num_replicas": 80, "num_groups": 8, "num_nodes": 2, "num_ranks": 8,
            "old_global_expert_indices": of(np.zeros((2, 80), dtype=np.int64))}),
        "keep_slots": (eplb.keep_slots, {"phy2log": np.zeros((2, 80), np.int64), "old": np.zeros((2, 80), np.int64), "num_ranks": 8}),
    }


def methods(kind):
    """A planner and its calls, with arguments that are right."""
    of = torch_or_numpy(kind)
    planner = Planner(CUBE, 80, 64, 8, device="cpu")
    ids, counts, counter = of(np.arange(64)), of(COUNTS), of(np.zeros(1, dtype=np.int64))
    probs, _ = planner.solve_probs(counts, None)
    _, rows = planner.count_workload(ids, 2)
    return planner, {
        "run": (planner.run, {"idx": ids, "avail_counter": counter, "n_sms": 3}),
        "count_workload": (planner.count_workload, {"idx": ids, "n_sms": 3}),
        "solve_probs": (planner.solve_probs, {"workload": counts, "avail_counter": counter}),
        "weighted_select_target": (planner.weighted_select_target, {"idx": ids, "o_weight": probs, "local_workload_by_sm": rows, "n_sms": 2}),
        "solve": (planner.solve, {"workload": counts, "avail_counter": counter}),
        "redirect": (planner.redirect, {"idx": ids, "n_sms": 2}),
        "update_redundancy_mapping": (planner.update_redundancy_mapping, {"workload": of(np.ones(64))}),
    }


def tried(functions, seed):
    """Runs every hostile value for every argument, then several at random. Returns what was accepted, of how much."""
    accepted = total = 0
    for function, arguments in functions.values():
        for name in arguments:
            for value in VALUES:
                accepted += attempt(function, arguments, {name: value})
                total += 1
    chance = random.Random(seed)
    for _ in range(500):
        function, arguments = chance.choice(list(functions.values()))
        names = chance.sample(list(arguments), chance.randint(1, len(arguments)))
        accepted += attempt(function, arguments, {name: chance.choice(list(VALUES)) for name in names})
        total += 1
    return accepted, total


def test_creation_and_checks():
    accepted, total = tried(CREATION, 1)
    assert 10 < accepted < total / 4


@pytest.mark.parametrize("kind", KINDS)
def test_host_functions(kind):
    accepted, total = tried(host_functions(kind), 2)
    assert 10 < accepted < total / 4


@pytest.mark.parametrize("kind", KINDS)
def test_methods(kind):
    planner, calls = methods(kind)
    planner.update_redundancy_mapping(np.ones(64))
    planner.solve(torch_or_numpy(kind)(COUNTS))
    for function, arguments in calls.values():
        for name in arguments:
            for value in VALUES:
                before = planner.info(), list(planner.split()), list(planner.mapping()[0])
                if not attempt(function, arguments, {name: value}):
                    assert (planner.info(), list(planner.split()), list(planner.mapping()[0])) == before, f"{function}: {name} {value}"
                elif function == planner.update_redundancy_mapping:
                    planner.solve(torch_or_numpy(kind)(COUNTS))  # the plan was for the other placement
    accepted, total = tried({name: call for name, call in calls.items() if name != "update_redundancy_mapping"}, 3)
    assert 10 < accepted < total / 2
    fresh = Planner(CUBE, 80, 64, 8, device="cpu")
    for each in (planner, fresh):
        each.update_redundancy_mapping(None)
    ids = np.random.default_rng(0).integers(-1, 64, (100, 8))
    assert (planner.run(ids, None) == fresh.run(ids, None)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_update_placement(kind):
    planner = Planner.from_placement(torch_or_numpy(kind)(np.array([0, 1, 1, 2])), ep_size=2, device="cpu")
    for value in VALUES:
        assert not attempt(planner.update_placement, {"phy2log": [0, 1, 1, 2]}, {"phy2log": value})
    assert list(planner.mapping()[0]) == [0, 1, 1, 2]
