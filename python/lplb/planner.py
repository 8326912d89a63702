"""The planner: which replica each token of a micro-batch goes to, so that the busiest rank has as little as possible, provably."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from . import _c
from ._c.handle import Handle
from ._ops.arguments import (
    Shape, check_exchange, default_nodes, device_ordinal, integer, one_of, shape_by_placement, shape_by_topology, truth)
from ._ops.calls import Calls, numpy_calls
from ._ops.cost import Unit, alike, capacities, unit_number
from ._ops.host import A, Array, Int32s, Int64s, address_of, host_integers, host_numbers, is_tensor, loaded_torch, shape_of
from ._ops.ranks import Ranks
from .errors import WrongOrder, broken_rule
from .info import Info, Locality, group_info
from .saving import copied, kept_arguments, make_again, parts
from .topology import named

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from .exchange import Exchange
    from .layout import Layout
    from .records import Metrics
    from ._ops.arguments import Device

P = ParamSpec("P")
T = TypeVar("T")
_MAX_BLOCKS = _c.MAX_BLOCKS


class Planner:
    """Plans one MoE layer's tokens over the ranks of an expert-parallel group.

    redundant_to_original: "cube", "ring", "hypercube", "square" or "torus:MxN" (see lplb.topology), or integers [group_size,
        num_redundants], on any device: slot d of rank r replicates slot d of rank redundant_to_original[r, d] of the same group. Each
        column is a permutation of 0 .. group_size-1.
    n_routed_experts, n_logical_routed_experts: physical experts with the redundant ones, and logical experts.
    ep_size, group: ranks, or the torch.distributed group they form; one of the two is needed. With a group every rank has tokens of its
        own and every plan is made from the counts of all of them (see tokens); without, from the given ids or counts alone.
    device: "cpu", "cuda", "cuda:1", an ordinal or a torch.device. None: the device of a CUDA topology; else the current GPU if there
        is one; else, and for a topology in a numpy array, the CPU.
    n_nodes: hosts, whose ranks are consecutive. None: with a group, the hosts that its ranks say they are on; else ep_size / 8, where 8
        divides ep_size, else 1.
    rank: which rank plans. None: the rank in group; without a group, the ids are those of all ranks together.
    solver: "flow" (exact, certified) or "ipm" (CUDA: interior point method, near-optimal).
    exchange: how the counts of all ranks travel: "torch" (torch.distributed, whatever its backend), "ipc" (over NVLink, see
        lplb.exchange), "auto" (the faster one that works), or an exchange that planners of one stream share: another planner's, which ends
        with the last planner that uses it, or one made by lplb.exchange.create, which the caller closes.
    tokens: "own": each rank of group has tokens of its own. "same": all ranks of group hold the same tokens, and every rank must choose
        the same replica for each: nothing is exchanged. Given "own" where the ranks hold the same tokens, each rank would take every
        token for another one and the ranks would choose different replicas.
    unit: what is counted on a rank. 1: tokens. A larger number: blocks of so many tokens, such as the 128 rows to which a grouped product
        pads every expert; an expert is split in whole blocks. "experts": active experts, those with a token, each of which then goes to one
        replica whole: what the time of a decode step follows. Exact and certified like tokens.
    debug: an id out of range raises at the call, which then waits for the GPU; with tokens="same", so do ids that differ between ranks.
        Otherwise an id out of range becomes -1 and is counted in info().
    history: adds up the tokens of each logical expert over all plans, for history(). Needs replicas.
    metrics: adds up what the plans achieve, for metrics().

    With a group, making a planner is collective: the ranks compare their arguments, and where one fails all fail. The placement is
    compared whenever counts travel, so that a rank with another history is found: Disagreement, see lplb.h.

    Tensors in, tensors out, on the planner's device; numpy arrays in, numpy arrays out (CPU). A planner may be used by one thread at a
    time: concurrent calls raise Busy. Errors are subclasses of LplbError.
    """

    device: str | torch.device
    r2o: Array  #: [group_size, num_redundants] int32
    o2r: Array  #: its inverse: rank o2r[r, d] holds the copy of slot d of rank r
    phy2log: Array  #: [n_routed_experts] int32, the logical expert of every slot
    _placed_by: npt.NDArray[np.float64] | None  # the history, for copies and pickles

    def __init__(self, redundant_to_original: Array | str, n_routed_experts: int, n_logical_routed_experts: int, ep_size: int | None = None,
                 group: torch.distributed.ProcessGroup | None = None, *, device: Device = None, n_nodes: int | None = None,
                 rank: int | None = None, solver: str = "flow", exchange: str | Exchange = "auto", tokens: str = "own",
                 unit: Unit = 1, debug: bool = False, history: bool = False, metrics: bool = False,
                 _shape: Callable[[int], Shape] | None = None) -> None:
        self._kept_arguments, self._placed_by = kept_arguments(locals()), None
        ranks = self._ranks = Ranks(ep_size, group, rank, tokens)
        self.ep_size, self.rank, self.tokens = ranks.size, ranks.own, ranks.tokens
        with ranks.telling():
            if _shape is None:
                if isinstance(redundant_to_original, str):
                    redundant_to_original = named(redundant_to_original)
                _shape = partial(shape_by_topology, redundant_to_original, n_routed_experts, n_logical_routed_experts)
            shape = _shape(self.ep_size)
            exchange = check_exchange(exchange)
            record = _c.RECORD_HISTORY * truth("history", history) + _c.RECORD_METRICS * truth("metrics", metrics)
            self._configure(shape, redundant_to_original, device, n_nodes, solver, exchange, unit_number(unit), truth("debug", debug), record)
        self._create(exchange, shape.phy2log)
        self.r2o = self._output(shape.r2o)
        self.o2r = self._output(np.argsort(shape.r2o, axis=0, kind="stable").astype(np.int32))
        self.phy2log = self.mapping()[0]

    @classmethod
    def from_placement(cls, phy2log: Array, *, ep_size: int | None = None, n_logical: int | None = None,
                       group: torch.distributed.ProcessGroup | None = None, group_size: int | None = None, device: Device = None,
                       n_nodes: int | None = None, rank: int | None = None, solver: str = "flow", exchange: str | Exchange = "auto",
                       tokens: str = "own", unit: Unit = 1, debug: bool = False, history: bool = False, metrics: bool = False) -> Self:
        """A planner for any placement, such as EPLB's: any number of replicas per expert, anywhere in the group.

        phy2log: integers [n_physical], the logical expert of every slot; rank r owns n_physical / ep_size consecutive slots; every
        logical expert stands at least once. n_logical: None takes max(phy2log) + 1. group_size: ranks that balance among themselves
        and hold all replicas of an expert between them, None: ep_size. The rest as for Planner.
        """
        shape = partial(shape_by_placement, phy2log, n_logical, group_size)  # which finds the sizes
        return cls(phy2log, 0, 0, ep_size, group, device=device, n_nodes=n_nodes, rank=rank, solver=solver, exchange=exchange,
                   tokens=tokens, unit=unit, debug=debug, history=history, metrics=metrics, _shape=shape)

    def _configure(self, shape: Shape, given: object, device: Device, n_nodes: int | None, solver: str, exchange: str | Exchange,
                   unit: int, debug: bool, record: int) -> None:
        """Fills in what the native planner is made from, and the attributes that follow from the sizes."""
        number = _c.SOLVERS[one_of("solver", solver, tuple(_c.SOLVERS))]
        ordinal = device_ordinal(device, given)
        whole_batch = self.rank is None or self.tokens == "same"
        slots = self._kept = shape.slot_classes()  # the config holds its address
        self._config = _c.Config(
            device=ordinal, solver=number, ep_size=self.ep_size, rank=_c.WHOLE_BATCH if whole_batch else self.rank,
            n_nodes=0 if n_nodes is None else integer("n_nodes", n_nodes, 1), n_logical=shape.n_logical, n_physical=shape.n_physical,
            group_size=shape.group_size, n_redundant=0 if slots is None else slots.shape[1],
            r2o=None if slots is None else address_of(slots), policy=0 if isinstance(exchange, str) else _c.POLICIES[exchange.policy],
            unit=unit, record=record)
        self.unit: Unit = "experts" if unit == _c.UNIT_EXPERTS else unit
        self.speed: Int32s | None = None  #: of the ranks, where set_capacity has set them
        self.fixed: Int32s | None = None
        self._general = slots is None
        torch = loaded_torch()
        self._as_tensors = torch is not None and (ordinal >= 0 or not isinstance(given, np.ndarray))
        self.device = torch.device("cuda", ordinal) if ordinal >= 0 else torch.device("cpu") if torch else "cpu"
        self._ops: Any = None  # the module of the operators, once torch is there
        self.n_routed_experts, self.n_logical_routed_experts = shape.n_physical, shape.n_logical
        self.n_local_routed_experts = shape.n_physical // self.ep_size
        self.n_local_logical_routed_experts = shape.n_logical // self.ep_size
        self.group_size, self.n_group = shape.group_size, self.ep_size // shape.group_size
        self.num_redundants = shape.r2o.shape[1]
        spare = self.n_local_routed_experts - self.n_local_logical_routed_experts
        self.combined_redundant_experts = spare // self.num_redundants if self.num_redundants else 0
        self.solver, self.debug = solver, debug
        self.deep_ep_initialized = False

    def _create(self, exchange: str | Exchange, slots: Int32s | None = None) -> None:
        """Agrees with the other ranks, makes the native planner, and joins the exchange. slots: a general placement."""
        config, ranks = self._config, self._ranks
        ranks.settle(config, exchange, None if slots is None else address_of(slots))
        with ExitStack() as undo:
            with ranks.telling(config.device):
                handle = self._handle = Handle(_c.load(), config)
                self._finalizer = weakref.finalize(self, handle.close)
                undo.callback(self.close)
                self.number = handle.number  #: how the operators of torch.ops.lplb name this planner
                handle.debug = self.debug
                self._decide_ratios()
                self.n_nodes: int = config.n_nodes or default_nodes(self.ep_size)
                torch = loaded_torch()
                if torch is not None:
                    self._load_ops()
                self._plan = torch.empty(1, dtype=torch.int32, device=self.device) if torch else None
                if slots is not None:
                    handle.check(handle.library.planner_set_placement(handle.opened(), address_of(slots), slots.size, self._stream()))
            ranks.agree(config, config.device)  # every rank has made its planner
            ranks.connect(self, exchange, self.debug)
            undo.pop_all()

    # ---- placement ----

    def update_redundancy_mapping(self, workload: Array | None = None) -> tuple[Array, Array, Array]:
        """Places the experts by the topology: in order, or, given a history of tokens per logical expert [n_logical], reordered by
        EPLB and each rank's heaviest replicated. All ranks must give the same history.

        Returns (phy2log int32 [n_routed_experts], log2phy int32 [n_logical, 2], -1 padded, original first, logcnt int32 [n_logical]).
        Waits for the planner's device.
        """
        self._check_kind("update_redundancy_mapping", general=False, instead="update_placement")
        handle, history = self._handle, None
        if workload is not None:
            history = host_numbers("workload", workload, np.float64, most=_c.MAX_LOGICAL).reshape(-1)
            if history.size != handle.n_logical:
                raise broken_rule("workload", f"must have n_logical_routed_experts = {handle.n_logical} elements", history.size)
        pointer = None if history is None else address_of(history)
        self._ranks.compare_placement(self._config, history=pointer)
        mapping = self._placed(handle.library.planner_place(handle.opened(), pointer, self._stream()))
        self._placed_by = history
        return mapping

    def update_placement(self, phy2log: Array) -> tuple[Array, Array, Array]:
        """Sets another placement of the same sizes on a planner made by from_placement. Returns mapping(). Waits for the device."""
        self._check_kind("update_placement", general=True, instead="update_redundancy_mapping")
        slots: Int32s = host_integers("phy2log", phy2log, 1, np.int32, _c.MAX_PHYSICAL)
        if slots.size != self.n_routed_experts:
            raise broken_rule("phy2log", f"must have {self.n_routed_experts} slots as before", slots.size)
        handle = self._handle
        self._ranks.compare_placement(self._config, phy2log=address_of(slots))
        return self._placed(handle.library.planner_set_placement(handle.opened(), address_of(slots), slots.size, self._stream()))

    def set_capacity(self, speed: Array | None = None, fixed: Array | None = None) -> None:
        """What the ranks may hold, from the next plan on: the one that takes longest is made as short as it can be.

        speed: integers [ep_size], 1 .. 65536: how many units a rank does in the time in which a normal one does 1024 (922 for one that is 10%
        slower). fixed: integers [ep_size], 0 .. 2**24 units of a normal rank: what else it has to do before. None: all 1024, all 0; both
        None: the ranks are alike, as in a new planner. Every rank sets the same, between the same plans: the counts that travel carry a
        digest of it. Holds until set again, under new placements too. Waits for the planner's device; captured CUDA graphs follow.

        The first call comes before the planner's first plan, else WrongOrder: planners whose ranks may differ plan by kernels of their own.
        Who knows of no differences yet calls set_capacity() there, and sets them later.
        """
        speeds, costs = capacities(speed, fixed, self.ep_size)
        if alike(speeds, costs):
            speeds = costs = None
        self._ranks.compare_capacity(self._config, speeds, costs)
        handle = self._handle
        handle.check(handle.library.planner_set_capacity(
            handle.opened(), None if speeds is None else address_of(speeds), None if costs is None else address_of(costs), self.ep_size,
            self._stream()))
        self.speed, self.fixed = speeds, costs
        self._decide_ratios()

    @property
    def _counts_tokens(self) -> bool:
        return self.unit == 1 and self.speed is None and self.fixed is None

    def _decide_ratios(self) -> None:
        """A plan has ratios where its slots have classes and its cost is tokens."""
        self._handle.n_ratios = self.ep_size * self._config.n_redundant if self._counts_tokens else 0

    def _placed(self, status: int) -> tuple[Array, Array, Array]:
        self._handle.check(status)
        mapping = self.mapping()
        self.phy2log = mapping[0]
        return mapping

    def mapping(self) -> tuple[Array, Array, Array]:
        """The placement: (phy2log int32 [n_physical], log2phy int32 [n_logical, max(2, most replicas)], -1 padded, original first,
        logcnt int32 [n_logical])."""
        handle = self._handle
        pointer, library = handle.opened(), handle.library
        most = ctypes.c_int64()
        handle.check(library.planner_max_replicas(pointer, ctypes.byref(most)))
        width, phy2log = max(2, most.value), np.empty(handle.n_physical, dtype=np.int32)
        log2phy = np.empty((handle.n_logical, width), dtype=np.int32)
        logcnt = np.empty(handle.n_logical, dtype=np.int32)
        handle.check(library.planner_phy2log(pointer, address_of(phy2log), phy2log.size))
        handle.check(library.planner_log2phy(pointer, address_of(log2phy), handle.n_logical, width))
        handle.check(library.planner_logcnt(pointer, address_of(logcnt), logcnt.size))
        return self._output(phy2log), self._output(log2phy), self._output(logcnt)

    # ---- plan ----

    def run(self, idx: A, avail_counter: Array | None, n_sms: int | None = None) -> A:
        """Physical ids for logical ids: count, exchange among the ranks of group, solve, redirect.

        idx: int64 or int32, any shape, -1 (no expert, stays -1) .. n_logical-1. avail_counter: one int32 or int64 that grows by the
        number of groups solved, or None. n_sms: at most so many multiprocessors are used, None: as many as measured best.
        Returns ids of idx's shape and type. On CUDA works on the current stream and does not wait. Without redundant experts nothing
        is exchanged or solved.
        """
        if n_sms is None:
            n_sms = 0
        elif type(n_sms) is not int or not 0 < n_sms <= _MAX_BLOCKS:
            n_sms = integer("n_sms", n_sms, 1, _c.MAX_BLOCKS)
        operators = self._ops
        if operators is not None and isinstance(idx, operators.Tensor):  # first, since this is counted in tenths of a microsecond
            physical: A
            if operators.is_compiling():
                physical = operators.run(idx, avail_counter, self.number, n_sms, self._plan)
                return physical
            try:
                physical = operators.run(idx, avail_counter, self.number, n_sms)
                return physical
            except Exception as error:
                operators.explain(error, idx=idx, avail_counter=avail_counter)
                raise
        calls = self._calls("idx", idx)
        if self._ops is not operators:  # loaded just now
            return self.run(idx, avail_counter, n_sms or None)
        return calls.run(idx, avail_counter, self.number, n_sms)

    def count_workload(self, idx: A, n_sms: int) -> tuple[A, A]:
        """(tokens per logical expert int32 [n_logical], cumulative counts int32 [n_sms, n_logical] for weighted_select_target)."""
        n_sms = integer("n_sms", n_sms, 1, _c.MAX_CHUNKS)
        return self._explained(("idx",), self._calls("idx", idx).count, idx, self.number, n_sms, self.n_logical_routed_experts)

    def solve_probs(self, workload: A, avail_counter: Array | None) -> tuple[A, A]:
        """Plans from counts and returns the plan as ratios.

        workload: int32 or int64, n_logical elements: this rank's counts with a group, everybody's without. avail_counter: as in run.
        Returns (probs float32 [n_group, group_size, num_redundants], the share of each slot class that stays at the original;
        global workload float32 [n_group, group_size, n_local_logical], the sum over ranks by logical expert, scaled to maximum 1).
        """
        self._check_kind("solve_probs", general=False, instead="solve and redirect")
        self._check_tokens("solve_probs")
        groups, ranks = self.n_group, self.group_size
        return self._solve(workload, avail_counter, [groups, ranks, self.num_redundants],
                           [groups, ranks, self.n_local_logical_routed_experts])

    def weighted_select_target(self, idx: A, o_weight: A, local_workload_by_sm: A, n_sms: int) -> A:
        """Physical ids by ratios: of the c occurrences of an expert in idx the first round(ratio * c) go to the original.

        o_weight: from solve_probs; local_workload_by_sm, n_sms: as count_workload returned and took it, for the same idx.
        """
        self._check_kind("weighted_select_target", general=False, instead="solve and redirect")
        self._check_tokens("weighted_select_target")
        n_sms = integer("n_sms", n_sms, 1, _c.MAX_CHUNKS)
        rows = shape_of(local_workload_by_sm)
        if len(rows) != 2 or rows[0] != n_sms:
            rule = f"must have n_sms = {n_sms} rows of n_logical = {self._handle.n_logical} counts"
            raise broken_rule("local_workload_by_sm", rule, f"shape {rows}" if rows else type(local_workload_by_sm).__name__)
        if not self._handle.has_replicas:
            return self.run(idx, None)  # there is nothing to weigh
        return self._explained(("idx", "o_weight", "local_workload_by_sm"), self._calls("idx", idx).redirect_by_ratio, idx, o_weight,
                               local_workload_by_sm, self.number)

    def solve(self, workload: A, avail_counter: Array | None = None) -> None:
        """Plans from counts, for any placement; redirect then applies the plan, and info, split and assignment read it.

        workload: as in solve_probs, or int [ep_size, n_logical], the counts of all ranks in rank order. With a group, the row of this rank
        is what travels, and the others' rows come from the others.
        """
        ratio_shape = [self.n_group, self.group_size, self.num_redundants if self._handle.n_ratios else 0]
        self._solve(workload, avail_counter, ratio_shape, [self.n_logical_routed_experts])

    def _solve(self, workload: A, avail_counter: Array | None, ratio_shape: list[int], scaled_shape: list[int]) -> tuple[A, A]:
        return self._explained(("workload", "avail_counter"), self._calls("workload", workload).solve, workload, avail_counter,
                               self._token(), self.number, ratio_shape, scaled_shape)

    def redirect(self, idx: A, n_sms: int | None = None) -> A:
        """Physical ids by the latest plan. The loads equal the plan exactly if idx are the ids that were counted."""
        blocks = 0 if n_sms is None else integer("n_sms", n_sms, 1, _c.MAX_BLOCKS)
        return self._explained(("idx",), self._calls("idx", idx).redirect, idx, self._token(), self.number, blocks)

    def layout(self, physical: A, *, experts: A | None = None, received: Callable[[A], A] | None = None, row_of_slot: A | None = None,
               n_rows: int | None = None, max_received: int | None = None) -> Layout[A]:
        """Where the rows of a dispatch go, see Layout. What is sent is counted; what is received follows from the latest plan, on every
        rank, where each lays out its ids of that plan. WrongOrder where there is none. On CUDA does not wait: Layout.wait() does, and
        raises what is wrong with the ids.

        physical: slots, -1 for no expert, any shape, as run or redirect returned them. experts: the ids they were made from, of the same
        type: checked that each slot holds its expert. received: None, or a function that is given what this rank sends, int32 [ep_size,
        n_rows], and returns what it receives, in the same form, by an exchange of its own (all_to_all_single): for planners without
        replicas, whose run exchanges nothing, with tokens="same", and for ids of an earlier plan. row_of_slot: integers [n_physical] on
        the device: each slot's row in its rank's buffers of n_rows rows, such as those of Replicas; None: the slots in order.
        max_received: so many rows at most are received, and by_row needs no wait; for CUDA graphs.
        """
        from .layout import lay_out

        return lay_out(self, physical, experts, received, row_of_slot, n_rows, max_received)

    def _token(self) -> torch.Tensor | None:
        """What stands for the plan inside the planner where a compiler must see who writes and who reads it, see _ops/operators.py."""
        torch = loaded_torch()
        return self._plan if torch is not None and torch.compiler.is_compiling() else None

    def _calls(self, name: str, array: A) -> Calls[A]:
        """The calls for arrays of this kind."""
        device = self._handle.device
        if isinstance(array, np.ndarray):
            if device >= 0:
                raise broken_rule(name, f"must be a tensor on the planner's device cuda:{device}", "a numpy array")
            return numpy_calls
        if not is_tensor(array):
            raise broken_rule(name, f"must be a torch tensor{' or a numpy array' if device < 0 else ''}", type(array).__name__)
        operators: Calls[A] = self._ops or self._load_ops()
        return operators

    def _explained(self, names: tuple[str, ...], call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Makes the call. Where PyTorch refuses an array before the library sees it, the error is worded as the library's are. names: of
        the first arguments, which are arrays."""
        operators = self._ops
        if operators is None or operators.is_compiling():
            return call(*arguments, **options)
        try:
            return call(*arguments, **options)
        except Exception as error:
            operators.explain(error, **dict(zip(names, arguments)))
            raise

    def _load_ops(self) -> Any:
        from ._ops import operators  # which imports torch

        self._ops = operators
        return operators

    def _check_kind(self, call: str, general: bool, instead: str) -> None:
        if self._general is not general:
            kinds = ("made with a topology", "made by from_placement")
            raise broken_rule("planner", f"must be {kinds[general]} for {call} (use {instead})", f"one {kinds[not general]}")

    def _check_tokens(self, call: str) -> None:
        if not self._counts_tokens:
            raise broken_rule("planner", f"must count tokens on ranks that are alike for {call}, whose ratios are shares of tokens (use solve "
                              "and redirect)", f"unit = {self.unit!r}" if self.unit != 1 else "one with capacities")

    # ---- results ----

    def info(self) -> Info:
        """What the latest plan achieved, and its certificate. Waits for the GPU. WrongOrder before the first plan."""
        handle = self._handle
        plan = _c.PlanInfoStruct()
        groups = (_c.GroupInfoStruct * self.n_group)()
        levels: Any = [None] * self.n_group
        handle.check(handle.library.planner_info(handle.opened(), ctypes.byref(plan), ctypes.byref(groups), self.n_group, self._stream()))
        if not self._counts_tokens:
            levels = (_c.LevelStruct * self.n_group)()
            handle.check(handle.library.planner_levels(handle.opened(), ctypes.byref(levels), self.n_group, self._stream()))
        return Info(
            [group_info(group, self.group_size, index * self.group_size, levels[index]) for index, group in enumerate(groups)],
            plan.invalid_ids, Locality(plan.own_rank, plan.own_node, plan.other_nodes), plan.overflow)

    def split(self) -> Array:
        """Tokens per physical expert in the latest plan, from all ranks together: int64 [n_physical]. Waits for the GPU."""
        return self._tokens(self._handle.library.planner_split)

    def assignment(self) -> Array:
        """The part of split() that comes from this planner's rank (all of it where the planner has none). Waits for the GPU."""
        return self._tokens(self._handle.library.planner_assignment)

    def _tokens(self, read: Callable[[_c.Address, _c.Address, int, _c.Address], int]) -> Array:
        tokens: Int64s = np.empty(self.n_routed_experts, dtype=np.int64)
        self._handle.check(read(self._handle.opened(), address_of(tokens), tokens.size, self._stream()))
        return self._output(tokens)

    def history(self, at: int | None = None, *, reset: bool = False) -> Array:
        """Tokens of each logical expert, from all ranks together, over all plans since the planner was made or its history was reset:
        int64 [n_logical], for lplb.place (lplb.history for several planners at once). For planners made with history=True. Plans of
        CUDA graphs are in it, and a new placement leaves it. Waits for the GPU.

        Ranks make the same plans, each in its own time; the history is read where the call stands in the stream. So all ranks that call
        at the same place of their program read the same numbers. at: how many plans must be in it: WrongOrder on a rank that is
        elsewhere, which would place experts differently. reset: the next history starts here.
        """
        from .records import read_history

        return self._output(read_history(self, at, reset))

    def metrics(self) -> Metrics:
        """What the plans so far have achieved, for planners made with metrics=True. Reads memory that the GPU writes: waits for nothing,
        from any thread, also while plans are made; those that are queued and not done are not in it."""
        from .records import read_metrics

        if not self._config.record & _c.RECORD_METRICS:
            raise WrongOrder("metrics: needs a planner made with metrics=True; this one keeps none")
        return read_metrics(self)

    def reset_metrics(self) -> None:
        """Counts anew. In the order of the stream as a plan is, waits for nothing, and can be captured in a CUDA graph."""
        self._handle.check(self._handle.library.planner_reset(self._handle.opened(), _c.RECORD_METRICS, self._stream()))

    # ---- exchange ----

    @property
    def ep_group(self) -> torch.distributed.ProcessGroup | None:
        """The process group of the ranks; None without one, once it is destroyed, and after close()."""
        return self._ranks.group

    @property
    def exchange(self) -> Exchange | None:
        """What the counts of all ranks travel by; None without a group and after close()."""
        return None if self._handle.native is None else self._handle.exchange

    def init_from_deep_ep(self, buffer: Any) -> None:
        """For callers who have a deep_ep.Buffer (or ElasticBuffer) of the same ranks. The exchange was set up with the planner and uses
        none of its memory; on several nodes it now uses the NVSHMEM that the buffer has started. Calling it again does nothing."""
        if not self.deep_ep_initialized and buffer is not None and self.ep_group is not None and self._handle.device >= 0:
            from .exchange import join_deep_ep

            join_deep_ep(self, buffer)
        self.deep_ep_initialized = True

    # ---- life ----

    def close(self) -> None:
        """Frees the planner's memory; on CUDA waits for the device. Also done when the planner is garbage. A call that another thread is
        in the middle of comes to its end first; every later one raises WrongOrder."""
        self._finalizer()
        self._ranks.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return make_again, parts(self)

    def __deepcopy__(self, memo: Any = None) -> Self:
        """Another planner with the same settings, group and placement, without a plan. With a group collective."""
        return copied(self)

    __copy__ = __deepcopy__

    def __repr__(self) -> str:
        what = "closed" if self._handle.native is None else str(self.device)
        return (f"Planner(ep_size={self.ep_size}, n_logical={self.n_logical_routed_experts}, n_physical={self.n_routed_experts}, "
                f"group_size={self.group_size}, num_redundants={self.num_redundants}, {what})")

    def _stream(self) -> int | None:
        return None if self._handle.device < 0 else self._ops.stream(self._handle.device)

    def _output(self, array: npt.NDArray[Any]) -> Array:
        """A host array as the planner hands out arrays: a tensor on its device, or the array itself."""
        if not self._as_tensors:
            return array
        return loaded_torch().from_numpy(array).to(self.device)  # type: ignore[no-any-return]
