// Shares: results of a solve as floating point numbers, for callers that want ratios.

extension FlowSolver {
    /// The share of each slot class that stays at the original: x of its first arc / its tokens; 1 without tokens and for self copies.
    /// - Parameter ratios: [n_group][group_size][nRedundant].
    public func writeRatios(_ ratios: UnsafeMutablePointer<Float>) {
        let classBundle = tables.classBundle, start = tables.bundleStart
        for index in 0..<(tables.shape.epSize &* tables.nRedundant) {
            let bundle = Int(classBundle[index])
            if bundle < 0 || work.demand[bundle] == 0 {
                ratios[index] = 1
            } else {
                ratios[index] = Float(work.x[Int(start[bundle])]) / Float(work.demand[bundle])
            }
        }
    }
}

/// Loads divided by the largest of them; zeros if that is 0.
public func writeScaled(loads: UnsafePointer<Int64>, count: Int, to scaled: UnsafeMutablePointer<Float>) {
    var most: Int64 = 0
    for i in 0..<count { most = max(most, loads[i]) }
    let unit = Float(most)
    for i in 0..<count { scaled[i] = most == 0 ? 0 : Float(loads[i]) / unit }
}
