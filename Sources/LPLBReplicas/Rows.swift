// Rows: in which row of a rank's buffers each of its experts lies while replicas train.

import LPLBPlacement
import LPLBTopology

/// Which expert lies in which row on every rank. A rank's rows begin with `own[rank]` rows for the experts whose home it is; the rest is
/// for its copies of others' experts. Every rank has as many rows: those of its slots, and twice the slack. The number of own rows stays
/// when the placement changes, since parameters were made of them.
public struct Rows: Sendable {
    public let nRanks: Int
    public let nRows: Int
    public let nLogical: Int
    /// [nRanks]: rows for own experts.
    public let own: [Int32]
    /// [nRanks][nRows]: the expert in each row, -1 for a row that is not in use.
    public let experts: [Int32]
    /// [nLogical]: the row of each expert's home, counted over all ranks: rank * nRows + row.
    public let home: [Int]

    /// The rows for a placement, and the slot of each expert's home. Homes are those of `homes(of:former:)`.
    /// - Parameter slack: by how many a rank's number of own experts may change in a later placement.
    /// - Parameter before: the rows until now: an expert that stays own, or stays a copy, keeps its row there. nil: the first ones.
    public static func settled(
        _ placement: Placement, slack: Int, before: Rows?
    ) throws(RuleViolation) -> (rows: Rows, homes: [Int32]) {
        let shape = placement.shape, nLocal = shape.nLocal, nRows = nLocal + 2 * slack
        if let before, (before.nRanks, before.nRows, before.nLogical) != (shape.epSize, nRows, shape.nLogical) {
            throw RuleViolation(
                "former", "must be rows of \(shape.epSize) ranks, \(nRows) each", value: "those of \(before.nRanks), \(before.nRows)")
        }
        let former = before.map { before in before.home.map { Int32($0 / nRows * nLocal) } }  // some slot of the rank of each home
        let homes = try homes(of: placement, former: former)
        var own = before?.own ?? [Int32](repeating: Int32(slack), count: shape.epSize)
        if before == nil { for home in homes { own[Int(home) / nLocal] += 1 } }

        var experts: [Int32] = []
        for rank in 0..<shape.epSize {
            var mine: [Int32] = [], copies: [Int32] = [], seen = Set<Int32>()
            for expert in placement.phy2log[rank * nLocal..<(rank + 1) * nLocal] where expert >= 0 && seen.insert(expert).inserted {
                if Int(homes[Int(expert)]) / nLocal == rank { mine.append(expert) } else { copies.append(expert) }
            }
            let first = Int(own[rank])
            if mine.count > first || copies.count > nRows - first {
                throw RuleViolation(
                    "placement",
                    "must leave rank \(rank) with at most \(first) own experts and \(nRows - first) copies, since its parameters were made "
                        + "for them (slack=\(slack))", value: "\(mine.count) own experts and \(copies.count) copies")
            }
            let old = before.map { Array($0.experts[rank * nRows..<(rank + 1) * nRows]) } ?? [Int32](repeating: -1, count: nRows)
            experts += keeping(old[..<first], mine) + keeping(old[first...], copies)
        }
        return (try Rows("rows", nRanks: shape.epSize, nRows: nRows, nLogical: shape.nLogical, own: own, experts: experts), homes)
    }

    /// Experts that have a row keep it; the others take the free rows in their order.
    private static func keeping(_ old: ArraySlice<Int32>, _ experts: [Int32]) -> [Int32] {
        let wanted = Set(experts), known = Set(old)
        var new = experts.lazy.filter { !known.contains($0) }.makeIterator()
        return old.map { wanted.contains($0) ? $0 : new.next() ?? -1 }
    }

    /// Rows that somebody else keeps: every expert in one own row, and at most once on a rank.
    public init(_ argument: String, nRanks: Int, nRows: Int, nLogical: Int, own: [Int32], experts: [Int32]) throws(RuleViolation) {
        var home = [Int](repeating: -1, count: nLogical)
        for rank in 0..<nRanks {
            if own[rank] < 0 || own[rank] > nRows {
                throw RuleViolation("\(argument)[\(rank)][0]", "must be a number of own rows, 0 .. \(nRows)", value: own[rank])
            }
            var held = Set<Int32>()
            for row in 0..<nRows {
                let expert = experts[rank * nRows + row]
                if expert < -1 || expert >= nLogical || (expert >= 0 && !held.insert(expert).inserted) {
                    throw RuleViolation(
                        "\(argument)[\(rank)][\(row + 1)]", "must be an expert, 0 .. \(nLogical - 1), once on a rank, or -1", value: expert)
                }
                if expert >= 0 && row < own[rank] {
                    if home[Int(expert)] >= 0 {
                        throw RuleViolation(argument, "must hold every expert in one own row", value: "two for expert \(expert)")
                    }
                    home[Int(expert)] = rank * nRows + row
                }
            }
        }
        if let expert = home.firstIndex(of: -1) {
            throw RuleViolation(argument, "must hold every expert in one own row", value: "none for expert \(expert)")
        }
        (self.nRanks, self.nRows, self.nLogical, self.own, self.experts, self.home) = (nRanks, nRows, nLogical, own, experts, home)
    }

    /// Calls `body` for every copy: its rank, its row and its expert; by rank, then by row.
    func eachCopy(_ body: (Int, Int, Int) -> Void) {
        for rank in 0..<nRanks {
            for row in Int(own[rank])..<nRows where experts[rank * nRows + row] >= 0 { body(rank, row, Int(experts[rank * nRows + row])) }
        }
    }
}
