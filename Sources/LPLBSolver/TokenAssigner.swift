// TokenAssigner: which tokens of one source rank go to which place, so that over all sources every place gets its quota.

import LPLBTopology

/// Assigns the tokens of one source. c[s][e] are the tokens of expert e on rank s, q the quota of each place (`FlowSolver.quotas`).
///
/// Every source follows the same rule, so all ranks agree without talking. Per expert:
///  1. A place on rank s gets min(c[s][e], q) from s.
///  2. Within each node, what is left on its ranks, in rank order, against what is left of the quotas of its places, in place order: the
///     tokens of a rank go where their interval overlaps that of a place.
///  3. The same over all ranks and places with what is left then.
///
/// Not for use by two threads at once. Nothing allocates after `init`.
public final class TokenAssigner {
    /// The rank whose tokens are assigned; nil: all tokens of the batch.
    public let source: Int?
    /// [nLogical]: sums over the sources of the latest `sum`.
    public let loads: UnsafePointer<Int64>
    /// [nPlaces]: tokens of the source for each place, of the latest `assign`.
    public let take: UnsafePointer<Int64>
    /// Tokens of the source that stay on its rank, go to another rank of its node, and go to other nodes. Zero if `source` is nil.
    public private(set) var onOwnRank: Int64 = 0
    public private(set) var onOwnNode: Int64 = 0
    public private(set) var onOtherNodes: Int64 = 0

    private let nLogical: Int
    private let nPlaces: Int
    private let ranksPerNode: Int
    private let network: Network

    /// Words from one source's counts to the next one's, of the latest `sum`.
    private var width: Int
    private let sums: UnsafeMutablePointer<Int64>
    private let taken: UnsafeMutablePointer<Int64>
    /// [nLogical]: sums over the ranks before the source's node, and over those before the source.
    private let beforeNode: UnsafeMutablePointer<Int64>
    private let beforeSource: UnsafeMutablePointer<Int64>
    /// [nNodes], zero between experts: of one expert, quotas left of a node's places after step 1, tokens kept in step 1, and tokens that
    /// step 2 still has to find a place for.
    private let nodeQuota: UnsafeMutablePointer<Int64>
    private let nodeKept: UnsafeMutablePointer<Int64>
    private let nodeMatched: UnsafeMutablePointer<Int64>

    /// [epSize][ownPlaces] of the latest `assign` with several sources: their counts of the experts that have a place on the source's rank.
    private let kept: UnsafeMutablePointer<Int64>
    /// The places on the source's rank, and the expert of each.
    private let ownPlaces: [(place: Int, expert: Int)]
    /// [nPlaces]: what another rank sends.
    private let ofOther: UnsafeMutablePointer<Int64>
    /// Sources of the latest `assign`; 0 before it.
    private var assigned = 0

    private let arena = Arena()

    /// - Parameter source: 0 ..< epSize, or nil.
    public init(_ network: Network, source: Int?) {
        let shape = network.shape
        self.source = source
        nLogical = shape.nLogical
        nPlaces = network.nPlaces
        ranksPerNode = shape.ranksPerNode
        self.network = network
        width = nLogical
        sums = arena.filled(nLogical, 0)
        taken = arena.filled(nPlaces, 0)
        beforeNode = arena.filled(nLogical, 0)
        beforeSource = arena.filled(nLogical, 0)
        nodeQuota = arena.filled(shape.nNodes, 0)
        nodeKept = arena.filled(shape.nNodes, 0)
        nodeMatched = arena.filled(shape.nNodes, 0)
        loads = UnsafePointer(sums)
        take = UnsafePointer(taken)
        let rank = source ?? (shape.epSize == 1 ? 0 : -1)
        ownPlaces = (0..<shape.nLogical).flatMap { expert in
            network.places(of: expert).filter { Int(network.placeRank[$0]) == rank }.map { (place: $0, expert: expert) }
        }
        kept = arena.filled(source == nil ? 0 : shape.epSize * ownPlaces.count, 0)
        ofOther = arena.filled(nPlaces, 0)
    }

    /// The largest load of an expert, LPLB_MAX_LOAD.
    public static let maxLoad: Int64 = 1 << 40

    /// Adds up the counts of all sources into `loads`. False, with `loads` undefined, if a count is negative or a sum above `maxLoad`.
    /// - Parameters:
    ///   - counts: [sources][width], of which the first nLogical of each row are counts; sources 1 or epSize.
    ///   - width: nil for nLogical.
    public func sum(_ counts: UnsafePointer<Int32>, sources: Int, width: Int? = nil) -> Bool { add(counts, sources, width) }
    public func sum(_ counts: UnsafePointer<Int64>, sources: Int, width: Int? = nil) -> Bool { add(counts, sources, width) }

