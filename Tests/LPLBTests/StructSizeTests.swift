// struct_size of other versions: shorter and longer structs, those that calls read and those that they write.

import CLPLB
import Testing

@testable import LPLB

@Suite struct StructSizeTests {
    static var read: [any SizedStruct.Type] {
        [
            lplb_config.self, lplb_agree_config.self, lplb_exchange_config.self, lplb_connect_config.self, lplb_rail_ops.self,
            lplb_replicas_config.self, lplb_replicas_tensor.self, lplb_layout.self, lplb_place_config.self,
            lplb_placement_report.self,
        ]
    }
    static var written: [any SizedStruct.Type] {
        [lplb_agreement.self, lplb_plan_info.self, lplb_exchange_report.self, lplb_metrics.self]
    }

    /// Every struct of the header that has a struct_size is one of these.
    @Test func allFieldsAreNamed() {
        func check<Value: SizedStruct>(_: Value.Type) {
            // Fields stand in the header's order, without gaps but those of alignment, and the last one ends the struct.
            let starts = Value.fields.map { MemoryLayout<Value>.offset(of: $0)! } + [MemoryLayout<Value>.size]
            #expect(starts[0] == 8)
            for (start, next) in zip(starts, starts.dropFirst()) {
                #expect([4, 8].contains(next - start), "\(Value.self): \(start) to \(next)")
            }
        }
        for type in Self.read + Self.written { check(type) }
    }

    /// Bytes that no field has by default, in a struct of `size` bytes, followed by `beyond`.
    func memory(_ size: Int, beyond: UInt8, _ body: (UnsafeMutableRawPointer) throws -> Void) rethrows {
        let memory = UnsafeMutableRawPointer.allocate(byteCount: 8192, alignment: 8)
        defer { memory.deallocate() }
        memory.initializeMemory(as: UInt8.self, repeating: beyond, count: 8192)
        memory.storeBytes(of: Int64(size), as: Int64.self)
        try body(memory)
    }

    @Test(arguments: read.indices) func anOlderCallersMissingFieldsTakeTheirDefaults(which: Int) throws {
        func check<Value: SizedStruct>(_: Value.Type) throws {
            for field in Value.fields {
                let end = MemoryLayout<Value>.offset(of: field)!
                try memory(end, beyond: 0x5A) { memory in
                    let pointer = UnsafePointer(memory.assumingMemoryBound(to: Value.self))
                    let value = try StructSize.read(pointer, "config")
                    var expected = Value.defaults
                    withUnsafeMutableBytes(of: &expected) { $0.copyMemory(from: UnsafeRawBufferPointer(start: memory, count: end)) }
                    #expect(withUnsafeBytes(of: value) { [UInt8]($0) } == withUnsafeBytes(of: expected) { [UInt8]($0) })
                }
            }
        }
        try check(Self.read[which])
    }

    @Test(arguments: read.indices) func aNewerCallersRestMustBeZero(which: Int) throws {
        func check<Value: SizedStruct>(_: Value.Type) throws {
            let ours = MemoryLayout<Value>.size
            try memory(ours + 16, beyond: 0) { memory in
                let pointer = UnsafePointer(memory.assumingMemoryBound(to: Value.self))
                _ = try StructSize.read(pointer, "config")
                memory.storeBytes(of: 3, toByteOffset: ours + 9, as: UInt8.self)
                do throws(Failure) {
                    _ = try StructSize.read(pointer, "config")
                    Issue.record("it was accepted")
                } catch {
                    #expect(error.message.contains("struct_size: must end within the \(ours) bytes of \(Value.self)"), "\(error.message)")
                    #expect(error.message.hasSuffix("got \(ours + 16) with 3 in byte \(ours + 9)"), "\(error.message)")
                }
            }
        }
        try check(Self.read[which])
    }

    @Test func whatIsNoSizeIsRefusedInWords() {
        func check<Value: SizedStruct>(_: Value.Type) {
            let ours = MemoryLayout<Value>.size
            for size in [Int.min, -8, 0, 1, 7, 9, ours - 1, ours - 3, ours + 1, ours + 4, 4104, Int.max] {
                memory(size, beyond: 0) { memory in
                    do throws(Failure) {
                        _ = try StructSize.check(memory.assumingMemoryBound(to: Value.self), "out")
                        Issue.record("\(size) was accepted")
                    } catch {
                        #expect(error.message.hasPrefix("struct_size: must be sizeof(\(Value.self)), \(ours), or"), "\(error.message)")
                        #expect(error.message.hasSuffix("got \(size)"), "\(error.message)")
                    }
                }
            }
        }
        for type in Self.read + Self.written { check(type) }
    }

