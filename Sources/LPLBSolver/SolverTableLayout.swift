// SolverTableLayout: where each table of SolverTables stands in its blob.

/// Offsets of the tables in the blob of `SolverTables`, in elements of Int32.
///
/// They depend on the sizes of the planner only, not on the placement, so the tables of a new placement can overwrite the old ones in
/// place. With L = nLogical, P = nPhysical, R = epSize the blob holds, in this order, each table padded to a multiple of 4 elements:
///
/// | table | elements | meaning |
/// |---|---|---|
/// | sizes | 16 | see `SolverTables.Size` |
/// | expertStart | L + 1 | places of expert e: `expertStart[e] ..< expertStart[e + 1]` |
/// | placeSlot, placeRank | P each | slot and rank (in EP) of a place |
/// | expertBundle | L | >= 0: its bundle; < 0: the expert has one place, on rank -1 - value |
/// | bundleExpertStart, bundleExpert | L + 1, L | experts of a bundle, in the order in which its tokens are cut |
/// | bundleStart | L + 1 | arcs of bundle u: `bundleStart[u] ..< bundleStart[u + 1]` |
/// | arcRank, arcBundle | P each | rank (in EP) and bundle of an arc |
/// | groupBundleStart | R + 1 | bundles of a group |
/// | groupColourStart | R + 1 | colours of a group; none if the group does not sweep |
/// | colourBegin, colourEnd | L each | bundles of colour c: `colourBegin[c] ..< colourEnd[c]` |
/// | rankStart, rankArc | R + 1, P | arcs on each rank (in EP), ascending |
/// | expertClass | L | slot class rank * nRedundant + d of a replicated expert of a topology, else -1 |
/// | expertCopy | L | slot of the copy of a replicated expert of a topology (self copies too), else -1 |
/// | classBundle | P | bundle of a slot class, -1 for self copies |
public struct SolverTableLayout: Sendable, Equatable {
    public let sizes: Int
    public let expertStart: Int
    public let placeSlot: Int
    public let placeRank: Int
    public let expertBundle: Int
    public let bundleExpertStart: Int
    public let bundleExpert: Int
    public let bundleStart: Int
    public let arcRank: Int
    public let arcBundle: Int
    public let groupBundleStart: Int
    public let groupColourStart: Int
    public let colourBegin: Int
    public let colourEnd: Int
    public let rankStart: Int
    public let rankArc: Int
    public let expertClass: Int
    public let expertCopy: Int
    public let classBundle: Int
    /// Elements of the whole blob.
    public let count: Int

    public init(nLogical: Int, nPhysical: Int, epSize: Int) {
        var end = 0
        func section(_ elements: Int) -> Int {
            let start = end
            end += (elements + 3) / 4 * 4
            return start
        }
        sizes = section(16)
        expertStart = section(nLogical + 1)
        placeSlot = section(nPhysical)
        placeRank = section(nPhysical)
        expertBundle = section(nLogical)
        bundleExpertStart = section(nLogical + 1)
        bundleExpert = section(nLogical)
        bundleStart = section(nLogical + 1)
        arcRank = section(nPhysical)
        arcBundle = section(nPhysical)
        groupBundleStart = section(epSize + 1)
        groupColourStart = section(epSize + 1)
        colourBegin = section(nLogical)
        colourEnd = section(nLogical)
        rankStart = section(epSize + 1)
        rankArc = section(nPhysical)
        expertClass = section(nLogical)
        expertCopy = section(nLogical)
        classBundle = section(nPhysical)
        count = end
    }
}
