// Place: one call for every placement policy, over all layers of a history.

import LPLBSolver
import LPLBTopology

/// What is placed: on which ranks, by which policy, from which past.
public struct PlaceRequest {
    /// The policies by name; the numbers are those of lplb.h.
    public enum Policy: Int32, CaseIterable, Sendable {
        case flow = 0, balanced, deepseek, repair
    }

    public var policy = Policy.flow
    public var nSnapshots = 1, nLayers = 0, nLogical = 0
    /// Slots of every rank; 0 for a rank that is dead.
    public var slots: [Int] = []
    /// Hosts, and groups of experts that are selected together; 1 and 1 for none.
    public var nNodes = 1, nGroups = 1
    /// `balanced` stops within this part of the mean.
    public var tolerance = 0.0005
    /// nil or [nLayers][width * ranks], -1 for empty slots: the placement in force.
    public var previous: [Int32]?
    /// The most slots, over all layers, that may take an expert which their rank did not hold; nil: any number.
    public var maxMoves: Int?
    /// Every rank shall be able to own equally many experts.
    public var evenHomes = false

    /// Slots that each rank has in the arrays; at least those of the largest rank.
    public var width = 0

    public init() {}

    public var slotsPerLayer: Int { width * slots.count }
    public var historyCount: Int { nSnapshots * nLayers * nLogical }
}

/// What a layer's placement is worth.
public struct PlaceReport: Sendable, Equatable {
    /// mean / max load of the live ranks on the history, with an even split over replicas and with the exact one.
    public var evenBalance = 1.0, exactBalance = 1.0
    /// Slots that hold an expert which their rank holds in another slot, too.
    public var duplicates = 0
    /// Experts that stand on a rank where the previous placement did not have them; 0 without one.
    public var moves = 0
}

/// Places every layer.
/// - Parameters:
///   - history: [nSnapshots][nLayers][nLogical], tokens per expert, finite, not negative.
///   - phy2log: [nLayers][width * ranks], written; -1 where a rank has no slot or the slot stays empty.
///   - isJudged: whether reports are wanted: the solver needs time for them.
/// - Returns: a report for each layer, or none.
/// - Throws: a `RuleViolation`; nothing is written then.
public func place(
    _ request: PlaceRequest, history: UnsafeBufferPointer<Double>, phy2log: UnsafeMutablePointer<Int32>, isJudged: Bool = true
) throws(RuleViolation) -> [PlaceReport] {
    try request.check(history)
    guard request.nLayers > 0 else { return [] }
    let board = Board(nLogical: request.nLogical, capacity: request.slots, width: request.width)
    let shape = try ExpertShape(
        epSize: request.slots.count, nNodes: 1, groupSize: 0, nLogical: request.nLogical, nPhysical: request.slotsPerLayer)
    var result: [[Int32]] = []
    result.reserveCapacity(request.nLayers)
    var placer = try Placer(request, shape, history)
    let classes = request.interchangeable
    for layer in 0..<request.nLayers {
        try placer.place(layer, on: board)
        if request.evenHomes { try makeHomesEven(board, request, shape, history, layer: layer) }
        if let previous = request.previous(of: layer), let classes, request.budget == nil { keepExperts(board, previous, classes: classes) }
        result.append(settled(board, request.previous(of: layer)))
    }
    if request.previous == nil && classes != nil { try nameRanks(&result, request, history, shape) }
    let reports = isJudged ? try request.reports(on: result, board, shape, history) : []
    for (layer, slots) in result.enumerated() { (phy2log + layer * request.slotsPerLayer).update(from: slots, count: slots.count) }
    return reports
}

/// Which policy places a layer, and what it keeps from layer to layer.
private struct Placer {
    private let request: PlaceRequest, history: UnsafeBufferPointer<Double>
    private let flow: FlowPolicy?
    /// The placement of each layer where moves are limited.
    private var points: [Trajectory.Point] = []

    init(_ request: PlaceRequest, _ shape: ExpertShape, _ history: UnsafeBufferPointer<Double>) throws(RuleViolation) {
        (self.request, self.history) = (request, history)
        flow =
            request.policy == .flow && request.budget == nil
            ? FlowPolicy(
                shape: shape, capacity: request.slots, width: request.width, groupSize: request.driftGroup, nSnapshots: request.nSnapshots)
            : nil
        guard let budget = request.budget else { return }
        let repair = Repair(shape: shape, capacity: request.slots, width: request.width)
        let search = BudgetSearch(
            nLogical: request.nLogical, capacity: request.slots, width: request.width,
            ranksPerNode: request.isHierarchical ? request.slots.count / request.nNodes : request.slots.count,
            groupSize: request.isHierarchical ? request.nLogical / request.nGroups : request.nLogical)
        let threshold = budget * 14 > request.nLayers * request.slots.reduce(0, +) ? 1.005 : 1.01
        points = try Trajectory.spend(budget, over: request.nLayers) { (layer, most) throws(RuleViolation) in
            let previous = request.previous(of: layer) ?? [], weight = request.weight(of: layer, history)
            return request.policy == .balanced
                ? search.trajectory(previous, weight: weight, most: most, threshold: threshold)
                : try repair.trajectory(previous, weight: weight, most: most)
        }
    }

