// lplb.h section 8: replicas. Check, convert, call, map the error.

import CLPLB

@inline(__always)
private func replicas(_ handle: OpaquePointer) -> Replicas {
    Unmanaged<Replicas>.fromOpaque(UnsafeRawPointer(handle)).takeUnretainedValue()
}

private func withReplicas(_ handle: OpaquePointer?, _ body: (Replicas) throws(Failure) -> Void) -> lplb_status {
    guard let handle else { return lplb_status(LPLB_ERROR_INVALID_ARGUMENT) }
    let replicas = replicas(handle)
    return replicas.enter { () throws(Failure) in try body(replicas) }
}

@_cdecl("lplb_replicas_create") @implementation
public func lplb_replicas_create(
    _ config: UnsafePointer<lplb_replicas_config>?, _ handle: UnsafeMutablePointer<OpaquePointer?>?,
    _ message: UnsafeMutablePointer<CChar>?, _ message_size: Int64
) -> lplb_status {
    withMessage(message, message_size) { () throws(Failure) in
        let handle = try Check.pointer(handle, "replicas")
        let made = try Replicas(StructSize.read(config, "config"))
        handle.pointee = OpaquePointer(Unmanaged.passRetained(made).toOpaque())
    }
}

@_cdecl("lplb_replicas_add") @implementation
public func lplb_replicas_add(
    _ handle: OpaquePointer?, _ tensor: UnsafePointer<lplb_replicas_tensor>?, _ memory: UnsafeMutablePointer<UnsafeMutableRawPointer?>?
) -> lplb_status {
    withReplicas(handle) { (replicas) throws(Failure) in
        let memory = try Check.pointer(memory, "memory")
        memory.pointee = try replicas.add(StructSize.read(tensor, "tensor"))
    }
}

@_cdecl("lplb_replicas_place") @implementation
public func lplb_replicas_place(
    _ handle: OpaquePointer?, _ rows: UnsafePointer<Int32>?, _ stream: UnsafeMutableRawPointer?
) -> lplb_status {
    withReplicas(handle) { (replicas) throws(Failure) in try replicas.place(rows, stream: stream) }
}

@_cdecl("lplb_replicas_pull") @implementation
public func lplb_replicas_pull(_ handle: OpaquePointer?, _ only_new: Int32, _ stream: UnsafeMutableRawPointer?) -> lplb_status {
    withReplicas(handle) { (replicas) throws(Failure) in try replicas.pull(onlyNew: only_new != 0, stream: stream) }
}

@_cdecl("lplb_replicas_push") @implementation
public func lplb_replicas_push(_ handle: OpaquePointer?, _ stream: UnsafeMutableRawPointer?) -> lplb_status {
    withReplicas(handle) { (replicas) throws(Failure) in try replicas.push(stream: stream) }
}

@_cdecl("lplb_replicas_close") @implementation
public func lplb_replicas_close(_ handle: OpaquePointer?) {
    guard let handle else { return }
    replicas(handle).close()
}

@_cdecl("lplb_replicas_destroy") @implementation
public func lplb_replicas_destroy(_ handle: OpaquePointer?) {
    guard let handle else { return }
    let owned = Unmanaged<Replicas>.fromOpaque(UnsafeRawPointer(handle))
    owned.takeUnretainedValue().end()
    owned.release()
}

private let noReplicas: StaticString = "replicas: must not be NULL, got NULL"

@_cdecl("lplb_replicas_error") @implementation
public func lplb_replicas_error(_ handle: OpaquePointer?) -> UnsafePointer<CChar>! {
    guard let handle else { return staticText(noReplicas) }
    return replicas(handle).error
}
