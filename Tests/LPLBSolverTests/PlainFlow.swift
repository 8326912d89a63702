// PlainFlow: the algorithm in the head comment of FlowSolver.swift, written down once more as directly as possible: sets, whole copies of
// the loads at each step, no tables. The oracle of the fast solvers; slow on purpose.

import LPLBTopology

@testable import LPLBSolver

struct PlainFlow {
    struct Bundle {
        var experts: [Int]
        /// Ranks in EP of its places.
        var ranks: [Int]
        var colour = 0
    }

    let placement: Placement
    var unit: Unit = .token
    var capacities: RankCapacities?
    /// By group, in the solver's order.
    var bundles: [[Bundle]] = []
    var sweeps: [Bool] = []

    private func places(_ expert: Int) -> [(rank: Int, slot: Int)] {
        var found: [(rank: Int, slot: Int)] = []
        for k in Int(placement.replicaStart[expert])..<Int(placement.replicaStart[expert + 1]) {
            let slot = Int(placement.replicaSlot[k]), rank = slot / placement.shape.nLocal
            if !found.contains(where: { $0.rank == rank }) { found.append((rank, slot)) }
        }
        return found
    }

    init(_ placement: Placement, unit: Unit = .token, capacities: RankCapacities? = nil) {
        (self.placement, self.unit, self.capacities) = (placement, unit, capacities)
        let shape = placement.shape
        for group in 0..<shape.nGroups {
            var list: [Bundle] = []
            for rank in group * shape.groupSize..<(group + 1) * shape.groupSize {
                for offset in 0..<shape.nLocal {
                    let slot = rank * shape.nLocal + offset
                    let expert = Int(placement.phy2log[slot])
                    let places = places(expert)
                    guard places.count > 1, places[0].slot == slot else { continue }
                    if let topology = placement.topology {
                        if offset >= topology.nRedundant { continue }
                        let members = (0..<placement.combined).map { Int(placement.phy2log[slot + $0 * topology.nRedundant]) }
                        list.append(Bundle(experts: members, ranks: places.map(\.rank)))
                    } else {
                        list.append(Bundle(experts: [expert], ranks: places.map(\.rank)))
                    }
                }
            }
            for u in list.indices {
                var colour = 0
                while list[..<u].contains(where: { $0.colour == colour && !Set($0.ranks).isDisjoint(with: list[u].ranks) }) { colour += 1 }
                list[u].colour = colour
            }
            let sweeps = !list.isEmpty && list.allSatisfy { $0.ranks.count == 2 && $0.colour < 8 }
            self.sweeps.append(sweeps)
            if sweeps { list = (0..<8).flatMap { colour in list.filter { $0.colour == colour } } }
            bundles.append(list)
        }
    }

    func solve(_ loads: [Int64]) -> Solved {
        var solved = Solved()
        solved.tokens = [Int64](repeating: 0, count: placement.shape.nPhysical)
        for group in 0..<placement.shape.nGroups { solve(group, loads, &solved) }
        return solved
    }

    /// Units that rank r in EP may hold at level T, as the header says it.
    private func cap(_ rank: Int, _ level: Int64) -> Int64 {
        guard let capacities else { return level }
        return max(0, Int64((Int128(level) - 1024 * Int128(capacities.fixed[rank])) * Int128(capacities.speed[rank]) >> 20))
    }

    /// The least level at which the ranks of a set hold so many units, by trying.
    private func raise(_ ranks: [Int], _ units: Int64, atLeast least: Int64) -> Int64 {
        var low = least - 1, high = max(1, least)
        func holds(_ level: Int64) -> Bool { ranks.reduce(Int128(0)) { $0 + Int128(cap($1, level)) } >= Int128(units) }
        while !holds(high) { high *= 2 }
        while high - low > 1 {
            let middle = low + (high - low) / 2
            if holds(middle) { high = middle } else { low = middle }
        }
        return high
    }

    private func ceiling(_ a: Int64, _ b: Int) -> Int64 { a / Int64(b) + (a % Int64(b) > 0 ? 1 : 0) }

