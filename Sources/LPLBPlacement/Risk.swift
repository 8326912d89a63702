// Risk: how much more than its mean a rank may get, given what is on it.

/// Mean plus deviations of the load that stands on each rank alone, kept up while experts are placed.
final class Risk {
    private let drift: Drift
    private let nRanks: Int, nGroups: Int, nSnapshots: Int
    /// Per rank: mean, variance of the experts' own drift and of their routing groups'.
    private let mean: UnsafeMutablePointer<Double>, variance: UnsafeMutablePointer<Double>
    /// [nRanks][nGroups] loads by routing group, and [nRanks][nSnapshots] how far the snapshots' loads are from the mean.
    private let byGroup: UnsafeMutablePointer<Double>, bySnapshot: UnsafeMutablePointer<Double>

    // How many deviations count, and what a load deviates by: of its own, with its routing group, and by the snapshots.
    private static let deviations = 3.0, own = 0.3, group = 0.2, snapshot = 1.2

    init(_ drift: Drift, nRanks: Int) {
        self.drift = drift
        self.nRanks = nRanks
        nGroups = drift.nGroups
        nSnapshots = drift.snapshots.count > 1 ? drift.snapshots.count : 0
        mean = .allocate(capacity: nRanks)
        variance = .allocate(capacity: nRanks)
        byGroup = .allocate(capacity: nRanks * nGroups)
        bySnapshot = .allocate(capacity: nRanks * nSnapshots)
        mean.initialize(repeating: 0, count: nRanks)
        variance.initialize(repeating: 0, count: nRanks)
        byGroup.initialize(repeating: 0, count: nRanks * nGroups)
        bySnapshot.initialize(repeating: 0, count: nRanks * nSnapshots)
    }

    deinit {
        mean.deallocate()
        variance.deallocate()
        byGroup.deallocate()
        bySnapshot.deallocate()
    }

    /// `part` of expert e's load on a rank.
    func add(_ e: Int, part: Double, on rank: Int) {
        let load = drift.mean[e] * part, group = rank &* nGroups &+ e / drift.groupSize
        variance[rank] += added(load, beside: byGroup[group])
        mean[rank] += load
        byGroup[group] += load
        for s in 0..<nSnapshots { bySnapshot[rank &* nSnapshots &+ s] += (drift.snapshots[s][e] - drift.mean[e]) * part }
    }

    /// Variance that a load brings, given what its routing group has on the rank.
    @inline(__always)
    private func added(_ load: Double, beside grouped: Double) -> Double {
        Risk.own * Risk.own * load * load + Risk.group * Risk.group * load * (load + 2 * grouped)
    }

    /// The rank with room that has least to bear with all of expert e as well; nil where none has room.
    func safest(_ ranks: [Int], _ board: Board, _ e: Int) -> Int? {
        let load = drift.mean[e], group = e / drift.groupSize
        return withUnsafeTemporaryAllocation(of: Double.self, capacity: nSnapshots) { gaps in
            for s in 0..<nSnapshots { gaps[s] = drift.snapshots[s][e] - load }
            var best: Int?, least = Double.infinity
            for rank in ranks where board.hasRoom(rank) && mean[rank] + load < least {
                var sum = variance[rank] + added(load, beside: byGroup[rank &* nGroups &+ group])
                if nSnapshots > 0 {
                    var spread = 0.0
                    for s in 0..<nSnapshots {
                        let gap = bySnapshot[rank &* nSnapshots &+ s] + gaps[s]
                        spread += gap * gap
                    }
                    sum += Risk.snapshot * Risk.snapshot * spread / Double(nSnapshots)
                }
                let level = mean[rank] + load + Risk.deviations * sum.squareRoot()
                if level < least { (best, least) = (rank, level) }
            }
            return best
        }
    }
}
