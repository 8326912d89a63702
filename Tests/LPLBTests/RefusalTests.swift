// Bad input gets a status and words that name the argument, the rule and the value; nothing changes.

import CLPLB
import Testing

@Suite struct RefusalTests {
    /// What is wrong, and a word its message must hold.
    static let settings: [(Settings, String)] = [
        (Settings(structSize: 9), "struct_size"),
        (Settings(epSize: 0), "ep_size"),
        (Settings(epSize: -8), "ep_size"),
        (Settings(epSize: .max), "ep_size"),
        (Settings(rank: 8), "rank"),
        (Settings(rank: -2), "rank"),
        (Settings(nNodes: 3), "n_nodes"),
        (Settings(nLogical: 0), "n_logical"),
        (Settings(nLogical: 63), "n_logical"),
        (Settings(nPhysical: 81), "n_physical"),
        (Settings(nPhysical: .min), "n_physical"),
        (Settings(groupSize: 3), "group_size"),
        (Settings(nRedundant: 1 << 40), "n_redundant"),
        (Settings(nRedundant: -1), "n_redundant"),
        (Settings(r2o: [Int32](repeating: 0, count: 16)), "r2o"),
        (Settings(r2o: [Int32](repeating: 9, count: 16)), "r2o"),
        (Settings(device: -2), "device"),
        (Settings(solver: 2), "solver"),
        (Settings(solver: 1), "solver"),
    ]

    @Test(arguments: settings.indices) func createNamesTheArgument(_ index: Int) {
        let (settings, word) = RefusalTests.settings[index]
        var handle: OpaquePointer?
        let (status, words) = create(settings, &handle)
        #expect(status != LPLB_OK && handle == nil)
        #expect(words.contains(word) && words.contains("got"), "\(words)")
    }

    @Test func nullAndWrongPointers() throws {
        let planner = try Handle(Settings())
        var out = [Int64](repeating: 7, count: 4)
        let ids: [Int64] = [1, 2, 3, 4]
        #expect(lplb_planner_create(nil, nil, nil, 0) == LPLB_ERROR_INVALID_ARGUMENT)
        #expect(lplb_planner_run(nil, ids, 1, 4, nil, &out, nil, 0, 0, nil) == LPLB_ERROR_INVALID_ARGUMENT)
        #expect(String(cString: lplb_planner_error(nil)).contains("NULL"))
        #expect(lplb_planner_run(planner.raw, nil, 1, 4, nil, &out, nil, 0, 0, nil) == LPLB_ERROR_INVALID_ARGUMENT)
        #expect(planner.error.contains("ids"))
        #expect(lplb_planner_run(planner.raw, ids, 1, 4, nil, nil, nil, 0, 0, nil) == LPLB_ERROR_INVALID_ARGUMENT)
        #expect(planner.error.contains("out"))
        #expect(lplb_planner_run(planner.raw, ids, 2, 4, nil, &out, nil, 0, 0, nil) == LPLB_ERROR_INVALID_ARGUMENT)
        #expect(planner.error.contains("ids_dtype") && planner.error.contains("got 2"))
        #expect(lplb_planner_run(planner.raw, ids, 1, -1, nil, &out, nil, 0, 0, nil) == LPLB_ERROR_INVALID_ARGUMENT)
        #expect(planner.error.contains("n_ids") && planner.error.contains("got -1"))
        let gathered = [Int32](repeating: 0, count: 8 * 65)
        #expect(lplb_planner_run(planner.raw, ids, 1, 4, gathered, &out, nil, 0, 0, nil) == LPLB_ERROR_INVALID_ARGUMENT)
        #expect(planner.error.contains("gathered"))
        #expect(out == [7, 7, 7, 7])
        lplb_planner_destroy(nil)
    }

    @Test func solveRefusesBadCountsAndKeepsThePlan() throws {
        let planner = try Handle(Settings())
        var counts = [Int64](repeating: 10, count: 64)
        #expect(lplb_planner_redirect(planner.raw, [Int64(0)], 1, 1, &counts, 0, nil) == LPLB_ERROR_WRONG_ORDER)
        #expect(lplb_planner_solve(planner.raw, counts, 1, 1, nil, nil, nil, 0, nil) == LPLB_OK)
        let before = planner.split()
        for bad: Int64 in [-1, (1 << 40) + 1, .max, .min] {
            counts[17] = bad
            var counter: Int64 = 3
            #expect(lplb_planner_solve(planner.raw, counts, 1, 1, nil, nil, &counter, 1, nil) == LPLB_ERROR_INVALID_ARGUMENT)
            #expect(planner.error.contains("counts") && planner.error.contains("\(bad)"), "\(planner.error)")
            #expect(counter == 3 && planner.split() == before)
        }
        #expect(lplb_planner_solve(planner.raw, counts, 1, 3, nil, nil, nil, 0, nil) == LPLB_ERROR_INVALID_ARGUMENT)
        #expect(planner.error.contains("n_sources") && planner.error.contains("got 3"))
        let history = [Double](repeating: .nan, count: 64)
        let phy2log = planner.phy2log()
        #expect(lplb_planner_place(planner.raw, history, nil) == LPLB_ERROR_INVALID_ARGUMENT)
        #expect(planner.error.contains("history"))
        #expect(planner.phy2log() == phy2log && planner.split() == before)
    }

