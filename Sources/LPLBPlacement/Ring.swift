// Ring: the heaviest experts have one copy each, on the ranks a few steps further on. Made for exact dispatch on few ranks.

/// A placement in which every rank's heaviest experts have copies on the ranks `steps` further on, or false where these sizes have none.
func placeRing(_ board: Board, _ drift: Drift, steps: [Int], turn: Int) -> Bool {
    let nLogical = board.nLogical, ranks = board.live, redundant = board.nSlots - nLogical
    guard redundant > 0, redundant <= nLogical, ranks.count > (steps.max() ?? 0) else { return false }
    let byLoad = drift.byLoad
    board.clear()
    for e in 0..<nLogical { board.copies[e] = 1 }
    for e in byLoad[..<redundant] { board.copies[e] = 2 }
    board.weigh(drift.mean)

    let risk = Risk(drift, nRanks: board.nRanks)
    var key = [Double](repeating: 0, count: ranks.count)
    var edges = [Int](repeating: 0, count: ranks.count)
    for (index, e) in byLoad[..<redundant].enumerated() {
        let round = index / ranks.count
        // Each rank gives one expert in each round; the lightest rank the heaviest one.
        var best = (cost: Double.infinity, from: -1, to: -1)
        for from in ranks.indices where edges[from] == round && board.hasRoom(ranks[from]) {
            for step in steps.indices {
                let to = (from + steps[(round + step) % steps.count]) % ranks.count
                guard board.hasRoom(ranks[to]), to != from, !board.holds(ranks[to], Int32(e)) else { continue }
                let cost = key[from] + key[to]
                if cost < best.cost { best = (cost, from, to) }
                break
            }
        }
        guard best.from >= 0 else { return false }
        edges[best.from] += 1
        for place in [best.from, best.to] {
            key[place] += 0.5 * drift.mean[e]
            board.put(e, on: ranks[place])
            risk.add(e, part: 0.5, on: ranks[place])
        }
    }
    for e in byLoad[redundant...] {
        guard let best = risk.safest(ranks, board, e) else { return false }
        board.put(e, on: best)
        risk.add(e, part: 1, on: best)
    }
    return true
}
