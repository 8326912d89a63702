// Flow: the placement whose exact split is expected to be best when the loads drift. Several candidates are made, and scored by the solver.

import LPLBSolver
import LPLBTopology

/// Makes and scores candidates for one layer after another. The same inputs give the same placement.
final class FlowPolicy {
    private let shape: ExpertShape
    private let trial: Board
    private let scenarios: Scenarios
    private let repair: Repair
    /// How many scenarios the candidates of each round are scored on; the better half goes on to the next round.
    private static let rounds = [8, 24, 64]
    /// A placement made for exact dispatch must take this part of what the balanced one is expected to lose, or the balanced one is safer.
    private static let margin = 0.25
    /// The balance on the history itself that is good enough.
    private static let enough = 0.998
    /// Rings lose against hubs where there are more ranks than these.
    private static let ringRanks = 32
    /// Leaves suffer from what stands on them alone, so that less than half of an edge is best counted there; more where the drift is
    /// small.
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
        repair = Repair(shape: shape, capacity: capacity, width: width)
        scenarios = Scenarios(FlowPolicy.rounds.last ?? 1, nLogical: shape.nLogical, groupSize: groupSize, nSnapshots: nSnapshots)
    }

    /// Leaves the best candidate on `board`.
    func place(_ board: Board, _ drift: Drift, turn: Int) throws(RuleViolation) {
        scenarios.draw(drift)
        var candidates = try makeCandidates(drift, turn: turn)
        var balanced = candidates[0]
        for count in FlowPolicy.rounds where candidates.count > 1 {
            for index in candidates.indices { candidates[index].score(scenarios, count) }
            candidates.sort { ($0.cost, $0.number) < ($1.cost, $1.number) }
            candidates.removeLast(candidates.count / 2)
        }
        guard candidates[0].number != balanced.number else { return board.take(balanced.phy2log) }
        let best = try mended(candidates[0], drift)
        balanced.score(scenarios, scenarios.count)
        let loss = balanced.cost * Double(board.live.count) - 1
        let isBetter = best.cost * Double(board.live.count) - 1 <= loss * (1 - FlowPolicy.margin)
        board.take(isBetter && isSafe(best, balanced, drift) ? best.phy2log : balanced.phy2log)
    }

    /// What has been seen already must not be much worse than with the balanced placement.
    private func isSafe(_ best: Candidate, _ balanced: Candidate, _ drift: Drift) -> Bool {
        drift.snapshots.allSatisfy { best.part(of: $0) <= balanced.part(of: $0) * 1.01 }
    }

    /// What the history itself would lose, without any drift, is mended by exchanges, unless that costs more under drift.
    private func mended(_ candidate: Candidate, _ drift: Drift) throws(RuleViolation) -> Candidate {
        var candidate = candidate
        candidate.score(scenarios, scenarios.count)
        let steps = try repair.trajectory(candidate.phy2log[...], weight: drift.mean, most: shape.nPhysical, until: FlowPolicy.enough)
        guard steps.points.count > 1, let last = steps.points.last else { return candidate }
        var other = try Candidate(shape, last.phy2log, number: candidate.number)
        other.score(scenarios, scenarios.count)
        return other.cost <= candidate.cost * 1.002 ? other : candidate
    }

    /// The balanced placement first.
    private func makeCandidates(_ drift: Drift, turn: Int) throws(RuleViolation) -> [Candidate] {
        var made: [[Int32]] = []
        drift.mean.withUnsafeBufferPointer { mean in
            guard let weight = mean.baseAddress else { return }
            placeBalanced(trial, weight: weight, tolerance: 0.0005)
        }
        made.append(trial.phy2log)
        for form in FlowPolicy.forms where placeHubs(trial, drift, form, turn: turn) { made.append(trial.phy2log) }
        if made.count == 1 || trial.live.count <= FlowPolicy.ringRanks {
            for steps in [[1, 2], [1, 3]] where placeRing(trial, drift, steps: steps, turn: turn) { made.append(trial.phy2log) }
        }
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
    private var sum = 0.0, scored = 0

    init(_ shape: ExpertShape, _ phy2log: [Int32], number: Int) throws(RuleViolation) {
        self.phy2log = phy2log
        self.number = number
        solver = FlowSolver(Network(try Placement(shape: shape, phy2log: phy2log)))
    }

    /// The heaviest rank's part of all tokens, as the mean over the scenarios so far.
    var cost: Double { sum / Double(max(1, scored)) }

    /// Adds the scenarios up to a number of them.
    mutating func score(_ scenarios: Scenarios, _ count: Int) {
        let nLogical = solver.network.shape.nLogical
        for number in scored..<max(scored, count) {
            solver.solve(loads: UnsafePointer(scenarios.loads + number * nLogical))
            sum += Double(solver.results[0].maxLoad) / Double(max(1, solver.results[0].total))
        }
        scored = max(scored, count)
    }

    /// The heaviest rank's part of given loads.
    func part(of loads: [Double]) -> Double {
        loads.map { Int64($0 + 0.5) }.withUnsafeBufferPointer { if let first = $0.baseAddress { solver.solve(loads: first) } }
        return Double(solver.results[0].maxLoad) / Double(max(1, solver.results[0].total))
    }
}
