// Judge: what a placement is worth, whoever made it: balance, homes and copies, and tokens that leave their rank.

import LPLBSolver
import LPLBTopology

/// Figures of one layer's placement; those that were not asked for stay as they are here.
public struct LayerFigures: Sendable, Equatable {
    /// mean / max load of the ranks that hold experts, with an even split over replicas and with the exact one.
    public var evenBalance = 1.0, exactBalance = 1.0
    /// Slots that hold an expert which their rank holds in another slot, too.
    public var duplicates = 0
    public var copies: CopyCounts?
    /// Shares of the tokens that leave their rank and their host, and what reaches each rank from others over the mean load.
    public var leavesRank = 0.0, leavesNode = 0.0
    public var inbound: [Double] = []
}

public struct Figures: OptionSet, Sendable {
    public let rawValue: Int
    public init(rawValue: Int) { self.rawValue = rawValue }

    public static let exactBalance = Figures(rawValue: 1), copies = Figures(rawValue: 2), locality = Figures(rawValue: 4)
    /// These need a history.
    public static let evenBalance = Figures(rawValue: 8)
}

/// The figures of every layer of a placement.
/// - Parameters:
///   - request: sizes and hosts.
///   - phy2log: [nLayers][width * ranks], every expert at least once in each layer, -1 for empty slots.
///   - history: as for `place`; nil: `wanted` has nothing but copies.
public func judge(
    _ request: PlaceRequest, phy2log: UnsafeBufferPointer<Int32>, history: UnsafeBufferPointer<Double>?, wanted: Figures
) throws(RuleViolation) -> [LayerFigures] {
    if let history { try request.check(history) }
    let shape = try ExpertShape(
        epSize: request.slots.count, nNodes: 1, groupSize: 0, nLogical: request.nLogical, nPhysical: request.slotsPerLayer)
    var result: [LayerFigures] = []
    for layer in 0..<request.nLayers {
        let slots = Array(phy2log[layer * request.slotsPerLayer..<(layer + 1) * request.slotsPerLayer])
        let weight = history.map { request.weight(of: layer, $0) }
        try request.check(slots, layer: layer)
        result.append(try LayerFigures(Placement(shape: shape, phy2log: slots), weight, nNodes: request.nNodes, wanted: wanted))
    }
    return result
}

extension PlaceRequest {
    /// Checks a layer of a placement that somebody else made.
    fileprivate func check(_ slots: [Int32], layer: Int) throws(RuleViolation) {
        var found = [Bool](repeating: false, count: nLogical)
        for (slot, e) in slots.enumerated() where e != -1 {
            guard e >= 0 && e < nLogical else {
                throw RuleViolation(
                    "phy2log[\(layer)][\(slot)]", "must be a logical expert, 0 .. \(nLogical - 1), or -1 for none", value: e)
            }
            found[Int(e)] = true
        }
        if let e = found.firstIndex(of: false) {
            throw RuleViolation("phy2log[\(layer)]", "must hold every logical expert at least once", value: "no slot for expert \(e)")
        }
    }
}

extension LayerFigures {
    /// - Parameter weight: [nLogical] loads; nil: 0.
    init(_ placement: Placement, _ weight: [Double]?, nNodes: Int, wanted: Figures) throws(RuleViolation) {
        let shape = placement.shape
        let used = (0..<shape.epSize).map { rank in
            placement.phy2log[rank * shape.nLocal..<(rank + 1) * shape.nLocal].reduce(0) { $0 + ($1 >= 0 ? 1 : 0) }
        }
        let board = Board(nLogical: shape.nLogical, capacity: used, width: shape.nLocal)
        board.take(placement.phy2log)
        duplicates = board.duplicates
        if wanted.contains(.copies) { copies = try CopyCounts(placement) }
        guard let weight else { return }
        if wanted.contains(.evenBalance) {
            weight.withUnsafeBufferPointer { if let first = $0.baseAddress { board.weigh(first) } }
            evenBalance = board.balance
        }
        if wanted.contains(.exactBalance) { exactBalance = LayerFigures.exactBalance(placement, weight, live: board.live.count) }
        guard wanted.contains(.locality) else { return }
        let locality = Locality(placement, weight: weight, nNodes: nNodes)
        (leavesRank, leavesNode, inbound) = (locality.leavesRank, locality.leavesNode, locality.inbound)
    }

    /// mean / max load of `live` ranks with the exact split; 1 without any load.
    static func exactBalance(_ placement: Placement, _ weight: [Double], live: Int) -> Double {
        let solver = FlowSolver(Network(placement)), loads = scaledLoads(weight)
        loads.withUnsafeBufferPointer { solver.solve(loads: $0.baseAddress!) }
        let most = solver.results[0].maxLoad
        return most > 0 ? Double(loads.reduce(0, +)) / Double(live) / Double(most) : 1
    }
}
