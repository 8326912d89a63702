// rebalance: the published example, the oracle on thousands of instances, and what is refused.

import LPLBPlacement
import LPLBTopology
import Testing

private let exampleLoads: [Float] = [
    90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86,
    20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27,
]
private let exampleSizes = Sizes(nLogical: 12, nPhysical: 16, nGroups: 4, nNodes: 2, nRanks: 8)

/// The example of the README of github.com/deepseek-ai/EPLB.
@Test func publishedExample() throws {
    let r = try balanced(exampleLoads, 2, exampleSizes)
    #expect(Array(r.phy2log[..<16]) == [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1])
    #expect(Array(r.phy2log[16...]) == [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1])
    #expect(Array(r.logcnt[..<12]) == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1])
}

private func randomSizes(_ random: inout Random) -> Sizes {
    // Everything divides by construction; about a third of the instances are global with several nodes.
    let nNodes = 1 + random.below(4), ranksPerNode = 1 + random.below(6)
    let groupsPerNode = 1 + random.below(3)
    let nGroups = random.below(3) == 0 ? 1 + random.below(7) : nNodes * groupsPerNode
    let nRanks = nNodes * ranksPerNode
    let nLogical = nGroups * (1 + random.below(12))
    let fewest = (nLogical + nRanks - 1) / nRanks
    return Sizes(
        nLogical: nLogical, nPhysical: nRanks * (fewest + random.below(4)), nGroups: nGroups, nNodes: nNodes, nRanks: nRanks)
}

@Test(arguments: 0..<10)
func equalsTheOracle(family: Int) throws {
    var random = Random(seed: UInt64(100 + family))
    for _ in 0..<400 {
        let s = randomSizes(&random)
        let w = randomLoads(s.nLogical, family: family, &random)
        let got = try balanced(w, 1, s), expected = Oracle.rebalance(w, s)
        if got != expected {
            Issue.record("\(s), loads \(w): got \(got), expected \(expected)")
            return
        }
    }
}

/// Sizes that reach the radix sort, one slot a rank, one rank, one expert.
@Test(arguments: [
    Sizes(nLogical: 256, nPhysical: 288, nGroups: 8, nNodes: 4, nRanks: 32),
    Sizes(nLogical: 256, nPhysical: 288, nGroups: 1, nNodes: 1, nRanks: 32),
    Sizes(nLogical: 256, nPhysical: 288, nGroups: 8, nNodes: 3, nRanks: 144),
    Sizes(nLogical: 256, nPhysical: 256, nGroups: 8, nNodes: 8, nRanks: 64),
    Sizes(nLogical: 256, nPhysical: 320, nGroups: 16, nNodes: 4, nRanks: 320),
    Sizes(nLogical: 250, nPhysical: 300, nGroups: 50, nNodes: 1, nRanks: 1),
    Sizes(nLogical: 500, nPhysical: 600, nGroups: 125, nNodes: 5, nRanks: 5),
    Sizes(nLogical: 64, nPhysical: 640, nGroups: 64, nNodes: 32, nRanks: 64),
    Sizes(nLogical: 1, nPhysical: 100, nGroups: 1, nNodes: 1, nRanks: 20),
    Sizes(nLogical: 1, nPhysical: 1, nGroups: 1, nNodes: 1, nRanks: 1),
])
func equalsTheOracleAtLargerSizes(s: Sizes) throws {
    var random = Random(seed: 5)
    let layers = (0..<20).map { randomLoads(s.nLogical, family: $0, &random) }
    let got = try balanced(Array(layers.joined()), layers.count, s)
    for (layer, w) in layers.enumerated() {
        let expected = Oracle.rebalance(w, s)
        #expect(Array(got.phy2log[layer * s.nPhysical..<(layer + 1) * s.nPhysical]) == expected.phy2log, "layer \(layer)")
        #expect(Array(got.replica[layer * s.nPhysical..<(layer + 1) * s.nPhysical]) == expected.replica, "layer \(layer)")
        #expect(Array(got.logcnt[layer * s.nLogical..<(layer + 1) * s.nLogical]) == expected.logcnt, "layer \(layer)")
    }
}

/// Every slot number 0 ..< logcnt of every expert occurs once: what log2phy needs.
@Test func replicasAreNumbered() throws {
    var random = Random(seed: 9)
    for family in 0..<10 {
        let s = Sizes(nLogical: 96, nPhysical: 144, nGroups: 12, nNodes: 4, nRanks: 24)
        let r = try balanced(randomLoads(s.nLogical, family: family, &random), 1, s)
        for e in 0..<s.nLogical {
            let numbers = (0..<s.nPhysical).filter { r.phy2log[$0] == e }.map { r.replica[$0] }.sorted()
            #expect(numbers == Array(0..<r.logcnt[e]))
        }
    }
}

/// Float32 sums of 1, 1/2, 1/3, ..., 1/(n-1), 0 as PyTorch 2.11 on x86-64 gives them (bit patterns). A second group holding exactly that
/// number must tie with it, the next float must not; which group came first shows in the order of the zeros.
@Test(arguments: [
    (3, 0x3FC0_0000 as UInt32), (5, 0x4005_5556), (6, 0x4012_2222), (7, 0x401C_CCCD), (9, 0x402D_F160), (20, 0x4063_0E2C),
    (40, 0x4088_1D07), (69, 0x4099_BAD9), (75, 0x409C_6AAE), (100, 0x40A5_AD14), (118, 0x40AA_FF3D), (300, 0x40C8_F047),
])
func groupSumsRoundLikePyTorch(n: Int, bits: UInt32) throws {
    let series = (1..<n).map { 1 / Float($0) } + [0]
    let s = Sizes(nLogical: 2 * n, nPhysical: 2 * n, nGroups: 2, nNodes: 1, nRanks: 1)
    func lastSlot(_ other: Float) throws -> Int64 {
        try balanced(series + [other] + [Float](repeating: 0, count: n - 1), 1, s).phy2log.last!
    }
    let sum = Float(bitPattern: bits)
    #expect(try lastSlot(sum) == Int64(2 * n - 1))
    #expect(try lastSlot(sum.nextUp) == Int64(n - 1))
}

