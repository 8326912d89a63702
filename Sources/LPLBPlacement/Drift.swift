// Drift: what a layer's history says about the loads that may arrive, and scenarios drawn from it.

/// The history of one layer, each snapshot scaled to the same total, so that a long one counts no more than a short one.
struct Drift {
    let nLogical: Int
    /// [snapshots][nLogical], each adding up to `total`.
    let snapshots: [[Double]]
    /// [nLogical]: their mean.
    let mean: [Double]
    /// The experts, the heaviest first, equal ones by index.
    let byLoad: [Int]
    /// Experts of one routing group are consecutive and drift together; the number of experts of one.
    let groupSize: Int
    static let total = 1_048_576.0

    var nGroups: Int { (nLogical + groupSize - 1) / groupSize }

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
        byLoad = (0..<n).sorted { (mean[$0], $1) > (mean[$1], $0) }
    }
}

/// Drifts that may come over a layer, drawn once for all layers: each expert's load changes by its own factor, by its group's and by a
/// power of itself. Several snapshots also mix with random weights, so that what moved together in the past does so here.
///
/// The deviations are those of real counts between workloads (DeepSeek-V3 class, prompts of one length and of longer ones).
final class Scenarios {
    let count: Int
    private let nLogical: Int
    /// [count][nLogical]: exp of the expert's own draw and of its group's.
    private let factor: UnsafeMutablePointer<Double>
    /// [count][snapshots]: weights of the snapshots in scenarios that mix them.
    private var weights: [[Double]] = []
    /// [count][nLogical]: the loads of the latest layer.
    let loads: UnsafeMutablePointer<Int64>
    private let strengths: [Double]

    // Deviations of the logarithm of a load: its own, its group's, and by the logarithm of the load itself.
    private static let own = 0.22, group = 0.12, slope = 0.12
    /// Strengths of the drift in turn: large ones too, since what arrives may be another task. Several snapshots show a part of it
    /// themselves.
    private static let alone = [0.6, 1.0, 1.5], mixed = [0.35, 0.56, 0.84]
    /// Means of the eighths of the normal distribution: every one of them is drawn as often.
    private static let slopes = [-1.65, -0.4, 0.12, 0.9, -0.9, 0.4, 1.65, -0.12]

    /// - Parameter count: the first 8 and the first 24 are small samples of the same kind.
    init(_ count: Int, nLogical: Int, groupSize: Int, nSnapshots: Int) {
        (self.count, self.nLogical) = (count, nLogical)
        strengths = nSnapshots > 1 ? Scenarios.mixed : Scenarios.alone
        factor = .allocate(capacity: count * nLogical)
        loads = .allocate(capacity: count * nLogical)
        loads.initialize(repeating: 0, count: count * nLogical)
        var random = SplitMix(state: 0x9E37_79B9_7F4A_7C15)
        for index in 0..<count {
            let strength = strengths[index % 3]
            let isMixed = nSnapshots > 1 && index % 2 == 0
            weights.append((0..<(isMixed ? nSnapshots : 0)).map { _ in 1.2 * random.normal() / Double(nSnapshots).squareRoot() })
            var ofGroup = 0.0
            for e in 0..<nLogical {
                if e % groupSize == 0 { ofGroup = Scenarios.group * random.normal() }
                (factor + index * nLogical + e).initialize(to: exponential(strength * (Scenarios.own * random.normal() + ofGroup)))
            }
        }
    }

    deinit {
        factor.deallocate()
        loads.deallocate()
    }

    /// Fills `loads` for a layer.
    func draw(_ drift: Drift) {
        let n = nLogical
        let logMean = drift.mean.map { log2Safe($0) }
        let centre = logMean.reduce(0, +) / Double(max(1, n))
        withUnsafeTemporaryAllocation(of: Double.self, capacity: 24 * n) { powers in
            for index in 0..<min(24, count) {
                let slope = Scenarios.slope * 0.69 * strengths[index % 3] * Scenarios.slopes[index % 8]
                for e in 0..<n { powers[index &* n &+ e] = exponential(slope * (logMean[e] - centre)) }
            }
            for index in 0..<count {
                let base = weights[index].isEmpty ? drift.mean : mixture(drift, weights[index])
                let power = index % 24 &* n, first = index &* n
                for e in 0..<n { loads[first &+ e] = Int64(base[e] * factor[first &+ e] * powers[power &+ e] + 0.5) }
            }
        }
    }

    /// A point around the mean in the span of the snapshots, not below zero.
    private func mixture(_ drift: Drift, _ weights: [Double]) -> [Double] {
        var point = drift.mean
        for (row, weight) in zip(drift.snapshots, weights) { for e in 0..<nLogical { point[e] += weight * (row[e] - drift.mean[e]) } }
        for e in 0..<nLogical { point[e] = max(point[e], 0.05 * drift.mean[e]) }
        return point
    }
}

private func log2Safe(_ value: Double) -> Double {
    let positive = max(value, 1e-3)
    return Double(positive.exponent) + (positive.significand - 1)  // piecewise linear: the same bits on every machine
}

/// e^x to 1e-9 or better for |x| <= 8, by plain arithmetic, so that every machine has the same bits.
@inline(__always)
private func exponential(_ x: Double) -> Double {
    let y = max(-8, min(8, x)) * (1.0 / 256)
    var power = 1 + y * (1 + y * (1.0 / 2 + y * (1.0 / 6 + y * (1.0 / 24 + y * (1.0 / 120)))))
    for _ in 0..<8 { power *= power }
    return power
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
