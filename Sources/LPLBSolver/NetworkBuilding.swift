// NetworkBuilding: how a Network is made from a placement.

import LPLBTopology

/// Where a table is written before the network shows it.
private typealias Words = UnsafeMutableBufferPointer<Int32>

extension Network {
    public init(_ placement: Placement) {
        shape = placement.shape
        nRedundant = placement.topology?.nRedundant ?? 0
        bundleExperts = max(placement.combined, 1)
        addPlaces(placement)
        addBundles(placement, first: coloured(firstExperts(placement)))
        addClasses(placement)
    }

    private func words(_ count: Int, _ value: Int32 = 0) -> Words { Words(start: arena.filled(count, value), count: count) }

    /// Goes through the replicas by expert. Those of an expert that share a rank are neighbours.
    private mutating func addPlaces(_ placement: Placement) {
        let phy2log = placement.phy2log, replicaSlot = placement.replicaSlot, nLocal = Int32(shape.nLocal)
        let starts = words(shape.nLogical + 1), slots = words(shape.nPhysical), ranks = words(shape.nPhysical)
        let bundles = words(shape.nLogical)
        var count: Int32 = 0, latestExpert: Int32 = -1, latestRank: Int32 = -1
        for slot in replicaSlot {
            let expert = phy2log[Int(slot)], rank = slot / nLocal
            slots[Int(count)] = slot
            ranks[Int(count)] = rank
            count &+= expert == latestExpert && rank == latestRank ? 0 : 1
            starts[Int(expert) &+ 1] = count
            bundles[Int(expert)] = -1 &- rank
            (latestExpert, latestRank) = (expert, rank)
        }
        (expertStart, expertBundle) = (Table(starts), Table(bundles))
        (placeSlot, placeRank) = (Table(rebasing: slots[..<Int(count)]), Table(rebasing: ranks[..<Int(count)]))
    }

    // MARK: Bundles

    /// The first expert of each bundle, in the order of their original slots, hence by group. Sets `groupBundleStart`.
    private mutating func firstExperts(_ placement: Placement) -> Table {
        let phy2log = placement.phy2log, nLocal = shape.nLocal, columns = placement.topology?.nRedundant ?? nLocal
        let experts = words(shape.nPhysical - shape.nLogical + 1), groupStarts = words(shape.nGroups + 1)
        var count = 0
        for rank in 0..<shape.epSize {
            for slot in rank &* nLocal..<rank &* nLocal &+ columns where phy2log[slot] >= 0 {
                let expert = Int(phy2log[slot]), first = Int(expertStart[expert])
                experts[count] = phy2log[slot]
                count &+= expertStart[expert &+ 1] &- expertStart[expert] > 1 && placeSlot[first] == slot ? 1 : 0
            }
            groupStarts[rank / shape.groupSize &+ 1] = Int32(truncatingIfNeeded: count)
        }
        groupBundleStart = Table(groupStarts)
        return Table(rebasing: experts[..<count])
    }

    /// Finds the groups that sweep, and orders their bundles by colour.
    private mutating func coloured(_ experts: Table) -> Table {
        let ordered = words(experts.count), groupStarts = words(shape.nGroups + 1), colours = words(experts.count)
        let ends = words(min(Network.maxColours * shape.nGroups, experts.count + Network.maxColours))
        let used = arena.filled(shape.epSize, UInt16(0))  // colours of the bundles on each rank so far
        var count = 0
        for group in 0..<shape.nGroups {
            let bundles = bundles(of: group), ends = Words(rebasing: ends[count...])
            if colour(experts, bundles, colours, ends, used) {
                // Counts become the starts of the ranges; filling them turns the starts into ends.
                var end = Int32(truncatingIfNeeded: bundles.lowerBound), colour = 0
                while end < bundles.upperBound {
                    (ends[colour], end) = (end, end &+ ends[colour])
                    colour &+= 1
                }
                count &+= colour
                for bundle in bundles {
                    let colour = Int(colours[bundle])
                    ordered[Int(ends[colour])] = experts[bundle]
                    ends[colour] &+= 1
                }
            } else {
                for colour in 0..<Network.maxColours { ends[colour] = 0 }
                for bundle in bundles { ordered[bundle] = experts[bundle] }
            }
            groupStarts[group &+ 1] = Int32(truncatingIfNeeded: count)
        }
        (groupColourStart, colourEnd) = (Table(groupStarts), Table(rebasing: ends[..<count]))
        return Table(ordered)
    }

