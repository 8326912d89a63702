// lplb.h section 5: placement alone.

import CLPLB
import LPLBPlacement
import LPLBTopology

@_cdecl("lplb_eplb_rebalance") @implementation
public func lplb_eplb_rebalance(
    _ weight: UnsafePointer<Float>?, _ n_layers: Int64, _ n_logical: Int64, _ n_physical: Int64, _ n_groups: Int64, _ n_nodes: Int64,
    _ n_ranks: Int64, _ phy2log: UnsafeMutablePointer<Int64>?, _ replica: UnsafeMutablePointer<Int64>?,
    _ logcnt: UnsafeMutablePointer<Int64>?, _ message: UnsafeMutablePointer<CChar>?, _ message_size: Int64
) -> lplb_status {
    withMessage(message, message_size) { () throws(Failure) in
        let count = try translating { () throws(RuleViolation) in
            try rebalanceWeightCount(
                nLayers: Int(n_layers), nLogical: Int(n_logical), nPhysical: Int(n_physical), nGroups: Int(n_groups),
                nNodes: Int(n_nodes), nRanks: Int(n_ranks))
        }
        try Check.aligned(UnsafeRawPointer(phy2log), "phy2log", to: 8)
        try Check.aligned(UnsafeRawPointer(replica), "replica", to: 8)
        try Check.aligned(UnsafeRawPointer(logcnt), "logcnt", to: 8)
        let weight = count == 0 ? nil : try Check.pointer(weight, "weight")
        try translating { () throws(RuleViolation) in
            try rebalance(
                weight: UnsafeBufferPointer(start: weight, count: count), nLayers: Int(n_layers), nLogical: Int(n_logical),
                nPhysical: Int(n_physical), nGroups: Int(n_groups), nNodes: Int(n_nodes), nRanks: Int(n_ranks), phy2log: phy2log,
                replica: replica, logcnt: logcnt)
        }
    }
}

@_cdecl("lplb_placement_homes") @implementation
public func lplb_placement_homes(
    _ phy2log: UnsafePointer<Int32>?, _ n_physical: Int64, _ n_logical: Int64, _ ep_size: Int64, _ former: UnsafePointer<Int32>?,
    _ homes: UnsafeMutablePointer<Int32>?, _ message: UnsafeMutablePointer<CChar>?, _ message_size: Int64
) -> lplb_status {
    withMessage(message, message_size) { () throws(Failure) in
        let phy2log = try Check.pointer(phy2log, "phy2log"), result = try Check.pointer(homes, "homes")
        try Check.aligned(UnsafeRawPointer(former), "former", to: 4)
        let found = try translating { () throws(RuleViolation) in
            let shape = try ExpertShape(epSize: Int(ep_size), nNodes: 1, groupSize: 0, nLogical: Int(n_logical), nPhysical: Int(n_physical))
            let placement = try Placement(shape: shape, phy2log: Array(UnsafeBufferPointer(start: phy2log, count: shape.nPhysical)))
            let before = former.map { Array(UnsafeBufferPointer(start: $0, count: shape.nLogical)) }
            return try LPLBPlacement.homes(of: placement, former: before)
        }
        result.update(from: found, count: found.count)
    }
}

@_cdecl("lplb_place") @implementation
public func lplb_place(
    _ config: UnsafePointer<lplb_place_config>?, _ history: UnsafePointer<Double>?, _ phy2log: UnsafeMutablePointer<Int32>?,
    _ reports: UnsafeMutablePointer<lplb_place_report>?, _ message: UnsafeMutablePointer<CChar>?, _ message_size: Int64
) -> lplb_status {
    withMessage(message, message_size) { () throws(Failure) in
        let request = try PlaceRequest(StructSize.read(config, "config"))
        let result = request.nLayers == 0 ? nil : try Check.pointer(phy2log, "phy2log")
        let loads = request.historyCount == 0 ? nil : try Check.pointer(history, "history")
        try Check.aligned(UnsafeRawPointer(reports), "reports", to: 8)
        guard let result else { return }
        let found = try translating { () throws(RuleViolation) in
            try place(request, history: UnsafeBufferPointer(start: loads, count: request.historyCount), phy2log: result)
        }
        guard let reports else { return }
        for (layer, one) in found.enumerated() {
            reports[layer] = lplb_place_report(
                even_balance: one.evenBalance, exact_balance: one.exactBalance, duplicates: Int64(one.duplicates), moves: Int64(one.moves))
        }
    }
}

extension PlaceRequest {
    fileprivate init(_ config: lplb_place_config) throws(Failure) {
        self.init()
        guard let policy = Policy(rawValue: config.policy) else {
            throw Failure("policy", "must be one of 0 .. \(Policy.allCases.count - 1)", value: config.policy)
        }
        self.policy = policy
        nSnapshots = config.n_snapshots == 0 ? 1 : Int(config.n_snapshots)
        (nLayers, nLogical) = (Int(config.n_layers), Int(config.n_logical))
        (nNodes, nGroups) = (max(1, Int(config.n_nodes)), max(1, Int(config.n_groups)))
        tolerance = config.tolerance == 0 ? tolerance : max(0, config.tolerance)
        let nRanks = try Check.range(config.n_ranks, "n_ranks", 1...Int64(LPLB_MAX_RANKS))
        let nSlots = try Check.range(config.n_slots, "n_slots", 1...Int64(LPLB_MAX_PHYSICAL))
        slots = config.slots.map { given in (0..<nRanks).map { Int(given[$0]) } } ?? [Int](repeating: nSlots, count: nRanks)
        for (rank, number) in slots.enumerated() where number < 0 || number > nSlots {
            throw Failure("slots[\(rank)]", "must lie in 0 ... n_slots \(nSlots)", value: number)
        }
        width = nSlots
        previous = config.previous == nil ? nil : []
        try translating { () throws(RuleViolation) in try checkSizes() }
        if let given = config.previous {
            let given = try Check.pointer(given, "previous")
            previous = Array(UnsafeBufferPointer(start: given, count: nLayers * slotsPerLayer))
        }
        switch config.max_moves {
        case Int64(LPLB_PLACE_KEEP): maxMoves = 0
        case -1, 0: maxMoves = nil
        case 1...: maxMoves = Int(config.max_moves)
        default: throw Failure("max_moves", "must be a number of moves, -1 for any or LPLB_PLACE_KEEP (-2)", value: config.max_moves)
        }
        if maxMoves != nil && previous == nil {
            throw Failure("max_moves", "needs previous, which moves are counted from", value: config.max_moves)
        }
    }
}
