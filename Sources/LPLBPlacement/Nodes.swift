// Nodes: groups of experts to hosts first, so that a token's experts lie on few hosts; then each host is balanced by itself.

/// Which node each group goes to: equally many to each, the heaviest node as light as can be. Exact while the search stays small (it does
/// for 8 groups on 4 nodes), else the best found within its limit, which begins with longest processing time first.
func groupsToNodes(_ weight: [Double], nNodes: Int) -> [Int] {
    var search = NodeSearch(weight, nNodes)
    search.descend(0)
    return search.best
}

private struct NodeSearch {
    private let order: [Int], weight: [Double], perNode: Int
    private var load: [Double], count: [Int], node: [Int]
    private var steps = 100_000
    private(set) var best: [Int]
    private var level = Double.infinity

    init(_ weight: [Double], _ nNodes: Int) {
        self.weight = weight
        order = weight.indices.sorted { (weight[$0], $1) > (weight[$1], $0) }
        perNode = weight.count / nNodes
        load = [Double](repeating: 0, count: nNodes)
        count = [Int](repeating: 0, count: nNodes)
        node = [Int](repeating: 0, count: weight.count)
        best = node
    }

    /// Places the groups from `index` on, each on the lightest node first, and leaves out what cannot be better than the best.
    mutating func descend(_ index: Int) {
        if index == order.count {
            let most = load.max() ?? 0
            if most < level { (level, best) = (most, node) }
            return
        }
        let group = order[index]
        var seen: Set<Double> = []
        for place in load.indices.sorted(by: { (load[$0], $0) < (load[$1], $1) }) where count[place] < perNode {
            // Nodes of one load are alike only while they also have equally many groups; empty ones always are.
            if count[place] == 0 && !seen.insert(-1).inserted { continue }
            if load[place] + weight[group] >= level || steps <= 0 && level < .infinity { continue }
            steps -= 1
            load[place] += weight[group]
            count[place] += 1
            node[group] = place
            descend(index + 1)
            load[place] -= weight[group]
            count[place] -= 1
        }
    }
}

/// The balanced placement inside nodes: every node holds the experts of its groups, on ranks nNodes equal blocks of which are the nodes.
func placeBalancedInNodes(_ board: Board, weight: UnsafePointer<Double>, nNodes: Int, nGroups: Int, tolerance: Double) {
    let size = board.nLogical / nGroups, ranksPerNode = board.nRanks / nNodes
    let byGroup = (0..<nGroups).map { group in (group * size..<(group + 1) * size).reduce(0.0) { $0 + weight[$1] } }
    let node = groupsToNodes(byGroup, nNodes: nNodes)
    // Nothing is gained on a node below the load that the heaviest node's ranks must have.
    let level = (0..<nNodes).map { place in
        let ranks = board.capacity[place * ranksPerNode..<(place + 1) * ranksPerNode].count { $0 > 0 }
        return (0..<nGroups).filter { node[$0] == place }.reduce(0.0) { $0 + byGroup[$1] } / Double(max(1, ranks))
    }.max() ?? 0
    board.clear()
    for place in 0..<nNodes {
        let experts = (0..<board.nLogical).filter { node[$0 / size] == place }
        let part = Board(nLogical: experts.count, capacity: Array(board.capacity[place * ranksPerNode..<(place + 1) * ranksPerNode]))
        let mine = experts.map { weight[$0] }
        mine.withUnsafeBufferPointer { mine in
            guard let first = mine.baseAddress else { return }
            placeBalanced(part, weight: first, tolerance: tolerance, target: level)
        }
        for (index, e) in experts.enumerated() { board.copies[e] = part.copies[index] }
        for rank in 0..<ranksPerNode {
            for slot in 0..<part.fill[rank] {
                let to = place * ranksPerNode + rank
                board.expert[to * board.width + slot] = Int32(experts[Int(part.expert[rank * part.width + slot])])
                board.fill[to] = slot + 1
            }
        }
    }
    board.weigh(weight)
}
