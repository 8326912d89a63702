// Placement: which logical expert each slot holds, and the slots of each expert.

/// A checked assignment of logical experts to slots. The slots of an expert ("replicas") are listed with the original first; all of them
/// lie inside one group of ranks. Building one costs O(nPhysical) and four small allocations.
public struct Placement: Sendable {
    public let shape: ExpertShape
    /// [nPhysical]: the logical expert of each slot, -1 for an empty one.
    public let phy2log: [Int32]
    /// [nLogical + 1]: the replicas of expert e are `replicaSlot[replicaStart[e] ..< replicaStart[e + 1]]`.
    public let replicaStart: [Int32]
    /// The slots that hold an expert, by expert, original first.
    public let replicaSlot: [Int32]
    /// The topology that placed the copies; nil in general placements.
    public let topology: RedundancyTopology?
    /// m: experts of a rank that share one redundant column. 0 in general placements and without copies.
    public let combined: Int
    /// The largest number of replicas of an expert.
    public let maxReplicas: Int

    /// A general placement. The replicas of an expert are ordered by slot.
    /// - Parameter phy2log: [nPhysical], every logical expert at least once, the replicas of an expert all within one group; -1: empty.
    public init(shape: ExpertShape, phy2log: [Int32]) throws(RuleViolation) {
        let nLogical = shape.nLogical
        if phy2log.count != shape.nPhysical {
            throw RuleViolation("phy2log", "must have n_physical \(shape.nPhysical) entries", value: phy2log.count)
        }
        var start = [Int32](repeating: 0, count: nLogical + 1)
        for slot in 0..<phy2log.count {
            let expert = Int(phy2log[slot])
            if expert == -1 { continue }
            if expert < 0 || expert >= nLogical {
                throw RuleViolation("phy2log[\(slot)]", "must be a logical expert, 0 .. \(nLogical - 1), or -1 for none", value: expert)
            }
            start[expert] &+= 1
        }
        // Counts become the ends of the ranges; filling them from the back turns the ends into starts and keeps the slots ascending.
        var most: Int32 = 0
        var end: Int32 = 0
        for expert in 0..<nLogical {
            let count = start[expert]
            if count == 0 {
                throw RuleViolation("phy2log", "must hold every logical expert at least once", value: "no slot for expert \(expert)")
            }
            most = max(most, count)
            end &+= count
            start[expert] = end
        }
        start[nLogical] = end
        var slots = [Int32](repeating: 0, count: Int(end))
        for slot in stride(from: phy2log.count - 1, through: 0, by: -1) where phy2log[slot] >= 0 {
            let expert = Int(phy2log[slot])
            start[expert] &-= 1
            slots[Int(start[expert])] = Int32(truncatingIfNeeded: slot)
        }
        if shape.nGroups > 1 && most > 1 {
            let slotsOfGroup = shape.nLocal * shape.groupSize
            for expert in 0..<nLogical {
                let first = Int(slots[Int(start[expert])])
                let last = Int(slots[Int(start[expert + 1]) - 1])
                let groups = (first / slotsOfGroup, last / slotsOfGroup)
                if groups.0 != groups.1 {
                    throw RuleViolation(
                        "phy2log", "all replicas of an expert must lie within one group of \(shape.groupSize) ranks",
                        value: "expert \(expert) in slot \(first) (group \(groups.0)) and slot \(last) (group \(groups.1))")
                }
            }
        }
        self.shape = shape
        self.phy2log = phy2log
        self.replicaStart = start
        self.replicaSlot = slots
        self.topology = nil
        self.combined = 0
        self.maxReplicas = Int(most)
    }

