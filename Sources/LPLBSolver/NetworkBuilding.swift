// NetworkBuilding: how a Network is made from a placement.

import LPLBTopology

extension Network {
    public init(_ placement: Placement) {
        shape = placement.shape
        nRedundant = placement.topology?.nRedundant ?? 0
        addPlaces(placement)
        addBundles(placement, first: coloured(firstExperts(placement)))
        addRanks()
        addClasses(placement)
    }

    private mutating func addPlaces(_ placement: Placement) {
        let nLocal = Int32(shape.nLocal), nLogical = shape.nLogical
        let replicaStart = placement.replicaStart, replicaSlot = placement.replicaSlot
        var starts = [Int32](repeating: 0, count: nLogical + 1)
        var slots = replicaSlot, ranks = replicaSlot
        var latest = [Int32](repeating: -1, count: shape.epSize)  // the latest expert with a place on each rank
        var count = 0
        for expert in 0..<nLogical {
            starts[expert] = Int32(truncatingIfNeeded: count)
            for replica in Int(replicaStart[expert])..<Int(replicaStart[expert + 1]) {
                let slot = replicaSlot[replica]
                let rank = slot / nLocal
                if latest[Int(rank)] == Int32(truncatingIfNeeded: expert) { continue }
                latest[Int(rank)] = Int32(truncatingIfNeeded: expert)
                slots[count] = slot
                ranks[count] = rank
                count += 1
            }
        }
        starts[nLogical] = Int32(truncatingIfNeeded: count)
        slots.removeLast(slots.count - count)
        ranks.removeLast(ranks.count - count)
        (expertStart, placeSlot, placeRank) = (starts, slots, ranks)
    }

    // MARK: Bundles

    /// The first expert of each bundle, in the order of their original slots, hence by group. Sets `groupBundleStart`.
    private mutating func firstExperts(_ placement: Placement) -> [Int32] {
        let columns = placement.topology?.nRedundant ?? shape.nLocal
        var experts: [Int32] = []
        experts.reserveCapacity(shape.nPhysical - shape.nLogical)
        let phy2log = placement.phy2log, expertStart = expertStart, placeSlot = placeSlot, nLocal = shape.nLocal
        for rank in 0..<shape.epSize {
            if rank % shape.groupSize == 0 { groupBundleStart.append(Int32(experts.count)) }
            for slot in rank * nLocal..<rank * nLocal + columns {
                let expert = Int(phy2log[slot])
                let first = Int(expertStart[expert])
                if Int(expertStart[expert + 1]) - first > 1 && Int(placeSlot[first]) == slot { experts.append(Int32(expert)) }
            }
        }
        groupBundleStart.append(Int32(experts.count))
        return experts
    }

    /// Finds the groups that sweep, and orders their bundles by colour.
    private mutating func coloured(_ experts: [Int32]) -> [Int32] {
        var ordered: [Int32] = []
        ordered.reserveCapacity(experts.count)
        var used = [UInt16](repeating: 0, count: shape.epSize)  // colours of the bundles on each rank so far
        for group in 0..<shape.nGroups {
            groupColourStart.append(Int32(colourEnd.count))
            let bundles = bundles(of: group)
            guard let colours = greedyColours(experts[bundles], &used) else {
                ordered += experts[bundles]
                continue
            }
            var colour: UInt16 = 0
            while ordered.count < bundles.upperBound {
                for (expert, its) in zip(experts[bundles], colours) where its == colour { ordered.append(expert) }
                colourEnd.append(Int32(ordered.count))
                colour += 1
            }
        }
        groupColourStart.append(Int32(colourEnd.count))
        return ordered
    }

    /// Each bundle takes the smallest colour that no earlier bundle on one of its ranks has. nil: the group does not sweep.
    private func greedyColours(_ experts: ArraySlice<Int32>, _ used: inout [UInt16]) -> [UInt16]? {
        var colours: [UInt16] = []
        for expert in experts {
            let places = places(of: Int(expert))
            guard places.count == 2 else { return nil }
            let a = Int(placeRank[places.lowerBound]), b = Int(placeRank[places.lowerBound + 1])
            let colour = (~(used[a] | used[b])).trailingZeroBitCount
            guard colour < Network.maxColours else { return nil }
            used[a] |= 1 << UInt16(colour)
            used[b] |= 1 << UInt16(colour)
            colours.append(UInt16(colour))
        }
        return colours
    }

    private mutating func addBundles(_ placement: Placement, first experts: [Int32]) {
        let combined = max(placement.combined, 1), nBundles = experts.count
        let phy2log = placement.phy2log, expertStart = expertStart, placeSlot = placeSlot, placeRank = placeRank
        // All experts of a bundle have its places, those in no bundle one each.
        let nArcs = (nPlaces - shape.nLogical + nBundles * combined) / combined
        var bundleOf = [Int32](repeating: 0, count: shape.nLogical)
        for expert in 0..<shape.nLogical { bundleOf[expert] = -1 - placeRank[Int(expertStart[expert])] }
        var members = [Int32](repeating: 0, count: nBundles * combined)
        var starts = [Int32](repeating: 0, count: nBundles + 1)
        var ranks = [Int32](repeating: 0, count: nArcs), bundles = ranks
        var arc = 0
        for bundle in 0..<nBundles {
            let first = Int(experts[bundle])
            let places = Int(expertStart[first])..<Int(expertStart[first + 1])
            for j in 0..<combined {
                let expert = phy2log[Int(placeSlot[places.lowerBound]) + j * nRedundant]
                members[bundle * combined + j] = expert
                bundleOf[Int(expert)] = Int32(truncatingIfNeeded: bundle)
            }
            for place in places {
                ranks[arc] = placeRank[place]
                bundles[arc] = Int32(truncatingIfNeeded: bundle)
                arc += 1
            }
            starts[bundle + 1] = Int32(truncatingIfNeeded: arc)
        }
        (expertBundle, bundleExpert, bundleStart, arcRank, arcBundle) = (bundleOf, members, starts, ranks, bundles)
        bundleExpertStart = (0...nBundles).map { Int32(truncatingIfNeeded: $0 * combined) }
    }

    // MARK: Ranks and slot classes

    private mutating func addRanks() {
        var ends = [Int32](repeating: 0, count: shape.epSize + 1)
        for rank in arcRank { ends[Int(rank)] += 1 }
        for rank in 0..<shape.epSize { ends[rank + 1] += ends[rank] }
        // Filling from the back turns the ends into starts and keeps the arcs of a rank ascending.
        var arcs = arcRank
        let ranks = arcRank
        for arc in ranks.indices.reversed() {
            let rank = Int(ranks[arc]), entry = ends[rank] - 1
            ends[rank] = entry
            arcs[Int(entry)] = Int32(truncatingIfNeeded: arc)
        }
        (rankStart, rankArc) = (ends, arcs)
    }

    private mutating func addClasses(_ placement: Placement) {
        expertClass = [Int32](repeating: -1, count: shape.nLogical)
        expertCopy = expertClass
        for rank in 0..<shape.epSize {
            for offset in 0..<placement.combined * nRedundant {
                let expert = Int(placement.phy2log[rank * shape.nLocal + offset])
                expertClass[expert] = Int32(rank * nRedundant + offset % nRedundant)
                expertCopy[expert] = placement.replicaSlot[Int(placement.replicaStart[expert]) + 1]
            }
        }
    }
}
