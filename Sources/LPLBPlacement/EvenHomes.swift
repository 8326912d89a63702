// EvenHomes: few swaps of slots after which every rank can own equally many experts, for training, where owners keep optimizer state.
//
// Ranks can own too many only where a set of them, A, holds more experts that stand nowhere else than it may own (Hall). Homes that are as
// even as the replicas allow show such a set: the ranks that a rank with too many can shift homes to, or all that cannot shift any to a
// rank with too few. One swap takes an expert that stands in A alone out of it, and brings a replica into A of one that keeps another
// outside.

import LPLBSolver
import LPLBTopology

/// Makes the homes of the layer on the board even, or throws in words.
func makeHomesEven(
    _ board: Board, _ request: PlaceRequest, _ shape: ExpertShape, _ history: UnsafeBufferPointer<Double>, layer: Int
) throws(RuleViolation) {
    let weight = request.weight(of: layer, history), share = EvenShare(nLogical: board.nLogical, nRanks: board.live.count)
    let mayChange = request.budget == nil && request.policy != .deepseek
    var mender = try HomeMender(board, shape, share, perNode: request.isHierarchical ? request.slots.count / request.nNodes : nil)
    if mender.excess > 0 && mayChange {
        if request.policy == .flow {
            let drift = Drift(snapshots: request.snapshots(of: layer, history), groupSize: request.driftGroup)
            let scenarios = Scenarios(16, nLogical: board.nLogical, groupSize: request.driftGroup, nSnapshots: request.nSnapshots)
            scenarios.draw(drift)
            try mender.mend(weight) { (placement) throws(RuleViolation) in
                let solver = FlowSolver(Network(placement))
                return (0..<scenarios.count).reduce(0.0) { sum, number in
                    solver.solve(loads: UnsafePointer(scenarios.loads + number * board.nLogical))
                    return sum + Double(solver.results[0].maxLoad) / Double(max(1, solver.results[0].total))
                }
            }
        } else {
            let trial = Board(nLogical: board.nLogical, capacity: board.capacity, width: board.width)
            try mender.mend(weight) { (placement) throws(RuleViolation) in
                trial.take(placement.phy2log)
                weight.withUnsafeBufferPointer { if let first = $0.baseAddress { trial.weigh(first) } }
                return -trial.balance
            }
        }
        board.take(mender.phy2log)
    }
    let owned = mender.homes.count
    if let rank = board.live.first(where: { owned[$0] > share.most || owned[$0] < share.least }) {
        let numbers = share.least == share.most ? "\(share.most)" : "\(share.least) or \(share.most)"
        throw RuleViolation(
            "even_homes", "must be 0 where no placement was found in which every rank can own \(numbers) of the \(board.nLogical) experts",
            value: "rank \(rank) with \(owned[rank]) in layer \(layer)\(mayChange ? "" : ", where policy or max_moves leave no choice")")
    }
}

private struct HomeMender {
    private(set) var phy2log: [Int32]
    private(set) var homes: HomeSearch
    private(set) var excess: Int
    private let shape: ExpertShape, share: EvenShare, live: [Int]
    /// Ranks of a host, where slots must not be swapped between hosts.
    private let perNode: Int
    /// [nLogical]: the ranks of each expert.
    private var ranks: [[Int]] = []

    private struct Swap {
        let slot: Int, other: Int, gap: Double
    }

    /// Partners of each slot, first few and then all.
    private static let partners = [24, Int.max]
    /// Slots that are looked at for all swaps of a step together.
    private static let work = 1 << 23

    init(_ board: Board, _ shape: ExpertShape, _ share: EvenShare, perNode: Int?) throws(RuleViolation) {
        (phy2log, self.shape, self.share, live, self.perNode) = (board.phy2log, shape, share, board.live, perNode ?? board.nRanks)
        homes = HomeSearch(try Placement(shape: shape, phy2log: phy2log), former: nil)
        homes.even()
        excess = share.excess(homes.count, on: live)
    }

