// Board: one layer's placement while it is made. Ranks of different sizes, some of them dead, are ordinary here.

/// The slots of the ranks, which fill up and swap experts, and the load that each rank has under an even split over replicas.
///
/// Slots of a rank are `expert[rank * width ..< rank * width + capacity[rank]]`, the first `fill[rank]` of them in use.
final class Board {
    let nRanks: Int, nLogical: Int
    /// Slots that a rank has in the arrays, at least those of the largest rank.
    let width: Int
    let capacity: [Int]
    /// Ranks with at least one slot.
    let live: [Int]
    let nSlots: Int
    let expert: UnsafeMutablePointer<Int32>
    let fill: UnsafeMutablePointer<Int>
    let load: UnsafeMutablePointer<Double>
    /// [nLogical]: load of one replica of each expert, and how many there are.
    let share: UnsafeMutablePointer<Double>
    let copies: UnsafeMutablePointer<Int>

    /// - Parameter width: nil: the most slots of a rank; or more.
    init(nLogical: Int, capacity: [Int], width: Int? = nil) {
        self.nLogical = nLogical
        self.capacity = capacity
        nRanks = capacity.count
        self.width = width ?? capacity.max() ?? 0
        live = capacity.indices.filter { capacity[$0] > 0 }
        nSlots = capacity.reduce(0, +)
        expert = .allocate(capacity: nRanks * self.width)
        fill = .allocate(capacity: nRanks)
        load = .allocate(capacity: nRanks)
        share = .allocate(capacity: nLogical)
        copies = .allocate(capacity: nLogical)
        share.initialize(repeating: 0, count: nLogical)
        copies.initialize(repeating: 0, count: nLogical)
        clear()
    }

    deinit {
        expert.deallocate()
        fill.deallocate()
        load.deallocate()
        share.deallocate()
        copies.deallocate()
    }

    /// Takes all experts off the ranks.
    func clear() {
        expert.initialize(repeating: -1, count: nRanks * width)
        fill.initialize(repeating: 0, count: nRanks)
        load.initialize(repeating: 0, count: nRanks)
    }

    @inline(__always)
    func holds(_ rank: Int, _ e: Int32) -> Bool {
        let row = expert + rank &* width
        for slot in 0..<fill[rank] where row[slot] == e { return true }
        return false
    }

    @inline(__always)
    func hasRoom(_ rank: Int) -> Bool { fill[rank] < capacity[rank] }

    /// Puts an expert into the next free slot of a rank, which must have one.
    @inline(__always)
    func put(_ e: Int, on rank: Int) {
        expert[rank &* width &+ fill[rank]] = Int32(truncatingIfNeeded: e)
        fill[rank] &+= 1
        load[rank] += share[e]
    }

    /// Sets the shares and the loads of the ranks from weights, for what the board holds.
    func weigh(_ weight: UnsafePointer<Double>) {
        for e in 0..<nLogical { share[e] = weight[e] / Double(max(1, copies[e])) }
        for rank in 0..<nRanks { weigh(rank: rank) }
    }

    /// Adds up a rank anew: swaps leave rounding errors, and equal placements must have equal loads.
    @inline(__always)
    func weigh(rank: Int) {
        var sum = 0.0
        for slot in 0..<fill[rank] { sum += share[Int(expert[rank &* width &+ slot])] }
        load[rank] = sum
    }

    /// The load of the heaviest rank.
    var heaviest: Double { live.reduce(0.0) { max($0, load[$1]) } }

    /// mean / max load of the live ranks; 1 without any load.
    var balance: Double {
        var most = 0.0, sum = 0.0
        for rank in live {
            most = max(most, load[rank])
            sum += load[rank]
        }
        return most > 0 ? sum / Double(live.count) / most : 1
    }

    /// Slots that hold a second copy of an expert on their rank.
    var duplicates: Int {
        var found = 0
        for rank in live {
            let row = expert + rank * width
            for slot in 0..<fill[rank] where (0..<slot).contains(where: { row[$0] == row[slot] }) { found += 1 }
        }
        return found
    }
}

extension Board {
    /// [nRanks * width], -1 for slots that are empty or that a rank does not have.
    var phy2log: [Int32] { Array(UnsafeBufferPointer(start: expert, count: nRanks * width)) }

    /// Sets what the ranks hold, with its copies; -1 may stand anywhere in a rank's block.
    func take(_ phy2log: [Int32]) {
        clear()
        copies.update(repeating: 0, count: nLogical)
        for rank in 0..<nRanks {
            for e in phy2log[rank * width..<(rank + 1) * width] where e >= 0 && hasRoom(rank) {
                expert[rank * width + fill[rank]] = e
                fill[rank] += 1
                copies[Int(e)] += 1
            }
        }
    }
}

extension Board {
    /// Sets what the ranks hold, and gives a slot to each expert that no rank holds any more, such as those of a rank that died: a free one
    /// on the lightest rank, else that of the lightest copy of an expert with several. There must be as many slots as experts.
    /// - Parameters:
    ///   - ranksPerNode: ranks of a host; nil: there is one host.
    ///   - groupSize: experts of a group. What is given a slot stays on the host of its group where it can.
    func take(_ previous: ArraySlice<Int32>, completedBy weight: [Double], ranksPerNode: Int? = nil, groupSize: Int = 1) {
        take(Array(previous))
        weight.withUnsafeBufferPointer { if let first = $0.baseAddress { weigh(first) } }
        let lost = (0..<nLogical).filter { copies[$0] == 0 }.sorted { (weight[$0], $1) > (weight[$1], $0) }
        for e in lost {
            let ranks = ranksPerNode.map { near(e, ranksPerNode: $0, groupSize: groupSize) } ?? live
            if !give(e, to: ranks, weight) && ranks.count < live.count { _ = give(e, to: live, weight) }
        }
    }

    /// The ranks of the host that the experts of e's group stand on; all where none stands anywhere, or they stand on several.
    private func near(_ e: Int, ranksPerNode: Int, groupSize: Int) -> [Int] {
        let group = e / groupSize
        let nodes = Set(live.filter { rank in
            (0..<fill[rank]).contains { Int(expert[rank * width + $0]) / groupSize == group }
        }.map { $0 / ranksPerNode })
        guard let node = nodes.first, nodes.count == 1 else { return live }
        return live.filter { $0 / ranksPerNode == node }
    }

    /// False where none of the ranks has a slot for an expert that stands nowhere.
    private func give(_ e: Int, to ranks: [Int], _ weight: [Double]) -> Bool {
        if let rank = ranks.filter(hasRoom).min(by: { (load[$0], $0) < (load[$1], $1) }) {
            copies[e] = 1
            share[e] = weight[e]
            put(e, on: rank)
            return true
        }
        var best = (cost: Double.infinity, rank: -1, slot: -1)
        for rank in ranks {
            for slot in 0..<fill[rank] {
                let old = Int(expert[rank * width + slot])
                if copies[old] > 1 && share[old] + load[rank] < best.cost { best = (share[old] + load[rank], rank, slot) }
            }
        }
        guard best.rank >= 0 else { return false }
        let place = expert + best.rank * width + best.slot
        copies[Int(place.pointee)] -= 1
        copies[e] = 1
        place.pointee = Int32(truncatingIfNeeded: e)
        weight.withUnsafeBufferPointer { if let first = $0.baseAddress { weigh(first) } }
        return true
    }
}
