// Agreement: the settings of all ranks compared, before their planners are made; and how the ranks lie on hosts.

import CLPLB

/// Every rank's record, in rank order. All ranks hold the same, so all come to the same conclusion and the same words.
struct Agreement {
    let records: [AgreementRecord]

    /// Gathers the records of all ranks by the caller's function.
    init(_ config: lplb_agree_config) throws(Failure) {
        let ranks = try Check.range(config.n_ranks, "n_ranks", 1...Int64(LPLB_MAX_EP_SIZE))
        _ = try Check.range(config.rank, "rank", 0...Int64(ranks - 1))
        guard let gather = config.gather else { throw Failure("gather", "must not be NULL", value: "NULL") }
        let mine = AgreementRecord(config).bytes, size = AgreementRecord.size
        var all = [UInt8](repeating: 0, count: ranks * size)
        let status = all.withUnsafeMutableBytes { all in
            mine.withUnsafeBytes { gather(config.context, $0.baseAddress, all.baseAddress, Int64(size)) }
        }
        guard status == 0 else {
            throw Failure(LPLB_ERROR_PEER_LOST, "gather: must bring the settings of all ranks and return 0, got \(status)")
        }
        self.init(all.withUnsafeBytes { all in
            (0..<ranks).map { AgreementRecord(UnsafeRawBufferPointer(rebasing: all[$0 * size..<($0 + 1) * size])) }
        })
    }

    init(_ records: [AgreementRecord]) { self.records = records }

    /// Throws what is wrong, the same on all ranks.
    func check() throws(Failure) {
        for (rank, record) in records.enumerated() {
            guard record.isOurs else {
                throw Failure(LPLB_ERROR_DISAGREEMENT, "gather: must bring what this version of lplb wrote, got other bytes from rank \(rank)")
            }
            guard record.rank == Int64(rank) else {
                throw Failure("gather", "must bring the ranks in order, entry \(rank) of rank \(rank)", value: "that of rank \(record.rank)")
            }
        }
        for (rank, record) in records.enumerated() {
            if let failure = record.failure { throw Failure(Int(failure.status), "rank \(rank): \(failure.message)") }
        }
        for (index, name) in AgreementRecord.numbers.enumerated() {
            try equal(name, { records[$0].number(index) }, { records[$0].words(ofNumber: index) })
        }
        try equal("settings", { records[$0].settings }, { "'\(records[$0].settings)'" })
    }

    /// Throws if not all ranks have the same value; most ranks are taken to be right.
    private func equal<Value: Hashable>(_ name: String, _ value: (Int) -> Value, _ words: (Int) -> String) throws(Failure) {
        let ranks = records.indices
        guard let odd = ranks.first(where: { value($0) != value(0) }) else { return }
        var count: [Value: Int] = [:]
        for rank in ranks { count[value(rank), default: 0] += 1 }
        let common = count[value(odd), default: 0] > count[value(0), default: 0] ? odd : 0
        let others = ranks.filter { value($0) != value(common) }
        let more = others.count > 1 ? " (differing: \(listed(others)))" : ""
        throw Failure(
            LPLB_ERROR_DISAGREEMENT,
            "\(name): must be equal on all ranks, got \(words(others[0])) on rank \(others[0]) and \(words(common)) on rank \(common)\(more)")
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

    var number: Int64 { records.reduce(.min) { max($0, $1.plannerNumber) } }

    var allOnCuda: Bool { records.allSatisfy(\.isOnCuda) }
}
