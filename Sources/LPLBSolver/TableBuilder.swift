// TableBuilder: fills the tables of SolverTables. All words are zero before.

import LPLBTopology

struct TableBuilder {
    let placement: Placement
    let layout: SolverTableLayout
    let words: UnsafeMutablePointer<Int32>

    private var shape: ExpertShape { placement.shape }

    private func at(_ offset: Int) -> UnsafeMutablePointer<Int32> { words + offset }

    func build() {
        makePlaces()
        var bundles = listBundles()
        colour(&bundles)
        writeBundles(bundles)
        writeRanks()
        writeClasses()
    }

    /// A bundle before it has its number: its first expert and its experts are found again from the slot of its first expert.
    private struct Bundle {
        var slot: Int32
        var expert: Int32
        var colour: Int32 = 0
    }

    // MARK: Places

    private func makePlaces() {
        let start = at(layout.expertStart), slots = at(layout.placeSlot), ranks = at(layout.placeRank)
        let nLocal = Int32(shape.nLocal)
        var seen = [Int32](repeating: -1, count: shape.epSize)
        var count = 0, most = 0
        for expert in 0..<shape.nLogical {
            start[expert] = Int32(count)
            for k in Int(placement.replicaStart[expert])..<Int(placement.replicaStart[expert + 1]) {
                let slot = placement.replicaSlot[k]
                let rank = slot / nLocal
                if seen[Int(rank)] == Int32(expert) { continue }
                seen[Int(rank)] = Int32(expert)
                slots[count] = slot
                ranks[count] = rank
                count += 1
            }
            most = max(most, count - Int(start[expert]))
        }
        start[shape.nLogical] = Int32(count)
        words[SolverTables.Size.places] = Int32(count)
        words[SolverTables.Size.maxPlacesOfExpert] = Int32(most)
    }

    private func placeCount(_ expert: Int) -> Int {
        Int(words[layout.expertStart + expert + 1] - words[layout.expertStart + expert])
    }

    // MARK: Bundles

    /// Bundles in the order of the original slot of their first expert, hence by group.
    private func listBundles() -> [Bundle] {
        var bundles: [Bundle] = []
        let nLocal = shape.nLocal
        if let topology = placement.topology {
            for rank in 0..<shape.epSize where placement.combined > 0 {
                for column in 0..<topology.nRedundant {
                    let slot = rank * nLocal + column
                    let expert = placement.phy2log[slot]
                    if placeCount(Int(expert)) > 1 { bundles.append(Bundle(slot: Int32(slot), expert: expert)) }
                }
            }
        } else {
            for slot in 0..<shape.nPhysical {
                let expert = Int(placement.phy2log[slot])
                if placeCount(expert) > 1 && Int(placement.replicaSlot[Int(placement.replicaStart[expert])]) == slot {
                    bundles.append(Bundle(slot: Int32(slot), expert: Int32(expert)))
                }
            }
        }
        return bundles
    }

    /// Finds the groups that sweep, colours their bundles and orders them by colour.
    private func colour(_ bundles: inout [Bundle]) {
        let groupStart = at(layout.groupBundleStart), colourStart = at(layout.groupColourStart)
        let slotsOfGroup = shape.nLocal * shape.groupSize
        var used = [UInt16](repeating: 0, count: shape.epSize)  // colours of the bundles on each rank so far
        var sorted: [Bundle] = []
        var first = 0, colours: Int32 = 0
        for group in 0..<shape.nGroups {
            var end = first
            while end < bundles.count && Int(bundles[end].slot) < (group + 1) * slotsOfGroup { end += 1 }
            groupStart[group] = Int32(first)
            colourStart[group] = colours
            if let count = greedyColours(&bundles, first..<end, &used), count > 0 {
                sorted.removeAll(keepingCapacity: true)
                for colour in 0..<count {
                    words[layout.colourBegin + Int(colours)] = Int32(first + sorted.count)
                    for u in first..<end where bundles[u].colour == colour { sorted.append(bundles[u]) }
                    words[layout.colourEnd + Int(colours)] = Int32(first + sorted.count)
                    colours += 1
                }
                bundles.replaceSubrange(first..<end, with: sorted)
            }
            first = end
        }
        groupStart[shape.nGroups] = Int32(bundles.count)
        colourStart[shape.nGroups] = colours
        words[SolverTables.Size.colours] = colours
    }

    /// Each bundle takes the smallest colour that no earlier bundle on one of its ranks has. nil: the group does not sweep.
    private func greedyColours(_ bundles: inout [Bundle], _ range: Range<Int>, _ used: inout [UInt16]) -> Int32? {
        var count: Int32 = 0
        for u in range {
            let expert = Int(bundles[u].expert)
            guard placeCount(expert) == 2 else { return nil }
            let place = Int(words[layout.expertStart + expert])
            let a = Int(words[layout.placeRank + place]), b = Int(words[layout.placeRank + place + 1])
            let colour = (~(used[a] | used[b])).trailingZeroBitCount
            guard colour < SolverTables.maxColours else { return nil }
            used[a] |= 1 << UInt16(colour)
            used[b] |= 1 << UInt16(colour)
            bundles[u].colour = Int32(colour)
            count = max(count, Int32(colour) + 1)
        }
        return count
    }

