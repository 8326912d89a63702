// What ranks tell each other by the caller's gather, and the conclusions that all of them draw alike.

import CLPLB
import Glibc

/// Bytes in little-endian order that travel between ranks.
protocol Record {
    var bytes: [UInt8] { get set }
}

extension Record {
    mutating func put<Value: FixedWidthInteger>(_ value: Value, at offset: Int) {
        bytes.withUnsafeMutableBytes { $0.storeBytes(of: value.littleEndian, toByteOffset: offset, as: Value.self) }
    }

    /// A text that ends with NUL, cut to the room there is.
    mutating func put(text: String, at offset: Int, room: Int) {
        bytes.withUnsafeMutableBytes { memory in
            write(text, to: (memory.baseAddress! + offset).assumingMemoryBound(to: CChar.self), size: room)
        }
    }

    func field<Value: FixedWidthInteger>(at offset: Int, _: Value.Type) -> Value {
        bytes.withUnsafeBytes { Value(littleEndian: $0.loadUnaligned(fromByteOffset: offset, as: Value.self)) }
    }

    func text(at offset: Int, room: Int) -> String {
        String(decoding: bytes[offset..<offset + room].prefix { $0 != 0 }, as: UTF8.self)
    }
}

/// What a rank brings to a meeting. Layout: 0 magic u32, 4 version u32, 8 rank, 16 host u64, 24 is on CUDA, 32 status of a failure;
/// 40 free; 48 `numbers`, 8 bytes each; from behind them up to 256 free; 256 words of a failure [768].
protocol MeetingRecord: Record {
    static var magic: UInt32 { get }
    /// What must be equal, in the order in which differences are reported.
    static var numbers: [String] { get }
    init(bytes: [UInt8])
    /// How the value of a number is said in an error.
    func words(ofNumber index: Int) -> String
}

extension MeetingRecord {
    static var size: Int { 1024 }
    static var version: UInt32 { 1 }
    private static var numbersOffset: Int { 48 }
    private static var failureOffset: Int { 256 }

    /// This rank's record, before it says more.
    init(rank: Int64) {
        self.init(bytes: [UInt8](repeating: 0, count: Self.size))
        put(Self.magic, at: 0)
        put(Self.version, at: 4)
        put(rank, at: 8)
        put(hostIdentity(), at: 16)
    }

    var isOurs: Bool {
        field(at: 0, UInt32.self) == Self.magic && field(at: 4, UInt32.self) == Self.version
            && lplb_status(exactly: field(at: 32, Int64.self)) != nil
    }
    var rank: Int64 { field(at: 8, Int64.self) }
    var host: UInt64 { field(at: 16, UInt64.self) }
    var isOnCuda: Bool {
        get { field(at: 24, Int64.self) != 0 }
        set { put(newValue ? 1 : 0 as Int64, at: 24) }
    }

    var failure: Failure? {
        get {
            let status = field(at: 32, Int64.self)
            return status == 0 ? nil : Failure(Int(status), text(at: Self.failureOffset, room: Self.size - Self.failureOffset))
        }
        set {
            put(Int64(newValue?.status ?? 0), at: 32)
            put(text: newValue?.message ?? "", at: Self.failureOffset, room: Self.size - Self.failureOffset)
        }
    }

    func number(_ index: Int) -> Int64 { field(at: Self.numbersOffset + 8 * index, Int64.self) }

    mutating func put(numbers: [Int64]) {
        for (index, value) in numbers.enumerated() { put(value, at: Self.numbersOffset + 8 * index) }
    }

    func words(ofNumber index: Int) -> String { String(number(index)) }
}

/// The caller's function that brings bytes of every rank to every rank.
struct Gathering {
    let ranks: Int
    let rank: Int
    private let function: lplb_gather
    private let context: UnsafeMutableRawPointer?

    init(_ function: lplb_gather?, _ context: UnsafeMutableRawPointer?, ranks: Int64, rank: Int64) throws(Failure) {
        self.ranks = try Check.range(ranks, "n_ranks", 1...Int64(LPLB_MAX_EP_SIZE))
        self.rank = try Check.range(rank, "rank", 0...ranks - 1)
        guard let function else { throw Failure("gather", "must not be NULL", value: "NULL") }
        (self.function, self.context) = (function, context)
    }

    /// The bytes of all ranks, one after the other; `mine` is as long on every rank.
    /// - Parameter what: what they are, for the words of a failure.
    func all(_ mine: [UInt8], _ what: String) throws(Failure) -> [UInt8] {
        var all = [UInt8](repeating: 0, count: ranks * mine.count)
        let status = all.withUnsafeMutableBytes { all in
            mine.withUnsafeBytes { function(context, $0.baseAddress, all.baseAddress, Int64($0.count)) }
        }
        guard status == 0 else {
            throw Failure(LPLB_ERROR_PEER_LOST, "gather: must bring \(what) of all ranks and return 0, got \(status)")
        }
        return all
    }
}

/// What a rank brings to one of several steps that make one call: 40 the number of the step; 96 the blob of a buffer [128].
protocol StepRecord: MeetingRecord {
    /// The call, in words.
    static var call: String { get }
}

