// The layout of a dispatch on the host: the oracle of the kernels in cuda/layout.cu.

import CLPLB
import LPLBSolver
import LPLBTopology

extension CpuBackend {
    func layout(_ request: LayoutRequest, stream: UnsafeMutableRawPointer?) throws(Failure) {
        let (solver, assigner) = try loaded()
        guard let dispatch else { throw Failure(LPLB_ERROR_INTERNAL, "the CPU backend was asked for a layout without a placement") }
        let nLocal = shape.nLocal
        switch (request.rowOfSlot, request.rowType) {
        case (nil, _): dispatch.setRows(request.nRows) { Int64($0 % nLocal) }
        case (let table?, .int32):
            let rows = table.assumingMemoryBound(to: Int32.self)
            dispatch.setRows(request.nRows) { Int64(rows[$0]) }
        case (let table?, .int64):
            let rows = table.assumingMemoryBound(to: Int64.self)
            dispatch.setRows(request.nRows) { rows[$0] }
        }
        if request.sends {
            let take = request.planned ? (network: solver.network, tokens: assigner.take) : nil
            let found: DispatchLayout.Findings
            switch request.ids.type {
            case .int32: found = sort(request, request.ids.as32, dispatch, take)
            case .int64: found = sort(request, request.ids.as64, dispatch, take)
            }
            writeSent(request, found)
        }
        if request.receives, let received = request.received {
            if request.planned { dispatch.receive(received) { assigner.eachReceived(quotas: solver.quotas, $0) } }
            writeReceived(request, received)
        }
        if request.gathers, let received = request.received, let byRow = request.byRow {
            dispatch.gather(received, to: byRow, request.nByRow)
        }
    }

    private func sort<Id: FixedWidthInteger>(
        _ request: LayoutRequest, _ ids: UnsafePointer<Id>, _ dispatch: DispatchLayout,
        _ take: (network: Network, tokens: UnsafePointer<Int64>)?
    ) -> DispatchLayout.Findings {
        dispatch.sort(
            ids, request.ids.count, experts: request.experts?.assumingMemoryBound(to: Id.self), order: request.order ?? nowhere(),
            sent: request.sent ?? nowhere(), take: take)
    }

    /// Never written to: there are no elements.
    private func nowhere<Word>() -> UnsafeMutablePointer<Word> { UnsafeMutablePointer(bitPattern: 64)! }

    private func writeSent(_ request: LayoutRequest, _ found: DispatchLayout.Findings) {
        guard let sent = request.sent, let numbers = request.numbers else { return }
        var problems = found.badIds > 0 ? LPLB_LAYOUT_BAD_IDS : 0
        if found.otherExperts > 0 { problems |= LPLB_LAYOUT_OTHER_EXPERTS }
        if found.otherPlan { problems |= LPLB_LAYOUT_OTHER_PLAN }
        var total: Int32 = 0
        for rank in 0..<shape.epSize {
            var rows: Int32 = 0
            for row in 0..<request.nRows { rows &+= sent[rank * request.nRows + row] }
            numbers[LPLB_LAYOUT_RANKS + rank] = rows
            total &+= rows
        }
        numbers[0] = Int32(problems)
        numbers[LPLB_LAYOUT_N_BAD_IDS] = Int32(truncatingIfNeeded: found.badIds)
        numbers[LPLB_LAYOUT_N_OTHER_EXPERTS] = Int32(truncatingIfNeeded: found.otherExperts)
        numbers[LPLB_LAYOUT_N_SENT] = total
        numbers[6] = 0
    }

    private func writeReceived(_ request: LayoutRequest, _ received: UnsafePointer<Int32>) {
        guard let ends = request.ends, let numbers = request.numbers else { return }
        let nRows = request.nRows, ofRank = LPLB_LAYOUT_RANKS + shape.epSize, ofRow = ofRank + shape.epSize
        var negative = false, total: Int64 = 0
        for rank in 0..<shape.epSize {
            var rows: Int64 = 0
            for row in 0..<nRows {
                negative = negative || received[rank * nRows + row] < 0
                rows += Int64(received[rank * nRows + row])
            }
            numbers[ofRank + rank] = Int32(clamping: rows)
        }
        for row in 0..<nRows {
            var rows: Int64 = 0
            for rank in 0..<shape.epSize { rows += Int64(received[rank * nRows + row]) }
            total += rows
            numbers[ofRow + row] = Int32(clamping: rows)
            ends[row] = Int32(clamping: total)
        }
        var problems = negative || total > Int64(Int32.max) ? LPLB_LAYOUT_BAD_RECEIVED : 0
        if request.gathers && total > Int64(request.nByRow) { problems |= LPLB_LAYOUT_BY_ROW_SHORT }
        numbers[1] = Int32(problems)
        numbers[LPLB_LAYOUT_N_RECEIVED] = Int32(clamping: total)
        numbers[7] = 0
    }
}
