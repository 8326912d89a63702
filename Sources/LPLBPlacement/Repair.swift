// Repair: few changes to a placement in force, made where the solver's witness shows that it is tight.

import LPLBSolver
import LPLBTopology

/// Finds changes for one layer after another. With exact dispatch a layer can only get better if the ranks of the witness get rid of load
/// that has no place outside of them: a single goes out in exchange for a lighter one, or gets a copy in a slot outside that is redundant.
final class Repair {
    private let shape: ExpertShape
    private let board: Board
    private var pool: WitnessPool
    /// For each expert, `words` words with a bit for each rank that holds it.
    private var places: [UInt64] = []
    private let words: Int
    /// Changes that the pool of witnesses looks at in each step, and those of them that are solved.
    private static let looked = 200, solves = 8

    /// A change: on `rank` (and `other`), `slot` (and `otherSlot`) get new experts.
    private struct Change {
        var score: Double
        var rank: Int, slot: Int, expert: Int32
        var other = -1, otherSlot = -1, otherExpert: Int32 = -1
    }

    init(shape: ExpertShape, capacity: [Int], width: Int) {
        self.shape = shape
        board = Board(nLogical: shape.nLogical, capacity: capacity, width: width)
        pool = WitnessPool(nRanks: capacity.count)
        words = (capacity.count + 63) / 64
    }

    /// The placements that repair passes through, at most `most` moves from `previous`.
    func trajectory(_ previous: ArraySlice<Int32>, weight: [Double], most: Int) throws(RuleViolation) -> Trajectory {
        board.take(previous, completedBy: weight)
        let former = Former(previous, nRanks: board.nRanks, nLogical: board.nLogical)
        let loads = scaledLoads(weight)
        pool = WitnessPool(nRanks: board.nRanks)
        notePlaces()
        var solved = try solve(loads)
        var trajectory = Trajectory(.init(moves: former.moves(board), balance: solved.balance, phy2log: board.phy2log))
        var stalled = 0
        while stalled < 3, trajectory.points.last?.balance ?? 1 < 0.9995 {
            guard let (next, found) = try bestChange(solved, loads, former, most), found.balance > solved.balance else { break }
            stalled = found.balance - solved.balance < 1e-5 ? stalled + 1 : 0
            apply(next)
            notePlaces()
            solved = found
            trajectory.add(.init(moves: former.moves(board), balance: solved.balance, phy2log: board.phy2log))
        }
        return trajectory
    }

    private struct Solved {
        var balance: Double
        var witness: [Bool]
    }

    private func solve(_ loads: [Int64]) throws(RuleViolation) -> Solved {
        let solver = FlowSolver(Network(try Placement(shape: shape, phy2log: board.phy2log)))
        loads.withUnsafeBufferPointer { loads in
            if let first = loads.baseAddress { solver.solve(loads: first) }
        }
        let words = solver.witness(ofGroup: 0), result = solver.results[0]
        let mean = Double(result.total) / Double(max(1, board.live.count))
        let witness = (0..<board.nRanks).map { words[$0 / 32] >> UInt32($0 % 32) & 1 == 1 }
        pool.add(witness.indices.filter { witness[$0] })
        return Solved(balance: result.maxLoad > 0 ? mean / Double(result.maxLoad) : 1, witness: witness)
    }

    /// Of the changes that look best the one that gives most a move, by the exact split. The witnesses so far tell which look best.
    private func bestChange(
        _ solved: Solved, _ loads: [Int64], _ former: Former, _ most: Int
    ) throws(RuleViolation) -> (Change, Solved)? {
        let before = former.moves(board), total = loads.reduce(0.0) { $0 + Double($1) }
        let mean = total / Double(max(1, board.live.count))
        pool.weigh(places, loads)
        var promising: [(gain: Double, moves: Int, change: Change, changed: Changed)] = []
        for change in changes(solved.witness, loads) {
            let moves = before + cost(change, former)
            guard moves <= most else { continue }
            let changed = changed(by: change), cost = max(moves - before, 1)
            let gain = (mean / max(mean, pool.bound(changed, places, loads)) - solved.balance) / Double(cost)
            if gain > 0 { promising.append((gain, cost, change, changed)) }
        }
        // Each solve brings a witness that bounds the others anew, so that few solves find the best change.
        var best: (change: Change, solved: Solved, gain: Double)?
        for _ in 0..<Repair.solves {
            guard let index = promising.indices.max(by: { promising[$0].gain < promising[$1].gain }),
                promising[index].gain > best?.gain ?? 0 else { break }
            let change = promising[index].change
            promising.swapAt(index, promising.count - 1)
            promising.removeLast()
            let undo = apply(change)
            let found = try solve(loads)
            let gain = (found.balance - solved.balance) / Double(max(former.moves(board) - before, 1))
            if gain > best?.gain ?? 0 { best = (change, found, gain) }
            apply(undo)
            pool.weighLatest(places, loads)
            for index in promising.indices {
                let one = promising[index]
                let bound = max(mean, pool.boundByLatest(one.changed, places, loads))
                promising[index].gain = min(one.gain, (mean / bound - solved.balance) / Double(one.moves))
            }
        }
        return best.map { ($0.change, $0.solved) }
    }

    private func cost(_ change: Change, _ former: Former) -> Int {
        let one = former.cost(board, change.rank, change.slot, change.expert)
        return change.other < 0 ? one : one + former.cost(board, change.other, change.otherSlot, change.otherExpert)
    }

