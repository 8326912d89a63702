"""The planner: which replica each token of a micro-batch goes to, so that the busiest rank has as little as possible, provably."""

from __future__ import annotations

import ctypes
import importlib
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _c, _numpy_ops
from ._arrays import (
    Array, Int32s, Int64s, address, as_tensor, host_integers, host_numbers, integer, is_tensor, loaded_torch, shape_of,
    truth)
from ._device import check_exchange, check_group, default_nodes, device_ordinal
from ._c.handle import Handle
from .errors import broken_rule, shown
from .info import Info, Locality, group_info

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from ._exchange import Exchange

EXCHANGES = ("auto", "symm", "ipc", "nccl")
TOKENS = ("own", "same")
_MAX_BLOCKS = _c.MAX_BLOCKS
_TENSORS = {  # the arguments of an operator that are tensors, too: those that follow the first one
    "run": ("avail_counter",), "solve": ("avail_counter",), "redirect_by_ratio": ("o_weight", "local_workload_by_sm")}


class Planner:
    """Plans one MoE layer's tokens over the ranks of an expert-parallel group.

    redundant_to_original: integers [group_size, num_redundants], on any device: slot d of rank r replicates slot d of rank
        redundant_to_original[r, d] of the same group. Each column is a permutation of 0 .. group_size-1.
    n_routed_experts, n_logical_routed_experts: physical experts with the redundant ones, and logical experts.
    ep_size, group: ranks, or the torch.distributed group they form; one of the two is needed. With a group every rank has tokens of its
        own and every plan is made from the counts of all of them (see tokens); without, from the given ids or counts alone.
    device: "cpu", "cuda", "cuda:1", an ordinal or a torch.device. None: the device of a CUDA topology; else the current GPU if there
        is one; else, and for a topology in a numpy array, the CPU.
    n_nodes: hosts, whose ranks are consecutive. None: with a group, the hosts that its ranks say they are on; else ep_size / 8, where 8
        divides ep_size, else 1.
    rank: which rank plans. None: the rank in group; without a group, the ids are those of all ranks together.
    solver: "flow" (exact, certified) or "ipm" (CUDA: interior point method, near-optimal).
    exchange: how the counts of all ranks travel: "nccl" (torch.distributed, whatever its backend), "symm" or "ipc" (over NVLink, see
        lplb.exchange), "auto" (the fastest there is), or an exchange that planners of one stream share: another planner's, which ends
        with the last planner that uses it, or one made by lplb.exchange.create, which the caller closes.
    tokens: "own": each rank of group has tokens of its own. "same": all ranks of group hold the same tokens, and every rank must choose
        the same replica for each: nothing is exchanged. Given "own" where the ranks hold the same tokens, each rank would take every
        token for another one and the ranks would choose different replicas.
    debug: an id out of range raises at the call, which then waits for the GPU; with tokens="same", so do ids that differ between ranks.
        Otherwise an id out of range becomes -1 and is counted in info().

    With a group, making a planner is collective: the ranks compare their arguments, and where one fails all fail. The placement is
    compared whenever counts travel, so that a rank with another history is found: Disagreement, see lplb.h.

    Tensors in, tensors out, on the planner's device; numpy arrays in, numpy arrays out (CPU). A planner may be used by one thread at a
    time: concurrent calls raise Busy. Errors are subclasses of LplbError.
    """

    r2o: Array  #: [group_size, num_redundants] int32
    o2r: Array  #: its inverse: rank o2r[r, d] holds the copy of slot d of rank r
    phy2log: Array  #: [n_routed_experts] int32, the logical expert of every slot

    def __init__(self, redundant_to_original: Array, n_routed_experts: int, n_logical_routed_experts: int, ep_size: int | None = None,
                 group: torch.distributed.ProcessGroup | None = None, *, device: Any = None, n_nodes: int | None = None,
                 rank: int | None = None, solver: str = "flow", exchange: str | Exchange = "auto", tokens: str = "own",
                 debug: bool = False) -> None:
        self._group(ep_size, group, rank, tokens)
        with self._telling():
            r2o = self._start(redundant_to_original, n_routed_experts, n_logical_routed_experts, device, n_nodes, solver, exchange, debug)
        self._create(exchange)
        num_redundants = self.num_redundants = r2o.shape[1]
        spare = self.n_local_routed_experts - self.n_local_logical_routed_experts
        self.combined_redundant_experts = spare // num_redundants if num_redundants else 0
        self.r2o = self._output(r2o)
        self.o2r = self._output(np.argsort(r2o, axis=0, kind="stable").astype(np.int32))
        self.phy2log = self.mapping()[0]

    def _start(self, redundant_to_original: Array, n_routed_experts: int, n_logical_routed_experts: int, device: Any,
               n_nodes: int | None, solver: str, exchange: str | Exchange, debug: bool) -> Int32s:
        """Checks the arguments of a planner with a topology. Returns r2o."""
        r2o: Int32s = host_integers("redundant_to_original", redundant_to_original, 2, np.int32, _c.MAX_PHYSICAL)
        group_size, num_redundants = r2o.shape
        if group_size == 0:
            raise broken_rule("redundant_to_original", "must have at least one row", f"shape {list(r2o.shape)}")
        if (np.sort(r2o, axis=0) != np.arange(group_size)[:, None]).any():
            raise broken_rule("redundant_to_original", f"each column must be a permutation of 0 .. {group_size - 1}", r2o.T.tolist())
        n_logical = self.n_logical_routed_experts = integer("n_logical_routed_experts", n_logical_routed_experts, 1)
        n_physical = self.n_routed_experts = integer("n_routed_experts", n_routed_experts, 1)
        if self.ep_size % group_size:
            raise broken_rule("ep_size", f"must be a multiple of the topology's {group_size} ranks", self.ep_size)
        if n_logical % self.ep_size:
            raise broken_rule("n_logical_routed_experts", f"must be a multiple of ep_size = {self.ep_size}", n_logical)
        if n_physical < n_logical or (n_physical - n_logical) % (self.ep_size * max(1, num_redundants)):
            rule = f"must be n_logical_routed_experts = {n_logical} plus a multiple of ep_size * num_redundants = "
            raise broken_rule("n_routed_experts", f"{rule}{self.ep_size} * {num_redundants}", n_physical)
        if n_physical > n_logical and not num_redundants:
            raise broken_rule("redundant_to_original", "must have a column for each class of redundant slots", f"shape {list(r2o.shape)}")
        used = r2o if n_physical > n_logical else np.empty((group_size, 0), dtype=np.int32)
        self._configure(redundant_to_original, used, group_size, device, n_nodes, solver, exchange, debug)
        return r2o

    @classmethod
    def from_placement(cls, phy2log: Array, *, ep_size: int | None = None, n_logical: int | None = None,
                       group: torch.distributed.ProcessGroup | None = None, group_size: int | None = None, device: Any = None,
                       n_nodes: int | None = None, rank: int | None = None, solver: str = "flow", exchange: str | Exchange = "auto",
                       tokens: str = "own", debug: bool = False) -> Self:
        """A planner for any placement, such as EPLB's: any number of replicas per expert, anywhere in the group.

        phy2log: integers [n_physical], the logical expert of every slot; rank r owns n_physical / ep_size consecutive slots; every
        logical expert stands at least once. n_logical: None takes max(phy2log) + 1. group_size: ranks that balance among themselves
        and hold all replicas of an expert between them, None: ep_size. The rest as for Planner.
        """
        self = cls.__new__(cls)
        self._group(ep_size, group, rank, tokens)
        with self._telling():
            slots: Int32s = host_integers("phy2log", phy2log, 1, np.int32, _c.MAX_PHYSICAL)
            if not slots.size:
                raise broken_rule("phy2log", "must have at least one slot", f"shape {list(slots.shape)}")
            self.n_routed_experts = slots.size
            self.n_logical_routed_experts = integer("n_logical", int(slots.max()) + 1 if n_logical is None else n_logical, 1)
            size = self.ep_size if group_size is None else integer("group_size", group_size, 1)
            if self.ep_size % size:
                raise broken_rule("group_size", f"must divide ep_size = {self.ep_size}", size)
            if slots.size % self.ep_size:
                raise broken_rule("phy2log", f"must have a multiple of ep_size = {self.ep_size} slots", slots.size)
            self._configure(phy2log, None, size, device, n_nodes, solver, exchange, debug)
        self._create(exchange, slots)
        self.r2o = self.o2r = self._output(np.empty((size, 0), dtype=np.int32))
        self.num_redundants = self.combined_redundant_experts = 0
        self.phy2log = self.mapping()[0]
        return self

    def _telling(self) -> Any:
        """A failure inside is told to all ranks of the group, which wait for this one."""
        if self.ep_group is None:
            return nullcontext()
        return importlib.import_module("._agree", __package__).telling(self.ep_group, self._collective_device())

    def _collective_device(self) -> int:
        """The device whose collectives serve the planner's group, before and after the planner's own device is known."""
        config = getattr(self, "_config", None)
        if config is not None:
            return int(config.device)
        torch = loaded_torch()
        return int(torch.cuda.current_device()) if torch is not None and torch.cuda.is_available() else _c.DEVICE_CPU

    def _group(self, ep_size: int | None, group: Any, rank: int | None, tokens: str) -> None:
        """Sets ep_size, ep_group, rank and tokens."""
        if not isinstance(tokens, str) or tokens not in TOKENS:
            raise broken_rule("tokens", f"must be one of {', '.join(TOKENS)}", shown(tokens))
        self._group_of_ranks: Any = None
        self.tokens = tokens
        if group is None:
            if ep_size is None:
                raise broken_rule("ep_size", "must be given where group is not", None)
            self.ep_size = integer("ep_size", ep_size, 1)
            self.rank: int | None = None if rank is None else integer("rank", rank, 0)
        else:
            check_group(group)
            import torch.distributed as dist

            self.ep_size = group.size()
            # Weak: it belongs to torch.distributed, and gloo's processes end badly if it outlives destroy_process_group.
            self._group_of_ranks = weakref.ref(group)
            if ep_size is not None and integer("ep_size", ep_size, 1) != self.ep_size:
                raise broken_rule("ep_size", f"must be the size of group, {self.ep_size}", ep_size)
            self.rank = dist.get_rank(group)
            if self.rank < 0:
                raise broken_rule("group", "must contain this process", group)
            if rank is not None and integer("rank", rank, 0) != self.rank:
                raise broken_rule("rank", f"must be this process's rank in group, {self.rank}", rank)
        if self.rank is not None and self.rank >= self.ep_size:
            raise broken_rule("rank", f"must be below ep_size = {self.ep_size}", self.rank)

    def _configure(self, given: Any, r2o: Int32s | None, group_size: int, device: Any, n_nodes: int | None, solver: str,
                   exchange: str | Exchange, debug: bool) -> None:
        """Fills in what the native planner is made from, and the attributes that follow from the sizes."""
        if not isinstance(solver, str) or solver not in _c.SOLVERS:
            raise broken_rule("solver", f"must be one of {', '.join(_c.SOLVERS)}", shown(solver))
        check_exchange(exchange, EXCHANGES)
        debug = truth("debug", debug)
        ordinal = device_ordinal(device, given)
        nodes = 0 if n_nodes is None else integer("n_nodes", n_nodes, 1)
        if nodes and self.ep_size % nodes:
            raise broken_rule("n_nodes", f"must divide ep_size = {self.ep_size}", nodes)
        whole_batch = self.rank is None or self.tokens == "same"
        self._config = _c.Config(
            struct_size=ctypes.sizeof(_c.Config), device=ordinal, solver=_c.SOLVERS[solver], ep_size=self.ep_size,
            rank=_c.WHOLE_BATCH if whole_batch else self.rank, n_nodes=nodes, n_logical=self.n_logical_routed_experts,
            n_physical=self.n_routed_experts, group_size=group_size, n_redundant=0 if r2o is None else r2o.shape[1],
            r2o=None if r2o is None else address(r2o),
            policy=0 if isinstance(exchange, str) else _c.POLICIES[exchange.policy])
        self._kept = r2o  # the config holds its address
        self._general = r2o is None
        torch = loaded_torch()
        self._as_tensors = torch is not None and (ordinal >= 0 or not isinstance(given, np.ndarray))
        self.device: Any = torch.device("cuda", ordinal) if ordinal >= 0 else torch.device("cpu") if torch else "cpu"
        self._ops: Any = None
        self.group_size = group_size
        self.n_group = self.ep_size // group_size
        self.n_local_routed_experts = self.n_routed_experts // self.ep_size
        self.n_local_logical_routed_experts = self.n_logical_routed_experts // self.ep_size
        self.solver, self.debug = solver, debug
        self.deep_ep_initialized = False

    def _create(self, exchange: str | Exchange, slots: Int32s | None = None) -> None:
        """Agrees with the other ranks, makes the native planner, and joins the exchange. slots: a general placement."""
        config, group = self._config, self.ep_group
        if group is not None:
            agree = importlib.import_module("._agree", __package__)
            kind = exchange if isinstance(exchange, str) else "a shared exchange"
            agree.settle(group, config, f"exchange={kind}, tokens={self.tokens}", None if slots is None else address(slots))
        with self._telling():
            handle = self._handle = Handle(_c.load(), config)
            self._finalizer = weakref.finalize(self, handle.close)
            self.number = handle.number  #: how the operators of lplb.ops name this planner
            handle.debug = self.debug
            self.n_nodes: int = config.n_nodes or default_nodes(self.ep_size)
            torch = loaded_torch()
            if torch is not None:
                self._load_ops()
            self._plan = torch.empty(1, dtype=torch.int32, device=self.device) if torch else None
            try:
                if slots is not None:
                    handle.check(handle.library.planner_set_placement(handle.opened(), address(slots), slots.size, self._stream()))
            except BaseException:
                self.close()
                raise
        try:
            if group is not None:
                agree.agree(group, config, device=config.device)  # every rank has made its planner
            self._connect(exchange)
        except BaseException:
            self.close()
            raise

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
        pointer = None if history is None else address(history)
        self._agree_on_placement(history=pointer)
        handle.check(handle.library.planner_place(handle.opened(), pointer, self._stream()))
        mapping = self.mapping()
        self.phy2log = mapping[0]
        return mapping

    def update_placement(self, phy2log: Array) -> tuple[Array, Array, Array]:
        """Sets another placement of the same sizes on a planner made by from_placement. Returns mapping(). Waits for the device."""
        self._check_kind("update_placement", general=True, instead="update_redundancy_mapping")
        slots: Int32s = host_integers("phy2log", phy2log, 1, np.int32, _c.MAX_PHYSICAL)
        if slots.size != self.n_routed_experts:
            raise broken_rule("phy2log", f"must have {self.n_routed_experts} slots as before", slots.size)
        handle = self._handle
        self._agree_on_placement(phy2log=address(slots))
        handle.check(handle.library.planner_set_placement(handle.opened(), address(slots), slots.size, self._stream()))
        mapping = self.mapping()
        self.phy2log = mapping[0]
        return mapping

    def _agree_on_placement(self, **arrays: int | None) -> None:
        """Where nothing travels that could be compared later, a new placement is compared at once."""
        if self.tokens == "same" and self.ep_group is not None:
            agree = importlib.import_module("._agree", __package__)
            agree.agree(self.ep_group, self._config, device=self._config.device, **arrays)

    def mapping(self) -> tuple[Array, Array, Array]:
        """The placement: (phy2log int32 [n_physical], log2phy int32 [n_logical, max(2, most replicas)], -1 padded, original first,
        logcnt int32 [n_logical])."""
        handle = self._handle
        pointer, library = handle.opened(), handle.library
        most = ctypes.c_int64()
        handle.check(library.planner_max_replicas(pointer, ctypes.byref(most)))
        phy2log = np.empty(handle.n_physical, dtype=np.int32)
        width = max(2, most.value)
        log2phy = np.empty((handle.n_logical, width), dtype=np.int32)
        logcnt = np.empty(handle.n_logical, dtype=np.int32)
        handle.check(library.planner_phy2log(pointer, address(phy2log), phy2log.size))
        handle.check(library.planner_log2phy(pointer, address(log2phy), handle.n_logical, width))
        handle.check(library.planner_logcnt(pointer, address(logcnt), logcnt.size))
        return self._output(phy2log), self._output(log2phy), self._output(logcnt)

    # ---- plan ----

    def run(self, idx: Array, avail_counter: Array | None, n_sms: int | None = None) -> Array:
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
            if operators.is_compiling():
                return operators.run(idx, avail_counter, self.number, n_sms, self._plan)  # type: ignore[no-any-return]
            try:
                return operators.run(idx, avail_counter, self.number, n_sms)  # type: ignore[no-any-return]
            except Exception as error:
                operators.explain(error, idx=idx, avail_counter=avail_counter)
                raise
        if isinstance(idx, np.ndarray):
            return self._numpy("run", idx, avail_counter, self.number, n_sms)  # type: ignore[no-any-return]
        return self._call("run", idx, avail_counter, self.number, n_sms)  # type: ignore[no-any-return]

    def count_workload(self, idx: Array, n_sms: int) -> tuple[Array, Array]:
        """(tokens per logical expert int32 [n_logical], cumulative counts int32 [n_sms, n_logical] for weighted_select_target)."""
        n_sms = integer("n_sms", n_sms, 1, _c.MAX_CHUNKS)
        counts: tuple[Array, Array] = self._call("count", idx, self.number, n_sms, self.n_logical_routed_experts)
        return counts

    def solve_probs(self, workload: Array, avail_counter: Array | None) -> tuple[Array, Array]:
        """Plans from counts and returns the plan as ratios.

        workload: int32 or int64, n_logical elements: this rank's counts with a group, everybody's without. avail_counter: as in run.
        Returns (probs float32 [n_group, group_size, num_redundants], the share of each slot class that stays at the original;
        global workload float32 [n_group, group_size, n_local_logical], the sum over ranks by logical expert, scaled to maximum 1).
        """
        self._check_kind("solve_probs", general=False, instead="solve and redirect")
        ratio_shape = [self.n_group, self.group_size, self.num_redundants]
        scaled_shape = [self.n_group, self.group_size, self.n_local_logical_routed_experts]
        probs: tuple[Array, Array] = self._call("solve", workload, avail_counter, self._token(), self.number, ratio_shape, scaled_shape,
                                                name="workload")
        return probs

    def weighted_select_target(self, idx: Array, o_weight: Array, local_workload_by_sm: Array, n_sms: int) -> Array:
        """Physical ids by ratios: of the c occurrences of an expert in idx the first round(ratio * c) go to the original.

        o_weight: from solve_probs; local_workload_by_sm, n_sms: as count_workload returned and took it, for the same idx.
        """
        self._check_kind("weighted_select_target", general=False, instead="solve and redirect")
        n_sms = integer("n_sms", n_sms, 1, _c.MAX_CHUNKS)
        rows = shape_of(local_workload_by_sm)
        if len(rows) != 2 or rows[0] != n_sms:
            what = f"shape {rows}" if rows else type(local_workload_by_sm).__name__
            raise broken_rule("local_workload_by_sm", f"must have n_sms = {n_sms} rows of n_logical = {self._handle.n_logical} counts", what)
        if self._handle.has_replicas:
            physical: Array = self._call("redirect_by_ratio", idx, o_weight, local_workload_by_sm, self.number)
        else:  # there is nothing to weigh
            physical = self._call("run", idx, None, self.number, 0)
        return physical

    def solve(self, workload: Array, avail_counter: Array | None = None) -> None:
        """Plans from counts, for any placement; redirect then applies the plan, and info, split and assignment read it.

        workload: as in solve_probs, or int [ep_size, n_logical], the counts of all ranks in rank order. With a group, the row of this rank
        is what travels, and the others' rows come from the others.
        """
        empty_shape = [self.n_group, self.group_size, self.num_redundants if self._handle.n_ratios else 0]
        scaled_shape = [self.n_logical_routed_experts]
        self._call("solve", workload, avail_counter, self._token(), self.number, empty_shape, scaled_shape, name="workload")

    def redirect(self, idx: Array, n_sms: int | None = None) -> Array:
        """Physical ids by the latest plan. The loads equal the plan exactly if idx are the ids that were counted."""
        blocks = 0 if n_sms is None else integer("n_sms", n_sms, 1, _c.MAX_BLOCKS)
        physical: Array = self._call("redirect", idx, self._token(), self.number, blocks)
        return physical

    def _token(self) -> Any:
        """What stands for the plan inside the planner where a compiler must see who writes and who reads it, see lplb.ops."""
        torch = loaded_torch()
        return self._plan if torch is not None and torch.compiler.is_compiling() else None

    def _call(self, operator: str, array: Any, *arguments: Any, name: str = "idx") -> Any:
        if isinstance(array, np.ndarray):
            return self._numpy(operator, array, *arguments, name=name)
        if not is_tensor(array):
            raise self._not_an_array(name, array)
        operators = self._ops or self._load_ops()
        if operators.is_compiling():
            return getattr(operators, operator)(array, *arguments)
        try:
            return getattr(operators, operator)(array, *arguments)
        except Exception as error:
            operators.explain(error, **{name: array}, **dict(zip(_TENSORS.get(operator, ()), arguments)))
            raise

    def _load_ops(self) -> Any:
        """The operators, for a planner that was made before torch was imported."""
        self._ops = importlib.import_module(".ops", __package__)
        return self._ops

    def _numpy(self, operator: str, array: Any, *arguments: Any, name: str = "idx") -> Any:
        handle = self._handle
        if handle.device >= 0:
            raise broken_rule(name, f"must be a tensor on the planner's device cuda:{handle.device}", "a numpy array")
        if handle.exchange is None:
            return getattr(_numpy_ops, operator)(array, *arguments)
        # The counts travel as tensors; from_numpy and numpy share memory, so a counter in an array still grows.
        names = _TENSORS.get(operator, ())
        _numpy_ops.check(name, array, dict(zip(names, arguments)), handle)
        tensors = [as_tensor(what, argument) for what, argument in zip((name, *names), (array, *arguments))]
        results = self._call(operator, *tensors, *arguments[len(names):], name=name)
        return tuple(result.numpy() for result in results) if isinstance(results, tuple) else results.numpy()

    def _check_kind(self, call: str, general: bool, instead: str) -> None:
        if self._general is not general:
            kinds = ("made with a topology", "made by from_placement")
            raise broken_rule("planner", f"must be {kinds[general]} for {call} (use {instead})", f"one {kinds[not general]}")

    def _not_an_array(self, name: str, value: object) -> Exception:
        wanted = "a torch tensor" if self._handle.device >= 0 else "a torch tensor or a numpy array"
        return broken_rule(name, f"must be {wanted}", type(value).__name__)

    # ---- results ----

    def info(self) -> Info:
        """What the latest plan achieved, and its certificate. Waits for the GPU. WrongOrder before the first plan."""
        handle = self._handle
        plan = _c.PlanInfoStruct(struct_size=ctypes.sizeof(_c.PlanInfoStruct))
        groups = (_c.GroupInfoStruct * self.n_group)()
        handle.check(handle.library.planner_info(handle.opened(), ctypes.byref(plan), ctypes.byref(groups), self.n_group, self._stream()))
        return Info(
            groups=[group_info(group, self.group_size, index * self.group_size) for index, group in enumerate(groups)],
            invalid_ids=plan.invalid_ids,
            locality=Locality(plan.own_rank, plan.own_node, plan.other_nodes),
            overflow=plan.overflow)

    def split(self) -> Array:
        """Tokens per physical expert in the latest plan, from all ranks together: int64 [n_physical]. Waits for the GPU."""
        return self._tokens(self._handle.library.planner_split)

    def assignment(self) -> Array:
        """The part of split() that comes from this planner's rank (all of it where the planner has none). Waits for the GPU."""
        return self._tokens(self._handle.library.planner_assignment)

    def _tokens(self, read: Callable[[_c.Address, _c.Address, int, _c.Address], int]) -> Array:
        tokens: Int64s = np.empty(self.n_routed_experts, dtype=np.int64)
        self._handle.check(read(self._handle.opened(), address(tokens), tokens.size, self._stream()))
        return self._output(tokens)

    # ---- exchange ----

    @property
    def ep_group(self) -> torch.distributed.ProcessGroup | None:
        """The process group of the ranks; None without one, once it is destroyed, and after close()."""
        return None if self._group_of_ranks is None else self._group_of_ranks()

    @property
    def exchange(self) -> Exchange | None:
        """What the counts of all ranks travel by; None without a group and after close()."""
        return None if self._handle.native is None else self._handle.exchange

    def init_from_deep_ep(self, buffer: Any) -> None:
        """For callers who have a deep_ep.Buffer (or ElasticBuffer) of the same ranks. The exchange was set up with the planner and uses
        none of its memory; on several nodes it now uses the NVSHMEM that the buffer has started. Calling it again does nothing."""
        if not self.deep_ep_initialized and buffer is not None and self.ep_group is not None and self._handle.device >= 0:
            importlib.import_module(".exchange", __package__).join_deep_ep(self, buffer)
        self.deep_ep_initialized = True

    def _connect(self, exchange: str | Exchange) -> None:
        """Sets up how counts travel. Collective where the counts can go over NVLink."""
        handle = self._handle
        if not isinstance(exchange, str):
            exchange.attach(self)
        elif self.ep_group is not None and self.tokens == "same":
            if self.debug:
                handle.compare = importlib.import_module("._agree", __package__).same_tokens(self.ep_group, handle.device)
        elif self.ep_group is not None:
            assert self.rank is not None
            if exchange == "nccl" or (exchange == "auto" and handle.device < 0) or not handle.has_replicas:
                from ._exchange import Layout, TorchExchange

                TorchExchange(self.ep_group, Layout(1, 0, self.ep_size, self.rank), handle.width, "").attach(self)
            else:
                importlib.import_module(".exchange", __package__).connect(self, exchange)
            assert handle.exchange is not None
            handle.exchange.owned = True
        elif exchange not in ("auto", "nccl"):
            raise broken_rule("group", f"must be given for exchange = {exchange!r}", None)

    # ---- life ----

    def close(self) -> None:
        """Frees the planner's memory; on CUDA waits for the device. Also done when the planner is garbage. A call that another thread is
        in the middle of comes to its end first; every later one raises WrongOrder."""
        self._finalizer()
        self._group_of_ranks = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a Planner owns native memory and cannot be copied or pickled; make another one")

    def __repr__(self) -> str:
        what = "closed" if self._handle.native is None else str(self.device)
        return (f"Planner(ep_size={self.ep_size}, n_logical={self.n_logical_routed_experts}, n_physical={self.n_routed_experts}, "
                f"group_size={self.group_size}, num_redundants={self.num_redundants}, {what})")

    def _stream(self) -> int | None:
        return None if self._ops is None else self._ops._stream(self._handle)

    def _output(self, array: Any) -> Array:
        """A host array as the planner hands out arrays: a tensor on its device, or the array itself."""
        if not self._as_tensors:
            return array  # type: ignore[no-any-return]
        return loaded_torch().from_numpy(array).to(self.device)  # type: ignore[no-any-return]
