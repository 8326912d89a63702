// Capacity: what each rank of a group may hold at the level T that the solver tries to keep. Nothing else knows what a level means.

/// The level T of a group while it is solved. The solvers compare the tokens of a rank with `cap`, and raise T by `raise` when the tokens
/// of some ranks cannot leave them and do not fit. A level counts tokens: every rank may hold T of them.
struct Capacity {
    private(set) var level: Int64 = 0

    /// The tokens that a rank may hold.
    @inline(__always)
    func cap(_ rank: Int) -> Int64 { level }

    /// The least level at which a rank may hold this many tokens.
    @inline(__always)
    func level(of tokens: Int64, on rank: Int) -> Int64 { tokens }

    /// T becomes the least level at which the ranks of a set, which is not empty, may hold this many tokens together.
    @inline(__always)
    mutating func raise(_ ranks: RankSet, holding tokens: Int64) {
        let count = Int64(ranks.count)
        level = (tokens &+ count &- 1) / count
    }

    /// The tokens that rank r gives to rank s (negative: takes from it) so that both stand at the same level, rounded toward zero.
    @inline(__always)
    func transfer(from r: Int, holding tokens: Int64, to s: Int, holding others: Int64) -> Int64 { (tokens &- others) / 2 }
}

/// A set of ranks of one group: bit r % 32 of word r / 32. A view of memory of the solver.
struct RankSet {
    let words: UnsafeMutablePointer<UInt32>
    /// Ranks of the group.
    let size: Int

    @inline(__always)
    func removeAll() { words.update(repeating: 0, count: FlowSolver.witnessWords) }

    @inline(__always)
    func insert(_ rank: Int) { words[rank >> 5] |= 1 << UInt32(rank & 31) }

    func insertAll() {
        for rank in stride(from: 0, to: size, by: 32) { words[rank >> 5] = size &- rank >= 32 ? ~0 : 1 << UInt32(size &- rank) &- 1 }
    }

    @inline(__always)
    var count: Int {
        var count = 0, word = 0
        while word &* 32 < size {
            count &+= words[word].nonzeroBitCount
            word &+= 1
        }
        return count
    }
}
