import CLPLBKernels
nonisolated(unsafe) private let t = lplbk_cuda()
func lplbk_exchange_identity(_ a: Int32, _ b: UnsafeMutablePointer<UInt8>!, _ c: UnsafeMutablePointer<UInt64>!) -> Int32 { t?.pointee.exchange_identity(a,b,c) ?? -1 }
func lplbk_exchange_export(_ a: Int32, _ b: UnsafeMutableRawPointer!, _ c: UnsafeMutablePointer<UInt8>!) -> Int32 { t?.pointee.exchange_export(a,b,c) ?? -1 }
func lplbk_exchange_import(_ a: Int32, _ b: UnsafePointer<UInt8>!, _ c: UnsafeMutablePointer<UnsafeMutableRawPointer?>!) -> Int32 { t?.pointee.exchange_import(a,b,c) ?? -1 }
func lplbk_exchange_reach(_ a: Int32, _ b: UnsafePointer<UInt8>!, _ c: Int32, _ d: UnsafeMutablePointer<Int32>!) -> Int32 { t?.pointee.exchange_reach(a,b,c,d) ?? -1 }
func lplbk_device_info_get(_ a: Int32, _ b: UnsafeMutablePointer<lplbk_device_info>!) -> Int32 { t?.pointee.device_info(a,b) ?? -1 }
func lplbk_exchange_open(_ a: Int32, _ b: UInt32, _ c: UnsafeMutablePointer<lplbk_exchange_view>!, _ d: UnsafeMutablePointer<UnsafeMutablePointer<lplbk_exchange_host>?>!) -> Int32 { t?.pointee.exchange_open(a,b,c,d) ?? -1 }
func lplbk_exchange_close(_ a: Int32, _ c: UnsafeMutablePointer<lplbk_exchange_view>!, _ d: UnsafeMutablePointer<lplbk_exchange_host>!) -> Int32 { t?.pointee.exchange_close(a,c,d) ?? -1 }
func lplbk_alloc(_ a: Int32, _ b: Int64, _ c: UnsafeMutablePointer<UnsafeMutableRawPointer?>!) -> Int32 { t?.pointee.alloc(a,b,c) ?? -1 }
func lplbk_free(_ a: Int32, _ b: UnsafeMutableRawPointer!) -> Int32 { t?.pointee.free(a,b) ?? -1 }
func lplbk_exchange_fill(_ a: Int32, _ b: UnsafeMutableRawPointer!, _ c: Int64, _ d: UInt32) -> Int32 { t?.pointee.exchange_fill(a,b,c,d) ?? -1 }
func lplbk_exchange_alloc(_ a: Int32, _ b: Int64, _ c: UInt32, _ d: UnsafeMutablePointer<UnsafeMutableRawPointer?>!) -> Int32 { t?.pointee.exchange_alloc(a,b,c,d) ?? -1 }
func lplbk_exchange_launch(_ a: Int32, _ b: UnsafePointer<lplbk_exchange_view>!, _ c: UnsafePointer<Int32>!, _ d: UnsafeMutablePointer<Int32>!, _ e: UnsafePointer<Int32>!, _ f: Int32, _ g: UnsafeMutableRawPointer!) -> Int32 { t?.pointee.exchange_launch(a,b,c,d,e,f,g) ?? -1 }
func lplbk_exchange_settle(_ a: Int32) { t?.pointee.exchange_settle(a) }
func lplbk_exchange_unimport(_ a: Int32, _ b: UnsafeMutableRawPointer!) -> Int32 { t?.pointee.exchange_unimport(a,b) ?? -1 }
