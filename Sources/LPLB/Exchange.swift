// The object behind an lplb_exchange handle: one rank's side of the exchange of counts. The protocol is in cuda/exchange_view.h.

import CLPLB
import CLPLBKernels
import Synchronization

/// A checked lplb_exchange_config.
struct ExchangeSettings {
    let device: Int32
    let ranks: Int
    let rank: Int
    let counts: Int
    let nodes: Int
    let node: Int
    let firstEpoch: UInt32
    let rail: lplb_rail_ops?

    /// 8-byte words of the buffer that the peers write.
    var bufferWords: Int64 { lplbk_exchange_buffer_words(Int64(ranks), Int64(nodes), Int64(counts)) }

    init(_ config: lplb_exchange_config) throws(Failure) {
        device = Int32(try Check.range(Int64(config.device), "device", 0...Int64(Int32.max)))
        ranks = try Check.range(config.n_ranks, "n_ranks", 1...Int64(LPLB_EXCHANGE_MAX_RANKS))
        rank = try Check.range(config.rank, "rank", 0...Int64(ranks - 1))
        counts = try Check.range(config.n_counts, "n_counts", 1...Int64(LPLB_MAX_LOGICAL) + 1)
        nodes = try Check.range(config.n_nodes, "n_nodes", 1...Int64(LPLB_EXCHANGE_MAX_NODES))
        node = try Check.range(config.node, "node", 0...Int64(nodes - 1))
        firstEpoch = UInt32(try Check.range(config.first_epoch, "first_epoch", 0...Int64(UInt32.max)))
        guard let given = config.rail else {
            guard nodes == 1 else { throw Failure("rail", "must not be NULL when n_nodes is above 1", value: "NULL") }
            rail = nil
            return
        }
        rail = try ExchangeSettings.rail(given)
    }

    static func rail(_ given: UnsafePointer<lplb_rail_ops>) throws(Failure) -> lplb_rail_ops {
        let rail = try StructSize.read(given, "rail", size: "rail.struct_size")
        guard rail.all_gather != nil else { throw Failure("rail.all_gather", "must not be NULL", value: "NULL") }
        return rail
    }
}

final class Exchange {
    private enum Stage { case begun, ready, closed }

    let settings: ExchangeSettings
    /// What the kernels get; its address stays, its limits may change.
    let view: UnsafeMutablePointer<lplbk_exchange_view>
    /// Shared with the device; stays as long as this object, since planners may ask what ended the exchange.
    private var host: UnsafeMutablePointer<lplbk_exchange_host>?

    /// How many planners were attached so far.
    var attachments: Int64 = 0

    private let cuda: lplbk_backend
    private var stage = Stage.begun
    /// The buffer that peers write, if it is ours to free.
    private var ownBuffer: UnsafeMutableRawPointer?
    private var imported: [UnsafeMutableRawPointer] = []
    /// Device memory: counts of the planner that runs [counts], what the rail brings [nodes][counts], everybody's [nodes * ranks][counts].
    private var scratch: UnsafeMutableRawPointer?
    /// Entered in the settings' rail only once the exchange exists, since it then owns the context.
    private var ownsRail = false

    /// The host has asked for an end of all waiting.
    private let aborted = Atomic<Bool>(false)
    /// LPLB_EXCHANGE_*: what the rail said when it was called.
    private let railCode = Atomic<Int32>(Int32(LPLB_EXCHANGE_FINE))

    private let gate = Gate()
    private let words: UnsafeMutablePointer<CChar>
    private static let wordsSize = 1024

    private init(_ settings: ExchangeSettings, policy: Int32, timeoutMs: Int64) throws(Failure) {
        self.settings = settings
        cuda = try cudaKernels("device \(settings.device)")
        let (policy, timeout) = try Exchange.limits(policy: policy, timeoutMs: timeoutMs)
        view = .allocate(capacity: 1)
        view.initialize(to: lplbk_exchange_view())
        words = .allocate(capacity: Exchange.wordsSize)
        words[0] = 0
        view.pointee.timeout_ns = timeout
        view.pointee.policy = policy
        view.pointee.rank = Int32(settings.rank)
        view.pointee.n_ranks = Int32(settings.ranks)
        view.pointee.n_nodes = Int32(settings.nodes)
        view.pointee.n_counts = Int32(settings.counts)
        view.pointee.n_words = Int32(settings.nodes * settings.counts)
        view.pointee.n_packets = (view.pointee.n_words + 1) / 2
        view.pointee.rail_failed = UInt64(UInt(bitPattern: settings.rail?.failed))
        var info = lplbk_device_info()
        try check(cuda.device_info(settings.device, &info), "device \(settings.device)")
        try check(cuda.exchange_open(settings.device, settings.firstEpoch, view, &host), "lplb_exchange: state")
        let words = settings.counts * (1 + settings.nodes + settings.nodes * settings.ranks)
        try check(cuda.alloc(settings.device, Int64(words * 4), &scratch), "lplb_exchange: scratch memory")
    }

