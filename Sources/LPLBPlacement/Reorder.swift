// Reorder: spreads the experts over the ranks by past loads, without replicas, for placements by a topology.

import LPLBTopology

/// The order in which a topology placement should hold the experts: EPLB without replication (groups and nodes of `shape`), then every
/// rank's experts sorted by history, heaviest first, since the first ones of a rank are those that get copies. Experts with equal history
/// stay in the order in which EPLB packed them.
///
/// EPLB itself sees the history rounded to float32, the sorting of a rank sees all of it.
/// - Parameter history: [nLogical], tokens per expert over some past: finite, not negative.
/// - Returns: `order` [nLogical], rank-major, as `Placement.init(shape:topology:order:)` takes it.
/// - Throws: a `RuleViolation` if `epSize` does not divide `nLogical`, or about the history.
public func reorderByHistory(_ history: [Double], shape: ExpertShape) throws(RuleViolation) -> [Int32] {
    let nLogical = shape.nLogical
    if nLogical % shape.epSize != 0 {
        throw RuleViolation("n_logical", "must be a multiple of ep_size \(shape.epSize) to be reordered", value: nLogical)
    }
    if history.count != nLogical { throw RuleViolation("history", "must have n_logical \(nLogical) entries", value: history.count) }
    for expert in 0..<nLogical where !(history[expert].isFinite && history[expert] >= 0) {
        throw RuleViolation("history[\(expert)]", "must be finite and not negative", value: history[expert])
    }

    let hierarchical = shape.nGroups % shape.nNodes == 0
    let workspace = EPLBWorkspace(
        EPLBSizes(
            nLogical: nLogical, nPhysical: nLogical, nGroups: hierarchical ? shape.nGroups : 1, nNodes: hierarchical ? shape.nNodes : 1,
            nRanks: shape.epSize))
    let weight = UnsafeMutablePointer<Float>.allocate(capacity: nLogical)
    defer { weight.deallocate() }
    for expert in 0..<nLogical { weight[expert] = Float(history[expert]) }
    workspace.balance(weight)

    var order = [Int32](UnsafeBufferPointer(start: workspace.slotExpert, count: nLogical))
    let nLocal = nLogical / shape.epSize
    order.withUnsafeMutableBufferPointer { order in
        history.withUnsafeBufferPointer { history in
            for rank in 0..<shape.epSize {
                sortDescending(UnsafeMutableBufferPointer(rebasing: order[rank &* nLocal..<(rank &+ 1) &* nLocal]), by: history)
            }
        }
    }
    return order
}

/// Stable. The experts come in descending order of their rounded loads, so that hardly any has to move.
private func sortDescending(_ experts: UnsafeMutableBufferPointer<Int32>, by history: UnsafeBufferPointer<Double>) {
    var moves = 0
    for i in 1..<max(experts.count, 1) {
        let expert = experts[i]
        var j = i
        while j > 0 && history[Int(experts[j &- 1])] < history[Int(expert)] {
            experts[j] = experts[j &- 1]
            j &-= 1
        }
        experts[j] = expert
        moves &+= i &- j
        // Many loads that are equal only after rounding: leave the quadratic way. What is done so far was stable, so this is too.
        if moves > 16 &* experts.count { return mergeSortDescending(experts, by: history) }
    }
}

private func mergeSortDescending(_ experts: UnsafeMutableBufferPointer<Int32>, by history: UnsafeBufferPointer<Double>) {
    let pairs = experts.enumerated().sorted { a, b in
        let (x, y) = (history[Int(a.element)], history[Int(b.element)])
        return x == y ? a.offset < b.offset : x > y
    }
    for (i, pair) in pairs.enumerated() { experts[i] = pair.element }
}
