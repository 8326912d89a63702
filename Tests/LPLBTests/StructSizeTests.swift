// struct_size of other versions: shorter and longer structs, those that calls read and those that they write.

import CLPLB
import Testing

@testable import LPLB

@Suite struct StructSizeTests {
    static var read: [any SizedStruct.Type] {
        [lplb_config.self, lplb_agree_config.self, lplb_exchange_config.self, lplb_connect_config.self, lplb_rail_ops.self]
    }
    static var written: [any SizedStruct.Type] { [lplb_agreement.self, lplb_plan_info.self, lplb_exchange_report.self] }

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
}