    deinit {
        endNow()
        if let host { _ = cuda.exchange_close(settings.device, view, host) }
        view.deallocate()
        words.deallocate()
    }

    /// From pointers to everybody's buffers, the own one among them.
    convenience init(_ config: lplb_exchange_config, buffers: UnsafePointer<UnsafeMutableRawPointer?>) throws(Failure) {
        let settings = try ExchangeSettings(config)
        try self.init(settings, policy: config.policy, timeoutMs: config.timeout_ms)
        for peer in 0..<settings.ranks {
            guard let buffer = buffers[peer] else { throw Failure("buffers[\(peer)]", "must not be NULL", value: "NULL") }
            try Check.aligned(buffer, "buffers[\(peer)]", to: 16)
            setPeer(peer, buffer)
        }
        let filled = cuda.exchange_fill(settings.device, buffers[settings.rank], settings.bufferWords, settings.firstEpoch)
        try check(filled, "buffers[\(settings.rank)]: cannot be filled")
        stage = .ready
        ownsRail = true
    }

    /// With a buffer of its own, to be mapped by the peers once they have its blob.
    convenience init(_ config: lplb_exchange_config) throws(Failure) {
        let settings = try ExchangeSettings(config)
        try self.init(settings, policy: config.policy, timeoutMs: config.timeout_ms)
        let made = cuda.exchange_alloc(settings.device, settings.bufferWords, settings.firstEpoch, &ownBuffer)
        try check(made, "lplb_exchange_begin: buffer of \(settings.bufferWords * 8) bytes")
        setPeer(settings.rank, ownBuffer)
    }

    /// The last step of lplb_exchange_begin, after which nothing can fail.
    func adoptRail() { ownsRail = true }

    /// An exchange that is refused leaves the rail to the caller.
    func leave() {
        ownsRail = false
        close()
    }

    // MARK: Peers

    private func setPeer(_ peer: Int, _ buffer: UnsafeMutableRawPointer?) {
        UnsafeMutableRawPointer(view).storeBytes(of: UInt64(UInt(bitPattern: buffer)), toByteOffset: 8 * peer, as: UInt64.self)
    }

    func blob() throws(Failure) -> ExchangeBlob {
        var blob = ExchangeBlob(settings, buffer: ownBuffer)
        try check(blob.identify(settings.device, cuda), "lplb_exchange_begin: identity of device \(settings.device)")
        try check(blob.export(settings.device, ownBuffer, cuda), "lplb_exchange_begin: the buffer cannot be exported by CUDA IPC")
        return blob
    }

    /// Maps the buffers behind everybody's blobs, in rank order.
    func finish(_ blobs: UnsafeRawPointer) throws(Failure) {
        guard stage == .begun, ownBuffer != nil, imported.isEmpty else {
            throw Failure(LPLB_ERROR_WRONG_ORDER, "lplb_exchange_finish: comes once, after lplb_exchange_begin")
        }
        let own = try blob()
        for peer in 0..<settings.ranks {
            let theirs = ExchangeBlob(blobs + peer * Int(LPLB_EXCHANGE_BLOB_BYTES))
            try theirs.check(entry: peer, against: own)
            if peer == settings.rank { continue }
            let (buffer, isImported) = try theirs.mapped(for: settings, of: peer, "lplb_exchange_finish", cuda)
            if isImported { imported.append(buffer) }
            setPeer(peer, buffer)
        }
        stage = .ready
    }

    // MARK: Calls

    /// Whether calls are possible, and no earlier one has failed.
    func requireReady() throws(Failure) {
        guard stage == .ready else {
            let reason = stage == .begun ? "lplb_exchange_finish has not succeeded" : "it is closed"
            throw Failure(LPLB_ERROR_WRONG_ORDER, "exchange: cannot be used, since \(reason)")
        }
        if let fault { throw fault }
    }

