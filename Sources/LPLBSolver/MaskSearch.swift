// MaskSearch: the solver's loop for groups of at most 64 ranks, with sets of ranks as bits of one word.

extension Group {
    /// The loop. `memory.adjacent` holds the ranks that a rank can push to: those of the other arcs of its bundles in which it has tokens.
    func balanceByMasks(_ state: inout GroupState) {
        let maxRounds = maxRounds
        let everyone: UInt64 = size == 64 ? ~0 : 1 &<< UInt64(size) &- 1
        for r in 0..<size { adjacent[r] = adjacency(r) }
        withUnsafeTemporaryAllocation(of: UInt64.self, capacity: 65) { ranksAt in
            guard let ranksAt = ranksAt.baseAddress else { return }
            var capacity = state.capacity
            var (below, above) = compare(capacity)
            while above != 0 && state.rounds < maxRounds {
                state.rounds &+= 1
                let (farthest, reached) = search(below, above, everyone, ranksAt)
                if above & ~reached != 0 && (above & reached == 0 || state.rounds <= Group.plainRounds) {
                    raise(&capacity, everyone & ~reached)
                    (below, above) = compare(capacity)
                    continue
                }
                var touched = wave(farthest, above, ranksAt, capacity)
                if state.rounds > Group.plainRounds { touched |= spill(ranksAt, touched, capacity) }
                while touched != 0 {
                    let r = touched.trailingZeroBitCount
                    let bit = touched & (0 &- touched)
                    touched &= touched &- 1
                    adjacent[r] = adjacency(r)
                    let cap = capacity.cap(r)
                    below = load[r] < cap ? below | bit : below & ~bit
                    above = load[r] > cap ? above | bit : above & ~bit
                }
            }
            state.capacity = capacity
        }
    }

    /// Backward from the ranks with room, until every rank above its cap has a distance or no rank gets one. Returns the last distance
    /// that has a rank above its cap, and the ranks that have a distance.
    @inline(__always)
    private func search(
        _ below: UInt64, _ above: UInt64, _ everyone: UInt64, _ ranksAt: UnsafeMutablePointer<UInt64>
    ) -> (farthest: Int, reached: UInt64) {
        var reached = below, nearest = below, wanted = above
        var distance = 0, farthest = 0
        ranksAt[0] = below
        while true {
            var next: UInt64 = 0
            var rest = everyone & ~reached
            while rest != 0 {
                let r = rest.trailingZeroBitCount
                let bit = rest & (0 &- rest)
                rest &= rest &- 1
                next |= adjacent[r] & nearest != 0 ? bit : 0
            }
            if next == 0 { break }
            distance &+= 1
            ranksAt[distance] = next
            reached |= next
            nearest = next
            if wanted & next != 0 {
                wanted &= ~next
                farthest = distance
                if wanted == 0 { break }
            }
        }
        return (farthest, reached)
    }

    /// The wave from the given distance on. Returns the ranks whose load changed.
    @inline(__always)
    private func wave(_ farthest: Int, _ above: UInt64, _ ranksAt: UnsafeMutablePointer<UInt64>, _ capacity: Capacity) -> UInt64 {
        var active = above, touched: UInt64 = 0
        var distance = farthest
        while distance >= 1 {
            var givers = ranksAt[distance] & active
            let targets = ranksAt[distance &- 1]
            var received: UInt64 = 0
            while givers != 0 {
                let r = givers.trailingZeroBitCount
                givers &= givers &- 1
                touched |= 1 &<< UInt64(r)
                received |= distance == 1 ? fill(r, targets, capacity, capped: true) : give(r, targets, capacity)
            }
            touched |= received
            if distance == 1 {
                receive(received)
            } else {
                active |= overfull(received, capacity)
            }
            distance &-= 1
        }
        return touched
    }

    /// After the wave, which changed the ranks in `changed`: what ranks of distance 1 have above their caps flows on through the ranks of
    /// distance 0, step by step, each of which keeps what it has room for. Returns the ranks whose load changed here.
    private func spill(_ ranksAt: UnsafeMutablePointer<UInt64>, _ changed: UInt64, _ capacity: Capacity) -> UInt64 {
        var givers = overfull(changed & ranksAt[1], capacity), takers = ranksAt[0]
        var suspects = changed & takers, touched: UInt64 = 0
        repeat {
            var received: UInt64 = 0
            while givers != 0 {
                let r = givers.trailingZeroBitCount
                givers &= givers &- 1
                touched |= 1 &<< UInt64(r)
                received |= fill(r, takers, capacity, capped: true)
                if load[r] > capacity.cap(r) { received |= fill(r, takers, capacity, capped: false) }
            }
            receive(received)
            touched |= received
            givers = overfull(suspects | received, capacity)
            suspects = 0
            takers &= ~givers
        } while givers != 0
        return touched
    }

