// lplb.h section 3: count, solve, redirect, run. Pointers and sizes are checked here, values by the backend.

import CLPLB

/// Ids and their output, as several calls take them.
@inline(__always)
func idBuffer(_ ids: UnsafeRawPointer?, _ dtype: lplb_dtype, _ n_ids: Int64, in whole: StaticString = "") throws(Failure) -> IdBuffer {
    let type = try Check.dtype(dtype, "\(whole)ids_dtype")
    let count = try Check.range(n_ids, "\(whole)n_ids", 0...Int64(Int32.max))
    if count > 0 && ids == nil { throw Failure("\(whole)ids", "must not be NULL when n_ids > 0", value: "NULL") }
    try Check.aligned(ids, "\(whole)ids", to: type.stride)
    return IdBuffer(base: ids, type: type, count: count)
}

@inline(__always)
private func idOutput(_ out: UnsafeMutableRawPointer?, for ids: IdBuffer) throws(Failure) -> IdOutput {
    if ids.count > 0 && out == nil { throw Failure("out", "must not be NULL when n_ids > 0", value: "NULL") }
    try Check.aligned(UnsafeRawPointer(out), "out", to: ids.type.stride)
    return IdOutput(base: out)
}

@inline(__always)
private func countBuffer(_ counts: UnsafeRawPointer?, _ dtype: lplb_dtype, sources: Int) throws(Failure) -> CountBuffer {
    let type = try Check.dtype(dtype, "counts_dtype")
    guard let counts else { throw Failure("counts", "must not be NULL", value: "NULL") }
    try Check.aligned(counts, "counts", to: type.stride)
    return CountBuffer(base: counts, type: type, sources: sources)
}

@inline(__always)
private func counterBuffer(_ counter: UnsafeMutableRawPointer?, _ dtype: lplb_dtype) throws(Failure) -> CounterBuffer {
    guard counter != nil else { return CounterBuffer(base: nil, type: .int64) }
    let type = try Check.dtype(dtype, "counter_dtype")
    try Check.aligned(UnsafeRawPointer(counter), "counter", to: type.stride)
    return CounterBuffer(base: counter, type: type)
}

private let chunkLimit: Int64 = 65_536

@_cdecl("lplb_planner_count") @implementation
public func lplb_planner_count(
    _ handle: OpaquePointer?, _ ids: UnsafeRawPointer?, _ ids_dtype: lplb_dtype, _ n_ids: Int64, _ counts: UnsafeMutablePointer<Int32>?,
    _ cumulative: UnsafeMutablePointer<Int32>?, _ n_chunks: Int64, _ stream: UnsafeMutableRawPointer?
) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        let ids = try idBuffer(ids, ids_dtype, n_ids)
        let counts = try Check.pointer(counts, "counts")
        try Check.aligned(UnsafeRawPointer(cumulative), "cumulative", to: 4)
        let chunks = cumulative == nil ? 1 : try Check.range(n_chunks, "n_chunks", 1...chunkLimit)
        try planner.count(ids, counts: counts, cumulative: cumulative, chunks: chunks, stream: stream)
    }
}

@_cdecl("lplb_planner_solve") @implementation
public func lplb_planner_solve(
    _ handle: OpaquePointer?, _ counts: UnsafeRawPointer?, _ counts_dtype: lplb_dtype, _ n_sources: Int64,
    _ ratios: UnsafeMutablePointer<Float>?, _ scaled: UnsafeMutablePointer<Float>?, _ counter: UnsafeMutableRawPointer?,
    _ counter_dtype: lplb_dtype, _ stream: UnsafeMutableRawPointer?
) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        try Check.aligned(UnsafeRawPointer(ratios), "ratios", to: 4)
        try Check.aligned(UnsafeRawPointer(scaled), "scaled", to: 4)
        let sources = try Check.range(n_sources, "n_sources", 1...Int64(LPLB_MAX_EP_SIZE))
        try planner.solve(
            try countBuffer(counts, counts_dtype, sources: sources), ratios: ratios, scaled: scaled,
            counter: try counterBuffer(counter, counter_dtype), stream: stream)
    }
}

