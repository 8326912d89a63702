// Connection: all ranks make one exchange together, try it, and come to the same conclusion.

import CLPLB

/// What can be connected: an exchange that has a buffer of its own. Each call is local and may fail on one rank alone.
protocol Connectable: AnyObject {
    func blob() throws(Failure) -> ExchangeBlob
    /// Maps the buffers behind the blobs of this node's ranks.
    func finish(_ blobs: UnsafeRawPointer) throws(Failure)
    /// What calls with these counts, [calls][counts], bring: [calls][ranks of all nodes][counts]. Comes back within the limit.
    func trial(_ counts: [Int32], calls: Int, limitMs: Int64) throws(Failure) -> [Int32]
    func setLimits(policy: Int32, timeoutMs: Int64) throws(Failure)
    /// Ends the use of the peers' memory, and leaves the rail to the caller.
    func leave()
    /// Frees the own memory; no rank uses it any more.
    func end()
}

/// One rank in a step: 96 its blob [128].
struct ConnectionRecord: StepRecord {
    static let magic: UInt32 = 0x4C_50_43_4E
    static let call = "lplb_exchange_connect"
    static let numbers = ["n_counts", "n_nodes", "first_epoch", "policy", "rail"]

    var bytes: [UInt8]

    init(bytes: [UInt8]) { self.bytes = bytes }

    func words(ofNumber index: Int) -> String {
        ConnectionRecord.numbers[index] == "rail" ? (number(index) == 0 ? "none" : "one") : String(number(index))
    }
}

/// One call of lplb_exchange_connect.
struct Connection<Made: Connectable> {
    private static var calls: Int { 5 }
    private static var longestTrialMs: Int64 { 30_000 }

    private let config: lplb_connect_config
    private let gathering: Gathering
    private var steps: Steps<ConnectionRecord>
    /// After a failed gather: what others may still write to.
    private(set) var left: Made?

    init(_ config: lplb_connect_config) throws(Failure) {
        self.config = config
        gathering = try Gathering(config.gather, config.context, ranks: config.n_ranks, rank: config.rank)
        steps = Steps(gathering)
    }

    /// The exchange, once it works on all ranks. Throws on all of them alike, unless a gather failed (LPLB_ERROR_PEER_LOST).
    mutating func make(_ make: (lplb_exchange_config) throws(Failure) -> Made) throws(Failure) -> Made {
        let nodes = try agree(), perNode = gathering.ranks / nodes, node = gathering.rank / perNode
        let trialMs = config.timeout_ms == 0 ? Self.longestTrialMs : min(config.timeout_ms, Self.longestTrialMs)
        var wanted = lplb_exchange_config.defaults
        wanted.struct_size = Int64(MemoryLayout<lplb_exchange_config>.size)
        (wanted.device, wanted.policy, wanted.timeout_ms) = (config.device, Int32(LPLB_EXCHANGE_REPORT), trialMs)
        (wanted.n_ranks, wanted.rank) = (Int64(perNode), Int64(gathering.rank % perNode))
        (wanted.n_nodes, wanted.node) = (Int64(nodes), Int64(node))
        (wanted.n_counts, wanted.first_epoch, wanted.rail) = (config.n_counts, config.first_epoch, config.rail)
        var made: Made?
        do throws(Failure) {
            let all = try steps.together { (mine) throws(Failure) in
                let new = try make(wanted)
                made = new
                mine.put(try new.blob())
            }
            guard let made else { throw Failure(LPLB_ERROR_INTERNAL, "lplb_exchange_connect: an exchange that was not made") }
            let blobs = all.records[node * perNode..<(node + 1) * perNode].flatMap(\.blob)
            try steps.together { (_) throws(Failure) in try blobs.withBytes { (memory) throws(Failure) in try made.finish(memory) } }
            try attempt(made, limitMs: trialMs)
            return made
        } catch {
            throw takeBack(made, after: error)
        }
    }

    /// Uses the exchange, and compares what it brings with what the caller's function brings. Then the caller's limits hold.
    private mutating func attempt(_ made: Made, limitMs: Int64) throws(Failure) {
        let calls = Self.calls, counts = Int(config.n_counts), ranks = gathering.ranks
        var hash = Hash()
        hash.add(Int64(gathering.rank))
        let mine = (0..<calls * counts).map { (index) -> Int32 in
            hash.add(Int64(index))
            return Int32(truncatingIfNeeded: hash.value)
        }
        let bytes = try gathering.all(mine.withUnsafeBytes { [UInt8]($0) }, "the counts of the trial")
        let config = config
        try steps.together { (_) throws(Failure) in
            let got = try made.trial(mine, calls: calls, limitMs: limitMs)
            let wrong = bytes.withUnsafeBytes { memory in
                let wanted = memory.bindMemory(to: Int32.self)  // [ranks][calls][counts]
                return (0..<got.count).count { index in
                    let call = index / (ranks * counts), rank = index / counts % ranks
                    return got[index] != wanted[(rank * calls + call) * counts + index % counts]
                }
            }
            guard wrong == 0 else { throw Failure(LPLB_ERROR_INTERNAL, "\(wrong) of \(got.count) counts were wrong in the trial") }
            try made.setLimits(policy: config.policy, timeoutMs: config.timeout_ms)
        }
    }

