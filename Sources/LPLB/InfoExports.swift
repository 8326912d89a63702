// lplb.h section 4: reading the latest plan.

import CLPLB

@_cdecl("lplb_planner_info") @implementation
public func lplb_planner_info(
    _ handle: OpaquePointer?, _ plan: UnsafeMutablePointer<lplb_plan_info>?, _ groups: UnsafeMutablePointer<lplb_group_info>?,
    _ n_groups: Int64, _ stream: UnsafeMutableRawPointer?
) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        let plan = try plan.map { (plan) throws(Failure) in try StructSize.check(plan, "plan") }
        try Check.aligned(UnsafeRawPointer(groups), "groups", to: 8)
        if groups != nil { try Check.size(n_groups, "n_groups", is: planner.shape.nGroups, "the planner's groups") }
        try planner.requirePlan("lplb_planner_info")
        let totals = try planner.backend.readInfo(groups: groups, stream: stream)
        if let plan {
            var found = lplb_plan_info()
            found.n_groups = Int64(planner.shape.nGroups)
            found.invalid_ids = totals.invalidIds
            found.own_rank = totals.onOwnRank
            found.own_node = totals.onOwnNode
            found.other_nodes = totals.onOtherNodes
            found.overflow = totals.overflow
            StructSize.write(found, to: plan)
        }
    }
}

@_cdecl("lplb_planner_split") @implementation
public func lplb_planner_split(
    _ handle: OpaquePointer?, _ tokens: UnsafeMutablePointer<Int64>?, _ n_physical: Int64, _ stream: UnsafeMutableRawPointer?
) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        let tokens = try Check.pointer(tokens, "tokens")
        try Check.size(n_physical, "n_physical", is: planner.shape.nPhysical, "the planner's physical experts")
        try planner.requirePlan("lplb_planner_split")
        try planner.backend.readSplit(tokens, stream: stream)
    }
}

@_cdecl("lplb_planner_assignment") @implementation
public func lplb_planner_assignment(
    _ handle: OpaquePointer?, _ tokens: UnsafeMutablePointer<Int64>?, _ n_physical: Int64, _ stream: UnsafeMutableRawPointer?
) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        let tokens = try Check.pointer(tokens, "tokens")
        try Check.size(n_physical, "n_physical", is: planner.shape.nPhysical, "the planner's physical experts")
        try planner.requirePlan("lplb_planner_assignment")
        try planner.backend.readAssignment(tokens, stream: stream)
    }
}

@_cdecl("lplb_planner_history") @implementation
public func lplb_planner_history(
    _ handle: OpaquePointer?, _ at: Int64, _ tokens: UnsafeMutablePointer<Int64>?, _ n_logical: Int64,
    _ plans: UnsafeMutablePointer<Int64>?, _ stream: UnsafeMutableRawPointer?
) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        let tokens = try Check.pointer(tokens, "tokens")
        try Check.aligned(UnsafeRawPointer(plans), "plans", to: 8)
        let nLogical = planner.shape.nLogical
        try Check.size(n_logical, "n_logical", is: nLogical, "the planner's logical experts")
        guard at >= Int64(LPLB_ANY_PLAN) else { throw Failure("at", "must be a number of plans, or LPLB_ANY_PLAN (-1)", value: at) }
        guard planner.recording.contains(.history) else {
            throw Failure(LPLB_ERROR_WRONG_ORDER, "lplb_planner_history: needs a planner created with LPLB_RECORD_HISTORY; this one keeps none")
        }
        let found = UnsafeMutablePointer<Int64>.allocate(capacity: nLogical + 1)
        defer { found.deallocate() }
        found.initialize(repeating: 0, count: nLogical + 1)
        try planner.backend.readHistory(found, stream: stream)
        if at >= 0 && found[nLogical] != at {
            throw Failure(
                LPLB_ERROR_WRONG_ORDER,
                "at: must be the number of plans in the history, so that all ranks read the same one, got \(at) where there are "
                    + "\(found[nLogical])")
        }
        tokens.update(from: found, count: nLogical)
        plans?.pointee = found[nLogical]
    }
}

@_cdecl("lplb_planner_get_metrics") @implementation
public func lplb_planner_get_metrics(_ handle: OpaquePointer?, _ metrics: UnsafeMutablePointer<lplb_metrics>?) -> lplb_status {
    guard let handle else { return lplb_status(LPLB_ERROR_INVALID_ARGUMENT) }
    return withMessage(nil, 0) { () throws(Failure) in
        let metrics = try StructSize.check(metrics, "metrics")
        let planner = planner(handle)
        StructSize.write(lplb_metrics(reading: planner.backend.metrics, nGroups: planner.shape.nGroups), to: metrics)
    }
}

@_cdecl("lplb_planner_reset") @implementation
public func lplb_planner_reset(_ handle: OpaquePointer?, _ record: Int64, _ stream: UnsafeMutableRawPointer?) -> lplb_status {
    withPlanner(handle) { (planner) throws(Failure) in
        try planner.backend.reset(try Recording(record, "record").intersection(planner.recording), stream: stream)
    }
}