@_cdecl("lplb_planner_count_row") @implementation
public func lplb_planner_count_row(
    _ handle: OpaquePointer?, _ ids: UnsafeRawPointer?, _ ids_dtype: lplb_dtype, _ n_ids: Int64, _ row: UnsafeMutablePointer<Int32>?,
    _ stream: UnsafeMutableRawPointer?
) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        let ids = try idBuffer(ids, ids_dtype, n_ids)
        try planner.countRow(ids, row: try Check.pointer(row, "row"), stream: stream)
    }
}

@_cdecl("lplb_planner_make_row") @implementation
public func lplb_planner_make_row(
    _ handle: OpaquePointer?, _ counts: UnsafeRawPointer?, _ counts_dtype: lplb_dtype, _ row: UnsafeMutablePointer<Int32>?,
    _ stream: UnsafeMutableRawPointer?
) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        let counts = try countBuffer(counts, counts_dtype, sources: 1)
        try planner.makeRow(counts, row: try Check.pointer(row, "row"), stream: stream)
    }
}

@_cdecl("lplb_planner_solve_rows") @implementation
public func lplb_planner_solve_rows(
    _ handle: OpaquePointer?, _ rows: UnsafePointer<Int32>?, _ ratios: UnsafeMutablePointer<Float>?,
    _ scaled: UnsafeMutablePointer<Float>?, _ counter: UnsafeMutableRawPointer?, _ counter_dtype: lplb_dtype,
    _ stream: UnsafeMutableRawPointer?
) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        let rows = try Check.pointer(rows, "rows")
        try Check.aligned(UnsafeRawPointer(ratios), "ratios", to: 4)
        try Check.aligned(UnsafeRawPointer(scaled), "scaled", to: 4)
        try planner.solve(
            CountBuffer(rows: rows, sources: planner.shape.epSize, compared: true), ratios: ratios, scaled: scaled,
            counter: try counterBuffer(counter, counter_dtype), stream: stream)
    }
}

@_cdecl("lplb_planner_redirect") @implementation
public func lplb_planner_redirect(
    _ handle: OpaquePointer?, _ ids: UnsafeRawPointer?, _ ids_dtype: lplb_dtype, _ n_ids: Int64, _ out: UnsafeMutableRawPointer?,
    _ max_blocks: Int64, _ stream: UnsafeMutableRawPointer?
) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        let ids = try idBuffer(ids, ids_dtype, n_ids)
        let out = try idOutput(out, for: ids)
        let blocks = try Check.range(max_blocks, "max_blocks", 0...Int64(Int32.max))
        try planner.redirect(ids, to: out, maxBlocks: blocks, stream: stream)
    }
}

@_cdecl("lplb_planner_redirect_by_ratio") @implementation
public func lplb_planner_redirect_by_ratio(
    _ handle: OpaquePointer?, _ ids: UnsafeRawPointer?, _ ids_dtype: lplb_dtype, _ n_ids: Int64, _ ratios: UnsafePointer<Float>?,
    _ cumulative: UnsafePointer<Int32>?, _ n_chunks: Int64, _ out: UnsafeMutableRawPointer?, _ stream: UnsafeMutableRawPointer?
) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        let ids = try idBuffer(ids, ids_dtype, n_ids)
        let out = try idOutput(out, for: ids)
        let ratios = try Check.pointer(ratios, "ratios")
        let cumulative = try Check.pointer(cumulative, "cumulative")
        let chunks = try Check.range(n_chunks, "n_chunks", 1...chunkLimit)
        try planner.redirect(ids, byRatios: ratios, cumulative: cumulative, chunks: chunks, to: out, stream: stream)
    }
}

@_cdecl("lplb_planner_run") @implementation
public func lplb_planner_run(
    _ handle: OpaquePointer?, _ ids: UnsafeRawPointer?, _ ids_dtype: lplb_dtype, _ n_ids: Int64, _ gathered: UnsafePointer<Int32>?,
    _ out: UnsafeMutableRawPointer?, _ counter: UnsafeMutableRawPointer?, _ counter_dtype: lplb_dtype, _ max_blocks: Int64,
    _ stream: UnsafeMutableRawPointer?
) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        let ids = try idBuffer(ids, ids_dtype, n_ids)
        let out = try idOutput(out, for: ids)
        try Check.aligned(UnsafeRawPointer(gathered), "gathered", to: 4)
        let blocks = try Check.range(max_blocks, "max_blocks", 0...Int64(Int32.max))
        try planner.run(
            ids, gathered: gathered, to: out, counter: try counterBuffer(counter, counter_dtype), maxBlocks: blocks, stream: stream)
    }
}
