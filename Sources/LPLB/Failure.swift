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
