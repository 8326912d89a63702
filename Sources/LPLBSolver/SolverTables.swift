// SolverTables: a placement in the form that the solvers read, on the CPU and on the GPU.

import LPLBTopology

/// A placement as flat Int32 tables.
///
/// - A *place* is one (expert, rank) pair. Replicas of an expert that share a rank are one place, at the first slot of them; the order of
///   an expert's places is that of its replicas, original first.
/// - A *bundle* is a set of experts with the same two or more places that are solved as one: in a topology the experts of the original
///   slots j * nRedundant + d (j ascending) of one rank and d, in a general placement one expert. Experts with one place are in no bundle.
/// - An *arc* is one place of a bundle: (bundle, j). The arcs of a bundle are consecutive.
/// - A *colour* is a run of bundles of a group no two of which share a rank. Only groups that sweep have colours (see FlowSolver): those
///   where every bundle has two places and greedy colouring needs at most `maxColours` of them.
///
/// Bundles are ordered by group, colour, and original slot of their first expert; the slot, not the expert's id, so that reordering the
/// experts by a history does not change the tables' structure. Building costs O(nPhysical + epSize) and two allocations.
/// The tables are one contiguous blob, see `SolverTableLayout`.
public final class SolverTables: @unchecked Sendable {
    /// Indices into `sizes`.
    public enum Size {
        public static let places = 0, bundles = 1, arcs = 2, colours = 3
        public static let maxPlacesOfExpert = 4, maxArcsOfRank = 5, maxPlacesOfBundle = 6, maxRounds = 7
        public static let groups = 8, groupSize = 9, localSlots = 10, ranksPerNode = 11, redundant = 12
        public static let maxBundlesOfGroup = 13, maxArcsOfGroup = 14
    }

    /// Groups that need more colours do not sweep: a sweep costs one step a colour.
    public static let maxColours = 8

    public let shape: ExpertShape
    /// Columns of the topology; 0 in general placements.
    public let nRedundant: Int
    public let layout: SolverTableLayout
    /// All tables. Valid as long as this object lives.
    public let blob: UnsafeRawBufferPointer

    public let nPlaces: Int
    public let nBundles: Int
    public let nArcs: Int
    public let nColours: Int

    let words: UnsafeMutablePointer<Int32>

    public init(_ placement: Placement) {
        let shape = placement.shape
        let layout = SolverTableLayout(nLogical: shape.nLogical, nPhysical: shape.nPhysical, epSize: shape.epSize)
        words = .allocate(capacity: layout.count)
        words.initialize(repeating: 0, count: layout.count)
        let builder = TableBuilder(placement: placement, layout: layout, words: words)
        builder.build()
        builder.finish()
        self.shape = shape
        self.layout = layout
        nRedundant = placement.topology?.nRedundant ?? 0
        blob = UnsafeRawBufferPointer(start: words, count: layout.count * MemoryLayout<Int32>.stride)
        nPlaces = Int(words[Size.places])
        nBundles = Int(words[Size.bundles])
        nArcs = Int(words[Size.arcs])
        nColours = Int(words[Size.colours])
    }

    deinit {
        words.deallocate()
    }

    /// One table by its offset, e.g. `table(at: layout.arcRank)`.
    @inline(__always)
    public func table(at offset: Int) -> UnsafePointer<Int32> { UnsafePointer(words + offset) }

    public var sizes: UnsafePointer<Int32> { table(at: layout.sizes) }
    public var expertStart: UnsafePointer<Int32> { table(at: layout.expertStart) }
    public var placeSlot: UnsafePointer<Int32> { table(at: layout.placeSlot) }
    public var placeRank: UnsafePointer<Int32> { table(at: layout.placeRank) }
    public var expertBundle: UnsafePointer<Int32> { table(at: layout.expertBundle) }
    public var bundleExpertStart: UnsafePointer<Int32> { table(at: layout.bundleExpertStart) }
    public var bundleExpert: UnsafePointer<Int32> { table(at: layout.bundleExpert) }
    public var bundleStart: UnsafePointer<Int32> { table(at: layout.bundleStart) }
    public var arcRank: UnsafePointer<Int32> { table(at: layout.arcRank) }
    public var arcBundle: UnsafePointer<Int32> { table(at: layout.arcBundle) }
    public var groupBundleStart: UnsafePointer<Int32> { table(at: layout.groupBundleStart) }
    public var groupColourStart: UnsafePointer<Int32> { table(at: layout.groupColourStart) }
    public var colourBegin: UnsafePointer<Int32> { table(at: layout.colourBegin) }
    public var colourEnd: UnsafePointer<Int32> { table(at: layout.colourEnd) }
    public var rankStart: UnsafePointer<Int32> { table(at: layout.rankStart) }
    public var rankArc: UnsafePointer<Int32> { table(at: layout.rankArc) }
    public var expertClass: UnsafePointer<Int32> { table(at: layout.expertClass) }
    public var expertCopy: UnsafePointer<Int32> { table(at: layout.expertCopy) }
    public var classBundle: UnsafePointer<Int32> { table(at: layout.classBundle) }

    /// Passes of the solver's loop after which it gives up. No input is known that comes near it.
    public var maxRounds: Int { Int(words[Size.maxRounds]) }
    /// The largest number of places of an expert, bundles' or not.
    public var maxPlacesOfExpert: Int { Int(words[Size.maxPlacesOfExpert]) }
}
