// Hosts: which host gets which parts of a layer's placement, so that the copies of an expert stand on different hosts.
//
// Tokens of all hosts need an expert. Two copies on one host serve that host's tokens as one would; on two hosts they serve those of both
// without crossing. What the hosts' ranks are called is free, so this costs no balance.

import LPLBTopology

/// Gives the parts of a layer to ranks such that as little load as it finds belongs to experts that stand twice on a host: two ranks of
/// different hosts swap parts while that falls.
/// - Parameters:
///   - phy2log: [nRanks * width]
///   - weight: [nLogical] loads.
///   - slots: of each rank; ranks with equally many may take each other's part.
func spreadOverHosts(_ phy2log: [Int32], weight: [Double], slots: [Int], nNodes: Int) -> [Int32] {
    let nRanks = slots.count, width = phy2log.count / nRanks, perNode = nRanks / nNodes
    var together = SharedLoad(phy2log, weight: weight, nRanks: nRanks, nNodes: nNodes)
    var part = Array(0..<nRanks)  // of each rank
    let least = 1e-9 * weight.reduce(0, +)
    for _ in 0..<20 {
        var swapped = false
        for rank in 0..<nRanks {
            for other in (rank / perNode + 1) * perNode..<nRanks where slots[rank] == slots[other] {
                guard together.gain(part[rank], rank / perNode, part[other], other / perNode) > least else { continue }
                together.swap(part[rank], rank / perNode, part[other], other / perNode)
                part.swapAt(rank, other)
                swapped = true
            }
        }
        if !swapped { break }
    }
    return part.flatMap { phy2log[$0 * width..<($0 + 1) * width] }
}

/// How much load belongs to experts that two parts share, and that a part shares with all on a host.
private struct SharedLoad {
    private let nRanks: Int, nNodes: Int
    /// [part][part], 0 with itself; [part][node].
    private var between: [Double], onNode: [Double]

    init(_ phy2log: [Int32], weight: [Double], nRanks: Int, nNodes: Int) {
        (self.nRanks, self.nNodes) = (nRanks, nNodes)
        between = [Double](repeating: 0, count: nRanks * nRanks)
        onNode = [Double](repeating: 0, count: nRanks * nNodes)
        var ranks = [[Int]](repeating: [], count: weight.count)
        let width = phy2log.count / nRanks, perNode = nRanks / nNodes
        for (slot, e) in phy2log.enumerated() where e >= 0 && ranks[Int(e)].last != slot / width { ranks[Int(e)].append(slot / width) }
        for (e, ranks) in ranks.enumerated() where ranks.count > 1 {
            let share = weight[e] / Double(ranks.count)
            for a in ranks {
                for b in ranks where b != a {
                    between[a * nRanks + b] += share
                    onNode[a * nNodes + b / perNode] += share
                }
            }
        }
    }

    /// By how much the shared load on hosts falls if part a of one node and part b of another swap.
    @inline(__always)
    func gain(_ a: Int, _ node: Int, _ b: Int, _ other: Int) -> Double {
        onNode[a * nNodes + node] + onNode[b * nNodes + other] - onNode[a * nNodes + other] - onNode[b * nNodes + node]
            + 2 * between[a * nRanks + b]
    }

    mutating func swap(_ a: Int, _ node: Int, _ b: Int, _ other: Int) {
        for part in 0..<nRanks {
            let change = between[part * nRanks + b] - between[part * nRanks + a]
            onNode[part * nNodes + node] += change
            onNode[part * nNodes + other] -= change
        }
    }
}
