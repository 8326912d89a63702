// What ranks learn of each other before their planners are made: hosts, numbers, and words that are the same on all of them.

import CLPLB
import Testing

@testable import LPLB

@Suite struct AgreementTests {
    /// The record of a rank on host `host`.
    static func record(_ rank: Int, of ranks: Int, host: UInt64 = 1, number: Int64 = 1, nNodes: Int64 = 0) -> AgreementRecord {
        var planner = lplb_config()
        planner.struct_size = Int64(MemoryLayout<lplb_config>.size)
        (planner.device, planner.rank, planner.ep_size, planner.n_nodes) = (-1, Int64(rank), Int64(ranks), nNodes)
        (planner.n_logical, planner.n_physical, planner.number) = (Int64(4 * ranks), Int64(4 * ranks), number)
        var record = withUnsafePointer(to: &planner) { planner in
            var config = lplb_agree_config()
            (config.planner, config.n_ranks, config.rank) = (planner, Int64(ranks), Int64(rank))
            return AgreementRecord(config)
        }
        record.put(host, at: 16)
        return record
    }

    static func agreement(hosts: [UInt64]) -> Agreement {
        Agreement(hosts.indices.map { record($0, of: hosts.count, host: hosts[$0]) })
    }

    @Test(arguments: [
        ([7, 7, 7, 7], 1, 1), ([7, 7, 8, 8], 2, 2), ([7, 8, 9, 10], 4, 4),
        ([7, 8, 7, 8], 2, 1),  // not consecutive
        ([7, 7, 7, 8], 2, 1),  // not as many on each
        ([7, 7, 8, 8, 8, 8], 2, 1), ([7, 7, 8, 8, 7, 7], 2, 1),
    ] as [([UInt64], Int, Int)])
    func ranksLieOnHosts(hosts: [UInt64], nHosts: Int, nNodes: Int) throws {
        let all = Self.agreement(hosts: hosts)
        try all.check()
        #expect(all.nHosts == nHosts && all.nNodes == nNodes)
    }

    @Test func thisHostHasOneIdentity() { #expect(hostIdentity() == hostIdentity() && hostIdentity() != Hash().value) }

    @Test func numbersMayDiffer() throws {
        let all = Agreement([3, 9, 4].enumerated().map { Self.record($0, of: 3, number: $1) })
        try all.check()
        #expect(all.number == 9)
    }

    func words(_ records: [AgreementRecord]) -> (Int, String) {
        do throws(Failure) {
            try Agreement(records).check()
        } catch {
            return (Int(error.status), error.message)
        }
        return (Int(LPLB_OK), "")
    }

    @Test func mostRanksAreRight() {
        let nodes: [Int64] = [2, 1, 1, 2, 1, 1]
        let (status, message) = words(nodes.enumerated().map { Self.record($0, of: 6, nNodes: $1) })
        #expect(status == Int(LPLB_ERROR_DISAGREEMENT))
        #expect(message == "n_nodes: must be equal on all ranks, got 2 on rank 0 and 1 on rank 1 (differing: ranks 0, 3)")
    }

    @Test func whatIsNoRecordIsRefused() {
        var records = (0..<3).map { Self.record($0, of: 3) }
        records[2].put(0 as UInt32, at: 0)
        #expect(words(records).1 == "gather: must bring what this version of lplb wrote, got other bytes from rank 2")
        for status: Int64 in [1 << 32, .min] {  // which must not become LPLB_OK on the way
            records[2] = Self.record(2, of: 3)
            records[2].put(status, at: 32)
            #expect(words(records).1 == "gather: must bring what this version of lplb wrote, got other bytes from rank 2")
        }
        #expect(words([0, 2, 1].map { Self.record($0, of: 3) }).1.contains("entry 1 of rank 1, got that of rank 2"))
    }

    @Test func differingDigestsAreSaidAlike() {
        let digests: [Int32] = [5, 5, 6, 5, 7]
        let failure = disagreement("gathered", ranks: 5) { digests[$0] }
        #expect(failure.status == lplb_status(LPLB_ERROR_DISAGREEMENT))
        #expect(failure.message.hasSuffix("got another digest from ranks 2, 4 than from the other 3 of 5"))
    }
}