    /// The experts whose places a change changes. (No rank holds one twice here, or the bound is only too low.)
    private func changed(by change: Change) -> Changed {
        var changed = Changed()
        func edit(_ e: Int, _ rank: Int, _ isThere: Bool) {
            let index = changed.experts.firstIndex(of: e) ?? changed.experts.count
            if index == changed.experts.count {
                changed.experts.append(e)
                changed.places += places[e * words..<(e + 1) * words]
            }
            let bit = UInt64(1) << UInt64(rank & 63), word = index * words + rank >> 6
            if isThere { changed.places[word] |= bit } else { changed.places[word] &= ~bit }
        }
        func write(_ rank: Int, _ slot: Int, _ e: Int32) {
            edit(Int(board.expert[rank * board.width + slot]), rank, false)
            edit(Int(e), rank, true)
        }
        write(change.rank, change.slot, change.expert)
        if change.other >= 0 { write(change.other, change.otherSlot, change.otherExpert) }
        return changed
    }

    private func notePlaces() {
        places = [UInt64](repeating: 0, count: board.nLogical * words)
        for rank in board.live {
            for slot in 0..<board.fill[rank] {
                places[Int(board.expert[rank * board.width + slot]) * words + rank >> 6] |= 1 << UInt64(rank & 63)
            }
        }
    }

    @discardableResult
    private func apply(_ change: Change) -> Change {
        var undo = change
        undo.expert = put(change.expert, change.rank, change.slot)
        if change.other >= 0 { undo.otherExpert = put(change.otherExpert, change.other, change.otherSlot) }
        return undo
    }

    /// Returns the expert that stood there.
    private func put(_ e: Int32, _ rank: Int, _ slot: Int) -> Int32 {
        let place = board.expert + rank * board.width + slot
        let old = place.pointee
        board.copies[Int(old)] -= 1
        board.copies[Int(e)] += 1
        place.pointee = e
        return old
    }

    /// Changes that take load out of the witness, those first that take out about as much as it has too much.
    private func changes(_ witness: [Bool], _ loads: [Int64]) -> [Change] {
        let inside = board.live.filter { witness[$0] }, outside = board.live.filter { !witness[$0] }
        guard !inside.isEmpty, !outside.isEmpty else { return [] }
        var held = [Bool](repeating: false, count: board.nLogical)  // has a place outside
        for rank in outside { for slot in 0..<board.fill[rank] { held[Int(board.expert[rank * board.width + slot])] = true } }
        var bound: [(e: Int32, rank: Int, slot: Int, load: Double)] = []  // can go nowhere else
        for rank in inside {
            for slot in 0..<board.fill[rank] {
                let e = board.expert[rank * board.width + slot]
                if !held[Int(e)] { bound.append((e, rank, slot, Double(loads[Int(e)]))) }
            }
        }
        let total = loads.reduce(0.0) { $0 + Double($1) }
        var counted = Set<Int32>()
        let must = bound.reduce(0.0) { $0 + (counted.insert($1.e).inserted ? $1.load : 0) }
        let excess = must - total * Double(inside.count) / Double(board.live.count)
        guard excess > 0 else { return [] }

        var found: [Change] = []
        for one in bound where one.load > 0 {
            // One move: a copy in a slot outside whose expert has another copy.
            for rank in outside where !board.holds(rank, one.e) {
                for slot in 0..<board.fill[rank] {
                    let old = Int(board.expert[rank * board.width + slot])
                    guard board.copies[old] > 1 else { continue }
                    let gain = min(one.load, excess) - 0.5 * Double(loads[old]) / Double(board.copies[old])
                    if gain > 0 { found.append(Change(score: gain, rank: rank, slot: slot, expert: one.e)) }
                }
            }
            guard board.copies[Int(one.e)] == 1 else { continue }
            // Two moves: a lighter single from outside in exchange.
            for rank in outside {
                for slot in 0..<board.fill[rank] {
                    let back = board.expert[rank * board.width + slot]
                    guard board.copies[Int(back)] == 1 else { continue }
                    let shift = one.load - Double(loads[Int(back)])
                    guard shift > 0 else { continue }
                    let gain = min(shift, max(0, 2 * excess - shift)) / 2
                    if gain > 0 {
                        found.append(
                            Change(
                                score: gain, rank: rank, slot: slot, expert: one.e, other: one.rank, otherSlot: one.slot, otherExpert: back))
                    }
                }
            }
        }
        found.sort { ($1.score, $0.rank, $0.slot, $0.expert) < ($0.score, $1.rank, $1.slot, $1.expert) }
        return diverse(found)
    }

    /// At most a few changes for each slot and each expert, so that those looked at are not all alike.
    private func diverse(_ changes: [Change]) -> [Change] {
        var bySlot: [Int: Int] = [:], byExpert: [Int32: Int] = [:]
        var chosen: [Change] = []
        for change in changes {
            let slot = change.rank * board.width + change.slot
            if bySlot[slot, default: 0] >= 2 || byExpert[change.expert, default: 0] >= 6 { continue }
            bySlot[slot, default: 0] += 1
            byExpert[change.expert, default: 0] += 1
            chosen.append(change)
            if chosen.count == Repair.looked { break }
        }
        return chosen
    }
}

/// Loads as whole tokens, scaled so that rounding does not matter.
func scaledLoads(_ weight: [Double]) -> [Int64] {
    let sum = weight.reduce(0, +)
    return weight.map { sum > 0 ? Int64(($0 / sum * Double(1 << 36)).rounded()) : 0 }
}
