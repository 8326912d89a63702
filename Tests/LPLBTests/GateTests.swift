// One thread at a time, and an end that waits for it: the gate, and what a rail's older callers hand over.

import CLPLB
import CLPLBKernels
import Foundation
import Synchronization
import Testing

@testable import LPLB

/// What a gate guards: counts the ends, and whether two threads were ever at it at once.
private final class Guarded: Sendable {
    let gate = Gate()
    let inside = Atomic<Int>(0)
    let overlaps = Atomic<Int>(0)
    let ends = Atomic<Int>(0)

    func call() {
        guard gate.enter() else { return }
        if inside.add(1, ordering: .relaxed).newValue != 1 { overlaps.add(1, ordering: .relaxed) }
        inside.subtract(1, ordering: .relaxed)
        gate.leave(finish)
    }

    func finish(_ what: UInt8) {
        if inside.add(1, ordering: .relaxed).newValue != 1 { overlaps.add(1, ordering: .relaxed) }
        ends.add(1, ordering: .relaxed)
        inside.subtract(1, ordering: .relaxed)
    }
}

@Suite struct GateTests {
    @Test func whatIsAskedForFromInsideIsDoneOnLeaving() {
        let gate = Gate()
        var done: [UInt8] = []
        let first = gate.enter(), second = gate.enter()
        #expect(first && !second)
        gate.ask(1) { done.append($0) }
        gate.ask(2) { done.append($0) }
        #expect(done.isEmpty)
        gate.leave { done.append($0) }
        #expect(done == [3])
        gate.ask(1) { done.append($0) }
        #expect(done == [3, 1])
        let again = gate.enter()
        #expect(again)
    }

    @Test func nothingEndsUnderACallAndNoRequestIsLost() {
        for _ in 0..<200 {
            let guarded = Guarded()
            DispatchQueue.concurrentPerform(iterations: 3) { thread in
                for call in 0..<40 {
                    guarded.call()
                    if thread == 0 && call == 20 { guarded.gate.ask(2, guarded.finish) }
                }
            }
            let ends = guarded.ends.load(ordering: .relaxed), overlaps = guarded.overlaps.load(ordering: .relaxed)
            #expect(ends == 1 && overlaps == 0)
        }
    }
}

@Suite struct RailOpsTests {
    /// The settings of a config whose rail is the first `size` bytes of a struct that is followed by `beyond`.
    func settings(size: Int, beyond: Int64 = 0) throws -> ExchangeSettings {
        var ops = lplb_rail_ops()
        ops.struct_size = Int64(size)
        ops.all_gather = { _, _, _, _, _ in 0 }
        ops.abort = { _ in }
        ops.report = { _, _ in }
        ops.failed = UnsafePointer(bitPattern: 4096)
        var words = [Int64](repeating: beyond, count: 16)
        withUnsafeBytes(of: ops) { source in words.withUnsafeMutableBytes { $0.copyMemory(from: source) } }
        return try words.withUnsafeBytes { bytes in
            var config = lplb_exchange_config()
            config.struct_size = Int64(MemoryLayout<lplb_exchange_config>.size)
            (config.n_ranks, config.rank, config.n_counts, config.n_nodes, config.first_epoch) = (2, 0, 8, 2, 1)
            config.rail = bytes.baseAddress!.assumingMemoryBound(to: lplb_rail_ops.self)
            return try ExchangeSettings(config)
        }
    }

    @Test func fieldsThatAnOlderCallerLacksAreNull() throws {
        let all = try #require(try settings(size: MemoryLayout<lplb_rail_ops>.size).rail)
        #expect(all.abort != nil && all.report != nil && all.failed != nil)
        let first = try #require(try settings(size: 40).rail)
        #expect(first.all_gather != nil && first.abort == nil && first.report == nil && first.failed == nil)
        let second = try #require(try settings(size: 48).rail)
        #expect(second.abort != nil && second.report == nil && second.failed == nil)
    }

    @Test func whatANewerCallerHasMustBeZero() throws {
        let size = MemoryLayout<lplb_rail_ops>.size + 8
        #expect(try settings(size: size).rail?.abort != nil)
        #expect(throws: Failure.self) { try settings(size: size, beyond: 1) }
        // 8: without all_gather there is no rail.
        for size in [0, 8, 41, -8, 8192] { #expect(throws: Failure.self) { try settings(size: size) } }
    }

    @Test func thePageIsReadOnlyOnceItsCodeIsThere() {
        var page = lplbk_exchange_host()
        (page.report.rank, page.report.peer, page.report.epoch, page.report.waited_ns) = (3, 5, 7, 11)
        let early = lplbk_report_read(&page.report)
        #expect(early.code == 0 && early.rank == 0 && early.peer == 0 && early.epoch == 0 && early.waited_ns == 0)
        page.report.code = 1
        let whole = lplbk_report_read(&page.report)
        #expect(whole.code == 1 && whole.rank == 3 && whole.peer == 5 && whole.epoch == 7 && whole.waited_ns == 11)
        lplbk_exchange_host_abort(&page)
        #expect(page.abort == 1)
    }
}
