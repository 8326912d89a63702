// RedundancyTopology: what is accepted and what is refused.

import LPLBTopology
import Testing

private func violation(_ r2o: [Int32], _ groupSize: Int, _ nRedundant: Int) -> RuleViolation? {
    do { _ = try RedundancyTopology(r2o: r2o, groupSize: groupSize, nRedundant: nRedundant) } catch { return error }
    return nil
}

@Test func randomTables() throws {
    var random = Random(seed: 7)
    for _ in 0..<300 {
        let ranks = 1 + random.below(40), columns = random.below(6)
        let permutations = (0..<columns).map { _ in random.permutation(ranks) }
        let table = (0..<ranks).flatMap { rank in permutations.map { $0[rank] } }
        let t = try RedundancyTopology(r2o: table, groupSize: ranks, nRedundant: columns)
        #expect(t.r2o == table && t.groupSize == ranks && t.nRedundant == columns)
        // Any single entry changed is no permutation any more.
        if ranks > 1 && columns > 0 {
            var broken = table
            broken[random.below(table.count)] = Int32(random.below(ranks))
            #expect((violation(broken, ranks, columns) == nil) == (broken == table))
        }
    }
}

@Test func refusedTables() {
    #expect(violation([1, 0, 0], 2, 1)?.message == "r2o: must have group_size * n_redundant = 2 entries, got 3")
    #expect(violation([1, 2], 2, 1)?.message == "r2o[1][0]: must be a rank of the group, 0 .. 1, got 2")
    #expect(violation([-1, 0], 2, 1)?.message == "r2o[0][0]: must be a rank of the group, 0 .. 1, got -1")
    #expect(violation([0, 1, 1, 1], 2, 2)?.message == "r2o[1][1]: every column must be a permutation of 0 .. 1, got 1, which row 0 has too")
    #expect(violation([.max, .min], 2, 1)?.kind == .invalidArgument)
    #expect(violation([], 0, 1)?.kind == .invalidArgument)
    #expect(violation([], 1025, 1)?.kind == .unsupported)
    #expect(violation([], .min, .min)?.kind == .invalidArgument)
    #expect(violation([], .max, .max)?.kind == .unsupported)
    #expect(violation([], 8, -1)?.kind == .invalidArgument)
    #expect(violation([], 8, 4097)?.kind == .unsupported)
    #expect(violation([], 8, 0) == nil)
    #expect(violation([0, 1], 2, 1) == nil)  // self copies
}
