// What the kernels are given, read back by the layout of tables.h, and the numbers that Swift and the kernels must have in common.

import CLPLB
import CLPLBKernels
import LPLBTopology
import Testing

@testable import LPLB
@testable import LPLBSolver

@Suite struct DeviceImageTests {
    @Test func numbersOfTheSolverAndTheKernels() throws {
        #expect(Network.maxColours == Int(LPLBK_MAX_COLOURS))
        #expect(Group.plainRounds == Int(LPLBK_PLAIN_ROUNDS))
        for size in [1, 8, 64, 512] {
            let shape = try ExpertShape(epSize: size, nNodes: 1, groupSize: 0, nLogical: size, nPhysical: size)
            let solver = FlowSolver(Network(try Placement(shape: shape, phy2log: (0..<Int32(size)).map { $0 })))
            #expect(Group(solver.memory, 0).maxRounds == Int(lplbk_max_rounds(Int32(size))))
        }
        #expect(Int(LPLB_MAX_RANKS_CUDA) == Int(LPLBK_MAX_GROUP) && Int(LPLB_MAX_LOGICAL_CUDA) == Int(LPLBK_MAX_LOGICAL))
        #expect(Int(LPLB_MAX_PHYSICAL_CUDA) == Int(LPLBK_MAX_PHYSICAL) && Int(LPLB_MAX_LAYOUT_ROWS) == Int(LPLBK_MAX_LAYOUT_ROWS))
        let layout = [
            LPLB_LAYOUT_BAD_IDS, LPLB_LAYOUT_OTHER_EXPERTS, LPLB_LAYOUT_OTHER_PLAN, LPLB_LAYOUT_NO_PLAN, LPLB_LAYOUT_BAD_RECEIVED,
            LPLB_LAYOUT_BY_ROW_SHORT, LPLB_LAYOUT_RANKS,
        ]
        #expect(
            layout == [
                LPLBK_LAYOUT_BAD_IDS, LPLBK_LAYOUT_OTHER_EXPERTS, LPLBK_LAYOUT_OTHER_PLAN, LPLBK_LAYOUT_NO_PLAN,
                LPLBK_LAYOUT_BAD_RECEIVED, LPLBK_LAYOUT_BY_ROW_SHORT, LPLBK_LAYOUT_RANKS,
            ])
    }

    /// The words of one expert.
    private func entry(_ expert: Int32, _ place: Int32, _ slot: Int32, copy: Int32 = Int32(LPLBK_NO_SLOT), _ slotClass: Int32 = -1) -> [Int32] {
        [expert, place, slot | copy << 16, slotClass]
    }

    /// Two groups of two ranks with two slots each. Written out by hand.
    @Test func generalPlacement() throws {
        let shape = try ExpertShape(epSize: 4, nNodes: 1, groupSize: 2, nLogical: 5, nPhysical: 8)
        // Group 0: rank 0 holds 4 1, rank 1 holds 1 0; group 1: rank 2 holds 3 2, rank 3 holds 2 3.
        let network = Network(try Placement(shape: shape, phy2log: [4, 1, 1, 0, 3, 2, 2, 3]))
        var of = lplbk_shape()
        (of.ep_size, of.group_size, of.n_groups, of.n_nodes, of.n_logical, of.n_physical) = (4, 2, 2, 1, 5, 8)
        (of.rank, of.bundle_experts, of.max_bundles, of.max_arcs) = (-1, 1, 2, 4)
        let at = withUnsafePointer(to: of) { lplbk_layout_of($0) }
        let words = DeviceImage.words(network, shape: of, layout: at, digest: 7)
        func section(_ start: Int32, _ count: Int) -> [Int32] { Array(words[Int(start)..<Int(start) + count]) }

        #expect(words.count == Int(at.words) && section(at.digest, 1) == [7])
        #expect(section(at.n_bundled, 1) == [3] && section(at.n_replicated, 1) == [3])
        // Expert 1, then 3 (slot 4), then 2 (slot 5). Bundles of the second group begin at 2.
        #expect(section(at.replicated, 12) == entry(1, 0, 1) + entry(3, 2, 4) + entry(2, 3, 5))
        #expect(section(at.code, 5) == [3, -1, -3, -2, 0])
        #expect(section(at.slot_expert, 8) == [4, 1, 1, 0, 3, 2, 2, 3])
        #expect(section(at.expert, 12) == entry(1, 0, 1) + entry(4, -1, 0) + entry(0, -2, 3))
        #expect(section(at.expert + 12, 8) == entry(3, 2, 4) + entry(2, 3, 5))
        #expect(section(at.image + Int32(LPLBK_IMAGE_FIRST_EXPERT), 2) == [0, 3])
        let copy = Int32.min, bundle1: Int32 = 1 << 13
        let image = at.image + at.image_words
        #expect(section(image + Int32(LPLBK_IMAGE_FIRST_EXPERT), 2) == [3, 2])
        #expect(section(image, 3) == [2, 4, 2] && section(image + Int32(LPLBK_IMAGE_COLOUR), 3) == [0, 1, 2])
        #expect(section(image + Int32(LPLBK_IMAGE_PAIRS), 1) == [1])
        #expect(section(image + at.bundle_start, 3) == [0, 2, 4])
        #expect(section(image + at.arc_rank, 4) == [0, 1, 0, 1])
        #expect(section(image + at.arc_slot, 4) == [4, 7 | copy, 5, 6 | copy])
        #expect(section(image + at.rank_start, 3) == [0, 2, 4])
        #expect(section(image + at.rank_arc, 4) == [0, 2 | bundle1, 1, 3 | bundle1])
        #expect(section(image + at.mask, 2) == [3, 3])
        #expect(section(image + at.lanes, 4) == [lplbk_lane(1, 0, 0), lplbk_lane(0, 0, 1), lplbk_no_lane(2), lplbk_no_lane(3)])
    }

    /// Two ranks that copy each other's first expert, or their own.
    @Test(arguments: [[1, 0], [0, 1]]) func topology(r2o: [Int32]) throws {
        let topology = try RedundancyTopology(r2o: r2o, groupSize: 2, nRedundant: 1)
        let shape = try ExpertShape(epSize: 2, nNodes: 1, groupSize: 2, nLogical: 4, nPhysical: 6)
        let network = Network(try Placement(shape: shape, topology: topology, order: [3, 2, 1, 0]))
        var of = lplbk_shape()
        (of.ep_size, of.group_size, of.n_groups, of.n_nodes, of.n_logical, of.n_physical) = (2, 2, 1, 1, 4, 6)
        (of.rank, of.n_redundant, of.bundle_experts, of.colours, of.max_bundles, of.max_arcs) = (-1, 1, 1, 2, 2, 4)
        let at = withUnsafePointer(to: of) { lplbk_layout_of($0) }
        let words = DeviceImage.words(network, shape: of, layout: at, digest: 7)
        func section(_ start: Int32, _ count: Int) -> [Int32] { Array(words[Int(start)..<Int(start) + count]) }

        let alone = entry(2, -1, 1) + entry(0, -2, 4)
        #expect(section(at.n_replicated, 1) == [2])
        if r2o == [1, 0] {  // rank 0: experts 3 2, copy of 1; rank 1: experts 1 0, copy of 3
            let pairs = entry(3, 0, 0, copy: 5, 0) + entry(1, 1, 3, copy: 2, 1)
            #expect(section(at.n_bundled, 1) == [2] && section(at.code, 4) == [4, -2, 1, -1])
            #expect(section(at.replicated, 8) == pairs && section(at.expert, 16) == pairs + alone)
            #expect(section(at.slot_expert, 6) == [3, 2, 1, 1, 0, 3])
            #expect(section(at.class_bundle, 2) == [0, 1])
            let lanes = at.image + at.lanes
            #expect(section(lanes, 2) == [lplbk_lane(1, 0, 0), lplbk_lane(0, 0, 1)])
            #expect(section(lanes + 32, 3) == [lplbk_lane(1, 1, 1), lplbk_lane(0, 1, 0), lplbk_no_lane(2)])
        } else {
            let first = entry(3, -1, 0, copy: 2, 0), second = entry(1, -2, 3, copy: 5, 1)
            #expect(section(at.n_bundled, 1) == [0] && section(at.code, 4) == [4, -1, 1, -2])
            #expect(section(at.replicated, 8) == second + first)
            #expect(section(at.expert, 16) == first + entry(2, -1, 1) + second + entry(0, -2, 4))
            #expect(section(at.slot_expert, 6) == [3, 2, -1, 1, 0, -1])
            #expect(section(at.class_bundle, 2) == [-1, -1])
        }
    }
}
