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

    /// `run` for the counts of all ranks: in one launch where the backend can, else count, exchange, plan.
    func run(
        _ ids: IdBuffer, by exchange: Exchange, to out: IdOutput, counter: CounterBuffer, maxBlocks: Int, stream: UnsafeMutableRawPointer?
    ) throws(Failure) {
        try exchange.alone { () throws(Failure) in
            try exchange.requireReady()
            let fused = try backend.run(
                ids, exchanging: exchange.view, to: out, counter: counter, maxBlocks: maxBlocks, stream: stream)
            if fused { return }
            let counts = exchange.plannerCounts, gathered = exchange.plannerGathered
            try backend.count(ids, counts: counts, cumulative: nil, chunks: 1, stream: stream)
            try exchange.allGather(counts, gathered, stream: stream)
            try backend.run(ids, gathered: gathered, to: out, counter: counter, maxBlocks: maxBlocks, stream: stream)
        }
    }
}
