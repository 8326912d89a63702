// Drift: what a layer's history says about the loads that may arrive, and scenarios drawn from it.

/// The history of one layer, each snapshot scaled to the same total, so that a long one counts no more than a short one.
struct Drift {
    let nLogical: Int
    /// [snapshots][nLogical], each adding up to `total`.
    let snapshots: [[Double]]
    /// [nLogical]: their mean.
    let mean: [Double]
    /// Experts of one routing group are consecutive and drift together; the number of experts of one.
    let groupSize: Int
    static let total = 1_048_576.0

    init(snapshots: [[Double]], groupSize: Int) {
        let n = snapshots.first?.count ?? 0
        nLogical = n
        self.groupSize = groupSize
        self.snapshots = snapshots.map { row in
            let sum = row.reduce(0, +)
            return sum > 0 ? row.map { $0 / sum * Drift.total } : [Double](repeating: Drift.total / Double(max(1, n)), count: n)
        }
        var mean = [Double](repeating: 0, count: n)
        for row in self.snapshots { for e in 0..<n { mean[e] += row[e] / Double(snapshots.count) } }
        self.mean = mean
    }

    /// Loads that may arrive: each expert's load times exp of three draws: its own, its group's, and a slope on the logarithm of its load.
    /// Several snapshots also mix with random weights, so that what moved together in the past does so here. The same draws at each call.
    ///
    /// The deviations are those of real counts between workloads (DeepSeek-V3 class, prompts of one length and of longer ones).
    func scenarios(_ count: Int) -> [[Int64]] {
        var random = SplitMix(state: 0x9E37_79B9_7F4A_7C15)
        let groups = (nLogical + groupSize - 1) / groupSize
        let logMean = mean.map { log2Safe($0) }
        let centre = logMean.reduce(0, +) / Double(max(1, nLogical))
        return (0..<count).map { index in
            let base = index % 2 == 0 && snapshots.count > 1 ? mixture(&random) : mean
            let strength = [0.6, 1.0, 1.5][index % 3] * (snapshots.count > 1 ? 0.7 : 1)
            let slope = 0.12 * strength * random.normal()
            let ofGroup = (0..<groups).map { _ in 0.12 * strength * random.normal() }
            var load = [Double](repeating: 0, count: nLogical)
            for e in 0..<nLogical {
                let draw = 0.22 * strength * random.normal() + ofGroup[e / groupSize] + slope * (logMean[e] - centre) * 0.69
                load[e] = base[e] * exponential(draw)
            }
            return load.map { Int64($0.rounded()) }
        }
    }

    /// A point around the mean in the span of the snapshots, not below zero.
    private func mixture(_ random: inout SplitMix) -> [Double] {
        let weight = snapshots.map { _ in 1.2 * random.normal() / Double(snapshots.count).squareRoot() }
        var point = mean
        for (row, weight) in zip(snapshots, weight) { for e in 0..<nLogical { point[e] += weight * (row[e] - mean[e]) } }
        for e in 0..<nLogical { point[e] = max(point[e], 0.05 * mean[e]) }
        return point
    }
}

private func log2Safe(_ value: Double) -> Double {
    let positive = max(value, 1e-3)
    return Double(positive.exponent) + (positive.significand - 1)  // piecewise linear: the same bits on every machine
}

/// e^x to 1e-9 or better for |x| <= 8, by plain arithmetic, so that every machine has the same bits.
private func exponential(_ x: Double) -> Double {
    let reduced = max(-8, min(8, x)) / 256
    var sum = 1.0, term = 1.0
    for k in 1..<8 {
        term *= reduced / Double(k)
        sum += term
    }
    for _ in 0..<8 { sum *= sum }
    return sum
}

/// A small random number generator (Steele, Lea, Flood 2014), for draws that are the same everywhere.
struct SplitMix {
    var state: UInt64

    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }

    /// Nearly normal, mean 0 and deviation 1: the sum of twelve uniform draws.
    mutating func normal() -> Double {
        var sum = -6.0
        for _ in 0..<12 { sum += Double(next() >> 11) * 0x1p-53 }
        return sum
    }
}
