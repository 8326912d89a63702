// RedundancyTopology: which rank of a group copies from which. The table is called r2o (redundant to original).

/// Redundant slot d of rank q of a group holds a copy from rank `r2o[q][d]` of the same group. Every column d is a permutation of the
/// ranks, so each rank gives and takes exactly one copy a column. A self copy (`r2o[q][d] == q`) is accepted; it moves nothing.
public struct RedundancyTopology: Sendable, Equatable {
    /// Ranks of a group, 1 ... `Limits.maxRanks`.
    public let groupSize: Int
    /// Columns: 0 or more, as long as the copies of a group are at most `Limits.maxPhysical`. With 0 there are no copies.
    public let nRedundant: Int
    /// Row-major [groupSize][nRedundant]: the rank that a redundant slot copies from.
    public let r2o: [Int32]

    /// Checks a table. O(groupSize * nRedundant). Any integers may be given.
    public init(r2o: [Int32], groupSize: Int, nRedundant: Int) throws(RuleViolation) {
        let size = try Self.size(groupSize: groupSize, nRedundant: nRedundant)
        if r2o.count != size {
            throw RuleViolation("r2o", "must have group_size * n_redundant = \(size) entries", value: r2o.count)
        }
        var holder = [Int32](repeating: -1, count: size)  // [original rank][column]: the rank that copies from it
        for rank in 0..<groupSize {
            for column in 0..<nRedundant {
                let original = Int(r2o[rank * nRedundant + column])
                if original < 0 || original >= groupSize {
                    throw RuleViolation("r2o[\(rank)][\(column)]", "must be a rank of the group, 0 .. \(groupSize - 1)", value: original)
                }
                let index = original * nRedundant + column
                if holder[index] >= 0 {
                    throw RuleViolation(
                        "r2o[\(rank)][\(column)]", "every column must be a permutation of 0 .. \(groupSize - 1)",
                        value: "\(original), which row \(holder[index]) has too")
                }
                holder[index] = Int32(truncatingIfNeeded: rank)
            }
        }
        self.groupSize = groupSize
        self.nRedundant = nRedundant
        self.r2o = r2o
    }

    /// The entries of a table, for callers that hold a bare pointer. Any integers may be given.
    public static func size(groupSize: Int, nRedundant: Int) throws(RuleViolation) -> Int {
        try check("group_size", groupSize, atLeast: 1, atMost: Limits.maxRanks)
        try check("n_redundant", nRedundant, atLeast: 0, atMost: Limits.maxPhysical / groupSize)
        return groupSize * nRedundant
    }
}
