// Ratios: results of a solve as floating point numbers.

extension FlowSolver {
    /// The part of each slot class that stays at the original: x of its first arc / its tokens; 1 without tokens and for self copies.
    /// - Parameter ratios: [n_group][group_size][nRedundant].
    public func writeRatios(_ ratios: UnsafeMutablePointer<Float>) {
        for expert in 0..<network.shape.nLogical where network.expertClass[expert] >= 0 {
            let bundle = Int(network.expertBundle[expert])
            let tokens = bundle < 0 ? 0 : memory.demand[bundle]
            let ratio = tokens == 0 ? 1 : Float(memory.x[Int(network.bundleStart[bundle])]) / Float(tokens)
            ratios[Int(network.expertClass[expert])] = ratio
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
