// Risk: how much more than its mean a rank may get, given what is on it.

/// Mean plus deviations of the load that stands on each rank alone, kept up while experts are placed.
final class Risk {
    private let drift: Drift
    private let nGroups: Int
    /// Per rank: mean, sum of squared loads, loads by routing group, loads by snapshot.
    private var mean: [Double], squares: [Double], byGroup: [Double], bySnapshot: [Double]
    private let nSnapshots: Int

    // How many deviations count, and what a load deviates by: of its own, with its routing group, and by the snapshots.
    private static let deviations = 3.0, own = 0.3, group = 0.2, snapshot = 1.2

    init(_ drift: Drift, nRanks: Int) {
        self.drift = drift
        nGroups = (drift.nLogical + drift.groupSize - 1) / drift.groupSize
        nSnapshots = drift.snapshots.count > 1 ? drift.snapshots.count : 0
        mean = [Double](repeating: 0, count: nRanks)
        squares = mean
        byGroup = [Double](repeating: 0, count: nRanks * nGroups)
        bySnapshot = [Double](repeating: 0, count: nRanks * nSnapshots)
    }

    /// `part` of expert e's load on a rank.
    func add(_ e: Int, part: Double, on rank: Int) {
        let load = drift.mean[e] * part
        mean[rank] += load
        squares[rank] += load * load
        byGroup[rank * nGroups + e / drift.groupSize] += load
        for s in 0..<nSnapshots { bySnapshot[rank * nSnapshots + s] += drift.snapshots[s][e] * part }
    }

    /// What the rank may have to bear with all of expert e as well.
    func level(_ rank: Int, with e: Int) -> Double {
        let load = drift.mean[e], group = e / drift.groupSize
        var variance = Risk.own * Risk.own * (squares[rank] + load * load)
        var grouped = 0.0
        for g in 0..<nGroups {
            let here = byGroup[rank * nGroups + g] + (g == group ? load : 0)
            grouped += here * here
        }
        variance += Risk.group * Risk.group * grouped
        if nSnapshots > 0 {
            let centre = mean[rank] + load
            var spread = 0.0
            for s in 0..<nSnapshots {
                let gap = bySnapshot[rank * nSnapshots + s] + drift.snapshots[s][e] - centre
                spread += gap * gap
            }
            variance += Risk.snapshot * Risk.snapshot * spread / Double(nSnapshots)
        }
        return mean[rank] + load + Risk.deviations * variance.squareRoot()
    }

    /// The rank with room that has least to bear with all of expert e as well; nil where none has room.
    func safest(_ ranks: [Int], _ board: Board, _ e: Int) -> Int? {
        var best: Int?, least = Double.infinity
        for rank in ranks where board.hasRoom(rank) {
            let level = level(rank, with: e)
            if level < least { (best, least) = (rank, level) }
        }
        return best
    }
}
