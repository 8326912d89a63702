// Units and capacities: the fast solvers are the algorithm of FlowSolver.swift's head comment, as PlainFlow writes it down.

import LPLBTopology
import Testing

@testable import LPLBSolver

@Suite struct CostTests {
    private func capacities(_ kind: Int, _ ranks: Int, _ random: inout Random) -> RankCapacities? {
        let speed = (0..<ranks).map { _ -> Int32 in
            switch kind {
            case 0: 1024
            case 1: random.below(2) == 0 ? 922 : 1024
            case 2: Int32(1 + random.below(65536))
            default: random.below(2) == 0 ? 1 : 65536
            }
        }
        let fixed = (0..<ranks).map { _ in random.below(2) == 0 ? 0 : Int32(random.below(kind == 3 ? 1 << 24 : 300)) }
        return RankCapacities(speed: speed, fixed: kind == 1 ? fixed.map { _ in 0 } : fixed)
    }

    private func expectPlain(_ placement: Placement, _ random: inout Random) {
        let families: [LoadFamily] = [.normal, .heavyTail, .tiny, .zero, .oneHot, .sparse, .fixedOnly, .movableOnly]
        for (turn, family) in families.enumerated() {
            let unit = [Unit.token, Unit(2), Unit(128), .expert][random.below(4)]
            let capacities = capacities(turn % 4, placement.shape.epSize, &random)
            let solver = FlowSolver(Network(placement), unit: unit, capacities: capacities)
            let oracle = PlainFlow(placement, unit: unit, capacities: capacities)
            let loads = family.loads(placement, &random)
            let solved = solver.run(loads)
            #expect(solved == oracle.solve(loads), "\(placement.shape) \(family) \(unit.size) \(turn)")
            #expect(solved.results.allSatisfy { $0.certified })
        }
    }

    @Test func topologies() throws {
        var random = Random(1)
        for (topology, groups, combined) in [
            (RedundancyTopology.ring8, 2, 1), (.cube8x2, 1, 2), (.hypercube16x2, 1, 1), (.torus(3, 4), 1, 1), (.torus(9, 8), 1, 1),
        ] {
            expectPlain(
                try topologyPlacement(topology, groups: groups, ownExperts: 5, combined: combined, shuffled: Random(7)), &random)
        }
    }

    @Test func generalPlacements() throws {
        var random = Random(2)
        for ranks in [1, 2, 5, 16, 33, 64, 65, 90] {
            expectPlain(try randomPlacement(ranks: ranks, localSlots: 3, maxReplicas: 6, &random), &random)
        }
    }

    /// Excess that has to travel over every rank: the rounds with spilling.
    @Test func chains() throws {
        var random = Random(3)
        for ranks in [9, 64, 80] {
            let shape = try ExpertShape(epSize: ranks, nNodes: 1, groupSize: 0, nLogical: ranks, nPhysical: 2 * ranks)
            expectPlain(try Placement(shape: shape, phy2log: (0..<2 * ranks).map { Int32(max(0, $0 / 2 - $0 % 2)) }), &random)
        }
    }

    @Test func ceilings() {
        var random = Random(4)
        let sizes: [Int64] = [2, 3, 7, 64, 128, 1000, 1 << 30, 2_147_483_647]
        for size in sizes {
            let unit = Unit(size)
            var numbers: [Int64] = [0, 1, size - 1, size, size + 1, 1 << 31, (1 << 32) - size, 1 << 40]
            for _ in 0..<50 { numbers.append(Int64(random.below(1 << 40))) }
            for tokens in numbers {
                let ceiling = (tokens + size - 1) / size
                #expect(unit.units(tokens) == ceiling)
            }
        }
        #expect(Unit.expert.units(0) == 0 && Unit.expert.units(1) == 1 && Unit.expert.units(1 << 40) == 1)
    }
}
