// CopyCounts: what a placement costs in training: which rank owns which expert, and how many copies each rank gets and gives.

import LPLBTopology

/// Homes of one layer, and the copies that have to follow them. In a pull each copy gets the weights of its home, in a push each home gets
/// the gradients of its copies. Replicas of an expert on one rank count as one, since they share a row.
public struct CopyCounts: Sendable, Equatable {
    /// [nLogical]: the slot of each expert's home.
    public let homes: [Int32]
    /// [nRanks]: experts whose home the rank is.
    public let owned: [Int]
    /// [nRanks]: copies of other ranks' experts on the rank. So many experts' weights arrive there in a pull, and gradients leave in a push.
    public let pulls: [Int]
    /// [nRanks]: copies of the rank's experts on other ranks. So many experts' gradients arrive there in a push, and weights leave in a pull.
    public let pushes: [Int]

    public init(_ placement: Placement) throws(RuleViolation) {
        let shape = placement.shape
        homes = try LPLBPlacement.homes(of: placement)
        var owned = [Int](repeating: 0, count: shape.epSize), pulls = owned, pushes = owned
        for expert in 0..<shape.nLogical {
            let home = Int(homes[expert]) / shape.nLocal
            owned[home] += 1
            var last = -1  // slots come in ascending order, so those of one rank stand together
            for slot in placement.replicaStart[expert]..<placement.replicaStart[expert + 1] {
                let rank = Int(placement.replicaSlot[Int(slot)]) / shape.nLocal
                if rank != last && rank != home {
                    pulls[rank] += 1
                    pushes[home] += 1
                }
                last = rank
            }
        }
        (self.owned, self.pulls, self.pushes) = (owned, pulls, pushes)
    }
}

/// The numbers of experts that ranks own where all own equally many, or as nearly so as can be.
struct EvenShare {
    let least: Int, most: Int

    init(nLogical: Int, nRanks: Int) {
        least = nLogical / max(1, nRanks)
        most = (nLogical + nRanks - 1) / max(1, nRanks)
    }

    /// How many homes stand where others should.
    func excess(_ owned: [Int], on ranks: [Int]) -> Int {
        let above = ranks.reduce(0) { $0 + max(0, owned[$1] - most) }, below = ranks.reduce(0) { $0 + max(0, least - owned[$1]) }
        return above + below
    }
}
