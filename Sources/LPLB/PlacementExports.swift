// lplb.h section 5: placement alone.

import CLPLB
import LPLBPlacement
import LPLBTopology

@_cdecl("lplb_eplb_rebalance") @implementation
public func lplb_eplb_rebalance(
    _ weight: UnsafePointer<Float>?, _ n_layers: Int64, _ n_logical: Int64, _ n_physical: Int64, _ n_groups: Int64, _ n_nodes: Int64,
    _ n_ranks: Int64, _ phy2log: UnsafeMutablePointer<Int64>?, _ replica: UnsafeMutablePointer<Int64>?,
    _ logcnt: UnsafeMutablePointer<Int64>?, _ message: UnsafeMutablePointer<CChar>?, _ message_size: Int64
) -> lplb_status {
    withMessage(message, message_size) { () throws(Failure) in
        let count = try translating { () throws(RuleViolation) in
            try rebalanceWeightCount(
                nLayers: Int(n_layers), nLogical: Int(n_logical), nPhysical: Int(n_physical), nGroups: Int(n_groups),
                nNodes: Int(n_nodes), nRanks: Int(n_ranks))
        }
        try Check.aligned(UnsafeRawPointer(phy2log), "phy2log", to: 8)
        try Check.aligned(UnsafeRawPointer(replica), "replica", to: 8)
        try Check.aligned(UnsafeRawPointer(logcnt), "logcnt", to: 8)
        let weight = count == 0 ? nil : try Check.pointer(weight, "weight")
        try translating { () throws(RuleViolation) in
            try rebalance(
                weight: UnsafeBufferPointer(start: weight, count: count), nLayers: Int(n_layers), nLogical: Int(n_logical),
                nPhysical: Int(n_physical), nGroups: Int(n_groups), nNodes: Int(n_nodes), nRanks: Int(n_ranks), phy2log: phy2log,
                replica: replica, logcnt: logcnt)
        }
    }
}

@_cdecl("lplb_placement_homes") @implementation
public func lplb_placement_homes(
    _ phy2log: UnsafePointer<Int32>?, _ n_physical: Int64, _ n_logical: Int64, _ ep_size: Int64, _ former: UnsafePointer<Int32>?,
    _ homes: UnsafeMutablePointer<Int32>?, _ message: UnsafeMutablePointer<CChar>?, _ message_size: Int64
) -> lplb_status {
    withMessage(message, message_size) { () throws(Failure) in
        let phy2log = try Check.pointer(phy2log, "phy2log"), result = try Check.pointer(homes, "homes")
        try Check.aligned(UnsafeRawPointer(former), "former", to: 4)
        let found = try translating { () throws(RuleViolation) in
            let shape = try ExpertShape(epSize: Int(ep_size), nNodes: 1, groupSize: 0, nLogical: Int(n_logical), nPhysical: Int(n_physical))
            let placement = try Placement(shape: shape, phy2log: Array(UnsafeBufferPointer(start: phy2log, count: shape.nPhysical)))
            let before = former.map { Array(UnsafeBufferPointer(start: $0, count: shape.nLogical)) }
            return try LPLBPlacement.homes(of: placement, former: before)
        }
        result.update(from: found, count: found.count)
    }
}
