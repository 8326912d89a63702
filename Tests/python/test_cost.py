"""Costs beyond tokens: units of several tokens, active experts, ranks of different speed and with work of their own."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import lplb
from lplb import _c

INSTANCES = 10_000


def units_of(tokens, unit):
    tokens = np.asarray(tokens, dtype=np.int64)
    return (tokens > 0).astype(np.int64) if unit == "experts" else -(-tokens // unit)


def cap(level, speed, fixed):
    """Units that a rank may hold at a level in 1/1024 units: the rule of the header, in Python's integers."""
    return max(0, (level - 1024 * fixed) * speed >> 20)


def level_of(units, speed, fixed):
    """The least level, in 1/1024 unit, at which one rank holds them."""
    return 1024 * fixed - (-(units << 20) // speed)


class Instance:
    """A random small problem of any kind of cost."""

    def __init__(self, rng):
        ranks, slots = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        n_physical = ranks * slots
        n_logical = int(rng.integers(1, n_physical + 1))
        phy2log = np.full(n_physical, -1, dtype=np.int32)
        phy2log[:n_logical] = np.arange(n_logical)
        spare = rng.integers(-1, n_logical, n_physical - n_logical)
        phy2log[n_logical:] = spare
        rng.shuffle(phy2log)
        self.ranks, self.phy2log, self.n_logical = ranks, phy2log, n_logical
        self.unit = [1, 1, 3, 128, "experts"][rng.integers(5)]
        most = {1: 4, 3: 11, 128: 500, "experts": 3}[self.unit]
        self.loads = rng.integers(0, most + 1, n_logical)
        kind = rng.integers(5)
        self.speed = None if kind == 0 else rng.integers(1, [2, 65537, 1500, 4][kind - 1], ranks) + (1023 if kind == 1 else 0)
        self.speed = None if self.speed is None else np.minimum(self.speed, 65536)
        self.fixed = None if rng.integers(2) else rng.integers(0, [2, 40][rng.integers(2)], ranks)
        self.units = units_of(self.loads, self.unit)
        self.places = [np.unique(np.flatnonzero(phy2log == e) // slots) for e in range(n_logical)]
        self.speeds = [1024] * ranks if self.speed is None else [int(s) for s in self.speed]
        self.costs = [0] * ranks if self.fixed is None else [int(f) for f in self.fixed]

    def solve(self):
        return lplb.solve(self.loads, self.phy2log, self.ranks, unit=self.unit, speed=self.speed, fixed=self.fixed)

    def level(self, units_by_rank):
        reached = [level_of(int(n), s, f) for n, s, f in zip(units_by_rank, self.speeds, self.costs)]
        return max(max(reached), 1024 * max(self.costs))

    def by_rank(self, values):
        return np.asarray(values).reshape(self.ranks, -1).sum(axis=1)

    def brute(self):
        """The least level of all splits: every reachable vector of loads, as the digits of a number."""
        total = int(self.units.sum()) + 1
        states = np.zeros(1, dtype=np.int64)
        for units, places in zip(self.units.tolist(), self.places):
            weights = [total**int(rank) for rank in places]
            ways = {sum(n * w for n, w in zip(way, weights)) for way in compositions(units, len(places))}
            states = np.unique(np.add.outer(states, np.array(sorted(ways))))
        worst = np.full(states.size, 1024 * max(self.costs), dtype=np.int64)
        for speed, fixed in zip(self.speeds, self.costs):
            table = np.array([level_of(n, speed, fixed) for n in range(total)], dtype=np.int64)
            worst = np.maximum(worst, table[states % total])
            states = states // total
        return int(worst.min())


_ways: dict = {}


def compositions(units, parts):
    """All ways to write units as an ordered sum of so many parts."""
    if (units, parts) not in _ways:
        bars = itertools.combinations(range(units + parts - 1), parts - 1)
        _ways[units, parts] = [np.diff([-1, *bar, units + parts - 1]) - 1 for bar in bars]
        _ways[units, parts] = [tuple(int(n) for n in way) for way in _ways[units, parts]]
    return _ways[units, parts]


def check(instance, solution):
    """Everything that a solution promises, from the inputs alone. Returns its level in 1/1024 unit."""
    one = instance
    tokens = np.asarray(solution.tokens)
    assert (tokens >= 0).all() and (tokens[one.phy2log < 0] == 0).all()
    assert np.array_equal(np.bincount(one.phy2log[one.phy2log >= 0], tokens[one.phy2log >= 0], one.n_logical), one.loads)
    units = units_of(tokens, one.unit)
    by_expert = np.bincount(one.phy2log[one.phy2log >= 0], units[one.phy2log >= 0], one.n_logical)
    assert np.array_equal(by_expert, one.units), "an expert was split inside a unit"
    level = one.level(one.by_rank(units))
    assert solution.certified and solution.level * 1024 == level == solution.level_bound * 1024
    assert solution.max_load == one.by_rank(tokens).max() and solution.total == one.loads.sum()
    proven = lplb.witness_bound(one.loads, one.phy2log, one.ranks, solution.witness, unit=one.unit, speed=one.speed, fixed=one.fixed)
    assert proven == solution.level_bound
    return level


def test_brute_force_and_a_linear_program_agree_on_10000_instances():
    """Brute force finds the level. And a linear program of all instances finds no way to hold all units a 1024th below it: with whole caps
    its flows are whole, so that this is exact."""
    optimize, sparse = pytest.importorskip("scipy.optimize"), pytest.importorskip("scipy.sparse")
    rng = np.random.default_rng(1)
    rows, columns, limits, demands, owners = [], [], [], [], []
    n_rows = n_columns = 0
    for index in range(INSTANCES):
        one = Instance(rng)
        level = check(one, one.solve())
        assert one.brute() == level, vars(one)
        if level <= 1024 * max(one.costs):
            continue  # no level is lower
        supply, room = n_rows, n_rows + one.n_logical
        n_rows = room + one.ranks
        limits += one.units.tolist() + [cap(level - 1, speed, fixed) for speed, fixed in zip(one.speeds, one.costs)]
        for expert, places in enumerate(one.places):
            for rank in places:
                rows += [supply + expert, room + int(rank)]
                columns += [n_columns, n_columns]
                n_columns += 1
        owners += [len(demands)] * (n_columns - len(owners))
        demands.append(int(one.units.sum()))
    matrix = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), (n_rows, n_columns))
    flow = optimize.linprog(-np.ones(n_columns), A_ub=matrix, b_ub=limits, method="highs-ds")
    assert flow.status == 0 and len(demands) > INSTANCES // 2
    carried = np.bincount(owners, flow.x, len(demands))
    assert (carried < np.array(demands) - 0.5).all()


def solve_both(loads, phy2log, ranks, **cost):
    """lplb.solve, and the same by a planner."""
    solution = lplb.solve(loads, phy2log, ranks, **cost)
    unit = cost.pop("unit", 1)
    with lplb.Planner.from_placement(phy2log, ep_size=ranks, n_logical=len(loads), device="cpu", unit=unit) as planner:
        planner.set_capacity(**cost)
        planner.solve(np.asarray(loads, dtype=np.int64))
        info = planner.info().groups[0]
        assert np.array_equal(np.asarray(planner.split()), solution.tokens)
        assert {name: getattr(solution, name) for name in vars(info)} == vars(info)
    return solution


PHY2LOG = np.array([0, 1, 2, 3, 4, 5, 0, 2, 1, 3, 5, 0, 4, -1, 2, 0], dtype=np.int32)  # 4 ranks


def test_equal_speeds_of_any_size_split_as_normal_ones():
    rng = np.random.default_rng(2)
    for speed in (1, 3, 1024, 65536):
        loads = rng.integers(0, 10_000, 6)
        for unit in (1, 64, "experts"):
            plain = solve_both(loads, PHY2LOG, 4, unit=unit)
            scaled = solve_both(loads, PHY2LOG, 4, unit=unit, speed=np.full(4, speed))
            assert np.array_equal(scaled.tokens, plain.tokens) and scaled.witness == plain.witness
            assert scaled.level == -(-int(plain.level) * 2**20 // speed) / 1024 if speed != 1024 else scaled == scaled


@pytest.mark.parametrize("ranks", [4, 96])
def test_large_loads_and_extremes_of_speed(ranks):
    """Loads near 2^31 and far above, speeds 1 and 65536 together, work of a rank's own above every load: nothing overflows."""
    rng = np.random.default_rng(3)
    phy2log = np.tile(PHY2LOG, ranks // 4)
    shifted = np.where(phy2log < 0, -1, phy2log + 6 * np.repeat(np.arange(ranks // 4), 16))
    shifted[-1] = 0  # all quarters hang together
    for top in (2**31 // (6 * ranks // 4), 2**42 // (6 * ranks // 4)):
        loads = rng.integers(top // 2, top, 6 * ranks // 4)
        for unit in (1, 128, 2**31 - 1, "experts"):
            speed = rng.choice([1, 1024, 65536], ranks)
            for fixed in (np.zeros(ranks, dtype=int), rng.choice([0, 7, 2**24], ranks)):
                one = Instance.__new__(Instance)
                one.ranks, one.phy2log, one.n_logical, one.unit, one.loads = ranks, shifted, loads.size, unit, loads
                one.speed, one.fixed, one.units = speed, fixed, units_of(loads, unit)
                one.speeds, one.costs = speed.tolist(), fixed.tolist()
                check(one, solve_both(loads, shifted, ranks, unit=unit, speed=speed, fixed=fixed))


def test_a_rank_with_more_work_of_its_own_than_there_is_gets_nothing():
    solution = solve_both([90, 90], [0, 1, 1, 0, 0, 1], 3, fixed=[1000, 0, 0])
    assert solution.level == solution.level_bound == solution.level_mean == 1000
    assert solution.tokens[:2].sum() == 0 and solution.certified


def test_the_last_place_takes_the_unit_that_is_not_full():
    solution = solve_both([1000, 300, 20, 5], [0, 1, 2, 3, 0, 1, 0, -1], 4, unit=128)
    assert (solution.level, solution.certified) == (4, True)
    assert solution.tokens.tolist()[0] % 128 == 0 and solution.tokens.tolist()[6] % 128 == 1000 % 128
    assert solution.bound == 332 and solution.max_load == max(solution.tokens.reshape(4, 2).sum(axis=1))


@pytest.mark.parametrize("unit", [1, 16, "experts"])
@pytest.mark.parametrize("combined", [1, 2])
def test_ranks_with_tokens_of_their_own_send_what_the_split_says(unit, combined):
    """A topology with bundles of several experts: each rank's planner; together they place every token once, as the split says, and each
    rank's units are those of the split."""
    rng = np.random.default_rng(4)
    r2o = np.stack([(np.arange(8) + 1) % 8, (np.arange(8) + 4) % 8], axis=1)
    n_logical, n_physical = 64, 64 + 16 * combined
    speed = rng.integers(700, 1100, 8)
    planners = [lplb.Planner(r2o, n_physical, n_logical, 8, device="cpu", rank=rank, unit=unit) for rank in range(8)]
    ids = rng.choice(n_logical, (8, 200), p=np.random.default_rng(5).dirichlet(np.full(n_logical, 0.3)))
    counts = np.stack([np.bincount(row, minlength=n_logical) for row in ids])
    sent = np.zeros(n_physical, dtype=np.int64)
    for rank, planner in enumerate(planners):
        planner.set_capacity(speed=speed)
        planner.solve(counts)
        physical = planner.redirect(ids[rank])
        assert np.array_equal(np.asarray(planner.phy2log)[physical], ids[rank])
        assert np.array_equal(np.bincount(physical, minlength=n_physical), np.asarray(planner.assignment()))
        layout = planner.layout(physical)
        assert np.asarray(layout.received_rows).sum() == np.asarray(planner.split()).reshape(8, -1)[rank].sum()
        sent += np.bincount(physical, minlength=n_physical)
    split = np.asarray(planners[0].split())
    assert np.array_equal(sent, split)
    info = planners[0].info().groups[0]
    by_rank = units_of(split, unit).reshape(8, -1).sum(axis=1)
    assert info.certified and info.level * 1024 == max(level_of(int(n), int(s), 0) for n, s in zip(by_rank, speed))
    assert info.max_load == split.reshape(8, -1).sum(axis=1).max()
    proven = lplb.witness_bound(counts.sum(axis=0), np.asarray(planners[0].phy2log), 8, info.witness, unit=unit, speed=speed)
    assert proven == info.level_bound
    for planner in planners:
        planner.close()


def test_planners_of_several_units_side_by_side_keep_their_own():
    loads = np.array([900, 450, 129, 1, 64, 64])
    planners = {unit: lplb.Planner.from_placement(PHY2LOG, ep_size=4, device="cpu", unit=unit) for unit in (1, 64, "experts")}
    for _ in range(2):
        for unit, planner in planners.items():
            planner.solve(loads)
            assert np.array_equal(np.asarray(planner.split()), lplb.solve(loads, PHY2LOG, 4, unit=unit).tokens)


def test_capacities_change_between_plans_and_outlive_placements():
    loads = np.array([900, 450, 129, 1, 64, 64])
    with lplb.Planner.from_placement(PHY2LOG, ep_size=4, device="cpu") as planner:
        planner.set_capacity()  # equal ranks: what is set later is followed
        planner.solve(loads)
        plain = np.asarray(planner.split())
        planner.set_capacity(speed=[512, 1024, 1024, 1024])
        assert np.array_equal(np.asarray(planner.split()), plain), "the latest plan stays"
        planner.update_placement(PHY2LOG)
        planner.solve(loads)
        slow = lplb.solve(loads, PHY2LOG, 4, speed=[512, 1024, 1024, 1024])
        assert np.array_equal(np.asarray(planner.split()), slow.tokens) and planner.info().groups[0].level == slow.level
        assert slow.tokens[:4].sum() < plain[:4].sum()
        planner.set_capacity()
        planner.solve(loads)
        assert np.array_equal(np.asarray(planner.split()), plain)


@pytest.mark.parametrize("record", [{}, {"history": True}])
def test_the_first_capacities_come_before_the_first_plan(record):
    """Later ones could not be followed by graphs that were captured before."""
    planner = lplb.Planner.from_placement(PHY2LOG, ep_size=4, device="cpu", **record)
    planner.solve(np.arange(6))
    for speed in ([1000] * 4, None):
        with pytest.raises(lplb.WrongOrder, match="set_capacity: must be called before a planner's first plan"):
            planner.set_capacity(speed=speed)
    planner.update_placement(PHY2LOG)
    with pytest.raises(lplb.WrongOrder):
        planner.set_capacity()
    with lplb.Planner.from_placement(PHY2LOG, ep_size=4, device="cpu", **record) as early:
        early.set_capacity()
        early.solve(np.arange(6))
        early.set_capacity(speed=[512, 1024, 1024, 1024])


def test_ranks_whose_capacities_differ_are_found():
    import ctypes

    library = _c.load()
    planners = [lplb.Planner.from_placement(PHY2LOG, ep_size=4, device="cpu", rank=rank, unit=16) for rank in range(4)]
    other = lplb.Planner.from_placement(PHY2LOG, ep_size=4, device="cpu", rank=3, unit=32)

    def rows(*of):
        rows, counts = np.zeros((4, 7), dtype=np.int32), np.arange(6, dtype=np.int32)
        for rank, planner in enumerate(of):
            handle = planner._handle
            handle.check(library.planner_make_row(handle.native.value, counts.ctypes.data, 0, rows[rank].ctypes.data, None))
        return rows

    def plan(planner, rows):
        handle = planner._handle
        handle.check(library.planner_solve_rows(handle.native.value, rows.ctypes.data, None, None, None, 0, None))

    for planner in planners:
        planner.set_capacity()
    plan(planners[0], rows(*planners))
    with pytest.raises(lplb.Disagreement, match="rank 3"):
        plan(planners[0], rows(*planners[:3], other))
    for planner in planners[:3]:
        planner.set_capacity(speed=[1000, 1024, 1024, 1024])
    with pytest.raises(lplb.Disagreement, match="rank 3"):
        plan(planners[0], rows(*planners))
    planners[3].set_capacity(speed=[1000, 1024, 1024, 1024], fixed=[0, 0, 0, 0])
    plan(planners[0], rows(*planners))
    assert ctypes.sizeof(_c.LevelStruct) == 24


def test_what_cannot_be_is_refused_in_words():
    for wrong in (0, -1, 2**31, 1.5, True, "tokens", None):
        with pytest.raises(lplb.InvalidArgument, match="unit"):
            lplb.solve([1], [0], 1, unit=wrong)
    for name, wrong in (("speed", [0]), ("speed", [65537]), ("speed", [1, 2]), ("fixed", [-1]), ("fixed", [2**24 + 1]), ("fixed", [1.5])):
        with pytest.raises(lplb.InvalidArgument, match=name):
            lplb.solve([1], [0], 1, **{name: wrong})
    with pytest.raises(lplb.InvalidArgument, match="loads.*4398046511104"):
        lplb.solve([2**40] * 5, [0, 1, 2, 3, 4], 1, speed=[1000])
    r2o = np.array([[1], [0]], dtype=np.int32)
    workload = np.ones(4, dtype=np.int32)
    with lplb.Planner(r2o, 6, 4, 2, device="cpu", unit=8) as planner:
        with pytest.raises(lplb.InvalidArgument, match="solve_probs.*unit"):
            planner.solve_probs(workload, None)
        with pytest.raises(lplb.InvalidArgument, match="weighted_select_target"):
            planner.weighted_select_target(np.array([1]), np.ones((1, 2, 1), np.float32), np.ones((1, 4), np.int32), 1)
        ratios = np.empty(2, dtype=np.float32)
        handle = planner._handle
        with pytest.raises(lplb.InvalidArgument, match="ratios: needs a planner whose unit is a token"):
            handle.check(handle.library.planner_solve(handle.native.value, workload.ctypes.data, 0, 1, ratios.ctypes.data, None, None, 0, None))
    with lplb.Planner(r2o, 6, 4, 2, device="cpu") as planner:
        planner.set_capacity(speed=[1024, 1000])
        with pytest.raises(lplb.InvalidArgument, match="capacities"):
            planner.solve_probs(workload, None)
        planner.solve(workload)
        planner.set_capacity()
        planner.solve_probs(workload, None)


def test_structs_of_other_versions():
    """struct_size both ways: an older caller's ends before unit; a newer one's is larger, and 0 beyond."""
    import ctypes

    def call(size, tail=b""):
        loads, slots = np.array([5, 7], dtype=np.int64), np.array([0, 1, 1, 0], dtype=np.int32)
        level = _c.LevelStruct()
        config = _c.SolveConfig(loads=loads.ctypes.data, phy2log=slots.ctypes.data, n_logical=2, n_physical=4, ep_size=2, unit=4,
                                level=ctypes.pointer(level))
        config.struct_size = size
        memory = ctypes.create_string_buffer(bytes(config) + tail)
        _c.call(_c.load().solve_with, ctypes.byref(memory))
        return level.reached / 1024

    whole = ctypes.sizeof(_c.SolveConfig)
    assert call(whole) == 2 and call(whole + 8, bytes(8)) == 2
    assert call(_c.SolveConfig.unit.offset) == 0  # plain, and level is not known
    for size, tail in ((whole + 8, b"\1" + bytes(7)), (whole - 3, b""), (0, b""), (-8, b""), (2**40, b"")):
        with pytest.raises(lplb.InvalidArgument, match="struct_size"):
            call(size, tail)
