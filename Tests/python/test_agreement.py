"""Ranks that differ in what must be equal find out, all of them and with the same words; nobody hangs, and the processes live on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
                                reason="needs a PyTorch with gloo")

PROCESSES = 4


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each rank saw in each case."""
    folder = tmp_path_factory.mktemp("agreement")
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONPATH": os.pathsep.join([str(here), *filter(None, sys.path)])}
    arguments = [str(PROCESSES), str(folder / "store"), str(folder)]
    started = [subprocess.Popen([sys.executable, str(here / "agreement_worker.py"), str(rank), *arguments], env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(PROCESSES)]
    try:
        words = [process.communicate(timeout=200)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, words):
        assert process.returncode == 0, text
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


SAME_PLANNER = "Disagreement: gathered: all ranks must call the same planner, with equal settings and placement, got another digest from "
EQUAL_ON_ALL = {
    "sizes": "Disagreement: n_logical: must be equal on all ranks, got 128 on rank 2 and 64 on rank 0",
    "topologies": "Disagreement: r2o: must be equal on all ranks, got one with digest",
    "kinds_of_planner": "Disagreement: n_redundant: must be equal on all ranks, got -1 on rank 3 and 0 on rank 0",
    "placements": "Disagreement: phy2log: must be equal on all ranks, got one with digest",
    "nodes": "Disagreement: n_nodes: must be equal on all ranks, got 1 on rank 2 and 2 on rank 0 (differing: ranks 2, 3)",
    "exchanges": "Disagreement: settings: must be equal on all ranks, got 'exchange=torch, tokens=own' on rank 0 and 'exchange=auto, tokens=own'",
    "histories": f"{SAME_PLANNER}rank 3 than from the other 3 of 4",
    "histories_and_solve_probs": SAME_PLANNER.replace("gathered", "rows") + "rank 0 than from the other 3 of 4",
    "layers_in_another_order": f"{SAME_PLANNER}rank 1 than from the other 3 of 4",
    "a_count_that_cannot_be": "InvalidArgument: rows[2][5]: must not be negative, got -2147483648",
    "same_tokens_and_other_histories": "Disagreement: history: must be equal on all ranks, got one with digest",
    "tokens_modes": "Disagreement: settings: must be equal on all ranks, got 'exchange=auto, tokens=same' on rank 0",
    "same_tokens_that_differ": "Disagreement: idx: must be equal on all ranks, since the planner was made with tokens='same', got other ids on ranks 1",
    "same_tokens_in_arrays_that_differ": "Disagreement: idx: must be equal on all ranks, since the planner was made with tokens='same', got other ids on ranks 1",
}


@pytest.mark.parametrize("case", EQUAL_ON_ALL)
def test_all_ranks_get_the_same_words(seen, case):
    words = {rank[case] for rank in seen}
    assert len(words) == 1 and words.pop().startswith(EQUAL_ON_ALL[case]), [rank[case] for rank in seen]


@pytest.mark.parametrize("case", ["types_of_ids", "counts_of_all_on_one_rank", "same_tokens"])
def test_what_is_no_difference(seen, case):
    assert [rank[case] for rank in seen] == ["fine"] * PROCESSES


@pytest.mark.parametrize("case, rank, words", [
    ("one_rank_is_refused", 1, "InvalidArgument: n_routed_experts: must be n_logical_routed_experts = 64 plus a multiple of"),
    ("one_rank_has_a_bad_placement", 0, "InvalidArgument: "),
    ("one_rank_has_no_gpu", 3, ""),
])
def test_a_failure_of_one_rank_is_everybodys(seen, case, rank, words):
    own = seen[rank][case]
    assert own != "fine" and own.startswith(words)
    for other in range(PROCESSES):
        if other != rank:
            assert f"rank {rank}: {own.split(': ', 1)[1].removeprefix(f'rank {rank}: ')}" in seen[other][case], seen[other][case]


@pytest.mark.parametrize("case, rank, words", [
    ("layers_of_other_sizes_in_another_order", 2, "brings 257 where this one brings 65"),
    ("one_rank_makes_a_planner", 1, "rank 1 makes or places a planner where this one exchanges counts"),
])
def test_ranks_in_different_calls(seen, case, rank, words):
    assert all(seen[other][case].startswith("Disagreement") for other in range(PROCESSES)), [other[case] for other in seen]
    assert all(words in seen[other][case] for other in range(PROCESSES) if other != rank), [other[case] for other in seen]
