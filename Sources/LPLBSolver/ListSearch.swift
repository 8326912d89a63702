// ListSearch: the solver's loop for groups of any size, with queues of ranks. O(ranks + arcs) a search.

struct ListSearch {
    private let group: Group
    private let load: UnsafeMutablePointer<Int64>
    private let x: UnsafeMutablePointer<Int64>
    private let arcRank: UnsafePointer<Int32>
    private let arcBundle: UnsafePointer<Int32>
    private let bundleStart: UnsafePointer<Int32>
    private let rankStart: UnsafePointer<Int32>
    private let rankArc: UnsafePointer<Int32>
    /// [size] level of a rank, -1: none.
    private let level: UnsafeMutablePointer<Int32>
    /// Ranks in the order of their levels; level k is `queue[levelStart[k] ..< levelStart[k + 1]]`.
    private let queue: UnsafeMutablePointer<Int32>
    private let levelStart: UnsafeMutablePointer<Int32>
    /// The smallest level of a bundle's ranks, -1: none.
    private let bundleLevel: UnsafeMutablePointer<Int32>
    private let incoming: UnsafeMutablePointer<Int64>
    /// Ranks that received in a step of spilling.
    private let receivers: UnsafeMutablePointer<Int32>

    init(_ group: Group) {
        self.group = group
        load = group.load
        x = group.x
        arcRank = group.arcRank
        arcBundle = group.arcBundle
        bundleStart = group.bundleStart
        rankStart = group.rankStart
        rankArc = group.rankArc
        level = group.work.level
        queue = group.work.queue
        levelStart = group.work.levelStart
        bundleLevel = group.work.bundleLevel
        incoming = group.work.incoming
        receivers = group.work.receivers
    }

    func run(_ state: inout GroupState) {
        let maxRounds = group.work.tables.maxRounds
        while state.rounds < maxRounds {
            var over = 0, found = 0
            for r in 0..<group.size {
                let tokens = load[r]
                level[r] = -1
                if tokens > state.bound {
                    over &+= 1
                } else if tokens < state.bound {
                    level[r] = 0
                    queue[found] = Int32(truncatingIfNeeded: r)
                    found &+= 1
                }
            }
            if over == 0 { return }
            state.rounds &+= 1
            for u in group.firstBundle..<group.endBundle { bundleLevel[u] = -1 }
            var wanted = over
            var k = search(&wanted, found, state.bound)
            if wanted == over || wanted > 0 && state.rounds <= Group.plainRounds {
                state.bound = raise()
                continue
            }
            while k >= 1 {
                push(k, state.bound)
                k &-= 1
            }
            if state.rounds > Group.plainRounds { spill(state.bound) }
        }
    }

    /// Levels of the ranks, from those with room (level 0, already queued) on, until no rank above the bound is without.
    /// `wanted`: ranks above the bound without level. Returns the last level.
    private func search(_ wanted: inout Int, _ roots: Int, _ bound: Int64) -> Int {
        var k: Int32 = 0
        var first = 0, end = roots
        levelStart[0] = 0
        levelStart[1] = Int32(truncatingIfNeeded: end)
        while wanted > 0 && first < end {
            var tail = end
            for i in first..<end {
                let q = Int(queue[i])
                for entry in Int(rankStart[q])..<Int(rankStart[q &+ 1]) {
                    let bundle = Int(arcBundle[Int(rankArc[entry])])
                    // The first rank that meets a bundle gives a level to all its others with tokens in it.
                    if bundleLevel[bundle] >= 0 { continue }
                    bundleLevel[bundle] = k
                    for arc in Int(bundleStart[bundle])..<Int(bundleStart[bundle &+ 1]) where x[arc] > 0 {
                        let r = Int(arcRank[arc])
                        if level[r] >= 0 { continue }
                        level[r] = k &+ 1
                        queue[tail] = Int32(truncatingIfNeeded: r)
                        tail &+= 1
                        if load[r] > bound { wanted &-= 1 }
                    }
                }
            }
            first = end
            end = tail
            k &+= 1
            levelStart[Int(k) &+ 1] = Int32(truncatingIfNeeded: end)
        }
        return Int(k)
    }

    /// The bound from the ranks without level, whose tokens cannot leave them; they become the witness.
    private func raise() -> Int64 {
        var sum: Int64 = 0, count = 0
        for i in 0..<FlowSolver.witnessWords { group.witness[i] = 0 }
        for r in 0..<group.size where level[r] < 0 {
            sum &+= load[r]
            count &+= 1
            group.witness[r >> 5] |= 1 << UInt32(r & 31)
        }
        return ceiling(sum, count)
    }

