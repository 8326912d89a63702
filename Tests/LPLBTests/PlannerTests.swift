// The C interface end to end on the CPU: what comes back is conserved, certified and equal to the plan.

import CLPLB
import Testing

/// Tokens that cannot leave the ranks of `witness`, divided by their number and rounded up: recomputed from the placement alone.
func bound(_ loads: [Int64], _ phy2log: [Int32], ranks: ClosedRange<Int>, nLocal: Int, witness: Set<Int>) -> Int64 {
    var hosts = [Set<Int>](repeating: [], count: loads.count)
    for (slot, expert) in phy2log.enumerated() { hosts[Int(expert)].insert(slot / nLocal) }
    let caught = loads.indices.filter { hosts[$0].isSubset(of: witness) }.reduce(0) { $0 + loads[$1] }
    return (caught + Int64(witness.count) - 1) / Int64(witness.count)
}

func witness(_ info: lplb_group_info, groupSize: Int, first: Int) -> Set<Int> {
    withUnsafeBytes(of: info.witness) { bytes in
        let words = bytes.bindMemory(to: UInt32.self)
        return Set((0..<groupSize).filter { words[$0 / 32] >> UInt32($0 % 32) & 1 == 1 }.map { first + $0 })
    }
}

@Suite struct PlannerTests {
    static let shapes: [Settings] = [
        Settings(),
        Settings(epSize: 16, nNodes: 2, nLogical: 64, nPhysical: 64 + 32, groupSize: 8, nRedundant: 2),
        Settings(nLogical: 64, nPhysical: 64 + 32, nRedundant: 2),
        Settings(nLogical: 16, nPhysical: 24, nRedundant: 1, r2o: ring8),
    ]

    @Test(arguments: shapes.indices) func runKeepsEveryTokenAndReachesTheBound(_ index: Int) throws {
        var generator = SplitMix64(UInt64(index) + 11)
        let settings = PlannerTests.shapes[index]
        let planner = try Handle(settings)
        for round in 0..<40 {
            if round == 20 {
                let history = (0..<settings.nLogical).map { _ in Double.random(in: 0...100, using: &generator) }
                #expect(lplb_planner_place(planner.raw, history, nil) == LPLB_OK)
            }
            let phy2log = planner.phy2log()
            let ids: [Int64] = skewedIds(Int.random(in: 0...3000, using: &generator), experts: Int(settings.nLogical), using: &generator)
            var out = [Int64](repeating: -9, count: ids.count)
            var counter: Int32 = 5
            #expect(
                lplb_planner_run(planner.raw, ids, 1, Int64(ids.count), nil, &out, &counter, 0, 0, nil) == LPLB_OK, "\(planner.error)")
            #expect(counter == 5 + Int32(settings.epSize / settings.groupSize))
            for (id, slot) in zip(ids, out) { #expect(id == -1 ? slot == -1 : Int64(phy2log[Int(slot)]) == id) }
            let split = planner.split()
            #expect(histogram(out, Int(settings.nPhysical)) == split)
            #expect(planner.assignment() == split)
            check(planner, loads: histogram(ids, Int(settings.nLogical)), phy2log: phy2log, split: split)
        }
    }

    private func check(_ planner: Handle, loads: [Int64], phy2log: [Int32], split: [Int64]) {
        let settings = planner.settings
        let nLocal = Int(settings.nPhysical / settings.epSize)
        let groupSize = Int(settings.groupSize)
        for (group, info) in planner.info().groups.enumerated() {
            let ranks = group * groupSize...group * groupSize + groupSize - 1
            let rankLoads = ranks.map { rank in split[rank * nLocal..<(rank + 1) * nLocal].reduce(0, +) }
            #expect(rankLoads.max() == info.max_load)
            #expect(rankLoads.reduce(0, +) == info.total)
            #expect(info.certified == 1 && info.max_load == info.bound)
            let set = witness(info, groupSize: groupSize, first: ranks.lowerBound)
            #expect(set.count == Int(info.witness_size))
            #expect(bound(loads, phy2log, ranks: ranks, nLocal: nLocal, witness: set) == info.bound)
        }
    }