    /// Ends a step of fills.
    @inline(__always)
    private func receive(_ receivers: UInt64) {
        var rest = receivers
        while rest != 0 {
            let q = rest.trailingZeroBitCount
            rest &= rest &- 1
            load[q] &+= incoming[q]
            incoming[q] = 0
        }
    }

    /// The ranks of a set that are above their caps.
    @inline(__always)
    private func overfull(_ ranks: UInt64, _ capacity: Capacity) -> UInt64 {
        var rest = ranks, above: UInt64 = 0
        while rest != 0 {
            let q = rest.trailingZeroBitCount
            rest &= rest &- 1
            if load[q] > capacity.cap(q) { above |= 1 &<< UInt64(q) }
        }
        return above
    }

    @inline(__always)
    private func adjacency(_ r: Int) -> UInt64 {
        var mask: UInt64 = 0
        var i = Int(rankStart[r])
        let end = Int(rankStart[r &+ 1])
        while i < end {
            let arc = Int(rankArc[i])
            mask |= arcMask[arc] & UInt64(bitPattern: (0 &- x[arc]) &>> 63)
            i &+= 1
        }
        return mask
    }

    /// Ranks with room, and ranks above their caps.
    @inline(__always)
    private func compare(_ capacity: Capacity) -> (below: UInt64, above: UInt64) {
        var below: UInt64 = 0, above: UInt64 = 0
        var r = 0
        while r < size {
            let cap = capacity.cap(r)
            below |= (load[r] < cap ? 1 : 0) &<< UInt64(r)
            above |= (load[r] > cap ? 1 : 0) &<< UInt64(r)
            r &+= 1
        }
        return (below, above)
    }

    /// Raises T for a set of ranks whose tokens cannot leave it; the set becomes the witness.
    private func raise(_ capacity: inout Capacity, _ closed: UInt64) {
        var tokens: Int64 = 0
        var rest = closed
        while rest != 0 {
            tokens &+= load[rest.trailingZeroBitCount]
            rest &= rest &- 1
        }
        witness.words[0] = UInt32(truncatingIfNeeded: closed)
        witness.words[1] = UInt32(truncatingIfNeeded: closed >> 32)
        capacity.raise(witness, holding: tokens)
    }

    /// Rank r gives its excess to ranks of the nearer distance, which will pass it on. Returns the receivers.
    @inline(__always)
    private func give(_ r: Int, _ targets: UInt64, _ capacity: Capacity) -> UInt64 {
        let cap = capacity.cap(r)
        var excess = load[r] &- cap
        var received: UInt64 = 0
        var i = Int(rankStart[r])
        let end = Int(rankStart[r &+ 1])
        while i < end && excess > 0 {
            let arc = Int(rankArc[i])
            i &+= 1
            guard x[arc] > 0, arcMask[arc] & targets != 0 else { continue }
            // Without a limit the first receiver takes all that this arc has.
            var other = Int(bundleStart[Int(arcBundle[arc])])
            while other == arc || targets &>> UInt64(arcRank[other]) & 1 == 0 { other &+= 1 }
            let q = Int(arcRank[other])
            let tokens = min(excess, x[arc])
            x[arc] &-= tokens
            x[other] &+= tokens
            load[q] &+= tokens
            received |= 1 &<< UInt64(q)
            excess &-= tokens
        }
        load[r] = cap &+ excess
        return received
    }

    /// Rank r gives what it has above its cap to ranks in `targets`; capped: no more than they have room for, from each arc on its own.
    /// Their loads change at the end of the step, from `incoming`. Returns the receivers.
    @inline(__always)
    private func fill(_ r: Int, _ targets: UInt64, _ capacity: Capacity, capped: Bool) -> UInt64 {
        let cap = capacity.cap(r)
        var excess = load[r] &- cap
        var received: UInt64 = 0
        var i = Int(rankStart[r])
        let end = Int(rankStart[r &+ 1])
        while i < end && excess > 0 {
            let arc = Int(rankArc[i])
            i &+= 1
            guard x[arc] > 0, arcMask[arc] & targets != 0 else { continue }
            let bundle = Int(arcBundle[arc])
            var other = Int(bundleStart[bundle])
            let endArc = Int(bundleStart[bundle &+ 1])
            while other < endArc {
                let q = Int(arcRank[other])
                if other != arc && targets &>> UInt64(q) & 1 != 0 {
                    // The load is that from before this step.
                    let most = min(excess, x[arc])
                    let tokens = capped ? min(most, max(0, capacity.cap(q) &- load[q])) : most
                    x[arc] &-= tokens
                    x[other] &+= tokens
                    incoming[q] &+= tokens
                    received |= 1 &<< UInt64(q)
                    excess &-= tokens
                    if excess == 0 || x[arc] == 0 { break }
                }
                other &+= 1
            }
        }
        load[r] = cap &+ excess
        return received
    }
}
