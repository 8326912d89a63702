import LPLBTopology
import Testing

@testable import LPLBSolver

@Suite struct NetworkTests {
    /// Written out by hand: two ranks, each copying the other's first two experts, in pairs.
    @Test func smallTopology() throws {
        let topology = try RedundancyTopology(r2o: [1, 0], groupSize: 2, nRedundant: 1)
        let shape = try ExpertShape(epSize: 2, nNodes: 1, groupSize: 2, nLogical: 6, nPhysical: 10)
        let network = Network(try Placement(shape: shape, topology: topology, order: [5, 4, 3, 2, 1, 0]))
        // Rank 0: experts 5 4 3, copies of 2 1; rank 1: experts 2 1 0, copies of 5 4.
        #expect(Array(network.expertStart) == [0, 1, 3, 5, 6, 8, 10])
        #expect(Array(network.placeSlot) == [7, 6, 4, 5, 3, 2, 1, 9, 0, 8])
        #expect(Array(network.placeRank) == [1, 1, 0, 1, 0, 0, 0, 1, 0, 1])
        #expect(Array(network.expertBundle) == [-2, 1, 1, -1, 0, 0])
        #expect(network.nBundles == 2 && network.nArcs == 4 && network.colourEnd.count == 2)
        #expect(network.bundleExperts == 2)
        #expect(Array(network.bundleExpert) == [5, 4, 2, 1])
        #expect(Array(network.bundleStart) == [0, 2, 4])
        #expect(Array(network.arcRank) == [0, 1, 1, 0])
        #expect(Array(network.arcBundle) == [0, 0, 1, 1])
        #expect(Array(network.rankStart) == [0, 2, 4])
        #expect(Array(network.rankArc) == [0, 3, 1, 2])
        #expect(Array(network.colourEnd) == [1, 2] && network.colours(of: 0) == 0..<2)
        #expect(Array(network.expertClass) == [-1, 1, 1, -1, 0, 0])
        #expect(Array(network.expertCopy) == [-1, 4, 3, -1, 9, 8])
    }

    @Test func selfCopiesAreNoBundles() throws {
        let topology = try RedundancyTopology(r2o: [0, 1, 1, 0], groupSize: 2, nRedundant: 2)
        let shape = try ExpertShape(epSize: 2, nNodes: 1, groupSize: 2, nLogical: 4, nPhysical: 8)
        let network = Network(try Placement(shape: shape, topology: topology, order: [0, 1, 2, 3]))
        #expect(network.nBundles == 2 && network.nPlaces == 6)
        #expect(Array(network.expertBundle) == [-1, 0, -2, 1])
        #expect(Array(network.expertCopy) == [2, 7, 6, 3])
    }

    @Test func replicasOnOneRankAreOnePlace() throws {
        let shape = try ExpertShape(epSize: 3, nNodes: 1, groupSize: 0, nLogical: 2, nPhysical: 9)
        let network = Network(try Placement(shape: shape, phy2log: [1, 0, 0, 0, 1, 1, 0, 0, 0]))
        #expect(Array(network.expertStart) == [0, 3, 5])
        #expect(Array(network.placeSlot) == [1, 3, 6, 0, 4])
        // Expert 1 has the smaller original slot, so its bundle comes first. Three places: no colours.
        #expect(Array(network.bundleExpert) == [1, 0])
        #expect(network.colourEnd.count == 0)
    }

    /// The structure does not depend on which experts stand where, only on the topology.
    @Test func historyDoesNotChangeTheStructure() throws {
        let a = Network(try topologyPlacement(.cube8x2, groups: 2, ownExperts: 4))
        let b = Network(try topologyPlacement(.cube8x2, groups: 2, ownExperts: 4, shuffled: Random(1)))
        #expect(Array(a.arcRank) == Array(b.arcRank))
        #expect(Array(a.rankArc) == Array(b.rankArc))
        #expect(Array(a.colourEnd) == Array(b.colourEnd))
    }

    @Test func coloursShareNoRank() throws {
        for topology in [RedundancyTopology.ring8, .cube8x2, .hypercube16x2, .torus(8, 4), .torus(5, 3)] {
            let network = Network(try topologyPlacement(topology, groups: 2, ownExperts: 2))
            var first = 0
            for end in network.colourEnd {
                let ranks = (first..<Int(end)).flatMap { network.arcs(of: $0) }.map { network.arcRank[$0] }
                #expect(Set(ranks).count == ranks.count)
                first = Int(end)
            }
            #expect(first == network.nBundles)
        }
    }
}