    @Test func everyRankComputesItsShareOfOnePlan() throws {
        var generator = SplitMix64(99)
        let epSize = 16
        for _ in 0..<10 {
            let planners = try (0..<epSize).map {
                try Handle(Settings(epSize: 16, rank: Int64($0), nNodes: 2, nLogical: 64, nPhysical: 96, groupSize: 8))
            }
            let ids: [[Int32]] = (0..<epSize).map { _ in skewedIds(512, experts: 64, using: &generator) }
            // Every rank brings its own row; all planners are equal but for their rank, so the digests are too.
            let gathered = ids.indices.flatMap { rank in
                var row = [Int32](repeating: -9, count: Int(lplb_counts_width(64)))
                #expect(lplb_planner_count_row(planners[rank].raw, ids[rank], 0, 512, &row, nil) == LPLB_OK)
                #expect(row.dropLast().map { Int64($0) } == histogram(ids[rank], 64))
                return row
            }
            var realised = [Int64](repeating: 0, count: 96)
            for rank in 0..<epSize {
                var out = [Int32](repeating: -9, count: 512)
                let raw = planners[rank].raw
                #expect(lplb_planner_run(raw, ids[rank], 0, 512, gathered, &out, nil, 0, 0, nil) == LPLB_OK, "\(planners[rank].error)")
                let mine = histogram(out, 96)
                #expect(mine == planners[rank].assignment())
                for slot in 0..<96 { realised[slot] += mine[slot] }
                let plan = planners[rank].info().plan
                #expect(plan.own_rank + plan.own_node + plan.other_nodes == mine.reduce(0, +))
            }
            for planner in planners { #expect(planner.split() == realised) }
        }
    }

    @Test func generalPlacementWithManyReplicas() throws {
        var generator = SplitMix64(5)
        let planner = try Handle(Settings(epSize: 8, nLogical: 20, nPhysical: 32, groupSize: 0, r2o: nil))
        for _ in 0..<30 {
            var phy2log = (0..<32).map { $0 < 20 ? Int32($0) : Int32.random(in: 0..<4, using: &generator) }
            phy2log.shuffle(using: &generator)
            #expect(lplb_planner_set_placement(planner.raw, phy2log, 32, nil) == LPLB_OK, "\(planner.error)")
            var none = [Int64](repeating: 0, count: 32)
            #expect(lplb_planner_split(planner.raw, &none, 32, nil) == LPLB_ERROR_WRONG_ORDER)
            let ids: [Int64] = skewedIds(2000, experts: 20, using: &generator)
            var out = ids
            let status = out.withUnsafeMutableBufferPointer { both in
                lplb_planner_run(planner.raw, both.baseAddress, 1, 2000, nil, both.baseAddress, nil, 0, 0, nil)
            }
            #expect(status == LPLB_OK)
            for (id, slot) in zip(ids, out) { #expect(id == -1 ? slot == -1 : Int64(phy2log[Int(slot)]) == id) }
            let info = planner.info().groups[0]
            #expect(info.certified == 1)
            let set = witness(info, groupSize: 8, first: 0)
            #expect(bound(histogram(ids, 20), phy2log, ranks: 0...7, nLocal: 4, witness: set) == info.bound)
        }
    }

    @Test func withoutReplicasOnlyTheIdsAreRewritten() throws {
        let planner = try Handle(Settings(nPhysical: 64, nRedundant: 0, r2o: []))
        let history = (0..<64).map { Double(64 - $0) }
        #expect(lplb_planner_place(planner.raw, history, nil) == LPLB_OK, "\(planner.error)")
        let phy2log = planner.phy2log()
        let ids = (0..<64).map { Int32($0) } + [-1]
        var out = [Int32](repeating: -9, count: 65)
        #expect(lplb_planner_run(planner.raw, ids, 0, 65, nil, &out, nil, 0, 0, nil) == LPLB_OK)
        for id in 0..<64 { #expect(phy2log[Int(out[id])] == Int32(id)) }
        #expect(out[64] == -1)
        var plan = lplb_plan_info()
        plan.struct_size = Int64(MemoryLayout<lplb_plan_info>.size)
        #expect(lplb_planner_info(planner.raw, &plan, nil, 0, nil) == LPLB_ERROR_WRONG_ORDER)
    }

    @Test func idsOutOfRangeAreCountedAndNeverUsed() throws {
        let planner = try Handle(Settings())
        let ids: [Int64] = [0, 64, -2, Int64.max, Int64.min, 63, -1]
        var out = [Int64](repeating: -9, count: 7)
        #expect(lplb_planner_run(planner.raw, ids, 1, 7, nil, &out, nil, 0, 0, nil) == LPLB_OK)
        #expect(out[0] >= 0 && out[5] >= 0)
        #expect(Array(out[1...4]) == [-1, -1, -1, -1] && out[6] == -1)
        #expect(planner.info().plan.invalid_ids == 4)
    }
}