    private func solve(_ group: Int, _ loads: [Int64], _ solved: inout Solved) {
        let size = placement.shape.groupSize, first = group * size
        let list = bundles[group].map { Bundle(experts: $0.experts, ranks: $0.ranks.map { $0 - first }, colour: $0.colour) }
        var base = [Int64](repeating: 0, count: size)
        for expert in 0..<placement.shape.nLogical {
            let places = places(expert)
            if places.count == 1 && places[0].rank / size == group {
                base[places[0].rank - first] += unit.units(loads[expert])
                solved.tokens[places[0].slot] = loads[expert]
            }
        }
        let demand = list.map { $0.experts.reduce(0) { $0 + unit.units(loads[$1]) } }
        var x = zip(list, demand).map { bundle, tokens in
            bundle.ranks.indices.map { tokens / Int64(bundle.ranks.count) + ($0 < Int(tokens % Int64(bundle.ranks.count)) ? 1 : 0) }
        }
        func currentLoads() -> [Int64] {
            var load = base
            for (u, bundle) in list.enumerated() { for (j, r) in bundle.ranks.enumerated() { load[r] += x[u][j] } }
            return load
        }
        var load = currentLoads()
        let total = load.reduce(0, +)
        let least = (first..<first + size).reduce(Int64(0)) { max($0, 1024 * Int64(capacities?.fixed[$1] ?? 0)) }
        var bound = raise((first..<first + size).map { $0 }, total, atLeast: least)
        let mean = bound
        var witness = Set(0..<size)
        let alone = (0..<size).map { raise([first + $0], base[$0], atLeast: least) }
        if alone.max()! > bound {
            bound = alone.max()!
            witness = [alone.firstIndex(of: bound)!]
        }
        var caps = (0..<size).map { min(total, cap(first + $0, bound)) }
        func exceeds() -> Bool { (0..<size).contains { load[$0] > caps[$0] } }
        var rounds = 0
        if exceeds() && sweeps[group] {
            var left = 2
            while left > 0 && exceeds() {
                left -= 1
                for colour in 0..<8 {
                    for (u, bundle) in list.enumerated() where bundle.colour == colour {
                        let (r, s) = (bundle.ranks[0], bundle.ranks[1])
                        let move = max(-x[u][1], min(x[u][0], ((caps[s] - load[s]) - (caps[r] - load[r])) / 2))
                        x[u][0] -= move
                        x[u][1] += move
                    }
                    load = currentLoads()
                }
            }
        }
        while exceeds() {
            rounds += 1
            let over = (0..<size).filter { load[$0] > caps[$0] }
            var level: [Int: Int] = [:]
            for r in 0..<size where load[r] < caps[r] { level[r] = 0 }
            var k = 0
            while over.contains(where: { level[$0] == nil }) {
                var next: Set<Int> = []
                for (u, bundle) in list.enumerated() {
                    for (j, r) in bundle.ranks.enumerated() where level[r] == nil && x[u][j] > 0 {
                        if bundle.ranks.indices.contains(where: { $0 != j && level[bundle.ranks[$0]] == k }) { next.insert(r) }
                    }
                }
                if next.isEmpty { break }
                for r in next { level[r] = k + 1 }
                k += 1
            }
            let lost = over.filter { level[$0] == nil }
            if lost.count == over.count || !lost.isEmpty && rounds <= 32 {
                witness = Set((0..<size).filter { level[$0] == nil })
                bound = raise(witness.map { first + $0 }, witness.reduce(0) { $0 + load[$1] }, atLeast: least)
                caps = (0..<size).map { min(total, cap(first + $0, bound)) }
                continue
            }
            k = over.compactMap { level[$0] }.max()!
            while k >= 1 {
                let before = load
                for r in 0..<size where level[r] == k && before[r] > caps[r] {
                    var excess = before[r] - caps[r]
                    for (u, bundle) in list.enumerated() {
                        guard let j = bundle.ranks.firstIndex(of: r) else { continue }
                        for (i, q) in bundle.ranks.enumerated() where i != j && level[q] == k - 1 {
                            var move = min(excess, x[u][j])
                            if k == 1 { move = min(move, max(0, caps[q] - before[q])) }
                            x[u][j] -= move
                            x[u][i] += move
                            excess -= move
                        }
                    }
                }
                load = currentLoads()
                k -= 1
            }
            if rounds <= 32 { continue }
            var givers = (0..<size).filter { level[$0] == 1 && load[$0] > caps[$0] }
            var takers = Set((0..<size).filter { level[$0] == 0 })
            repeat {
                let before = load
                for r in givers {
                    var excess = before[r] - caps[r]
                    for capped in [true, false] {
                        for (u, bundle) in list.enumerated() {
                            guard let j = bundle.ranks.firstIndex(of: r) else { continue }
                            for (i, q) in bundle.ranks.enumerated() where i != j && takers.contains(q) {
                                let move = min(excess, x[u][j], capped ? max(0, caps[q] - before[q]) : Int64.max)
                                x[u][j] -= move
                                x[u][i] += move
                                excess -= move
                            }
                        }
                    }
                }
                load = currentLoads()
                givers = takers.filter { load[$0] > caps[$0] }.sorted()
                takers.subtract(givers)
            } while !givers.isEmpty
        }

        var result = GroupResult()
        result.maxLoad = capacities == nil ? load.max()! : (0..<size).map { raise([first + $0], load[$0], atLeast: least) }.max()!
        solved.means.append(mean)
        result.bound = bound
        result.total = total
        result.rounds = Int64(rounds)
        result.witnessSize = witness.count
        for (u, bundle) in list.enumerated() {
            result.moved += demand[u] - x[u][0]
            if bundle.experts.count == 1 {
                var units: Int64 = 0, before: Int64 = 0
                for (j, place) in places(bundle.experts[0]).enumerated() {
                    units += x[u][j]
                    let upTo = min(loads[bundle.experts[0]], units * unit.size)
                    (solved.tokens[place.slot], before) = (upTo - before, upTo)
                }
                continue
            }
            var sum: Int64 = 0, before: Int64 = 0
            for expert in bundle.experts {
                sum += unit.units(loads[expert])
                let upTo = demand[u] == 0 ? 0 : Int64(Int128(x[u][1]) * Int128(sum) / Int128(demand[u]))
                let places = places(expert)
                let original = min(loads[expert], (unit.units(loads[expert]) - (upTo - before)) * unit.size)
                solved.tokens[places[1].slot] = loads[expert] - original
                solved.tokens[places[0].slot] = original
                before = upTo
            }
        }
        solved.results.append(result)
        solved.witnesses.append(witness)
    }
}
