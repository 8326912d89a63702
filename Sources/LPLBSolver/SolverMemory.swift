// SolverMemory: the memory that the solver's hot loops read and write, and the one place where it is allocated.

import LPLBTopology

/// Buffers at addresses that stay, for hot loops: reading them pays neither for bounds nor for classes. All end with the arena.
final class Arena {
    private var blocks: [UnsafeMutableRawPointer] = []

    init() { blocks.reserveCapacity(32) }

    deinit { for block in blocks { block.deallocate() } }

    func filled<T: BitwiseCopyable>(_ count: Int, _ value: T) -> UnsafeMutablePointer<T> {
        let memory = UnsafeMutablePointer<T>.allocate(capacity: max(count, 1))
        memory.initialize(repeating: value, count: max(count, 1))
        blocks.append(UnsafeMutableRawPointer(memory))
        return memory
    }

    func copy<T: BitwiseCopyable>(_ array: [T]) -> UnsafePointer<T> {
        let memory = UnsafeMutablePointer<T>.allocate(capacity: max(array.count, 1))
        _ = UnsafeMutableBufferPointer(start: memory, count: array.count).initialize(from: array)
        blocks.append(UnsafeMutableRawPointer(memory))
        return UnsafePointer(memory)
    }
}

/// The memory of a FlowSolver: arrays of its network, under their names there, and what a solve writes. A struct of pointers.
struct SolverMemory {
    let nLogical: Int
    let epSize: Int
    let groupSize: Int
    let nBundles: Int
    let expertStart: UnsafePointer<Int32>
    let expertBundle: UnsafePointer<Int32>
    let bundleExpertStart: UnsafePointer<Int32>
    let bundleExpert: UnsafePointer<Int32>
    let bundleStart: UnsafePointer<Int32>
    let arcBundle: UnsafePointer<Int32>
    let groupBundleStart: UnsafePointer<Int32>
    let groupColourStart: UnsafePointer<Int32>
    let rankStart: UnsafePointer<Int32>
    let rankArc: UnsafePointer<Int32>
    /// [nArcs] rank of an arc, counted within its group.
    let arcRank: UnsafePointer<Int32>
    /// [nArcs] ranks of the bundle's other arcs as bits; only if a group has at most 64 ranks.
    let arcMask: UnsafePointer<UInt64>

    /// [epSize] tokens on each rank; of them `base` cannot move.
    let load: UnsafeMutablePointer<Int64>
    let base: UnsafeMutablePointer<Int64>
    /// [nBundles] tokens of a bundle.
    let demand: UnsafeMutablePointer<Int64>
    /// [nArcs] tokens on an arc.
    let x: UnsafeMutablePointer<Int64>
    /// [nPlaces]
    let quota: UnsafeMutablePointer<Int64>
    /// [groupSize] each.
    let incoming: UnsafeMutablePointer<Int64>
    let distance: UnsafeMutablePointer<Int32>
    let queue: UnsafeMutablePointer<Int32>
    let receivers: UnsafeMutablePointer<Int32>
    /// [groupSize + 2]
    let distanceStart: UnsafeMutablePointer<Int32>
    /// [nBundles] the smallest distance of a bundle's ranks.
    let bundleDistance: UnsafeMutablePointer<Int32>
    /// [groupSize] what a rank can push to, as bits; only if a group has at most 64 ranks.
    let adjacent: UnsafeMutablePointer<UInt64>
    let results: UnsafeMutablePointer<GroupResult>
    /// [nGroups][witnessWords]
    let witness: UnsafeMutablePointer<UInt32>

