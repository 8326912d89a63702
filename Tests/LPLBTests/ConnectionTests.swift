// lplb_exchange_connect among threads that stand for ranks, with exchanges that need no GPU and fail where a test says so.

import CLPLB
import Foundation
import Testing

@testable import LPLB

/// Where ranks bring bytes and get everybody's; a rank that leaves makes the gathers of the others fail, as a broken connection does.
final class MeetingPlace: @unchecked Sendable {
    private let condition = NSCondition()
    private let ranks: Int
    private var brought: [[UInt8]], arrived = 0, round = 0, last: [UInt8] = [], lost = false

    init(ranks: Int) { (self.ranks, brought) = (ranks, Array(repeating: [], count: ranks)) }

    func leave() {
        condition.lock()
        lost = true
        condition.broadcast()
        condition.unlock()
    }

    func gather(_ rank: Int, _ mine: [UInt8]) -> [UInt8]? {
        condition.lock()
        defer { condition.unlock() }
        brought[rank] = mine
        arrived += 1
        let own = round
        if arrived == ranks {
            (last, arrived, round) = (brought.flatMap { $0 }, 0, round + 1)
            condition.broadcast()
        }
        while round == own && !lost { condition.wait() }
        return round == own ? nil : last
    }
}

/// One rank: what it gathers with, and what it does wrong.
final class Member: @unchecked Sendable {
    let rank: Int, place: MeetingPlace, trialPlace: MeetingPlace
    var fails = "", gathersUntil = Int.max, host: UInt64?
    var log: [String] = [], outcome = "", left = false

    init(_ rank: Int, _ place: MeetingPlace, _ trialPlace: MeetingPlace) {
        (self.rank, self.place, self.trialPlace) = (rank, place, trialPlace)
    }

    func failing(_ stage: String) throws(Failure) {
        if fails == stage { throw Failure(LPLB_ERROR_CUDA, "it cannot \(stage)") }
        if fails == "wait to \(stage)" { throw Failure(LPLB_ERROR_TIMEOUT, "it has waited to \(stage)") }
    }
}

final class FakeExchange: Connectable {
    let member: Member, config: lplb_exchange_config
    init(_ member: Member, _ config: lplb_exchange_config) throws(Failure) {
        (self.member, self.config) = (member, config)
        try member.failing("begin")
    }
    func blob() throws(Failure) -> ExchangeBlob {
        try member.failing("export")
        return ExchangeBlob(try ExchangeSettings(config), buffer: nil)
    }
    func finish(_ blobs: UnsafeRawPointer) throws(Failure) {
        for peer in 0..<Int(config.n_ranks) {
            let theirs = ExchangeBlob(blobs + peer * Int(LPLB_EXCHANGE_BLOB_BYTES))
            #expect(theirs.bytes[5] == UInt8(peer))  // numbered in their node
        }
        try member.failing("map")
    }
    func trial(_ counts: [Int32], calls: Int, limitMs: Int64) throws(Failure) -> [Int32] {
        #expect(config.policy == Int32(LPLB_EXCHANGE_REPORT) && limitMs == min(config.timeout_ms, 30000))
        let ranks = Int(config.n_ranks * config.n_nodes), n = counts.count / calls
        let all = member.trialPlace.gather(member.rank, counts.withUnsafeBytes { [UInt8]($0) })!
        try member.failing("count")
        var got = [Int32](repeating: 0, count: ranks * counts.count)
        all.withUnsafeBytes { bytes in
            for call in 0..<calls {
                for rank in 0..<ranks {
                    let from = (rank * calls + call) * n, to = (call * ranks + rank) * n
                    for i in 0..<n { got[to + i] = bytes.load(fromByteOffset: 4 * (from + i), as: Int32.self) }
                }
            }
        }
        if member.fails == "count right" { for call in 0..<calls { got[call * ranks * n] ^= 1 } }
        return got
    }
    func setLimits(policy: Int32, timeoutMs: Int64) { member.log.append("limits \(policy) \(timeoutMs)") }
    func leave() { member.log.append("left") }
    func end() { member.log.append("freed") }
}

