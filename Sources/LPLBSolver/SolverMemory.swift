// SolverMemory: the memory that the solver's hot loops read and write, and the one place where it is allocated.

import LPLBTopology

/// Memory at addresses that stay, for hot loops: reading it pays neither for bounds nor for classes. All of it ends with the arena.
final class Arena {
    /// Most arenas need one block. Larger arrays get a block of their own.
    private static let blockBytes = 1 << 14, alignment = 16
    /// The latest block. Its first word leads to the one before.
    private var block: UnsafeMutableRawPointer?
    private var used = 0, size = 0

    deinit {
        while let last = block {
            block = last.load(as: UnsafeMutableRawPointer?.self)
            last.deallocate()
        }
    }

    func filled<T: BitwiseCopyable>(_ count: Int, _ value: T) -> UnsafeMutablePointer<T> {
        let bytes = (count &* MemoryLayout<T>.stride &+ Arena.alignment &- 1) & ~(Arena.alignment &- 1)
        if block == nil || size &- used < bytes { addBlock(bytes) }
        let memory = (block! + used).bindMemory(to: T.self, capacity: count)
        memory.initialize(repeating: value, count: count)
        used &+= bytes
        return memory
    }

    private func addBlock(_ bytes: Int) {
        size = max(bytes &+ Arena.alignment, Arena.blockBytes)
        let new = UnsafeMutableRawPointer.allocate(byteCount: size, alignment: Arena.alignment)
        new.storeBytes(of: block, as: UnsafeMutableRawPointer?.self)
        (block, used) = (new, Arena.alignment)
    }
}

/// The memory of a FlowSolver: its network, and what a solve writes.
struct SolverMemory {
    let network: Network
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
        self.network = network
        let hasMasks = shape.groupSize <= Group.maskRanks
        let masks = arena.filled(hasMasks ? network.nArcs : 0, UInt64(0))
        if hasMasks {
            for bundle in 0..<network.nBundles {
                var all: UInt64 = 0
                for arc in network.arcs(of: bundle) { all |= 1 &<< UInt64(network.arcRank[arc]) }
                for arc in network.arcs(of: bundle) { masks[arc] = all & ~(1 &<< UInt64(network.arcRank[arc])) }
            }
        }
        arcMask = UnsafePointer(masks)
        load = arena.filled(shape.epSize, 0)
        base = arena.filled(shape.epSize, 0)
        demand = arena.filled(network.nBundles, 0)
        x = arena.filled(network.nArcs, 0)
        quota = arena.filled(network.nPlaces, 0)
        incoming = arena.filled(shape.groupSize, 0)
        distance = arena.filled(shape.groupSize, 0)
        queue = arena.filled(shape.groupSize, 0)
        receivers = arena.filled(shape.groupSize, 0)
        distanceStart = arena.filled(shape.groupSize + 2, 0)
        bundleDistance = arena.filled(network.nBundles, 0)
        adjacent = arena.filled(hasMasks ? shape.groupSize : 0, 0)
        results = arena.filled(shape.nGroups, GroupResult())
        witness = arena.filled(shape.nGroups * FlowSolver.witnessWords, 0)
    }

    /// Fixed loads of the ranks, tokens of the bundles.
    func read(_ loads: UnsafePointer<Int64>) {
        let base = base, demand = demand, expertBundle = network.expertBundle
        base.update(repeating: 0, count: network.shape.epSize)
        demand.update(repeating: 0, count: network.nBundles)
        for expert in 0..<network.shape.nLogical {
            let bundle = Int(expertBundle[expert])
            let target = bundle >= 0 ? demand + bundle : base + (-1 &- bundle)
            target.pointee &+= loads[expert]
        }
    }

    /// Tokens of the places from tokens of the arcs.
    func writeQuotas(_ loads: UnsafePointer<Int64>) {
        let quota = quota, expertStart = network.expertStart, expertBundle = network.expertBundle
        for expert in 0..<network.shape.nLogical where expertBundle[expert] < 0 { quota[Int(expertStart[expert])] = loads[expert] }
        let bundleStart = network.bundleStart, experts = network.bundleExpert, bundleExperts = network.bundleExperts
        for bundle in 0..<network.nBundles {
            let arcs = x + Int(bundleStart[bundle])
            if bundleExperts == 1 {
                let places = quota + Int(expertStart[Int(experts[bundle])])
                let degree = Int(bundleStart[bundle + 1] &- bundleStart[bundle])
                for j in 0..<degree { places[j] = arcs[j] }
            } else {
                cut(loads, bundle &* bundleExperts, copies: arcs[1], of: demand[bundle])
            }
        }
    }

    /// Experts of a bundle of two places give to the second place, the copy, in proportion to their tokens, by rounded-down running sums.
    private func cut(_ loads: UnsafePointer<Int64>, _ first: Int, copies: Int64, of total: Int64) {
        var sum: Int64 = 0, before: Int64 = 0
        // Loads of 2^31 and more need the 128-bit product; the quotient is at most `copies`, so the wide division cannot overflow.
        let narrow = total < 1 << 31
        for k in first..<first &+ network.bundleExperts {
            let expert = Int(network.bundleExpert[k])
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
            let places = quota + Int(network.expertStart[expert])
            places[1] = upTo &- before
            places[0] = loads[expert] &- (upTo &- before)
            before = upTo
        }
    }
}
