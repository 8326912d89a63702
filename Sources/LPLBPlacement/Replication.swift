// Replication: how many copies each expert gets.

/// Gives every expert one copy, and each further slot to the expert whose replicas are heaviest, ties to the lowest index; no expert more
/// copies than `limit`, so that no rank must hold one twice.
func replicate(_ board: Board, weight: UnsafePointer<Double>, limit: Int) {
    let n = board.nLogical, copies = board.copies, share = board.share
    for e in 0..<n {
        copies[e] = 1
        share[e] = weight[e]
    }
    var total = n
    while total < board.nSlots {
        var best = -1, heaviest = -1.0
        for e in 0..<n where share[e] > heaviest && copies[e] < limit { (best, heaviest) = (e, share[e]) }
        if best < 0 { break }
        copies[best] &+= 1
        share[best] = weight[best] / Double(copies[best])
        total &+= 1
    }
}

/// Every copy of every expert, the heaviest first, equal ones by index.
func copiesByShare(_ board: Board) -> [Int32] {
    let share = board.share
    let experts = (0..<board.nLogical).sorted { (share[$0], $1) > (share[$1], $0) }
    var all: [Int32] = []
    all.reserveCapacity(board.nSlots)
    for e in experts { for _ in 0..<board.copies[e] { all.append(Int32(truncatingIfNeeded: e)) } }
    return all
}
