// Group: one group's view of the solver's memory, with the beginning, the sweeps and the end of the algorithm.

/// The level T and the counters of a group while it is solved.
struct GroupState {
    var capacity: Capacity
    var total: Int64
    /// The first T, which all ranks together force.
    var mean: Int64 = 0
    var rounds = 0
}

/// Ranks are counted within the group, arcs and bundles over all groups.
struct Group {
    /// Groups up to this size use one 64-bit mask as a set of ranks.
    static let maskRanks = 64
    /// Rounds without spilling, in which one rank above its cap without distance is enough to raise T; later on, none of them may have one.
    static let plainRounds = 32

    let memory: SolverMemory
    let size: Int
    let firstBundle: Int
    let endBundle: Int
    /// The group has colours.
    let sweeps: Bool
    let load: UnsafeMutablePointer<Int64>
    let base: UnsafeMutablePointer<Int64>
    let rankStart: UnsafePointer<Int32>
    let witness: RankSet
    /// nil: all ranks are alike.
    let costs: RankCosts?

    var demand: UnsafeMutablePointer<Int64> { memory.demand }
    var x: UnsafeMutablePointer<Int64> { memory.x }
    var incoming: UnsafeMutablePointer<Int64> { memory.incoming }
    var bundleStart: Network.Table { memory.network.bundleStart }
    var arcRank: Network.Table { memory.network.arcRank }
    var arcBundle: Network.Table { memory.network.arcBundle }
    var arcMask: UnsafePointer<UInt64> { memory.arcMask }
    var rankArc: Network.Table { memory.network.rankArc }
    var adjacent: UnsafeMutablePointer<UInt64> { memory.adjacent }
    var distance: UnsafeMutablePointer<Int32> { memory.distance }
    var bundleDistance: UnsafeMutablePointer<Int32> { memory.bundleDistance }
    var queue: UnsafeMutablePointer<Int32> { memory.queue }
    var distanceStart: UnsafeMutablePointer<Int32> { memory.distanceStart }
    var receivers: UnsafeMutablePointer<Int32> { memory.receivers }

    @inline(__always)
    init(_ memory: SolverMemory, _ index: Int, ranked: Bool = false) {
        let network = memory.network, bundles = network.bundles(of: index)
        self.memory = memory
        size = network.shape.groupSize
        (firstBundle, endBundle) = (bundles.lowerBound, bundles.upperBound)
        sweeps = network.groupColourStart[index] < network.groupColourStart[index &+ 1]
        let firstRank = index &* size
        load = memory.load + firstRank
        base = memory.base + firstRank
        rankStart = network.rankStart.baseAddress! + firstRank
        witness = RankSet(words: memory.witness + index &* FlowSolver.witnessWords, size: size)
        costs = ranked ? memory.costs(ofGroup: index) : nil
    }

    /// Rounds of the loop after which it gives up, a guard that is never met.
    var maxRounds: Int { Group.plainRounds &+ (size &+ 1) &* (size &* size &+ 2) }

    /// Some rank has more than it may hold.
    @inline(__always)
    func exceeds(_ capacity: Capacity) -> Bool {
        var most: Int64 = 0
        var r = 0
        while r < size {
            most = max(most, load[r] &- capacity.cap(r))
            r &+= 1
        }
        return most > 0
    }

    // MARK: Start

    /// Splits every bundle evenly and takes the first level.
    func start() -> GroupState {
        var total: Int64 = 0
        for r in 0..<size {
            load[r] = base[r]
            total &+= base[r]
        }
        for u in firstBundle..<endBundle {
            total &+= demand[u]
            splitEvenly(u)
        }
        var state = GroupState(capacity: Capacity(total: total, size: size, caps: memory.caps, costs: costs), total: total)
        witness.removeAll()
        witness.insertAll()
        state.capacity.raise(witness, holding: total)
        state.mean = state.capacity.level
        var highest = state.mean
        var busiest = -1
        for r in 0..<size where base[r] > state.capacity.cap(r) {
            let level = state.capacity.level(of: base[r], on: r)
            if level > highest {
                highest = level
                busiest = r
            }
        }
        if busiest >= 0 {
            witness.removeAll()
            witness.insert(busiest)
            state.capacity.raise(witness, holding: base[busiest])
        }
        return state
    }

    @inline(__always)
    private func splitEvenly(_ bundle: Int) {
        let tokens = demand[bundle], first = Int(bundleStart[bundle]), end = Int(bundleStart[bundle &+ 1])
        if end &- first == 2 {
            let half = tokens >> 1
            put(first, tokens &- half)
            put(first &+ 1, half)
        } else {
            let part = tokens / Int64(end &- first)
            let rest = Int(tokens &- part &* Int64(end &- first))
            for arc in first..<end { put(arc, part &+ (arc &- first < rest ? 1 : 0)) }
        }
    }

    @inline(__always)
    private func put(_ arc: Int, _ tokens: Int64) {
        x[arc] = tokens
        load[Int(arcRank[arc])] &+= tokens
    }

    // MARK: Sweep

    /// Levels the two ranks of each bundle. The bundles come colour by colour, and those of a colour share no rank.
    func sweep(_ capacity: Capacity) {
        let load = load, x = x, arcRank = arcRank, bundleStart = bundleStart
        var u = firstBundle
        while u < endBundle {
            let arc = Int(bundleStart[u])
            let r = Int(arcRank[arc]), s = Int(arcRank[arc &+ 1])
            let wanted = capacity.transfer(from: r, holding: load[r], to: s, holding: load[s])
            let tokens = max(0 &- x[arc &+ 1], min(x[arc], wanted))
            x[arc] &-= tokens
            x[arc &+ 1] &+= tokens
            load[r] &-= tokens
            load[s] &+= tokens
            u &+= 1
        }
    }

    // MARK: Result

    func result(_ state: GroupState) -> GroupResult {
        var result = GroupResult()
        result.bound = state.capacity.level
        if costs != nil && !exceeds(state.capacity) {
            // T is the least level that its witness can have, so no split that keeps within T has a lower one.
            result.maxLoad = result.bound
        } else {
            for r in 0..<size { result.maxLoad = max(result.maxLoad, state.capacity.level(of: load[r], on: r)) }
        }
        result.total = state.total
        result.rounds = Int64(state.rounds)
        result.witnessSize = witness.count
        for u in firstBundle..<endBundle { result.moved &+= demand[u] &- x[Int(bundleStart[u])] }
        return result
    }

    func level(_ state: GroupState, _ result: GroupResult) -> GroupLevel {
        let scale: Int64 = costs == nil ? 1024 : 1
        return GroupLevel(
            reached: result.maxLoad &* scale, bound: result.bound &* scale, mean: state.mean &* scale,
            isTokens: costs == nil && memory.unit.size == 1)
    }
}
