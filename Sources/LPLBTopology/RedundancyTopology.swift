// RedundancyTopology: which rank of a group copies from which. The table is called r2o (redundant to original).

/// Redundant slot d of rank q of a group holds a copy from rank `r2o[q][d]` of the same group. Every column d is a permutation of the
/// ranks, so each rank gives and takes exactly one copy a column. A self copy (`r2o[q][d] == q`) is accepted; it moves nothing.
public struct RedundancyTopology: Sendable, Equatable {
    /// Ranks of a group, 1 ... `Limits.maxRanks`.
    public let groupSize: Int
    /// Columns, 0 ... `Limits.maxLogical`. With 0 there are no copies.
    public let nRedundant: Int
    /// Row-major [groupSize][nRedundant]: the rank that a redundant slot copies from.
    public let r2o: [Int32]
    /// Row-major [groupSize][nRedundant], the inverse: `o2r[r2o[q][d]][d] == q`, the rank that holds the copy.
    public let o2r: [Int32]

    /// Checks a table. O(groupSize * nRedundant).
    public init(r2o: [Int32], groupSize: Int, nRedundant: Int) throws(RuleViolation) {
        let size = try Self.elementCount(groupSize: groupSize, nRedundant: nRedundant)
        if r2o.count != size {
            throw RuleViolation("r2o", "must have group_size * n_redundant = \(size) entries", value: r2o.count)
        }
        var inverse = [Int32](repeating: -1, count: size)
        for rank in 0..<groupSize {
            for column in 0..<nRedundant {
                let original = Int(r2o[rank * nRedundant + column])
                if original < 0 || original >= groupSize {
                    throw RuleViolation("r2o[\(rank)][\(column)]", "must be a rank of the group, 0 .. \(groupSize - 1)", value: original)
                }
                let place = original * nRedundant + column
                if inverse[place] >= 0 {
                    throw RuleViolation(
                        "r2o[\(rank)][\(column)]", "every column must be a permutation of 0 .. \(groupSize - 1)",
                        value: "\(original), which row \(inverse[place]) has too")
                }
                inverse[place] = Int32(truncatingIfNeeded: rank)
            }
        }
        self.init(unchecked: r2o, inverse: inverse, groupSize: groupSize, nRedundant: nRedundant)
    }

    /// The number of entries of a table of these sizes, for callers that hold a bare pointer. Any integers may be given.
    public static func elementCount(groupSize: Int, nRedundant: Int) throws(RuleViolation) -> Int {
        try check("group_size", groupSize, atLeast: 1, atMost: Limits.maxRanks)
        try check("n_redundant", nRedundant, atLeast: 0, atMost: Limits.maxLogical)
        return groupSize * nRedundant
    }

    private init(unchecked r2o: [Int32], inverse: [Int32], groupSize: Int, nRedundant: Int) {
        self.groupSize = groupSize
        self.nRedundant = nRedundant
        self.r2o = r2o
        self.o2r = inverse
    }

    /// A table from its columns, which the callers below know to be permutations.
    private init(columns: [[Int32]], groupSize: Int) {
        var table = [Int32](repeating: 0, count: groupSize * columns.count)
        var inverse = table
        for (d, column) in columns.enumerated() {
            for (rank, original) in column.enumerated() {
                table[rank * columns.count + d] = original
                inverse[Int(original) * columns.count + d] = Int32(truncatingIfNeeded: rank)
            }
        }
        self.init(unchecked: table, inverse: inverse, groupSize: groupSize, nRedundant: columns.count)
    }

    /// Each of 8 ranks copies from the next one.
    public static let ring8 = RedundancyTopology(columns: [[1, 2, 3, 4, 5, 6, 7, 0]], groupSize: 8)

    /// 4 ranks, the next and the opposite one.
    public static let square4x2 = RedundancyTopology(columns: [[1, 2, 3, 0], [2, 3, 0, 1]], groupSize: 4)

    /// 8 ranks as two rings of 4 with links between them; suits the 8 GPUs of a host.
    public static let cube8x2 = RedundancyTopology(columns: [[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]], groupSize: 8)

    /// 16 ranks as four rings of 4 in a ring.
    public static let hypercube16x2 = RedundancyTopology(
        columns: [
            [3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14],
            [12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        ], groupSize: 16)

    /// m x n ranks: rank (i, j) = i * n + j copies from (i + 1 mod m, j) and from (i, j + 1 mod n). A side of length 1 gives self copies.
    public static func torus(_ m: Int, _ n: Int) throws(RuleViolation) -> RedundancyTopology {
        try check("m", m, atLeast: 1, atMost: Limits.maxRanks)
        try check("n", n, atLeast: 1, atMost: Limits.maxRanks)
        if m * n > Limits.maxRanks { throw RuleViolation(.unsupported, "m * n", "must be at most \(Limits.maxRanks)", value: m * n) }
        let ranks = 0..<(m * n)
        let down = ranks.map { Int32(truncatingIfNeeded: ($0 / n + 1) % m * n + $0 % n) }
        let right = ranks.map { Int32(truncatingIfNeeded: $0 / n * n + ($0 + 1) % n) }
        return RedundancyTopology(columns: [down, right], groupSize: m * n)
    }
}
