// A planner with an exchange: `run` gathers everybody's counts by itself.

import CLPLB
import LPLBTopology

extension Planner {
    /// Checks that the exchange is one of this planner's ranks, then uses it in `run`; nil: no exchange any more.
    func attach(_ exchange: Exchange?) throws(Failure) {
        guard let exchange else { return self.exchange = nil }
        let settings = exchange.settings
        guard device == Int(settings.device) else {
            throw Failure("exchange", "must be on the planner's device, \(device)", value: "device \(settings.device)")
        }
        guard settings.counts == shape.nLogical else {
            throw Failure("exchange", "must carry n_logical = \(shape.nLogical) counts", value: settings.counts)
        }
        guard settings.ranks * settings.nodes == shape.epSize else {
            throw Failure("exchange", "must join ep_size = \(shape.epSize) ranks", value: settings.ranks * settings.nodes)
        }
        let rank = settings.node * settings.ranks + settings.rank
        guard self.rank == rank else {
            let own = self.rank.map(String.init) ?? "none"
            throw Failure("exchange", "must be that of the planner's rank, \(own)", value: "rank \(rank)")
        }
        self.exchange = exchange
    }

    /// The counts of all ranks, in memory of the exchange that keeps until its next call.
    func exchangedCounts(
        of ids: IdBuffer, by exchange: Exchange, stream: UnsafeMutableRawPointer?
    ) throws(Failure) -> UnsafePointer<Int32> {
        try exchange.alone { () throws(Failure) in
            try exchange.requireReady()
            let counts = exchange.plannerCounts
            try backend.count(ids, counts: counts, cumulative: nil, chunks: 1, stream: stream)
            try exchange.allGather(counts, exchange.plannerGathered, stream: stream)
        }
        return UnsafePointer(exchange.plannerGathered)
    }
}
