// reorderByHistory: the oracle without replicas, then each rank sorted plainly.

import LPLBPlacement
import LPLBTopology
import Testing

private func expectedOrder(_ history: [Double], _ shape: ExpertShape) -> [Int32] {
    let packed = Oracle.rebalance(
        history.map { Float($0) },
        Sizes(nLogical: shape.nLogical, nPhysical: shape.nLogical, nGroups: shape.nGroups, nNodes: shape.nNodes, nRanks: shape.epSize)
    ).phy2log.map { Int($0) }
    let nLocal = shape.nLogical / shape.epSize
    return (0..<shape.epSize).flatMap { rank in
        (0..<nLocal).sorted { a, b in
            let (x, y) = (history[packed[rank * nLocal + a]], history[packed[rank * nLocal + b]])
            return x == y ? a < b : x > y
        }.map { Int32(packed[rank * nLocal + $0]) }
    }
}

@Test func equalsThePlainOrder() throws {
    var random = Random(seed: 21)
    for round in 0..<1500 {
        let nNodes = 1 + random.below(3), group = 1 + random.below(5), nGroups = nNodes * (1 + random.below(3))
        let ep = group * nGroups, nLogical = ep * (1 + random.below(6))
        // n_nodes may also not divide the number of groups: then the reordering is global.
        let nodes = random.below(3) == 0 ? ep : nNodes
        let shape = try ExpertShape(epSize: ep, nNodes: nodes, groupSize: group, nLogical: nLogical, nPhysical: nLogical)
        var history = randomLoads(nLogical, family: round, &random).map { Double($0) }
        if round % 4 == 1 {
            // Differences that float32 does not see.
            history = history.map { $0 + Double(random.below(8)) * 1e-12 }
        }
        let order = try reorderByHistory(history, shape: shape)
        if order != expectedOrder(history, shape) {
            Issue.record("\(shape), history \(history): got \(order)")
            return
        }
    }
}

/// Ascending loads that are all the same as float32: the longest way for the sort of a rank.
@Test(arguments: [1, 2, 15, 16, 33, 512, 4096])
func historiesThatDifferOnlyInDouble(n: Int) throws {
    let shape = try ExpertShape(epSize: 1, nNodes: 1, groupSize: 1, nLogical: n, nPhysical: n)
    #expect(try reorderByHistory((0..<n).map { 1 + Double($0) * 1e-14 }, shape: shape) == (0..<Int32(n)).reversed())
    #expect(try reorderByHistory((0..<n).map { 1e300 + Double($0 / 3) * 1e290 }, shape: shape).first == Int32((n - 1) / 3 * 3))
    #expect(try reorderByHistory([Double](repeating: 2, count: n), shape: shape) == (0..<Int32(n)).map { $0 })
}

@Test func placementFromHistory() throws {
    let shape = try ExpertShape(epSize: 8, nNodes: 1, groupSize: 8, nLogical: 32, nPhysical: 48)
    var random = Random(seed: 3)
    let history = (0..<32).map { _ in Double(random.below(1000)) }
    let cube = try RedundancyTopology(r2o: [3, 6, 0, 7, 1, 4, 2, 5, 7, 0, 4, 1, 5, 2, 6, 3], groupSize: 8, nRedundant: 2)
    let p = try Placement(shape: shape, topology: cube, order: reorderByHistory(history, shape: shape))
    for rank in 0..<8 {
        let own = p.phy2log[rank * 6..<rank * 6 + 4].map { history[Int($0)] }
        #expect(own == own.sorted(by: >))
        #expect(p.phy2log[rank * 6..<rank * 6 + 4].map { p.logcnt[Int($0)] } == [2, 2, 1, 1])
    }
}

@Test func refusedHistories() throws {
    let shape = try ExpertShape(epSize: 2, nNodes: 1, groupSize: 2, nLogical: 4, nPhysical: 6)
    func refusal(_ history: [Double], _ shape: ExpertShape) -> String? {
        do { _ = try reorderByHistory(history, shape: shape) } catch { return error.message }
        return nil
    }
    #expect(refusal([1, 2, 3, 4], shape) == nil)
    #expect(refusal([1, 2, -0.0, .greatestFiniteMagnitude], shape) == nil)
    #expect(refusal([1, 2, 3], shape) == "history: must have n_logical 4 entries, got 3")
    #expect(refusal([1, 2, .nan, 4], shape) == "history[2]: must be finite and not negative, got nan")
    #expect(refusal([1, 2, 3, .infinity], shape) == "history[3]: must be finite and not negative, got inf")
    #expect(refusal([-1e-300, 2, 3, 4], shape) == "history[0]: must be finite and not negative, got -1e-300")
    let uneven = try ExpertShape(epSize: 2, nNodes: 1, groupSize: 2, nLogical: 5, nPhysical: 6)
    #expect(refusal([1, 2, 3, 4, 5], uneven) == "n_logical: must be a multiple of ep_size 2 to be reordered, got 5")
}
