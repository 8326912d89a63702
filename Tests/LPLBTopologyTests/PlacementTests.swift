// Placement: both ways of making one against plain definitions of the tables, and what is refused.

import LPLBTopology
import Testing

private func violation(_ body: () throws -> Placement) -> RuleViolation? {
    do { _ = try body() } catch { return error as? RuleViolation }
    return nil
}

private func sizes(_ ep: Int, _ group: Int, _ logical: Int, _ physical: Int) throws -> ExpertShape {
    try ExpertShape(epSize: ep, nNodes: 0, groupSize: group, nLogical: logical, nPhysical: physical)
}

/// What must hold for every placement, from `phy2log` alone.
private func checkTables(_ p: Placement) {
    let s = p.shape
    #expect(p.phy2log.count == s.nPhysical && p.replicaSlot.count == s.nPhysical && p.replicaStart.count == s.nLogical + 1)
    #expect(p.replicaStart.first == 0 && p.replicaStart.last == Int32(s.nPhysical))
    let width = p.maxReplicas
    let log2phy = p.log2phy(width: width)
    #expect(log2phy.count == s.nLogical * width)
    let wide = p.log2phy(width: width + 1)
    var most = 0
    for e in 0..<s.nLogical {
        let slots = Array(p.replicaSlot[Int(p.replicaStart[e])..<Int(p.replicaStart[e + 1])])
        #expect(slots.sorted() == (0..<s.nPhysical).filter { p.phy2log[$0] == Int32(e) }.map { Int32($0) })
        #expect(p.logcnt[e] == Int32(slots.count))
        #expect(Array(log2phy[e * width..<(e + 1) * width]) == slots + Array(repeating: -1, count: width - slots.count))
        #expect(Array(wide[e * (width + 1)..<(e + 1) * (width + 1)]) == slots + Array(repeating: -1, count: width + 1 - slots.count))
        most = max(most, slots.count)
    }
    #expect(most == width)
}

@Test func topologyPlacements() throws {
    var random = Random(seed: 11)
    for round in 0..<120 {
        let group = 1 + random.below(9), nGroups = 1 + random.below(3), ep = group * nGroups
        let nRedundant = random.below(4), m = nRedundant == 0 ? 0 : 1 + random.below(3)
        let nOwn = max(1, m * nRedundant + random.below(4)), nLocal = nOwn + m * nRedundant
        let columns = (0..<nRedundant).map { _ in round % 7 == 0 ? (0..<Int32(group)).map { $0 } : random.permutation(group) }
        let topology = try RedundancyTopology(
            r2o: (0..<group).flatMap { r in columns.map { $0[r] } }, groupSize: group, nRedundant: nRedundant)
        let order = round % 3 == 0 ? (0..<Int32(ep * nOwn)).map { $0 } : random.permutation(ep * nOwn)
        let p = try Placement(shape: sizes(ep, group, ep * nOwn, ep * nLocal), topology: topology, order: order)
        checkTables(p)
        #expect(p.combined == m)
        #expect(p.topology == topology)
        for rank in 0..<ep {
            let first = rank / group * group
            for i in 0..<nOwn {
                #expect(p.phy2log[rank * nLocal + i] == order[rank * nOwn + i])
                let replicas = p.replicaSlot[Int(p.replicaStart[Int(order[rank * nOwn + i])])...]
                #expect(replicas.first == Int32(rank * nLocal + i))  // the original, also when its copy has a smaller slot
                #expect(p.logcnt[Int(order[rank * nOwn + i])] == (i < m * nRedundant ? 2 : 1))
            }
            for j in 0..<m {
                for d in 0..<nRedundant {
                    let original = first + Int(topology.r2o[rank % group * nRedundant + d])
                    #expect(p.phy2log[rank * nLocal + nOwn + j * nRedundant + d] == order[original * nOwn + j * nRedundant + d])
                }
            }
        }
    }
}

@Test func selfCopyIsTwoReplicasOnOneRank() throws {
    let topology = try RedundancyTopology(r2o: [0, 1], groupSize: 2, nRedundant: 1)
    let p = try Placement(shape: sizes(2, 2, 4, 6), topology: topology, order: [0, 1, 2, 3])
    #expect(p.phy2log == [0, 1, 0, 2, 3, 2])
    #expect(p.logcnt == [2, 1, 2, 1])
    #expect(p.log2phy(width: 2) == [0, 2, 1, -1, 3, 5, 4, -1])
}

@Test func originalFirstOnTheRing() throws {
    let ring = try RedundancyTopology(r2o: [1, 2, 3, 4, 5, 6, 7, 0], groupSize: 8, nRedundant: 1)
    let p = try Placement(shape: sizes(8, 8, 8, 16), topology: ring, order: (0..<8).map { $0 })
    #expect(p.log2phy(width: 2) == [0, 15, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13])
}

@Test func noColumnsMeansNoCopies() throws {
    let none = try RedundancyTopology(r2o: [], groupSize: 4, nRedundant: 0)
    let p = try Placement(shape: sizes(4, 4, 8, 8), topology: none, order: (0..<8).map { $0 })
    #expect(p.maxReplicas == 1 && p.combined == 0)
    #expect(p.phy2log == (0..<8).map { $0 })
    #expect(p.log2phy(width: 2) == (0..<8).flatMap { [$0, -1] })
    #expect(violation { try Placement(shape: sizes(4, 4, 8, 12), topology: none, order: (0..<8).map { $0 }) } != nil)
}

