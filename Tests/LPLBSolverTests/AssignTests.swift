import LPLBTopology
import Testing

@testable import LPLBSolver

/// The rule of TokenAssigner for all sources at once, step by step on whole matrices. [source][place]
private func plainAssign(_ network: Network, _ counts: [[Int64]], _ quotas: [Int64]) -> [[Int64]] {
    let shape = network.shape
    var take = [[Int64]](repeating: [Int64](repeating: 0, count: network.nPlaces), count: shape.epSize)
    for expert in 0..<shape.nLogical {
        let places = Array(Int(network.expertStart[expert])..<Int(network.expertStart[expert + 1]))
        var supply = counts.map { $0[expert] }
        var quota = quotas
        func give(_ s: Int, _ place: Int, _ tokens: Int64) {
            take[s][place] += tokens
            supply[s] -= tokens
            quota[place] -= tokens
        }
        func match(_ ranks: [Int], _ places: [Int]) {
            for s in ranks { for place in places { give(s, place, min(supply[s], quota[place])) } }
        }
        for place in places {
            let rank = Int(network.placeRank[place])
            give(rank, place, min(supply[rank], quota[place]))
        }
        for node in 0..<shape.nNodes {
            let ranks = Array(node * shape.ranksPerNode..<(node + 1) * shape.ranksPerNode)
            match(ranks, places.filter { ranks.contains(Int(network.placeRank[$0])) })
        }
        match(Array(0..<shape.epSize), places)
    }
    return take
}

private func check(_ placement: Placement, _ random: inout Random) {
    let network = Network(placement), shape = placement.shape
    let solver = FlowSolver(network)
    let assigners = (0..<shape.epSize).map { TokenAssigner(network, source: $0) }
    for family in LoadFamily.allCases where family != .huge {
        let rows = (0..<shape.epSize).map { _ in family.loads(placement, &random) }
        let wide = rows.flatMap { $0 }, narrow = wide.map { Int32($0) }
        var sums = [Int64](repeating: 0, count: network.nPlaces)
        var expected: [[Int64]] = []
        for (s, assigner) in assigners.enumerated() {
            let fits = assigner.sum(wide, sources: shape.epSize)
            #expect(fits)
            let loads = (0..<shape.nLogical).map { assigner.loads[$0] }
            #expect(loads == (0..<shape.nLogical).map { e in rows.reduce(0) { $0 + $1[e] } })
            if s == 0 {
                solver.solve(loads: loads)
                expected = plainAssign(network, rows, (0..<network.nPlaces).map { solver.quotas[$0] })
            }
            assigner.assign(wide, sources: shape.epSize, quotas: solver.quotas)
            let take = (0..<network.nPlaces).map { assigner.take[$0] }
            #expect(take == expected[s])
            for place in 0..<network.nPlaces { sums[place] += take[place] }

            for expert in 0..<shape.nLogical {
                let places = Int(network.expertStart[expert])..<Int(network.expertStart[expert + 1])
                #expect(places.reduce(0) { $0 + take[$1] } == rows[s][expert])
                // No source could keep more on its own rank.
                for place in places where Int(network.placeRank[place]) == s {
                    #expect(take[place] == min(rows[s][expert], solver.quotas[place]))
                }
            }
            let own = (0..<network.nPlaces).filter { Int(network.placeRank[$0]) == s }.reduce(0) { $0 + take[$1] }
            let node = (0..<network.nPlaces).filter { Int(network.placeRank[$0]) / shape.ranksPerNode == s / shape.ranksPerNode }
                .reduce(0) { $0 + take[$1] }
            #expect(assigner.onOwnRank == own)
            #expect(assigner.onOwnNode == node - own)
            #expect(assigner.onOtherNodes == rows[s].reduce(0, +) - node)

            // Each rank knows what the others send to its places.
            var known = 0
            assigner.eachReceived(quotas: solver.quotas) { from, slot, tokens in
                let place = (0..<network.nPlaces).first { Int(network.placeSlot[$0]) == slot }!
                #expect(Int(network.placeRank[place]) == s && tokens == expected[from][place])
                known += 1
            }
            #expect(known == shape.epSize * (0..<network.nPlaces).filter { Int(network.placeRank[$0]) == s }.count)

            let again = assigner.sum(narrow, sources: shape.epSize)
            #expect(again)
            assigner.assign(narrow, sources: shape.epSize, quotas: solver.quotas)
            #expect((0..<network.nPlaces).allSatisfy { assigner.take[$0] == take[$0] })
        }
        #expect(sums == (0..<network.nPlaces).map { solver.quotas[$0] })
    }
}

