// lplb.h section 5: placement alone.

import CLPLB
import LPLBPlacement
import LPLBReplicas
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

@_cdecl("lplb_placement_rows") @implementation
public func lplb_placement_rows(
    _ phy2log: UnsafePointer<Int32>?, _ n_physical: Int64, _ n_logical: Int64, _ ep_size: Int64, _ slack: Int64,
    _ former: UnsafePointer<Int32>?, _ rows: UnsafeMutablePointer<Int32>?, _ homes: UnsafeMutablePointer<Int32>?,
    _ row_of_slot: UnsafeMutablePointer<Int32>?, _ message: UnsafeMutablePointer<CChar>?, _ message_size: Int64
) -> lplb_status {
    withMessage(message, message_size) { () throws(Failure) in
        let phy2log = try Check.pointer(phy2log, "phy2log"), result = try Check.pointer(rows, "rows")
        try Check.aligned(UnsafeRawPointer(homes), "homes", to: 4)
        try Check.aligned(UnsafeRawPointer(row_of_slot), "row_of_slot", to: 4)
        let slack = try Check.range(slack, "slack", 0...Int64(LPLB_MAX_PHYSICAL))
        let shape = try translating { () throws(RuleViolation) in
            try ExpertShape(epSize: Int(ep_size), nNodes: 1, groupSize: 0, nLogical: Int(n_logical), nPhysical: Int(n_physical))
        }
        let before = try former.map { (former) throws(Failure) in
            try Rows(former, "former", nRanks: shape.epSize, nRows: shape.nLocal + 2 * slack, nLogical: shape.nLogical)
        }
        let found = try translating { () throws(RuleViolation) in
            let placement = try Placement(shape: shape, phy2log: Array(UnsafeBufferPointer(start: phy2log, count: shape.nPhysical)))
            return try Rows.settled(placement, slack: slack, before: before)
        }
        found.rows.write(to: result)
        homes?.update(from: found.homes, count: found.homes.count)
        row_of_slot?.update(from: found.rows.ofSlots(phy2log, shape), count: shape.nPhysical)
    }
}

@_cdecl("lplb_placement_moves") @implementation
public func lplb_placement_moves(
    _ kind: Int32, _ rows: UnsafePointer<Int32>?, _ former: UnsafePointer<Int32>?, _ n_logical: Int64, _ ep_size: Int64, _ n_rows: Int64,
    _ moves: UnsafeMutablePointer<Int32>?, _ n_moves: UnsafeMutablePointer<Int64>?, _ message: UnsafeMutablePointer<CChar>?,
    _ message_size: Int64
) -> lplb_status {
    withMessage(message, message_size) { () throws(Failure) in
        let moves = try Check.pointer(moves, "moves"), count = try Check.pointer(n_moves, "n_moves")
        let kind = try Check.range(Int64(kind), "kind", Int64(LPLB_MOVES_PULL)...Int64(LPLB_MOVES_HOMES))
        let nLogical = try Check.range(n_logical, "n_logical", 1...Int64(LPLB_MAX_LOGICAL))
        let nRanks = try Check.range(ep_size, "ep_size", 1...Int64(LPLB_MAX_RANKS))
        let nRows = try Check.range(n_rows, "n_rows", 1...Rows.most)
        let now = try Rows(rows, "rows", nRanks: nRanks, nRows: nRows, nLogical: nLogical)
        let before = try former.map { (former) throws(Failure) in
            try Rows(former, "former", nRanks: nRanks, nRows: nRows, nLogical: nLogical)
        }
        let found: [Move]
        switch (kind, before) {
        case (Int(LPLB_MOVES_PULL), _): found = now.pulls(except: before)
        case (Int(LPLB_MOVES_PUSH), nil): found = now.pushes()
        case (Int(LPLB_MOVES_HOMES), let before?): found = now.homeMoves(from: before)
        default:
            throw Failure(
                "former", "must be NULL for LPLB_MOVES_PUSH, and rows for LPLB_MOVES_HOMES", value: before == nil ? "NULL" : "rows")
        }
        for (index, move) in found.enumerated() {
            let words = [move.round, move.source.rank, move.source.row, move.target.rank, move.target.row].map(Int32.init)
            (moves + 5 * index).update(from: words, count: 5)
        }
        count.pointee = Int64(found.count)
    }
}

extension Rows {
    /// The largest n_rows that lplb_placement_rows makes.
    static var most: Int64 { 3 * Int64(LPLB_MAX_PHYSICAL) }

    /// From [nRanks][1 + nRows] of a caller.
    init(_ memory: UnsafePointer<Int32>?, _ argument: String, nRanks: Int, nRows: Int, nLogical: Int) throws(Failure) {
        let memory = try Check.pointer(memory, argument), width = 1 + nRows
        let own = (0..<nRanks).map { memory[$0 * width] }
        let experts = (0..<nRanks).flatMap { UnsafeBufferPointer(start: memory + $0 * width + 1, count: nRows) }
        self = try translating { () throws(RuleViolation) in
            try Rows(argument, nRanks: nRanks, nRows: nRows, nLogical: nLogical, own: own, experts: experts)
        }
    }

    fileprivate func write(to memory: UnsafeMutablePointer<Int32>) {
        for rank in 0..<nRanks {
            memory[rank * (1 + nRows)] = own[rank]
            for row in 0..<nRows { memory[rank * (1 + nRows) + 1 + row] = experts[rank * nRows + row] }
        }
    }

    /// The row of the expert in each slot, on the slot's rank.
    fileprivate func ofSlots(_ phy2log: UnsafePointer<Int32>, _ shape: ExpertShape) -> [Int32] {
        var result: [Int32] = []
        for rank in 0..<nRanks {
            var row: [Int32: Int32] = [:]
            for (index, expert) in experts[rank * nRows..<(rank + 1) * nRows].enumerated() where expert >= 0 { row[expert] = Int32(index) }
            for slot in rank * shape.nLocal..<(rank + 1) * shape.nLocal { result.append(row[phy2log[slot]] ?? -1) }
        }
        return result
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
            try place(request, history: UnsafeBufferPointer(start: loads, count: request.historyCount), phy2log: result, isJudged: reports != nil)
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
        evenHomes = try Check.range(Int64(config.even_homes), "even_homes", 0...1) == 1
        nSnapshots = config.n_snapshots == 0 ? 1 : Int(config.n_snapshots)
        (nLayers, nLogical) = (Int(config.n_layers), Int(config.n_logical))
        (nNodes, nGroups) = (config.n_nodes == 0 ? 1 : Int(config.n_nodes), config.n_groups == 0 ? 1 : Int(config.n_groups))
        guard config.tolerance.isFinite else { throw Failure("tolerance", "must be finite", value: config.tolerance) }
        tolerance = config.tolerance == 0 ? tolerance : max(0, config.tolerance)
        let nRanks = try Check.range(config.n_ranks, "n_ranks", 1...Int64(LPLB_MAX_RANKS))
        let nSlots = try Check.range(config.n_slots, "n_slots", 1...Int64(LPLB_MAX_PHYSICAL))
        try Check.aligned(UnsafeRawPointer(config.slots), "slots", to: 8)
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
        if maxMoves != nil && policy == .deepseek {
            throw Failure(
                "max_moves", "must be 0 or -1 with policy deepseek, which places anew; repair and balanced keep to it",
                value: config.max_moves)
        }
        if maxMoves != nil && previous == nil {
            throw Failure("max_moves", "needs previous, which moves are counted from", value: config.max_moves)
        }
    }
}