    @Test func placementsThatBreakARuleLeaveTheOldOne() throws {
        let planner = try Handle(Settings(nLogical: 16, nPhysical: 16, r2o: nil))
        let good = planner.phy2log()
        var phy2log = good
        phy2log[3] = 16
        #expect(lplb_planner_set_placement(planner.raw, phy2log, 16, nil) == LPLB_ERROR_INVALID_ARGUMENT)
        #expect(planner.error.contains("phy2log") && planner.error.contains("16"), "\(planner.error)")
        phy2log[3] = 4
        #expect(lplb_planner_set_placement(planner.raw, phy2log, 16, nil) == LPLB_ERROR_INVALID_ARGUMENT)
        #expect(lplb_planner_set_placement(planner.raw, phy2log, 15, nil) == LPLB_ERROR_INVALID_ARGUMENT)
        #expect(lplb_planner_place(planner.raw, nil, nil) == LPLB_ERROR_WRONG_ORDER)
        #expect(planner.phy2log() == good)
    }

    @Test func aPlannerInUseIsRefusedNotCorrupted() async throws {
        let planner = try Handle(Settings())
        let raw = UInt(bitPattern: UnsafeRawPointer(planner.raw))
        let phy2log = planner.phy2log()
        // Every call either fails as busy and writes nothing, or answers as if it were alone.
        let wrong = await withTaskGroup(of: Int.self) { group in
            for seed in 0..<4 {
                group.addTask {
                    var generator = SplitMix64(UInt64(seed))
                    let ids: [Int64] = skewedIds(4000, experts: 64, using: &generator)
                    var wrong = 0, alone: [Int64]?
                    for _ in 0..<200 {
                        var out = [Int64](repeating: -9, count: 4000)
                        let status = Int(lplb_planner_run(OpaquePointer(bitPattern: raw), ids, 1, 4000, nil, &out, nil, 0, 0, nil))
                        if status == LPLB_ERROR_BUSY {
                            wrong += out.allSatisfy { $0 == -9 } ? 0 : 1
                        } else {
                            wrong += status == LPLB_OK && (alone == nil || alone == out) ? 0 : 1
                            alone = out
                            wrong += zip(ids, out).allSatisfy { $0 == -1 ? $1 == -1 : Int64(phy2log[Int($1)]) == $0 } ? 0 : 1
                        }
                    }
                    return wrong
                }
            }
            return await group.reduce(0, +)
        }
        #expect(wrong == 0)
        #expect(planner.info().groups[0].certified == 1)
    }

    @Test func oneOffSolveAndRebalanceSayWhatIsWrong() {
        var message = [CChar](repeating: 0, count: 256)
        func words() -> String { message.withUnsafeBufferPointer { String(cString: $0.baseAddress!) } }
        var tokens = [Int64](repeating: 0, count: 4)
        #expect(lplb_solve([1, -5], 2, [0, 1, 0, 1], 4, 2, &tokens, nil, &message, 256) == LPLB_ERROR_INVALID_ARGUMENT)
        #expect(words().contains("loads") && words().contains("-5"), "\(words())")
        #expect(lplb_solve([1, 5], 2, [0, 1, 0, 2], 4, 2, &tokens, nil, &message, 256) == LPLB_ERROR_INVALID_ARGUMENT)
        #expect(words().contains("phy2log"), "\(words())")
        #expect(lplb_solve([7, 5], 2, [0, 1, 0, 1], 4, 2, &tokens, nil, &message, 256) == LPLB_OK)
        #expect(tokens.reduce(0, +) == 12 && tokens[0] + tokens[1] == 6)
        #expect(lplb_eplb_rebalance([1, 2, 3, 4], 1, 4, 5, 1, 1, 2, nil, nil, nil, &message, 256) == LPLB_ERROR_INVALID_ARGUMENT)
        #expect(words().contains("n_physical"), "\(words())")
        #expect(lplb_eplb_rebalance([1, 2, .nan, 4], 1, 4, 6, 1, 1, 2, nil, nil, nil, &message, 256) == LPLB_ERROR_INVALID_ARGUMENT)
        #expect(words().contains("weight"), "\(words())")
        var homes = [Int32](repeating: -1, count: 2)
        #expect(lplb_placement_homes([0, 1, 0, 2], 4, 2, 2, nil, &homes, &message, 256) == LPLB_ERROR_INVALID_ARGUMENT)
        #expect(words().contains("phy2log[3]"), "\(words())")
        #expect(lplb_placement_homes([0, 1, 1, 0], 4, 2, 2, [0, 4], &homes, &message, 256) == LPLB_ERROR_INVALID_ARGUMENT)
        #expect(words().contains("former[1]") && homes == [-1, -1], "\(words())")
        #expect(lplb_placement_homes([0, 1, 1, 0], 4, 2, 2, nil, &homes, &message, 256) == LPLB_OK)
        #expect(homes == [0, 2])
    }
}
