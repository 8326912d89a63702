// Sweep: pairwise levelling of two-place bundles, and the lower bound from the ranks sorted by load.

extension Group {
    /// One pass over the colours. The bundles of a colour share no rank, so any order gives the same result.
    func sweep() {
        let load = load, x = x, arcRank = arcRank, bundleStart = bundleStart
        let begins = work.tables.colourBegin, ends = work.tables.colourEnd
        for colour in firstColour..<endColour {
            var u = Int(begins[colour])
            let end = Int(ends[colour])
            while u < end {
                let arc = Int(bundleStart[u])
                let r = Int(arcRank[arc]), s = Int(arcRank[arc &+ 1])
                let tokens = Swift.max(0 &- x[arc &+ 1], Swift.min(x[arc], (load[r] &- load[s]) / 2))
                x[arc] &-= tokens
                x[arc &+ 1] &+= tokens
                load[r] &-= tokens
                load[s] &+= tokens
                u &+= 1
            }
        }
    }

    /// The best bound among the sets "the n busiest ranks".
    func cutPrefix(_ state: inout GroupState) {
        let order = work.queue, position = work.level, fixed = work.incoming
        for r in 0..<size {
            var i = r
            while i > 0, load[Int(order[i &- 1])] < load[r] {
                order[i] = order[i &- 1]
                i &-= 1
            }
            order[i] = Int32(truncatingIfNeeded: r)
        }
        for i in 0..<size {
            let r = Int(order[i])
            position[r] = Int32(truncatingIfNeeded: i)
            fixed[i] = base[r]
        }
        for u in firstBundle..<endBundle {
            let arc = Int(bundleStart[u])
            let last = Swift.max(position[Int(arcRank[arc])], position[Int(arcRank[arc &+ 1])])
            fixed[Int(last)] &+= demand[u]
        }
        var sum: Int64 = 0, best = 0
        for i in 0..<size {
            sum &+= fixed[i]
            fixed[i] = 0
            if sum > state.bound &* Int64(i &+ 1) {
                state.bound = ceiling(sum, i &+ 1)
                best = i &+ 1
            }
        }
        guard best > 0 else { return }
        for i in 0..<FlowSolver.witnessWords { witness[i] = 0 }
        for i in 0..<best { witness[Int(order[i]) >> 5] |= 1 << UInt32(order[i] & 31) }
    }
}
