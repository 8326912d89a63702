// The exchange without a GPU: what ranks must agree on before memory is mapped. (Configs and NULLs: Tests/python/test_exchange.py.)

import CLPLB
import Testing

@testable import LPLB

@Suite struct ExchangeBlobTests {
    /// The blob of a rank, as another process of another host would have made it.
    static func blob(
        rank: Int64, ranks: Int64 = 4, counts: Int64 = 64, epoch: Int64 = 1, host: UInt64 = 5, process: UInt8 = 1
    ) throws -> ExchangeBlob {
        var config = lplb_exchange_config()
        config.struct_size = Int64(MemoryLayout<lplb_exchange_config>.size)
        (config.n_ranks, config.rank, config.n_counts, config.n_nodes, config.first_epoch) = (ranks, rank, counts, 1, epoch)
        let made = ExchangeBlob(try ExchangeSettings(config), buffer: UnsafeMutableRawPointer(bitPattern: 0x7000_0000_1000))
        var bytes = [UInt8](repeating: 0, count: Int(LPLB_EXCHANGE_BLOB_BYTES))
        bytes.withUnsafeMutableBytes { memory in
            made.write(to: memory.baseAddress!)
            memory.storeBytes(of: host.littleEndian, toByteOffset: 24, as: UInt64.self)
            if process != 0 { memory[56] ^= process }
        }
        return bytes.withUnsafeBytes { ExchangeBlob($0.baseAddress!) }
    }

    func refusal(of theirs: ExchangeBlob, entry: Int) throws -> (status: Int, words: String) {
        let own = try Self.blob(rank: 0)
        do throws(Failure) {
            try theirs.check(entry: entry, against: own)
        } catch {
            return (Int(error.status), error.message)
        }
        return (Int(LPLB_OK), "")
    }

    @Test func agreeingRanksPass() throws {
        for rank in 0..<4 { #expect(try refusal(of: Self.blob(rank: Int64(rank)), entry: rank) == (Int(LPLB_OK), "")) }
    }

    @Test func whatDiffersIsNamed() throws {
        let cases: [(ExchangeBlob, Int, String)] = [
            (try Self.blob(rank: 2), 3, "rank order, entry 3 of rank 3, got that of rank 2"),
            (try Self.blob(rank: 1, counts: 65), 1, "same n_counts, 64 here, got 65 of rank 1"),
            (try Self.blob(rank: 1, epoch: 2), 1, "same first_epoch, 1 here, got 2 of rank 1"),
            (try Self.blob(rank: 1, ranks: 5), 1, "same n_ranks, 4 here, got 5 of rank 1"),
            ([UInt8](repeating: 0, count: 128).withUnsafeBytes { ExchangeBlob($0.baseAddress!) }, 1, "entry 1 must come from lplb_exchange_begin"),
        ]
        for (theirs, entry, words) in cases {
            let (status, message) = try refusal(of: theirs, entry: entry)
            #expect(status == Int(LPLB_ERROR_INVALID_ARGUMENT) && message.contains(words), "\(message)")
        }
    }

    @Test func anotherHostIsBeyondIpc() throws {
        let (status, message) = try refusal(of: Self.blob(rank: 1, host: 6), entry: 1)
        #expect(status == Int(LPLB_ERROR_UNSUPPORTED) && message.contains("rank 1 is on another host than rank 0"), "\(message)")
    }

    @Test func onlyAddressesOfThisProcessAreUsedAsTheyAre() throws {
        #expect(try !Self.blob(rank: 1).isOfThisProcess)
        let own = try Self.blob(rank: 1, process: 0)
        #expect(own.isOfThisProcess && UInt(bitPattern: own.buffer) == 0x7000_0000_1000)
    }
}