    @Test(arguments: written.indices) func anAnswerFillsWhatBothKnow(which: Int) throws {
        func check<Value: SizedStruct>(_: Value.Type) throws {
            let ours = MemoryLayout<Value>.size
            var full = Value.defaults
            withUnsafeMutableBytes(of: &full) { bytes in for byte in 8..<ours { bytes[byte] = 0x11 } }
            for size in Value.fields.map({ MemoryLayout<Value>.offset(of: $0)! }) + [ours, ours + 8, ours + 24] {
                try memory(size, beyond: 0x5A) { memory in
                    StructSize.write(full, to: try StructSize.check(memory.assumingMemoryBound(to: Value.self), "out"))
                    #expect(memory.load(as: Int64.self) == Int64(size))
                    for byte in 8..<ours + 48 {
                        let expected: UInt8 = byte >= size ? 0x5A : byte < ours ? 0x11 : 0
                        #expect(memory.load(fromByteOffset: byte, as: UInt8.self) == expected)
                    }
                }
            }
        }
        try check(Self.written[which])
    }

    // MARK: The calls themselves

    /// The bytes of a struct as a caller of another version has them: `size` of them, behind ours zeros but for the last byte.
    func other<Value: SizedStruct, Result>(
        _ value: Value, size: Int, last: UInt8 = 0, _ body: (UnsafeMutablePointer<Value>) throws -> Result
    ) rethrows -> Result {
        let memory = UnsafeMutableRawPointer.allocate(byteCount: size, alignment: 8)
        defer { memory.deallocate() }
        memory.initializeMemory(as: UInt8.self, repeating: 0, count: size)
        withUnsafeBytes(of: value) { memory.copyMemory(from: $0.baseAddress!, byteCount: min(size, $0.count)) }
        if size > MemoryLayout<Value>.size { memory.storeBytes(of: last, toByteOffset: size - 1, as: UInt8.self) }
        memory.storeBytes(of: Int64(size), as: Int64.self)
        return try body(memory.assumingMemoryBound(to: Value.self))
    }

    static var planner: lplb_config {
        var config = lplb_config.defaults
        (config.ep_size, config.n_logical, config.n_physical) = (1, 4, 4)
        return config
    }

    static func size<Value>(before field: PartialKeyPath<Value>) -> Int { MemoryLayout<Value>.offset(of: field)! }

    /// Statuses and words of a call with the struct cut before a field, longer with zeros, and longer with another byte.
    func tried<Value: SizedStruct>(
        _ value: Value, before field: PartialKeyPath<Value>, _ call: (UnsafePointer<Value>, inout [CChar]) -> lplb_status
    ) -> [(Int, String)] {
        let ours = MemoryLayout<Value>.size
        return [(Self.size(before: field), 0), (ours + 8, 0), (ours + 8, 9)].map { size, last in
            var words = [CChar](repeating: 0, count: 512)
            let status = other(value, size: size, last: UInt8(last)) { call($0, &words) }
            return (Int(status), words.withUnsafeBufferPointer { String(cString: $0.baseAddress!) })
        }
    }

