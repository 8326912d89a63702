// Balanced: the placement with the best even split over replicas, for dispatch that gives every replica of an expert the same.

/// Copies by the heaviest share, the copies to ranks by longest processing time, then swaps until the heaviest rank is within the
/// tolerance of the mean. Where there are few slots, other numbers of copies are tried, too.
/// - Parameters:
///   - weight: [nLogical]
///   - tolerance: by how much of the mean, or of a higher target, the heaviest rank may exceed it.
func placeBalanced(_ board: Board, weight: UnsafePointer<Double>, tolerance: Double, target: Double = 0) {
    let limit = max(board.live.count, (board.nSlots + board.nLogical - 1) / board.nLogical)
    replicate(board, weight: weight, limit: limit)
    let mean = (0..<board.nLogical).reduce(0.0) { $0 + weight[$1] } / Double(max(1, board.live.count))
    let level = max(mean, target) * (1 + tolerance)
    arrangeCopies(board, to: level)
    if board.nSlots > JointSearch.mostSlots || board.heaviest <= level * JointSearch.worthwhile { return }
    var search = JointSearch(board, weight: weight, level: level)
    search.run()
}

/// Places copies that are given with their shares.
func arrangeCopies(_ board: Board, to level: Double) {
    board.clear()
    packHeaviestFirst(board, copiesByShare(board))
    SwapSearch(board).refine(to: level)
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
    let others = board.live.filter { !board.holds($0, Int32(e)) }, open = board.live.filter(board.hasRoom)
    guard !others.isEmpty, !open.isEmpty else { return false }
    var target = [Int](repeating: -1, count: board.nLogical)  // the first rank with room that does not hold an expert; nRanks: none
    var best = (gap: Double.infinity, from: -1, slot: -1, to: -1)
    for from in others {
        for slot in 0..<board.fill[from] {
            let other = Int(board.expert[from * board.width + slot]), gap = abs(board.share[other] - board.share[e])
            guard gap <= best.gap else { continue }
            if target[other] < 0 { target[other] = open.first { !board.holds($0, Int32(other)) } ?? board.nRanks }
            let to = target[other]
            if to < board.nRanks && (gap < best.gap || to < best.to) { best = (gap, from, slot, to) }
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
