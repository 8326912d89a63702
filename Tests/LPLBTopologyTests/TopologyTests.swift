// RedundancyTopology: the named tables against their geometry, the inverse, and what is refused.

import LPLBTopology
import Testing

private func violation(_ r2o: [Int32], _ groupSize: Int, _ nRedundant: Int) -> RuleViolation? {
    do { _ = try RedundancyTopology(r2o: r2o, groupSize: groupSize, nRedundant: nRedundant) } catch { return error }
    return nil
}

/// Rank of (plane, position on a ring of 4) in the cube and the hypercube.
private func ringOfFour(_ plane: Int, _ position: Int) -> Int { plane * 4 + (position % 4 + 4) % 4 }

@Test func namedTables() throws {
    #expect(RedundancyTopology.ring8.r2o == (0..<8).map { Int32(($0 + 1) % 8) })

    let square = RedundancyTopology.square4x2
    for rank in 0..<4 { #expect([square.r2o[2 * rank], square.r2o[2 * rank + 1]] == [Int32((rank + 1) % 4), Int32((rank + 2) % 4)]) }

    let cube = RedundancyTopology.cube8x2
    #expect(cube.r2o == [3, 6, 0, 7, 1, 4, 2, 5, 7, 0, 4, 1, 5, 2, 6, 3])

    let hyper = RedundancyTopology.hypercube16x2
    #expect(hyper.groupSize == 16 && hyper.nRedundant == 2)
    for plane in 0..<4 {
        for position in 0..<4 {
            let rank = ringOfFour(plane, position)
            #expect(Int(hyper.r2o[2 * rank]) == ringOfFour(plane, position - 1))
            #expect(Int(hyper.r2o[2 * rank + 1]) == ringOfFour((plane + 3) % 4, position))
        }
    }
}

@Test(arguments: [(8, 4), (4, 8), (3, 5), (1, 6), (6, 1), (1, 1), (32, 32), (2, 2)])
func torus(m: Int, n: Int) throws {
    let t = try RedundancyTopology.torus(m, n)
    #expect(t.groupSize == m * n && t.nRedundant == 2)
    for i in 0..<m {
        for j in 0..<n {
            #expect(Int(t.r2o[2 * (i * n + j)]) == (i + 1) % m * n + j)
            #expect(Int(t.r2o[2 * (i * n + j) + 1]) == i * n + (j + 1) % n)
        }
    }
    #expect(try RedundancyTopology(r2o: t.r2o, groupSize: m * n, nRedundant: 2) == t)
}

@Test func torusBeyondTheLimits() {
    for (m, n) in [(0, 4), (4, -1), (33, 32), (.max, .max), (.min, 2), (1024, 1024)] {
        #expect(throws: RuleViolation.self) { try RedundancyTopology.torus(m, n) }
    }
}

@Test func inverseOfRandomTables() throws {
    var random = Random(seed: 7)
    for _ in 0..<300 {
        let ranks = 1 + random.below(40), columns = random.below(6)
        let permutations = (0..<columns).map { _ in random.permutation(ranks) }
        let table = (0..<ranks).flatMap { rank in permutations.map { $0[rank] } }
        let t = try RedundancyTopology(r2o: table, groupSize: ranks, nRedundant: columns)
        for rank in 0..<ranks {
            for d in 0..<columns { #expect(t.o2r[Int(t.r2o[rank * columns + d]) * columns + d] == Int32(rank)) }
        }
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
