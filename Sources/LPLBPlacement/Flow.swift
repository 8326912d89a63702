// Flow: the placement whose exact split is expected to be best when the loads drift. Several candidates are made, and scored by the solver.

import LPLBSolver
import LPLBTopology

/// Makes and scores candidates for one layer after another. The same inputs give the same placement.
final class FlowPolicy {
    private let shape: ExpertShape
    private let trial: Board
    private let scenarios: Scenarios
    /// How many scenarios the candidates of each round are scored on; the better half goes on to the next round.
    private static let rounds = [8, 24, 64]

    /// Leaves suffer from what stands on them alone, so that less than half of an edge is best counted there; more where the drift is small.
    private static let forms = (1...4).flatMap { edges in
        [
            HubForm(edges: edges, part: 0.2), HubForm(edges: edges, part: 0.5), HubForm(edges: edges, extraHubs: 1, part: 0.2),
            HubForm(edges: edges, more: 2, part: 0.2),
        ]
    }

    /// - Parameter shape: of boards as `Board.phy2log` gives them.
    init(shape: ExpertShape, capacity: [Int], width: Int, groupSize: Int, nSnapshots: Int) {
        self.shape = shape
        trial = Board(nLogical: shape.nLogical, capacity: capacity, width: width)
        scenarios = Scenarios(64, nLogical: shape.nLogical, groupSize: groupSize, nSnapshots: nSnapshots)
    }

    /// Leaves the best candidate on `board`.
    func place(_ board: Board, _ drift: Drift, turn: Int) throws(RuleViolation) {
        var candidates = try makeCandidates(drift, turn: turn)
        scenarios.draw(drift)
        var from = 0
        for to in FlowPolicy.rounds where candidates.count > 1 {
            for index in candidates.indices { candidates[index].add(scenarios, from..<to) }
            from = to
            candidates.sort { ($0.cost, $0.number) < ($1.cost, $1.number) }
            candidates.removeLast(candidates.count / 2)
        }
        candidates.sort { ($0.cost, $0.number) < ($1.cost, $1.number) }
        board.take(candidates[0].phy2log)
    }

    private func makeCandidates(_ drift: Drift, turn: Int) throws(RuleViolation) -> [Candidate] {
        var made: [[Int32]] = []
        drift.mean.withUnsafeBufferPointer { mean in
            if let weight = mean.baseAddress {
                placeBalanced(trial, weight: weight, tolerance: 0.0005)
                made.append(trial.phy2log)
            }
        }
        for form in FlowPolicy.forms where placeHubs(trial, drift, form, turn: turn) { made.append(trial.phy2log) }
        for steps in [[1, 2], [1, 3]] where placeRing(trial, drift, steps: steps, turn: turn) { made.append(trial.phy2log) }
        var candidates: [Candidate] = []
        for phy2log in made { candidates.append(try Candidate(shape, phy2log, number: candidates.count)) }
        return candidates
    }
}
/// A placement and what its exact split came to so far.
private struct Candidate {
    let phy2log: [Int32]
    let number: Int
    private let solver: FlowSolver
    private var sum = 0.0

    init(_ shape: ExpertShape, _ phy2log: [Int32], number: Int) throws(RuleViolation) {
        self.phy2log = phy2log
        self.number = number
        solver = FlowSolver(Network(try Placement(shape: shape, phy2log: phy2log)))
    }

    var cost: Double { sum }

    mutating func add(_ scenarios: Scenarios, _ numbers: Range<Int>) {
        for number in numbers {
            solver.solve(loads: UnsafePointer(scenarios.loads + number * solver.network.shape.nLogical))
            sum += Double(solver.results[0].maxLoad) / Double(max(1, solver.results[0].total))
        }
    }
}
