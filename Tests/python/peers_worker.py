"""One process of test_peers.py. Arguments: scenario, rank, processes, folder. Writes what it saw to the folder as JSON."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
import weakref

import torch
import torch.distributed as dist

import lplb
from lplb import exchange
from lplb.exchange.by_torch import TorchExchange
from lplb.exchange.native import state_of

torch.set_num_threads(1)
LIMIT = 2.0
WIDTH = 17  # counts that travel for 16 experts
FATES = ("exits", "killed", "raises", "late")  # what becomes of the second rank of each pair


def join(folder, name, rank, processes):
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=processes)
    return dist.group.WORLD


def planner_of(group, **more):
    return lplb.Planner(torch.tensor([[1], [0]]), 18, 16, group=group, **more)


def used(planner):
    """A plan of the counts of both ranks."""
    ids = torch.arange(64) % 16
    out = planner.run(ids, None)
    assert planner.info().groups[0].total == 128 and torch.equal(planner.phy2log[out], ids.int())
    return out


# ---- how planners, exchanges and process groups end ----


def life(folder, rank, processes):
    """A shared exchange, and planners that end in every order."""
    group = join(folder, "life", rank, processes)
    seen = {}
    for order in ("012", "210", "120"):
        first = planner_of(group)
        planners = [first, planner_of(group, exchange=first.exchange), planner_of(group, exchange=first.exchange)]
        shared = first.exchange
        wanted = [used(planner) for planner in planners]
        still = []
        for count, which in enumerate(order):
            if count == 1:
                planners[int(which)] = first = None  # garbage
                gc.collect()
            else:
                planners[int(which)].close()
                planners[int(which)] = None
            left = [(planner, out) for planner, out in zip(planners, wanted) if planner is not None]
            still.append(shared.closed)
            assert all(torch.equal(used(planner), out) for planner, out in left)
        seen[order] = still
    mine = exchange.create(group, "cpu", WIDTH)
    with planner_of(group, exchange=mine) as planner:
        used(planner)
    seen["the caller's"] = mine.closed
    with planner_of(group, exchange=mine) as planner:
        mine.close()
        try:
            used(planner)
        except lplb.WrongOrder as error:
            seen["closed by the caller"] = str(error)
    try:
        planner_of(group, exchange=mine)
    except lplb.WrongOrder as error:
        seen["a closed one"] = str(error)
    dist.destroy_process_group()
    return seen


def ends(folder, rank, processes, order):
    """Nothing of ours keeps a destroyed process group alive; the last lines of the program are those of `order`."""
    alive = []
    orders = ["close, destroy", "destroy, close", "destroy", "share, close, destroy", "exchange, destroy", order]
    for number, steps in enumerate(orders):
        group = join(folder, f"ends{number}", rank, processes)
        planner = planner_of(group)
        used(planner)
        kept = [planner]
        for step in steps.split(", "):
            if step == "share":
                kept.append(planner_of(group, exchange=planner.exchange))
            elif step == "exchange":
                kept.append(exchange.create(group, "cpu", WIDTH))
            elif step == "close":
                planner.close()
                assert planner.ep_group is None and planner.exchange is None
            elif step == "destroy":
                gone = weakref.ref(group)
                del group
                dist.destroy_process_group()
                alive.append(gone() is not None)
        if steps == "destroy":
            try:
                used(planner)
            except lplb.WrongOrder as error:
                words = str(error)
    globals()["kept"] = kept  # until the interpreter ends
    return {"alive": alive, "without a group": words}


def names(folder, rank, processes):
    """The next process group of the same name is another one."""
    seen = {}
    for number in range(2):
        group = join(folder, f"names{number}", rank, processes)
        state = state_of(group)
        seen[f"fresh {number}"] = [group.group_name, state.made, state.rail_groups.get(2) is None]
        along, again = (state.rail_group(group, exchange.Layout(2, rank, 1, 0), -1) for _ in range(2))
        state.made += 1
        total = torch.ones(1)
        dist.all_reduce(total, group=along)
        seen[f"used {number}"] = [again is along, total.item()]
        del along, again
        dist.destroy_process_group()
        seen[f"gone {number}"] = state.rail_groups.get(2) is None
    return seen


# ---- peers that do not come ----


def meet(fate, act):
    """The second rank's part."""
    if fate == "exits":
        os._exit(0)
    if fate == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "raises":
        raise ValueError("an error of the training code")
    time.sleep(3 * LIMIT)
    return act()


def attempt(act):
    began = time.perf_counter()
    try:
        act()
        words = kind = ""
    except Exception as error:
        kind, words = type(error).__name__, str(error)
    return {"kind": kind, "words": words, "took": time.perf_counter() - began}


def pairs(folder, rank, processes, scenario):
    """Ranks 2k and 2k + 1 are a group; the second one has the fate k."""
    join(folder, scenario, rank, processes)
    groups = [dist.new_group([first, first + 1]) for first in range(0, processes, 2)]
    group, fate = groups[rank // 2], FATES[rank // 2]
    if scenario == "run":
        planner = planner_of(group, exchange="torch")
        planner.exchange.set_limits(LIMIT, "trap")
        used(planner)
        acts = [lambda: used(planner)]
    else:
        exchange.create(group, "cpu", WIDTH).close()
        acts = [lambda: exchange.create(group, "cpu", WIDTH, timeout=LIMIT)]
    if rank % 2:
        return attempt(lambda: meet(fate, acts[0])) if fate == "late" else meet(fate, acts[0])
    seen = attempt(acts[0])
    if scenario == "run":
        report = planner.exchange.report()
        seen["report"] = [report.reason, report.rank, report.peer, report.epoch, str(report)]
        seen["again"] = attempt(acts[0])
    return seen


def abort(folder, rank, processes):
    """A call without a limit whose peer does not come until it is aborted."""
    group = join(folder, "abort", rank, processes)
    made = exchange.create(group, "cpu", WIDTH, timeout=0)
    assert isinstance(made, TorchExchange)
    counts = torch.arange(WIDTH, dtype=torch.int32)
    made.all_gather(counts)
    if rank:
        time.sleep(4)
        os._exit(0)
    threading.Timer(0.3, made.abort).start()
    seen = attempt(lambda: made.all_gather(counts))
    return {**seen, "again": attempt(lambda: made.all_gather(counts)), "report": str(made.report())}


def main():
    scenario, rank, processes, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    scenario, _, detail = scenario.partition(":")
    lost = scenario in ("run", "create", "abort")
    seen = {"life": life, "names": names, "abort": abort,
            "ends": lambda *place: ends(*place, detail),
            "run": lambda *place: pairs(*place, "run"), "create": lambda *place: pairs(*place, "create")}[scenario](folder, rank, processes)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(seen, file)
    if lost:
        os._exit(0)  # a peer is gone, so there is no clean end


if __name__ == "__main__":
    main()
