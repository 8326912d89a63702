"""Every wrong argument raises an exception that names the argument, the rule and the value, and changes nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import lplb
from lplb import Planner, topology

torch = pytest.importorskip("torch")

CUBE = topology.CUBE_8P2E


def planner(**options):
    return Planner(CUBE, 80, 64, 8, **{"device": "cpu", **options})


def general(phy2log=(0, 1, 1, 2), **options):
    return Planner.from_placement(np.array(phy2log), **{"ep_size": 2, **options})


CREATION = [
    (lambda: Planner(CUBE, 80, 64), "ep_size: .*got None"),
    (lambda: Planner(CUBE, 80, 64, 0), "ep_size: .*got 0"),
    (lambda: Planner(CUBE, 80, 64, 8.5), "ep_size: .*integer, got 8.5"),
    (lambda: Planner(CUBE, 80, 64, 12, device="cpu"), "ep_size: .*8 ranks, got 12"),
    (lambda: Planner(CUBE, 80, 60, 8, device="cpu"), "n_logical_routed_experts: .*ep_size = 8, got 60"),
    (lambda: Planner(CUBE, 80, 0, 8, device="cpu"), "n_logical_routed_experts: .*got 0"),
    (lambda: Planner(CUBE, 79, 64, 8, device="cpu"), r"n_routed_experts: .*64 .*8 \* 2, got 79"),
    (lambda: Planner(CUBE, 72, 64, 8, device="cpu"), "n_routed_experts: .*got 72"),
    (lambda: Planner(CUBE, 56, 64, 8, device="cpu"), "n_routed_experts: .*got 56"),
    (lambda: Planner(CUBE, 64 + 8 * 10, 64, 8, device="cpu"), "n_physical|n_routed_experts"),  # more copies than originals
    (lambda: Planner(torch.tensor([0, 1]), 80, 64, 8), r"redundant_to_original: .*2 dimensions, got shape \[2\]"),
    (lambda: Planner(CUBE.float(), 80, 64, 8), "redundant_to_original: .*integers, got float"),
    (lambda: Planner(CUBE * 0, 80, 64, 8), r"redundant_to_original: .*permutation of 0 \.\. 7, got"),
    (lambda: Planner(CUBE + 1, 80, 64, 8), "redundant_to_original: .*permutation"),
    (lambda: Planner(CUBE - 1, 80, 64, 8), "redundant_to_original: .*permutation"),
    (lambda: Planner(CUBE + 2**40, 80, 64, 8), "redundant_to_original: .*int32, got 1099511627"),
    (lambda: Planner(torch.empty((0, 2), dtype=torch.int32), 80, 64, 8), r"redundant_to_original: .*row, got shape \[0, 2\]"),
    (lambda: Planner(torch.empty((8, 0), dtype=torch.int32), 80, 64, 8), "redundant_to_original: .*column"),
    (lambda: Planner([[0, 1], [2]], 80, 64, 8), "redundant_to_original"),
    (lambda: planner(solver="simplex"), "solver: .*flow, ipm, got 'simplex'"),
    (lambda: planner(solver="ipm"), "solver|CUDA"),
    (lambda: planner(solver=["flow"]), r"solver: .*flow, ipm, got \['flow'\]"),
    (lambda: planner(exchange="pigeon"), "exchange: .*got 'pigeon'"),
    (lambda: planner(exchange=3), "exchange: must be one of auto, ipc, torch or an exchange of lplb.exchange, got 3"),
    (lambda: planner(exchange=None), "exchange: .*got None"),
    (lambda: planner(debug="no"), "debug: must be True or False, got 'no'"),
    (lambda: Planner(CUBE, 80, 64, 2**40), "ep_size|n_logical_routed_experts"),
    (lambda: Planner(CUBE, 2**40, 64, 8, device="cpu"), "n_physical: .*got 1099511627776"),
    (lambda: Planner(CUBE, 2**80, 64, 8, device="cpu"), "n_routed_experts: must be at most .*, got 1208925819614629174706176"),
    (lambda: Planner(CUBE, 10**5000, 64, 8, device="cpu"), "n_routed_experts: .*of 16610 bits"),
    (lambda: Planner(CUBE, 80, 64, True, device="cpu"), "ep_size: must be an integer, got True"),
    (lambda: Planner(np.broadcast_to(np.int64(0), (2**20, 2**20)), 80, 64, 8, device="cpu"), "redundant_to_original: .*8192 elements"),
    (lambda: planner(device=True), "device: .*got True"),
    (lambda: planner(exchange="symm"), "group: .*exchange = 'ipc', got None"),
    (lambda: planner(n_nodes=3), "n_nodes: .*ep_size 8, got 3"),
    (lambda: planner(n_nodes=0), "n_nodes: .*got 0"),
    (lambda: planner(rank=8), "rank: .*ep_size = 8, got 8"),
    (lambda: planner(rank=-1), "rank: .*got -1"),
    (lambda: planner(device="tpu"), "device: .*got 'tpu'"),
    (lambda: planner(device="meta"), "device: .*got 'meta'"),
    (lambda: planner(device=3.5), "device: .*got 3.5"),
    (lambda: general([0, 1, 1]), "n_physical: .*ep_size 2, got 3"),
    (lambda: general([]), r"phy2log: .*got shape \[0\]"),
    (lambda: general([[0, 1]]), r"phy2log: .*1 dimension, got shape \[1, 2\]"),
    (lambda: general([0, 1, 1, 3]), "phy2log.*2"),  # expert 2 stands nowhere
    (lambda: general([0, 1, 1, -2]), "phy2log.*-1 for none, got -2"),
    (lambda: general([0, 1, 1, 2], n_logical=2), "phy2log|n_logical"),
    (lambda: general([0, 1, 1, 2], n_logical=9), "phy2log|n_logical"),
    (lambda: general([0.0, 1.0]), "phy2log: .*integers, got float64"),
    (lambda: general(ep_size=None), "ep_size: .*got None"),
    (lambda: general(group_size=3), "group_size: .*ep_size 2, got 3"),
    (lambda: general([0, 1, 1, 2], group_size=1), "phy2log|group"),  # replicas of 1 in two groups
]


@pytest.mark.parametrize("index", range(len(CREATION)))
def test_creation(index):
    make, words = CREATION[index]
    with pytest.raises(lplb.LplbError, match=words):
        make()


@pytest.mark.parametrize("group", ["world", "x", 3, object()])
def test_group_must_be_a_group(group):
    with pytest.raises(lplb.InvalidArgument, match="group: must be a torch.distributed process group .*, got"):
        Planner(CUBE, 80, 64, group=group)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda", 1)])
def test_no_gpu_is_said(device):
    missing = r"torch \S+ was built without CUDA|torch finds no usable GPU or driver( \(CUDA_VISIBLE_DEVICES is .*\))?"
    with pytest.raises(lplb.NoCuda, match=rf"device: cannot be a GPU here, since ({missing}); device='cpu' plans on the host, got .*(cuda|0)"):
        planner(device=device)


IDS = torch.zeros((4, 8), dtype=torch.int64)
COUNTER = torch.zeros(1, dtype=torch.int64)

CALLS = [
    (lambda p: p.run(IDS.float(), COUNTER), "idx: .*int32 or int64, got torch.float32"),
    (lambda p: p.run(IDS.short(), COUNTER), "idx: .*int32 or int64, got torch.int16"),
    (lambda p: p.run(IDS.numpy().astype(np.uint8), COUNTER), "idx: .*int32 or int64, got uint8"),
    (lambda p: p.run(IDS.tolist(), COUNTER), "idx: .*tensor or a numpy array, got list"),
    (lambda p: p.run(None, COUNTER), "idx: .*got NoneType"),
    (lambda p: p.run(IDS, torch.zeros(2, dtype=torch.int64)), r"avail_counter: .*one element, got shape \[2\]"),
    (lambda p: p.run(IDS, torch.zeros(0, dtype=torch.int64)), r"avail_counter: .*one element, got shape \[0\]"),
    (lambda p: p.run(IDS, torch.zeros(1)), "avail_counter: .*int32 or int64, got torch.float32"),
    (lambda p: p.run(IDS.numpy(), np.zeros(2, dtype=np.int64)), r"avail_counter: .*one element, got shape \[2\]"),
    (lambda p: p.run(IDS.numpy(), np.zeros(1)), "avail_counter: .*got float64"),
    (lambda p: p.run(IDS.numpy(), [0]), "avail_counter: .*got list"),
    (lambda p: p.run(IDS.numpy(), np.broadcast_to(np.int64(0), (1,))), "avail_counter: .*read-only"),
    (lambda p: p.run(IDS, COUNTER, 0), "n_sms: .*at least 1, got 0"),
    (lambda p: p.run(IDS, COUNTER, 2.5), "n_sms: must be an integer, got 2.5"),
    (lambda p: p.run(IDS, COUNTER, "2"), "n_sms: must be an integer, got '2'"),
    (lambda p: p.run(IDS, COUNTER, 2**40), "n_sms: must be at most 2147483647, got 1099511627776"),
    (lambda p: p.run(IDS, COUNTER, float("nan")), "n_sms: must be an integer, got nan"),
    (lambda p: p.redirect(IDS, 2**40), "n_sms: .*got 1099511627776"),
    (lambda p: p.count_workload(IDS, 2**40), "n_sms: must be at most 65536, got 1099511627776"),
    (lambda p: p.run(IDS, 3), "avail_counter: must be a torch tensor, as idx is one, got int"),
    (lambda p: p.run(IDS, [0]), "avail_counter: .*got list"),
    (lambda p: p.run(IDS, COUNTER.numpy()), "avail_counter: .*got ndarray"),
    (lambda p: p.solve(torch.ones(64, dtype=torch.int32), 3), "avail_counter: must be a torch tensor, as workload is one, got int"),
    (lambda p: p.solve_probs(torch.ones(64, dtype=torch.int32), "x"), "avail_counter: .*got str"),
    (lambda p: p.run(IDS, COUNTER.to_sparse()), "avail_counter: must be a dense, plain tensor, got torch.sparse_coo"),
    (lambda p: p.run(IDS.to_sparse(), COUNTER), "idx: must be a dense, plain tensor, got torch.sparse_coo"),
    (lambda p: p.run(IDS, COUNTER.to("meta")), "idx: must be on one device with the other tensors"),
    (lambda p: p.run(np.ma.masked_all(8, dtype=np.int64), None), "idx: must be a plain array, got MaskedArray"),
    (lambda p: p.run(np.broadcast_to(np.int64(0), (2**20, 2**20)), None), "idx: must have at most 2147483647 elements"),
    (lambda p: p.run(torch.zeros(1, dtype=torch.int64).expand(2**40), None), "idx: must have at most 2147483647 elements"),
    (lambda p: p.weighted_select_target(IDS, torch.ones(1, 8, 2), None, 2), "local_workload_by_sm: .*2 rows of n_logical = 64 .*got NoneType"),
    (lambda p: p.weighted_select_target(IDS, None, torch.zeros(2, 64, dtype=torch.int32), 2), "o_weight: must be a torch tensor, .*NoneType"),
    (lambda p: p.count_workload(IDS, 0), "n_sms: .*got 0"),
    (lambda p: p.count_workload(IDS, "all"), "n_sms: .*got 'all'"),
    (lambda p: p.count_workload(IDS.bool(), 1), "idx: .*torch.bool"),
    (lambda p: p.solve_probs(torch.zeros(63, dtype=torch.int32), COUNTER), r"workload: .*64 elements .*, got shape \[63\]"),
    (lambda p: p.solve_probs(np.zeros(65, dtype=np.int32), COUNTER), r"workload: .*64 elements .*, got shape \[65\]"),
    (lambda p: p.solve_probs(torch.zeros(64), COUNTER), "workload: .*int32 or int64, got torch.float32"),
    (lambda p: p.solve_probs([0] * 64, COUNTER), "workload: .*got list"),
    (lambda p: p.solve_probs(torch.full((64,), -1), COUNTER), "counts.*-1|workload.*-1"),
    (lambda p: p.solve(torch.full((64,), 2**40 + 1)), "counts.*1099511627777|workload.*1099511627777"),
    (lambda p: p.solve(torch.zeros(3, 64, dtype=torch.int32)), r"workload: .*got shape \[3, 64\]"),
    (lambda p: p.weighted_select_target(IDS, torch.ones(1, 8, 1), torch.zeros(2, 64, dtype=torch.int32), 2), "o_weight: .*16 elements, got 8"),
    (lambda p: p.weighted_select_target(IDS, torch.ones(1, 8, 2).double(), torch.zeros(2, 64, dtype=torch.int32), 2), "o_weight: .*float64"),
    (lambda p: p.weighted_select_target(IDS, torch.ones(1, 8, 2), torch.zeros(2, 64), 2), "local_workload_by_sm: .*int32, got torch.float32"),
    (lambda p: p.weighted_select_target(IDS, torch.ones(1, 8, 2), torch.zeros(2, 63, dtype=torch.int32), 2), r"local_workload_by_sm: .*\[2, 63\]"),
    (lambda p: p.weighted_select_target(IDS, torch.ones(1, 8, 2), torch.zeros(2, 64, dtype=torch.int32), 3), r"local_workload_by_sm: .*3 rows .*got shape \[2, 64\]"),
    (lambda p: p.weighted_select_target(IDS.numpy(), np.ones(16), np.zeros((2, 64), dtype=np.int32), 2), "o_weight: .*float32, got float64"),
    (lambda p: p.update_redundancy_mapping(torch.ones(63)), "workload: .*64 elements, got 63"),
    (lambda p: p.update_redundancy_mapping(torch.full((64,), -1.0)), "history.*-1|workload.*-1"),
    (lambda p: p.update_redundancy_mapping(torch.full((64,), float("nan"))), "history.*nan|workload.*nan"),
    (lambda p: p.update_redundancy_mapping(["a"] * 64), "workload: .*numbers"),
    (lambda p: p.update_placement(p.phy2log), "planner: must be made by from_placement for update_placement .use update_redundancy_mapping., got one made with a topology"),
]


@pytest.mark.parametrize("index", range(len(CALLS)))
def test_calls(index):
    call, words = CALLS[index]
    with planner() as subject:
        subject.run(torch.arange(64), None)
        before, plan, placement = subject.info(), torch.as_tensor(subject.split()), subject.phy2log.clone()
        with pytest.raises(lplb.LplbError, match=words) as caught:
            call(subject)
        assert isinstance(caught.value, ValueError)
        assert COUNTER.item() == 0
        assert subject.info() == before and torch.equal(torch.as_tensor(subject.split()), plan)
        assert torch.equal(subject.mapping()[0], placement)


def test_the_wrong_kind_of_planner_is_one_kind_of_error():
    counts = torch.zeros((1, 3), dtype=torch.int32)
    with general() as subject:
        for name, call in (("solve_probs", lambda: subject.solve_probs(counts[0], None)),
                           ("update_redundancy_mapping", lambda: subject.update_redundancy_mapping(None)),
                           ("weighted_select_target", lambda: subject.weighted_select_target(IDS, torch.ones(1), counts, 1))):
            words = rf"planner: must be made with a topology for {name} \(use .*\), got one made by from_placement"
            with pytest.raises(lplb.InvalidArgument, match=words):
                call()


def test_wrong_order():
    with planner() as subject:
        for call in (subject.info, subject.split, subject.assignment, lambda: subject.redirect(IDS)):
            with pytest.raises(lplb.WrongOrder):
                call()


def test_update_placement_refusals_keep_the_placement():
    with general([0, 1, 1, 2]) as subject:
        for wrong, words in (([0, 1], "phy2log: .*4 slots as before, got 2"), ([0, 1, 1, 1], "phy2log.*2"), ([0, 1, 2, 3], "phy2log.*3")):
            with pytest.raises(lplb.InvalidArgument, match=words):
                subject.update_placement(wrong)
            assert subject.mapping()[0].tolist() == [0, 1, 1, 2] == subject.phy2log.tolist()


def test_another_device_is_refused():
    meta = torch.zeros((4, 8), dtype=torch.int64, device="meta")
    with planner() as subject:
        if torch.cuda.is_available():
            with pytest.raises(lplb.InvalidArgument, match="idx: .*device cpu, got cuda"):
                subject.run(IDS.cuda(), None)
        assert subject.run(meta, None).device.type == "meta"  # shapes only, as for every operator


SOLVE = [
    (([1, 2], [0, 1, 1], 2), "phy2log|n_physical|ep_size"),
    (([1, 2], [0, 0], 2), "phy2log.*1"),
    (([1, 2], [0, 2], 2), "phy2log.*2"),
    (([1, -2], [0, 1], 2), "loads.*-2"),
    (([1, 2**40 + 1], [0, 1], 2), "loads.*1099511627777"),
    (([1.5, 2.5], [0, 1], 2), "loads: .*integers, got float64"),
    (([[1, 2]], [0, 1], 2), "loads: .*1 dimension"),
    (([1, 2], [0, 1], 0), "ep_size: .*got 0"),
    (([1, 2], [0, 1], 3), "ep_size|phy2log|n_physical"),
    (([], [], 1), "loads|n_logical|phy2log"),
]


@pytest.mark.parametrize("arguments, words", SOLVE)
def test_solve(arguments, words):
    with pytest.raises(lplb.LplbError, match=words):
        lplb.solve(*arguments)


WITNESS = [
    (([1, 2, 3], [0, 1], 2, [0]), "phy2log: must hold every logical expert, got no slot for 2"),
    (([1, 2], [0, 2], 2, [0]), r"phy2log\[1\]: must be a logical expert, 0 .. 1, or -1 for none, got 2"),
    (([1, 2], [-2, 0], 2, [0]), r"phy2log\[0\]: .*got -2"),
    (([1, 2], [0, 1, 1], 2, [0]), "phy2log: .*multiple of ep_size = 2 slots, .*got 3"),
    (([1, 2], [], 2, [0]), "phy2log: .*got 0"),
    (([], [0], 1, [0]), "loads: .*one expert at least"),
    (([1, -2], [0, 1], 2, [0]), r"loads\[1\]: .*got -2"),
    (([1, 2**41], [0, 1], 2, [0]), r"loads\[1\]: must lie in 0 \.\.\. 1099511627776, got 2199023255552"),
    (([1, 2], [0, 1], 2**40, [0]), "phy2log: .*ep_size = 1099511627776 slots"),
    (([1, 2], [0, 1], 2, [0, 0]), r"witness: .*each once, .*got \[0, 0\]"),
    (([1, 2], [0, 1], 2, [0.5]), r"witness: .*got \[0.5\]"),
    (([1, 2], [0, 1], 2, None), "witness: .*got None"),
    (([1, 2], [0, 1], 2, itertools.count()), "witness: .*got count"),
]


@pytest.mark.parametrize("arguments, words", WITNESS)
def test_witness_bound_checks_sizes_and_ids(arguments, words):
    with pytest.raises(lplb.InvalidArgument, match=words):
        lplb.witness_bound(*arguments)


def test_values_are_shown_in_one_short_line():
    with pytest.raises(lplb.InvalidArgument) as caught:
        planner(device="x\n" * 1000)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_witness_bound():
    with pytest.raises(ValueError, match=r"witness: .*0 \.\. 1.*got \[2\]"):
        lplb.witness_bound([1, 2], [0, 1], 2, [2])
    with pytest.raises(ValueError, match=r"witness: .*got \[\]"):
        lplb.witness_bound([1, 2], [0, 1], 2, [])
