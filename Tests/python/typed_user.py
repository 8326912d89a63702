"""What a user's type checker must know: tensors in are tensors out, arrays in are arrays out. Checked by mypy --strict, never run."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter
from typing_extensions import assert_type

import lplb
from lplb import Planner, eplb, topology


def tensors(planner: Planner, ids: Tensor, counts: Tensor, counter: Tensor) -> None:
    assert_type(planner.run(ids, counter), Tensor)
    assert_type(planner.run(ids, None, 100), Tensor)
    assert_type(planner.count_workload(ids, 4), tuple[Tensor, Tensor])
    assert_type(planner.solve_probs(counts, counter), tuple[Tensor, Tensor])
    assert_type(planner.weighted_select_target(ids, counts, counts, 4), Tensor)
    assert_type(planner.solve(counts), None)
    assert_type(planner.redirect(ids), Tensor)
    assert_type(lplb.solve(counts, ids, 2).tokens, Tensor)
    assert_type(lplb.homes(ids, 2), Tensor)
    assert_type(lplb.place(counts, ep_size=2, slots=4).report.pulls, Tensor)
    assert_type(planner.layout(ids).order, Tensor)
    assert_type(planner.layout(ids).wait().sent, list[int])
    assert_type(lplb.Replicas(planner).parameter("up", (3, 4)), Parameter)
    assert_type(eplb.rebalance_experts(counts, 80, 8, 1, 8), tuple[Tensor, Tensor, Tensor])
    assert_type(eplb.EplbPolicy.rebalance_experts(counts, 80, 8, 1, 8, None), Tensor)


def arrays(planner: Planner, ids: NDArray[np.int64], counter: NDArray[np.int32]) -> None:
    assert_type(planner.run(ids, counter), NDArray[Any])
    assert_type(planner.count_workload(ids, 4), tuple[NDArray[Any], NDArray[Any]])
    assert_type(planner.solve_probs(ids, None), tuple[NDArray[Any], NDArray[Any]])
    assert_type(planner.redirect(ids, 3), NDArray[Any])
    assert_type(planner.layout(ids, received=lambda sent: sent).by_row, NDArray[Any])
    assert_type(lplb.solve(ids, ids, 2).tokens, NDArray[Any])
    assert_type(lplb.placement_report(ids, ep_size=2, history=ids).leaves_node, NDArray[Any])
    assert_type(eplb.rebalance_experts(ids, 80, 8, 1, 8)[0], NDArray[Any])


def made() -> Planner:
    with Planner(topology.CUBE_8P2E, 80, 64, ep_size=8) as planner:
        assert_type(planner, Planner)
        assert_type(planner.info().groups[0].max_load, int)
    return Planner.from_placement(planner.phy2log, ep_size=8)


class Mine(Planner):
    pass


assert_type(Mine.from_placement(np.arange(8), ep_size=8), Mine)
made().run("no array", None)  # type: ignore[type-var]
made().run(np.arange(8), None, n_sms="all")  # type: ignore[arg-type]
