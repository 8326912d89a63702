// Balanced: the placement with the best even split over replicas, for dispatch that gives every replica of an expert the same.

/// Copies by the heaviest share, the copies to ranks by longest processing time, then swaps until the heaviest rank is within the
/// tolerance of the mean.
/// - Parameters:
///   - weight: [nLogical]
///   - tolerance: by how much of the mean, or of a higher target, the heaviest rank may exceed it.
func placeBalanced(_ board: Board, weight: UnsafePointer<Double>, tolerance: Double, target: Double = 0) {
    board.clear()
    let limit = max(board.live.count, (board.nSlots + board.nLogical - 1) / board.nLogical)
    replicate(board, weight: weight, limit: limit)
    packHeaviestFirst(board, copiesByShare(board))
    let mean = (0..<board.nLogical).reduce(0.0) { $0 + weight[$1] } / Double(max(1, board.live.count))
    SwapSearch(board).refine(to: max(mean, target) * (1 + tolerance))
}

/// Each copy to the lightest rank that has room and does not hold its expert. Where there is none, a copy of another expert makes way to a
/// rank that has room. Copies that fit nowhere without a duplicate become one.
func packHeaviestFirst(_ board: Board, _ copies: [Int32]) {
    for e in copies {
        var best = -1, least = Double.infinity
        for rank in board.live where board.load[rank] < least && board.hasRoom(rank) && !board.holds(rank, e) {
            (best, least) = (rank, board.load[rank])
        }
        if best >= 0 {
            board.put(Int(e), on: best)
        } else if !displace(board, Int(e)) {
            guard let free = board.live.first(where: { board.hasRoom($0) }) else { return }
            board.put(Int(e), on: free)
        }
    }
}

/// Moves the copy of the closest share from a rank that does not hold `e` to a rank with room, and puts `e` into its slot.
private func displace(_ board: Board, _ e: Int) -> Bool {
    var best = (gap: Double.infinity, from: -1, slot: -1, to: -1)
    for to in board.live where board.hasRoom(to) {
        for from in board.live where !board.holds(from, Int32(e)) {
            for slot in 0..<board.fill[from] {
                let other = board.expert[from * board.width + slot]
                let gap = abs(board.share[Int(other)] - board.share[e])
                if gap < best.gap && !board.holds(to, other) { best = (gap, from, slot, to) }
            }
        }
    }
    guard best.from >= 0 else { return false }
    let place = best.from * board.width + best.slot
    let other = Int(board.expert[place])
    board.expert[place] = Int32(e)
    board.weigh(rank: best.from)
    board.put(other, on: best.to)
    return true
}