    init(_ network: Network, _ arena: Arena) {
        let shape = network.shape
        nLogical = shape.nLogical
        epSize = shape.epSize
        groupSize = shape.groupSize
        nBundles = network.nBundles
        expertStart = arena.copy(network.expertStart)
        expertBundle = arena.copy(network.expertBundle)
        bundleExpertStart = arena.copy(network.bundleExpertStart)
        bundleExpert = arena.copy(network.bundleExpert)
        bundleStart = arena.copy(network.bundleStart)
        arcBundle = arena.copy(network.arcBundle)
        groupBundleStart = arena.copy(network.groupBundleStart)
        groupColourStart = arena.copy(network.groupColourStart)
        rankStart = arena.copy(network.rankStart)
        rankArc = arena.copy(network.rankArc)
        let hasMasks = shape.groupSize <= Group.maskRanks
        let ranks = arena.copy(network.arcRank.map { $0 % Int32(shape.groupSize) })
        let masks = arena.filled(hasMasks ? network.nArcs : 0, UInt64(0))
        if hasMasks {
            for bundle in 0..<nBundles {
                let arcs = network.arcs(of: bundle)
                let all = arcs.reduce(UInt64(0)) { $0 | 1 << UInt64(ranks[$1]) }
                for arc in arcs { masks[arc] = all & ~(1 << UInt64(ranks[arc])) }
            }
        }
        (arcRank, arcMask) = (ranks, UnsafePointer(masks))
        load = arena.filled(shape.epSize, 0)
        base = arena.filled(shape.epSize, 0)
        demand = arena.filled(nBundles, 0)
        x = arena.filled(network.nArcs, 0)
        quota = arena.filled(network.nPlaces, 0)
        incoming = arena.filled(shape.groupSize, 0)
        distance = arena.filled(shape.groupSize, 0)
        queue = arena.filled(shape.groupSize, 0)
        receivers = arena.filled(shape.groupSize, 0)
        distanceStart = arena.filled(shape.groupSize + 2, 0)
        bundleDistance = arena.filled(nBundles, 0)
        adjacent = arena.filled(hasMasks ? shape.groupSize : 0, 0)
        results = arena.filled(shape.nGroups, GroupResult())
        witness = arena.filled(shape.nGroups * FlowSolver.witnessWords, 0)
    }

    /// Fixed loads of the ranks, tokens of the bundles.
    func read(_ loads: UnsafePointer<Int64>) {
        let base = base, demand = demand, expertBundle = expertBundle
        base.update(repeating: 0, count: epSize)
        demand.update(repeating: 0, count: nBundles)
        var expert = 0
        let end = nLogical
        while expert < end {
            let bundle = Int(expertBundle[expert])
            let target = bundle >= 0 ? demand + bundle : base + (-1 &- bundle)
            target.pointee &+= loads[expert]
            expert &+= 1
        }
    }

    /// Tokens of the places from tokens of the arcs.
    func writeQuotas(_ loads: UnsafePointer<Int64>) {
        let quota = quota, expertStart = expertStart, expertBundle = expertBundle
        var expert = 0
        let end = nLogical
        while expert < end {
            if expertBundle[expert] < 0 { quota[Int(expertStart[expert])] = loads[expert] }
            expert &+= 1
        }
        for bundle in 0..<nBundles {
            let first = Int(bundleExpertStart[bundle]), last = Int(bundleExpertStart[bundle + 1])
            let arcs = x + Int(bundleStart[bundle])
            if last &- first == 1 {
                let places = quota + Int(expertStart[Int(bundleExpert[first])])
                let degree = Int(bundleStart[bundle + 1] &- bundleStart[bundle])
                for j in 0..<degree { places[j] = arcs[j] }
            } else {
                cut(loads, first, last, copies: arcs[1], of: demand[bundle])
            }
        }
    }

    /// Experts of a bundle of two places give to the second place, the copy, in proportion to their tokens, by rounded-down running sums.
    private func cut(_ loads: UnsafePointer<Int64>, _ first: Int, _ last: Int, copies: Int64, of total: Int64) {
        var sum: Int64 = 0, before: Int64 = 0
        // Loads of 2^31 and more need the 128-bit product; the quotient is at most `copies`, so the wide division cannot overflow.
        let narrow = total < 1 << 31
        for k in first..<last {
            let expert = Int(bundleExpert[k])
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
            let places = quota + Int(expertStart[expert])
            places[1] = upTo &- before
            places[0] = loads[expert] &- (upTo &- before)
            before = upTo
        }
    }
}
