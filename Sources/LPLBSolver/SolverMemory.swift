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
    let unit: Unit
    /// [nArcs] ranks of the bundle's other arcs as bits; only if a group has at most 64 ranks.
    let arcMask: UnsafePointer<UInt64>

    /// [epSize] units on each rank; of them `base` cannot move.
    let load: UnsafeMutablePointer<Int64>
    let base: UnsafeMutablePointer<Int64>
    /// [nBundles] units of a bundle.
    let demand: UnsafeMutablePointer<Int64>
    /// [nArcs] units on an arc.
    let x: UnsafeMutablePointer<Int64>
    /// [nPlaces] tokens.
    let quota: UnsafeMutablePointer<Int64>
    /// [epSize], see RankCosts; `least` by group.
    let speed: UnsafeMutablePointer<Int64>
    let fixed: UnsafeMutablePointer<Int64>
    let least: UnsafeMutablePointer<Int64>
    /// [epSize] of which each group uses its own part as far as it has kinds, [nGroups].
    let kinds: UnsafeMutablePointer<RankCosts.Kind>
    let nKinds: UnsafeMutablePointer<Int>
    /// [groupSize], see Capacity.
    let caps: UnsafeMutablePointer<Int64>
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
    let levels: UnsafeMutablePointer<GroupLevel>
    /// [nGroups][witnessWords]
    let witness: UnsafeMutablePointer<UInt32>

    init(_ network: Network, _ unit: Unit, _ arena: Arena) {
        let shape = network.shape
        self.network = network
        self.unit = unit
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
        speed = arena.filled(shape.epSize, 0)
        fixed = arena.filled(shape.epSize, 0)
        least = arena.filled(shape.nGroups, 0)
        kinds = arena.filled(shape.epSize, RankCosts.Kind())
        nKinds = arena.filled(shape.nGroups, 0)
        caps = arena.filled(shape.groupSize, 0)
        incoming = arena.filled(shape.groupSize, 0)
        distance = arena.filled(shape.groupSize, 0)
        queue = arena.filled(shape.groupSize, 0)
        receivers = arena.filled(shape.groupSize, 0)
        distanceStart = arena.filled(shape.groupSize + 2, 0)
        bundleDistance = arena.filled(network.nBundles, 0)
        adjacent = arena.filled(hasMasks ? shape.groupSize : 0, 0)
        results = arena.filled(shape.nGroups, GroupResult())
        levels = arena.filled(shape.nGroups, GroupLevel())
        witness = arena.filled(shape.nGroups * FlowSolver.witnessWords, 0)
    }

    /// What the ranks may hold.
    func set(_ capacities: RankCapacities) {
        let size = network.shape.groupSize
        for group in 0..<network.shape.nGroups {
            var numbers: [UInt64: Int] = [:], latest: Int64 = 0
            let kinds = kinds + group * size
            for rank in group * size..<(group + 1) * size {
                (speed[rank], fixed[rank]) = (Int64(capacities.speed[rank]), Int64(capacities.fixed[rank]))
                latest = max(latest, fixed[rank])
                let key = UInt64(speed[rank]) << 32 | UInt64(fixed[rank]), number = numbers[key] ?? numbers.count
                if number == numbers.count { kinds[number] = RankCosts.Kind(speed: speed[rank], fixed: fixed[rank]) }
                numbers[key] = number
                kinds[number].times += 1
            }
            nKinds[group] = numbers.count
            least[group] = latest << 10
        }
    }

    func costs(ofGroup group: Int) -> RankCosts {
        let first = group * network.shape.groupSize
        return RankCosts(
            speed: speed + first, fixed: fixed + first, least: least[group],
            kinds: UnsafeBufferPointer(start: kinds + first, count: nKinds[group]))
    }

    /// Fixed loads of the ranks and loads of the bundles, in units.
    func read(_ loads: UnsafePointer<Int64>) {
        let base = base, demand = demand, expertBundle = network.expertBundle, unit = unit
        base.update(repeating: 0, count: network.shape.epSize)
        demand.update(repeating: 0, count: network.nBundles)
        if unit.size == 1 {
            for expert in 0..<network.shape.nLogical { add(loads[expert], Int(expertBundle[expert]), base, demand) }
        } else {
            for expert in 0..<network.shape.nLogical { add(unit.units(loads[expert]), Int(expertBundle[expert]), base, demand) }
        }
    }

    @inline(__always)
    private func add(_ units: Int64, _ bundle: Int, _ base: UnsafeMutablePointer<Int64>, _ demand: UnsafeMutablePointer<Int64>) {
        let target = bundle >= 0 ? demand + bundle : base + (-1 &- bundle)
        target.pointee &+= units
    }

    /// Tokens of the places from units of the arcs.
    func writeQuotas(_ loads: UnsafePointer<Int64>) {
        let quota = quota, expertStart = network.expertStart, expertBundle = network.expertBundle, unit = unit
        for expert in 0..<network.shape.nLogical where expertBundle[expert] < 0 { quota[Int(expertStart[expert])] = loads[expert] }
        let bundleStart = network.bundleStart, experts = network.bundleExpert, bundleExperts = network.bundleExperts
        for bundle in 0..<network.nBundles {
            let arcs = x + Int(bundleStart[bundle])
            if bundleExperts == 1 {
                let expert = Int(experts[bundle]), places = quota + Int(expertStart[expert])
                let degree = Int(bundleStart[bundle + 1] &- bundleStart[bundle])
                if unit.size == 1 {
                    for j in 0..<degree { places[j] = arcs[j] }
                } else {
                    var units: Int64 = 0, before: Int64 = 0
                    for j in 0..<degree {
                        units &+= arcs[j]
                        let upTo = unit.tokens(loads[expert], inFirst: units)
                        places[j] = upTo &- before
                        before = upTo
                    }
                }
            } else {
                cut(loads, bundle &* bundleExperts, copies: arcs[1], of: demand[bundle])
            }
        }
    }

    /// Experts of a bundle of two places give to the second place, the copy, in proportion to their units, by rounded-down running sums.
    private func cut(_ loads: UnsafePointer<Int64>, _ first: Int, copies: Int64, of total: Int64) {
        var sum: Int64 = 0, before: Int64 = 0
        // Loads of 2^31 and more need the 128-bit product; the quotient is at most `copies`, so the wide division cannot overflow.
        let narrow = total < 1 << 31
        for k in first..<first &+ network.bundleExperts {
            let expert = Int(network.bundleExpert[k]), units = unit.units(loads[expert])
            sum &+= units
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
            let original = unit.tokens(loads[expert], inFirst: units &- (upTo &- before))
            places[1] = loads[expert] &- original
            places[0] = original
            before = upTo
        }
    }
}
