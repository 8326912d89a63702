// Network: a placement as the flow network that the solvers work on, and the one table format: DeviceImage packs it for the kernels.

import LPLBTopology

/// A placement as plain arrays, which copies of a network share. Immutable outside of this module.
///
/// - A *place* is one (expert, rank) pair. Replicas of an expert that share a rank are one place, at the first slot of them; the order of
///   an expert's places is that of its replicas, original first.
/// - A *bundle* is a set of experts with the same two or more places that are solved as one: in a topology the experts of the original
///   slots j * nRedundant + d (j ascending) of one rank and d, in a general placement one expert. Experts with one place are in no bundle.
/// - An *arc* is one place of a bundle: (bundle, j). The arcs of a bundle are consecutive.
/// - A *colour* is a set of consecutive bundles of a group no two of which share a rank. Only groups that sweep have colours (see
///   FlowSolver): those where every bundle has two places and greedy colouring needs at most `maxColours` of them.
///
/// Bundles are ordered by group, colour, and original slot of their first expert; the slot, not the expert's id, so that reordering the
/// experts by a history does not change the network's form. Building costs O(nPhysical + epSize) and, as a rule, two allocations.
public struct Network {
    /// Valid as long as its network lives.
    public typealias Table = UnsafeBufferPointer<Int32>

    /// Groups that need more colours do not sweep: a sweep costs one step a colour.
    public static let maxColours = 8

    public let shape: ExpertShape
    /// Columns of the topology; 0 in general placements.
    public let nRedundant: Int
    /// Experts in each bundle; more than 1 in topologies only.
    public let bundleExperts: Int
    let arena = Arena()

    /// [nLogical + 1] the places of expert e are `expertStart[e] ..< expertStart[e + 1]`.
    public internal(set) var expertStart: Table = .empty
    /// [nPlaces] slot and rank in EP of a place.
    public internal(set) var placeSlot: Table = .empty
    public internal(set) var placeRank: Table = .empty
    /// [nLogical] >= 0: the bundle of an expert; < 0: it has one place, on rank -1 - value.
    public internal(set) var expertBundle: Table = .empty
    /// [nBundles][bundleExperts] the experts of a bundle, in the order in which its tokens are cut.
    public internal(set) var bundleExpert: Table = .empty
    /// [nBundles + 1] the arcs of bundle u are `bundleStart[u] ..< bundleStart[u + 1]`.
    public internal(set) var bundleStart: Table = .empty
    /// [nArcs] rank, counted within its group, and bundle of an arc.
    public internal(set) var arcRank: Table = .empty
    public internal(set) var arcBundle: Table = .empty
    /// [nGroups + 1] the bundles of a group.
    public internal(set) var groupBundleStart: Table = .empty
    /// [nGroups + 1] the colours of a group; none if it does not sweep.
    public internal(set) var groupColourStart: Table = .empty
    /// [nColours] where the bundles of a colour end. They begin where those of the group's colour before it end.
    public internal(set) var colourEnd: Table = .empty
    /// [epSize + 1] into `rankArc`: the arcs on each rank in EP, ascending.
    public internal(set) var rankStart: Table = .empty
    /// [nArcs]
    public internal(set) var rankArc: Table = .empty
    /// [nLogical] the slot class rank * nRedundant + d of a replicated expert of a topology, else -1.
    public internal(set) var expertClass: Table = .empty
    /// [nLogical] the slot of the copy of a replicated expert of a topology (beside its original too), else -1.
    public internal(set) var expertCopy: Table = .empty

    public var nPlaces: Int { placeSlot.count }
    public var nBundles: Int { bundleStart.count - 1 }
    public var nArcs: Int { arcRank.count }

    public func places(of expert: Int) -> Range<Int> { Int(expertStart[expert])..<Int(expertStart[expert + 1]) }
    public func arcs(of bundle: Int) -> Range<Int> { Int(bundleStart[bundle])..<Int(bundleStart[bundle + 1]) }
    public func arcs(ofGroup group: Int) -> Range<Int> {
        let bundles = bundles(of: group)
        return Int(bundleStart[bundles.lowerBound])..<Int(bundleStart[bundles.upperBound])
    }
    public func bundles(of group: Int) -> Range<Int> { Int(groupBundleStart[group])..<Int(groupBundleStart[group + 1]) }
    public func colours(of group: Int) -> Range<Int> { Int(groupColourStart[group])..<Int(groupColourStart[group + 1]) }
}

extension Network.Table {
    static var empty: Self { Self(start: nil, count: 0) }
}
