// Trajectory: how a layer gets better move by move, and how a budget of moves is spent over the layers.

/// The placements that a layer passes through, from the previous one on. A move is an expert that comes new to a rank.
struct Trajectory {
    struct Point {
        var moves: Int
        var balance: Double
        var phy2log: [Int32]
    }

    private(set) var points: [Point]
    /// It ended for want of moves.
    var isCut = false

    init(_ start: Point) { points = [start] }

    /// Keeps a point that is better than all with as few moves.
    mutating func add(_ point: Point) {
        points.removeAll { $0.moves >= point.moves && $0.balance <= point.balance }
        if points.allSatisfy({ $0.moves > point.moves || $0.balance < point.balance }) { points.append(point) }
        points.sort { $0.moves < $1.moves }
    }

    /// The points where each further move brings less than those before: the upper hull.
    func hull() -> [Point] {
        var hull: [Point] = []
        for point in points {
            while let last = hull.last {
                let before = hull.count > 1 ? hull[hull.count - 2] : nil
                let isBelow = before.map { slope($0, last) <= slope(last, point) } ?? false
                guard isBelow || last.balance >= point.balance && last.moves >= point.moves else { break }
                hull.removeLast()
            }
            if point.balance > hull.last?.balance ?? -1 { hull.append(point) }
        }
        return hull
    }

    /// Spends a budget over the layers where a move brings most. Returns the point of each layer.
    /// - Parameter make: the trajectory of a layer with a number of moves. Few layers need several times their share, so all are tried
    ///   with few moves first, and those that use them up again with more.
    static func spend<Failure>(
        _ budget: Int, over nLayers: Int, _ make: (_ layer: Int, _ most: Int) throws(Failure) -> Trajectory
    ) throws(Failure) -> [Point] {
        let share = budget / max(1, nLayers), limit = min(budget, max(8, 5 * share))
        var most = [Int](repeating: min(limit, max(8, 2 * share)), count: nLayers)
        var layers: [Trajectory] = []
        for layer in 0..<nLayers { layers.append(try make(layer, most[layer])) }
        while true {
            let points = spend(budget, over: layers)
            let short = layers.indices.filter {
                layers[$0].isCut && most[$0] < limit && points[$0].moves == layers[$0].points.last?.moves
            }
            if short.isEmpty { return points }
            for layer in short {
                most[layer] = min(limit, 2 * most[layer])
                layers[layer] = try make(layer, most[layer])
            }
        }
    }

    /// Spends what the first points leave of the budget.
    static func spend(_ budget: Int, over layers: [Trajectory]) -> [Point] {
        let hulls = layers.map { $0.hull() }
        var taken = [Int](repeating: 0, count: layers.count)
        var steps: [(slope: Double, layer: Int, index: Int)] = []
        for (layer, hull) in hulls.enumerated() {
            for index in hull.indices.dropFirst() { steps.append((slope(hull[index - 1], hull[index]), layer, index)) }
        }
        steps.sort { ($1.slope, $0.layer, $0.index) < ($0.slope, $1.layer, $1.index) }
        var left = budget - hulls.reduce(0) { $0 + $1[0].moves }
        for step in steps where taken[step.layer] == step.index - 1 {
            let hull = hulls[step.layer], cost = hull[step.index].moves - hull[step.index - 1].moves
            if cost <= left {
                left -= cost
                taken[step.layer] = step.index
            }
        }
        return hulls.indices.map { hulls[$0][taken[$0]] }
    }
}

private func slope(_ a: Trajectory.Point, _ b: Trajectory.Point) -> Double {
    (b.balance - a.balance) / Double(max(1, b.moves - a.moves))
}

/// What each rank held before: counts moves against it.
struct Former {
    private let holds: [Bool]
    private let nLogical: Int, nRanks: Int, width: Int

    init(_ phy2log: ArraySlice<Int32>, nRanks: Int, nLogical: Int) {
        (self.nLogical, self.nRanks, width) = (nLogical, nRanks, phy2log.count / nRanks)
        var holds = [Bool](repeating: false, count: nRanks * nLogical)
        for (slot, e) in phy2log.enumerated() where e >= 0 { holds[slot / width * nLogical + Int(e)] = true }
        self.holds = holds
    }

    @inline(__always)
    func held(_ rank: Int, _ e: Int) -> Bool { holds[rank * nLogical + e] }

    /// Moves that it takes to put an expert into a slot in use; -1 where that undoes one.
    func cost(_ board: Board, _ rank: Int, _ slot: Int, _ e: Int32) -> Int {
        let old = Int(board.expert[rank * board.width + slot])
        return (held(rank, Int(e)) ? 0 : 1) - (held(rank, old) ? 0 : 1)
    }

    /// Experts on ranks that did not hold them.
    func moves(_ board: Board) -> Int {
        var moves = 0
        for rank in board.live {
            let row = board.expert + rank * board.width
            for slot in 0..<board.fill[rank] where !held(rank, Int(row[slot])) {
                moves += (0..<slot).contains { row[$0] == row[slot] } ? 0 : 1
            }
        }
        return moves
    }
}

/// The board's placement with every expert that stays on its rank in the slot that it had.
func settled(_ board: Board, _ former: ArraySlice<Int32>?) -> [Int32] {
    guard let former else { return board.phy2log }
    var result = [Int32](repeating: -1, count: board.nRanks * board.width)
    for rank in 0..<board.nRanks {
        let first = rank * board.width
        var waiting = (0..<board.fill[rank]).map { board.expert[first + $0] }
        for slot in 0..<board.capacity[rank] {
            let old = former[former.startIndex + first + slot]
            guard old >= 0, let index = waiting.firstIndex(of: old) else { continue }
            result[first + slot] = old
            waiting.remove(at: index)
        }
        var next = waiting.makeIterator()
        for slot in first..<first + board.capacity[rank] where result[slot] < 0 { result[slot] = next.next() ?? -1 }
    }
    return result
}