    /// One step of the wave: the ranks of level k that are above the bound give to those of level k - 1.
    private func push(_ k: Int, _ bound: Int64) {
        let target = Int32(truncatingIfNeeded: k &- 1)
        for i in Int(levelStart[k])..<Int(levelStart[k &+ 1]) {
            let r = Int(queue[i])
            if load[r] > bound { give(r, target, bound) }
        }
        if k > 1 { return }
        for i in 0..<Int(levelStart[1]) {
            let q = Int(queue[i])
            load[q] &+= incoming[q]
            incoming[q] = 0
        }
    }

    private func give(_ r: Int, _ target: Int32, _ bound: Int64) {
        var excess = load[r] &- bound
        var i = Int(rankStart[r])
        let end = Int(rankStart[r &+ 1])
        while i < end && excess > 0 {
            let arc = Int(rankArc[i])
            i &+= 1
            let bundle = Int(arcBundle[arc])
            guard x[arc] > 0, bundleLevel[bundle] == target else { continue }
            var other = Int(bundleStart[bundle])
            let endArc = Int(bundleStart[bundle &+ 1])
            while other < endArc {
                let q = Int(arcRank[other])
                if other != arc && level[q] == target {
                    var tokens = Swift.min(excess, x[arc])
                    if target == 0 {
                        // The load is that from before this step, so there is room.
                        tokens = Swift.min(tokens, bound &- load[q])
                        incoming[q] &+= tokens
                    } else {
                        load[q] &+= tokens
                    }
                    x[arc] &-= tokens
                    x[other] &+= tokens
                    excess &-= tokens
                    if excess == 0 || x[arc] == 0 { break }
                }
                other &+= 1
            }
        }
        load[r] = bound &+ excess
    }

    /// After the wave: what ranks of level 1 have above the bound flows on through the ranks of level 0, step by step, each of which keeps
    /// what it lacks. From here on level 0 says that a rank can still receive.
    private func spill(_ bound: Int64) {
        let nearest = Int(levelStart[1])
        var found = 0
        for i in nearest..<Int(levelStart[2]) { pour(Int(queue[i]), bound, &found) }
        receive(found)
        // The givers of the next step are queued where the ranks of level 0 were.
        var givers = 0
        for i in 0..<nearest { stop(queue[i], bound, &givers) }
        while givers > 0 {
            found = 0
            for i in 0..<givers { pour(Int(queue[i]), bound, &found) }
            receive(found)
            givers = 0
            for i in 0..<found { stop(receivers[i], bound, &givers) }
        }
    }

    private func receive(_ found: Int) {
        for i in 0..<found {
            let q = Int(receivers[i])
            load[q] &+= incoming[q]
            incoming[q] = 0
        }
    }

    /// A rank above the bound receives no more and gives in the next step.
    private func stop(_ rank: Int32, _ bound: Int64, _ givers: inout Int) {
        if load[Int(rank)] <= bound { return }
        level[Int(rank)] = -1
        queue[givers] = rank
        givers &+= 1
    }

    /// Rank r gives what it has above the bound: first no more than the receivers lack, from each arc on its own; then the rest.
    private func pour(_ r: Int, _ bound: Int64, _ found: inout Int) {
        var excess = load[r] &- bound
        if excess <= 0 { return }
        pour(r, &excess, bound, &found, capped: true)
        if excess > 0 { pour(r, &excess, bound, &found, capped: false) }
        load[r] = bound &+ excess
    }

    private func pour(_ r: Int, _ excess: inout Int64, _ bound: Int64, _ found: inout Int, capped: Bool) {
        var i = Int(rankStart[r])
        let last = Int(rankStart[r &+ 1])
        while i < last && excess > 0 {
            let arc = Int(rankArc[i])
            i &+= 1
            let bundle = Int(arcBundle[arc])
            guard x[arc] > 0, bundleLevel[bundle] == 0 else { continue }
            var other = Int(bundleStart[bundle])
            let endArc = Int(bundleStart[bundle &+ 1])
            while other < endArc && excess > 0 && x[arc] > 0 {
                let q = Int(arcRank[other])
                if other != arc && level[q] == 0 {
                    var tokens = Swift.min(excess, x[arc])
                    if capped { tokens = Swift.min(tokens, Swift.max(0, bound &- load[q])) }
                    if tokens > 0 {
                        if incoming[q] == 0 {
                            receivers[found] = Int32(truncatingIfNeeded: q)
                            found &+= 1
                        }
                        incoming[q] &+= tokens
                        x[arc] &-= tokens
                        x[other] &+= tokens
                        excess &-= tokens
                    }
                }
                other &+= 1
            }
        }
    }
}
