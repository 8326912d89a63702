// lplb.h section 2, what ranks must agree on. Check, convert, call, map the error.

import CLPLB

@_cdecl("lplb_counts_width") @implementation
public func lplb_counts_width(_ n_logical: Int64) -> Int64 { n_logical &+ 1 }

@_cdecl("lplb_agree") @implementation
public func lplb_agree(
    _ config: UnsafePointer<lplb_agree_config>?, _ agreement: UnsafeMutablePointer<lplb_agreement>?,
    _ message: UnsafeMutablePointer<CChar>?, _ message_size: Int64
) -> lplb_status {
    withMessage(message, message_size) { () throws(Failure) in
        let config = try Check.pointer(config, "config")
        let size = UnsafeRawPointer(config).load(as: Int64.self)
        try Check.size(size, "struct_size", is: MemoryLayout<lplb_agree_config>.size, "sizeof(lplb_agree_config)")
        let out = try Check.pointer(agreement, "agreement")
        try Check.size(out.pointee.struct_size, "agreement.struct_size", is: MemoryLayout<lplb_agreement>.size, "sizeof(lplb_agreement)")
        let all = try Agreement(config.pointee)
        try all.check()
        // n_nodes is the second number of every record, and all are equal.
        let given = all.records[0].number(1)
        out.pointee.n_nodes = given != 0 ? given : Int64(all.nNodes)
        out.pointee.n_hosts = Int64(all.nHosts)
        out.pointee.number = all.number
        out.pointee.row_dtype = lplb_dtype(LPLB_INT32)
        out.pointee.all_cuda = all.allOnCuda ? 1 : 0
    }
}
