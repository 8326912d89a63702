// Homes: which replica of each expert owns its weights, its gradient and its optimizer state, so that every rank owns equally many.

import LPLBTopology

/// The slot of each expert's home, such that the ranks have as equal numbers of homes as the replicas allow: nLogical / epSize each where
/// that is possible, remainders to the lowest ranks.
///
/// The k-th home of rank r costs (k, r), compared in this order. Homes start where they would best stand: on the rank of `former`, else at
/// the replica that comes first in its rank's block, which for a placement by a topology is the original. Then, while some path over
/// experts with several replicas leads from a rank to a cheaper one, the homes on the path shift by one rank, the shortest path first.
/// When no such path is left, no choice of homes has a smaller sum of squares, and none a smaller largest number of homes of a rank
/// (Harvey et al., semi-matchings). Equal inputs give equal homes. O((nPhysical + replicas) * shifts).
/// - Parameter former: nil or [nLogical], a slot of this shape for each expert, such as its home under the placement before: the expert
///   stays on that rank where it still stands there and the numbers allow it.
/// - Returns: [nLogical] slots.
public func homes(of placement: Placement, former: [Int32]? = nil) throws(RuleViolation) -> [Int32] {
    let shape = placement.shape
    if let former {
        if former.count != shape.nLogical {
            throw RuleViolation("former", "must have n_logical \(shape.nLogical) entries", value: former.count)
        }
        for expert in 0..<shape.nLogical where former[expert] < 0 || former[expert] >= shape.nPhysical {
            throw RuleViolation("former[\(expert)]", "must be a slot, 0 .. \(shape.nPhysical - 1)", value: former[expert])
        }
    }
    var search = HomeSearch(placement, former: former)
    search.even()
    return search.home
}

/// Homes while they are made even.
struct HomeSearch {
    private let placement: Placement
    private let nRanks: Int, nLocal: Int
    private(set) var home: [Int32]
    /// [nRanks]: homes of each rank.
    private(set) var count: [Int]

    init(_ placement: Placement, former: [Int32]?) {
        self.placement = placement
        nRanks = placement.shape.epSize
        nLocal = placement.shape.nLocal
        home = []
        count = [Int](repeating: 0, count: nRanks)
        home.reserveCapacity(placement.shape.nLogical)
        for expert in 0..<placement.shape.nLogical {
            let wanted = former.map { Int($0[expert]) / nLocal }
            let slot = replicas(expert).min { key($0, wanted) < key($1, wanted) } ?? 0
            home.append(slot)
            count[rank(slot)] += 1
        }
    }

    private func replicas(_ expert: Int) -> ArraySlice<Int32> {
        placement.replicaSlot[Int(placement.replicaStart[expert])..<Int(placement.replicaStart[expert + 1])]
    }

    private func rank(_ slot: Int32) -> Int { Int(slot) / nLocal }

    /// The wanted rank first, then the place in the rank's block, then the rank.
    private func key(_ slot: Int32, _ wanted: Int?) -> (Int, Int, Int) {
        (rank(slot) == wanted ? 0 : 1, Int(slot) % nLocal, rank(slot))
    }

    /// Shifts homes until no path leads to a cheaper rank. The dearest rank comes first: once nothing cheaper can be reached from it, no
    /// later path passes through what it reaches, so it needs no second look.
    mutating func even() {
        var open = [Bool](repeating: true, count: nRanks)
        while let from = (0..<nRanks).filter({ open[$0] && count[$0] > 0 }).max(by: { (count[$0], $0) < (count[$1], $1) }) {
            let (reached, move) = search(from: from)
            guard let to = reached.min(by: { (count[$0], $0) < (count[$1], $1) }), (count[to], to) < (count[from] - 1, from) else {
                open[from] = false
                continue
            }
            var end = to
            while end != from {
                let slot = move[end], expert = Int(placement.phy2log[Int(slot)])
                end = rank(home[expert])
                home[expert] = slot
            }
            count[from] -= 1
            count[to] += 1
        }
    }

    /// Breadth first: the ranks that a home of `from` can be shifted to, and for each the slot that the last shift goes to.
    func search(from: Int) -> (reached: [Int], move: [Int32]) {
        var move = [Int32](repeating: -1, count: nRanks)
        var reached = [from]
        var next = 0
        while next < reached.count {
            let here = reached[next]
            next += 1
            for own in here * nLocal..<(here + 1) * nLocal where placement.phy2log[own] >= 0 {
                let expert = Int(placement.phy2log[own])
                guard Int(home[expert]) == own else { continue }
                for slot in replicas(expert) where rank(slot) != from && move[rank(slot)] < 0 {
                    move[rank(slot)] = slot
                    reached.append(rank(slot))
                }
            }
        }
        return (reached, move)
    }
}
