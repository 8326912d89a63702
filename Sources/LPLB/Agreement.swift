// Agreement: the settings of all ranks compared, before their planners are made; and how the ranks lie on hosts.

import CLPLB
import LPLBPlacement
import LPLBSolver
import LPLBTopology

/// One rank's settings: 40 the planner's number; 160 the caller's settings [96]. Arrays travel as their hash; 0: there is none.
struct AgreementRecord: MeetingRecord {
    static let magic: UInt32 = 0x4C_50_41_47
    static let numbers = [
        "ep_size", "n_nodes", "group_size", "n_logical", "n_physical", "n_redundant", "solver", "policy", "r2o", "phy2log", "history", "unit",
    ]
    private static let arrays: Set = ["r2o", "phy2log", "history"]
    private static let settingsOffset = 160, settingsSize = 96

    var bytes: [UInt8]

    init(bytes: [UInt8]) { self.bytes = bytes }

    /// This rank's record. Whatever is wrong here goes into it, for all ranks to see.
    init(_ config: lplb_agree_config) {
        self.init(rank: config.rank)
        if let settings = config.settings {
            put(text: String(cString: settings), at: AgreementRecord.settingsOffset, room: AgreementRecord.settingsSize)
        }
        do throws(Failure) {
            if let words = config.failure { throw Failure(LPLB_ERROR_INVALID_ARGUMENT, String(cString: words)) }
            try describe(config)
        } catch {
            failure = error
        }
    }

    private mutating func describe(_ config: lplb_agree_config) throws(Failure) {
        let given = try PlannerSettings(reading: try Check.pointer(config.planner, "planner"))
        let shape = given.shape
        guard Int64(shape.epSize) == config.n_ranks else { throw Failure("ep_size", "must be n_ranks, \(config.n_ranks)", value: shape.epSize) }
        if let rank = given.rank, Int64(rank) != config.rank {
            throw Failure("rank", "must be this one's place among the ranks, \(config.rank)", value: rank)
        }
        isOnCuda = given.device >= 0
        var r2o = Hash(), phy2log = Hash(), history = Hash()
        if let topology = given.topology { r2o.add(topology.r2o) }
        if let values = config.phy2log {
            let slots = Array(UnsafeBufferPointer(start: try Check.pointer(values, "phy2log"), count: shape.nPhysical))
            _ = try translating { () throws(RuleViolation) in try Placement(shape: shape, phy2log: slots) }
            phy2log.add(slots)
        }
        if let values = config.history {
            let loads = Array(UnsafeBufferPointer(start: try Check.pointer(values, "history"), count: shape.nLogical))
            _ = try translating { () throws(RuleViolation) in try reorderByHistory(loads, shape: shape) }
            for load in loads { history.add(Int64(bitPattern: load.bitPattern)) }
        }
        put(given.number, at: 40)
        put(numbers: [
            Int64(shape.epSize), given.nodesGiven, Int64(shape.groupSize), Int64(shape.nLogical), Int64(shape.nPhysical),
            Int64(given.topology?.nRedundant ?? -1), Int64(given.solver), Int64(given.policy),
            given.topology == nil ? 0 : Int64(r2o.folded), config.phy2log == nil ? 0 : Int64(phy2log.folded),
            config.history == nil ? 0 : Int64(history.folded), given.unit == .expert ? Int64(LPLB_UNIT_EXPERTS) : given.unit.size,
        ])
    }

    var plannerNumber: Int64 { field(at: 40, Int64.self) }
    var settings: String { text(at: AgreementRecord.settingsOffset, room: AgreementRecord.settingsSize) }

    func words(ofNumber index: Int) -> String {
        let value = number(index)
        guard AgreementRecord.arrays.contains(AgreementRecord.numbers[index]) else { return String(value) }
        return value == 0 ? "none" : "one with digest \(value)"
    }
}

typealias Agreement = Meeting<AgreementRecord>

extension Agreement {
    /// Gathers the records of all ranks by the caller's function.
    init(_ config: lplb_agree_config) throws(Failure) {
        let gathering = try Gathering(config.gather, config.context, ranks: config.n_ranks, rank: config.rank)
        try self.init(AgreementRecord(config), gathering, "the settings")
    }

    /// Throws what is wrong, the same on all ranks.
    func check() throws(Failure) {
        try checkOrder()
        for (rank, record) in records.enumerated() {
            if let failure = record.failure { throw Failure(Int(failure.status), "rank \(rank): \(failure.message)") }
        }
        try checkNumbers()
        try equal("settings", { records[$0].settings }, { "'\(records[$0].settings)'" })
    }

    var number: Int64 { records.reduce(.min) { max($0, $1.plannerNumber) } }
}
