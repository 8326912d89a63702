"""Checks that hold on every device, for test_planner.py (CPU) and test_gpu_planner.py."""

from __future__ import annotations

import ctypes

import pytest
import torch

from lplb import Planner, WrongOrder, _c
from lplb.topology import CUBE_8P2E


def rows_of(planner, counts):
    """The rows that ranks with these counts [ep_size, n_logical] and the planner's digest bring to an exchange."""
    handle = planner._handle
    counts = counts.to(planner.device, torch.int32).contiguous()
    row = torch.empty(handle.width, dtype=torch.int32, device=planner.device)
    handle.check(handle.library.planner_make_row(handle.opened(), counts[0].data_ptr(), 0, row.data_ptr(), planner._stream()))
    return torch.cat([counts, row[-1:].expand(len(counts), 1)], dim=1)


class Reporting(Planner):
    """A planner whose kernels report ranks that disagree, where they would trap."""

    def _configure(self, *arguments):
        super()._configure(*arguments)
        self._config.policy = 1


def run_gathered(planner, ids, counts, counter=None):
    """lplb_planner_run with the counts of all ranks [ep_size, n_logical]."""
    return run_rows(planner, ids, rows_of(planner, counts), counter)


def run_rows(planner, ids, rows, counter=None):
    handle, out = planner._handle, torch.empty_like(ids)
    handle.check(handle.planner_run(
        handle.opened(), ids.data_ptr(), int(ids.dtype == torch.int64), ids.numel(), rows.data_ptr(), out.data_ptr(),
        None if counter is None else counter.data_ptr(), int(counter is not None and counter.dtype == torch.int64), 0, planner._stream()))
    return out


def check_invalid_ids_count_once(device):
    """However the steps are called, an id out of range is one."""
    ids = torch.tensor([0, 63, 64, -1, -2, 2**40, 17, -2**40] * 100, device=device)
    bad = 4 * 100
    counts = torch.bincount(ids[(ids >= 0) & (ids < 64)], minlength=64)
    everybody = torch.zeros(8, 64, dtype=torch.int32, device=device)
    everybody[3] = counts

    def counted(call, rank=None):
        planner = Planner(CUBE_8P2E, 80, 64, 8, device=device, rank=rank)
        out = call(planner)
        assert ((out == -1) == ((ids < 0) | (ids >= 64))).all()
        planner.solve(counts)  # so that there is a plan to read
        return planner.info().invalid_ids

    def steps(planner):
        planner.solve(planner.count_workload(ids, 3)[0])
        return planner.redirect(ids)

    def by_ratio(planner):
        workload, rows = planner.count_workload(ids, 3)
        return planner.weighted_select_target(ids, planner.solve_probs(workload, None)[0], rows, 3)

    def gathered(planner):
        planner.count_workload(ids, 3)
        return run_gathered(planner, ids, everybody)

    assert [counted(lambda planner: planner.run(ids, None)), counted(steps), counted(by_ratio), counted(gathered, 3)] == [bad] * 4
    for planner in (Planner(CUBE_8P2E[:, :0], 64, 64, 8, device=device), Planner(CUBE_8P2E, 80, 64, 8, device=device)):
        planner.run(ids, None)
        planner.count_workload(ids, 3)
        planner.solve(counts)
        assert planner.info().invalid_ids == bad


