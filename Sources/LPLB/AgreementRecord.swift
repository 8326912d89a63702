// What a rank tells the others before planners are made: 1024 bytes, gathered by the caller.

import CLPLB
import Glibc
import LPLBPlacement
import LPLBTopology

/// One rank's settings. Layout, little-endian: 0 magic u32, 4 version u32, 8 rank, 16 host u64, 24 is on CUDA, 32 status of a failure;
/// 40 the planner's number; 48 what must be equal, 8 bytes each; 160 the caller's settings [96]; 256 words of a failure [768]. Texts end with NUL.
struct AgreementRecord {
    static let size = 1024
    private static let magic: UInt32 = 0x4C_50_41_47
    private static let version: UInt32 = 1
    private static let settingsOffset = 160, settingsSize = 96
    private static let failureOffset = 256
    private static let numbersOffset = 48

    /// What must be equal, in the order in which differences are reported. Arrays travel as their hash; 0: there is none.
    static let numbers = [
        "ep_size", "n_nodes", "group_size", "n_logical", "n_physical", "n_redundant", "solver", "policy", "r2o", "phy2log", "history",
    ]
    private static let arrays: Set = ["r2o", "phy2log", "history"]

    private(set) var bytes = [UInt8](repeating: 0, count: size)

    /// This rank's record. Whatever is wrong here goes into it, for all ranks to see.
    init(_ config: lplb_agree_config) {
        put(AgreementRecord.magic, at: 0)
        put(AgreementRecord.version, at: 4)
        put(config.rank, at: 8)
        put(hostIdentity(), at: 16)
        if let settings = config.settings {
            put(text: String(cString: settings), at: AgreementRecord.settingsOffset, room: AgreementRecord.settingsSize)
        }
        do throws(Failure) {
            if let words = config.failure { throw Failure(LPLB_ERROR_INVALID_ARGUMENT, String(cString: words)) }
            try describe(config)
        } catch {
            put(Int64(error.status), at: 32)
            put(text: error.message, at: AgreementRecord.failureOffset, room: AgreementRecord.size - AgreementRecord.failureOffset)
        }
    }

    /// Another rank's record.
    init(_ memory: UnsafeRawBufferPointer) { bytes = [UInt8](memory) }

    private mutating func describe(_ config: lplb_agree_config) throws(Failure) {
        let given = try PlannerSettings(reading: try Check.pointer(config.planner, "planner"))
        let shape = given.shape
        guard Int64(shape.epSize) == config.n_ranks else { throw Failure("ep_size", "must be n_ranks, \(config.n_ranks)", value: shape.epSize) }
        if let rank = given.rank, Int64(rank) != config.rank {
            throw Failure("rank", "must be this one's place among the ranks, \(config.rank)", value: rank)
        }
        put(given.device >= 0 ? 1 : 0 as Int64, at: 24)
        var r2o = Hash(), phy2log = Hash(), history = Hash()
        if let topology = given.topology { r2o.add(topology.r2o) }
        if let values = config.phy2log {
            let slots = Array(UnsafeBufferPointer(start: try Check.pointer(values, "phy2log"), count: shape.nPhysical))
            _ = try translating { () throws(RuleViolation) in try Placement(shape: shape, phy2log: slots) }
            phy2log.add(slots)
        }
        if let values = config.history {
            let loads = Array(UnsafeBufferPointer(start: try Check.pointer(values, "history"), count: shape.nLogical))
            _ = try translating { () throws(RuleViolation) in try reorderByHistory(loads, shape: shape) }
            for load in loads { history.add(Int64(bitPattern: load.bitPattern)) }
        }
        let values: [Int64] = [
            Int64(shape.epSize), given.nodesGiven, Int64(shape.groupSize), Int64(shape.nLogical), Int64(shape.nPhysical),
            Int64(given.topology?.nRedundant ?? -1), Int64(given.solver), Int64(given.policy),
            given.topology == nil ? 0 : Int64(r2o.folded), config.phy2log == nil ? 0 : Int64(phy2log.folded),
            config.history == nil ? 0 : Int64(history.folded),
        ]
        put(given.number, at: 40)
        for (index, value) in values.enumerated() { put(value, at: AgreementRecord.numbersOffset + 8 * index) }
    }

    // MARK: Reading

    var isOurs: Bool { field(at: 0, UInt32.self) == AgreementRecord.magic && field(at: 4, UInt32.self) == AgreementRecord.version }
    var rank: Int64 { field(at: 8, Int64.self) }
    var host: UInt64 { field(at: 16, UInt64.self) }
    var plannerNumber: Int64 { field(at: 40, Int64.self) }
    var isOnCuda: Bool { field(at: 24, Int64.self) != 0 }
    var settings: String { text(at: AgreementRecord.settingsOffset, room: AgreementRecord.settingsSize) }
    func number(_ index: Int) -> Int64 { field(at: AgreementRecord.numbersOffset + 8 * index, Int64.self) }

    /// How the value of a number is said in an error.
    func words(ofNumber index: Int) -> String {
        let name = AgreementRecord.numbers[index], value = number(index)
        if AgreementRecord.arrays.contains(name) { return value == 0 ? "none" : "one with digest \(value)" }
        return String(value)
    }

    var failure: Failure? {
        let status = field(at: 32, Int64.self)
        guard status != 0 else { return nil }
        return Failure(Int(status), text(at: AgreementRecord.failureOffset, room: AgreementRecord.size - AgreementRecord.failureOffset))
    }

    // MARK: Bytes

    mutating func put<Value: FixedWidthInteger>(_ value: Value, at offset: Int) {
        bytes.withUnsafeMutableBytes { $0.storeBytes(of: value.littleEndian, toByteOffset: offset, as: Value.self) }
    }

    private mutating func put(text: String, at offset: Int, room: Int) {
        bytes.withUnsafeMutableBytes { memory in
            write(text, to: (memory.baseAddress! + offset).assumingMemoryBound(to: CChar.self), size: room)
        }
    }

    private func field<Value: FixedWidthInteger>(at offset: Int, _: Value.Type) -> Value {
        bytes.withUnsafeBytes { Value(littleEndian: $0.loadUnaligned(fromByteOffset: offset, as: Value.self)) }
    }

    private func text(at offset: Int, room: Int) -> String {
        String(decoding: bytes[offset..<offset + room].prefix { $0 != 0 }, as: UTF8.self)
    }
}

/// Equal on the ranks that share a kernel, whatever container they are in: a hash of the id that the kernel draws at every boot, else of
/// the host's name.
func hostIdentity() -> UInt64 {
    var words = [CChar](repeating: 0, count: 256)
    if let file = fopen("/proc/sys/kernel/random/boot_id", "r") {
        _ = fgets(&words, Int32(words.count), file)
        fclose(file)
    } else {
        _ = gethostname(&words, words.count - 1)
    }
    var hash = Hash()
    for character in words.prefix(while: { $0 != 0 }) { hash.add(Int64(character)) }
    return hash.value
}
