// Workspace: the memory of a FlowSolver. Group: the part of it that belongs to one group, with the start of the algorithm.

import LPLBTopology

/// Buffers that live as long as the solver. A struct of pointers, so that hot loops read them without the checks of class properties.
struct Workspace {
    let tables: SolverTables
    /// [epSize] tokens on each rank; of them `base` cannot move.
    let load: UnsafeMutablePointer<Int64>
    let base: UnsafeMutablePointer<Int64>
    /// [nBundles] tokens of a bundle.
    let demand: UnsafeMutablePointer<Int64>
    /// [nArcs] tokens on an arc.
    let x: UnsafeMutablePointer<Int64>
    /// [nPlaces]
    let quota: UnsafeMutablePointer<Int64>
    /// [nArcs] rank of an arc, counted within its group.
    let arcRank: UnsafeMutablePointer<Int32>
    /// [nArcs] ranks of the bundle's other arcs as bits; only if a group has at most 64 ranks.
    let arcMask: UnsafeMutablePointer<UInt64>
    /// [groupSize] each.
    let incoming: UnsafeMutablePointer<Int64>
    let level: UnsafeMutablePointer<Int32>
    let queue: UnsafeMutablePointer<Int32>
    let receivers: UnsafeMutablePointer<Int32>
    /// [groupSize + 2]
    let levelStart: UnsafeMutablePointer<Int32>
    /// [nBundles] the smallest level of a bundle's ranks.
    let bundleLevel: UnsafeMutablePointer<Int32>
    /// [groupSize] what a rank can push to, as bits; only if a group has at most 64 ranks.
    let adjacent: UnsafeMutablePointer<UInt64>
    let results: UnsafeMutablePointer<GroupResult>
    /// [nGroups][witnessWords]
    let witness: UnsafeMutablePointer<UInt32>

    init(_ tables: SolverTables) {
        func zeroed<T: BitwiseCopyable>(_ count: Int, _ zero: T) -> UnsafeMutablePointer<T> {
            let memory = UnsafeMutablePointer<T>.allocate(capacity: Swift.max(count, 1))
            memory.initialize(repeating: zero, count: Swift.max(count, 1))
            return memory
        }
        let shape = tables.shape
        self.tables = tables
        load = zeroed(shape.epSize, 0)
        base = zeroed(shape.epSize, 0)
        demand = zeroed(tables.nBundles, 0)
        x = zeroed(tables.nArcs, 0)
        quota = zeroed(tables.nPlaces, 0)
        arcRank = zeroed(tables.nArcs, 0)
        let masks = shape.groupSize <= Group.maskRanks
        arcMask = zeroed(masks ? tables.nArcs : 0, 0)
        incoming = zeroed(shape.groupSize, 0)
        level = zeroed(shape.groupSize, 0)
        queue = zeroed(shape.groupSize, 0)
        receivers = zeroed(shape.groupSize, 0)
        levelStart = zeroed(shape.groupSize + 2, 0)
        bundleLevel = zeroed(tables.nBundles, 0)
        adjacent = zeroed(masks ? shape.groupSize : 0, 0)
        results = zeroed(shape.nGroups, GroupResult())
        witness = zeroed(shape.nGroups * FlowSolver.witnessWords, 0)

        for arc in 0..<tables.nArcs { arcRank[arc] = tables.arcRank[arc] % Int32(shape.groupSize) }
        if masks {
            for u in 0..<tables.nBundles {
                let arcs = Int(tables.bundleStart[u])..<Int(tables.bundleStart[u + 1])
                let all = arcs.reduce(UInt64(0)) { $0 | 1 << UInt64(arcRank[$1]) }
                for arc in arcs { arcMask[arc] = all & ~(1 << UInt64(arcRank[arc])) }
            }
        }
    }

    func deallocate() {
        load.deallocate()
        base.deallocate()
        demand.deallocate()
        x.deallocate()
        quota.deallocate()
        arcRank.deallocate()
        arcMask.deallocate()
        incoming.deallocate()
        level.deallocate()
        queue.deallocate()
        receivers.deallocate()
        levelStart.deallocate()
        bundleLevel.deallocate()
        adjacent.deallocate()
        results.deallocate()
        witness.deallocate()
    }

    /// Fixed loads of the ranks, tokens of the bundles.
    func place(_ loads: UnsafePointer<Int64>) {
        let base = base, demand = demand, expertBundle = tables.expertBundle
        base.update(repeating: 0, count: tables.shape.epSize)
        demand.update(repeating: 0, count: tables.nBundles)
        var expert = 0
        let end = tables.shape.nLogical
        while expert < end {
            let bundle = Int(expertBundle[expert])
            let target = bundle >= 0 ? demand + bundle : base + (-1 &- bundle)
            target.pointee &+= loads[expert]
            expert &+= 1
        }
    }

    /// Tokens of the places from tokens of the arcs.
    func writeQuotas(_ loads: UnsafePointer<Int64>) {
        let quota = quota, expertStart = tables.expertStart, expertBundle = tables.expertBundle
        var expert = 0
        let end = tables.shape.nLogical
        while expert < end {
            if expertBundle[expert] < 0 { quota[Int(expertStart[expert])] = loads[expert] }
            expert &+= 1
        }
        let bundleExpertStart = tables.bundleExpertStart, bundleExpert = tables.bundleExpert, bundleStart = tables.bundleStart
        for bundle in 0..<tables.nBundles {
            let first = Int(bundleExpertStart[bundle]), last = Int(bundleExpertStart[bundle + 1])
            let arcs = x + Int(bundleStart[bundle])
            if last &- first == 1 {
                let places = quota + Int(expertStart[Int(bundleExpert[first])])
                let degree = Int(bundleStart[bundle + 1] &- bundleStart[bundle])
                for j in 0..<degree { places[j] = arcs[j] }
            } else {
                shareOut(loads, first, last, copies: arcs[1], of: demand[bundle])
            }
        }
    }

