// Checks of arguments, shared by the exports.

import CLPLB

/// Each throws a failure that names the argument.
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
