// RuleViolation: why an argument was refused, in words for the person who passed it. Limits: the sizes this library is built for.

import CLPLB

/// An argument that breaks a rule. The words name the argument as the C header spells it, the rule, and the value that broke it.
public struct RuleViolation: Error, Equatable, Sendable, CustomStringConvertible {
    public enum Kind: Sendable {
        /// The argument makes no sense for any build of this library.
        case invalidArgument
        /// The argument is meaningful, but beyond a limit of this library.
        case unsupported
    }

    public let kind: Kind

    /// "argument: rule, got value"
    public let message: String

    public init(_ kind: Kind, _ argument: String, _ rule: String, value: some CustomStringConvertible) {
        self.kind = kind
        self.message = "\(argument): \(rule), got \(value)"
    }

    /// The same with the kind `invalidArgument`.
    public init(_ argument: String, _ rule: String, value: some CustomStringConvertible) {
        self.init(.invalidArgument, argument, rule, value: value)
    }

    public var description: String { message }
}

/// The limits of one planner: those of lplb.h.
public enum Limits {
    /// Ranks of one group.
    public static let maxRanks = Int(LPLB_MAX_RANKS)
    /// Ranks in all.
    public static let maxEPSize = Int(LPLB_MAX_EP_SIZE)
    /// Logical experts.
    public static let maxLogical = Int(LPLB_MAX_LOGICAL)
    /// Physical experts.
    public static let maxPhysical = Int(LPLB_MAX_PHYSICAL)
}

/// Refuses a value below `minimum` as invalid and one above `maximum` as unsupported.
@inline(__always)
func check(_ argument: String, _ value: Int, atLeast minimum: Int, atMost maximum: Int) throws(RuleViolation) {
    if value < minimum { throw RuleViolation(argument, "must be at least \(minimum)", value: value) }
    if value > maximum { throw RuleViolation(.unsupported, argument, "must be at most \(maximum)", value: value) }
}