    /// All ranks stop using each other's memory, then all free theirs. Returns the failure to report: another one where this gather fails.
    private mutating func takeBack(_ made: Made?, after failure: Failure) -> Failure {
        made?.leave()
        do throws(Failure) {
            if Int(failure.status) == LPLB_ERROR_PEER_LOST { throw failure }
            _ = try gathering.all([UInt8](repeating: 0, count: ConnectionRecord.size), "the end of a refused exchange")
            made?.end()
            return failure
        } catch {
            left = made
            return error
        }
    }

    /// Compares what the ranks want, and returns the number of nodes.
    private mutating func agree() throws(Failure) -> Int {
        let config = config, ranks = gathering.ranks
        let all = try steps.together { (mine) throws(Failure) in
            if let words = config.failure { throw Failure(LPLB_ERROR_UNSUPPORTED, String(cString: words)) }
            _ = try Check.range(Int64(config.device), "device", Int64(LPLB_DEVICE_CPU)...Int64(Int32.max))
            _ = try Exchange.limits(policy: config.policy, timeoutMs: config.timeout_ms)
            let most = Int64(LPLB_MAX_LOGICAL) + 1
            _ = try Check.range(config.n_counts, "n_counts", 1...Int64.max)
            guard config.n_counts <= most else {
                throw Failure(LPLB_ERROR_UNSUPPORTED, "n_counts: must be at most \(most) over NVLink, got \(config.n_counts)")
            }
            _ = try Check.range(config.first_epoch, "first_epoch", 0...Int64(UInt32.max))
            let nodes = try Check.range(config.n_nodes, "n_nodes", 0...Int64(ranks))
            guard nodes == 0 || ranks % nodes == 0 else { throw Failure("n_nodes", "must divide n_ranks, \(ranks)", value: nodes) }
            if let rail = config.rail { _ = try ExchangeSettings.rail(rail) }
            mine.isOnCuda = config.device >= 0
            mine.put(numbers: [config.n_counts, config.n_nodes, config.first_epoch, Int64(config.policy), config.rail == nil ? 0 : 1])
        }
        try all.checkNumbers()
        return try all.nodes(given: Int(config.n_nodes), rail: config.rail != nil)
    }
}

extension Meeting<ConnectionRecord> {
    /// How many NVLink domains the ranks form, or why CUDA IPC cannot join them.
    func nodes(given: Int, rail: Bool) throws(Failure) -> Int {
        func refusal(_ reason: String) -> Failure { Failure(LPLB_ERROR_UNSUPPORTED, reason) }
        let onCpu = records.indices.filter { !records[$0].isOnCuda }
        guard onCpu.isEmpty else {
            throw refusal("NVLink joins GPUs, and \(listed(onCpu)) \(onCpu.count == 1 ? "is" : "are") on the CPU")
        }
        let nodes = given == 0 ? nNodes : given, perNode = records.count / nodes
        for rank in records.indices {
            let first = rank / perNode * perNode
            guard records[rank].host == records[first].host else {
                throw refusal(
                    given == 0
                        ? "the ranks of \(nHosts) hosts are not consecutive or not as many on each"
                        : "ranks \(first) and \(rank) of one node are on different hosts, and CUDA IPC stays on one")
            }
        }
        guard perNode <= Int(LPLB_EXCHANGE_MAX_RANKS), nodes <= Int(LPLB_EXCHANGE_MAX_NODES) else {
            throw refusal("\(nodes) nodes of \(perNode) ranks are more than \(LPLB_EXCHANGE_MAX_NODES) of \(LPLB_EXCHANGE_MAX_RANKS)")
        }
        guard nodes == 1 || rail else { throw refusal("the ranks form \(nodes) nodes, and there is no rail between them") }
        return nodes
    }
}

extension [UInt8] {
    fileprivate func withBytes(_ body: (UnsafeRawPointer) throws(Failure) -> Void) throws(Failure) {
        let result = withUnsafeBytes { (memory) -> Result<Void, Failure> in
            do throws(Failure) { return .success(try body(memory.baseAddress!)) } catch { return .failure(error) }
        }
        try result.get()
    }
}
