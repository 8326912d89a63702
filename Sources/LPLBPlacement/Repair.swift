// Repair: few changes to a placement in force, made where the solver's witness shows that it is tight.

import LPLBSolver
import LPLBTopology

/// Finds changes for one layer after another. With exact dispatch a layer can only get better if the ranks of the witness get rid of load
/// that has no place outside of them: a single goes out in exchange for a lighter one, or gets a copy in a slot outside that is redundant.
final class Repair {
    private let shape: ExpertShape
    private let board: Board
    private let pool: WitnessPool
    /// Changes that the pool of witnesses looks at in each step, and those of them that are solved.
    private static let looked = 400, solves = 8
    /// Slots that are considered for each expert.
    private static let picked = 12
    /// Changes that are solved at most, where none has helped so far.
    private static let mostSolves = 24

    init(shape: ExpertShape, capacity: [Int], width: Int) {
        self.shape = shape
        board = Board(nLogical: shape.nLogical, capacity: capacity, width: width)
        pool = WitnessPool(board)
    }

    /// The placements that repair passes through, at most `most` moves from `previous`.
    /// - Parameter until: the balance that is good enough.
    func trajectory(
        _ previous: ArraySlice<Int32>, weight: [Double], most: Int, until enough: Double = 0.9995
    ) throws(RuleViolation) -> Trajectory {
        board.take(previous, completedBy: weight)
        let former = Former(previous, nRanks: board.nRanks, nLogical: board.nLogical)
        let loads = scaledLoads(weight)
        pool.begin(loads)
        var solved = try solve(loads), moves = former.moves(board)
        _ = pool.add(solved.witness)
        var trajectory = Trajectory(.init(moves: moves, balance: solved.balance, phy2log: board.phy2log))
        var stalled = 0
        while stalled < 3, solved.balance < enough {
            guard let (next, found) = try bestChange(solved, loads, former, moves, most) else { break }
            stalled = found.balance - solved.balance < 1e-5 ? stalled + 1 : 0
            apply(next)
            pool.note()
            solved = found
            moves = former.moves(board)
            trajectory.add(.init(moves: moves, balance: solved.balance, phy2log: board.phy2log))
        }
        trajectory.isCut = moves + 2 > most
        return trajectory
    }

    private struct Solved {
        var balance: Double
        /// The ranks that are tight together.
        var witness: [Int]
    }

    private func solve(_ loads: [Int64]) throws(RuleViolation) -> Solved {
        let solver = FlowSolver(Network(try Placement(shape: shape, phy2log: board.phy2log)))
        loads.withUnsafeBufferPointer { loads in
            if let first = loads.baseAddress { solver.solve(loads: first) }
        }
        let words = solver.witness(ofGroup: 0), result = solver.results[0]
        let mean = Double(result.total) / Double(max(1, board.live.count))
        let witness = (0..<board.nRanks).filter { words[$0 / 32] >> UInt32($0 % 32) & 1 == 1 }
        return Solved(balance: result.maxLoad > 0 ? mean / Double(result.maxLoad) : 1, witness: witness)
    }

