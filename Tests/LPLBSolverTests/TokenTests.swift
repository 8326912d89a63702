import LPLBTopology
import Testing

@testable import LPLBSolver

private func randomIds(_ n: Int, _ nLogical: Int, _ random: inout Random, bad: Bool = true) -> [Int64] {
    (0..<n).map { _ in
        switch random.below(20) {
        case 0: return -1
        case 1 where bad:
            return [-2, Int64(nLogical), Int64(nLogical) + 7, 1 << 20, -(1 << 31), (1 << 31) - 1][random.below(6)]
        // A hot expert, so that runs of equal ids occur.
        case 2...7: return Int64(nLogical / 2)
        default: return Int64(random.below(nLogical))
        }
    }
}

private func plainCount(_ ids: some Sequence<Int64>, _ nLogical: Int) -> [Int32] {
    var counts = [Int32](repeating: 0, count: nLogical)
    for id in ids where id >= 0 && id < nLogical { counts[Int(id)] += 1 }
    return counts
}

/// `slot(e, k)`: where the k-th occurrence of e goes.
private func plainRedirect(_ ids: [Int64], _ nLogical: Int, _ slot: (Int, Int) -> Int32) -> [Int64] {
    var seen = [Int](repeating: 0, count: nLogical)
    return ids.map { id in
        guard id >= 0 && id < nLogical else { return -1 }
        defer { seen[Int(id)] += 1 }
        return Int64(slot(Int(id), seen[Int(id)]))
    }
}

private func invalidCount(_ ids: [Int64], _ nLogical: Int) -> Int64 { Int64(ids.filter { $0 < -1 || $0 >= nLogical }.count) }

@Suite struct TokenTests {
    @Test func counting() {
        var random = Random(1)
        for nLogical in [1, 2, 64, 4096] {
            let mapper = TokenMapper(nLogical: nLogical)
            for n in [0, 1, 3, 4, 5, 1000, 5003] {
                let ids = randomIds(n, nLogical, &random)
                var counts = [Int32](repeating: 99, count: nLogical)
                #expect(mapper.count(ids, n, counts: &counts) == invalidCount(ids, nLogical))
                #expect(counts == plainCount(ids, nLogical))
                counts = [Int32](repeating: 99, count: nLogical)
                #expect(mapper.count(ids.map { Int32($0) }, n, counts: &counts) == invalidCount(ids, nLogical))
                #expect(counts == plainCount(ids, nLogical))
            }
        }
    }

    @Test func extremeIdsAreInvalid() {
        let mapper = TokenMapper(nLogical: 4)
        let ids: [Int64] = [.min, .max, .min + 1, .max - 1, -2, 4, 1 << 32, -(1 << 32), (1 << 32) + 1, -1, 0, 3]
        var counts = [Int32](repeating: 0, count: 4)
        #expect(mapper.count(ids, ids.count, counts: &counts) == 9)
        #expect(counts == [1, 0, 0, 1])
        let narrow: [Int32] = [.min, .max, -1, 2]
        #expect(mapper.count(narrow, 4, counts: &counts) == 2)
        #expect(counts == [0, 0, 1, 0])
    }

    @Test func cumulativeCounts() {
        var random = Random(2)
        let nLogical = 10
        let mapper = TokenMapper(nLogical: nLogical)
        for (n, chunks, length) in [(0, 3, 0), (1, 1, 1024), (5000, 1, 5120), (5000, 2, 3072), (5000, 5, 1024), (5000, 100, 1024)] {
            #expect(TokenMapper.chunkLength(n, chunks: chunks) == length)
            let ids = randomIds(n, nLogical, &random)
            var counts = [Int32](repeating: 9, count: nLogical), rows = [Int32](repeating: 9, count: chunks * nLogical)
            #expect(mapper.count(ids, n, counts: &counts, cumulative: &rows, chunks: chunks) == invalidCount(ids, nLogical))
            #expect(counts == plainCount(ids, nLogical))
            for i in 0..<chunks {
                #expect(Array(rows[i * nLogical..<(i + 1) * nLogical]) == plainCount(ids.prefix((i + 1) * length), nLogical))
            }
        }
    }

