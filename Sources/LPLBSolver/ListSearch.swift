// ListSearch: the solver's loop for groups of any size, with queues of ranks. O(ranks + arcs) a search.

extension Group {
    /// The loop. Ranks are queued in the order of their distances: those of distance k are
    /// `queue[distanceStart[k] ..< distanceStart[k + 1]]`. A distance of -1 stands for none.
    func balanceByLists(_ state: inout GroupState) {
        while state.rounds < maxRounds {
            var over = 0, found = 0
            for r in 0..<size {
                let tokens = load[r], cap = state.capacity.cap(r)
                distance[r] = -1
                if tokens > cap {
                    over &+= 1
                } else if tokens < cap {
                    distance[r] = 0
                    queue[found] = Int32(truncatingIfNeeded: r)
                    found &+= 1
                }
            }
            if over == 0 { return }
            state.rounds &+= 1
            for u in firstBundle..<endBundle { bundleDistance[u] = -1 }
            var wanted = over
            var k = search(&wanted, found, state.capacity)
            if wanted == over || wanted > 0 && state.rounds <= Group.plainRounds {
                raise(&state.capacity)
                continue
            }
            while k >= 1 {
                push(k, state.capacity)
                k &-= 1
            }
            if state.rounds > Group.plainRounds { spill(state.capacity) }
        }
    }

    /// Levels of the ranks, from those with room (distance 0, already queued) on, until no rank above its cap is without.
    /// `wanted`: ranks above their caps without distance. Returns the last distance.
    private func search(_ wanted: inout Int, _ roots: Int, _ capacity: Capacity) -> Int {
        var k: Int32 = 0
        var first = 0, end = roots
        distanceStart[0] = 0
        distanceStart[1] = Int32(truncatingIfNeeded: end)
        while wanted > 0 && first < end {
            var tail = end
            for i in first..<end {
                let q = Int(queue[i])
                for entry in Int(rankStart[q])..<Int(rankStart[q &+ 1]) {
                    let bundle = Int(arcBundle[Int(rankArc[entry])])
                    // The first rank that meets a bundle gives a distance to all its others with tokens in it.
                    if bundleDistance[bundle] >= 0 { continue }
                    bundleDistance[bundle] = k
                    for arc in Int(bundleStart[bundle])..<Int(bundleStart[bundle &+ 1]) where x[arc] > 0 {
                        let r = Int(arcRank[arc])
                        if distance[r] >= 0 { continue }
                        distance[r] = k &+ 1
                        queue[tail] = Int32(truncatingIfNeeded: r)
                        tail &+= 1
                        if load[r] > capacity.cap(r) { wanted &-= 1 }
                    }
                }
            }
            first = end
            end = tail
            k &+= 1
            distanceStart[Int(k) &+ 1] = Int32(truncatingIfNeeded: end)
        }
        return Int(k)
    }

    /// Raises T for the ranks without distance, whose tokens cannot leave them; they become the witness.
    private func raise(_ capacity: inout Capacity) {
        var tokens: Int64 = 0
        witness.removeAll()
        for r in 0..<size where distance[r] < 0 {
            tokens &+= load[r]
            witness.insert(r)
        }
        capacity.raise(witness, holding: tokens)
    }

    /// One step of the wave: the ranks of distance k that are above their caps give to those of distance k - 1.
    private func push(_ k: Int, _ capacity: Capacity) {
        let target = Int32(truncatingIfNeeded: k &- 1)
        for i in Int(distanceStart[k])..<Int(distanceStart[k &+ 1]) {
            let r = Int(queue[i])
            if load[r] > capacity.cap(r) { give(r, target, capacity) }
        }
        if k > 1 { return }
        for i in 0..<Int(distanceStart[1]) {
            let q = Int(queue[i])
            load[q] &+= incoming[q]
            incoming[q] = 0
        }
    }

    private func give(_ r: Int, _ target: Int32, _ capacity: Capacity) {
        let cap = capacity.cap(r)
        var excess = load[r] &- cap
        var i = Int(rankStart[r])
        let end = Int(rankStart[r &+ 1])
        while i < end && excess > 0 {
            let arc = Int(rankArc[i])
            i &+= 1
            let bundle = Int(arcBundle[arc])
            guard x[arc] > 0, bundleDistance[bundle] == target else { continue }
            var other = Int(bundleStart[bundle])
            let endArc = Int(bundleStart[bundle &+ 1])
            while other < endArc {
                let q = Int(arcRank[other])
                if other != arc && distance[q] == target {
                    var tokens = min(excess, x[arc])
                    if target == 0 {
                        // The load is that from before this step, so there is room.
                        tokens = min(tokens, capacity.cap(q) &- load[q])
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
        load[r] = cap &+ excess
    }

    /// After the wave: what ranks of distance 1 have above their caps flows on through the ranks of distance 0, step by step, each of which
    /// keeps what it has room for. From here on distance 0 says that a rank can still receive.
    private func spill(_ capacity: Capacity) {
        let nearest = Int(distanceStart[1])
        var found = 0
        for i in nearest..<Int(distanceStart[2]) { pour(Int(queue[i]), capacity, &found) }
        receive(found)
        // The givers of the next step are queued where the ranks of distance 0 were.
        var givers = 0
        for i in 0..<nearest { stop(queue[i], capacity, &givers) }
        while givers > 0 {
            found = 0
            for i in 0..<givers { pour(Int(queue[i]), capacity, &found) }
            receive(found)
            givers = 0
            for i in 0..<found { stop(receivers[i], capacity, &givers) }
        }
    }

    private func receive(_ found: Int) {
        for i in 0..<found {
            let q = Int(receivers[i])
            load[q] &+= incoming[q]
            incoming[q] = 0
        }
    }

    /// A rank above its cap receives no more and gives in the next step.
    private func stop(_ rank: Int32, _ capacity: Capacity, _ givers: inout Int) {
        if load[Int(rank)] <= capacity.cap(Int(rank)) { return }
        distance[Int(rank)] = -1
        queue[givers] = rank
        givers &+= 1
    }

    /// Rank r gives what it has above its cap: first no more than the receivers have room for, from each arc on its own; then the rest.
    private func pour(_ r: Int, _ capacity: Capacity, _ found: inout Int) {
        let cap = capacity.cap(r)
        var excess = load[r] &- cap
        if excess <= 0 { return }
        pour(r, &excess, capacity, &found, capped: true)
        if excess > 0 { pour(r, &excess, capacity, &found, capped: false) }
        load[r] = cap &+ excess
    }

    private func pour(_ r: Int, _ excess: inout Int64, _ capacity: Capacity, _ found: inout Int, capped: Bool) {
        var i = Int(rankStart[r])
        let last = Int(rankStart[r &+ 1])
        while i < last && excess > 0 {
            let arc = Int(rankArc[i])
            i &+= 1
            let bundle = Int(arcBundle[arc])
            guard x[arc] > 0, bundleDistance[bundle] == 0 else { continue }
            var other = Int(bundleStart[bundle])
            let endArc = Int(bundleStart[bundle &+ 1])
            while other < endArc && excess > 0 && x[arc] > 0 {
                let q = Int(arcRank[other])
                if other != arc && distance[q] == 0 {
                    var tokens = min(excess, x[arc])
                    if capped { tokens = min(tokens, max(0, capacity.cap(q) &- load[q])) }
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
