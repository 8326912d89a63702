// lplb.h section 1: version, status texts, build line; and the wrapper of calls that have no planner.

import CLPLB
import CLPLBKernels

/// A static C string. `StaticString` keeps it NUL-terminated for the life of the process.
func staticText(_ text: StaticString) -> UnsafePointer<CChar> {
    UnsafeRawPointer(text.utf8Start).assumingMemoryBound(to: CChar.self)
}

/// Runs a call that has no planner to keep its words: a failure is written to the caller's buffer.
func withMessage(_ message: UnsafeMutablePointer<CChar>?, _ size: Int64, _ body: () throws(Failure) -> Void) -> lplb_status {
    do {
        try body()
        return lplb_status(LPLB_OK)
    } catch {
        write(error.message, to: message, size: Int(clamping: size))
        return error.status
    }
}

@_cdecl("lplb_version") @implementation
public func lplb_version() -> Int32 { Int32(LPLB_VERSION) }

@_cdecl("lplb_status_string") @implementation
public func lplb_status_string(_ status: lplb_status) -> UnsafePointer<CChar>! {
    switch Int(status) {
    case LPLB_OK: staticText("ok")
    case LPLB_ERROR_INVALID_ARGUMENT: staticText("invalid argument")
    case LPLB_ERROR_UNSUPPORTED: staticText("beyond a limit of this library or device")
    case LPLB_ERROR_WRONG_ORDER: staticText("call out of order")
    case LPLB_ERROR_BUSY: staticText("another thread is inside a call on this planner")
    case LPLB_ERROR_OUT_OF_MEMORY: staticText("out of memory")
    case LPLB_ERROR_NO_CUDA: staticText("no CUDA in this build or on this machine")
    case LPLB_ERROR_CUDA: staticText("the CUDA runtime reported an error")
    case LPLB_ERROR_TIMEOUT: staticText("a peer did not answer in time")
    case LPLB_ERROR_INTERNAL: staticText("a defect inside lplb")
    case LPLB_ERROR_DISAGREEMENT: staticText("ranks differ in what must be equal on all of them")
    case LPLB_ERROR_PEER_LOST: staticText("the connection to a peer broke")
    default: staticText("unknown status")
    }
}

/// Built once, kept for the life of the process.
nonisolated(unsafe) private let buildInfo: UnsafePointer<CChar> = {
    #if swift(>=6.3)
        let swift = "Swift 6.3 or later"
    #elseif swift(>=6.2)
        let swift = "Swift 6.2"
    #else
        let swift = "Swift 6.1 or earlier"
    #endif
    var cuda = "without CUDA"
    if let kernels = lplbk_cuda()?.pointee {
        cuda = "CUDA \(kernels.version / 1000).\(kernels.version % 1000 / 10) (\(String(cString: kernels.architectures)))"
    }
    let text = "lplb \(LPLB_VERSION_MAJOR).\(LPLB_VERSION_MINOR).\(LPLB_VERSION_PATCH), \(cuda), \(swift)"
    let buffer = UnsafeMutablePointer<CChar>.allocate(capacity: text.utf8.count + 1)
    write(text, to: buffer, size: text.utf8.count + 1)
    return UnsafePointer(buffer)
}()

@_cdecl("lplb_build_info") @implementation
public func lplb_build_info() -> UnsafePointer<CChar>! { buildInfo }
