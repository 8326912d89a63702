// lplb.h section 7: the exchange. Check, convert, call, map the error.

import CLPLB
import CLPLBKernels

@inline(__always)
private func exchange(_ handle: OpaquePointer) -> Exchange {
    Unmanaged<Exchange>.fromOpaque(UnsafeRawPointer(handle)).takeUnretainedValue()
}

private func withExchange(_ handle: OpaquePointer?, _ body: (Exchange) throws(Failure) -> Void) -> lplb_status {
    guard let handle else { return lplb_status(LPLB_ERROR_INVALID_ARGUMENT) }
    let exchange = exchange(handle)
    return exchange.enter { () throws(Failure) in try body(exchange) }
}

@_cdecl("lplb_exchange_connect") @implementation
public func lplb_exchange_connect(
    _ config: UnsafePointer<lplb_connect_config>?, _ handle: UnsafeMutablePointer<OpaquePointer?>?, _ message: UnsafeMutablePointer<CChar>?,
    _ message_size: Int64
) -> lplb_status {
    withMessage(message, message_size) { () throws(Failure) in
        let handle = try Check.pointer(handle, "exchange")
        handle.pointee = nil
        var connection = try Connection<Exchange>(StructSize.read(config, "config"))
        do throws(Failure) {
            let made = try connection.make { (config) throws(Failure) in
                let exchange = try Exchange(config)
                exchange.adoptRail()
                return exchange
            }
            handle.pointee = OpaquePointer(Unmanaged.passRetained(made).toOpaque())
        } catch {
            handle.pointee = connection.left.map { OpaquePointer(Unmanaged.passRetained($0).toOpaque()) }
            throw error
        }
    }
}

@_cdecl("lplb_exchange_buffer_bytes") @implementation
public func lplb_exchange_buffer_bytes(
    _ config: UnsafePointer<lplb_exchange_config>?, _ bytes: UnsafeMutablePointer<Int64>?, _ message: UnsafeMutablePointer<CChar>?,
    _ message_size: Int64
) -> lplb_status {
    withMessage(message, message_size) { () throws(Failure) in
        let bytes = try Check.pointer(bytes, "bytes")
        bytes.pointee = try ExchangeSettings(StructSize.read(config, "config")).bufferWords * 8
    }
}

@_cdecl("lplb_exchange_create") @implementation
public func lplb_exchange_create(
    _ config: UnsafePointer<lplb_exchange_config>?, _ buffers: UnsafePointer<UnsafeMutableRawPointer?>?,
    _ handle: UnsafeMutablePointer<OpaquePointer?>?, _ message: UnsafeMutablePointer<CChar>?, _ message_size: Int64
) -> lplb_status {
    withMessage(message, message_size) { () throws(Failure) in
        let handle = try Check.pointer(handle, "exchange")
        let buffers = try Check.pointer(buffers, "buffers")
        let exchange = try Exchange(StructSize.read(config, "config"), buffers: buffers)
        handle.pointee = OpaquePointer(Unmanaged.passRetained(exchange).toOpaque())
    }
}

@_cdecl("lplb_exchange_begin") @implementation
public func lplb_exchange_begin(
    _ config: UnsafePointer<lplb_exchange_config>?, _ handle: UnsafeMutablePointer<OpaquePointer?>?, _ blob: UnsafeMutableRawPointer?,
    _ message: UnsafeMutablePointer<CChar>?, _ message_size: Int64
) -> lplb_status {
    withMessage(message, message_size) { () throws(Failure) in
        let handle = try Check.pointer(handle, "exchange")
        guard let blob else { throw Failure("blob", "must not be NULL", value: "NULL") }
        let exchange = try Exchange(StructSize.read(config, "config"))
        try exchange.blob().write(to: blob)
        exchange.adoptRail()
        handle.pointee = OpaquePointer(Unmanaged.passRetained(exchange).toOpaque())
    }
}

@_cdecl("lplb_exchange_finish") @implementation
public func lplb_exchange_finish(_ handle: OpaquePointer?, _ blobs: UnsafeRawPointer?) -> lplb_status {
    withExchange(handle) { (exchange) throws(Failure) in
        guard let blobs else { throw Failure("blobs", "must not be NULL", value: "NULL") }
        try exchange.finish(blobs)
    }
}

@_cdecl("lplb_exchange_all_gather") @implementation
public func lplb_exchange_all_gather(
    _ handle: OpaquePointer?, _ counts: UnsafePointer<Int32>?, _ gathered: UnsafeMutablePointer<Int32>?, _ stream: UnsafeMutableRawPointer?
) -> lplb_status {
    withExchange(handle) { (exchange) throws(Failure) in
        try exchange.allGather(try Check.pointer(counts, "counts"), try Check.pointer(gathered, "gathered"), stream: stream)
    }
}

@_cdecl("lplb_exchange_set_limits") @implementation
public func lplb_exchange_set_limits(_ handle: OpaquePointer?, _ policy: Int32, _ timeout_ms: Int64) -> lplb_status {
    withExchange(handle) { (exchange) throws(Failure) in try exchange.setLimits(policy: policy, timeoutMs: timeout_ms) }
}

@_cdecl("lplb_exchange_abort") @implementation
public func lplb_exchange_abort(_ handle: OpaquePointer?) {
    guard let handle else { return }
    exchange(handle).abort()
}

@_cdecl("lplb_exchange_get_report") @implementation
public func lplb_exchange_get_report(_ handle: OpaquePointer?, _ report: UnsafeMutablePointer<lplb_exchange_report>?) -> lplb_status {
    guard let handle else { return lplb_status(LPLB_ERROR_INVALID_ARGUMENT) }
    return withMessage(nil, 0) { () throws(Failure) in
        StructSize.write(exchange(handle).report(), to: try StructSize.check(report, "report"))
    }
}

@_cdecl("lplb_exchange_close") @implementation
public func lplb_exchange_close(_ handle: OpaquePointer?) {
    guard let handle else { return }
    exchange(handle).close()
}

@_cdecl("lplb_exchange_destroy") @implementation
public func lplb_exchange_destroy(_ handle: OpaquePointer?) {
    guard let handle else { return }
    let owned = Unmanaged<Exchange>.fromOpaque(UnsafeRawPointer(handle))
    owned.takeUnretainedValue().end()
    owned.release()
}

private let noExchange: StaticString = "exchange: must not be NULL, got NULL"

@_cdecl("lplb_exchange_error") @implementation
public func lplb_exchange_error(_ handle: OpaquePointer?) -> UnsafePointer<CChar>! {
    guard let handle else { return staticText(noExchange) }
    return exchange(handle).error
}

@_cdecl("lplb_planner_attach_exchange") @implementation
public func lplb_planner_attach_exchange(_ handle: OpaquePointer?, _ attached: OpaquePointer?) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in try planner.attach(attached.map { exchange($0) }) }
}
