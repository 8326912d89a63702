// Sweep: pairwise levelling of two-place bundles.

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
}