    /// A placement by a topology. The first m * nRedundant experts of each rank get one copy each: the expert at offset
    /// i = j * nRedundant + d of rank `r2o[q][d]` also stands on rank q of the same group, behind q's own experts, at offset i from there.
    /// - Parameter order: [nLogical], a permutation: the expert at offset i of rank r is `order[r * (nLogical / epSize) + i]`.
    public init(shape: ExpertShape, topology: RedundancyTopology, order: [Int32]) throws(RuleViolation) {
        let combined = try Self.combined(shape: shape, topology: topology)
        let nLogical = shape.nLogical
        if order.count != nLogical { throw RuleViolation("order", "must have n_logical \(nLogical) entries", value: order.count) }

        let nLocal = shape.nLocal, nOwn = nLogical / shape.epSize, nColumns = topology.nRedundant
        let nCopies = combined * nColumns
        // Until the starts are summed up, start[e + 1] is the number of replicas of e, 0 meaning "not seen yet".
        var start = [Int32](repeating: 0, count: nLogical + 1)
        var offset = 0
        for position in 0..<nLogical {
            let expert = Int(order[position])
            if expert < 0 || expert >= nLogical {
                throw RuleViolation("order[\(position)]", "must be a logical expert, 0 .. \(nLogical - 1)", value: expert)
            }
            if start[expert + 1] != 0 {
                throw RuleViolation("order[\(position)]", "must be a permutation of 0 .. \(nLogical - 1)", value: "\(expert) again")
            }
            start[expert + 1] = offset < nCopies ? 2 : 1
            offset = offset + 1 == nOwn ? 0 : offset + 1
        }
        for expert in 0..<nLogical { start[expert + 1] &+= start[expert] }

        var phy2log = [Int32](repeating: 0, count: shape.nPhysical)
        var slots = phy2log
        for rank in 0..<shape.epSize {
            let inGroup = rank % shape.groupSize
            let group = rank - inGroup
            for i in 0..<nOwn {
                let expert = order[rank * nOwn + i]
                let slot = rank * nLocal + i
                phy2log[slot] = expert
                slots[Int(start[Int(expert)])] = Int32(truncatingIfNeeded: slot)
            }
            var column = 0
            for i in 0..<nCopies {
                let original = group + Int(topology.r2o[inGroup * nColumns + column])
                let expert = order[original * nOwn + i]
                let slot = rank * nLocal + nOwn + i
                phy2log[slot] = expert
                slots[Int(start[Int(expert)]) + 1] = Int32(truncatingIfNeeded: slot)
                column = column + 1 == nColumns ? 0 : column + 1
            }
        }
        self.shape = shape
        self.phy2log = phy2log
        self.replicaStart = start
        self.replicaSlot = slots
        self.topology = topology
        self.combined = combined
        self.maxReplicas = nCopies > 0 ? 2 : 1
    }

    /// m, the experts of a rank that share one column of the topology, with the rules that tie the two together.
    private static func combined(shape: ExpertShape, topology: RedundancyTopology) throws(RuleViolation) -> Int {
        if topology.groupSize != shape.groupSize {
            throw RuleViolation("r2o", "must have group_size \(shape.groupSize) rows", value: topology.groupSize)
        }
        if shape.nLogical % shape.epSize != 0 {
            throw RuleViolation("n_logical", "must be a multiple of ep_size \(shape.epSize) with r2o", value: shape.nLogical)
        }
        let nOwn = shape.nLogical / shape.epSize
        let nCopies = shape.nLocal - nOwn
        let argument = "(n_physical - n_logical) / ep_size"
        if topology.nRedundant == 0 {
            if nCopies != 0 { throw RuleViolation(argument, "must be 0 when n_redundant is 0", value: nCopies) }
            return 0
        }
        if nCopies == 0 || nCopies % topology.nRedundant != 0 {
            throw RuleViolation(argument, "must be m * n_redundant for an m >= 1, n_redundant being \(topology.nRedundant)", value: nCopies)
        }
        if nCopies > nOwn { throw RuleViolation(argument, "must be at most n_logical / ep_size \(nOwn)", value: nCopies) }
        return nCopies / topology.nRedundant
    }

    /// [nLogical]: replicas of each expert.
    public var logcnt: [Int32] {
        (0..<shape.nLogical).map { replicaStart[$0 + 1] &- replicaStart[$0] }
    }

    /// Row-major [nLogical][width]: the slots of each expert, original first, then -1. A width below `maxReplicas` cuts the rows.
    /// - Parameter width: 0 ... `Limits.maxPhysical`; other values are taken as the nearer end.
    public func log2phy(width: Int) -> [Int32] {
        let width = max(0, min(width, Limits.maxPhysical))
        var table = [Int32](repeating: -1, count: shape.nLogical * width)
        for expert in 0..<shape.nLogical {
            let first = Int(replicaStart[expert])
            for k in 0..<min(width, Int(replicaStart[expert + 1]) - first) { table[expert * width + k] = replicaSlot[first + k] }
        }
        return table
    }
}
