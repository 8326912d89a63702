import LPLBTopology
import Testing

@testable import LPLBSolver

private func array(_ table: UnsafePointer<Int32>, _ count: Int) -> [Int] { (0..<count).map { Int(table[$0]) } }

@Suite struct TablesTests {
    /// Written out by hand: two ranks, each copying the other's first two experts, in pairs.
    @Test func smallTopology() throws {
        let topology = try RedundancyTopology(r2o: [1, 0], groupSize: 2, nRedundant: 1)
        let shape = try ExpertShape(epSize: 2, nNodes: 1, groupSize: 2, nLogical: 6, nPhysical: 10)
        let tables = SolverTables(try Placement(shape: shape, topology: topology, order: [5, 4, 3, 2, 1, 0]))
        // Rank 0: experts 5 4 3, copies of 2 1; rank 1: experts 2 1 0, copies of 5 4.
        #expect(array(tables.expertStart, 7) == [0, 1, 3, 5, 6, 8, 10])
        #expect(array(tables.placeSlot, 10) == [7, 6, 4, 5, 3, 2, 1, 9, 0, 8])
        #expect(array(tables.placeRank, 10) == [1, 1, 0, 1, 0, 0, 0, 1, 0, 1])
        #expect(array(tables.expertBundle, 6) == [-2, 1, 1, -1, 0, 0])
        #expect(tables.nBundles == 2 && tables.nArcs == 4 && tables.nColours == 2)
        #expect(array(tables.bundleExpertStart, 3) == [0, 2, 4])
        #expect(array(tables.bundleExpert, 4) == [5, 4, 2, 1])
        #expect(array(tables.bundleStart, 3) == [0, 2, 4])
        #expect(array(tables.arcRank, 4) == [0, 1, 1, 0])
        #expect(array(tables.arcBundle, 4) == [0, 0, 1, 1])
        #expect(array(tables.rankStart, 3) == [0, 2, 4])
        #expect(array(tables.rankArc, 4) == [0, 3, 1, 2])
        #expect(array(tables.colourBegin, 2) == [0, 1] && array(tables.colourEnd, 2) == [1, 2])
        #expect(array(tables.expertClass, 6) == [-1, 1, 1, -1, 0, 0])
        #expect(array(tables.expertCopy, 6) == [-1, 4, 3, -1, 9, 8])
        #expect(array(tables.classBundle, 2) == [0, 1])
    }

    @Test func selfCopiesAreNoBundles() throws {
        let topology = try RedundancyTopology(r2o: [0, 1, 1, 0], groupSize: 2, nRedundant: 2)
        let shape = try ExpertShape(epSize: 2, nNodes: 1, groupSize: 2, nLogical: 4, nPhysical: 8)
        let tables = SolverTables(try Placement(shape: shape, topology: topology, order: [0, 1, 2, 3]))
        #expect(tables.nBundles == 2 && tables.nPlaces == 6)
        #expect(array(tables.classBundle, 4) == [-1, 0, -1, 1])
        #expect(array(tables.expertBundle, 4) == [-1, 0, -2, 1])
        #expect(array(tables.expertCopy, 4) == [2, 7, 6, 3])
    }

    @Test func replicasOnOneRankAreOnePlace() throws {
        let shape = try ExpertShape(epSize: 3, nNodes: 1, groupSize: 0, nLogical: 2, nPhysical: 9)
        let tables = SolverTables(try Placement(shape: shape, phy2log: [1, 0, 0, 0, 1, 1, 0, 0, 0]))
        #expect(array(tables.expertStart, 3) == [0, 3, 5])
        #expect(array(tables.placeSlot, 5) == [1, 3, 6, 0, 4])
        // Expert 1 has the smaller original slot, so its bundle comes first. Three places: no colours.
        #expect(array(tables.bundleExpert, 2) == [1, 0])
        #expect(tables.nColours == 0)
        #expect(tables.maxPlacesOfExpert == 3)
    }

    /// The structure does not depend on which experts stand where, only on the topology.
    @Test func historyDoesNotChangeTheStructure() throws {
        let a = SolverTables(try topologyPlacement(.cube8x2, groups: 2, ownExperts: 4))
        let b = SolverTables(try topologyPlacement(.cube8x2, groups: 2, ownExperts: 4, shuffled: Random(1)))
        #expect(array(a.arcRank, a.nArcs) == array(b.arcRank, b.nArcs))
        #expect(array(a.rankArc, a.nArcs) == array(b.rankArc, b.nArcs))
        #expect(array(a.colourEnd, a.nColours) == array(b.colourEnd, b.nColours))
        #expect(a.layout == b.layout)
    }

    @Test func coloursShareNoRank() throws {
        for topology in [RedundancyTopology.ring8, .cube8x2, .hypercube16x2, try .torus(8, 4), try .torus(5, 3)] {
            let tables = SolverTables(try topologyPlacement(topology, groups: 2, ownExperts: 2))
            var bundles = 0
            for c in 0..<tables.nColours {
                let arcs = Int(tables.bundleStart[Int(tables.colourBegin[c])])..<Int(tables.bundleStart[Int(tables.colourEnd[c])])
                #expect(Set(arcs.map { tables.arcRank[$0] }).count == arcs.count)
                bundles += Int(tables.colourEnd[c] - tables.colourBegin[c])
            }
            #expect(bundles == tables.nBundles)
        }
    }

    @Test func layoutIsAlignedAndComplete() throws {
        let tables = SolverTables(try topologyPlacement(.cube8x2, ownExperts: 5))
        let l = tables.layout
        let starts = [
            l.sizes, l.expertStart, l.placeSlot, l.placeRank, l.expertBundle, l.bundleExpertStart, l.bundleExpert, l.bundleStart, l.arcRank,
            l.arcBundle, l.groupBundleStart, l.groupColourStart, l.colourBegin, l.colourEnd, l.rankStart, l.rankArc, l.expertClass,
            l.expertCopy, l.classBundle, l.count,
        ]
        #expect(starts == starts.sorted() && Set(starts).count == starts.count)
        #expect(starts.allSatisfy { $0 % 4 == 0 })
        #expect(tables.blob.count == l.count * 4)
        // 40 experts, 56 slots, 8 ranks.
        #expect(l.placeSlot == 16 + 44 && l.placeRank - l.placeSlot == 56 && l.groupColourStart - l.groupBundleStart == 12)
    }
}
