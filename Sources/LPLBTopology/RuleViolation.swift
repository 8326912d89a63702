// RuleViolation: why an argument was refused, in words for the person who passed it. Limits: the sizes this library is built for.

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

/// The limits of one planner: the numbers of lplb.h, which this module does not import.
public enum Limits {
    /// LPLB_MAX_RANKS: ranks of one group.
    public static let maxRanks = 1024
    /// LPLB_MAX_EP_SIZE: ranks in all.
    public static let maxEPSize = 8192
    /// LPLB_MAX_LOGICAL: logical experts.
    public static let maxLogical = 4096
    /// LPLB_MAX_PHYSICAL: physical experts.
    public static let maxPhysical = 8192
}

/// Refuses a value below `minimum` as invalid and one above `maximum` as unsupported.
@inline(__always)
func check(_ argument: String, _ value: Int, atLeast minimum: Int, atMost maximum: Int) throws(RuleViolation) {
    if value < minimum { throw RuleViolation(argument, "must be at least \(minimum)", value: value) }
    if value > maximum { throw RuleViolation(.unsupported, argument, "must be at most \(maximum)", value: value) }
}
