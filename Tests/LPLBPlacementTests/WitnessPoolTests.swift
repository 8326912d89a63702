// WitnessPool: its bounds against the solver, on changes of random placements.

@testable import LPLBPlacement
import LPLBSolver
import LPLBTopology
import Testing

/// The level of the exact split, and the ranks that are tight.
private func solved(_ board: Board, _ loads: [Int64]) throws -> (level: Int64, witness: [Int]) {
    let shape = try ExpertShape(
        epSize: board.nRanks, nNodes: 1, groupSize: 0, nLogical: board.nLogical, nPhysical: board.nRanks * board.width)
    let solver = FlowSolver(Network(try Placement(shape: shape, phy2log: board.phy2log)))
    loads.withUnsafeBufferPointer { solver.solve(loads: $0.baseAddress!) }
    let words = solver.witness(ofGroup: 0)
    return (solver.results[0].maxLoad, (0..<board.nRanks).filter { words[$0 / 32] >> UInt32($0 % 32) & 1 == 1 })
}

@Test func boundsOfWitnessesHoldAndAreMetByTheirOwnPlacement() throws {
    var random = Random(seed: 53), tight = 0, tried = 0
    for _ in 0..<60 {
        let ranks = 2 + random.below(70), width = 2 + random.below(4), experts = ranks + random.below(ranks * (width - 1))
        let board = Board(nLogical: experts, capacity: [Int](repeating: width, count: ranks))
        board.take((0..<ranks * width).map { Int32($0 < experts ? $0 : random.below(experts)) }.shuffled(using: &random))
        let loads = (0..<experts).map { _ in Int64(random.below(1000) * random.below(1000)) }
        let pool = WitnessPool(board)
        pool.begin(loads)
        for _ in 0..<80 {
            // Two slots exchange their experts, or one gets a copy of another expert.
            let rank = random.below(ranks), other = random.below(ranks), slot = rank * width + random.below(width)
            let place = other * width + random.below(width), a = board.expert[slot], b = board.expert[place]
            let isCopy = random.below(2) == 0 && board.copies[Int(a)] > 1
            if rank == other || a == b || !isCopy && (board.holds(rank, b) || board.holds(other, a)) { continue }
            let bound = pool.bound(
                .init(expert: Int(b), from: isCopy ? -1 : other, to: rank), .init(expert: Int(a), from: rank, to: isCopy ? -1 : other))
            let before = board.phy2log
            board.expert[slot] = b
            if !isCopy { board.expert[place] = a }
            board.take(board.phy2log)
            let after = try solved(board, loads)
            #expect(bound <= Double(after.level))
            if random.below(2) == 0 {
                board.take(before)
            }
            pool.note()
            _ = pool.add(try solved(board, loads).witness)
            // Nothing changes when an expert leaves a rank and comes back: the witness is among the sets, so the bound is the optimum.
            let same = WitnessPool.Edit(expert: Int(board.expert[slot]), from: rank, to: rank)
            let level = try solved(board, loads).level
            #expect(pool.bound(same, same) > Double(level) - 1 && pool.bound(same, same) <= Double(level))
            tried += 1
            tight += bound > 0.9 * Double(after.level) ? 1 : 0
        }
    }
    #expect(tried > 1000 && tight > tried / 2)
}