    /// Assigns the tokens. With one source, or no `source`, `take` is the whole quota.
    /// - Parameters:
    ///   - counts: what was given to the latest `sum`.
    ///   - quotas: [nPlaces], the quotas of `loads`.
    public func assign(_ counts: UnsafePointer<Int32>, sources: Int, quotas: UnsafePointer<Int64>) { distribute(counts, sources, quotas) }
    public func assign(_ counts: UnsafePointer<Int64>, sources: Int, quotas: UnsafePointer<Int64>) { distribute(counts, sources, quotas) }

    @inline(__always)
    private func add<T: FixedWidthInteger>(_ counts: UnsafePointer<T>, _ sources: Int, _ width: Int?) -> Bool {
        let count = nLogical, sums = sums
        let width = width ?? count
        self.width = width
        let perNode = ranksPerNode
        // The or of all values shows a negative one and, with 41 bits, keeps the sums of 8192 rows far from overflow.
        var bits: Int64 = 0
        sums.update(repeating: 0, count: count)
        for row in 0..<sources {
            if let source, sources > 1 {
                if row == source &- source % perNode { beforeNode.update(from: sums, count: count) }
                if row == source { beforeSource.update(from: sums, count: count) }
            }
            let values = counts + row &* width
            for e in 0..<count {
                let value = Int64(truncatingIfNeeded: values[e])
                bits |= value
                sums[e] &+= value
            }
            if bits &>> 41 != 0 { return false }
        }
        var most: Int64 = 0
        for e in 0..<count { most = max(most, sums[e]) }
        return most <= TokenAssigner.maxLoad
    }

    @inline(__always)
    private func distribute<T: FixedWidthInteger>(_ counts: UnsafePointer<T>, _ sources: Int, _ quotas: UnsafePointer<Int64>) {
        assigned = sources
        if let source, sources > 1 {
            let row = counts + source &* width
            for expert in 0..<nLogical {
                let first = Int(network.expertStart[expert]), end = Int(network.expertStart[expert &+ 1])
                let tokens = Int64(truncatingIfNeeded: row[expert])
                if end &- first == 1 {
                    taken[first] = tokens
                } else {
                    distributeExpert(
                        counts + expert, width, first, end, tokens, quotas, source, beforeNode[expert], beforeSource[expert], taken)
                }
            }
            for (index, own) in ownPlaces.enumerated() {
                for rank in 0..<sources {
                    kept[rank &* ownPlaces.count &+ index] = Int64(truncatingIfNeeded: counts[rank &* width &+ own.expert])
                }
            }
        } else {
            taken.update(from: quotas, count: nPlaces)
        }
        measure()
    }

    /// Calls visit(rank, slot, tokens) for every rank and every place on the source's rank: how many tokens that rank sends there. Every
    /// rank follows the same rule, so this one can apply it for the others. Without a `source`, the only rank's own.
    /// - Parameter quotas: those of the latest `assign`.
    public func eachReceived(quotas: UnsafePointer<Int64>, _ visit: (Int, Int, Int64) -> Void) {
        for (index, own) in ownPlaces.enumerated() {
            let slot = Int(network.placeSlot[own.place])
            if assigned == 1 { visit(source ?? 0, slot, quotas[own.place]) }
            if assigned <= 1 { continue }
            let places = network.places(of: own.expert), column = UnsafePointer(kept) + index, width = ownPlaces.count
            var beforeNode: Int64 = 0, before: Int64 = 0
            for rank in 0..<network.shape.epSize {
                if rank % ranksPerNode == 0 { beforeNode = before }
                let tokens = column[rank &* width]
                if places.count > 1 {
                    distributeExpert(
                        column, width, places.lowerBound, places.upperBound, tokens, quotas, rank, beforeNode, before, ofOther)
                }
                visit(rank, slot, places.count > 1 ? ofOther[own.place] : tokens)
                before &+= tokens
            }
        }
    }