    /// - Parameter compared: the counts are rows, whose last words the kernel compares.
    func allGather(
        _ counts: UnsafePointer<Int32>, _ gathered: UnsafeMutablePointer<Int32>, compared: Bool = false, stream: UnsafeMutableRawPointer?
    ) throws(Failure) {
        try requireReady()
        var brought = counts
        if let rail = settings.rail, let gather = rail.all_gather, settings.nodes > 1 {
            let target = scratchWords(at: settings.counts)
            let failed = gather(rail.context, counts, target, Int64(settings.counts), stream)
            guard failed == 0 else { throw railFailure(failed, rail) }
            brought = UnsafePointer(target)
        }
        try check(
            cuda.exchange_launch(settings.device, view, brought, gathered, compared ? counts + settings.counts - 1 : nil, 0, stream),
            "lplb_exchange_all_gather: launch")
    }

    /// The failure of a rail's call. Whoever did not come would be taken for the next call's, so a rank that is missing ends the exchange.
    private func railFailure(_ status: Int32, _ rail: lplb_rail_ops) -> Failure {
        let words = rail.error.flatMap { $0(rail.context) }.map { String(cString: $0) } ?? "no words"
        let text = "rail: the exchange with the other nodes failed (\(words))"
        switch Int(status) {
        case LPLB_ERROR_TIMEOUT: railCode.store(Int32(LPLB_EXCHANGE_TIMED_OUT), ordering: .releasing)
        case LPLB_ERROR_PEER_LOST: railCode.store(Int32(LPLB_EXCHANGE_LOST), ordering: .releasing)
        default: return fault ?? Failure(LPLB_ERROR_CUDA, text)
        }
        return Failure(Int(status), text)
    }

    /// Where a planner's own counts go before they are exchanged, and everybody's after it.
    var plannerCounts: UnsafeMutablePointer<Int32> { scratchWords(at: 0) }
    var plannerGathered: UnsafeMutablePointer<Int32> { scratchWords(at: settings.counts * (1 + settings.nodes)) }

    private func scratchWords(at word: Int) -> UnsafeMutablePointer<Int32> {
        // Allocated by init, kept until endNow(); calls come in between only.
        (scratch! + word * 4).assumingMemoryBound(to: Int32.self)
    }

    func setLimits(policy: Int32, timeoutMs: Int64) throws(Failure) {
        let (policy, timeout) = try Exchange.limits(policy: policy, timeoutMs: timeoutMs)
        view.pointee.policy = policy
        view.pointee.timeout_ns = timeout
    }

    static func limits(policy: Int32, timeoutMs: Int64) throws(Failure) -> (Int32, UInt64) {
        let policy = try Check.range(Int64(policy), "policy", Int64(LPLB_EXCHANGE_TRAP)...Int64(LPLB_EXCHANGE_REPORT))
        let ms = try Check.range(timeoutMs, "timeout_ms", 0...Int64(Int32.max))
        return (Int32(policy), UInt64(ms) * 1_000_000)
    }

    // MARK: Faults

    /// What ended the exchange, as far as it is known. Reads host memory only, from any thread.
    func report() -> lplb_exchange_report {
        var report = lplb_exchange_report()
        report.struct_size = Int64(MemoryLayout<lplb_exchange_report>.size)  // for the rail, which may know another version
        report.rank = Int32(settings.rank)
        (report.peer, report.peer_node) = (-1, -1)
        let page = host.map { lplbk_report_read(lplbk_exchange_report_of($0)) } ?? lplbk_report()
        if page.code != Int32(LPLBK_EXCHANGE_FINE) {
            (report.code, report.peer, report.epoch) = (page.code, page.peer, page.epoch)
            report.waited_ns = Int64(clamping: page.waited_ns)
            if page.peer >= 0 { report.peer_node = Int32(settings.node) }
            if page.code == Int32(LPLBK_EXCHANGE_DISAGREED) {  // found among the rows of all nodes
                report.peer_node = page.peer / Int32(settings.ranks)
                report.peer = page.peer % Int32(settings.ranks)
            }
            return report
        }
        if let rail = settings.rail, ownsRail, let ask = rail.report {
            ask(rail.context, &report)
            if report.code != Int32(LPLB_EXCHANGE_FINE) {
                if report.peer_node >= 0 { report.peer = report.rank }  // the same local rank of the other node
                return report
            }
        }
        report.code = railCode.load(ordering: .acquiring)
        if report.code == Int32(LPLB_EXCHANGE_FINE), aborted.load(ordering: .acquiring) { report.code = Int32(LPLB_EXCHANGE_ABORTED) }
        return report
    }

