// What a rank tells the others about its buffer: 128 bytes, gathered by the caller between lplb_exchange_begin and _finish.

import CLPLB
import CLPLBKernels
import Glibc

/// Layout, little-endian: 0 magic, 4 version u8, 5 rank u8, 6 ranks u8, 8 counts u32, 12 nodes u32, 16 first epoch u32, 20 process u32,
/// 24 host u64, 32 UUID of the GPU [16], 48 address of the buffer in its process u64, 56 nonce of the process u64, 64 CUDA IPC handle [64].
struct ExchangeBlob: Record {
    private static let magic: UInt32 = 0x4C_50_58_42
    private static let version: UInt8 = 1
    private static let uuidOffset = 32
    private static let handleOffset = 64

    /// Tells this process from one of another container that happens to have the same number.
    private static let nonce = UInt64.random(in: .min ... .max)

    var bytes: [UInt8]

    init(_ settings: ExchangeSettings, buffer: UnsafeMutableRawPointer?) {
        bytes = [UInt8](repeating: 0, count: Int(LPLB_EXCHANGE_BLOB_BYTES))
        put(ExchangeBlob.magic, at: 0)
        put(ExchangeBlob.version, at: 4)
        put(UInt8(settings.rank), at: 5)
        put(UInt8(settings.ranks), at: 6)
        put(UInt32(settings.counts), at: 8)
        put(UInt32(settings.nodes), at: 12)
        put(settings.firstEpoch, at: 16)
        put(UInt32(bitPattern: getpid()), at: 20)
        put(UInt64(UInt(bitPattern: buffer)), at: 48)
        put(ExchangeBlob.nonce, at: 56)
    }

    init(_ memory: UnsafeRawPointer) {
        bytes = [UInt8](UnsafeRawBufferPointer(start: memory, count: Int(LPLB_EXCHANGE_BLOB_BYTES)))
    }

    func write(to memory: UnsafeMutableRawPointer) { memory.copyMemory(from: bytes, byteCount: bytes.count) }

    mutating func identify(_ device: Int32, _ cuda: lplbk_backend) -> Int32 {
        var host: UInt64 = 0
        let error = bytes.withUnsafeMutableBufferPointer {
            cuda.exchange_identity(device, $0.baseAddress! + ExchangeBlob.uuidOffset, &host)
        }
        put(host, at: 24)
        return error
    }

    mutating func export(_ device: Int32, _ buffer: UnsafeMutableRawPointer?, _ cuda: lplbk_backend) -> Int32 {
        bytes.withUnsafeMutableBufferPointer { cuda.exchange_export(device, buffer, $0.baseAddress! + ExchangeBlob.handleOffset) }
    }

    /// The buffer of rank `peer` for this rank's device, and whether it was imported, so that it has to be given back.
    func mapped(
        for settings: ExchangeSettings, of peer: Int, _ call: String, _ cuda: lplbk_backend
    ) throws(Failure) -> (buffer: UnsafeMutableRawPointer, isImported: Bool) {
        var reach: Int32 = 0, mapped = isOfThisProcess ? buffer : nil
        let asked = bytes.withUnsafeBufferPointer {
            cuda.exchange_reach(settings.device, $0.baseAddress! + ExchangeBlob.uuidOffset, isOfThisProcess ? 1 : 0, &reach)
        }
        try LPLB.check(asked, "\(call): peer access to rank \(peer)")
        guard reach != 0 else {
            throw Failure(
                LPLB_ERROR_UNSUPPORTED, "\(call): the GPU of rank \(settings.rank) cannot write to that of rank \(peer)")
        }
        if !isOfThisProcess {
            let error = bytes.withUnsafeBufferPointer {
                cuda.exchange_import(settings.device, $0.baseAddress! + ExchangeBlob.handleOffset, &mapped)
            }
            try LPLB.check(error, "\(call): the buffer of rank \(peer) cannot be mapped here by CUDA IPC")
        }
        guard let mapped else { throw Failure(LPLB_ERROR_INTERNAL, "\(call): no buffer of rank \(peer)") }
        return (mapped, !isOfThisProcess)
    }

    /// A buffer of this process needs no mapping (and CUDA IPC would refuse it).
    var isOfThisProcess: Bool {
        field(at: 56, UInt64.self) == ExchangeBlob.nonce && field(at: 20, UInt32.self) == UInt32(bitPattern: getpid())
    }

    var buffer: UnsafeMutableRawPointer? { UnsafeMutableRawPointer(bitPattern: UInt(field(at: 48, UInt64.self))) }

    /// Whether this can be the blob of rank `entry` in the same exchange as `own`.
    func check(entry: Int, against own: ExchangeBlob) throws(Failure) {
        guard field(at: 0, UInt32.self) == ExchangeBlob.magic, bytes[4] == ExchangeBlob.version else {
            throw Failure("blobs", "entry \(entry) must come from lplb_exchange_begin of this version", value: "other bytes")
        }
        guard Int(bytes[5]) == entry else {
            throw Failure("blobs", "must stand in rank order, entry \(entry) of rank \(entry)", value: "that of rank \(bytes[5])")
        }
        for (name, offset) in [("n_counts", 8), ("n_nodes", 12), ("first_epoch", 16)] {
            let theirs = field(at: offset, UInt32.self), ours = own.field(at: offset, UInt32.self)
            guard theirs == ours else {
                throw Failure("blobs", "all ranks must have the same \(name), \(ours) here", value: "\(theirs) of rank \(entry)")
            }
        }
        guard bytes[6] == own.bytes[6] else {
            throw Failure("blobs", "all ranks must have the same n_ranks, \(own.bytes[6]) here", value: "\(bytes[6]) of rank \(entry)")
        }
        guard field(at: 24, UInt64.self) == own.field(at: 24, UInt64.self) else {
            throw Failure(
                LPLB_ERROR_UNSUPPORTED,
                "lplb_exchange_finish: rank \(entry) is on another host than rank \(own.bytes[5]), and CUDA IPC stays on one")
        }
    }
}
