// The digest of a planner: one number made from everything that must be equal on all ranks that plan together.

import CLPLB
import LPLBSolver
import LPLBTopology

/// A hash of numbers and bytes, the same on every machine. Not meant to withstand forgery: it finds mistakes.
struct Hash {
    private(set) var value: UInt64 = 0x6C70_6C62_0001_0001

    mutating func add(_ number: Int64) {
        value = (value ^ UInt64(bitPattern: number)) &* 0x9E37_79B9_7F4A_7C15
        value ^= value >> 29
    }

    mutating func add(_ numbers: some Sequence<Int32>) { for number in numbers { add(Int64(number)) } }

    /// 31 bits that are never 0, so that a row of zeros, which stands for a rank that did not come, is never taken for one that agrees.
    var folded: Int32 {
        let low = Int32(truncatingIfNeeded: (value ^ (value >> 32)) & 0x7FFF_FFFF)
        return low == 0 ? 1 : low
    }
}

extension Planner {
    /// What travels as the last count of this planner's rows.
    /// - Parameter attached: how many planners were attached to the exchange with this one; 0: there is no exchange.
    func digest(of placement: Placement, attached: Int64, _ capacities: RankCapacities?) -> Int32 {
        var hash = Hash()
        for size in [shape.epSize, shape.nNodes, shape.groupSize, shape.nLogical, shape.nPhysical, solver] { hash.add(Int64(size)) }
        hash.add(number)
        hash.add(attached)
        if let topology {
            hash.add(Int64(topology.nRedundant))
            hash.add(topology.r2o)
        } else {
            hash.add(-1)
        }
        hash.add(placement.phy2log)
        if unit != .token { hash.add(unit.size) }
        if let capacities {
            hash.add(capacities.speed)
            hash.add(capacities.fixed)
        }
        return hash.folded
    }
}

/// The failure for rows whose digests differ, in words that are the same on every rank: most ranks are taken to be right.
func disagreement(_ argument: String, ranks: Int, digest: (Int) -> Int32) -> Failure {
    var ranksOf: [Int32: Int] = [:]
    for rank in 0..<ranks { ranksOf[digest(rank), default: 0] += 1 }
    // The digest of most ranks; of the lowest of them where several are as frequent.
    var common = digest(0)
    for rank in 0..<ranks where ranksOf[digest(rank), default: 0] > ranksOf[common, default: 0] { common = digest(rank) }
    let others = (0..<ranks).filter { digest($0) != common }
    return Failure(
        LPLB_ERROR_DISAGREEMENT,
        "\(argument): all ranks must call the same planner, with equal settings and placement, got another digest from "
            + "\(listed(others)) than from the other \(ranks - others.count) of \(ranks)")
}

/// The same from what a kernel noted: the first rank that it found to differ from its own.
func disagreement(reported argument: String, by own: Int, of peer: Int) -> Failure {
    Failure(
        LPLB_ERROR_DISAGREEMENT,
        "\(argument): all ranks must call the same planner, with equal settings and placement, got another digest from rank \(peer) "
            + "than from rank \(own), which noticed it")
}

/// "rank 3" or "ranks 1, 2, 5 (and 9 more)".
func listed(_ ranks: [Int]) -> String {
    let shown = ranks.prefix(8).map(String.init).joined(separator: ", ")
    let rest = ranks.count > 8 ? " (and \(ranks.count - 8) more)" : ""
    return (ranks.count == 1 ? "rank " : "ranks ") + shown + rest
}
