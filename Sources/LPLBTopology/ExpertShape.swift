// ExpertShape: how many ranks, hosts, groups and experts there are. Everything else is built on a checked shape.

/// The sizes of one expert-parallel (EP) group. A value of this type keeps all the rules below, so code that holds one need not check
/// again.
public struct ExpertShape: Sendable, Equatable {
    /// Ranks, 1 ... `Limits.maxEPSize`.
    public let epSize: Int
    /// Hosts; divides `epSize`. The ranks of a host are consecutive.
    public let nNodes: Int
    /// Ranks that balance among themselves, 1 ... `Limits.maxRanks`; divides `epSize`. The ranks of a group are consecutive.
    public let groupSize: Int
    /// Logical experts, 1 ... `Limits.maxLogical`.
    public let nLogical: Int
    /// Physical experts (slots), `nLogical` ... `Limits.maxPhysical`; a multiple of `epSize`.
    public let nPhysical: Int

    /// Slots of one rank: rank r owns the slots r * nLocal ..< (r + 1) * nLocal.
    public var nLocal: Int { nPhysical / epSize }
    public var nGroups: Int { epSize / groupSize }
    public var ranksPerNode: Int { epSize / nNodes }
    /// Some expert has several slots, wherever they stand: there is something to plan. This holds for all placements of a shape, so that
    /// host and device, and a graph captured under an earlier placement, agree on it.
    public var hasReplicas: Bool { nPhysical > nLogical }

    /// Checks the sizes. Any integers may be given.
    /// - Parameters:
    ///   - nNodes: 0 means one host for each 8 ranks if 8 divides `epSize`, else one host.
    ///   - groupSize: 0 means all ranks.
    public init(epSize: Int, nNodes: Int, groupSize: Int, nLogical: Int, nPhysical: Int) throws(RuleViolation) {
        try check("ep_size", epSize, atLeast: 1, atMost: Limits.maxEPSize)

        if nNodes < 0 { throw RuleViolation("n_nodes", "must be 0 (the default) or a divisor of ep_size", value: nNodes) }
        let hosts = nNodes > 0 ? nNodes : epSize % 8 == 0 ? epSize / 8 : 1
        if epSize % hosts != 0 { throw RuleViolation("n_nodes", "must divide ep_size \(epSize)", value: nNodes) }

        if groupSize < 0 { throw RuleViolation("group_size", "must be 0 (the default) or a divisor of ep_size", value: groupSize) }
        let ranks = groupSize > 0 ? groupSize : epSize
        if epSize % ranks != 0 { throw RuleViolation("group_size", "must divide ep_size \(epSize)", value: groupSize) }
        if ranks > Limits.maxRanks {
            let value = groupSize > 0 ? "\(ranks)" : "0, which stands for ep_size \(ranks)"
            throw RuleViolation(.unsupported, "group_size", "must be at most \(Limits.maxRanks)", value: value)
        }

        try check("n_logical", nLogical, atLeast: 1, atMost: Limits.maxLogical)
        try check("n_physical", nPhysical, atLeast: 1, atMost: Limits.maxPhysical)
        if nPhysical < nLogical { throw RuleViolation("n_physical", "must be at least n_logical \(nLogical)", value: nPhysical) }
        if nPhysical % epSize != 0 { throw RuleViolation("n_physical", "must be a multiple of ep_size \(epSize)", value: nPhysical) }

        self.epSize = epSize
        self.nNodes = hosts
        self.groupSize = ranks
        self.nLogical = nLogical
        self.nPhysical = nPhysical
    }
}
