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
    func take(_ previous: ArraySlice<Int32>, completedBy weight: [Double]) {
        take(Array(previous))
        weight.withUnsafeBufferPointer { if let first = $0.baseAddress { weigh(first) } }
        let lost = (0..<nLogical).filter { copies[$0] == 0 }.sorted { (weight[$0], $1) > (weight[$1], $0) }
        for e in lost {
            copies[e] = 1
            share[e] = weight[e]
            if let rank = live.filter(hasRoom).min(by: { (load[$0], $0) < (load[$1], $1) }) {
                put(e, on: rank)
                continue
            }
            var best = (cost: Double.infinity, rank: -1, slot: -1)
            for rank in live {
                for slot in 0..<fill[rank] {
                    let old = Int(expert[rank * width + slot])
                    if copies[old] > 1 && share[old] + load[rank] < best.cost { best = (share[old] + load[rank], rank, slot) }
                }
            }
            guard best.rank >= 0 else { continue }
            let place = expert + best.rank * width + best.slot, old = Int(place.pointee)
            copies[old] -= 1
            place.pointee = Int32(truncatingIfNeeded: e)
            weight.withUnsafeBufferPointer { if let first = $0.baseAddress { weigh(first) } }
        }
    }
}
