// What a rank's work costs: units and capacities, as the caller gives them.

import CLPLB
import LPLBSolver
import LPLBTopology

extension Check {
    static func unit(_ value: Int32) throws(Failure) -> Unit {
        if value == LPLB_UNIT_EXPERTS { return .expert }
        return Unit(max(1, Int64(try range(Int64(value), "unit", Int64(LPLB_UNIT_EXPERTS)...Int64(Int32.max)))))
    }

    /// speed and fixed as in lplb_planner_set_capacity; nil: the ranks are alike.
    static func capacities(
        _ speed: UnsafePointer<Int32>?, _ fixed: UnsafePointer<Int32>?, ranks: Int
    ) throws(Failure) -> RankCapacities? {
        RankCapacities(
            speed: try each(speed, "speed", ranks, 1...RankCapacities.maxSpeed, otherwise: RankCapacities.normalSpeed),
            fixed: try each(fixed, "fixed", ranks, 0...RankCapacities.maxFixed, otherwise: 0))
    }

    private static func each(
        _ values: UnsafePointer<Int32>?, _ argument: String, _ count: Int, _ allowed: ClosedRange<Int32>, otherwise: Int32
    ) throws(Failure) -> [Int32] {
        guard let values else { return [Int32](repeating: otherwise, count: count) }
        try aligned(UnsafeRawPointer(values), argument, to: 4)
        for rank in 0..<count where !allowed.contains(values[rank]) {
            throw Failure("\(argument)[\(rank)]", "must lie in \(allowed.lowerBound) ... \(allowed.upperBound)", value: values[rank])
        }
        return Array(UnsafeBufferPointer(start: values, count: count))
    }

    /// Where the ranks differ, what is solved for together has a limit.
    static func total(_ loads: UnsafePointer<Int64>, count: Int, _ argument: String) throws(Failure) {
        var total: Int64 = 0
        for expert in 0..<count { total += loads[expert] }
        guard total <= RankCapacities.maxTotal else {
            throw Failure(argument, "must be at most \(RankCapacities.maxTotal) tokens together where ranks have capacities", value: total)
        }
    }
}

extension Planner {
    func setCapacity(_ capacities: RankCapacities?, stream: UnsafeMutableRawPointer?) throws(Failure) {
        guard solver == Int(LPLB_SOLVER_FLOW) || capacities == nil else {
            throw Failure(LPLB_ERROR_UNSUPPORTED, "lplb_planner_set_capacity: needs LPLB_SOLVER_FLOW, got a planner with LPLB_SOLVER_IPM")
        }
        guard !recording.contains(.metrics) || capacities == nil else {
            throw Failure(
                LPLB_ERROR_UNSUPPORTED, "lplb_planner_set_capacity: needs a planner without LPLB_RECORD_METRICS, which knows tokens only")
        }
        if recording.contains(.metrics) { return }  // these ranks stay alike
        guard mayDiffer || !everPlanned else {
            throw Failure(
                LPLB_ERROR_WRONG_ORDER,
                "lplb_planner_set_capacity: must be called before a planner's first plan, since captured graphs follow it only then; "
                    + "got a first call after a plan (ranks that are alike can be set then, and others later)")
        }
        let changed = placement.map { self.digest(of: $0, attached: attached, capacities) }
        try backend.set(capacities, digest: changed, stream: stream)
        self.capacities = capacities
        mayDiffer = true
    }

    /// Ratios are shares of tokens.
    func requireTokens(_ argument: String) throws(Failure) {
        if unit != .token { throw Failure(argument, "needs a planner whose unit is a token, since shares are no whole units", value: "another unit") }
    }
}

extension lplb_level {
    init(_ level: GroupLevel) { self.init(reached: level.reached, bound: level.bound, mean: level.mean) }
}

/// What a group's plan is in tokens.
struct GroupTokens {
    var most: Int64 = 0
    var total: Int64 = 0
    var moved: Int64 = 0
}

extension Network {
    /// - Parameter tokens: of a place.
    func tokens(ofGroup group: Int, _ tokens: (Int) -> Int64) -> GroupTokens {
        var sums = [Int64](repeating: 0, count: shape.groupSize), found = GroupTokens()
        let first = Int32(group * shape.groupSize)
        for expert in 0..<shape.nLogical {
            let places = places(of: expert)
            if Int(placeRank[places.lowerBound]) / shape.groupSize != group { continue }
            for place in places {
                let here = tokens(place)
                sums[Int(placeRank[place] - first)] += here
                found.moved += place == places.lowerBound ? 0 : here
            }
        }
        for sum in sums {
            found.most = max(found.most, sum)
            found.total += sum
        }
        return found
    }
}

extension lplb_group_info {
    /// Of a plan whose cost is not tokens: what is told in tokens.
    mutating func tell(_ tokens: GroupTokens, ranks: Int) {
        (max_load, total, moved) = (tokens.most, tokens.total, tokens.moved)
        bound = (tokens.total + Int64(ranks) - 1) / Int64(ranks)
    }
}

@_cdecl("lplb_planner_set_capacity") @implementation
public func lplb_planner_set_capacity(
    _ handle: OpaquePointer?, _ speed: UnsafePointer<Int32>?, _ fixed: UnsafePointer<Int32>?, _ n_ranks: Int64,
    _ stream: UnsafeMutableRawPointer?
) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        let ranks = planner.shape.epSize
        try Check.size(n_ranks, "n_ranks", is: ranks, "the planner's ep_size")
        try planner.setCapacity(try Check.capacities(speed, fixed, ranks: ranks), stream: stream)
    }
}

@_cdecl("lplb_planner_levels") @implementation
public func lplb_planner_levels(
    _ handle: OpaquePointer?, _ levels: UnsafeMutablePointer<lplb_level>?, _ n_groups: Int64, _ stream: UnsafeMutableRawPointer?
) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        let levels = try Check.pointer(levels, "levels")
        try Check.size(n_groups, "n_groups", is: planner.shape.nGroups, "the planner's groups")
        try planner.requirePlan("lplb_planner_levels")
        try planner.backend.readLevels(levels, stream: stream)
    }
}
