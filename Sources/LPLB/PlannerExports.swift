// lplb.h section 2: create, place, read the placement. Check, convert, call, map the error: nothing else happens here.

import CLPLB
import LPLBTopology

/// The planner behind a handle. The caller keeps it alive, so nothing is retained on the way.
@inline(__always)
func planner(_ handle: OpaquePointer) -> Planner {
    Unmanaged<Planner>.fromOpaque(UnsafeRawPointer(handle)).takeUnretainedValue()
}

/// Runs a call on the planner behind `handle`; NULL is refused.
@inline(__always)
func withPlanner(_ handle: OpaquePointer?, _ body: (Planner) throws(Failure) -> Void) -> lplb_status {
    guard let handle else { return lplb_status(LPLB_ERROR_INVALID_ARGUMENT) }
    let planner = planner(handle)
    return planner.enter { () throws(Failure) in try body(planner) }
}

@_cdecl("lplb_planner_create") @implementation
public func lplb_planner_create(
    _ config: UnsafePointer<lplb_config>?, _ handle: UnsafeMutablePointer<OpaquePointer?>?, _ message: UnsafeMutablePointer<CChar>?,
    _ message_size: Int64
) -> lplb_status {
    withMessage(message, message_size) { () throws(Failure) in
        let handle = try Check.pointer(handle, "planner")
        let config = try Check.pointer(config, "config")
        let planner = try Planner(PlannerSettings(reading: config))
        handle.pointee = OpaquePointer(Unmanaged.passRetained(planner).toOpaque())
    }
}

@_cdecl("lplb_planner_destroy") @implementation
public func lplb_planner_destroy(_ handle: OpaquePointer?) {
    guard let handle else { return }
    Unmanaged<Planner>.fromOpaque(UnsafeRawPointer(handle)).release()
}

private let noPlanner: StaticString = "planner: must not be NULL, got NULL"

@_cdecl("lplb_planner_error") @implementation
public func lplb_planner_error(_ handle: OpaquePointer?) -> UnsafePointer<CChar>! {
    guard let handle else { return staticText(noPlanner) }
    return planner(handle).error
}

@_cdecl("lplb_planner_place") @implementation
public func lplb_planner_place(
    _ handle: OpaquePointer?, _ history: UnsafePointer<Double>?, _ stream: UnsafeMutableRawPointer?
) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        try Check.aligned(history, "history", to: 8)
        try planner.place(history: history.map { UnsafeBufferPointer(start: $0, count: planner.shape.nLogical) }, stream: stream)
    }
}

@_cdecl("lplb_planner_set_placement") @implementation
public func lplb_planner_set_placement(
    _ handle: OpaquePointer?, _ phy2log: UnsafePointer<Int32>?, _ n_physical: Int64, _ stream: UnsafeMutableRawPointer?
) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        let phy2log = try Check.pointer(phy2log, "phy2log")
        try Check.size(n_physical, "n_physical", is: planner.shape.nPhysical, "the planner's physical experts")
        try planner.setPlacement(Array(UnsafeBufferPointer(start: phy2log, count: planner.shape.nPhysical)), stream: stream)
    }
}

private func copy(_ table: [Int32], to out: UnsafeMutablePointer<Int32>) {
    for (index, word) in table.enumerated() { out[index] = word }
}

@_cdecl("lplb_planner_max_replicas") @implementation
public func lplb_planner_max_replicas(_ handle: OpaquePointer?, _ max_replicas: UnsafeMutablePointer<Int64>?) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        let out = try Check.pointer(max_replicas, "max_replicas")
        out.pointee = Int64(try planner.placed().maxReplicas)
    }
}

@_cdecl("lplb_planner_phy2log") @implementation
public func lplb_planner_phy2log(
    _ handle: OpaquePointer?, _ phy2log: UnsafeMutablePointer<Int32>?, _ n_physical: Int64
) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        let out = try Check.pointer(phy2log, "phy2log")
        try Check.size(n_physical, "n_physical", is: planner.shape.nPhysical, "the planner's physical experts")
        copy(try planner.placed().phy2log, to: out)
    }
}

@_cdecl("lplb_planner_log2phy") @implementation
public func lplb_planner_log2phy(
    _ handle: OpaquePointer?, _ log2phy: UnsafeMutablePointer<Int32>?, _ n_logical: Int64, _ max_replicas: Int64
) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        let out = try Check.pointer(log2phy, "log2phy")
        try Check.size(n_logical, "n_logical", is: planner.shape.nLogical, "the planner's logical experts")
        let placement = try planner.placed()
        let width = try Check.range(max_replicas, "max_replicas", Int64(placement.maxReplicas)...Int64(LPLB_MAX_PHYSICAL))
        copy(placement.log2phy(width: width), to: out)
    }
}

@_cdecl("lplb_planner_logcnt") @implementation
public func lplb_planner_logcnt(_ handle: OpaquePointer?, _ logcnt: UnsafeMutablePointer<Int32>?, _ n_logical: Int64) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        let out = try Check.pointer(logcnt, "logcnt")
        try Check.size(n_logical, "n_logical", is: planner.shape.nLogical, "the planner's logical experts")
        copy(try planner.placed().logcnt, to: out)
    }
}
