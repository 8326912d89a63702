// Oracle: EPLB written down as plainly as possible, from its description; slow on purpose. The tests hold the fast version against it.

import LPLBPlacement
import LPLBTopology

struct Sizes: CustomStringConvertible {
    var nLogical: Int, nPhysical: Int, nGroups: Int, nNodes: Int, nRanks: Int
    var description: String { "\(nLogical) experts, \(nPhysical) slots, \(nGroups) groups, \(nNodes) nodes, \(nRanks) ranks" }
}

struct Result: Equatable {
    var phy2log: [Int64] = [], replica: [Int64] = [], logcnt: [Int64] = []
}

enum Oracle {
    /// Items to packs, heaviest first. For each pack its items in the order in which they came.
    static func pack(_ weights: [Float], _ nPacks: Int) -> [[Int]] {
        let perPack = weights.count / nPacks
        if perPack == 1 { return (0..<nPacks).map { [$0] } }
        let heaviestFirst = weights.indices.sorted { weights[$0] == weights[$1] ? $0 < $1 : weights[$0] > weights[$1] }
        var packs = [[Int]](repeating: [], count: nPacks)
        var totals = [Float](repeating: 0, count: nPacks)
        for item in heaviestFirst {
            var best = -1
            for pack in 0..<nPacks where packs[pack].count < perPack && (best < 0 || totals[pack] < totals[best]) { best = pack }
            packs[best].append(item)
            totals[best] += weights[item]
        }
        return packs
    }

    /// (expert, which replica of it) of each item: every expert once, then copies of whichever has the largest load per replica.
    static func replicate(_ weights: [Float], _ nItems: Int) -> [(expert: Int, replica: Int)] {
        var items = weights.indices.map { (expert: $0, replica: 0) }
        var counts = [Int](repeating: 1, count: weights.count)
        while items.count < nItems {
            var best = 0
            for e in weights.indices where weights[e] / Float(counts[e]) > weights[best] / Float(counts[best]) { best = e }
            items.append((best, counts[best]))
            counts[best] += 1
        }
        return items
    }

    /// Rows of up to 7 in 4 lanes of one float, longer ones in 4 lanes of 8 floats; what is left over goes to the first lane, and single
    /// floats come last.
    static func sum(_ x: [Float]) -> Float {
        let width = x.count < 8 ? 1 : 8
        let nVectors = x.count / width
        var lanes = [[Float]](repeating: [Float](repeating: 0, count: width), count: 4)
        for v in 0..<nVectors {
            let lane = v < nVectors / 4 * 4 ? v % 4 : 0
            for k in 0..<width { lanes[lane][k] += x[v * width + k] }
        }
        for lane in 1..<4 { for k in 0..<width { lanes[0][k] += lanes[lane][k] } }
        return lanes[0].reduce(x[(nVectors * width)...].reduce(0, +), +)
    }

    static func rebalance(_ weight: [Float], _ s: Sizes) -> Result {
        let hierarchical = s.nGroups % s.nNodes == 0
        let nGroups = hierarchical ? s.nGroups : 1, nNodes = hierarchical ? s.nNodes : 1
        let groupSize = s.nLogical / nGroups, slotsPerNode = s.nPhysical / nNodes
        let sums = (0..<nGroups).map { sum(Array(weight[$0 * groupSize..<($0 + 1) * groupSize])) }
        var result = Result(logcnt: [Int64](repeating: 0, count: s.nLogical))
        for groups in pack(sums, nNodes) {
            let experts = groups.flatMap { $0 * groupSize..<($0 + 1) * groupSize }
            let items = replicate(experts.map { weight[$0] }, slotsPerNode)
            for item in items { result.logcnt[experts[item.expert]] += 1 }
            let shares = items.map { weight[experts[$0.expert]] / Float(result.logcnt[experts[$0.expert]]) }
            for slot in pack(shares, s.nRanks / nNodes).joined() {
                result.phy2log.append(Int64(experts[items[slot].expert]))
                result.replica.append(Int64(items[slot].replica))
            }
        }
        return result
    }
}

/// The library's answer for whole arrays.
func balanced(_ weight: [Float], _ nLayers: Int, _ s: Sizes) throws -> Result {
    var r = Result(
        phy2log: .init(repeating: -7, count: nLayers * s.nPhysical), replica: .init(repeating: -7, count: nLayers * s.nPhysical),
        logcnt: .init(repeating: -7, count: nLayers * s.nLogical))
    try weight.withUnsafeBufferPointer { weight in
        try r.phy2log.withUnsafeMutableBufferPointer { phy2log in
            try r.replica.withUnsafeMutableBufferPointer { replica in
                try r.logcnt.withUnsafeMutableBufferPointer { logcnt in
                    try rebalance(
                        weight: weight, nLayers: nLayers, nLogical: s.nLogical, nPhysical: s.nPhysical, nGroups: s.nGroups,
                        nNodes: s.nNodes, nRanks: s.nRanks, phy2log: phy2log.baseAddress, replica: replica.baseAddress,
                        logcnt: logcnt.baseAddress)
                }
            }
        }
    }
    return r
}

/// Load families that reach the corners: ties, zeros, equal loads, one hot expert, heavy tails, tiny and huge floats.
func randomLoads(_ n: Int, family: Int, _ random: inout Random) -> [Float] {
    (0..<n).map { i in
        switch family % 10 {
        case 0: Float.random(in: 0..<1, using: &random)
        case 1: Float(random.below(4))
        case 2: 0
        case 3: 5
        case 4: i == n / 2 ? 1000 : 0
        case 5: Float(random.below(3000)) / Float(1 + i)
        case 6: random.below(3) == 0 ? Float.random(in: 0..<1e4, using: &random) : 0
        case 7: Float(bitPattern: UInt32.random(in: 0..<0x7F80_0000, using: &random))  // any finite float, sums may overflow
        case 8: random.below(2) == 0 ? -0.0 : Float(random.below(2))
        default: Float(1 << 24) + Float(random.below(64))  // whole numbers whose sums round
        }
    }
}