    private func writeBundles(_ bundles: [Bundle]) {
        let expertBundle = at(layout.expertBundle)
        for expert in 0..<shape.nLogical { expertBundle[expert] = -1 - words[layout.placeRank + Int(words[layout.expertStart + expert])] }
        let combined = placement.topology == nil ? 1 : placement.combined
        let step = placement.topology?.nRedundant ?? 0
        var arc = 0, entry = 0, most = 0
        for u in 0..<bundles.count {
            words[layout.bundleExpertStart + u] = Int32(entry)
            words[layout.bundleStart + u] = Int32(arc)
            for j in 0..<combined {
                let expert = j == 0 ? bundles[u].expert : placement.phy2log[Int(bundles[u].slot) + j * step]
                words[layout.bundleExpert + entry] = expert
                expertBundle[Int(expert)] = Int32(u)
                entry += 1
            }
            let first = Int(words[layout.expertStart + Int(bundles[u].expert)])
            let degree = placeCount(Int(bundles[u].expert))
            for k in 0..<degree {
                words[layout.arcRank + arc] = words[layout.placeRank + first + k]
                words[layout.arcBundle + arc] = Int32(u)
                arc += 1
            }
            most = max(most, degree)
        }
        words[layout.bundleExpertStart + bundles.count] = Int32(entry)
        words[layout.bundleStart + bundles.count] = Int32(arc)
        words[SolverTables.Size.bundles] = Int32(bundles.count)
        words[SolverTables.Size.arcs] = Int32(arc)
        words[SolverTables.Size.maxPlacesOfBundle] = Int32(most)
    }

    // MARK: Ranks and slot classes

    private func writeRanks() {
        let start = at(layout.rankStart), nArcs = Int(words[SolverTables.Size.arcs])
        for arc in 0..<nArcs { start[Int(words[layout.arcRank + arc]) + 1] += 1 }
        var most: Int32 = 0
        for rank in 0..<shape.epSize {
            most = max(most, start[rank + 1])
            start[rank + 1] += start[rank]
        }
        var next = Array(UnsafeBufferPointer(start: start, count: shape.epSize))
        for arc in 0..<nArcs {
            let rank = Int(words[layout.arcRank + arc])
            words[layout.rankArc + Int(next[rank])] = Int32(arc)
            next[rank] += 1
        }
        words[SolverTables.Size.maxArcsOfRank] = most
    }

    private func writeClasses() {
        let expertClass = at(layout.expertClass), expertCopy = at(layout.expertCopy)
        for expert in 0..<shape.nLogical {
            expertClass[expert] = -1
            expertCopy[expert] = -1
        }
        guard let topology = placement.topology, placement.combined > 0 else { return }
        for rank in 0..<shape.epSize {
            for column in 0..<topology.nRedundant {
                let index = rank * topology.nRedundant + column
                for j in 0..<placement.combined {
                    let expert = Int(placement.phy2log[rank * shape.nLocal + j * topology.nRedundant + column])
                    expertClass[expert] = Int32(index)
                    expertCopy[expert] = placement.replicaSlot[Int(placement.replicaStart[expert]) + 1]
                    if j == 0 { words[layout.classBundle + index] = max(-1, words[layout.expertBundle + expert]) }
                }
            }
        }
    }

    /// The sizes that are left.
    func finish() {
        words[SolverTables.Size.maxRounds] = Int32(Group.plainRounds + (shape.groupSize + 1) * (shape.groupSize * shape.groupSize + 2))
        words[SolverTables.Size.groups] = Int32(shape.nGroups)
        words[SolverTables.Size.groupSize] = Int32(shape.groupSize)
        words[SolverTables.Size.localSlots] = Int32(shape.nLocal)
        words[SolverTables.Size.ranksPerNode] = Int32(shape.ranksPerNode)
        words[SolverTables.Size.redundant] = Int32(placement.topology?.nRedundant ?? 0)
        for group in 0..<shape.nGroups {
            let first = Int(words[layout.groupBundleStart + group]), end = Int(words[layout.groupBundleStart + group + 1])
            let arcs = words[layout.bundleStart + end] - words[layout.bundleStart + first]
            words[SolverTables.Size.maxBundlesOfGroup] = max(words[SolverTables.Size.maxBundlesOfGroup], Int32(end - first))
            words[SolverTables.Size.maxArcsOfGroup] = max(words[SolverTables.Size.maxArcsOfGroup], arcs)
        }
    }
}