@Test func generalPlacements() throws {
    var random = Random(seed: 13)
    for _ in 0..<200 {
        let group = 1 + random.below(6), nGroups = 1 + random.below(3), ep = group * nGroups
        let nLocal = 1 + random.below(6), slotsOfGroup = group * nLocal
        // Experts of a group, each once, then any of them; shuffled over the slots of the group.
        var next: Int32 = 0
        var phy2log: [Int32] = []
        for _ in 0..<nGroups {
            let experts = (0..<Int32(1 + random.below(slotsOfGroup))).map { $0 + next }
            next += Int32(experts.count)
            let more = (0..<(slotsOfGroup - experts.count)).map { _ in experts[random.below(experts.count)] }
            phy2log += (experts + more).shuffled(using: &random)
        }
        let names = random.permutation(Int(next))  // which group an expert lies in follows no order
        let shape = try sizes(ep, group, Int(next), phy2log.count)
        let p = try Placement(shape: shape, phy2log: phy2log.map { names[Int($0)] })
        checkTables(p)
        #expect(p.topology == nil && p.combined == 0)
        for e in 0..<shape.nLogical {
            let slots = p.replicaSlot[Int(p.replicaStart[e])..<Int(p.replicaStart[e + 1])]
            #expect(slots.sorted() == Array(slots))
        }
    }
}

@Test func refusedGeneralPlacements() throws {
    let one = try sizes(2, 2, 3, 4), two = try sizes(2, 1, 3, 4)
    #expect(violation { try Placement(shape: one, phy2log: [0, 1, 2]) }?.message == "phy2log: must have n_physical 4 entries, got 3")
    let rule = "must be a logical expert, 0 .. 2, or -1 for none"
    #expect(violation { try Placement(shape: one, phy2log: [0, 1, 3, 2]) }?.message == "phy2log[2]: \(rule), got 3")
    #expect(violation { try Placement(shape: one, phy2log: [0, -2, 1, 2]) }?.message == "phy2log[1]: \(rule), got -2")
    #expect(violation { try Placement(shape: one, phy2log: [0, -1, 1, -1]) }?.message.hasSuffix("no slot for expert 2") == true)
    #expect(violation { try Placement(shape: one, phy2log: [0, .max, .min, 2]) }?.kind == .invalidArgument)
    #expect(
        violation { try Placement(shape: one, phy2log: [0, 1, 1, 0]) }?.message
            == "phy2log: must hold every logical expert at least once, got no slot for expert 2")
    #expect(violation { try Placement(shape: one, phy2log: [0, 1, 2, 0]) } == nil)
    #expect(
        violation { try Placement(shape: two, phy2log: [0, 1, 2, 0]) }?.message
            == "phy2log: all replicas of an expert must lie within one group of 1 ranks, "
            + "got expert 0 in slot 0 (group 0) and slot 3 (group 1)")
    #expect(violation { try Placement(shape: two, phy2log: [0, 1, 2, 2]) } == nil)
}

@Test func refusedTopologyPlacements() throws {
    let cube = try RedundancyTopology(r2o: [3, 6, 0, 7, 1, 4, 2, 5, 7, 0, 4, 1, 5, 2, 6, 3], groupSize: 8, nRedundant: 2)
    let order = (0..<Int32(32)).map { $0 }
    func message(_ group: Int, _ logical: Int, _ physical: Int, _ order: [Int32], ep: Int = 8) -> String? {
        violation { try Placement(shape: sizes(ep, group, logical, physical), topology: cube, order: order) }?.message
    }
    #expect(message(8, 32, 48, order) == nil)
    #expect(message(8, 32, 64, order) == nil)
    #expect(message(4, 32, 48, order) == "r2o: must have group_size 4 rows, got 8")
    #expect(message(8, 36, 56, order) == "n_logical: must be a multiple of ep_size 8 with r2o, got 36")
    let rule = "(n_physical - n_logical) / ep_size: must be"
    #expect(message(8, 32, 40, order) == "\(rule) m * n_redundant for an m >= 1, n_redundant being 2, got 1")
    #expect(message(8, 32, 32, order) == "\(rule) m * n_redundant for an m >= 1, n_redundant being 2, got 0")
    #expect(message(8, 32, 80, order) == "\(rule) at most n_logical / ep_size 4, got 6")
    #expect(message(8, 32, 48, Array(order.dropLast())) == "order: must have n_logical 32 entries, got 31")
    var broken = order
    broken[5] = 3
    #expect(message(8, 32, 48, broken) == "order[5]: must be a permutation of 0 .. 31, got 3 again")
    broken[5] = 32
    #expect(message(8, 32, 48, broken) == "order[5]: must be a logical expert, 0 .. 31, got 32")
    broken[5] = .min
    #expect(message(8, 32, 48, broken)?.hasPrefix("order[5]: must be a logical expert") == true)
}

@Test func widthsOfLog2phy() throws {
    let p = try Placement(shape: sizes(1, 1, 2, 4), phy2log: [1, 0, 1, 1])
    #expect(p.log2phy(width: 1) == [1, 0])
    #expect(p.log2phy(width: 0) == [])
    #expect(p.log2phy(width: -3) == [])
    #expect(p.log2phy(width: .max).count == 2 * Limits.maxPhysical)
}