@Test func outputsAreOptional() throws {
    let all = try balanced(exampleLoads, 2, exampleSizes)
    var phy2log = [Int64](repeating: 0, count: 32)
    for some in [true, false] {
        try exampleLoads.withUnsafeBufferPointer { weight in
            try phy2log.withUnsafeMutableBufferPointer { phy2log in
                try rebalance(
                    weight: weight, nLayers: 2, nLogical: 12, nPhysical: 16, nGroups: 4, nNodes: 2, nRanks: 8,
                    phy2log: some ? phy2log.baseAddress : nil, replica: nil, logcnt: nil)
            }
        }
    }
    #expect(phy2log == all.phy2log)
    #expect(try balanced([], 0, exampleSizes) == Result())
}

/// Numbers of groups and nodes that do not go together mean "global", whatever else they divide.
@Test func globalNeedsNeitherGroupsNorNodes() throws {
    let global = try balanced(exampleLoads, 2, Sizes(nLogical: 12, nPhysical: 16, nGroups: 1, nNodes: 1, nRanks: 8))
    for (nGroups, nNodes) in [(5, 2), (1, 3), (4, 3), (4, .max)] {
        #expect(try balanced(exampleLoads, 2, Sizes(nLogical: 12, nPhysical: 16, nGroups: nGroups, nNodes: nNodes, nRanks: 8)) == global)
    }
}

@Test func refusalsInWords() throws {
    func refusal(_ s: Sizes, _ w: [Float]? = nil, layers: Int = 1) -> String? {
        let weight = w ?? [Float](repeating: 1, count: max(0, min(s.nLogical, 100)))
        do {
            try weight.withUnsafeBufferPointer {
                try rebalance(
                    weight: $0, nLayers: layers, nLogical: s.nLogical, nPhysical: s.nPhysical, nGroups: s.nGroups, nNodes: s.nNodes,
                    nRanks: s.nRanks, phy2log: nil, replica: nil, logcnt: nil)
            }
        } catch { return (error as? RuleViolation)?.message ?? "\(error)" }
        return nil
    }
    func with(_ change: (inout Sizes) -> Void) -> Sizes {
        var s = exampleSizes
        change(&s)
        return s
    }
    #expect(refusal(exampleSizes) == nil)
    #expect(refusal(with { $0.nPhysical = 17 }) == "n_physical: must be a multiple of n_ranks 8, got 17")
    #expect(refusal(with { $0.nPhysical = 8 }) == "n_physical: must be at least n_logical 12, got 8")
    #expect(refusal(with { $0.nGroups = 10 }) == "n_logical: must be a multiple of n_groups 10, got 12")
    #expect(refusal(with { $0.nGroups = 12; $0.nNodes = 3 }) == "n_ranks: must be a multiple of n_nodes 3, got 8")
    #expect(refusal(with { $0.nRanks = 0 }) == "n_ranks: must be at least 1, got 0")
    #expect(refusal(with { $0.nRanks = .min }) == "n_ranks: must be at least 1, got \(Int.min)")
    #expect(refusal(with { $0.nLogical = -1 })?.hasPrefix("n_logical: must be at least 1") == true)
    #expect(refusal(with { $0.nPhysical = .max })?.hasPrefix("n_physical: must be at most 1048576") == true)
    #expect(refusal(with { $0.nLogical = .max })?.hasPrefix("n_physical: must be at least n_logical") == true)
    #expect(refusal(with { $0.nGroups = .max - 1 })?.hasPrefix("n_logical: must be a multiple of n_groups") == true)
    #expect(refusal(with { $0.nGroups = .max; $0.nNodes = .max })?.hasPrefix("n_ranks: must be a multiple of n_nodes") == true)
    #expect(refusal(exampleSizes, layers: -1) == "n_layers: must be at least 0, got -1")
    #expect(refusal(exampleSizes, layers: .max)?.hasPrefix("n_layers: ") == true)
    #expect(refusal(exampleSizes, [1, 2]) == "weight: must have n_layers * n_logical = 12 entries, got 2")
    for bad: Float in [.nan, .infinity, -.infinity, -1, -.leastNonzeroMagnitude] {
        var w = exampleLoads
        w[12 + 7] = bad
        #expect(refusal(exampleSizes, w, layers: 2) == "weight[1][7]: must be finite and not negative, got \(bad)")
    }
}

@Test func aRefusedCallWritesNothing() {
    var out = [Int64](repeating: -7, count: 2 * 16)
    var w = exampleLoads
    w[23] = .nan
    #expect(throws: RuleViolation.self) {
        try w.withUnsafeBufferPointer { w in
            try out.withUnsafeMutableBufferPointer {
                try rebalance(
                    weight: w, nLayers: 2, nLogical: 12, nPhysical: 16, nGroups: 4, nNodes: 2, nRanks: 8, phy2log: $0.baseAddress,
                    replica: nil, logcnt: nil)
            }
        }
    }
    #expect(out == [Int64](repeating: -7, count: 2 * 16))
}