def check_replicas_on_one_rank(device):
    """What is planned depends on the sizes, not on where the replicas happen to stand."""
    beside = torch.arange(24).div(3, rounding_mode="floor")  # experts 0, 1, .. three times each, on one rank each
    apart = torch.arange(24) % 8
    for sizes in ({"ep_size": 8}, {"ep_size": 8, "group_size": 1}, {"ep_size": 1}):
        planner = Planner.from_placement(beside, n_logical=8, device=device, **sizes)
        ids = torch.arange(8, device=device).repeat(50)
        with pytest.raises(WrongOrder):
            planner.redirect(ids)
        counter = torch.zeros(1, dtype=torch.int32, device=device)
        out = planner.run(ids, counter)
        assert (planner.phy2log[out] == ids).all() and counter.item() == planner.n_group
        info = planner.info()
        assert info.certified and sum(group.total for group in info.groups) == 400 and not any(group.moved for group in info.groups)
        assert planner.split().sum() == planner.assignment().sum() == 400
        assert torch.equal(planner.redirect(ids), out)
        if planner.group_size > 1:
            planner.update_placement(apart)
            planner.run(ids, counter)
            assert planner.info().groups[0].max_load == 50
            planner.update_placement(beside)
        planner.run(ids[:8], counter)
        assert sum(group.total for group in planner.info().groups) == 8


def raw_metrics(planner):
    """lplb_metrics, all fields."""
    found = _c.MetricsStruct()
    planner._handle.check(planner._handle.library.planner_get_metrics(planner._handle.opened(), ctypes.byref(found)))
    return {name: getattr(found, name) for name, _ in found._fields_[1:]}


class Expected:
    """What a planner records, added up in Python from the counts given and from info() after each plan."""

    def __init__(self, planner):
        self.planner, self.overflow, self.invalid = planner, planner.info().overflow if planner.metrics().plans else 0, 0
        self.tokens = torch.zeros(planner.n_logical_routed_experts, dtype=torch.int64)
        self.metrics = dict.fromkeys(raw_metrics(planner), 0)

    def add(self, counts):
        """A plan for counts [sources, n_logical] was made just now."""
        info, size, now = self.planner.info(), self.planner.group_size, self.metrics
        self.tokens += counts.cpu().long().clamp(min=0).view(-1, len(self.tokens)).sum(0)
        overflow, self.overflow = info.overflow - self.overflow, info.overflow
        now["plans"] += 1
        now["overflow"] += overflow
        now["own_rank"] += info.locality.to_own_rank
        now["own_node"] += info.locality.to_own_node
        now["other_nodes"] += info.locality.to_other_nodes
        for group in info.groups:
            if overflow and not group.certified and not group.total:
                continue
            now["uncertified"] += not group.certified
            now["tokens"] += group.total
            now["moved"] += group.moved
            if group.total:
                imbalance = (group.max_load * size << 22) // group.total
                gap = (group.bound * size << 22) // group.total - (1 << 22)
                now["groups"] += 1
                now["imbalance_sum"] += imbalance
                now["imbalance_max"] = max(now["imbalance_max"], imbalance)
                now["gap_sum"] += gap
                now["gap_max"] = max(now["gap_max"], gap)

    def check(self):
        assert raw_metrics(self.planner) == {**self.metrics, "invalid_ids": self.invalid}
        assert torch.equal(self.planner.history(at=self.metrics["plans"]).cpu(), self.tokens)


def check_records(rng, planner, sizes):
    """History and metrics of a planner, however plans are made."""
    ep_size, n_logical, kept = planner.ep_size, planner.n_logical_routed_experts, Expected(planner)
    for step, n in enumerate(sizes):
        ids = torch.from_numpy(rng.integers(-2, n_logical + 1, n)).to(planner.device)
        counts = torch.bincount(ids[(ids >= 0) & (ids < n_logical)], minlength=n_logical)
        bad = int(((ids < -1) | (ids >= n_logical)).sum())
        planner.run(ids, None)
        kept.add(counts)
        planner.redirect(ids)  # makes no plan, and has ids to complain about
        kept.invalid += 2 * bad
        if planner.rank is not None:
            everybody = torch.from_numpy(rng.integers(0, 300, (ep_size, n_logical))).to(planner.device)
            everybody[planner.rank] = counts
            run_gathered(planner, ids, everybody)
            kept.invalid += bad
            kept.add(everybody)
            planner.solve(everybody)
            kept.add(everybody)
        planner.solve(counts * (step % 3))  # once without tokens
        kept.add(counts * (step % 3))
        kept.check()
