// Hub: few ranks hold only replicas (hubs), every other rank (a leaf) shares experts with a hub. Made for exact dispatch.
//
// A rank set without enough copies on ranks outside of it must bear what its experts bring. In rings of copies neighbours share the same
// few ways out; here every leaf has a way into a hub, and a leaf is in trouble only through the experts that stand on it alone.

/// The form of a placement with hubs.
struct HubForm {
    /// Experts of each leaf that have a copy on a hub, and how many leaves have one more.
    var edges: Int, more = 0
    /// Hubs beyond the fewest that hold all redundant copies.
    var extraHubs = 0
    /// The part of an edge's load that is reckoned to stay on its leaf when the leaf's other experts are chosen.
    var part: Double
}

/// A placement with hubs, or false where these sizes have none: it needs a replica for each leaf.
/// - Parameter turn: which rank the hubs begin at, so that different layers burden different ranks.
func placeHubs(_ board: Board, _ drift: Drift, _ form: HubForm, turn: Int) -> Bool {
    let nLogical = board.nLogical, redundant = board.nSlots - nLogical
    let order = board.live.indices.map { board.live[($0 + turn) % board.live.count] }
    var hubs: [Int] = [], room = 0
    while room < redundant && hubs.count < order.count {
        room += board.capacity[order[hubs.count]]
        hubs.append(order[hubs.count])
    }
    for _ in 0..<form.extraHubs where hubs.count < order.count {
        room += board.capacity[order[hubs.count]]
        hubs.append(order[hubs.count])
    }
    let leaves = Array(order[hubs.count...]), fillers = room - redundant
    let nEdges = form.edges * leaves.count + form.more, most = form.edges + (form.more > 0 ? 1 : 0)
    guard redundant > 0, form.more <= leaves.count, !leaves.isEmpty, nEdges <= redundant, nEdges + fillers <= nLogical,
        leaves.allSatisfy({ board.capacity[$0] >= most }) else { return false }

    let edgeExperts = Array(drift.byLoad[..<nEdges])
    board.clear()
    for e in 0..<nLogical { board.copies[e] = 1 }
    for e in edgeExperts { board.copies[e] = 2 }
    guard addCopies(board, drift, edgeExperts, redundant - nEdges, most: hubs.count + 1) else { return false }
    drift.mean.withUnsafeBufferPointer { if let mean = $0.baseAddress { board.weigh(mean) } }

    let risk = Risk(drift, nRanks: board.nRanks)
    let leafOf = placeEdges(board, drift, risk, edgeExperts, leaves, part: form.part)
    for e in drift.byLoad[nEdges..<(nLogical - fillers)] {
        guard let leaf = risk.safest(leaves, board, e) else { return false }
        board.put(e, on: leaf)
        risk.add(e, part: 1, on: leaf)
    }
    guard placeOnHubs(board, drift, edgeExperts, leafOf: leafOf, hubs: hubs) else { return false }
    for e in drift.byLoad[(nLogical - fillers)...] {
        guard let hub = hubs.filter(board.hasRoom).min(by: { (board.load[$0], $0) < (board.load[$1], $1) }) else { return false }
        board.put(e, on: hub)
    }
    return true
}

/// Further copies for the edge experts whose replicas are heaviest.
private func addCopies(_ board: Board, _ drift: Drift, _ experts: [Int], _ number: Int, most: Int) -> Bool {
    for _ in 0..<number {
        var best = -1, heaviest = -1.0
        for e in experts where board.copies[e] < most && drift.mean[e] / Double(board.copies[e]) > heaviest {
            (best, heaviest) = (e, drift.mean[e] / Double(board.copies[e]))
        }
        if best < 0 { return false }
        board.copies[best] += 1
    }
    return true
}

/// Edges to leaves in rounds, the heaviest first, each to the lightest leaf that has fewer edges than the others.
/// - Returns: the leaf of each edge.
private func placeEdges(
    _ board: Board, _ drift: Drift, _ risk: Risk, _ experts: [Int], _ leaves: [Int], part: Double
) -> [Int] {
    var key = [Double](repeating: 0, count: board.nRanks)
    var leafOf: [Int] = []
    leafOf.reserveCapacity(experts.count)
    for (index, e) in experts.enumerated() {
        let round = index / leaves.count
        var leaf = leaves[0], least = Double.infinity
        for other in leaves where board.fill[other] == round && (key[other], other) < (least, leaf) { (leaf, least) = (other, key[other]) }
        key[leaf] += drift.mean[e]
        board.put(e, on: leaf)
        risk.add(e, part: part, on: leaf)
        leafOf.append(leaf)
    }
    return leafOf
}

/// The edges' copies, heaviest first, each to the hub with the least inflow, away from hubs that this expert's leaf or its other hubs
/// share already, and from its routing group.
private func placeOnHubs(_ board: Board, _ drift: Drift, _ experts: [Int], leafOf: [Int], hubs: [Int]) -> Bool {
    let nRanks = board.nRanks, nGroups = drift.nGroups
    var inflow = [Double](repeating: 0, count: nRanks)
    var joined = [Bool](repeating: false, count: hubs.count * nRanks)  // a hub and a rank, by an expert that both hold
    var grouped = [Double](repeating: 0, count: nRanks * nGroups)
    var isMine = [Bool](repeating: false, count: nRanks), shared = [Int](repeating: 0, count: nRanks)
    let key = experts.map { drift.mean[$0] / Double(board.copies[$0]) }
    var mine: [Int] = []  // indices of hubs
    for index in experts.indices.sorted(by: { (key[$0], $1) > (key[$1], $0) }) {
        let e = experts[index], leaf = leafOf[index], others = board.copies[e] - 1, group = e / drift.groupSize
        let share = drift.mean[e] / Double(others + 1)
        mine.removeAll(keepingCapacity: true)
        for hub in hubs { (isMine[hub], shared[hub]) = (false, 0) }
        for _ in 0..<others {
            var best = -1, least = Double.infinity
            for (number, hub) in hubs.enumerated() where board.hasRoom(hub) && !isMine[hub] {
                var cost = inflow[hub] + share + 0.3 * grouped[hub * nGroups + group] + 0.5 * share * Double(shared[hub])
                if joined[number * nRanks + leaf] { cost += drift.mean[e] * 4 }
                if cost < least { (best, least) = (number, cost) }
            }
            if best < 0 { return false }
            let hub = hubs[best]
            board.put(e, on: hub)
            inflow[hub] += share
            grouped[hub * nGroups + group] += share
            joined[best * nRanks + leaf] = true
            for other in mine { (joined[best * nRanks + hubs[other]], joined[other * nRanks + hub]) = (true, true) }
            mine.append(best)
            isMine[hub] = true
            // Of the hubs that are left, those that share an expert with this one already.
            for (number, other) in hubs.enumerated() where !isMine[other] && joined[number * nRanks + hub] { shared[other] += 1 }
        }
    }
    return true
}
