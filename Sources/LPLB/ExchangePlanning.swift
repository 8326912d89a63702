// A planner with an exchange: `run` gathers everybody's counts by itself.

import CLPLB
import LPLBTopology

extension Planner {
    /// Checks that the exchange is one of this planner's ranks, then uses it in `run`; nil: no exchange any more.
    func attach(_ exchange: Exchange?) throws(Failure) {
        guard let exchange else {
            self.exchange = nil
            return try number(attached: 0)
        }
        let settings = exchange.settings
        guard device == Int(settings.device) else {
            throw Failure("exchange", "must be on the planner's device, \(device)", value: "device \(settings.device)")
        }
        guard settings.counts == shape.nLogical + 1 else {
            throw Failure(
                "exchange", "must carry lplb_counts_width(n_logical) = \(shape.nLogical + 1) counts", value: settings.counts)
        }
        guard settings.ranks * settings.nodes == shape.epSize else {
            throw Failure("exchange", "must join ep_size = \(shape.epSize) ranks", value: settings.ranks * settings.nodes)
        }
        let rank = settings.node * settings.ranks + settings.rank
        guard self.rank == rank else {
            let own = self.rank.map(String.init) ?? "none"
            throw Failure("exchange", "must be that of the planner's rank, \(own)", value: "rank \(rank)")
        }
        try number(attached: exchange.attachments + 1)
        exchange.attachments += 1
        self.exchange = exchange
    }

    /// Enters the number by which this planner is attached into its digest.
    private func number(attached: Int64) throws(Failure) {
        if let placement { try backend.setDigest(digest(of: placement, attached: attached, capacities)) }
        self.attached = attached
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
            try backend.countRow(ids, row: counts, stream: stream)
            try exchange.allGather(counts, gathered, compared: true, stream: stream)
            let rows = CountBuffer(rows: gathered, sources: shape.epSize, compared: false)
            try backend.run(ids, gathered: rows, to: out, counter: counter, maxBlocks: maxBlocks, stream: stream)
        }
    }
}
