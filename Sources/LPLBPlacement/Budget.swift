// Budget: from the placement in force towards the best even split, with as few moves as can be.

/// Finds, for one layer after another, exchanges and replacements that relieve the heaviest rank.
final class BudgetSearch {
    private let board: Board
    /// [nLogical][nRanks], [nLogical]: the ranks of each expert, and how many they are.
    private let hosts: UnsafeMutablePointer<Int32>, hostCount: UnsafeMutablePointer<Int>
    /// [nLogical] each: how much heavier a replica gets when there is one less (where there are several), how much lighter when there is
    /// one more, and the latter for all of an expert's ranks above the level, which is the most that another copy can take off them.
    private let more: UnsafeMutablePointer<Double>, less: UnsafeMutablePointer<Double>, relief: UnsafeMutablePointer<Double>
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
        hosts = .allocate(capacity: nLogical * capacity.count)
        hostCount = .allocate(capacity: nLogical)
        hosts.initialize(repeating: -1, count: nLogical * capacity.count)
        hostCount.initialize(repeating: 0, count: nLogical)
        more = .allocate(capacity: nLogical)
        less = .allocate(capacity: nLogical)
        relief = .allocate(capacity: nLogical)
        for table in [more, less, relief] { table.initialize(repeating: 0, count: nLogical) }
    }

    deinit {
        hosts.deallocate()
        hostCount.deallocate()
        more.deallocate()
        less.deallocate()
        relief.deallocate()
    }

    /// The placements passed through, at most `most` moves from `previous`.
    func trajectory(_ previous: ArraySlice<Int32>, weight: [Double], most: Int, threshold: Double) -> Trajectory {
        board.take(previous, completedBy: weight, ranksPerNode: ranksPerNode, groupSize: groupSize)
        let former = Former(previous, nRanks: board.nRanks, nLogical: board.nLogical)
        let mean = weight.reduce(0, +) / Double(max(1, board.live.count))
        var moves = former.moves(board)
        var trajectory = Trajectory(.init(moves: moves, balance: board.balance, phy2log: board.phy2log))
        weight.withUnsafeBufferPointer { weight in
            guard let weight = weight.baseAddress else { return }
            for e in 0..<board.nLogical { note(e, weight) }
            for _ in 0..<4 * board.nSlots {
                guard let change = best(former, threshold * mean, most - moves) else { break }
                moves += cost(change, former)
                apply(change, weight)
                trajectory.add(.init(moves: moves, balance: board.balance, phy2log: board.phy2log))
            }
        }
        trajectory.isCut = moves + 2 > most
        return trajectory
    }

    private func best(_ former: Former, _ level: Double, _ left: Int) -> Change? {
        let byLoad = board.live.sorted { (board.load[$0], $1) > (board.load[$1], $0) }
        guard let heavy = byLoad.first, board.load[heavy] > level else { return nil }
        let node = heavy / ranksPerNode
        var search = Search(former: former, level: level, left: left, best: Change())
        relief.update(repeating: 0, count: board.nLogical)
        for rank in board.live where board.load[rank] > level {
            for slot in 0..<board.fill[rank] {
                let e = Int(board.expert[rank &* board.width &+ slot])
                relief[e] += min(less[e], board.load[rank] - level)
            }
        }
        for light in byLoad.filter({ $0 / ranksPerNode == node }).suffix(BudgetSearch.lightest) where light != heavy {
            exchange(heavy, light, &search)
        }
        for i in 0..<board.fill[heavy] where board.copies[Int(board.expert[heavy &* board.width &+ i])] > 1 {
            for e in 0..<board.nLogical where isOn(node, e) { replace(heavy, i, Int32(truncatingIfNeeded: e), &search) }
        }
        return search.best.rank < 0 ? nil : search.best
    }

    /// What a step looks for, and the best change so far.
    private struct Search {
        let former: Former, level: Double, left: Int
        var best: Change

        @inline(__always)
        func over(_ load: Double) -> Double { max(0, load - level) }

        /// The fall that is worth as much as the best change so far, for a change of this many moves. Those that bring experts back
        /// count four times.
        @inline(__always)
        func least(_ moves: Int) -> Double { max(1e-9 * level, best.gain * (moves <= 0 ? 0.25 : Double(moves))) }
    }

    /// Some rank of the host holds e.
    private func isOn(_ node: Int, _ e: Int) -> Bool {
        ranksPerNode == board.nRanks || (0..<hostCount[e]).contains { Int(hosts[e &* board.nRanks &+ $0]) / ranksPerNode == node }
    }

    /// One of a heavy rank's experts against one of a light rank's, or as a copy in the place of one.
    private func exchange(_ heavy: Int, _ light: Int, _ search: inout Search) {
        let high = board.load[heavy], low = board.load[light], before = search.over(high) + search.over(low)
        for i in 0..<board.fill[heavy] {
            let out = board.expert[heavy &* board.width &+ i]
            if board.holds(light, out) { continue }
            for j in 0..<board.fill[light] {
                let back = board.expert[light &* board.width &+ j]
                let shift = board.share[Int(out)] - board.share[Int(back)]
                if shift > 0 {
                    let fall = before - search.over(high - shift) - search.over(low + shift)
                    if fall > search.least(-1) && !board.holds(heavy, back) {
                        let change = Change(rank: light, slot: j, expert: out, other: heavy, otherSlot: i, otherExpert: back)
                        consider(change, cost(change, search.former), fall: fall, &search)
                    }
                }
                if board.copies[Int(back)] > 1 { replace(light, j, out, &search) }
            }
        }
    }

    @inline(__always)
    private func consider(_ change: Change, _ moves: Int, fall: Double, _ search: inout Search) {
        guard fall > search.least(moves), moves <= search.left else { return }
        search.best = change
        search.best.gain = fall / Double(max(moves, 1)) * (moves <= 0 ? 4 : 1)
    }

    /// A slot of `rank` gets expert `new` in place of one whose other copies take over.
    @inline(__always)
    private func replace(_ rank: Int, _ slot: Int, _ new: Int32, _ search: inout Search) {
        let o = Int(board.expert[rank &* board.width &+ slot]), n = Int(new), load = board.load[rank]
        let fall = search.over(load) - search.over(load + board.share[n] - less[n] - board.share[o])
        // All that the other ranks can add to this is the relief.
        if fall + relief[n] <= search.least(-1) { return }
        let moves = search.former.cost(board, rank, slot, new)
        guard fall + relief[n] > search.least(moves), moves <= search.left, !board.holds(rank, new) else { return }
        replace(rank, slot, o, n, moves, fall, &search)
    }

    private func replace(_ rank: Int, _ slot: Int, _ o: Int, _ n: Int, _ moves: Int, _ first: Double, _ search: inout Search) {
        let moreOld = more[o], lessNew = less[n]
        var fall = first
        let ofOld = hosts + o &* board.nRanks, ofNew = hosts + n &* board.nRanks
        for index in 0..<hostCount[o] where ofOld[index] != rank {
            let other = Int(ofOld[index])
            let change = moreOld - (holds(n, other) ? lessNew : 0)
            fall += search.over(board.load[other]) - search.over(board.load[other] + change)
        }
        for index in 0..<hostCount[n] {
            let other = Int(ofNew[index])
            if other == rank || board.load[other] <= search.level || holds(o, other) { continue }
            fall += search.over(board.load[other]) - search.over(board.load[other] - lessNew)
        }
        consider(Change(rank: rank, slot: slot, expert: Int32(truncatingIfNeeded: n)), moves, fall: fall, &search)
    }

    @inline(__always)
    private func holds(_ e: Int, _ rank: Int) -> Bool {
        for index in 0..<hostCount[e] where hosts[e &* board.nRanks &+ index] == rank { return true }
        return false
    }

    /// Notes the ranks that hold an expert, and what its replicas weigh.
    private func note(_ e: Int, _ weight: UnsafePointer<Double>) {
        var count = 0
        for rank in board.live where board.holds(rank, Int32(truncatingIfNeeded: e)) {
            hosts[e &* board.nRanks &+ count] = Int32(truncatingIfNeeded: rank)
            count += 1
        }
        hostCount[e] = count
        let copies = max(1, board.copies[e])
        board.share[e] = weight[e] / Double(copies)
        more[e] = weight[e] / Double(max(1, copies - 1)) - board.share[e]
        less[e] = board.share[e] - weight[e] / Double(copies + 1)
    }

    /// Moves that a change adds; below zero where it brings experts back.
    private func cost(_ change: Change, _ former: Former) -> Int {
        let one = former.cost(board, change.rank, change.slot, change.expert)
        return change.other < 0 ? one : one + former.cost(board, change.other, change.otherSlot, change.otherExpert)
    }

    private func apply(_ change: Change, _ weight: UnsafePointer<Double>) {
        var touched: [Int] = []
        for (rank, slot, e) in [(change.rank, change.slot, change.expert), (change.other, change.otherSlot, change.otherExpert)]
        where rank >= 0 {
            let place = board.expert + rank * board.width + slot
            touched += [Int(place.pointee), Int(e)]
            board.copies[Int(place.pointee)] -= 1
            board.copies[Int(e)] += 1
            place.pointee = e
        }
        var ranks = [change.rank]
        if change.other >= 0 { ranks.append(change.other) }
        for e in touched {
            note(e, weight)
            for index in 0..<hostCount[e] { ranks.append(Int(hosts[e &* board.nRanks &+ index])) }
        }
        for rank in ranks { board.weigh(rank: rank) }
    }
}
