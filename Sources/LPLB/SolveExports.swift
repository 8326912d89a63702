// lplb.h section 6: one solve without a planner.

import CLPLB
import LPLBSolver
import LPLBTopology

@_cdecl("lplb_solve") @implementation
public func lplb_solve(
    _ loads: UnsafePointer<Int64>?, _ n_logical: Int64, _ phy2log: UnsafePointer<Int32>?, _ n_physical: Int64, _ ep_size: Int64,
    _ tokens: UnsafeMutablePointer<Int64>?, _ info: UnsafeMutablePointer<lplb_group_info>?, _ message: UnsafeMutablePointer<CChar>?,
    _ message_size: Int64
) -> lplb_status {
    var config = lplb_solve_config()
    (config.loads, config.phy2log, config.tokens, config.info) = (loads, phy2log, tokens, info)
    (config.n_logical, config.n_physical, config.ep_size) = (n_logical, n_physical, ep_size)
    return withMessage(message, message_size) { () throws(Failure) in try solve(config) }
}

@_cdecl("lplb_solve_with") @implementation
public func lplb_solve_with(
    _ config: UnsafePointer<lplb_solve_config>?, _ message: UnsafeMutablePointer<CChar>?, _ message_size: Int64
) -> lplb_status {
    withMessage(message, message_size) { () throws(Failure) in try solve(try StructSize.read(config, "config")) }
}

private func solve(_ config: lplb_solve_config) throws(Failure) {
    let shape = try translating { () throws(RuleViolation) in
        try ExpertShape(
            epSize: Int(config.ep_size), nNodes: 1, groupSize: 0, nLogical: Int(config.n_logical), nPhysical: Int(config.n_physical))
    }
    let loads = try Check.pointer(config.loads, "loads")
    let phy2log = try Check.pointer(config.phy2log, "phy2log")
    try Check.aligned(UnsafeRawPointer(config.tokens), "tokens", to: 8)
    try Check.aligned(UnsafeRawPointer(config.info), "info", to: 8)
    try Check.aligned(UnsafeRawPointer(config.level), "level", to: 8)
    guard config.unused == 0 else { throw Failure("unused", "must be 0", value: config.unused) }
    let unit = try Check.unit(config.unit), capacities = try Check.capacities(config.speed, config.fixed, ranks: shape.epSize)
    for expert in 0..<shape.nLogical where loads[expert] < 0 || loads[expert] > TokenAssigner.maxLoad {
        throw Failure("loads[\(expert)]", "must lie in 0 ... \(TokenAssigner.maxLoad)", value: loads[expert])
    }
    let placement = try translating { () throws(RuleViolation) in
        try Placement(shape: shape, phy2log: Array(UnsafeBufferPointer(start: phy2log, count: shape.nPhysical)))
    }
    if capacities != nil { try Check.total(loads, count: shape.nLogical, "loads") }
    let solver = FlowSolver(Network(placement), unit: unit, capacities: capacities)
    solver.solve(loads: loads)
    if let tokens = config.tokens { solver.network.scatter(solver.quotas, to: tokens) }
    config.info?.pointee = lplb_group_info(solver, group: 0)
    config.level?.pointee = lplb_level(solver.levels[0])
}
