// FlowSolver: splits the tokens of replicated experts so that the busiest rank of each group has as few as possible, and proves it.
//
// The algorithm, in full. The CUDA kernels do the same with the same integers, so that CPU and GPU agree bit for bit; a change here is a
// change there. Everything below is per group; "parallel" means that the order does not matter. x[a] are the tokens on arc a, load[r] those
// of rank r.
//
// Tokens are counted in units (Unit.swift): ceil(tokens / unit) of each expert, of which all units stay whole. "Tokens" below are units;
// at the end the units of an expert's places become tokens, the last place that has any taking the unit that is not full.
//
// T is a level, cap(r) the tokens that rank r may hold at it, and raise(S, n) the least level at which the ranks of a set S may hold n
// tokens together. Capacity.swift says what they are, and nothing else does: where all ranks are alike, cap(r) = T and raise(S, n) =
// ceil(n / |S|). A rank with load > cap is over, one with load < cap has room.
//
// Start    b[r] = tokens of the experts whose only place is on r. C[u] = tokens of the bundle's experts, split evenly: arc j gets
//          C / degree, the first C % degree arcs one more. T = max(raise(all ranks, total), max raise({r}, b[r])) is a lower bound of
//          every split's level; its witness is the set of all ranks, or the first rank with the largest raise. Done if no rank is over.
// Sweeps   Only in groups that have colours (every bundle has two places, at most 8 colours). Twice: for each colour, in parallel for its
//          bundles with ranks r, s: move what leaves both the same room, min(cap, total) - load, half the difference rounded toward
//          zero, from r to s as far as x allows. Done if, after a whole sweep, no rank is over.
// Loop     Until no rank is over:
//          - Search for distances: 0 for the ranks with room. A rank without distance gets k + 1 if one of its arcs has x > 0 and the
//            bundle has another arc on a rank of distance k. Stop when every rank that is over has a distance, or no rank gets one.
//          - If a rank that is over has none: the tokens of the ranks without distance, S, cannot leave S. T = raise(S, load(S)), witness
//            S; next round (a Newton step on the cuts). From round 33 on only if no rank that is over has a distance.
//          - Else a wave, from the farthest rank that is over to distance 1: in parallel, each rank r of distance k with
//            excess = load[r] - cap(r) > 0 takes its arcs with x > 0 ascending and, for each, the bundle's other arcs on ranks of distance
//            k - 1 ascending, and moves min(excess, x). For k = 1 the receiver takes at most its room at the beginning of this step,
//            from each arc on its own: several may overfill it. Tokens received in a step travel on in the next.
//          - From round 33 on the wave then spills over the ranks of distance 0. Givers are the ranks of distance 1 that are over, takers
//            those of distance 0. In steps, until there are no givers: in parallel, each giver goes twice over its arcs with x > 0
//            ascending and, for each, the bundle's other arcs on takers ascending, and moves min(excess, x), the first time at most the
//            taker's room at the beginning of this step (nothing if it is over). Takers that are now over are the givers of the next step
//            and takers no more.
//
// Why it ends. Let d[r] be the distance that r would have if the search never stopped early, infinite if none. Tokens go only from
// distance k to k - 1, or to ranks of distance 0, so a residual arc from r to q that is new has d[r] <= d[q] + 1 too; no rank that is over
// gets room. So with T fixed no d ever falls, and after a wave every rank that is over and had a distance has a larger one: at k >= 2 it
// used up its arcs to k - 1, at 1 its receivers are full (or its arcs to them empty), at 0 it has no room any more. A rank's d, at most n
// - 1 or infinite, rises at most n times: at most n^2 + 1 waves, n being the number of ranks, until no rank that is over has a distance.
// When T is raised from there (from round 33 on always), S holds exactly the excess of all ranks, so it has the most tokens above its caps
// of all sets; then the next such S is smaller: at most n raises. So there are at most 32 + (n + 1)(n^2 + 2) rounds, T never passes the
// optimum, and the last T is reached: every result is certified.
//
// How many rounds there are. Where experts are replicated as in training: about 1 to 10, the slowest hundredth of torus and EPLB
// placements 10 to 30 (up to 128 ranks). Spilling is for excess that has a long way to go through ranks that each lack little, in chains
// above all; without it such a chain takes a round for every few of its ranks. The most that a search over loads found on chains, rings,
// ladders, combs, trees, stars and bands of ranks, keeping what takes longer: 44 rounds with 32 ranks, 53 with 64, 97 with 128 (without
// spilling 159, 447 and 3301). These are measured, no bound. A search over a chain of n ranks has n distances however few the rounds are,
// and on a GPU each costs barriers: there the slowest with 128 ranks takes 640 us, where usual loads take 4.
//
// What an arc can carry in a wave is known before the wave: tokens never come in through an arc that leads on to the next distance, since
// their giver would then have been that near itself. So only the excess travels from step to step, and the arcs of a rank share it by a
// prefix sum.

