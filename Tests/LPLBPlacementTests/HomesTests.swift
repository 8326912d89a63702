// homes: against every choice of homes on small placements, and the properties that large ones must keep.

import LPLBPlacement
import LPLBTopology
import Testing

private func randomPlacement(_ random: inout Random, ranks: Int, experts: Int, slotsPerRank: Int) throws -> Placement {
    let slots = ranks * slotsPerRank
    var phy2log = (0..<slots).map { Int32($0 < experts ? $0 : random.below(experts)) }
    if random.below(2) == 0 { phy2log.shuffle(using: &random) }
    let shape = try ExpertShape(epSize: ranks, nNodes: 1, groupSize: 0, nLogical: experts, nPhysical: slots)
    return try Placement(shape: shape, phy2log: phy2log)
}

private func numbers(_ homes: [Int32], _ shape: ExpertShape) -> [Int] {
    var count = [Int](repeating: 0, count: shape.epSize)
    for slot in homes { count[Int(slot) / shape.nLocal] += 1 }
    return count
}

/// What the search minimises: the k-th home of rank r costs k * ranks + r, k from 0.
private func cost(_ count: [Int]) -> Int {
    count.enumerated().reduce(0) { $0 + $1.element * ($1.element - 1) / 2 * count.count + $1.offset * $1.element }
}

@Test func equalsTheBestOfAllChoices() throws {
    var random = Random(seed: 31)
    for round in 0..<3000 {
        let ranks = 1 + random.below(4), slotsPerRank = 1 + random.below(3), experts = 1 + random.below(ranks * slotsPerRank)
        let placement = try randomPlacement(&random, ranks: ranks, experts: experts, slotsPerRank: slotsPerRank)
        let former = round % 2 == 0 ? nil : (0..<experts).map { _ in Int32(random.below(ranks * slotsPerRank)) }
        let found = try homes(of: placement, former: former)
        #expect((0..<experts).allSatisfy { placement.phy2log[Int(found[$0])] == $0 })

        var best = Int.max, smallest = Int.max
        var choice = [Int32](repeating: 0, count: experts)
        func choose(_ expert: Int) {
            if expert == experts {
                let count = numbers(choice, placement.shape)
                (best, smallest) = (min(best, cost(count)), min(smallest, count.max()!))
                return
            }
            for k in placement.replicaStart[expert]..<placement.replicaStart[expert + 1] {
                choice[expert] = placement.replicaSlot[Int(k)]
                choose(expert + 1)
            }
        }
        choose(0)
        let count = numbers(found, placement.shape)
        if cost(count) != best || count.max()! != smallest {
            Issue.record("\(placement.phy2log) on \(ranks) ranks: got \(found), cost \(cost(count)), best \(best)")
            return
        }
    }
}

@Test func homesOfATopologyAreTheOriginals() throws {
    let cube = try RedundancyTopology(r2o: [3, 6, 0, 7, 1, 4, 2, 5, 7, 0, 4, 1, 5, 2, 6, 3], groupSize: 8, nRedundant: 2)
    let shape = try ExpertShape(epSize: 8, nNodes: 1, groupSize: 8, nLogical: 32, nPhysical: 48)
    var random = Random(seed: 32)
    for _ in 0..<20 {
        let placement = try Placement(shape: shape, topology: cube, order: random.permutation(32))
        let general = try Placement(shape: shape, phy2log: placement.phy2log)
        let originals = (0..<32).map { placement.replicaSlot[Int(placement.replicaStart[$0])] }
        #expect(try homes(of: placement) == originals)
        #expect(try homes(of: general) == originals)
    }
}

/// Whether some shift of homes along experts with several replicas would be cheaper, by the transitive closure over the ranks.
private func canBeMoreEven(_ homes: [Int32], _ placement: Placement) -> Bool {
    let shape = placement.shape, ranks = 0..<shape.epSize, count = numbers(homes, shape)
    var leads = ranks.map { one in ranks.map { $0 == one } }
    for slot in 0..<shape.nPhysical {
        leads[Int(homes[Int(placement.phy2log[slot])]) / shape.nLocal][slot / shape.nLocal] = true
    }
    for middle in ranks {
        for from in ranks where leads[from][middle] {
            for to in ranks where leads[middle][to] { leads[from][to] = true }
        }
    }
    return ranks.contains { from in
        count[from] > 0 && ranks.contains { leads[from][$0] && (count[$0], $0) < (count[from] - 1, from) }
    }
}

/// EPLB puts experts without copies together, so that a rank may have to own more than its share.
@Test(arguments: [(32, 256, 9), (64, 256, 5), (16, 64, 6), (8, 61, 8), (5, 12, 3)])
func homesOfEPLBCannotBeMoreEven(ranks: Int, experts: Int, slotsPerRank: Int) throws {
    var random = Random(seed: 33)
    for _ in 0..<10 {
        var weight = (0..<experts).map { Float(100 + random.below(100)) / Float(1 + $0 % 9) }
        weight.shuffle(using: &random)
        var phy2log = [Int64](repeating: 0, count: ranks * slotsPerRank)
        try weight.withUnsafeBufferPointer { weight throws(RuleViolation) in
            try rebalance(
                weight: weight, nLayers: 1, nLogical: experts, nPhysical: phy2log.count, nGroups: 1, nNodes: 1, nRanks: ranks,
                phy2log: &phy2log, replica: nil, logcnt: nil)
        }
        let shape = try ExpertShape(epSize: ranks, nNodes: 1, groupSize: 0, nLogical: experts, nPhysical: phy2log.count)
        let placement = try Placement(shape: shape, phy2log: phy2log.map { Int32($0) })
        let found = try homes(of: placement)
        #expect(!canBeMoreEven(found, placement))
        #expect(try homes(of: placement) == found)
        #expect(try homes(of: placement, former: found) == found, "homes that are as even as they can be stay")
        let originals = (0..<experts).map { placement.replicaSlot[Int(placement.replicaStart[$0])] }
        #expect(cost(numbers(found, shape)) <= cost(numbers(originals, shape)))
    }
}

/// Every expert twice, on ranks that differ where there are several: each rank owns its share, and remainders go to the lowest ranks.
@Test(arguments: [(4, 10), (4, 12), (7, 21), (6, 27), (2, 5), (1, 3)])
func everyRankOwnsItsShare(ranks: Int, experts: Int) throws {
    let phy2log = (0..<2 * experts).map { Int32($0 % experts) }
    let shape = try ExpertShape(epSize: ranks, nNodes: 1, groupSize: 0, nLogical: experts, nPhysical: phy2log.count)
    let found = try homes(of: Placement(shape: shape, phy2log: phy2log))
    #expect(numbers(found, shape) == (0..<ranks).map { experts / ranks + ($0 < experts % ranks ? 1 : 0) })
}

@Test func refusedFormerHomes() throws {
    let shape = try ExpertShape(epSize: 2, nNodes: 1, groupSize: 2, nLogical: 3, nPhysical: 4)
    let placement = try Placement(shape: shape, phy2log: [0, 1, 2, 0])
    func refusal(_ former: [Int32]) -> String? {
        do { _ = try homes(of: placement, former: former) } catch { return error.message }
        return nil
    }
    #expect(refusal([3, 1, 2]) == nil)
    #expect(refusal([0, 1]) == "former: must have n_logical 3 entries, got 2")
    #expect(refusal([0, 4, 1]) == "former[1]: must be a slot, 0 .. 3, got 4")
}
