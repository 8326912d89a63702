// Certificate: recomputes a bound from its witness, from the placement alone, so that nobody has to trust the solver.

import LPLBTopology

/// A bound that holds for every split: the tokens that cannot leave the ranks of a set S, divided by their number, rounded up. Those are
/// the tokens of the experts whose replicas all stand on ranks of S. The split is optimal if its largest load equals this. 0 for an empty
/// set.
/// - Parameters:
///   - loads: [nLogical], each 0 ... 2^40
///   - witness: `FlowSolver.witnessWords` words; bit r: rank r of the group is in S.
/// - Complexity: O(nPhysical)
func certifiedBound(loads: UnsafePointer<Int64>, placement: Placement, group: Int, witness: UnsafePointer<UInt32>) -> Int64 {
    let shape = placement.shape
    let first = group * shape.groupSize
    var size = 0
    for rank in 0..<shape.groupSize where witness[rank >> 5] >> UInt32(rank & 31) & 1 != 0 { size += 1 }
    if size == 0 { return 0 }
    var tokens: Int64 = 0
    for expert in 0..<shape.nLogical {
        var inside = true
        for k in Int(placement.replicaStart[expert])..<Int(placement.replicaStart[expert + 1]) {
            let rank = Int(placement.replicaSlot[k]) / shape.nLocal - first
            if rank < 0 || rank >= shape.groupSize || witness[rank >> 5] >> UInt32(rank & 31) & 1 == 0 {
                inside = false
                break
            }
        }
        if inside { tokens &+= loads[expert] }
    }
    return (tokens + Int64(size) - 1) / Int64(size)
}
