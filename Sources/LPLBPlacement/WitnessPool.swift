// WitnessPool: the sets of ranks that were tight so far, as quick lower bounds for placements that have not been solved.

/// A set S of ranks must bear all experts that have every place in S, so the heaviest rank has at least their load / |S|. The solver's
/// witness is a set for which this is the optimum itself. Sets found for one placement bound its neighbours, too.
struct WitnessPool {
    private let words: Int
    /// [sets][words], and how many ranks each has.
    private var sets: [UInt64] = [], sizes: [Double] = []
    /// Load that each set must bear under the placement that was given to `weigh`.
    private var must: [Double] = []
    private static let most = 48

    init(nRanks: Int) { words = (nRanks + 63) / 64 }

    mutating func add(_ ranks: [Int]) {
        var set = [UInt64](repeating: 0, count: words)
        for rank in ranks { set[rank >> 6] |= 1 << UInt64(rank & 63) }
        let isKnown = sizes.indices.contains { sets[$0 * words..<($0 + 1) * words].elementsEqual(set) }
        if ranks.isEmpty || isKnown { return }
        if sizes.count == WitnessPool.most {
            sets.removeFirst(words)
            sizes.removeFirst()
            must.removeFirst()
        }
        sets += set
        sizes.append(Double(ranks.count))
        must.append(0)
    }

    /// Adds up what each set must bear. places: of each expert, `words` words with a bit for each rank.
    mutating func weigh(_ places: [UInt64], _ loads: [Int64]) {
        for index in sizes.indices { weigh(index, places, loads) }
    }

    /// The same for the set that was added last.
    mutating func weighLatest(_ places: [UInt64], _ loads: [Int64]) { if !sizes.isEmpty { weigh(sizes.count - 1, places, loads) } }

    private mutating func weigh(_ index: Int, _ places: [UInt64], _ loads: [Int64]) {
        var sum = 0.0
        for e in loads.indices where isInside(index, places, e) { sum += Double(loads[e]) }
        must[index] = sum
    }

    @inline(__always)
    private func isInside(_ index: Int, _ places: [UInt64], _ e: Int) -> Bool {
        var outside: UInt64 = 0
        for word in 0..<words { outside |= places[e &* words &+ word] & ~sets[index &* words &+ word] }
        return outside == 0
    }

    /// A level below which no split of the changed placement can stay.
    func bound(_ changed: Changed, _ places: [UInt64], _ loads: [Int64]) -> Double {
        sizes.indices.reduce(0.0) { max($0, bound($1, changed, places, loads)) }
    }

    /// The bound by the set that was added last.
    func boundByLatest(_ changed: Changed, _ places: [UInt64], _ loads: [Int64]) -> Double {
        sizes.isEmpty ? 0 : bound(sizes.count - 1, changed, places, loads)
    }

    @inline(__always)
    private func bound(_ index: Int, _ changed: Changed, _ places: [UInt64], _ loads: [Int64]) -> Double {
        var sum = must[index]
        for (number, e) in changed.experts.enumerated() {
            let before = isInside(index, places, e), after = isInside(index, changed.places, number)
            if before != after { sum += after ? Double(loads[e]) : -Double(loads[e]) }
        }
        return sum / sizes[index]
    }
}

/// Experts that have other places in a placement that was not solved, and these places: [experts][words].
struct Changed {
    var experts: [Int] = []
    var places: [UInt64] = []
}