    @Test func redirectFollowsThePlan() throws {
        var random = Random(3)
        for _ in 0..<12 {
            let placement = try randomPlacement(ranks: 8, localSlots: 3, maxReplicas: 6, replicated: 0.7, nodes: 2, &random)
            let network = Network(placement), n = placement.shape.nLogical
            let solver = FlowSolver(network), mapper = TokenMapper(nLogical: n), assigner = TokenAssigner(network, source: nil)
            let ids = randomIds(3000, n, &random)
            var counts = [Int32](repeating: 0, count: n)
            _ = mapper.count(ids, ids.count, counts: &counts)
            #expect(assigner.sum(counts, sources: 1))
            solver.solve(loads: assigner.loads)
            assigner.assign(counts, sources: 1, quotas: solver.quotas)

            func slot(_ e: Int, _ k: Int) -> Int32 {
                var upTo: Int64 = 0
                for place in Int(network.expertStart[e])..<Int(network.expertStart[e + 1]) {
                    upTo += assigner.take[place]
                    if upTo > k { return network.placeSlot[place] }
                }
                return network.placeSlot[Int(network.expertStart[e])]
            }
            let expected = plainRedirect(ids, n, slot)
            var out = [Int64](repeating: 7, count: ids.count)
            #expect(mapper.redirect(ids, ids.count, to: &out, network: network, take: assigner.take) == invalidCount(ids, n))
            #expect(out == expected)
            // The tokens on each slot are the plan's.
            let ofSlot = plainCount(out, placement.shape.nPhysical)
            #expect((0..<network.nPlaces).allSatisfy { Int64(ofSlot[Int(network.placeSlot[$0])]) == solver.quotas[$0] })

            var inPlace = ids.map { Int32($0) }
            inPlace.withUnsafeMutableBufferPointer {
                _ = mapper.redirect($0.baseAddress!, $0.count, to: $0.baseAddress!, network: network, take: assigner.take)
            }
            #expect(inPlace.map { Int64($0) } == expected)

            // More ids than were counted: the surplus goes to the originals.
            let twice = ids + ids
            out = [Int64](repeating: 7, count: twice.count)
            _ = mapper.redirect(twice, twice.count, to: &out, network: network, take: assigner.take)
            #expect(out == plainRedirect(twice, n, slot))
            _ = mapper.redirect(twice, twice.count, to: &out, network: network, take: nil)
            #expect(out == plainRedirect(twice, n) { e, _ in network.placeSlot[Int(network.expertStart[e])] })
        }
    }

    @Test func redirectByRatio() throws {
        var random = Random(4)
        let special: [Float] = [0, 1, -3, 7, .nan, .infinity, -.infinity, 0.5, .leastNonzeroMagnitude, Float(1).nextDown]
        for topology in [RedundancyTopology.cube8x2, .torus(1, 8)] {
            let placement = try topologyPlacement(topology, ownExperts: 4, combined: 2, shuffled: Random(5))
            let network = Network(placement), n = placement.shape.nLogical
            let mapper = TokenMapper(nLogical: n)
            for _ in 0..<10 {
                let ids = randomIds(2000, n, &random)
                let totals = plainCount(ids, n)
                let ratios = (0..<16).map { _ in random.below(2) == 0 ? special[random.below(special.count)] : Float(random.unit()) }
                let expected = plainRedirect(ids, n) { e, k in
                    let slots = (Int(placement.replicaStart[e])..<Int(placement.replicaStart[e + 1])).map { placement.replicaSlot[$0] }
                    if slots.count == 1 { return slots[0] }
                    // Local slot j * 2 + d of the original's rank.
                    let rank = Int(slots[0]) / placement.shape.nLocal, d = Int(slots[0]) % placement.shape.nLocal % 2
                    let given = ratios[rank * 2 + d]
                    let ratio = given.isNaN ? 1 : min(1, max(0, given))
                    return Double(k) < (Double(ratio) * Double(totals[e])).rounded(.toNearestOrAwayFromZero) ? slots[0] : slots[1]
                }
                var out = [Int64](repeating: 7, count: ids.count)
                let invalid = mapper.redirect(ids, ids.count, to: &out, network: network, ratios: ratios, totals: totals)
                #expect(invalid == invalidCount(ids, n))
                #expect(out == expected)
                var narrow = ids.map { Int32($0) }
                narrow.withUnsafeMutableBufferPointer {
                    _ = mapper.redirect($0.baseAddress!, $0.count, to: $0.baseAddress!, network: network, ratios: ratios, totals: totals)
                }
                #expect(narrow.map { Int64($0) } == expected)
            }
        }
    }

    @Test func ratiosAndScaledLoads() throws {
        var random = Random(6)
        let placement = try topologyPlacement(.torus(1, 4), groups: 2, ownExperts: 4, combined: 2, shuffled: Random(7))
        let network = Network(placement), solver = FlowSolver(network), shape = placement.shape
        for family in LoadFamily.allCases {
            let loads = family.loads(placement, &random)
            let solved = solver.run(loads)
            var ratios = [Float](repeating: -1, count: shape.epSize * 2), scaled = [Float](repeating: -1, count: shape.nLogical)
            solver.writeRatios(&ratios)
            writeScaled(loads: loads, count: loads.count, to: &scaled)
            for rank in 0..<shape.epSize {
                for d in 0..<2 {
                    let slots = [0, 1].map { rank * shape.nLocal + $0 * 2 + d }
                    let all = slots.reduce(0) { $0 + loads[Int(placement.phy2log[$1])] }
                    let stay = slots.reduce(0) { $0 + solved.tokens[$1] }
                    // Column 0 of a 1 x 4 torus copies to itself.
                    #expect(ratios[rank * 2 + d] == (all == 0 || d == 0 ? 1 : Float(stay) / Float(all)))
                }
            }
            let most = loads.max()!
            #expect(scaled == loads.map { most == 0 ? 0 : Float($0) / Float(most) })
        }
    }
}