extension StepRecord {
    private static var stepOffset: Int { 40 }
    private static var blobRange: Range<Int> { 96..<96 + Int(LPLB_EXCHANGE_BLOB_BYTES) }

    init(rank: Int, step: Int64) {
        self.init(rank: Int64(rank))
        put(step, at: Self.stepOffset)
    }

    var step: Int64 { field(at: Self.stepOffset, Int64.self) }

    var blob: ArraySlice<UInt8> { bytes[Self.blobRange] }
    mutating func put(_ blob: ExchangeBlob) { bytes.replaceSubrange(Self.blobRange, with: blob.bytes) }
}

/// The steps of one call that all ranks make together.
struct Steps<Entry: StepRecord> {
    private let gathering: Gathering
    private var step: Int64 = 0

    init(_ gathering: Gathering) { self.gathering = gathering }

    /// One step: what this rank does by itself, then everybody's record, or the same failure on all ranks as soon as one has failed.
    @discardableResult
    mutating func together(_ act: (inout Entry) throws(Failure) -> Void) throws(Failure) -> Meeting<Entry> {
        step += 1
        var mine = Entry(rank: gathering.rank, step: step)
        do throws(Failure) { try act(&mine) } catch { mine.failure = error }
        let all = try Meeting(mine, gathering, "a step")
        try all.checkOrder()
        try all.equal("gather", { all.records[$0].step }, { "step \(all.records[$0].step) of \(Entry.call)" })
        let failed = all.records.compactMap { record in record.failure.map { (rank: record.rank, failure: $0) } }
        // Where a rank has failed others wait for it in vain, so that theirs is not the reason.
        guard let cause = failed.first(where: { Int($0.failure.status) != LPLB_ERROR_TIMEOUT }) ?? failed.first else {
            if let own = mine.failure { throw own }  // which the gather has lost
            return all
        }
        let isRule = Int(cause.failure.status) == LPLB_ERROR_INVALID_ARGUMENT
        let more = failed.count > 1 ? " (and \(failed.count - 1) more)" : ""
        throw Failure(
            isRule ? LPLB_ERROR_INVALID_ARGUMENT : LPLB_ERROR_UNSUPPORTED, "rank \(cause.rank): \(cause.failure.message)\(more)")
    }
}

/// Every rank's record, in rank order. All ranks hold the same, so all come to the same conclusion and the same words.
struct Meeting<Entry: MeetingRecord> {
    let records: [Entry]

    init(_ records: [Entry]) { self.records = records }

    init(_ mine: Entry, _ gathering: Gathering, _ what: String) throws(Failure) {
        let all = try gathering.all(mine.bytes, what), size = Entry.size
        records = (0..<gathering.ranks).map { Entry(bytes: [UInt8](all[$0 * size..<($0 + 1) * size])) }
    }

    /// Throws unless everybody's record is there, in its place.
    func checkOrder() throws(Failure) {
        for (rank, record) in records.enumerated() {
            guard record.isOurs else {
                throw Failure(
                    LPLB_ERROR_DISAGREEMENT, "gather: must bring what this version of lplb wrote, got other bytes from rank \(rank)")
            }
            guard record.rank == Int64(rank) else {
                throw Failure(
                    "gather", "must bring the ranks in order, entry \(rank) of rank \(rank)", value: "that of rank \(record.rank)")
            }
        }
    }

    /// Throws where ranks have different numbers.
    func checkNumbers() throws(Failure) {
        for (index, name) in Entry.numbers.enumerated() {
            try equal(name, { records[$0].number(index) }, { records[$0].words(ofNumber: index) })
        }
    }

    /// Throws if not all ranks have the same value; most ranks are taken to be right.
    func equal<Value: Hashable>(_ name: String, _ value: (Int) -> Value, _ words: (Int) -> String) throws(Failure) {
        let ranks = records.indices
        guard let odd = ranks.first(where: { value($0) != value(0) }) else { return }
        var count: [Value: Int] = [:]
        for rank in ranks { count[value(rank), default: 0] += 1 }
        let common = count[value(odd), default: 0] > count[value(0), default: 0] ? odd : 0
        let others = ranks.filter { value($0) != value(common) }
        let more = others.count > 1 ? " (differing: \(listed(others)))" : ""
        throw Failure(
            LPLB_ERROR_DISAGREEMENT,
            "\(name): must be equal on all ranks, got \(words(others[0])) on rank \(others[0]) "
                + "and \(words(common)) on rank \(common)\(more)")
    }

    // MARK: Hosts

    var nHosts: Int { Set(records.map(\.host)).count }

    /// The hosts as nodes, where the ranks of each are consecutive and as many; else 1: then no rank is preferred to another.
    var nNodes: Int {
        let starts = records.indices.filter { $0 == 0 || records[$0].host != records[$0 - 1].host }
        let hosts = nHosts
        guard starts.count == hosts, records.count % hosts == 0 else { return 1 }
        let perHost = records.count / hosts
        return starts.allSatisfy { $0 % perHost == 0 } ? hosts : 1
    }

    var allOnCuda: Bool { records.allSatisfy(\.isOnCuda) }
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