@Suite struct AssignTests {
    @Test func topologies() throws {
        var random = Random(1)
        check(try topologyPlacement(.ring8, ownExperts: 3), &random)
        check(try topologyPlacement(.cube8x2, groups: 2, ownExperts: 4, shuffled: Random(2)), &random)
        check(try topologyPlacement(.square4x2, ownExperts: 6, combined: 2), &random)
    }

    @Test func generalPlacements() throws {
        var random = Random(2)
        for (ranks, nodes) in [(8, 1), (8, 2), (8, 8), (12, 3), (12, 4), (16, 2)] {
            check(try randomPlacement(ranks: ranks, localSlots: 3, maxReplicas: 8, replicated: 0.8, nodes: nodes, &random), &random)
        }
        check(try randomPlacement(ranks: 4, groups: 3, localSlots: 3, maxReplicas: 4, replicated: 0.8, nodes: 2, &random), &random)
    }

    /// One expert with a replica on every rank and all tokens on one source: they must spread over own rank, own node, other nodes.
    @Test func localityByHand() throws {
        let shape = try ExpertShape(epSize: 4, nNodes: 2, groupSize: 0, nLogical: 1, nPhysical: 4)
        let network = Network(try Placement(shape: shape, phy2log: [0, 0, 0, 0]))
        let solver = FlowSolver(network), assigner = TokenAssigner(network, source: 1)
        let counts: [Int32] = [0, 40, 0, 0]
        #expect(assigner.sum(counts, sources: 4))
        solver.solve(loads: assigner.loads)
        assigner.assign(counts, sources: 4, quotas: solver.quotas)
        #expect((0..<4).map { assigner.take[$0] } == [10, 10, 10, 10])
        #expect([assigner.onOwnRank, assigner.onOwnNode, assigner.onOtherNodes] == [10, 10, 20])
    }

    @Test func oneSourceTakesEverything() throws {
        var random = Random(3)
        let placement = try randomPlacement(ranks: 8, localSlots: 3, maxReplicas: 4, nodes: 2, &random)
        let network = Network(placement), solver = FlowSolver(network)
        let counts = LoadFamily.normal.loads(placement, &random)
        for source in [nil, 5] as [Int?] {
            let assigner = TokenAssigner(network, source: source)
            #expect(assigner.sum(counts, sources: 1))
            solver.solve(loads: assigner.loads)
            assigner.assign(counts, sources: 1, quotas: solver.quotas)
            #expect((0..<network.nPlaces).allSatisfy { assigner.take[$0] == solver.quotas[$0] })
            let total = counts.reduce(0, +)
            #expect(assigner.onOwnRank + assigner.onOwnNode + assigner.onOtherNodes == (source == nil ? 0 : total))
        }
        // All sources, but a planner for the whole batch.
        let assigner = TokenAssigner(network, source: nil)
        let rows = (0..<8).flatMap { _ in counts }
        #expect(assigner.sum(rows, sources: 8))
        solver.solve(loads: assigner.loads)
        assigner.assign(rows, sources: 8, quotas: solver.quotas)
        #expect((0..<network.nPlaces).allSatisfy { assigner.take[$0] == solver.quotas[$0] })
        #expect(assigner.onOwnRank == 0 && assigner.onOwnNode == 0 && assigner.onOtherNodes == 0)
    }

    @Test func refusesBadCounts() throws {
        let network = Network(try topologyPlacement(.ring8, ownExperts: 1))
        let assigner = TokenAssigner(network, source: 2)
        var counts = [Int64](repeating: 1, count: 64)
        #expect(assigner.sum(counts, sources: 8))
        for (value, good) in [
            (-1, false), (Int64.min, false), (Int64.max, false), (1 << 40, false), ((1 << 40) - 7, true), ((1 << 40) - 6, false),
        ] as [(Int64, Bool)] {
            counts[9] = value
            #expect(assigner.sum(counts, sources: 8) == good)
        }
        var narrow = [Int32](repeating: 3, count: 64)
        narrow[63] = -3
        #expect(!assigner.sum(narrow, sources: 8))
        #expect(assigner.sum([1 << 40, 0, 0, 0, 0, 0, 0, 0] as [Int64], sources: 1))
    }
}
