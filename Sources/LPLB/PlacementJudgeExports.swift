// lplb.h section 5: what a placement is worth.

import CLPLB
import LPLBPlacement
import LPLBTopology

@_cdecl("lplb_placement_judge") @implementation
public func lplb_placement_judge(
    _ report: UnsafePointer<lplb_placement_report>?, _ message: UnsafeMutablePointer<CChar>?, _ message_size: Int64
) -> lplb_status {
    withMessage(message, message_size) { () throws(Failure) in
        let report: lplb_placement_report = try StructSize.read(report, "report")
        let request = try PlaceRequest(report)
        try report.checkResults()
        if request.nLayers == 0 { return }
        let phy2log = try Check.pointer(report.phy2log, "phy2log")
        let history = try report.history.map { (history) throws(Failure) in
            UnsafeBufferPointer(start: try Check.pointer(history, "history"), count: request.historyCount)
        }
        let figures = try translating { () throws(RuleViolation) in
            try judge(
                request, phy2log: UnsafeBufferPointer(start: phy2log, count: request.nLayers * request.slotsPerLayer), history: history,
                wanted: report.wanted)
        }
        for (layer, one) in figures.enumerated() { report.write(one, layer: layer, request) }
    }
}

extension PlaceRequest {
    fileprivate init(_ report: lplb_placement_report) throws(Failure) {
        self.init()
        policy = .balanced
        nSnapshots = report.n_snapshots == 0 ? 1 : Int(report.n_snapshots)
        (nLayers, nLogical, nNodes) = (Int(report.n_layers), Int(report.n_logical), report.n_nodes == 0 ? 1 : Int(report.n_nodes))
        width = try Check.range(report.n_slots, "n_slots", 1...Int64(LPLB_MAX_PHYSICAL))
        slots = [Int](repeating: width, count: try Check.range(report.n_ranks, "n_ranks", 1...Int64(LPLB_MAX_RANKS)))
        try translating { () throws(RuleViolation) in try checkSizes() }
    }
}

extension lplb_placement_report {
    fileprivate var wanted: Figures {
        var wanted: Figures = []
        if even_balance != nil { wanted.insert(.evenBalance) }
        if exact_balance != nil { wanted.insert(.exactBalance) }
        if homes != nil || pulls != nil || pushes != nil { wanted.insert(.copies) }
        if leaves_rank != nil || leaves_node != nil || inbound != nil { wanted.insert(.locality) }
        return wanted
    }

    fileprivate func checkResults() throws(Failure) {
        try Check.aligned(UnsafeRawPointer(even_balance), "even_balance", to: 8)
        try Check.aligned(UnsafeRawPointer(exact_balance), "exact_balance", to: 8)
        try Check.aligned(UnsafeRawPointer(duplicates), "duplicates", to: 8)
        try Check.aligned(UnsafeRawPointer(homes), "homes", to: 4)
        try Check.aligned(UnsafeRawPointer(pulls), "pulls", to: 8)
        try Check.aligned(UnsafeRawPointer(pushes), "pushes", to: 8)
        try Check.aligned(UnsafeRawPointer(leaves_rank), "leaves_rank", to: 8)
        try Check.aligned(UnsafeRawPointer(leaves_node), "leaves_node", to: 8)
        try Check.aligned(UnsafeRawPointer(inbound), "inbound", to: 8)
        if history == nil && !wanted.isSubset(of: .copies) {
            throw Failure("history", "must be given for balance and for what leaves ranks", value: "NULL")
        }
    }

    fileprivate func write(_ one: LayerFigures, layer: Int, _ request: PlaceRequest) {
        even_balance?[layer] = one.evenBalance
        exact_balance?[layer] = one.exactBalance
        duplicates?[layer] = Int64(one.duplicates)
        leaves_rank?[layer] = one.leavesRank
        leaves_node?[layer] = one.leavesNode
        let ranks = layer * request.slots.count
        for (rank, share) in one.inbound.enumerated() { inbound?[ranks + rank] = share }
        guard let copies = one.copies else { return }
        for (expert, slot) in copies.homes.enumerated() { homes?[layer * request.nLogical + expert] = slot }
        for (rank, number) in copies.pulls.enumerated() { pulls?[ranks + rank] = Int64(number) }
        for (rank, number) in copies.pushes.enumerated() { pushes?[ranks + rank] = Int64(number) }
    }
}