@Suite struct ConnectionTests {
    /// What all ranks saw.
    func connect(_ change: (Member, inout lplb_connect_config) -> Void) -> [Member] {
        let ranks = 4
        let place = MeetingPlace(ranks: ranks), trialPlace = MeetingPlace(ranks: ranks), group = DispatchGroup()
        return (0..<ranks).map { rank in
            let member = Member(rank, place, trialPlace)
            var config = lplb_connect_config.defaults
            (config.device, config.n_ranks, config.rank, config.n_counts) = (0, Int64(ranks), Int64(rank), 8)
            config.context = Unmanaged.passUnretained(member).toOpaque()
            config.gather = { context, mine, all, bytes in
                let member = Unmanaged<Member>.fromOpaque(context!).takeUnretainedValue()
                member.gathersUntil -= 1
                guard member.gathersUntil >= 0 else {
                    member.place.leave()
                    return 7
                }
                var own = [UInt8](UnsafeRawBufferPointer(start: mine!, count: Int(bytes)))
                if let host = member.host, own.count == ConnectionRecord.size {  // as a rank of another host would
                    withUnsafeBytes(of: host.littleEndian) { own.replaceSubrange(16..<24, with: $0) }
                }
                guard let everyone = member.place.gather(member.rank, own) else { return 1 }
                all!.copyMemory(from: everyone, byteCount: everyone.count)
                return 0
            }
            change(member, &config)
            group.enter()
            nonisolated(unsafe) let given = config
            Thread.detachNewThread {
                do throws(Failure) {
                    var connection = try Connection<FakeExchange>(given)
                    do throws(Failure) {
                        let made = try connection.make { (config) throws(Failure) in try FakeExchange(member, config) }
                        member.outcome = "ok \(made.config.n_nodes) x \(made.config.n_ranks), \(made.config.node) \(made.config.rank)"
                    } catch {
                        member.left = connection.left != nil
                        throw error
                    }
                } catch {
                    member.outcome = "\(error.status) \(error.message)"
                }
                group.leave()
            }
            return member
        }.settled(group)
    }

    @Test func whatWorksIsHandedOutWithTheCallersLimits() {
        for member in connect({ _, config in (config.timeout_ms, config.policy) = (70_000, 1) }) {
            #expect(member.outcome == "ok 1 x 4, 0 \(member.rank)" && member.log == ["limits 1 70000"])
        }
    }

    @Test(arguments: [
        ("begin", "rank 2: it cannot begin", []), ("export", "rank 2: it cannot export", ["left", "freed"]),
        ("map", "rank 2: it cannot map", ["left", "freed"]), ("count", "rank 2: it cannot count", ["left", "freed"]),
        ("count right", "rank 2: 5 of 160 counts were wrong in the trial", ["left", "freed"]),
    ])
    func whatFailsOnOneRankIsRefusedAndFreedOnAll(stage: String, words: String, log: [String]) {
        for member in connect({ member, _ in if member.rank == 2 { member.fails = stage } }) {
            #expect(member.outcome == "\(LPLB_ERROR_UNSUPPORTED) \(words)" && !member.left)
            let made = stage == "begin" && member.rank != 2 ? ["left", "freed"] : log
            #expect(member.log.filter { !$0.hasPrefix("limits") } == made)
        }
    }

    @Test func severalFailuresAreCounted() {
        for member in connect({ member, _ in if member.rank != 1 { member.fails = "map" } }) {
            #expect(member.outcome == "\(LPLB_ERROR_UNSUPPORTED) rank 0: it cannot map (and 2 more)")
        }
    }

    @Test func whoWaitedInVainIsNotTheReason() {
        for member in connect({ member, _ in member.fails = ["wait to count", "wait to count", "count", ""][member.rank] }) {
            #expect(member.outcome == "\(LPLB_ERROR_UNSUPPORTED) rank 2: it cannot count (and 2 more)")
        }
    }

    @Test(arguments: [
        ("aabb", 0, true, "ok 2 x 2"), ("aaaa", 4, true, "ok 4 x 1"), ("aabb", 2, true, "ok 2 x 2"),
        ("aabb", 0, false, "2 the ranks form 2 nodes, and there is no rail between them"),
        ("abab", 0, true, "2 the ranks of 2 hosts are not consecutive or not as many on each"),
        ("aaab", 0, true, "2 the ranks of 2 hosts are not consecutive or not as many on each"),
        ("aabb", 1, true, "2 ranks 0 and 2 of one node are on different hosts, and CUDA IPC stays on one"),
        ("aabb", 4, true, "ok 4 x 1"), ("aaaa", 3, true, "1 rank 0: n_nodes: must divide n_ranks, 4, got 3 (and 3 more)"),
    ] as [(String, Int64, Bool, String)])
    func hostsBecomeNodes(hosts: String, nodes: Int64, rail: Bool, outcome: String) {
        var ops = lplb_rail_ops()
        ops.struct_size = Int64(MemoryLayout<lplb_rail_ops>.size)
        ops.all_gather = { _, _, _, _, _ in 0 }
        withUnsafePointer(to: ops) { ops in
            for member in connect({ member, config in
                member.host = UInt64(Array(hosts.utf8)[member.rank])
                config.n_nodes = nodes
                if rail { config.rail = ops }
            }) {
                #expect(member.outcome.hasPrefix(outcome), "\(member.outcome)")
            }
        }
    }

