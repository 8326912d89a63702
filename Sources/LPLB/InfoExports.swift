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