    /// Of the changes that look best the one that gives most a move, by the exact split. The witnesses so far tell which look best.
    private func bestChange(
        _ solved: Solved, _ loads: [Int64], _ former: Former, _ before: Int, _ most: Int
    ) throws(RuleViolation) -> (Change, Solved)? {
        let mean = loads.reduce(0.0) { $0 + Double($1) } / Double(max(1, board.live.count))
        var promising: [(gain: Double, moves: Int, change: Change)] = []
        promising.reserveCapacity(Repair.looked)
        for change in changes(solved.witness, loads) {
            let moves = change.cost(board, former)
            guard before + moves <= most else { continue }
            let (one, other) = change.edits(board)
            let gain = (mean / max(mean, pool.bound(one, other)) - solved.balance) / Double(max(moves, 1))
            if gain > 0 { promising.append((gain, max(moves, 1), change)) }
        }
        // Each solve brings a witness that bounds the others anew, so that few solves find the best change.
        var best: (change: Change, solved: Solved, gain: Double)?
        for number in 0..<Repair.mostSolves where best == nil || number < Repair.solves {
            var index = -1, gain = best?.gain ?? 0
            for other in promising.indices where promising[other].gain > gain { (index, gain) = (other, promising[other].gain) }
            if index < 0 { break }
            let (_, moves, change) = promising[index]
            promising.swapAt(index, promising.count - 1)
            promising.removeLast()
            let undo = apply(change)
            let found = try solve(loads)
            if (found.balance - solved.balance) / Double(moves) > best?.gain ?? 0 {
                best = (change, found, (found.balance - solved.balance) / Double(moves))
            }
            apply(undo)
            guard let set = pool.add(found.witness) else { continue }
            for index in promising.indices {
                let (one, other) = promising[index].change.edits(board)
                let bound = max(mean, pool.bound(one, other, by: set))
                promising[index].gain = min(promising[index].gain, (mean / bound - solved.balance) / Double(promising[index].moves))
            }
        }
        return best.map { ($0.change, $0.solved) }
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
    private func changes(_ witness: [Int], _ loads: [Int64]) -> [Change] {
        var isInside = [Bool](repeating: false, count: board.nRanks)
        for rank in witness { isInside[rank] = true }
        let inside = board.live.filter { isInside[$0] }, outside = board.live.filter { !isInside[$0] }
        guard !inside.isEmpty, !outside.isEmpty else { return [] }
        var held = [Bool](repeating: false, count: board.nLogical), targets: [Target] = []  // held: has a place outside
        for rank in outside {
            for slot in 0..<board.fill[rank] {
                let e = Int(board.expert[rank * board.width + slot])
                held[e] = true
                targets.append(Target(rank: rank, slot: slot, expert: Int32(e), load: Double(loads[e]), copies: board.copies[e]))
            }
        }
        var bound: [Target] = []  // can go nowhere else
        var counted = held, must = 0.0
        for rank in inside {
            for slot in 0..<board.fill[rank] {
                let e = Int(board.expert[rank * board.width + slot])
                if held[e] || loads[e] <= 0 { continue }
                bound.append(Target(rank: rank, slot: slot, expert: Int32(e), load: Double(loads[e]), copies: board.copies[e]))
                if !counted[e] { must += Double(loads[e]) }
                counted[e] = true
            }
        }
        let total = loads.reduce(0.0) { $0 + Double($1) }
        let excess = must - total * Double(inside.count) / Double(board.live.count)
        guard excess > 0 else { return [] }

        var picks: [Pick] = []
        for index in bound.indices { best(bound[index], index, excess, targets, &picks) }
        picks.sort { ($1.score, $0.bound, $0.target) < ($0.score, $1.bound, $1.target) }
        return diverse(picks, bound, targets)
    }

    /// An expert of the witness, or a slot outside of it and the expert that stands there.
    private struct Target {
        var rank: Int, slot: Int, expert: Int32
        var load: Double, copies: Int
    }

    /// What an expert of the witness and a slot outside of it promise, by their numbers.
    private struct Pick {
        var score: Double, bound: Int32, target: Int32
    }

    /// The best slots for one expert of the witness.
    private func best(_ one: Target, _ index: Int, _ excess: Double, _ targets: [Target], _ picks: inout [Pick]) {
        let first = picks.count, most = min(one.load, excess)
        var least = 0.0
        for number in targets.indices {
            // One move: a copy in a slot whose expert has another copy. Two moves: a lighter single from outside in exchange.
            let target = targets[number], shift = one.load - target.load
            let score: Double
            if target.copies > 1 {
                score = most - 0.5 * target.load / Double(target.copies)
                guard score > least, !board.holds(target.rank, one.expert) else { continue }
            } else {
                score = min(shift, 2 * excess - shift) / 2
                guard score > least, one.copies == 1 else { continue }
            }
            if picks.count - first == Repair.picked { picks.removeLast() }
            picks.append(Pick(score: score, bound: Int32(truncatingIfNeeded: index), target: Int32(truncatingIfNeeded: number)))
            var place = picks.count - 1
            while place > first && picks[place - 1].score < score {
                picks.swapAt(place, place - 1)
                place -= 1
            }
            if picks.count - first == Repair.picked { least = picks[picks.count - 1].score }
        }
    }

    /// At most a few changes for each slot and each expert, so that those looked at are not all alike.
    private func diverse(_ picks: [Pick], _ bound: [Target], _ targets: [Target]) -> [Change] {
        var bySlot = [Int8](repeating: 0, count: targets.count), byExpert = [Int8](repeating: 0, count: board.nLogical)
        var chosen: [Change] = []
        chosen.reserveCapacity(Repair.looked)
        for pick in picks {
            let slot = Int(pick.target), one = bound[Int(pick.bound)], target = targets[slot], e = Int(one.expert)
            if bySlot[slot] >= 2 || byExpert[e] >= 12 { continue }
            bySlot[slot] += 1
            byExpert[e] += 1
            var change = Change(rank: target.rank, slot: target.slot, expert: one.expert)
            if target.copies == 1 { (change.other, change.otherSlot, change.otherExpert) = (one.rank, one.slot, target.expert) }
            chosen.append(change)
            if chosen.count == Repair.looked { break }
        }
        return chosen
    }
}

/// A change: on `rank` (and `other`), `slot` (and `otherSlot`) get new experts.
private struct Change {
    var rank: Int, slot: Int, expert: Int32
    var other = -1, otherSlot = -1, otherExpert: Int32 = -1

    /// Moves that it adds.
    func cost(_ board: Board, _ former: Former) -> Int {
        let one = former.cost(board, rank, slot, expert)
        return other < 0 ? one : one + former.cost(board, other, otherSlot, otherExpert)
    }

    /// The two experts whose ranks it changes.
    @inline(__always)
    func edits(_ board: Board) -> (WitnessPool.Edit, WitnessPool.Edit) {
        let old = Int(board.expert[rank &* board.width &+ slot])
        return (.init(expert: Int(expert), from: other, to: rank), .init(expert: old, from: rank, to: other))
    }
}

/// Loads as whole tokens, scaled so that rounding does not matter.
func scaledLoads(_ weight: [Double]) -> [Int64] {
    let sum = weight.reduce(0, +)
    return weight.map { sum > 0 ? Int64(($0 / sum * Double(1 << 36)).rounded()) : 0 }
}
