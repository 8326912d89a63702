// Rebalance: the EPLB policy for many layers at once: which expert each slot holds, so that past loads spread evenly over the ranks.

import LPLBTopology

/// Physical experts beyond this are refused: every size then fits 32-bit indices, and replica counts are exact as float32.
let maxSlots = 1 << 20

/// EPLB for `nLayers` layers. If `nNodes` divides `nGroups` hierarchical: expert groups to nodes, replicas inside the node, slots to ranks;
/// else global, as with one group and one node. Ties go to the lowest index. Equal inputs give equal results.
///
/// For a layer, with n physical and m redundant experts: O(n log ranks + m log experts + n), all memory allocated once a call.
/// - Parameters:
///   - weight: [nLayers][nLogical], tokens per expert over some past: finite, not negative.
///   - phy2log: nil or [nLayers][nPhysical]: the expert of each slot.
///   - replica: nil or [nLayers][nPhysical]: which replica of its expert a slot is, from 0.
///   - logcnt: nil or [nLayers][nLogical]: replicas of each expert.
/// - Throws: a `RuleViolation` if `nLogical <= nPhysical` fails, if `nRanks` does not divide `nPhysical`, in the hierarchical case if
///   `nNodes` does not divide `nRanks` or `nGroups` not `nLogical`, or if a weight is no load. Nothing is written then.
public func rebalance(
    weight: UnsafeBufferPointer<Float>, nLayers: Int, nLogical: Int, nPhysical: Int, nGroups: Int, nNodes: Int, nRanks: Int,
    phy2log: UnsafeMutablePointer<Int64>?, replica: UnsafeMutablePointer<Int64>?, logcnt: UnsafeMutablePointer<Int64>?
) throws(RuleViolation) {
    let size = try rebalanceWeightCount(
        nLayers: nLayers, nLogical: nLogical, nPhysical: nPhysical, nGroups: nGroups, nNodes: nNodes, nRanks: nRanks)
    if weight.count != size { throw RuleViolation("weight", "must have n_layers * n_logical = \(size) entries", value: weight.count) }
    guard let weights = weight.baseAddress, size > 0 else { return }
    try checkWeights(weights, nLayers: nLayers, nLogical: nLogical)

    let hierarchical = nGroups % nNodes == 0
    let workspace = EPLBWorkspace(
        EPLBSizes(
            nLogical: nLogical, nPhysical: nPhysical, nGroups: hierarchical ? nGroups : 1, nNodes: hierarchical ? nNodes : 1,
            nRanks: nRanks))
    for layer in 0..<nLayers {
        workspace.balance(weights + layer &* nLogical)
        widen(workspace.slotExpert, phy2log, layer, nPhysical)
        widen(workspace.slotReplica, replica, layer, nPhysical)
        widen(workspace.count, logcnt, layer, nLogical)
    }
}

/// Checks all sizes of `rebalance` (any integers may be given) and returns nLayers * nLogical, for callers that hold a bare pointer.
public func rebalanceWeightCount(
    nLayers: Int, nLogical: Int, nPhysical: Int, nGroups: Int, nNodes: Int, nRanks: Int
) throws(RuleViolation) -> Int {
    if nLayers < 0 { throw RuleViolation("n_layers", "must be at least 0", value: nLayers) }
    for (name, value) in [
        ("n_logical", nLogical), ("n_physical", nPhysical), ("n_groups", nGroups), ("n_nodes", nNodes), ("n_ranks", nRanks),
    ] where value < 1 {
        throw RuleViolation(name, "must be at least 1", value: value)
    }
    if nPhysical > maxSlots { throw RuleViolation(.unsupported, "n_physical", "must be at most \(maxSlots)", value: nPhysical) }
    if nPhysical < nLogical { throw RuleViolation("n_physical", "must be at least n_logical \(nLogical)", value: nPhysical) }
    if nPhysical % nRanks != 0 { throw RuleViolation("n_physical", "must be a multiple of n_ranks \(nRanks)", value: nPhysical) }
    // The global case knows neither groups nor nodes, and DeepSeek's program accepts any numbers of them there.
    if nGroups % nNodes == 0 {
        if nRanks % nNodes != 0 { throw RuleViolation("n_ranks", "must be a multiple of n_nodes \(nNodes)", value: nRanks) }
        if nLogical % nGroups != 0 { throw RuleViolation("n_logical", "must be a multiple of n_groups \(nGroups)", value: nLogical) }
    }
    // In the hierarchical case nNodes divides nRanks and so nPhysical, and nGroups and so nLogical.
    if nLayers.multipliedReportingOverflow(by: nPhysical * 8).overflow {
        throw RuleViolation(.unsupported, "n_layers", "n_layers * n_physical must fit the memory", value: nLayers)
    }
    return nLayers * nLogical
}

/// Refuses NaN, infinities and negative numbers; -0 is fine.
private func checkWeights(_ weights: UnsafePointer<Float>, nLayers: Int, nLogical: Int) throws(RuleViolation) {
    // One branch a layer: as integers, the bits of all other floats lie above those of the largest finite one.
    let largest = Float.greatestFiniteMagnitude.bitPattern, minusZero = (-Float.zero).bitPattern
    for layer in 0..<nLayers {
        let row = weights + layer &* nLogical
        var bad: UInt32 = 0
        for i in 0..<nLogical {
            let bits = row[i].bitPattern
            bad |= bits > largest && bits != minusZero ? 1 : 0
        }
        if bad == 0 { continue }
        for i in 0..<nLogical where !(row[i].isFinite && row[i] >= 0) {
            throw RuleViolation("weight[\(layer)][\(i)]", "must be finite and not negative", value: row[i])
        }
    }
}

@inline(__always)
private func widen(_ from: UnsafePointer<Int32>, _ to: UnsafeMutablePointer<Int64>?, _ layer: Int, _ n: Int) {
    guard let to else { return }
    let row = to + layer &* n
    for i in 0..<n { row[i] = Int64(from[i]) }
}
