// SwapSearch: exchanges between the heaviest rank and lighter ones, one expert against one, then two against two.

/// Lowers the heaviest load of a board until it is at the target or no exchange helps. No exchange makes a duplicate.
final class SwapSearch {
    private typealias Pair = (sum: Double, first: Int, second: Int)
    private let board: Board
    /// For each rank the pairs of its slots by the sum of their shares, once they have been asked for; empty after a change.
    private var pairs: [[Pair]]
    /// The live ranks, the lightest first, ties by rank.
    private var order: [Int]

    init(_ board: Board) {
        self.board = board
        pairs = [[Pair]](repeating: [], count: board.nRanks)
        order = board.live.sorted { (board.load[$0], $0) < (board.load[$1], $1) }
    }

    /// An exchange: `from` slots of the heaviest rank against `to` slots of another; -1 for none.
    private struct Exchange {
        var level: Double
        var rank = -1
        var from = (-1, -1)
        var to = (-1, -1)
    }

    func refine(to target: Double) {
        // Each round lowers the heaviest rank without raising another one to its level, so the rounds end; the limit is for time.
        for _ in 0..<16 * max(16, board.nSlots) {
            guard let heaviest = order.last, board.load[heaviest] > target else { return }
            var best = Exchange(level: board.load[heaviest] * (1 - 1e-12))
            single(heaviest, target, &best)
            if best.rank < 0 { double(heaviest, target, &best) }
            if best.rank < 0 { return }
            apply(heaviest, best)
        }
    }

    /// Puts a rank whose load has changed where it belongs.
    private func settle(_ rank: Int) {
        order.removeAll { $0 == rank }
        let place = order.firstIndex { (board.load[rank], rank) < (board.load[$0], $0) } ?? order.count
        order.insert(rank, at: place)
    }

    /// The best exchange of one expert against one, or against an empty slot.
    private func single(_ heavy: Int, _ target: Double, _ best: inout Exchange) {
        let board = board, high = board.load[heavy]
        for light in order.dropLast() {
            let low = board.load[light]
            if (high + low) / 2 >= best.level || best.level <= target { return }
            for i in 0..<board.fill[heavy] {
                let out = board.expert[heavy &* board.width &+ i], share = board.share[Int(out)]
                if share <= 0 { continue }
                let open = board.hasRoom(light) ? 1 : 0
                for j in 0..<board.fill[light] + open {
                    let isEmpty = j == board.fill[light]
                    let back = isEmpty ? -1 : board.expert[light &* board.width &+ j]
                    let shift = share - (isEmpty ? 0 : board.share[Int(back)])
                    let level = max(high - shift, low + shift)
                    guard shift > 0, level < best.level else { continue }
                    if board.holds(light, out) || (!isEmpty && board.holds(heavy, back)) { continue }
                    best = Exchange(level: level, rank: light, from: (i, -1), to: (isEmpty ? -1 : j, -1))
                }
            }
        }
    }

    /// The best exchange of two experts against two: this is what ends the stall of exchanges of one against one.
    private func double(_ heavy: Int, _ target: Double, _ best: inout Exchange) {
        let board = board, high = board.load[heavy]
        prepare(heavy)
        let outs = pairs[heavy]
        for light in order.dropLast() {
            let low = board.load[light], wanted = (high - low) / 2
            if (high + low) / 2 >= best.level || best.level <= target { return }
            prepare(light)
            let sums = pairs[light]
            for out in outs {
                // The pair that comes back should weigh out.sum - wanted: look at the nearest ones on both sides.
                var low0 = 0, high0 = sums.count
                while low0 < high0 {
                    let middle = (low0 + high0) / 2
                    if sums[middle].sum < out.sum - wanted { low0 = middle + 1 } else { high0 = middle }
                }
                for index in max(0, low0 - 2)..<min(sums.count, low0 + 2) {
                    let back = sums[index], shift = out.sum - back.sum
                    let level = max(high - shift, low + shift)
                    guard shift > 0, level < best.level, canSwap(heavy, out.first, out.second, light, back.first, back.second) else { continue }
                    best = Exchange(level: level, rank: light, from: (out.first, out.second), to: (back.first, back.second))
                }
            }
        }
    }

    private func prepare(_ rank: Int) {
        guard pairs[rank].isEmpty else { return }
        let row = board.expert + rank * board.width
        for i in 0..<board.fill[rank] {
            for j in 0..<i { pairs[rank].append((board.share[Int(row[i])] + board.share[Int(row[j])], i, j)) }
        }
        pairs[rank].sort { ($0.sum, $0.first, $0.second) < ($1.sum, $1.first, $1.second) }
    }

    private func canSwap(_ heavy: Int, _ i: Int, _ k: Int, _ light: Int, _ j: Int, _ l: Int) -> Bool {
        let here = board.expert + heavy * board.width, there = board.expert + light * board.width
        return !board.holds(light, here[i]) && !board.holds(light, here[k]) && !board.holds(heavy, there[j]) && !board.holds(heavy, there[l])
    }

    private func apply(_ heavy: Int, _ exchange: Exchange) {
        let here = board.expert + heavy * board.width, there = board.expert + exchange.rank * board.width
        for (i, j) in [(exchange.from.0, exchange.to.0), (exchange.from.1, exchange.to.1)] where i >= 0 {
            if j >= 0 {
                swap(&here[i], &there[j])
            } else {
                there[board.fill[exchange.rank]] = here[i]
                board.fill[exchange.rank] += 1
                board.fill[heavy] -= 1
                here[i] = here[board.fill[heavy]]
                here[board.fill[heavy]] = -1
            }
        }
        for rank in [heavy, exchange.rank] {
            board.weigh(rank: rank)
            settle(rank)
            pairs[rank].removeAll(keepingCapacity: true)
        }
    }
}
