// Capacity: what each rank of a group may hold at the level T that the solver tries to keep. Nothing else knows what a level means.

/// What may differ between ranks. Where all speeds are 1024 and nothing is fixed, `init` gives nil: the ranks are alike.
public struct RankCapacities: Sendable, Equatable {
    /// [epSize], 1 ... maxSpeed; 1024 is normal.
    public let speed: [Int32]
    /// [epSize], 0 ... maxFixed units.
    public let fixed: [Int32]

    public static let normalSpeed: Int32 = 1024, maxSpeed: Int32 = 1 << 16, maxFixed: Int32 = 1 << 24
    /// Tokens that may be solved for together, so that no level leaves 63 bits.
    public static let maxTotal: Int64 = 1 << 42

    public init?(speed: [Int32], fixed: [Int32]) {
        if speed.allSatisfy({ $0 == RankCapacities.normalSpeed }) && fixed.allSatisfy({ $0 == 0 }) { return nil }
        (self.speed, self.fixed) = (speed, fixed)
    }
}

/// What differs between the ranks of one group. Views of memory of the solver.
struct RankCosts {
    /// A rank does speed / 1024 units while a normal one does one, and `fixed` units' time goes by before its first.
    let speed: UnsafePointer<Int64>
    let fixed: UnsafePointer<Int64>
    /// The largest `fixed`, in 1/1024 unit: no level is below it.
    let least: Int64
    /// The ranks of the group that are alike, counted together.
    let kinds: UnsafeBufferPointer<Kind>

    struct Kind: BitwiseCopyable {
        var speed: Int64 = 0
        var fixed: Int64 = 0
        var times: Int64 = 0
    }

    /// Bits of speed and of the fraction of T: a unit takes a rank 2^20 / speed.
    static let bits: Int64 = 20

    @inline(__always)
    func start(_ rank: Int) -> Int64 { fixed[rank] &<< 10 }

    /// floor((T - start) * speed / 2^20) for a T of at least `least`.
    @inline(__always)
    func cap(_ rank: Int, at level: Int64) -> Int64 { RankCosts.units(level &- start(rank), speed[rank]) }

    @inline(__always)
    private static func units(_ time: Int64, _ speed: Int64) -> Int64 {
        let product = time.multipliedFullWidth(by: speed)
        return product.high &<< (64 &- bits) | Int64(bitPattern: UInt64(product.low) &>> UInt64(bits))
    }

    /// The least T with cap(rank) >= units.
    func level(of units: Int64, on rank: Int) -> Int64 {
        max(least, start(rank) &+ ceiling(units &<< RankCosts.bits, speed[rank]))
    }

    /// The least T at which the ranks of a set, which is not empty, may hold `units` together.
    func level(of units: Int64, on ranks: RankSet) -> Int64 {
        var count: Int64 = 0, speeds: Int64 = 0, starts: Int64 = 0
        forEach(ranks) { speed, start, times in
            count &+= times
            speeds &+= speed &* times
            starts &+= start &* speed &* times
        }
        // Without rounding it would be this, or `least`. Each cap is rounded down, by less than a unit, so a unit more for each is enough.
        var low = max(least, ceiling(units &<< RankCosts.bits &+ starts, speeds))
        if sum(ranks, at: low) >= units { return low }
        var high = low &+ ceiling(count &<< RankCosts.bits, speeds)
        while high &- low > 1 {
            let middle = low &+ (high &- low) / 2
            if sum(ranks, at: middle) >= units { high = middle } else { low = middle }
        }
        return high
    }

    private func sum(_ ranks: RankSet, at level: Int64) -> Int64 {
        var sum: Int64 = 0
        forEach(ranks) { speed, start, times in sum &+= RankCosts.units(level &- start, speed) &* times }
        return sum
    }

    /// Visits speeds and starts of a set; of all ranks each kind once, with how many ranks are of it.
    @inline(__always)
    private func forEach(_ ranks: RankSet, _ visit: (_ speed: Int64, _ start: Int64, _ times: Int64) -> Void) {
        if ranks.count == ranks.size {
            for kind in 0..<kinds.count { visit(kinds[kind].speed, kinds[kind].fixed &<< 10, kinds[kind].times) }
        } else {
            ranks.forEach { visit(speed[$0], start($0), 1) }
        }
    }

    @inline(__always)
    private func ceiling(_ a: Int64, _ b: Int64) -> Int64 { (a &+ b &- 1) / b }
}

/// The level T of a group while it is solved. The solvers compare the units of a rank with `cap`, and raise T by `raise` when the units
/// of some ranks cannot leave them and do not fit.
///
/// Where all ranks are alike a level counts units, and every rank may hold T of them. Else it counts 1/1024 of the time that a rank of
/// normal speed takes for a unit: cap(r) = floor((T - fixed) * speed / 1024) in units, and T is at least the largest `fixed`.
struct Capacity {
    private(set) var level: Int64 = 0
    /// Of all ranks together.
    private let total: Int64
    private let size: Int
    /// [size] what each rank may hold at T; more than there is counts as all there is.
    private let caps: UnsafeMutablePointer<Int64>
    /// nil: all ranks are alike.
    let costs: RankCosts?

    init(total: Int64, size: Int, caps: UnsafeMutablePointer<Int64>, costs: RankCosts?) {
        (self.total, self.size, self.caps, self.costs) = (total, size, caps, costs)
    }

    /// The units that a rank may hold.
    @inline(__always)
    func cap(_ rank: Int) -> Int64 { caps[rank] }

    /// The least level at which a rank may hold this many units.
    @inline(__always)
    func level(of units: Int64, on rank: Int) -> Int64 { costs?.level(of: units, on: rank) ?? units }

    /// T becomes the least level at which the ranks of a set, which is not empty, may hold this many units together.
    @inline(__always)
    mutating func raise(_ ranks: RankSet, holding units: Int64) {
        if let costs {
            level = costs.level(of: units, on: ranks)
            for rank in 0..<size { caps[rank] = min(total, costs.cap(rank, at: level)) }
        } else {
            let count = Int64(ranks.count)
            level = (units &+ count &- 1) / count
            for rank in 0..<size { caps[rank] = level }
        }
    }

    /// The units that rank r gives to rank s (negative: takes from it) so that both have the same room, rounded toward zero.
    @inline(__always)
    func transfer(from r: Int, holding units: Int64, to s: Int, holding others: Int64) -> Int64 {
        ((caps[s] &- others) &- (caps[r] &- units)) / 2
    }
}

/// A set of ranks of one group: bit r % 32 of word r / 32. A view of memory of the solver.
struct RankSet {
    let words: UnsafeMutablePointer<UInt32>
    /// Ranks of the group.
    let size: Int

    @inline(__always)
    func removeAll() { words.update(repeating: 0, count: FlowSolver.witnessWords) }

    @inline(__always)
    func insert(_ rank: Int) { words[rank >> 5] |= 1 << UInt32(rank & 31) }

    func insertAll() {
        for rank in stride(from: 0, to: size, by: 32) { words[rank >> 5] = size &- rank >= 32 ? ~0 : 1 << UInt32(size &- rank) &- 1 }
    }

    @inline(__always)
    func forEach(_ visit: (Int) -> Void) {
        for word in 0..<(size &+ 31) / 32 {
            var rest = words[word]
            while rest != 0 {
                visit(word &* 32 &+ rest.trailingZeroBitCount)
                rest &= rest &- 1
            }
        }
    }

    @inline(__always)
    var count: Int {
        var count = 0, word = 0
        while word &* 32 < size {
            count &+= words[word].nonzeroBitCount
            word &+= 1
        }
        return count
    }
}
