// lplb.h section 9: the layout of a dispatch.

import CLPLB
import LPLBTopology

/// A checked lplb_layout: the pointers that its parts need are there, sizes are in range.
struct LayoutRequest {
    let ids: IdBuffer
    let experts: UnsafeRawPointer?
    let rowOfSlot: UnsafeRawPointer?
    let rowType: IdType
    let nRows: Int
    let sends: Bool
    let receives: Bool
    let gathers: Bool
    /// `received` is written from the plan, and `sent` compared with it.
    let planned: Bool
    let order: UnsafeMutablePointer<Int64>?
    let sent: UnsafeMutablePointer<Int32>?
    let received: UnsafeMutablePointer<Int32>?
    let ends: UnsafeMutablePointer<Int32>?
    let numbers: UnsafeMutablePointer<Int32>?
    let byRow: UnsafeMutablePointer<Int64>?
    let nByRow: Int

    init(_ layout: lplb_layout, _ shape: ExpertShape) throws(Failure) {
        let all = LPLB_LAYOUT_SENT | LPLB_LAYOUT_RECEIVED | LPLB_LAYOUT_BY_ROW
        let given = try Check.range(Int64(layout.parts), "layout.parts", 0...Int64(all))
        let parts = given == 0 ? LPLB_LAYOUT_SENT | LPLB_LAYOUT_RECEIVED : given
        sends = parts & LPLB_LAYOUT_SENT != 0
        receives = parts & LPLB_LAYOUT_RECEIVED != 0
        gathers = parts & LPLB_LAYOUT_BY_ROW != 0
        planned = try Check.range(Int64(layout.exchanged), "layout.exchanged", 0...1) == 0 && receives
        let most = Int64(LPLB_MAX_LAYOUT_ROWS) / Int64(shape.epSize)
        nRows = layout.n_rows == 0 ? shape.nLocal : try Check.range(layout.n_rows, "layout.n_rows", 1...most)

        rowType = layout.row_of_slot == nil ? .int32 : try Check.dtype(layout.row_dtype, "layout.row_dtype")
        try Check.aligned(layout.row_of_slot, "layout.row_of_slot", to: rowType.stride)
        if layout.row_of_slot == nil && nRows < shape.nLocal && (sends || planned) {
            throw Failure("layout.n_rows", "must be at least the \(shape.nLocal) slots of a rank where row_of_slot is NULL", value: nRows)
        }
        rowOfSlot = layout.row_of_slot
        if sends {
            ids = try idBuffer(layout.ids, layout.ids_dtype, layout.n_ids, in: "layout.")
            try Check.aligned(layout.experts, "layout.experts", to: ids.type.stride)
        } else {
            ids = IdBuffer(base: nil, type: .int32, count: 0)
        }
        experts = layout.experts
        order = try LayoutRequest.output(layout.order, "layout.order", sends && ids.count > 0)
        sent = try LayoutRequest.output(layout.sent, "layout.sent", sends)
        received = try LayoutRequest.output(layout.received, "layout.received", receives || gathers)
        ends = try LayoutRequest.output(layout.ends, "layout.ends", receives)
        numbers = try LayoutRequest.output(layout.numbers, "layout.numbers", sends || receives)
        nByRow = gathers ? try Check.range(layout.n_by_row, "layout.n_by_row", 0...Int64(Int32.max)) : 0
        byRow = try LayoutRequest.output(layout.by_row, "layout.by_row", nByRow > 0)
    }

    /// nil where it is not needed.
    private static func output<Word>(
        _ pointer: UnsafeMutablePointer<Word>?, _ argument: String, _ needed: Bool
    ) throws(Failure) -> UnsafeMutablePointer<Word>? {
        needed ? try Check.pointer(pointer, argument) : nil
    }
}

extension Planner {
    func layout(_ request: LayoutRequest, stream: UnsafeMutableRawPointer?) throws(Failure) {
        _ = try placed()
        if request.planned {
            guard rank != nil || shape.epSize == 1 else {
                throw Failure(
                    "layout.exchanged",
                    "must be 1 for a planner of the whole batch of several ranks, which does not know who sends what", value: 0)
            }
            try requirePlan("lplb_planner_layout")
        }
        try backend.layout(request, stream: stream)
    }
}

@_cdecl("lplb_planner_layout") @implementation
public func lplb_planner_layout(
    _ handle: OpaquePointer?, _ layout: UnsafePointer<lplb_layout>?, _ stream: UnsafeMutableRawPointer?
) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        let layout = try StructSize.read(layout, "layout", size: "layout.struct_size")
        try planner.layout(try LayoutRequest(layout, planner.shape), stream: stream)
    }
}
