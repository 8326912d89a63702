// Hub: few ranks hold only replicas (hubs), every other rank (a leaf) shares experts with a hub. Made for exact dispatch.
//
// A rank set without enough copies on ranks outside of it must bear what its experts bring. In rings of copies neighbours share the same
// few ways out; here every leaf has a way into a hub, and a leaf is in trouble only through the experts that stand on it alone.

/// A placement with hubs, or false where these sizes have none: it needs a replica for each leaf.
/// - Parameters:
///   - edges: experts of each leaf that have a copy on a hub.
///   - extraHubs: hubs beyond the fewest that hold all redundant copies.
///   - turn: which rank the hubs begin at, so that different layers burden different ranks.
func placeHubs(_ board: Board, _ drift: Drift, edges: Int, extraHubs: Int, turn: Int) -> Bool {
    let nLogical = board.nLogical, redundant = board.nSlots - nLogical
    let order = board.live.indices.map { board.live[($0 + turn) % board.live.count] }
    var hubs: [Int] = [], room = 0
    while room < redundant && hubs.count < order.count {
        room += board.capacity[order[hubs.count]]
        hubs.append(order[hubs.count])
    }
    for _ in 0..<extraHubs where hubs.count < order.count {
        room += board.capacity[order[hubs.count]]
        hubs.append(order[hubs.count])
    }
    let leaves = Array(order[hubs.count...]), nEdges = edges * leaves.count
    let fillers = room - redundant
    guard redundant > 0, !leaves.isEmpty, nEdges <= redundant, nEdges + fillers <= nLogical,
        leaves.allSatisfy({ board.capacity[$0] >= edges }) else { return false }

    let byLoad = (0..<nLogical).sorted { (drift.mean[$0], $1) > (drift.mean[$1], $0) }
    let edgeExperts = Array(byLoad[..<nEdges])
    board.clear()
    for e in 0..<nLogical { board.copies[e] = 1 }
    for e in edgeExperts { board.copies[e] = 2 }
    guard addCopies(board, drift, edgeExperts, redundant - nEdges, most: hubs.count + 1) else { return false }
    board.weigh(drift.mean)

    let risk = Risk(drift, nRanks: board.nRanks)
    let leafOf = placeEdges(board, drift, risk, edgeExperts, leaves)
    for e in byLoad[nEdges..<(nLogical - fillers)] {
        guard let leaf = risk.safest(leaves, board, e) else { return false }
        board.put(e, on: leaf)
        risk.add(e, part: 1, on: leaf)
    }
    guard placeOnHubs(board, drift, edgeExperts, leafOf: leafOf, hubs: hubs) else { return false }
    for e in byLoad[(nLogical - fillers)...] {
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

/// Edges to leaves in rounds, the heaviest first, each to the lightest leaf that has fewer edges than the others. An edge counts half,
/// since the other half can go to the hub.
/// - Returns: the leaf of each edge.
private func placeEdges(_ board: Board, _ drift: Drift, _ risk: Risk, _ experts: [Int], _ leaves: [Int]) -> [Int] {
    var key = [Double](repeating: 0, count: board.nRanks)
    var leafOf: [Int] = []
    for (index, e) in experts.enumerated() {
        let round = index / leaves.count
        let leaf = leaves.filter { board.fill[$0] == round }.min { (key[$0], $0) < (key[$1], $1) } ?? leaves[0]
        key[leaf] += 0.5 * drift.mean[e]
        board.put(e, on: leaf)
        risk.add(e, part: 0.5, on: leaf)
        leafOf.append(leaf)
    }
    return leafOf
}

/// The edges' copies, heaviest first, each to the hub with the least inflow, away from hubs that this expert's leaf or its other hubs
/// share already, and from its routing group.
private func placeOnHubs(_ board: Board, _ drift: Drift, _ experts: [Int], leafOf: [Int], hubs: [Int]) -> Bool {
    var inflow = [Double](repeating: 0, count: board.nRanks)
    var joined = Set<Int>()  // hub * ranks + leaf, and hub * ranks + hub
    let nGroups = (drift.nLogical + drift.groupSize - 1) / drift.groupSize
    var grouped = [Double](repeating: 0, count: board.nRanks * nGroups)
    let order = experts.indices.sorted {
        (drift.mean[experts[$0]] / Double(board.copies[experts[$0]]), $1) > (drift.mean[experts[$1]] / Double(board.copies[experts[$1]]), $0)
    }
    for index in order {
        let e = experts[index], others = board.copies[e] - 1
        let share = drift.mean[e] * Double(others) / Double(others + 1) / Double(others)
        var mine: [Int] = []
        var isMine = [Bool](repeating: false, count: board.nRanks), shared = [Int](repeating: 0, count: board.nRanks)
        for _ in 0..<others {
            var best = -1, least = Double.infinity
            for hub in hubs where board.hasRoom(hub) && !isMine[hub] {
                var cost = inflow[hub] + share + 0.3 * grouped[hub * nGroups + e / drift.groupSize]
                for _ in 0..<shared[hub] { cost += 0.5 * share }
                if joined.contains(hub * board.nRanks + leafOf[index]) { cost += drift.mean[e] * 4 }
                if cost < least { (best, least) = (hub, cost) }
            }
            if best < 0 { return false }
            board.put(e, on: best)
            inflow[best] += share
            grouped[best * nGroups + e / drift.groupSize] += share
            joined.insert(best * board.nRanks + leafOf[index])
            for other in mine {
                joined.insert(best * board.nRanks + other)
                joined.insert(other * board.nRanks + best)
            }
            mine.append(best)
            isMine[best] = true
            // Of the hubs that are left, those that share an expert with this one already.
            for hub in hubs where !isMine[hub] && joined.contains(hub * board.nRanks + best) { shared[hub] += 1 }
        }
    }
    return true
}
