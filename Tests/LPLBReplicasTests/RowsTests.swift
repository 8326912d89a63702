// Rows and moves of random placements that follow one another, against plain definitions.

import LPLBTopology
import Testing

@testable import LPLBReplicas

/// SplitMix64.
private struct Random: RandomNumberGenerator {
    var state: UInt64
    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }
}

@Suite struct RowsTests {
    /// Every expert once, and copies of some; a hot expert may stand on every rank.
    private static func placement(_ ranks: Int, _ local: Int, _ experts: Int, _ random: inout Random) throws -> Placement {
        let shape = try ExpertShape(epSize: ranks, nNodes: 1, groupSize: 0, nLogical: experts, nPhysical: ranks * local)
        let hot = Int.random(in: 1...experts, using: &random)
        var slots = (0..<ranks * local).map { $0 < experts ? Int32($0) : Int32.random(in: 0..<Int32(hot), using: &random) }
        slots.shuffle(using: &random)
        return try Placement(shape: shape, phy2log: slots)
    }

    /// Calls body for placements that follow one another, with the rows before and after.
    private static func each(_ body: (Placement, Rows?, Rows, [Int32]) throws -> Void) throws {
        var random = Random(state: 11), refused = 0, followed = 0
        for _ in 0..<300 {
            let ranks = Int.random(in: 1...9, using: &random), local = Int.random(in: 1...6, using: &random)
            let experts = Int.random(in: 1...ranks * local, using: &random), slack = Int.random(in: 0...3, using: &random)
            var before: Rows?
            for _ in 0..<4 {
                let placement = try placement(ranks, local, experts, &random)
                do throws(RuleViolation) {
                    let (rows, homes) = try Rows.settled(placement, slack: slack, before: before)
                    do { try body(placement, before, rows, homes) } catch { Issue.record(error) }
                    followed += before == nil ? 0 : 1
                    before = rows
                } catch {
                    #expect(before != nil && error.message.hasPrefix("placement: must leave rank "), "\(error.message)")
                    refused += 1
                }
            }
        }
        #expect(followed > 200 && refused > 50)
    }

    @Test func everyExpertOfARankHasOneRowThere() throws {
        try Self.each { placement, before, rows, homes in
            let local = placement.shape.nLocal
            for rank in 0..<rows.nRanks {
                let held = rows.experts[rank * rows.nRows..<(rank + 1) * rows.nRows].filter { $0 >= 0 }
                #expect(held.sorted() == Set(placement.phy2log[rank * local..<(rank + 1) * local]).sorted())
            }
            for expert in 0..<rows.nLogical {
                #expect(rows.home[expert] / rows.nRows == Int(homes[expert]) / local)
                #expect(rows.home[expert] % rows.nRows < Int(rows.own[rows.home[expert] / rows.nRows]))
            }
            guard let before else { return }
            #expect(rows.own == before.own)
            for (index, old) in before.experts.enumerated() where old >= 0 && rows.experts[index] != old {
                // Whoever left its row is no longer there as what it was.
                let rank = index / rows.nRows, own = Int(rows.own[rank])
                let part = index % rows.nRows < own ? 0..<own : own..<rows.nRows
                #expect(!rows.experts[(rank * rows.nRows + part.lowerBound)..<(rank * rows.nRows + part.upperBound)].contains(old))
            }
        }
    }

    /// The most moves that one rank sends, or gets.
    private func degree(_ moves: [Move]) -> Int {
        let ends = [moves.map(\.source.rank), moves.map(\.target.rank)]
        return ends.map { Dictionary(grouping: $0) { $0 }.values.map(\.count).max() ?? 0 }.max() ?? 0
    }

    private func expectRounds(_ moves: [Move], atMost most: Int) {
        for round in Dictionary(grouping: moves, by: \.round).values {
            #expect(Set(round.map(\.source.rank)).count == round.count && Set(round.map(\.target.rank)).count == round.count)
        }
        #expect((moves.map(\.round).max() ?? -1) < most)
        #expect(moves.map(\.round) == moves.map(\.round).sorted())
    }

    /// Every place with a copy, and its expert.
    private func copies(_ rows: Rows) -> [Int: Int32] {
        var found: [Int: Int32] = [:]
        for (index, expert) in rows.experts.enumerated() where expert >= 0 && index % rows.nRows >= Int(rows.own[index / rows.nRows]) {
            found[index] = expert
        }
        return found
    }

    private func index(_ place: Move.Place, _ rows: Rows) -> Int { place.rank * rows.nRows + place.row }

    @Test func everyCopyIsPulledOnceInTheFewestRounds() throws {
        try Self.each { _, before, rows, _ in
            for known in before == nil ? [nil] : [nil, before] {
                let moves = rows.pulls(except: known), old = known.map(copies) ?? [:]
                #expect(moves.map { index($0.target, rows) }.sorted() == copies(rows).filter { old[$0.key] != $0.value }.keys.sorted())
                for move in moves { #expect(index(move.source, rows) == rows.home[Int(rows.experts[index(move.target, rows)])]) }
                expectRounds(moves, atMost: degree(moves))
            }
        }
    }

    @Test func everyCopyIsPushedOnceAndLowerRanksFirst() throws {
        try Self.each { _, _, rows, _ in
            let moves = rows.pushes()
            #expect(moves.map { index($0.source, rows) }.sorted() == copies(rows).keys.sorted())
            for move in moves { #expect(index(move.target, rows) == rows.home[Int(rows.experts[index(move.source, rows)])]) }
            for sums in Dictionary(grouping: moves, by: { index($0.target, rows) }).values {
                #expect(sums.map(\.source.rank) == sums.map(\.source.rank).sorted())
            }
            expectRounds(moves, atMost: max(0, 2 * degree(moves) - 1))
        }
    }

    @Test func homesMoveFromWhereTheyWere() throws {
        try Self.each { _, before, rows, _ in
            guard let before else { return }
            let moves = rows.homeMoves(from: before)
            let wanted = (0..<rows.nLogical).filter { before.home[$0] / rows.nRows != rows.home[$0] / rows.nRows }
            #expect(moves.map { Int(rows.experts[index($0.target, rows)]) }.sorted() == wanted)
            for move in moves { #expect(before.experts[index(move.source, rows)] == rows.experts[index(move.target, rows)]) }
            expectRounds(moves, atMost: degree(moves))
        }
    }

    @Test(arguments: [
        ([2, 1], [0, 1, -1, 2, 0, -1], "rows: must hold every expert in one own row, got none for expert 3"),
        ([2, 1], [0, 1, 3, 0, 2, 3], "rows: must hold every expert in one own row, got two for expert 0"),
        ([2, 1], [0, 1, 1, 2, 3, -1], "rows[0][3]: must be an expert, 0 .. 3, once on a rank, or -1, got 1"),
        ([2, 1], [0, 1, 4, 2, 3, -1], "rows[0][3]: must be an expert, 0 .. 3, once on a rank, or -1, got 4"),
        ([4, 1], [0, 1, 2, 3, -1, -1], "rows[0][0]: must be a number of own rows, 0 .. 3, got 4"),
    ] as [([Int32], [Int32], String)]) func rowsThatCannotBeAreRefused(own: [Int32], experts: [Int32], words: String) throws {
        do throws(RuleViolation) {
            _ = try Rows("rows", nRanks: 2, nRows: 3, nLogical: 4, own: own, experts: experts)
            Issue.record("it was accepted")
        } catch {
            #expect(error.message == words)
        }
    }
}
