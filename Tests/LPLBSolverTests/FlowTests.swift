import LPLBTopology
import Testing

@testable import LPLBSolver

/// max over all non-empty sets S of ranks of the group of ceil(tokens that cannot leave S / |S|).
private func bruteForceOptimum(_ placement: Placement, _ loads: [Int64], group: Int) -> Int64 {
    let shape = placement.shape, first = group * shape.groupSize
    var sets: [(mask: Int, tokens: Int64)] = []
    for expert in 0..<shape.nLogical {
        var mask = 0, inGroup = true
        for k in Int(placement.replicaStart[expert])..<Int(placement.replicaStart[expert + 1]) {
            let rank = Int(placement.replicaSlot[k]) / shape.nLocal - first
            if rank < 0 || rank >= shape.groupSize { inGroup = false } else { mask |= 1 << rank }
        }
        if inGroup { sets.append((mask, loads[expert])) }
    }
    var best: Int64 = 0
    for s in 1..<(1 << shape.groupSize) {
        var tokens: Int64 = 0
        for set in sets where set.mask & ~s == 0 { tokens += set.tokens }
        let n = Int64(s.nonzeroBitCount)
        best = max(best, (tokens + n - 1) / n)
    }
    return best
}

/// Everything that must hold for any solve, from the placement and the loads alone.
func expectSound(_ placement: Placement, _ loads: [Int64], _ solver: FlowSolver, _ solved: Solved) {
    let shape = placement.shape
    var ofExpert = [Int64](repeating: 0, count: shape.nLogical)
    var ofRank = [Int64](repeating: 0, count: shape.epSize)
    for slot in 0..<shape.nPhysical {
        #expect(solved.tokens[slot] >= 0)
        ofExpert[Int(placement.phy2log[slot])] += solved.tokens[slot]
        ofRank[slot / shape.nLocal] += solved.tokens[slot]
    }
    #expect(ofExpert == loads)
    for group in 0..<shape.nGroups {
        let ranks = ofRank[group * shape.groupSize..<(group + 1) * shape.groupSize]
        let result = solved.results[group]
        #expect(result.maxLoad == ranks.max()!)
        #expect(result.total == ranks.reduce(0, +))
        #expect(result.certified)
        #expect(result.witnessSize == solved.witnesses[group].count)
        let bound = certifiedBound(loads: loads, placement: placement, group: group, witness: solver.witness(ofGroup: group))
        #expect(bound == result.maxLoad)
    }
    var moved: Int64 = 0
    for expert in 0..<shape.nLogical {
        let original = Int(placement.replicaSlot[Int(placement.replicaStart[expert])])
        moved += loads[expert] - solved.tokens[original]
    }
    #expect(moved == solved.results.reduce(0) { $0 + $1.moved })
}