    /// Swaps slots until the homes are even or no swap that is tried brings them nearer.
    mutating func mend(_ weight: [Double], cost: (Placement) throws(RuleViolation) -> Double) throws(RuleViolation) {
        let most = max(1, min(6, (1 << 14) / shape.nPhysical))  // swaps that bring the homes nearer, of which the cheapest is taken
        while excess > 0 {
            ranks = [[Int]](repeating: [], count: shape.nLogical)
            for (slot, e) in phy2log.enumerated() where e >= 0 && ranks[Int(e)].last != slot / shape.nLocal {
                ranks[Int(e)].append(slot / shape.nLocal)
            }
            let inside = crowded()
            var best: (excess: Int, cost: Double, phy2log: [Int32], homes: HomeSearch)?
            for partners in HomeMender.partners where best == nil {
                var weighed = 0
                for swap in swaps(weight, inside, partners) where weighed < most {
                    var slots = phy2log
                    slots.swapAt(swap.slot, swap.other)
                    let placement = try Placement(shape: shape, phy2log: slots)
                    var search = HomeSearch(placement, former: homes.home)
                    search.even()
                    let left = share.excess(search.count, on: live)
                    guard left < excess else { continue }
                    weighed += 1
                    let price = try cost(placement)
                    if best == nil || (left, price) < (best!.excess, best!.cost) { best = (left, price, slots, search) }
                }
            }
            guard let best else { return }
            (excess, phy2log, homes) = (best.excess, best.phy2log, best.homes)
        }
    }

    /// Ranks with too many experts that stand nowhere else.
    private func crowded() -> [Bool] {
        var inside = [Bool](repeating: false, count: shape.epSize)
        if let rank = live.max(by: { (homes.count[$0], $1) < (homes.count[$1], $0) }), homes.count[rank] > share.most {
            for other in homes.search(from: rank).reached { inside[other] = true }
        } else if let rank = live.min(by: { (homes.count[$0], $0) < (homes.count[$1], $1) }) {
            for other in live { inside[other] = true }
            for other in reaching(rank) { inside[other] = false }
        }
        return inside
    }

    /// The ranks from which homes can be shifted to a rank, itself included.
    private func reaching(_ rank: Int) -> [Int] {
        var found = [rank], isFound = [Bool](repeating: false, count: shape.epSize), next = 0
        isFound[rank] = true
        while next < found.count {
            let here = found[next]
            next += 1
            for e in phy2log[here * shape.nLocal..<(here + 1) * shape.nLocal] where e >= 0 {
                let owner = Int(homes.home[Int(e)]) / shape.nLocal
                if !isFound[owner] { found.append(owner) }
                isFound[owner] = true
            }
        }
        return found
    }

    /// Swaps of an expert that stands in crowded ranks alone with one that stands on several others, nearest shares of the load first.
    private func swaps(_ weight: [Double], _ inside: [Bool], _ partnersOfSlot: Int) -> [Swap] {
        func load(_ slot: Int) -> Double { weight[Int(phy2log[slot])] / Double(ranks[Int(phy2log[slot])].count) }
        let used = phy2log.indices.filter { phy2log[$0] >= 0 }
        let out = used.filter { ranks[Int(phy2log[$0])].allSatisfy { inside[$0] } }
        let partners = used.filter { slot in
            !inside[slot / shape.nLocal] && ranks[Int(phy2log[slot])].reduce(0) { $0 + (inside[$1] ? 0 : 1) } > 1
        }.sorted { (load($0), $0) < (load($1), $1) }
        let levels = partners.map(load)
        var found: [Swap] = []
        for slot in out {
            var above = levels.partitioningIndex { $0 >= load(slot) }, below = above - 1, taken = 0
            while taken < partnersOfSlot && (above < partners.count || below >= 0) {
                let up = above < partners.count ? levels[above] - load(slot) : .infinity
                let down = below >= 0 ? load(slot) - levels[below] : .infinity
                let other = up <= down ? partners[above] : partners[below]
                if up <= down { above += 1 } else { below -= 1 }
                guard isFree(slot, other) else { continue }
                found.append(Swap(slot: slot, other: other, gap: min(up, down)))
                taken += 1
            }
        }
        return Array(found.sorted { ($0.gap, $0.slot, $0.other) < ($1.gap, $1.slot, $1.other) }.prefix(HomeMender.work / shape.nPhysical))
    }

    /// Neither rank holds the other's expert, and both are on one host where that is asked for.
    private func isFree(_ slot: Int, _ other: Int) -> Bool {
        let a = slot / shape.nLocal, b = other / shape.nLocal
        return a / perNode == b / perNode && !ranks[Int(phy2log[slot])].contains(b) && !ranks[Int(phy2log[other])].contains(a)
    }
}

extension [Double] {
    /// The first index whose value fulfils a condition that all later ones fulfil, too.
    fileprivate func partitioningIndex(_ condition: (Double) -> Bool) -> Int {
        var low = 0, high = count
        while low < high {
            let middle = (low + high) / 2
            if condition(self[middle]) { high = middle } else { low = middle + 1 }
        }
        return low
    }
}
