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
    withMessage(message, message_size) { () throws(Failure) in
        let shape = try translating { () throws(RuleViolation) in
            try ExpertShape(epSize: Int(ep_size), nNodes: 1, groupSize: 0, nLogical: Int(n_logical), nPhysical: Int(n_physical))
        }
        let loads = try Check.pointer(loads, "loads")
        let phy2log = try Check.pointer(phy2log, "phy2log")
        try Check.aligned(UnsafeRawPointer(tokens), "tokens", to: 8)
        try Check.aligned(UnsafeRawPointer(info), "info", to: 8)
        for expert in 0..<shape.nLogical where loads[expert] < 0 || loads[expert] > TokenAssigner.maxLoad {
            throw Failure("loads[\(expert)]", "must lie in 0 ... \(TokenAssigner.maxLoad)", value: loads[expert])
        }
        let placement = try translating { () throws(RuleViolation) in
            try Placement(shape: shape, phy2log: Array(UnsafeBufferPointer(start: phy2log, count: shape.nPhysical)))
        }
        let solver = FlowSolver(Network(placement))
        solver.solve(loads: loads)
        if let tokens { solver.network.scatter(solver.quotas, to: tokens) }
        info?.pointee = lplb_group_info(solver, group: 0)
    }
}