import LPLBTopology

/// The outcome of one group.
public struct GroupResult: Sendable, Equatable, BitwiseCopyable {
    /// The level of the busiest rank; where all ranks are alike, its units.
    public var maxLoad: Int64 = 0
    /// T: no split has a smaller maximum.
    public var bound: Int64 = 0
    /// Units of all ranks.
    public var total: Int64 = 0
    /// Units that do not go to the first place of their expert.
    public var moved: Int64 = 0
    /// Rounds of the loop.
    public var rounds: Int64 = 0
    /// Ranks in the witness.
    public var witnessSize: Int = 0

    /// The split is optimal, and the witness proves it.
    public var certified: Bool { maxLoad == bound }
}

/// The levels of one group's result, in 1/1024 unit.
public struct GroupLevel: Sendable, Equatable, BitwiseCopyable {
    public var reached: Int64 = 0
    /// T: no split has a smaller level.
    public var bound: Int64 = 0
    /// The least level at which all ranks together could hold the units.
    public var mean: Int64 = 0
    /// All ranks are alike, and units are tokens.
    public var isTokens = true
}

/// Solves one placement's groups for one set of loads after another. Not for use by two threads at once. `solve` allocates nothing.
public final class FlowSolver {
    /// Words of one group's witness.
    public static let witnessWords = Limits.maxRanks / 32

    public var network: Network { memory.network }
    /// [nPlaces]: tokens of each place, of the latest solve.
    public let quotas: UnsafePointer<Int64>
    /// [nGroups]
    public let results: UnsafePointer<GroupResult>
    /// [nGroups]
    public let levels: UnsafePointer<GroupLevel>

    let memory: SolverMemory
    private let arena = Arena()
    private var ranked = false

    public init(_ network: Network, unit: Unit = .token, capacities: RankCapacities? = nil) {
        memory = SolverMemory(network, unit, arena)
        quotas = UnsafePointer(memory.quota)
        results = UnsafePointer(memory.results)
        levels = UnsafePointer(memory.levels)
        set(capacities)
    }

    /// What the ranks may hold from the next solve on; nil: they are alike.
    public func set(_ capacities: RankCapacities?) {
        ranked = capacities != nil
        if let capacities { memory.set(capacities) }
    }

    /// Bit r of the words: rank r of the group is in the witness. `witnessWords` words.
    public func witness(ofGroup group: Int) -> UnsafePointer<UInt32> {
        UnsafePointer(memory.witness + group * FlowSolver.witnessWords)
    }

    /// Solves every group.
    /// - Parameter loads: [nLogical], each 0 ... 2^40; where the ranks differ, at most `RankCapacities.maxTotal` together.
    public func solve(loads: UnsafePointer<Int64>) {
        let memory = memory
        memory.read(loads)
        for index in 0..<network.shape.nGroups {
            let group = Group(memory, index, ranked: ranked)
            var state = group.start()
            if group.exceeds(state.capacity) { balance(group, &state) }
            memory.results[index] = group.result(state)
            memory.levels[index] = group.level(state, memory.results[index])
        }
        memory.writeQuotas(loads)
    }

    /// The sweeps and the loop, for a group with a rank that has more than it may hold.
    private func balance(_ group: Group, _ state: inout GroupState) {
        if group.sweeps {
            for _ in 0..<2 {
                group.sweep(state.capacity)
                if !group.exceeds(state.capacity) { return }
            }
        }
        if group.size <= Group.maskRanks {
            group.balanceByMasks(&state)
        } else {
            group.balanceByLists(&state)
        }
    }
}