    /// One expert with several places `first ..< end`, `tokens` of it on the source; its counts are every `width`-th of `counts`, and
    /// before* the sums of those on ranks before the source's node and before the source.
    @inline(__always)
    private func distributeExpert<T: FixedWidthInteger>(
        _ counts: UnsafePointer<T>, _ width: Int, _ first: Int, _ end: Int, _ tokens: Int64, _ quotas: UnsafePointer<Int64>, _ source: Int,
        _ beforeNode: Int64, _ beforeSource: Int64, _ taken: UnsafeMutablePointer<Int64>
    ) {
        let rankOf = network.placeRank, perNode = ranksPerNode
        for place in first..<end { taken[place] = 0 }
        if tokens == 0 { return }

        // Step 1. Positions of the source among the supplies of step 2 and 3 shrink by what ranks before it keep.
        let ownNode = source / perNode, ownNodeStart = ownNode &* perNode
        var left = tokens, position = beforeSource &- beforeNode, positionOfNode = beforeNode
        for place in first..<end {
            let rank = Int(rankOf[place]), node = rank / perNode
            let kept = min(Int64(truncatingIfNeeded: counts[rank &* width]), quotas[place])
            nodeQuota[node] &+= quotas[place] &- kept
            nodeKept[node] &+= kept
            if rank == source {
                taken[place] = kept
                left &-= kept
            } else if rank < source {
                if rank >= ownNodeStart { position &-= kept } else { positionOfNode &-= kept }
            }
        }
        if left > 0 {
            // Step 2: the places of this node, laid end to end, against [position, position + left).
            var offset: Int64 = 0
            var remaining = left
            for place in first..<end where Int(rankOf[place]) / perNode == ownNode {
                let rank = Int(rankOf[place])
                let quota = quotas[place] &- min(Int64(truncatingIfNeeded: counts[rank &* width]), quotas[place])
                let part = overlap(position, left, offset, quota)
                taken[place] &+= part
                remaining &-= part
                offset &+= quota
            }
            if remaining > 0 {
                let before = max(0, position &- offset)
                distributeAbroad(counts, width, first, end, remaining, positionOfNode &+ before, quotas, ownNode, taken)
            }
        }
        for place in first..<end {
            let node = Int(rankOf[place]) / perNode
            nodeQuota[node] = 0
            nodeKept[node] = 0
            nodeMatched[node] = 0
        }
    }

    /// Step 3 for a source with tokens left, hence with no quota left on its node. `position` counts the tokens of step 3 on ranks before
    /// the source, except that those which nodes before it placed in step 2 are still to be taken off.
    @inline(__always)
    private func distributeAbroad<T: FixedWidthInteger>(
        _ counts: UnsafePointer<T>, _ width: Int, _ first: Int, _ end: Int, _ tokens: Int64, _ position: Int64,
        _ quotas: UnsafePointer<Int64>, _ ownNode: Int, _ taken: UnsafeMutablePointer<Int64>
    ) {
        let rankOf = network.placeRank, perNode = ranksPerNode
        var position = position
        for place in first..<end {
            let node = Int(rankOf[place]) / perNode
            // The first place of each other node with quota left counts the node's supply; a node is done when its quota is set to 0.
            if node == ownNode || nodeQuota[node] == 0 { continue }
            var supply = 0 &- nodeKept[node]
            for rank in (node &* perNode)..<((node &+ 1) &* perNode) {
                supply &+= Int64(truncatingIfNeeded: counts[rank &* width])
            }
            let matched = min(supply, nodeQuota[node])
            nodeMatched[node] = matched
            nodeQuota[node] = 0
            if node < ownNode { position &-= matched }
        }
        var offset: Int64 = 0
        for place in first..<end {
            let rank = Int(rankOf[place]), node = rank / perNode
            if node == ownNode { continue }
            var quota = quotas[place] &- min(Int64(truncatingIfNeeded: counts[rank &* width]), quotas[place])
            let used = min(quota, nodeMatched[node])
            nodeMatched[node] &-= used
            quota &-= used
            taken[place] &+= overlap(position, tokens, offset, quota)
            offset &+= quota
        }
    }

    /// The length of [a, a + n) within [b, b + m).
    @inline(__always)
    private func overlap(_ a: Int64, _ n: Int64, _ b: Int64, _ m: Int64) -> Int64 {
        max(0, min(a &+ n, b &+ m) &- max(a, b))
    }

    private func measure() {
        (onOwnRank, onOwnNode, onOtherNodes) = (0, 0, 0)
        guard let source else { return }
        let rankOf = network.placeRank, perNode = ranksPerNode
        let first = source &- source % perNode
        var rank: Int64 = 0, node: Int64 = 0, all: Int64 = 0
        for place in 0..<nPlaces {
            let r = Int(rankOf[place])
            all &+= taken[place]
            if r == source { rank &+= taken[place] }
            if r >= first && r < first &+ perNode { node &+= taken[place] }
        }
        (onOwnRank, onOwnNode, onOtherNodes) = (rank, node &- rank, all &- node)
    }
}
