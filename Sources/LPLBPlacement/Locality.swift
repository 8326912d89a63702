// Locality: how many tokens leave their rank and their host under a placement, with the exact split.

import LPLBSolver
import LPLBTopology

/// Where tokens go when every rank that holds experts brings the same number of tokens of each expert. They are sent by the rule of
/// `TokenAssigner`: each replica takes from its own rank first, then from its host, then from all.
struct Locality {
    /// Shares of all tokens that go to another rank, and to a rank of another host.
    private(set) var leavesRank = 0.0, leavesNode = 0.0
    /// [nRanks]: tokens that reach the rank from others, over the mean load of the ranks that hold experts.
    private(set) var inbound: [Double]

    /// - Parameter weight: [nLogical] loads.
    init(_ placement: Placement, weight: [Double], nNodes: Int) {
        let shape = placement.shape, perNode = shape.epSize / nNodes
        inbound = [Double](repeating: 0, count: shape.epSize)
        let live = (0..<shape.epSize).filter { rank in
            placement.phy2log[rank * shape.nLocal..<(rank + 1) * shape.nLocal].contains { $0 >= 0 }
        }
        var isLive = [Bool](repeating: false, count: shape.epSize), sources = [Int64](repeating: 0, count: nNodes)
        for rank in live {
            isLive[rank] = true
            sources[rank / perNode] += 1
        }
        let each = scaledLoads(weight).map { $0 / Int64(live.count) }  // of one source
        let solver = FlowSolver(Network(placement))
        let loads = each.map { $0 * Int64(live.count) }
        loads.withUnsafeBufferPointer { solver.solve(loads: $0.baseAddress!) }
        let total = loads.reduce(0, +)
        guard total > 0 else { return }
        var onRank: Int64 = 0, onNode: Int64 = 0, arrived = [Int64](repeating: 0, count: shape.epSize)
        var kept = [Int64](repeating: 0, count: nNodes), quota = kept
        for expert in 0..<shape.nLogical {
            let places = solver.network.places(of: expert)
            for place in places {
                let rank = Int(solver.network.placeRank[place]), tokens = places.count == 1 ? loads[expert] : solver.quotas[place]
                let stay = min(tokens, each[expert])
                kept[rank / perNode] += stay
                quota[rank / perNode] += tokens
                arrived[rank] += tokens - stay
            }
            for node in 0..<nNodes {
                onRank += kept[node]
                onNode += min(sources[node] * each[expert], quota[node])
                (kept[node], quota[node]) = (0, 0)
            }
        }
        leavesRank = Double(total - onRank) / Double(total)
        leavesNode = Double(total - onNode) / Double(total)
        inbound = arrived.map { Double($0) / (Double(total) / Double(live.count)) }
    }
}
