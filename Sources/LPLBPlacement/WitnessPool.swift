// WitnessPool: the sets of ranks that were tight so far, as quick lower bounds for placements that have not been solved.

/// A set S of ranks must bear all experts that have every place in S, so the heaviest rank has at least their load / |S|. The solver's
/// witness is a set for which this is the optimum itself. Sets found for one placement bound its neighbours, too.
///
/// There are at most 64 sets, and bit k of a word stands for set k: an expert must be borne by the sets that all of its ranks are in.
final class WitnessPool {
    /// An expert that leaves a rank, comes to one, or both; -1 for none.
    struct Edit {
        var expert: Int, from: Int, to: Int
    }

    private static let most = 64
    private let board: Board
    /// [nRanks] the sets that a rank is in, [nLogical] those that must bear an expert.
    private let member: UnsafeMutablePointer<UInt64>, inside: UnsafeMutablePointer<UInt64>
    /// [nLogical + 1], [nSlots]: the ranks of each expert.
    private let start: UnsafeMutablePointer<Int32>, host: UnsafeMutablePointer<Int32>
    /// [most] ranks of each set, and what it must bear.
    private let size: UnsafeMutablePointer<Int64>, must: UnsafeMutablePointer<Int64>
    /// [nLogical]
    private let load: UnsafeMutablePointer<Int64>
    /// The sets, the tightest first.
    private var order: [Int] = []
    /// Where the next set goes: the oldest one makes way.
    private var next = 0

    init(_ board: Board) {
        self.board = board
        member = .allocate(capacity: board.nRanks)
        inside = .allocate(capacity: board.nLogical)
        start = .allocate(capacity: board.nLogical + 2)
        host = .allocate(capacity: board.nSlots)
        size = .allocate(capacity: WitnessPool.most)
        must = .allocate(capacity: WitnessPool.most)
        load = .allocate(capacity: board.nLogical)
        member.initialize(repeating: 0, count: board.nRanks)
        inside.initialize(repeating: 0, count: board.nLogical)
        start.initialize(repeating: 0, count: board.nLogical + 2)
        host.initialize(repeating: 0, count: board.nSlots)
        size.initialize(repeating: 0, count: WitnessPool.most)
        must.initialize(repeating: 0, count: WitnessPool.most)
        load.initialize(repeating: 0, count: board.nLogical)
    }

    deinit {
        member.deallocate()
        inside.deallocate()
        start.deallocate()
        host.deallocate()
        size.deallocate()
        must.deallocate()
        load.deallocate()
    }

    /// Forgets all sets.
    func begin(_ loads: [Int64]) {
        for e in 0..<board.nLogical { load[e] = loads[e] }
        member.update(repeating: 0, count: board.nRanks)
        (order, next) = ([], 0)
        note()
    }

    /// Takes what the board holds now.
    func note() {
        let n = board.nLogical
        start.update(repeating: 0, count: n + 2)
        for rank in board.live {
            for slot in 0..<board.fill[rank] { start[Int(board.expert[rank &* board.width &+ slot]) &+ 2] &+= 1 }
        }
        for e in 0..<n { start[e &+ 2] &+= start[e &+ 1] }
        // Now the ranks of e begin at start[e + 1]. Filling turns this into their end, which is where those of e + 1 begin.
        for rank in board.live {
            for slot in 0..<board.fill[rank] {
                let e = Int(board.expert[rank &* board.width &+ slot])
                host[Int(start[e &+ 1])] = Int32(truncatingIfNeeded: rank)
                start[e &+ 1] &+= 1
            }
        }
        must.update(repeating: 0, count: WitnessPool.most)
        for e in 0..<n {
            inside[e] = setsAround(Edit(expert: e, from: -1, to: -1))
            forEach(inside[e]) { must[$0] &+= load[e] }
        }
        sortSets()
    }

    /// Adds a set, unless it is known or empty. Returns its number.
    func add(_ ranks: [Int]) -> Int? {
        guard !ranks.isEmpty else { return nil }
        var known = ~UInt64(0)
        for rank in ranks { known &= member[rank] }
        var isKnown = false
        forEach(known) { isKnown = isKnown || size[$0] == ranks.count }
        if isKnown { return nil }
        let number = next, bit = UInt64(1) << UInt64(number)
        next = (next + 1) % WitnessPool.most
        for rank in board.live { member[rank] &= ~bit }
        for rank in ranks { member[rank] |= bit }
        size[number] = Int64(ranks.count)
        must[number] = 0
        for e in 0..<board.nLogical {
            inside[e] = inside[e] & ~bit | setsAround(Edit(expert: e, from: -1, to: -1)) & bit
            if inside[e] & bit != 0 { must[number] &+= load[e] }
        }
        if !order.contains(number) { order.append(number) }
        sortSets()
        return number
    }

    private func sortSets() { order.sort { (level($0), $1) > (level($1), $0) } }

    @inline(__always)
    private func level(_ set: Int) -> Double { Double(must[set]) / Double(size[set]) }

    /// The sets that an expert's ranks are all in, after an edit. Unused sets may be among them.
    @inline(__always)
    private func setsAround(_ edit: Edit) -> UInt64 {
        var sets = edit.to >= 0 ? member[edit.to] : ~0, from = edit.from
        for index in Int(start[edit.expert])..<Int(start[edit.expert &+ 1]) {
            let rank = Int(host[index])
            if rank == from { from = -1 } else { sets &= member[rank] }
        }
        return sets
    }

    @inline(__always)
    private func forEach(_ sets: UInt64, _ body: (Int) -> Void) {
        var rest = sets
        while rest != 0 {
            body(rest.trailingZeroBitCount)
            rest &= rest &- 1
        }
    }

    /// A level below which no split of the placement can stay once two experts have other ranks.
    func bound(_ one: Edit, _ other: Edit) -> Double {
        let first = setsAround(one), second = setsAround(other)
        let touched = (first ^ inside[one.expert]) | (second ^ inside[other.expert])
        var most = 0.0
        for set in order where touched >> UInt64(set) & 1 == 0 {
            most = level(set)
            break
        }
        for set in order where touched >> UInt64(set) & 1 == 1 { most = max(most, level(set, one, first, other, second)) }
        return most
    }

    /// The bound by one set.
    func bound(_ one: Edit, _ other: Edit, by set: Int) -> Double { level(set, one, setsAround(one), other, setsAround(other)) }

    @inline(__always)
    private func level(_ set: Int, _ one: Edit, _ first: UInt64, _ other: Edit, _ second: UInt64) -> Double {
        func change(_ edit: Edit, _ after: UInt64) -> Int64 {
            let bit = UInt64(set), now = after >> bit & 1, before = inside[edit.expert] >> bit & 1
            return now == before ? 0 : now > before ? load[edit.expert] : -load[edit.expert]
        }
        return Double(must[set] &+ change(one, first) &+ change(other, second)) / Double(size[set])
    }
}
