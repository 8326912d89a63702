// MaskSearch: the solver's loop for groups of at most 64 ranks, with sets of ranks as bits of one word.

struct MaskSearch {
    private let group: Group
    private let load: UnsafeMutablePointer<Int64>
    private let x: UnsafeMutablePointer<Int64>
    private let arcRank: UnsafePointer<Int32>
    private let arcBundle: UnsafePointer<Int32>
    private let bundleStart: UnsafePointer<Int32>
    private let rankStart: UnsafePointer<Int32>
    private let rankArc: UnsafePointer<Int32>
    /// Ranks of a bundle's other arcs.
    private let arcMask: UnsafePointer<UInt64>
    /// Ranks that a rank can push to: those of the other arcs of its bundles in which it has tokens.
    private let adjacent: UnsafeMutablePointer<UInt64>
    private let incoming: UnsafeMutablePointer<Int64>

    @inline(__always)
    init(_ group: Group) {
        self.group = group
        load = group.load
        x = group.x
        arcRank = group.arcRank
        arcBundle = group.arcBundle
        bundleStart = group.bundleStart
        rankStart = group.rankStart
        rankArc = group.rankArc
        arcMask = UnsafePointer(group.work.arcMask)
        adjacent = group.work.adjacent
        incoming = group.work.incoming
    }

    func run(_ state: inout GroupState) {
        let size = group.size, maxRounds = group.work.tables.maxRounds
        let everyone: UInt64 = size == 64 ? ~0 : 1 &<< UInt64(size) &- 1
        for r in 0..<size { adjacent[r] = adjacency(r) }
        withUnsafeTemporaryAllocation(of: UInt64.self, capacity: 65) { levels in
            guard let levels = levels.baseAddress else { return }
            var bound = state.bound
            var (below, above) = compare(bound)
            while above != 0 && state.rounds < maxRounds {
                state.rounds &+= 1
                let (farthest, reached) = search(below, above, everyone, levels)
                if above & ~reached != 0 && (above & reached == 0 || state.rounds <= Group.plainRounds) {
                    bound = raise(everyone & ~reached)
                    (below, above) = compare(bound)
                    continue
                }
                var touched = wave(farthest, above, levels, bound)
                if state.rounds > Group.plainRounds { touched |= spill(levels, touched, bound) }
                while touched != 0 {
                    let r = touched.trailingZeroBitCount
                    let bit = touched & (0 &- touched)
                    touched &= touched &- 1
                    adjacent[r] = adjacency(r)
                    below = load[r] < bound ? below | bit : below & ~bit
                    above = load[r] > bound ? above | bit : above & ~bit
                }
            }
            state.bound = bound
        }
    }

    /// Backward from the ranks with room, until every rank above the bound has a level or no rank gets one. Returns the last level that has a
    /// rank above the bound, and the ranks that have a level.
    @inline(__always)
    private func search(
        _ below: UInt64, _ above: UInt64, _ everyone: UInt64, _ levels: UnsafeMutablePointer<UInt64>
    ) -> (farthest: Int, reached: UInt64) {
        var reached = below, nearest = below, wanted = above
        var level = 0, farthest = 0
        levels[0] = below
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
            level &+= 1
            levels[level] = next
            reached |= next
            nearest = next
            if wanted & next != 0 {
                wanted &= ~next
                farthest = level
                if wanted == 0 { break }
            }
        }
        return (farthest, reached)
    }

    /// The wave from the given level on. Returns the ranks whose load changed.
    @inline(__always)
    private func wave(_ farthest: Int, _ above: UInt64, _ levels: UnsafeMutablePointer<UInt64>, _ bound: Int64) -> UInt64 {
        var active = above, touched: UInt64 = 0
        var level = farthest
        while level >= 1 {
            var givers = levels[level] & active
            let targets = levels[level &- 1]
            var received: UInt64 = 0
            while givers != 0 {
                let r = givers.trailingZeroBitCount
                givers &= givers &- 1
                touched |= 1 &<< UInt64(r)
                received |= level == 1 ? fill(r, targets, bound, capped: true) : pass(r, targets, bound)
            }
            touched |= received
            if level == 1 {
                receive(received)
            } else {
                active |= overfull(received, bound)
            }
            level &-= 1
        }
        return touched
    }

    /// After the wave, which changed the ranks in `changed`: what ranks of level 1 have above the bound flows on through the ranks of level 0,
    /// step by step, each of which keeps what it lacks. Returns the ranks whose load changed here.
    private func spill(_ levels: UnsafeMutablePointer<UInt64>, _ changed: UInt64, _ bound: Int64) -> UInt64 {
        var givers = overfull(changed & levels[1], bound), takers = levels[0]
        var suspects = changed & takers, touched: UInt64 = 0
        repeat {
            var received: UInt64 = 0
            while givers != 0 {
                let r = givers.trailingZeroBitCount
                givers &= givers &- 1
                touched |= 1 &<< UInt64(r)
                received |= fill(r, takers, bound, capped: true)
                if load[r] > bound { received |= fill(r, takers, bound, capped: false) }
            }
            receive(received)
            touched |= received
            givers = overfull(suspects | received, bound)
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

    /// The ranks of a set that are above the bound.
    @inline(__always)
    private func overfull(_ ranks: UInt64, _ bound: Int64) -> UInt64 {
        var rest = ranks, above: UInt64 = 0
        while rest != 0 {
            let q = rest.trailingZeroBitCount
            rest &= rest &- 1
            if load[q] > bound { above |= 1 &<< UInt64(q) }
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

    /// Ranks below and above the bound.
    @inline(__always)
    private func compare(_ bound: Int64) -> (below: UInt64, above: UInt64) {
        var below: UInt64 = 0, above: UInt64 = 0
        var r = 0
        while r < group.size {
            below |= (load[r] < bound ? 1 : 0) &<< UInt64(r)
            above |= (load[r] > bound ? 1 : 0) &<< UInt64(r)
            r &+= 1
        }
        return (below, above)
    }

    /// The bound from a set of ranks whose tokens cannot leave it; the set becomes the witness.
    private func raise(_ closed: UInt64) -> Int64 {
        var sum: Int64 = 0
        var rest = closed
        while rest != 0 {
            sum &+= load[rest.trailingZeroBitCount]
            rest &= rest &- 1
        }
        group.witness[0] = UInt32(truncatingIfNeeded: closed)
        group.witness[1] = UInt32(truncatingIfNeeded: closed >> 32)
        return ceiling(sum, closed.nonzeroBitCount)
    }

    /// Rank r passes its excess to ranks of the nearer level, which will pass it on. Returns the receivers.
    @inline(__always)
    private func pass(_ r: Int, _ targets: UInt64, _ bound: Int64) -> UInt64 {
        var excess = load[r] &- bound
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
            let tokens = Swift.min(excess, x[arc])
            x[arc] &-= tokens
            x[other] &+= tokens
            load[q] &+= tokens
            received |= 1 &<< UInt64(q)
            excess &-= tokens
        }
        load[r] = bound &+ excess
        return received
    }

    /// Rank r gives what it has above the bound to ranks in `targets`; capped: no more than they lack, from each arc on its own. Their loads
    /// change at the end of the step, from `incoming`. Returns the receivers.
    @inline(__always)
    private func fill(_ r: Int, _ targets: UInt64, _ bound: Int64, capped: Bool) -> UInt64 {
        var excess = load[r] &- bound
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
                    let most = Swift.min(excess, x[arc])
                    let tokens = capped ? Swift.min(most, Swift.max(0, bound &- load[q])) : most
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
        load[r] = bound &+ excess
        return received
    }
}