    /// Each bundle takes the smallest colour that no earlier bundle on one of its ranks has. Counts them. False: the group does not sweep.
    private func colour(
        _ experts: Table, _ bundles: Range<Int>, _ colours: Words, _ counts: Words, _ used: UnsafeMutablePointer<UInt16>
    ) -> Bool {
        for bundle in bundles {
            let places = places(of: Int(experts[bundle]))
            guard places.count == 2 else { return false }
            let a = Int(placeRank[places.lowerBound]), b = Int(placeRank[places.lowerBound + 1])
            let colour = (~(used[a] | used[b])).trailingZeroBitCount
            guard colour < Network.maxColours else { return false }
            used[a] |= 1 &<< UInt16(colour)
            used[b] |= 1 &<< UInt16(colour)
            colours[bundle] = Int32(truncatingIfNeeded: colour)
            counts[colour] &+= 1
        }
        return true
    }

    private mutating func addBundles(_ placement: Placement, first experts: Table) {
        let phy2log = placement.phy2log, nBundles = experts.count, groupSize = Int32(shape.groupSize)
        // All experts of a bundle have its places, those in no bundle one each.
        let nArcs = (nPlaces - shape.nLogical + nBundles * bundleExperts) / bundleExperts
        let members = words(nBundles * bundleExperts), starts = words(nBundles + 1), ranks = words(nArcs), bundles = words(nArcs)
        let bundleOf = Words(mutating: expertBundle), rankStarts = words(shape.epSize + 2)
        var arc = 0
        for bundle in 0..<nBundles {
            let places = places(of: Int(experts[bundle])), slot = Int(placeSlot[places.lowerBound])
            for j in 0..<bundleExperts {
                let expert = phy2log[slot &+ j &* nRedundant]
                members[bundle &* bundleExperts &+ j] = expert
                bundleOf[Int(expert)] = Int32(truncatingIfNeeded: bundle)
            }
            for place in places {
                ranks[arc] = placeRank[place] % groupSize
                bundles[arc] = Int32(truncatingIfNeeded: bundle)
                rankStarts[Int(placeRank[place]) &+ 2] &+= 1
                arc &+= 1
            }
            starts[bundle &+ 1] = Int32(truncatingIfNeeded: arc)
        }
        (bundleExpert, bundleStart) = (Table(members), Table(starts))
        (arcRank, arcBundle) = (Table(ranks), Table(bundles))
        addRanks(rankStarts)
    }

    // MARK: Ranks and slot classes

    /// - Parameter starts: [epSize + 2], the arcs of rank r at r + 2.
    private mutating func addRanks(_ starts: Words) {
        for rank in 0..<shape.epSize { starts[rank &+ 2] &+= starts[rank &+ 1] }
        // Now the start of rank r is at r + 1. Filling turns it into the end of r, which is the start of r + 1.
        let arcs = words(nArcs)
        for group in 0..<shape.nGroups {
            let starts = Words(rebasing: starts[(group &* shape.groupSize &+ 1)...])
            for arc in self.arcs(ofGroup: group) {
                let rank = Int(arcRank[arc])
                arcs[Int(starts[rank])] = Int32(truncatingIfNeeded: arc)
                starts[rank] &+= 1
            }
        }
        (rankStart, rankArc) = (Table(rebasing: starts[..<(shape.epSize + 1)]), Table(arcs))
    }

    private mutating func addClasses(_ placement: Placement) {
        let classes = words(shape.nLogical, -1), copies = words(shape.nLogical, -1)
        let phy2log = placement.phy2log, starts = placement.replicaStart, slots = placement.replicaSlot
        for rank in 0..<shape.epSize {
            for offset in 0..<placement.combined * nRedundant {
                let expert = Int(phy2log[rank * shape.nLocal + offset])
                classes[expert] = Int32(truncatingIfNeeded: rank * nRedundant + offset % nRedundant)
                copies[expert] = slots[Int(starts[expert]) + 1]
            }
        }
        (expertClass, expertCopy) = (Table(classes), Table(copies))
    }
}