    mutating func place(_ layer: Int, on board: Board) throws(RuleViolation) {
        let weight = request.weight(of: layer, history)
        if !points.isEmpty {
            board.take(points[layer].phy2log)
        } else if request.policy == .deepseek {
            board.take(try request.deepseek(weight))
        } else if let flow {
            try flow.place(board, Drift(snapshots: request.snapshots(of: layer, history), groupSize: request.driftGroup), turn: layer)
        } else {
            weight.withUnsafeBufferPointer { weight in
                guard let first = weight.baseAddress else { return }
                if request.isHierarchical {
                    placeBalancedInNodes(
                        board, weight: first, nNodes: request.nNodes, nGroups: request.nGroups, tolerance: request.tolerance)
                } else {
                    placeBalanced(board, weight: first, tolerance: request.tolerance)
                }
            }
        }
        weight.withUnsafeBufferPointer { if let first = $0.baseAddress { board.weigh(first) } }
    }
}

extension PlaceRequest {
    /// Experts of one routing group, which drift together: those that are selected together, or 32.
    var driftGroup: Int { nGroups > 1 ? nLogical / nGroups : min(32, nLogical) }

    /// A layer's loads, scaled by a power of two so that sums neither overflow nor vanish.
    func snapshots(of layer: Int, _ history: UnsafeBufferPointer<Double>) -> [[Double]] {
        let rows = (0..<nSnapshots).map { history[($0 * nLayers + layer) * nLogical..<($0 * nLayers + layer + 1) * nLogical] }
        let most = rows.reduce(0.0) { max($0, $1.max() ?? 0) }
        return rows.map { row in row.map { most > 0 ? Double(sign: .plus, exponent: 20 - Int(most.exponent), significand: $0) : 0 } }
    }

    /// The sum of a layer's snapshots.
    func weight(of layer: Int, _ history: UnsafeBufferPointer<Double>) -> [Double] {
        let snapshots = snapshots(of: layer, history)
        var sum = snapshots.first ?? []
        for row in snapshots.dropFirst() { for e in sum.indices { sum[e] += row[e] } }
        return sum
    }

    /// Expert groups go to hosts first: where they can be shared out evenly, as in DeepSeek's rule.
    var isHierarchical: Bool { nNodes > 1 && nGroups % nNodes == 0 && (policy == .balanced || policy == .deepseek) }

    /// DeepSeek's program, whose ties go to the lowest index.
    func deepseek(_ weight: [Double]) throws(RuleViolation) -> [Int32] {
        var slots = [Int64](repeating: -1, count: slotsPerLayer)
        let floats = weight.map { Float($0) }
        do {
            try floats.withUnsafeBufferPointer { floats in
                try slots.withUnsafeMutableBufferPointer { slots in
                    try rebalance(
                        weight: floats, nLayers: 1, nLogical: nLogical, nPhysical: slotsPerLayer, nGroups: nGroups, nNodes: nNodes,
                        nRanks: self.slots.count, phy2log: slots.baseAddress, replica: nil, logcnt: nil)
                }
            }
        } catch let error as RuleViolation {
            throw error
        } catch {
            throw RuleViolation("policy", "deepseek failed", value: "\(error)")
        }
        return slots.map { Int32(truncatingIfNeeded: $0) }
    }

    func previous(of layer: Int) -> ArraySlice<Int32>? { previous?[layer * slotsPerLayer..<(layer + 1) * slotsPerLayer] }

    /// The moves that all layers may take together, where they are limited: always for repair, 1% of the slots unless more are allowed.
    var budget: Int? {
        guard previous != nil else { return nil }
        let slots = nLayers * slots.reduce(0, +)
        return policy == .repair ? min(maxMoves ?? max(1, slots / 100), slots) : maxMoves.map { min($0, slots) }
    }

    /// Checks all sizes; any integers may be given.
    public func checkSizes() throws(RuleViolation) {
        for (name, value, least, most) in [
            ("n_snapshots", nSnapshots, 1, 1 << 16), ("n_layers", nLayers, 0, 1 << 20), ("n_logical", nLogical, 1, Limits.maxLogical),
            ("n_ranks", slots.count, 1, Limits.maxRanks), ("n_nodes", nNodes, 1, slots.count), ("n_groups", nGroups, 1, nLogical),
        ] where value < least || value > most {
            throw RuleViolation(name, "must lie in \(least) .. \(most)", value: value)
        }
        if slotsPerLayer > Limits.maxPhysical {
            throw RuleViolation("n_slots", "n_ranks * n_slots must be at most \(Limits.maxPhysical)", value: width)
        }
        let total = slots.reduce(0, +)
        if total < nLogical { throw RuleViolation("slots", "must be at least n_logical \(nLogical) in all", value: total) }
        if slots.count % nNodes != 0 { throw RuleViolation("n_nodes", "must divide n_ranks \(slots.count)", value: nNodes) }
        if isHierarchical && nLogical % nGroups != 0 {
            throw RuleViolation("n_groups", "must divide n_logical \(nLogical)", value: nGroups)
        }
        for node in 0..<(isHierarchical ? nNodes : 0) {
            let perNode = slots.count / nNodes, mine = slots[node * perNode..<(node + 1) * perNode].reduce(0, +)
            if mine < nLogical / nNodes {
                throw RuleViolation("slots", "must be at least n_logical / n_nodes \(nLogical / nNodes) on each node", value: mine)
            }
        }
        if policy == .deepseek, let uneven = slots.first(where: { $0 != width }) {
            throw RuleViolation("policy", "deepseek needs equally many slots on every rank; balanced and flow do not", value: "a rank with \(uneven)")
        }
        if policy == .repair && previous == nil {
            throw RuleViolation("previous", "must be given with policy repair, which changes it", value: "none")
        }
        if historyCount > 1 << 32 { throw RuleViolation(.unsupported, "n_layers", "history must have at most 2^32 entries", value: nLayers) }
    }

