// Random numbers, loads and placements of the tests. All seeds are fixed.

import LPLBTopology

@testable import LPLBSolver

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random: RandomNumberGenerator {
    private var state: UInt64

    init(_ seed: UInt64) { state = seed }

    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }

    mutating func below(_ n: Int) -> Int { Int(next() % UInt64(n)) }

    /// 0 ..< 1
    mutating func unit() -> Double { Double(next() >> 11) / 9_007_199_254_740_992 }

    /// About normal: mean 0, deviation 1.
    mutating func bell() -> Double {
        var sum = -6.0
        for _ in 0..<12 { sum += unit() }
        return sum
    }
}

enum LoadFamily: CaseIterable {
    case normal, heavyTail, tiny, zero, oneHot, equal, sparse, huge, fixedOnly, movableOnly

    func loads(_ placement: Placement, _ random: inout Random) -> [Int64] {
        let n = placement.shape.nLogical
        func replicas(_ e: Int) -> Int { Int(placement.replicaStart[e + 1] - placement.replicaStart[e]) }
        switch self {
        case .normal: return (0..<n).map { _ in Int64(max(0, 1000 + 300 * random.bell())) }
        case .heavyTail: return (0..<n).map { _ in Int64(20_000 / Double(1 + random.below(n))) }
        case .tiny: return (0..<n).map { _ in Int64(random.below(4)) }
        case .zero: return (0..<n).map { _ in 0 }
        case .oneHot:
            let hot = random.below(n)
            return (0..<n).map { $0 == hot ? 12_345 : 0 }
        case .equal: return (0..<n).map { _ in 777 }
        case .sparse: return (0..<n).map { _ in random.below(8) == 0 ? Int64(random.below(5000)) : 0 }
        case .huge: return (0..<n).map { _ in random.below(2) == 0 ? 1 << 40 : Int64(random.next() >> 24) }
        case .fixedOnly: return (0..<n).map { replicas($0) == 1 ? Int64(random.below(1000)) : 0 }
        case .movableOnly: return (0..<n).map { replicas($0) > 1 ? Int64(random.below(1000)) : 0 }
        }
    }
}

extension RedundancyTopology {
    /// Each of 8 ranks copies from the next one.
    static let ring8 = of([[1, 2, 3, 4, 5, 6, 7, 0]])

    /// 4 ranks, the next and the opposite one.
    static let square4x2 = of([[1, 2, 3, 0], [2, 3, 0, 1]])

    /// 8 ranks as two rings of 4 with links between them.
    static let cube8x2 = of([[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]])

    /// 16 ranks as four rings of 4 in a ring.
    static let hypercube16x2 = of([
        [3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14], [12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    ])

    /// m x n ranks: rank (i, j) = i * n + j copies from (i + 1 mod m, j) and from (i, j + 1 mod n). A side of length 1 gives self copies.
    static func torus(_ m: Int, _ n: Int) -> RedundancyTopology {
        of([(0..<m * n).map { ($0 / n + 1) % m * n + $0 % n }, (0..<m * n).map { $0 / n * n + ($0 + 1) % n }])
    }

    private static func of(_ columns: [[Int]]) -> RedundancyTopology {
        let ranks = columns[0].count
        return try! RedundancyTopology(
            r2o: (0..<ranks).flatMap { rank in columns.map { Int32($0[rank]) } }, groupSize: ranks, nRedundant: columns.count)
    }
}

/// The cases that a topology test runs over: shape and placement, with the experts in a random order.
func topologyPlacement(
    _ topology: RedundancyTopology, groups: Int = 1, ownExperts: Int, combined: Int = 1, shuffled: Random? = nil
) throws -> Placement {
    let epSize = topology.groupSize * groups
    let copies = combined * topology.nRedundant
    let shape = try ExpertShape(
        epSize: epSize, nNodes: epSize % 4 == 0 ? epSize / 4 : 1, groupSize: topology.groupSize, nLogical: epSize * ownExperts,
        nPhysical: epSize * (ownExperts + copies))
    var order = (0..<shape.nLogical).map { Int32($0) }
    if var random = shuffled { order.shuffle(using: &random) }
    return try Placement(shape: shape, topology: topology, order: order)
}

/// Experts with 1 ... maxReplicas replicas in random slots of their group; several may share a rank.
func randomPlacement(
    ranks: Int, groups: Int = 1, localSlots: Int, maxReplicas: Int, replicated: Double = 0.5, nodes: Int = 1, _ random: inout Random
) throws -> Placement {
    let slots = ranks * localSlots
    var phy2log = [Int32](repeating: -1, count: slots * groups)
    var expert: Int32 = 0
    for group in 0..<groups {
        var free = Array(group * slots..<(group + 1) * slots)
        free.shuffle(using: &random)
        while !free.isEmpty {
            let replicas = random.unit() < replicated ? 1 + random.below(maxReplicas) : 1
            for _ in 0..<min(replicas, free.count) { phy2log[free.removeLast()] = expert }
            expert += 1
        }
    }
    var names = Array(0..<expert)
    names.shuffle(using: &random)
    let shape = try ExpertShape(
        epSize: ranks * groups, nNodes: nodes, groupSize: ranks, nLogical: Int(expert), nPhysical: slots * groups)
    return try Placement(shape: shape, phy2log: phy2log.map { names[Int($0)] })
}

/// One solve with everything that it leaves behind, as arrays.
struct Solved: Equatable {
    var results: [GroupResult] = []
    var witnesses: [Set<Int>] = []
    /// The first level of each group.
    var means: [Int64] = []
    /// [nPhysical]
    var tokens: [Int64] = []
}

extension FlowSolver {
    func run(_ loads: [Int64]) -> Solved {
        solve(loads: loads)
        var solved = Solved()
        let shape = network.shape
        for group in 0..<shape.nGroups {
            solved.results.append(results[group])
            solved.means.append(levels[group].mean / (results[group].bound == levels[group].bound ? 1 : 1024))
            let words = witness(ofGroup: group)
            solved.witnesses.append(Set((0..<Limits.maxRanks).filter { words[$0 >> 5] >> UInt32($0 & 31) & 1 != 0 }))
        }
        solved.tokens = [Int64](repeating: 0, count: shape.nPhysical)
        for place in 0..<network.nPlaces { solved.tokens[Int(network.placeSlot[place])] = quotas[place] }
        return solved
    }
}