    func expect(_ found: [(Int, String)], _ usual: lplb_status, _ name: String = "struct_size") {
        for (status, words) in found.prefix(2) { #expect(status == Int(usual) && !words.contains("struct_size"), "\(words)") }
        #expect(found[2].0 == Int(LPLB_ERROR_INVALID_ARGUMENT) && found[2].1.contains("\(name): must end within"), "\(found[2].1)")
    }

    @Test func callsThatReadAStructTakeOtherVersions() {
        expect(tried(Self.planner, before: \.number) { config, words in
            var handle: OpaquePointer?
            let status = lplb_planner_create(config, &handle, &words, 512)
            #expect((handle != nil) == (status == LPLB_OK))
            lplb_planner_destroy(handle)
            return status
        }, lplb_status(LPLB_OK))
        var exchange = lplb_exchange_config.defaults
        (exchange.n_ranks, exchange.n_counts) = (8, 256)
        expect(tried(exchange, before: \.n_nodes) { config, words in
            var bytes: Int64 = 0
            let status = lplb_exchange_buffer_bytes(config, &bytes, &words, 512)
            #expect(bytes == (status == LPLB_OK ? 2 * 8 * 128 * 16 : 0))
            return status
        }, lplb_status(LPLB_OK))
        var connect = lplb_connect_config.defaults
        (connect.n_ranks, connect.n_counts) = (1, 5)
        connect.gather = echo
        expect(tried(connect, before: \.context) { config, words in
            var handle: OpaquePointer?
            return lplb_exchange_connect(config, &handle, &words, 512)
        }, lplb_status(LPLB_ERROR_UNSUPPORTED))
        var replicas = lplb_replicas_config.defaults
        (replicas.n_logical, replicas.n_rows) = (4, 4)
        expect(tried(replicas, before: \.blocks) { config, words in
            var handle: OpaquePointer?
            return lplb_replicas_create(config, &handle, &words, 512)
        }, lplb_status(LPLB_ERROR_INVALID_ARGUMENT))  // without an exchange
    }

    /// An older caller gets the results that it knows, where fields that it does not know would name others.
    @Test func judgingAPlacementTakesOtherVersions() {
        let slots: [Int32] = [0, 1, 0, 2], loads = [4.0, 2, 2]
        var pulls: [Int64] = [9, 9], leaves = [9.0]
        slots.withUnsafeBufferPointer { slots in
            loads.withUnsafeBufferPointer { loads in
                pulls.withUnsafeMutableBufferPointer { pulls in
                    leaves.withUnsafeMutableBufferPointer { leaves in
                        var report = lplb_placement_report.defaults
                        (report.n_layers, report.n_logical, report.n_ranks, report.n_slots) = (1, 3, 2, 2)
                        (report.phy2log, report.history, report.pulls) = (slots.baseAddress, loads.baseAddress, pulls.baseAddress)
                        report.leaves_rank = leaves.baseAddress
                        expect(tried(report, before: \.leaves_rank) { report, words in
                            pulls[1] = 9
                            let status = lplb_placement_judge(report, &words, 512)
                            #expect(pulls[1] == (status == LPLB_OK ? 1 : 9))
                            let isOlder = UnsafeRawPointer(report).load(as: Int64.self) < MemoryLayout<lplb_placement_report>.size
                            #expect(!isOlder || leaves[0] == 9)
                            return status
                        }, lplb_status(LPLB_OK))
                    }
                }
            }
        }
        #expect(pulls == [0, 9] && leaves == [0.25])
    }

    @Test func placingTakesOtherVersions() {
        var config = lplb_place_config.defaults
        (config.policy, config.n_layers, config.n_logical, config.n_ranks, config.n_slots) = (Int32(LPLB_PLACE_BALANCED), 1, 2, 2, 1)
        expect(tried(config, before: \.tolerance) { config, words in
            var slots: [Int32] = [9, 9]
            let status = lplb_place(config, [1, 3], &slots, nil, &words, 512)
            #expect(Set(slots) == (status == LPLB_OK ? [0, 1] : [9]))
            return status
        }, lplb_status(LPLB_OK))
    }

    @Test func agreeingTakesOtherVersionsOfAllItsStructs() {
        func agree(_ config: UnsafePointer<lplb_agree_config>, _ agreement: UnsafeMutablePointer<lplb_agreement>, _ words: inout [CChar])
            -> lplb_status
        { lplb_agree(config, agreement, &words, 512) }
        var config = lplb_agree_config()
        (config.n_ranks, config.gather) = (1, echo)
        expect(tried(Self.planner, before: \.number) { planner, words in
            config.planner = planner
            return other(config, size: Self.size(before: \lplb_agree_config.context)) { asked in
                other(lplb_agreement(), size: MemoryLayout<lplb_agreement>.size) { agree(asked, $0, &words) }
            }
        }, lplb_status(LPLB_OK))
        withUnsafePointer(to: Self.planner) { planner in
            other(planner.pointee, size: MemoryLayout<lplb_config>.size) { planner in
                config.planner = UnsafePointer(planner)
                expect(tried(config, before: \.context) { asked, words in
                    other(lplb_agreement(), size: Self.size(before: \lplb_agreement.number)) { agreement in
                        let status = agree(asked, agreement, &words)
                        #expect(status != LPLB_OK || UnsafeRawPointer(agreement).load(fromByteOffset: 16, as: Int64.self) == 1)  // n_hosts
                        return status
                    }
                }, lplb_status(LPLB_OK))
            }
        }
    }

    @Test func aShorterPlanInfoGetsItsFieldsAlone() throws {
        let handle = try Handle(Settings())
        let ids = [Int32](repeating: 3, count: 10), size = Self.size(before: \lplb_plan_info.own_rank)
        var out = ids
        #expect(lplb_planner_run(handle.raw, ids, 0, 10, nil, &out, nil, 0, 0, nil) == LPLB_OK)
        var words = [Int64](repeating: 77, count: 16)
        words[0] = Int64(size)
        words.withUnsafeMutableBytes { memory in
            let plan = memory.baseAddress!.assumingMemoryBound(to: lplb_plan_info.self)
            #expect(lplb_planner_info(handle.raw, plan, nil, 0, nil) == LPLB_OK)
        }
        #expect(words[0...3] == [Int64(size), 1, 0, 77])
    }
}

/// The gather of a rank that is alone.
private let echo: lplb_gather = { _, mine, all, bytes in
    all!.copyMemory(from: mine!, byteCount: Int(bytes))
    return 0
}