    @Test func whatDiffersIsSaidAlike() {
        let cases: [(String, (inout lplb_connect_config) -> Void)] = [
            ("n_counts: must be equal on all ranks, got 9 on rank 3 and 8 on rank 0", { $0.n_counts = 9 }),
            ("first_epoch: must be equal on all ranks, got 5 on rank 3 and 1 on rank 0", { $0.first_epoch = 5 }),
            ("policy: must be equal on all ranks, got 1 on rank 3 and 0 on rank 0", { $0.policy = 1 }),
            ("n_nodes: must be equal on all ranks, got 2 on rank 3 and 0 on rank 0", { $0.n_nodes = 2 }),
        ]
        for (words, change) in cases {
            for member in connect({ member, config in if member.rank == 3 { change(&config) } }) {
                #expect(member.outcome == "\(LPLB_ERROR_DISAGREEMENT) \(words)" && member.log.isEmpty, "\(member.outcome)")
            }
        }
    }

    @Test func aBrokenRuleAndARanksOwnFailureReachAll() {
        for member in connect({ member, config in if member.rank == 1 { config.policy = 2 } }) {
            #expect(member.outcome == "\(LPLB_ERROR_INVALID_ARGUMENT) rank 1: policy: must lie in 0 ... 1, got 2")
        }
        for member in connect({ _, config in config.n_counts = 5000 }) {  // which other means may carry
            #expect(member.outcome.hasPrefix("\(LPLB_ERROR_UNSUPPORTED) rank 0: n_counts: must be at most 4097 over NVLink, got 5000"))
        }
        "no rail here".withCString { words in
            for member in connect({ member, config in if member.rank == 1 { config.failure = words } }) {
                #expect(member.outcome == "\(LPLB_ERROR_UNSUPPORTED) rank 1: no rail here" && member.log.isEmpty)
            }
        }
        for member in connect({ member, config in if member.rank % 2 == 1 { config.device = -1 } }) {
            #expect(member.outcome == "\(LPLB_ERROR_UNSUPPORTED) NVLink joins GPUs, and ranks 1, 3 are on the CPU")
        }
    }

    /// The gathers are: what is wanted, blobs, mapped, counts of the trial, tried.
    @Test(arguments: 0..<5) func aLostRankIsToldAndMemoryThatOthersMayWriteIsKept(gathers: Int) {
        for member in connect({ member, _ in if member.rank == 1 { member.gathersUntil = gathers } }) {
            #expect(member.outcome.hasPrefix("\(LPLB_ERROR_PEER_LOST) gather: must bring"), "\(member.outcome)")
            #expect(member.left == (gathers > 0) && !member.log.contains("freed"))
        }
    }

    @Test func aLostRankWhileAllTakeBackIsToldToo() {
        let members = connect { member, _ in
            if member.rank == 1 { (member.fails, member.gathersUntil) = ("map", 3) }
        }
        for member in members {
            #expect(member.outcome.hasPrefix("\(LPLB_ERROR_PEER_LOST) gather: must bring the end of a refused"), "\(member.outcome)")
            #expect(member.left && member.log == ["left"])
        }
    }

    @Test func aGatherThatLosesWhatIsWrongHereChangesNothing() throws {
        var config = lplb_connect_config.defaults
        (config.device, config.n_ranks, config.n_counts, config.n_nodes) = (0, 1, 8, .min)
        config.gather = { _, mine, all, bytes in
            all!.copyMemory(from: mine!, byteCount: Int(bytes))
            all!.storeBytes(of: 0, toByteOffset: 32, as: Int64.self)  // the status of the failure
            return 0
        }
        var connection = try Connection<FakeExchange>(config)
        #expect(throws: Failure.self) {
            try connection.make { (_) throws(Failure) in throw Failure(LPLB_ERROR_INTERNAL, "it must not come so far") }
        }
    }

    @Test func aWatchdogBarksOnceItIsLate() {
        let barked = Flag()
        let late = Watchdog(afterMs: 20) { barked.set() }
        while !barked.isSet { usleep(1000) }
        late.end()
        let quiet = Flag()
        Watchdog(afterMs: 60_000) { quiet.set() }.end()
        #expect(!quiet.isSet)
    }
}

private final class Flag: @unchecked Sendable {
    private let lock = NSLock()
    private var value = false
    func set() { lock.withLock { value = true } }
    var isSet: Bool { lock.withLock { value } }
}

extension [Member] {
    fileprivate func settled(_ group: DispatchGroup) -> Self {
        #expect(group.wait(timeout: .now() + 60) == .success)
        return self
    }
}