    func check(_ history: UnsafeBufferPointer<Double>) throws(RuleViolation) {
        if let previous {
            if previous.count != nLayers * slotsPerLayer {
                throw RuleViolation("previous", "must have n_layers * n_ranks * n_slots entries", value: previous.count)
            }
            for (index, e) in previous.enumerated() where e < -1 || e >= nLogical {
                let layer = index / slotsPerLayer
                throw RuleViolation(
                    "previous[\(layer)][\(index % slotsPerLayer)]", "must be a logical expert, 0 .. \(nLogical - 1), or -1 for none", value: e)
            }
        }
        for index in history.indices where !(history[index].isFinite && history[index] >= 0) {
            let layer = index / nLogical % nLayers
            throw RuleViolation(
                "history[\(index / nLogical / nLayers)][\(layer)][\(index % nLogical)]", "must be finite and not negative",
                value: history[index])
        }
    }
}

/// Copies of an expert go to different hosts; and over all layers no rank gets more copies to send than others, where there are hubs or
/// the placement is for training.
private func nameRanks(
    _ layers: inout [[Int32]], _ request: PlaceRequest, _ history: UnsafeBufferPointer<Double>, _ shape: ExpertShape
) throws(RuleViolation) {
    let perNode = request.slots.count / request.nNodes, spreads = request.nNodes > 1 && !request.isHierarchical
    for (layer, slots) in layers.enumerated() where spreads {
        let weight = request.weight(of: layer, history)
        let spread = spreadOverHosts(slots, weight: weight, slots: request.slots, nNodes: request.nNodes)
        func leavesNode(_ phy2log: [Int32]) throws(RuleViolation) -> Double {
            Locality(try Placement(shape: shape, phy2log: phy2log), weight: weight, nNodes: request.nNodes).leavesNode
        }
        if try leavesNode(spread) < leavesNode(slots) { layers[layer] = spread }
    }
    guard request.policy == .flow || request.evenHomes else { return }
    if spreads {
        let alike = Dictionary(grouping: 0..<request.nNodes) { node in Array(request.slots[node * perNode..<(node + 1) * perNode]) }
        try rotate(&layers, classes: alike.values.sorted { $0[0] < $1[0] }, shape: shape, block: perNode)
    }
    try rotate(&layers, classes: request.ranks(ofEach: perNode), shape: shape)
}

extension PlaceRequest {
    /// What the placements are worth on the history that they were made from.
    fileprivate func reports(
        on layers: [[Int32]], _ board: Board, _ shape: ExpertShape, _ history: UnsafeBufferPointer<Double>
    ) throws(RuleViolation) -> [PlaceReport] {
        var reports: [PlaceReport] = []
        for (layer, slots) in layers.enumerated() {
            let weight = weight(of: layer, history)
            var report = PlaceReport()
            board.take(slots)
            weight.withUnsafeBufferPointer { if let first = $0.baseAddress { board.weigh(first) } }
            (report.evenBalance, report.duplicates) = (board.balance, board.duplicates)
            if let previous = previous(of: layer) {
                report.moves = Former(previous, nRanks: board.nRanks, nLogical: board.nLogical).moves(board)
            }
            let placement = try Placement(shape: shape, phy2log: slots)
            report.exactBalance = LayerFigures.exactBalance(placement, weight, live: board.live.count)
            reports.append(report)
        }
        return reports
    }

    /// Ranks that may take each other's part of a placement: those with equally many slots, on one host where groups of experts stay on
    /// hosts. nil for DeepSeek's program, whose result is known.
    fileprivate var interchangeable: [[Int]]? {
        policy == .deepseek ? nil : ranks(ofEach: isHierarchical ? slots.count / nNodes : slots.count)
    }

    /// Ranks with equally many slots in each block of so many ranks.
    fileprivate func ranks(ofEach block: Int) -> [[Int]] {
        Dictionary(grouping: slots.indices) { rank in [rank / block, slots[rank]] }.values.sorted { $0[0] < $1[0] }
    }
}
