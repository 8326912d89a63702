// Budget: from the placement in force towards the best even split, with as few moves as can be.

/// Finds, for one layer after another, exchanges and replacements that relieve the heaviest rank.
final class BudgetSearch {
    private let board: Board
    /// The ranks of each expert.
    private var hosts: [[Int]] = []
    private static let lightest = 12

    /// Slots that get other experts: one, or two of different ranks.
    private struct Change {
        var gain = 0.0  // a move
        var rank = -1, slot = -1, expert: Int32 = -1
        var other = -1, otherSlot = -1, otherExpert: Int32 = -1
    }

    /// Ranks and experts that stay together: those of a host, and those of a group, which stands on one host. All of them without hosts.
    private let ranksPerNode: Int, groupSize: Int

    init(nLogical: Int, capacity: [Int], width: Int, ranksPerNode: Int, groupSize: Int) {
        board = Board(nLogical: nLogical, capacity: capacity, width: width)
        (self.ranksPerNode, self.groupSize) = (ranksPerNode, groupSize)
    }

    /// The placements passed through, at most `most` moves from `previous`.
    func trajectory(_ previous: ArraySlice<Int32>, weight: [Double], most: Int, threshold: Double) -> Trajectory {
        board.take(previous, completedBy: weight, ranksPerNode: ranksPerNode, groupSize: groupSize)
        noteHosts()
        let former = Former(previous, nRanks: board.nRanks, nLogical: board.nLogical)
        let mean = weight.reduce(0, +) / Double(max(1, board.live.count))
        var moves = former.moves(board)
        var trajectory = Trajectory(.init(moves: moves, balance: board.balance, phy2log: board.phy2log))
        for _ in 0..<4 * board.nSlots {
            guard let change = best(former, weight, threshold * mean, most - moves) else { break }
            moves += cost(change, former)
            apply(change, weight)
            trajectory.add(.init(moves: moves, balance: board.balance, phy2log: board.phy2log))
        }
        return trajectory
    }

    private func best(_ former: Former, _ weight: [Double], _ level: Double, _ left: Int) -> Change? {
        let byLoad = board.live.sorted { (board.load[$0], $1) > (board.load[$1], $0) }
        guard let heavy = byLoad.first, board.load[heavy] > level else { return nil }
        var best = Change()
        func consider(_ change: Change, fall: Double) {
            guard fall > 1e-9 * level else { return }
            let moves = cost(change, former)
            guard moves <= left else { return }
            let gain = fall / Double(max(moves, 1)) * (moves <= 0 ? 4 : 1)
            if gain > best.gain {
                best = change
                best.gain = gain
            }
        }
        let over = { (load: Double) in max(0, load - level) }
        let node = heavy / ranksPerNode
        for light in byLoad.filter({ $0 / ranksPerNode == node }).suffix(BudgetSearch.lightest) where light != heavy {
            let high = board.load[heavy], low = board.load[light]
            for i in 0..<board.fill[heavy] {
                let out = board.expert[heavy * board.width + i]
                if board.holds(light, out) { continue }
                for j in 0..<board.fill[light] {
                    let back = board.expert[light * board.width + j]
                    let shift = board.share[Int(out)] - board.share[Int(back)]
                    if shift > 0 && !board.holds(heavy, back) {
                        let fall = over(high) + over(low) - over(high - shift) - over(low + shift)
                        let change = Change(
                            rank: light, slot: j, expert: out, other: heavy, otherSlot: i, otherExpert: back)
                        consider(change, fall: fall)
                    }
                    if board.copies[Int(back)] > 1 {
                        consider(
                            Change(rank: light, slot: j, expert: out), fall: replaced(light, out: back, in: out, weight, level))
                    }
                }
            }
        }
        for i in 0..<board.fill[heavy] {
            let out = board.expert[heavy * board.width + i]
            guard board.copies[Int(out)] > 1 else { continue }
            for e in 0..<board.nLogical where !board.holds(heavy, Int32(e)) && hosts[e].contains(where: { $0 / ranksPerNode == node }) {
                let change = Change(rank: heavy, slot: i, expert: Int32(e))
                consider(change, fall: replaced(heavy, out: out, in: Int32(e), weight, level))
            }
        }
        return best.rank < 0 ? nil : best
    }

    /// How much the overload of all ranks falls when a slot of `rank` holds `new` in place of `old`, whose other copies take over.
    private func replaced(
        _ rank: Int, out old: Int32, in new: Int32, _ weight: [Double], _ level: Double
    ) -> Double {
        let o = Int(old), n = Int(new)
        func over(_ load: Double) -> Double { max(0, load - level) }
        let moreOld = weight[o] / Double(board.copies[o] - 1) - board.share[o]
        let lessNew = board.share[n] - weight[n] / Double(board.copies[n] + 1)
        let load = board.load[rank]
        var fall = over(load) - over(load + board.share[n] - lessNew - board.share[o])
        for other in hosts[o] where other != rank {
            let change = moreOld - (hosts[n].contains(other) ? lessNew : 0)
            fall += over(board.load[other]) - over(board.load[other] + change)
        }
        for other in hosts[n] where other != rank && board.load[other] > level && !hosts[o].contains(other) {
            fall += over(board.load[other]) - over(board.load[other] - lessNew)
        }
        return fall
    }

    private func noteHosts() {
        hosts = [[Int]](repeating: [], count: board.nLogical)
        for rank in board.live {
            for slot in 0..<board.fill[rank] { hosts[Int(board.expert[rank * board.width + slot])].append(rank) }
        }
    }

    /// Moves that a change adds; below zero where it brings experts back.
    private func cost(_ change: Change, _ former: Former) -> Int {
        let one = former.cost(board, change.rank, change.slot, change.expert)
        return change.other < 0 ? one : one + former.cost(board, change.other, change.otherSlot, change.otherExpert)
    }

    private func apply(_ change: Change, _ weight: [Double]) {
        var touched: [Int] = []
        for (rank, slot, e) in [(change.rank, change.slot, change.expert), (change.other, change.otherSlot, change.otherExpert)]
        where rank >= 0 {
            let place = board.expert + rank * board.width + slot
            touched += [Int(place.pointee), Int(e)]
            board.copies[Int(place.pointee)] -= 1
            board.copies[Int(e)] += 1
            place.pointee = e
        }
        for e in touched {
            hosts[e] = board.live.filter { board.holds($0, Int32(e)) }
            board.share[e] = weight[e] / Double(max(1, board.copies[e]))
        }
        for rank in Set(touched.flatMap { hosts[$0] } + [change.rank, change.other]) where rank >= 0 { board.weigh(rank: rank) }
    }
}