    /// The failure of calls that come after what ended the exchange, nil while nothing did.
    var fault: Failure? {
        let report = report()
        guard report.code != Int32(LPLB_EXCHANGE_FINE) else { return nil }
        if report.code == Int32(LPLB_EXCHANGE_DISAGREED) {
            let own = settings.node * settings.ranks + settings.rank
            return disagreement(reported: "exchange", by: own, of: Int(report.peer_node) * settings.ranks + Int(report.peer))
        }
        let node = settings.nodes > 1 && report.peer_node >= 0 ? " of node \(report.peer_node)" : ""
        let peer = report.peer >= 0 ? "the counts of rank \(report.peer)\(node)" : "another rank's counts"
        let own = settings.nodes > 1 ? " of node \(settings.node)" : ""
        let waited = "rank \(report.rank)\(own) waited \(report.waited_ns / 1_000_000) ms for \(peer) in call \(report.epoch)"
        let known = report.epoch != 0 || report.peer >= 0 || report.waited_ns != 0
        switch Int(report.code) {
        case LPLB_EXCHANGE_ABORTED:
            return Failure(LPLB_ERROR_TIMEOUT, known ? "exchange: \(waited), then the host aborted it" : "exchange: the host aborted it")
        case LPLB_EXCHANGE_LOST:
            return Failure(LPLB_ERROR_PEER_LOST, "exchange: rank \(report.rank)\(own) has lost the connection to another node by its rail")
        default:
            return Failure(
                LPLB_ERROR_TIMEOUT,
                known ? "exchange: \(waited); that rank is late, stuck or gone" : "exchange: another node did not come in time by the rail")
        }
    }

    /// A failure of CUDA's after a peer was missing (policy trap) is that of the peer.
    func explaining(_ failure: Failure) -> Failure {
        guard Int(failure.status) == LPLB_ERROR_CUDA, let fault else { return failure }
        return Failure(Int(fault.status), "\(fault.message) (\(failure.message))")
    }

    /// The page first: what a rail that was aborted leaves unfinished must not travel on over NVLink.
    func abort() {
        aborted.store(true, ordering: .releasing)
        if let host { lplbk_exchange_host_abort(host) }
        if let rail = settings.rail, ownsRail { rail.abort?(rail.context) }
    }

    // MARK: The end

    private static let toClose: UInt8 = 1, toEnd: UInt8 = 2

    func close() { gate.ask(Exchange.toClose, finish) }

    /// Planners may hold the object still; what it owns goes now, or when the call that one of them is inside is over.
    func end() { gate.ask(Exchange.toEnd, finish) }

    private func finish(_ asked: UInt8) {
        if asked & Exchange.toEnd != 0 { endNow() } else { closeNow() }
    }

    private func closeNow() {
        guard stage != .closed else { return }
        stage = .closed
        cuda.exchange_settle(settings.device)
        for buffer in imported { _ = cuda.exchange_unimport(settings.device, buffer) }
        imported = []
    }

    /// Also comes when an initialiser has thrown half-way, so everything is optional here.
    private func endNow() {
        closeNow()
        if let rail = settings.rail, ownsRail { rail.destroy?(rail.context) }
        ownsRail = false
        _ = cuda.free(settings.device, ownBuffer)
        _ = cuda.free(settings.device, scratch)
        (ownBuffer, scratch) = (nil, nil)
    }

    // MARK: Entering and failing

    var error: UnsafePointer<CChar> { UnsafePointer(words) }

    /// Runs one call on this exchange alone; a second thread is turned away.
    func alone(_ body: () throws(Failure) -> Void) throws(Failure) {
        guard gate.enter() else { throw Failure(LPLB_ERROR_BUSY, "exchange: another thread is inside a call on it") }
        defer { gate.leave(finish) }
        try body()
    }

    /// One call of the C interface: as `alone`, and a failure of the call leaves its words (a refused thread does not own them).
    func enter(_ body: () throws(Failure) -> Void) -> lplb_status {
        do throws(Failure) {
            try alone { () throws(Failure) in
                do throws(Failure) {
                    try body()
                } catch {
                    write(error.message, to: words, size: Exchange.wordsSize)
                    throw error
                }
            }
            return lplb_status(LPLB_OK)
        } catch {
            return error.status
        }
    }
}