private func expectSound(_ placement: Placement, _ seed: UInt64, rounds: Int = 1, plain: Bool = true, bruteForce: Bool = false) {
    var random = Random(seed)
    let solver = FlowSolver(Network(placement))
    let oracle = PlainFlow(placement)
    for _ in 0..<rounds {
        for family in LoadFamily.allCases {
            let loads = family.loads(placement, &random)
            let solved = solver.run(loads)
            expectSound(placement, loads, solver, solved)
            if plain { #expect(solved == oracle.solve(loads), "\(family)") }
            if bruteForce {
                for group in 0..<placement.shape.nGroups {
                    #expect(solved.results[group].maxLoad == bruteForceOptimum(placement, loads, group: group))
                }
            }
        }
    }
}

@Suite struct FlowTests {
    @Test func ring() throws {
        for own in [1, 3, 8] { expectSound(try topologyPlacement(.ring8, ownExperts: own), 1, rounds: 4, bruteForce: true) }
    }

    @Test func cube() throws {
        for own in [2, 8] { expectSound(try topologyPlacement(.cube8x2, ownExperts: own), 2, rounds: 4, bruteForce: true) }
        expectSound(try topologyPlacement(.cube8x2, groups: 3, ownExperts: 4, shuffled: Random(7)), 3, bruteForce: true)
    }

    @Test func square() throws {
        for groups in [1, 2] {
            expectSound(try topologyPlacement(.square4x2, groups: groups, ownExperts: 4), 4, rounds: 5, bruteForce: true)
        }
    }

    @Test func combinedExperts() throws {
        for combined in [2, 3, 5] {
            let placement = try topologyPlacement(.cube8x2, ownExperts: 10, combined: combined, shuffled: Random(11))
            expectSound(placement, 5, rounds: 2, bruteForce: true)
        }
        expectSound(try topologyPlacement(.ring8, groups: 2, ownExperts: 6, combined: 4, shuffled: Random(12)), 6, rounds: 2)
    }

    @Test func hypercube() throws {
        expectSound(try topologyPlacement(.hypercube16x2, ownExperts: 8, shuffled: Random(13)), 7, rounds: 3)
    }

    @Test func tori() throws {
        expectSound(try topologyPlacement(.torus(8, 4), ownExperts: 4), 8, rounds: 2)
        expectSound(try topologyPlacement(.torus(8, 8), ownExperts: 2, shuffled: Random(14)), 9)
        expectSound(try topologyPlacement(.torus(3, 3), ownExperts: 3, combined: 1), 10, rounds: 2, bruteForce: true)
        // Sides of length 1 and 2: self copies, and two bundles on the same pair of ranks.
        expectSound(try topologyPlacement(.torus(1, 6), ownExperts: 3), 11, rounds: 3, bruteForce: true)
        expectSound(try topologyPlacement(.torus(2, 2), ownExperts: 3), 12, rounds: 3, bruteForce: true)
        expectSound(try topologyPlacement(.torus(1, 1), ownExperts: 3), 13)
    }

    /// Columns drawn at random, self copies included. With many columns the colours run out and the group does not sweep.
    @Test func randomTopologies() throws {
        var random = Random(50)
        var sweeping = Set<Bool>()
        for (seed, ranks) in [1, 2, 3, 3, 4, 5, 6, 7, 8, 8, 8, 9, 12, 16, 16, 24, 30, 40, 64].enumerated() {
            let columns = 1 + random.below(5)
            var r2o = [Int32](repeating: 0, count: ranks * columns)
            for d in 0..<columns {
                for (rank, original) in (0..<ranks).shuffled(using: &random).enumerated() { r2o[rank * columns + d] = Int32(original) }
            }
            let topology = try RedundancyTopology(r2o: r2o, groupSize: ranks, nRedundant: columns)
            let combined = 1 + random.below(2)
            let placement = try topologyPlacement(
                topology, groups: 1 + random.below(2), ownExperts: columns * combined + random.below(3), combined: combined,
                shuffled: random)
            expectSound(placement, UInt64(seed), bruteForce: ranks < 9)
            sweeping.insert(Network(placement).colourEnd.count > 0)
        }
        #expect(sweeping.count == 2)
    }

    @Test func topologyAbove64Ranks() throws {
        expectSound(try topologyPlacement(.torus(10, 7), ownExperts: 3, shuffled: Random(15)), 14)
    }

    @Test func smallGeneralPlacements() throws {
        var random = Random(100)
        for seed in 0..<150 {
            let ranks = 1 + random.below(9)
            let placement = try randomPlacement(
                ranks: ranks, groups: 1 + random.below(2), localSlots: 1 + random.below(5), maxReplicas: 1 + random.below(8),
                replicated: random.unit(), &random)
            expectSound(placement, UInt64(seed), bruteForce: true)
        }
    }

    @Test func generalPlacementsUpTo64Ranks() throws {
        var random = Random(200)
        for (seed, ranks) in [10, 12, 16, 20, 24, 28, 31, 32, 32, 33, 40, 48, 56, 63, 64].enumerated() {
            let placement = try randomPlacement(
                ranks: ranks, localSlots: 2 + random.below(4), maxReplicas: 2 + random.below(7), replicated: random.unit(), &random)
            expectSound(placement, UInt64(seed))
        }
    }

    @Test func generalPlacementsAbove64Ranks() throws {
        var random = Random(300)
        for (seed, ranks) in [65, 100].enumerated() {
            expectSound(try randomPlacement(ranks: ranks, groups: 2 - seed, localSlots: 3, maxReplicas: 8, &random), UInt64(seed))
        }
    }

    /// The two searches are one algorithm: the fast one for up to 64 ranks and the one for any number agree on the same group.
    @Test func bothSearchesAgree() throws {
        var random = Random(400)
        for ranks in [8, 40, 64] {
            let placement = try randomPlacement(ranks: ranks, localSlots: 4, maxReplicas: 8, &random)
            let solver = FlowSolver(Network(placement)), other = FlowSolver(solver.network)
            for family in LoadFamily.allCases {
                let loads = family.loads(placement, &random)
                solver.solve(loads: loads)
                other.memory.read(loads)
                let group = Group(other.memory, 0)
                var state = group.start()
                if group.sweeps { continue }
                group.balanceByLists(&state)
                #expect(group.result(state) == solver.results[0])
                #expect((0..<solver.network.nArcs).allSatisfy { other.memory.x[$0] == solver.memory.x[$0] })
            }
        }
    }

    /// A replica on every rank: the loads can be levelled completely.
    @Test func everyExpertEverywhere() throws {
        for ranks in [2, 8, 64, 128] {
            let shape = try ExpertShape(epSize: ranks, nNodes: 1, groupSize: 0, nLogical: 3, nPhysical: 3 * ranks)
            let placement = try Placement(shape: shape, phy2log: (0..<3 * ranks).map { Int32($0 % 3) })
            expectSound(placement, 20, plain: ranks <= 64)
        }
    }

    /// Chains of two-place experts: excess has to travel over every rank. The worst case for the number of levels.
    @Test func chains() throws {
        for ranks in [2, 9, 64, 80] {
            let shape = try ExpertShape(epSize: ranks, nNodes: 1, groupSize: 0, nLogical: ranks, nPhysical: 2 * ranks)
            // Rank r holds expert r and expert r - 1 (rank 0 holds expert 0 twice).
            let phy2log = (0..<2 * ranks).map { Int32(max(0, $0 / 2 - $0 % 2)) }
            let placement = try Placement(shape: shape, phy2log: phy2log)
            let solver = FlowSolver(Network(placement)), oracle = PlainFlow(placement)
            let profiles: [(Int) -> Int] = [
                { $0 < ranks / 2 ? 100 : 0 }, { $0 }, { $0 == ranks - 1 ? 1 << 40 : 0 }, { $0 * 37 % 11 },
            ]
            for profile in profiles {
                let loads = (0..<ranks).map { Int64(profile($0)) }
                let solved = solver.run(loads)
                expectSound(placement, loads, solver, solved)
                #expect(solved == oracle.solve(loads))
            }
        }
    }

    @Test func equalInputsGiveEqualBits() throws {
        var random = Random(500)
        let placement = try randomPlacement(ranks: 32, localSlots: 5, maxReplicas: 6, &random)
        let a = FlowSolver(Network(placement)), b = FlowSolver(Network(placement))
        let first = LoadFamily.normal.loads(placement, &random), second = LoadFamily.sparse.loads(placement, &random)
        let before = a.run(first)
        _ = a.run(second)
        #expect(a.run(first) == before)
        #expect(b.run(first) == before)
    }

    @Test func limits() throws {
        var random = Random(600)
        let general = try randomPlacement(ranks: 1024, localSlots: 8, maxReplicas: 8, replicated: 0.75, nodes: 128, &random)
        let torus = try topologyPlacement(.torus(32, 32), ownExperts: 4, combined: 1)
        #expect(general.shape.nLogical <= Limits.maxLogical && torus.shape.nLogical == Limits.maxLogical)
        for placement in [general, torus] {
            let solver = FlowSolver(Network(placement))
            for family in [LoadFamily.normal, .huge, .heavyTail, .oneHot] {
                let loads = family.loads(placement, &random)
                expectSound(placement, loads, solver, solver.run(loads))
            }
            let most = [Int64](repeating: 1 << 40, count: placement.shape.nLogical)
            expectSound(placement, most, solver, solver.run(most))
        }
    }
}
