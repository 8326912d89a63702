// Failures inside the boundary, and how they become a status and words for the caller.

import CLPLB
import LPLBTopology

/// Why a call failed: one of the LPLB_ERROR_* statuses and a sentence that names the argument, the rule and the value.
struct Failure: Error {
    let status: lplb_status
    let message: String

    init(_ status: Int, _ message: String) {
        self.status = lplb_status(truncatingIfNeeded: status)
        self.message = message
    }

    /// An argument that breaks a rule.
    init(_ argument: String, _ rule: String, value: some CustomStringConvertible) {
        self.init(LPLB_ERROR_INVALID_ARGUMENT, "\(argument): \(rule), got \(value)")
    }

    init(_ violation: RuleViolation) {
        self.init(violation.kind == .unsupported ? LPLB_ERROR_UNSUPPORTED : LPLB_ERROR_INVALID_ARGUMENT, violation.message)
    }
}

/// Runs `body`, turning a broken rule of the planning modules into a failure of this module.
@inline(__always)
func translating<Result>(_ body: () throws(RuleViolation) -> Result) throws(Failure) -> Result {
    do {
        return try body()
    } catch {
        throw Failure(error)
    }
}

/// Copies `text` into `buffer` of `size` bytes, cut to fit at a character boundary and always NUL-terminated. NULL or no room: nothing.
func write(_ text: String, to buffer: UnsafeMutablePointer<CChar>?, size: Int) {
    guard let buffer, size > 0 else { return }
    var text = text
    text.withUTF8 { bytes in
        var length = min(bytes.count, size - 1)
        while length < bytes.count && length > 0 && bytes[length] & 0xC0 == 0x80 { length -= 1 }
        for index in 0..<length { buffer[index] = CChar(bitPattern: bytes[index]) }
        buffer[length] = 0
    }
}

/// Checks shared by the exports: each throws a failure that names the argument.
enum Check {
    static func dtype(_ value: lplb_dtype, _ argument: String) throws(Failure) -> IdType {
        switch Int(value) {
        case LPLB_INT32: return .int32
        case LPLB_INT64: return .int64
        default: throw Failure(argument, "must be LPLB_INT32 (0) or LPLB_INT64 (1)", value: value)
        }
    }

    static func range(_ value: Int64, _ argument: String, _ allowed: ClosedRange<Int64>) throws(Failure) -> Int {
        guard allowed.contains(value) else {
            throw Failure(argument, "must lie in \(allowed.lowerBound) ... \(allowed.upperBound)", value: value)
        }
        return Int(value)
    }

    static func size(_ value: Int64, _ argument: String, is expected: Int, _ meaning: String) throws(Failure) {
        guard value == Int64(expected) else {
            throw Failure(argument, "must be \(meaning), \(expected)", value: value)
        }
    }

    static func aligned(_ pointer: UnsafeRawPointer?, _ argument: String, to alignment: Int) throws(Failure) {
        guard UInt(bitPattern: pointer) % UInt(alignment) == 0 else {
            throw Failure(argument, "must be aligned to \(alignment) bytes", value: "an address that is not")
        }
    }

    /// A pointer that must not be NULL, aligned to the size of what it points to.
    static func pointer<Pointee>(
        _ pointer: UnsafeMutablePointer<Pointee>?, _ argument: String
    ) throws(Failure) -> UnsafeMutablePointer<Pointee> {
        guard let pointer else { throw Failure(argument, "must not be NULL", value: "NULL") }
        try aligned(UnsafeRawPointer(pointer), argument, to: MemoryLayout<Pointee>.alignment)
        return pointer
    }

    static func pointer<Pointee>(
        _ pointer: UnsafePointer<Pointee>?, _ argument: String
    ) throws(Failure) -> UnsafePointer<Pointee> {
        guard let pointer else { throw Failure(argument, "must not be NULL", value: "NULL") }
        try aligned(UnsafeRawPointer(pointer), argument, to: MemoryLayout<Pointee>.alignment)
        return pointer
    }
}
