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
        let config = try StructSize.read(config, "config")
        let out = try StructSize.check(agreement, "agreement", size: "agreement.struct_size")
        let all = try Agreement(config)
        try all.check()
        // n_nodes is the second number of every record, and all are equal.
        let given = all.records[0].number(1)
        var agreed = lplb_agreement()
        agreed.n_nodes = given != 0 ? given : Int64(all.nNodes)
        agreed.n_hosts = Int64(all.nHosts)
        agreed.number = all.number
        agreed.row_dtype = lplb_dtype(LPLB_INT32)
        agreed.all_cuda = all.allOnCuda ? 1 : 0
        StructSize.write(agreed, to: out)
    }
}
