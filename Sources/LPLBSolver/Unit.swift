// Unit: how many tokens cost as one.

/// The tokens of an expert are split in whole units. The last place of an expert that has any takes the unit that is not full.
public struct Unit: Sendable, Equatable {
    /// Tokens of a unit. No expert has more than `TokenAssigner.maxLoad`, so a unit of that many is an expert.
    public let size: Int64
    /// floor(2^64 / size) + 1, for units of several tokens.
    public let inverse: UInt64

    public static let token = Unit(1), expert = Unit(TokenAssigner.maxLoad)

    /// - Parameter size: 1 ..< 2^31, or that of an expert.
    public init(_ size: Int64) {
        self.size = size
        inverse = size > 1 ? UInt64.max / UInt64(size) &+ (UInt64.max % UInt64(size) == UInt64(size) &- 1 ? 2 : 1) : 0
    }

    /// ceil(tokens / size) for tokens >= 0.
    @inline(__always)
    public func units(_ tokens: Int64) -> Int64 {
        if size == 1 { return tokens }
        if size > UInt32.max { return tokens > 0 ? 1 : 0 }
        let sum = UInt64(bitPattern: tokens &+ size &- 1)
        // Both below 2^32: then sum * inverse / 2^64 is too large by less than 1 / size.
        if sum < 1 << 32 { return Int64(bitPattern: sum.multipliedFullWidth(by: inverse).high) }
        return Int64(bitPattern: sum / UInt64(bitPattern: size))
    }

    /// Of an expert with so many tokens, those in its first `units` units.
    @inline(__always)
    public func tokens(_ tokens: Int64, inFirst units: Int64) -> Int64 {
        // units * size is at most tokens + size - 1.
        min(tokens, units &* size)
    }
}