    /// Experts of a bundle of two places give to the second place in proportion to their tokens, by rounded-down running sums.
    private func shareOut(_ loads: UnsafePointer<Int64>, _ first: Int, _ last: Int, copies: Int64, of total: Int64) {
        var sum: Int64 = 0, before: Int64 = 0
        // Loads of 2^31 and more need the 128-bit product; the quotient is at most `copies`, so the wide division cannot overflow.
        let narrow = total < 1 << 31
        for k in first..<last {
            let expert = Int(tables.bundleExpert[k])
            sum &+= loads[expert]
            var upTo: Int64 = 0
            if total > 0 {
                if narrow {
                    upTo = (copies &* sum) / total
                } else {
                    let product = UInt64(copies).multipliedFullWidth(by: UInt64(sum))
                    upTo = Int64(UInt64(total).dividingFullWidth(product).quotient)
                }
            }
            let places = quota + Int(tables.expertStart[expert])
            places[1] = upTo &- before
            places[0] = loads[expert] &- (upTo &- before)
            before = upTo
        }
    }
}

/// The lower bound and the counters of a group while it is solved.
struct GroupState {
    var bound: Int64
    var total: Int64
    var rounds = 0
}

/// One group's view of the workspace. Ranks are counted within the group, arcs and bundles over all groups.
struct Group {
    /// Groups up to this size use one 64-bit mask as a set of ranks.
    static let maskRanks = 64
    /// Passes without spilling, in which one rank above the bound without level is enough to raise it; later on, none of them may have one.
    static let plainRounds = 32

    let size: Int
    let firstBundle: Int
    let endBundle: Int
    let firstColour: Int
    let endColour: Int
    let load: UnsafeMutablePointer<Int64>
    let base: UnsafeMutablePointer<Int64>
    let demand: UnsafeMutablePointer<Int64>
    let x: UnsafeMutablePointer<Int64>
    let bundleStart: UnsafePointer<Int32>
    let arcRank: UnsafePointer<Int32>
    let arcBundle: UnsafePointer<Int32>
    let rankStart: UnsafePointer<Int32>
    let rankArc: UnsafePointer<Int32>
    let witness: UnsafeMutablePointer<UInt32>
    let work: Workspace

    @inline(__always)
    init(_ work: Workspace, _ index: Int) {
        let tables = work.tables
        let firstRank = index &* tables.shape.groupSize
        self.work = work
        size = tables.shape.groupSize
        firstBundle = Int(tables.groupBundleStart[index])
        endBundle = Int(tables.groupBundleStart[index &+ 1])
        firstColour = Int(tables.groupColourStart[index])
        endColour = Int(tables.groupColourStart[index &+ 1])
        load = work.load + firstRank
        base = work.base + firstRank
        demand = work.demand
        x = work.x
        bundleStart = tables.bundleStart
        arcRank = UnsafePointer(work.arcRank)
        arcBundle = tables.arcBundle
        rankStart = tables.rankStart + firstRank
        rankArc = tables.rankArc
        witness = work.witness + index &* FlowSolver.witnessWords
    }

    func max() -> Int64 {
        var most = load[0]
        var r = 1
        while r < size {
            most = Swift.max(most, load[r])
            r &+= 1
        }
        return most
    }

    /// Splits every bundle evenly and takes the first bound.
    func start() -> GroupState {
        var total: Int64 = 0, most: Int64 = 0
        var busiest = 0
        for r in 0..<size {
            load[r] = base[r]
            total &+= base[r]
            if base[r] > most {
                most = base[r]
                busiest = r
            }
        }
        for u in firstBundle..<endBundle {
            let tokens = demand[u], first = Int(bundleStart[u]), end = Int(bundleStart[u &+ 1])
            total &+= tokens
            if end &- first == 2 {
                let half = tokens >> 1
                move(first, tokens &- half)
                move(first &+ 1, half)
            } else {
                let share = tokens / Int64(end &- first)
                let rest = Int(tokens &- share &* Int64(end &- first))
                for arc in first..<end { move(arc, share &+ (arc &- first < rest ? 1 : 0)) }
            }
        }
        for i in 0..<FlowSolver.witnessWords { witness[i] = 0 }
        let mean = ceiling(total, size)
        if most > mean {
            witness[busiest >> 5] = 1 << UInt32(busiest & 31)
            return GroupState(bound: most, total: total)
        }
        var left = size, i = 0
        while left > 0 {
            witness[i] = left >= 32 ? ~0 : 1 << UInt32(left) &- 1
            left &-= 32
            i &+= 1
        }
        return GroupState(bound: mean, total: total)
    }

    @inline(__always)
    private func move(_ arc: Int, _ tokens: Int64) {
        x[arc] = tokens
        load[Int(arcRank[arc])] &+= tokens
    }
}

@inline(__always)
func ceiling(_ tokens: Int64, _ ranks: Int) -> Int64 {
    (tokens &+ Int64(ranks) &- 1) / Int64(ranks)
}
